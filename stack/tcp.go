// This file is egress TCP: dial the host first, complete the container's handshake on success, then copy both ways.

package stack

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// dnsPort is where the gateway's own addresses answer queries.
const dnsPort = 53

// Keep-alive after Timeouts.TCPIdle of silence, on both sides: the interval of probes, and how many may go unanswered.
const (
	keepAliveInterval = 30 * time.Second
	keepAliveCount    = 4
)

// tcpFlow is one connection of a container.
type tcpFlow struct {
	ns    *netstack
	entry *entry
	to    netip.AddrPort // where the host dials; not valid for the gateway's resolver
	quote []byte         // the SYN's IP header and the first eight bytes of its TCP header, for ICMP errors

	ctx    context.Context // done when the flow is to end
	cancel context.CancelFunc

	queue waiter.Queue // events of ep

	// hostBroken says that the host refused bytes: what it still had for the container has been read, then comes a reset.
	hostBroken atomic.Bool

	mu    sync.Mutex
	ended bool
	ep    tcpip.Endpoint
	host  *net.TCPConn // nil for the gateway's resolver
}

// acceptTCP is gVisor's question what to do with a segment that belongs to no connection. False makes it answer with RST.
func (ns *netstack) acceptTCP(id gstack.TransportEndpointID, pkt *gstack.PacketBuffer) bool {
	const kindOfSegment = header.TCPFlagSyn | header.TCPFlagAck | header.TCPFlagRst | header.TCPFlagFin
	if header.TCP(pkt.TransportHeader().Slice()).Flags()&kindOfSegment != header.TCPFlagSyn {
		return false
	}
	key := keyOf(protoTCP, id)
	f := &tcpFlow{ns: ns}
	if !ns.isResolver(key.dst) {
		to, ok := ns.gw.target(key.src.Addr(), key.dst)
		if !ok {
			return false
		}
		f.to = to
		f.quote = quote(pkt)
		if why, ok := ns.gw.refusal(key.src.Addr(), key.dst, to); !ok {
			ns.count.drop(why)
			ns.sendError(adminProhibited, f.quote)
			return true
		}
	}
	f.ctx, f.cancel = context.WithCancel(ns.ctx)
	e, fresh, why := ns.flows.add(key, kindHalfOpen, f)
	switch {
	case e == nil:
		f.cancel()
		ns.count.drop(why)
		return true
	case !fresh: // the SYN again, while the first is being dialled
		f.cancel()
		return true
	}
	f.entry = e
	if !ns.conns.HandlePacket(id, pkt) {
		f.cancel()
		ns.flows.remove(e)
		return false
	}
	return true
}

func (ns *netstack) isResolver(dst netip.AddrPort) bool {
	return dst.Port() == dnsPort && ns.gw.isOwn(dst.Addr())
}

// keyOf is the key of a packet's flow. In gVisor's words "local" is what the container calls remote.
func keyOf(proto uint8, id gstack.TransportEndpointID) flowKey {
	return flowKey{
		proto: proto,
		src:   netip.AddrPortFrom(netipAddr(id.RemoteAddress), id.RemotePort),
		dst:   netip.AddrPortFrom(netipAddr(id.LocalAddress), id.LocalPort),
	}
}

// quote copies the headers of a packet that ICMP errors about it repeat.
func quote(pkt *gstack.PacketBuffer) []byte {
	ip := pkt.NetworkHeader().Slice()
	t := pkt.TransportHeader().Slice()
	q := make([]byte, 0, len(ip)+8)
	return append(append(q, ip...), t[:min(8, len(t))]...)
}

// openTCP runs in a goroutine of its own for every SYN that acceptTCP let through, and stays for the whole connection.
func (ns *netstack) openTCP(r *tcp.ForwarderRequest) {
	e := ns.flows.find(keyOf(protoTCP, r.ID()))
	f := e.flow.(*tcpFlow)
	// The flow leaves the table after the request is complete, so that gVisor never sees two requests for one key.
	defer ns.flows.remove(e)
	defer f.cancel()

	var host *net.TCPConn
	if f.to.IsValid() {
		var err error
		if host, err = f.dial(); err != nil {
			f.refuse(r, err)
			return
		}
		if ns.gw.denied(f.to) { // dialling takes its time, in which the host may get the address
			ns.count.drop(dropDenied)
			reset(host)
			r.Complete(false)
			ns.sendError(adminProhibited, f.quote)
			return
		}
	}
	ep, terr := r.CreateEndpoint(&f.queue)
	r.Complete(false)
	if terr != nil { // the container has given up, or never answered
		reset(host)
		return
	}
	f.mu.Lock()
	f.ep, f.host = ep, host
	ended := f.ended
	f.mu.Unlock()
	if ended {
		ep.Abort()
		reset(host)
		return
	}
	ns.flows.establish(e)
	ns.count.tcpOpened.Add(1)
	f.keepAlive()
	if host == nil {
		f.resolve()
		return
	}
	f.copyBothWays()
}

