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
	g.table.Routes = append(g.table.Routes, Route{netip.MustParsePrefix(containerB6 + "/128"), ToPort(g.portB)})
	g.set(g.table)
	return p
}

// containerB6 is containerB's address in the routes of a path.
const containerB6 = "fd00:1::3"

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
	ack := nettest.TCP{Flags: nettest.ACK}
	tso := func(from, to string) []packet.Packet {
		return repeated(nettest.Super(nettest.Between(from, to).TCP(ack, nettest.Payload(44*1400)), 1400), 4)
	}
	uso := func(from, to string) []packet.Packet {
		return repeated(nettest.Super(nettest.Between(from, to).UDP(nettest.UDP{}, nettest.Payload(40*1400)), 1400), 2)
	}
	small := func(from, to string) []packet.Packet {
		owed := nettest.Packet(nettest.Between(from, to).UDP(nettest.UDP{}, nettest.Payload(64)))
		nettest.Owe(owed)
		return repeated(owed, batchPackets)
	}
	return map[string][]packet.Packet{
		"tso":    tso(containerA, containerC),
		"tso6":   tso(containerA6, containerC6),
		"uso":    uso(containerA, containerC),
		"uso6":   uso(containerA6, containerC6),
		"small":  small(containerA, containerC),
		"small6": small(containerA6, containerC6),
		"local":  tso(containerA, containerB),
		"local6": tso(containerA6, containerB6),
		"egress": repeated(pkt(udp(containerA, outside, 1000)), 2),
		"frag":   {*pkt(udp(containerA, "10.3.0.2", 1400))},
		"icmp":   {*pkt(udp(containerA, "10.1.0.77", 1400))},
		"icmp6":  {*pkt(udp(containerA6, "fd00:1::77", 1400))},
	}
}

func repeated(p *packet.Packet, n int) (pkts []packet.Packet) {
	for range n {
		pkts = append(pkts, *p)
	}
	return pkts
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

func TestForward_AllocatesNothingForAPolicy(t *testing.T) {
	for name, orig := range traffic() {
		t.Run(name, func(t *testing.T) {
			p := newPath(t)
			p.policed(p.portA, Policy{In: closedBut(), Out: closedBut(allow("10.2.0.0/16", 0), allow("fd00:2::/64", 0))})
			pkts := copies(orig)
			for range 5 {
				p.batch(orig, pkts)
			}
			if n := testing.AllocsPerRun(50, func() { p.batch(orig, pkts) }); n != 0 {
				t.Errorf("%v allocations a batch", n)
			}
		})
	}
}

func TestReceive_AllocatesNothing(t *testing.T) {
	for name, train := range receiveTrains() {
		t.Run(name, func(t *testing.T) {
			p := newPath(t)
			needGSO(t, p.rig)
			receive := func() {
				sendTrain(t, p.peer, p.Underlay(), train.bytes, train.size)
				p.receive(1)
			}
			for range 5 {
				receive()
			}
			with := testing.AllocsPerRun(50, receive)
			without := testing.AllocsPerRun(50, func() { sendTrain(t, p.stock, addrPort(p.small), train.bytes, train.size) })
			if with > without {
				t.Errorf("%v allocations a train", with-without)
			}
			if p.discard.Packets < 40*50 {
				t.Errorf("%d packets arrived: the test tests nothing (drops %v)", p.discard.Packets, p.drops())
			}
		})
	}
}

// receiveTrain is 40 packets of a peer for a container, end to end.
type receiveTrain struct {
	bytes []byte
	size  int // of each packet
}

func receiveTrains() map[string]receiveTrain {
	train := func(super *packet.Packet) (t receiveTrain) {
		for _, s := range nettest.Segment(super) {
			t.bytes, t.size = append(t.bytes, s...), len(s)
		}
		return t
	}
	v4, v6 := nettest.Between(containerC, containerA), nettest.Between(containerC6, containerA6)
	ack := nettest.TCP{Flags: nettest.ACK}
	return map[string]receiveTrain{
		"tcp":  train(nettest.Super(v4.TCP(ack, nettest.Payload(40*1400)), 1400)),
		"tcp6": train(nettest.Super(v6.TCP(ack, nettest.Payload(40*1400)), 1400)),
		"udp":  train(nettest.Super(v4.UDP(nettest.UDP{}, nettest.Payload(40*1400)), 1400)),
		"udp6": train(nettest.Super(v6.UDP(nettest.UDP{}, nettest.Payload(40*1400)), 1400)),
	}
}

func TestSegment_AllocatesNothing(t *testing.T) {
	hdr := make([]byte, packet.MaxHeaders)
	for name, pkts := range traffic() {
		p := pkts[0]
		if p.GSO == packet.GSONone {
			continue
		}
		for _, partial := range []bool{false, true} {
			if n := testing.AllocsPerRun(50, func() { segmentAll(&p, partial, hdr) }); n != 0 {
				t.Errorf("%s, partial %v: %v allocations", name, partial, n)
			}
		}
	}
}

// segmentAll cuts a superpacket, without sending it.
func segmentAll(p *packet.Packet, partial bool, hdr []byte) {
	s := newSegmenter(p, partial)
	for {
		if _, ok := s.next(hdr); !ok {
			return
		}
	}
}

func TestLookup_AllocatesNothing(t *testing.T) {
	tab := bigTable(t, 1000)
	a, a6 := bigTableAddr(512, 77), bigTableAddr6(512, 77)
	for _, x := range []netip.Addr{a, a6} {
		if h := tab.lookup(x); h == nil || h.kind != hopPeer {
			t.Errorf("%v is not routed to a peer", x)
		}
	}
	if n := testing.AllocsPerRun(100, func() { tab.lookup(a); tab.lookup(a6) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// bigTable has n peers with a subnet of each family.
func bigTable(t testing.TB, n int) *table {
	c := TableConfig{Routes: []Route{
		{netip.MustParsePrefix("10.0.0.0/8"), UnreachableNet}, {netip.MustParsePrefix("fd00::/16"), UnreachableNet},
	}}
	for i := range n {
		peer := ToPeer(PeerConfig{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)}), 8285), MTU: 1472})
		c.Routes = append(c.Routes, Route{netip.PrefixFrom(bigTableAddr(i, 0), 24), peer}, Route{netip.PrefixFrom(bigTableAddr6(i, 0), 64), peer})
	}
	tab, err := buildTable(c, nil, nil, &underlay{outer4: {}})
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func bigTableAddr(peer int, host byte) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(peer >> 8), byte(peer), host})
}

