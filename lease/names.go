// This file is the names of containers in the store: one key a name, which goes when its node goes.
//
//	<prefix>/rootless-ovl/names/web                          the name, in lower case
//	{"NodeID":"3fa2...","Addr":"10.213.7.3"                  always present
//	 ,"Addr6":"fd00:5:0:7::3"                                in a dual-stack network
//	 ,"Aliases":["front","db"]}                              others may have the same
//
// flannel reads nothing there. All names of a node hang on one etcd lease with a short TTL; the lease of the subnet outlives its node by
// a day. A name is written only where its key is absent or ours, and only while none of its aliases is a name: a name is never stolen.

package lease

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

// NamesTTL is how long names outlive their node.
const NamesTTL = 20 * time.Second

// Bounds of a name in bytes, and of how many aliases one may have.
const (
	maxDNSName = 100
	maxAliases = 64
)

// Name is a container that can be found by its name.
type Name struct {
	Name    string // of labels as CheckDNSName takes them
	NodeID  string
	Addr    netip.Addr // IPv4
	Addr6   netip.Addr // zero: none
	Aliases []string   // likewise names, but not unique
}

func (n Name) equal(m Name) bool {
	return n.Name == m.Name && n.NodeID == m.NodeID && n.Addr == m.Addr && n.Addr6 == m.Addr6 && slices.Equal(n.Aliases, m.Aliases)
}

type wireName struct {
	NodeID  string
	Addr    netip.Addr
	Addr6   netip.Addr `json:",omitzero"`
	Aliases []string   `json:",omitempty"`
}

// ParseName reads a name out of its key, in full or its last part, and its value. With an error the Name has the NodeID alone if that can be read:
// then it is somebody's all the same, as that of a later version may be.
func ParseName(key string, value []byte) (Name, error) {
	name := key[strings.LastIndexByte(key, '/')+1:]
	if len(value) > MaxValue {
		return Name{}, fmt.Errorf("the value has more than %d bytes", MaxValue)
	}
	var w wireName
	err := json.Unmarshal(value, &w)
	n := Name{name, w.NodeID, w.Addr, w.Addr6, w.Aliases}
	if err != nil {
		err = fmt.Errorf("the value is not a name's: %w", err)
	} else if err = n.check(); err == nil {
		return n, nil
	}
	var owner struct{ NodeID string }
	if json.Unmarshal(value, &owner) != nil || !validNodeID(owner.NodeID) {
		return Name{}, err
	}
	return Name{Name: name, NodeID: owner.NodeID}, err
}

func (n Name) check() error {
	switch {
	case !validNodeID(n.NodeID):
		return fmt.Errorf("NodeID %.64q is not 1 to %d letters, digits, '.', '_' or '-'", n.NodeID, maxNodeID)
	case !n.Addr.Is4() || !n.Addr.IsGlobalUnicast():
		return fmt.Errorf("address %v is not an IPv4 address of a container", n.Addr)
	case n.Addr6.IsValid() && (!n.Addr6.Is6() || n.Addr6.Is4In6() || n.Addr6.Zone() != "" || !n.Addr6.IsGlobalUnicast()):
		return fmt.Errorf("address %v is not an IPv6 address of a container", n.Addr6)
	case len(n.Aliases) > maxAliases:
		return fmt.Errorf("%d aliases, at most %d are taken", len(n.Aliases), maxAliases)
	}
	if err := CheckDNSName(n.Name); err != nil {
		return err
	}
	for _, a := range n.Aliases {
		if err := CheckDNSName(a); err != nil {
			return err
		}
	}
	return nil
}

func (n Name) value() ([]byte, error) {
	return json.Marshal(wireName{n.NodeID, n.Addr, n.Addr6, n.Aliases})
}

// CheckDNSName tells whether name, in lower case and of one or more labels, can be found in DNS below a domain.
func CheckDNSName(name string) error {
	if len(name) > maxDNSName {
		return fmt.Errorf("%.100q... cannot be a name in DNS: it is longer than %d characters", name, maxDNSName)
	}
	for l := range strings.SplitSeq(name, ".") {
		if err := checkLabel(l); err != nil {
			return fmt.Errorf("%q cannot be a name in DNS: %w", name, err)
		}
	}
	return nil
}

