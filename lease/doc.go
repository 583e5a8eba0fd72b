// Package lease answers one question for the whole network: which node owns which subnet. The answer is kept in etcd v3,
// in flannel's keys and JSON, so that stock flannel nodes read our leases and we read theirs.
//
// # Place in the journey
//
// A node reads the network config ([Registry.Config]), acquires a subnet ([Registry.Acquire]), keeps it
// ([Held.Run]) and watches everybody's leases ([Registry.Watch]), which hands over a full [Snapshot] at every change.
// The node turns snapshots into routes; nothing here knows about packets.
//
//	            NodeID        reservation      previous       random
//	list  ---->  ours?  -no->  for us?   -no->  free?  -no->   free   --> txn "absent" --lost--> list again (bounded)
//	              |yes          |yes             |yes                          |won
//	              +--> txn "unchanged" <---------+ txn "absent"                v
//	                        |                                                 Held: keep alive, watch own key
//	                        +------------------------------------------------> deleted: put again; taken: Done
//
// # Rules
//
// Every write is a transaction that compares revisions: two nodes never fight over a key. A key without an etcd lease
// is a reservation and stays one. A store that is away ends nothing: Run and Watch keep trying, the log has one line
// when it goes and one when it is back, and [Registry.Health] says so meanwhile. Compaction makes Watch list again.
//
// # Ownership and concurrency
//
// No constructor starts a goroutine. [Held.Run] and [Registry.Watch] block; each needs a goroutine of the caller's.
// Every method may be called from any goroutine. Values handed out are copies that the caller may keep; their
// json.RawMessage and Raw bytes are shared and must not be written to. Time is Go's clock, so testing/synctest works
// on the fake of leasetest.
//
// # Limits
//
// A value over [MaxValue] bytes is skipped and named in [Snapshot].Skipped, as is one that does not parse; its subnet
// still counts as occupied. Networks are IPv4 or dual-stack: flannel's key has no form for IPv6 alone.
//
// # Sources
//
// The keys, the JSON and the validation follow github.com/flannel-io/flannel at commit cdf76059 (v0.28.9+8):
// pkg/subnet/subnet.go, pkg/subnet/config.go, pkg/lease/lease.go, pkg/subnet/etcd/local_manager.go. Each file here
// names what it follows and where it differs on purpose.
package lease
