// This file keeps peers for a moment whose leases have vanished from the store.

package node

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// peerGrace is how long a peer is still sent to after its lease has vanished. A key deleted by hand, or a store restored from
// a backup, takes the lease of a node that lives and puts it back within moments: no container is to notice. A subnet that
// somebody else leases changes hands at once all the same.
const peerGrace = 5 * time.Second

// lingering is the leases of the store with those that vanished from it a moment ago. One goroutine at a time.
type lingering struct {
	stored   []lease.Lease
	vanished map[netip.Prefix]vanished // by subnet
}

type vanished struct {
	lease lease.Lease
	until time.Time
}

// take replaces what the store has.
func (g *lingering) take(now time.Time, stored []lease.Lease) {
	if g.vanished == nil {
		g.vanished = make(map[netip.Prefix]vanished)
	}
	for _, l := range g.stored {
		g.vanished[l.Subnet] = vanished{lease: l, until: now.Add(peerGrace)}
	}
	for subnet, v := range g.vanished {
		if slices.ContainsFunc(stored, func(l lease.Lease) bool { return supersedes(l, v.lease) }) {
			delete(g.vanished, subnet)
		}
	}
	g.stored = stored
}

// supersedes tells whether a stored lease l ends the grace of old: it has the subnet, or is the same node's.
func supersedes(l, old lease.Lease) bool {
	mine, theirs := l.Attrs.RootlessOvl, old.Attrs.RootlessOvl
	return l.Subnet.Overlaps(old.Subnet) || l.Subnet6.Overlaps(old.Subnet6) || mine != nil && theirs != nil && mine.NodeID == theirs.NodeID
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

// watchLeases turns the leases of the store into routes until ctx ends.
func (n *Node) watchLeases(ctx context.Context, r *lease.Registry) error {
	g, ctx := errgroup.WithContext(ctx)
	snapshots := make(chan []lease.Lease)
	g.Go(func() error {
		return r.Watch(ctx, func(s lease.Snapshot) {
			select {
			case snapshots <- s.Leases:
			case <-ctx.Done():
			}
		})
	})
	g.Go(func() error {
		var known lingering
		var expiry <-chan time.Time
		for {
			select {
			case stored := <-snapshots:
				known.take(time.Now(), stored)
			case <-expiry:
			case <-ctx.Done():
				return nil
			}
			now := time.Now()
			leases, next := known.leases(now)
			n.setLeases(leases)
			expiry = nil
			if !next.IsZero() {
				expiry = time.After(next.Sub(now))
			}
		}
	})
	return g.Wait()
}
