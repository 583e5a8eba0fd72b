// This file is how a node gets its subnet. It follows LocalManager.AcquireLease of flannel (pkg/subnet/etcd/
// local_manager.go) with these corrections: the node is known by its NodeID and not by its address; a reservation
// stays a reservation; a lost race is run again; every write compares revisions; nothing asks for each lease's TTL.

package lease

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"
)

// Defaults of a Request, and bounds.
const (
	DefaultTTL          = 24 * time.Hour // flannel's
	DefaultEphemeralTTL = time.Minute
	minTTL              = time.Second // etcd counts in seconds
	maxCandidates       = 100         // free subnets to choose from, as in flannel
	maxRaces            = 50          // lost races before Acquire gives up
)

// Request is who wants a subnet.
type Request struct {
	NodeID      string        // identity; required
	Attrs       Attrs         // what to publish; PublicIP or PublicIPv6 is required; RootlessOvl gets V and NodeID filled in
	Previous    netip.Prefix  // subnet held last time, taken again if free; may be zero
	Previous6   netip.Prefix  // likewise of a dual-stack network
	TTL         time.Duration // of the etcd lease; 0: 24 h, or 1 min if Ephemeral
	Ephemeral   bool          // a node that will not come back: the caller means to Revoke
	RenewMargin time.Duration // keep alive at least this long before the TTL ends; a third of the TTL is always kept to
	StockPort   int           // port of nodes that publish none (NetworkConfig.StockPort); 0: DefaultUDPPort
}

func (q *Request) check() error {
	if !validNodeID(q.NodeID) {
		return fmt.Errorf("lease: NodeID %.64q is not 1 to %d letters, digits, '.', '_' or '-'", q.NodeID, maxNodeID)
	}
	if !q.Attrs.PublicIP.IsValid() && !q.Attrs.PublicIPv6.IsValid() {
		return errors.New("lease: no public IP to publish")
	}
	if q.TTL == 0 {
		q.TTL = DefaultTTL
		if q.Ephemeral {
			q.TTL = DefaultEphemeralTTL
		}
	}
	if q.TTL < minTTL {
		return fmt.Errorf("lease: TTL %v is below %v", q.TTL, minTTL)
	}
	if q.RenewMargin < 0 || q.RenewMargin >= q.TTL {
		return fmt.Errorf("lease: the renew margin %v must be shorter than the TTL %v", q.RenewMargin, q.TTL)
	}
	if q.StockPort == 0 {
		q.StockPort = DefaultUDPPort
	}
	q.Attrs = stamped(q.Attrs, q.NodeID)
	return nil
}

// stamped is a with NodeID in its own copy of the extension.
func stamped(a Attrs, nodeID string) Attrs {
	var e Extension
	if a.RootlessOvl != nil {
		e = *a.RootlessOvl
	}
	e.V, e.NodeID = ExtensionVersion, nodeID
	a.RootlessOvl = &e
	return a
}

