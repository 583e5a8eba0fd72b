// This file tests what takes hours, on the store in memory and a clock that jumps: renewal, long outages, expiry.

package lease_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

func testNetwork(t *testing.T) lease.NetworkConfig {
	t.Helper()
	c, err := lease.ParseConfig([]byte(`{"Network":"10.5.0.0/16"}`))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func testRequest(id, ip string) lease.Request {
	return lease.Request{NodeID: id, Attrs: lease.Attrs{PublicIP: netip.MustParseAddr(ip), RootlessOvl: &lease.Extension{Port: 18285}}}
}

// counting counts what a store is asked, and can fail.
type counting struct {
	*leasetest.Store
	keepAlives, gets atomic.Int64
}

func (c *counting) KeepAlive(ctx context.Context, id lease.LeaseID) (time.Duration, error) {
	c.keepAlives.Add(1)
	return c.Store.KeepAlive(ctx, id)
}

func (c *counting) Get(ctx context.Context, key string, prefix bool) ([]lease.Pair, int64, error) {
	c.gets.Add(1)
	return c.Store.Get(ctx, key, prefix)
}

// hold acquires and runs a lease inside a synctest bubble; stop ends it and returns Run's result.
func hold(t *testing.T, s lease.Store, q lease.Request) (h *lease.Held, stop func() error) {
	t.Helper()
	h, err := lease.NewRegistry(s, "", nil).Acquire(t.Context(), testNetwork(t), q)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- h.Run(ctx) }()
	synctest.Wait()
	return h, func() error {
		cancel()
		return <-result
	}
}

