// Package hostnet reads the network of the host we run on, and changes nothing: which interface and address other nodes
// reach us at, whether it reaches the world over IPv6, and what of the overlay network the host already uses for something else.
//
// Place in the journey: node asks at its start and after every change of the host's network, `doctor` when it is run. No packet passes
// through here.
//
// Nothing here keeps state or starts a goroutine; every call reads afresh. Reading interfaces, addresses and routes by
// rtnetlink, and being told of their changes, needs no privilege. Limits: the external interface has an IPv4 address; an IPv6 one is
// taken along.
//
// Sources: flannel pkg/ipmatch/match.go, pkg/ip/iface.go and main.go (v0.28.9) for the choice and its order;
// rtnetlink(7); resolv.conf(5).
package hostnet
