// This file is a lease that is held: it is kept alive, put back when somebody deletes it, and given up only to another
// node.
//
//	        +--> check: keep alive, read own key --absent, stale--> txn put --+
//	        |         | ours                    --somebody else's--> Done     |
//	backoff |         v                                                       |
//	        |    watch own key, keep alive at a third of the TTL  <-----------+
//	        |         | key changed: check; store away
//	        +---------+
//
// flannel renews by an unconditional put and ends its process when the key is deleted; here every put compares
// revisions and an outage of any length ends in "still ours" or in Done.

package lease

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Held is this node's lease. Acquire makes it; Run keeps it.
type Held struct {
	r    *Registry // constant
	req  Request   // constant; Attrs is what Acquire was given
	done chan struct{}

	view atomic.Pointer[Lease] // what Lease returns

	// mu is held across the store's answers, so that a check and an Update do not interleave.
	mu       turn
	key      string
	want     Attrs     // what shall be published
	value    []byte    // want as JSON
	tried    []Attrs   // what may be published: the last known and every attempt since
	etcd     LeaseID   // 0 for a reservation, or when it has to be granted anew
	past     []LeaseID // etcd leases before, which the store may not have cleared away yet, or may have again from a backup
	reserved bool      // the key hangs on no etcd lease
	ttl      time.Duration
	alive    time.Time // of the last successful KeepAlive or Grant
	losses   losses    // of the key

	endOnce sync.Once
	err     error // constant once done is closed
}

func newHeld(r *Registry, req Request) *Held {
	return &Held{r: r, req: req, done: make(chan struct{}), mu: make(turn, 1), want: req.Attrs, ttl: req.TTL}
}

// turn is a lock that somebody may give up waiting for: whoever holds it may be waiting for a store that is silent. Make it with room for
// one.
type turn chan struct{}

func (t turn) Lock()   { t <- struct{}{} }
func (t turn) Unlock() { <-t }

// LockContext takes the lock, unless ctx ends first.
func (t turn) LockContext(ctx context.Context) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Lease is the subnet and what was last published.
func (h *Held) Lease() Lease { return *h.view.Load() }

// Done is closed when the lease is no longer ours. The store being away does not close it.
func (h *Held) Done() <-chan struct{} { return h.done }

// Err says why Done is closed: ErrTaken, ErrDuplicateNode or ErrReleased; nil before.
func (h *Held) Err() error {
	select {
	case <-h.done:
		return h.err
	default:
		return nil
	}
}

// Connected is whether the store answers.
func (h *Held) Connected() bool { return h.r.Health().Connected }

// LastError is why the store does not answer, nil if it does.
func (h *Held) LastError() error { return h.r.Health().Err }

func (h *Held) end(err error) {
	h.endOnce.Do(func() {
		h.r.held.Delete(h)
		h.err = err
		close(h.done)
	})
}

// adopt takes over an entry that is ours or reserved for us. nil, nil is a lost race.
func (h *Held) adopt(ctx context.Context, e entry) (*Held, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.encodeLocked(h.want); err != nil {
		return nil, err
	}
	h.key, h.reserved = e.Key, e.lease.Reservation
	h.view.Store(&Lease{Subnet: e.lease.Subnet, Subnet6: e.lease.Subnet6})
	if still, err := h.stillGoodLocked(ctx, e); err != nil {
		return nil, err
	} else if still {
		return h, nil
	}
	ok, err := h.putLocked(ctx, e.ModRevision)
	if err != nil {
		return nil, err
	}
	if !ok {
		if h.etcd != 0 {
			_ = h.r.store.Revoke(context.WithoutCancel(ctx), h.etcd)
		}
		return nil, nil
	}
	if e.Lease != 0 && e.Lease != h.etcd {
		// Nothing hangs on the previous run's etcd lease any more. If this fails it expires.
		_ = h.r.store.Revoke(ctx, e.Lease)
	}
	h.r.log.Info("took over own lease", "subnet", e.lease.Subnet, "reservation", h.reserved)
	return h, nil
}