func TestHeld_KeepsAliveInTime(t *testing.T) {
	for name, tc := range map[string]struct {
		ttl, margin time.Duration
		days        int
		want        int // keep-alives at most, beside the one at the start; half of them at least
	}{
		"a host: every 8 h":         {0, time.Hour, 10, 30},
		"a margin of 20 h of 24":    {0, 20 * time.Hour, 1, 6},
		"ephemeral: every 20 s":     {time.Minute, 0, 1, 3 * 60 * 24},
		"margin longer than thirds": {time.Minute, 50 * time.Second, 1, 6 * 60 * 24},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &counting{Store: leasetest.NewStore()}
				q := testRequest("node-1", "192.168.0.1")
				q.TTL, q.RenewMargin = tc.ttl, tc.margin
				h, stop := hold(t, s, q)
				first := h.Lease()
				s.keepAlives.Store(0)
				time.Sleep(time.Duration(tc.days)*24*time.Hour + time.Second)
				synctest.Wait()
				if got := int(s.keepAlives.Load()); got > tc.want || got < tc.want/2 {
					t.Errorf("%d keep-alives in %d days, want about %d", got, tc.days, tc.want)
				}
				if got := h.Lease(); got.ModRevision != first.ModRevision || h.Err() != nil {
					t.Errorf("from %+v to %+v: %v", first, got, h.Err())
				}
				if err := stop(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestHeld_SurvivesOutageLongerThanTheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &counting{Store: leasetest.NewStore()}
		h, stop := hold(t, s, testRequest("node-1", "192.168.0.1"))
		subnet := h.Lease().Subnet
		s.SetAway(lease.ErrUnreachable)
		s.gets.Store(0)
		time.Sleep(72 * time.Hour)
		synctest.Wait()
		if h.Err() != nil || h.Connected() || !errors.Is(h.LastError(), lease.ErrUnreachable) {
			t.Errorf("during the outage: %v, connected %t, %v", h.Err(), h.Connected(), h.LastError())
		}
		s.SetAway(nil)
		time.Sleep(6 * time.Second) // one pause at most
		synctest.Wait()
		// After a quiet minute a hiccup is over at once.
		time.Sleep(time.Minute)
		s.SetAway(lease.ErrUnreachable)
		time.Sleep(150 * time.Millisecond)
		synctest.Wait()
		if h.Connected() {
			t.Error("the hiccup was not noticed")
		}
		s.SetAway(nil)
		time.Sleep(450 * time.Millisecond)
		synctest.Wait()
		pairs, _, err := s.Get(t.Context(), lease.DefaultPrefix, true)
		if err != nil || len(pairs) != 1 || !strings.HasSuffix(pairs[0].Key, lease.Key(subnet, netip.Prefix{})) || pairs[0].Lease == 0 {
			t.Errorf("after the outage: %+v, %v", pairs, err)
		}
		if h.Err() != nil || !h.Connected() || h.Lease().Subnet != subnet {
			t.Errorf("after the outage: %v, connected %t", h.Err(), h.Connected())
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// silent is a store that gives no answer until a request is given up.
type silent struct {
	*leasetest.Store
	gets, commits atomic.Bool // which requests
}

func (s *silent) Get(ctx context.Context, key string, prefix bool) ([]lease.Pair, int64, error) {
	if s.gets.Load() {
		<-ctx.Done()
		return nil, 0, ctx.Err()
	}
	return s.Store.Get(ctx, key, prefix)
}

func (s *silent) Commit(ctx context.Context, x lease.Txn) (bool, int64, error) {
	if s.commits.Load() {
		<-ctx.Done()
		return false, 0, ctx.Err()
	}
	return s.Store.Commit(ctx, x)
}

func TestHeld_UpdateEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &silent{Store: leasetest.NewStore()}
		h, stop := hold(t, s, testRequest("node-1", "192.168.0.1"))
		first := h.Lease()
		a := testRequest("node-1", "192.168.0.2").Attrs
		ask := map[string]func(context.Context, lease.Attrs) error{"Update": h.Update, "Allows": h.Allows}
		giveUp := func(what string) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			begin := time.Now()
			if err := ask[what](ctx, a); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != time.Second {
				t.Errorf("%s after %v: %v", what, time.Since(begin), err)
			}
		}
		s.commits.Store(true)
		giveUp("Update")
		s.gets.Store(true)
		giveUp("Update")
		giveUp("Allows")
		// Somebody else holds the lock and waits for the store.
		waiting, cancel := context.WithCancel(t.Context())
		other := make(chan error)
		go func() { other <- h.Update(waiting, a) }()
		synctest.Wait()
		giveUp("Update")
		giveUp("Allows")
		cancel()
		if err := <-other; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		s.gets.Store(false)
		s.commits.Store(false)
		time.Sleep(24 * time.Hour) // of renewals
		synctest.Wait()
		if now := h.Lease(); now.ModRevision != first.ModRevision || now.Attrs.PublicIP != first.Attrs.PublicIP {
			t.Errorf("an update that was given up changed the lease to %+v", now)
		}
		if err := h.Update(t.Context(), a); err != nil || h.Lease().Attrs.PublicIP != a.PublicIP {
			t.Errorf("%+v, %v", h.Lease(), err)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// An update whose answer is lost, and which the store carries out only after somebody has looked, is ours all the same.
func TestHeld_KnowsALateWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &late{Store: leasetest.NewStore()}
		h, stop := hold(t, s, testRequest("node-1", "192.168.0.1"))
		s.keep.Store(true)
		a := testRequest("node-1", "192.168.0.2").Attrs
		if err := h.Update(t.Context(), a); !errors.Is(err, lease.ErrUnreachable) {
			t.Fatal(err)
		}
		time.Sleep(24 * time.Hour) // Run looks, and finds what it knows
		if ok, _, err := s.Store.Commit(t.Context(), s.kept); !ok || err != nil {
			t.Fatalf("%v, %v", ok, err)
		}
		synctest.Wait()
		if err := h.Err(); err != nil {
			t.Error(err)
		}
		if err := h.Update(t.Context(), a); err != nil || h.Lease().Attrs.PublicIP != a.PublicIP {
			t.Errorf("%+v, %v", h.Lease(), err)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// late keeps a Commit back, when told to.
type late struct {
	*leasetest.Store
	keep atomic.Bool
	kept lease.Txn
}

func (l *late) Commit(ctx context.Context, x lease.Txn) (bool, int64, error) {
	if l.keep.Swap(false) {
		l.kept = x
		return false, 0, lease.ErrUnreachable
	}
	return l.Store.Commit(ctx, x)
}

func TestHeld_EndsIfTakenDuringOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// The node is cut off, not the store: cut fails the first node's requests only.
		s := leasetest.NewStore()
		c := &cuttable{Store: s}
		h, stop := hold(t, c, testRequest("node-1", "192.168.0.1"))
		c.cut.Store(true)
		s.Expire()
		time.Sleep(time.Second)
		q := testRequest("node-2", "192.168.0.2")
		q.Previous = h.Lease().Subnet
		if _, err := lease.NewRegistry(s, "", nil).Acquire(t.Context(), testNetwork(t), q); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if h.Err() != nil {
			t.Errorf("cut off, yet: %v", h.Err())
		}
		c.cut.Store(false)
		<-h.Done()
		if err := h.Err(); !errors.Is(err, lease.ErrTaken) || !strings.Contains(err.Error(), "node-2") {
			t.Errorf("Err = %v", err)
		}
		if err := stop(); !errors.Is(err, lease.ErrTaken) {
			t.Errorf("Run: %v", err)
		}
	})
}

// cuttable is a client whose network can be cut; its watches end with it at the next event.
type cuttable struct {
	*leasetest.Store
	cut atomic.Bool
}

func (c *cuttable) Get(ctx context.Context, key string, prefix bool) ([]lease.Pair, int64, error) {
	if c.cut.Load() {
		return nil, 0, lease.ErrUnreachable
	}
	return c.Store.Get(ctx, key, prefix)
}

func (c *cuttable) Commit(ctx context.Context, x lease.Txn) (bool, int64, error) {
	if c.cut.Load() {
		return false, 0, lease.ErrUnreachable
	}
	return c.Store.Commit(ctx, x)
}

func TestAcquire_SecondAttemptFindsAWriteThatFailed(t *testing.T) {
	// The transaction happened, the answer did not arrive, and neither did the revocation.
	s := leasetest.NewStore()
	r := lease.NewRegistry(&deaf{Store: s}, "", nil)
	q := testRequest("node-1", "192.168.0.1")
	if _, err := r.Acquire(t.Context(), testNetwork(t), q); !errors.Is(err, lease.ErrUnreachable) {
		t.Fatalf("first: %v", err)
	}
	before, _, err := s.Get(t.Context(), lease.DefaultPrefix, true)
	if err != nil || len(before) != 1 {
		t.Fatalf("in the store: %v, %v", before, err)
	}
	if _, err := r.Acquire(t.Context(), testNetwork(t), q); err != nil {
		t.Fatal(err)
	}
	after, _, err := s.Get(t.Context(), lease.DefaultPrefix, true)
	if err != nil || len(after) != 1 || after[0].Key != before[0].Key {
		t.Errorf("from %v to %v, %v", before, after, err)
	}
}

// deaf loses the first answer to a Commit.
type deaf struct {
	*leasetest.Store
	commits int
}

func (d *deaf) Commit(ctx context.Context, x lease.Txn) (bool, int64, error) {
	ok, rev, err := d.Store.Commit(ctx, x)
	if d.commits++; d.commits == 1 {
		return false, 0, lease.ErrUnreachable
	}
	return ok, rev, err
}

func (d *deaf) Revoke(ctx context.Context, id lease.LeaseID) error {
	if d.commits == 1 {
		return lease.ErrUnreachable
	}
	return d.Store.Revoke(ctx, id)
}

func TestAcquire_GivesUpAfterTooManyRaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &unlucky{Store: leasetest.NewStore()}
		_, err := lease.NewRegistry(s, "", nil).Acquire(t.Context(), testNetwork(t), testRequest("node-1", "192.168.0.1"))
		if !errors.Is(err, lease.ErrContended) || s.races < 10 || s.races > 1000 {
			t.Errorf("after %d races: %v", s.races, err)
		}
		if s.granted != s.revoked {
			t.Errorf("%d etcd leases granted, %d revoked", s.granted, s.revoked)
		}
	})
}

