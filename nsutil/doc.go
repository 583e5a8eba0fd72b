// Package nsutil is everything that happens in another namespace: it finds who owns a network namespace, opens a TAP
// device there, gives back the descriptors, and makes a namespace of its own for `rootless-ovl run`. It needs no
// capability on the host and no cgo.
//
// Place in the journey: node asks for a Namespace by process, path or number (find.go), has a TAP made in it, and gives the TAP's
// descriptors to internal/tap. From then on no packet passes through this package. Where a namespace has a whole subnet behind it, node
// has its firewall let that through (transit.go). For published ports it makes connections of the container's own kernel (inside.go).
//
// How a namespace is entered without root. A process that made a user namespace (or whose child did) holds every
// capability over it, but Go cannot join one: setns(CLONE_NEWUSER) is refused to a process with several threads, and a
// helper that is executed after joining loses its capabilities again unless its uid is mapped to 0 there. So
// forkInside forks without executing anything: the child, which has one thread, joins the user namespace and the network
// namespace, opens /dev/net/tun and a netlink socket there, sends the descriptors back over a socket pair and exits.
// The parent never enters any namespace; descriptors remember theirs, and the kernel checks the parent's rights over
// the owning user namespace for everything that is then done with them.
//
// Who owns what: a Namespace, a TAP, an Exit, an Inside and a Sandbox belong to whoever asked for them, until Close (or Wait). The
// only goroutines are one for each Exit that is open, two for each Sandbox whose command has not ended, and those
// that make and give back an Inside's spare sockets. All functions
// and methods may be called from several goroutines. A process that starts a Sandbox becomes the subreaper of its
// descendants (prctl(2)) and reaps those of the Sandbox, no others.
//
// Limits: Linux 5.3 or later; a fork child that has not answered within five seconds is killed; at most 64 queues a TAP.
//
// Sources: user_namespaces(7), network_namespaces(7), ioctl_ns(2), tun(4), Documentation/networking/tuntap.rst,
// rtnetlink(7), netlink(7), pidfd_open(2), capabilities(7), proc_pid_mountinfo(5).
package nsutil
