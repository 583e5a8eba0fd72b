// This file follows the host to other addresses: a lease of DHCP that ran out, a laptop in another network. The sockets of the new
// addresses are opened and polled first; then every worker goes over to them when it begins its next batch (worker.begin), and
// the old ones are closed when all have. No worker waits, and none takes a lock.

package forwarder

import (
	"net/netip"
)

// Rebind binds the underlay to other addresses of the host, on the port that it has. A family whose address stays, or that addr6, invalid,
// has none for, keeps its sockets. Ports, tables, counters and probes that wait for an answer stay. What is on its way to an old address is
// lost. After an error nothing has changed. Rebind may be called at any time before the Router has stopped, from any goroutine but the
// packet path's.
func (r *Router) Rebind(addr, addr6 netip.Addr) error {
	if err := checkUnderlayAddrs(addr, addr6); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() {
		return errStopped
	}
	old := r.under.Load()
	next := *old
	for f, a := range [families]netip.Addr{outer4: addr, outer6: addr6} {
		if !a.IsValid() || old[f] != nil && old[f].addr.Addr() == a {
			continue
		}
		to := netip.AddrPortFrom(a, old[outer4].addr.Port())
		s, err := openSockets(r.underlayConfig, to, len(r.loops), old[outer4].lanes) // as many as the loops have memory for
		if err != nil {
			r.discardLocked(&next, old)
			return explainListen(err, to, r.vxlan)
		}
		next[f] = s
		for _, l := range r.loops { // before they are used: a loop that is told of them too soon finds nothing in the old ones
			if err := l.watchLanes(s); err != nil {
				r.discardLocked(&next, old)
				return err
			}
		}
	}
	if next == *old {
		return nil
	}
	r.under.Store(&next)
	r.discardLocked(old, &next)
	return nil
}

// discardLocked closes those of u's sockets that are not in kept as well, once no worker can use them.
func (r *Router) discardLocked(u, kept *underlay) {
	for f, s := range u {
		if s != nil && s != kept[f] {
			for _, l := range r.loops {
				l.unwatchLanes(s)
			}
		}
	}
	r.quiesceLocked()
	for f, s := range u {
		if s != nil && s != kept[f] {
			s.close()
		}
	}
}