// stillGoodLocked is whether the store has what we would write, on an etcd lease that lives: then nothing is written,
// and no peer has to look at it.
func (h *Held) stillGoodLocked(ctx context.Context, e entry) (bool, error) {
	if !bytes.Equal(e.Value, h.value) {
		return false, nil
	}
	if !h.reserved {
		ttl, err := h.r.store.KeepAlive(ctx, e.Lease)
		if errors.Is(err, ErrLeaseExpired) || err == nil && ttl != h.req.TTL {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		h.etcd, h.ttl, h.alive = e.Lease, ttl, time.Now()
	}
	h.acceptLocked(e.ModRevision)
	h.r.log.Info("took over own lease, unchanged", "subnet", e.lease.Subnet, "reservation", h.reserved)
	return true, nil
}

// create puts a new key, unless somebody was faster since the list at rev. nil, nil is a lost race.
func (h *Held) create(ctx context.Context, v4, v6 netip.Prefix, rev int64) (*Held, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.encodeLocked(h.want); err != nil {
		return nil, err
	}
	h.key = h.r.leaseKey(v4, v6)
	h.view.Store(&Lease{Subnet: v4, Subnet6: v6})
	// A key of the same IPv4 subnet with another IPv6 part is a rival too.
	rivals := h.rangeKey()
	if v6.IsValid() {
		// Two keys with different IPv4 parts may hold the same IPv6 subnet, so nobody at all may have been faster.
		rivals = h.r.subnetsKey()
	}
	ok, err := h.putLocked(ctx, 0, Guard{Key: rivals, Prefix: true, AtMost: true, ModRevision: rev})
	if err != nil || !ok {
		if h.etcd != 0 {
			_ = h.r.store.Revoke(context.WithoutCancel(ctx), h.etcd)
		}
		return nil, err
	}
	h.r.log.Info("leased a subnet", "subnet", v4, "key", h.key)
	return h, nil
}

func (h *Held) encodeLocked(a Attrs) error {
	value, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if len(value) > MaxValue {
		return fmt.Errorf("lease: the attributes have %d bytes, at most %d", len(value), MaxValue)
	}
	h.want, h.value = a, value
	if !slices.ContainsFunc(h.tried, func(t Attrs) bool { return samePlace(t, a) }) {
		h.tried = append(h.tried, a)
	}
	return nil
}

// rangeKey begins every key that holds our IPv4 subnet.
func (h *Held) rangeKey() string { return h.r.leaseKey(h.view.Load().Subnet, netip.Prefix{}) }

// putLocked writes our value if the key is at rev (0: absent) and also holds. false is a lost race.
func (h *Held) putLocked(ctx context.Context, rev int64, also ...Guard) (bool, error) {
	guards := append([]Guard{{Key: h.key, ModRevision: rev}}, also...)
	for granted := false; ; granted = true {
		if h.etcd == 0 && !h.reserved {
			id, err := h.r.store.Grant(ctx, h.req.TTL)
			if err != nil {
				return false, err
			}
			h.etcd, h.ttl, h.alive = id, h.req.TTL, time.Now()
		}
		ok, at, err := h.r.store.Commit(ctx, Txn{If: guards, Key: h.key, Value: h.value, Lease: h.etcd})
		if errors.Is(err, ErrLeaseExpired) && !granted {
			h.forgetLocked()
			continue
		}
		if err == nil && ok {
			h.acceptLocked(at)
		}
		return ok, err
	}
}

// forgetLocked notes that nothing of ours hangs on the etcd lease any more.
func (h *Held) forgetLocked() {
	if h.etcd == 0 {
		return
	}
	const most = 100 // of which a backup may have any
	h.past = append(h.past[max(0, len(h.past)-most+1):], h.etcd)
	h.etcd = 0
}

// acceptLocked notes that the store has our value at rev.
func (h *Held) acceptLocked(rev int64) {
	l := *h.view.Load()
	if rev != l.ModRevision { // or else a write that was given up, and waits for the key as it is, may still come
		h.tried = []Attrs{h.want}
	}
	l.Attrs, l.Reservation, l.ModRevision = h.want, h.reserved, rev
	h.view.Store(&l)
}

// Run keeps the lease until ctx ends or Revoke is called (nil), or another node takes it (Err). It never returns
// because the store is away.
func (h *Held) Run(ctx context.Context) error {
	var pause backoff
	for ctx.Err() == nil {
		err := h.keep(ctx, &pause)
		select {
		case <-h.done:
			if errors.Is(h.err, ErrReleased) {
				return nil
			}
			return h.err
		default:
		}
		h.r.health.report("lease", err)
		if ctx.Err() == nil {
			pause.wait(ctx, h.r.health.answered())
		}
	}
	return nil
}

// keep checks, watches and keeps alive, until the store fails or the lease ends.
func (h *Held) keep(ctx context.Context, pause *backoff) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := h.renew(ctx); err != nil {
		return err
	}
	rev, err := h.check(ctx)
	if err != nil {
		return err
	}
	h.r.health.report("lease", nil)
	events := h.r.store.Watch(ctx, h.rangeKey(), true, rev+1)
	started := time.Now()
	timer := time.NewTimer(h.untilRenewal())
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.done:
			return nil
		case e, ok := <-events:
			if time.Since(started) > maxBackoff {
				pause.reset()
			}
			if !ok || e.Err != nil {
				// Only the next check tells whether the store is away.
				return nil
			}
			if h.news(e) {
				if err := sleep(ctx, h.calmDown()); err != nil {
					return nil //nolint:nilerr // ctx has ended
				}
				if _, err := h.check(ctx); err != nil {
					return err
				}
			}
		case <-timer.C:
			if err := h.renew(ctx); err != nil {
				return err
			}
			if _, err := h.check(ctx); err != nil {
				return err
			}
			timer.Reset(h.untilRenewal())
		}
	}
}

