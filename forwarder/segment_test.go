// This file tests the cutting of superpackets against nettest's plain one, and owed checksums.

package forwarder

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	containerA, containerB, containerC = "10.1.0.2", "10.1.0.3", "10.2.0.2"
	containerA6, containerC6           = "fd00:1::2", "fd00:2::2"
)

// cut runs the segmenter to its end.
func cut(p *packet.Packet, partial bool) (out [][]byte) {
	s := newSegmenter(p, partial)
	for {
		hdr := make([]byte, s.hdr)
		payload, ok := s.next(hdr)
		if !ok {
			return out
		}
		out = append(out, append(hdr, payload...))
	}
}

func TestSegmenter_CutsAsTheReferenceDoes(t *testing.T) {
	v4, v6 := nettest.Between(containerA, containerC), nettest.Between(containerA6, containerC6)
	withTOS := v4
	withTOS.TOS, withTOS.ID, withTOS.Frag, withTOS.TTL = 0x2e, 0xfffe, nettest.DF, 3
	withOptions := v4
	withOptions.Options = []byte{7, 7, 4, 0, 0, 0, 0, 0}
	manyOptions := v4
	manyOptions.Options = bytes.Repeat([]byte{1}, 40)
	timestamps := []byte{1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 3, 4}
	for name, h := range map[string]nettest.IP{"v4": v4, "v6": v6, "v4 tos df id wraps": withTOS, "v4 options": withOptions, "v4 all options": manyOptions} {
		for _, size := range []struct{ payload, seg int }{
			{1, 1}, {2, 1}, {1399, 1400}, {1400, 1400}, {1401, 1400}, {2800, 1400}, {5000, 1399}, {64000, 1398}, {65000, 65000}, {7, 3},
		} {
			for _, flags := range []uint8{nettest.ACK, nettest.ACK | nettest.PSH, nettest.ACK | nettest.FIN | nettest.PSH, nettest.ACK | nettest.CWR, nettest.ACK | nettest.ECE | nettest.CWR | nettest.PSH} {
				for _, options := range [][]byte{nil, timestamps, bytes.Repeat([]byte{1}, 40)} {
					tcp := nettest.TCP{SrcPort: 1234, DstPort: 80, Seq: 0xfffff000, Ack: 77, Flags: flags, Window: 501, Reserved: 1, Options: options}
					compare(t, fmt.Sprintf("tcp %s %v flags %#x options %d", name, size, flags, len(options)),
						nettest.Super(h.TCP(tcp, nettest.Payload(size.payload)), size.seg))
				}
			}
			compare(t, fmt.Sprintf("udp %s %v", name, size), nettest.Super(h.UDP(nettest.UDP{SrcPort: 53, DstPort: 9999}, nettest.Payload(size.payload)), size.seg))
		}
	}
}

func TestSegmenter_CutsRandomSuperpackets(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 11))
	for i := range 3000 {
		h := nettest.Between(containerA, containerC)
		if r.IntN(3) == 0 {
			h = nettest.Between(containerA6, containerC6)
		} else {
			h.Options = bytes.Repeat([]byte{1}, 4*r.IntN(11))
			h.ID, h.Frag = uint16(r.Uint32()), uint16(r.IntN(2))*nettest.DF
		}
		h.TTL, h.TOS = uint8(1+r.IntN(255)), uint8(r.Uint32())
		payload := nettest.Payload(1 + r.IntN(9000))
		if r.IntN(4) == 0 { // sums of zero and of ones
			payload = bytes.Repeat([]byte{byte(-r.IntN(2))}, len(payload))
		}
		seg := 1 + r.IntN(len(payload)+100)
		if len(payload)/seg > 500 {
			seg = 100
		}
		if r.IntN(2) == 0 {
			compare(t, fmt.Sprint("udp ", i), nettest.Super(h.UDP(nettest.UDP{SrcPort: uint16(r.Uint32()), DstPort: uint16(r.Uint32())}, payload), seg))
			continue
		}
		compare(t, fmt.Sprint("tcp ", i), nettest.Super(h.TCP(nettest.TCP{
			SrcPort: uint16(r.Uint32()), DstPort: uint16(r.Uint32()), Seq: r.Uint32(), Ack: r.Uint32(), Flags: uint8(r.Uint32()),
			Reserved: uint8(r.IntN(16)), Window: uint16(r.Uint32()), Options: nettest.Payload(4 * r.IntN(11)),
		}, payload), seg))
	}
}

