// This file carries bytes between a container's connection and a socket of the host, with half-close and resets passed on both ways.
//
// Nothing waits here. Each of the two directions is called when gVisor or the poller says that there may be something to do, goes on in a
// goroutine of the crew, or at the end of a turn (turn.go), until there is nothing more, and rests: an idle connection has no goroutine and no buffer. Bytes are not
// copied on the way: they go from gVisor's memory to the socket, and are read from the socket into gVisor's memory.

package stack

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// mostAtOnce bounds in bytes what one write to a container takes from the host's socket.
const mostAtOnce = 1 << 20

// littleAtOnce is below how many bytes the last time a direction is taken to have little to do the next time.
const littleAtOnce = 16 << 10

// The states of a direction.
const (
	resting  uint32 = iota
	running         // a goroutine is at it
	recalled        // and was called again meanwhile: it looks once more
	over            // nothing is carried any more
)

// direction is one half of a carrier.
type direction struct {
	c     *carrier
	state atomic.Uint32
	last  int // bytes that it carried when it ran last; of whoever has it running
}

// carrier joins an endpoint of gVisor and a connected, non-blocking socket of the host. It owns both.
type carrier struct {
	ns    *netstack
	ep    tcpip.Endpoint
	queue *waiter.Queue // events of ep
	fd    int
	line  uint8  // of the container in the exit queue
	done  func() // called once, when endpoint and socket are closed

	event       waiter.Entry
	toHost      direction
	toContainer direction
	left        atomic.Int32 // directions that are not over
	buffers     buffers

	out hostWriter // of toHost
	in  hostReader // of toContainer

	hostEvents  atomic.Uint32 // those of the poller that say that the host's side ends
	awaitsRoom  bool          // of toHost: the poller tells of room
	hostFull    atomic.Bool   // toHost waits for room in the socket
	hostEOF     atomic.Bool   // the host has sent its last byte
	hostRefuses atomic.Bool   // the host takes no more bytes; what it still had for the container is carried, then comes a reset
	broken      atomic.Bool   // both sides are to be reset
	moved       atomic.Bool   // bytes have been carried since tend looked
	tended      atomic.Bool   // keep-alive is set
	settling    atomic.Bool   // both directions are over

	mu     sync.Mutex
	closed bool // fd may be another's
}

// carry begins to carry between ep, whose events are those of queue, and the socket fd, and owns both from now on. done is called when it is
// over, both are closed, and the container has what there was for it (settle.go). dialled is who was told of the events of fd so far; nil: fd is new to the poller.
func (ns *netstack) carry(ep tcpip.Endpoint, queue *waiter.Queue, of *account, fd int, dialled *tcpFlow, done func()) *carrier {
	c := &carrier{ns: ns, ep: ep, queue: queue, fd: fd, done: done}
	if to, err := ep.GetRemoteAddress(); err == nil { // else it has ended, and needs no line
		c.line = lineOf(netipAddr(to.Addr))
	}
	c.out.fd, c.in.fd = fd, fd
	c.toHost.c, c.toContainer.c = c, c
	c.left.Store(2)
	// What is sent as urgent is carried in its place among the rest: outside of it, it would stop the stream (tcp(7)). Cannot fail on a socket of TCP.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	c.event.Init(c, waiter.ReadableEvents|waiter.WritableEvents|waiter.EventHUp|waiter.EventErr)
	c.buffers.open(&ns.budget, of, ep)
	queue.EventRegister(&c.event)
	if dialled != nil {
		ns.poller.pass(fd, c)
		c.ready(dialled.events.Load())
	} else if ns.poller.add(fd, c, false) != nil {
		c.end()
		return c
	}
	// What came before anybody was told.
	if ep.Readiness(waiter.ReadableEvents) != 0 { // EventRdHUp among them: an end that has come already
		c.call(&c.toHost)
	}
	return c
}

// NotifyEvent is called by gVisor, in the middle of its own work: nothing here may call back into the endpoint.
func (c *carrier) NotifyEvent(mask waiter.EventMask) {
	if mask&(waiter.ReadableEvents|waiter.EventHUp|waiter.EventErr) != 0 {
		c.call(&c.toHost)
	}
	if mask&(waiter.WritableEvents|waiter.EventHUp|waiter.EventErr) != 0 {
		c.call(&c.toContainer)
	}
}

