// This file keeps addresses for engines, whose plugins choose a container's address before there is anything to attach. A reserved address
// goes to whoever names it when he attaches; when that is detached it stays reserved, until it is released.

package node

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// savedAddress is one reserved address as it is kept on disk.
type savedAddress struct {
	Addr  netip.Prefix `json:"addr"` // with the length that the subnet had
	Owner string       `json:"owner,omitempty"`
	Since time.Time    `json:"since"`
}

// ReserveAddress keeps an address. Its owner gets it again if he asks again.
func (n *Node) ReserveAddress(ctx context.Context, r api.AddressRequest) (api.Address, error) {
	if err := r.Validate(); err != nil {
		return api.Address{}, err
	}
	if r.Addr != "" {
		if err := n.awaitLeaving(ctx, api.AttachRequest{Addr: r.Addr}); err != nil {
			return api.Address{}, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s, err := n.reserveAddressLocked(r)
	if err != nil {
		what := "reserve an address"
		if r.Addr != "" {
			what = "reserve " + r.Addr
		}
		return api.Address{}, api.Errorf(codeOf(err), "%s: %w", what, err)
	}
	return n.describeAddressLocked(s), nil
}

func (n *Node) reserveAddressLocked(r api.AddressRequest) (savedAddress, error) {
	if err := n.takesLocked(); err != nil {
		return savedAddress{}, err
	}
	if err := n.excludedLocked(false); err != nil {
		return savedAddress{}, err
	}
	addr, err := n.chooseReservedLocked(r)
	if err != nil {
		return savedAddress{}, err
	}
	if s, ok := n.pool.reserved[addr]; ok {
		return s, nil
	}
	s := savedAddress{Addr: netip.PrefixFrom(addr, n.pool.subnet.Bits()), Owner: r.Owner, Since: time.Now()}
	n.pool.reserved[addr] = s
	if err := n.saveAttachmentsLocked(); err != nil {
		delete(n.pool.reserved, addr)
		return savedAddress{}, err
	}
	return s, nil
}

// chooseReservedLocked is an address that r's owner may have, or has reserved already.
func (n *Node) chooseReservedLocked(r api.AddressRequest) (netip.Addr, error) {
	if r.Addr == "" {
		return n.pool.next()
	}
	addr, err := netip.ParseAddr(r.Addr)
	if err != nil {
		return addr, api.Errorf(api.CodeInvalid, "address: %w", err)
	}
	if err := n.pool.check(addr); err != nil {
		return addr, err
	}
	if s, ok := n.pool.reserved[addr]; ok {
		if r.Owner != "" && s.Owner == r.Owner {
			return addr, nil
		}
		return addr, fmt.Errorf("%w: it is reserved%s: choose another, or release it (`rootless-ovl addresses --release %v`) if nobody has it any more", ErrAddrInUse, forOwner(s.Owner), addr)
	}
	if name, ok := n.pool.taken[addr]; ok {
		return addr, fmt.Errorf("%w by attachment %q: choose another, or detach that", ErrAddrInUse, name)
	}
	return addr, nil
}

func forOwner(owner string) string {
	if owner == "" {
		return ""
	}
	return " for " + owner
}

// ReleaseAddress gives a reserved address back. An attachment that has it keeps it to its end.
func (n *Node) ReleaseAddress(_ context.Context, addr string) error {
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return api.Errorf(api.CodeInvalid, "release %q: it is not an address", addr)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.takesLocked(); err != nil { // what the last daemon had reserved may not be known yet
		return err
	}
	s, ok := n.pool.reserved[a]
	if !ok {
		return api.Errorf(api.CodeNotFound, "release %v: it is not reserved: `rootless-ovl addresses` lists those that are", a)
	}
	delete(n.pool.reserved, a)
	if err := n.saveAttachmentsLocked(); err != nil {
		n.pool.reserved[a] = s
		return err
	}
	return nil
}

// Addresses lists what is reserved, in the order of the addresses.
func (n *Node) Addresses(context.Context) ([]api.Address, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.takesLocked(); err != nil {
		return nil, err
	}
	var list []api.Address
	for _, s := range n.savedAddressesLocked() {
		list = append(list, n.describeAddressLocked(s))
	}
	return list, nil
}

func (n *Node) savedAddressesLocked() []savedAddress {
	return slices.SortedFunc(maps.Values(n.pool.reserved), func(a, b savedAddress) int { return a.Addr.Addr().Compare(b.Addr.Addr()) })
}

func (n *Node) describeAddressLocked(s savedAddress) api.Address {
	d := api.Address{
		Addr:       s.Addr.String(),
		Gateway:    gatewayAddr(s.Addr).String(),
		Owner:      s.Owner,
		Attachment: n.pool.taken[s.Addr.Addr()],
		Since:      s.Since,
	}
	me := n.selfLocked()
	if me.subnet6.IsValid() && me.subnet.Contains(s.Addr.Addr()) {
		if addr6, ok := addr6Of(s.Addr, me.subnet6); ok {
			d.Addr6, d.Gateway6 = addr6.String(), gatewayAddr(addr6).String()
		}
	}
	return d
}

// takeUpAddressesLocked takes up what the last daemon had reserved.
func (n *Node) takeUpAddressesLocked(saved []savedAddress) {
	for _, s := range saved {
		if !s.Addr.Addr().Is4() || len(s.Owner) > 255 || strings.ContainsFunc(s.Owner, func(c rune) bool { return c < ' ' }) {
			n.log.Warn("a reserved address is dropped: its entry in the state file is not valid", "addr", s.Addr)
			continue
		}
		n.pool.reserved[s.Addr.Addr()] = s
	}
}
