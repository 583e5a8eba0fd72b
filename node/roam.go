// This file follows the host: its external interface may get another address while the node runs, by DHCP, because the machine was
// moved, because a laptop roams. The node keeps its subnet and its containers, and peers follow its lease.
//
//	the kernel tells of a change -> a moment's quiet -> the interface is chosen again, by the same flags as at the start
//
//	none         a warning; everything stays as it is until there is one
//	the same     nothing
//	another      the underlay is bound to its address; the route table, path MTUs and the shown endpoint follow; then the lease has the
//	             new address under the same key, as soon as the store is there
//
// flannel does none of it: a host with another address gets another subnet when flanneld is started again (flannel#205, #760).

package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

const (
	// A change comes in several messages, some of them late: it is looked at when none came for settleFor, at the latest after settleMost.
	settleFor, settleMost = 200 * time.Millisecond, time.Second
	// roamRetry is the pause between attempts at what did not work, and between looks where the kernel does not tell of changes.
	roamRetry = 5 * time.Second
)

// roamer is the goroutine that follows the host.
type roamer struct {
	// constant
	n     *Node
	store *openedStore

	// owned by run
	said string // the trouble that was logged last; empty: there is none
	owed bool   // the lease may not have what it was last told to
}

// What may be wrong, for the log and for status.
const (
	addressGone  = "no external address any more; everything stays as it is until there is one"
	address6Gone = "no external IPv6 address any more; packets over IPv6 reach no peer until there is one"
	notBound     = "the underlay cannot follow to another external address; trying again"
	notPublished = "the new external address is not published, so that peers do not follow; trying again"
	storeAway    = "the new external address is not published yet, as the store is away; peers follow when it is back"
)

// run follows the host until ctx ends.
func (r *roamer) run(ctx context.Context) error {
	changed := make(chan struct{}, 1)
	tell := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() { r.watch(ctx, tell) })
	for ctx.Err() == nil {
		var again <-chan time.Time
		if !r.look(ctx) {
			again = time.After(roamRetry)
		}
		select {
		case <-changed:
			settle(ctx, changed)
		case <-r.n.newLease:
			r.closeStore(ctx) // the gateway may be new as well
		case <-again:
		case <-ctx.Done():
		}
	}
	return nil
}

// watch calls tell when the host's network has changed, or now and then if the kernel does not say, until ctx ends.
func (r *roamer) watch(ctx context.Context, tell func()) {
	err := r.n.edges.watchHost(ctx, r.n.cfg, tell)
	if err == nil || ctx.Err() != nil {
		return
	}
	r.n.log.Warn("changes of this host's network are not told; looking for them now and then", "every", roamRetry, "err", err)
	tick := time.NewTicker(roamRetry)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			tell()
		case <-ctx.Done():
			return
		}
	}
}

