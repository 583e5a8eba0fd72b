// This file makes TCP connections inside another network namespace, which come from whatever address the caller says: that is how a
// container sees the client of a published port, while both ends of the connection are the kernel's.
//
// A socket of the namespace binds to the client's address (IP_TRANSPARENT) and connects to the container's. What the server in the
// container answers would leave by its TAP, where the client's address is; so the socket marks its packets, the server's
// side of the connection takes the mark over (tcp_fwmark_accept), what refuses it as well (fwmark_reflect), and a rule leads what is
// marked to a table in which every address is the namespace's own:
//
//	ip rule add priority 1 fwmark MARK lookup TABLE protocol 111     in both families
//	ip route add local default dev lo table TABLE protocol 111
//	sysctl net.ipv4.tcp_fwmark_accept=1 net.ipv4.fwmark_reflect=1 net.ipv6.fwmark_reflect=1
//
// MARK and TABLE are one number, made of "ov" and a hash of the TAP's name: two nodes may have a TAP each in a namespace. The
// metric of the IPv4 route says which sysctls were off before, so that a daemon that comes back after a crash can undo what is not its
// own doing alone. Packets never leave lo, where both directions have found their route when they were sent: rp_filter and
// accept_local are not asked. The sockets are bound to lo, too: then a port of the same four-tuple may be used again after a second
// (tcp_tw_reuse is on for lo), and nothing with a forged address can leave over another device.
//
// Sources: ip(7), Documentation/networking/ip-sysctl.rst; inet_request_mark in include/net/inet_sock.h, IP4_REPLY_MARK in
// include/net/ip.h, ip_rcv_finish_core in net/ipv4/ip_input.c, tcp_twsk_unique in net/ipv4/tcp_ipv4.c, net_ctl_permissions in
// net/sysctl_net.c, fib_rules(7) for rules.

package nsutil

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	insideMark     = 0x6f76 << 16 // "ov"
	insidePriority = 1            // before every rule but that of the local table
	insideProtocol = 111          // of routes and rules: who made them, 'o'
	insideMetric   = 1024         // of the local route; its low bits are those of sysctls

	frActToTable = 1 // FR_ACT_TO_TBL, include/uapi/linux/fib_rules.h

	// tryTimeout is for the one connection of each family that is made to see whether any can be: over lo, where nothing but a
	// firewall keeps it. socketsTimeout is for its sockets.
	tryTimeout, socketsTimeout = 300 * time.Millisecond, 10 * time.Second
	// A connection that is not there after slowDial has somebody look whether what was prepared is still in its place, no more often
	// than every mendEvery.
	slowDial, mendEvery = 500 * time.Millisecond, 5 * time.Second
)

// insideSysctls are set to 1. The last is missing where there is no IPv6.
var insideSysctls = []string{"/proc/sys/net/ipv4/tcp_fwmark_accept", "/proc/sys/net/ipv4/fwmark_reflect", "/proc/sys/net/ipv6/fwmark_reflect"}

// Clients that are nobody, for the try: TEST-NET-1 (RFC 5737) and the documentation prefix (RFC 3849).
var (
	nobody4 = netip.MustParseAddr("192.0.2.1")
	nobody6 = netip.MustParseAddr("2001:db8::1")
)

// InsideConfig says for which container connections are made.
type InsideConfig struct {
	IfName string       // of its TAP
	Addrs  []netip.Addr // its own addresses: a connection to each is tried, and a family in which it fails is not supported
}

// Inside makes connections in a namespace. Its methods may be called from several goroutines.
type Inside struct {
	n     *Namespace
	table uint32 // and mark

	// By family, [0] IPv4. An error says why that family is not supported.
	no    [2]error
	pools [2]*pool

	mu     sync.Mutex
	closed bool
	mended time.Time // when it was last looked whether there is something to mend
}

