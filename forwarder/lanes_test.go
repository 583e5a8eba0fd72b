// This file tests the lanes: that the kernel lays TCP across them, and that a flow comes out of them in order.

package forwarder

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	manyLanes = 1 << 30 // more than any machine grants one socket
	manyTCP   = maxLanes - mixedLanes
)

// tcpLane and mixedLane are where packets are, of maxLanes.
func tcpLane(seq uint32) int { return mixedLanes + int(seq>>stripeShift)%manyTCP }

func mixedLane(from string) int { return steerIndex(netip.MustParseAddr(from), mixedLanes) }

func newLanes(t *testing.T, loops int, v *VXLAN) *Router {
	t.Helper()
	r := newRouterAsking(t, loops, manyLanes, v)
	if !r.under.Load()[outer4].steered {
		t.Skip("this kernel attaches no program to a group of sockets")
	}
	if r.under.Load()[outer4].lanes != maxLanes {
		t.Fatalf("%d lanes, want %d", r.under.Load()[outer4].lanes, maxLanes)
	}
	return r
}

func TestLanes_KernelLaysTCPAcrossThemInStripes(t *testing.T) {
	const stripe = 1 << stripeShift
	for _, c := range []struct {
		loops int
		vxlan *VXLAN
	}{{1, nil}, {2, nil}, {3, nil}, {1, testVXLAN()}, {2, testVXLAN()}} {
		loops := c.loops
		t.Run(fmt.Sprintf("%d loops, encapsulation %d", loops, c.vxlan.Encap()), func(t *testing.T) {
			r := newLanes(t, loops, c.vxlan)
			c := udpSocket(t)
			want := make([][][]byte, len(r.under.Load()[outer4].fds))
			send := func(b []byte, to string, lane int) {
				t.Helper()
				b = framed(r, b)
				if _, err := c.WriteToUDPAddrPort(b, r.Underlay()); err != nil {
					t.Fatal(err)
				}
				i := steerIndex(netip.MustParseAddr(to), loops)*r.under.Load()[outer4].lanes + lane
				want[i] = append(want[i], b)
			}
			for _, ends := range [][2]string{{containerC, containerA}, {containerC, containerB}, {containerC6, containerA6}} {
				between := nettest.Between(ends[0], ends[1])
				for _, seq := range []uint32{0, stripe - 1, stripe, 5*stripe + 7, manyTCP*stripe - 1, manyTCP * stripe, 1<<32 - 1} {
					send(between.TCP(nettest.TCP{Seq: seq, Flags: nettest.ACK}, nettest.Payload(10)), ends[1], tcpLane(seq))
				}
				send(udp(ends[0], ends[1], 30), ends[1], mixedLane(ends[0]))
			}
			options := nettest.Between(containerC, containerA)
			options.Options = []byte{1, 1, 1, 1}
			send(options.TCP(nettest.TCP{Seq: 3 * stripe, Flags: nettest.ACK}, nil), containerA, tcpLane(3*stripe))
			fragment := nettest.Between(containerC, containerA)
			fragment.Frag = 100 // what stands where its ports would be is payload
			send(fragment.TCP(nettest.TCP{Seq: 3 * stripe, Flags: nettest.ACK}, nettest.Payload(30)), containerA, mixedLane(containerC))
			wantOnSockets(t, r, outer4, want)
		})
	}
}

// flow is a TCP flow that a peer sends.
type flow struct {
	from, to string
	port     uint16
	seq      uint32
}

// A batch from all lanes at once holds several stripes of each flow, and wraps around the lanes and the sequence numbers.
func TestLanes_FlowsComeOutInOrder(t *testing.T) {
	s := newSteeredOn(t, newLanes(t, 1, nil), containerA, containerA6)
	const step, rounds = 100_000, 10
	flows := []flow{
		{containerC, containerA, 1, 0}, {containerC, containerA, 2, 1<<32 - 3*step}, {containerC6, containerA6, 1, 1<<31 - step},
	}
	sent := 0
	for range rounds {
		for i := range flows {
			f := &flows[i]
			b := nettest.Between(f.from, f.to).TCP(nettest.TCP{SrcPort: f.port, Seq: f.seq, Flags: nettest.ACK}, nettest.Payload(8))
			if _, err := s.peer.WriteToUDPAddrPort(b, s.Underlay()); err != nil {
				t.Fatal(err)
			}
			f.seq += step
			sent++
		}
	}
	// A pure ACK and a datagram keep their place, too.
	for _, b := range [][]byte{nettest.Between(containerC, containerA).TCP(nettest.TCP{Flags: nettest.ACK, SrcPort: 3}, nil), udp(containerC, containerA, 5)} {
		if _, err := s.peer.WriteToUDPAddrPort(b, s.Underlay()); err != nil {
			t.Fatal(err)
		}
		sent++
	}
	s.readAll(t)
	next := map[string]uint32{}
	got := 0
	for _, d := range s.devices {
		for _, p := range d.Take() {
			got++
			ip := p.Bytes()
			proto, l4, ok := packet.Transport(ip)
			if !ok || proto != packet.TCP || len(ip) == l4+20 {
				continue
			}
			k := fmt.Sprintf("%d %x", ip[0]>>4, ip[l4:l4+4])
			seq := binary.BigEndian.Uint32(ip[l4+4:])
			if want, ok := next[k]; ok && seq != want {
				t.Errorf("flow %s: sequence %d came where %d was due", k, seq, want)
			}
			next[k] = seq + step
		}
	}
	if got != sent || len(next) != len(flows) {
		t.Errorf("%d packets of %d flows, want %d of %d", got, len(next), sent, len(flows))
	}
}

