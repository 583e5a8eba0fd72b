// Tests of the choice and of the overlaps on made-up hosts, and of reading in a real network namespace.

package hostnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func ip(s string) netip.Addr       { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// fixed is addresses set by hand.
func fixed(ips ...string) []addr {
	var as []addr
	for _, s := range ips {
		as = append(as, addr{ip: ip(s), flags: unix.IFA_F_PERMANENT})
	}
	return as
}

func testHost() network {
	return network{
		ifaces: []iface{
			{name: "lo", index: 1, mtu: 65536, addrs: fixed("127.0.0.1")},
			{name: "eth0", index: 2, mtu: 1500, addrs: slices.Concat(
				fixed("169.254.7.7", "192.0.2.10", "192.0.2.11", "fe80::7"),
				[]addr{
					{ip: ip("2001:db8:1::1"), flags: unix.IFA_F_PERMANENT | unix.IFA_F_DADFAILED},
					{ip: ip("2001:db8:1::2"), flags: unix.IFA_F_PERMANENT | unix.IFA_F_TENTATIVE},
					{ip: ip("2001:db8:1::3"), flags: unix.IFA_F_TEMPORARY},
					{ip: ip("2001:db8:1::4"), flags: unix.IFA_F_DEPRECATED},
					{ip: ip("2001:db8:1::5")},
				})},
			{name: "eth1", index: 3, mtu: 9000, addrs: []addr{
				{ip: ip("198.51.100.5"), flags: unix.IFA_F_PERMANENT | unix.IFA_F_DEPRECATED},
				{ip: ip("198.51.100.6")},
				{ip: ip("198.51.100.7"), flags: unix.IFA_F_PERMANENT},
				{ip: ip("fe80::7"), flags: unix.IFA_F_PERMANENT},
			}},
			{name: "bare0", index: 4, mtu: 1500, addrs: fixed("2001:db8:4::1")},
			{name: "tun0", index: 5, mtu: 0, addrs: fixed("10.99.0.1")},
		},
		routes: []route{
			{dst: prefix("192.0.2.0/24"), index: 2, main: true},
			{dst: prefix("0.0.0.0/0"), index: 3}, // of another table
			{dst: prefix("0.0.0.0/0"), index: 2, main: true},
			{dst: prefix("0.0.0.0/0"), index: 3, main: true},
			{dst: prefix("10.20.0.0/16"), index: 3, main: true},
			{dst: prefix("10.20.0.0/16"), index: 3}, // the same again
			{dst: prefix("100.64.0.0/10"), index: 5},
			{dst: prefix("fd00:1::/32"), index: 2, main: true},
			{dst: prefix("::/0"), index: 2, main: true},
		},
		reach: func(dst netip.Addr) (int, netip.Addr, error) {
			switch dst {
			case ip("203.0.113.1"):
				return 3, ip("198.51.100.6"), nil
			case ip("2001:db8:9::1"):
				return 2, ip("2001:db8:1::3"), nil
			case ip("203.0.113.2"): // the kernel need not name a source
				return 2, netip.Addr{}, nil
			}
			return 0, netip.Addr{}, unix.ENETUNREACH
		},
	}
}

func TestExternal_ChoosesAsFlannelDoes(t *testing.T) {
	eth0 := Ext{Name: "eth0", Index: 2, MTU: 1500, Addr: ip("192.0.2.10"), PublicIP: ip("192.0.2.10"), Addr6: ip("2001:db8:1::5"), PublicIPv6: ip("2001:db8:1::5")}
	eth1 := Ext{Name: "eth1", Index: 3, MTU: 9000, Addr: ip("198.51.100.7"), PublicIP: ip("198.51.100.7")}
	at := func(e Ext, addr, public string) Ext {
		e.Addr, e.PublicIP = ip(addr), ip(public)
		return e
	}
	at6 := func(e Ext, addr, public string) Ext {
		e.Addr6, e.PublicIPv6 = ip(addr), ip(public)
		return e
	}
	noAddr6 := func(e Ext, public string) Ext {
		e.Addr6, e.PublicIPv6 = netip.Addr{}, ip(public)
		return e
	}
	for _, tt := range []struct {
		name string
		o    Options
		want Ext
	}{
		{"first default route of the main table", Options{}, eth0},
		{"public IP chooses the interface", Options{PublicIP: ip("192.0.2.11")}, at(eth0, "192.0.2.11", "192.0.2.11")},
		{"public IP may be a deprecated address", Options{PublicIP: ip("198.51.100.5")}, at(eth1, "198.51.100.5", "198.51.100.5")},
		{"name", Options{Iface: []string{"eth1"}}, eth1},
		{"address", Options{Iface: []string{"198.51.100.6"}}, at(eth1, "198.51.100.6", "198.51.100.6")},
		{"second name", Options{Iface: []string{"wlan0", "bare0", "eth1", "eth0"}}, eth1},
		{"name with a public IP behind NAT", Options{Iface: []string{"eth1"}, PublicIP: ip("203.0.113.9")}, at(eth1, "198.51.100.7", "203.0.113.9")},
		{"expression on an address, best first", Options{IfaceRegex: []string{`^192\.0\.2\.`}}, eth0},
		{"expression on an address beats one on a name", Options{IfaceRegex: []string{`eth0|198\.51\.100\.6`}}, at(eth1, "198.51.100.6", "198.51.100.6")},
		{"expression on a name", Options{IfaceRegex: []string{`^eth1$`}}, eth1},
		{"second expression", Options{IfaceRegex: []string{`^wlan`, `^eth0$`}}, eth0},
		{"names before expressions", Options{IfaceRegex: []string{`^eth0$`}, Iface: []string{"eth1"}}, eth1},
		{"expressions before the route", Options{IfaceRegex: []string{`^eth0$`}, CanReach: ip("203.0.113.1")}, eth0},
		{"route", Options{CanReach: ip("203.0.113.1")}, at(eth1, "198.51.100.6", "198.51.100.6")},
		{"route as the last resort", Options{Iface: []string{"wlan0"}, CanReach: ip("203.0.113.1")}, at(eth1, "198.51.100.6", "198.51.100.6")},
		{"IPv4 in IPv6 text", Options{PublicIP: ip("::ffff:192.0.2.10")}, eth0},
		{"public IP is another address of the named interface", Options{Iface: []string{"eth0"}, PublicIP: ip("192.0.2.11")}, at(eth0, "192.0.2.11", "192.0.2.11")},
		{"no source of the route", Options{CanReach: ip("203.0.113.2")}, eth0},
		{"IPv6 public IP chooses the interface", Options{PublicIPv6: ip("2001:db8:1::3")}, at6(eth0, "2001:db8:1::3", "2001:db8:1::3")},
		{"IPv6 public IP of another host", Options{PublicIP: ip("192.0.2.10"), PublicIPv6: ip("2001:db8:f::1")}, at6(eth0, "2001:db8:1::5", "2001:db8:f::1")},
		{"IPv6 public IP beside the public IP", Options{PublicIP: ip("192.0.2.11"), PublicIPv6: ip("2001:db8:1::4")}, at6(at(eth0, "192.0.2.11", "192.0.2.11"), "2001:db8:1::4", "2001:db8:1::4")},
		{"IPv6 public IP beside a name", Options{Iface: []string{"eth1"}, PublicIPv6: ip("2001:db8:1::3")}, noAddr6(eth1, "2001:db8:1::3")},
		{"IPv6 address", Options{Iface: []string{"2001:db8:1::3"}}, at6(eth0, "2001:db8:1::3", "2001:db8:1::3")},
		{"link-local address with its zone", Options{Iface: []string{"fe80::7%eth1"}}, eth1},
		{"IPv6 address of an interface without IPv4", Options{Iface: []string{"2001:db8:4::1", "eth1"}}, eth1},
		{"expression on an IPv6 address", Options{IfaceRegex: []string{`^2001:db8:[14]::3?`}}, at6(eth0, "2001:db8:1::5", "2001:db8:1::5")},
		{"expression on addresses of both families", Options{IfaceRegex: []string{`^192\.0\.2\.11$|:3$`}}, at6(at(eth0, "192.0.2.11", "192.0.2.11"), "2001:db8:1::3", "2001:db8:1::3")},
		{"expression on a name beats one on an IPv6 address", Options{IfaceRegex: []string{`^2001:|^eth1`}}, eth1},
		{"addresses in use stay", Options{InUse: []netip.Addr{ip("192.0.2.11"), ip("2001:db8:1::3")}}, at6(at(eth0, "192.0.2.11", "192.0.2.11"), "2001:db8:1::3", "2001:db8:1::3")},
		{"a link-local address in use does not", Options{InUse: []netip.Addr{ip("169.254.7.7")}}, eth0},
		{"nor one that is deprecated", Options{Iface: []string{"eth1"}, InUse: []netip.Addr{ip("198.51.100.5"), ip("2001:db8:1::4")}}, eth1},
		{"nor one of another interface", Options{InUse: []netip.Addr{ip("198.51.100.6")}}, eth0},
		{"an expression on addresses prefers one in use", Options{IfaceRegex: []string{`^192\.0\.2\.`}, InUse: []netip.Addr{ip("192.0.2.11")}}, at(eth0, "192.0.2.11", "192.0.2.11")},
		{"route to an IPv6 address", Options{CanReach: ip("2001:db8:9::1")}, at6(eth0, "2001:db8:1::3", "2001:db8:1::3")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := testHost().external(tt.o)
			if err != nil || got != tt.want {
				t.Errorf("got %+v, %v\nwant %+v", got, err, tt.want)
			}
		})
	}
}

