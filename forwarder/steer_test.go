// This file tests the steering of packets to loops, by the kernel that does it.

package forwarder

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func newSteeredRouter(t *testing.T, loops int, v *VXLAN) *Router {
	t.Helper()
	r := newRouterAsking(t, loops, granted(t), v)
	if loops > 1 && !r.Steers() {
		t.Skip("this kernel attaches no program to a group of sockets")
	}
	return r
}

func TestSteer_KernelAgreesWithTheChoiceOfLoops(t *testing.T) {
	var addrs []string
	for _, host := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 100, 253, 254, 255, 256, 257, 1000, 0x7fff, 0x8000, 0xfffe, 0xffff} {
		addrs = append(addrs, fmt.Sprintf("10.1.%d.%d", host>>8, host&0xff), fmt.Sprintf("fd00:1:ffff:ffff:ffff:ffff:ffff:%x", host))
	}
	for _, tc := range []struct {
		loops int
		vxlan *VXLAN
	}{{2, nil}, {3, nil}, {4, nil}, {5, nil}, {7, nil}, {64, nil}, {2, testVXLAN()}, {5, testVXLAN()}} {
		n := tc.loops
		t.Run(fmt.Sprintf("%d loops, encapsulation %d", n, tc.vxlan.Encap()), func(t *testing.T) {
			r := newSteeredRouter(t, n, tc.vxlan)
			c := udpSocket(t)
			lanes := r.under.Load()[outer4].lanes
			want := make([][][]byte, n*lanes)
			send := func(b []byte, loop int) {
				t.Helper()
				if _, err := c.WriteToUDPAddrPort(b, r.Underlay()); err != nil {
					t.Fatal(err)
				}
				want[loop*lanes] = append(want[loop*lanes], b)
			}
			for _, a := range addrs {
				to := netip.MustParseAddr(a)
				from := "10.2.0.0" // whose packets are in the first lane
				if to.Is6() {
					from = "fd00:2::"
				}
				ip := udp(from, a, 30)
				if got, want := int(steerKey(ip))%n, steerIndex(to, n); got != want {
					t.Errorf("%v: loop %d by its packets, %d by its address", to, got, want)
				}
				send(framed(r, ip), steerIndex(to, n))
			}
			// What is no packet has to go somewhere, too, and be counted there.
			send([]byte{0x45}, 0)
			send(framed(r, bytes.Repeat([]byte{0x45}, steerAt4+1)), 0)
			send(framed(r, bytes.Repeat([]byte{0x60}, steerAt6+1)), 0)
			send(nil, 0)
			wantOnSockets(t, r, outer4, want)
		})
	}
}

// wantOnSockets checks that each socket of the Router has just the datagrams that are wanted on it, in order.
func wantOnSockets(t *testing.T, r *Router, f family, want [][][]byte) {
	t.Helper()
	for i, fd := range r.under.Load()[f].fds {
		for _, w := range want[i] {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20000); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 1500)
			m, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT)
			if err != nil || !bytes.Equal(b[:m], w) {
				t.Fatalf("socket %d: %x, %v, want %x", i, b[:max(m, 0)], err, w)
			}
		}
		if more := waiting(fd); len(more) > 0 {
			t.Errorf("socket %d has %d datagrams of others", i, len(more))
		}
	}
}

// steered is a running router with a container on each of the addresses, all sent to by one peer.
type steered struct {
	*Router
	peer    *net.UDPConn
	ports   []*Port
	devices []*nettest.Device
}

func newSteered(t *testing.T, loops int, addrs ...string) *steered {
	t.Helper()
	s := newSteeredOn(t, newSteeredRouter(t, loops, nil), addrs...)
	start(t, s.Router)
	return s
}

