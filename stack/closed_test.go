// This file tests what containers may not reach, and how they are told.

package stack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestJudge_ClosesByDefault(t *testing.T) {
	for _, c := range []struct {
		addr               string
		want, withLoopback verdict
		withLinkLocal      verdict
	}{
		{"192.0.2.1", open, open, open},
		{"10.0.0.1", open, open, open},
		{"192.168.1.10", open, open, open},
		{"240.0.0.1", open, open, open},
		{"127.0.0.1", closed, open, closed},
		{"127.255.255.254", closed, open, closed},
		{"0.0.0.0", closed, closed, closed},
		{"0.1.2.3", closed, closed, closed},
		{"169.254.169.254", closed, closed, open},
		{"169.254.0.1", closed, closed, open},
		{"224.0.0.1", silence, silence, silence},
		{"239.255.255.250", silence, silence, silence},
		{"255.255.255.255", silence, silence, silence},
		{"2001:db8::1", open, open, open},
		{"fd00::1", open, open, open},
		{"::1", closed, open, closed},
		{"::", closed, closed, closed},
		{"fe80::1", closed, closed, open},
		{"febf::1", closed, closed, open},
		{"fd00:ec2::254", closed, closed, open},
		{"ff02::1", silence, silence, silence},
		{"::ffff:127.0.0.1", closed, closed, closed},
		{"::ffff:192.0.2.1", closed, closed, closed},
		{"::127.0.0.1", closed, open, closed},
		{"64:ff9b::127.0.0.1", closed, open, closed},
		{"64:ff9b::169.254.169.254", closed, closed, open},
		{"64:ff9b::192.0.2.1", open, open, open},
		{"::ffff:0:127.0.0.1", closed, open, closed},
		{"64:ff9b:1::192.0.2.1", open, open, open}, // a prefix of 96 bits
		{"64:ff9b:1::127.0.0.1", closed, open, closed},
		{"64:ff9b:1:1:2:3:192.0.2.1", open, open, open},
		{"64:ff9b:1:1:2:3:169.254.169.254", closed, closed, open},
		{"64:ff9b:1:a9fe:a9:fe00::", closed, closed, open}, // of 48: 169.254.169.254
		{"64:ff9b:1:c000:2:100::", open, open, open},       // 192.0.2.1
		{"64:ff9b:1:7f:0:100::", closed, open, closed},     // of 56: 127.0.0.1
		{"64:ff9b:1:1:7f:0:100:0", closed, open, closed},   // of 64: 127.0.0.1
		{"64:ff9b:1::", closed, closed, closed},
	} {
		a := netip.MustParseAddr(c.addr)
		if got := (&Config{}).judge(a); got != c.want {
			t.Errorf("%s: %d, want %d", c.addr, got, c.want)
		}
		if got := (&Config{HostLoopback: true}).judge(a); got != c.withLoopback {
			t.Errorf("%s with HostLoopback: %d, want %d", c.addr, got, c.withLoopback)
		}
		if got := (&Config{LinkLocal: true}).judge(a); got != c.withLinkLocal {
			t.Errorf("%s with LinkLocal: %d, want %d", c.addr, got, c.withLinkLocal)
		}
	}
}

func TestClosed_IsAnsweredAndCounted(t *testing.T) {
	w := newWire(t, func(c *Config) { c.HostLoopback = false })
	touched := make(chan string, 8)
	tcpServer := listenTCP(t, func(s *net.TCPConn) { touched <- "tcp" })
	udpServer := listenUDP(t, func(b []byte) []byte { touched <- "udp"; return b })
	src := netip.AddrPortFrom(aliceAddr, 1234)
	meta := netip.MustParseAddrPort("169.254.169.254:80")
	for i, b := range [][]byte{
		makeTCP(src, tcpServer, header.TCPFlagSyn, 1),
		makeUDP(src, udpServer, []byte("x")),
		makeEcho(aliceAddr, loopback, 1, 1, "x"),
		makeTCP(src, meta, header.TCPFlagSyn, 1),
		makeUDP(src, meta, []byte("x")),
		makeUDP(src, netip.MustParseAddrPort("0.0.0.0:80"), []byte("x")),
	} {
		w.send(b)
		eventually(t, "administratively prohibited", func() bool {
			return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4AdminProhibited) == i+1
		})
		if n := w.drops(dropClosed); n != uint64(i+1) {
			t.Errorf("%d drops, want %d", n, i+1)
		}
	}
	// No errors about multicast, broadcast, and errors.
	before := w.countSeen(func(observed) bool { return true })
	w.send(makeUDP(src, netip.MustParseAddrPort("239.1.2.3:5353"), []byte("x")),
		makeUDP(src, netip.MustParseAddrPort("255.255.255.255:67"), []byte("x")),
		makeIPv4(protoICMP, aliceAddr, loopback, []byte{3, 3, 0, 0, 0, 0, 0, 0}))
	// The gateway is no door to the host's loopback either.
	c := w.container(aliceAddr)
	if _, err := c.dialTCP(netip.AddrPortFrom(gatewayAddr, tcpServer.Port())); err == nil {
		t.Error("the host's loopback was reached by the gateway's address")
	}
	if n := w.countSeen(func(o observed) bool { return o.in.proto == protoICMP }); n != before {
		t.Errorf("%d ICMP errors about what must have none", n-before)
	}
	if n := w.drops(dropMulticast); n != 2 {
		t.Errorf("%d drops of multicast and broadcast, want 2", n)
	}
	select {
	case what := <-touched:
		t.Errorf("the host's %s server was reached", what)
	default:
	}
}

