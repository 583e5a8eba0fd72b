// This file is the connections of a client, so that those which cannot live any more are given up at once: a connection from an
// address that this host has no longer hangs until gRPC's keepalive notices, a quarter of a minute.

package lease

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"

	"google.golang.org/grpc/credentials"
)

// connections are those of a client that are open.
type connections struct {
	mu   sync.Mutex
	open map[net.Conn]bool
}

// listed is credentials whose connections are in a list while they are open.
type listed struct {
	credentials.TransportCredentials
	in *connections
}

func (l listed) Clone() credentials.TransportCredentials {
	return listed{l.TransportCredentials.Clone(), l.in}
}

func (l listed) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := l.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	l.in.mu.Lock()
	defer l.in.mu.Unlock()
	l.in.open[raw] = true
	return &listedConn{conn, raw, l.in}, info, nil
}

type listedConn struct {
	net.Conn
	raw net.Conn
	in  *connections
}

func (c *listedConn) Close() error {
	c.in.mu.Lock()
	delete(c.in.open, c.raw)
	c.in.mu.Unlock()
	return c.Conn.Close()
}

// DropLost closes the connections to the store from addresses that this host has no longer. Others are opened at once; requests under
// way fail as when the store is away.
func (c *Client) DropLost() error {
	have, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	c.conns.drop(func(local netip.Addr) bool {
		return !slices.ContainsFunc(have, func(a net.Addr) bool {
			p, err := netip.ParsePrefix(a.String())
			return err == nil && (p.Addr() == local || p.Contains(local) && local.IsLoopback())
		})
	})
	return nil
}

// DropAll closes the connections to the store: this host has slept, and nobody knows what the other end has made of that. See DropLost.
func (c *Client) DropAll() { c.conns.drop(func(netip.Addr) bool { return true }) }

func (c *connections) drop(lost func(local netip.Addr) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for raw := range c.open {
		if a, ok := raw.LocalAddr().(*net.TCPAddr); ok && lost(a.AddrPort().Addr().Unmap().WithZone("")) {
			_ = raw.Close() // gRPC reads the error and closes the rest
		}
	}
}
