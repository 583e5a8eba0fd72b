// This file is the way into the overlay: connections and datagrams that begin outside and end in a container, for published ports and
// for host processes that ask for overlay addresses.

package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
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

// Conn is a connection into the overlay.
type Conn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// errNotRunning is what dialling says before Run and after it.
var errNotRunning = fmt.Errorf("stack: the gateway is not running: %w", syscall.ENETDOWN)

// DialTCP opens a connection from from to an overlay address. Without from it comes from the gateway's own address; with port 0 from any
// port. Packets carry it as their source, so that a container sees the client's own address. A container on a peer can be reached from
// the gateway's own address only: peers take no other source from us, and such a dial times out. It takes a place among the connections of
// the container, and ends with them (Release). Errors unwrap to a syscall.Errno, or are those of ctx.
func (g *Gateway) DialTCP(ctx context.Context, from, to netip.AddrPort) (Conn, error) {
	in, err := g.dialInward(ctx, from, to)
	if err != nil {
		return nil, err
	}
	c := &inwardConn{TCPConn: gonet.NewTCPConn(&in.flow.queue, in.flow.ep), in: in}
	c.buffers.open(&in.flow.ns.budget, &in.flow.entry.holder.lent, in.flow.ep)
	c.leave = sync.OnceFunc(func() {
		c.buffers.close()
		in.leave()
	})
	// An ended flow does not wait for its user.
	context.AfterFunc(in.flow.ctx, c.leave)
	return c, nil
}

// inwardConn is a Conn whose flow leaves the table when it is closed and the container has what there was for it, or when it is ended from
// within.
type inwardConn struct {
	*gonet.TCPConn
	in      *inwardTCP
	buffers buffers
	leave   func() // in.leave, and gives the buffers back
	closed  sync.Once
}

// Read reads. A reset that a write was told of is none the less no end.
func (c *inwardConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	if errors.Is(err, io.EOF) && tcp.EndpointState(c.in.flow.ep.State()) == tcp.StateError {
		err = syscall.ECONNRESET
	}
	return n, err
}

// Abort ends the connection with a reset to the container.
func (c *inwardConn) Abort() {
	c.in.flow.end()
	c.leave()
}

// Close lets what was written be sent, and ends the connection, without waiting for either.
func (c *inwardConn) Close() error {
	err := c.TCPConn.Close()
	c.closed.Do(func() { c.in.flow.ns.settle(c.in.flow.ep, &c.in.flow.queue, c.leave) })
	return err
}

// CarryTCP dials as DialTCP, then copies between host and the connection until both ends are done, with half-close and resets passed on.
// Where from's port is in use for a connection to the same place, it has another. CarryTCP owns host. An error says that the dial failed; host has
// been reset then. When ctx is done both ends are reset.
func (g *Gateway) CarryTCP(ctx context.Context, host *net.TCPConn, from, to netip.AddrPort) error {
	in, err := g.dialInward(ctx, from, to)
	if errors.Is(err, syscall.EADDRINUSE) && from.Port() != 0 {
		in, err = g.dialInward(ctx, netip.AddrPortFrom(from.Addr(), 0), to)
	}
	if err != nil {
		reset(host)
		return err
	}
	defer in.leave()
	fd, err := takeOver(host)
	if err != nil {
		in.flow.ep.Abort()
		return nil
	}
	defer context.AfterFunc(ctx, in.flow.end)()
	over := make(chan struct{})
	in.flow.carry(fd, nil, func() { close(over) })
	<-over
	return nil
}

