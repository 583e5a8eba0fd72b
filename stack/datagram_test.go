// This file tests egress UDP and ping.

package stack

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func same(b []byte) []byte { return b }

func TestUDP_CarriesDatagramsOfAllSizes(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	conn := c.dialUDP(listenUDP(t, same))
	defer conn.Close()
	for _, size := range []int{0, 1, 1400, testMTU, 9000, 65507} { // the larger ones are fragments both ways
		data := randomBytes(size)
		if _, err := conn.Write(data); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 70000)
		n, err := conn.Read(got)
		if err != nil || !bytes.Equal(got[:n], data) {
			t.Fatalf("size %d: %d bytes, %v", size, n, err)
		}
	}
	if s := w.g.Stats(); s.UDPFlows != 1 || s.UDPOpened != 1 {
		t.Errorf("stats: %+v", s)
	}
}

func TestUDP_ClosedPortIsReported(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	conn := c.dialUDP(closedPort(t))
	defer conn.Close()
	if _, err := conn.Write([]byte("anybody?")); err != nil {
		t.Fatal(err)
	}
	// A Read of gonet that waits already would not be woken by an error.
	eventually(t, "port unreachable", func() bool {
		return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4PortUnreachable) == 1
	})
	eventually(t, "the container's socket is told", func() bool {
		_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
		_, err := conn.Read(make([]byte, 1))
		return err != nil && strings.Contains(err.Error(), "refused")
	})
}

// A flow whose first datagram was refused still carries those that come when somebody listens.
func TestUDP_FlowOutlivesARefusal(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	at := closedPort(t)
	conn := c.dialUDP(at)
	defer conn.Close()
	_, _ = conn.Write([]byte("early"))
	eventually(t, "the refusal", func() bool {
		return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4PortUnreachable) == 1
	})
	s, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		t.Skip("the port has been taken by another process")
	}
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(patience))
	_, _ = conn.Write([]byte("again"))
	_, _ = conn.Write([]byte("again")) // the first write may only fetch the error
	buf := make([]byte, 16)
	if n, _, err := s.ReadFromUDPAddrPort(buf); string(buf[:n]) != "again" {
		t.Errorf("the host got %q, %v", buf[:n], err)
	}
}

func TestUDP_IdleFlowsExpire(t *testing.T) {
	w := newWire(t, func(c *Config) {
		c.Timeouts.UDP = 50 * time.Millisecond
	})
	c := w.container(aliceAddr)
	conn := c.dialUDP(listenUDP(t, same))
	defer conn.Close()
	silent := c.dialUDP(listenUDP(t, func([]byte) []byte { return nil }))
	defer silent.Close()
	for range 2 { // a flow that has expired begins anew
		_, _ = conn.Write([]byte("a"))
		_, _ = silent.Write([]byte("a"))
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the flows expire", func() bool { return w.g.Stats().UDPFlows == 0 })
	}
	if s := w.g.Stats(); s.UDPOpened != 4 {
		t.Errorf("%d flows opened, want 4", s.UDPOpened)
	}
}

func TestUDP_LimitsBiteAndCount(t *testing.T) {
	w := newWire(t, func(c *Config) { c.Limits.UDPFlows = 3; c.Limits.UDPFlowsEach = 2 })
	at := listenUDP(t, same)
	for _, who := range []netip.Addr{aliceAddr, bobAddr} {
		for i := range uint16(3) {
			w.send(makeUDP(netip.AddrPortFrom(who, 100+i), at, []byte("x")))
		}
	}
	if s := w.g.Stats(); s.UDPFlows != 3 || w.drops(dropContainerShare) != 1 || w.drops(dropUDPFlows) != 2 {
		t.Errorf("%d flows, drops %v; want 3, 1 for the share, 2 for the limit", s.UDPFlows, s.Drops)
	}
}

func TestUDP_SuperpacketsAreCut(t *testing.T) {
	w := newWire(t, nil)
	var sizes = make(chan string, 16)
	at := listenUDP(t, func(b []byte) []byte { sizes <- string(b); return nil })
	b := makeUDP(netip.AddrPortFrom(aliceAddr, 7), at, []byte("aaaabbbbcc"))
	p := &packet.Packet{Buf: append(make([]byte, packet.Headroom), b...), Off: packet.Headroom,
		GSO: packet.GSOUDP, SegSize: 4, HdrLen: 28, NeedsCsum: true, CsumStart: 20, CsumOffset: 6}
	w.g.Send(packet.NewScratch(), []*packet.Packet{p})
	for _, want := range []string{"aaaa", "bbbb", "cc"} {
		select {
		case got := <-sizes:
			if got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("%q never came", want)
		}
	}
}

