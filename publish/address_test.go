// Tests of as whom a container sees a client.

package publish

import (
	"net/netip"
	"testing"
)

func TestRoute_KeepsTheClientsAddressWhereItMay(t *testing.T) {
	addr := netip.MustParseAddr
	dual := Addresses{
		Container4: addr("10.5.1.2"), Container6: addr("fd00:5:1::2"), Gateway4: addr("10.5.1.1"), Gateway6: addr("fd00:5:1::1"),
		Overlay: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/32")},
	}
	only4, only6 := dual, dual
	only4.Container6, only4.Gateway6 = netip.Addr{}, netip.Addr{}
	only6.Container4, only6.Gateway4 = netip.Addr{}, netip.Addr{}
	noGateway6 := dual
	noGateway6.Gateway6 = netip.Addr{}

	for _, c := range []struct {
		name     string
		a        Addresses
		client   string
		snat     bool
		from, to string // from "": refused
	}{
		{"IPv4", dual, "203.0.113.7:5555", false, "203.0.113.7:5555", "10.5.1.2:80"},
		{"IPv4, privileged port", dual, "203.0.113.7:80", false, "203.0.113.7:80", "10.5.1.2:80"},
		{"IPv4 of a private network", dual, "192.168.1.9:5555", false, "192.168.1.9:5555", "10.5.1.2:80"},
		{"IPv6", dual, "[2001:db8::7]:5555", false, "[2001:db8::7]:5555", "[fd00:5:1::2]:80"},
		{"IPv4 written as IPv6", dual, "[::ffff:203.0.113.7]:5555", false, "203.0.113.7:5555", "10.5.1.2:80"},
		{"snat", dual, "203.0.113.7:5555", true, "10.5.1.1:0", "10.5.1.2:80"},
		{"snat, IPv6", dual, "[2001:db8::7]:5555", true, "[fd00:5:1::1]:0", "[fd00:5:1::2]:80"},
		{"loopback", dual, "127.0.0.1:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"loopback, another address", dual, "127.8.9.1:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"loopback, IPv6", dual, "[::1]:5555", false, "[fd00:5:1::1]:0", "[fd00:5:1::2]:80"},
		{"loopback written as IPv6", dual, "[::ffff:127.0.0.1]:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"link-local", dual, "169.254.1.1:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"link-local, IPv6", dual, "[fe80::1%2]:5555", false, "[fd00:5:1::1]:0", "[fd00:5:1::2]:80"},
		{"a container's address", dual, "10.5.9.9:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"a container's IPv6 address", dual, "[fd00:5:9::9]:5555", false, "[fd00:5:1::1]:0", "[fd00:5:1::2]:80"},
		{"the container's own", dual, "10.5.1.2:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"multicast", dual, "224.0.0.1:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"broadcast", dual, "255.255.255.255:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"no address", dual, "0.0.0.0:68", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"this network", dual, "0.1.2.3:68", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"port 0", dual, "203.0.113.7:0", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"IPv6 client, IPv4 container", only4, "[2001:db8::7]:5555", false, "10.5.1.1:0", "10.5.1.2:80"},
		{"IPv4 client, IPv6 container", only6, "203.0.113.7:5555", false, "[fd00:5:1::1]:0", "[fd00:5:1::2]:80"},
		{"IPv6 client kept without a gateway of IPv6", noGateway6, "[2001:db8::7]:5555", false, "[2001:db8::7]:5555", "[fd00:5:1::2]:80"},
		{"IPv6 loopback without a gateway of IPv6", noGateway6, "[::1]:5555", false, "", ""},
		{"a container without an address", Addresses{}, "203.0.113.7:5555", false, "", ""},
	} {
		from, to, ok := c.a.route(netip.MustParseAddrPort(c.client), 80, c.snat)
		switch {
		case c.from == "":
			if ok {
				t.Errorf("%s: %s is seen as %v", c.name, c.client, from)
			}
		case !ok || from.String() != c.from || to.String() != c.to:
			t.Errorf("%s: %s is seen as %v at %v (%v), want %s at %s", c.name, c.client, from, to, ok, c.from, c.to)
		}
	}
}