func (f *tcpFlow) dial() (*net.TCPConn, error) {
	t := &f.ns.gw.cfg.Timeouts
	d := net.Dialer{
		Timeout: t.Dial,
		Control: f.ns.gw.cfg.Outbound.control,
		KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: t.TCPIdle, Interval: keepAliveInterval, Count: keepAliveCount,
		},
	}
	c, err := d.DialContext(f.ctx, "tcp", f.to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// refuse tells the container what dialling told us.
func (f *tcpFlow) refuse(r *tcp.ForwarderRequest, err error) {
	switch kind, ok := kindOf(err); {
	case f.ctx.Err() != nil:
		r.Complete(true)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		f.ns.count.tcpRefused.Add(1)
		r.Complete(true)
	case ok:
		f.ns.count.tcpUnreachable.Add(1)
		r.Complete(false)
		f.ns.sendError(kind, f.quote)
	default: // no descriptor or no memory: the container's next SYN tries again
		f.ns.count.drop(dropNoSocket)
		r.Complete(false)
	}
}

// keepAlive has the container asked now and then whether it is still there: one that was killed says nothing by itself.
func (f *tcpFlow) keepAlive() {
	idle := tcpip.KeepaliveIdleOption(f.ns.gw.cfg.Timeouts.TCPIdle)
	interval := tcpip.KeepaliveIntervalOption(keepAliveInterval)
	// These options cannot fail on an endpoint of TCP.
	_ = f.ep.SetSockOpt(&idle)
	_ = f.ep.SetSockOpt(&interval)
	_ = f.ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
	f.ep.SocketOptions().SetKeepAlive(true)
}

func (f *tcpFlow) end() {
	f.cancel()
	f.mu.Lock()
	f.ended = true
	ep, host := f.ep, f.host
	f.mu.Unlock()
	if ep != nil {
		ep.Abort()
	}
	reset(host)
}

// reset closes a host socket so that its peer gets a RST.
func reset(host *net.TCPConn) {
	if host != nil {
		// A failure means that the socket is closed already.
		_ = host.SetLinger(0)
		_ = host.Close()
	}
}

// resolve serves DNS on the connection.
func (f *tcpFlow) resolve() {
	c := gonet.NewTCPConn(&f.queue, f.ep)
	defer c.Close()
	f.ns.gw.resolver.ServeStream(f.ctx, c)
}

func (f *tcpFlow) copyBothWays() {
	raw, err := f.host.SyscallConn()
	if err != nil { // closed by end
		f.ep.Abort()
		return
	}
	// A reset by the container, or its silence, is noticed even while both loops wait for the host. gVisor calls this in
	// the middle of its own work: nothing here may call back into the endpoint.
	broken := waiter.NewFunctionEntry(waiter.EventHUp|waiter.EventErr, func(waiter.EventMask) {
		if tcp.EndpointState(f.ep.State()) == tcp.StateError {
			reset(f.host)
		}
	})
	f.queue.EventRegister(&broken)
	defer f.queue.EventUnregister(&broken)
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.toContainer(raw)
	}()
	f.toHost()
	<-done
	f.ep.Close()
	// Whatever there was to say has been said: by the FINs of both sides, or by a reset.
	_ = f.host.Close()
}

// toHost copies what the container sends, until it has no more or one side breaks.
func (f *tcpFlow) toHost() {
	event, readable := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	f.queue.EventRegister(&event)
	defer f.queue.EventUnregister(&event)
	for {
		buf := borrowBuffer()
		w := tcpip.SliceWriter(buf.bytes())
		res, terr := f.ep.Read(&w, tcpip.ReadOptions{})
		switch terr.(type) {
		case nil:
			f.ep.ModerateRecvBuf(res.Count)
			_, err := f.host.Write(buf.bytes()[:res.Count])
			buf.giveBack()
			if err != nil {
				f.hostBroken.Store(true)
				return
			}
		case *tcpip.ErrWouldBlock:
			buf.giveBack()
			<-readable
		case *tcpip.ErrClosedForReceive:
			buf.giveBack()
			// Fails only when the host has closed meanwhile.
			_ = f.host.CloseWrite()
			return
		default: // the container reset the connection, or is gone
			buf.giveBack()
			reset(f.host)
			return
		}
	}
}

// toContainer copies what the host receives, until there is no more or one side breaks.
func (f *tcpFlow) toContainer(raw syscall.RawConn) {
	event, writable := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	f.queue.EventRegister(&event)
	defer f.queue.EventUnregister(&event)
	var payload bytes.Reader
	for {
		f.ns.exit.waitRoom()
		buf, n, err := readHost(raw)
		if n > 0 {
			payload.Reset(buf.bytes()[:n])
			ok := f.give(&payload, writable)
			buf.giveBack()
			if !ok {
				reset(f.host)
				return
			}
			continue
		}
		if err == nil && !f.hostBroken.Load() {
			// Fails only when the container has closed meanwhile.
			_ = f.ep.Shutdown(tcpip.ShutdownWrite)
			return
		}
		f.ep.Abort()
		return
	}
}

// give writes all of payload to the container. No means that the container does not take it any more.
func (f *tcpFlow) give(payload *bytes.Reader, writable <-chan struct{}) bool {
	for payload.Len() > 0 {
		// bytes.Reader says EOF for an empty slice only when it is at its end, and gVisor is not called then: with a
		// reader that says so earlier its Write would never return.
		switch _, terr := f.ep.Write(payload, tcpip.WriteOptions{}); terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			<-writable
		default:
			return false
		}
	}
	return true
}

// readHost waits for bytes from the host and only then borrows a buffer for them. Nothing and no error is the end.
func readHost(raw syscall.RawConn) (buf copyBuffer, n int, err error) {
	werr := raw.Read(func(fd uintptr) bool {
		buf = borrowBuffer()
		for {
			n, err = unix.Read(int(fd), buf.bytes())
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if n > 0 {
			return true
		}
		buf.giveBack()
		n = 0
		return !errors.Is(err, unix.EAGAIN)
	})
	if werr != nil {
		return copyBuffer{}, 0, werr
	}
	return buf, n, err
}
