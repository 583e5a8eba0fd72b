// This file measures joining and reading, and holds both to allocate nothing.

package tap

import (
	"fmt"
	"os"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// batches are what a Device is sent: fresh makes the packets of a batch again, which Send has changed.
func batches() map[string][][]byte {
	tcp := nettest.TCP{Flags: nettest.ACK, Options: []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}}
	var singles [][]byte
	for i := range 64 {
		singles = append(singles, in4.UDP(nettest.UDP{SrcPort: uint16(i)}, nettest.Payload(64)))
	}
	return map[string][][]byte{
		"tcp":     nettest.Segment(nettest.Super(in4.TCP(tcp, nettest.Payload(44*1420)), 1420)),
		"tcp6":    nettest.Segment(nettest.Super(in6.TCP(tcp, nettest.Payload(44*1400)), 1400)),
		"udp":     nettest.Segment(nettest.Super(in4.UDP(nettest.UDP{}, nettest.Payload(40*1200)), 1200)),
		"singles": singles,
	}
}

type batch struct {
	ips  [][]byte
	pkts []packet.Packet
	ptrs []*packet.Packet
}

func newBatch(ips [][]byte) *batch {
	b := &batch{ips: ips, pkts: make([]packet.Packet, len(ips)), ptrs: make([]*packet.Packet, len(ips))}
	for i := range ips {
		b.pkts[i] = *verified(ips[i])
		b.ptrs[i] = &b.pkts[i]
	}
	return b
}

func (b *batch) fresh() []*packet.Packet {
	for i := range b.pkts {
		p := &b.pkts[i]
		*p = packet.Packet{Buf: p.Buf, Off: p.Off, Verified: true}
		copy(p.Bytes(), b.ips[i][:min(len(b.ips[i]), packet.MaxHeaders)])
	}
	return b.ptrs
}

// toNull is a Device that writes to /dev/null.
func toNull(t testing.TB) *Device {
	f, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	d, _ := newDevice(t)
	d.fd = int(f.Fd())
	return d
}

func TestSend_AllocatesNothing(t *testing.T) {
	for name, ips := range batches() {
		d, s, b := toNull(t), packet.NewScratch(), newBatch(ips)
		if n := testing.AllocsPerRun(50, func() { d.Send(s, b.fresh()) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
		if d.Stats().WritePackets == 0 {
			t.Errorf("%s: nothing was written", name)
		}
	}
}

func TestRead_AllocatesNothing(t *testing.T) {
	d, w := newDevice(t)
	f := frame(nettest.Super(out4.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(40000)), 1400))
	rx := packet.NewRx(64, 256<<10)
	n := testing.AllocsPerRun(50, func() {
		w.write(f)
		rx.Reset()
		if err := d.Read(rx); err != nil || len(rx.Packets()) != 1 {
			t.Fatal(err, len(rx.Packets()))
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkCoalesce joins segments and writes them to /dev/null: all but the kernel's part.
func BenchmarkCoalesce(b *testing.B) {
	for name, ips := range batches() {
		b.Run(fmt.Sprintf("%s-%d", name, len(ips)), func(b *testing.B) {
			d, s, batch := toNull(b), packet.NewScratch(), newBatch(ips)
			bytes := 0
			for _, ip := range ips {
				bytes += len(ip)
			}
			b.SetBytes(int64(bytes))
			b.ReportAllocs()
			for b.Loop() {
				d.Send(s, batch.fresh())
			}
		})
	}
}
