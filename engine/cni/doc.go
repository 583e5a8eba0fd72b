// Package cni is the CNI plugin: it does what a container runtime asks for by CNI_COMMAND, and answers on standard output.
//
// Place in the journey: none of a packet's. It is a thin client of api: what it adds is CNI's words for an attachment. Which address a container
// gets, what is routed to it and how it ends are the daemon's affair.
//
// Which attachment belongs to which call is told by its owner, cni/NETWORK/CONTAINERID/IFNAME, that CNI calls unique. The container's network
// namespace is handed over as a descriptor: CNI_NETNS is a path that often means something in the runtime's mount namespace only (rootless
// podman, RootlessKit).
//
// Ownership: a Plugin serves one call and lives as long as its process. It starts no goroutine. The one descriptor that it opens is closed when
// the call ends; the daemon has a copy of its own by then.
//
// Limits: versions 0.3.1, 0.4.0, 1.0.0 and 1.1.0 of the specification. Addresses are the daemon's to give, so there is no ipam. One IPv4
// address for each interface; the IPv6 address of a dual-stack network follows from it. CHECK looks into the container's namespace only
// where it is allowed to, as root of the user namespace that owns it.
//
// Sources: the CNI specification 1.1.0 (SPEC.md) and its conventions (CONVENTIONS.md); what podman (containers/common libnetwork/cni) and
// containerd (go-cni) pass.
package cni
