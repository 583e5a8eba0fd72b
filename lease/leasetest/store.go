// This file is Store, an etcd in memory: revisions, transactions, etcd leases that expire, watches that replay
// history, compaction, and outages on demand.

package leasetest

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// Store implements lease.Store. Use NewStore.
type Store struct {
	mu        sync.Mutex
	rev       int64
	compacted int64 // history before this revision is gone
	pairs     map[string]lease.Pair
	history   []lease.Change
	leases    map[lease.LeaseID]*etcdLease
	nextLease lease.LeaseID
	watches   map[*watch]struct{}
	away      error
	commits   int
}

type etcdLease struct {
	ttl   time.Duration
	timer *time.Timer
}

var _ lease.Store = (*Store)(nil)

// NewStore is an empty store.
func NewStore() *Store {
	return &Store{
		rev:       1,
		pairs:     make(map[string]lease.Pair),
		leases:    make(map[lease.LeaseID]*etcdLease),
		nextLease: 1,
		watches:   make(map[*watch]struct{}),
	}
}

// SetAway makes every request fail with err, and ends every watch with it; nil brings the store back. Meanwhile etcd
// leases go on expiring, as they do when the network between a node and its etcd is cut.
func (s *Store) SetAway(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = err
	if err != nil {
		for w := range s.watches {
			w.push(lease.Events{Err: err})
		}
	}
}

// Wipe forgets everything, as if the store had been made anew.
func (s *Store) Wipe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.leases {
		l.timer.Stop()
	}
	s.rev, s.compacted, s.history = 1, 0, nil
	clear(s.pairs)
	clear(s.leases)
	for w := range s.watches {
		w.push(lease.Events{Err: fmt.Errorf("%s: %w", s, lease.ErrUnreachable)})
	}
}

// Save copies everything; what it returns goes back to it, with etcd leases that have all their time again.
func (s *Store) Save() (restore func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rev, pairs, ttls := s.rev, maps.Clone(s.pairs), make(map[lease.LeaseID]time.Duration)
	for id, l := range s.leases {
		ttls[id] = l.ttl
	}
	return func() {
		s.Wipe()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.rev, s.compacted, s.pairs = rev, rev, maps.Clone(pairs)
		for id, ttl := range ttls {
			s.leases[id] = s.etcdLease(id, ttl)
		}
	}
}

// etcdLease is one that begins now.
func (s *Store) etcdLease(id lease.LeaseID, ttl time.Duration) *etcdLease {
	return &etcdLease{ttl, time.AfterFunc(ttl, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.revokeLocked(id)
	})}
}

// Compact forgets all history up to now.
func (s *Store) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.compacted = s.rev
	s.history = slices.DeleteFunc(s.history, func(c lease.Change) bool { return c.ModRevision < s.compacted })
}

// Expire ends every etcd lease at once, as if the store had been away for long.
func (s *Store) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(s.leases)) {
		s.revokeLocked(id)
	}
}

// Commits counts the transactions that wrote something.
func (s *Store) Commits() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.commits
}

// String implements lease.Store.
func (s *Store) String() string { return "etcd in memory" }

func (s *Store) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.away != nil {
		return fmt.Errorf("%s: %w", s, s.away)
	}
	return nil
}

func inRange(key, want string, prefix bool) bool {
	return key == want || prefix && strings.HasPrefix(key, want)
}

// Get implements lease.Store.
func (s *Store) Get(ctx context.Context, key string, prefix bool) ([]lease.Pair, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ready(ctx); err != nil {
		return nil, 0, err
	}
	var pairs []lease.Pair
	for k, p := range s.pairs {
		if inRange(k, key, prefix) {
			pairs = append(pairs, p)
		}
	}
	slices.SortFunc(pairs, func(a, b lease.Pair) int { return cmp.Compare(a.Key, b.Key) })
	return pairs, s.rev, nil
}

// Commit implements lease.Store.
func (s *Store) Commit(ctx context.Context, t lease.Txn) (bool, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ready(ctx); err != nil {
		return false, 0, err
	}
	for _, g := range t.If {
		if !s.holdsLocked(g) {
			return false, s.rev, nil
		}
	}
	if t.Delete {
		s.deleteLocked(t.Key)
		return true, s.rev, nil
	}
	if t.Lease != 0 && s.leases[t.Lease] == nil {
		return false, 0, fmt.Errorf("%s: writing %s: %w", s, t.Key, lease.ErrLeaseExpired)
	}
	s.rev++
	s.commits++
	p := lease.Pair{Key: t.Key, Value: slices.Clone(t.Value), ModRevision: s.rev, Lease: t.Lease}
	s.pairs[t.Key] = p
	s.tellLocked(lease.Change{Pair: p})
	return true, s.rev, nil
}