// Acquire gets the node a subnet of cfg's network: the one that is its own already, by NodeID; else a reservation made
// for its public IPv4 address, which is all that flannel goes by; else Previous if free; else a random free one. What comes back is held but not kept alive: call
// Run. Errors: ErrForeignLease, ErrExhausted, ErrContended, or the store's.
func (r *Registry) Acquire(ctx context.Context, cfg NetworkConfig, req Request) (*Held, error) {
	if err := req.check(); err != nil {
		return nil, err
	}
	for range maxRaces {
		h, err := r.tryAcquire(ctx, cfg, req)
		r.health.report("request", storeFailure(err))
		switch {
		case err != nil:
			return nil, err
		case h != nil:
			r.held.Store(h, h.key)
			return h, nil
		}
		// Somebody else was faster. A random pause keeps a crowd from colliding again.
		if err := sleep(ctx, rand.N(20*time.Millisecond)); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: %d attempts at %s in %s", ErrContended, maxRaces, r.subnetsKey(), r.store)
}

// storeFailure is err if it is about the store and not about leases.
func storeFailure(err error) error {
	if e := (*storeError)(nil); errors.As(err, &e) || errors.Is(err, ErrUnreachable) {
		return err
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// tryAcquire lists and makes one attempt. nil, nil is a lost race.
func (r *Registry) tryAcquire(ctx context.Context, cfg NetworkConfig, req Request) (*Held, error) {
	entries, rev, err := r.list(ctx)
	if err != nil {
		return nil, err
	}
	own, err := r.findOwn(entries, cfg, req)
	if err != nil {
		return nil, err
	}
	if own != nil && !compatible(cfg, own.lease) {
		if !own.lease.Reservation {
			return nil, r.giveUp(ctx, own)
		}
		r.log.Warn("the reservation for this node does not fit the network config; taking another subnet", "subnet", own.lease.Subnet)
		own = nil
	}
	h := newHeld(r, req)
	if own != nil {
		return h.adopt(ctx, *own)
	}
	v4, v6, err := pick(cfg, req, entries)
	if err != nil {
		return nil, fmt.Errorf("%w (%d keys under %s in %s): delete the keys of nodes that are gone, or put a larger Network or a longer SubnetLen into %s with `rootless-ovl config set`",
			err, len(entries), r.subnetsKey(), r.store, r.configKey())
	}
	return h.create(ctx, v4, v6, rev)
}

// findOwn is the entry that is this node's to take over, or nil, or ErrForeignLease.
func (r *Registry) findOwn(entries []entry, cfg NetworkConfig, req Request) (*entry, error) {
	var own, reserved *entry
	for i := range entries {
		e := &entries[i]
		if e.skip != "" {
			continue
		}
		theirs := e.lease.Attrs
		ordinary := e.Key == r.leaseKey(e.lease.Subnet, e.lease.Subnet6) // and not a key that only ends like one
		switch {
		case theirs.nodeID() == req.NodeID:
			// Of several the first that fits the config, a reservation before a lease.
			if ordinary && (own == nil || better(cfg, e.lease, own.lease)) {
				own = e
			}
		case theirs.sharesPublicIP(req.Attrs) && theirs.RootlessOvl == nil && e.lease.Reservation:
			if ordinary && reserved == nil && compatible(cfg, e.lease) {
				reserved = e
			}
		default:
			if err := foreign(e, req); err != nil {
				return nil, err
			}
		}
	}
	if own == nil || !compatible(cfg, own.lease) && reserved != nil {
		own = reserved
	}
	return own, nil
}

// foreign is an ErrForeignLease if e is a lease of another node that cannot be beside one of req's: one of ours that receives at
// an address and port of req's node, or a stock one that has its PublicIP. A stock one that has its PublicIPv6 only is another
// node, as it is to flannel.
func foreign(e *entry, req Request) error {
	theirs := e.lease.Attrs
	shared := theirs.shared(req.Attrs)
	switch {
	case e.skip != "" || theirs.nodeID() == req.NodeID || theirs.left() || !shared.IsValid():
		return nil
	case theirs.RootlessOvl != nil:
		if theirs.port(req.StockPort) != req.Attrs.port(req.StockPort) {
			return nil
		}
		return fmt.Errorf("%w: %s holds %v with the same address and port (key %s): give this node %s or a port of its own; if that node is gone for good, delete the key or wait for the lease to expire",
			ErrForeignLease, theirs.whoAt(shared), e.lease.Subnet, e.Key, publicIPOfFamily(shared))
	case e.lease.Reservation || !theirs.sharesPublicIP(req.Attrs):
		return nil
	}
	return fmt.Errorf("%w: %s holds %v (key %s) and would take this node's lease for its own: stop flanneld on that address, or give this node another public IP; if that node is gone for good, delete the key or wait for the lease to expire", ErrForeignLease, theirs.who(), e.lease.Subnet, e.Key)
}

// publicIPOfFamily is what to ask for in the place of a.
func publicIPOfFamily(a netip.Addr) string {
	if a.Is6() {
		return "a public IPv6 address"
	}
	return "a public IP"
}

func better(cfg NetworkConfig, a, b Lease) bool {
	if ca, cb := compatible(cfg, a), compatible(cfg, b); ca != cb {
		return ca
	}
	return a.Reservation && !b.Reservation
}

// giveUp makes room for another attempt where our own lease no longer fits the network config.
func (r *Registry) giveUp(ctx context.Context, own *entry) error {
	r.log.Info("own lease does not fit the network config any more; its key is deleted for a new one, with the subnets of the old one as far as they fit", "key", own.Key)
	_, _, err := r.store.Commit(ctx, Txn{
		If:  []Guard{{Key: own.Key, ModRevision: own.ModRevision}},
		Key: own.Key, Delete: true,
	})
	return err
}

// compatible is whether a lease is one that cfg would give out.
func compatible(cfg NetworkConfig, l Lease) bool {
	return inRange(l.Subnet, cfg.SubnetMin, cfg.SubnetMax, cfg.SubnetLen) &&
		cfg.EnableIPv6 == l.Subnet6.IsValid() &&
		(!cfg.EnableIPv6 || inRange(l.Subnet6, cfg.IPv6SubnetMin, cfg.IPv6SubnetMax, cfg.IPv6SubnetLen))
}

func inRange(p netip.Prefix, lo, hi netip.Addr, bits int) bool {
	return p.IsValid() && p.Bits() == bits && p == p.Masked() && !p.Addr().Less(lo) && !hi.Less(p.Addr())
}

// pick is a free subnet: the previous one, or one of the first hundred at random.
func pick(cfg NetworkConfig, req Request, entries []entry) (v4, v6 netip.Prefix, err error) {
	var taken, taken6 []netip.Prefix
	for _, e := range entries {
		if e.lease.Subnet.IsValid() {
			taken = append(taken, e.lease.Subnet)
		}
		if e.lease.Subnet6.IsValid() {
			taken6 = append(taken6, e.lease.Subnet6)
		}
	}
	v4, err = pickOne(cfg.Network, req.Previous, cfg.SubnetMin, cfg.SubnetMax, cfg.SubnetLen, taken)
	if err == nil && cfg.EnableIPv6 {
		v6, err = pickOne(cfg.IPv6Network, req.Previous6, cfg.IPv6SubnetMin, cfg.IPv6SubnetMax, cfg.IPv6SubnetLen, taken6)
	}
	return v4, v6, err
}

func pickOne(network, previous netip.Prefix, lo, hi netip.Addr, bits int, taken []netip.Prefix) (netip.Prefix, error) {
	ranges := newOccupied(taken)
	if inRange(previous, lo, hi, bits) {
		if _, busy := ranges.over(previous); !busy {
			return previous, nil
		}
	}
	var free []netip.Prefix
	for a, ok := lo, true; ok && !hi.Less(a) && len(free) < maxCandidates; {
		p := netip.PrefixFrom(a, bits)
		if last, busy := ranges.over(p); busy {
			// Step over the whole of a shorter prefix at once.
			p = netip.PrefixFrom(lastSubnet(last, max(bits, last.Bits())), bits).Masked()
		} else {
			free = append(free, p)
		}
		a, ok = nextSubnet(p.Addr(), bits)
	}
	if len(free) == 0 {
		return netip.Prefix{}, fmt.Errorf("%w: no free /%d between %v and %v in %v", ErrExhausted, bits, lo, hi, network)
	}
	return free[rand.IntN(len(free))], nil
}

// occupied answers "does this prefix overlap a lease" in logarithmic time: flannel's walk over all leases for every
// candidate takes seconds in a full network.
type occupied struct {
	exact map[netip.Prefix]bool
	bits  []int                         // lengths present
	above map[netip.Prefix]netip.Prefix // any prefix that contains a lease -> that lease
}

func newOccupied(taken []netip.Prefix) *occupied {
	o := &occupied{make(map[netip.Prefix]bool), nil, make(map[netip.Prefix]netip.Prefix)}
	seen := make(map[int]bool)
	for _, p := range taken {
		o.exact[p] = true
		if !seen[p.Bits()] {
			seen[p.Bits()] = true
			o.bits = append(o.bits, p.Bits())
		}
		for b := p.Bits() - 1; b > 0; b-- {
			up, _ := p.Addr().Prefix(b)
			if _, ok := o.above[up]; ok {
				break // its ancestors are in already
			}
			o.above[up] = p
		}
	}
	return o
}

// over is a lease that overlaps p.
func (o *occupied) over(p netip.Prefix) (netip.Prefix, bool) {
	if inside, ok := o.above[p]; ok {
		return inside, true
	}
	for _, b := range o.bits {
		if b <= p.Bits() {
			if up, err := p.Addr().Prefix(b); err == nil && o.exact[up] {
				return up, true
			}
		}
	}
	return netip.Prefix{}, false
}
