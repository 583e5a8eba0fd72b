// This file is what falls on nodes and store.

package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"net/netip"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// fault is something bad that begins, and ends unless it is over by then.
type fault struct {
	kind   string
	node   *node // whom it falls on; nil: the store
	beside bool  // it falls beside the operations of a batch; the others begin before
	quiet  bool  // packets go on as if nothing was
	done   bool
	begin  func()
	end    func()
}

// A maker decides by the seed what a fault does; nil: it cannot be just now.
type maker func(*run) *fault

var faults = []weighted[maker]{
	{"daemon killed", 14, (*run).kills},
	{"daemon restarted", 8, (*run).restarts},
	{"daemon replaced", 10, (*run).replaces},
	{"daemon stopped for a while", 6, (*run).pauses},
	{"etcd away", 8, (*run).storeAway},
	{"etcd frozen", 5, (*run).storeFrozen},
	{"etcd compacted", 4, (*run).storeCompacted},
	{"lease revoked", 5, (*run).leaseRevoked},
	{"key deleted", 5, (*run).keyDeleted},
	{"all keys deleted", 2, (*run).storeWiped},
	{"cable pulled", 6, (*run).cablePulled},
	{"interface down", 5, (*run).interfaceDown},
	{"bad cable", 10, (*run).badCable},
	{"address changed", 6, (*run).addressChanged},
}

// chooseFaults chooses those of a day: none, one, or two that do not meet on a node.
func (r *run) chooseFaults() []*fault {
	r.hurts = nil
	for range []int{0, 0, 0, 1, 1, 1, 1, 1, 2, 2}[r.rng.IntN(10)] {
		w := choose(r, faults)
		f := w.happen(r)
		if f == nil || slices.ContainsFunc(r.hurts, func(o *fault) bool { return o.node == f.node }) {
			continue
		}
		f.kind = w.name
		begin, end := f.begin, f.end
		f.begin = func() { r.say("%s begins", f); begin() }
		if end != nil {
			f.end = func() { end(); r.say("%s is over", f) }
		}
		r.hurts = append(r.hurts, f)
	}
	return r.hurts
}

func (f *fault) String() string {
	if f.node == nil {
		return f.kind
	}
	return f.kind + " on " + f.node.Name
}

// hurt tells whether something of this day falls on a node, or on the store, which all need.
func (r *run) hurt(n *node) bool {
	return slices.ContainsFunc(r.hurts, func(f *fault) bool { return f.node == nil || f.node == n })
}

func (r *run) anyHurt() bool { return len(r.hurts) > 0 }

// storeOnly tells whether packets have to go on.
func (r *run) storeOnly(hurts []*fault) bool {
	return !slices.ContainsFunc(hurts, func(f *fault) bool { return !f.quiet })
}

// victim is any node, by the seed.
func (r *run) victim() *node { return r.nodes[r.rng.IntN(len(r.nodes))] }

func (r *run) millis(most int) time.Duration {
	return time.Duration(r.rng.IntN(most)) * time.Millisecond
}

// up starts the node's daemon again.
func (r *run) up(n *node, args ...string) {
	r.logged(n)
	n.set(n.UpNoWait(append([]string{"--etcd-endpoints", r.etcd.Endpoint}, args...)...))
}

func (r *run) kills() *fault {
	n, away := r.mortal, time.Duration(0)
	if r.rng.IntN(2) == 0 {
		away = r.millis(2000)
	}
	return &fault{node: n, beside: true, begin: func() {
		n.daemon().Kill()
		time.Sleep(away)
		r.up(n)
	}}
}

func (r *run) restarts() *fault {
	n, away := r.mortal, r.millis(1000)
	return &fault{node: n, beside: true, begin: func() {
		if code := n.daemon().Stop(); code != 0 {
			r.t.Errorf("%s: the daemon ended with exit code %d", n.Name, code)
		}
		time.Sleep(away)
		r.up(n)
	}}
}

// replaces has a new daemon take the place of another, with its descriptors: `up --replace`.
func (r *run) replaces() *fault {
	n := r.replaced
	return &fault{node: n, beside: true, quiet: true, begin: func() {
		old := n.daemon()
		r.logged(n)
		next := n.UpNoWait("--etcd-endpoints", r.etcd.Endpoint, "--replace")
		for deadline := time.Now().Add(time.Minute); next.Running() && old.Running() && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
		}
		switch {
		case next.Running() && !old.Running():
			n.leaks.pid = next.PID // what was handed over counts on
			n.set(next)
			if code := old.Wait(); code != 0 {
				r.t.Errorf("%s: the daemon that was replaced ended with exit code %d", n.Name, code)
			}
		case !next.Running() && old.Running() && len(r.hurts) > 1:
			r.say("%s was not replaced: %s", n.Name, lastLine(next.LogText()))
		default:
			r.t.Errorf("%s: old daemon running %v, its successor %v: %s", n.Name, old.Running(), next.Running(), lastLine(next.LogText()))
		}
	}}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func (r *run) pauses() *fault {
	n := r.victim()
	return &fault{node: n, begin: func() {
		n.mute = true
		n.daemon().Signal(unix.SIGSTOP)
	}, end: func() {
		n.daemon().Signal(unix.SIGCONT)
		n.mute = false
	}}
}