func TestUDP_WrongChecksumIsDropped(t *testing.T) {
	w := newWire(t, nil)
	b := makeUDP(netip.AddrPortFrom(aliceAddr, 7), listenUDP(t, same), []byte("data"))
	b[len(b)-1] ^= 1
	w.send(b)
	if s := w.g.Stats(); s.UDPOpened != 0 || s.Drops["bad-checksum"] != 1 {
		t.Errorf("stats: %+v", s)
	}
}

func TestEcho_GatewayAnswersForItself(t *testing.T) {
	w := newWire(t, nil)
	for i, a := range []netip.Addr{gatewayAddr, gatewayAddr0} {
		w.send(makeEcho(aliceAddr, a, 9, uint16(i), "hello"))
		eventually(t, "the reply", func() bool { return w.icmpSeen(header.ICMPv4EchoReply, 0) == i+1 })
	}
}

func TestGateway_AddressesChangeWhileItRuns(t *testing.T) {
	w := newWire(t, nil)
	now := netip.MustParseAddr("10.9.9.1")
	if err := w.g.SetAddresses([]netip.Addr{now}); err != nil {
		t.Fatal(err)
	}
	w.send(makeEcho(aliceAddr, now, 9, 1, "hello"))
	eventually(t, "the reply", func() bool { return w.icmpSeen(header.ICMPv4EchoReply, 0) == 1 })
	if err := w.g.SetAddresses(nil); err == nil {
		t.Error("no addresses at all were taken")
	}
}

// The rest runs in a namespace of its own, where ping_group_range is ours to set: the test starts itself again in new user
// and network namespaces.

const inNamespace = "STACK_TEST_IN_NAMESPACE"

// inOwnNamespace says whether the test is where it belongs, with the loopback up. If not it has run the test there.
func inOwnNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inNamespace) == t.Name() {
		loopbackUp(t)
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), inNamespace+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if err != nil && len(out) == 0 {
		t.Skipf("no namespaces here: %v", err)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("in the namespace: %v\n%s", err, out)
	}
	return false
}

func loopbackUp(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		t.Fatalf("loopback up: %v", err)
	}
}

func TestEcho_GoesOutByTheHost(t *testing.T) {
	if !inOwnNamespace(t) {
		return
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		t.Fatal(err)
	}
	w := newWire(t, nil)
	to := netip.MustParseAddr("127.0.0.7")
	big := strings.Repeat("0123456789", 400)
	for i, data := range []string{"hello", "", big} {
		for _, f := range fragments(makeEcho(aliceAddr, to, 4711, uint16(i), data), 1400) {
			w.send(f)
		}
		eventually(t, "the reply", func() bool {
			return w.countSeen(func(o observed) bool {
				if o.in.proto != protoICMP || o.in.later || o.in.src != to || o.in.dst != aliceAddr {
					return false
				}
				h := header.ICMPv4(o.b[o.in.transport:])
				return h.Type() == header.ICMPv4EchoReply && h.Ident() == 4711 && h.Sequence() == uint16(i)
			}) == 1
		})
	}
	if s := w.g.Stats(); s.EchoFlows != 1 || s.EchoOpened != 1 {
		t.Errorf("stats: %+v", s)
	}
	// There is no route out of this namespace: nothing may answer for the address, and the container is told.
	nobody := netip.MustParseAddr("192.0.2.1")
	w.send(makeEcho(aliceAddr, nobody, 1, 1, "hello"))
	eventually(t, "network unreachable", func() bool {
		return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4NetUnreachable) == 1
	})
	w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 1), netip.AddrPortFrom(nobody, 1), []byte("x")))
	w.send(makeTCP(netip.AddrPortFrom(aliceAddr, 1), netip.AddrPortFrom(nobody, 1), header.TCPFlagSyn, 1))
	eventually(t, "the same for UDP and TCP", func() bool {
		return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4NetUnreachable) == 3
	})
	if n := w.countSeen(func(o observed) bool { return o.in.src == nobody }); n != 0 {
		t.Errorf("%d packets came from an address that nobody has", n)
	}
}

func TestEcho_IPv6GoesOutByTheHost(t *testing.T) {
	if !inOwnNamespace(t) {
		return
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		t.Fatal(err)
	}
	w := newWire(t, nil)
	to := netip.IPv6Loopback()
	for i, dst := range []netip.Addr{to, gatewayAddr6} {
		w.send(makeEcho6(aliceAddr6, dst, 4711, uint16(i), "hello"))
		eventually(t, "the reply", func() bool {
			return w.countSeen(func(o observed) bool {
				if o.in.proto != protoICMPv6 || o.in.src != dst || o.in.dst != aliceAddr6 {
					return false
				}
				h := header.ICMPv6(o.b[o.in.transport:])
				return h.Type() == header.ICMPv6EchoReply && h.Ident() == 4711 && h.Sequence() == uint16(i)
			}) == 1
		})
	}
	if s := w.g.Stats(); s.EchoOpened != 1 { // the gateway answers for itself
		t.Errorf("stats: %+v", s)
	}
}

