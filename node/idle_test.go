// Tests of giving memory back after a load.

package node

import (
	"context"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/internal/tap"
)

func TestIdleMemory_ReleasesOnceAfterEachLoad(t *testing.T) {
	const start, load = 10 << 20, 1e6
	for name, c := range map[string]struct {
		calls  []uint64 // in each interval between two looks
		grows  uint64   // bytes, by each busy interval
		frees  bool     // what has grown is garbage at the release
		want   []uint64 // releases after each look
		remain uint64   // bytes held at the end
	}{
		"never busy":               {[]uint64{0, 0, busyCalls - 1, 0}, worthReleasing, true, []uint64{0, 0, 0, 0}, start},
		"one load":                 {[]uint64{0, busyCalls, load, 0, 0, 0}, worthReleasing, true, []uint64{0, 0, 0, 1, 1, 1}, start},
		"two loads":                {[]uint64{load, 0, 0, load, load, 10, 0}, worthReleasing, true, []uint64{0, 1, 1, 1, 1, 2, 2}, start},
		"a load that does not end": {[]uint64{load, load, busyCalls, busyCalls}, worthReleasing, true, []uint64{0, 0, 0, 0}, start + 4*worthReleasing},
		"a load that takes little": {[]uint64{load, 0, 0, 0}, worthReleasing - 1, true, []uint64{0, 0, 0, 0}, start + worthReleasing - 1},
		"many small loads":         {[]uint64{load, 0, load, 0, load, 0}, worthReleasing - 1, true, []uint64{0, 0, 0, 1, 1, 1}, start + worthReleasing - 1},
		"memory that stays in use": {[]uint64{load, 0, busyCalls, 0, 0}, worthReleasing, false, []uint64{0, 1, 1, 2, 2}, start + 2*worthReleasing},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var calls, released, held atomic.Uint64
				calls.Store(1000)
				held.Store(start)
				m := idleMemory{
					calls: calls.Load,
					held:  held.Load,
					release: func() {
						released.Add(1)
						if c.frees {
							held.Store(start)
						}
					},
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go func() {
					if err := m.run(ctx); err != nil {
						t.Error(err)
					}
				}()
				synctest.Wait()
				for i, n := range c.calls {
					calls.Add(n)
					if n >= busyCalls {
						held.Add(c.grows)
					}
					time.Sleep(idleLook)
					synctest.Wait()
					if n := released.Load(); n != c.want[i] {
						t.Fatalf("%d releases after look %d, want %d", n, i+1, c.want[i])
					}
				}
				if n := held.Load(); n != c.remain {
					t.Errorf("%d bytes held, want %d", n, c.remain)
				}
			})
		})
	}
}

func TestIdleMemory_CountsTAPsThatAreThereAndGone(t *testing.T) {
	n := &Node{gone: tap.Stats{Reads: 10, Writes: 20}, attachments: map[string]*attachment{
		"there": {link: &fakeLink{}}, "leaving": {},
	}}
	if got := n.tapCalls(); got != 31 {
		t.Errorf("%d calls, want 31", got)
	}
}

// garbage is where a test puts what it allocates, so that it is allocated on the heap.
var garbage [][]byte

func TestReleaseMemory_GivesGarbageBack(t *testing.T) {
	const load = 64 << 20
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // nobody else collects
	releaseMemory()
	before := heapHeld()
	for range load >> 20 {
		garbage = append(garbage, make([]byte, 1<<20))
	}
	if held := heapHeld(); held < before+load/2 {
		t.Errorf("%d bytes held, before the load %d", held, before)
	}
	garbage = nil
	releaseMemory()
	if after := heapHeld(); after >= before+worthReleasing {
		t.Errorf("%d bytes held, before the load %d", after, before)
	}
}
