// This file keeps peers for a moment whose leases have vanished from the store.

package node

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// peerGrace is how long a peer is still sent to after its lease has vanished. A key deleted by hand, or a store restored from
// a backup or made anew, takes the lease of a node that lives and puts it back when it has reached the store again, which
// may take some pauses between attempts: no container is to notice. A node that gives its lease back says so and is gone at
// once, one that has died was known for as long as its etcd lease anyway, and a subnet that somebody else leases changes
// hands at once all the same.
const peerGrace = time.Minute

// lingering is the leases of the store with those that vanished from it a moment ago. One goroutine at a time. What was known
// before the store could be asked counts as stored: see take.
type lingering struct {
	stored   []lease.Lease
	vanished map[netip.Prefix]vanished // by subnet
}

type vanished struct {
	lease lease.Lease
	until time.Time
}

// take replaces what the store has. left are leases that were given back since the last time, by nodes that are gone. It says which
// leases have vanished now.
func (g *lingering) take(now time.Time, stored, left []lease.Lease) (gone []lease.Lease) {
	if g.vanished == nil {
		g.vanished = make(map[netip.Prefix]vanished)
	}
	stored, leaving := split(stored, lease.Lease.Left) // whose last word is in the store, but not yet gone from it
	for _, l := range g.stored {
		if _, ok := g.vanished[l.Subnet]; !ok {
			g.vanished[l.Subnet] = vanished{lease: l, until: now.Add(peerGrace)}
			gone = append(gone, l)
		}
	}
	ended := func(old lease.Lease) bool {
		return slices.ContainsFunc(stored, func(l lease.Lease) bool { return supersedes(l, old) }) ||
			slices.ContainsFunc(slices.Concat(left, leaving), func(l lease.Lease) bool { return l.Subnet == old.Subnet })
	}
	for subnet, v := range g.vanished {
		if ended(v.lease) {
			delete(g.vanished, subnet)
		}
	}
	g.stored = stored
	return slices.DeleteFunc(gone, ended)
}

// split sorts leases into those of which is says false and the others.
func split(leases []lease.Lease, is func(lease.Lease) bool) (not, those []lease.Lease) {
	for _, l := range leases {
		if is(l) {
			those = append(those, l)
		} else {
			not = append(not, l)
		}
	}
	return not, those
}

// supersedes tells whether a stored lease l ends the grace of old: it has the subnet, or is the same node's, or that of another
// which receives where the old one did.
func supersedes(l, old lease.Lease) bool {
	mine, theirs := l.Attrs.RootlessOvl, old.Attrs.RootlessOvl
	switch {
	case l.Subnet.Overlaps(old.Subnet) || l.Subnet6.Overlaps(old.Subnet6):
		return true
	case mine == nil || theirs == nil:
		return false
	}
	return mine.NodeID == theirs.NodeID || l.Attrs.PublicIP == old.Attrs.PublicIP && l.Attrs.PublicIP.IsValid() && mine.Port == theirs.Port && mine.Port != 0
}

// vanishing are the subnets of leases that are not in the store any more, with the end of their grace.
func (g *lingering) vanishing() map[netip.Prefix]time.Time {
	m := make(map[netip.Prefix]time.Time, len(g.vanished))
	for subnet, v := range g.vanished {
		m[subnet] = v.until
	}
	return m
}

// leases are those to forward by at now, sorted by subnet, and the time of the next change without the store's doing; zero
// when there is none.
func (g *lingering) leases(now time.Time) (all []lease.Lease, next time.Time) {
	all = slices.Clone(g.stored)
	for subnet, v := range g.vanished {
		if !now.Before(v.until) {
			delete(g.vanished, subnet)
			continue
		}
		all = append(all, v.lease)
		if next.IsZero() || v.until.Before(next) {
			next = v.until
		}
	}
	slices.SortFunc(all, func(a, b lease.Lease) int { return a.Subnet.Addr().Compare(b.Subnet.Addr()) })
	return all, next
}

// tellVanished logs, once for all of them, that leases of others are not in the store any more.
func (n *Node) tellVanished(gone []lease.Lease) {
	var subnets []string
	for _, l := range gone {
		if x := l.Attrs.RootlessOvl; x == nil || x.NodeID != n.id {
			subnets = append(subnets, l.Subnet.String())
		}
	}
	const named = 8
	count := len(subnets)
	if count > named {
		subnets = append(subnets[:named], "...")
	}
	if count > 0 {
		n.log.Warn("leases have vanished from the store; their nodes have time to put them back, and are sent to meanwhile", "count", count, "subnets", strings.Join(subnets, " "), "grace", peerGrace)
	}
}

// watchLeases turns the leases of the store into routes until ctx ends.
func (n *Node) watchLeases(ctx context.Context, r *lease.Registry) error {
	g, ctx := errgroup.WithContext(ctx)
	snapshots := make(chan lease.Snapshot)
	g.Go(func() error {
		return r.Watch(ctx, func(s lease.Snapshot) {
			select {
			case snapshots <- s:
			case <-ctx.Done():
			}
		})
	})
	g.Go(func() error {
		var known lingering
		n.mu.Lock()
		known.take(time.Now(), n.leases, nil) // of the last run, if it went on with those
		n.mu.Unlock()
		var expiry <-chan time.Time
		for {
			select {
			case s := <-snapshots:
				n.tellVanished(known.take(time.Now(), s.Leases, s.Left))
			case <-expiry:
			case <-ctx.Done():
				return nil
			}
			now := time.Now()
			leases, next := known.leases(now)
			n.mu.Lock()
			n.vanishing = known.vanishing()
			n.mu.Unlock()
			n.setLeases(leases)
			expiry = nil
			if !next.IsZero() {
				expiry = time.After(next.Sub(now))
			}
		}
	})
	return g.Wait()
}
