// This file is the watch: everybody's leases, always as one full Snapshot.
//
//	list at R --> watch from R+1 --events--> snapshot, ...
//	  ^               |
//	  +--- compacted, gone back to an earlier revision, connection lost (backoff while the list fails)

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
	// Left are the leases that were given back since the last Snapshot by nodes that said so (Extension.Left). Of others that are missing
	// nobody knows: they may have expired, or the store may have lost them.
	Left []Lease
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
	garbage := garbageLog{say: func(key, reason string) {
		r.log.Warn("skipping a key that is not a lease", "key", key, "reason", reason)
	}}
	var left []Lease
	f := following[entry]{
		r: r, key: r.subnetsKey(), what: "leases",
		report: func(err error) { r.health.report("watch", err) },
		read: func(p Pair) entry {
			e := r.entryOf(p)
			e.Value = nil // the parsed form is enough, and the value may be large
			return e
		},
		hand: func(rev int64, state map[string]entry) {
			garbage.tell(func(yield func(string, skipped) bool) {
				for key, e := range state {
					if e.skip != "" && !r.answersFor(key) && !yield(key, skipped{e.ModRevision, e.skip}) {
						return
					}
				}
			})
			s := snapshot(rev, maps.Values(state))
			s.Left, left = left, nil
			fn(s)
		},
		deleted: func(e entry) {
			if e.skip == "" && e.lease.Attrs.left() {
				left = append(left, e.lease)
			}
		},
	}
	f.run(ctx)
	return nil
}

// following is everything below a key, followed from a list through its changes; E is what a key with its value means.
type following[E any] struct {
	r      *Registry
	key    string                              // what the keys begin with
	what   string                              // they are, for the log
	report func(error)                         // how the list went; nil: well
	read   func(Pair) E                        // may not keep the value
	hand   func(rev int64, state map[string]E) // called now and after every change; state is lent

	listed  func(rev int64) // called after every list, before hand; may be nil
	deleted func(E)         // called for what was there and was seen to be deleted, before hand; may be nil
}

// run goes on until ctx ends.
func (f *following[E]) run(ctx context.Context) {
	var pause backoff
	for ctx.Err() == nil {
		since := f.r.now()
		pairs, rev, err := f.r.store.Get(ctx, f.key, true)
		f.report(err)
		if err != nil {
			pause.wait(ctx, f.r.health.answered())
			continue
		}
		era, ok := f.r.listed(since, rev)
		if !ok {
			continue
		}
		if f.listed != nil {
			f.listed(rev)
		}
		started := time.Now()
		err = f.from(ctx, pairs, era, rev)
		if errors.Is(err, ErrCompacted) {
			f.r.log.Info("the store compacted its history; listing everything again", "what", f.what, "prefix", f.r.prefix)
		}
		if other := (*otherStoreError)(nil); errors.As(err, &other) { // found by looking around: no request failed that would say so
			f.r.log.Warn("from now on another store is asked", "what", f.what, "err", err)
		}
		// A watch that ended is no outage yet: only the next list tells.
		if time.Since(started) > maxBackoff {
			pause.reset()
		}
		pause.wait(ctx, nil)
	}
}

// from hands over the list, of an era, and then every change, until the watch ends with an error.
func (f *following[E]) from(ctx context.Context, list []Pair, era int, rev int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	state := make(map[string]E, len(list))
	for _, p := range list {
		state[p.Key] = f.read(p)
	}
	apply := func(e Events) bool {
		for _, c := range e.Changes {
			if c.Deleted {
				if was, ok := state[c.Key]; ok && f.deleted != nil {
					f.deleted(was)
				}
				delete(state, c.Key)
			} else {
				state[c.Key] = f.read(c.Pair)
			}
		}
		rev = max(rev, e.Revision)
		f.r.reached(era, rev)
		return len(e.Changes) > 0
	}

	f.hand(rev, state)
	events := f.r.store.Watch(ctx, f.key, true, rev+1)
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
			f.hand(rev, state)
		}
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

// garbageLog says once of every key that it is skipped, and again when it was written again.
type garbageLog struct {
	say  func(key, reason string)
	said map[string]int64 // key -> the ModRevision that was logged
}

// skipped is why a key is passed over.
type skipped struct {
	rev int64 // of its last write
	why string
}

// tell takes all that is skipped now, by key.
func (g *garbageLog) tell(all iter.Seq2[string, skipped]) {
	now := make(map[string]int64)
	for key, s := range all {
		if now[key] = s.rev; g.said[key] != s.rev {
			g.say(clipped(key), s.why)
		}
	}
	g.said = now
}

const maxBackoff = 5 * time.Second

// backoff is the pause between attempts: 100 ms doubling to 5 s as in flannel, with a quarter of chance in it so that
// a thousand nodes do not come back in step.
type backoff struct{ next time.Duration }

func (b *backoff) reset() { b.next = 0 }

// step is how long the next pause is.
func (b *backoff) step() time.Duration {
	b.next = min(max(2*b.next, 100*time.Millisecond), maxBackoff)
	return b.next - rand.N(b.next/4)
}

// wait pauses, and ends early when the store has answered somebody else: one attempt more costs less than a node that lags behind.
func (b *backoff) wait(ctx context.Context, answered <-chan struct{}) {
	t := time.NewTimer(b.step())
	defer t.Stop()
	select {
	case <-t.C:
	case <-answered:
	case <-ctx.Done():
	}
}