func TestExternal_SaysWhatToDo(t *testing.T) {
	noRoute := testHost()
	noRoute.routes = nil
	for _, tt := range []struct {
		name  string
		host  network
		o     Options
		texts []string
	}{
		{"no default route", noRoute, Options{}, []string{"--iface", "--public-ip", "eth0 169.254.7.7 192.0.2.10"}},
		{"nothing at all", network{}, Options{}, []string{"--iface", "none"}},
		{"public IP of nobody", testHost(), Options{PublicIP: ip("203.0.113.9")}, []string{"203.0.113.9", "--iface", "NAT"}},
		{"no such name", testHost(), Options{Iface: []string{"wlan0"}}, []string{"--iface wlan0", "eth1"}},
		{"no address", testHost(), Options{Iface: []string{"bare0"}}, []string{"--iface bare0"}},
		{"no match", testHost(), Options{IfaceRegex: []string{"^wlan"}}, []string{"--iface-regex ^wlan"}},
		{"broken expression", testHost(), Options{IfaceRegex: []string{"("}}, []string{"--iface-regex ("}},
		{"no route to it", testHost(), Options{CanReach: ip("192.168.1.1")}, []string{"--iface-can-reach 192.168.1.1", "unreachable"}},
		{"no MTU", testHost(), Options{Iface: []string{"tun0"}}, []string{"tun0", "MTU"}},
		{"IPv6 public IP", testHost(), Options{PublicIP: ip("2001:db8::1")}, []string{"2001:db8::1", "IPv4"}},
		{"IPv4 as the IPv6 public IP", testHost(), Options{PublicIPv6: ip("192.0.2.10")}, []string{"192.0.2.10", "IPv6"}},
		{"mapped IPv4 as the IPv6 public IP", testHost(), Options{PublicIPv6: ip("::ffff:192.0.2.10")}, []string{"192.0.2.10", "IPv6"}},
		{"link-local IPv6 public IP", testHost(), Options{PublicIPv6: ip("fe80::7")}, []string{"fe80::7", "IPv6"}},
		{"loopback public IP", testHost(), Options{Iface: []string{"eth0"}, PublicIP: ip("127.0.0.1")}, []string{"127.0.0.1", "eth0 has 192.0.2.10"}},
		{"link-local public IP", testHost(), Options{Iface: []string{"eth0"}, PublicIP: ip("169.254.1.1")}, []string{"169.254.1.1", "cannot send"}},
		{"multicast public IP", testHost(), Options{Iface: []string{"eth0"}, PublicIP: ip("224.0.0.1")}, []string{"224.0.0.1", "cannot send"}},
		{"broadcast public IP", testHost(), Options{Iface: []string{"eth0"}, PublicIP: ip("255.255.255.255")}, []string{"255.255.255.255", "cannot send"}},
		{"unspecified public IP", testHost(), Options{Iface: []string{"eth0"}, PublicIP: ip("0.0.0.0")}, []string{"0.0.0.0", "cannot send"}},
		{"loopback IPv6 public IP", testHost(), Options{Iface: []string{"eth0"}, PublicIPv6: ip("::1")}, []string{"::1", "cannot send"}},
		{"multicast IPv6 public IP", testHost(), Options{Iface: []string{"eth0"}, PublicIPv6: ip("ff02::1")}, []string{"ff02::1", "cannot send"}},
		{"IPv6 public IP of nobody", testHost(), Options{PublicIPv6: ip("2001:db8:f::1")}, []string{"2001:db8:f::1", "--iface", "--public-ipv6", "NAT"}},
		{"IPv6 public IP of an interface without IPv4", testHost(), Options{PublicIPv6: ip("2001:db8:4::1")}, []string{"bare0", "IPv4"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.host.external(tt.o)
			if !errors.Is(err, ErrNoInterface) {
				t.Fatalf("got %+v, %v", got, err)
			}
			for _, text := range tt.texts {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not say %q", err, text)
				}
			}
		})
	}
}