func bigTableAddr6(peer int, host byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, 6: byte(peer >> 8), 7: byte(peer), 15: host})
}

// BenchmarkSegment cuts a superpacket: for any peer, and for one that takes partial checksums.
func BenchmarkSegment(b *testing.B) {
	for _, name := range []string{"tso", "tso6", "uso", "uso6"} {
		p := traffic()[name][0]
		for _, kind := range []struct {
			name    string
			partial bool
		}{{"", false}, {"-partial", true}} {
			b.Run(name+kind.name, func(b *testing.B) {
				hdr := make([]byte, packet.MaxHeaders)
				b.SetBytes(int64(p.Len()))
				b.ReportAllocs()
				for b.Loop() {
					segmentAll(&p, kind.partial, hdr)
				}
			})
		}
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

func BenchmarkPseudoSum(b *testing.B) {
	for _, name := range []string{"small", "small6"} {
		ip := traffic()[name][0].Bytes()
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				packet.PseudoSum(ip, packet.UDP, 72)
			}
		})
	}
}

// BenchmarkComplete pays the checksum that a datagram of 64 bytes owes.
func BenchmarkComplete(b *testing.B) {
	for _, name := range []string{"small", "small6"} {
		p := traffic()[name][0]
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(p.Len()))
			b.ReportAllocs()
			for b.Loop() {
				completeChecksum(&p)
			}
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	for family, addr := range map[string]func(int, byte) netip.Addr{"v4": bigTableAddr, "v6": bigTableAddr6} {
		for _, n := range []int{10, 1000} {
			b.Run(fmt.Sprintf("%s-%d", family, n), func(b *testing.B) {
				tab := bigTable(b, n)
				addrs := make([]netip.Addr, 256)
				for i := range addrs {
					addrs[i] = addr(i*7%n, byte(i))
					if h := tab.lookup(addrs[i]); h == nil || h.kind != hopPeer {
						b.Fatalf("%v is not routed to a peer", addrs[i])
					}
				}
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					tab.lookup(addrs[i&255])
				}
			})
		}
	}
}

// BenchmarkEncapsulate takes a batch from a container to the underlay socket, the system call with it.
func BenchmarkEncapsulate(b *testing.B) {
	for _, name := range []string{"tso", "tso6", "uso", "uso6", "small", "small6", "local", "local6"} {
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

// BenchmarkPolicy is what a policy costs for a packet: of an open direction, of a flow that is known, refused after as many rules.
func BenchmarkPolicy(b *testing.B) {
	manyRules := func(n int) (rules []Rule) {
		for i := range n {
			rules = append(rules, allow(fmt.Sprintf("10.77.%d.0/24", i), packet.TCP, 80))
		}
		return rules
	}
	sent, reply := datagram(us, 5, them, 53), datagram(them, 53, us, 5)
	sent6, reply6 := datagram(us6, 5, them6, 53), datagram(them6, 53, us6, 5)
	for _, c := range []struct {
		name      string
		policy    Policy
		first, ip []byte
		dir       direction // of ip
	}{
		{"open", Policy{In: closedBut()}, sent, sent, outbound},
		{"reply", Policy{In: closedBut()}, sent, reply, inbound},
		{"reply6", Policy{In: closedBut()}, sent6, reply6, inbound},
		{"refused-10", Policy{In: closedBut(manyRules(10)...)}, reply, reply, inbound},
		{"refused-100", Policy{In: closedBut(manyRules(100)...)}, reply, reply, inbound},
	} {
		b.Run(c.name, func(b *testing.B) {
			p := compiled(b, c.policy)
			p.asks(1, c.first)
			b.ReportAllocs()
			for b.Loop() {
				var s sight
				s.read(c.ip)
				p.permits(c.dir, &s, 1)
			}
		})
	}
}

// BenchmarkReceive takes a train of 40 packets from the underlay socket to a container, the system call with it.
func BenchmarkReceive(b *testing.B) {
	for name, train := range receiveTrains() {
		b.Run(name, func(b *testing.B) {
			p := newPath(b)
			b.SetBytes(int64(len(train.bytes)))
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				sendTrain(b, p.peer, p.Underlay(), train.bytes, train.size)
				b.StartTimer()
				p.w.begin()
				p.loops[0].rxq.read(p.w, outer4, 1)
				p.w.end()
			}
		})
	}
}
