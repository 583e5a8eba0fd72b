// This file tests that a store which has gone back is told of once, whichever of those who follow it notices first.

package lease_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

// uneven answers some later than others.
type uneven struct {
	*leasetest.Store
	leasesAsked, namesTold, namesEnd time.Duration // what lists of leases, answers to lists of names, and ends of watches of names wait
}

func (s *uneven) Get(ctx context.Context, key string, prefix bool) ([]lease.Pair, int64, error) {
	names := strings.HasSuffix(key, "/names/")
	if prefix && !names {
		time.Sleep(s.leasesAsked)
	}
	pairs, rev, err := s.Store.Get(ctx, key, prefix)
	if prefix && names {
		time.Sleep(s.namesTold)
	}
	return pairs, rev, err
}

func (s *uneven) Watch(ctx context.Context, key string, prefix bool, rev int64) <-chan lease.Events {
	events := s.Store.Watch(ctx, key, prefix, rev)
	if !strings.HasSuffix(key, "/names/") {
		return events
	}
	late := make(chan lease.Events)
	go func() {
		defer close(late)
		for e := range events {
			if e.Err != nil {
				time.Sleep(s.namesEnd)
			}
			select {
			case late <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return late
}

func TestRegistry_SaysOnceThatTheStoreHasGoneBack(t *testing.T) {
	for what, times := range map[string]uneven{
		"a list is overtaken":                {leasesAsked: time.Second, namesTold: 5 * time.Second},
		"the end of a watch is noticed late": {namesEnd: 5 * time.Second},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &uneven{Store: leasetest.NewStore()}
				write := func() {
					if ok, _, err := s.Commit(t.Context(), lease.Txn{Key: "/unrelated", Value: []byte("x")}); err != nil || !ok {
						t.Fatal(ok, err)
					}
				}
				for range 20 {
					write()
				}
				var log bytes.Buffer
				r := lease.NewRegistry(s, "", slog.New(slog.NewTextHandler(&log, nil)))
				ctx, cancel := context.WithCancel(t.Context())
				var running sync.WaitGroup
				running.Go(func() { _ = r.Watch(ctx, func(lease.Snapshot) {}) })
				running.Go(func() { _ = r.NewNames("one", lease.NamesTTL).Run(ctx, func(lease.NamesSnapshot) {}) })
				synctest.Wait()
				times.Store = s.Store
				*s = times
				for range 2 { // it may do so again
					s.Wipe()
					time.Sleep(900 * time.Millisecond)
					write() // what was asked before that has an earlier revision
					time.Sleep(time.Minute)
					for range 20 {
						write()
					}
				}
				cancel()
				running.Wait()
				if got := strings.Count(log.String(), "the store has gone back"); got != 2 {
					t.Errorf("said %d times, of 2:\n%s", got, &log)
				}
			})
		})
	}
}
