// Package docker makes the daemon a network of docker's: a remote network driver and a remote IPAM driver, in the words of docker's plugin
// protocol (HTTP and JSON on a unix socket).
//
// Place in the journey: none of a packet's. It is a client of the API. An endpoint of docker's is a loose attachment, whose TAP is made in
// the namespace where dockerd takes interfaces from; dockerd moves it into the container, names it and gives it its addresses. Addresses are
// reservations of the node's, ports its published ports.
//
// State: nearly none. An endpoint is known by the Owner of its attachment, which the daemon keeps; so a restart of the daemon loses nothing.
// What was asked of a network when it was created is kept in StateDir/docker-networks.json, and where dockerd was seen in
// RuntimeDir/dockerd-sockets.
//
// docker's plugin protocol does not tell a driver what a container is called. That is read from dockerd's own API: its events say when a
// container was connected or renamed, and its list, after a restart of either daemon, what has changed unseen.
//
// Ownership: Driver is safe for many goroutines. Nothing runs before Follow, which ends its goroutines when its context does.
//
// Limits: IPv4 pools only, of the node's subnet; a container gets its IPv6 address with its IPv4 one. No swarm: the scope is local. A request
// has at most 4 MiB.
//
// Sources: moby daemon/libnetwork/docs/remote.md and ipam.md, drivers/remote/api, ipams/remote/api, types/types.go (PortBinding);
// docker's API 1.41 for events, lists and inspect.
package docker
