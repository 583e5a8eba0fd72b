// This file is the way into the overlay for processes of this host: a destination is looked up, checked, and dialled from the gateway's own
// address. The API's streams and the proxy come here; nothing but addresses of the overlay is dialled.

package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/internal/relay"
	"github.com/rootless-ovl/rootless-ovl/stack"
)

const (
	// dialTimeout bounds how long all addresses of a name may take to accept a connection.
	dialTimeout = 20 * time.Second
	// dialShare bounds it for one address: three SYNs.
	dialShare = 5 * time.Second
)

// inwardDialer is the gateway as it dials containers.
type inwardDialer interface {
	DialTCP(ctx context.Context, from, to netip.AddrPort) (stack.Conn, error)
}

// Forward connects a client of the API with a container.
func (n *Node) Forward(ctx context.Context, to string, accept func() (*api.Stream, error)) error {
	host, port, err := api.SplitTarget(to)
	if err != nil {
		return err
	}
	conn, err := n.dialOverlay(ctx, host, port)
	if err != nil {
		return err
	}
	s, err := accept()
	if err != nil {
		relay.Reset(conn)
		return err
	}
	if err := relay.Join(ctx, s, conn); err != nil {
		n.log.Debug("a connection into the overlay was cut off", "to", to, "err", err)
	}
	return nil
}

// dialOverlay opens a connection to a name or an address of the overlay. Errors say which of the two it is not, or why nobody answers.
func (n *Node) dialOverlay(ctx context.Context, host string, port uint16) (stack.Conn, error) {
	dialer, addrs, err := n.destinations(host)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	for _, a := range addrs {
		to := netip.AddrPortFrom(a, port)
		var conn stack.Conn
		if err = n.leadsNowhere(a); err == nil {
			conn, err = dialOne(ctx, dialer, to)
		}
		if err == nil {
			return conn, nil
		}
		err = unanswered(host, to, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

func dialOne(ctx context.Context, dialer inwardDialer, to netip.AddrPort) (stack.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialShare)
	defer cancel()
	return dialer.DialTCP(ctx, netip.AddrPort{}, to)
}

// leadsNowhere is the error of an address that the route table (routes.go) leads to nobody: packets of the gateway's own are not answered
// by the router. Of a peer's subnet only the peer knows.
func (n *Node) leadsNowhere(to netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.attachments {
		if a.phase == live && (a.saved.Addr.Addr() == to || a.saved.Addr6.Addr() == to) {
			return nil
		}
	}
	if n.pool.subnet.Contains(to) || n.subnet6.Contains(to) {
		return syscall.EHOSTUNREACH
	}
	for i := range n.peers {
		for _, w := range n.peers[i].ways() {
			if w.subnet.Contains(to) {
				return nil
			}
		}
	}
	return syscall.ENETUNREACH
}

// unanswered says what a container's silence or refusal means.
func unanswered(host string, to netip.AddrPort, err error) error {
	who := to.String()
	if host != to.Addr().String() {
		who = fmt.Sprintf("%s (%v)", host, to)
	}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return api.Errorf(api.CodeUnavailable, "%s: %w: nothing listens there, or on the container's loopback alone", who, syscall.ECONNREFUSED)
	case errors.Is(err, syscall.EHOSTUNREACH):
		return api.Errorf(api.CodeUnavailable, "%s: %w: no container has this address", who, syscall.EHOSTUNREACH)
	case errors.Is(err, syscall.ENETUNREACH):
		return api.Errorf(api.CodeUnavailable, "%s: %w: no node has its subnet, or none that can be sent to (`rootless-ovl peers`)", who, syscall.ENETUNREACH)
	case errors.Is(err, syscall.EACCES):
		return api.Errorf(api.CodeUnavailable, "%s: %w: its policy does not let this node's gateway in (--isolate, --allow-from), or a firewall in the container does not", who, syscall.EACCES)
	case errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, context.DeadlineExceeded):
		return api.Errorf(api.CodeUnavailable, "%s does not answer: %w: its node may be down, or a firewall drops the packets", who, syscall.ETIMEDOUT)
	case errors.Is(err, syscall.EAGAIN):
		return api.Errorf(api.CodeExhausted, "%s: %w", who, err)
	}
	return api.Errorf(api.CodeUnavailable, "%s: %w", who, err)
}

// destinations are the addresses that a host of the overlay has: of a name, or that one.
func (n *Node) destinations(host string) (inwardDialer, []netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.open || n.dialer == nil {
		return nil, nil, api.Errorf(api.CodeUnavailable, "the node has no subnet yet (%s): `rootless-ovl status` says more", n.state)
	}
	for _, a := range n.attachments {
		if a.saved.Gateway {
			return nil, nil, api.Errorf(api.CodeUnavailable,
				"the gateway's address is that of a container engine's bridge (attach --gateway), so that no answer would come back: dial from another node, or from a second one on this host")
		}
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if err := n.dialableLocked(a); err != nil {
			return nil, nil, err
		}
		return n.dialer, []netip.Addr{a.Unmap()}, nil
	}
	name := strings.TrimSuffix(strings.ToLower(host), ".")
	addrs := slices.DeleteFunc(n.lookupLocked(name), func(a netip.Addr) bool { return n.dialableLocked(a) != nil })
	if len(addrs) == 0 {
		return nil, nil, api.Errorf(api.CodeNotFound, "no container of the overlay is called %q: `rootless-ovl ps` lists those of this node", host)
	}
	return n.dialer, addrs, nil
}

// dialableLocked says why an address is none that is dialled.
func (n *Node) dialableLocked(a netip.Addr) error {
	a = a.Unmap()
	switch {
	case a.Zone() != "" || !n.netConfig.Network.Contains(a) && !(carriesIPv6(n.netConfig) && n.netConfig.IPv6Network.Contains(a)):
		networks := n.netConfig.Network.String()
		if carriesIPv6(n.netConfig) {
			networks += ", " + n.netConfig.IPv6Network.String()
		}
		return api.Errorf(api.CodeDenied, "%v is not in the overlay (%s): only addresses in it are dialled", a, networks)
	case slices.Contains(n.own, a):
		return api.Errorf(api.CodeDenied, "%v is the gateway's own address: only containers are dialled", a)
	}
	for i := range n.peers {
		for _, subnet := range []netip.Prefix{n.peers[i].lease.Subnet, n.peers[i].lease.Subnet6} {
			if subnet.Contains(a) && (a == gatewayAddr(subnet) || a == networkAddr(subnet)) {
				return api.Errorf(api.CodeDenied, "%v is the gateway's address of another node: only containers are dialled", a)
			}
		}
	}
	return nil
}

// lookupLocked is the addresses of a name in lower case and without a dot at its end.
func (n *Node) lookupLocked(name string) []netip.Addr {
	for _, a := range n.attachments {
		if a.phase == live && strings.EqualFold(a.saved.Name, name) {
			addrs := []netip.Addr{a.saved.Addr.Addr()}
			if a.saved.Addr6.IsValid() {
				addrs = append(addrs, a.saved.Addr6.Addr())
			}
			return addrs
		}
	}
	return n.zone.Lookup(name)
}
