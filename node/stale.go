// This file is about containers' connections to the outside that the last daemon carried and that went with it: a daemon that stops resets them,
// one that is killed cannot. So the next one lists what each container that it takes up again still believes to have, and has the gateway end it.

package node

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

const (
	// staleMost of a container are ended in a round; staleBatch of them, then a pause, so that the answers of a thousand containers do not crowd out
	// what else there is to do.
	staleMost  = 1024
	staleBatch = 64
	stalePause = 5 * time.Millisecond
)

// staleRounds are the pauses before the rounds, of which the first has the gateway begin: kernels answer a connection twice a second at most, and bound such answers as a whole.
var staleRounds = [...]time.Duration{20 * time.Millisecond, time.Second, 4 * time.Second}

// stale is an attachment that was taken up again.
type stale struct {
	a     *attachment
	known map[uint64]bool // connections, by their cookies, of the round before; nil: there was none
}

// endStale ends them in every container that adopt has taken up, round by round. It returns when all is done, or with ctx.
func (n *Node) endStale(ctx context.Context) error {
	list := n.adopted()
	for _, pause := range staleRounds {
		sleep(ctx, pause)
		for _, s := range list {
			if ctx.Err() != nil {
				return nil
			}
			n.endStaleOf(ctx, s)
		}
		list = slices.DeleteFunc(list, func(s *stale) bool { return len(s.known) == 0 })
	}
	return nil
}

// adopted are the attachments of an earlier daemon, but for namespaces whose own engine is their way out.
func (n *Node) adopted() (list []*stale) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.attachments {
		if a.phase == live && a.adopted && !a.saved.Gateway {
			list = append(list, &stale{a: a})
		}
	}
	return list
}

// openNow opens the namespace where an attachment is now.
func (n *Node) openNow(a *attachment) (namespace, error) {
	if !a.saved.Loose {
		return n.openAttached(a)
	}
	n.mu.Lock()
	l := a.link
	n.mu.Unlock()
	if l == nil {
		return nil, errLinkClosed
	}
	return l.openNamespace()
}

func (n *Node) endStaleOf(ctx context.Context, s *stale) {
	first, addrs := s.known == nil, s.a.saved.addrs()
	var conns []nsutil.TCPConnection
	ns, err := n.openNow(s.a)
	if err == nil {
		conns, err = ns.connections(staleMost, func(c nsutil.TCPConnection) bool {
			return slices.Contains(addrs, c.Local.Addr()) && n.carriesFor(addrs, c.Remote.Addr()) && (first || s.known[c.Cookie])
		})
		err = errors.Join(err, ns.Close())
	}
	if err != nil {
		n.log.Debug("connections of the last run are not looked at", "name", n.nameOf(s.a), "err", err)
	}
	s.known = make(map[uint64]bool, len(conns))
	for i, c := range conns {
		if i%staleBatch == staleBatch-1 {
			sleep(ctx, stalePause)
		}
		s.known[c.Cookie] = true
		n.stack.Provoke(c.Local, c.Remote)
	}
	if first && len(conns) > 0 {
		n.log.Info("connections to the outside went with the last daemon: the container is told", "name", n.nameOf(s.a), "connections", len(conns))
	}
}

// carriesFor tells whether what a container exchanges with an address is carried by the gateway, and not by the router or the container's own kernel.
func (n *Node) carriesFor(own []netip.Addr, remote netip.Addr) bool {
	if remote.IsLoopback() || slices.Contains(own, remote) {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Contains(n.own, remote) {
		return true
	}
	return !n.netConfig.Network.Contains(remote) && !(carriesIPv6(n.netConfig) && n.netConfig.IPv6Network.Contains(remote))
}

// sleep pauses, or returns with ctx.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
