// This file follows the host: its external interface may get another address while the node runs, by DHCP, because the machine was
// moved, because a laptop roams. The node keeps its subnet and its containers, and peers follow its lease.
//
//	the kernel tells of a change -> a moment's quiet -> the interface is chosen again, by the same flags as at the start
//
//	none         a warning; everything stays as it is until there is one
//	the same     nothing
//	another      where the address before is still there: nothing until the store answers and no other node's lease has the new one
//	             the underlay is bound to its address; the route table, path MTUs and the shown endpoint follow; then the lease has the
//	             new address under the same key, as soon as the store is there
//
// What waits for the store is given up when the next look finds the host somewhere else again.
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

// roamer is the goroutine that looks at the host, and another for each thing found, one at a time, that does what is to be done.
type roamer struct {
	// constant
	n     *Node
	store *openedStore

	// owned by the one that does, by run between two of them
	said string // the trouble that was logged last; empty: there is none
	owed bool   // the lease may not have what it was last told to
}

// sight is the host at a look.
type sight struct {
	next  external // as it is chosen now
	stays bool     // it is elsewhere than the node is bound, and the addresses that the node is bound to are still there
	err   error    // nothing can be chosen
}

// same tells whether nothing is to be done about s that is not being done about other.
func (s sight) same(other sight) bool {
	return s.err == nil && other.err == nil && s.next == other.next && s.stays == other.stays
}

// pursuit is what follows a sight, under way.
type pursuit struct {
	of   sight
	stop context.CancelFunc
	done chan bool // has one element at the end; false: not all of it worked
}

// What may be wrong, for the log and for status.
const (
	addressGone  = "no external address any more; everything stays as it is until there is one"
	address6Gone = "no external IPv6 address any more; packets over IPv6 reach no peer until there is one"
	notBound     = "the underlay cannot follow to another external address; trying again"
	notPublished = "the new external address is not published, so that peers do not follow; trying again"
	storeAway    = "the new external address is not published yet, as the store is away; peers follow when it is back"
	staying      = "another external address is to be used, for which the store is to answer; the one before is still there and stays in use until then"
	foreignNext  = "another external address is to be used, which another node has by its lease; the one before is still there and stays in use"
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
	var under pursuit // its channel is nil while there is none
	halt := func() {
		if under.done != nil {
			under.stop()
			<-under.done
			under = pursuit{}
		}
	}
	defer halt()
	var again <-chan time.Time
	look := true
	for ctx.Err() == nil {
		if look {
			if seen := r.look(); under.done == nil || !seen.same(under.of) {
				halt()
				under, again = r.pursue(ctx, seen), nil
			}
		}
		look = true
		select {
		case <-changed:
			settle(ctx, changed)
		case <-r.n.newLease:
			halt()
		case ok := <-under.done:
			under.stop()
			under, look = pursuit{}, false
			if !ok {
				again = time.After(roamRetry)
			}
		case <-again:
		case <-ctx.Done():
		}
	}
	return nil
}

// pursue does what is to be done about seen, until it is stopped.
func (r *roamer) pursue(ctx context.Context, seen sight) pursuit {
	ctx, stop := context.WithCancel(ctx)
	p := pursuit{of: seen, stop: stop, done: make(chan bool, 1)}
	go func() { p.done <- r.follow(ctx, seen) }()
	return p
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

// look is what the host is now.
func (r *roamer) look() sight {
	n := r.n
	n.lookOutbound()
	n.mu.Lock()
	now, dual, alloc, client := n.external, carriesIPv6(n.netConfig), allocates(n.netConfig), n.client
	n.mu.Unlock()
	if client != nil {
		if err := client.DropLost(); err != nil {
			n.log.Warn("connections to the store from an address that is gone may hang for a while", "err", err)
		}
	}
	next, err := n.edges.external(n.cfg, now)
	if err != nil {
		return sight{err: err}
	}
	s := sight{next: next}
	if alloc || next.bind == now.bind && (!dual || next.bind6 == now.bind6) {
		return s
	}
	s.stays = r.stays(now.bind, next.bind) && (!dual || !next.bind6.IsValid() || r.stays(now.bind6, next.bind6))
	return s
}

// stays tells whether sockets that are to go from one address to another would go on working at the one.
func (r *roamer) stays(from, to netip.Addr) bool {
	if from == to {
		return true
	}
	has, err := r.n.edges.hasAddr(from)
	return has && err == nil
}

// follow compares a look at the host with what the node and its lease say of it, and does what is to be done; false: not all of it worked,
// or not before ctx ended.
func (r *roamer) follow(ctx context.Context, seen sight) bool {
	n := r.n
	if seen.err != nil {
		if r.inTrouble(addressGone, seen.err, "") {
			n.log.Warn(addressGone, "err", seen.err)
		}
		return false
	}
	n.mu.Lock()
	now, dual, alloc := n.external, carriesIPv6(n.netConfig), allocates(n.netConfig)
	n.mu.Unlock()
	next := seen.next
	var gone6 error
	switch {
	case !dual:
		now.bind6, now.public6 = next.bind6, next.public6 // nothing hangs on them
	case !next.bind6.IsValid() && !alloc: // there was one, or the node would not have started
		next.bind6, next.public6 = now.bind6, now.public6
		gone6 = fmt.Errorf("interface %s has no IPv6 address that other nodes could send to", next.ifName)
	}
	if next != now {
		if seen.stays && !r.mayPublish(ctx, next) {
			return false
		}
		if err := r.move(now, next, dual); err != nil {
			if r.inTrouble(notBound, err, err.Error()) {
				n.log.Error(notBound, "err", err)
			}
			return false
		}
	} else if r.said == addressGone || r.said == staying || strings.HasPrefix(r.said, foreignNext) || r.said == address6Gone && gone6 == nil ||
		strings.HasPrefix(r.said, notBound) {
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

// mayPublish tells whether next can be published as soon as the underlay is there. Until then it is better to stay: peers drop what comes from
// an address that no lease has.
func (r *roamer) mayPublish(ctx context.Context, next external) bool {
	n := r.n
	n.mu.Lock()
	held := n.held
	n.mu.Unlock()
	if held == nil { // the one that is being acquired will have it
		return true
	}
	attrs := n.request(subnets{}).Attrs
	attrs.PublicIP = next.public
	if attrs.PublicIPv6.IsValid() {
		attrs.PublicIPv6 = next.public6
	}
	if !r.tells(held, attrs) {
		return true
	}
	err := held.Allows(ctx, attrs)
	switch {
	case err == nil, held.Err() != nil:
		return true
	case ctx.Err() != nil:
	case errors.Is(err, lease.ErrForeignLease):
		if r.inTrouble(foreignNext, err, err.Error()) {
			n.log.Error(foreignNext, "err", err)
		}
	default:
		if r.inTrouble(staying, err, "") {
			n.log.Warn(staying, "err", err)
		}
	}
	return false
}

// tells is whether a lease has to be told of attrs.
func (r *roamer) tells(held *lease.Held, attrs lease.Attrs) bool {
	has := held.Lease().Attrs
	return r.owed || has.PublicIP != attrs.PublicIP || has.PublicIPv6 != attrs.PublicIPv6
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
func (r *roamer) move(now, next external, dual bool) error {
	n := r.n
	n.mu.Lock()
	path, alloc := n.path, allocates(n.netConfig)
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
	r.take(now, next)
	return nil
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
	if !r.tells(held, attrs) {
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
	case held.Err() != nil: // nothing to publish it in
		r.owed = false
		return true
	case ctx.Err() != nil:
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
