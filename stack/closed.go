// This file is what containers may not reach through the gateway unless a flag opens it.

package stack

import (
	"net/netip"

	"github.com/rootless-ovl/rootless-ovl/internal/hostnet"
)

// verdict is what becomes of a packet because of its destination address alone.
type verdict uint8

const (
	open    verdict = iota
	closed          // refused with an ICMP error
	silence         // dropped: ICMP errors are not sent about broadcast and multicast (RFC 1122 section 3.2.2)
)

// awsMetadataIPv6 is the IPv6 address of the instance metadata service of AWS; it is a unique local address, not a
// link-local one.
var awsMetadataIPv6 = netip.MustParseAddr("fd00:ec2::254")

// The prefixes of IPv6 that stand for an IPv4 address in their last 32 bits: NAT64 (RFC 6052), IPv4-compatible and
// IPv4-translated (RFC 4291, RFC 7915). A host with such a route would let a container around the rules for IPv4.
var embedded4 = []netip.Prefix{
	netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("::ffff:0:0:0/96"),
	netip.MustParsePrefix("::/96"),
}

// judge says whether a container may talk to a. It looks at the address only; denied looks at ports.
func (c *Config) judge(a netip.Addr) verdict {
	a = a.Unmap()
	switch {
	case a.IsMulticast():
		return silence
	case a.IsLoopback():
		if c.HostLoopback {
			return open
		}
		return closed
	case a.IsLinkLocalUnicast(), a == awsMetadataIPv6:
		if c.LinkLocal {
			return open
		}
		return closed
	case a.IsUnspecified():
		return closed
	}
	if a.Is4() {
		b := a.As4()
		switch {
		case b == [4]byte{255, 255, 255, 255}:
			return silence
		case b[0] == 0: // 0.0.0.0/8, "this network" (RFC 1122); Linux takes 0.0.0.0 for itself
			return closed
		}
		return open
	}
	for _, p := range embedded4 {
		if p.Contains(a) {
			b := a.As16()
			if v := c.judge(netip.AddrFrom4([4]byte(b[12:]))); v != open {
				return closed
			}
		}
	}
	return open
}

// denials are what Deny was given. They are never changed.
type denials struct {
	at     map[netip.AddrPort]bool
	onHost map[uint16]bool // ports of this host at whatever address it has
}

// denied says whether Deny lists the destination. Which addresses this host has is asked when it matters, for a port that is denied, and of
// the kernel, so that one which came a moment ago is no way around.
func (g *Gateway) denied(dst netip.AddrPort) bool {
	d := g.deny.Load()
	if d.at[dst] || d.at[netip.AddrPortFrom(dst.Addr(), 0)] {
		return true
	}
	if !d.onHost[dst.Port()] && !d.onHost[0] {
		return false
	}
	has, err := hostnet.Has(dst.Addr())
	return has || err != nil
}

// target is where a container's flow to dst is carried on to: dst itself, or the host's loopback when dst is the gateway and that is
// open, to all or on this port to this one. ok is false when nothing is there for containers.
func (g *Gateway) target(container netip.Addr, dst netip.AddrPort) (to netip.AddrPort, ok bool) {
	if !g.isOwn(dst.Addr()) {
		return dst, true
	}
	src, has := g.errorSource(dst.Addr().Is4())
	if (!g.cfg.HostLoopback || !has || src != dst.Addr()) && !g.opensHost(container, dst.Port()) {
		return netip.AddrPort{}, false
	}
	if dst.Addr().Is4() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), dst.Port()), true
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), dst.Port()), true
}
