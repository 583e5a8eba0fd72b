// Package embedded runs a single-member etcd server inside the daemon, for people who have no etcd. It is an ordinary
// etcd: other nodes, etcdctl and stock flanneld may use its endpoint, and this node too talks to it only through
// lease.Dial, so that there is one code path for both.
//
// Place in the journey: before everything of package lease, and only without --etcd-endpoints.
//
// Goroutines: etcd starts dozens; they end before Close returns. The server owns its data directory, locked against a
// second daemon, and one listening socket; a single member needs no peer port. On every address of the host (wildcard.go) that socket is ours, with two
// goroutines a client, and the member has a port of the loopback behind it.
//
// Limits: one member, so the network's leases cannot change while this node is down (nodes keep forwarding on what
// they know). Ticks are ten times faster than etcd's defaults, which a lone member can afford: it is ready in a fraction of
// a second. History is compacted hourly.
//
// Sources: go.etcd.io/etcd/server/v3 v3.7, package embed.
package embedded
