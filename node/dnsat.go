// This file is about other addresses than the gateway's at which its resolver answers a container (AttachRequest.DNSAt). Docker's resolver in a
// container asks on, from the container's own address, the server that dockerd's resolv.conf names: 10.0.2.3 under slirp4netns, 169.254.1.1 under
// pasta. Nobody is there for a container of the overlay, whose gateway answers in its place.

package node

import "github.com/rootless-ovl/rootless-ovl/api"

// checkDNSAtLocked refuses addresses for which packets never come to the gateway.
func (n *Node) checkDNSAtLocked(r api.AttachRequest) error {
	addrs, err := r.ResolverAddrs()
	if err != nil {
		return err
	}
	me := n.selfLocked()
	for _, a := range addrs {
		own := me.subnet.IsValid() && a == gatewayAddr(me.subnet) || me.subnet6.IsValid() && a == gatewayAddr(me.subnet6)
		if !own && (me.network.IsValid() && me.network.Contains(a) || me.network6.IsValid() && me.network6.Contains(a)) {
			return api.Errorf(api.CodeInvalid, "dns_at: %v is an address of the overlay, where a resolver would answer itself: leave it out", a)
		}
	}
	return nil
}