// OpenInside prepares a namespace for connections from any address. It may be called again for a TAP, also by another process
// after a crash. Where the namespace, or its kernel, does not let us, the error is errors.ErrUnsupported; others may be gone
// another time. After one nothing is left behind.
// It starts goroutines while sockets are made and for as long as spare ones are kept; Close ends them.
func (n *Namespace) OpenInside(c InsideConfig) (*Inside, error) {
	if err := checkIfName(c.IfName); err != nil {
		return nil, err
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(c.IfName))
	in := &Inside{n: n, table: insideMark | h.Sum32()&0xffff}
	in.pools[0] = newPool(func(count int) ([]int, error) { return in.sockets(wish{talks: noTalk, stream4: count}) })
	in.pools[1] = newPool(func(count int) ([]int, error) { return in.sockets(wish{talks: noTalk, stream6: count}) })
	var err error
	if in.no, err = in.prepare(); err == nil {
		err = in.tryAll(c.Addrs)
	}
	if err != nil {
		_ = in.Close() // of what there may be
		return nil, err
	}
	return in, nil
}

// tryAll makes a connection to each address, to all of them at once, and remembers the families in which it fails. It is an error when all do, and when
// it could not be tried.
func (in *Inside) tryAll(addrs []netip.Addr) error {
	tried := make([]error, len(addrs))
	var all sync.WaitGroup
	for i, a := range addrs {
		if tried[i] = in.no[familyIndex(a)]; tried[i] == nil {
			all.Go(func() { tried[i] = in.try(a) })
		}
	}
	all.Wait()
	works := len(addrs) == 0
	for i, a := range addrs {
		if err := tried[i]; err != nil {
			if !errors.Is(err, errors.ErrUnsupported) {
				return err
			}
			in.no[familyIndex(a)] = err
		}
	}
	for _, a := range addrs {
		works = works || in.no[familyIndex(a)] == nil
	}
	if !works {
		return in.no[familyIndex(addrs[0])]
	}
	return nil
}

// prepare makes what is not there yet: rules, routes, sysctls. What it says no to are families.
func (in *Inside) prepare() (no [2]error, err error) {
	n := in.n
	op, err := n.enterFor(wish{talks: unix.NETLINK_ROUTE, files: insideSysctls})
	if err != nil {
		return no, err
	}
	defer op.close()
	rt := newRTNL(op.netlink)
	lo, err := rt.link("lo")
	if err == nil {
		err = rt.setUp(lo.index)
	}
	if err != nil {
		return no, fmt.Errorf("%s: bringing lo up: %w", n.name, err)
	}
	off, err := readSysctls(op.files)
	if err != nil {
		return no, in.unsupported(err)
	}
	for i, family := range families {
		if i == 1 && op.files[2] < 0 {
			no[1] = in.unsupported(errors.New("no IPv6 there"))
			continue
		}
		if off, err = in.lead(rt, family, lo.index, off); err != nil {
			no[i] = in.unsupported(err)
			if i == 0 { // its route has the memory for both
				return no, no[0]
			}
		}
	}
	for i, fd := range op.files {
		if fd < 0 {
			continue
		}
		if _, err := unix.Pwrite(fd, []byte("1\n"), 0); err != nil {
			return no, in.unsupported(&os.PathError{Op: "write", Path: insideSysctls[i], Err: err})
		}
	}
	return no, nil
}

var families = [2]uint8{unix.AF_INET, unix.AF_INET6}