// news is whether somebody else may have written our key.
func (h *Held) news(e Events) bool {
	rev := h.view.Load().ModRevision
	for _, c := range e.Changes {
		if c.ModRevision != rev {
			return true
		}
	}
	return false
}

// losses counts how often the key was gone, or somebody had written what is no lease: from the third time on in a while it is put back after a
// pause only, and the log is quiet, because whoever does so may never stop.
type losses struct {
	count int
	last  time.Time
	pause backoff
}

const maxLosses = 3

// add counts one more, and says whether the log is to tell, and that it is the last time.
func (l *losses) add() (tell, last bool) {
	if time.Since(l.last) > calm {
		*l = losses{}
	}
	l.last = time.Now()
	l.count++
	return l.count <= maxLosses, l.count == maxLosses
}

// calmDown is how long to wait before the key is looked at.
func (h *Held) calmDown() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.losses.count < maxLosses || time.Since(h.losses.last) > calm {
		return 0
	}
	return h.losses.pause.step()
}

// lossLocked counts a loss of the key, which was put back, and says whether to log it, with what.
func (h *Held) lossLocked() (attrs []any, tell bool) {
	tell, last := h.losses.add()
	attrs = []any{"subnet", h.view.Load().Subnet, "key", h.key}
	if last {
		attrs = append(attrs, "note", "it happens again and again: from now on it is put back after a pause, and not logged until a minute has passed without")
	}
	return attrs, tell
}

// untilRenewal is how long the etcd lease may be left alone.
func (h *Held) untilRenewal() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reserved {
		return h.req.TTL / 3 // nothing to keep alive, but look at the key now and then
	}
	return max(0, time.Until(h.alive.Add(min(h.ttl/3, h.ttl-h.req.RenewMargin))))
}

// renew restarts the time of the etcd lease. One that has expired is left for check to replace.
func (h *Held) renew(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.etcd == 0 {
		return nil
	}
	ttl, err := h.r.store.KeepAlive(ctx, h.etcd)
	switch {
	case errors.Is(err, ErrLeaseExpired):
		h.forgetLocked()
	case err != nil:
		return err
	default:
		h.ttl, h.alive = ttl, time.Now()
	}
	return nil
}

// check compares the store's idea of our key with ours and puts it right, or ends the lease. It returns the store's
// revision at which it looked.
func (h *Held) check(ctx context.Context) (int64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.checkLocked(ctx)
}

func (h *Held) checkLocked(ctx context.Context) (int64, error) {
	for range maxRaces {
		if h.Err() != nil {
			return 0, h.Err()
		}
		pairs, rev, err := h.r.store.Get(ctx, h.rangeKey(), true)
		if err != nil {
			return 0, err
		}
		var own, rival *entry
		for _, p := range pairs {
			e := h.r.entryOf(p)
			switch {
			case p.Key == h.key:
				own = &e
			case e.skip == "" && e.lease.Subnet == h.view.Load().Subnet:
				rival = &e
			}
		}
		if own == nil && rival != nil {
			h.lost(*rival)
			return 0, h.Err()
		}
		ok, err := h.settleLocked(ctx, own, rev)
		if err != nil {
			return 0, err
		}
		if ok {
			return rev, nil
		}
	}
	return 0, fmt.Errorf("%s: key %s changes faster than it can be read", h.r.store, h.key)
}

