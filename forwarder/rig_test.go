// This file is what the tests of the Router share: a node with two containers, a gateway and two peers on loopback.

package forwarder

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	gateway, gateway6 = "10.1.0.1", "fd00:1::1"
	outside           = "192.0.2.9"
	peerMTU           = 1472
	smallMTU          = 600
)

// rig is a Router that a test drives packet by packet, and who is around it.
type rig struct {
	*Router
	t              testing.TB
	a, b           *nettest.Device // containers
	portA, portB   *Port
	gw, egress     *nettest.Recorder
	peer, small    *net.UDPConn // 10.2/16 with peerMTU, and 10.3/16 with smallMTU
	stock          *net.UDPConn // 10.4/16, a peer that sends from any port
	peerCfg, other PeerConfig
	table          TableConfig
}

func udpSocket(t testing.TB) *net.UDPConn {
	t.Helper()
	return udpSocketOn(t, outer4)
}

func udpSocketOn(t testing.TB, f family) *net.UDPConn {
	t.Helper()
	loopback := [families]net.IP{outer4: net.IPv4(127, 0, 0, 1), outer6: net.IPv6loopback}
	c, err := net.ListenUDP(familySpecs[f].network, &net.UDPAddr{IP: loopback[f]})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetReadBuffer(4 << 20)
	return c
}