// ready is called by the poller.
func (c *carrier) ready(events uint32) {
	const ends = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
	if events&ends != 0 {
		c.hostEvents.Or(events & ends)
	}
	if events&(unix.EPOLLIN|ends) != 0 {
		c.call(&c.toContainer)
	}
	if events&(unix.EPOLLHUP|unix.EPOLLERR) != 0 || events&unix.EPOLLOUT != 0 && c.hostFull.Load() {
		c.call(&c.toHost)
	}
}

// call makes d look for something to do.
func (c *carrier) call(d *direction) {
	for {
		switch d.state.Load() {
		case resting:
			if d.state.CompareAndSwap(resting, running) {
				if d.last < littleAtOnce && c.ns.exit.hasRoom(c.line) { // whoever ends a turn is not to wait for one container's line
					c.ns.crew.soon(d)
				} else {
					c.ns.crew.give(d)
				}
				return
			}
		case running:
			if d.state.CompareAndSwap(running, recalled) {
				return
			}
		default:
			return
		}
	}
}

// do carries what there is.
func (d *direction) do() {
	c := d.c
	carry := c.carryToContainer
	if d == &c.toHost {
		carry = c.carryToHost
	}
	d.last = 0
	for {
		if carry() {
			d.state.Store(over)
			if c.left.Add(-1) == 0 {
				c.close()
			}
			return
		}
		if d.state.CompareAndSwap(running, resting) {
			return
		}
		d.state.Store(running)
	}
}

// end resets both sides soon. It may be called at any time, and more than once.
func (c *carrier) end() {
	c.broken.Store(true)
	c.call(&c.toHost)
	c.call(&c.toContainer)
	if c.settling.Load() {
		c.ep.Abort()
	}
}

// close is called when both directions are over.
func (c *carrier) close() {
	c.queue.EventUnregister(&c.event)
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	if c.broken.Load() || c.hostRefuses.Load() {
		c.ep.Abort()
		c.ns.poller.reset(c.fd)
	} else {
		// Whatever there was to say to the host has been said by the FINs of both sides.
		c.ns.poller.close(c.fd)
	}
	c.settling.Store(true)
	if c.broken.Load() { // end may not have known yet
		c.ep.Abort()
	}
	c.ns.settle(c.ep, c.queue, func() {
		c.buffers.close()
		c.done()
	})
}

// carryToHost carries what the container sends.
func (c *carrier) carryToHost() bool {
	for {
		if c.broken.Load() {
			return true
		}
		if c.hostEOF.Load() && c.hostEvents.Load()&unix.EPOLLERR != 0 { // a reset after the host's FIN
			c.end()
			return true
		}
		c.out.err = nil
		res, terr := c.ep.Read(&c.out, tcpip.ReadOptions{})
		switch {
		case c.out.err == nil:
		case errors.Is(c.out.err, unix.EAGAIN):
			if !c.awaitsRoom {
				c.awaitsRoom = true
				if c.ns.poller.awaitRoom(c.fd) != nil {
					c.end()
					return true
				}
			}
			// Room that came before anybody knew that it is waited for is found by a second try.
			if c.hostFull.Swap(true) {
				return false
			}
			continue
		case errors.Is(c.out.err, unix.EPIPE), errors.Is(c.out.err, unix.ECONNRESET), errors.Is(c.out.err, unix.ETIMEDOUT):
			c.hostRefuses.Store(true)
			c.call(&c.toContainer)
			return true
		default: // the host may be there yet, but bytes are missing: no memory, for one
			c.end()
			return true
		}
		c.hostFull.Store(false)
		switch terr.(type) {
		case nil:
			c.moved.Store(true)
			c.toHost.last += res.Count
			c.buffers.growReceive(res.Count)
		case *tcpip.ErrWouldBlock:
			return false
		case *tcpip.ErrClosedForReceive:
			if tcp.EndpointState(c.ep.State()) == tcp.StateError {
				c.end()
				return true
			}
			if c.left.Load() > 1 { // else close says it
				// Fails only when the host has closed meanwhile.
				_ = unix.Shutdown(c.fd, unix.SHUT_WR)
			}
			return true
		default: // the container reset the connection, or is gone
			c.end()
			return true
		}
	}
}

