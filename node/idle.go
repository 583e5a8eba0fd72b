// This file gives memory back to the host when a load is over. The gateway's flows grow the heap (a download through it takes
// some 30 MB), and what they leave is garbage that nobody collects: Go collects when the heap grows, or every two minutes, and
// keeps what the last collection hoped to use again. So the node looks every few seconds how much passed its TAPs, and at
// the first quiet look after a busy one, if its heap has grown, collects and releases. Under load it never does: a
// collection takes time from the packets. A node that was not busy does nothing but look.

package node

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// idleLook is how often the node looks whether a load is over. Memory is back two looks after it at the latest.
	idleLook = 3 * time.Second
	// busyCalls is how many reads and writes of TAPs since the last look make a node busy: 100 a second, each of which can be
	// one small packet or 64 KB.
	busyCalls = 300
	// worthReleasing is how many bytes the heap must have above the least that it had after a release: an idle one moves by 4 MB. What
	// the last collection found in use says nothing, for it ran under the load; nor what the last release left, which may have been
	// the flows of a load that was not over.
	worthReleasing = 8 << 20
)

// idleMemory releases memory after each load. One goroutine.
type idleMemory struct {
	calls   func() uint64 // of TAPs so far
	held    func() uint64 // bytes of heap that the kernel has given
	release func()
}

func (n *Node) idleMemory() *idleMemory {
	return &idleMemory{calls: n.tapCalls, held: heapHeld, release: releaseMemory}
}

// run looks until ctx ends.
func (m *idleMemory) run(ctx context.Context) error {
	tick := time.NewTicker(idleLook)
	defer tick.Stop()
	last, least, loaded := m.calls(), m.held(), false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := m.calls()
		busy := now-last >= busyCalls
		last = now
		if loaded && !busy && m.held() >= least+worthReleasing {
			m.release()
			least = min(least, m.held())
		}
		loaded = busy
	}
}

// tapCalls counts the reads and writes of all TAPs since the start; every packet of a container is in one.
func (n *Node) tapCalls() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	sum := n.gone
	for _, a := range n.attachments {
		if a.link != nil {
			sum.Add(a.link.Stats())
		}
	}
	return sum.Reads + sum.Writes
}

// heapHeld is the memory of the heap, used or not, without what was given back already.
func heapHeld() uint64 {
	s := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
	}
	metrics.Read(s)
	return s[0].Value.Uint64() + s[1].Value.Uint64() + s[2].Value.Uint64()
}

// releaseMemory collects twice, since what lies in a sync.Pool, as the gateway's buffers do, survives the first time.
func releaseMemory() {
	runtime.GC()
	debug.FreeOSMemory()
}
