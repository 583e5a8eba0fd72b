// Package doctor looks for every known cause of trouble on a host and names its remedy. It changes nothing, needs no
// daemon and no privilege.
//
// Place in the journey: `rootless-ovl doctor`, and nothing else. Run asks the checks of one host one after the other,
// those that reach out over the network side by side, and is bounded by Options.Timeout for each.
//
// Every check reads the host through the fields of type host, so that each cause has a test that makes it true.
//
// Limits: what is filtered without an answer cannot be told from what is lost, so the checks of peers say what they saw
// and no more. Peers are probed over IPv4. etcd is asked for its version alone: whether it would let us log in is not known.
//
// Sources: proc(5), getrlimit(2), user_namespaces(7), subuid(5), udp(7) and ip(7) for the errors of connected sockets.
package doctor
