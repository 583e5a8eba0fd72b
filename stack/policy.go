// This file is what single containers may reach through the gateway, beside what is closed to all of them (closed.go): the outside
// (`attach --egress`), and ports of the host's loopback (`--host-access`); and where it is answered as by the gateway itself. It is asked when a flow begins. What the outside began, as with
// a published port, has a flow already when the container answers, and is not asked about.

package stack

import (
	"maps"
	"net/netip"
	"slices"
)

// Policy is what a container may reach. The zero value is what every container has that none was set for.
type Policy struct {
	Egress *Egress // nil: everything that is not closed to all
	// HostPorts are ports of the gateway's addresses that lead to the host's loopback, TCP and UDP: to 127.0.0.1 from an IPv4 address, to ::1
	// from an IPv6 one. Port 53 is the resolver's, and what Deny lists stays denied.
	HostPorts []uint16
	// DNSAt are addresses that are no gateway's own and at whose port 53 the resolver answers the container all the same. Everything else of
	// them is as of any address.
	DNSAt []netip.Addr
}

// Egress is what of the outside a container may reach.
type Egress struct {
	// Allow is the destinations; without any, nothing outside is reached and no name outside resolved. An IPv6 address that stands for an IPv4
	// one is judged as that, or as all that it may stand for.
	Allow []netip.Prefix
}

// policies is what was set, by container. A published map is never changed.
type policies map[netip.Addr]*Policy

// SetPolicy says what the container with these addresses may reach. Flows that exist go on.
func (g *Gateway) SetPolicy(containers []netip.Addr, p Policy) {
	if p.Egress == nil && len(p.HostPorts) == 0 && len(p.DNSAt) == 0 {
		g.DropPolicy(containers)
		return
	}
	p.HostPorts, p.DNSAt = slices.Clone(p.HostPorts), slices.Clone(p.DNSAt)
	if p.Egress != nil {
		p.Egress = &Egress{Allow: slices.Clone(p.Egress.Allow)}
	}
	g.changePolicies(func(m policies) {
		for _, a := range containers {
			m[a] = &p
		}
	})
}

// DropPolicy forgets what SetPolicy was told of the container.
func (g *Gateway) DropPolicy(containers []netip.Addr) {
	if !slices.ContainsFunc(containers, func(a netip.Addr) bool { return g.policyOf(a) != nil }) {
		return
	}
	g.changePolicies(func(m policies) {
		for _, a := range containers {
			delete(m, a)
		}
	})
}

func (g *Gateway) changePolicies(change func(policies)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := maps.Clone(*g.policies.Load())
	change(m)
	g.policies.Store(&m)
}

// policyOf is nil for a container that none was set for, and for whoever is not of this node.
func (g *Gateway) policyOf(container netip.Addr) *Policy { return (*g.policies.Load())[container] }

// opensHost tells whether a port of ours is the host's for the container.
func (g *Gateway) opensHost(container netip.Addr, port uint16) bool {
	p := g.policyOf(container)
	return p != nil && slices.Contains(p.HostPorts, port)
}

// resolvesAt tells whether the container is answered by the resolver at an address that is none of ours.
func (g *Gateway) resolvesAt(container, a netip.Addr) bool {
	p := g.policyOf(container)
	return p != nil && slices.Contains(p.DNSAt, a)
}

// lets tells whether the container's policy lets it reach dst, outside the overlay.
func (g *Gateway) lets(container, dst netip.Addr) bool {
	p := g.policyOf(container)
	return p == nil || p.Egress == nil || p.Egress.allows(dst)
}

func (e *Egress) allows(dst netip.Addr) bool {
	lists := func(a netip.Addr) bool {
		return slices.ContainsFunc(e.Allow, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	if dst.Is6() {
		if all := standsFor(dst); all != nil {
			return !slices.ContainsFunc(all, func(a netip.Addr) bool { return !lists(a) })
		}
	}
	return lists(dst)
}

// resolves tells whether names outside the overlay are resolved for whoever asks from there.
func (g *Gateway) resolves(from netip.Addr) bool {
	p := g.policyOf(from)
	return p == nil || p.Egress == nil || len(p.Egress.Allow) > 0
}

// refusal tells why a flow to dst, which would be carried on to another address, must not begin; ok is true if it may.
func (g *Gateway) refusal(container netip.Addr, dst, to netip.AddrPort) (why dropReason, ok bool) {
	switch {
	case g.denied(dst) || g.denied(to):
		return dropDenied, false
	case !g.isOwn(dst.Addr()) && !g.lets(container, dst.Addr()):
		return dropEgress, false
	}
	return 0, true
}
