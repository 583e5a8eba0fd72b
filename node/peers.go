// This file reads the leases of a snapshot as peers: where each node is, and why one cannot be sent to.

package node

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

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
	public    netip.AddrPort   // our public IP and underlay port
	mtu       int              // our overlay MTU, bytes
	vxlan     *forwarder.VXLAN // of the network; nil in a udp one
	stockPort int              // where stock flannel nodes listen: the port of the network config
	subnetLen int              // prefix length of a node's subnet, of the network config
	alloc     bool             // the network's backend is alloc
}

// peer is another node as one lease describes it.
type peer struct {
	lease   lease.Lease
	addr    netip.AddrPort // where datagrams for it go
	mtu     int            // of the two nodes, the smaller overlay MTU, bytes
	pathMTU int            // what the path carries of that; 0: not asked yet
	stock   bool           // a flannel node
	alloc   bool           // in a network whose backend is alloc
	partial bool           // takes partial checksums
	steers  bool           // steers trains to its loops by the inner destination
	vtep    [6]byte        // its MAC address in a vxlan network
	problem string         // why nothing is sent to it; empty when it is
	doubt   string         // why what is sent to it may get lost all the same; empty when all is well
}

// backend is flannel's word for what the peer speaks, by its own lease.
func (p peer) backend() string {
	if t := p.lease.Attrs.BackendType; t != "" {
		return t
	}
	if p.alloc {
		return backendAlloc
	}
	return backendUDP // which flannel does not write out, as it does not alloc
}

// publicIP is the address that its lease names, for the log.
func (p peer) publicIP() string {
	if a := p.lease.Attrs.PublicIP; a.IsValid() {
		return a.String()
	}
	return "none"
}

// kind is what the peer runs, for the log.
func (p peer) kind() string {
	if p.stock {
		return "flannel"
	}
	return "rootless-ovl"
}

// config is the peer as the router knows it. A stock node's port may be translated on the way, and a kernel's VXLAN device chooses
// one for each flow; ours is published as it is. A kernel may leave out the outer checksum of VXLAN, we never do.
func (p peer) config() forwarder.PeerConfig {
	return forwarder.PeerConfig{
		Addr: p.addr, MTU: cmp.Or(p.pathMTU, p.mtu), AnyPort: p.stock, PartialChecksums: p.partial, Steers: p.steers,
		VTEP: p.vtep, OuterChecksums: !p.stock && p.vtep != [6]byte{},
	}
}

// peersOf returns one peer per lease that is not ours, in the order of the snapshot. What others have put into the store is
// not trusted: a lease that makes no sense gets a problem, and the rest of the overlay goes on. In a udp network the backend
// of a lease is not asked for, as flannel does not either, but one that is not udp is told of; in a vxlan network others
// are passed over, as flannel does.
func peersOf(leases []lease.Lease, me self) []peer {
	var peers []peer
	for _, l := range leases {
		ext := l.Attrs.RootlessOvl
		if ext != nil && ext.NodeID == me.nodeID {
			continue
		}
		p := peer{lease: l, stock: ext == nil, mtu: me.mtu, alloc: me.alloc}
		port := me.stockPort
		if ext != nil {
			if ext.Port != 0 {
				port = ext.Port
			}
			p.partial = slices.Contains(ext.Caps, lease.CapPartialChecksums)
			p.steers = slices.Contains(ext.Caps, lease.CapSteers)
			if ext.MTU >= minPeerMTU {
				p.mtu = min(p.mtu, ext.MTU)
			}
		}
		p.problem = problemOf(l, port, me)
		if me.vxlan != nil && p.problem == "" {
			p.vtep, p.problem, p.doubt = vtepOf(l.Attrs, me.vxlan)
		}
		if p.problem == "" {
			p.addr = netip.AddrPortFrom(l.Attrs.PublicIP, uint16(port))
		}
		if t := p.backend(); t != backendUDP && me.vxlan == nil && p.problem == "" {
			p.doubt = fmt.Sprintf("its lease is of the backend %.32q, and this network's is udp: packets are sent to %v all the same, but it may not listen there", t, p.addr)
		}
		peers = append(peers, p)
	}
	settleOverlaps(peers, me.subnetLen)
	return peers
}