// unlucky loses every race.
type unlucky struct {
	*leasetest.Store
	races, granted, revoked int
}

func (u *unlucky) Commit(context.Context, lease.Txn) (bool, int64, error) {
	u.races++
	return false, 1, nil
}

func (u *unlucky) Grant(ctx context.Context, ttl time.Duration) (lease.LeaseID, error) {
	u.granted++
	return u.Store.Grant(ctx, ttl)
}

func (u *unlucky) Revoke(ctx context.Context, id lease.LeaseID) error {
	u.revoked++
	return u.Store.Revoke(ctx, id)
}

func TestAcquire_RefusesBadRequests(t *testing.T) {
	for name, change := range map[string]func(*lease.Request){
		"no NodeID":            func(q *lease.Request) { q.NodeID = "" },
		"NodeID with newline":  func(q *lease.Request) { q.NodeID = "a\nb" },
		"no address":           func(q *lease.Request) { q.Attrs.PublicIP = netip.Addr{} },
		"IPv6 as IPv4":         func(q *lease.Request) { q.Attrs.PublicIP = netip.MustParseAddr("2001:db8::1") },
		"TTL below a second":   func(q *lease.Request) { q.TTL = time.Millisecond },
		"margin as long":       func(q *lease.Request) { q.TTL, q.RenewMargin = time.Hour, time.Hour },
		"negative margin":      func(q *lease.Request) { q.RenewMargin = -1 },
		"enormous backenddata": func(q *lease.Request) { q.Attrs.BackendData = []byte(`"` + strings.Repeat("x", lease.MaxValue) + `"`) },
	} {
		s := leasetest.NewStore()
		q := testRequest("node-1", "192.168.0.1")
		change(&q)
		if _, err := lease.NewRegistry(s, "", nil).Acquire(t.Context(), testNetwork(t), q); err == nil {
			t.Errorf("%s: no error", name)
		}
		if s.Commits() != 0 {
			t.Errorf("%s: something was written", name)
		}
	}
}