// To a socket of the host, an IPv4-mapped address is the IPv4 one, which would get around what is denied at that.
func TestClosed_MappedAddresses(t *testing.T) {
	w := newWire(t, nil)
	at := listenUDP(t, same)
	mapped := netip.AddrPortFrom(netip.AddrFrom16(loopback.As16()), at.Port())
	w.send(makeUDP6(netip.AddrPortFrom(aliceAddr6, 7), mapped, []byte("x")))
	if n := w.drops(dropClosed); n != 1 || w.g.Stats().UDPFlows != 0 {
		t.Errorf("%d drops, want 1; %+v", n, w.g.Stats())
	}
}

func TestClosed_IPv6(t *testing.T) {
	w := newWire(t, func(c *Config) { c.HostLoopback = false })
	c := w.container(aliceAddr6)
	conn := c.dialUDP(netip.MustParseAddrPort("[fd00:ec2::254]:80"))
	defer conn.Close()
	_, _ = conn.Write([]byte("x"))
	eventually(t, "administratively prohibited", func() bool {
		return w.countSeen(func(o observed) bool {
			if o.in.proto != protoICMPv6 || o.in.src != gatewayAddr6 || o.in.dst != aliceAddr6 {
				return false
			}
			h := header.ICMPv6(o.b[o.in.transport:])
			q, ok := parseQuote(h[8:])
			return h.Type() == header.ICMPv6DstUnreachable && h.Code() == header.ICMPv6Prohibited && ok && q.src == aliceAddr6
		}) == 1
	})
	other := c.dialUDP(netip.AddrPortFrom(gatewayAddr6, 9))
	defer other.Close()
	_, _ = other.Write([]byte("x"))
	eventually(t, "port unreachable", func() bool {
		return w.countSeen(func(o observed) bool {
			return o.in.proto == protoICMPv6 && header.ICMPv6(o.b[o.in.transport:]).Code() == header.ICMPv6PortUnreachable
		}) == 1
	})
}

func TestHostLoopback_IsReachedByTheGatewaysAddress(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = s.Write([]byte("hello")) })
	conn := c.mustDialTCP(netip.AddrPortFrom(gatewayAddr, server.Port()))
	defer conn.Close()
	if got, err := io.ReadAll(conn); string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
	u := c.dialUDP(netip.AddrPortFrom(gatewayAddr, listenUDP(t, same).Port()))
	defer u.Close()
	_, _ = u.Write([]byte("ping"))
	buf := make([]byte, 16)
	if n, err := u.Read(buf); string(buf[:n]) != "ping" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
}

func TestDeny_ClosesOnTheDirectWayAndByTheGateway(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = s.Write([]byte("x")) })
	u := listenUDP(t, same)
	w.g.Deny([]netip.AddrPort{server, netip.AddrPortFrom(loopback, u.Port())})
	for i, to := range []netip.AddrPort{server, netip.AddrPortFrom(gatewayAddr, server.Port())} {
		if _, err := c.dialTCP(to); err == nil {
			t.Errorf("%v was reached", to)
		}
		w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 1), netip.AddrPortFrom(to.Addr(), u.Port()), []byte("x")))
		if n := w.drops(dropDenied); n != uint64(2*(i+1)) {
			t.Errorf("%d drops, want %d", n, 2*(i+1))
		}
	}
	if s := w.g.Stats(); s.TCPOpened+s.UDPOpened != 0 {
		t.Errorf("stats: %+v", s)
	}
	// Others stay open, and it can be taken back.
	c.mustDialTCP(listenTCP(t, func(s *net.TCPConn) {})).Close()
	w.g.Deny(nil)
	c.mustDialTCP(server).Close()
	w.g.Deny([]netip.AddrPort{netip.AddrPortFrom(loopback, 0)})
	if _, err := c.dialTCP(server); err == nil {
		t.Error("an address denied on all ports was reached")
	}
}

