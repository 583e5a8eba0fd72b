// This file finds what of a policy can have no effect on this node: what is certainly a mistake is refused, of the rest the user is told.

package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// checkPolicyLocked says why p cannot be meant, or what of it has no effect. p is valid.
func (n *Node) checkPolicyLocked(p api.Policy) (warnings []string, err error) {
	from, to, err := p.Rules()
	if err != nil {
		return nil, err
	}
	for _, list := range []struct {
		flag  string
		rules []api.Rule
	}{{"--allow-from", from}, {"--allow-to", to}} {
		for _, r := range list.rules {
			warning, err := n.checkRuleLocked(r)
			if err != nil {
				return nil, api.Errorf(api.CodeInvalid, "%s: rule %q: %w", list.flag, r, err)
			}
			if warning != "" {
				warnings = append(warnings, fmt.Sprintf("%s: rule %q: %s", list.flag, r, warning))
			}
		}
	}
	networks, _, err := p.EgressNetworks()
	if err != nil {
		return nil, err
	}
	for _, network := range networks {
		if err := n.checkEgressLocked(network); err != nil {
			return nil, api.Errorf(api.CodeInvalid, "--egress: %w", err)
		}
	}
	for _, port := range p.HostAccess {
		for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if slices.Contains(n.closed, netip.AddrPortFrom(a, uint16(port))) {
				return nil, api.Errorf(api.CodeDenied, "--host-access: port %d of this host is that of the store or of the node's proxy, which stays closed to containers: leave it out", port)
			}
		}
	}
	return warnings, nil
}

// checkRuleLocked is about one rule of --allow-from or --allow-to.
func (n *Node) checkRuleLocked(r api.Rule) (warning string, err error) {
	network := n.netConfig.Network
	if r.Prefix.Addr().Is6() {
		if !carriesIPv6(n.netConfig) {
			return "this overlay has no IPv6, so it matches nobody" + meantPort(r), nil
		}
		network = n.netConfig.IPv6Network
	}
	if !r.Prefix.Overlaps(network) {
		return "", fmt.Errorf("%v lies outside the overlay, %v: it would match nobody%s", r.Prefix, network, meantPort(r))
	}
	if hint := meantPort(r); hint != "" {
		if a := r.Prefix.Addr().As16(); !n.netConfig.Network.Contains(netip.AddrFrom4([4]byte(a[12:]))) { // as it does for containers of ours
			return "it is an address, without a port" + hint, nil
		}
	}
	return "", nil
}

// meantPort is a hint for a rule with an IPv6 address whose end looks like a port.
func meantPort(r api.Rule) string {
	a := r.Prefix.Addr()
	if !a.Is6() || r.Prefix.Bits() != 128 || r.Last != 0 {
		return ""
	}
	text := a.String()
	i := strings.LastIndexByte(text, ':')
	if _, err := strconv.ParseUint(text[i+1:], 10, 16); err != nil {
		return ""
	}
	before := text[:i]
	if strings.HasSuffix(before, ":") {
		before += ":"
	}
	return fmt.Sprintf(" (for port %s write [%s]:%s)", text[i+1:], before, text[i+1:])
}

// checkEgressLocked is about one network of --egress.
func (n *Node) checkEgressLocked(network netip.Prefix) error {
	within := func(p netip.Prefix) bool { return p.Bits() <= network.Bits() && p.Contains(network.Addr()) }
	switch {
	case within(n.netConfig.Network), carriesIPv6(n.netConfig) && within(n.netConfig.IPv6Network):
		return fmt.Errorf("%v is the overlay's own: what it may reach there is said with --allow-to", network)
	case !n.cfg.HostLoopback && slices.ContainsFunc(loopbackNetworks, within):
		return fmt.Errorf("%v is this host's loopback, which stays closed: --host-access opens ports of it", network)
	case !n.cfg.LinkLocal && slices.ContainsFunc(linkLocalNetworks, within):
		return fmt.Errorf("%v is link-local, or a cloud's metadata service, and stays closed to all containers: `rootless-ovl up --allow-link-local` opens these for all", network)
	case slices.ContainsFunc(noHosts, within):
		return fmt.Errorf("%v is no network of hosts", network)
	}
	return nil
}

// Networks that the gateway closes to all (stack/closed.go).
var (
	loopbackNetworks  = prefixes("127.0.0.0/8", "::1/128")
	linkLocalNetworks = prefixes("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128")
	noHosts           = prefixes("0.0.0.0/8", "224.0.0.0/4", "ff00::/8", "::/128")
)

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, t := range texts {
		all = append(all, netip.MustParsePrefix(t))
	}
	return all
}

// familyWarning tells of networks of --egress that the attachment has no address for.
func familyWarning(s savedAttachment) []string {
	networks, _, err := s.Policy.EgressNetworks()
	if err != nil || s.Addr6.IsValid() || !slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		return nil
	}
	return []string{"--egress: the container has no IPv6 address, so that its IPv6 networks have no effect"}
}
