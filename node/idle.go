// This file gives memory back to the host when a load is over. The gateway's flows grow the heap (a download through it takes
// some 35 MB of segments), and what they leave is garbage that nobody collects: Go collects when the heap grows, or every two
// minutes, and its scavenger keeps what the last collection hoped to use again. So the node looks every few seconds how
// much passed its TAPs, and at the first quiet look after a busy one collects and releases, once. Under load it never does: a
// collection takes time from the packets. A node that was not busy does nothing but look.
//
// What is left then is some 7 MB of heap and stacks, and the program's own pages (25 MB, shared and reclaimed at need).

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
	// worthReleasing is the memory in bytes below which a collection is not worth its time. An idle heap moves by 4 MB.
	worthReleasing = 8 << 20
)

// idleMemory releases memory after each load. One goroutine.
type idleMemory struct {
	calls   func() uint64 // of TAPs so far
	spare   func() uint64 // bytes that a release may give back
	release func()
}

func (n *Node) idleMemory() *idleMemory {
	return &idleMemory{calls: n.tapCalls, spare: spareMemory, release: releaseMemory}
}

// run looks until ctx ends.
func (m *idleMemory) run(ctx context.Context) error {
	tick := time.NewTicker(idleLook)
	defer tick.Stop()
	last, loaded := m.calls(), false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := m.calls()
		busy := now-last >= busyCalls
		last = now
		if loaded && !busy && m.spare() >= worthReleasing {
			m.release()
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

// spareMemory is what the heap has from the kernel beyond what the last collection found in use.
func spareMemory() uint64 {
	s := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, // not that which was released already
		{Name: "/gc/heap/live:bytes"},
	}
	metrics.Read(s)
	held, live := s[0].Value.Uint64()+s[1].Value.Uint64()+s[2].Value.Uint64(), s[3].Value.Uint64()
	return held - min(held, live)
}

// releaseMemory collects twice, since what lies in a sync.Pool, as the gateway's buffers do, survives the first time.
func releaseMemory() {
	runtime.GC()
	debug.FreeOSMemory()
}
