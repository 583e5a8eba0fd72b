// This file is published UDP: one socket a listener, a flow a client, answers from the address that was asked.

package publish

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// A flow ends when nothing came either way for that long: as with conntrack, a client who never got an answer is forgotten sooner.
	unansweredIdle, answeredIdle = 60 * time.Second, 180 * time.Second
	// sweepEvery is how often idle flows are looked for.
	sweepEvery = 10 * time.Second
	// readBatch is how many datagrams are read before time and closing are looked at.
	readBatch = 64
	// readPause is after an error of the socket that is not one of a datagram.
	readPause = 10 * time.Millisecond

	maxDatagram = 65535
)

var started = time.Now()

// ticksAt is the time since the program began, in ns: setting the host's clock ends no flow, and keeps none.
func ticksAt(t time.Time) int64 { return int64(t.Sub(started)) }

// udpListener is one socket, whose clients' flows belong to the goroutine of run.
type udpListener struct {
	p    *Publication
	conn *net.UDPConn
	raw  syscall.RawConn
	now  func() time.Time

	flows   map[netip.AddrPort]*udpFlow // by client
	waiting list.List                   // flows without an answer, the one that waits longest first
	due     time.Time                   // of the next sweep; zero while there are no flows
	victims []victim                    // who makes room where nobody waits, the first last
	picked  time.Time                   // when they were
	oob     []byte
	err     error // of the last read
}

// udpFlow is one client.
type udpFlow struct {
	l      *udpListener
	client unix.Sockaddr
	inside UDPFlow
	asked  netip.Addr    // what from says
	place  *list.Element // in waiting; nil once answered

	from     atomic.Pointer[[]byte] // control message: the address that the client asked last
	last     atomic.Int64           // when a datagram passed, either way: ticksAt
	answered atomic.Bool
}

func newUDPListener(p *Publication, c *net.UDPConn) (*udpListener, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	l := &udpListener{p: p, conn: c, raw: raw, now: time.Now, flows: map[netip.AddrPort]*udpFlow{}, oob: make([]byte, 128)}
	var serr error
	err = raw.Control(func(fd uintptr) {
		if c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Is4() {
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		} else {
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		}
	})
	if err = errors.Join(err, serr); err != nil {
		return nil, fmt.Errorf("which address clients ask: %w", err)
	}
	return l, nil
}

// run serves clients until the socket is closed or ctx is done.
func (l *udpListener) run(ctx context.Context) {
	defer func() {
		for client, f := range l.flows {
			l.end(client, f)
		}
	}()
	read := l.read
	for ctx.Err() == nil {
		l.keepTime()
		l.err = nil
		err := l.raw.Read(read)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
		case err != nil:
			return
		case l.err != nil:
			select {
			case <-ctx.Done():
			case <-time.After(readPause):
			}
		}
	}
}

// keepTime sweeps when it is time, and sees to it that a read ends when it will be.
func (l *udpListener) keepTime() {
	now := l.now()
	switch {
	case len(l.flows) == 0:
		if l.due.IsZero() {
			return
		}
		l.due = time.Time{}
	case l.due.IsZero():
		l.due = now.Add(sweepEvery)
	case now.Before(l.due):
		return
	default:
		l.sweep(now)
		l.due = now.Add(sweepEvery)
	}
	_ = l.conn.SetReadDeadline(l.due)
}

// sweep ends the flows that are idle.
func (l *udpListener) sweep(now time.Time) {
	for client, f := range l.flows {
		idle := unansweredIdle
		if f.answered.Load() {
			idle = answeredIdle
		}
		if time.Duration(ticksAt(now)-f.last.Load()) >= idle {
			l.end(client, f)
		}
	}
}

var datagrams = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// read reads datagrams until there are none, or the batch is full. It takes a buffer only while there is something to read.
func (l *udpListener) read(fd uintptr) (done bool) {
	buf := datagrams.Get().(*[maxDatagram]byte)
	defer datagrams.Put(buf)
	for got := 0; got < readBatch; {
		n, oobn, _, sa, err := unix.Recvmsg(int(fd), buf[:], l.oob, 0)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EAGAIN):
			return got > 0
		case err != nil:
			l.err = err
			return true
		}
		got++
		if client, ok := addrPortOf(sa); ok {
			l.datagram(client, sa, askedAddr(l.oob[:oobn]), buf[:n])
		}
	}
	return true
}

// datagram brings what a client sent to the container.
func (l *udpListener) datagram(client netip.AddrPort, sa unix.Sockaddr, asked netip.Addr, b []byte) {
	p := l.p
	f := l.flows[client]
	for range 2 {
		if f == nil {
			if f = l.begin(client, sa, asked); f == nil {
				return
			}
		}
		f.askedAt(asked)
		if err := f.inside.Send(b); err == nil {
			f.last.Store(ticksAt(l.now()))
			p.count.bytesIn.Add(uint64(len(b)))
			return
		}
		// The gateway has ended the flow: this client begins another.
		l.end(client, f)
		f = nil
	}
	p.count.send.Add(1)
}

