// This file divides the memory that TCP towards containers may take: what a container has sent and the host does not take yet, and what the
// host has sent and the container has not acknowledged. gVisor's own tuning knows one connection only.
//
// A connection begins with an equal part of half the budget, for few of them the size that fills a fast path. It doubles a buffer
// that is in its way while there is enough for others to begin with, and gives back what is more than its part when it has been idle. What
// a container may have altogether is bounded, so that one that reads nothing does not slow down the others.

package stack

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Sizes in bytes of one connection's buffers.
const (
	tcpMinBuffer     = 4 << 10 // that every connection has, also when the budget is spent
	tcpReceiveBuffer = 1 << 20 // to begin with
	tcpSendBuffer    = 512 << 10
	tcpMaxBuffer     = 4 << 20 // to grow to
)

// budget is the memory for the buffers of all connections. What is lent may be in use or not.
type budget struct {
	limit int64 // constant
	lent  atomic.Int64
	flows atomic.Int64
}

// part is what a connection has of each of its two buffers, wanted or less.
func (b *budget) part(wanted int64) int64 {
	return max(tcpMinBuffer, min(wanted, b.limit/4/max(1, b.flows.Load())))
}

// account is what one container has been lent.
type account struct{ lent atomic.Int64 }

// begin grants a new connection of a container size bytes, or says that they are not there.
func (b *budget) begin(a *account, size int64) bool { return b.lend(a, size, b.limit, b.limit/2) }

// grow grants size bytes more to a connection. Half of the budget is left to those that begin.
func (b *budget) grow(a *account, size int64) bool { return b.lend(a, size, b.limit/2, b.limit/4) }

// lend grants size bytes if no more than total are lent then, and each to that container.
func (b *budget) lend(a *account, size, total, each int64) bool {
	if a.lent.Add(size) > each {
		a.lent.Add(-size)
		return false
	}
	if b.lent.Add(size) > total {
		b.book(a, -size)
		return false
	}
	return true
}

// book counts size bytes, fewer than none if they are given back.
func (b *budget) book(a *account, size int64) {
	a.lent.Add(size)
	b.lent.Add(size)
}

// buffers are those of one connection.
type buffers struct {
	b    *budget
	of   *account
	ep   tcpip.Endpoint
	opts *tcpip.SocketOptions

	mu            sync.Mutex
	receive, send int64
	sealed        bool // nothing more comes into the send buffer
}

// open takes the part of a new connection of a container.
func (s *buffers) open(b *budget, of *account, ep tcpip.Endpoint) {
	s.b, s.of, s.ep, s.opts = b, of, ep, ep.SocketOptions()
	b.flows.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	grant := func(size int64) int64 {
		if size = b.part(size); size == tcpMinBuffer || !b.begin(of, size) {
			size = tcpMinBuffer
			b.book(of, size)
		}
		return size
	}
	s.receive, s.send = grant(tcpReceiveBuffer), grant(tcpSendBuffer)
	s.opts.SetReceiveBufferSize(s.receive, false)
	s.opts.SetSendBufferSize(s.send, true) // which also ends gVisor's own tuning
}

// close gives everything back. The buffers have been emptied.
func (s *buffers) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.book(s.of, -s.receive-s.send)
	s.receive, s.send = 0, 0
	s.b.flows.Add(-1)
}

// growReceive doubles the receive buffer if the container was able to fill a half of its window, the most that lies there
// between two acknowledgements that make room: n bytes were read at once.
func (s *buffers) growReceive(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if size := s.receive; int64(n) >= size/4 && 2*size <= tcpMaxBuffer && s.b.grow(s.of, size) {
		s.receive = 2 * size
		s.opts.SetReceiveBufferSize(s.receive, false)
	}
}

// growSend doubles the send buffer, which was full. No means that it stays as it is, and full.
func (s *buffers) growSend() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if writable(s.ep) { // room came, or shrink was at it
		return true
	}
	size := s.send
	if size == 0 || 2*size > tcpMaxBuffer || !s.b.grow(s.of, size) {
		return false
	}
	s.send = 2 * size
	s.opts.SetSendBufferSize(s.send, false)
	return true
}

// seal has the send buffer stay as it is. It is called before the endpoint is shut down for writing, after which gVisor tells no more
// whether something lies there.
func (s *buffers) seal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealed = true
}

// shrink gives back what is more than the connection's part, which is idle, unless something lies there.
func (s *buffers) shrink() {
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting, terr := s.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if size := s.b.part(tcpReceiveBuffer); size < s.receive && terr == nil && waiting == 0 {
		s.b.book(s.of, size-s.receive)
		s.receive = size
		s.opts.SetReceiveBufferSize(size, false)
	}
	if size := s.b.part(tcpSendBuffer); size < s.send && !s.sealed {
		// How much lies in it gVisor does not tell, but whether the smaller one would be full.
		s.opts.SetSendBufferSize(size, false)
		if !writable(s.ep) {
			s.opts.SetSendBufferSize(s.send, false)
			return
		}
		s.b.book(s.of, size-s.send)
		s.send = size
	}
}

// writable tells whether ep takes bytes, or an error that says why it never will. gVisor tells of a peer that has ended its own direction
// whatever it is asked for.
func writable(ep tcpip.Endpoint) bool {
	return ep.Readiness(waiter.WritableEvents)&waiter.WritableEvents != 0
}