func TestLanes_OverflowABatch(t *testing.T) {
	s := newSteeredOn(t, newLanes(t, 1, nil), containerA)
	const n = 3 * rxSlots
	for i := range n {
		b := nettest.Between(containerC, containerA).TCP(nettest.TCP{Seq: uint32(i) << stripeShift, Flags: nettest.ACK}, nettest.Payload(8))
		if _, err := s.peer.WriteToUDPAddrPort(b, s.Underlay()); err != nil {
			t.Fatal(err)
		}
	}
	s.readAll(t)
	if got := len(s.devices[0].Take()); got != n {
		t.Errorf("%d packets, want %d", got, n)
	}
}

func TestLanes_AllocateNothing(t *testing.T) {
	s := newSteeredOn(t, newLanes(t, 1, nil), containerA)
	q := s.loops[0].rxq
	for i := range uint32(rxSlots) {
		b := nettest.Between(containerC, containerA).TCP(nettest.TCP{Seq: (rxSlots - i) << stripeShift, Flags: nettest.ACK}, nettest.Payload(8))
		q.msgs[i].Len = uint32(copy(q.bufs[i][packet.Headroom:], b))
	}
	if n := testing.AllocsPerRun(50, func() {
		if n := q.sweep(outer4, s.under.Load()[outer4].loopFDs(0), 1<<maxLanes-1); n != 0 {
			t.Errorf("%d trains from nowhere", n)
		}
		q.inOrderOfArrival(rxSlots)
		q.sort(rxSlots)
	}); n != 0 {
		t.Errorf("%v allocations a batch", n)
	}
	if q.order[0] != rxSlots-1 || q.order[rxSlots-1] != 0 {
		t.Errorf("order %v, want the reverse", q.order)
	}
}

// readAll reads what the lanes of the first loop have, on the goroutine of the test.
func (s *steered) readAll(t *testing.T) {
	t.Helper()
	l := s.loops[0]
	for {
		ready := s.lanesReady(outer4, 0)
		if ready == 0 {
			return
		}
		l.worker.begin()
		l.rxq.read(l.worker, outer4, ready)
		l.worker.end()
	}
}

// A container of a peer floods, and the socket that has its datagrams is full. What others send comes through all the same, and in the next batch.
func TestLanes_AFloodIsLostAloneAndHoldsNobodyUp(t *testing.T) {
	s := newSteeredOn(t, newLanes(t, 1, nil), containerA, containerA6)
	send := func(b []byte) {
		t.Helper()
		if _, err := s.peer.WriteToUDPAddrPort(b, s.Underlay()); err != nil {
			t.Fatal(err)
		}
	}
	const flood = 2000 // of 60000 bytes: more than a socket holds, whatever the machine grants
	for range flood {
		send(udp("10.2.0.3", containerA, 60000))
	}
	others := [][]byte{
		udp(containerC, containerA, 1), nettest.Between("10.2.0.4", containerA).ICMP(8, 0, 0, nettest.Payload(2)), udp(containerC6, containerA6, 3),
		nettest.Between("10.2.0.3", containerA).TCP(nettest.TCP{Seq: 1, Flags: nettest.ACK}, nettest.Payload(4)), // even the flooder's own TCP
	}
	for _, b := range others {
		send(b)
	}
	l := s.loops[0]
	l.worker.begin()
	l.rxq.read(l.worker, outer4, s.lanesReady(outer4, 1000))
	l.worker.end()
	small, large := 0, 0
	for _, d := range s.devices {
		for _, p := range d.Take() {
			if p.Len() > 1000 {
				large++
			} else {
				small++
			}
		}
	}
	if small != len(others) || large == 0 || large > rxMsgs {
		t.Errorf("in one batch %d packets of others, want %d, and %d of the flood, want 1 to %d", small, len(others), large, rxMsgs)
	}
	s.readAll(t)
	if rest := len(s.devices[0].Take()); rest+large == flood {
		t.Error("nothing was lost: that is no flood")
	}
}