// settleOverlaps gives every address to one peer at most, and the others a problem: first come those whose subnet is of the
// length that the network gives out, then the older ones.
func settleOverlaps(peers []peer, subnetLen int) {
	var order []*peer
	for i := range peers {
		if peers[i].problem == "" {
			order = append(order, &peers[i])
		}
	}
	slices.SortStableFunc(order, func(a, b *peer) int {
		if fits := a.lease.Subnet.Bits() == subnetLen; fits != (b.lease.Subnet.Bits() == subnetLen) {
			if fits {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.lease.ModRevision, b.lease.ModRevision)
	})
	var settled bart.Table[*peer]
	for _, p := range order {
		subnet := p.lease.Subnet.Masked()
		if settled.OverlapsPrefix(subnet) {
			p.problem = fmt.Sprintf("its subnet overlaps that of another peer, %v", overlapping(&settled, subnet))
			p.addr, p.doubt = netip.AddrPort{}, ""
			continue
		}
		settled.Insert(subnet, p)
	}
}

// overlapping names one of the peers whose subnet overlaps.
func overlapping(settled *bart.Table[*peer], subnet netip.Prefix) string {
	for _, p := range settled.Supernets(subnet) {
		return p.name()
	}
	for _, p := range settled.Subnets(subnet) {
		return p.name()
	}
	return "" // it overlaps
}

func (p peer) name() string { return fmt.Sprintf("%v at %v", p.lease.Subnet, p.addr) }

func problemOf(l lease.Lease, port int, me self) string {
	public := l.Attrs.PublicIP
	switch {
	case me.alloc:
		return noForwarding
	case !l.Subnet.IsValid() || !l.Subnet.Addr().Is4():
		return "its lease names no IPv4 subnet"
	case !inside(me.network, l.Subnet):
		return fmt.Sprintf("its subnet is outside the network %v", me.network)
	case me.subnet.IsValid() && me.subnet.Overlaps(l.Subnet):
		return fmt.Sprintf("its subnet overlaps ours, %v", me.subnet)
	case !public.IsValid():
		return "its lease names no public IP"
	case !reachable(public, me.public.Addr()):
		return fmt.Sprintf("its public IP %v cannot be sent to", public)
	case port < 1 || port > 65535:
		return fmt.Sprintf("its port %d is none", port)
	case netip.AddrPortFrom(public, uint16(port)) == me.public:
		return fmt.Sprintf("its address %v is our own", me.public)
	}
	return ""
}

var (
	thisNetwork = netip.MustParsePrefix("0.0.0.0/8")   // RFC 791
	reserved    = netip.MustParsePrefix("240.0.0.0/4") // RFC 1112, with the broadcast address
)

// reachable tells whether a datagram from this host, whose own public IP is own, could ever arrive at public. Loopback and
// link-local addresses are good among nodes that have such ones themselves.
func reachable(public, own netip.Addr) bool {
	switch {
	case !public.Is4(), public.IsMulticast(), thisNetwork.Contains(public), reserved.Contains(public):
		return false
	case public.IsLoopback():
		return own.IsLoopback()
	case public.IsLinkLocalUnicast():
		return own.IsLinkLocalUnicast()
	}
	return true
}

// inside tells whether all of p lies within outer.
func inside(outer, p netip.Prefix) bool {
	return p.Bits() >= outer.Bits() && outer.Contains(p.Addr())
}

// pathTargets are the peers as the prober must know them.
func pathTargets(peers []peer) []pathTarget {
	var targets []pathTarget
	for _, p := range peers {
		if p.problem != "" {
			continue
		}
		t := pathTarget{config: p.config(), answers: [2]netip.Addr{gatewayAddr(p.lease.Subnet.Masked())}}
		t.config.MTU = p.mtu
		if p.stock { // flannel's own device has .0, and .1 is there with a bridge
			t.answers = [2]netip.Addr{networkAddr(p.lease.Subnet.Masked()), t.answers[0]}
		}
		targets = append(targets, t)
	}
	return targets
}
