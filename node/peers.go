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
	nodeID     string
	subnet     netip.Prefix // zero while no lease is held
	subnet6    netip.Prefix // likewise, and without IPv6 in the overlay
	network    netip.Prefix
	network6   netip.Prefix     // zero without IPv6 in the overlay
	public     netip.AddrPort   // our public IP and underlay port
	public6    netip.AddrPort   // likewise over IPv6; zero without it
	mtu        int              // our overlay MTU, bytes
	vxlan      *forwarder.VXLAN // of the network; nil in a udp one
	stockPort  int              // where stock flannel nodes listen: the port of the network config
	subnetLen  int              // prefix length of a node's subnet, of the network config
	subnetLen6 int
	alloc      bool // the network's backend is alloc
}

// isFor tells whether l, whose holder would receive on port, is a reservation for us who hold another lease.
func (me self) isFor(l lease.Lease, port int) bool {
	return l.Reservation && l.Attrs.RootlessOvl == nil && me.subnet.IsValid() && netip.AddrPortFrom(l.Attrs.PublicIP, uint16(port)) == me.public
}

// peer is another node as one lease describes it.
type peer struct {
	lease   lease.Lease
	mtu     int  // of the two nodes, the smaller overlay MTU, bytes
	stock   bool // a flannel node
	alloc   bool // in a network whose backend is alloc
	partial bool // takes partial checksums
	steers  bool // steers trains to its loops by the inner destination
	forUs   bool // a reservation for this node, which holds another subnet

	way     // for IPv4; its problem is the peer's
	v6  way // for IPv6; zero without IPv6 in the overlay
}