// newSteeredOn is the same on a Router that does not run.
func newSteeredOn(t *testing.T, r *Router, addrs ...string) *steered {
	t.Helper()
	s := &steered{Router: r, peer: udpSocket(t)}
	routes := []Route{
		{netip.MustParsePrefix("10.2.0.0/16"), ToPeer(PeerConfig{Addr: addrPort(s.peer), MTU: peerMTU})},
		{netip.MustParsePrefix("fd00:2::/64"), ToPeer(PeerConfig{Addr: addrPort(s.peer), MTU: peerMTU})},
	}
	for _, a := range addrs {
		addr := netip.MustParseAddr(a)
		d := nettest.NewDevice(t)
		p, err := s.AddPort(PortConfig{Name: a, MTU: peerMTU, Sources: []netip.Prefix{alone(addr)}, Device: d})
		if err != nil {
			t.Fatal(err)
		}
		s.ports, s.devices = append(s.ports, p), append(s.devices, d)
		routes = append(routes, Route{netip.PrefixFrom(addr, addr.BitLen()), ToPort(p)})
	}
	if err := s.SetTable(TableConfig{Routes: routes}); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSteer_OneLoopDoesBothDirectionsOfAContainer(t *testing.T) {
	for _, loops := range []int{1, 2, 3, 4} {
		t.Run(fmt.Sprint(loops), func(t *testing.T) {
			s := newSteered(t, loops, "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "fd00:1::2", "fd00:1::3", "fd00:1::4", "fd00:1::5")
			want := make(map[*loop]uint64)
			for i, d := range s.devices {
				from := containerC
				if i >= 4 {
					from = containerC6
				}
				if i >= 4 && s.ports[i].loop != s.ports[i-4].loop {
					t.Errorf("%s and %s are in different loops", s.ports[i].cfg.Name, s.ports[i-4].cfg.Name)
				}
				for k := range 1 + i {
					if _, err := s.peer.WriteToUDPAddrPort(udp(from, s.ports[i].cfg.Name, 100), s.Underlay()); err != nil {
						t.Fatal(err)
					}
					d.Wait(t, k+1)
				}
				want[s.ports[i].loop] += uint64(1 + i)
			}
			if len(want) != loops {
				t.Errorf("containers in %d loops of %d", len(want), loops)
			}
			for i, l := range s.loops {
				if got := l.rxq.stats.packets.Load(); got != want[l] {
					t.Errorf("loop %d received %d packets, want %d", i, got, want[l])
				}
			}
		})
	}
}

func TestSteer_DeliversTheForeignPacketsOfATrain(t *testing.T) {
	s := newSteered(t, 2, "10.1.0.2", "10.1.0.3")
	if !s.Stats().Underlay.GSO {
		t.Skip("this kernel has no UDP_SEGMENT")
	}
	const trains, each = 20, 16
	for range trains {
		var train []byte
		for i := range each {
			train = append(train, udp(containerC, fmt.Sprintf("10.1.0.%d", 2+i%2), 100)...)
		}
		sendTrain(t, s.peer, s.Underlay(), train, len(train)/each)
	}
	for _, d := range s.devices {
		d.Wait(t, trains*each/2)
	}
}

func TestSteer_PortsTakeTurnsWhereTheKernelRefuses(t *testing.T) {
	rc, err := udpSocket(t).SyscallConn() // of no group
	if err != nil {
		t.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) {
		if steer(int(fd), 2, 1, 0) {
			t.Error("a socket that shares no port was steered")
		}
	})
	r := newRouter(t, 3)
	r.under.Load()[outer4].steered = false
	seen := make(map[*loop]int)
	for i := range 6 {
		p, err := r.AddPort(PortConfig{Name: "c", Sources: []netip.Prefix{alone(netip.AddrFrom4([4]byte{10, 1, 0, byte(3 * i)}))}, Device: nettest.NewDevice(t)})
		if err != nil {
			t.Fatal(err)
		}
		seen[p.loop]++
	}
	for _, l := range r.loops {
		if seen[l] != 2 {
			t.Errorf("ports per loop: %v, want 2 each", seen)
		}
	}
}

func TestSteer_ATrainForAPeerThatSteersIsForOneContainer(t *testing.T) {
	const c2, c62 = "10.2.0.3", "fd00:2::3"
	super := func(from, to string) *packet.Packet {
		return nettest.Super(nettest.Between(from, to).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(4*1000)), 1000)
	}
	small := func(to string) *packet.Packet { return pkt(udp(containerA, to, 100)) }
	for name, c := range map[string]struct {
		pkts             func() []*packet.Packet
		steered, another uint64 // trains for a peer that steers, and for another
	}{
		"to one container": {func() []*packet.Packet {
			return []*packet.Packet{super(containerA, containerC), super(containerA, containerC)}
		}, 1, 1},
		"to two": {func() []*packet.Packet { return []*packet.Packet{super(containerA, containerC), super(containerA, c2)} }, 2, 1},
		"to two of IPv6": {func() []*packet.Packet {
			return []*packet.Packet{super(containerA6, containerC6), super(containerA6, c62)}
		}, 2, 1},
		"to and fro": {func() []*packet.Packet {
			return []*packet.Packet{super(containerA, containerC), super(containerA, c2), super(containerA, containerC)}
		}, 3, 1},
		"small ones": {func() []*packet.Packet {
			return []*packet.Packet{small(containerC), small(containerC), small(c2), small(c2)}
		}, 2, 1},
		"a small one joins": {func() []*packet.Packet { return []*packet.Packet{super(containerA, containerC), small(containerC)} }, 1, 1},
		"a small one does not": {func() []*packet.Packet {
			return []*packet.Packet{super(containerA, containerC), small(c2), small(c2), super(containerA, c2)}
		}, 3, 3},
	} {
		t.Run(name, func(t *testing.T) {
			for steers, want := range map[bool]uint64{true: c.steered, false: c.another} {
				g := newRig(t)
				needGSO(t, g)
				for i, r := range g.table.Routes {
					if r.Hop == ToPeer(g.peerCfg) {
						g.table.Routes[i].Hop.peer.Steers = steers
					}
				}
				g.set(g.table)
				g.fromA(c.pkts()...)
				if got := g.Stats().Underlay.SentTrains; got != want {
					t.Errorf("steers %v: %d trains, want %d", steers, got, want)
				}
				g.wantDrops(nil)
			}
		})
	}
}
