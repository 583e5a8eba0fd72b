// This file knows the TCP ports that the daemon itself listens on, so that nobody looks for another program behind them.

package node

import (
	"errors"
	"net/netip"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/publish"
)

// ownPort is a TCP port of the host that the daemon listens on.
type ownPort struct {
	at   savedPort
	what string // whose it is, and the flag that moves it
}

// listensOn remembers a port of the daemon's.
func (n *Node) listensOn(at netip.AddrPort, what string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := savedPort{HostAddr: at.Addr().Unmap(), HostPort: at.Port(), Proto: publish.TCP}
	if s.HostAddr == netip.IPv6Unspecified() {
		s.HostAddr = netip.Addr{} // such a listener has IPv4 too
	}
	n.ownPorts = append(n.ownPorts, ownPort{s, what})
}

// takenByUs puts the error of a port that could not be opened into other words where the daemon itself has the port.
func (n *Node) takenByUs(s savedPort, err error) error {
	if !errors.Is(err, publish.ErrPortTaken) {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, own := range n.ownPorts {
		if s.collides(own.at) {
			return api.Errorf(api.CodeInUse, "port %d/%s of this host is the daemon's own, of %s: choose another port", s.HostPort, s.Proto, own.what)
		}
	}
	return err
}
