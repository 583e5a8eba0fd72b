// This file feeds the parsers of a container's frames with anything at all.

package tap

import (
	"bytes"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// FuzzFrame reads any frame as Device.Read does: it is answered, dropped, or a packet whose offload facts fit it.
func FuzzFrame(f *testing.F) {
	for _, c := range goldenVnetHdrs {
		f.Add(frame(c.p))
	}
	f.Add(hexBytes(f, arpAsks))
	f.Add(solicit("fd00:1::2", "fd00:1::1"))
	d := toNull(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < linkHdrLen || len(b) > linkHdrLen+packet.MaxIP || !d.accept(b) {
			return
		}
		p := &packet.Packet{Buf: b, Off: linkHdrLen}
		if readVnetHdr(b, p) != nil {
			return
		}
		if p.Verified {
			t.Fatal("a container's packet is called verified")
		}
		if p.NeedsCsum && (p.CsumStart < 20 || int(p.CsumStart)+int(p.CsumOffset)+2 > p.Len()) {
			t.Fatalf("the checksum is outside of the payload: %+v", p)
		}
		if p.GSO == packet.GSONone {
			return
		}
		if !p.NeedsCsum || p.SegSize == 0 || p.HdrLen > packet.MaxHeaders || int(p.HdrLen) >= p.Len() || p.HdrLen < p.CsumStart+8 {
			t.Fatalf("superpacket %+v of %d bytes", p, p.Len())
		}
		again := make([]byte, vnetHdrLen)
		putVnetHdr(again, p)
		q := &packet.Packet{Buf: b, Off: linkHdrLen}
		if err := readVnetHdr(again, q); err != nil || !equalFacts(*p, *q) {
			t.Fatalf("written and read again: %v, %+v, was %+v", err, q, p)
		}
	})
}

// FuzzCoalesce sends edited segments of a flow: whatever is joined can be taken apart into what it was.
func FuzzCoalesce(f *testing.F) {
	f.Add(uint8(0), []byte{})
	f.Add(uint8(1), []byte{1, 8, 1, 2, 33, 8})
	f.Add(uint8(2), []byte{3, 52, 0x10})
	f.Add(uint8(3), []byte{0, 20, 1, 5, 6, 0x20})
	tcp := nettest.TCP{Seq: 0xfffffff0, Flags: nettest.ACK, Options: []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}}
	bases := []*packet.Packet{
		nettest.Super(in4.TCP(tcp, nettest.Payload(790)), 100),
		nettest.Super(in6.TCP(tcp, nettest.Payload(790)), 100),
		nettest.Super(in4.UDP(nettest.UDP{SrcPort: 7}, nettest.Payload(790)), 100),
		nettest.Super(in6.UDP(nettest.UDP{SrcPort: 7}, nettest.Payload(790)), 100),
	}
	d, far := newDevice(f)
	s := packet.NewScratch()
	f.Fuzz(func(t *testing.T, base uint8, edits []byte) {
		w := wire{t, far.fd}
		segs := nettest.Segment(bases[int(base)%len(bases)])
		for ; len(edits) >= 3; edits = edits[3:] { // which segment, which byte of its headers, how it differs
			ip := segs[int(edits[0])%len(segs)]
			ip[int(edits[1])%80] ^= edits[2]
		}
		var pkts []*packet.Packet
		var want [][]byte
		for _, ip := range segs {
			nettest.Fix(ip)
			if nettest.Check(ip) == nil { // the Router sends no others
				pkts, want = append(pkts, verified(ip)), append(want, ip)
			}
		}
		d.Send(s, pkts)
		var got [][]byte
		for _, fr := range w.frames() {
			p := nettest.Packet(fr[linkHdrLen:])
			if err := readVnetHdr(fr, p); err != nil {
				t.Fatal(err)
			}
			got = append(got, nettest.Segment(p)...)
		}
		if len(got) != len(want) {
			t.Fatalf("%d packets, want %d", len(got), len(want))
		}
		for i := range got {
			if a, b := essence(got[i]), essence(want[i]); !bytes.Equal(a, b) {
				t.Fatalf("packet %d became\n%x, was\n%x", i, a, b)
			}
		}
	})
}

// essence is a packet without what a superpacket may lose: the identification of IPv4, which means nothing unless
// fragmented, and an urgent pointer without URG.
func essence(ip []byte) []byte {
	b := bytes.Clone(ip)
	if proto, l4, ok := packet.Transport(b); ok && proto == packet.TCP && b[l4+13]&nettest.URG == 0 {
		b[l4+18], b[l4+19] = 0, 0
	}
	if b[0]>>4 == 4 && b[6]&0x3f == 0 && b[7] == 0 {
		b[4], b[5] = 0, 0
	}
	nettest.Fix(b)
	return b
}
