// This file tests that neighbouring segments are joined, that nothing else is, and that the join can be undone.

package tap

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// segmentsOf cuts p as a peer's node does; each segment comes verified, as from the underlay.
func segmentsOf(p *packet.Packet) (out []*packet.Packet) {
	for _, ip := range nettest.Segment(p) {
		out = append(out, verified(ip))
	}
	return out
}

func verified(ip []byte) *packet.Packet {
	p := nettest.Packet(ip)
	p.Verified = true
	return p
}

func TestSend_JoinsWhatASenderCut(t *testing.T) {
	tcp := nettest.TCP{SrcPort: 80, DstPort: 5000, Seq: 0xffffff00, Ack: 9, Flags: nettest.ACK, Window: 700}
	stamped := tcp
	stamped.Options = []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	pushed := stamped
	pushed.Flags |= nettest.PSH
	options := in4
	options.Options = []byte{0x88, 4, 0, 1}
	marked := in4
	marked.TOS, marked.Frag, marked.ID, marked.TTL = 0x2a, nettest.DF, 0xfff0, 9
	for name, c := range map[string]struct {
		super  *packet.Packet
		frames int
	}{
		"TCP":                    {nettest.Super(in4.TCP(tcp, nettest.Payload(10000)), 1000), 1},
		"TCP, short end":         {nettest.Super(in4.TCP(tcp, nettest.Payload(10001)), 1000), 1},
		"TCP with timestamps":    {nettest.Super(in4.TCP(stamped, nettest.Payload(60000)), 1360), 1},
		"TCP pushed":             {nettest.Super(in4.TCP(pushed, nettest.Payload(20000)), 1360), 1},
		"TCP with IP options":    {nettest.Super(options.TCP(tcp, nettest.Payload(9000)), 1360), 1},
		"TCP, ECT, DF, id wraps": {nettest.Super(marked.TCP(tcp, nettest.Payload(60000)), 1360), 1},
		"TCP over IPv6":          {nettest.Super(in6.TCP(pushed, nettest.Payload(60000)), 1360), 1},
		"TCP of 64 KB":           {nettest.Super(in4.TCP(tcp, nettest.Payload(65495)), 1460), 1},
		"TCP over IPv6 of 64 KB": {nettest.Super(in6.TCP(tcp, nettest.Payload(65435)), 1440), 1},
		"more segments than one superpacket takes": {nettest.Super(in4.TCP(tcp, nettest.Payload(60000)), 100), 3},
		"UDP":            {nettest.Super(in4.UDP(nettest.UDP{SrcPort: 3, DstPort: 4}, nettest.Payload(30000)), 1200), 1},
		"UDP, short end": {nettest.Super(in4.UDP(nettest.UDP{SrcPort: 3, DstPort: 4}, nettest.Payload(30001)), 1200), 1},
		"UDP over IPv6":  {nettest.Super(in6.UDP(nettest.UDP{SrcPort: 3, DstPort: 4}, nettest.Payload(30000)), 1200), 1},
		"UDP of 1 byte":  {nettest.Super(in4.UDP(nettest.UDP{SrcPort: 3, DstPort: 4}, nettest.Payload(10)), 1), 1},
	} {
		t.Run(name, func(t *testing.T) {
			d, w := newDevice(t)
			want := nettest.Segment(c.super)
			d.Send(packet.NewScratch(), segmentsOf(c.super))
			got := w.packets()
			if len(got) != c.frames {
				t.Fatalf("%d frames, want %d (drops %v)", len(got), c.frames, drops(d))
			}
			checkSame(t, got, want)
			s := d.Stats()
			if s.Writes != uint64(c.frames) || s.WritePackets != uint64(len(want)) || s.WriteSuperpackets != uint64(c.frames) {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// checkSame cuts what the container got and compares.
func checkSame(t *testing.T, got []*packet.Packet, want [][]byte) {
	t.Helper()
	var pieces [][]byte
	for _, p := range got {
		if p.GSO != packet.GSONone {
			if hl := int(p.CsumStart); p.Bytes()[0]>>4 == 4 && nettest.Sum(p.Bytes()[:hl]) != 0xffff {
				t.Error("the superpacket's IPv4 checksum is wrong")
			}
			if p.SegSize == 0 || !p.NeedsCsum {
				t.Errorf("superpacket %+v", p)
			}
			// The pseudo header is that of the whole superpacket.
			again := nettest.Packet(p.Bytes())
			nettest.Owe(again)
			if !bytes.Equal(again.Bytes(), p.Bytes()) {
				t.Error("the superpacket's pseudo header sum is wrong")
			}
		}
		pieces = append(pieces, nettest.Segment(p)...)
	}
	if len(pieces) != len(want) {
		t.Fatalf("%d packets, want %d", len(pieces), len(want))
	}
	for i := range want {
		if !bytes.Equal(pieces[i], want[i]) {
			t.Fatalf("packet %d became\n%x, was\n%x", i, pieces[i], want[i])
		}
	}
}

func TestSend_KeepsApartWhatIsNotOneFlow(t *testing.T) {
	const seg = 100
	tcp := nettest.TCP{SrcPort: 80, DstPort: 5000, Seq: 1000, Ack: 9, Flags: nettest.ACK, Window: 700, Options: []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}}
	type spec struct {
		ip   nettest.IP
		tcp  nettest.TCP
		size int
	}
	two := func(edit func(a, b *spec)) [][]byte {
		a, b := spec{in4, tcp, seg}, spec{in4, tcp, seg}
		b.tcp.Seq += seg
		edit(&a, &b)
		return [][]byte{a.ip.TCP(a.tcp, nettest.Payload(a.size)), b.ip.TCP(b.tcp, nettest.Payload(b.size))}
	}
	udp := func(second nettest.UDP, size int) [][]byte {
		return [][]byte{in4.UDP(nettest.UDP{SrcPort: 1, DstPort: 2}, nettest.Payload(seg)), in4.UDP(second, nettest.Payload(size))}
	}
	flags := func(f uint8) [][]byte { return two(func(_, b *spec) { b.tcp.Flags = f }) }
	firstFlags := func(f uint8) [][]byte { return two(func(a, _ *spec) { a.tcp.Flags = f }) }
	for name, c := range map[string]struct {
		ips    [][]byte
		frames int
	}{
		"nothing differs":       {two(func(_, _ *spec) {}), 1},
		"ack":                   {two(func(_, b *spec) { b.tcp.Ack++ }), 2},
		"window":                {two(func(_, b *spec) { b.tcp.Window++ }), 2},
		"TCP option":            {two(func(_, b *spec) { b.tcp.Options = []byte{1, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 2} }), 2},
		"no TCP options":        {two(func(_, b *spec) { b.tcp.Options = nil }), 2},
		"source port":           {two(func(_, b *spec) { b.tcp.SrcPort++ }), 2},
		"destination port":      {two(func(_, b *spec) { b.tcp.DstPort++ }), 2},
		"accurate ECN":          {two(func(_, b *spec) { b.tcp.Reserved = 1 }), 2},
		"TTL":                   {two(func(_, b *spec) { b.ip.TTL = 63 }), 2},
		"TOS":                   {two(func(_, b *spec) { b.ip.TOS = 4 }), 2},
		"CE":                    {two(func(a, b *spec) { a.ip.TOS, b.ip.TOS = 2, 3 }), 2},
		"DF":                    {two(func(_, b *spec) { b.ip.Frag = nettest.DF }), 2},
		"source":                {two(func(_, b *spec) { b.ip.Src = nettest.Between("10.2.0.3", "10.1.0.2").Src }), 2},
		"IP option":             {two(func(_, b *spec) { b.ip.Options = []byte{1, 1, 1, 1} }), 2},
		"IP options":            {two(func(a, b *spec) { a.ip.Options, b.ip.Options = []byte{1, 1, 1, 1}, []byte{1, 1, 1, 0} }), 2},
		"gap":                   {two(func(_, b *spec) { b.tcp.Seq++ }), 2},
		"overlap":               {two(func(_, b *spec) { b.tcp.Seq-- }), 2},
		"repeated":              {two(func(_, b *spec) { b.tcp.Seq -= seg }), 2},
		"longer second":         {two(func(_, b *spec) { b.size++ }), 2},
		"shorter second":        {two(func(_, b *spec) { b.size-- }), 1},
		"pure ACK second":       {two(func(_, b *spec) { b.size = 0 }), 2},
		"pure ACK first":        {two(func(a, b *spec) { a.size, b.tcp.Seq = 0, a.tcp.Seq }), 2},
		"PSH second":            {flags(nettest.ACK | nettest.PSH), 1},
		"PSH first":             {firstFlags(nettest.ACK | nettest.PSH), 2},
		"FIN":                   {flags(nettest.ACK | nettest.FIN), 2},
		"SYN":                   {flags(nettest.ACK | nettest.SYN), 2},
		"RST":                   {flags(nettest.ACK | nettest.RST), 2},
		"URG":                   {flags(nettest.ACK | nettest.URG), 2},
		"ECE":                   {flags(nettest.ACK | nettest.ECE), 2},
		"CWR":                   {flags(nettest.ACK | nettest.CWR), 2},
		"no ACK":                {flags(0), 2},
		"FIN first":             {firstFlags(nettest.ACK | nettest.FIN), 2},
		"CWR first":             {firstFlags(nettest.ACK | nettest.CWR), 2},
		"fragments":             {two(func(a, b *spec) { a.ip.Frag, b.ip.Frag = nettest.MF, nettest.MF }), 2},
		"later fragments":       {two(func(a, b *spec) { a.ip.Frag, b.ip.Frag = 5, 5 }), 2},
		"other family":          {[][]byte{in4.TCP(tcp, nettest.Payload(seg)), in6.TCP(tcp, nettest.Payload(seg))}, 2},
		"UDP":                   {udp(nettest.UDP{SrcPort: 1, DstPort: 2}, seg), 1},
		"UDP shorter":           {udp(nettest.UDP{SrcPort: 1, DstPort: 2}, seg-1), 1},
		"UDP longer":            {udp(nettest.UDP{SrcPort: 1, DstPort: 2}, seg+1), 2},
		"UDP empty":             {udp(nettest.UDP{SrcPort: 1, DstPort: 2}, 0), 2},
		"UDP source port":       {udp(nettest.UDP{SrcPort: 3, DstPort: 2}, seg), 2},
		"UDP destination port":  {udp(nettest.UDP{SrcPort: 1, DstPort: 3}, seg), 2},
		"UDP without checksum":  {udp(nettest.UDP{SrcPort: 1, DstPort: 2, NoChecksum: true}, seg), 2},
		"TCP and UDP":           {[][]byte{in4.TCP(tcp, nettest.Payload(seg)), in4.UDP(nettest.UDP{SrcPort: 80, DstPort: 5000}, nettest.Payload(seg+24))}, 2},
		"ICMP":                  {[][]byte{in4.ICMP(8, 0, 1, nettest.Payload(seg)), in4.ICMP(8, 0, 1, nettest.Payload(seg))}, 2},
		"IPv6 hop limit":        {v6pair(func(b []byte) { b[7]-- }), 2},
		"IPv6 traffic class":    {v6pair(func(b []byte) { b[1] ^= 0x10 }), 2},
		"IPv6 flow label":       {v6pair(func(b []byte) { b[3] ^= 1 }), 2},
		"IPv6, nothing differs": {v6pair(func([]byte) {}), 1},
	} {
		t.Run(name, func(t *testing.T) {
			d, w := newDevice(t)
			d.Send(packet.NewScratch(), []*packet.Packet{verified(c.ips[0]), verified(c.ips[1])})
			got := w.packets()
			if len(got) != c.frames {
				t.Fatalf("%d frames, want %d", len(got), c.frames)
			}
			if c.frames == 2 {
				checkSame(t, got, c.ips)
			}
		})
	}
}

func v6pair(edit func(second []byte)) [][]byte {
	tcp := nettest.TCP{Seq: 5, Flags: nettest.ACK}
	a := in6.TCP(tcp, nettest.Payload(100))
	tcp.Seq += 100
	b := in6.TCP(tcp, nettest.Payload(100))
	edit(b)
	return [][]byte{a, b}
}

func TestSend_JoinsOnlyVerifiedPackets(t *testing.T) {
	super := nettest.Super(in4.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(3000)), 1000)
	want := nettest.Segment(super)
	for i := range 3 {
		d, w := newDevice(t)
		pkts := segmentsOf(super)
		pkts[i].Verified = false
		d.Send(packet.NewScratch(), pkts)
		got := w.packets()
		checkSame(t, got, want)
		// The unverified one stands alone, and its checksum is for the container's kernel to judge.
		alone := 0
		for _, p := range got {
			if !p.NeedsCsum {
				alone++
				if !bytes.Equal(p.Bytes(), want[i]) {
					t.Errorf("segment %d unverified: it is not the one that owes nothing", i)
				}
			}
		}
		if alone != 1 {
			t.Errorf("segment %d unverified: %d frames owe nothing, want 1", i, alone)
		}
	}
}

func TestSend_KeepsUDPApartWithoutUSO(t *testing.T) {
	d, w := newDevice(t)
	d.uso = false
	super := nettest.Super(in4.UDP(nettest.UDP{SrcPort: 1, DstPort: 2}, nettest.Payload(3000)), 1000)
	d.Send(packet.NewScratch(), segmentsOf(super))
	if got := w.packets(); len(got) != 3 {
		t.Errorf("%d frames, want 3", len(got))
	}
}

func TestSend_JoinsNoMoreDatagramsThanTheKernelTakes(t *testing.T) {
	d, w := newDevice(t)
	super := nettest.Super(in4.UDP(nettest.UDP{SrcPort: 1, DstPort: 2}, nettest.Payload(150*10)), 10)
	d.Send(packet.NewScratch(), segmentsOf(super))
	var sizes []int
	for _, p := range w.packets() {
		sizes = append(sizes, (p.Len()-28)/10)
	}
	if want := []int{64, 64, 22}; !slices.Equal(sizes, want) {
		t.Errorf("superpackets of %v datagrams, want %v", sizes, want)
	}
}

func TestSend_KeepsTheOrder(t *testing.T) {
	d, w := newDevice(t)
	a := segmentsOf(nettest.Super(in4.TCP(nettest.TCP{SrcPort: 1, Flags: nettest.ACK}, nettest.Payload(3000)), 1000))
	b := segmentsOf(nettest.Super(in4.TCP(nettest.TCP{SrcPort: 2, Flags: nettest.ACK}, nettest.Payload(2000)), 1000))
	ping := verified(in4.ICMP(8, 0, 1, nil))
	all := []*packet.Packet{ping, a[0], a[1], b[0], b[1], a[2], ping}
	var want [][]byte
	for _, p := range all {
		want = append(want, bytes.Clone(p.Bytes()))
	}
	d.Send(packet.NewScratch(), all)
	got := w.packets()
	if len(got) != 5 {
		t.Errorf("%d frames, want ping, a+a, b+b, a, ping", len(got))
	}
	checkSame(t, got, want)
}

// The rule of the packet path: a packet becomes CHECKSUM_PARTIAL, and so is believed by the container's kernel, if and
// only if something on the way has verified it.
func TestSend_OwesTheChecksumOfVerifiedPacketsAlone(t *testing.T) {
	frag, odd := in4, in4.UDP(nettest.UDP{SrcPort: 1}, nettest.Payload(10))
	frag.Frag = nettest.MF
	odd[25]-- // the datagram ends before its packet does
	for name, c := range map[string]struct {
		ip   []byte
		owed bool // if verified
	}{
		"TCP":                     {in4.TCP(nettest.TCP{Flags: nettest.SYN}, nil), true},
		"TCP over IPv6":           {in6.TCP(nettest.TCP{Flags: nettest.SYN}, nil), true},
		"UDP":                     {in4.UDP(nettest.UDP{SrcPort: 1}, nettest.Payload(10)), true},
		"UDP over IPv6":           {in6.UDP(nettest.UDP{SrcPort: 1}, nettest.Payload(10)), true},
		"UDP without checksum":    {in4.UDP(nettest.UDP{SrcPort: 1, NoChecksum: true}, nettest.Payload(10)), false},
		"UDP shorter than packet": {odd, false},
		"ICMP":                    {in4.ICMP(8, 0, 1, nil), false},
		"ICMPv6":                  {in6.ICMP(128, 0, 1, nil), false},
		"fragment":                {frag.UDP(nettest.UDP{SrcPort: 1}, nettest.Payload(10)), false},
		"TCP cut short":           {in4.Raw(packet.TCP, nettest.Payload(17)), false},
		"UDP cut short":           {in4.Raw(packet.UDP, nettest.Payload(7)), false},
		"IP header alone":         {in4.Raw(packet.TCP, nil), false},
	} {
		t.Run(name, func(t *testing.T) {
			for _, v := range []bool{false, true} {
				d, w := newDevice(t)
				p := nettest.Packet(c.ip)
				p.Verified = v
				d.Send(packet.NewScratch(), []*packet.Packet{p})
				f := w.frames()
				if len(f) != 1 {
					t.Fatalf("%d frames", len(f))
				}
				if owed := f[0][0]&vnetNeedsCsum != 0; owed != (v && c.owed) {
					t.Errorf("verified %v: checksum owed %v", v, owed)
				}
				if !(v && c.owed) {
					if !bytes.Equal(f[0][linkHdrLen:], c.ip) {
						t.Error("the packet was changed")
					}
					continue
				}
				got := nettest.Packet(f[0][linkHdrLen:])
				if err := readVnetHdr(f[0], got); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(nettest.Finish(got), c.ip) {
					t.Error("the checksum once paid is another than before")
				}
			}
		})
	}
}

func TestSend_ReadsNoMoreThanItIsLent(t *testing.T) {
	// Datagrams of a train lie end to end: no segment may be written with a byte of its neighbour.
	super := nettest.Super(in4.TCP(nettest.TCP{Flags: nettest.ACK | nettest.PSH}, nettest.Payload(3500)), 1000)
	want := nettest.Segment(super)
	train := append(make([]byte, packet.Headroom), bytes.Join(want, nil)...)
	var pkts []*packet.Packet
	for at, i := packet.Headroom, 0; i < len(want); i++ {
		end := at + len(want[i])
		p := &packet.Packet{Buf: train[at:end:end], Verified: true}
		if i == 0 {
			p = &packet.Packet{Buf: train[:end:end], Off: at, Verified: true}
		}
		pkts, at = append(pkts, p), end
	}
	d, w := newDevice(t)
	d.Send(packet.NewScratch(), pkts)
	checkSame(t, w.packets(), want)
	if binary.BigEndian.Uint16(want[0][2:]) != 1040 {
		t.Fatal("the test's segments are not what it thinks")
	}
}
