// This file tests how names are kept where the store is slow or somebody else writes to it, on the store in memory and a clock that jumps.

package lease_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

// slow takes its time for every write, and counts what it is asked.
type slow struct {
	*leasetest.Store
	delay           time.Duration
	grants, commits atomic.Int64
}

func (s *slow) Grant(ctx context.Context, ttl time.Duration) (lease.LeaseID, error) {
	s.grants.Add(1)
	return s.Store.Grant(ctx, ttl)
}

func (s *slow) Commit(ctx context.Context, t lease.Txn) (bool, int64, error) {
	s.commits.Add(1)
	time.Sleep(s.delay)
	return s.Store.Commit(ctx, t)
}

func nameAt(name, addr string, aliases ...string) lease.Name {
	return lease.Name{Name: name, Addr: netip.MustParseAddr(addr), Aliases: aliases}
}

// keepNames runs names of a node until the test ends.
func keepNames(t *testing.T, s lease.Store, nodeID string) *lease.Names {
	t.Helper()
	n := lease.NewRegistry(s, "", nil).NewNames(nodeID, lease.NamesTTL)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := n.Run(ctx, func(lease.NamesSnapshot) {}); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return n
}

func TestNames_LiveWhileManyArePublishedSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slow{Store: leasetest.NewStore(), delay: lease.NamesTTL / 4}
		n := keepNames(t, s, "one")
		const count = 12
		for i := range count {
			if err := n.Keep(nameAt(fmt.Sprintf("c%d", i), fmt.Sprintf("10.5.1.%d", i+2))); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * lease.NamesTTL)
		if g, c := s.grants.Load(), s.commits.Load(); g != 1 || c != count {
			t.Errorf("%d etcd leases and %d writes for %d names", g, c, count)
		}
	})
}

func TestNames_OfTwoDaemonsWithOneNodeIDAreNotFoughtOverWithoutPause(t *testing.T) {
	for what, second := range map[string]string{"of one name": "web", "of what the other does not want": "db"} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &slow{Store: leasetest.NewStore(), delay: time.Millisecond}
				one, two := keepNames(t, s, "same"), keepNames(t, s, "same")
				if err := errors.Join(one.Claim(t.Context(), nameAt("web", "10.5.1.2")), two.Claim(t.Context(), nameAt(second, "10.5.1.3"))); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * time.Minute)
				if c := s.commits.Load(); c > 300 {
					t.Errorf("%d writes in two minutes", c)
				}
				p := one.Problem("web")
				if p == nil {
					p = two.Problem(second)
				}
				if p == nil || !strings.Contains(p.Error(), "node's id") {
					t.Errorf("the problem is %v", p)
				}
			})
		})
	}
}

func TestNames_PutBackIsForgottenWhenItIsCalm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := leasetest.NewStore()
		n := keepNames(t, s, "one")
		if err := n.Claim(t.Context(), nameAt("web", "10.5.1.2")); err != nil {
			t.Fatal(err)
		}
		const key = lease.DefaultPrefix + "/rootless-ovl/names/web"
		there := func() bool {
			pairs, _, err := s.Get(t.Context(), key, false)
			if err != nil {
				t.Fatal(err)
			}
			return len(pairs) == 1
		}
		for i, want := range []bool{true, true, false} {
			if _, _, err := s.Commit(t.Context(), lease.Txn{Key: key, Delete: true}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if there() != want {
				t.Errorf("at once after loss %d: %v, want %v", i+1, there(), want)
			}
		}
		time.Sleep(2 * time.Minute)
		if !there() || n.Problem("web") != nil {
			t.Errorf("later it is there: %v; %v", there(), n.Problem("web"))
		}
		if _, _, err := s.Commit(t.Context(), lease.Txn{Key: key, Delete: true}); err != nil {
			t.Fatal(err)
		}
		if synctest.Wait(); !there() {
			t.Error("a loss long after the others is not made good at once")
		}
	})
}

func TestNames_RecordThatCannotBeReadIsItsNodesAllTheSame(t *testing.T) {
	const later = `{"NodeID":"other","Addr":{"of":"a later version"}}`
	for value, taken := range map[string]bool{
		later:                                 true,
		`{"NodeID":"other","Addr":"fd00::1"}`: true,
		`{"NodeID":"one","Addr":{}}`:          false, // ours
		`{"NodeID":"","Addr":"10.5.9.9"}`:     false,
		`garbage`:                             false,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := leasetest.NewStore()
			const key = lease.DefaultPrefix + "/rootless-ovl/names/web"
			if _, _, err := s.Commit(t.Context(), lease.Txn{Key: key, Value: []byte(value)}); err != nil {
				t.Fatal(err)
			}
			n := keepNames(t, s, "one")
			synctest.Wait()
			err := n.Claim(t.Context(), nameAt("web", "10.5.1.2"))
			var e *lease.NameTakenError
			switch {
			case !taken && err != nil:
				t.Errorf("%s: %v", value, err)
			case taken && (!errors.As(err, &e) || e.Holder.NodeID != "other" || !strings.Contains(err.Error(), "by a container of node other")):
				t.Errorf("%s: %v", value, err)
			}
			if err := n.Claim(t.Context(), nameAt("db", "10.5.1.3", "web")); !errors.Is(err, lease.ErrNameTaken) {
				t.Errorf("%s, as an alias: %v", value, err)
			}
			pairs, _, err := s.Get(t.Context(), key, false)
			if err != nil || len(pairs) != 1 || taken != (string(pairs[0].Value) == value) {
				t.Errorf("%s: the store has %v, %v", value, pairs, err)
			}
		})
	}
}