func familyIndex(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func (in *Inside) unsupported(cause error) error {
	return fail(errors.ErrUnsupported, cause, "%s: no connections with a client's own address can be made inside (%v)", in.n.name, cause)
}

// readSysctls says which of them are off, a bit for each.
func readSysctls(files []int) (off uint32, err error) {
	for i, fd := range files {
		if fd < 0 {
			if i < 2 {
				return 0, fmt.Errorf("%s cannot be opened for writing there", insideSysctls[i])
			}
			continue
		}
		var b [16]byte
		n, err := unix.Pread(fd, b[:], 0)
		if err != nil {
			return 0, &os.PathError{Op: "read", Path: insideSysctls[i], Err: err}
		}
		if strings.TrimSpace(string(b[:n])) == "0" {
			off |= 1 << i
		}
	}
	return off, nil
}

// lead makes the rule and the route of a family. off is remembered in the route, with what was off before that: both are returned.
func (in *Inside) lead(rt *rtnl, family uint8, lo int32, off uint32) (uint32, error) {
	before, there, err := in.remembered(rt, family)
	if err != nil {
		return off, err
	}
	if there && before|off != before {
		if err := in.localRoute(rt, unix.RTM_DELROUTE, 0, family, lo, before); err != nil {
			return off, fmt.Errorf("replacing the local route: %w", err)
		}
		there = false
	}
	if !there {
		err := in.localRoute(rt, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, family, lo, before|off)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return off, fmt.Errorf("adding a local route: %w", err)
		}
	}
	err = in.rule(rt, unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, family)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return off, fmt.Errorf("adding a rule for marked packets: %w", err)
	}
	return off | before, nil
}

// Close removes what OpenInside made, and closes the sockets that were kept ready. Connections stay. The namespace must
// still be open.
func (in *Inside) Close() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	for _, p := range in.pools {
		p.close()
	}
	op, err := in.n.enterFor(wish{talks: unix.NETLINK_ROUTE, files: insideSysctls})
	if err != nil {
		return err
	}
	defer op.close()
	rt := newRTNL(op.netlink)
	lo, err := rt.link("lo")
	if err != nil {
		return fmt.Errorf("%s: looking up lo: %w", in.n.name, err)
	}
	off, _, err := in.remembered(rt, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("%s: %w", in.n.name, err)
	}
	var errs []error
	for _, family := range families {
		before, there, err := in.remembered(rt, family)
		if err == nil && there {
			err = in.localRoute(rt, unix.RTM_DELROUTE, 0, family, lo.index, before)
		}
		errs = append(errs, err)
		err = in.rule(rt, unix.RTM_DELRULE, 0, family)
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
			errs = append(errs, err)
		}
	}
	left, err := in.handOn(rt, lo.index, off)
	errs = append(errs, err)
	for i, fd := range op.files {
		if fd < 0 || off&(1<<i) == 0 || left {
			continue
		}
		_, err := unix.Pwrite(fd, []byte("0\n"), 0)
		errs = append(errs, err)
	}
	return wrapped(errors.Join(errs...), "%s: removing what published ports need", in.n.name)
}

// rule adds or deletes the rule of a family.
func (in *Inside) rule(rt *rtnl, kind, flags int, family uint8) error {
	req := nl.NewNetlinkRequest(kind, flags|unix.NLM_F_ACK)
	// struct fib_rule_hdr has the fields of struct rtmsg, action where that has type.
	msg := &nl.RtMsg{}
	msg.Family = family
	msg.Type = frActToTable
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.FRA_PRIORITY, nl.Uint32Attr(insidePriority)))
	req.AddData(nl.NewRtAttr(unix.FRA_FWMARK, nl.Uint32Attr(in.table)))
	req.AddData(nl.NewRtAttr(unix.FRA_FWMASK, nl.Uint32Attr(^uint32(0))))
	req.AddData(nl.NewRtAttr(unix.FRA_TABLE, nl.Uint32Attr(in.table)))
	req.AddData(nl.NewRtAttr(unix.FRA_PROTOCOL, nl.Uint8Attr(insideProtocol)))
	_, err := rt.do(req)
	return err
}

// handOn has another TAP's Inside of the namespace, if there is one, remember which sysctls were off.
func (in *Inside) handOn(rt *rtnl, lo int32, off uint32) (done bool, err error) {
	routes, err := rt.insideRoutes(unix.AF_INET)
	if err != nil || len(routes) == 0 {
		return false, err
	}
	heir := routes[0]
	if heir.off|off == heir.off {
		return true, nil
	}
	other := &Inside{table: heir.table}
	err = other.localRoute(rt, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, unix.AF_INET, lo, heir.off|off)
	if err == nil {
		err = other.localRoute(rt, unix.RTM_DELROUTE, 0, unix.AF_INET, lo, heir.off)
	}
	return true, wrapped(err, "handing on which sysctls were off")
}

