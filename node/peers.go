// This file reads the leases of a snapshot as peers: where each node is, and why one cannot be sent to.

package node

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// minPeerMTU is the smallest overlay MTU that is believed of a peer: what every IPv4 host must take (RFC 791).
const minPeerMTU = 576

// self is what tells our own lease from those of the peers, and what peers' values are measured against.
type self struct {
	nodeID    string
	subnet    netip.Prefix // zero while no lease is held
	network   netip.Prefix
	public    netip.AddrPort // our public IP and underlay port
	mtu       int            // our overlay MTU, bytes
	stockPort int            // where stock flannel nodes listen: the port of the network config
}

// peer is another node as one lease describes it.
type peer struct {
	lease   lease.Lease
	addr    netip.AddrPort // where datagrams for it go
	mtu     int            // overlay MTU towards it, bytes
	stock   bool           // a flannel node
	partial bool           // takes partial checksums
	problem string         // why nothing is sent to it; empty when all is well
}

// config is the peer as the router knows it. A stock node's port may be translated on the way, ours is published as it is.
func (p peer) config() forwarder.PeerConfig {
	return forwarder.PeerConfig{Addr: p.addr, MTU: p.mtu, AnyPort: p.stock, PartialChecksums: p.partial}
}

// peersOf returns one peer per lease that is not ours, in the order of the snapshot. What others have put into the store is
// not trusted: a lease that makes no sense gets a problem, and the rest of the overlay goes on.
func peersOf(leases []lease.Lease, me self) []peer {
	var peers []peer
	owner := make(map[netip.Prefix]bool)
	for _, l := range leases {
		ext := l.Attrs.RootlessOvl
		if ext != nil && ext.NodeID == me.nodeID {
			continue
		}
		p := peer{lease: l, stock: ext == nil, mtu: me.mtu}
		port := me.stockPort
		if ext != nil {
			if ext.Port != 0 {
				port = ext.Port
			}
			p.partial = slices.Contains(ext.Caps, lease.CapPartialChecksums)
			if ext.MTU >= minPeerMTU {
				p.mtu = min(p.mtu, ext.MTU)
			}
		}
		p.problem = problemOf(l, port, me)
		if p.problem == "" && owner[l.Subnet.Masked()] {
			p.problem = "another lease names the same subnet"
		}
		if p.problem == "" {
			owner[l.Subnet.Masked()] = true
			p.addr = netip.AddrPortFrom(l.Attrs.PublicIP, uint16(port))
		}
		peers = append(peers, p)
	}
	return peers
}

func problemOf(l lease.Lease, port int, me self) string {
	public := l.Attrs.PublicIP
	switch {
	case !l.Subnet.IsValid() || !l.Subnet.Addr().Is4():
		return "its lease names no IPv4 subnet"
	case !inside(me.network, l.Subnet):
		return fmt.Sprintf("its subnet is outside the network %v", me.network)
	case me.subnet.IsValid() && me.subnet.Overlaps(l.Subnet):
		return fmt.Sprintf("its subnet overlaps ours, %v", me.subnet)
	case !public.Is4() || public.IsUnspecified() || public.IsMulticast() || public == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Sprintf("its public IP %v cannot be sent to", public)
	case port < 1 || port > 65535:
		return fmt.Sprintf("its port %d is none", port)
	case netip.AddrPortFrom(public, uint16(port)) == me.public:
		return fmt.Sprintf("its address %v is our own", me.public)
	}
	return ""
}

// inside tells whether all of p lies within outer.
func inside(outer, p netip.Prefix) bool {
	return p.Bits() >= outer.Bits() && outer.Contains(p.Addr())
}