func TestEcho_IsNeverMadeUpWhereTheHostForbids(t *testing.T) {
	if !inOwnNamespace(t) { // a new namespace forbids it to everybody
		return
	}
	w := newWire(t, nil)
	to := netip.MustParseAddr("127.0.0.7")
	for i := range uint16(2) {
		w.send(makeEcho(aliceAddr, to, 4711, i, "hello"))
	}
	eventually(t, "administratively prohibited", func() bool {
		return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4AdminProhibited) == 2
	})
	if n := w.icmpSeen(header.ICMPv4EchoReply, 0); n != 0 {
		t.Errorf("%d forged replies", n)
	}
	if n := strings.Count(w.log.String(), "ping_group_range"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, w.log)
	}
	if n := w.drops(dropEchoForbidden); n != 2 {
		t.Errorf("%d drops counted, want 2", n)
	}
}

// fragments cuts an IPv4 packet as a sender with that MTU does.
func fragments(b []byte, mtu int) [][]byte {
	if len(b) <= mtu {
		return [][]byte{b}
	}
	var out [][]byte
	payload := b[header.IPv4MinimumSize:]
	for at := 0; at < len(payload); {
		n := min((mtu-header.IPv4MinimumSize)&^7, len(payload)-at)
		f := append(bytes.Clone(b[:header.IPv4MinimumSize]), payload[at:at+n]...)
		h := header.IPv4(f)
		h.SetTotalLength(uint16(len(f)))
		h.SetID(77)
		var flags uint8
		if at+n < len(payload) {
			flags = header.IPv4FlagMoreFragments
		}
		h.SetFlagsFragmentOffset(flags, uint16(at))
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		out = append(out, f)
		at += n
	}
	return out
}

// errorsFrom counts the ICMP errors about closed ports that came from an address.
func (w *wire) errorsFrom(from netip.Addr) int {
	return w.countSeen(func(o observed) bool {
		if o.in.src != from {
			return false
		}
		switch t := o.b[o.in.transport:]; o.in.proto {
		case protoICMP:
			return header.ICMPv4(t).Type() == header.ICMPv4DstUnreachable && header.ICMPv4(t).Code() == header.ICMPv4PortUnreachable
		case protoICMPv6:
			return header.ICMPv6(t).Type() == header.ICMPv6DstUnreachable && header.ICMPv6(t).Code() == header.ICMPv6PortUnreachable
		}
		return false
	})
}

func TestUDP_ErrorsComeFromWhoSaysThem(t *testing.T) {
	if !inOwnNamespace(t) {
		return
	}
	host, host6 := netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8::10")
	addToLoopback(t, host, host6)
	w := newWire(t, nil)
	const closedUDP = 9
	for _, tt := range []struct{ container, to, from netip.Addr }{
		{aliceAddr, host, host},
		{aliceAddr6, host6, host6},
		{aliceAddr, netip.MustParseAddr("127.0.0.7"), gatewayAddr}, // the host's loopback has no name in a container
	} {
		c := w.containers[tt.container]
		if c == nil {
			c = w.container(tt.container)
		}
		conn := c.dialUDP(netip.AddrPortFrom(tt.to, closedUDP))
		defer conn.Close()
		for i := range 3 { // the error of one datagram may be told by the next one's send
			if _, err := conn.Write([]byte("x")); err != nil { // of the datagram before; nothing has been sent
				_, _ = conn.Write([]byte("x"))
			}
			eventually(t, "an error from "+tt.from.String(), func() bool { return w.errorsFrom(tt.from) == i+1 })
		}
	}
	if n := w.countSeen(func(o observed) bool { return o.in.proto == protoICMP || o.in.proto == protoICMPv6 }); n != 9 {
		t.Errorf("%d ICMP messages, want 9", n)
	}
}

func TestErrors_NeverComeFromWhatIsClosed(t *testing.T) {
	w := newWire(t, func(c *Config) { c.LinkLocal = true }) // the loopback is open, too
	router := netip.MustParseAddr("198.51.100.7")
	orig := makeUDP(netip.AddrPortFrom(aliceAddr, 1), netip.MustParseAddrPort("192.0.2.1:1"), []byte("x"))
	for _, from := range []string{"127.0.0.1", "169.254.1.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "2001:db8::1", "::1"} {
		w.g.live.Load().sendErrorFrom(netip.MustParseAddr(from), portUnreachable, orig)
	}
	w.g.live.Load().sendErrorFrom(router, portUnreachable, orig)
	eventually(t, "the errors", func() bool { return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4PortUnreachable) == 8 })
	if g, r := w.errorsFrom(gatewayAddr), w.errorsFrom(router); g != 7 || r != 1 {
		t.Errorf("%d errors from the gateway and %d from the router, want 7 and 1", g, r)
	}
}
