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

// routes returns the full table, most specific first in meaning (the order of the slice does not matter):
//
//	an attachment's address                  its port
//	.0 and .1 of the subnet                  the gateway
//	the rest of our subnet                   unreachable: no such host
//	a peer's subnet                          that peer
//	the rest of the network                  unreachable: nobody leases it
//	everything else                          the gateway, which sends it out of the overlay
//
// An attachment of an earlier subnet of ours keeps its route, and its gateway's, until it is detached: only peers no
// longer find it.
func routes(src routeSources) []forwarder.Route {
	gateway := forwarder.ToGateway(src.gateway)
	table := []forwarder.Route{
		{Prefix: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Hop: gateway},
		{Prefix: src.me.network, Hop: forwarder.Unreachable},
	}
	// Several leases of one node (a flannel host that got a new subnet and whose old one has not expired) are one peer.
	byAddr := make(map[netip.AddrPort]*forwarder.PeerConfig)
	var order []*forwarder.PeerConfig
	for _, p := range src.peers {
		if p.problem != "" {
			continue
		}
		c := byAddr[p.addr]
		if c == nil {
			c = &forwarder.PeerConfig{Addr: p.addr, MTU: p.mtu, AnyPort: p.stock}
			byAddr[p.addr] = c
			order = append(order, c)
		}
		c.Subnets = append(c.Subnets, p.lease.Subnet.Masked())
		c.MTU = min(c.MTU, p.mtu)
		c.AnyPort = c.AnyPort || p.stock
	}
	for _, c := range order {
		hop := forwarder.ToPeer(*c)
		for _, subnet := range c.Subnets {
			table = append(table, forwarder.Route{Prefix: subnet, Hop: hop})
		}
	}
	if src.me.subnet.IsValid() {
		table = append(table, forwarder.Route{Prefix: src.me.subnet.Masked(), Hop: forwarder.Unreachable})
	}
	for _, addr := range gatewayAddrs(src.me.subnet, src.attachments) {
		table = append(table, forwarder.Route{Prefix: netip.PrefixFrom(addr, 32), Hop: gateway})
	}
	for _, a := range src.attachments {
		table = append(table, forwarder.Route{Prefix: netip.PrefixFrom(a.addr.Addr(), 32), Hop: forwarder.ToPort(a.port)})
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
