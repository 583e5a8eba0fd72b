// This file is where containers' traffic leaves the host, when its owner has chosen.

package node

import (
	"errors"
	"fmt"

	"github.com/rootless-ovl/rootless-ovl/stack"
)

// outbound is OutboundAddrs and OutboundIf in the gateway's words.
func (c Config) outbound() (stack.Outbound, error) {
	o := stack.Outbound{Interface: c.OutboundIf}
	if c.OutboundIf == "lo" {
		return o, errors.New("outbound interface lo: nothing outside this host is reached by it (--outbound-if)")
	}
	for _, a := range c.OutboundAddrs {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Is6() && a.IsLinkLocalUnicast() {
			return o, fmt.Errorf("outbound address %v: an address of this host is needed that others can answer to (--outbound-addr)", a)
		}
		mine := &o.Addr4
		if a.Is6() {
			mine = &o.Addr6
		}
		if mine.IsValid() {
			return o, fmt.Errorf("outbound addresses %v and %v: there can be one of each family (--outbound-addr)", *mine, a)
		}
		*mine = a
	}
	return o, nil
}

// outboundGone is what it means that checkOutbound finds something missing, for the log and for status.
const outboundGone = "what containers send outside does not leave, as the address or interface chosen for it is gone"

// lookOutbound has status and the log say when what was chosen has gone, and when it is back. What containers send is bound to it
// anew each time, so that nothing else is to be done.
func (n *Node) lookOutbound() {
	err := n.checkOutbound()
	problem := ""
	if err != nil {
		problem = fmt.Sprintf("%s: %v", outboundGone, err)
	}
	n.mu.Lock()
	before := n.outboundProblem
	n.outboundProblem = problem
	n.mu.Unlock()
	switch {
	case problem == before:
	case err != nil:
		n.log.Warn(outboundGone, "err", err)
	default:
		n.log.Info("what containers send outside leaves again", "addrs", n.cfg.OutboundAddrs, "interface", n.cfg.OutboundIf)
	}
}

// checkOutbound says what of the choice this host does not have.
func (n *Node) checkOutbound() error {
	for _, a := range n.cfg.OutboundAddrs {
		has, err := n.edges.hasAddr(a)
		if err != nil {
			return err
		}
		if !has {
			return fmt.Errorf("this host does not have the address %v (--outbound-addr): give one that `ip addr` lists", a)
		}
	}
	if n.cfg.OutboundIf == "" {
		return nil
	}
	has, err := n.edges.hasIface(n.cfg.OutboundIf)
	if err != nil {
		return err
	}
	if !has {
		return fmt.Errorf("this host has no interface %s (--outbound-if): give one that `ip link` lists", n.cfg.OutboundIf)
	}
	return nil
}
