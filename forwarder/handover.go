// This file hands the underlay sockets over to another process, in which another Router goes on with them: they stay open, and what arrives meanwhile
// waits in them.

package forwarder

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// ErrOtherSockets says that the sockets of another Router are not such as this one would open.
var ErrOtherSockets = errors.New("the underlay sockets are of another kind")

// SocketSet describes the sockets of one family. What the kernel was told of them stays with them.
type SocketSet struct {
	Addr    netip.AddrPort `json:"addr"`
	Loops   int            `json:"loops"`
	Lanes   int            `json:"lanes"`
	Encap   int            `json:"encap"` // bytes before an inner packet, by which packets are steered
	GSO     bool           `json:"gso,omitempty"`
	GRO     bool           `json:"gro,omitempty"`
	Steered bool           `json:"steered,omitempty"`
}

// Count is how many sockets there are.
func (s SocketSet) Count() int { return s.Loops * s.Lanes }

// check refuses what no Router can have said.
func (s SocketSet) check() error {
	if s.Loops < 1 || s.Loops > 1<<12 || s.Lanes < 1 || s.Lanes > maxLanes || !s.Addr.IsValid() || s.Addr.Port() == 0 || s.Addr.Addr().Is4In6() {
		return fmt.Errorf("%w: %+v", ErrOtherSockets, s)
	}
	return nil
}

// GivenSockets are sockets of another Router, which a new one takes over in the place of some that it would open: it duplicates the descriptors,
// which stay the caller's.
type GivenSockets struct {
	SocketSet
	FDs []int
}

// Sockets describes the sockets in use, with duplicates of their descriptors, which are the caller's.
func (r *Router) Sockets() (all []GivenSockets, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() {
		return nil, errStopped
	}
	for _, s := range r.under.Load() {
		if s == nil {
			continue
		}
		g := GivenSockets{SocketSet: SocketSet{s.addr, len(r.loops), s.lanes, r.vxlan.Encap(), s.gso, s.gro, s.steered}}
		for _, fd := range s.fds {
			dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				for _, done := range append(all, g) {
					(&sockets{fds: done.FDs}).close()
				}
				return nil, fmt.Errorf("underlay socket: %w", err)
			}
			g.FDs = append(g.FDs, dup)
		}
		all = append(all, g)
	}
	return all, nil
}

// given finds the sockets of a family among those of another Router. ok is false if there are none for this address; where they are of another kind,
// a new set could not be bound beside them.
func (c *UnderlayConfig) given(addr netip.AddrPort, loops int) (s *sockets, ok bool, err error) {
	for _, g := range c.Given {
		if g.Addr.Addr() != addr.Addr() || addr.Port() != 0 && g.Addr.Port() != addr.Port() {
			continue
		}
		if err := g.check(); err != nil {
			return nil, false, err
		}
		if g.Loops != loops || g.Encap != c.VXLAN.Encap() || len(g.FDs) != g.Count() {
			return nil, false, fmt.Errorf("%w: %d sockets for %d loops and %d bytes of encapsulation, where %d loops and %d bytes are wanted: stop the daemon that runs and start this one",
				ErrOtherSockets, len(g.FDs), g.Loops, g.Encap, loops, c.VXLAN.Encap())
		}
		s = &sockets{addr: g.Addr, lanes: g.Lanes, gso: g.GSO, gro: g.GRO, steered: g.Steered}
		for _, fd := range g.FDs {
			own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				s.close()
				return nil, false, fmt.Errorf("underlay socket: %w", err)
			}
			s.fds = append(s.fds, own)
		}
		s.recvBuffer = receiveBuffer(s.fds[0])
		return s, true, nil
	}
	return nil, false, nil
}
