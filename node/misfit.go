// This file is about attachments that the network, or the node's lease, has changed under: what can be mended when they are taken up
// again is, and of the rest people are told.

package node

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// refit gives the interface of an attachment that is taken up what it would get now: the MTU, and the IPv6 address if the network has
// become dual-stack, or the host has got a way out for it. What is not done stays in misfit.
func (n *Node) refit(a *attachment, ns namespace) {
	n.mu.Lock()
	s, me, carries := a.saved, n.selfLocked(), a.phase == live
	n.mu.Unlock()
	s.MTU = me.mtu
	// With less than 32 bits one of an earlier subnet could have the address.
	if !carries && (!s.Addr6.IsValid() || isEgress6(s.Addr6)) && !s.Gateway && !s.Loose && !s.NoIPv6 && me.subnet6.IsValid() && me.subnet6.Bits() <= 96 && me.subnet.Contains(s.Addr.Addr()) {
		s.Addr6, _ = addr6Of(s.Addr, me.subnet6)
	}
	if !carries && !s.Addr6.IsValid() {
		s.Addr6 = n.egress6Of(s, me)
	}
	new6 := s.Addr6 != a.saved.Addr6
	if s.MTU == a.saved.MTU && !new6 {
		return
	}
	c, err := n.tapConfig(s)
	if err != nil {
		return // its MAC address, which adopting tells of
	}
	c.Addrs = slices.DeleteFunc(c.Addrs, func(p netip.Prefix) bool { return !new6 || p.Addr().Is4() })
	c.Routes = slices.DeleteFunc(c.Routes, func(r nsutil.Route) bool { return !new6 || r.Dst.Addr().Is4() })
	if new6 && a.saved.Addr6.IsValid() { // for the outside alone, with its default route
		c.OldAddrs = []netip.Prefix{a.saved.Addr6}
		c.OldRoutes = []nsutil.Route{{Dst: netip.PrefixFrom(netip.IPv6Unspecified(), 0), Gateway: gatewayAddr(a.saved.Addr6)}}
	}
	err = ns.change(c)
	if errors.Is(err, nsutil.ErrNoIPv6) {
		s.Addr6, c.Addrs, c.Routes, c.OldAddrs, c.OldRoutes = a.saved.Addr6, nil, nil, nil, nil
		err = ns.change(c)
	}
	switch {
	case errors.Is(err, nsutil.ErrNoTAP): // which adopting tells of
	case err != nil:
		n.log.Warn("the interface in the container was not changed to what the network has now", "name", s.Name, "where", s.where(), "err", err)
	case s.MTU != a.saved.MTU || s.Addr6 != a.saved.Addr6:
		attrs := []any{"name", s.Name, "where", s.where(), "mtu", s.MTU, "mtu_before", a.saved.MTU}
		if s.Addr6 != a.saved.Addr6 {
			attrs = append(attrs, "addr6", s.Addr6.Addr())
		}
		n.log.Info("the interface in the container was changed to what the network has now", attrs...)
		n.mu.Lock()
		a.saved = s
		n.mu.Unlock()
	}
}

// misfitLocked is what of an attachment does not work by what the node and the network are now, and the remedy; empty when all does.
func (n *Node) misfitLocked(a *attachment) string {
	s, me := &a.saved, n.selfLocked()
	if !me.subnet.IsValid() {
		return ""
	}
	switch {
	case s.Gateway && s.Addr.Masked() != me.subnet.Masked():
		return fmt.Sprintf("the subnet %v that is routed to it is an earlier one of this node, which has %v now: peers do not reach its containers; detach it, start its engine again with what the subnet file says now (--bip), and attach it again", s.Addr.Masked(), me.subnet)
	case !me.subnet.Contains(s.Addr.Addr()):
		return "its address is of an earlier subnet: it reaches this node and the outside, but no peer; detach it and attach it again"
	case isEgress6(s.Addr6) && me.subnet6.IsValid():
		return "its IPv6 address is for the outside alone, and the network has IPv6 now; detach it and attach it again"
	case isEgress6(s.Addr6) && me.mtu < minMTUv6:
		return fmt.Sprintf("it has an IPv6 address, and IPv6 needs an MTU of %d; detach it and attach it again", minMTUv6)
	case isEgress6(s.Addr6):
	case s.Addr6.IsValid() && !me.subnet6.IsValid():
		return "it has an IPv6 address, and the network has no IPv6 any more; detach it and attach it again"
	case s.Addr6.IsValid() && !me.subnet6.Contains(s.Addr6.Addr()):
		return "its IPv6 address is of an earlier subnet: it reaches no peer over IPv6; detach it and attach it again"
	case s.MTU != me.mtu:
		return fmt.Sprintf("its interface does not have the MTU of the network, %d; detach it and attach it again", me.mtu)
	case s.Gateway && me.subnet6.IsValid():
		return "IPv6 of the subnet is not routed to it: its containers have IPv4 only"
	case me.subnet6.IsValid() && !s.Addr6.IsValid() && !s.NoIPv6:
		return "it has no IPv6 address; see that IPv6 is not switched off in it (sysctl net.ipv6.conf.all.disable_ipv6), detach it and attach it again"
	}
	return ""
}

// tellMisfitLocked logs it.
func (n *Node) tellMisfitLocked(a *attachment) {
	if misfit := n.misfitLocked(a); misfit != "" {
		n.log.Warn("attachment does not fit the network", "name", a.saved.Name, "addr", a.saved.Addr, "now", n.pool.subnet, "problem", misfit)
	}
}

// troubleLocked is all that may not work of an attachment, for people.
func (n *Node) troubleLocked(a *attachment) string {
	return joined(a.problem, n.misfitLocked(a), a.portTroubleLocked(), n.nameTroubleLocked(a))
}

// joined are sentences in one line, of which any may be empty.
func joined(sentences ...string) string {
	return strings.Join(slices.DeleteFunc(sentences, func(s string) bool { return s == "" }), "; ")
}
