// This file is what this package uses of etcd v3. Client is the real thing, leasetest.Store the one in memory; the
// suite of leasetest runs on both.

package lease

import (
	"context"
	"time"
)

// LeaseID names an etcd lease: the thing with a TTL that keys hang on, not the lease of a subnet. Zero is none.
type LeaseID int64

// Pair is a key with its value as the store has it.
type Pair struct {
	Key         string
	Value       []byte
	ModRevision int64   // of the last write to the key
	Lease       LeaseID // the etcd lease it hangs on
}

// Guard is a condition of a Txn: every key in range was last written at ModRevision; an absent key counts as 0.
type Guard struct {
	Key         string
	Prefix      bool // every key that begins with Key, rather than Key alone
	AtMost      bool // written at ModRevision or before
	ModRevision int64
}

// Txn is one write that happens only if all guards hold.
type Txn struct {
	If     []Guard
	Key    string
	Value  []byte
	Lease  LeaseID // for a put
	Delete bool    // delete Key rather than put it
}

// Change is one event of a watch.
type Change struct {
	Pair    // of a deletion only Key and ModRevision
	Deleted bool
}

// Events is what happened at or before Revision. The last one of a watch has Err: ErrCompacted, ErrRewound, or a failure.
type Events struct {
	Revision int64
	Changes  []Change
	Err      error
}

// Store is etcd v3 as this package sees it. Every method is safe for concurrent use, and answers or fails within
// seconds even if the store is away. Failures match ErrUnreachable, ErrAuth or ErrTLS, or are ctx's.
type Store interface {
	// Get lists key, or with prefix every key that begins with it, sorted by key, and says the store's revision.
	Get(ctx context.Context, key string, prefix bool) ([]Pair, int64, error)
	// Commit does t. ok is false if a guard did not hold. rev is the store's revision, on success the ModRevision of
	// what was put. A put on an etcd lease that is gone gives ErrLeaseExpired. After a failure the write may have
	// happened or not.
	Commit(ctx context.Context, t Txn) (ok bool, rev int64, err error)
	// Grant makes an etcd lease that lives ttl, in whole seconds; a store may lengthen a short one.
	Grant(ctx context.Context, ttl time.Duration) (LeaseID, error)
	// KeepAlive restarts the time of an etcd lease and says how long it lives, or ErrLeaseExpired.
	KeepAlive(ctx context.Context, id LeaseID) (time.Duration, error)
	// Revoke ends an etcd lease and deletes the keys that hang on it. One that is gone already is no error.
	Revoke(ctx context.Context, id LeaseID) error
	// Watch reports every change at revision rev or after. The channel closes after an Events with Err, or when ctx
	// ends. A lost connection is such an Err: whoever watches then lists again. So is a revision that the store will come
	// to only later, but for the next one: it has lost what was listed there.
	Watch(ctx context.Context, key string, prefix bool, rev int64) <-chan Events
	// String names the store in logs and errors, as in "etcd http://127.0.0.1:2379".
	String() string
}