// settle waits until a change is over.
func settle(ctx context.Context, changed <-chan struct{}) {
	quiet, most := time.NewTimer(settleFor), time.NewTimer(settleMost)
	defer quiet.Stop()
	defer most.Stop()
	for {
		select {
		case <-changed:
			quiet.Reset(settleFor)
		case <-quiet.C:
			return
		case <-most.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// look compares the host with what the node and its lease say of it, and does what is to be done; false: not all of it worked.
func (r *roamer) look(ctx context.Context) bool {
	n := r.n
	n.mu.Lock()
	now, dual, alloc := n.external, carriesIPv6(n.netConfig), allocates(n.netConfig)
	n.mu.Unlock()
	next, err := n.edges.external(n.cfg, now)
	if err != nil {
		if r.inTrouble(addressGone, err, "") {
			n.log.Warn(addressGone, "err", err)
		}
		return false
	}
	var gone6 error
	switch {
	case !dual:
		now.bind6, now.public6 = next.bind6, next.public6 // nothing hangs on them
	case !next.bind6.IsValid() && !alloc: // there was one, or the node would not have started
		next.bind6, next.public6 = now.bind6, now.public6
		gone6 = fmt.Errorf("interface %s has no IPv6 address that other nodes could send to", next.ifName)
	}
	if next != now {
		if err := r.move(ctx, now, next, dual); err != nil {
			if r.inTrouble(notBound, err, err.Error()) {
				n.log.Error(notBound, "err", err)
			}
			return false
		}
	} else if r.said == addressGone || r.said == address6Gone && gone6 == nil || strings.HasPrefix(r.said, notBound) {
		n.log.Info("the external address is back", now.attrs()...)
	}
	if !r.publish(ctx) {
		return false
	}
	if gone6 != nil {
		if r.inTrouble(address6Gone, gone6, "") {
			n.log.Warn(address6Gone, "err", gone6)
		}
		return false
	}
	r.said = ""
	n.mu.Lock()
	n.problem = ""
	n.mu.Unlock()
	return true
}

// inTrouble has status show what is wrong, and tells whether it is to be logged: once for as long as it lasts, and each variant of it.
func (r *roamer) inTrouble(what string, err error, variant string) bool {
	r.n.mu.Lock()
	r.n.problem = fmt.Sprintf("%s: %v", what, err)
	r.n.mu.Unlock()
	before := r.said
	r.said = what + variant
	return r.said != before
}

// move has everything on this host follow from one external interface or address to another. After an error nothing has changed.
func (r *roamer) move(ctx context.Context, now, next external, dual bool) error {
	n := r.n
	n.mu.Lock()
	path, client, alloc := n.path, n.client, allocates(n.netConfig)
	n.mu.Unlock()
	if !alloc {
		bind6 := next.bind6
		if !dual {
			bind6 = netip.Addr{}
		}
		if err := path.Rebind(next.bind, bind6); err != nil {
			return err
		}
	}
	if client != nil {
		if err := client.DropLost(); err != nil {
			n.log.Warn("connections to the store from an address that is gone may hang for a while", "err", err)
		}
	}
	r.take(now, next)
	r.closeStore(ctx)
	return nil
}

// closeStore keeps containers from the embedded store, which may listen on every address that this host has.
func (r *roamer) closeStore(ctx context.Context) {
	r.n.mu.Lock()
	gw := r.n.stack
	r.n.mu.Unlock()
	if gw != nil && r.store.server != nil {
		gw.Deny(r.store.addrs(ctx))
	}
}

// take makes next what the node knows of the host.
func (r *roamer) take(now, next external) {
	n := r.n
	n.mu.Lock()
	defer n.mu.Unlock()
	n.external = next
	place := next
	if place.mtu = now.mtu; place != now {
		n.log.Info("the external address has changed", next.after(now)...)
	}
	if next.mtu != now.mtu {
		n.log.Warn("the external interface has another MTU: containers and the lease keep theirs until the node is started again, and what paths carry is probed anew",
			"interface", next.ifName, "mtu", next.mtu, "before", now.mtu, "overlay_mtu", n.mtu)
	}
	if r.store.server != nil {
		r.followStoreLocked(now.bind, next.bind)
	}
	n.prober.restart()
	old, first := n.peers, n.leases == nil
	n.peers = peersOf(n.leases, n.selfLocked())
	if !first {
		n.tellPeersLocked(old, false)
	}
	if n.gateway != nil {
		if err := n.publishLocked(); err != nil {
			n.log.Error("route table not replaced", "err", err)
		}
	}
}

// followStoreLocked shows where the embedded store can be reached now.
func (r *roamer) followStoreLocked(before, bind netip.Addr) {
	listen := r.store.server.Endpoint()
	_, others, _ := endpointsOf(listen, bind)
	if u, err := url.Parse(listen); err == nil && before != bind && u.Hostname() == before.String() {
		r.n.log.Error("the embedded store listens on an address that this host had before: no node reaches it until this one is started again with another --listen-etcd, such as 0.0.0.0:PORT",
			"listen", listen)
	}
	if !slices.Equal(r.n.endpoints, []string{others}) {
		r.n.endpoints = []string{others}
		r.n.log.Info("the embedded store is reached at another endpoint now: nodes that were given the old one need the new one, or a name", "endpoint", others)
	}
}

// publish has the lease say where this host is; false: it does not yet.
func (r *roamer) publish(ctx context.Context) bool {
	n := r.n
	n.mu.Lock()
	held := n.held
	n.mu.Unlock()
	if held == nil { // the one that is being acquired will
		r.owed = false
		return true
	}
	attrs := n.request(subnets{}).Attrs
	has := held.Lease().Attrs
	if !r.owed && has.PublicIP == attrs.PublicIP && has.PublicIPv6 == attrs.PublicIPv6 {
		return true
	}
	err := held.Update(ctx, attrs)
	r.owed = err != nil
	switch {
	case err == nil:
		where := []any{"subnet", held.Lease().Subnet, "public_ip", attrs.PublicIP, "before", has.PublicIP}
		if attrs.PublicIPv6.IsValid() {
			where = append(where, "public_ipv6", attrs.PublicIPv6)
		}
		n.log.Info("the lease has the new address", where...)
		return true
	case ctx.Err() != nil, held.Err() != nil: // nothing to publish it in
		r.owed = false
		return true
	case errors.Is(err, lease.ErrForeignLease):
		if r.inTrouble(notPublished, err, err.Error()) {
			n.log.Error(notPublished, "err", err)
		}
	default:
		if r.inTrouble(storeAway, err, "") {
			n.log.Warn(storeAway, "err", err)
		}
	}
	return false
}