// localRoute adds or deletes the route of a family to everywhere.
func (in *Inside) localRoute(rt *rtnl, kind, flags int, family uint8, lo int32, off uint32) error {
	req := nl.NewNetlinkRequest(kind, flags|unix.NLM_F_ACK)
	msg := &nl.RtMsg{}
	msg.Family = family
	msg.Type = unix.RTN_LOCAL
	msg.Protocol = insideProtocol
	if family == unix.AF_INET {
		msg.Scope = unix.RT_SCOPE_HOST
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(in.table)))
	req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(lo))))
	req.AddData(nl.NewRtAttr(unix.RTA_PRIORITY, nl.Uint32Attr(insideMetric|off)))
	_, err := rt.do(req)
	return err
}

// insideRoute is the route of an Inside, with which sysctls were off before it was made.
type insideRoute struct{ table, off uint32 }

// insideRoutes are those of all TAPs' Insides in a family.
func (c *rtnl) insideRoutes(family uint8) ([]insideRoute, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
	msg := &nl.RtMsg{}
	msg.Family = family
	req.AddData(msg)
	routes, err := dump(c, req, func(b []byte) (insideRoute, bool) {
		if len(b) < unix.SizeofRtMsg || b[0] != family {
			return insideRoute{}, false
		}
		attrs := attrsIn(b[unix.SizeofRtMsg:])
		table, metric := attrs[unix.RTA_TABLE], attrs[unix.RTA_PRIORITY]
		if len(table) != 4 || len(metric) != 4 {
			return insideRoute{}, false
		}
		r := insideRoute{table: binary.NativeEndian.Uint32(table), off: binary.NativeEndian.Uint32(metric) &^ insideMetric}
		return r, r.table>>16 == insideMark>>16
	})
	if err != nil {
		return nil, fmt.Errorf("listing routes: %w", err)
	}
	return routes, nil
}

// remembered looks for the route of a family, and tells which sysctls were off before it was made.
func (in *Inside) remembered(rt *rtnl, family uint8) (off uint32, there bool, err error) {
	routes, err := rt.insideRoutes(family)
	for _, r := range routes {
		if r.table == in.table {
			return r.off, true, err
		}
	}
	return 0, false, err
}

// sockets makes sockets of one family, ready to be bound.
func (in *Inside) sockets(w wish) ([]int, error) {
	op, err := in.n.enterFor(w)
	if err != nil {
		return nil, err
	}
	for _, fd := range op.stream4 {
		if err == nil {
			err = in.ready(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT)
		}
	}
	for _, fd := range op.stream6 {
		if err == nil {
			err = in.ready(fd, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT)
		}
	}
	if err != nil {
		op.close()
		return nil, in.unsupported(err)
	}
	return append(op.stream4, op.stream6...), nil
}

