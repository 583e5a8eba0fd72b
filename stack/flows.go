// This file keeps the flows: which there are, how many there may be, and whose they are.

package stack

import (
	"net/netip"
	"sync"
	"time"
)

// kind is a class of flow with a limit of its own.
type kind uint8

const (
	kindHalfOpen kind = iota // TCP before the handshake is complete
	kindEvicted              // that had to make room for another of its container, and is about to end
	kindTCP
	kindUDP
	kindEcho
	kinds
)

// flowKey tells flows apart: container's address and port, and where it wants to go. For echo the ports are identifier and
// zero.
type flowKey struct {
	proto    uint8
	src, dst netip.AddrPort
}

// flow is one of a container's conversations.
type flow interface {
	// end makes the goroutines of the flow return soon. It may be called at any time, and more than once.
	end()
}

type entry struct {
	key    flowKey
	kind   kind
	flow   flow
	holder *holder // of the container

	// Of half-open ones: when it was added, and its neighbours among those of the container.
	since        time.Time
	older, newer *entry
}

// holder is what one container has of the table.
type holder struct {
	n              [kinds]int
	oldest, newest *entry // of the half-open ones
	lent           account
}

// open puts a half-open connection at the end of the list.
func (h *holder) open(e *entry) {
	e.since = time.Now()
	e.older = h.newest
	if h.newest != nil {
		h.newest.newer = e
	} else {
		h.oldest = e
	}
	h.newest = e
}

// leave takes a connection that is no longer half-open out of the list.
func (h *holder) leave(e *entry) {
	if e.older != nil {
		e.older.newer = e.newer
	} else {
		h.oldest = e.newer
	}
	if e.newer != nil {
		e.newer.older = e.older
	} else {
		h.newest = e.older
	}
	e.older, e.newer = nil, nil
}

// flowTable holds the flows of one netstack. A flow counts in wg from add to remove.
type flowTable struct {
	limits *Limits
	stale  time.Duration // Timeouts.Stale
	count  *counters
	wg     sync.WaitGroup

	mu     sync.RWMutex
	closed bool
	flows  map[flowKey]*entry
	total  [kinds]int
	each   map[netip.Addr]*holder
}

func newFlowTable(l *Limits, stale time.Duration, c *counters) *flowTable {
	return &flowTable{limits: l, stale: stale, count: c, flows: make(map[flowKey]*entry), each: make(map[netip.Addr]*holder)}
}

func (t *flowTable) find(k flowKey) *entry {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.flows[k]
}

// add puts a flow into the table. nil means that it did not fit, for the reason given; a flow that has the key already is
// returned with fresh false. A TCP connection that is past its handshake gives its key up to a new one: gVisor has asked
// about a SYN, so it has forgotten the old connection. A container that has its share of half-open connections loses the oldest to a
// new one if that is stale: of a flood it is the one that nobody waits for, and a client among it gets its turn.
func (t *flowTable) add(k flowKey, kd kind, f flow) (e *entry, fresh bool, why dropReason) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, false, dropNotRunning
	}
	if e := t.flows[k]; e != nil && e.kind != kindTCP {
		return e, false, 0
	}
	return t.addLocked(k, kd, f)
}

// evictLocked ends the oldest half-open connection of a container. No means that it is not stale, or that earlier ones have not ended yet.
func (t *flowTable) evictLocked(h *holder) bool {
	if h.oldest == nil || time.Since(h.oldest.since) < t.stale || h.n[kindEvicted] >= t.limits.TCPHalfOpenEach {
		return false
	}
	e := h.oldest
	h.leave(e)
	t.becomeLocked(h, e, kindEvicted)
	t.count.drop(dropEvicted)
	t.wg.Go(e.flow.end)
	return true
}

// evicted tells whether a flow is one that had to make room. It is not refused: its container asks again, and may find room then.
func (t *flowTable) evicted(e *entry) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return e.kind == kindEvicted
}

// becomeLocked makes an entry one of another kind.
func (t *flowTable) becomeLocked(h *holder, e *entry, kd kind) {
	t.total[e.kind]--
	h.n[e.kind]--
	e.kind = kd
	t.total[kd]++
	h.n[kd]++
}

