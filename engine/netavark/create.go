// Create: a network that podman is about to write down.

package netavark

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// create checks a network and gives it back with what it can have. Its containers' addresses are chosen by the daemon, which alone knows
// of all that have one; so the network has no subnet of its own, or podman would choose addresses from it.
func (p *Plugin) create(ctx context.Context) error {
	var n network
	var all map[string]json.RawMessage
	if err := read(p.Stdin, "a network", &n, &all); err != nil {
		return err
	}
	if all == nil {
		return errors.New("standard input is null: it should be the JSON of a network")
	}
	if err := n.check(); err != nil {
		return err
	}
	if len(n.Subnets) > 0 || n.IPv6 {
		if err := p.checkAgainstNode(ctx, &n); err != nil {
			return err
		}
	}
	delete(all, "subnets")
	// host-local would have podman look for static addresses in the subnets that are not there.
	all["ipam_options"] = json.RawMessage("{}")
	return p.answer(all)
}

// check looks at what can be judged without the daemon.
func (n *network) check() error {
	if _, err := n.options(nil); err != nil {
		return err
	}
	switch driver := n.IPAMOptions["driver"]; {
	case driver != "" && driver != "host-local":
		return fmt.Errorf("the ipam driver %q cannot be had: the node gives addresses from its own subnet, leave --ipam-driver out", driver)
	case n.Interface != "":
		return fmt.Errorf("the network has no interface on the host that could be called %q: leave --interface-name out", n.Interface)
	case len(n.Routes) > 0:
		return errors.New("the network has no routes of its own: leave --route out, containers have a route to the overlay, and a default route but for --internal and -o no_default_route=true")
	case len(n.DNSServers) > 0:
		return errors.New("the network has no DNS servers of its own: leave --dns out, the node's gateway asks those of the host's resolv.conf")
	}
	return nil
}

// checkAgainstNode holds subnets and IPv6 to what the node has.
func (p *Plugin) checkAgainstNode(ctx context.Context, n *network) error {
	daemon, err := p.Connect()
	if err != nil {
		return err
	}
	s, err := daemon.Status(ctx)
	if err != nil {
		return fmt.Errorf("a subnet is compared with the node's: %w", err)
	}
	if s.Subnet == "" {
		return api.Errorf(api.CodeUnavailable, "a subnet is compared with the node's, which has none yet (%s): `rootless-ovl status` says more; or leave --subnet out", s.State)
	}
	if n.IPv6 && s.Network6 == "" {
		return errors.New("the overlay has no IPv6 network: leave --ipv6 out (containers reach the outside over IPv6 all the same, if the host does)")
	}
	for _, sub := range n.Subnets {
		if err := sub.check(s); err != nil {
			return err
		}
	}
	return nil
}

// check tells whether a subnet is one of the node's.
func (sub subnet) check(s api.Status) error {
	given, err := netip.ParsePrefix(sub.Subnet)
	if err != nil {
		return fmt.Errorf("subnet %q is no network in CIDR form: leave --subnet out, the node's is %s", sub.Subnet, s.Subnet)
	}
	own, gateway := s.Subnet, s.Gateway
	if given.Addr().Is6() {
		own, gateway = s.Subnet6, s.Gateway6
		if own == "" {
			return fmt.Errorf("subnet %v cannot be had: the overlay has no IPv6 network, leave it out", given)
		}
	}
	if p, err := netip.ParsePrefix(own); err != nil || p.Masked() != given.Masked() {
		return fmt.Errorf("subnet %v cannot be had: the node has leased %s, leave --subnet out or give that", given, own)
	}
	if sub.Gateway != "" && sub.Gateway != gateway {
		return fmt.Errorf("gateway %s cannot be had: the node's is %s, leave --gateway out or give that", sub.Gateway, gateway)
	}
	if len(sub.LeaseRange) > 0 && string(sub.LeaseRange) != "null" {
		return errors.New("the node chooses addresses from all of its subnet: leave --ip-range out, and give containers that need a certain address one with --ip")
	}
	return nil
}