func (in *Inside) ready(fd, level, transparent int) error {
	for _, o := range []struct{ level, option, value int }{
		{level, transparent, 1},
		{unix.SOL_SOCKET, unix.SO_MARK, int(in.table)},
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		{unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return os.NewSyscallError("setsockopt", unix.BindToDevice(fd, "lo"))
}

// DialTCP opens a connection to an address of the namespace that comes from `from`; its port 0 is any port. Where from's port is
// in use for a connection to the same place, it has another. An error that is errors.ErrUnsupported is of
// the namespace, the family or, where a server inside listens on from's port, of this connection alone.
func (in *Inside) DialTCP(ctx context.Context, from, to netip.AddrPort) (*net.TCPConn, error) {
	if !from.IsValid() || !to.IsValid() || from.Addr().Is4() != to.Addr().Is4() || from.Addr().Is4In6() || to.Addr().Is4In6() {
		return nil, fail(ErrInvalid, nil, "%v and %v are not the two ends of a connection", from, to)
	}
	i := familyIndex(to.Addr())
	if in.no[i] != nil {
		return nil, in.no[i]
	}
	slow := time.AfterFunc(slowDial, func() { in.mend() })
	defer slow.Stop()
	c, err := in.dial(ctx, in.pools[i], from, to)
	if errors.Is(err, unix.ENETUNREACH) && in.mend() {
		c, err = in.dial(ctx, in.pools[i], from, to)
	}
	if errors.Is(err, unix.EADDRNOTAVAIL) && from.Port() != 0 {
		c, err = in.dial(ctx, in.pools[i], netip.AddrPortFrom(from.Addr(), 0), to)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: connecting to %v from %v: %w", in.n.name, to, from, err)
	}
	return c, nil
}

// mend makes again what somebody took away: with lo, when it goes down, goes the IPv6 route over it. A connection that waits is helped, as the kernel
// tries it again. It tells whether it has looked.
func (in *Inside) mend() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed || time.Since(in.mended) < mendEvery {
		return false
	}
	in.mended = time.Now()
	_, err := in.prepare()
	return err == nil
}

func (in *Inside) dial(ctx context.Context, p *pool, from, to netip.AddrPort) (*net.TCPConn, error) {
	fd, err := p.take(ctx)
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, ErrGone) && !errors.Is(err, errors.ErrUnsupported) {
			err = fail(errors.ErrUnsupported, err, "no socket can be made there now (%v)", err)
		}
		return nil, err
	}
	return connected(ctx, fd, from, to)
}

// connected makes a socket that is ready a connection. It owns fd.
func connected(ctx context.Context, fd int, from, to netip.AddrPort) (*net.TCPConn, error) {
	f := os.NewFile(uintptr(fd), "connection inside")
	defer f.Close() // the connection has a descriptor of its own
	switch err := unix.Bind(fd, sockaddrOf(from)); {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fail(errors.ErrUnsupported, err, "port %d is a server's there", from.Port())
	case err != nil:
		return nil, os.NewSyscallError("bind", err)
	}
	if err := connect(ctx, f, fd, to); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// connect connects a socket that does not block, and waits for the outcome.
func connect(ctx context.Context, f *os.File, fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, sockaddrOf(to))
	if !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	outcome := func(fd uintptr) (done bool) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, perr := unix.Poll(p, 0); perr != nil || n == 0 {
			return false
		}
		var errno int
		if errno, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
			err = syscall.Errno(errno)
		}
		return true
	}
	// Over lo the answer is usually there already.
	if !outcome(uintptr(fd)) {
		raw, rerr := f.SyscallConn()
		if rerr != nil {
			return rerr
		}
		stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
		werr := raw.Write(outcome)
		stop()
		if werr != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return werr
		}
	}
	return os.NewSyscallError("connect", err)
}

// try makes a connection to an address from nobody's and takes it apart. The error is errors.ErrUnsupported, unless there were no sockets to
// try it with.
func (in *Inside) try(to netip.Addr) error {
	ctx, cancel := context.WithTimeout(context.Background(), socketsTimeout)
	defer cancel()
	var fds [2]int
	for i := range fds {
		var err error
		if fds[i], err = in.pools[familyIndex(to)].take(ctx); err != nil {
			closeAll(fds[:i])
			if errors.Is(err, ErrNoIPv6) {
				err = in.unsupported(err)
			}
			return err
		}
	}
	defer unix.Close(fds[0])
	port, err := serveNobody(fds[0], to)
	if err != nil {
		unix.Close(fds[1])
		return in.unsupported(err)
	}
	from := nobody4
	if to.Is6() {
		from = nobody6
	}
	ctx, cancel = context.WithTimeout(context.Background(), tryTimeout)
	defer cancel()
	c, err := connected(ctx, fds[1], netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, port))
	if err != nil {
		return in.unsupported(fmt.Errorf("a connection that was tried: %w", err))
	}
	_ = c.SetLinger(0)
	return c.Close()
}

