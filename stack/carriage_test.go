// This file tests how datagrams are carried on: TTL, fragments, and the errors that come back about them.

package stack

import (
	"encoding/binary"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// receiveHops is a UDP socket that is told TTLs and hop limits of what it receives.
func receiveHops(t *testing.T, at netip.Addr) (port uint16, next func() int) {
	t.Helper()
	family, level, option := unix.AF_INET, unix.IPPROTO_IP, unix.IP_RECVTTL
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: to4(at)}
	if at.Is6() {
		family, level, option = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT
		sa = &unix.SockaddrInet6{Addr: at.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	tv := unix.NsecToTimeval(int64(patience))
	for _, err := range []error{
		unix.SetsockoptInt(fd, level, option, 1), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv), unix.Bind(fd, sa),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	switch n := name.(type) {
	case *unix.SockaddrInet4:
		port = uint16(n.Port)
	case *unix.SockaddrInet6:
		port = uint16(n.Port)
	}
	return port, func() int {
		t.Helper()
		var control [64]byte
		_, n, _, _, err := unix.Recvmsg(fd, make([]byte, 16), control[:], 0)
		if err != nil {
			t.Fatal(err)
		}
		msgs, err := unix.ParseSocketControlMessage(control[:n])
		if err != nil || len(msgs) != 1 {
			t.Fatalf("%v, %v", msgs, err)
		}
		return int(binary.NativeEndian.Uint32(msgs[0].Data))
	}
}

// makeUDP6 is makeUDP for IPv6.
func makeUDP6(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, header.IPv6MinimumSize+header.UDPMinimumSize+len(payload))
	header.IPv6(b).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(b) - header.IPv6MinimumSize), TransportProtocol: header.UDPProtocolNumber, HopLimit: 64,
		SrcAddr: tcpipAddr(src.Addr()), DstAddr: tcpipAddr(dst.Addr()),
	})
	u := header.UDP(b[header.IPv6MinimumSize:])
	u.SetSourcePort(src.Port())
	u.SetDestinationPort(dst.Port())
	u.SetLength(uint16(len(u)))
	copy(u[header.UDPMinimumSize:], payload)
	fixTransport(b)
	return b
}

func withTTL(b []byte, ttl uint8, flags uint8) []byte {
	h := header.IPv4(b)
	h.SetTTL(ttl)
	h.SetFlagsFragmentOffset(flags, 0)
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	return b
}

func TestUDP_TTLIsCarriedOn(t *testing.T) {
	if !inOwnNamespace(t) {
		return
	}
	w := newWire(t, nil)
	port, next := receiveHops(t, loopback)
	for _, ttl := range []uint8{64, 3, 3, 255, 1} { // of one flow
		w.send(withTTL(makeUDP(netip.AddrPortFrom(aliceAddr, 7), netip.AddrPortFrom(loopback, port), []byte("x")), ttl, 0))
		if got := next(); got != int(ttl) {
			t.Errorf("TTL %d arrived as %d", ttl, got)
		}
	}
	port, next = receiveHops(t, netip.IPv6Loopback())
	for _, hops := range []uint8{64, 3, 1} {
		b := makeUDP6(netip.AddrPortFrom(aliceAddr6, 7), netip.AddrPortFrom(netip.IPv6Loopback(), port), []byte("x"))
		b[7] = hops
		w.send(b)
		if got := next(); got != int(hops) {
			t.Errorf("hop limit %d arrived as %d", hops, got)
		}
	}
}