// way is how packets of one family get to a peer.
type way struct {
	subnet  netip.Prefix   // the peer's
	addr    netip.AddrPort // where datagrams go; zero with a problem
	pathMTU int            // what the path carries of the peer's MTU; 0: not asked yet
	vtep    [6]byte        // its MAC address in a vxlan network
	problem string         // why nothing is sent there; empty when it is
	doubt   string         // why what is sent may get lost all the same; empty when all is well
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

// where is, for the log, what the peer has and where packets for it go, and then more.
func (p peer) where(more ...any) []any {
	attrs := []any{"subnet", p.lease.Subnet, "addr", p.addr}
	if p.v6.addr.IsValid() {
		attrs = append(attrs, "subnet6", p.v6.subnet, "addr6", p.v6.addr)
	}
	return append(attrs, more...)
}

// kind is what the peer runs, for the log.
func (p peer) kind() string {
	if p.stock {
		return "flannel"
	}
	return "rootless-ovl"
}

// ways are those on which something is sent to the peer.
func (p peer) ways() (usable []way) {
	for _, w := range []way{p.way, p.v6} {
		if w.addr.IsValid() {
			usable = append(usable, w)
		}
	}
	return usable
}

// trouble is what is wrong with the peer, for people.
func (p peer) trouble() string {
	if p.v6.problem != "" && p.problem == "" {
		return "no IPv6: " + p.v6.problem
	}
	return cmp.Or(p.problem, p.doubt, p.v6.doubt)
}

// config is a way to the peer as the router knows it. A stock node's port may be translated on the way, and a kernel's VXLAN device
// chooses one for each flow; ours is published as it is. A kernel may leave out the outer checksum of VXLAN, we never do.
func (p peer) config(w way) forwarder.PeerConfig {
	return forwarder.PeerConfig{
		Addr: w.addr, MTU: cmp.Or(w.pathMTU, p.mtu), AnyPort: p.stock, PartialChecksums: p.partial, Steers: p.steers,
		VTEP: w.vtep, OuterChecksums: !p.stock && w.vtep != [6]byte{},
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
		p.way = wayTo(l, port, me)
		p.forUs = me.isFor(l, port)
		if t := p.backend(); t != backendUDP && me.vxlan == nil && p.problem == "" {
			p.doubt = fmt.Sprintf("its lease is of the backend %.32q, and this network's is udp: packets are sent to %v all the same, but it may not listen there", t, p.addr)
		}
		if me.network6.IsValid() && p.problem == "" {
			p.v6 = way6To(l, port, p.mtu, me)
		}
		peers = append(peers, p)
	}
	settleOverlaps(peers, func(p *peer) *way { return &p.way }, me.subnetLen)
	for i, p := range peers {
		if p.problem != "" { // before it could take its IPv6 subnet from another
			peers[i].v6 = way{}
		}
	}
	settleOverlaps(peers, func(p *peer) *way { return &p.v6 }, me.subnetLen6)
	return peers
}

// settleOverlaps gives every address of a family to one peer at most, and the others a problem: first come those whose subnet is of
// the length that the network gives out, then the older ones.
func settleOverlaps(peers []peer, of func(*peer) *way, subnetLen int) {
	var order []*peer
	for i := range peers {
		if of(&peers[i]).addr.IsValid() {
			order = append(order, &peers[i])
		}
	}
	slices.SortStableFunc(order, func(a, b *peer) int {
		if fits := of(a).subnet.Bits() == subnetLen; fits != (of(b).subnet.Bits() == subnetLen) {
			if fits {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.lease.ModRevision, b.lease.ModRevision)
	})
	var settled bart.Table[*way]
	for _, p := range order {
		w := of(p)
		if settled.OverlapsPrefix(w.subnet) {
			*w = way{subnet: w.subnet, problem: fmt.Sprintf("its subnet overlaps that of another peer, %v", overlapping(&settled, w.subnet))}
			continue
		}
		settled.Insert(w.subnet, w)
	}
}

// overlapping names one of the peers whose subnet overlaps.
func overlapping(settled *bart.Table[*way], subnet netip.Prefix) string {
	for _, w := range settled.Supernets(subnet) {
		return w.String()
	}
	for _, w := range settled.Subnets(subnet) {
		return w.String()
	}
	return "" // it overlaps
}

func (w *way) String() string { return fmt.Sprintf("%v at %v", w.subnet, w.addr) }

// wayTo is the way for IPv4 packets to the holder of l, which receives on port.
func wayTo(l lease.Lease, port int, me self) way {
	public, subnet := l.Attrs.PublicIP, l.Subnet.Masked()
	w := way{subnet: subnet}
	switch {
	case me.alloc:
		w.problem = noForwarding
	case !subnet.IsValid() || !subnet.Addr().Is4():
		w.problem = "its lease names no IPv4 subnet"
	case !inside(me.network, subnet):
		w.problem = fmt.Sprintf("its subnet is outside the network %v", me.network)
	case me.subnet.IsValid() && me.subnet.Overlaps(subnet):
		w.problem = fmt.Sprintf("its subnet overlaps ours, %v", me.subnet)
	case !public.IsValid():
		w.problem = "its lease names no public IP"
	case !reachable(public, me.public.Addr()):
		w.problem = fmt.Sprintf("its public IP %v cannot be sent to", public)
	case port < 1 || port > 65535:
		w.problem = fmt.Sprintf("its port %d is none", port)
	case me.isFor(l, port):
		w.problem = fmt.Sprintf("it is reserved for this node, which holds %v: to move, stop the node, delete the key of its lease from the store (subnets/%s) and start it again", me.subnet, lease.Key(me.subnet, me.subnet6))
	case netip.AddrPortFrom(public, uint16(port)) == me.public:
		w.problem = fmt.Sprintf("its address %v is our own", me.public)
	case me.vxlan != nil:
		if w.problem = notVXLAN(l.Attrs); w.problem == "" {
			w.vtep, w.problem, w.doubt = vtepOf("BackendData", l.Attrs.BackendData, me.vxlan)
		}
	}
	if w.problem == "" {
		w.addr = netip.AddrPortFrom(public, uint16(port))
	}
	return w
}

// way6To is the way for IPv6 packets to the holder of l, whose overlay MTU is mtu bytes and whose IPv4 way has no problem.
func way6To(l lease.Lease, port, mtu int, me self) way {
	public, subnet := l.Attrs.PublicIPv6, l.Subnet6.Masked()
	w := way{subnet: subnet}
	switch {
	case !subnet.IsValid():
		w.problem = "its lease names no IPv6 subnet"
	case !inside(me.network6, subnet):
		w.problem = fmt.Sprintf("its subnet %v is outside the network %v", subnet, me.network6)
	case me.subnet6.IsValid() && me.subnet6.Overlaps(subnet):
		w.problem = fmt.Sprintf("its subnet %v overlaps ours, %v", subnet, me.subnet6)
	case !public.IsValid():
		w.problem = "its lease names no PublicIPv6"
	case !reachable6(public, me.public6.Addr()):
		w.problem = fmt.Sprintf("its PublicIPv6 %v cannot be sent to", public)
	case netip.AddrPortFrom(public, uint16(port)) == me.public6:
		w.problem = fmt.Sprintf("its address %v is our own", me.public6)
	case mtu < minMTUv6:
		w.problem = fmt.Sprintf("its overlay MTU %d is below the %d of IPv6", mtu, minMTUv6)
	case len(l.Attrs.BackendV6Data) == 0:
		w.problem = "its lease has no BackendV6Data, which holds the MAC address of its VTEP for IPv6"
	default:
		w.vtep, w.problem, w.doubt = vtepOf("BackendV6Data", l.Attrs.BackendV6Data, me.vxlan)
	}
	if w.problem == "" {
		w.addr = netip.AddrPortFrom(public, uint16(port))
	}
	return w
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

// reachable6 is reachable for IPv6. A link-local address says nothing without its interface.
func reachable6(public, own netip.Addr) bool {
	return !public.IsMulticast() && !public.IsUnspecified() && !public.IsLinkLocalUnicast() && (!public.IsLoopback() || own.IsLoopback())
}

// inside tells whether all of p lies within outer.
func inside(outer, p netip.Prefix) bool {
	return p.Bits() >= outer.Bits() && outer.Contains(p.Addr())
}

// pathTargets are the ways to the peers as the prober must know them. Our own subnets are where the probes come from.
func pathTargets(peers []peer, own subnets) []pathTarget {
	var targets []pathTarget
	for _, p := range peers {
		for _, w := range p.ways() {
			from, least := own.v4, minPeerMTU
			if w.subnet.Addr().Is6() {
				from, least = own.v6, minMTUv6
			}
			if !from.IsValid() {
				continue
			}
			t := pathTarget{config: p.config(w), source: gatewayAddr(from), answers: [2]netip.Addr{gatewayAddr(w.subnet)}, least: least}
			t.config.MTU = p.mtu
			if p.stock { // flannel's own device has .0, and .1 is there with a bridge
				t.answers = [2]netip.Addr{networkAddr(w.subnet), t.answers[0]}
			}
			targets = append(targets, t)
		}
	}
	return targets
}