// addInward is add for a flow that began outside. An egress flow of datagrams gives its key up to it and is ended; any other flow that
// has the key is returned with fresh false.
func (t *flowTable) addInward(k flowKey, kd kind, f flow) (e *entry, fresh bool, why dropReason) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, false, dropNotRunning
	}
	if e := t.flows[k]; e != nil {
		egress, ok := e.flow.(*datagramFlow)
		if !ok {
			return e, false, 0
		}
		delete(t.flows, k)
		t.wg.Go(egress.end)
	}
	return t.addLocked(k, kd, f)
}

func (t *flowTable) addLocked(k flowKey, kd kind, f flow) (e *entry, fresh bool, why dropReason) {
	src := k.src.Addr()
	mine := t.each[src]
	if mine == nil {
		mine = new(holder)
	}
	l := t.limits
	tcp, mineTCP := t.total[kindHalfOpen]+t.total[kindEvicted]+t.total[kindTCP], mine.n[kindHalfOpen]+mine.n[kindTCP]
	full := l.shared > 0 && tcp+t.total[kindUDP] >= l.shared
	mineFull := l.shared > 0 && mineTCP+mine.n[kindUDP] >= l.sharedEach
	switch kd {
	case kindHalfOpen:
		switch {
		case tcp >= l.TCPFlows || full:
			return nil, false, dropTCPFlows
		case mineTCP >= l.TCPFlowsEach || mineFull:
			return nil, false, dropContainerShare
		case mine.n[kindHalfOpen] >= l.TCPHalfOpenEach:
			if !t.evictLocked(mine) {
				return nil, false, dropContainerShare
			}
		case t.total[kindHalfOpen] >= l.TCPHalfOpen:
			return nil, false, dropTCPHalfOpen
		}
	case kindUDP:
		switch {
		case t.total[kindUDP] >= l.UDPFlows || full:
			return nil, false, dropUDPFlows
		case mine.n[kindUDP] >= l.UDPFlowsEach || mineFull:
			return nil, false, dropContainerShare
		}
	case kindEcho:
		switch {
		case t.total[kindEcho] >= l.EchoFlows:
			return nil, false, dropEchoFlows
		case mine.n[kindEcho] >= l.EchoFlowsEach:
			return nil, false, dropContainerShare
		}
	}
	e = &entry{key: k, kind: kd, flow: f, holder: mine}
	t.flows[k] = e
	t.total[kd]++
	mine.n[kd]++
	if kd == kindHalfOpen {
		mine.open(e)
	}
	t.each[src] = mine
	t.wg.Add(1)
	return e, true, 0
}

// establish turns a half-open connection into a connection; an evicted one stays that, and is being ended.
func (t *flowTable) establish(e *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.kind == kindHalfOpen {
		e.holder.leave(e)
		t.becomeLocked(e.holder, e, kindTCP)
	}
}

// remove takes a flow out. It is called once, by the last goroutine of the flow.
func (t *flowTable) remove(e *entry) {
	t.mu.Lock()
	if t.flows[e.key] == e {
		delete(t.flows, e.key)
	}
	mine := e.holder
	if e.kind == kindHalfOpen {
		mine.leave(e)
	}
	t.total[e.kind]--
	mine.n[e.kind]--
	if mine.n == [kinds]int{} {
		delete(t.each, e.key.src.Addr())
	}
	t.mu.Unlock()
	t.wg.Done()
}

// begin counts a goroutine that is no flow, until wg.Done. No means that the table is closed.
func (t *flowTable) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Add(1)
	return true
}

func (t *flowTable) counts() [kinds]int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.total
}

// all are the flows of a kind.
func (t *flowTable) all(kd kind) []flow {
	t.mu.RLock()
	defer t.mu.RUnlock()
	found := make([]flow, 0, t.total[kd])
	for _, e := range t.flows {
		if e.kind == kd {
			found = append(found, e.flow)
		}
	}
	return found
}

// release ends the flows of the containers of a prefix.
func (t *flowTable) release(src netip.Prefix) {
	t.endWhere(func(k flowKey) bool { return src.Contains(k.src.Addr()) })
}

// close ends all flows and lets no more in.
func (t *flowTable) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.endWhere(func(flowKey) bool { return true })
}

func (t *flowTable) endWhere(which func(flowKey) bool) {
	t.mu.RLock()
	var found []flow
	for k, e := range t.flows {
		if which(k) {
			found = append(found, e.flow)
		}
	}
	t.mu.RUnlock()
	for _, f := range found {
		f.end()
	}
}
