// This file attaches a namespace as the gateway of the whole leased subnet (`attach --gateway`): rootless docker's own, say, which
// has its bridge in it. It is flannel's way, with the TAP in the place of flannel's device:
//
//	containers  10.5.72.2-254   on docker0, 10.5.72.1/24: `dockerd --bip=$FLANNEL_SUBNET`
//	rovl0       10.5.72.0/32    the TAP; 10.5.0.0/16 via 192.0.0.8 onlink
//	us          192.0.0.8       source of ICMP errors, and where the namespace sends what is for the overlay
//
// So .0 and .1, which are ours otherwise, are the namespace's, and errors from there would be forged ones to it. 192.0.0.8 is the
// IPv4 dummy address (RFC 7600 4.8), which nobody has. One address to send to makes one neighbour entry, however many peers there are.
//
// The namespace keeps its default route and its resolver, which container engines have made for themselves: what its containers
// send to the outside is masqueraded and leaves as the engine's own does, and its published ports work as ever. Masquerading is done
// where subnet.env says FLANNEL_IPMASQ=true, since docker then need not (nsutil/transit.go).
//
// A subnet has one owner: gateway and other attachments exclude each other on a node.

package node

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// gatewayIfName is the TAP's name: eth0 and tap0 are those of slirp4netns and pasta.
const gatewayIfName = "rovl0"

// dummyAddr is our address towards a namespace that has the whole subnet.
var dummyAddr = netip.AddrFrom4([4]byte{192, 0, 0, 8})

// engineOf names the namespace of a gateway attachment, or of a loose one, by its path where the process is RootlessKit's child, which may have stayed in
// the host's.
func (n *Node) engineOf(r api.AttachRequest) api.AttachRequest {
	if r.PID == 0 {
		return r
	}
	path := n.edges.detached(r.PID)
	if path == "" {
		return r
	}
	if r.Name == "" && !r.Loose {
		r.Name = defaultName(r)
	}
	r.PID, r.Netns = 0, path
	return r
}

// excludedLocked tells why an attachment cannot be made beside those there are.
func (n *Node) excludedLocked(gateway bool) error {
	for _, a := range n.attachments {
		switch {
		case a.saved.Gateway:
			return api.Errorf(api.CodeInUse, "the whole subnet %v is routed to %q (attach --gateway): start containers with that engine, or `rootless-ovl detach %s` first, or run a second node on this host (up with --state-dir, --runtime-dir and --port of its own)",
				a.saved.Addr.Masked(), a.saved.Name, a.saved.Name)
		case gateway:
			return api.Errorf(api.CodeInUse, "%q has the address %v of the subnet, which would be routed to the namespace as a whole: `rootless-ovl detach` what `rootless-ovl ps` lists first, or run a second node on this host (up with --state-dir, --runtime-dir and --port of its own)",
				a.saved.Name, a.saved.Addr.Addr())
		}
	}
	return nil
}

// gatewayTAP is the namespace's side of a gateway attachment, where c is that of an ordinary one.
func gatewayTAP(c nsutil.TAPConfig, subnet, network netip.Prefix) nsutil.TAPConfig {
	c.Addrs = []netip.Prefix{netip.PrefixFrom(networkAddr(subnet), 32)}
	c.Routes = []nsutil.Route{{Dst: netip.PrefixFrom(dummyAddr, 32)}, {Dst: network, Gateway: dummyAddr}}
	// The superpackets were made for the interfaces of the containers, whose limit is the kernel's: one that the TAP did not take would be
	// cut into single packets by the namespace's kernel.
	c.GSOMaxSize = maxGSO
	return c
}

// letThrough has the namespace's firewall let a gateway attachment's packets through. What it cannot do is told, and no reason to do
// without the attachment: without a firewall nothing is in the way.
func (n *Node) letThrough(a *attachment, ns namespace) {
	if !a.saved.Gateway {
		return
	}
	n.mu.Lock()
	t := nsutil.Transit{IfName: a.saved.IfName, Network: n.netConfig.Network, Subnet: a.saved.Addr.Masked(), Masquerade: !n.cfg.NoIPMasq}
	n.mu.Unlock()
	n.lookAtBridges(a, ns)
	err := ns.allow(t)
	if err == nil {
		return
	}
	n.log.Warn("the firewall of the namespace was not changed: should the policy of its FORWARD chain be drop, peers cannot begin a connection to its containers",
		"name", a.saved.Name, "where", a.saved.where(), "err", err, "remedy", "in the namespace: iptables -A FORWARD -i "+t.IfName+" -j ACCEPT")
	n.mu.Lock()
	defer n.mu.Unlock()
	a.problem = joined(a.problem, err.Error())
}

// lookAtBridges tells of an engine that was not started with a bridge in the subnet, once: it may yet come.
func (n *Node) lookAtBridges(a *attachment, ns namespace) {
	bridges, err := ns.bridges()
	if err != nil {
		n.log.Debug("the bridges in the namespace are not known", "name", a.saved.Name, "err", err)
		return
	}
	subnet, elsewhere := a.saved.Addr.Masked(), ""
	for _, b := range bridges {
		for _, p := range b.Addrs {
			if subnet.Contains(p.Addr()) {
				return
			}
			elsewhere = cmp.Or(elsewhere, fmt.Sprintf("%s has %v", b.IfName, p))
		}
	}
	if elsewhere == "" {
		return
	}
	problem := fmt.Sprintf("when it was looked at, none of its bridges was in the subnet %v, and %s: start dockerd with --bip=%v (FLANNEL_SUBNET), or make podman's network with that subnet", subnet, elsewhere, gatewayOf(subnet))
	n.log.Warn("the engine has no bridge in the subnet, so that its containers are not on the overlay", "name", a.saved.Name, "where", a.saved.where(), "problem", problem)
	n.mu.Lock()
	defer n.mu.Unlock()
	a.problem = joined(a.problem, problem)
}

// gatewayOf is the bridge's address in the subnet, as subnet.env has it.
func gatewayOf(subnet netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(gatewayAddr(subnet), subnet.Bits())
}

// takeBack undoes letThrough, where the namespace is still there.
func (n *Node) takeBack(a *attachment) {
	if !a.saved.Gateway {
		return
	}
	ns, err := n.openAttached(a)
	if err != nil {
		return // it has ended
	}
	defer ns.Close()
	n.forbid(ns, n.savedOf(a))
}

// forbid has the firewall of an attachment's namespace forget what letThrough has made.
func (n *Node) forbid(ns namespace, s savedAttachment) {
	if !s.Gateway {
		return
	}
	if err := ns.forbid(s.IfName); err != nil {
		n.log.Warn("firewall rules not removed from the namespace", "name", s.Name, "where", s.where(), "err", err)
	}
}

// gateway is where the container, or the namespace of a gateway attachment, sends what is for others.
func (s *savedAttachment) gateway() netip.Addr {
	if s.Gateway {
		return dummyAddr
	}
	return gatewayAddr(s.Addr)
}

// wholeSubnet is the port of the namespace that our subnet is routed to as a whole, or nil.
func wholeSubnet(subnet netip.Prefix, attachments []attachedPort) *forwarder.Port {
	for _, a := range attachments {
		if a.whole && a.addr.Masked() == subnet.Masked() {
			return a.port
		}
	}
	return nil
}
