// This file is the suite's part about stores that lose what they had: made anew, restored from a backup.

package leasetest

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

func testStoreWatchFuture(t *testing.T, r *room) {
	_, rev, err := r.store.Get(r.ctx, r.prefix, true)
	if err != nil {
		t.Fatal(err)
	}
	if e := <-r.store.Watch(r.ctx, r.prefix, true, rev+1_000_000); !errors.Is(e.Err, lease.ErrRewound) {
		t.Errorf("a watch from the far future: %+v", e)
	}
}

// keepConfig runs KeepConfig until the test ends; the function gives what it has found so far.
func (r *room) keepConfig(t *testing.T, n *node, raw string) (found func() []string) {
	var mu sync.Mutex
	var list []string
	ctx, cancel := context.WithCancel(r.ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- n.KeepConfig(ctx, []byte(raw), func(now []byte) {
			mu.Lock()
			defer mu.Unlock()
			list = append(list, string(now))
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("KeepConfig: %v", err)
		}
	})
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(list)
	}
}

func testKeepConfig(t *testing.T, r *room) {
	n := r.node(t)
	key := r.prefix + "/config"
	found := r.keepConfig(t, n, network)
	is := func(what, want string) {
		t.Helper()
		r.eventually(t, what, func() bool {
			p := r.get(t, key)
			return p != nil && string(p.Value) == want
		})
	}
	is("the config is put where there is none", network)
	r.delete(t, key)
	is("the config is put back", network)
	for _, other := range []string{`{"Network":"10.7.0.0/16"}`, "garbage"} {
		r.put(t, key, other, 0)
		r.eventually(t, "it is told what there is", func() bool { return slices.Contains(found(), other) })
		is("what somebody wrote stays", other)
	}
	if got := n.log.count("put back"); got != 1 { // within so short a time
		t.Errorf("%d log lines:\n%s", got, n.log)
	}
}

func testWatchLeft(t *testing.T, r *room) {
	n := r.node(t)
	h := r.acquire(t, r.node(t), r.config(t, network), request(1))
	subnet := h.Lease().Subnet
	var left []lease.Lease
	wait := r.follow(t, n)
	wait(subnet.String())
	if err := h.Revoke(r.ctx); err != nil {
		t.Fatal(err)
	}
	if left = append(left, wait().Left...); len(left) != 1 || left[0].Subnet != subnet {
		t.Errorf("left: %+v", left)
	}
	// A key that is merely deleted tells nothing.
	h = r.acquire(t, r.node(t), r.config(t, network), request(2))
	wait(h.Lease().Subnet.String())
	r.delete(t, r.key(h.Lease().Subnet))
	if s := wait(); len(s.Left) != 0 {
		t.Errorf("left: %+v", s.Left)
	}
}

// The data directory is gone: nodes put back all that they know, and nobody ends.
func testComesBackEmpty(t *testing.T, r *room) {
	cfg := r.config(t, network)
	// History, so that revisions go back a long way.
	for range 20 {
		r.put(t, r.prefix+"/unrelated", "x", 0)
	}
	var held []*lease.Held
	var subnets []string
	var nodes []*node
	for i := range 3 {
		n := r.node(t)
		h := r.acquire(t, n, cfg, request(i+1))
		r.run(t, h)
		r.keepConfig(t, n, network)
		nodes, held, subnets = append(nodes, n), append(held, h), append(subnets, h.Lease().Subnet.String())
	}
	slices.SortFunc(subnets, func(a, b string) int {
		return netip.MustParsePrefix(a).Compare(netip.MustParsePrefix(b))
	})
	wait := r.follow(t, nodes[0])
	wait(subnets...)
	names := r.namer(t, 1, lease.NamesTTL)
	names.claim(t, r, named("web", "10.5.1.2"))

	r.Stop(t)
	r.Wipe(t)
	r.Start(t)
	r.eventually(t, "every lease is back", func() bool {
		s, err := nodes[1].Leases(r.ctx)
		return err == nil && len(s.Leases) == len(held)
	})
	wait(subnets...)
	r.eventually(t, "the config is back", func() bool {
		c, err := nodes[1].Config(r.ctx)
		return err == nil && string(c.Raw) == network
	})
	r.eventually(t, "the name is back", func() bool { return r.get(t, r.prefix+"/rootless-ovl/names/web") != nil })
	for i, h := range held {
		if h.Err() != nil || !slices.Contains(subnets, h.Lease().Subnet.String()) {
			t.Errorf("node %d: %v, %v", i+1, h.Lease(), h.Err())
		}
	}
	if got := nodes[0].log.count("the store has gone back"); got != 1 {
		t.Errorf("%d log lines:\n%s", got, nodes[0].log)
	}
}

// A backup has an earlier version of a node's lease, on another etcd lease and with another address, and knows nothing of a node that came later.
func testComesBackFromABackup(t *testing.T, r *room) {
	cfg := r.config(t, network)
	before := request(1)
	before.Attrs.PublicIP = netip.MustParseAddr("172.16.0.1")
	r.acquire(t, r.node(t), cfg, before) // by an earlier run of the node, and not revoked
	r.Stop(t)
	restore := r.Save(t)
	r.Start(t)

	n, m := r.node(t), r.node(t)
	var first, second *lease.Held
	r.eventually(t, "the store is back", func() bool {
		var err error
		first, err = n.Acquire(r.ctx, cfg, request(1))
		return err == nil
	})
	second = r.acquire(t, m, cfg, request(2))
	r.run(t, first)
	r.run(t, second)
	keys := []string{r.key(first.Lease().Subnet), r.key(second.Lease().Subnet)}
	want := [][]byte{r.get(t, keys[0]).Value, r.get(t, keys[1]).Value}
	wait := r.follow(t, n)
	both := []string{first.Lease().Subnet.String(), second.Lease().Subnet.String()}
	if second.Lease().Subnet.Addr().Less(first.Lease().Subnet.Addr()) {
		slices.Reverse(both)
	}
	wait(both...)
	names := r.namer(t, 1, lease.NamesTTL)
	names.claim(t, r, named("web", "10.5.1.2"))

	r.Stop(t)
	restore(t)
	r.Start(t)
	for i, key := range keys {
		r.eventually(t, "each node's lease is as it was", func() bool {
			pairs, _, err := r.store.Get(r.ctx, key, false)
			return err == nil && len(pairs) == 1 && bytes.Equal(pairs[0].Value, want[i])
		})
	}
	wait(both...)
	r.eventually(t, "the name is back", func() bool { return r.get(t, r.prefix+"/rootless-ovl/names/web") != nil })
	time.Sleep(100 * time.Millisecond) // for whoever would end
	if first.Err() != nil || second.Err() != nil {
		t.Errorf("ended: %v, %v", first.Err(), second.Err())
	}
}