func addrPort(c *net.UDPConn) netip.AddrPort {
	a := c.LocalAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// newRouter's Router asks for as much as this machine grants a socket, and so has one lane.
func newRouter(t testing.TB, loops int) *Router {
	t.Helper()
	return newRouterAsking(t, loops, granted(t), nil)
}

// granted is the largest receive buffer in bytes that this machine grants a socket.
func granted(t testing.TB) int {
	t.Helper()
	n := grantedBuffer(defaultBuffer)
	if n == 0 {
		t.Fatal("the kernel does not say what it grants")
	}
	return n
}

func newRouterAsking(t testing.TB, loops, receiveBuffer int, v *VXLAN) *Router {
	t.Helper()
	return newRouterOn(t, loops, UnderlayConfig{ReceiveBuffer: receiveBuffer, VXLAN: v})
}

// newRouterOn is a Router on IPv4's loopback address, and on whatever c says.
func newRouterOn(t testing.TB, loops int, c UnderlayConfig) *Router {
	t.Helper()
	c.Addr = netip.MustParseAddrPort("127.0.0.1:0")
	r, err := NewRouter(Config{Log: slog.New(slog.DiscardHandler), Loops: loops, Underlay: c})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// alone is the prefix of one address.
func alone(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func newRig(t testing.TB) *rig {
	t.Helper()
	return newRigOn(t, newRouter(t, 1))
}

// newRigOn is a rig around r. Where that speaks VXLAN, the peers have the MAC addresses of vtepOf.
func newRigOn(t testing.TB, r *Router) *rig {
	t.Helper()
	g := &rig{
		Router: r, t: t, a: nettest.NewDevice(t), b: nettest.NewDevice(t), gw: nettest.NewRecorder(t), egress: nettest.NewRecorder(t),
		peer: udpSocket(t), small: udpSocket(t), stock: udpSocket(t),
	}
	port := func(name string, d *nettest.Device, addrs ...string) *Port {
		c := PortConfig{Name: name, MTU: 1500, Device: d}
		for _, a := range addrs {
			c.Sources = append(c.Sources, alone(netip.MustParseAddr(a)))
		}
		p, err := g.AddPort(c)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	g.portA, g.portB = port("a", g.a, containerA, containerA6), port("b", g.b, containerB)
	g.peerCfg = PeerConfig{Addr: addrPort(g.peer), MTU: peerMTU}
	g.other = PeerConfig{Addr: addrPort(g.small), MTU: smallMTU}
	stock := PeerConfig{Addr: addrPort(g.stock), MTU: peerMTU, AnyPort: true}
	if r.vxlan != nil {
		g.peerCfg.VTEP, g.other.VTEP, stock.VTEP = vtepOf(2), vtepOf(3), vtepOf(4)
		g.peerCfg.OuterChecksums, g.other.OuterChecksums = true, true
	}
	to := netip.MustParsePrefix
	g.table = TableConfig{
		Gateway: netip.MustParseAddr(gateway), Gateway6: netip.MustParseAddr(gateway6),
		Routes: []Route{
			{to(containerA + "/32"), ToPort(g.portA)},
			{to(containerA6 + "/128"), ToPort(g.portA)},
			{to(containerB + "/32"), ToPort(g.portB)},
			{to(gateway + "/32"), ToGateway(g.gw)},
			{to("10.1.0.0/16"), UnreachableHost},
			{to("10.0.0.0/8"), UnreachableNet},
			{to("10.2.0.0/16"), ToPeer(g.peerCfg)},
			{to("fd00:2::/64"), ToPeer(g.peerCfg)},
			{to("10.3.0.0/16"), ToPeer(g.other)},
			{to("10.4.0.0/16"), ToPeer(stock)},
			{to("fd00:1::/64"), UnreachableHost},
			{to("0.0.0.0/0"), ToEgress(g.egress)},
		},
	}
	g.set(g.table)
	return g
}

func (g *rig) set(c TableConfig) {
	g.t.Helper()
	if err := g.SetTable(c); err != nil {
		g.t.Fatal(err)
	}
}

// from forwards one batch of ingress in, on the goroutine of the test.
func (g *rig) from(in ingress, pkts ...*packet.Packet) {
	w := g.loops[0].worker
	w.begin()
	for _, p := range pkts {
		w.forward(p, &in)
	}
	w.end()
}

func (g *rig) fromA(pkts ...*packet.Packet) {
	g.from(ingress{kind: fromContainer, port: g.portA}, pkts...)
}

func (g *rig) fromPeer(c *net.UDPConn, pkts ...*packet.Packet) {
	g.from(ingress{kind: fromPeer, outer: addrPort(c)}, pkts...)
}

// arrived makes the Router take the n bytes in its first buffer as from a peer, in segments of size if that is not 0.
func (g *rig) arrived(from netip.AddrPort, n, size int) {
	l := g.loops[0]
	q := l.rxq
	q.msgs[0].Len = uint32(n)
	q.names[0] = sockaddrOf(from)
	q.msgs[0].Hdr.SetControllen(0)
	if size > 0 {
		h := unix.Cmsghdr{Level: unix.IPPROTO_UDP, Type: unix.UDP_GRO}
		h.SetLen(unix.CmsgLen(4))
		clear(q.ctls[0][:])
		*(*unix.Cmsghdr)(unsafe.Pointer(&q.ctls[0][0])) = h
		binary.NativeEndian.PutUint32(q.ctls[0][unix.CmsgLen(0):], uint32(size))
		q.msgs[0].Hdr.SetControllen(unix.CmsgSpace(4))
	}
	l.worker.begin()
	q.inOrderOfArrival(1)
	q.forward(l.worker, 1)
	l.worker.end()
}

// drops are the reasons counted so far, without the zeros.
func (g *rig) drops() map[string]uint64 {
	m := g.Stats().Drops
	for k, v := range m {
		if v == 0 {
			delete(m, k)
		}
	}
	return m
}

func (g *rig) wantDrops(want map[string]uint64) {
	g.t.Helper()
	got := g.drops()
	if len(got) != len(want) {
		g.t.Fatalf("drops %v, want %v", got, want)
	}
	for k, v := range want {
		if got[k] != v {
			g.t.Fatalf("drops %v, want %v", got, want)
		}
	}
}

// datagrams takes what the Router sent to c, in order. Loopback delivers within the call that sends, or soon after it on a
// busy machine.
func datagrams(t testing.TB, c *net.UDPConn) (out [][]byte) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) {
		for {
			got := waiting(int(fd))
			out = append(out, got...)
			if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20); n == 0 && err == nil {
				return
			}
		}
	})
	return out
}

// waiting takes the datagrams that a socket holds now.
func waiting(fd int) (out [][]byte) {
	b := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT)
		if err != nil {
			return out
		}
		out = append(out, bytes.Clone(b[:n]))
	}
}

func udp(src, dst string, size int) []byte {
	return nettest.Between(src, dst).UDP(nettest.UDP{SrcPort: 1000, DstPort: 2000}, nettest.Payload(size))
}

func pkt(ip []byte) *packet.Packet { return nettest.Packet(ip) }