// begin opens the flow of a client; nil if it cannot be, which is counted.
func (l *udpListener) begin(client netip.AddrPort, sa unix.Sockaddr, asked netip.Addr) *udpFlow {
	p := l.p
	from, to, ok := p.addrs.Load().route(client, p.spec.Port, p.spec.SNAT)
	if !ok {
		p.count.noAddress.Add(1)
		return nil
	}
	if p.count.active.Add(1) > uint64(p.limits.Flows) && !l.evict() {
		p.count.active.Add(^uint64(0))
		p.count.tooMany.Add(1)
		return nil
	}
	f := &udpFlow{l: l, client: sa}
	f.askedAt(asked)
	var err error
	f.inside, err = p.inside.OpenUDP(from, to, f.reply)
	if errors.Is(err, syscall.EADDRINUSE) && from.Port() != 0 {
		// The same client asks for this port of the container by way of another port of the host.
		f.inside, err = p.inside.OpenUDP(netip.AddrPortFrom(from.Addr(), 0), to, f.reply)
	}
	if err != nil {
		p.count.active.Add(^uint64(0))
		p.count.send.Add(1)
		return nil
	}
	p.count.flows.Add(1)
	f.last.Store(ticksAt(l.now()))
	f.place = l.waiting.PushBack(client)
	l.flows[client] = f
	return f
}

// victim is a flow that may have to go.
type victim struct {
	client netip.AddrPort
	f      *udpFlow
	last   int64 // of f, when it was picked
	rank   int   // how many flows of its client's address were idle for less long, and itself
}

const (
	// victimsPicked are picked at once, for looking at all flows takes its time, and good for victimsGood.
	victimsPicked = 64
	victimsGood   = time.Second
)

// evict ends the flow that has waited longest for its first answer: clients that are nobody do not keep others out. Where all have been answered, it is the
// one that is idle for longest of the address that has the most: nobody keeps others out by having many.
func (l *udpListener) evict() bool {
	for e := l.waiting.Front(); e != nil; e = l.waiting.Front() {
		client := e.Value.(netip.AddrPort)
		f := l.flows[client]
		if f.answered.Load() {
			l.waiting.Remove(e)
			f.place = nil
			continue
		}
		l.p.count.tooMany.Add(1)
		l.end(client, f)
		return true
	}
	now := l.now()
	for range 2 {
		for len(l.victims) > 0 && now.Sub(l.picked) < victimsGood {
			v := l.victims[len(l.victims)-1]
			l.victims = l.victims[:len(l.victims)-1]
			if l.flows[v.client] == v.f && v.f.last.Load() == v.last {
				l.p.count.tooMany.Add(1)
				l.end(v.client, v.f)
				return true
			}
		}
		l.pick(now)
	}
	return false
}

// pick picks victims in the order in which they are to go, had each gone before the next is looked for.
func (l *udpListener) pick(now time.Time) {
	all := make([]victim, 0, len(l.flows))
	for client, f := range l.flows {
		all = append(all, victim{client: client, f: f, last: f.last.Load()})
	}
	slices.SortFunc(all, func(a, b victim) int {
		return cmp.Or(a.client.Addr().Compare(b.client.Addr()), cmp.Compare(b.last, a.last))
	})
	for i := range all {
		all[i].rank = 1
		if i > 0 && all[i].client.Addr() == all[i-1].client.Addr() {
			all[i].rank += all[i-1].rank
		}
	}
	slices.SortFunc(all, func(a, b victim) int { return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(b.last, a.last)) })
	l.victims, l.picked = slices.Clone(all[max(0, len(all)-victimsPicked):]), now
}

func (l *udpListener) end(client netip.AddrPort, f *udpFlow) {
	if f.place != nil {
		l.waiting.Remove(f.place)
		f.place = nil
	}
	delete(l.flows, client)
	l.p.count.active.Add(^uint64(0))
	f.inside.Close()
}

// askedAt has answers leave from the address that the client asked last.
func (f *udpFlow) askedAt(a netip.Addr) {
	if a == f.asked || !a.IsValid() {
		return
	}
	f.asked = a
	oob := pktinfo(a)
	f.from.Store(&oob)
}

// reply sends an answer of the container. It is called from the packet path: it takes no lock and does not wait.
func (f *udpFlow) reply(b []byte) {
	var oob []byte
	if from := f.from.Load(); from != nil {
		oob = *from
	}
	var serr error
	err := f.l.raw.Control(func(fd uintptr) {
		_, serr = unix.SendmsgN(int(fd), b, oob, f.client, unix.MSG_DONTWAIT)
	})
	if err != nil || serr != nil {
		f.l.p.count.reply.Add(1)
		return
	}
	f.l.p.count.bytesOut.Add(uint64(len(b)))
	f.last.Store(ticksAt(f.l.now()))
	f.answered.Store(true)
}

func addrPortOf(sa unix.Sockaddr) (netip.AddrPort, bool) {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), true
	case *unix.SockaddrInet6:
		a := netip.AddrFrom16(sa.Addr)
		if sa.ZoneId != 0 {
			a = a.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
		return netip.AddrPortFrom(a, uint16(sa.Port)), true
	}
	return netip.AddrPort{}, false
}

// askedAddr is the address of this host that a datagram was sent to; for one to a group or to all hosts, that of the interface.
func askedAddr(oob []byte) netip.Addr {
	for len(oob) > 0 {
		hdr, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			break
		}
		oob = rest
		switch {
		case hdr.Level == unix.IPPROTO_IP && hdr.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			// ifindex, ipi_spec_dst, ipi_addr: ip(7)
			return netip.AddrFrom4([4]byte(data[4:8]))
		case hdr.Level == unix.IPPROTO_IPV6 && hdr.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			if a := netip.AddrFrom16([16]byte(data[:16])); !a.IsMulticast() {
				return a
			}
		}
	}
	return netip.Addr{}
}

// pktinfo is the control message that has a datagram leave from an address.
func pktinfo(from netip.Addr) []byte {
	if from.Is4() {
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: from.As4()})
	}
	return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: from.As16()})
}