func checkLabel(l string) error {
	switch {
	case l == "":
		return errors.New("there is nothing between two dots, or at an end")
	case len(l) > 63:
		return fmt.Errorf("%.63q... is longer than 63 characters", l)
	case strings.HasPrefix(l, "-") || strings.HasSuffix(l, "-"):
		return fmt.Errorf("%q has a hyphen at an end", l)
	}
	for _, c := range []byte(l) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return fmt.Errorf("%q has something else than letters, digits, '-' and '_' in it", l)
		}
	}
	return nil
}

// NameTakenError is an ErrNameTaken: who has the name.
type NameTakenError struct {
	Name   string // that was asked for, or one of the aliases
	Holder Name   // its Name is another where Name is an alias of it; its Addr is not valid where the record cannot be read
}

func (e *NameTakenError) Error() string {
	what := fmt.Sprintf("name %q", e.Name)
	if e.Holder.Name != e.Name {
		what = fmt.Sprintf("name %q (an alias of %q)", e.Name, e.Holder.Name)
	}
	return fmt.Sprintf("%s is taken by %s of node %s", what, e.Who(), e.Holder.NodeID)
}

// Who is the holder's address, or what can be said without one.
func (e *NameTakenError) Who() string {
	if !e.Holder.Addr.IsValid() {
		return "a container"
	}
	return e.Holder.Addr.String()
}

// Is makes errors.Is find ErrNameTaken.
func (e *NameTakenError) Is(target error) bool { return target == ErrNameTaken }

// NamesSnapshot is all names of the network at Revision.
type NamesSnapshot struct {
	Revision int64
	Names    []Name   // sorted by Name
	Skipped  []string // keys whose value or name is no name, each with the reason, sorted
}

// Names is what a node publishes of its containers' names, and sees of all. Make one with NewNames; it is safe for concurrent use.
type Names struct {
	r       *Registry     // constant
	nodeID  string        // constant
	ttl     time.Duration // constant
	changed chan struct{} // has one element when there may be something to put right
	said    bool          // of Run: the store does not let us in, and the log tells so

	// writing is held across the store's answers, and guards the etcd lease.
	writing turn
	etcd    LeaseID // 0: none yet, or it has to be granted anew
	alive   time.Time

	mu      sync.Mutex
	want    map[string]*wanted
	seen    map[string]seenName // by key; nil: the store has not answered yet
	seenRev int64
}

// wanted is a name that shall be published. Guarded by Names.mu; name and value are constant.
type wanted struct {
	name    Name
	value   []byte
	rev     int64 // at which the store has it; 0: not, as far as is known
	problem error // why not

	// Of what became of it in the store without our doing.
	losses int // how often it was lost, each within calm of the one before
	lost   time.Time
	pause  backoff
	after  time.Time // it is not put back before
}

// calm is how long a name has to stay in the store until what happened to it before is forgotten.
const calm = time.Minute

// errContested is the problem of a name that was put back and is gone again.
var errContested = errors.New("it is deleted or overwritten in the store again and again: does another daemon have this node's id, from a copied state directory?")

// lose notes that w is not in the store any more. It is put back at once, from the third time on after a pause: whoever overwrites it may be
// putting back its own.
func (w *wanted) lose(now time.Time) {
	if now.Sub(w.lost) > calm {
		w.losses = 0
		w.pause.reset()
	}
	w.rev, w.lost = 0, now
	if w.losses++; w.losses > 2 {
		w.after, w.problem = now.Add(w.pause.step()), errContested
	}
}

// seenName is a key as the watch has it.
type seenName struct {
	name  Name // where skip is not empty as ParseName has it with an error
	rev   int64
	lease LeaseID
	skip  string // why it is none; empty: it is
}

// NewNames makes the names of a node, which starts without any. ttl is how long they outlive it.
func (r *Registry) NewNames(nodeID string, ttl time.Duration) *Names {
	return &Names{r: r, nodeID: nodeID, ttl: ttl, changed: make(chan struct{}, 1), writing: make(turn, 1), want: make(map[string]*wanted)}
}

func (r *Registry) namesKey() string { return path.Join(r.prefix, "rootless-ovl", "names") + "/" }

func (n *Names) key(name string) string { return n.r.namesKey() + name }

func (n *Names) wake() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

// Claim publishes a name, now or, where the store does not answer within ctx, as soon as it is back: then Problem says how it stands. A name that
// somebody else has, or another container of this node, is a NameTakenError, and not wanted any longer. A name that is
// ours already is published as it is now.
func (n *Names) Claim(ctx context.Context, name Name) error {
	w, err := n.ask(name, true)
	if err != nil {
		return err
	}
	err = n.writing.LockContext(ctx)
	if err == nil {
		err = n.publish(ctx, w)
		n.writing.Unlock()
	}
	if errors.Is(err, ErrNameTaken) {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.want[name.Name] == w {
			delete(n.want, name.Name)
		}
		return err
	}
	if err != nil {
		n.blame(w, err)
		n.wake()
	}
	return nil
}

