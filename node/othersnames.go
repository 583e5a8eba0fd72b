// This file decides which names of other nodes are believed. Whoever can write to the store can write any record: one must not lead names, or the
// way back from addresses, to containers of somebody else or out of the overlay.

package node

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// believedNames is what is believed of the names that others have published; doubts are the sentences about the rest, each once.
func (n *Node) believedNamesLocked() (believed []lease.Name, doubts []string) {
	me := n.selfLocked()
	b := beliefs{me: me, held: subnetHolders(n.leases, me), ours: make(map[netip.Addr]bool)}
	for _, a := range n.attachments {
		for _, addr := range a.saved.addrs() {
			b.ours[addr] = true
		}
	}
	doubt := func(name lease.Name, addr netip.Addr, why string) {
		doubts = append(doubts, fmt.Sprintf("%q of node %s at %v: %s", name.Name, name.NodeID, addr, why))
	}
	for _, name := range n.known {
		if name.NodeID == n.id {
			continue
		}
		if why := b.against(name.Addr, name.NodeID, b.me.network, b.me.subnet); why != "" {
			doubt(name, name.Addr, why)
			continue
		}
		if name.Addr6.IsValid() {
			if why := b.against(name.Addr6, name.NodeID, b.me.network6, b.me.subnet6); why != "" {
				doubt(name, name.Addr6, why)
				name.Addr6 = netip.Addr{}
			}
		}
		believed = append(believed, name)
	}
	return believed, doubts
}

// beliefs is what names of other nodes are held against.
type beliefs struct {
	me   self
	held holders
	ours map[netip.Addr]bool // addresses of this node's containers, which may be of an earlier subnet
}

// against is what speaks against an address of another node in network, where subnet is ours; empty: nothing. A subnet that nobody is known to
// have may be the node's: leases and names come independently of each other.
func (b *beliefs) against(a netip.Addr, nodeID string, network, subnet netip.Prefix) string {
	switch {
	case !network.IsValid():
		return "the overlay does not have addresses of this family"
	case !network.Contains(a):
		return fmt.Sprintf("it is not in the network %v", network)
	case subnet.Contains(a) || b.ours[a]:
		return "it is an address of this node"
	}
	if who, ok := b.held.other(a, nodeID); ok {
		return "the subnet is leased to " + who
	}
	return ""
}

// holders are who holds which subnet, by the leases.
type holders struct {
	bits   []int // lengths of subnets that there are
	leases map[netip.Prefix][]*lease.Lease

	subnetLen, subnetLen6 int // that the network gives out
}

func subnetHolders(leases []lease.Lease, me self) holders {
	h := holders{leases: make(map[netip.Prefix][]*lease.Lease, len(leases)), subnetLen: me.subnetLen, subnetLen6: me.subnetLen6}
	for i := range leases {
		l := &leases[i]
		for _, p := range []netip.Prefix{l.Subnet, l.Subnet6} {
			if !p.IsValid() {
				continue
			}
			if !slices.Contains(h.bits, p.Bits()) {
				h.bits = append(h.bits, p.Bits())
			}
			h.leases[p.Masked()] = append(h.leases[p.Masked()], l)
		}
	}
	return h
}

// other says who has the subnet of a, if it is known and not nodeID. Of several whose subnets overlap it is the one that settleOverlaps sends
// packets to: a lease of everything makes nobody the holder of what others have.
func (h holders) other(a netip.Addr, nodeID string) (who string, ok bool) {
	var holder *lease.Lease
	fitting := false
	for _, bits := range h.bits {
		p, err := a.Prefix(bits)
		if err != nil {
			continue // too long for this family
		}
		fits := bits == h.subnetLen
		if a.Is6() {
			fits = bits == h.subnetLen6
		}
		for _, l := range h.leases[p] {
			if holder == nil || fits && !fitting || fits == fitting && l.ModRevision < holder.ModRevision {
				holder, fitting = l, fits
			}
		}
	}
	if holder == nil {
		return "", false
	}
	x := holder.Attrs.RootlessOvl
	switch {
	case x == nil:
		return fmt.Sprintf("a flannel host (%v)", holder.Attrs.PublicIP), true
	case x.NodeID == nodeID:
		return "", false
	}
	return fmt.Sprintf("node %s (%v)", x.NodeID, holder.Attrs.PublicIP), true
}

// tellDoubtsLocked logs what is new among doubts.
func (n *Node) tellDoubtsLocked(doubts []string) {
	for _, d := range doubts {
		if _, told := slices.BinarySearch(n.doubts, d); !told {
			n.log.Warn("passing over a name in the store", "name", d)
		}
	}
	slices.Sort(doubts)
	n.doubts = doubts
}
