// This file knows when something was heard of each peer, for people who look for a host that is gone. The packet path counts packets anyway; here the
// counts are looked at now and then.

package node

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
)

// heard is what was received from an underlay address.
type heard struct {
	packets uint64
	at      time.Time // when there were more, to within pulse; zero: none yet
}

// listen looks at the counts.
func (n *Node) listen() {
	n.mu.Lock()
	router := n.router
	n.mu.Unlock()
	if router == nil {
		return
	}
	n.noteHeard(time.Now(), router.Stats().Peers)
}

// noteHeard takes the counts at now. They begin at 0 again when a peer's configuration changes.
func (n *Node) noteHeard(now time.Time, peers map[netip.AddrPort]forwarder.PeerStats) {
	n.mu.Lock()
	defer n.mu.Unlock()
	next := make(map[netip.AddrPort]heard, len(peers))
	for addr, s := range peers {
		h := n.heard[addr]
		if s.RecvPackets != h.packets && s.RecvPackets > 0 {
			h.at = now
		}
		h.packets = s.RecvPackets
		next[addr] = h
	}
	n.heard = next
}

// silence says, for people, that a peer which containers here send to does not answer path MTU discovery; empty when it does, or was not asked.
// since is when it stopped, last when anything was received from it (zero: never), at now. stock nodes may have been told to answer no pings.
func silence(to netip.AddrPort, stock bool, since, last, now time.Time) string {
	if since.IsZero() {
		return ""
	}
	long := now.Sub(since).Round(time.Second)
	switch {
	case last.After(since) && stock:
		return ""
	case last.After(since):
		return fmt.Sprintf("for %v it has answered nothing that it was asked, though packets come from it: look for a firewall that lets UDP to %v pass in one direction only", long, to)
	case last.IsZero():
		return fmt.Sprintf("for %v it has answered nothing, and nothing was ever received from it: is the host up, and does UDP to %v pass?", long, to)
	}
	return fmt.Sprintf("for %v it has answered nothing, and nothing was received from it: is the host up, and does UDP to %v pass?", long, to)
}
