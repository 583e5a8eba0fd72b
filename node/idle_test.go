// Tests of giving memory back after a load.

package node

import (
	"context"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/internal/tap"
)

func TestIdleMemory_ReleasesOnceAfterEachLoad(t *testing.T) {
	const much, little = worthReleasing, worthReleasing - 1
	for name, c := range map[string]struct {
		calls []uint64 // in each interval between two looks
		spare uint64
		want  []int // releases after each look
	}{
		"never busy":               {[]uint64{0, 0, busyCalls - 1, 0}, much, []int{0, 0, 0, 0}},
		"one load":                 {[]uint64{0, busyCalls, 1e6, 0, 0, 0}, much, []int{0, 0, 0, 1, 1, 1}},
		"two loads":                {[]uint64{1e6, 0, 0, 1e6, 1e6, 10, 0}, much, []int{0, 1, 1, 1, 1, 2, 2}},
		"a load that does not end": {[]uint64{1e6, 1e6, busyCalls, busyCalls}, much, []int{0, 0, 0, 0}},
		"little to give back":      {[]uint64{1e6, 0, 0, 0}, little, []int{0, 0, 0, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls, released := uint64(1000), 0
				m := idleMemory{
					calls:   func() uint64 { return calls },
					spare:   func() uint64 { return c.spare },
					release: func() { released++ },
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
					calls += n
					time.Sleep(idleLook)
					synctest.Wait()
					if released != c.want[i] {
						t.Fatalf("%d releases after look %d, want %d", released, i+1, c.want[i])
					}
				}
				cancel()
				synctest.Wait()
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
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // nobody else collects
	releaseMemory()
	before := spareMemory()
	for range 64 {
		garbage = append(garbage, make([]byte, 1<<20))
	}
	for _, b := range garbage {
		b[0] = 1
	}
	if spare := spareMemory(); spare < before+worthReleasing {
		t.Errorf("%d bytes to release, before the load %d", spare, before)
	}
	garbage = nil
	releaseMemory()
	if after := spareMemory(); after >= worthReleasing {
		t.Errorf("%d bytes are still to be released", after)
	}
}