func TestOverlaps_FindsRoutesAndNameServers(t *testing.T) {
	files := map[string]string{
		"/etc/resolv.conf":                 "# made by hand\nsearch x\nnameserver 127.0.0.53\n nameserver\t10.20.0.2 # main\nnameserver nonsense\nnameserver\n",
		"/run/systemd/resolve/resolv.conf": "nameserver 10.20.0.2\nnameserver 100.100.1.1\nnameserver fd00:1::53%eth0\n",
	}
	read := func(name string) ([]byte, error) {
		if s, ok := files[name]; ok {
			return []byte(s), nil
		}
		return nil, fs.ErrNotExist
	}
	for _, tt := range []struct {
		overlay string
		want    []string
	}{
		{"10.5.0.0/16", nil},
		{"10.20.0.0/16", []string{"route to 10.20.0.0/16 over eth1", "name server 10.20.0.2 (/etc/resolv.conf)"}},
		{"10.0.0.0/8", []string{"route to 10.20.0.0/16 over eth1", "name server 10.20.0.2 (/etc/resolv.conf)"}},
		{"10.20.7.0/24", []string{"route to 10.20.0.0/16 over eth1"}},
		{"100.100.0.0/16", []string{"route to 100.64.0.0/10 over tun0", "name server 100.100.1.1 (/run/systemd/resolve/resolv.conf)"}},
		{"127.0.0.0/24", []string{"name server 127.0.0.53 (/etc/resolv.conf)"}},
		{"fd00:1::/48", []string{"route to fd00:1::/32 over eth0", "name server fd00:1::53 (/run/systemd/resolve/resolv.conf)"}},
	} {
		found, err := testHost().overlaps(prefix(tt.overlay), read)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, o := range found {
			got = append(got, o.String())
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s:\ngot  %q\nwant %q", tt.overlay, got, tt.want)
		}
	}
	files = nil
	if found, err := testHost().overlaps(prefix("192.168.0.0/16"), read); err != nil || len(found) != 0 {
		t.Errorf("without resolv.conf: %v, %v", found, err)
	}
}