func (s *Store) holdsLocked(g lease.Guard) bool {
	any := false
	holds := func(rev int64) bool { return rev == g.ModRevision || g.AtMost && rev < g.ModRevision }
	for k, p := range s.pairs {
		if inRange(k, g.Key, g.Prefix) {
			any = true
			if !holds(p.ModRevision) {
				return false
			}
		}
	}
	return any || holds(0)
}

// deleteLocked deletes keys in one revision.
func (s *Store) deleteLocked(keys ...string) {
	keys = slices.DeleteFunc(keys, func(k string) bool { _, ok := s.pairs[k]; return !ok })
	if len(keys) == 0 {
		return
	}
	s.rev++
	var changes []lease.Change
	for _, k := range keys {
		delete(s.pairs, k)
		changes = append(changes, lease.Change{Pair: lease.Pair{Key: k, ModRevision: s.rev}, Deleted: true})
	}
	s.tellLocked(changes...)
}

func (s *Store) tellLocked(changes ...lease.Change) {
	s.history = append(s.history, changes...)
	for w := range s.watches {
		w.offer(s.rev, changes)
	}
}

// Grant implements lease.Store.
func (s *Store) Grant(ctx context.Context, ttl time.Duration) (lease.LeaseID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ready(ctx); err != nil {
		return 0, err
	}
	id := s.nextLease
	s.nextLease++
	ttl = max(ttl.Truncate(time.Second), time.Second)
	s.leases[id] = s.etcdLease(id, ttl)
	return id, nil
}

// KeepAlive implements lease.Store.
func (s *Store) KeepAlive(ctx context.Context, id lease.LeaseID) (time.Duration, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ready(ctx); err != nil {
		return 0, err
	}
	l := s.leases[id]
	if l == nil {
		return 0, fmt.Errorf("%s: %w", s, lease.ErrLeaseExpired)
	}
	l.timer.Reset(l.ttl)
	return l.ttl, nil
}

// Revoke implements lease.Store.
func (s *Store) Revoke(ctx context.Context, id lease.LeaseID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ready(ctx); err != nil {
		return err
	}
	s.revokeLocked(id)
	return nil
}

func (s *Store) revokeLocked(id lease.LeaseID) {
	l := s.leases[id]
	if l == nil {
		return
	}
	l.timer.Stop()
	delete(s.leases, id)
	var keys []string
	for k, p := range s.pairs {
		if p.Lease == id {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	s.deleteLocked(keys...)
}

// watch is one watch: a queue that never blocks the store, and a goroutine that empties it.
type watch struct {
	key    string
	prefix bool

	mu    sync.Mutex
	queue []lease.Events
	wake  chan struct{}
}

func (w *watch) push(e lease.Events) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queue = append(w.queue, e)
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watch) offer(rev int64, changes []lease.Change) {
	var mine []lease.Change
	for _, c := range changes {
		if inRange(c.Key, w.key, w.prefix) {
			mine = append(mine, c)
		}
	}
	if len(mine) > 0 {
		w.push(lease.Events{Revision: rev, Changes: mine})
	}
}

// Watch implements lease.Store.
func (s *Store) Watch(ctx context.Context, key string, prefix bool, rev int64) <-chan lease.Events {
	w := &watch{key: key, prefix: prefix, wake: make(chan struct{}, 1)}
	s.mu.Lock()
	switch {
	case s.away != nil:
		w.push(lease.Events{Err: fmt.Errorf("%s: %w", s, s.away)})
	case rev < s.compacted:
		w.push(lease.Events{Err: fmt.Errorf("%s: %w", s, lease.ErrCompacted)})
	case rev > s.rev+1:
		w.push(lease.Events{Err: fmt.Errorf("%s: %w", s, lease.ErrRewound)})
	default:
		for i := 0; i < len(s.history); {
			n := i + 1
			for n < len(s.history) && s.history[n].ModRevision == s.history[i].ModRevision {
				n++
			}
			if s.history[i].ModRevision >= rev {
				w.offer(s.history[i].ModRevision, s.history[i:n])
			}
			i = n
		}
	}
	s.watches[w] = struct{}{}
	s.mu.Unlock()

	out := make(chan lease.Events)
	go func() {
		defer close(out)
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.watches, w)
		}()
		w.run(ctx, out)
	}()
	return out
}

func (w *watch) run(ctx context.Context, out chan<- lease.Events) {
	for {
		select {
		case <-w.wake:
		case <-ctx.Done():
			return
		}
		w.mu.Lock()
		queue := w.queue
		w.queue = nil
		w.mu.Unlock()
		for _, e := range queue {
			select {
			case out <- e:
			case <-ctx.Done():
				return
			}
			if e.Err != nil {
				return
			}
		}
	}
}
