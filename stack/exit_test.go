// This file tests the exit queue and the parser of containers' packets, without a gateway around them.

package stack

import (
	"bytes"
	"net/netip"
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
			q.waitRoom() // half full is room enough
			q.push(p)
		}
		passed := false
		go func() {
			q.waitRoom()
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
		q.waitRoom()
		p := queued(data)
		q.push(p)
		p.DecRef()
	}
}
