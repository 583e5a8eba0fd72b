// This file is the watch: everybody's leases, always as one full Snapshot.
//
//	list at R --> watch from R+1 --events--> snapshot, ...
//	  ^               |
//	  +--- compacted, connection lost (backoff while the list fails)

package lease

import (
	"context"
	"errors"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"time"
)

// Snapshot is all leases of the network at Revision.
type Snapshot struct {
	Revision int64
	Leases   []Lease  // sorted by Subnet, then Subnet6; one for a pair of subnets
	Skipped  []string // keys whose value or name is no lease, each with the reason, sorted
}

// snapshot sorts entries into a Snapshot. Two keys that name one subnet in different spellings count once: the one
// written last, as flannel does.
func snapshot(rev int64, entries iter.Seq[entry]) Snapshot {
	s := Snapshot{Revision: rev}
	for e := range entries {
		if e.skip != "" {
			s.Skipped = append(s.Skipped, e.skipped())
		} else {
			s.Leases = append(s.Leases, e.lease)
		}
	}
	slices.Sort(s.Skipped)
	slices.SortFunc(s.Leases, func(a, b Lease) int {
		if c := a.Subnet.Compare(b.Subnet); c != 0 {
			return c
		}
		if c := a.Subnet6.Compare(b.Subnet6); c != 0 {
			return c
		}
		return int(min(1, max(-1, b.ModRevision-a.ModRevision)))
	})
	s.Leases = slices.CompactFunc(s.Leases, func(a, b Lease) bool { return a.Subnet == b.Subnet && a.Subnet6 == b.Subnet6 })
	return s
}

func (e entry) skipped() string { return clipped(e.Key) + ": " + e.skip }

func clipped(key string) string {
	if len(key) > 200 {
		return key[:200] + "..."
	}
	return key
}

// Watch hands fn a full Snapshot now and after every change, until ctx ends; then it returns nil. Nothing else ends it:
// while the store is away it keeps trying, with a pause of up to 5 s, and fn hears nothing. fn runs on Watch's
// goroutine and may take its time: changes meanwhile arrive as one Snapshot. After an outage or a compaction fn gets
// a fresh list even if nothing changed.
func (r *Registry) Watch(ctx context.Context, fn func(Snapshot)) error {
	var pause backoff
	logged := make(map[string]int64) // garbage key -> the ModRevision that was logged
	for ctx.Err() == nil {
		entries, rev, err := r.list(ctx)
		r.health.report("watch", err)
		if err != nil {
			pause.wait(ctx)
			continue
		}
		started := time.Now()
		err = r.watchFrom(ctx, entries, rev, logged, fn)
		if errors.Is(err, ErrCompacted) {
			r.log.Info("the store compacted its history; listing all leases again", "prefix", r.prefix)
		}
		// A watch that ended is no outage yet: only the next list tells.
		if time.Since(started) > maxBackoff {
			pause.reset()
		}
		pause.wait(ctx)
	}
	return nil
}

// watchFrom hands over the list and then every change, until the watch ends with an error.
func (r *Registry) watchFrom(ctx context.Context, list []entry, rev int64, logged map[string]int64, fn func(Snapshot)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	state := make(map[string]entry, len(list))
	set := func(e entry) {
		e.Value = nil // the parsed form is enough, and the value may be large
		state[e.Key] = e
	}
	for _, e := range list {
		set(e)
	}
	hand := func() {
		maps.DeleteFunc(logged, func(key string, _ int64) bool { return state[key].skip == "" })
		for key, e := range state {
			if e.skip != "" && logged[key] != e.ModRevision && !r.answersFor(key) {
				logged[key] = e.ModRevision
				r.log.Warn("skipping a key that is not a lease", "key", clipped(key), "reason", e.skip)
			}
		}
		fn(snapshot(rev, maps.Values(state)))
	}
	apply := func(e Events) bool {
		for _, c := range e.Changes {
			if c.Deleted {
				delete(state, c.Key)
			} else {
				set(r.entryOf(c.Pair))
			}
		}
		rev = max(rev, e.Revision)
		return len(e.Changes) > 0
	}

	hand()
	events := r.store.Watch(ctx, r.subnetsKey(), true, rev+1)
	for e := range events {
		changed := apply(e)
		err := e.Err
	drain: // take what else is there, so that a burst makes one snapshot
		for err == nil {
			select {
			case e, ok := <-events:
				if !ok {
					break drain
				}
				changed = apply(e) || changed
				err = e.Err
			default:
				break drain
			}
		}
		if changed {
			hand()
		}
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

const maxBackoff = 5 * time.Second

// backoff is the pause between attempts: 100 ms doubling to 5 s as in flannel, with a quarter of chance in it so that
// a thousand nodes do not come back in step.
type backoff struct{ next time.Duration }

func (b *backoff) reset() { b.next = 0 }

func (b *backoff) wait(ctx context.Context) {
	b.next = min(max(2*b.next, 100*time.Millisecond), maxBackoff)
	t := time.NewTimer(b.next - rand.N(b.next/4))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
