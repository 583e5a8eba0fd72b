// This file is egress TCP: dial the host first, complete the container's handshake on success, then carry both ways (carry.go). A
// goroutine belongs to a connection only until it is established.

package stack

import (
	"context"
	"errors"
	"net/netip"
	"os"
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

// dnsPort is where the gateway's own addresses answer queries, and those of Policy.DNSAt.
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

	// Done when the flow is to end; of the resolver's flows and of those that begin outside.
	ctx    context.Context
	cancel context.CancelFunc

	queue  waiter.Queue  // events of ep
	wake   chan struct{} // of egress flows: the socket that is being connected has news, or the flow has been ended
	events atomic.Uint32 // that the poller has told of that socket

	refused chan syscall.Errno // of flows that we dial: what an ICMP error said of the SYN; has room for one

	mu      sync.Mutex
	ended   bool
	shaking bool // gVisor is at the handshake with the container
	ep      tcpip.Endpoint
	carrier *carrier // nil until both sides are there
}

// acceptTCP is gVisor's question what to do with a segment that belongs to no connection. False makes it answer with RST.
func (ns *netstack) acceptTCP(id gstack.TransportEndpointID, pkt *gstack.PacketBuffer) bool {
	const kindOfSegment = header.TCPFlagSyn | header.TCPFlagAck | header.TCPFlagRst | header.TCPFlagFin
	if header.TCP(pkt.TransportHeader().Slice()).Flags()&kindOfSegment != header.TCPFlagSyn {
		return false
	}
	key := keyOf(protoTCP, id)
	f := &tcpFlow{ns: ns, wake: make(chan struct{}, 1)}
	if !ns.isResolver(key) {
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
	e, fresh, why := ns.flows.add(key, kindHalfOpen, f)
	switch {
	case e == nil:
		ns.count.drop(why)
		return true
	case !fresh: // the SYN again, while the first is being dialled
		return true
	}
	f.entry = e
	if !ns.conns.HandlePacket(id, pkt) {
		ns.flows.remove(e)
		return false
	}
	return true
}

func (ns *netstack) isResolver(key flowKey) bool {
	return key.dst.Port() == dnsPort && (ns.gw.isOwn(key.dst.Addr()) || ns.gw.resolvesAt(key.src.Addr(), key.dst.Addr()))
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

// opening is a connection that a container wants.
type opening struct {
	ns *netstack
	r  *tcp.ForwarderRequest
}

// openTCP is called by gVisor for every SYN that acceptTCP let through, in a new goroutine.
func (ns *netstack) openTCP(r *tcp.ForwarderRequest) { ns.crew.give(&opening{ns, r}) }

// do opens the connection. It returns when it is established, or not to be had.
func (o *opening) do() {
	ns, r := o.ns, o.r
	f := ns.flows.find(keyOf(protoTCP, r.ID())).flow.(*tcpFlow)
	// The flow leaves the table after the request is complete, so that gVisor never sees two requests for one key.
	leave := func() { ns.flows.remove(f.entry) }

	fd := -1
	if f.to.IsValid() {
		var err error
		if fd, err = f.dial(); err != nil {
			f.refuse(r, err)
			leave()
			return
		}
		if ns.gw.denied(f.to) { // dialling takes its time, in which the host may get the address
			ns.count.drop(dropDenied)
			ns.poller.reset(fd)
			r.Complete(false)
			ns.sendError(adminProhibited, f.quote)
			leave()
			return
		}
	}
	f.mu.Lock()
	f.shaking = true
	ended := f.ended
	f.mu.Unlock()
	var (
		ep   tcpip.Endpoint
		terr tcpip.Error
	)
	if !ended {
		ep, terr = r.CreateEndpoint(&f.queue)
	}
	f.mu.Lock()
	f.shaking, f.ep = false, ep
	f.mu.Unlock()
	r.Complete(ended && !ns.flows.evicted(f.entry))
	if ended || terr != nil { // the container has given up, or never answered
		if fd >= 0 {
			ns.poller.reset(fd)
		}
		leave()
		return
	}
	ns.flows.establish(f.entry)
	ns.count.tcpOpened.Add(1)
	f.quote = nil
	if fd < 0 {
		f.resolve()
		ns.settle(f.ep, &f.queue, leave)
		return
	}
	ns.beginTurn()
	f.carry(fd, f, leave)
	ns.endTurn()
}

// carry begins to carry between the container and the socket fd, as netstack.carry does. A flow that has been ended is over soon.
func (f *tcpFlow) carry(fd int, dialled *tcpFlow, done func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.carrier = f.ns.carry(f.ep, &f.queue, &f.entry.holder.lent, fd, dialled, done)
	if f.ended {
		f.carrier.end()
	}
}

// dial connects a socket to where the container wants to go. The socket is in the poller.
func (f *tcpFlow) dial() (fd int, err error) {
	if fd, err = f.ns.hostTCP(f.to.Addr()); err != nil {
		return -1, err
	}
	sa := sockaddr(f.to)
	f.hearErrors(fd, 1)
	err = unix.Connect(fd, sa)
	if errors.Is(err, unix.EINPROGRESS) { // a host that is near has answered by now
		err = unix.Connect(fd, sa)
	}
	connecting := errors.Is(err, unix.EALREADY) || errors.Is(err, unix.EINTR)
	if err != nil && !connecting {
		err = reported(fd, os.NewSyscallError("connect", err))
		_ = unix.Close(fd)
		return -1, err
	}
	if err := f.ns.poller.add(fd, f, connecting); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	if connecting {
		if err := f.waitConnected(fd, sa); err != nil {
			err = reported(fd, os.NewSyscallError("connect", err))
			f.ns.poller.close(fd)
			return -1, err
		}
	}
	f.hearErrors(fd, 0)
	return fd, nil
}

// hearErrors has the kernel note who sent the ICMP error that ends the dial, or no longer: it would end a connection that stands, too. For
// IPv4 it does the one without being asked (tcp_v4_err in net/ipv4/tcp_ipv4.c, Linux 5.8), and not the other.
func (f *tcpFlow) hearErrors(fd, on int) {
	if f.to.Addr().Is6() {
		// Cannot fail on a socket of IPv6.
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, on)
	}
}

// waitConnected waits for a connection that is being made.
func (f *tcpFlow) waitConnected(fd int, sa unix.Sockaddr) error {
	patience := time.NewTimer(f.ns.gw.cfg.Timeouts.Dial)
	defer patience.Stop()
	for {
		// Asked again, connect says what has become of it.
		err := unix.Connect(fd, sa)
		if !errors.Is(err, unix.EALREADY) && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR) {
			if errors.Is(err, unix.EISCONN) {
				return nil
			}
			return err
		}
		// An ICMP error that came in the midst of a call is not told by connect, as it is otherwise.
		if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
			return unix.Errno(code)
		}
		select {
		case <-f.wake:
			f.mu.Lock()
			ended := f.ended
			f.mu.Unlock()
			if ended {
				return errEnded
			}
		case <-patience.C:
			return unix.ETIMEDOUT
		}
	}
}

