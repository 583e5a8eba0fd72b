// This file is what becomes of a connection that both sides have ended: gVisor may yet have bytes for the container, and keeps them for as
// long as the container says that it is there and has no room. Until they are gone the flow keeps its place in the table and
// its part of the budget, and ends with its container.

package stack

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// settling is a connection of which nothing is read and to which nothing is written any more.
type settling struct {
	ns    *netstack
	ep    tcpip.Endpoint
	queue *waiter.Queue // events of ep
	event waiter.Entry
	over  atomic.Bool
	done  func()
}

// settle closes ep and calls done, once gVisor has nothing more to tell the container, or the container has taken nothing for
// Timeouts.TCPLast. Abort is quicker.
func (ns *netstack) settle(ep tcpip.Endpoint, queue *waiter.Queue, done func()) {
	if settled(ep) {
		ep.Close()
		done()
		return
	}
	s := &settling{ns: ns, ep: ep, queue: queue, done: done}
	s.event.Init(s, waiter.EventHUp|waiter.EventErr)
	queue.EventRegister(&s.event)
	patience := tcpip.TCPUserTimeoutOption(ns.gw.cfg.Timeouts.TCPLast)
	// Cannot fail on an endpoint of TCP.
	_ = ep.SetSockOpt(&patience)
	s.do() // what came before anybody was told
}

// settled tells whether nothing is left for ep to do but to wait for late segments.
func settled(ep tcpip.Endpoint) bool {
	switch tcp.EndpointState(ep.State()) {
	case tcp.StateClose, tcp.StateError, tcp.StateTimeWait:
		return true
	}
	return false
}

// NotifyEvent is called by gVisor, in the middle of its own work.
func (s *settling) NotifyEvent(waiter.EventMask) { s.ns.crew.soon(s) }

func (s *settling) do() {
	if !settled(s.ep) || s.over.Swap(true) {
		return
	}
	s.queue.EventUnregister(&s.event)
	s.ep.Close()
	s.done()
}