// What must not be fragmented and is larger than the host's path takes is refused with the path's MTU; anything else is cut.
func TestUDP_TooBigIsToldWithTheMTU(t *testing.T) {
	if !inOwnNamespace(t) {
		return
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		t.Fatal(err)
	}
	const mtu = 1300
	host, host6 := netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8::10")
	addToLoopback(t, host, host6)
	setLoopbackMTU(t, mtu)
	w := newWire(t, nil)
	at, from := sources(t, host)
	at6, from6 := sources(t, host6)
	data := make([]byte, 1400)
	w.send(withTTL(makeUDP(netip.AddrPortFrom(aliceAddr, 7), at, data), 64, header.IPv4FlagDontFragment))
	w.send(withTTL(makeEcho(aliceAddr, host, 9, 1, string(data)), 64, header.IPv4FlagDontFragment))
	w.send(makeUDP6(netip.AddrPortFrom(aliceAddr6, 7), at6, data))
	tooBigs := func() (n4, n6 int) {
		w.countSeen(func(o observed) bool {
			switch b := o.b[o.in.transport:]; {
			case o.in.proto == protoICMP && header.ICMPv4(b).Code() == header.ICMPv4FragmentationNeeded &&
				header.ICMPv4(b).MTU() == mtu && o.in.src == gatewayAddr:
				n4++
			case o.in.proto == protoICMPv6 && header.ICMPv6(b).Type() == header.ICMPv6PacketTooBig &&
				header.ICMPv6(b).MTU() == mtu && o.in.src == gatewayAddr6:
				n6++
			}
			return false
		})
		return n4, n6
	}
	eventually(t, "the errors", func() bool { n4, n6 := tooBigs(); return n4 == 2 && n6 == 1 })
	if len(from)+len(from6) != 0 {
		t.Error("a datagram that is too big arrived")
	}
	// Of the same flows: one that may be fragmented, and one that the container has fragmented.
	w.send(withTTL(makeUDP(netip.AddrPortFrom(aliceAddr, 7), at, data), 64, 0))
	for _, f := range fragments6(makeUDP6(netip.AddrPortFrom(aliceAddr6, 7), at6, data), 1280) {
		w.send(f)
	}
	eventually(t, "the datagrams", func() bool { return len(from) == 1 && len(from6) == 1 })
	if n4, n6 := tooBigs(); n4 != 2 || n6 != 1 {
		t.Errorf("%d and %d errors, want 2 and 1", n4, n6)
	}
}

// fragments6 is fragments for an IPv6 packet without extension headers.
func fragments6(b []byte, mtu int) (out [][]byte) {
	payload := b[header.IPv6MinimumSize:]
	size := (mtu - header.IPv6MinimumSize - header.IPv6FragmentHeaderSize) &^ 7
	for at := 0; at < len(payload); at += size {
		n := min(size, len(payload)-at)
		f := append([]byte(nil), b[:header.IPv6MinimumSize]...)
		f = append(f, f[6], 0, 0, 0, 0, 0, 0, 77)
		f[6] = uint8(header.IPv6FragmentHeader)
		offset := uint16(at)
		if at+n < len(payload) {
			offset |= 1
		}
		binary.BigEndian.PutUint16(f[42:], offset)
		f = append(f, payload[at:at+n]...)
		binary.BigEndian.PutUint16(f[4:], uint16(len(f)-header.IPv6MinimumSize))
		out = append(out, f)
	}
	return out
}

// A container that says that nobody is there any more ends the flow, so that the host says it too.
func TestUDP_ARefusalByTheContainerReachesTheFlow(t *testing.T) {
	w := newWire(t, nil)
	at := listenUDP(t, same)
	src := netip.AddrPortFrom(aliceAddr, 7)
	w.send(makeUDP(src, at, []byte("x")))
	reply := makeUDP(at, src, []byte("x"))
	eventually(t, "the flow", func() bool { return w.g.Stats().UDPFlows == 1 })
	w.send(portUnreachable.message(true).over4(reply, bobAddr.As4(), at.Addr().As4()))
	if n := w.g.Stats().UDPFlows; n != 1 {
		t.Error("another container has ended the flow")
	}
	w.send(portUnreachable.message(true).over4(reply, aliceAddr.As4(), at.Addr().As4()))
	eventually(t, "the end of the flow", func() bool { return w.g.Stats().UDPFlows == 0 })
}

