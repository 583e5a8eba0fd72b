// This file gives out the addresses of our own subnet to attachments.

package node

import (
	"errors"
	"fmt"
	"net/netip"
)

// Why an address cannot be had.
var (
	ErrAddrInUse    = errors.New("address in use")
	ErrAddrInvalid  = errors.New("address cannot be used")
	ErrNoAddrsLeft  = errors.New("no addresses left")
	errNoSubnetHeld = errors.New("no subnet is held yet")
)

// pool knows which addresses are taken, and by whom. It gives out the next free address after the last one given, not
// the lowest: an address that was just freed is the last to come round again, so that peers' and clients' memory of
// its old owner has faded. It is not safe for concurrent use.
type pool struct {
	subnet netip.Prefix          // ours; zero until a lease is held
	last   netip.Addr            // the last address given by any; may lie outside subnet
	taken  map[netip.Addr]string // address -> name of the attachment; may hold addresses outside subnet
	// reserved addresses are given to those who name them, and by any to nobody; they may lie outside subnet.
	reserved map[netip.Addr]savedAddress
}

func newPool() *pool {
	return &pool{taken: make(map[netip.Addr]string), reserved: make(map[netip.Addr]savedAddress)}
}

// network and gateway are the .0 and .1 of a subnet: both belong to the gateway (stock flannel hosts speak from .0).
func networkAddr(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr() }
func gatewayAddr(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr().Next() }

// broadcastAddr is the last address of an IPv4 subnet.
func broadcastAddr(subnet netip.Prefix) netip.Addr {
	a := subnet.Masked().Addr().As4()
	for bit := subnet.Bits(); bit < 32; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(a)
}

// take marks addr as name's, or says why it cannot be: ErrAddrInvalid or ErrAddrInUse.
func (p *pool) take(addr netip.Addr, name string) error {
	if err := p.check(addr); err != nil {
		return err
	}
	if owner, ok := p.taken[addr]; ok {
		return fmt.Errorf("%v: %w by attachment %q", addr, ErrAddrInUse, owner)
	}
	p.taken[addr] = name
	return nil
}

// check tells whether an attachment may have addr, be it free or not: errNoSubnetHeld, ErrAddrInvalid.
func (p *pool) check(addr netip.Addr) error {
	switch {
	case !p.subnet.IsValid():
		return errNoSubnetHeld
	case !addr.Is4():
		return fmt.Errorf("%v: %w: an IPv4 address of %v is needed", addr, ErrAddrInvalid, p.subnet)
	case !p.subnet.Contains(addr):
		return fmt.Errorf("%v: %w: it is outside this node's subnet %v", addr, ErrAddrInvalid, p.subnet)
	case addr == networkAddr(p.subnet), addr == gatewayAddr(p.subnet):
		return fmt.Errorf("%v: %w: it belongs to the gateway", addr, ErrAddrInvalid)
	case addr == broadcastAddr(p.subnet):
		return fmt.Errorf("%v: %w: it is the broadcast address of %v", addr, ErrAddrInvalid, p.subnet)
	}
	return nil
}

// any takes a free address for name, or says ErrNoAddrsLeft.
func (p *pool) any(name string) (netip.Addr, error) {
	addr, err := p.next()
	if err == nil {
		p.taken[addr] = name
	}
	return addr, err
}

// next is the address that is given out next, or ErrNoAddrsLeft. It counts as given out.
func (p *pool) next() (netip.Addr, error) {
	if !p.subnet.IsValid() {
		return netip.Addr{}, errNoSubnetHeld
	}
	first, end := gatewayAddr(p.subnet).Next(), broadcastAddr(p.subnet)
	addr := first
	if p.last.IsValid() && p.subnet.Contains(p.last) {
		addr = p.last.Next()
	}
	for range 1 << (32 - p.subnet.Bits()) {
		if !p.subnet.Contains(addr) || addr == end || addr.Less(first) {
			addr = first
		}
		_, taken := p.taken[addr]
		_, kept := p.reserved[addr]
		if !taken && !kept && addr != end {
			p.last = addr
			return addr, nil
		}
		addr = addr.Next()
	}
	return netip.Addr{}, fmt.Errorf("%w in %v: all %d are attached or reserved; detach one (`rootless-ovl addresses` lists those that are reserved), or give nodes larger subnets (SubnetLen in the network config)",
		ErrNoAddrsLeft, p.subnet, p.size())
}

// size is how many addresses the subnet has for attachments.
func (p *pool) size() int { return 1<<(32-p.subnet.Bits()) - 3 }

// left is how many of them nobody has and nobody has reserved.
func (p *pool) left() int {
	if !p.subnet.IsValid() {
		return 0
	}
	left := p.size()
	ours := func(a netip.Addr) bool {
		return p.subnet.Contains(a) && a != networkAddr(p.subnet) && a != gatewayAddr(p.subnet) && a != broadcastAddr(p.subnet)
	}
	for a := range p.taken {
		if ours(a) {
			left--
		}
	}
	for a := range p.reserved {
		if _, taken := p.taken[a]; !taken && ours(a) {
			left--
		}
	}
	return left
}

// keep marks an address of an attachment that lives on from before, wherever it lies: the subnet may have changed under it.
func (p *pool) keep(addr netip.Addr, name string) error {
	if owner, ok := p.taken[addr]; ok {
		return fmt.Errorf("%v: %w by attachment %q", addr, ErrAddrInUse, owner)
	}
	p.taken[addr] = name
	return nil
}

// free gives addr back.
func (p *pool) free(addr netip.Addr) { delete(p.taken, addr) }
