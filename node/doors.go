// This file closes the store to containers, at every address that it is known to have: whoever reaches it can change the overlay.

package node

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

const (
	// lookupTimeout bounds finding the addresses of the store.
	lookupTimeout = 3 * time.Second
	// doorsInterval is how often the store is asked for its members, and names are looked up anew.
	doorsInterval = time.Minute
	// doorsRetry is the same while the store does not say.
	doorsRetry = 5 * time.Second
)

// storeDoors are the ways to the store, as far as they are known. It is for one goroutine at a time.
type storeDoors struct {
	hasAddr func(netip.Addr) (bool, error) // tells whether an address is this host's
	ours    []string                       // host:ports of an embedded server
	given   []string                       // URLs of --etcd-endpoints
	members [][]string                     // URLs of each member, as last listed
	found   map[string][]netip.Addr        // of a host, when it could last be looked up
}

// addrs are the addresses of the store, for stack.Gateway.Deny. A server that listens on every address of this host is at 0.0.0.0; one of this
// host that we were given might.
func (d *storeDoors) addrs(ctx context.Context) []netip.AddrPort {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	var all []netip.AddrPort
	add := func(a netip.Addr, port uint16) {
		if at := netip.AddrPortFrom(a, port); !slices.Contains(all, at) {
			all = append(all, at)
		}
	}
	for _, door := range d.ours {
		host, port, _ := splitDoor(door)
		for _, a := range d.lookUp(ctx, host) {
			add(a, port)
		}
	}
	for _, e := range d.given {
		host, port, ok := splitDoor(e)
		if !ok {
			continue
		}
		for _, a := range d.lookUp(ctx, host) {
			add(a, port)
			if here, err := d.hasAddr(a); a.IsLoopback() || here && err == nil {
				add(netip.IPv4Unspecified(), port)
			}
		}
	}
	for _, urls := range d.members {
		for _, m := range d.member(ctx, urls) {
			add(m.Addr(), m.Port())
		}
	}
	return all
}

// member is every address of a member with every port of it: one that tells clients "localhost" has told the other members where it is. Addresses of
// the loopback are left out, for they are another host's to whoever reads them.
func (d *storeDoors) member(ctx context.Context, urls []string) (all []netip.AddrPort) {
	var ports []uint16
	var addrs []netip.Addr
	for _, u := range urls {
		host, port, ok := splitDoor(u)
		if !ok {
			continue
		}
		ports = append(ports, port)
		for _, a := range d.lookUp(ctx, host) {
			if !a.IsLoopback() && !a.IsUnspecified() {
				addrs = append(addrs, a)
			}
		}
	}
	for _, a := range addrs {
		for _, port := range ports {
			all = append(all, netip.AddrPortFrom(a, port))
		}
	}
	return all
}

// lookUp is the addresses of a host, now or when it last had some.
func (d *storeDoors) lookUp(ctx context.Context, host string) []netip.Addr {
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil { // what was never resolved, the client has not reached either
		return d.found[host]
	}
	for i, ip := range ips {
		ips[i] = ip.Unmap().WithZone("")
	}
	if d.found == nil {
		d.found = make(map[string][]netip.Addr)
	}
	d.found[host] = ips
	return ips
}

// splitDoor is the host and the port of a URL, or of host:port. No port of 0 passes: it would stand for all.
func splitDoor(door string) (host string, port uint16, ok bool) {
	if u, err := url.Parse(door); err == nil && u.Host != "" {
		door = u.Host
	}
	host, name, err := net.SplitHostPort(door)
	if err != nil {
		return "", 0, false
	}
	number, err := net.LookupPort("tcp", name)
	return host, uint16(number), err == nil && number > 0
}

// storeAddrs are the addresses of the store that containers may not reach through the gateway. Asked for its members, a store may fail to answer:
// what was known of them stays.
func (n *Node) storeAddrs(ctx context.Context, s *openedStore, ask bool) ([]netip.AddrPort, error) {
	d := &s.doors
	d.hasAddr = n.edges.hasAddr
	if s.server != nil {
		d.ours = s.server.Doors()
	} else {
		d.given = s.config.Endpoints
	}
	var err error
	if ask {
		var members [][]string
		if members, err = s.client.MemberURLs(ctx); err == nil {
			d.members = members
		} else {
			n.log.Debug("the store does not tell its addresses: containers are kept from those that are known", "err", err)
		}
	}
	return d.addrs(ctx), err
}

// denials are what no container reaches through the gateway: the store, and what of the node listens.
func (n *Node) denials(store []netip.AddrPort) []netip.AddrPort {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = slices.Clone(store)
	if n.proxyAddr.IsValid() { // who comes by it comes from the gateway
		n.closed = append(n.closed, n.proxyAddr)
	}
	return n.closed
}

// closeDoors keeps containers from the store while its members and their addresses change.
func (n *Node) closeDoors(ctx context.Context, s *openedStore) error {
	for ctx.Err() == nil {
		addrs, err := n.storeAddrs(ctx, s, true)
		if ctx.Err() != nil {
			break
		}
		n.stack.Deny(n.denials(addrs))
		pause := doorsInterval
		if errors.Is(err, lease.ErrUnreachable) {
			pause = doorsRetry
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
	return nil
}