// takeOver closes host and returns a descriptor of its socket, which is non-blocking.
func takeOver(host *net.TCPConn) (fd int, err error) {
	raw, err := host.SyscallConn()
	if err != nil {
		return -1, err
	}
	var derr error
	err = raw.Control(func(s uintptr) { fd, derr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, derr); err != nil {
		reset(host)
		return -1, err
	}
	return fd, host.Close()
}

// reset closes a host socket so that its peer gets a RST.
func reset(host *net.TCPConn) {
	// A failure means that the socket is closed already.
	_ = host.SetLinger(0)
	_ = host.Close()
}

// inwardTCP is a tcpFlow that we dialled. leave takes it out of the table; it may be called more than once.
type inwardTCP struct {
	flow  *tcpFlow
	leave func()
}

// dialPortTries is how often a free port of the gateway's own is looked for.
const dialPortTries = 16

func (g *Gateway) dialInward(ctx context.Context, from, to netip.AddrPort) (*inwardTCP, error) {
	return openFrom(g, from, to, func(ns *netstack, from netip.AddrPort) (*inwardTCP, error) { return ns.dialInward(ctx, from, to) })
}

// openFrom opens what leads to to, from from with what inwardSource fills in; where any port will do, until one is found that is not in use.
func openFrom[T any](g *Gateway, from, to netip.AddrPort, open func(ns *netstack, from netip.AddrPort) (T, error)) (opened T, err error) {
	ns := g.live.Load()
	if ns == nil {
		return opened, errNotRunning
	}
	if from, err = g.inwardSource(from, to); err != nil {
		return opened, err
	}
	anyPort := from.Port() == 0
	for try := 1; ; try++ {
		if anyPort {
			from = netip.AddrPortFrom(from.Addr(), ephemeralPort())
		}
		opened, err = open(ns, from)
		if err == nil || !anyPort || !errors.Is(err, syscall.EADDRINUSE) || try == dialPortTries {
			return opened, err
		}
	}
}

// The range of ports that the gateway connects from, as Linux has it (ip_local_port_range).
const (
	firstEphemeral = 32768
	lastEphemeral  = 60999
)

func ephemeralPort() uint16 {
	return uint16(firstEphemeral + rand.IntN(lastEphemeral-firstEphemeral+1))
}

// inwardSource checks both ends and fills in the gateway's own address: the one that has most in common with to, as RFC 6724 (rule 8) has it.
func (g *Gateway) inwardSource(from, to netip.AddrPort) (netip.AddrPort, error) {
	a := to.Addr()
	if !a.IsValid() || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || to.Port() == 0 || g.isOwn(a) {
		return from, fmt.Errorf("stack: %v cannot be an address of a container: %w", to, syscall.EADDRNOTAVAIL)
	}
	if !from.Addr().IsValid() {
		var own netip.Addr
		for _, o := range *g.own.Load() {
			if o.Is4() == a.Is4() && (!own.IsValid() || commonBits(o, a) > commonBits(own, a)) {
				own = o
			}
		}
		if !own.IsValid() {
			return from, fmt.Errorf("stack: the gateway has no address of the family of %v: %w", a, syscall.EAFNOSUPPORT)
		}
		return netip.AddrPortFrom(own, from.Port()), nil
	}
	if from.Addr().Is4() != a.Is4() {
		return from, fmt.Errorf("stack: %v cannot be a client of %v, which is of another family: %w", from, to, syscall.EAFNOSUPPORT)
	}
	if !g.isOwn(from.Addr()) && g.cfg.judge(from.Addr()) != open {
		return from, fmt.Errorf("stack: a container could not answer %v, which is closed to containers: %w", from, syscall.EADDRNOTAVAIL)
	}
	return from, nil
}

// commonBits is the length of the prefix that two addresses of one family share.
func commonBits(a, b netip.Addr) int {
	n := 0
	for n < a.BitLen() && netip.PrefixFrom(a, n+1).Contains(b) {
		n++
	}
	return n
}

// dialInward connects from an address and port. EADDRINUSE says that there is such a connection already.
func (ns *netstack) dialInward(ctx context.Context, from, to netip.AddrPort) (*inwardTCP, error) {
	f := &tcpFlow{ns: ns, refused: make(chan syscall.Errno, 1)}
	f.ctx, f.cancel = context.WithCancel(ns.ctx)
	key := flowKey{proto: protoTCP, src: to, dst: from}
	e, fresh, why := ns.flows.addInward(key, kindHalfOpen, f)
	if !fresh {
		f.cancel()
		return nil, ns.noPlace(e, why, from, to)
	}
	f.entry = e
	in := &inwardTCP{flow: f, leave: sync.OnceFunc(func() {
		f.cancel()
		ns.flows.remove(e)
	})}
	if err := f.connect(ctx, from, to); err != nil {
		in.leave()
		return nil, fmt.Errorf("dial %v from %v: %w", to, from, err)
	}
	ns.flows.establish(e)
	ns.count.tcpInward.Add(1)
	ns.keepAlive(f.ep)
	return in, nil
}

// noPlace is the error of a flow that did not get into the table.
func (ns *netstack) noPlace(there *entry, why dropReason, from, to netip.AddrPort) error {
	switch {
	case there != nil:
		return fmt.Errorf("stack: there is a flow from %v to %v already: %w", from, to, syscall.EADDRINUSE)
	case why == dropNotRunning:
		return errNotRunning
	}
	ns.count.drop(why)
	return fmt.Errorf("stack: no flow from %v to %v: %s: %w", from, to, dropNames[why], syscall.EAGAIN)
}

// connect makes the endpoint of a flow that we dial and waits until it is established.
func (f *tcpFlow) connect(ctx context.Context, from, to netip.AddrPort) error {
	proto := header.IPv4ProtocolNumber
	if to.Addr().Is6() {
		proto = header.IPv6ProtocolNumber
	}
	ep, terr := f.ns.s.NewEndpoint(tcp.ProtocolNumber, proto, &f.queue)
	if terr != nil {
		return errnoOf(terr)
	}
	f.mu.Lock()
	f.ep = ep
	ended := f.ended
	f.mu.Unlock()
	if ended {
		ep.Abort()
		return net.ErrClosed
	}
	// One address and port may talk to many containers.
	ep.SocketOptions().SetReuseAddress(true)
	if terr := ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: tcpipAddr(from.Addr()), Port: from.Port()}); terr != nil {
		ep.Close()
		return errnoOf(terr)
	}
	connected, wake := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	f.queue.EventRegister(&connected)
	defer f.queue.EventUnregister(&connected)
	remote := tcpip.FullAddress{NIC: nicID, Addr: tcpipAddr(to.Addr()), Port: to.Port()}
	terr = ep.Connect(remote)
	if _, taken := terr.(*tcpip.ErrBadLocalAddress); taken && f.ns.forgetTimeWait(from, to) {
		select { // a Connect that fails says so there, too
		case <-wake:
		default:
		}
		terr = ep.Connect(remote)
	}
	if _, taken := terr.(*tcpip.ErrBadLocalAddress); taken {
		ep.Close()
		return syscall.EADDRINUSE
	}
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		patience := time.NewTimer(f.ns.gw.cfg.Timeouts.Dial)
		defer patience.Stop()
		select {
		case <-wake:
			terr = ep.LastError()
		case errno := <-f.refused:
			ep.Abort()
			return errno
		case <-ctx.Done():
			ep.Abort()
			return ctx.Err()
		case <-patience.C:
			ep.Abort()
			return syscall.ETIMEDOUT
		case <-f.ctx.Done():
			ep.Abort()
			return net.ErrClosed
		}
	}
	if terr != nil {
		ep.Close()
		select { // gVisor takes a policy's refusal for a host that is not there
		case errno := <-f.refused:
			return errno
		default:
			return errnoOf(terr)
		}
	}
	return nil
}