// carryToContainer carries what the host receives.
func (c *carrier) carryToContainer() bool {
	for {
		// A reset by the container, or its silence, is noticed even while there is nothing to carry.
		if c.broken.Load() || tcp.EndpointState(c.ep.State()) == tcp.StateError {
			c.end()
			return true
		}
		n, err := unix.IoctlGetInt(c.fd, unix.TIOCINQ)
		if err != nil {
			c.end()
			return true
		}
		if n == 0 {
			if c.hostEvents.Load() == 0 {
				return false
			}
			more, over := c.hostEnded()
			if over || !more {
				return over
			}
			continue
		}
		c.ns.exit.waitRoom(c.line)
		c.in.left = min(n, mostAtOnce)
		asked := int64(c.in.left)
		// Atomic: what has been read from the socket is kept, even if the buffer becomes smaller meanwhile.
		done, terr := c.ep.Write(&c.in, tcpip.WriteOptions{Atomic: true})
		switch terr.(type) {
		case nil:
			c.moved.Store(true)
			c.toContainer.last += int(done)
			switch {
			case done < asked: // the endpoint is full, and tells when it is not
				if !c.buffers.growSend() {
					return false
				}
			case n > mostAtOnce:
			case c.hostEvents.Load() == 0: // what comes now is told by the poller
				return false
			default: // that was the last, most likely
				more, over := c.hostEnded()
				if over || !more {
					return over
				}
			}
		case *tcpip.ErrWouldBlock:
			if !c.buffers.growSend() {
				return false
			}
		default: // the container does not take it any more
			c.end()
			return true
		}
	}
}

// hostEnded looks why the host's socket has nothing to read: more says that it has something now, over that there will be nothing
// any more.
func (c *carrier) hostEnded() (more, over bool) {
	var one [1]byte
	n, _, err := unix.Recvfrom(c.fd, one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false, false
	case errors.Is(err, unix.EINTR), n > 0:
		return true, false
	case err != nil:
		c.end()
		return false, true
	}
	c.hostEOF.Store(true)
	if c.hostEvents.Load()&unix.EPOLLERR != 0 { // toHost looks for it too, but perhaps did before there was an end
		c.end()
	} else if !c.hostRefuses.Load() {
		c.buffers.seal()
		// Fails only when the container has closed meanwhile.
		_ = c.ep.Shutdown(tcpip.ShutdownWrite)
	}
	return false, true
}

// hostWriter is where gVisor writes what it has for the host. It is called with the endpoint locked, and never waits.
type hostWriter struct {
	fd    int
	err   error
	later bool // this is not the first time
	quick bool // the socket does not wait for more
}

func (w *hostWriter) Write(b []byte) (int, error) {
	if w.later && !w.quick { // of the first there is nothing to wait for
		w.quick = true
		_ = unix.SetsockoptInt(w.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	w.later = true
	done := 0
	for done < len(b) {
		n, err := unix.SendmsgN(w.fd, b[done:], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			w.err = err
			return done, err
		}
		done += n
	}
	return done, nil
}

// hostReader is what gVisor reads from, straight into its own memory. left bytes are there for sure: gVisor asks for ever from a reader that
// ends early.
type hostReader struct {
	fd, left int
}

var _ tcpip.Payloader = (*hostReader)(nil)

func (r *hostReader) Len() int { return r.left }

func (r *hostReader) Read(b []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if len(b) == 0 {
		return 0, nil
	}
	for {
		n, err := unix.Read(r.fd, b[:min(len(b), r.left)])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		}
		r.left -= n
		return n, nil
	}
}

// tend is called every few seconds: it has both sides asked now and then whether they are still there, which needs not be said of
// connections that last no longer, and has an idle connection give back memory.
func (c *carrier) tend() {
	if !c.tended.Swap(true) {
		c.ns.keepAlive(c.ep)
		c.keepHostAlive()
	}
	if !c.moved.Swap(false) {
		c.buffers.shrink()
		// gVisor tells of room at half of the size that there is at the moment: it may have passed that while the size was another.
		c.call(&c.toContainer)
	}
}

// keepHostAlive has the host asked as keepAlive has the container.
func (c *carrier) keepHostAlive() {
	whole := func(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }
	c.withSocket(func(fd int) {
		for _, o := range []struct{ level, name, value int }{
			{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, whole(c.ns.gw.cfg.Timeouts.TCPIdle)},
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, whole(keepAliveInterval)},
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAliveCount},
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		} {
			// Fails only when there is no connection any more.
			_ = unix.SetsockoptInt(fd, o.level, o.name, o.value)
		}
	})
}

// withSocket calls use unless the socket has been closed, and keeps it open meanwhile.
func (c *carrier) withSocket(use func(fd int)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		use(c.fd)
	}
}
