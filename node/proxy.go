// This file is the node's proxy: its listener, and what it may dial.

package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/proxy"
)

// listenProxy opens the proxy's port; nil if none is wanted. The caller has Serve close it.
func (n *Node) listenProxy() (*net.TCPListener, error) {
	if !n.cfg.Proxy.IsValid() {
		return nil, nil
	}
	ln, err := n.givenTCP(givenProxy, n.cfg.Proxy)
	if ln == nil && err == nil {
		ln, err = listenTCP(n.cfg.Proxy)
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("proxy: %v is taken: choose another port with --proxy", n.cfg.Proxy)
	case errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("proxy: port %d is for root: choose one from 1024 up with --proxy, or lower net.ipv4.ip_unprivileged_port_start as root (%w)", n.cfg.Proxy.Port(), err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fmt.Errorf("proxy: %v is not an address of this host (see `ip address`): give --proxy one that is, or only a port for loopback (%w)", n.cfg.Proxy.Addr(), err)
	case err != nil:
		return nil, fmt.Errorf("proxy: %w: choose another address or port with --proxy", err)
	}
	at := ln.Addr().(*net.TCPAddr).AddrPort()
	n.log.Info("proxy", "addr", at)
	if !n.cfg.Proxy.Addr().IsLoopback() {
		n.log.Warn("the proxy listens beyond loopback: whoever reaches it reaches every container of the overlay, without a password", "addr", at)
	}
	n.forProxy = ln
	n.listensOn(at, "its proxy (--proxy)")
	n.mu.Lock()
	defer n.mu.Unlock()
	n.proxyAddr = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	return ln, nil
}

// newProxy makes the proxy, which dials the overlay only.
func (n *Node) newProxy() *proxy.Proxy {
	return proxy.New(proxy.Config{Log: n.log, Dial: n.dialForProxy})
}

// dialForProxy is dialOverlay with errors of the kinds that the proxy tells its clients apart.
func (n *Node) dialForProxy(ctx context.Context, host string, port uint16) (proxy.Conn, error) {
	conn, err := n.dialOverlay(ctx, host, port)
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, api.ErrDenied):
		err = kindOf{err, proxy.ErrForbidden}
	case errors.Is(err, api.ErrNotFound):
		err = kindOf{err, proxy.ErrNoName}
	}
	return nil, err
}

// kindOf is an error with a kind that its text does not repeat.
type kindOf struct{ err, kind error }

func (k kindOf) Error() string   { return k.err.Error() }
func (k kindOf) Unwrap() []error { return []error{k.err, k.kind} }