// forgetTimeWait ends what is left of an earlier connection with these ends, and says whether there was any.
func (ns *netstack) forgetTimeWait(from, to netip.AddrPort) bool {
	e := ns.endpoint(flowKey{proto: protoTCP, src: to, dst: from})
	if e == nil || tcp.EndpointState(e.State()) != tcp.StateTimeWait {
		return false
	}
	e.Abort()
	ns.count.timeWaitReused.Add(1)
	return true
}

// errnoOf says in the host's words what gVisor says of a connection.
func errnoOf(terr tcpip.Error) error {
	switch terr.(type) {
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrConnectionReset:
		return syscall.ECONNRESET
	case *tcpip.ErrConnectionAborted:
		return syscall.ECONNABORTED
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrNetworkUnreachable, *tcpip.ErrNoNet:
		return syscall.ENETUNREACH
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrPortInUse, *tcpip.ErrBadLocalAddress:
		return syscall.EADDRINUSE
	case *tcpip.ErrNoBufferSpace:
		return syscall.ENOBUFS
	}
	return fmt.Errorf("%v: %w", terr, syscall.EIO)
}

// InwardUDP is a flow of datagrams that a client outside began. It has no clock of its own: who opened it closes it when it has been idle
// long enough.
type InwardUDP struct {
	ns    *netstack
	entry *entry
	route *gstack.Route // to the container
	key   flowKey
	reply func([]byte)

	mu     sync.Mutex // of err and of the use of route
	err    error
	closed chan struct{}
}

// OpenUDP begins a flow from from, which is as that of DialTCP, to a container. What the container answers to it is given to reply, from
// the packet path: it copies what it keeps, and does not block. An egress flow of the container between the same ends is replaced; another
// inward one is an error (EADDRINUSE). The flow ends with Close, with Release of the container, with the gateway, and when the container
// says that nobody listens there (ECONNREFUSED).
func (g *Gateway) OpenUDP(from, to netip.AddrPort, reply func(b []byte)) (*InwardUDP, error) {
	return openFrom(g, from, to, func(ns *netstack, from netip.AddrPort) (*InwardUDP, error) { return ns.openInward(from, to, reply) })
}

