// Tests of how the ports of a loop share its time.

package forwarder

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// endless is a device that always has a batch, of a packet each, and counts them.
type endless struct {
	*nettest.Device
	ip      []byte
	batches int
}

func newEndless(t *testing.T, ip []byte) *endless {
	e := &endless{Device: nettest.NewDevice(t), ip: ip}
	e.Inject(pkt(ip)) // readable, and never read
	return e
}

func (e *endless) Read(rx *packet.Rx) error {
	e.batches++
	rx.Add(copy(rx.Space()[packet.Headroom:], e.ip))
	return nil
}

// costly is a next hop that takes its time.
type costly struct{ each time.Duration }

func (c costly) Send(*packet.Scratch, []*packet.Packet) { time.Sleep(c.each) }

// rounds are rounds of a loop until done.
func (l *loop) rounds(t *testing.T, done func() bool) {
	t.Helper()
	events := make([]unix.EpollEvent, maxEvents)
	for !done() {
		n, err := l.poll(events, 0)
		if err != nil {
			t.Fatal(err)
		}
		l.readPorts(events[:n])
	}
}

func TestReadPorts_ShareTimeAndNotBatches(t *testing.T) {
	g := newRig(t)
	l := g.loops[0]
	flood, other := newEndless(t, udp(containerA, outside, 10)), newEndless(t, udp(containerB, containerA, 10))
	for i, r := range g.table.Routes {
		if r.Hop.kind == hopEgress {
			g.table.Routes[i].Hop = ToEgress(costly{50 * time.Millisecond})
		}
	}
	g.set(g.table)
	for _, s := range []struct {
		p *Port
		d *endless
	}{{g.portA, flood}, {g.portB, other}} {
		l.remove(s.p)
		s.p.cfg.Device = s.d
		if err := l.add(s.p); err != nil {
			t.Fatal(err)
		}
	}
	l.rounds(t, func() bool { return flood.batches == 6 })
	if other.batches < 4*flood.batches {
		t.Errorf("%d batches beside %d that cost 50 ms each", other.batches, flood.batches)
	}
	// Alone it is not held up, and the one that was idle meanwhile has saved up nothing.
	l.remove(g.portB)
	l.rounds(t, func() bool { return flood.batches == 12 })
	if err := l.add(g.portB); err != nil {
		t.Fatal(err)
	}
	g.portB.used = 0
	events := make([]unix.EpollEvent, maxEvents)
	n, err := l.poll(events, 0)
	if err != nil {
		t.Fatal(err)
	}
	l.readPorts(events[:n])
	if behind := l.level - g.portB.used; behind > aheadAtMost {
		t.Errorf("it may be served for %v before anybody else", behind)
	}
}

func TestReadPorts_AreNotChargedForeverForABatchThatWasHeldUp(t *testing.T) {
	g := newRig(t)
	l := g.loops[0]
	held := newEndless(t, udp(containerA, outside, 10))
	for i, r := range g.table.Routes {
		if r.Hop.kind == hopEgress {
			g.table.Routes[i].Hop = ToEgress(costly{20 * owesAtMost}) // as if the daemon had been stopped meanwhile
		}
	}
	g.set(g.table)
	l.remove(g.portA)
	g.portA.cfg.Device = held
	if err := l.add(g.portA); err != nil {
		t.Fatal(err)
	}
	l.rounds(t, func() bool { return held.batches == 1 })
	if owes := g.portA.used - l.level; owes > owesAtMost {
		t.Errorf("it owes %v, of which %v are to be paid", owes, owesAtMost)
	}
}
