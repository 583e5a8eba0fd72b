// This file is the one queue of the packet path: what gVisor has for containers, bounded, drained by one goroutine, fair to the containers.
//
// Each container has a line of its own, and the lines are served in turn, quantum by quantum (deficit round robin: Shreedhar and
// Varghese, 1995). So one that downloads by a hundred connections fills its line and waits in it; the answer to another's ping is next.

package stack

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
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

const (
	// exitLines is the number of lines. Containers of one subnet share a line only where it has more addresses than there are lines.
	exitLines = 256
	// exitQuantum is what a line may send in its turn in bytes: no packet is longer.
	exitQuantum = 64 << 10
)

// exitQueue is lines of packets, with room for so many in all. push never blocks; where there is no room, the longest line loses. Whoever produces
// bulk data without holding a lock calls waitRoom first, so that drops are left to bursts. The packets are given to exit by the goroutine of drain,
// or, where there are few, by that of a turn at its end; by one at a time.
type exitQueue struct {
	count *counters
	exit  func([]*packet.Packet)

	crowded atomic.Bool // more than half full; changes with mu held

	mu       sync.Mutex
	filled   sync.Cond // drain has something to do
	roomy    sync.Cond // somebody who waits for room may have some, or the queue was closed
	slots    []exitSlot
	free     int32 // first free slot
	n        int
	lines    [exitLines]exitLine
	active   [exitLines]uint8 // a ring of the lines that are not empty, the next first
	first    uint8            // in active
	actives  int
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

// exitSlot is room for a packet, in a line or in the list of the free.
type exitSlot struct {
	pkt  *gstack.PacketBuffer
	next int32
}

// exitLine is the packets for one container, as a list of slots.
type exitLine struct {
	head, tail int32
	n          int
	credit     int  // bytes that it may still send in its turn; above zero while it is active
	awaited    bool // somebody waits for room in it
}

func newExitQueue(size int, c *counters, exit func([]*packet.Packet)) *exitQueue {
	q := &exitQueue{
		count: c, exit: exit, slots: make([]exitSlot, size),
		batch: make([]*packet.Packet, 0, exitBatch), arena: make([]byte, exitArena),
	}
	for i := range q.slots {
		q.slots[i].next = int32(i) + 1
	}
	q.filled.L = &q.mu
	q.roomy.L = &q.mu
	return q
}

// lineOf is the line of the container with an address, which ends as its other address does (as forwarder/steer.go has it).
func lineOf(a netip.Addr) uint8 {
	b := a.As16()
	return b[15]
}

// lineFor is the line of a packet.
func lineFor(p *gstack.PacketBuffer) uint8 {
	views, skip := p.AsViewList()
	v := views.Front()
	if v == nil {
		return 0
	}
	switch b := after(v, &skip); {
	case len(b) >= header.IPv4MinimumSize && b[0]>>4 == 4:
		return b[19]
	case len(b) >= header.IPv6MinimumSize && b[0]>>4 == 6:
		return b[39]
	}
	return 0
}

// push takes a reference to p. It says no when the queue is closed, or full, and the container has its share of it; the packet that has no room
// then, this or another's, is counted.
func (q *exitQueue) push(p *gstack.PacketBuffer) bool {
	line := lineFor(p)
	q.mu.Lock()
	if q.closed || q.n == len(q.slots) && !q.makeRoomLocked(line) {
		q.mu.Unlock()
		q.count.drop(dropExitQueue)
		return false
	}
	at := q.free
	q.free = q.slots[at].next
	q.slots[at] = exitSlot{pkt: p.IncRef()}
	l := &q.lines[line]
	if l.n == 0 {
		l.head, l.credit = at, exitQuantum
		q.active[(int(q.first)+q.actives)%exitLines] = line
		q.actives++
	} else {
		q.slots[l.tail].next = at
	}
	l.tail = at
	l.n++
	if q.n++; q.n == len(q.slots)/2+1 {
		q.crowded.Store(true)
	}
	q.rouseLocked()
	q.mu.Unlock()
	return true
}

// makeRoomLocked drops the oldest packet of the longest line for a container, unless its own is not shorter.
func (q *exitQueue) makeRoomLocked(line uint8) bool {
	longest := line
	for i := range q.actives {
		if other := q.active[(int(q.first)+i)%exitLines]; q.lines[other].n > q.lines[longest].n {
			longest = other
		}
	}
	if longest == line {
		return false
	}
	q.popLocked(&q.lines[longest]).DecRef() // it has others: it stays active
	q.count.drop(dropExitQueue)
	return true
}

// popLocked takes the first packet of a line.
func (q *exitQueue) popLocked(l *exitLine) *gstack.PacketBuffer {
	at := l.head
	s := &q.slots[at]
	p := s.pkt
	l.head = s.next
	*s = exitSlot{next: q.free}
	q.free = at
	l.n--
	if q.n--; q.n == len(q.slots)/2 {
		q.crowded.Store(false)
	}
	return p
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

// shareLocked is how many packets a line may have where the queue is half full.
func (q *exitQueue) shareLocked() int { return len(q.slots) / 2 / max(1, q.actives) }

// roomLocked tells whether there is room for more bulk data of a line.
func (q *exitQueue) roomLocked(l *exitLine) bool {
	return q.closed || !q.crowded.Load() || l.n < q.shareLocked()
}

// waitRoom returns when the queue is at most half full, or what waits in that line is less than its share of that. The caller holds no lock.
func (q *exitQueue) waitRoom(line uint8) {
	if !q.crowded.Load() {
		return
	}
	l := &q.lines[line]
	q.mu.Lock()
	for !q.roomLocked(l) {
		l.awaited = true
		q.roomy.Wait()
	}
	q.mu.Unlock()
}

// hasRoom tells whether waitRoom would return at once.
func (q *exitQueue) hasRoom(line uint8) bool {
	if !q.crowded.Load() {
		return true
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.roomLocked(&q.lines[line])
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

// takeLocked moves up to len(dst) packets to dst, and not many more bytes than a batch has room for, from line after line.
func (q *exitQueue) takeLocked(dst []*gstack.PacketBuffer) int {
	n, bytes := 0, 0
	crowded, woken := q.crowded.Load(), false
	for n < len(dst) && bytes < exitArena && q.actives > 0 {
		line := q.active[q.first]
		l := &q.lines[line]
		p := q.popLocked(l)
		size := p.Size()
		dst[n] = p
		n++
		bytes += size
		l.credit -= size
		switch {
		case l.n == 0:
			q.first++ // modulo exitLines
			q.actives--
		case l.credit <= 0:
			l.credit += exitQuantum
			q.first++
			q.active[(int(q.first)+q.actives-1)%exitLines] = line
		}
		if l.awaited && l.n <= q.shareLocked()/2 {
			l.awaited, woken = false, true
		}
	}
	if woken || crowded && !q.crowded.Load() {
		q.roomy.Broadcast()
	}
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