// Keep publishes a name when it can, and waits for nothing: that of a container that has it already, whatever others have done meanwhile.
func (n *Names) Keep(name Name) error {
	if _, err := n.ask(name, false); err != nil {
		return err
	}
	n.wake()
	return nil
}

// ask makes name wanted. One that isNew must not be in conflict with what is known.
func (n *Names) ask(name Name, isNew bool) (*wanted, error) {
	name.NodeID = n.nodeID
	name.Aliases = slices.DeleteFunc(slices.Compact(slices.Sorted(slices.Values(name.Aliases))), func(a string) bool { return a == name.Name })
	if err := name.check(); err != nil {
		return nil, err
	}
	value, err := name.value()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	was := n.want[name.Name]
	switch {
	case was != nil && was.name.Addr != name.Addr:
		return nil, &NameTakenError{name.Name, was.name}
	case was != nil && was.name.equal(name):
		return was, nil
	}
	if holder := n.conflictLocked(name); holder != nil && was == nil && isNew {
		return nil, holder
	}
	w := &wanted{name: name, value: value}
	n.want[name.Name] = w
	return w, nil
}

// conflictLocked is whoever is known to have the name as an alias, or one of the aliases as a name, on this node or elsewhere; nil: nobody.
func (n *Names) conflictLocked(name Name) *NameTakenError {
	for other := range n.othersLocked(name.Name) {
		switch {
		case other.Name == name.Name: // the store knows better, as it may have gone
		case slices.Contains(other.Aliases, name.Name):
			return &NameTakenError{name.Name, other}
		case slices.Contains(name.Aliases, other.Name):
			return &NameTakenError{other.Name, other}
		}
	}
	return nil
}

// othersLocked are all names but one: what this node wants, and what the watch has of other nodes.
func (n *Names) othersLocked(but string) iter.Seq[Name] {
	return func(yield func(Name) bool) {
		for name, w := range n.want {
			if name != but && !yield(w.name) {
				return
			}
		}
		for _, s := range n.seen {
			if s.name.NodeID != "" && s.name.NodeID != n.nodeID && s.name.Name != but && !yield(s.name) {
				return
			}
		}
	}
}

// Drop takes a name back, if it is that of the container with name's address: of another's it leaves everything as it is. If the store does not
// answer within ctx the error says so, and it is deleted when the store is back; or it goes with its etcd lease.
func (n *Names) Drop(ctx context.Context, name Name) error {
	n.mu.Lock()
	w := n.want[name.Name]
	if w == nil || w.name.Addr != name.Addr {
		n.mu.Unlock()
		return nil
	}
	delete(n.want, name.Name)
	n.mu.Unlock()
	defer n.wake()
	if err := n.writing.LockContext(ctx); err != nil {
		return err
	}
	defer n.writing.Unlock()
	n.mu.Lock()
	rev, again := w.rev, n.want[name.Name] != nil
	n.mu.Unlock()
	if rev == 0 || again {
		return nil
	}
	key := n.key(name.Name)
	_, _, err := n.r.store.Commit(ctx, Txn{If: []Guard{{Key: key, ModRevision: rev}}, Key: key, Delete: true})
	return err
}

// Problem is why a name that was claimed is not published; nil: it is, or was not claimed.
func (n *Names) Problem(name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if w := n.want[name]; w != nil {
		return w.problem
	}
	return nil
}

