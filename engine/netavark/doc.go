// Package netavark is the plugin that podman and netavark run for networks of the driver rootless-ovl: `podman network create -d
// rootless-ovl` has it look at the network (create), and a container's start and end have it attach (setup) and detach (teardown) the
// container's namespace.
//
// Place in the journey: none of a packet's. It is a thin client of the daemon's API, a process for each call, and decides nothing about
// addresses or routes. Who calls it is in other namespaces than the daemon: netavark in podman's network and mount namespaces, where alone
// the container's namespace has its path. So the plugin opens that and gives the daemon the descriptor.
//
// Ownership: a Plugin has no state of its own and starts no goroutine. What it attaches is found again by its owner, netavark/NETWORK
// ID/CONTAINER ID.
//
// Limits: one network of rootless-ovl for a container, since a namespace is attached once. Input of up to 1 MiB. Members of the input that are
// not known are passed over, as the protocol asks; options that are not known are refused.
//
// Sources: netavark's plugin-API.md (API 1.0.0), src/plugin.rs, src/network/plugin.rs and src/network/types.rs; podman's
// libnetwork/netavark/config.go for what it checks of a network that a plugin has made, libpod/networking_linux.go for who publishes ports.
package netavark