// All of 127/8 is this host's, and no list has it all.
func TestDeny_ClosesEveryAddressOfTheHost(t *testing.T) {
	for _, everywhere := range []string{"0.0.0.0", "::", "::ffff:0.0.0.0"} {
		w := newWire(t, nil)
		c := w.container(aliceAddr)
		l, err := net.Listen("tcp4", "0.0.0.0:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		port := l.Addr().(*net.TCPAddr).AddrPort().Port()
		at := func(a string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(a), port) }
		c.mustDialTCP(at("127.0.0.1")).Close()
		w.g.Deny([]netip.AddrPort{at(everywhere)})
		for _, a := range []string{"127.0.0.1", "127.9.8.7", gatewayAddr.String()} {
			if _, err := c.dialTCP(at(a)); err == nil {
				t.Errorf("%s: %s was reached", everywhere, a)
			}
		}
		w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 1), at("127.0.0.1"), []byte("x")))
		w.send(makeEcho(aliceAddr, netip.MustParseAddr("127.0.0.1"), 1, 1, "x")) // no port is every port, not this one
		if n := w.drops(dropDenied); n != 4 {
			t.Errorf("%d drops, want 4", n)
		}
		// Others stay open: other ports of the host, and the port elsewhere.
		c.mustDialTCP(listenTCP(t, func(*net.TCPConn) {})).Close()
		if w.g.denied(at("192.0.2.1")) || w.g.denied(at("2001:db8::1")) {
			t.Error("the port of another host is denied")
		}
		w.g.Deny([]netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(everywhere), 0)})
		w.send(makeEcho(aliceAddr, netip.MustParseAddr("127.0.0.1"), 1, 2, "x"))
		if n := w.drops(dropDenied); n != 5 {
			t.Errorf("%d drops, want 5", n)
		}
	}
}

// What is denied when the host answers is denied, though it was not when the container called.
func TestDeny_ClosesWhatIsBeingDialled(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback.As4()}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	server := netip.AddrPortFrom(loopback, uint16(sa.(*unix.SockaddrInet4).Port))
	filler, err := net.Dial("tcp4", server.String()) // the only place in the queue: who comes next calls again every second
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	dialled := make(chan error, 1)
	go func() {
		_, err := c.dialTCP(server)
		dialled <- err
	}()
	eventually(t, "it is dialled", func() bool { return w.g.Stats().TCPHalfOpen == 1 })
	w.g.Deny([]netip.AddrPort{netip.AddrPortFrom(netip.IPv4Unspecified(), server.Port())})
	conn, _, err := unix.Accept(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(conn)
	if err := <-dialled; err == nil {
		t.Error("the server was reached")
	}
	if w.drops(dropDenied) == 0 { // more if the container's SYN came again
		t.Error("no drop was counted")
	}
}

func TestReceive_UnknownProtocolsAreRefused(t *testing.T) {
	w := newWire(t, nil)
	dst := netip.MustParseAddr("192.0.2.1")
	w.send(makeIPv4(132, aliceAddr, dst, make([]byte, 12))) // SCTP
	eventually(t, "protocol unreachable", func() bool {
		return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4ProtoUnreachable) == 1
	})
	w.send(makeIPv4(protoICMP, aliceAddr, dst, []byte{13, 0, 0, 0, 0, 0, 0, 0})) // timestamp
	if n := w.drops(dropICMPType); n != 1 {
		t.Errorf("%d drops, want 1", n)
	}
}

// An ICMP error must quote what a container's kernel looks for: addresses, ports, and the SYN's sequence number.
func TestSendError_QuotesThePacket(t *testing.T) {
	w := newWire(t, func(c *Config) { c.HostLoopback = false })
	src, dst := netip.AddrPortFrom(aliceAddr, 4242), netip.MustParseAddrPort("127.0.0.1:80")
	w.send(makeTCP(src, dst, header.TCPFlagSyn, 0xdecade))
	eventually(t, "the error", func() bool {
		return w.countSeen(func(o observed) bool {
			if o.in.proto != protoICMP || o.in.src != gatewayAddr || o.in.dst != aliceAddr {
				return false
			}
			q := o.b[o.in.transport+8:]
			in, _ := parseIP(q)
			h := header.TCP(q[20:])
			return in.src == aliceAddr && in.dst == loopback && h.SourcePort() == 4242 && h.SequenceNumber() == 0xdecade
		}) == 1
	})
}

func TestSend_BeforeAndAfterRunDropsAndCounts(t *testing.T) {
	w := newWire(t, nil)
	g := w.g
	ns := g.live.Swap(nil)
	w.send(makeEcho(aliceAddr, gatewayAddr, 1, 1, "x"))
	g.live.Store(ns)
	if n := w.drops(dropNotRunning); n != 1 {
		t.Errorf("%d drops, want 1", n)
	}
	if err := g.Run(t.Context()); !errors.Is(err, ErrRunning) {
		t.Errorf("a second Run: %v", err)
	}
}

func TestNew_RefusesWhatCannotWork(t *testing.T) {
	exit := newWire(t, nil).exit
	for name, c := range map[string]Config{
		"no exit":              {Addresses: []netip.Addr{gatewayAddr}, MTU: 1450},
		"no address":           {MTU: 1450, Exit: exit},
		"small MTU":            {Addresses: []netip.Addr{gatewayAddr}, MTU: 500, Exit: exit},
		"large MTU":            {Addresses: []netip.Addr{gatewayAddr}, MTU: 70000, Exit: exit},
		"small MTU for IPv6":   {Addresses: []netip.Addr{gatewayAddr, gatewayAddr6}, MTU: 1200, Exit: exit},
		"loopback as address":  {Addresses: []netip.Addr{loopback}, MTU: 1450, Exit: exit},
		"multicast as address": {Addresses: []netip.Addr{netip.MustParseAddr("224.0.0.1")}, MTU: 1450, Exit: exit},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
