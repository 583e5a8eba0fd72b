// What is asked of an attachment whose interface somebody else configures, and at which other addresses its resolver answers.

package api

import "net/netip"

// maxDNSAt bounds AttachRequest.DNSAt: the libc reads three, and container engines hand on what the host has.
const maxDNSAt = 16

// ResolverAddrs reads DNSAt. Errors have CodeInvalid.
func (r AttachRequest) ResolverAddrs() ([]netip.Addr, error) {
	if len(r.DNSAt) > maxDNSAt {
		return nil, Errorf(CodeInvalid, "dns_at has %d addresses: the most is %d", len(r.DNSAt), maxDNSAt)
	}
	var addrs []netip.Addr
	for _, s := range r.DNSAt {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast():
			return nil, Errorf(CodeInvalid, "dns_at: %q is not an address that a resolver can have: write it as 10.0.2.3", clip(s))
		case a.IsLoopback():
			return nil, Errorf(CodeInvalid, "dns_at: %v is the container's own loopback, which it sends nothing to the gateway for: give the container the gateway as its resolver", a)
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

// checkLoose is the part of Validate about Loose and DNSAt.
func (r AttachRequest) checkLoose() error {
	if r.Loose && r.Gateway {
		return Errorf(CodeInvalid, "the gateway of the whole subnet is to be loose: leave one of the two out")
	}
	if r.Gateway && len(r.DNSAt) > 0 {
		return Errorf(CodeInvalid, "dns_at is given to the gateway of the whole subnet, whose containers ask their engine's resolver: leave it out")
	}
	_, err := r.ResolverAddrs()
	return err
}
