// This file is the part of the suite about the names of containers.

package leasetest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// namer is a node's names, running.
type namer struct {
	*lease.Names
	*node
	last atomic.Pointer[lease.NamesSnapshot]
	stop func() // without taking anything back
}

func (r *room) namer(t *testing.T, i int, ttl time.Duration) *namer {
	t.Helper()
	n := &namer{node: r.node(t)}
	n.Names = n.NewNames(fmt.Sprintf("node-%d", i), ttl)
	n.run(t, r)
	return n
}

func (n *namer) run(t *testing.T, r *room) {
	ctx, cancel := context.WithCancel(r.ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := n.Names.Run(ctx, func(s lease.NamesSnapshot) { n.last.Store(&s) }); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	n.stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(n.stop)
}

func named(name, addr string, aliases ...string) lease.Name {
	return lease.Name{Name: name, Addr: netip.MustParseAddr(addr), Aliases: aliases}
}

func (n *namer) claim(t *testing.T, r *room, name lease.Name) {
	t.Helper()
	if err := n.Claim(r.ctx, name); err != nil {
		t.Fatalf("Claim: %v", err)
	}
	if err := n.Problem(name.Name); err != nil {
		t.Fatalf("Claim has published nothing: %v", err)
	}
}

// sees waits until n sees these names, each written as "name node addr aliases".
func (n *namer) sees(t *testing.T, r *room, want ...string) {
	t.Helper()
	var got []string
	defer func() {
		if t.Failed() {
			t.Logf("the last seen are %q", got)
		}
	}()
	r.eventually(t, fmt.Sprintf("the names are %q", want), func() bool {
		got = nil
		if s := n.last.Load(); s != nil {
			for _, x := range s.Names {
				got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %v %s", x.Name, x.NodeID, x.Addr, strings.Join(x.Aliases, ","))))
			}
		}
		return strings.Join(got, ";") == strings.Join(want, ";") && n.last.Load() != nil
	})
}

func testNames(t *testing.T, r *room) {
	a, b := r.namer(t, 1, time.Minute), r.namer(t, 2, time.Minute)
	a.sees(t, r)
	web := named("web", "10.5.1.2", "front", "db", "front", "web")
	web.Addr6 = netip.MustParseAddr("fd00:5::2")
	a.claim(t, r, web)
	b.claim(t, r, named("db2", "10.5.2.2", "front"))
	const one, two = "db2 node-2 10.5.2.2 front", "web node-1 10.5.1.2 db,front"
	a.sees(t, r, one, two)
	b.sees(t, r, one, two)
	if got := b.last.Load().Names[1].Addr6; got != web.Addr6 {
		t.Errorf("the IPv6 address is %v", got)
	}
	if p := r.get(t, r.prefix+"/rootless-ovl/names/web"); p == nil || p.Lease == 0 {
		t.Errorf("the key is %+v", p)
	}
	r.put(t, r.prefix+"/rootless-ovl/names/bad", "garbage", 0)
	r.put(t, r.prefix+"/rootless-ovl/names/Upper", `{"NodeID":"x","Addr":"10.5.3.3"}`, 0)
	r.put(t, r.prefix+"/rootless-ovl/names/a/b", `{"NodeID":"x","Addr":"10.5.3.3"}`, 0)
	r.put(t, r.prefix+"/rootless-ovl/other", `{"NodeID":"x","Addr":"10.5.3.3"}`, 0)
	r.eventually(t, "garbage is skipped", func() bool { return len(b.last.Load().Skipped) == 3 })
	// What is wanted otherwise takes the place of what was; the address makes it the same container.
	a.claim(t, r, named("web", "10.5.1.2"))
	b.sees(t, r, one, "web node-1 10.5.1.2")
	if err := a.Drop(r.ctx, named("web", "10.5.1.2")); err != nil {
		t.Errorf("Drop: %v", err)
	}
	if p := r.get(t, r.prefix+"/rootless-ovl/names/web"); p != nil {
		t.Errorf("after Drop the key is %+v", p)
	}
	b.sees(t, r, one)
	if got := b.log.count("skipping a key that is not a name"); got != 3 {
		t.Errorf("%d log lines for three keys of garbage:\n%s", got, b.log)
	}
	for _, bad := range []lease.Name{named("Web", "10.5.1.2"), named("a..b", "10.5.1.2"), named("-a", "10.5.1.2"), named("a", "fd00::1"), named("a", "127.0.0.1"), named("a", "10.5.1.2", "B")} {
		if err := a.Claim(r.ctx, bad); err == nil || errors.Is(err, lease.ErrNameTaken) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func testNamesTaken(t *testing.T, r *room) {
	a, b := r.namer(t, 1, time.Minute), r.namer(t, 2, time.Minute)
	a.claim(t, r, named("web", "10.5.1.2", "front"))
	b.sees(t, r, "web node-1 10.5.1.2 front")
	taken := func(n *namer, name lease.Name, what string) {
		t.Helper()
		err := n.Claim(r.ctx, name)
		var e *lease.NameTakenError
		if !errors.Is(err, lease.ErrNameTaken) || !errors.As(err, &e) || e.Name != what || e.Holder.Addr.String() != "10.5.1.2" {
			t.Errorf("Claim(%v) = %v", name, err)
		}
	}
	taken(b, named("web", "10.5.2.2"), "web")
	taken(b, named("db", "10.5.2.2", "web"), "web")
	taken(b, named("front", "10.5.2.2"), "front")
	// On one node, too.
	taken(a, named("web", "10.5.1.3"), "web")
	taken(a, named("front", "10.5.1.3"), "front")
	taken(a, named("db", "10.5.1.3", "web"), "web")
	b.claim(t, r, named("db", "10.5.2.2", "front"))
	a.sees(t, r, "db node-2 10.5.2.2 front", "web node-1 10.5.1.2 front")
	// Whoever did not get it takes nothing back.
	if err := a.Drop(r.ctx, named("web", "10.5.1.3")); err != nil {
		t.Error(err)
	}
	if p := r.get(t, r.prefix+"/rootless-ovl/names/web"); p == nil || a.Problem("web") != nil {
		t.Errorf("the key is %+v, %v", p, a.Problem("web"))
	}
	taken(b, named("web", "10.5.2.3"), "web")
	if err := a.Drop(r.ctx, named("web", "10.5.1.2")); err != nil {
		t.Error(err)
	}
	b.claim(t, r, named("web", "10.5.2.3"))
	a.sees(t, r, "db node-2 10.5.2.2 front", "web node-2 10.5.2.3")
}

func testNamesRace(t *testing.T, r *room) {
	const crowd = 5
	errs := make(chan error, crowd)
	for i := range crowd {
		n := r.namer(t, i, time.Minute)
		go func() { errs <- n.Claim(r.ctx, named("web", fmt.Sprintf("10.5.%d.2", i))) }()
	}
	won := 0
	for range crowd {
		switch err := <-errs; {
		case err == nil:
			won++
		case !errors.Is(err, lease.ErrNameTaken):
			t.Errorf("Claim: %v", err)
		}
	}
	if won != 1 {
		t.Errorf("%d of %d got the name", won, crowd)
	}
}

func testNamesPutBack(t *testing.T, r *room) {
	n := r.namer(t, 1, time.Minute)
	n.claim(t, r, named("web", "10.5.1.2"))
	n.claim(t, r, named("db", "10.5.1.3"))
	key := r.prefix + "/rootless-ovl/names/web"
	ours := func() bool {
		p := r.get(t, key)
		return p != nil && strings.Contains(string(p.Value), "node-1") && p.Lease != 0
	}
	r.delete(t, key)
	r.eventually(t, "a deleted name is put back", ours)
	r.put(t, key, "garbage", 0)
	r.eventually(t, "garbage is overwritten", ours)
	if err := r.store.Revoke(r.ctx, r.get(t, key).Lease); err != nil {
		t.Fatal(err)
	}
	r.eventually(t, "both are put back on another etcd lease", func() bool {
		db := r.get(t, r.prefix+"/rootless-ovl/names/db")
		return ours() && db != nil && db.Lease != 0
	})
}

func testNamesFreed(t *testing.T, r *room) {
	a, b := r.namer(t, 1, time.Minute), r.namer(t, 2, time.Minute)
	a.claim(t, r, named("web", "10.5.1.2"))
	if err := b.Keep(named("web", "10.5.2.2")); err != nil {
		t.Fatal(err)
	}
	if err := b.Keep(named("db", "10.5.2.3", "web")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web", "db"} {
		r.eventually(t, name+" is known to be taken", func() bool { return errors.Is(b.Problem(name), lease.ErrNameTaken) })
	}
	a.sees(t, r, "web node-1 10.5.1.2")
	if err := b.Drop(r.ctx, named("web", "10.5.2.2")); err != nil {
		t.Error(err)
	}
	if err := a.Drop(r.ctx, named("web", "10.5.1.2")); err != nil {
		t.Error(err)
	}
	b.sees(t, r, "db node-2 10.5.2.3 web")
	r.eventually(t, "there is no problem left", func() bool { return b.Problem("db") == nil })
}

func testNamesGo(t *testing.T, r *room) {
	const ttl = 2 * time.Second
	a, b, c := r.namer(t, 1, ttl), r.namer(t, 2, ttl), r.namer(t, 3, ttl)
	a.claim(t, r, named("killed", "10.5.1.2"))
	b.claim(t, r, named("lives", "10.5.2.2"))
	c.claim(t, r, named("stopped", "10.5.3.2"))
	b.sees(t, r, "killed node-1 10.5.1.2", "lives node-2 10.5.2.2", "stopped node-3 10.5.3.2")
	c.stop()
	if err := c.Revoke(r.ctx); err != nil {
		t.Error(err)
	}
	if p := r.get(t, r.prefix+"/rootless-ovl/names/stopped"); p != nil {
		t.Errorf("after Revoke the key is %+v", p)
	}
	a.stop()
	b.sees(t, r, "lives node-2 10.5.2.2")
	select { // longer than the TTL
	case <-time.After(2 * ttl):
	case <-r.ctx.Done():
	}
	b.sees(t, r, "lives node-2 10.5.2.2")
}

func testNamesRestart(t *testing.T, r *room) {
	a, b := r.namer(t, 1, time.Minute), r.namer(t, 2, time.Minute)
	a.claim(t, r, named("web", "10.5.1.2"))
	a.claim(t, r, named("old", "10.5.1.3"))
	b.sees(t, r, "old node-1 10.5.1.3", "web node-1 10.5.1.2")
	a.stop() // killed
	was := r.get(t, r.prefix+"/rootless-ovl/names/web").Lease
	again := &namer{node: r.node(t)}
	again.Names = again.NewNames("node-1", time.Minute)
	if err := again.Keep(named("web", "10.5.1.2")); err != nil {
		t.Fatal(err)
	}
	again.run(t, r)
	b.sees(t, r, "web node-1 10.5.1.2")
	r.eventually(t, "the name hangs on the etcd lease of the new process", func() bool {
		p := r.get(t, r.prefix+"/rootless-ovl/names/web")
		return p != nil && p.Lease != 0 && p.Lease != was
	})
}

func testNamesOutage(t *testing.T, r *room) {
	a, b := r.namer(t, 1, time.Minute), r.namer(t, 2, time.Minute)
	a.claim(t, r, named("web", "10.5.1.2"))
	b.sees(t, r, "web node-1 10.5.1.2")
	r.Stop(t)
	r.eventually(t, "the outage is noticed", func() bool { return !a.Health().Connected })
	ctx, cancel := context.WithTimeout(r.ctx, 200*time.Millisecond)
	defer cancel()
	if err := a.Claim(ctx, named("db", "10.5.1.3")); err != nil {
		t.Errorf("Claim while the store is away: %v", err)
	}
	if err := a.Problem("db"); err == nil || errors.Is(err, lease.ErrNameTaken) {
		t.Errorf("Problem = %v", err)
	}
	if err := a.Drop(ctx, named("web", "10.5.1.2")); err == nil {
		t.Error("Drop says that it has deleted something")
	}
	r.Start(t)
	b.sees(t, r, "db node-1 10.5.1.3")
	r.eventually(t, "nothing is wrong any more", func() bool { return a.Problem("db") == nil && a.Health().Connected })
}
