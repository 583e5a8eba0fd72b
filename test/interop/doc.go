// Package interop holds the program against flannel itself: flannel's own packages, linked, not read about.
//
//	leases/    what both read and write in the store: network configuration, keys, lease JSON, subnet.env; and a crowd of both at one etcd
//	flanneld/  flannel's daemon, put together as its main.go does
//	here       that daemon on one simulated host (package lab), our node, unprivileged, on another, containers on both
//
// It is a module of its own, so that the program's module does not depend on flannel. `make interop` runs it: it needs Debian's
// etcd-server, and gcc, since flannel's udp backend is C.
//
// flanneld needs root over its host's network only: it runs with every capability over the lab's namespaces and none outside.
//
// Sources: github.com/flannel-io/flannel v0.28.10.
package interop
