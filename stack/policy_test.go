// This file tests what single containers may reach: the outside, and ports of the host.

package stack

import (
	"io"
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func prefixes(list ...string) (p []netip.Prefix) {
	for _, s := range list {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

func TestEgress_AllowsWhatItLists(t *testing.T) {
	for _, c := range []struct {
		allow []netip.Prefix
		dst   string
		want  bool
	}{
		{nil, "192.0.2.1", false},
		{nil, "2001:db8::1", false},
		{prefixes("192.0.2.0/24"), "192.0.2.1", true},
		{prefixes("192.0.2.0/24"), "192.0.3.1", false},
		{prefixes("192.0.2.0/24"), "2001:db8::1", false},
		{prefixes("192.0.2.0/24"), "64:ff9b::192.0.2.1", true},
		{prefixes("192.0.2.0/24", "::/0"), "64:ff9b::192.0.3.1", false},
		{prefixes("::/0"), "64:ff9b::192.0.2.1", false},
		{prefixes("::/0"), "::ffff:0:192.0.2.1", false},
		{prefixes("::/0"), "64:ff9b:1::192.0.2.1", false},
		{prefixes("192.0.2.0/24"), "64:ff9b:1::192.0.2.1", true},
		{prefixes("192.0.2.0/24"), "64:ff9b:1:c633:64:100:192.0.2.1", false}, // 198.51.100.1 if the prefix has 48 bits
		{prefixes("::/0"), "::192.0.2.1", false},
		{prefixes("::/0"), "192.0.2.1", false},
		{prefixes("::/0"), "2001:db8::1", true},
		{prefixes("0.0.0.0/0"), "192.0.2.1", true},
		{prefixes("0.0.0.0/0"), "2001:db8::1", false},
		{prefixes("2001:db8::/32", "10.0.0.0/8"), "2001:db8::1", true},
		{prefixes("2001:db8::/32", "10.0.0.0/8"), "10.9.9.9", true},
		{prefixes("2001:db8::/32", "10.0.0.0/8"), "2001:db9::1", false},
	} {
		if got := (&Egress{Allow: c.allow}).allows(netip.MustParseAddr(c.dst)); got != c.want {
			t.Errorf("%s with %v: %v, want %v", c.dst, c.allow, got, c.want)
		}
	}
}

func TestEgress_IsRefusedWhenAFlowBegins(t *testing.T) {
	w := newWire(t, nil) // the servers are on loopback, which is the outside here
	alice, bob := w.container(aliceAddr), w.container(bobAddr)
	server, u := listenTCP(t, func(s *net.TCPConn) { _, _ = io.Copy(s, s) }), listenUDP(t, same)
	src := netip.AddrPortFrom(aliceAddr, 1234)
	attempts := [][]byte{
		makeTCP(src, server, header.TCPFlagSyn, 1),
		makeUDP(src, u, []byte("x")),
		makeEcho(aliceAddr, loopback, 1, 1, "x"),
	}
	low := makeUDP(netip.AddrPortFrom(aliceAddr, 1235), u, []byte("x")) // as traceroute sends it
	low[8] = 1
	h := header.IPv4(low)
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	attempts = append(attempts, low)

	early := alice.mustDialTCP(server)
	defer early.Close()
	w.g.SetPolicy([]netip.Addr{aliceAddr, aliceAddr6}, Policy{Egress: &Egress{}})
	for i, b := range attempts {
		w.send(b)
		eventually(t, "administratively prohibited", func() bool {
			return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4AdminProhibited) == i+1
		})
		if n := w.drops(dropEgress); n != uint64(i+1) {
			t.Errorf("%d drops, want %d", n, i+1)
		}
	}
	if _, err := early.Write([]byte("x")); err != nil {
		t.Errorf("a connection from before: %v", err)
	}
	if _, err := io.ReadFull(early, make([]byte, 1)); err != nil {
		t.Errorf("a connection from before: %v", err)
	}
	// IPv6 alike; the gateway itself and other containers are not concerned.
	w.send(makeEcho6(aliceAddr6, netip.MustParseAddr("2001:db8::1"), 1, 1, "x"))
	eventually(t, "the drop", func() bool { return w.drops(dropEgress) == uint64(len(attempts)+1) })
	w.send(makeEcho(aliceAddr, gatewayAddr, 7, 1, "x"))
	eventually(t, "the gateway's answer", func() bool { return w.icmpSeen(header.ICMPv4EchoReply, 0) == 1 })
	bob.mustDialTCP(server).Close()

	w.g.SetPolicy([]netip.Addr{aliceAddr}, Policy{Egress: &Egress{Allow: prefixes("127.0.0.0/8")}})
	alice.mustDialTCP(server).Close()
	w.g.SetPolicy([]netip.Addr{aliceAddr}, Policy{Egress: &Egress{Allow: prefixes("10.0.0.0/8")}})
	if _, err := alice.dialTCP(server); err == nil {
		t.Error("a destination that is not listed was reached")
	}
	w.g.DropPolicy([]netip.Addr{aliceAddr, aliceAddr6})
	alice.mustDialTCP(server).Close()
}

// What is closed to all stays closed, whatever a list says.
func TestEgress_OpensNothingThatIsClosed(t *testing.T) {
	w := newWire(t, func(c *Config) { c.HostLoopback = false })
	server := listenTCP(t, func(*net.TCPConn) {})
	w.g.SetPolicy([]netip.Addr{aliceAddr}, Policy{Egress: &Egress{Allow: prefixes("0.0.0.0/0")}})
	alice := w.container(aliceAddr)
	for _, to := range []netip.AddrPort{server, netip.MustParseAddrPort("169.254.169.254:80")} {
		if _, err := alice.dialTCP(to); err == nil {
			t.Errorf("%v was reached", to)
		}
	}
	if n := w.drops(dropClosed); n == 0 {
		t.Error("nothing was refused as closed")
	}
}

func TestResolves_NothingWithoutEgress(t *testing.T) {
	w := newWire(t, nil)
	w.g.SetPolicy([]netip.Addr{aliceAddr}, Policy{Egress: &Egress{}})
	w.g.SetPolicy([]netip.Addr{bobAddr}, Policy{Egress: &Egress{Allow: prefixes("192.0.2.0/24")}})
	for a, want := range map[netip.Addr]bool{aliceAddr: false, bobAddr: true, aliceAddr6: true} {
		if got := w.g.resolves(a); got != want {
			t.Errorf("%v: %v, want %v", a, got, want)
		}
	}
}

func TestHostPorts_AreOpenToWhoAsked(t *testing.T) {
	w := newWire(t, func(c *Config) { c.HostLoopback = false })
	alice, bob := w.container(aliceAddr), w.container(bobAddr)
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = s.Write([]byte("hello")) })
	other := listenTCP(t, func(*net.TCPConn) {})
	u := listenUDP(t, same)
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(gatewayAddr, port) }
	// Egress says nothing of the host's ports.
	w.g.SetPolicy([]netip.Addr{aliceAddr, aliceAddr6}, Policy{HostPorts: []uint16{server.Port(), u.Port(), dnsPort}, Egress: &Egress{}})

	conn := alice.mustDialTCP(at(server.Port()))
	defer conn.Close()
	if got, err := io.ReadAll(conn); string(got) != "hello" {
		t.Errorf("TCP: got %q, %v", got, err)
	}
	c := alice.dialUDP(at(u.Port()))
	defer c.Close()
	_, _ = c.Write([]byte("ping"))
	buf := make([]byte, 16)
	if n, err := c.Read(buf); string(buf[:n]) != "ping" {
		t.Errorf("UDP: got %q, %v", buf[:n], err)
	}
	for what, closed := range map[string]struct {
		c  *container
		to netip.AddrPort
	}{
		"another port":           {alice, at(other.Port())},
		"the loopback itself":    {alice, server},
		"another container":      {bob, at(server.Port())},
		"a peer's container":     {w.container(netip.MustParseAddr("10.5.2.2")), at(server.Port())},
		"IPv6, nobody listening": {w.container(aliceAddr6), netip.AddrPortFrom(gatewayAddr6, server.Port())},
	} {
		if _, err := closed.c.dialTCP(closed.to); err == nil {
			t.Errorf("%s was reached", what)
		}
	}

	w.g.Deny([]netip.AddrPort{server})
	if _, err := alice.dialTCP(at(server.Port())); err == nil {
		t.Error("a denied port was reached")
	}
	w.g.Deny(nil)
	alice.mustDialTCP(at(server.Port())).Close()
	w.g.DropPolicy([]netip.Addr{aliceAddr, aliceAddr6})
	if _, err := alice.dialTCP(at(server.Port())); err == nil {
		t.Error("the port is open after the policy was dropped")
	}
}

func TestHostPorts_OfIPv6LeadToItsLoopback(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("this host has no IPv6 loopback")
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("six"))
			_ = c.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	w := newWire(t, func(c *Config) { c.HostLoopback = false })
	w.g.SetPolicy([]netip.Addr{aliceAddr6}, Policy{HostPorts: []uint16{port}})
	conn := w.container(aliceAddr6).mustDialTCP(netip.AddrPortFrom(gatewayAddr6, port))
	defer conn.Close()
	if got, err := io.ReadAll(conn); string(got) != "six" {
		t.Errorf("got %q, %v", got, err)
	}
}
