// This file is the IPAM driver: the one pool is the node's subnet, and an address is a reservation of the node's.

package docker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	addressSpaceLocal  = "rootless-ovl-local"
	addressSpaceGlobal = "rootless-ovl-global"

	// reservationOwner is whose reservations are docker's. It does not say for what endpoint it asks.
	reservationOwner = "docker"

	// giftLimit is how long an address is one container's before it is attached. dockerd creates the endpoint at once; should its answer have
	// been lost, the address can be had again after this.
	giftLimit = 30 * time.Second
)

// gift says that a dockerd has an address for a container that is not attached yet. A dockerd after it gets the address again.
type gift struct {
	pid   int
	until time.Time
}

// give notes that dockerd has an address; it is false if the same dockerd has it already, for another container.
func (d *Driver) give(addr string, pid int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(d.given, func(_ string, g gift) bool { return now.After(g.until) })
	if g, is := d.given[addr]; is && g.pid == pid {
		return false
	}
	d.given[addr] = gift{pid, now.Add(giftLimit)}
	return true
}

func (d *Driver) takeBack(addr string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.given, addr)
}

// requestPool gives the node's subnet, and with it its gateway. Several networks of docker's may be of the one pool.
func (d *Driver) requestPool(ctx context.Context, r *poolRequest) (any, error) {
	if r.V6 {
		return nil, errIPv6
	}
	if r.SubPool != "" {
		return nil, fmt.Errorf("--ip-range %s: addresses come from all of the node's subnet: leave it out", clip(r.SubPool))
	}
	s, err := d.ready(ctx)
	if err != nil {
		return nil, err
	}
	subnet, err := netip.ParsePrefix(s.Subnet)
	if err != nil {
		return nil, fmt.Errorf("the node's subnet: %w", err)
	}
	if asked, err := netip.ParsePrefix(r.Pool); r.Pool != "" && (err != nil || asked.Masked() != subnet) {
		return nil, fmt.Errorf("--subnet %s is not this node's, %s, from which peers reach its containers: leave --subnet out", clip(r.Pool), s.Subnet)
	}
	return poolResponse{
		PoolID: s.Subnet,
		Pool:   s.Subnet,
		Data:   map[string]string{labelGateway: fmt.Sprintf("%s/%d", s.Gateway, subnet.Bits())},
	}, nil
}

// requestAddress reserves an address, that which is asked for or any.
func (d *Driver) requestAddress(ctx context.Context, r *addressRequest) (any, error) {
	s, err := d.ready(ctx)
	if err != nil {
		return nil, err
	}
	if r.PoolID != s.Subnet {
		return nil, movedError(r.PoolID, s, howToRemake("", options{})) // docker does not say for which network
	}
	subnet, err := netip.ParsePrefix(s.Subnet)
	if err != nil {
		return nil, fmt.Errorf("the node's subnet: %w", err)
	}
	var asked string
	if r.Address != "" {
		a, err := addrOf(r.Address)
		if err != nil || !a.Is4() {
			return nil, fmt.Errorf("%q is not an IPv4 address", clip(r.Address))
		}
		asked = a.String()
	}
	if r.Options[addressTypeKey] == labelGateway {
		if asked != "" && asked != s.Gateway {
			return nil, fmt.Errorf("--gateway %s: the gateway is the node's, %s: leave it out", asked, s.Gateway)
		}
		return addressResponse{fmt.Sprintf("%s/%d", s.Gateway, subnet.Bits())}, nil
	}
	pid, _ := ctx.Value(pidKey{}).(int)
	if asked == "" {
		return d.anyAddress(ctx, pid)
	}
	if !d.give(asked, pid) { // before it is reserved: the reservation is one for all of docker
		return nil, fmt.Errorf("address %s is another container's, which is being started: choose another with --ip", asked)
	}
	got, err := d.api.ReserveAddress(ctx, api.AddressRequest{Addr: asked, Owner: reservationOwner})
	switch {
	case err != nil:
		d.takeBack(asked)
		return nil, err
	case got.Attachment != "": // docker's own reservation, which it gets again
		d.takeBack(asked)
		return nil, fmt.Errorf("address %s is in use by %q: choose another with --ip", asked, got.Attachment)
	}
	return addressResponse{got.Addr}, nil
}

// anyAddress reserves a free one. Somebody may ask for just that before it is noted; then he has it, and there are others.
func (d *Driver) anyAddress(ctx context.Context, pid int) (any, error) {
	for {
		got, err := d.api.ReserveAddress(ctx, api.AddressRequest{Owner: reservationOwner})
		if err != nil {
			return nil, err
		}
		a, err := addrOf(got.Addr)
		if err != nil {
			return nil, fmt.Errorf("the reserved address: %w", err)
		}
		if d.give(a.String(), pid) {
			return addressResponse{got.Addr}, nil
		}
	}
}

// movedError is for a network that was made when the node had another subnet.
func movedError(pool string, s api.Status, remedy string) error {
	return fmt.Errorf("docker's network has the subnet %s, the node has %s since: %s", clip(pool), s.Subnet, remedy)
}

// unused are the addresses that are reserved for docker and that no attachment has.
func (d *Driver) unused(ctx context.Context) (map[string]bool, error) {
	reserved, err := d.api.Addresses(ctx)
	if err != nil || len(reserved) == 0 {
		return nil, err
	}
	free := make(map[string]bool)
	for _, r := range reserved {
		if a, err := addrOf(r.Addr); err == nil && r.Owner == reservationOwner && r.Attachment == "" {
			free[a.String()] = true
		}
	}
	return free, nil
}

// releaseAddress gives an address back. One that is not reserved, as the gateway is not, needs nothing.
func (d *Driver) releaseAddress(ctx context.Context, r *addressRequest) (any, error) {
	a, err := addrOf(r.Address)
	if err != nil {
		return nil, fmt.Errorf("%q is not an address", clip(r.Address))
	}
	d.takeBack(a.String())
	if err := d.api.ReleaseAddress(ctx, a.String()); err != nil && !errors.Is(err, api.ErrNotFound) {
		return nil, err
	}
	return nothing{}, nil
}
