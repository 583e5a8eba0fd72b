// Bench measures rootless-ovl beside what it competes with: the bare underlay, kernel VXLAN as flannel sets it up, nebula,
// slirp4netns, pasta, RootlessKit and a kernel bridge. `make bench` runs it.
//
// Place in the journey: beside it. The program under test is the binary that a user runs, as an unprivileged user with no
// capability; only the kernel peers, nebula and the lab itself need root.
//
// How it works. The program runs itself a second time as the first process of a new PID and mount namespace: whatever way
// the bench ends, everything that it started ends with it. The first stage keeps the machine's sysctls and puts them back.
// A lab is two hosts, network namespaces held by descriptor, on one bridge in a namespace of its own, over one of two
// underlays:
//
//	veth      superpackets cross the wire whole, which flatters everybody, kernel VXLAN most
//	nic-like  the wire cuts them to 1500 bytes and the receiver runs GRO, as with a real network card
//
// A third host, where rootless-ovl is a member among flannel hosts, comes to them when a row asks for it (peer_member.go).
//
// An experiment (experiments.go) measures one or more rows on some paths, a path being a peer's two ends. Within a round the
// paths of an experiment are measured one after the other, in an order that rotates from round to round; a ratio is computed
// within a round, and its median is reported.
//
// Load comes from iperf3 and from this program run again inside a namespace (`bench load ...`, load*.go).
//
// Owners: a lab owns its namespaces, processes and files until close. Everything is bounded in time by a context.
//
// Limits: Linux on amd64 or arm64, IPv4, at least two CPUs for the latency rows to mean anything.
//
// Sources: flannel's vxlan backend (device, forwarding entries and routes), veth(4), udp(7), recvmmsg(2), namespaces(7),
// proc(5).
package main
