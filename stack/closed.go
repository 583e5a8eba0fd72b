// This file is what containers may not reach through the gateway unless a flag opens it.

package stack

import (
	"net/netip"
	"time"
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

// localNAT64 is for a site's own NAT64 (RFC 8215): the IPv4 address stands where RFC 6052 section 2.2 has it for the length of the prefix that the
// site has chosen, which cannot be told from an address.
var localNAT64 = netip.MustParsePrefix("64:ff9b:1::/48")

// localNAT64At is where the four bytes are for prefixes of 48, 56, 64 and 96 bits. Byte 8 is always zero.
var localNAT64At = [][4]int{{6, 7, 9, 10}, {7, 9, 10, 11}, {9, 10, 11, 12}, {12, 13, 14, 15}}

// standsFor are the IPv4 addresses that an IPv6 one may stand for: none, one, or one for each way to read it. Of those ways, one by which it would
// be of 0.0.0.0/8 is none, unless all are.
func standsFor(a netip.Addr) (found []netip.Addr) {
	b := a.As16()
	if localNAT64.Contains(a) {
		for _, at := range localNAT64At {
			if v4 := [4]byte{b[at[0]], b[at[1]], b[at[2]], b[at[3]]}; v4[0] != 0 {
				found = append(found, netip.AddrFrom4(v4))
			}
		}
		if found != nil {
			return found
		}
		return []netip.Addr{netip.IPv4Unspecified()}
	}
	for _, p := range embedded4 {
		if p.Contains(a) {
			return []netip.Addr{netip.AddrFrom4([4]byte(b[12:]))}
		}
	}
	return nil
}

// judge says whether a container may talk to a. It looks at the address only; denied looks at ports.
func (c *Config) judge(a netip.Addr) verdict {
	switch {
	case a.Is4In6(): // never on a wire; the host's sockets would take it for IPv4 (RFC 4291 section 2.5.5.2)
		return closed
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
	for _, v4 := range standsFor(a) {
		if c.judge(v4) != open {
			return closed
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
// the kernel, whose answer is believed for a moment (hostAddressKept): for no longer is an address that the host has just got a way around.
func (g *Gateway) denied(dst netip.AddrPort) bool {
	d := g.deny.Load()
	if d.at[dst] || d.at[netip.AddrPortFrom(dst.Addr(), 0)] {
		return true
	}
	if !d.onHost[dst.Port()] && !d.onHost[0] {
		return false
	}
	return g.hostAddrs.has(dst.Addr(), time.Now())
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