func (ns *netstack) openInward(from, to netip.AddrPort, reply func([]byte)) (*InwardUDP, error) {
	r, terr := ns.route(from.Addr(), to.Addr())
	if terr != nil {
		return nil, errnoOf(terr)
	}
	u := &InwardUDP{ns: ns, route: r, reply: reply, closed: make(chan struct{}), key: flowKey{proto: protoUDP, src: to, dst: from}}
	u.mu.Lock() // nobody ends the flow before it has its entry
	defer u.mu.Unlock()
	e, fresh, why := ns.flows.addInward(u.key, kindUDP, u)
	if !fresh {
		r.Release()
		return nil, ns.noPlace(e, why, from, to)
	}
	u.entry = e
	ns.count.udpInward.Add(1)
	return u, nil
}

// From is where the container sees the datagrams come from.
func (u *InwardUDP) From() netip.AddrPort { return u.key.dst }

// Send gives the container one datagram. It never blocks; what does not fit into the exit queue is dropped and counted. An error says that
// the flow has ended, and why.
func (u *InwardUDP) Send(b []byte) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.err != nil {
		return u.err
	}
	u.ns.sendDatagram(u.route, u.key, b)
	return nil
}

// Done is closed when the flow has ended.
func (u *InwardUDP) Done() <-chan struct{} { return u.closed }

// Err says why the flow has ended: nil while it has not, net.ErrClosed, or ECONNREFUSED.
func (u *InwardUDP) Err() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.err
}

// Close ends the flow. What the container sends afterwards is egress.
func (u *InwardUDP) Close() { u.endWith(net.ErrClosed) }

// end is Close for the flow table.
func (u *InwardUDP) end() { u.Close() }

func (u *InwardUDP) endWith(why error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.err != nil {
		return
	}
	u.err = why
	close(u.closed)
	u.route.Release()
	u.ns.flows.remove(u.entry)
}

// send takes a datagram of the container: an answer to the client.
func (u *InwardUDP) send(d datagram) { u.reply(d.payload) }

// refuseDial ends the dial that the quoted segment to a container is of, if it is one, with what an ICMP error says of it: gVisor does not tell
// a policy's refusal from a host that is not there, and hears nothing of either over IPv6.
func (ns *netstack) refuseDial(message []byte, in, q inbound, quoted []byte) {
	const ports = 4 // bytes, with which a TCP header begins
	errno, ok := refusalOf(in.proto, message)
	if !ok || len(quoted) < q.transport+ports {
		return
	}
	t := header.TCP(quoted[q.transport:])
	e := ns.flows.find(flowKey{
		proto: protoTCP,
		src:   netip.AddrPortFrom(q.dst, t.DestinationPort()),
		dst:   netip.AddrPortFrom(q.src, t.SourcePort()),
	})
	if e == nil {
		return
	}
	if f, ok := e.flow.(*tcpFlow); ok {
		select {
		case f.refused <- errno: // nobody looks at it any more when the connection is there; an egress flow has no such channel
		default:
		}
	}
}

// refusalOf is what an ICMP error says of what it is about; EACCES is a policy's or a firewall's refusal.
func refusalOf(proto uint8, icmp []byte) (errno syscall.Errno, ok bool) {
	if proto == protoICMP {
		if header.ICMPv4Type(icmp[0]) != header.ICMPv4DstUnreachable {
			return 0, false
		}
		switch header.ICMPv4Code(icmp[1]) {
		case header.ICMPv4PortUnreachable:
			return syscall.ECONNREFUSED, true
		case header.ICMPv4NetUnreachable:
			return syscall.ENETUNREACH, true
		case header.ICMPv4HostUnreachable:
			return syscall.EHOSTUNREACH, true
		case header.ICMPv4NetProhibited, header.ICMPv4HostProhibited, header.ICMPv4AdminProhibited:
			return syscall.EACCES, true
		}
		return 0, false
	}
	if header.ICMPv6Type(icmp[0]) != header.ICMPv6DstUnreachable {
		return 0, false
	}
	switch header.ICMPv6Code(icmp[1]) {
	case header.ICMPv6PortUnreachable:
		return syscall.ECONNREFUSED, true
	case header.ICMPv6NetworkUnreachable:
		return syscall.ENETUNREACH, true
	case header.ICMPv6AddressUnreachable:
		return syscall.EHOSTUNREACH, true
	case header.ICMPv6Prohibited:
		return syscall.EACCES, true
	}
	return 0, false
}
