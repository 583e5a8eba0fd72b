// This file decides as whom a container sees a client.

package publish

import "net/netip"

// Addresses are what the choice of a client's address depends on. It is not changed after it was handed over.
type Addresses struct {
	Container4, Container6 netip.Addr     // the container's; an invalid one: it has none of that family
	Gateway4, Gateway6     netip.Addr     // as whom clients are seen whose own address is not kept
	Overlay                []netip.Prefix // the networks of the overlay: nobody may pretend to be a container
}

// route is the source and the destination of what a client begins. A source that keeps the client's address keeps its port
// too; the gateway's has port 0, any port. It is not ok where the container has no address, or the gateway none of that family.
//
// The client's address is kept but for these, of which the gateway's address is seen: with SNAT; clients of the host's own loopback, which
// would be the container's own to it, and answered there; link-local ones, which have a meaning on their link alone; addresses
// of the overlay and of this container; what is no address of one host; and clients of a family that the container does not have.
func (a *Addresses) route(client netip.AddrPort, port uint16, snat bool) (from, to netip.AddrPort, ok bool) {
	c := client.Addr().Unmap()
	container, gateway, same := a.Container4, a.Gateway4, c.Is4()
	if c.Is6() && a.Container6.IsValid() || !a.Container4.IsValid() {
		container, gateway, same = a.Container6, a.Gateway6, c.Is6()
	}
	if !container.IsValid() {
		return from, to, false
	}
	to = netip.AddrPortFrom(container, port)
	if same && !snat && client.Port() != 0 && a.keeps(c) {
		return netip.AddrPortFrom(c, client.Port()), to, true
	}
	return netip.AddrPortFrom(gateway, 0), to, gateway.IsValid()
}

// reserved4 is kept for future use (RFC 1112 section 4), with the limited broadcast address (RFC 919).
var reserved4 = netip.MustParsePrefix("240.0.0.0/4")

// thisNetwork is RFC 1122's "this host on this network".
var thisNetwork = netip.MustParsePrefix("0.0.0.0/8")

// keeps tells whether a container may see this address as a client's.
func (a *Addresses) keeps(c netip.Addr) bool {
	if !c.IsValid() || c.Zone() != "" || c.IsUnspecified() || c.IsLoopback() || c.IsLinkLocalUnicast() || c.IsMulticast() ||
		reserved4.Contains(c) || thisNetwork.Contains(c) || c == a.Container4 || c == a.Container6 || c == a.Gateway4 || c == a.Gateway6 {
		return false
	}
	for _, p := range a.Overlay {
		if p.Contains(c) {
			return false
		}
	}
	return true
}