// serveNobody makes a socket that is ready a server on a free port, which knows nothing of all this.
func serveNobody(fd int, at netip.Addr) (port uint16, err error) {
	level, transparent := unix.IPPROTO_IP, unix.IP_TRANSPARENT
	if at.Is6() {
		level, transparent = unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0), unix.SetsockoptInt(fd, level, transparent, 0), unix.BindToDevice(fd, ""))
	if err != nil {
		return 0, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, sockaddrOf(netip.AddrPortFrom(at, 0))); err != nil {
		return 0, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		return 0, os.NewSyscallError("listen", err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, os.NewSyscallError("getsockname", err)
	}
	return portOf(sa), nil
}

func sockaddrOf(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func portOf(sa unix.Sockaddr) uint16 {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port)
	case *unix.SockaddrInet6:
		return uint16(sa.Port)
	}
	return 0
}

const (
	// A pool keeps leastSockets ready; when they run out it has twice as many made at once, up to mostSockets, and each trimEvery
	// without that need half as many.
	leastSockets, mostSockets = 8, 240
	trimEvery                 = 30 * time.Second
)

// pool is sockets of one family that are ready. The first are made when the first is taken.
type pool struct {
	build func(count int) ([]int, error)

	mu      sync.Mutex
	ready   []int
	batch   int           // how many are made at once
	scarce  bool          // somebody has waited since the last trim
	making  chan struct{} // closed when the batch that is being made is there, or cannot be; nil: none is
	err     error         // of the last batch
	trimmer *time.Timer   // nil: the pool is not larger than it has to be
	closed  bool
}

func newPool(build func(count int) ([]int, error)) *pool {
	return &pool{build: build, batch: leastSockets}
}

// take hands over a socket, when there is one.
func (p *pool) take(ctx context.Context) (int, error) {
	waited := false
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return -1, fail(ErrGone, os.ErrClosed, "no connections are made there any more")
		}
		if last := len(p.ready) - 1; last >= 0 {
			fd := p.ready[last]
			p.ready = p.ready[:last]
			if last < p.batch/2 {
				p.moreLocked()
			}
			p.mu.Unlock()
			return fd, nil
		}
		if waited && p.err != nil {
			err := p.err
			p.mu.Unlock()
			return -1, err
		}
		if p.making == nil && (waited || p.scarce) {
			p.batch = min(2*p.batch, mostSockets)
		}
		p.scarce = true
		p.moreLocked()
		making := p.making
		p.mu.Unlock()
		select {
		case <-making:
			waited = true
		case <-ctx.Done():
			return -1, context.Cause(ctx)
		}
	}
}

// moreLocked has a batch made, if none is being made.
func (p *pool) moreLocked() {
	if p.making != nil {
		return
	}
	making, count := make(chan struct{}), p.batch
	p.making = making
	go func() {
		fds, err := p.build(count)
		p.mu.Lock()
		if p.closed {
			closeAll(fds)
		} else {
			p.ready = append(p.ready, fds...)
		}
		p.err = err
		p.making = nil
		if p.trimmer == nil && !p.closed {
			p.trimmer = time.AfterFunc(trimEvery, p.trim)
		}
		p.mu.Unlock()
		close(making)
	}()
}

// trim gives back what a load that is over had made.
func (p *pool) trim() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	if !p.scarce {
		p.batch = max(p.batch/2, leastSockets)
	}
	p.scarce = false
	if spare := len(p.ready) - p.batch; spare > 0 {
		closeAll(p.ready[:spare])
		p.ready = append([]int(nil), p.ready[spare:]...)
	}
	p.trimmer = nil
	if p.batch > leastSockets {
		p.trimmer = time.AfterFunc(trimEvery, p.trim)
	}
}

// close closes the sockets that are ready, and waits for those that are being made.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	closeAll(p.ready)
	p.ready = nil
	if p.trimmer != nil {
		p.trimmer.Stop()
	}
	making := p.making
	p.mu.Unlock()
	if making != nil {
		<-making
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
