// This file turns what the node knows into its route table. It is a pure function: no lock, no clock, no state.

package node

import (
	"net/netip"
	"slices"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// routeSources is everything that the route table is made of.
type routeSources struct {
	me          self
	peers       []peer // of peersOf; those with a problem are not routed to
	attachments []attachedPort
	gateway     packet.Sender
}

// attachedPort is a live attachment as the route table sees it.
type attachedPort struct {
	addr  netip.Prefix // its address with the length of the subnet it was attached in
	addr6 netip.Prefix // likewise; zero without IPv6
	port  *forwarder.Port
	whole bool // attached as the gateway of addr's subnet
}

// addrs are its addresses with the lengths of their subnets.
func (a attachedPort) addrs() []netip.Prefix {
	if a.addr6.IsValid() {
		return []netip.Prefix{a.addr, a.addr6}
	}
	return []netip.Prefix{a.addr}
}

// routes returns the full table; the longest prefix wins, so its order does not matter:
//
//	an attachment's address        its port
//	.1 and .0 of our subnet        the gateway, for containers here and on peers; ::1 and :: in the IPv6 one
//	all of our subnet              instead of these: the namespace that is attached as its gateway (gatewayattach.go)
//	the rest of our subnet         unreachable: no such host
//	a peer's subnet                that peer
//	the rest of the network        unreachable: nobody leases it
//	IPv6 for the outside alone     unreachable, but for containers here (egress6.go)
//	everything else                out of the overlay through the gateway, for containers here alone
//
// An attachment of an earlier subnet of ours keeps its route, and its gateway's, until it is detached: only peers no
// longer find it. That of a whole subnet has none: its containers reach each other without us. Without IPv6 in the overlay, or for the outside, there is no route for it.
func routes(src routeSources) forwarder.TableConfig {
	var table forwarder.TableConfig
	to := func(p netip.Prefix, h forwarder.Hop) {
		table.Routes = append(table.Routes, forwarder.Route{Prefix: p.Masked(), Hop: h})
	}
	host := func(a netip.Addr, h forwarder.Hop) { to(netip.PrefixFrom(a, a.BitLen()), h) }

	to(netip.PrefixFrom(netip.IPv4Unspecified(), 0), forwarder.ToEgress(src.gateway))
	to(src.me.network, forwarder.UnreachableNet)
	outside6 := slices.ContainsFunc(src.attachments, func(a attachedPort) bool { return isEgress6(a.addr6) })
	if outside6 || src.me.network6.IsValid() {
		to(netip.PrefixFrom(netip.IPv6Unspecified(), 0), forwarder.ToEgress(src.gateway))
	}
	if src.me.network6.IsValid() {
		to(src.me.network6, forwarder.UnreachableNet)
	}
	if outside6 {
		to(egress6, forwarder.UnreachableHost)
		table.Gateway6 = gatewayAddr(egress6)
	}
	for _, p := range src.peers {
		for _, w := range p.ways() {
			to(w.subnet, forwarder.ToPeer(p.config(w)))
		}
	}
	whole := wholeSubnet(src.me.subnet, src.attachments)
	if src.me.subnet.IsValid() {
		table.Gateway = gatewayAddr(src.me.subnet)
		rest := forwarder.UnreachableHost
		if whole != nil {
			rest = forwarder.ToPort(whole)
		}
		to(src.me.subnet, rest)
	}
	if src.me.subnet6.IsValid() {
		table.Gateway6 = gatewayAddr(src.me.subnet6)
		to(src.me.subnet6, forwarder.UnreachableHost)
	}
	for _, a := range gatewayAddrs(src.me.subnets(), src.attachments) {
		if whole != nil && src.me.subnet.Contains(a) {
			host(a, forwarder.ToOwnAt(whole, src.gateway))
			continue
		}
		host(a, forwarder.ToGateway(src.gateway))
	}
	for _, a := range src.attachments {
		if a.whole {
			continue
		}
		for _, p := range a.addrs() {
			host(p.Addr(), forwarder.ToPort(a.port))
		}
	}
	return table
}

// gatewayAddrs are the gateway's addresses: .1 and .0 of our subnet and the like of the IPv6 one, then those of earlier subnets that
// attachments still have their address from. A namespace that has a whole subnet knows another one, which comes first: our errors to it
// are from there.
func gatewayAddrs(own subnets, attachments []attachedPort) []netip.Addr {
	var addrs []netip.Addr
	seen := make(map[netip.Prefix]bool)
	add := func(p netip.Prefix) {
		if p = p.Masked(); p.IsValid() && !seen[p] {
			seen[p] = true
			addrs = append(addrs, gatewayAddr(p), networkAddr(p))
		}
	}
	if slices.ContainsFunc(attachments, func(a attachedPort) bool { return a.whole }) {
		addrs = append(addrs, dummyAddr)
	}
	add(own.v4)
	add(own.v6)
	for _, a := range attachments {
		if a.whole {
			continue
		}
		for _, p := range a.addrs() {
			add(p)
		}
	}
	return addrs
}