// errEnded says that a flow was ended while it was being dialled.
var errEnded = errors.New("the flow has been ended")

// ready is called by the poller while the flow is being dialled.
func (f *tcpFlow) ready(events uint32) {
	f.events.Or(events)
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// hostTCP makes a socket for a connection to a host, bound as Config.Outbound says.
func (ns *netstack) hostTCP(to netip.Addr) (int, error) {
	family := unix.AF_INET
	if to.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := ns.gw.cfg.Outbound.bind(fd, to); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// refuse tells the container what dialling told us.
func (f *tcpFlow) refuse(r *tcp.ForwarderRequest, err error) {
	switch kind, ok := kindOf(err); {
	case errors.Is(err, errEnded):
		r.Complete(!f.ns.flows.evicted(f.entry))
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		f.ns.count.tcpRefused.Add(1)
		r.Complete(true)
	case ok:
		f.ns.count.tcpUnreachable.Add(1)
		r.Complete(false)
		f.ns.sendErrorFrom(reporter(err), kind, f.quote)
	default: // no descriptor or no memory: the container's next SYN tries again
		f.ns.count.drop(dropNoSocket)
		r.Complete(false)
	}
}

// keepAlive has the container asked now and then whether it is still there: one that was killed says nothing by itself.
func (ns *netstack) keepAlive(ep tcpip.Endpoint) {
	idle := tcpip.KeepaliveIdleOption(ns.gw.cfg.Timeouts.TCPIdle)
	interval := tcpip.KeepaliveIntervalOption(keepAliveInterval)
	// These options cannot fail on an endpoint of TCP.
	_ = ep.SetSockOpt(&idle)
	_ = ep.SetSockOpt(&interval)
	_ = ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAliveCount)
	ep.SocketOptions().SetKeepAlive(true)
}

func (f *tcpFlow) end() {
	if f.cancel != nil {
		f.cancel()
	}
	f.mu.Lock()
	f.ended = true
	ep, carrier, shaking := f.ep, f.carrier, f.shaking
	f.mu.Unlock()
	switch {
	case carrier != nil:
		carrier.end()
	case ep != nil:
		ep.Abort()
	case shaking:
		f.ns.crew.give(&interruption{f})
	case f.wake != nil:
		f.ready(0)
	}
}

// interruption ends a handshake with a container, of which gVisor has no other handle than the endpoint that it makes some time in
// the middle.
type interruption struct{ f *tcpFlow }

func (i *interruption) do() {
	for f := i.f; ; time.Sleep(time.Millisecond) {
		f.mu.Lock()
		over := !f.shaking
		f.mu.Unlock()
		if over {
			return
		}
		if ep := f.ns.endpoint(f.entry.key); ep != nil {
			ep.Abort()
		}
	}
}

// endpoint is gVisor's endpoint of a flow, nil if there is none.
func (ns *netstack) endpoint(k flowKey) *tcp.Endpoint {
	proto := header.IPv4ProtocolNumber
	if k.dst.Addr().Is6() {
		proto = header.IPv6ProtocolNumber
	}
	ep, _ := ns.s.FindTransportEndpoint(proto, tcp.ProtocolNumber, gstack.TransportEndpointID{
		LocalPort: k.dst.Port(), LocalAddress: tcpipAddr(k.dst.Addr()),
		RemotePort: k.src.Port(), RemoteAddress: tcpipAddr(k.src.Addr()),
	}, nicID).(*tcp.Endpoint)
	return ep
}

// resolve serves DNS on the connection.
func (f *tcpFlow) resolve() {
	f.ns.keepAlive(f.ep)
	ctx, cancel := context.WithCancel(f.ns.ctx)
	defer cancel()
	c := gonet.NewTCPConn(&f.queue, f.ep)
	defer c.Close()
	f.ns.gw.resolver.ServeStream(ctx, f.ns.gw.asks(f.entry.key), c)
}

// tend looks at a connection that is established.
func (f *tcpFlow) tend() {
	f.mu.Lock()
	c := f.carrier
	f.mu.Unlock()
	if c != nil {
		c.tend()
	}
}
