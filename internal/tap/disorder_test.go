// This file tests the joining of segments on a bad underlay: whatever is lost, doubled or out of order, the container gets just what came.

package tap

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func TestSend_JoinsNothingThatDidNotComeInThisOrder(t *testing.T) {
	tcp := nettest.TCP{SrcPort: 80, DstPort: 5000, Seq: 0xfffff000, Ack: 9, Flags: nettest.ACK, Window: 700} // the numbers wrap
	other := tcp
	other.DstPort++
	later := tcp // of the first flow, far ahead
	later.Seq += 20000
	joined := uint64(0)
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 7))
		flows := [][]*packet.Packet{
			segmentsOf(nettest.Super(in4.TCP(tcp, nettest.Payload(20000)), 1000)),
			segmentsOf(nettest.Super(in4.TCP(other, nettest.Payload(9500)), 1000)),
			segmentsOf(nettest.Super(in4.TCP(later, nettest.Payload(4000)), 1000)),
			segmentsOf(nettest.Super(in6.TCP(tcp, nettest.Payload(8000)), 1000)),
			segmentsOf(nettest.Super(in4.UDP(nettest.UDP{SrcPort: 3, DstPort: 4}, nettest.Payload(6000)), 1000)),
		}
		var came []*packet.Packet
		for len(flows) > 0 { // some of one, some of another
			i := random.IntN(len(flows))
			n := 1 + random.IntN(len(flows[i]))
			came = append(came, flows[i][:n]...)
			if flows[i] = flows[i][n:]; len(flows[i]) == 0 {
				flows = append(flows[:i], flows[i+1:]...)
			}
		}
		var arrived []*packet.Packet
		for i, p := range came {
			switch random.IntN(12) {
			case 0: // lost
			case 1: // doubled
				arrived = append(arrived, p, verified(bytes.Clone(p.Bytes())))
			case 2: // overtaken by the one after it
				if i+1 < len(came) {
					came[i], came[i+1] = came[i+1], p
				}
				arrived = append(arrived, came[i])
			default:
				arrived = append(arrived, p)
			}
		}
		var want [][]byte
		for _, p := range arrived {
			want = append(want, bytes.Clone(p.Bytes()))
		}
		d, w := newDevice(t)
		d.Send(packet.NewScratch(), arrived)
		var got [][]byte
		for _, p := range w.packets() {
			got = append(got, nettest.Segment(p)...)
		}
		if len(got) != len(want) {
			t.Fatalf("seed %d: %d packets, want %d", seed, len(got), len(want))
		}
		for i := range want {
			if !bytes.Equal(essence(got[i]), essence(want[i])) {
				t.Fatalf("seed %d: packet %d is another", seed, i)
			}
		}
		joined += d.Stats().WriteSuperpackets
	}
	if joined == 0 {
		t.Error("nothing was ever joined")
	}
}
