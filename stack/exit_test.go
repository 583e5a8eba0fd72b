// This file tests the exit queue and the parser of containers' packets, without a gateway around them.

package stack

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"

	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func queued(b []byte) *gstack.PacketBuffer {
	return gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: copied(b)})
}

func TestExitQueue_KeepsOrderAndBytes(t *testing.T) {
	count := new(counters)
	var want, got [][]byte
	q := newExitQueue(256, count, func(pkts []*packet.Packet) {
		for _, p := range pkts {
			clear(p.Buf[:p.Off]) // headroom is the receiver's
			got = append(got, bytes.Clone(p.Bytes()))
		}
	})
	for i := range 200 {
		b := bytes.Repeat([]byte{byte(i)}, 1+i*300%65000)
		b[0] = 0 // of no container
		want = append(want, b)
		p := queued(b)
		q.push(p)
		p.DecRef()
	}
	q.close()
	q.drain()
	if len(got) != len(want) {
		t.Fatalf("%d packets, want %d", len(got), len(want))
	}
	for i := range got {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("packet %d differs", i)
		}
	}
	if n := count.packetsOut.Load(); n != 200 {
		t.Errorf("%d packets counted, want 200", n)
	}
}

func TestExitQueue_FullDropsAndCounts(t *testing.T) {
	count := new(counters)
	q := newExitQueue(4, count, func([]*packet.Packet) {})
	p := queued([]byte{1})
	defer p.DecRef()
	for range 6 {
		q.push(p)
	}
	if n := count.drops[dropExitQueue].Load(); n != 2 || q.length() != 4 {
		t.Errorf("%d drops, %d queued; want 2 and 4", n, q.length())
	}
	q.close()
	q.drain()
}

func TestExitQueue_ProducersWaitForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		count := new(counters)
		q := newExitQueue(4, count, func([]*packet.Packet) {})
		p := queued([]byte{1})
		defer p.DecRef()
		for range 3 {
			q.waitRoom(0) // half full is room enough
			q.push(p)
		}
		passed := false
		go func() {
			q.waitRoom(0)
			passed = true
		}()
		synctest.Wait()
		if passed {
			t.Error("waitRoom did not wait")
		}
		q.mu.Lock()
		q.takeLocked(make([]*gstack.PacketBuffer, 1))
		q.mu.Unlock()
		synctest.Wait()
		if !passed {
			t.Error("waitRoom still waits")
		}
		q.close()
		q.drain()
	})
}

// to is a packet of some bytes for a container of the subnet.
func to(container byte, size int) *gstack.PacketBuffer {
	b := make([]byte, size)
	b[0], b[19] = 0x45, container
	return queued(b)
}

func TestExitQueue_ServesContainersInTurn(t *testing.T) {
	for name, c := range map[string]struct {
		flood, victim int // bytes of a packet
		before        int // packets of the flood that may leave before the victim's, at most
		share         float64
	}{
		"a small packet behind superpackets":    {60000, 100, 2, 0},
		"a small packet behind small ones":      {100, 100, 2 * exitQuantum / 100, 0},
		"superpackets beside superpackets":      {60000, 60000, 2, 0.5},
		"small packets beside superpackets":     {60000, 1000, 2, 0.5},
		"superpackets beside a mass of packets": {100, 60000, 2 * exitQuantum / 100, 0.5},
	} {
		t.Run(name, func(t *testing.T) {
			var left []byte
			bytes := map[byte]int{}
			q := newExitQueue(4096, new(counters), func(pkts []*packet.Packet) {
				for _, p := range pkts {
					left = append(left, p.Bytes()[19])
				}
			})
			push := func(container byte, n, size int) {
				for range n {
					p := to(container, size)
					q.push(p)
					p.DecRef()
				}
			}
			n := 1
			if c.share > 0 {
				n = 1000
			}
			push(1, 3000, c.flood)
			push(2, n, c.victim)
			q.close()
			q.drain()
			first := slices.Index(left, 2)
			if first < 0 || first > c.before {
				t.Errorf("the first packet of the other container left after %d of the flood, want %d at most", first, c.before)
			}
			if c.share == 0 {
				return
			}
			// As long as both wait, each has its half.
			last := min(len(left)-1-slices.Index(reversed(left), 1), len(left)-1-slices.Index(reversed(left), 2))
			for _, container := range left[:last] {
				bytes[container] += map[byte]int{1: c.flood, 2: c.victim}[container]
			}
			if got := float64(bytes[2]) / float64(bytes[1]+bytes[2]); got < 0.9*c.share {
				t.Errorf("it had %.2f of the bytes while both waited", got)
			}
		})
	}
}

