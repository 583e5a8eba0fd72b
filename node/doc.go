// Package node is one host's daemon: it holds the lease of this host's subnet, the attachments (one network namespace
// each) and the route table, and serves the API.
//
// Place in the journey: node is the glue. lease says which subnet is ours and which are the peers'; nsutil opens TAPs in
// containers; internal/tap and forwarder move the packets; stack is the gateway; api is how people and engines ask.
// node turns (snapshot of leases, attachments, gateway) into one full route table - routes.go, a pure function - and the
// router swaps it in. No packet ever passes through this package.
//
// Who owns what: Node owns the TAP descriptors (a tap.Device lends them to the router between AddPort and RemovePort),
// the lease, the embedded store and the files below the state and runtime directories. Run starts every goroutine and
// ends only when all of them have ended; what persists after it is the lease (unless Ephemeral), the TAPs in the
// containers, and the state directory.
//
// Published ports are package publish's: node opens them, brings its clients to containers by nsutil or stack, and keeps them over restarts.
//
// The host's address may change while Run lasts: roam.go follows it.
//
// Locking: one mutex (Node.mu) guards the attachments, addresses and the current snapshot. The slow part of an attach
// (opening a TAP in a namespace) runs outside it, with the name, namespace and address reserved under it. Published ports are opened and closed one
// request after the other (Node.portsMu, taken first).
//
// Limits: IPv4 overlay or, in a vxlan network, both families; flannel's udp and vxlan formats (or alloc, which has none). A subnet of /24 holds 253 attachments (.0, .1
// and broadcast are not given out).
package node