func compare(t *testing.T, name string, p *packet.Packet) {
	t.Helper()
	want := nettest.Segment(p)
	for _, ip := range cut(p, true) {
		// What a peer that takes partial checksums makes of it.
		q := packet.Packet{Buf: ip, Verified: true}
		q.MarkPartial()
		if got := nettest.Finish(&q); len(want) == 0 || !bytes.Equal(got, want[0]) {
			t.Fatalf("%s: partial segment\n got %x\nwant %x", name, got, want)
		}
		want = want[1:]
	}
	want = nettest.Segment(p)
	got := cut(p, false)
	if len(got) != len(want) {
		t.Fatalf("%s: %d segments, want %d", name, len(got), len(want))
	}
	for i := range got {
		if err := nettest.Check(got[i]); err != nil {
			t.Fatalf("%s: segment %d: %v", name, i, err)
		}
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("%s: segment %d differs\n got %x\nwant %x", name, i, got[i], want[i])
		}
	}
}

func TestSegmenter_NeverSendsAUDPChecksumOfZero(t *testing.T) {
	// One of 65536 values of these two bytes makes the sum 0xffff and the checksum therefore zero.
	h := nettest.Between(containerA, containerC)
	found := false
	for x := range 1 << 16 {
		payload := binary.BigEndian.AppendUint16(nil, uint16(x))
		ip := h.UDP(nettest.UDP{SrcPort: 1, DstPort: 2}, payload)
		if binary.BigEndian.Uint16(ip[26:]) != 0xffff {
			continue
		}
		found = true
		for _, got := range [][]byte{cut(nettest.Super(ip, 1000), false)[0], completed(ip)} {
			if !bytes.Equal(got, ip) {
				t.Fatalf("got %x, want %x", got, ip)
			}
		}
	}
	if !found {
		t.Fatal("no payload has a checksum of zero: the test tests nothing")
	}
}

// completed takes the checksum out of ip and has it completed again.
func completed(ip []byte) []byte {
	p := nettest.Packet(ip)
	nettest.Owe(p)
	completeChecksum(p)
	return p.Bytes()
}

func TestCompleteChecksum_PaysWhatIsOwed(t *testing.T) {
	for _, h := range []nettest.IP{nettest.Between(containerA, containerC), nettest.Between(containerA6, containerC6)} {
		for n := range 70 {
			for _, ip := range [][]byte{
				h.UDP(nettest.UDP{SrcPort: 4000, DstPort: 53}, nettest.Payload(n)),
				h.TCP(nettest.TCP{SrcPort: 4000, DstPort: 53, Seq: 9, Flags: nettest.ACK}, nettest.Payload(n)),
			} {
				if got := completed(ip); !bytes.Equal(got, ip) {
					t.Fatalf("%d bytes: got %x, want %x", n, got, ip)
				}
			}
		}
	}
}

func TestSegmenter_LeavesTheSuperpacketAlone(t *testing.T) {
	p := nettest.Super(nettest.Between(containerA, containerC).TCP(nettest.TCP{Flags: nettest.ACK | nettest.FIN}, nettest.Payload(5000)), 1000)
	before := bytes.Clone(p.Bytes())
	cut(p, false)
	if !bytes.Equal(before, p.Bytes()) {
		t.Fatal("the superpacket was changed")
	}
}

func TestUnderlay_LeavesOwedChecksumsOnlyToPeersThatTakeThem(t *testing.T) {
	g := newRig(t)
	partial := g.peerCfg
	partial.PartialChecksums = true
	for _, c := range []struct {
		peer PeerConfig
		owed bool
	}{{g.peerCfg, false}, {partial, true}} {
		for i := range g.table.Routes {
			if g.table.Routes[i].Prefix.String() == "10.2.0.0/16" {
				g.table.Routes[i].Hop = ToPeer(c.peer)
			}
		}
		g.set(g.table)
		h := nettest.Between(containerA, containerC)
		for name, ip := range map[string][]byte{
			"tcp": h.TCP(nettest.TCP{SrcPort: 4000, DstPort: 53, Seq: 9, Flags: nettest.ACK}, nettest.Payload(99)),
			"udp": h.UDP(nettest.UDP{SrcPort: 4000, DstPort: 53}, nettest.Payload(99)),
		} {
			p := nettest.Packet(bytes.Clone(ip))
			nettest.Owe(p)
			g.fromA(p)
			got := datagrams(t, g.peer)
			if len(got) != 1 {
				t.Fatalf("%s: %d datagrams", name, len(got))
			}
			if owed := nettest.Check(got[0]) != nil; owed != c.owed {
				t.Errorf("%s to a peer with PartialChecksums %v: checksum still owed is %v", name, c.peer.PartialChecksums, owed)
			}
			q := packet.Packet{Buf: got[0], Verified: true}
			q.MarkPartial()
			if err := nettest.Check(nettest.Finish(&q)); err != nil {
				t.Errorf("%s as its receiver takes it: %v", name, err)
			}
		}
	}
}
