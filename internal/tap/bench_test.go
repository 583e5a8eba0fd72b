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
	var singles, singles6 [][]byte
	for i := range 64 {
		udp := nettest.UDP{SrcPort: uint16(i)}
		singles, singles6 = append(singles, in4.UDP(udp, nettest.Payload(64))), append(singles6, in6.UDP(udp, nettest.Payload(64)))
	}
	return map[string][][]byte{
		"tcp":     nettest.Segment(nettest.Super(in4.TCP(tcp, nettest.Payload(44*1420)), 1420)),
		"tcp6":    nettest.Segment(nettest.Super(in6.TCP(tcp, nettest.Payload(44*1400)), 1400)),
		"udp":     nettest.Segment(nettest.Super(in4.UDP(nettest.UDP{}, nettest.Payload(40*1200)), 1200)),
		"udp6":    nettest.Segment(nettest.Super(in6.UDP(nettest.UDP{}, nettest.Payload(40*1200)), 1200)),
		"singles": singles, "singles6": singles6,
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

// frames are what a Device reads: superpackets, and datagrams whose checksum is owed.
func frames() map[string][][]byte {
	ack := nettest.TCP{Flags: nettest.ACK}
	small := func(h nettest.IP) (fs [][]byte) {
		p := nettest.Packet(h.UDP(nettest.UDP{}, nettest.Payload(64)))
		nettest.Owe(p)
		for range 8 {
			fs = append(fs, frame(p))
		}
		return fs
	}
	return map[string][][]byte{
		"tso":    {frame(nettest.Super(out4.TCP(ack, nettest.Payload(44*1400)), 1400))},
		"tso6":   {frame(nettest.Super(out6.TCP(ack, nettest.Payload(44*1400)), 1400))},
		"uso":    {frame(nettest.Super(out4.UDP(nettest.UDP{}, nettest.Payload(40*1400)), 1400))},
		"uso6":   {frame(nettest.Super(out6.UDP(nettest.UDP{}, nettest.Payload(40*1400)), 1400))},
		"small":  small(out4),
		"small6": small(out6),
	}
}

// readAll puts the frames on the wire and reads them.
func readAll(t testing.TB, d *Device, w wire, rx *packet.Rx, frames [][]byte) {
	for _, f := range frames {
		w.write(f)
	}
	rx.Reset()
	if err := d.Read(rx); err != nil || len(rx.Packets()) != len(frames) {
		t.Fatal(err, len(rx.Packets()))
	}
}

func TestRead_AllocatesNothing(t *testing.T) {
	for name, fs := range frames() {
		d, w := newDevice(t)
		rx := packet.NewRx(64, 256<<10)
		if n := testing.AllocsPerRun(50, func() { readAll(t, d, w, rx, fs) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// BenchmarkRead reads frames from a socket in place of a TAP, the calls that write them with it.
func BenchmarkRead(b *testing.B) {
	for name, fs := range frames() {
		b.Run(fmt.Sprintf("%s-%d", name, len(fs)), func(b *testing.B) {
			d, w := newDevice(b)
			rx := packet.NewRx(64, 256<<10)
			bytes := 0
			for _, f := range fs {
				bytes += len(f) - linkHdrLen
			}
			b.SetBytes(int64(bytes))
			b.ReportAllocs()
			for b.Loop() {
				readAll(b, d, w, rx, fs)
			}
		})
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
