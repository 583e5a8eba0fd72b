// This file turns the policy of an attachment into those that hold it to it: between containers the router's, for the outside and the host
// the gateway's.

package node

import (
	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
	"github.com/rootless-ovl/rootless-ovl/stack"
)

// protocols of rules, by their names.
var protocols = map[string]uint8{"": 0, "tcp": packet.TCP, "udp": packet.UDP, "icmp": packet.ICMP}

// setPolicy puts what s may do into c, and into the gateway, before its port is there to send anything. drop undoes it.
func (n *Node) setPolicy(s savedAttachment, c *forwarder.PortConfig) (drop func(), err error) {
	if c.Policy, err = containerPolicy(s.Policy); err != nil {
		return nil, err
	}
	outside, err := gatewayPolicy(s.Policy)
	if err != nil {
		return nil, err
	}
	if outside.DNSAt, err = (api.AttachRequest{DNSAt: s.DNSAt}).ResolverAddrs(); err != nil {
		return nil, err
	}
	addrs := s.addrs()
	n.gateway.SetPolicy(addrs, outside)
	return func() { n.gateway.DropPolicy(addrs) }, nil
}

// containerPolicy is what p means between containers; nil where nothing is closed.
func containerPolicy(p api.Policy) (*forwarder.Policy, error) {
	from, to, err := p.Rules()
	if err != nil {
		return nil, err
	}
	c := &forwarder.Policy{
		In:  forwarder.Direction{Closed: p.Isolate || len(from) > 0, Allow: rulesOf(from)},
		Out: forwarder.Direction{Closed: p.Isolate || len(to) > 0, Allow: rulesOf(to)},
	}
	if !c.In.Closed && !c.Out.Closed {
		return nil, nil
	}
	return c, nil
}

func rulesOf(list []api.Rule) (rules []forwarder.Rule) {
	for _, r := range list {
		rules = append(rules, forwarder.Rule{Prefix: r.Prefix, Proto: protocols[r.Proto], First: r.First, Last: r.Last})
	}
	return rules
}

// gatewayPolicy is what p means for the outside and the host.
func gatewayPolicy(p api.Policy) (stack.Policy, error) {
	var g stack.Policy
	networks, all, err := p.EgressNetworks()
	if err != nil {
		return g, err
	}
	if !all {
		g.Egress = &stack.Egress{Allow: networks}
	}
	for _, port := range p.HostAccess {
		g.HostPorts = append(g.HostPorts, uint16(port))
	}
	return g, nil
}