func reversed(b []byte) []byte {
	b = slices.Clone(b)
	slices.Reverse(b)
	return b
}

func TestExitQueue_TheLongestLineLosesWhenItIsFull(t *testing.T) {
	count := new(counters)
	got := map[byte]int{}
	q := newExitQueue(100, count, func(pkts []*packet.Packet) {
		for _, p := range pkts {
			got[p.Bytes()[19]]++
		}
	})
	for range 1000 {
		p := to(1, 100)
		q.push(p)
		p.DecRef()
	}
	for range 30 {
		p := to(2, 100)
		if !q.push(p) {
			t.Error("a packet of the shorter line was refused")
		}
		p.DecRef()
	}
	q.close()
	q.drain()
	if got[1] != 70 || got[2] != 30 || count.drops[dropExitQueue].Load() != 930 {
		t.Errorf("%d and %d packets left, %d drops", got[1], got[2], count.drops[dropExitQueue].Load())
	}
}

func TestExitQueue_RoomIsForEachContainer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newExitQueue(100, new(counters), func([]*packet.Packet) {})
		for range 80 {
			p := to(1, 100)
			q.push(p)
			p.DecRef()
		}
		q.waitRoom(2) // returns
		if q.hasRoom(1) || !q.hasRoom(2) {
			t.Error("the flood has room, or the other has none")
		}
		passed := false
		go func() {
			q.waitRoom(1)
			passed = true
		}()
		synctest.Wait()
		if passed {
			t.Error("the flood does not wait")
		}
		go q.drain()
		synctest.Wait()
		if !passed {
			t.Error("the flood still waits")
		}
		q.close()
	})
}

func TestExitQueue_FewPacketsWaitForTheEndOfATurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []byte
		q := newExitQueue(64, new(counters), func(pkts []*packet.Packet) {
			for _, p := range pkts {
				got = append(got, p.Bytes()[0])
			}
		})
		next := byte(0)
		push := func(n int) {
			for range n {
				p := queued([]byte{next})
				q.push(p)
				p.DecRef()
				next++
			}
		}
		go q.drain()
		q.beginTurn()
		q.beginTurn()
		push(exitFew - 1)
		synctest.Wait()
		if len(got) != 0 {
			t.Errorf("%d packets left before the turn ended", len(got))
		}
		q.endTurn()
		if len(got) != exitFew-1 {
			t.Errorf("%d packets left at the end of the turn, want %d", len(got), exitFew-1)
		}
		push(exitFew)
		synctest.Wait()
		if len(got) != 2*exitFew-1 {
			t.Errorf("%d packets left when there were more than few, want %d", len(got), 2*exitFew-1)
		}
		push(1)
		q.endTurn()
		push(1)
		synctest.Wait()
		if len(got) != 2*exitFew+1 {
			t.Errorf("%d packets left without a turn, want %d", len(got), 2*exitFew+1)
		}
		for i, b := range got {
			if int(b) != i {
				t.Fatalf("the order is %v", got)
			}
		}
		q.close()
	})
}

