// Package publish is the host's side of published ports: it listens on the host and hands each connection and each flow of datagrams to a
// container, which sees the client's own address and port.
//
// Place in the journey: node makes a Publication for each port of an attachment, and gives it an Inside, which is how
// that container is reached. A TCP connection is accepted by the host's kernel, a second one is dialled to the container with the
// client's address as its source, and what comes in on either goes out on the other. The fast way is a socket in the container's own
// network namespace (nsutil): both ends are the kernel's, and the bytes are spliced past this process. Where a namespace does
// not allow that, the gateway's stack dials into the overlay and pumps. Datagrams always go through the stack: answers
// of a server in the container are not marked, so that they leave by its TAP.
//
// Who owns what: a Publication owns its listening sockets from Listen until Close, and each accepted connection until it is over or
// Carry has taken it. The pipes that bytes are spliced through are shared by all connections of the process: a connection holds one
// only while it has bytes in it, so that idle connections cost two sockets and two goroutines. A datagram is read into a
// buffer of the listener's goroutine, and lent to UDPFlow.Send.
//
// Goroutines: one a listener, two a TCP connection, none a flow of datagrams. Listen starts none; Run does, and ends all of them.
//
// Limits: 16,384 connections and 4,096 flows of datagrams a publication unless Limits says otherwise, and Places for the connections of all of them; a dial into the
// container takes 20 s at the most; a flow of datagrams ends after 60 s without any, or after 180 s once the container has answered.
//
// Sources: tcp(7), ip(7) for IP_PKTINFO, ipv6(7), splice(2), pipe(7); RFC 9293 for half-closed connections and resets.
package publish