// settleLocked makes the key ours again, whatever became of it: own is nil if it was absent at rev. false: look again.
func (h *Held) settleLocked(ctx context.Context, own *entry, rev int64) (bool, error) {
	subnet := h.view.Load().Subnet
	if own == nil {
		h.reserved = false // a reservation that is gone is not ours to make again
		ok, err := h.putLocked(ctx, 0, Guard{Key: h.rangeKey(), Prefix: true, AtMost: true, ModRevision: rev})
		if ok && err == nil {
			if attrs, tell := h.lossLocked(); tell {
				h.r.log.Warn("own lease was gone from the store; put it back", attrs...)
			}
		}
		return ok, err
	}
	theirs := own.lease.Attrs
	switch {
	case own.skip != "": // nobody's
	case theirs.nodeID() == h.req.NodeID && own.ModRevision < h.view.Load().ModRevision:
		// Written before what the store had of us, so it has gone back: to what we wrote once, or the process before.
	case theirs.nodeID() == h.req.NodeID:
		// Written on an etcd lease that is not ours, or with an address that we never had: not by this process. Of
		// the two the one that started later goes on.
		if own.Lease != 0 && own.Lease != h.etcd && !slices.Contains(h.past, own.Lease) ||
			!slices.ContainsFunc(h.tried, func(a Attrs) bool { return samePlace(a, theirs) }) {
			h.end(fmt.Errorf("%w: it publishes %s for %v (key %s): does this node run twice, or was its state directory copied? Then give the copy a NodeID of its own", ErrDuplicateNode, theirs.who(), subnet, h.key))
			return false, nil
		}
	case own.lease.Reservation && theirs.RootlessOvl == nil && theirs.sharesPublicIP(h.want): // reserved for us
	default:
		h.lost(*own)
		return false, nil
	}
	if own.skip != "" {
		// Whatever it hangs on: only a readable lease says that it is a reservation.
		ok, err := h.putLocked(ctx, own.ModRevision)
		if ok && err == nil {
			if attrs, tell := h.lossLocked(); tell {
				h.r.log.Warn("own lease was overwritten with what is no lease; repaired it", append(attrs, "reason", own.skip)...)
			}
		}
		return ok, err
	}
	if own.lease.Reservation != h.reserved {
		// Somebody turned our lease into a reservation (flannel's Documentation/reservations.md), or back.
		h.r.log.Info("own lease changed its kind", "subnet", subnet, "reservation", own.lease.Reservation)
		h.reserved = own.lease.Reservation
		if h.reserved {
			h.forgetLocked() // it expires
		}
	}
	if bytes.Equal(own.Value, h.value) && own.Lease == h.etcd {
		h.acceptLocked(own.ModRevision)
		return true, nil
	}
	return h.putLocked(ctx, own.ModRevision)
}

func (h *Held) lost(e entry) {
	h.end(fmt.Errorf("%w: %v now belongs to %s (key %s)", ErrTaken, e.lease.Subnet, e.lease.Attrs.who(), e.Key))
}

// samePlace: the two are published by one and the same socket.
func samePlace(a, b Attrs) bool {
	return a.PublicIP == b.PublicIP && a.PublicIPv6 == b.PublicIPv6 && a.port(0) == b.port(0)
}

// Update publishes other attributes for the same subnet; NodeID stays. If another node's lease has their address it returns
// ErrForeignLease, if the store is away that error, and when ctx ends, for whatever it waits, soon. After an error what was published
// stays what Run publishes: nobody but Update looks for other leases with an address, so that one which could not be looked for is not
// written when the store is back. (Where only the store's answer was lost, the store may have a until Run or the next Update looks.)
// Call it again until it has succeeded.
func (h *Held) Update(ctx context.Context, a Attrs) error {
	if err := h.mu.LockContext(ctx); err != nil {
		return err
	}
	defer h.mu.Unlock()
	if err := h.allowsLocked(ctx, a); err != nil {
		return err
	}
	if err := h.encodeLocked(stamped(a, h.req.NodeID)); err != nil {
		return err
	}
	if _, err := h.checkLocked(ctx); err != nil {
		return errors.Join(err, h.encodeLocked(h.view.Load().Attrs))
	}
	return nil
}

// Allows is the error that Update would return for a, as far as can be told without writing anything: nil if the store answers and no other
// node's lease has a's address.
func (h *Held) Allows(ctx context.Context, a Attrs) error {
	if err := h.mu.LockContext(ctx); err != nil {
		return err
	}
	defer h.mu.Unlock()
	return h.allowsLocked(ctx, a)
}

func (h *Held) allowsLocked(ctx context.Context, a Attrs) error {
	if err := h.Err(); err != nil {
		return err
	}
	entries, _, err := h.r.list(ctx)
	if err != nil {
		return err
	}
	req := h.req
	req.Attrs = stamped(a, h.req.NodeID)
	for i := range entries {
		if err := foreign(&entries[i], req); err != nil {
			return err
		}
	}
	return nil
}

// Revoke gives the lease back: the key goes, Done is closed with ErrReleased, and Run returns. A reservation stays in
// the store. If the store is away the error says so and the lease ends with its TTL. Others read in the last value of the key that the
// node means to go: of a key that is merely gone they wait for its node to put it back.
func (h *Held) Revoke(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.end(ErrReleased)
	if h.etcd == 0 {
		return nil
	}
	last := h.view.Load()
	gone := stamped(last.Attrs, h.req.NodeID)
	gone.RootlessOvl.Left = true
	if value, err := json.Marshal(gone); err == nil {
		// What fails here the revocation tells of, and if it does not: the others find out by themselves.
		_, _, _ = h.r.store.Commit(ctx, Txn{If: []Guard{{Key: h.key, ModRevision: last.ModRevision}}, Key: h.key, Value: value, Lease: h.etcd})
	}
	if err := h.r.store.Revoke(ctx, h.etcd); err != nil {
		return err
	}
	h.r.log.Info("gave the lease back", "subnet", h.view.Load().Subnet)
	return nil
}
