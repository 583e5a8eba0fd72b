// This file is the one queue of the packet path: what gVisor has for containers, bounded, drained by one goroutine.

package stack

import (
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// A batch for Exit ends at so many packets, or when their memory is full.
const (
	exitBatch = 64
	exitArena = 1 << 20 // bytes; 15 superpackets, or 64 packets of an MTU that is no larger than 16 KiB
)

// exitFew is how many packets may wait for the end of a turn (turn.go).
const exitFew = 8

// exitQueue is a ring of packets. push never blocks; a full ring drops. Whoever produces bulk data without holding a lock calls
// waitRoom first, so that drops are left to bursts. The packets are given to exit by the goroutine of drain, or, where there are few, by that of a
// turn at its end; by one at a time.
type exitQueue struct {
	count *counters
	exit  func([]*packet.Packet)

	mu       sync.Mutex
	filled   sync.Cond // drain has something to do
	roomy    sync.Cond // the ring is less than half full again, or the queue was closed
	ring     []*gstack.PacketBuffer
	head     int
	n        int
	closed   bool
	turns    int  // turns that have not ended
	waiting  bool // drain waits for filled
	draining bool // somebody gives packets to exit

	// of who is draining
	taken  [exitBatch]*gstack.PacketBuffer
	memory [exitBatch]packet.Packet
	batch  []*packet.Packet
	arena  []byte
}

func newExitQueue(size int, c *counters, exit func([]*packet.Packet)) *exitQueue {
	q := &exitQueue{
		count: c, exit: exit, ring: make([]*gstack.PacketBuffer, size),
		batch: make([]*packet.Packet, 0, exitBatch), arena: make([]byte, exitArena),
	}
	q.filled.L = &q.mu
	q.roomy.L = &q.mu
	return q
}

// push takes a reference to p. It says no when the ring is full (counted) or the queue closed.
func (q *exitQueue) push(p *gstack.PacketBuffer) bool {
	q.mu.Lock()
	if q.closed || q.n == len(q.ring) {
		q.mu.Unlock()
		q.count.drop(dropExitQueue)
		return false
	}
	q.ring[(q.head+q.n)%len(q.ring)] = p.IncRef()
	q.n++
	q.rouseLocked()
	q.mu.Unlock()
	return true
}

// dueLocked says that drain has something to do.
func (q *exitQueue) dueLocked() bool {
	return !q.draining && (q.closed || q.n >= exitFew || q.n > 0 && q.turns == 0)
}

// rouseLocked wakes drain if it has something to do.
func (q *exitQueue) rouseLocked() {
	if q.waiting && q.dueLocked() {
		q.waiting = false
		q.filled.Signal()
	}
}

// waitRoom returns when the ring is at most half full. The caller holds no lock.
func (q *exitQueue) waitRoom() {
	q.mu.Lock()
	for q.n > len(q.ring)/2 && !q.closed {
		q.roomy.Wait()
	}
	q.mu.Unlock()
}

func (q *exitQueue) length() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.n
}

// close lets drain return when it has emptied the ring. Nothing can be pushed any more.
func (q *exitQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.rouseLocked()
	q.roomy.Broadcast()
	q.mu.Unlock()
}

// beginTurn says that endTurn will be called soon, and few packets may wait for it.
func (q *exitQueue) beginTurn() {
	q.mu.Lock()
	q.turns++
	q.mu.Unlock()
}

// endTurn gives to exit what is there, unless it is much or somebody is at it.
func (q *exitQueue) endTurn() {
	q.mu.Lock()
	for q.n > 0 && q.n < exitFew && !q.draining {
		q.drainLocked()
	}
	q.turns--
	q.rouseLocked()
	q.mu.Unlock()
}

// drain gives packets to exit until the queue is closed and empty, and nobody gives any more.
func (q *exitQueue) drain() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for !q.dueLocked() {
			q.waiting = true
			q.filled.Wait()
		}
		if q.n == 0 { // closed
			return
		}
		q.drainLocked()
	}
}

// takeLocked moves up to len(dst) packets to dst.
func (q *exitQueue) takeLocked(dst []*gstack.PacketBuffer) int {
	n := min(q.n, len(dst))
	for i := range n {
		dst[i] = q.ring[q.head]
		q.ring[q.head] = nil
		q.head = (q.head + 1) % len(q.ring)
	}
	half := len(q.ring) / 2
	if q.n > half && q.n-n <= half {
		q.roomy.Broadcast()
	}
	q.n -= n
	return n
}

// drainLocked gives a batch to exit, with the queue unlocked meanwhile. Nobody is draining.
func (q *exitQueue) drainLocked() {
	n := q.takeLocked(q.taken[:])
	q.draining = true
	q.mu.Unlock()
	q.give(q.taken[:n])
	q.mu.Lock()
	q.draining = false
}

// give gives packets to exit.
func (q *exitQueue) give(taken []*gstack.PacketBuffer) {
	flush := func() {
		if len(q.batch) > 0 {
			q.exit(q.batch)
			q.batch = q.batch[:0]
		}
	}
	used, bytes := 0, 0
	for i, pb := range taken {
		size := packet.Headroom + pb.Size()
		if used+size > len(q.arena) {
			flush()
			used = 0
		}
		p := &q.memory[i]
		p.Reset(q.arena[used:used+size:used+size], packet.Headroom)
		flatten(p, pb)
		pb.DecRef()
		taken[i] = nil
		q.batch = append(q.batch, p)
		bytes += p.Len()
		used += (size + packet.Headroom - 1) &^ (packet.Headroom - 1)
	}
	flush()
	q.count.packetsOut.Add(uint64(len(taken)))
	q.count.bytesOut.Add(uint64(bytes))
}

// flatten copies gVisor's packet to p and translates what is owed to it.
func flatten(p *packet.Packet, pb *gstack.PacketBuffer) {
	views, skip := pb.AsViewList()
	at := p.Off
	for v := views.Front(); v != nil; v = v.Next() {
		at += copy(p.Buf[at:], after(v, &skip))
	}
	gso := pb.GSOOptions
	if gso.Type == gstack.GSONone || !gso.NeedsCsum {
		return
	}
	p.NeedsCsum = true
	p.CsumStart = gso.L3HdrLen
	p.CsumOffset = gso.CsumOffset
	if pb.Data().Size() <= int(gso.MSS) {
		return
	}
	p.HdrLen = uint16(pb.HeaderSize())
	p.SegSize = gso.MSS
	switch gso.Type {
	case gstack.GSOTCPv4:
		p.GSO = packet.GSOTCPv4
	case gstack.GSOTCPv6:
		p.GSO = packet.GSOTCPv6
	}
}

// after is what is left of a view once skip bytes, counted down over the views, are passed over.
func after(v *buffer.View, skip *int) []byte {
	b := v.AsSlice()
	n := min(*skip, len(b))
	*skip -= n
	return b[n:]
}