func TestWatch_WaitsLongerBetweenAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &counting{Store: leasetest.NewStore()}
		s.SetAway(lease.ErrUnreachable)
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		snapshots := 0
		go func() { result <- lease.NewRegistry(s, "", nil).Watch(ctx, func(lease.Snapshot) { snapshots++ }) }()
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := s.gets.Load(); got < 3600/5 || got > 3600/3 || snapshots != 0 {
			t.Errorf("%d attempts in an hour, %d snapshots", got, snapshots)
		}
		s.SetAway(nil)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if snapshots != 1 {
			t.Errorf("%d snapshots once the store is back", snapshots)
		}
		// After a quiet minute a hiccup is over at once.
		time.Sleep(time.Minute)
		s.SetAway(lease.ErrUnreachable)
		time.Sleep(50 * time.Millisecond)
		s.SetAway(nil)
		time.Sleep(450 * time.Millisecond)
		synctest.Wait()
		if snapshots != 2 {
			t.Errorf("%d snapshots after a hiccup", snapshots)
		}
		cancel()
		if err := <-result; err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
}

// Somebody's script deletes the key for ever: it is put back, at a pace, and the log does not grow with it.
func TestHeld_PutsBackAtAPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := leasetest.NewStore()
		var log bytes.Buffer
		h, err := lease.NewRegistry(s, "", slog.New(slog.NewTextHandler(&log, nil))).Acquire(t.Context(), testNetwork(t), testRequest("node-1", "192.168.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() { result <- h.Run(ctx) }()
		key := lease.DefaultPrefix + "/subnets/" + lease.Key(h.Lease().Subnet, netip.Prefix{})
		before := s.Commits()
		for range 3600 * 10 {
			time.Sleep(100 * time.Millisecond)
			if _, _, err := s.Commit(t.Context(), lease.Txn{Key: key, Delete: true}); err != nil {
				t.Fatal(err)
			}
		}
		if puts := s.Commits() - before; puts > 3600 || puts < 3600/10 {
			t.Errorf("put back %d times in an hour", puts)
		}
		time.Sleep(10 * time.Second)
		if pairs, _, err := s.Get(t.Context(), key, false); err != nil || len(pairs) != 1 {
			t.Errorf("afterwards: %v, %v", pairs, err)
		}
		if lines := strings.Count(log.String(), "put it back"); lines != 3 {
			t.Errorf("%d lines:\n%s", lines, &log)
		}
		cancel()
		if err := <-result; err != nil {
			t.Error(err)
		}
	})
}
