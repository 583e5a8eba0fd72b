// This file measures the packet path, and holds it to allocate nothing.

package forwarder

import (
	"fmt"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// path is a Router whose devices and gateway keep nothing, driven on the goroutine of the test.
type path struct {
	*rig
	w       *worker
	in      ingress
	discard *nettest.Discard
}

// sink is a device that keeps nothing.
type sink struct {
	*nettest.Device
	*nettest.Discard
}

func (s sink) Send(sc *packet.Scratch, pkts []*packet.Packet) { s.Discard.Send(sc, pkts) }

func newPath(t testing.TB) *path {
	g := newRig(t)
	p := &path{rig: g, w: g.loops[0].worker, in: ingress{kind: fromContainer, port: g.portA}, discard: new(nettest.Discard)}
	for _, port := range []*Port{g.portA, g.portB} {
		port.cfg.Device = sink{nettest.NewDevice(t), p.discard}
	}
	for i, r := range g.table.Routes {
		if r.Hop.kind == hopEgress {
			g.table.Routes[i].Hop = ToEgress(p.discard)
		}
	}
	g.set(g.table)
	return p
}

// batch forwards copies of the packets in orig, whose memory is made again of the same arena each time.
func (p *path) batch(orig, pkts []packet.Packet) {
	p.w.begin()
	in := p.in
	for i := range orig {
		copy(pkts[i].Buf[pkts[i].Off:], orig[i].Bytes())
		buf, off := pkts[i].Buf, pkts[i].Off
		pkts[i] = orig[i]
		pkts[i].Buf, pkts[i].Off = buf, off
		p.w.forward(&pkts[i], &in)
	}
	p.w.end()
}

func copies(orig []packet.Packet) []packet.Packet {
	out := make([]packet.Packet, len(orig))
	for i := range orig {
		out[i] = *nettest.Packet(orig[i].Bytes())
	}
	return out
}

// traffic is what the fast path is measured with.
func traffic() map[string][]packet.Packet {
	a := nettest.Between(containerA, containerC)
	ack := nettest.TCP{Flags: nettest.ACK}
	super := *nettest.Super(a.TCP(ack, nettest.Payload(44*1432)), 1432)
	super6 := *nettest.Super(nettest.Between(containerA6, containerC6).TCP(ack, nettest.Payload(44*1400)), 1400)
	uso := *nettest.Super(a.UDP(nettest.UDP{}, nettest.Payload(40*1400)), 1400)
	owed := nettest.Packet(a.UDP(nettest.UDP{}, nettest.Payload(64)))
	nettest.Owe(owed)
	local := *nettest.Super(nettest.Between(containerA, containerB).TCP(ack, nettest.Payload(60000)), 1432)
	var small []packet.Packet
	for range batchPackets {
		small = append(small, *owed)
	}
	return map[string][]packet.Packet{
		"tso":    {super, super, super, super},
		"tso6":   {super6, super6},
		"uso":    {uso, uso},
		"small":  small,
		"local":  {local, local},
		"egress": {*pkt(udp(containerA, outside, 1000)), *pkt(udp(containerA, outside, 1000))},
		"frag":   {*pkt(udp(containerA, "10.3.0.2", 1400))},
		"icmp":   {*pkt(udp(containerA, "10.1.0.77", 1400))},
	}
}

func TestForward_AllocatesNothing(t *testing.T) {
	for name, orig := range traffic() {
		t.Run(name, func(t *testing.T) {
			p := newPath(t)
			pkts := copies(orig)
			for range 5 { // buckets grow to their size, the fragment arena is made
				p.batch(orig, pkts)
			}
			if n := testing.AllocsPerRun(50, func() { p.batch(orig, pkts) }); n != 0 {
				t.Errorf("%v allocations a batch", n)
			}
		})
	}
}

func TestReceive_AllocatesNothing(t *testing.T) {
	p := newPath(t)
	needGSO(t, p.rig)
	train := receiveTrain()
	receive := func() {
		sendTrain(t, p.peer, p.Underlay(), train, 1472)
		p.receive(1)
	}
	for range 5 {
		receive()
	}
	with := testing.AllocsPerRun(50, receive)
	without := testing.AllocsPerRun(50, func() { sendTrain(t, p.stock, addrPort(p.small), train, 1472) })
	if with > without {
		t.Errorf("%v allocations a train", with-without)
	}
	if p.discard.Packets < 40*50 {
		t.Errorf("%d packets arrived: the test tests nothing (drops %v)", p.discard.Packets, p.drops())
	}
}

// receiveTrain is 40 TCP segments of a peer, end to end.
func receiveTrain() (train []byte) {
	for _, s := range nettest.Segment(nettest.Super(nettest.Between(containerC, containerA).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(40*1432)), 1432)) {
		train = append(train, s...)
	}
	return train
}

func TestLookup_AllocatesNothing(t *testing.T) {
	tab := bigTable(t, 1000)
	a, a6 := netip.MustParseAddr("10.2.0.77"), netip.MustParseAddr("fd00:2::77")
	if n := testing.AllocsPerRun(100, func() { tab.lookup(a); tab.lookup(a6) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func bigTable(t testing.TB, n int) *table {
	c := TableConfig{Routes: []Route{{netip.MustParsePrefix("10.0.0.0/8"), UnreachableNet}}}
	for i := range n {
		c.Routes = append(c.Routes, Route{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24),
			ToPeer(PeerConfig{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)}), 8285), MTU: 1472}),
		})
	}
	tab, err := buildTable(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

// BenchmarkSegment cuts a superpacket, without sending it.
func BenchmarkSegment(b *testing.B) {
	for _, name := range []string{"tso", "tso6", "uso"} {
		p := traffic()[name][0]
		b.Run(name, func(b *testing.B) {
			hdr := make([]byte, packet.MaxHeaders)
			b.SetBytes(int64(p.Len()))
			b.ReportAllocs()
			for b.Loop() {
				s := newSegmenter(&p, false)
				for {
					if _, ok := s.next(hdr); !ok {
						break
					}
				}
			}
		})
	}
}

func BenchmarkChecksum(b *testing.B) {
	for _, n := range []int{20, 64, 1432, 65536} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			buf := nettest.Payload(n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				checksum.Checksum(buf, 0)
			}
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			tab := bigTable(b, n)
			addrs := make([]netip.Addr, 256)
			for i := range addrs {
				addrs[i] = netip.AddrFrom4([4]byte{10, byte(i * 7 % n >> 8), byte(i * 7 % n), byte(i)})
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				tab.lookup(addrs[i&255])
			}
		})
	}
}

// BenchmarkEncapsulate takes a batch from a container to the underlay socket, the system call with it.
func BenchmarkEncapsulate(b *testing.B) {
	for _, name := range []string{"tso", "uso", "small", "local"} {
		b.Run(name, func(b *testing.B) {
			p := newPath(b)
			orig := traffic()[name]
			pkts := copies(orig)
			bytes := 0
			for i := range orig {
				bytes += orig[i].Len()
			}
			b.SetBytes(int64(bytes))
			b.ReportAllocs()
			for b.Loop() {
				p.batch(orig, pkts)
			}
		})
	}
}

// BenchmarkReceive takes a train of 40 segments from the underlay socket to a container, the system call with it.
func BenchmarkReceive(b *testing.B) {
	p := newPath(b)
	train := receiveTrain()
	b.SetBytes(int64(len(train)))
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		sendTrain(b, p.peer, p.Underlay(), train, 1472)
		b.StartTimer()
		p.w.begin()
		p.loops[0].rxq.read(p.w)
		p.w.end()
	}
}