// Run publishes what was claimed and keeps it so, and hands fn a full snapshot of all names now and after every change, as Registry.Watch does
// with leases, until ctx ends; then it returns nil. What is in the store then stays until Revoke, or for the TTL.
func (n *Names) Run(ctx context.Context, fn func(NamesSnapshot)) error {
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		n.keep(ctx)
	}()
	garbage := garbageLog{say: func(key, reason string) {
		n.r.log.Warn("skipping a key that is not a name", "key", key, "reason", reason)
	}}
	f := following[seenName]{
		r: n.r, key: n.r.namesKey(), what: "names",
		report: func(err error) {
			if errors.Is(err, ErrAuth) { // no outage: the leases may be open to us all the same
				if !n.said {
					n.said = true
					n.r.log.Warn("the store does not let this node read the names of containers: its user needs to read and write below this key", "key", n.r.namesKey(), "err", err)
				}
				err = nil
			}
			n.r.health.report("names", err)
		},
		read: func(p Pair) seenName {
			s := seenName{rev: p.ModRevision, lease: p.Lease}
			var err error
			if s.name, err = ParseName(p.Key, p.Value); s.name.Name != "" && n.key(s.name.Name) != p.Key {
				s.name, err = Name{}, errors.New("there is a slash in the name")
			}
			if err != nil {
				s.skip = err.Error()
			}
			return s
		},
		listed: n.doubt,
		hand: func(rev int64, state map[string]seenName) {
			garbage.tell(func(yield func(string, skipped) bool) {
				for key, s := range state {
					if s.skip != "" && !yield(key, skipped{s.rev, s.skip}) {
						return
					}
				}
			})
			n.mu.Lock()
			n.seen, n.seenRev = maps.Clone(state), rev
			n.mu.Unlock()
			n.wake()
			fn(namesSnapshot(rev, state))
		},
	}
	f.run(ctx)
	<-kept
	return nil
}

// doubt looks again after names that were published later than the store has come: it has gone back, or was asked before they were.
func (n *Names) doubt(rev int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.want {
		if w.rev > rev {
			w.rev = 0
		}
	}
}

func namesSnapshot(rev int64, state map[string]seenName) NamesSnapshot {
	s := NamesSnapshot{Revision: rev}
	for key, e := range state {
		if e.skip != "" {
			s.Skipped = append(s.Skipped, clipped(key)+": "+e.skip)
		} else {
			s.Names = append(s.Names, e.name)
		}
	}
	slices.Sort(s.Skipped)
	slices.SortFunc(s.Names, func(a, b Name) int { return strings.Compare(a.Name, b.Name) })
	return s
}

// Revoke takes all names back at once, and forgets what was claimed.
func (n *Names) Revoke(ctx context.Context) error {
	n.mu.Lock()
	n.want = make(map[string]*wanted)
	n.mu.Unlock()
	if err := n.writing.LockContext(ctx); err != nil {
		return err
	}
	defer n.writing.Unlock()
	if n.etcd == 0 {
		return nil
	}
	id := n.etcd
	n.etcd = 0
	return n.r.store.Revoke(ctx, id)
}

