// Package opener is the second process of the daemon: it looks into other processes, which the daemon itself cannot do any more once it is in its
// cage (package cage), and hands over what it has opened.
//
// Place in the journey: the daemon starts the opener first thing, shuts itself in, and asks it for what /proc has of others: a container's network
// namespace, where a namespace is found, what dockerd listens on. The opener answers a fixed set of questions (calls.go). The only descriptors that it
// hands out are of network namespaces, which it has made sure of; the only thing that it changes is one symbolic link, whose place and target
// it is told before any packet has been seen. So a daemon that was taken over gets through it nothing that it could not have attached.
//
// The opener is this program executed once more. It has no network, cannot execute anything and opens no socket (package cage), reads what it is
// asked over a socket pair that it got, ignores the signals that end a daemon, and ends with the pair or the daemon.
//
// Who owns what: an Opener belongs to whoever started it. It has two goroutines, one of which keeps its thread as the opener is to end with it, until Close; then the
// process is gone. Its methods are safe for concurrent use. In the opener every request has a goroutine, no more than maxAtOnce at a time: a path may
// lead to a file system that hangs.
//
// Limits: a message has at most maxMessage bytes.
//
// Sources: unix(7) for SOCK_SEQPACKET and SCM_RIGHTS; prctl(2) for PR_SET_PDEATHSIG.
package opener
