// This file is the errors that a caller may want to tell apart. All are matched with errors.Is; the text that wraps
// them names the endpoint, the key and the remedy.

package lease

import "errors"

// Why the store did not answer. Each is temporary in the sense that the caller may try again.
var (
	// ErrUnreachable: no endpoint answered in time.
	ErrUnreachable = errors.New("unreachable")
	// ErrAuth: the store refused the user name, the password or the permission.
	ErrAuth = errors.New("access refused")
	// ErrTLS: the TLS handshake failed, on either side's certificate.
	ErrTLS = errors.New("TLS handshake failed")
)

// What a Store answers beyond data.
var (
	// ErrLeaseExpired: the etcd lease does not exist (any more).
	ErrLeaseExpired = errors.New("the etcd lease has expired or was revoked")
	// ErrCompacted: the revision asked for is gone from the store's history; list again.
	ErrCompacted = errors.New("the revision has been compacted")
	// ErrRewound: the store is at an earlier revision than the one asked for, so it was restored from a backup, began anew,
	// or is another one; list again.
	ErrRewound = errors.New("the store has not come to that revision yet: it was restored from a backup or began anew")
)

// Outcomes of Config, Acquire, Held and Names.
var (
	// ErrNoConfig: the store answers but has no network config.
	ErrNoConfig = errors.New("no network config in the store")
	// ErrBadConfig: the network config does not parse or does not make sense.
	ErrBadConfig = errors.New("bad network config")
	// ErrExhausted: every subnet of the network is leased.
	ErrExhausted = errors.New("out of subnets")
	// ErrContended: other nodes won every race; trying again later is right.
	ErrContended = errors.New("lost every race for a subnet")
	// ErrForeignLease: another node already holds a lease with our public IP (and port).
	ErrForeignLease = errors.New("another node has this public IP")
	// ErrTaken: our subnet now belongs to another node.
	ErrTaken = errors.New("the subnet was taken by another node")
	// ErrDuplicateNode: another running process uses our NodeID. Acquiring again would take the lease from it in
	// turn, so a node should stop.
	ErrDuplicateNode = errors.New("another node runs with this node's NodeID")
	// ErrNameTaken: another attachment has the name, or the alias as its name, or the name as an alias.
	ErrNameTaken = errors.New("the name is taken")
	// ErrReleased: Revoke gave the lease back.
	ErrReleased = errors.New("the lease was given back")
)
