// This file is the Registry: one network's keys in one store. It reads and writes the config and lists the leases;
// acquire.go, held.go and watch.go build on it, health.go says whether the store answers.

package lease

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path"
	"slices"
	"sync"
)

// DefaultPrefix is flannel's --etcd-prefix.
const DefaultPrefix = "/coreos.com/network"

// Lease is a subnet and the node that owns it.
type Lease struct {
	Subnet      netip.Prefix
	Subnet6     netip.Prefix // zero unless dual-stack
	Attrs       Attrs
	Reservation bool  // no etcd lease: it stays until somebody deletes it
	ModRevision int64 // of the last write
}

// Left tells whether the node has given the lease back and is gone, though the key may still be there.
func (l Lease) Left() bool { return l.Attrs.left() }

// Registry is one network in one store. Make it with NewRegistry; it is safe for concurrent use and starts nothing.
type Registry struct {
	store  Store
	prefix string
	log    *slog.Logger
	health health
	held   sync.Map // *Held -> its key, of which that Held speaks by itself

	momentMu sync.Mutex
	moment   moment // of the store, as last seen
}

// moment is how far a store has come: revisions of one era grow, and an era ends when the store has gone back.
type moment struct {
	era int
	rev int64
}

// reached notes a revision that the store came to in an era. What tells of an earlier era comes too late to say anything.
func (r *Registry) reached(era int, rev int64) {
	r.momentMu.Lock()
	defer r.momentMu.Unlock()
	if era == r.moment.era {
		r.moment.rev = max(r.moment.rev, rev)
	}
}

// now is what a list that is asked for from now on is to show, at least.
func (r *Registry) now() moment {
	r.momentMu.Lock()
	defer r.momentMu.Unlock()
	return r.moment
}

// listed notes the revision of a list that was asked for at a moment, and says once when the store has gone back since. ok is false if somebody
// else has found that meanwhile: nobody knows on which side of it such a list is, and it is to be asked for again.
func (r *Registry) listed(since moment, rev int64) (era int, ok bool) {
	r.momentMu.Lock()
	defer r.momentMu.Unlock()
	switch {
	case since.era != r.moment.era:
		return 0, false
	case rev >= since.rev:
		r.moment.rev = max(r.moment.rev, rev)
	default:
		r.log.Warn("the store has gone back: it was restored from a backup, began anew, or is another one; what this node has in it is put back", "store", r.store.String(), "revision", rev, "before", since.rev)
		r.moment = moment{r.moment.era + 1, rev}
	}
	return r.moment.era, true
}

// answersFor is whether a Held of ours keeps key in order.
func (r *Registry) answersFor(key string) (found bool) {
	r.held.Range(func(_, held any) bool {
		found = held == key
		return !found
	})
	return found
}

// NewRegistry names the network at prefix ("" for DefaultPrefix) in store. log receives one line when the store goes
// away and one when it is back, so that callers who try again need not log each failure; nil discards.
func NewRegistry(store Store, prefix string, log *slog.Logger) *Registry {
	if prefix == "" {
		prefix = DefaultPrefix
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	r := &Registry{store: store, prefix: path.Clean(prefix), log: log}
	r.health.init(log, store.String())
	return r
}

// Prefix is where the network's keys are.
func (r *Registry) Prefix() string { return r.prefix }

// ConfigKey is the key of the network config at prefix, to the byte as flannel forms it: prefix is cleaned as a path is, and
// gets no slash in front that it does not have. The other keys are formed likewise.
func ConfigKey(prefix string) string { return path.Join(prefix, "config") }

func (r *Registry) configKey() string  { return ConfigKey(r.prefix) }
func (r *Registry) subnetsKey() string { return path.Join(r.prefix, "subnets") } // flannel lists without a slash
func (r *Registry) leaseKey(v4, v6 netip.Prefix) string {
	return path.Join(r.subnetsKey(), Key(v4, v6))
}

// Config reads the network config. ErrNoConfig and ErrBadConfig are about its content, the rest about the store.
func (r *Registry) Config(ctx context.Context) (NetworkConfig, error) {
	pairs, _, err := r.store.Get(ctx, r.configKey(), false)
	r.health.report("request", err)
	if err != nil {
		return NetworkConfig{}, err
	}
	if len(pairs) == 0 {
		return NetworkConfig{}, fmt.Errorf("%w: %s has no key %s: set one with \"rootless-ovl config set\" or \"etcdctl put\" (etcd API v3), or check the prefix", ErrNoConfig, r.store, r.configKey())
	}
	c, err := ParseConfig(pairs[0].Value)
	if err != nil {
		return NetworkConfig{}, fmt.Errorf("%s: key %s: %w: mend it with `rootless-ovl config set`", r.store, r.configKey(), err)
	}
	return c, nil
}

// CreateConfig writes raw as the network config unless there is one; created says which. raw must parse.
func (r *Registry) CreateConfig(ctx context.Context, raw []byte) (created bool, err error) {
	if _, err := ParseConfig(raw); err != nil {
		return false, err
	}
	created, _, err = r.store.Commit(ctx, Txn{If: []Guard{{Key: r.configKey()}}, Key: r.configKey(), Value: raw})
	r.health.report("request", err)
	return created, err
}

// PutConfig writes raw as the network config whatever is there. raw must parse. Nodes read the config when they start.
func (r *Registry) PutConfig(ctx context.Context, raw []byte) error {
	if _, err := ParseConfig(raw); err != nil {
		return err
	}
	_, _, err := r.store.Commit(ctx, Txn{Key: r.configKey(), Value: raw})
	r.health.report("request", err)
	return err
}

// entry is one key under <prefix>/subnets. With skip set the value is not a lease; with a valid subnet it occupies
// that subnet all the same.
type entry struct {
	Pair
	lease Lease
	skip  string
}

func (r *Registry) entryOf(p Pair) entry {
	e := entry{Pair: p}
	var err error
	if e.lease.Subnet, e.lease.Subnet6, err = ParseKey(p.Key); err == nil {
		e.lease.Attrs, err = ParseAttrs(p.Value)
	}
	e.lease.Reservation, e.lease.ModRevision = p.Lease == 0, p.ModRevision
	if err != nil {
		e.skip = err.Error()
	}
	return e
}

// list reads every key under <prefix>/subnets, sorted by key.
func (r *Registry) list(ctx context.Context) ([]entry, int64, error) {
	pairs, rev, err := r.store.Get(ctx, r.subnetsKey(), true)
	if err != nil {
		return nil, 0, err
	}
	entries := make([]entry, len(pairs))
	for i, p := range pairs {
		entries[i] = r.entryOf(p)
	}
	return entries, rev, nil
}

// Leases lists the leases once, as Watch would.
func (r *Registry) Leases(ctx context.Context) (Snapshot, error) {
	entries, rev, err := r.list(ctx)
	r.health.report("request", err)
	if err != nil {
		return Snapshot{}, err
	}
	return snapshot(rev, slices.Values(entries)), nil
}
