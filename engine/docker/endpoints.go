// This file is endpoints: a loose attachment each, found by its owner. It is made when docker creates the endpoint, so that docker is told its
// MAC and IPv6 address, and ends when docker deletes it. Between Join and Leave dockerd has the interface in the container; what it does not
// bring back is removed wherever it is.

package docker

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const ownerPrefix = "docker/"

func ownerOf(endpoint string) string { return ownerPrefix + endpoint }

// endpointOf is the endpoint that an attachment's owner names.
func endpointOf(owner string) (endpoint string, is bool) {
	return strings.CutPrefix(owner, ownerPrefix)
}

// resolversFor are where dockerd's containers ask, without addresses of the overlay: there somebody answers himself.
func (d *Driver) resolversFor(pid int, s api.Status) []string {
	overlay := func(text string) bool {
		a, err := netip.ParseAddr(text)
		for _, network := range []string{s.Network, s.Network6} {
			p, perr := netip.ParsePrefix(network)
			if err == nil && perr == nil && p.Contains(a) {
				return true
			}
		}
		return false
	}
	return slices.DeleteFunc(d.peek(pid).Resolvers, overlay)
}

// attachmentOf is the attachment of an endpoint; the error of none is api.ErrNotFound.
func (d *Driver) attachmentOf(ctx context.Context, endpoint string) (api.Attachment, error) {
	list, err := d.api.AttachmentsOf(ctx, ownerOf(endpoint))
	switch {
	case err != nil:
		return api.Attachment{}, err
	case len(list) == 0:
		return api.Attachment{}, api.Errorf(api.CodeNotFound, "the container's attachment is gone: `docker restart` makes it anew")
	}
	return list[0], nil
}

func (d *Driver) createEndpoint(ctx context.Context, r *endpointRequest) (any, error) {
	pid, _ := ctx.Value(pidKey{}).(int)
	if pid == 0 {
		return nil, errors.New("dockerd cannot be seen from here: run it and the daemon in one PID namespace")
	}
	o, known := d.networks.get(r.NetworkID)
	if !known {
		return nil, fmt.Errorf("this network was created with another state directory of the daemon, so its options are not known: start the daemon with that --state-dir, or %s",
			howToRemake(r.NetworkID, options{}))
	}
	remake := howToRemake(r.NetworkID, o)
	given, err := userOptions(r.Options)
	if err != nil {
		return nil, err
	}
	if _, of := given["snat"]; of {
		return nil, errors.New("snat is an option of the network: give it to `docker network create`")
	}
	if o, err = o.with(given); err != nil {
		return nil, err
	}
	if r.Interface == nil || r.Interface.Address == "" {
		return nil, fmt.Errorf("docker names no address: create the network with %s", howToCreate)
	}
	s, err := d.ready(ctx)
	if err != nil {
		return nil, err
	}
	addr, err := addrOf(r.Interface.Address)
	if err != nil {
		return nil, fmt.Errorf("%q is not an address", clip(r.Interface.Address))
	}
	if subnet, err := netip.ParsePrefix(s.Subnet); err != nil || !subnet.Contains(addr) {
		return nil, movedError(r.Interface.Address, s, remake)
	}
	if err := d.detach(ctx, r.EndpointID); err != nil { // docker asks again when an answer was lost
		return nil, err
	}
	a, err := d.api.Attach(ctx, api.AttachRequest{
		PID:    pid,
		Owner:  ownerOf(r.EndpointID),
		Loose:  true,
		Addr:   addr.String(),
		MAC:    r.Interface.MacAddress,
		DNSAt:  d.resolversFor(pid, s),
		Policy: o.Policy,
	})
	if err != nil {
		return nil, err
	}
	d.takeBack(addr.String()) // from here on the node knows who has it
	var resp createEndpointResponse
	if r.Interface.MacAddress == "" {
		resp.Interface.MacAddress = a.MAC
	}
	if r.Interface.AddressIPv6 == "" {
		resp.Interface.AddressIPv6 = a.Addr6
	}
	return resp, nil
}

// detach takes an endpoint off the overlay if it is on it. Its name may change while we look.
func (d *Driver) detach(ctx context.Context, endpoint string) error {
	for range 3 {
		a, err := d.attachmentOf(ctx, endpoint)
		if errors.Is(err, api.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if err = d.api.DetachSoon(ctx, a.Name, a.Owner); err == nil || !errors.Is(err, api.ErrNotFound) {
			return err
		}
	}
	return nil
}

// deleteEndpoint succeeds for one that is not there: docker deletes what it does not remember the state of.
func (d *Driver) deleteEndpoint(ctx context.Context, r *endpointRequest) (any, error) {
	d.forget(r.EndpointID)
	return nothing{}, d.detach(ctx, r.EndpointID)
}

func (d *Driver) endpointInfo(context.Context, *endpointRequest) (any, error) {
	return operInfo{Value: map[string]string{}}, nil
}

// join tells dockerd which interface to take, and where the container sends to: the default route unless another network has it, and the
// overlay and docker's resolvers in any case. docker asks the resolvers from within the container, so this is how names of the overlay are found
// also by a container with several networks.
func (d *Driver) join(ctx context.Context, r *endpointRequest) (any, error) {
	s, err := d.ready(ctx)
	if err != nil {
		return nil, err
	}
	a, err := d.attachmentOf(ctx, r.EndpointID)
	if err != nil {
		return nil, err
	}
	resp := joinResponse{
		InterfaceName: interfaceName{SrcName: a.IfName, DstPrefix: interfacePrefix},
		Gateway:       a.Gateway,
		GatewayIPv6:   a.Gateway6,
	}
	via := func(destination, gateway string) {
		resp.StaticRoutes = append(resp.StaticRoutes, staticRoute{Destination: destination, RouteType: routeByNextHop, NextHop: gateway})
	}
	if s.Network != "" && s.Network != s.Subnet {
		via(s.Network, a.Gateway)
	}
	if s.Network6 != "" && s.Network6 != s.Subnet6 && a.Gateway6 != "" {
		via(s.Network6, a.Gateway6)
	}
	pid, _ := ctx.Value(pidKey{}).(int)
	for _, text := range d.resolversFor(pid, s) {
		if server, err := netip.ParseAddr(text); err == nil && server.Is4() {
			via(netip.PrefixFrom(server, server.BitLen()).String(), a.Gateway)
		}
	}
	return resp, nil
}

// leave does nothing: dockerd takes the interface back to its namespace after this, and deletes the endpoint.
func (d *Driver) leave(context.Context, *endpointRequest) (any, error) { return nothing{}, nil }
