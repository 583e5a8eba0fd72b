// This file turns what the node knows into its route table. It is a pure function: no lock, no clock, no state.

package node

import (
	"net/netip"

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
	addr netip.Prefix // its address with the length of the subnet it was attached in
	port *forwarder.Port
}

// routes returns the full table; the longest prefix wins, so its order does not matter:
//
//	an attachment's address        its port
//	.1 and .0 of our subnet        the gateway, for containers here and on peers
//	the rest of our subnet         unreachable: no such host
//	a peer's subnet                that peer
//	the rest of the network        unreachable: nobody leases it
//	everything else                out of the overlay through the gateway, for containers here alone
//
// An attachment of an earlier subnet of ours keeps its route, and its gateway's, until it is detached: only peers no
// longer find it.
func routes(src routeSources) forwarder.TableConfig {
	var table forwarder.TableConfig
	to := func(p netip.Prefix, h forwarder.Hop) {
		table.Routes = append(table.Routes, forwarder.Route{Prefix: p.Masked(), Hop: h})
	}
	host := func(a netip.Addr, h forwarder.Hop) { to(netip.PrefixFrom(a, a.BitLen()), h) }

	to(netip.PrefixFrom(netip.IPv4Unspecified(), 0), forwarder.ToEgress(src.gateway))
	to(src.me.network, forwarder.UnreachableNet)
	for _, p := range src.peers {
		if p.problem == "" {
			to(p.lease.Subnet, forwarder.ToPeer(p.config()))
		}
	}
	if src.me.subnet.IsValid() {
		table.Gateway = gatewayAddr(src.me.subnet)
		to(src.me.subnet, forwarder.UnreachableHost)
	}
	for _, a := range gatewayAddrs(src.me.subnet, src.attachments) {
		host(a, forwarder.ToGateway(src.gateway))
	}
	for _, a := range src.attachments {
		host(a.addr.Addr(), forwarder.ToPort(a.port))
	}
	return table
}

// gatewayAddrs are the gateway's addresses: .1 and .0 of our subnet, then those of earlier subnets that attachments still
// have their address from.
func gatewayAddrs(subnet netip.Prefix, attachments []attachedPort) []netip.Addr {
	var addrs []netip.Addr
	seen := make(map[netip.Prefix]bool)
	add := func(p netip.Prefix) {
		if p = p.Masked(); p.IsValid() && !seen[p] {
			seen[p] = true
			addrs = append(addrs, gatewayAddr(p), networkAddr(p))
		}
	}
	add(subnet)
	for _, a := range attachments {
		add(a.addr)
	}
	return addrs
}