func FuzzNameServers(f *testing.F) {
	f.Add([]byte("nameserver 10.0.0.1\nnameserver fe80::1%eth0\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, a := range nameServers(b) {
			if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
				t.Errorf("%v from %q", a, b)
			}
		}
	})
}

// realResult is what the test binary sees in a network namespace of its own.
type realResult struct {
	NoRoute, Err string
	Ext, Reach   Ext
	Overlaps     []string
	Has          []string
	Outside6     []bool
}

func TestMain(m *testing.M) {
	switch os.Getenv("HOSTNET_TEST_INSIDE") {
	case "":
	case "watch":
		watchInside()
	default:
		inside()
	}
	os.Exit(m.Run())
}

// inside sets up two interfaces, one without a way out, and asks.
func inside() {
	var r realResult
	run := func(args ...string) {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil && r.Err == "" {
			r.Err = fmt.Sprintf("ip %v: %v: %s", args, err, out)
		}
	}
	run("link", "add", "up0", "mtu", "1450", "type", "veth", "peer", "name", "far0")
	run("addr", "add", "192.0.2.10/24", "dev", "up0")
	run("link", "set", "up0", "up")
	run("addr", "add", "2001:db8:7::10/64", "dev", "up0", "nodad")
	run("link", "set", "far0", "up")
	r.Outside6 = append(r.Outside6, Outside6(""))
	run("route", "add", "default", "via", "2001:db8:7::1")
	r.Outside6 = append(r.Outside6, Outside6(""), Outside6("up0"), Outside6("far0"), Outside6("gone0"))
	if _, err := ExternalInterface(Options{}); err != nil {
		r.NoRoute = err.Error()
	}
	run("route", "add", "default", "via", "192.0.2.1")
	run("addr", "add", "10.30.1.1/24", "dev", "far0")
	run("route", "add", "10.40.0.0/16", "via", "10.30.1.2", "table", "77")
	run("route", "add", "blackhole", "10.50.0.0/16")
	var err error
	if r.Ext, err = ExternalInterface(Options{}); err != nil {
		r.Err = err.Error()
	}
	if r.Reach, err = ExternalInterface(Options{CanReach: ip("10.30.1.9")}); err != nil {
		r.Err = err.Error()
	}
	run("addr", "add", "192.0.2.11/24", "dev", "up0") // secondary
	run("route", "add", "local", "10.60.0.0/16", "dev", "lo")
	run("route", "add", "unreachable", "10.70.0.0/16")
	for _, a := range []string{
		"192.0.2.10", "192.0.2.11", "192.0.2.12", "2001:db8:7::10", "2001:db8:7::11", "2001:db8:9::1", "10.30.1.1", "10.60.1.1", "10.40.0.1", "10.50.0.1",
		"10.70.0.1", "::ffff:192.0.2.10", "198.51.100.1",
	} {
		has, err := Has(ip(a))
		if err != nil {
			r.Err = err.Error()
		}
		if has {
			r.Has = append(r.Has, a)
		}
	}
	for _, name := range []string{"up0", "up", "gone0"} {
		has, err := HasInterface(name)
		if err != nil {
			r.Err = err.Error()
		}
		if has {
			r.Has = append(r.Has, name)
		}
	}
	found, err := Overlaps(prefix("10.0.0.0/8"))
	if err != nil {
		r.Err = err.Error()
	}
	for _, o := range found {
		if o.File == "" {
			r.Overlaps = append(r.Overlaps, o.String())
		}
	}
	_ = json.NewEncoder(os.Stdout).Encode(r)
	os.Exit(0)
}

