// This file is published ports: docker's bindings in the words of the API.

package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// portBinding is libnetwork's types.PortBinding.
type portBinding struct {
	Proto       int // of IP: 6, 17
	Port        int // of the container
	HostIP      string
	HostPort    int // 0: any
	HostPortEnd int // the last of those of which one is to be taken
}

// protocols by their number in IP.
var protocols = map[int]string{6: api.ProtoTCP, 17: api.ProtoUDP}

// binding is a portBinding that has been checked.
type binding struct {
	addr        netip.Addr // not valid: all addresses of the host
	first, last int        // of the host, both 0 for any
	port        int
	proto       string
}

// bindingsOf reads the port map among a request's options, sorted so that neighbours are beside each other. One that is listed twice is one.
func bindingsOf(options map[string]json.RawMessage) ([]binding, error) {
	raw := options[labelPortMap]
	if len(raw) == 0 {
		return nil, nil
	}
	var given []portBinding
	if err := json.Unmarshal(raw, &given); err != nil {
		return nil, fmt.Errorf("published ports: %w", err)
	}
	var list []binding
	for _, g := range given {
		b := binding{first: g.HostPort, last: g.HostPortEnd, port: g.Port, proto: protocols[g.Proto]}
		switch {
		case g.Proto == 132:
			return nil, fmt.Errorf("port %d/sctp cannot be published: publish tcp or udp", g.Port)
		case b.proto == "":
			return nil, fmt.Errorf("port %d: protocol %d cannot be published: publish tcp or udp", g.Port, g.Proto)
		}
		b.last = max(b.first, b.last)
		for _, p := range []int{b.first, b.last} {
			if p < 0 || p > 65535 {
				return nil, fmt.Errorf("port %d cannot be published on port %d of the host: ports go up to 65535", g.Port, p)
			}
		}
		if b.port < 1 || b.port > 65535 {
			return nil, fmt.Errorf("the container has no port %d: ports go from 1 to 65535", g.Port)
		}
		if g.HostIP != "" {
			addr, err := netip.ParseAddr(g.HostIP)
			if err != nil {
				return nil, fmt.Errorf("port %d cannot be published at %q: it is not an address", g.Port, clip(g.HostIP))
			}
			b.addr = addr.Unmap()
		}
		list = append(list, b)
	}
	slices.SortFunc(list, func(a, b binding) int {
		return cmp.Or(strings.Compare(a.proto, b.proto), a.addr.Compare(b.addr), cmp.Compare(a.first, b.first), cmp.Compare(a.port, b.port), cmp.Compare(a.last, b.last))
	})
	return slices.Compact(list), nil
}

// spec is n bindings that follow each other, b the first, as `publish` takes them, on the port host.
func (b binding) spec(host, n int) string {
	ends := func(first int) string {
		if n == 1 {
			return strconv.Itoa(first)
		}
		return fmt.Sprintf("%d-%d", first, first+n-1)
	}
	var text strings.Builder
	if b.addr.IsValid() {
		addr := b.addr.String()
		if b.addr.Is6() {
			addr = "[" + addr + "]"
		}
		text.WriteString(addr + ":")
	}
	return text.String() + ends(host) + ":" + ends(b.port) + "/" + b.proto
}

// follows tells whether b is n ports after first at both ends, so that both can be written as a range.
func (b binding) follows(first binding, n int) bool {
	return first.first != 0 && first.first == first.last && b.addr == first.addr && b.proto == first.proto &&
		b.first == first.first+n && b.last == b.first && b.port == first.port+n
}

// specs are the bindings that leave no choice, neighbours as ranges: a request of the API has a bounded size.
func specs(list []binding) (fixed []string, choose []binding) {
	for i := 0; i < len(list); {
		b, n := list[i], 1
		if b.first != b.last {
			choose = append(choose, b)
			i++
			continue
		}
		for i+n < len(list) && list[i+n].follows(b, n) {
			n++
		}
		fixed = append(fixed, b.spec(b.first, n))
		i += n
	}
	return fixed, choose
}

// publish opens what docker's -p asks for: all of it, or none. What an earlier call has opened is closed first; docker calls again when the
// endpoint takes over from another network.
func (d *Driver) publish(ctx context.Context, r *endpointRequest) (any, error) {
	list, err := bindingsOf(r.Options)
	if err != nil || len(list) == 0 {
		return nothing{}, err
	}
	a, err := d.attachmentOf(ctx, r.EndpointID)
	if err != nil {
		return nil, err
	}
	o, _ := d.networks.get(r.NetworkID)
	if len(a.Ports) > 0 {
		if _, err := d.api.Unpublish(ctx, a.Name, api.UnpublishRequest{All: true}); err != nil {
			return nil, err
		}
	}
	fixed, choose := specs(list)
	if len(fixed) > 0 {
		_, err = d.api.Publish(ctx, a.Name, api.PublishRequest{Publish: fixed, SNAT: o.SNAT})
	}
	for _, b := range choose {
		if err == nil {
			err = d.publishOne(ctx, a.Name, b, o.SNAT)
		}
	}
	if err != nil {
		_, undo := d.api.Unpublish(ctx, a.Name, api.UnpublishRequest{All: true})
		if undo != nil && !errors.Is(undo, api.ErrNotFound) {
			d.log.Warn("published ports are not taken back", "name", a.Name, "err", undo)
		}
		return nil, err
	}
	return nothing{}, nil
}

// publishOne takes the first port of the host's that is free among those of a binding.
func (d *Driver) publishOne(ctx context.Context, ref string, b binding, snat bool) error {
	for host := b.first; host <= b.last; host++ {
		_, err := d.api.Publish(ctx, ref, api.PublishRequest{Publish: []string{b.spec(host, 1)}, SNAT: snat})
		if errors.Is(err, api.ErrDenied) { // the others are not tried: which port it is would depend on this host's settings
			return fmt.Errorf("the range %d-%d of the host: %w", b.first, b.last, err)
		}
		if !errors.Is(err, api.ErrInUse) {
			return err
		}
	}
	return fmt.Errorf("the ports %d-%d of the host are all taken: publish port %d on another", b.first, b.last, b.port)
}

// unpublish closes all ports of an endpoint, if it is there.
func (d *Driver) unpublish(ctx context.Context, r *endpointRequest) (any, error) {
	a, err := d.attachmentOf(ctx, r.EndpointID)
	if err == nil && len(a.Ports) > 0 {
		_, err = d.api.Unpublish(ctx, a.Name, api.UnpublishRequest{All: true})
	}
	if err != nil && !errors.Is(err, api.ErrNotFound) {
		return nil, err
	}
	return nothing{}, nil
}
