// Package lab makes hosts for black-box tests out of namespaces, with no root: a switch, hosts with a LAN address each, an
// "outside" host that is everybody's default route, and containers, which are child user + network namespaces.
//
// Place in the journey: beside it. The program under test is run as the binary that a user runs; the lab only lays the
// cables. Tests and the demo use the lab, nothing else does.
//
// How it works. Main runs the calling program again, three times, each stage deeper:
//
//	outermost  builds or finds the rootless-ovl binary, makes the work directory; real root gives up root here
//	init       the first process of a new user + network + mount namespace, mapped to the same unprivileged uid; it adopts
//	           and ends whatever the lab leaves behind, also when the outermost stage is killed
//	lab        the program itself, with every capability over the lab's namespaces and none outside
//
// A host is a pair of descriptors (network and mount namespace), not a process. To do something on a host a goroutine locks a
// thread, moves the thread there, does it, and lets the thread die: a socket opened so keeps its namespace for ever, hence
// servers and clients of tests are ordinary goroutines of the test process. A program started on a host (Host.Start) first
// loses all capabilities, the bounding set too: the daemon has what an unprivileged user has.
//
// RootedMain (rooted.go) is Main where the hosts' user must be able to map a range of uids, as container engines do: it needs root, and
// the hosts' programs run as the machine's ordinary user.
//
// Owners: everything made by New ends with the test it was made for (T.Cleanup), in bounded time. Goroutines that a method
// starts end with the test too.
//
// Limits: a LAN has IPv4, and IPv6 beside it only if asked for (WithIPv6); the kernel must allow unprivileged user namespaces. One uid is mapped, so "another user" is found among
// the machine's own processes and not made.
//
// Sources: user_namespaces(7), network_namespaces(7), capabilities(7), packet(7), pcap-savefile(5).
package lab
