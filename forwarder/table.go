// This file is the route table: immutable once built, looked into by every worker without a lock.

package forwarder

import (
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/gaissmai/bart"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// TableConfig is a whole route table, as the node wants it to be.
type TableConfig struct {
	// Gateway and Gateway6 are our own addresses in the overlay, the source of ICMP errors. An invalid address means
	// that the family has none and its errors are not sent.
	Gateway, Gateway6 netip.Addr
	Routes            []Route
}

// Route sends what goes to Prefix to Hop; the longest prefix wins.
type Route struct {
	Prefix netip.Prefix
	Hop    Hop
}

// Hop is a next hop: one of ToPort, ToOwnAt, ToPeer, ToGateway, ToEgress, UnreachableHost, UnreachableNet. Comparable.
type Hop struct {
	kind   hopKind
	port   *Port
	peer   PeerConfig
	sender packet.Sender
}

type hopKind uint8

const (
	hopNone hopKind = iota
	hopPort
	hopOwnAt
	hopPeer
	hopGateway
	hopEgress
	hopUnreachableHost
	hopUnreachableNet
)

// PeerConfig says how a peer is reached. Comparable: a peer keeps its counters for as long as its configuration stays.
type PeerConfig struct {
	// Addr is the peer's underlay address and port: IPv4, or IPv6 where the Router has an IPv6 address.
	Addr netip.AddrPort
	// MTU is the largest packet that the peer and the path to it take, in bytes. It may change without the counters' being lost.
	MTU int
	// AnyPort: the peer's datagrams may come from any source port (a stock flannel node). Otherwise only from Addr's.
	AnyPort bool
	// PartialChecksums: the peer takes TCP and UDP whose checksum covers the pseudo header alone. Only for peers that
	// believe the outer UDP checksum, as our own nodes do.
	PartialChecksums bool
	// Steers: the peer has several loops and steers trains to them by the inner destination, as this one does (steer.go).
	Steers bool
	// VTEP is the peer's MAC address, for a Router that speaks VXLAN.
	VTEP [6]byte
	// OuterChecksums: the peer's VXLAN datagrams always have a UDP checksum, so that the kernel has checked what is in them
	// (one of our own nodes). In the udp format every peer's have.
	OuterChecksums bool
}

// key is what makes a peer the same one.
func (c PeerConfig) key() PeerConfig {
	c.MTU = 0
	return c
}

// valid tells whether h leads anywhere.
func (h Hop) valid() bool {
	switch h.kind {
	case hopNone:
		return false
	case hopPort:
		return h.port != nil
	case hopOwnAt:
		return h.port != nil && h.sender != nil
	case hopGateway, hopEgress:
		return h.sender != nil
	}
	return true
}

// ToPort is the hop to an attachment's own address.
func ToPort(p *Port) Hop { return Hop{kind: hopPort, port: p} }

// ToPeer is the hop to a subnet that a peer holds.
func ToPeer(c PeerConfig) Hop { return Hop{kind: hopPeer, peer: c} }

// ToGateway is the hop to our own overlay addresses, which the stack answers, for containers here and on peers.
func ToGateway(s packet.Sender) Hop { return Hop{kind: hopGateway, sender: s} }

// ToEgress is the hop to everything outside the overlay, through the stack, for containers of this node alone.
func ToEgress(s packet.Sender) Hop { return Hop{kind: hopEgress, sender: s} }

// UnreachableHost and UnreachableNet answer with the ICMP error of that name: no such attachment in our subnet, no
// node that leases the destination.
var (
	UnreachableHost = Hop{kind: hopUnreachableHost}
	UnreachableNet  = Hop{kind: hopUnreachableNet}
)

// hop is a Hop as the packet path uses it: one per distinct destination in a table.
type hop struct {
	kind   hopKind
	port   *Port
	peer   *peer
	sender packet.Sender
	mtu    int // bytes, see mtuFor; 0 is no limit of the hop's own

	gateway *hop // of hopOwnAt: where peers' probes go
}

// minMTU6 is what every path of IPv6 carries (RFC 8200 5): no host has to send less.
const minMTU6 = header.IPv6MinimumMTU

// mtuFor is what a hop of that MTU is taken to carry of a family. Where it does not carry minMTU6, nobody is told to send less than
// that of IPv6, and what is longer gets lost in the underlay: counted, if it is this host that cannot send it (DropUnderlayTooBig).
func mtuFor(v4 bool, mtu int) int {
	if !v4 && 0 < mtu && mtu < minMTU6 {
		return minMTU6
	}
	return mtu
}

// peer is a remote node. Its counters outlive tables.
type peer struct {
	cfg     PeerConfig // its key
	family  family
	name    sockaddr
	headers [vxlanEncap]byte // in front of every packet to it, for a Router that speaks VXLAN

	watched                                        atomic.Bool // Router.PathEvents is to tell of the next packet
	sentPackets, sentBytes, recvPackets, recvBytes atomic.Uint64
}

// sent tells whether a datagram from outer is the peer's.
func (p *peer) sent(outer netip.AddrPort) bool {
	return outer == p.cfg.Addr || (p.cfg.AnyPort && outer.Addr() == p.cfg.Addr.Addr())
}

// table is what SetTable publishes.
type table struct {
	routes   bart.Table[*hop]
	gateway  netip.Addr
	gateway6 netip.Addr
	peers    map[PeerConfig]*peer // by key
}

// buildTable compiles c for a Router that speaks v and has the sockets u; peers that old has already are taken over with their
// counters.
func buildTable(c TableConfig, old *table, v *VXLAN, u *underlay) (*table, error) {
	t := &table{gateway: c.Gateway, gateway6: c.Gateway6, peers: make(map[PeerConfig]*peer)}
	hops := make(map[Hop]*hop)
	for _, r := range c.Routes {
		if !r.Prefix.IsValid() || !r.Hop.valid() {
			return nil, fmt.Errorf("route to %v has no prefix or no next hop", r.Prefix)
		}
		h := hops[r.Hop]
		if h == nil {
			h = &hop{kind: r.Hop.kind, port: r.Hop.port, sender: r.Hop.sender}
			switch h.kind {
			case hopOwnAt:
				h.gateway = &hop{kind: hopGateway, sender: h.sender}
				fallthrough
			case hopPort:
				h.mtu = r.Hop.port.cfg.MTU
			}
			if h.kind == hopPeer {
				pc := r.Hop.peer
				if err := checkPeerAddr(pc.Addr, u); err != nil {
					return nil, fmt.Errorf("route to %v: %w", r.Prefix, err)
				}
				if v != nil && !unicastMAC(pc.VTEP) {
					return nil, fmt.Errorf("route to %v: the peer's MAC address %x is not a unicast one", r.Prefix, pc.VTEP)
				}
				if old != nil {
					h.peer = old.peers[pc.key()]
				}
				if h.peer == nil {
					h.peer = t.peers[pc.key()]
				}
				if h.peer == nil {
					h.peer = &peer{cfg: pc.key(), family: familyOf(pc.Addr.Addr()), name: sockaddrOf(pc.Addr), headers: v.headers(pc.VTEP)}
					h.peer.watched.Store(true)
				}
				t.peers[pc.key()] = h.peer
				h.mtu = pc.MTU
			}
			hops[r.Hop] = h
		}
		t.routes.Insert(r.Prefix.Masked(), h)
	}
	return t, nil
}

// checkPeerAddr refuses an address that u could not send to.
func checkPeerAddr(peer netip.AddrPort, u *underlay) error {
	a := peer.Addr()
	switch {
	case !a.IsValid() || a.Is4In6() || a.Zone() != "" || peer.Port() == 0:
		return fmt.Errorf("peer address %v is not an IP address with a port", peer)
	case u[familyOf(a)] == nil:
		return fmt.Errorf("peer address %v is IPv6, and this node has no IPv6 address in the underlay", peer)
	}
	return nil
}

// lookup returns the next hop of a, or nil.
func (t *table) lookup(a netip.Addr) *hop {
	h, _ := t.routes.Lookup(a)
	return h
}
