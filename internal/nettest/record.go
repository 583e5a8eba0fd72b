// This file is the two ends of a path under test: a next hop that remembers, and a device that can be polled.

package nettest

import (
	"encoding/binary"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Recorder is a packet.Sender that keeps copies of what it is sent. If the test fails they are written to a pcap file. Safe
// for concurrent use.
type Recorder struct {
	mu   sync.Mutex
	sent []packet.Packet
	more chan struct{}
}

// NewRecorder returns a Recorder of a test.
func NewRecorder(t testing.TB) *Recorder {
	r := &Recorder{more: make(chan struct{}, 1)}
	t.Cleanup(func() {
		if t.Failed() {
			r.dump(t)
		}
	})
	return r
}

// Send keeps copies. See packet.Sender.
func (r *Recorder) Send(_ *packet.Scratch, pkts []*packet.Packet) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range pkts {
		c := *p
		c.Buf = append([]byte(nil), p.Buf...)
		r.sent = append(r.sent, c)
	}
	select {
	case r.more <- struct{}{}:
	default:
	}
}

// Packets are the packets so far, in order.
func (r *Recorder) Packets() []packet.Packet {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]packet.Packet(nil), r.sent...)
}

// Take is Packets, and forgets them.
func (r *Recorder) Take() []packet.Packet {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sent
	r.sent = nil
	return s
}

// Wait returns the packets once there are n, and fails the test if they do not come.
func (r *Recorder) Wait(t testing.TB, n int) []packet.Packet {
	t.Helper()
	lost := time.After(20 * time.Second)
	for {
		if s := r.Packets(); len(s) >= n {
			return s
		}
		select {
		case <-r.more:
		case <-lost:
			t.Fatalf("%d packets came, want %d", len(r.Packets()), n)
		}
	}
}

// dump writes a pcap file of raw IP packets (LINKTYPE_RAW, https://www.tcpdump.org/manpages/pcap-savefile.5.html).
func (r *Recorder) dump(t testing.TB) {
	const linkTypeRaw = 101
	sent := r.Packets()
	if len(sent) == 0 {
		return
	}
	b := binary.LittleEndian.AppendUint32(nil, 0xa1b2c3d4)
	b = append(b, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, 1<<18)
	b = binary.LittleEndian.AppendUint32(b, linkTypeRaw)
	for i, p := range sent {
		b = binary.LittleEndian.AppendUint32(b, 0)
		b = binary.LittleEndian.AppendUint32(b, uint32(i)) // their order, in microseconds
		b = binary.LittleEndian.AppendUint32(b, uint32(p.Len()))
		b = binary.LittleEndian.AppendUint32(b, uint32(p.Len()))
		b = append(b, p.Bytes()...)
	}
	f, err := os.CreateTemp("", "nettest-*.pcap")
	if err != nil {
		t.Logf("packets not dumped: %v", err)
		return
	}
	defer func() { _ = f.Close() }()
	if _, err := f.Write(b); err != nil {
		t.Logf("packets not dumped: %v", err)
		return
	}
	t.Logf("what was sent is in %s", f.Name())
}

// Device is a Recorder that can also be read from, with a descriptor that polls readable while packets wait. It fits
// forwarder.Device.
type Device struct {
	*Recorder
	fd      int
	reading atomic.Int32

	mu      sync.Mutex
	waiting []packet.Packet
	err     error
}

// NewDevice returns a Device whose descriptor is closed when the test ends.
func NewDevice(t testing.TB) *Device {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatalf("eventfd: %v", err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return &Device{Recorder: NewRecorder(t), fd: fd}
}

// FD is the descriptor to poll.
func (d *Device) FD() int { return d.fd }

// Inject makes pkts wait to be read, as if the container had sent them.
func (d *Device) Inject(pkts ...*packet.Packet) {
	d.mu.Lock()
	for _, p := range pkts {
		d.waiting = append(d.waiting, *p)
	}
	d.mu.Unlock()
	d.ring()
}

// Fail makes the next Read return err, as when the TAP has gone.
func (d *Device) Fail(err error) {
	d.mu.Lock()
	d.err = err
	d.mu.Unlock()
	d.ring()
}

func (d *Device) ring() { _, _ = unix.Write(d.fd, binary.NativeEndian.AppendUint64(nil, 1)) }

// Read fills rx with what waits.
func (d *Device) Read(rx *packet.Rx) error {
	if d.reading.Add(1) != 1 {
		panic("nettest: two readers of one device")
	}
	defer d.reading.Add(-1)
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.waiting) > 0 {
		space := rx.Space()
		if space == nil {
			return nil
		}
		w := d.waiting[0]
		d.waiting = d.waiting[1:]
		p := rx.Add(copy(space[packet.Headroom:], w.Bytes()))
		w.Buf, w.Off = p.Buf, p.Off
		*p = w
	}
	var counter [8]byte
	_, _ = unix.Read(d.fd, counter[:])
	return d.err
}

// Reading tells whether a Read is in progress.
func (d *Device) Reading() bool { return d.reading.Load() != 0 }

// Discard is a next hop that takes everything and keeps a count of it. Not safe for concurrent use.
type Discard struct{ Packets, Bytes int }

// Send counts. See packet.Sender.
func (d *Discard) Send(_ *packet.Scratch, pkts []*packet.Packet) {
	d.Packets += len(pkts)
	for _, p := range pkts {
		d.Bytes += p.Len()
	}
}
