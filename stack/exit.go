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

// exitQueue is a ring of packets. push never blocks; a full ring drops. Whoever produces bulk data without holding a lock calls
// waitRoom first, so that drops are left to bursts.
type exitQueue struct {
	count *counters

	mu     sync.Mutex
	filled sync.Cond // a packet came, or the queue was closed
	roomy  sync.Cond // the ring is less than half full again, or the queue was closed
	ring   []*gstack.PacketBuffer
	head   int
	n      int
	closed bool
}

func newExitQueue(size int, c *counters) *exitQueue {
	q := &exitQueue{ring: make([]*gstack.PacketBuffer, size), count: c}
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
	if q.n == 1 {
		q.filled.Signal()
	}
	q.mu.Unlock()
	return true
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
	q.filled.Broadcast()
	q.roomy.Broadcast()
	q.mu.Unlock()
}

// take waits for packets and moves up to len(dst) of them there. Zero means that the queue is closed and empty.
func (q *exitQueue) take(dst []*gstack.PacketBuffer) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.n == 0 && !q.closed {
		q.filled.Wait()
	}
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

// drain gives packets to exit until the queue is closed and empty.
func (q *exitQueue) drain(exit func([]*packet.Packet), c *counters) {
	var (
		taken  [exitBatch]*gstack.PacketBuffer
		memory [exitBatch]packet.Packet
		batch  = make([]*packet.Packet, 0, exitBatch)
		arena  = make([]byte, exitArena)
	)
	flush := func() {
		if len(batch) > 0 {
			exit(batch)
			batch = batch[:0]
		}
	}
	for {
		n := q.take(taken[:])
		if n == 0 {
			return
		}
		used, bytes := 0, 0
		for i, pb := range taken[:n] {
			size := packet.Headroom + pb.Size()
			if used+size > len(arena) {
				flush()
				used = 0
			}
			p := &memory[i]
			p.Reset(arena[used:used+size:used+size], packet.Headroom)
			flatten(p, pb)
			pb.DecRef()
			taken[i] = nil
			batch = append(batch, p)
			bytes += p.Len()
			used += (size + packet.Headroom - 1) &^ (packet.Headroom - 1)
		}
		flush()
		c.packetsOut.Add(uint64(n))
		c.bytesOut.Add(uint64(bytes))
	}
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
