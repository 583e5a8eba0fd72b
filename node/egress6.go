// This file gives containers of an IPv4-only overlay an IPv6 way out, where their host has one:
//
//	container   10.5.72.9  fdfa:a976:e5a::a05:4809       a prefix that is the same on every node, and in the last bits the IPv4 address
//	gateway     10.5.72.1  fdfa:a976:e5a::1
//
// The overlay does not carry these addresses. Containers of one node reach each other by them; to any other the router says unreachable, so that
// programs go on with IPv4. Towards the outside the gateway translates, as it does for IPv4. That the addresses are unique local ones has
// programs prefer IPv4 where a name has both families (RFC 6724: the label of such a source is not that of a global destination).

package node

import (
	"net/netip"
)

// egress6 is where the addresses come from: a unique local prefix with a random Global ID (RFC 4193 3.2).
var egress6 = netip.MustParsePrefix("fdfa:a976:e5a::/64")

// isEgress6 tells whether an attachment's IPv6 address is for the outside alone.
func isEgress6(addr6 netip.Prefix) bool { return addr6.IsValid() && egress6.Contains(addr6.Addr()) }

// egress6Of is the IPv6 address for the outside of an attachment; zero where it is to have none: it has another way out or none, somebody else configures it, the
// overlay carries IPv6 or cannot for its MTU, or the host has no IPv6 way out.
func (n *Node) egress6Of(s savedAttachment, me self) netip.Prefix {
	if s.Gateway || s.Loose || s.NoIPv6 || s.NoDefault || me.subnet6.IsValid() || me.mtu < minMTUv6 || !n.edges.outside6(n.cfg.OutboundIf) {
		return netip.Prefix{}
	}
	addr6, _ := addr6Of(s.Addr, egress6) // 64 bits have room for 32
	return addr6
}

// routed6 is the IPv6 address of an attachment that the route table has: none below the MTU of IPv6, which an attachment of a larger one
// may find itself under.
func (me self) routed6(s *savedAttachment) netip.Prefix {
	if isEgress6(s.Addr6) && me.mtu < minMTUv6 {
		return netip.Prefix{}
	}
	return s.Addr6
}