// keep renews the etcd lease and puts right what is not as it is wanted, until ctx ends.
func (n *Names) keep(ctx context.Context) {
	var pause backoff
	failing := false
	for ctx.Err() == nil {
		wait, err := n.settle(ctx)
		// To have had nothing to do says nothing of the store.
		if err != nil && !errors.Is(err, ErrAuth) || err == nil && failing {
			failing = err != nil
			n.r.health.report("own names", err)
		}
		if err != nil {
			wait = pause.step()
		} else {
			pause.reset()
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-n.changed:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// settle does once what keep is there for, and says when to do so again if nothing happens before.
func (n *Names) settle(ctx context.Context) (next time.Duration, err error) {
	if err := n.writing.LockContext(ctx); err != nil {
		return 0, nil //nolint:nilerr // ctx has ended, and keep with it
	}
	defer n.writing.Unlock()
	if err := n.renew(ctx); err != nil {
		return 0, err
	}
	missing, stale, next := n.compare()
	for _, g := range stale {
		if err := n.renew(ctx); err != nil { // the store may be slow, and much be left to do
			return 0, err
		}
		if _, _, err := n.r.store.Commit(ctx, Txn{If: []Guard{g}, Key: g.Key, Delete: true}); err != nil {
			return 0, err
		}
	}
	for _, w := range missing {
		if err := n.renew(ctx); err != nil {
			return 0, err
		}
		was := n.Problem(w.name.Name)
		err := n.publish(ctx, w)
		n.blame(w, err)
		switch {
		case errors.Is(err, ErrNameTaken):
			if was == nil || was.Error() != err.Error() {
				n.r.log.Warn("a name is not published", "name", w.name.Name, "err", err)
			}
		case err != nil && (ctx.Err() != nil || errors.Is(err, ErrUnreachable) || errors.Is(err, ErrTLS) || errors.Is(err, ErrAuth)):
			return 0, err
		case err == nil && errors.Is(was, ErrNameTaken):
			n.r.log.Info("a name is free again, and published", "name", w.name.Name)
		}
	}
	return next, nil
}

// blame notes why w is not published; nil: it is.
func (n *Names) blame(w *wanted, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w.problem = err
}

// renew restarts the time of the etcd lease when a third of it has passed. The caller has writing.
func (n *Names) renew(ctx context.Context) error {
	if n.etcd == 0 || time.Since(n.alive) < n.ttl/3 {
		return nil
	}
	_, err := n.r.store.KeepAlive(ctx, n.etcd)
	switch {
	case errors.Is(err, ErrLeaseExpired):
		n.expired()
	case err != nil:
		return err
	default:
		n.alive = time.Now()
	}
	return nil
}

// expired notes that the etcd lease has gone, and all names with it.
func (n *Names) expired() {
	n.etcd = 0
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.want {
		w.rev = 0
	}
}

// compare holds what the watch has seen against what is wanted: what has to be published, and keys of ours that nobody wants, by the revision that
// was seen; next is when there may be more without the watch's telling.
func (n *Names) compare() (missing []*wanted, stale []Guard, next time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	next = n.ttl / 3
	for _, name := range slices.Sorted(maps.Keys(n.want)) {
		w := n.want[name]
		key := n.key(name)
		s, there := n.seen[key]
		if w.rev != 0 && n.seenRev >= w.rev && s.rev != w.rev {
			w.lose(now)
			n.r.log.Warn("a name of this node was deleted or overwritten in the store; putting it back", "name", name, "pause", max(0, w.after.Sub(now)).Round(time.Millisecond))
		}
		foreign := there && s.name.NodeID != "" && s.name.NodeID != n.nodeID
		switch pause := w.after.Sub(now); {
		case w.rev != 0:
		case pause > 0:
			next = min(next, pause)
		// Of one that was taken, the watch tells when to look again.
		case errors.Is(w.problem, ErrNameTaken) && (foreign || n.conflictLocked(w.name) != nil):
		default:
			missing = append(missing, w)
		}
	}
	for key, s := range n.seen {
		if s.skip == "" && s.name.NodeID == n.nodeID && n.want[s.name.Name] == nil {
			stale = append(stale, Guard{Key: key, ModRevision: s.rev})
		}
	}
	return missing, stale, next
}

// publish writes w, if its key is absent or ours and no alias is a name. The caller has writing.
func (n *Names) publish(ctx context.Context, w *wanted) error {
	key := n.key(w.name.Name)
	for range maxRaces {
		pairs, _, err := n.r.store.Get(ctx, key, false)
		if err != nil {
			return err
		}
		guards := []Guard{{Key: key}}
		if len(pairs) > 0 {
			p := pairs[0]
			held, perr := ParseName(key, p.Value)
			switch {
			case held.NodeID == "": // nobody's
			case held.NodeID != n.nodeID:
				return &NameTakenError{w.name.Name, held}
			case perr != nil:
			case p.Lease == n.etcd && n.etcd != 0 && bytes.Equal(p.Value, w.value):
				n.published(w, p.ModRevision)
				return nil
			}
			guards[0].ModRevision = p.ModRevision
		}
		for _, a := range w.name.Aliases {
			guards = append(guards, Guard{Key: n.key(a)})
		}
		if n.etcd == 0 {
			if n.etcd, err = n.r.store.Grant(ctx, n.ttl); err != nil {
				n.etcd = 0
				return err
			}
			n.alive = time.Now()
		}
		ok, rev, err := n.r.store.Commit(ctx, Txn{If: guards, Key: key, Value: w.value, Lease: n.etcd})
		switch {
		case errors.Is(err, ErrLeaseExpired):
			n.expired()
			continue
		case err != nil:
			return err
		case ok:
			n.published(w, rev)
			return nil
		}
		if err := n.aliasTaken(ctx, w); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: key %s changes faster than it can be read", n.r.store, key)
}

// aliasTaken is the error of a Txn that failed because an alias of w is a name; nil: it failed for something else.
func (n *Names) aliasTaken(ctx context.Context, w *wanted) error {
	for _, a := range w.name.Aliases {
		pairs, _, err := n.r.store.Get(ctx, n.key(a), false)
		if err != nil {
			return err
		}
		if len(pairs) == 0 {
			continue
		}
		held, err := ParseName(a, pairs[0].Value)
		if held.NodeID == "" {
			return fmt.Errorf("alias %q: key %s of the store holds what is no name: %w: delete it", a, n.key(a), err)
		}
		return &NameTakenError{a, held}
	}
	return nil
}

func (n *Names) published(w *wanted, rev int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w.rev, w.problem = rev, nil
}