// FuzzReceive gives a running gateway what a container could send.
func FuzzReceive(f *testing.F) {
	src, dst := netip.AddrPortFrom(aliceAddr, 1000), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 9)
	f.Add(makeUDP(src, dst, []byte("datagram")), uint8(0), uint16(4))
	f.Add(makeTCP(src, dst, 2, 1), uint8(1), uint16(1000))
	f.Add(makeEcho(aliceAddr, gatewayAddr, 1, 1, "x"), uint8(0), uint16(0))
	f.Add(tooBig(true, 600).over4(makeTCP(netip.AddrPortFrom(gatewayAddr, 80), src, 16, 1), to4(aliceAddr), to4(gatewayAddr)), uint8(0), uint16(0))
	f.Add(tooBig(false, 1280).over6(makeEcho6(gatewayAddr6, aliceAddr6, 1, 1, "x"), aliceAddr6.As16(), gatewayAddr6.As16()), uint8(0), uint16(0))
	f.Add(makeUDP(src, netip.AddrPortFrom(gatewayAddr, 53), []byte("no query at all")), uint8(3), uint16(3))
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 8, 17, 64}, make([]byte, 40)...), uint8(0), uint16(0))
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 16, 44, 64}, make([]byte, 48)...), uint8(0), uint16(0))
	g, err := New(Config{
		Addresses: []netip.Addr{gatewayAddr, gatewayAddr6}, MTU: testMTU, Exit: func([]*packet.Packet) {},
		ResolvConf: "/dev/null", Limits: Limits{TCPFlows: 8, TCPHalfOpen: 8, UDPFlows: 8, EchoFlows: 8},
	})
	if err != nil {
		f.Fatal(err)
	}
	// Only the gateway's own addresses and closed ones are tried: nothing leaves the machine.
	ns, err := newNetstack(g)
	if err != nil {
		f.Fatal(err)
	}
	g.live.Store(ns)
	go ns.exit.drain()
	f.Cleanup(ns.shutDown)
	f.Fuzz(func(t *testing.T, b []byte, gso uint8, seg uint16) {
		in, ok := parseIP(b)
		if ok && (in.length > len(b) || in.transport > in.length) {
			t.Fatalf("offsets beyond the packet: %+v, %d bytes", in, len(b))
		}
		if ok && !g.isOwn(in.dst) && g.cfg.judge(in.dst) == open {
			return
		}
		p := &packet.Packet{Buf: append(make([]byte, packet.Headroom), b...), Off: packet.Headroom, GSO: packet.GSO(gso % 4), SegSize: seg}
		g.Send(nil, []*packet.Packet{p})
	})
}

func BenchmarkSend_UDP(b *testing.B) {
	g, err := New(Config{Addresses: []netip.Addr{gatewayAddr}, MTU: testMTU, Exit: func([]*packet.Packet) {}, Limits: Limits{UDPFlows: 1}})
	if err != nil {
		b.Fatal(err)
	}
	ns, err := newNetstack(g)
	if err != nil {
		b.Fatal(err)
	}
	g.live.Store(ns)
	go ns.exit.drain()
	defer ns.shutDown()
	// Port unreachable by gVisor: the whole way in, and a small packet out.
	d := makeUDP(netip.AddrPortFrom(aliceAddr, 1), netip.AddrPortFrom(gatewayAddr, 9), make([]byte, 1400))
	p := new(packet.Packet)
	p.Reset(append(make([]byte, packet.Headroom), d...), packet.Headroom)
	p.Verified = true
	list := []*packet.Packet{p}
	b.ReportAllocs()
	b.SetBytes(int64(len(d)))
	for b.Loop() {
		g.Send(nil, list)
	}
}

func BenchmarkExit_Superpackets(b *testing.B) {
	count := new(counters)
	q := newExitQueue(256, count, func([]*packet.Packet) {})
	go q.drain()
	defer q.close()
	data := make([]byte, 64000)
	b.ReportAllocs()
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		q.waitRoom(0)
		p := queued(data)
		q.push(p)
		p.DecRef()
	}
}