// runInside runs the test binary in a network namespace of its own, and returns what it prints. What it does there is TestMain's choice, by
// its name.
func runInside(t *testing.T, what string) []byte {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "HOSTNET_TEST_INSIDE="+what, "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
	}
	out, err := cmd.Output()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
		t.Skipf("user namespaces cannot be made here: %v", err)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

func TestHost_IsReadFromTheKernel(t *testing.T) {
	out := runInside(t, "read")
	var r realResult
	if err := json.Unmarshal(out, &r); err != nil || r.Err != "" {
		t.Fatalf("%v %s", err, r.Err)
	}
	if !strings.Contains(r.NoRoute, "--iface") || !strings.Contains(r.NoRoute, "up0 192.0.2.10") {
		t.Errorf("without a default route: %q", r.NoRoute)
	}
	if r.Ext.Name != "up0" || r.Ext.MTU != 1450 || r.Ext.Addr != ip("192.0.2.10") || r.Ext.PublicIP != ip("192.0.2.10") || r.Ext.Index == 0 {
		t.Errorf("external interface %+v", r.Ext)
	}
	if r.Ext.Addr6 != ip("2001:db8:7::10") || r.Ext.PublicIPv6 != r.Ext.Addr6 {
		t.Errorf("its IPv6 addresses %v, %v", r.Ext.Addr6, r.Ext.PublicIPv6)
	}
	if r.Reach.Name != "far0" || r.Reach.Addr != ip("10.30.1.1") {
		t.Errorf("interface to 10.30.1.9 is %+v", r.Reach)
	}
	if want := []bool{false, true, true, false, false}; !slices.Equal(r.Outside6, want) {
		t.Errorf("IPv6 to the outside: %v, want %v: without a default route, with one, by its interface, by another, by none", r.Outside6, want)
	}
	slices.Sort(r.Overlaps)
	if want := []string{"route to 10.30.1.0/24 over far0", "route to 10.40.0.0/16 over far0"}; !slices.Equal(r.Overlaps, want) {
		t.Errorf("overlaps %q, want %q", r.Overlaps, want)
	}
	if want := []string{"192.0.2.10", "192.0.2.11", "2001:db8:7::10", "10.30.1.1", "10.60.1.1", "::ffff:192.0.2.10", "up0"}; !slices.Equal(r.Has, want) {
		t.Errorf("the host has %q, want %q", r.Has, want)
	}
}