func TestOutsideError_BecomesTheMessageThatItWas(t *testing.T) {
	router, router6 := netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8::7")
	for _, tt := range []struct {
		e    outsideError
		want icmpError
		ok   bool
	}{
		{outsideError{is4: true, typ: 11, from: router}, icmpError{typ: 11}, true},
		{outsideError{is4: true, typ: 3, code: 13, from: router}, icmpError{typ: 3, code: 13}, true},
		{outsideError{is4: true, typ: 3, code: 4, extra: 1400, from: router}, icmpError{typ: 3, code: 4, rest: 1400}, true},
		{outsideError{is4: true, typ: 12, extra: 9, from: router}, icmpError{typ: 12, rest: 9 << 24}, true},
		{outsideError{is4: true, typ: 4, from: router}, icmpError{}, false}, // source quench is a thing of the past (RFC 6633)
		{outsideError{typ: 1, code: 6, from: router6}, icmpError{typ: 1, code: 6}, true},
		{outsideError{typ: 2, extra: 1400, from: router6}, icmpError{typ: 2, rest: 1400}, true},
		{outsideError{typ: 2, extra: 1000, from: router6}, icmpError{typ: 2, rest: 1280}, true},
		{outsideError{typ: 3, from: router6}, icmpError{typ: 3}, true},
		{outsideError{typ: 4, code: 1, extra: 40, from: router6}, icmpError{typ: 4, code: 1, rest: 40}, true},
		{outsideError{typ: 128, from: router6}, icmpError{}, false},
		{outsideError{is4: true, errno: unix.EMSGSIZE, extra: 1400}, icmpError{typ: 3, code: 4, rest: 1400}, true},
		{outsideError{errno: unix.EMSGSIZE, extra: 1400}, icmpError{typ: 2, rest: 1400}, true},
		{outsideError{errno: unix.EPERM}, icmpError{}, false},
	} {
		if m, ok := tt.e.message(); ok != tt.ok || ok && m != tt.want {
			t.Errorf("%+v: %+v, %v", tt.e, m, ok)
		}
	}
}

// An error about one of many datagrams on the way quotes that one.
func TestSentDatagrams_AreToldApart(t *testing.T) {
	var s sentDatagrams
	var udp [3][]byte
	for i := range udp {
		payload := []byte{'n', byte(i)}
		udp[i] = makeUDP(netip.AddrPortFrom(aliceAddr, 7), netip.MustParseAddrPort("192.0.2.1:33434"), payload)
		binary.BigEndian.PutUint16(udp[i][4:], uint16(100+i)) // the identification
		s.note(datagram{payload: payload, quote: udp[i][:28], carriage: carriage{hops: uint8(i + 1)}}, false)
	}
	for i := range udp {
		if got := s.quote([]byte{'n', byte(i)}); string(got) != string(udp[i]) {
			t.Errorf("datagram %d: %x, want %x", i, got, udp[i])
		}
	}
	if got := s.quote(nil); string(got) != string(udp[2][:28]) { // a router that quotes no more than it must
		t.Errorf("without payload: %x", got)
	}
	var echoes sentDatagrams
	for i := range 20 {
		b := makeEcho(aliceAddr, bobAddr, 9, uint16(i), "ping")
		echoes.note(datagram{payload: b[20:], quote: b[:28], carriage: carriage{hops: 64}}, true)
	}
	about := makeEcho(aliceAddr, bobAddr, 4711, 7, "ping")[20:] // with the host's identifier
	if got, want := echoes.quote(about), makeEcho(aliceAddr, bobAddr, 9, 7, "ping"); string(got) != string(want) {
		t.Errorf("echo: %x, want %x", got, want)
	}
}

func FuzzParseError(f *testing.F) {
	f.Add([]byte{})
	f.Fuzz(func(_ *testing.T, b []byte) {
		if e, ok := parseError(b); ok {
			e.message()
		}
	})
}
