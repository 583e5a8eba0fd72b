// Package forwarder moves IP packets between containers' TAPs, peers and the gateway. "Forwarder" is meant as a router
// means it: L3 forwarding by longest-prefix match, with TTL, MTU and ICMP errors.
//
// Place in the journey, in the order of the files:
//
//	loop.go      a poll loop wakes (wait.go), and reads a batch from a TAP or from its underlay sockets
//	receive.go   datagram trains read from the underlay and cut into packets; lanes.go and steer.go say from which socket
//	router.go    every packet of the batch: check, whose it is, TTL, route, MTU; then into its next hop's bucket
//	table.go     the immutable route table that router.go looks into
//	check.go     which packets are well-formed enough to be routed
//	policy.go    what a container may exchange with others; policyflows.go remembers flows, so that replies pass
//	icmp.go      what the sender is told when a packet ends here; fragment.go cuts packets without DF
//	mss.go       a SYN is told of a narrow path; probe.go is how the node finds that it is narrow
//	segment.go   a bucket for a peer: superpackets are cut into packets of the MTU, checksums completed
//	underlay.go  the messages, many packets in one, out in one system call
//	sockets.go   the sockets of both families of the underlay; rebind.go follows the host to other addresses
//	udp.go       the encapsulation: flannel's udp format, or vxlan.go: that of its vxlan backend
//
// Ownership: a worker (one per poll loop, one per Injector) owns its scratch, its transmit queues and its buckets. Packets are
// borrowed from the reader until the batch is flushed. Nothing on the path takes a lock or allocates.
//
// Concurrency: tables are swapped whole (SetTable) and never changed, and so are the sockets (Rebind). RemovePort waits until every
// worker has passed the end of the batch it was in, so that the caller may close the device; Rebind does so before it closes sockets.
//
// Families: the underlay is IPv4, and IPv6 too where it is given an address of it; peers are reached in either. What a packet inside
// is has nothing to do with it: either family travels over either.
//
// Sources: RFC 1812 (router requirements), RFC 792/4443 (ICMP), RFC 8200 (IPv6), RFC 7348 (VXLAN), flannel pkg/backend/udp and vxlan,
// Documentation/networking/segmentation-offloads.rst, udp(7).
package forwarder
