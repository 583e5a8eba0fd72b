// This file is the gateway's side of names: what its resolver answers by itself, and who is asking it.

package stack

import "github.com/rootless-ovl/rootless-ovl/stack/dns"

// SetNames replaces what the resolver answers by itself; nil is nothing.
func (g *Gateway) SetNames(z *dns.Zone) { g.resolver.SetZone(z) }

// asks is who asks the resolver in a flow.
func (g *Gateway) asks(k flowKey) dns.Query {
	from := k.src.Addr()
	return dns.Query{From: from, At: k.dst.Addr(), Closed: !g.resolves(from)}
}
