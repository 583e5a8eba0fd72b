// Package stack is the gateway of every container: a gVisor TCP/IP stack that ends the containers' connections to the
// outside and carries them on with sockets of the host.
//
// Place in the journey: forwarder hands packets for the outside, and for the gateway's own addresses, to Gateway.Send;
// what the stack has to say to containers leaves through Config.Exit, which gives it back to forwarder.
//
//	container ─ TAP ─ forwarder ─ Send ─▶ gVisor ─▶ accept functions ─▶ host sockets ─▶ outside
//	container ◀ TAP ◀ forwarder ◀ Exit ◀ one queue ◀ gVisor ◀───────── carriers ◀───┘
//
// What happens to a packet, by its destination:
//
//   - The gateway's own addresses: gVisor answers ping, port 53 is the resolver of package dns, ports that the container's policy opens
//     lead to the host's loopback, everything else is refused.
//   - A closed destination (closed.go), or one that the container's policy does not list (policy.go): ICMP administratively
//     prohibited, and a counter.
//   - TCP: the host socket is dialled first. Only when that has succeeded is the container's handshake completed, so
//     that a container sees what it would see without a gateway: connection refused, unreachable, or a connection.
//   - UDP: one connected host socket a flow, so that ICMP errors come back: routers and hosts of the outside speak to
//     the container with their own address, type and code, and its TTL and "don't fragment" are those of the host's datagrams, so that
//     traceroute and path MTU discovery work.
//   - ICMP echo: an unprivileged ICMP datagram socket. A reply is never made up: where the host does not let us ping, the
//     container is told so.
//   - Anything else: ICMP protocol unreachable.
//
// What begins outside and ends in a container (inward.go) takes places in the same table of flows: connections that we dial with the client's
// own address as their source, and flows of datagrams that OpenUDP begins.
//
// Buffers: packets given to Send are copied before it returns; packets given to Exit are lent for the length of the call.
//
// Goroutines: New starts none. Run is the one that drains the exit queue and calls Exit; under it live gVisor's TCP
// processors (one a CPU), the poller of the TCP flows' host sockets, unless Config.Attend polls them, and the crew that works for those flows
// (carry.go): an idle TCP flow has none. What is little is done by a goroutine that is awake anyhow (turn.go). One more reads all UDP and echo flows. All of them have ended when Run returns. Send never blocks, and may be called from several
// goroutines, also from inside Exit.
//
// Limits: Config.Limits bounds flows, half-open connections and both per container; what does not fit is dropped and counted. A
// container's half-open connections make room for its own newer ones. Together they leave the rest of the process descriptors
// to work with (descriptors.go). The buffers of all TCP flows have a common budget (buffers.go). The exit queue is bounded: those who
// carry bulk data wait while it is more than half full, and at its end packets are dropped and counted.
//
// Sources: RFC 1122 and RFC 1812 for ICMP errors, RFC 6191 for the reuse of a four-tuple in TIME_WAIT, RFC 4787 for UDP timeouts (ours
// are shorter for flows without a reply), icmp(7) and ip(7) of Linux.
package stack