func (r *run) storeAway() *fault {
	return &fault{quiet: true, begin: r.etcd.Stop, end: r.etcd.Start}
}

func (r *run) storeFrozen() *fault {
	return &fault{quiet: true, begin: r.etcd.Freeze, end: r.etcd.Thaw}
}

// operator does something to the store, as an operator would.
func (r *run) operator(do func(ctx context.Context) error) func() {
	return func() {
		ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
		defer cancel()
		if err := do(ctx); err != nil {
			r.t.Errorf("the store: %v", err)
		}
	}
}

func (r *run) storeCompacted() *fault {
	return &fault{quiet: true, begin: r.operator(func(ctx context.Context) error {
		for range 10 {
			if _, err := r.client.Put(ctx, "/elsewhere", "x"); err != nil {
				return err
			}
		}
		resp, err := r.client.Get(ctx, "/elsewhere")
		if err != nil {
			return err
		}
		if _, err := r.client.Compact(ctx, resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
			return err
		}
		_, err = r.client.Defragment(ctx, r.etcd.Endpoint)
		return err
	})}
}

// key is the key of a node's subnet.
func (n *node) key() string {
	return prefix + "/subnets/" + strings.ReplaceAll(n.subnet.String(), "/", "-")
}

// leaseRevoked ends the etcd lease of a node's subnet, or of its names, with all keys on it.
func (r *run) leaseRevoked() *fault {
	n, ofNames := r.victim(), r.rng.IntN(2) == 0
	return &fault{quiet: true, begin: r.operator(func(ctx context.Context) error {
		key, options := n.key(), []clientv3.OpOption(nil)
		if ofNames {
			key, options = namesPrefix, []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithLimit(1)}
		}
		resp, err := r.client.Get(ctx, key, options...)
		if err != nil || len(resp.Kvs) == 0 || resp.Kvs[0].Lease == 0 {
			return err
		}
		_, err = r.client.Revoke(ctx, clientv3.LeaseID(resp.Kvs[0].Lease))
		return err
	})}
}

func (r *run) keyDeleted() *fault {
	n := r.victim()
	key := n.key()
	if m := r.one(attached); m != nil {
		m.busy = false
		if r.rng.IntN(2) == 0 {
			key = namesPrefix + m.name
		}
	}
	return &fault{quiet: true, begin: r.operator(func(ctx context.Context) error {
		_, err := r.client.Delete(ctx, key)
		return err
	})}
}

// storeWiped takes every lease and name at once.
func (r *run) storeWiped() *fault {
	return &fault{quiet: true, begin: r.operator(func(ctx context.Context) error {
		for _, under := range []string{prefix + "/subnets/", namesPrefix} {
			if _, err := r.client.Delete(ctx, under, clientv3.WithPrefix()); err != nil {
				return err
			}
		}
		return nil
	})}
}

// must has an error of the lab be one of the run.
func (r *run) must(f func() error) func() {
	return func() {
		if err := f(); err != nil {
			r.t.Errorf("lab: %v", err)
		}
	}
}

func (r *run) cablePulled() *fault {
	n := r.victim()
	return &fault{node: n, begin: r.must(n.Unplug), end: r.must(n.Plug)}
}

func (r *run) interfaceDown() *fault {
	n := r.victim()
	return &fault{node: n, begin: r.must(n.LinkDown), end: r.must(n.LinkUp)}
}

func (r *run) badCable() *fault {
	n := r.victim()
	way := func() lab.Impairment {
		return lab.Impairment{
			Loss: r.rng.Float64() * 0.1, Duplicate: r.rng.Float64() * 0.2, Reorder: r.rng.Float64() * 0.3,
			Delay: r.millis(20), Jitter: r.millis(20),
		}
	}
	out, in := way(), way()
	if r.rng.IntN(4) == 0 {
		out.Loss = 1 // its peers do not hear it
	}
	return &fault{node: n, begin: r.must(func() error { return n.ImpairWays(out, in) }), end: r.must(n.Mend)}
}

func (r *run) addressChanged() *fault {
	n, away := r.victim(), r.millis(1500)
	r.address++
	if r.address > 250 {
		r.address = 101
	}
	b := lab.LAN.Addr().As4()
	b[3] = byte(r.address)
	return &fault{node: n, begin: r.must(func() error {
		if err := n.LoseAddress(); err != nil {
			return err
		}
		time.Sleep(away)
		return n.GetAddress(netip.AddrFrom4(b))
	})}
}
