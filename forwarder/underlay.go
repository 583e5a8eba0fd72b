// This file is the underlay: the UDP sockets between nodes, with as few system calls as the kernel allows. Many packets of
// one size for one peer go out in one datagram train (UDP_SEGMENT), many trains in one sendmmsg; trains come in whole
// (UDP_GRO), several in one recvmmsg.

package forwarder

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// UnderlayConfig is where the underlay sockets are bound.
type UnderlayConfig struct {
	// Addr is the address of the external interface and the port; port 0 lets the kernel choose.
	Addr netip.AddrPort
	// ReceiveBuffer in bytes is asked for; the kernel grants a socket at most net.core.rmem_max, and lanes make up for it.
	// 0 asks for 4 MiB, below which the path loses bursts.
	ReceiveBuffer int
	// VXLAN is what is spoken with peers; nil: the udp format.
	VXLAN *VXLAN
}

const (
	defaultBuffer = 4 << 20

	// MaxTrain is the payload in bytes of the largest UDP datagram, of which a train is cut: 65535 less the IPv4 and UDP
	// headers.
	MaxTrain = 65535 - outerIPv4Len - outerUDPLen
	// trainSegs is UDP_MAX_SEGMENTS since Linux 6.9; before, it was 64. Which one holds is probed.
	trainSegs, oldTrainSegs = 128, 64

	txMsgs   = 64                 // trains in one sendmmsg
	txIovs   = 4 * packet.MaxIovs // pieces of all trains together; one message has at most MaxIovs
	txHdrLen = txIovs / 2 * 64    // bytes of headers and small packets in one batch, without encapsulation
	// Up to so many bytes are copied together rather than handed to the kernel piece by piece, which costs it more.
	smallPiece = 256

	sendWait = 100 // milliseconds to wait for room in the socket's send buffer before a batch is dropped
)

// underlay is the set of sockets on one port.
type underlay struct {
	// constant after listenUnderlay
	fds        []int // loop by loop, lane by lane
	lanes      int   // sockets a loop
	addr       netip.AddrPort
	vxlan      *VXLAN // nil: the udp format
	recvBuffer int
	gso        bool // UDP_SEGMENT
	gro        bool // UDP_GRO
	steered    bool // the kernel chooses the socket by the inner destination
}

// listenUnderlay opens the sockets of so many loops on one port. Offloads that the kernel lacks are left out.
func listenUnderlay(c UnderlayConfig, loops int, log *slog.Logger) (*underlay, error) {
	if !c.Addr.Addr().Is4() {
		return nil, fmt.Errorf("underlay address %v is not IPv4: the udp format carries IPv4 only", c.Addr.Addr())
	}
	if err := c.VXLAN.check(); err != nil {
		return nil, err
	}
	if c.ReceiveBuffer == 0 {
		c.ReceiveBuffer = defaultBuffer
	}
	u := &underlay{addr: c.Addr, vxlan: c.VXLAN, lanes: lanesFor(c.ReceiveBuffer, loops)}
	if err := u.listen(c, loops); err != nil {
		u.close()
		if errors.Is(err, unix.EADDRINUSE) && c.VXLAN != nil {
			return nil, fmt.Errorf("UDP port %d on %v is taken: by another program (`ss -lunp` names it), or by this host's kernel for a VXLAN device, as flannel makes one, for a host has either flannel or this node (root deletes it: `ip link delete flannel.1`). Free the port, or give this node one of its own with --port, to which flannel hosts cannot send", c.Addr.Port(), c.Addr.Addr())
		}
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("UDP port %d on %v is taken by another program (`ss -lunp` names it): stop it, or give this node a port of its own with --port", c.Addr.Port(), c.Addr.Addr())
		}
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			return nil, fmt.Errorf("%v is not an address of this host: choose the interface with --iface", c.Addr.Addr())
		}
		if errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("UDP port %d needs privilege: choose one above net.ipv4.ip_unprivileged_port_start with --port", c.Addr.Port())
		}
		return nil, fmt.Errorf("open the underlay socket on %v: %w", c.Addr, err)
	}
	u.recvBuffer = receiveBuffer(u.fds[0])
	if all := u.recvBuffer * u.lanes; 2*all < c.ReceiveBuffer {
		log.Warn("the kernel grants the underlay less receive buffer than asked for; fast bursts may be lost until an administrator raises net.core.rmem_max",
			"granted", all, "asked", c.ReceiveBuffer, "sockets", u.lanes)
	}
	return u, nil
}

// listen opens the sockets, all lanes of a loop after one another. A kernel that does not steer leaves one lane.
func (u *underlay) listen(c UnderlayConfig, loops int) error {
	shared := loops*u.lanes > 1
	if shared && c.Addr.Port() != 0 {
		if err := probeFree(c.Addr); err != nil {
			return err
		}
	}
	for i := 0; i < loops*u.lanes; i++ {
		fd, err := u.open(c, shared)
		if err != nil {
			return err
		}
		u.fds = append(u.fds, fd)
		if i == 0 && shared {
			if u.steered = steer(fd, loops, u.lanes, u.vxlan.Encap()); !u.steered {
				u.lanes = 1
			}
		}
	}
	return nil
}

// loopFDs are the sockets of loop i, one a lane.
func (u *underlay) loopFDs(i int) []int { return u.fds[i*u.lanes : (i+1)*u.lanes] }

// open opens one socket; shared with others of its port.
func (u *underlay) open(c UnderlayConfig, shared bool) (int, error) {
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		if !shared {
			return nil
		}
		var err error
		if cerr := rc.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	pc, err := lc.ListenPacket(context.Background(), "udp4", u.addr.String())
	if err != nil {
		return -1, err
	}
	defer func() { _ = pc.Close() }()
	conn, ok := pc.(*net.UDPConn)
	if !ok {
		return -1, fmt.Errorf("%T is not a UDP socket", pc)
	}
	file, err := conn.File() // a duplicate outside the runtime's poller
	if err != nil {
		return -1, err
	}
	defer func() { _ = file.Close() }()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	for _, o := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, c.ReceiveBuffer) // what was granted is read back and reported
	}
	// DF on every datagram, and no ear for what an ICMP error says of the path: node/pathmtu.go finds out what passes.
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	_, err = unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	u.gso = err == nil
	u.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	if la, ok := conn.LocalAddr().(*net.UDPAddr); ok {
		u.addr = netip.AddrPortFrom(c.Addr.Addr(), uint16(la.Port))
	}
	return fd, nil
}

// probeFree fails if somebody else holds the port, even with SO_REUSEPORT: sharing it would lose packets in silence.
func probeFree(a netip.AddrPort) error {
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(a))
	if err != nil {
		return err
	}
	return c.Close()
}

func (u *underlay) close() {
	for _, fd := range u.fds {
		_ = unix.Close(fd)
	}
	u.fds = nil
}

// txQueue collects a batch's datagrams and sends them. It belongs to one worker.
type txQueue struct {
	// constant after newTxQueue
	fd    int
	w     *worker
	stats *underlayCounters
	encap int // bytes in front of each packet, in what is queued

	maxSegs int // segments in one train; 1 where the kernel has no UDP_SEGMENT
	n       int // trains queued
	trains  [txMsgs]train
	msgs    [txMsgs]unix.Mmsghdr
	names   [txMsgs]unix.RawSockaddrInet4
	ctls    [txMsgs]segmentCtl
	iovs    []unix.Iovec
	niov    int
	one     [2]unix.Iovec // of a segment that is sent by itself: its pieces, which may go on into the next segment's
	hdrs    []byte
	nhdr    int
}

// train is a datagram, or several of one size to be cut by the kernel or the network card.
type train struct {
	to     *peer
	iov    int // first iovec
	niov   int
	size   int // bytes of each segment but the last
	segs   int
	bytes  int
	closed bool // its last segment is shorter
}

// segmentCtl is the control message with UDP_SEGMENT's u16.
type segmentCtl struct {
	hdr  unix.Cmsghdr
	size uint16
	_    [6]byte
}

func newTxQueue(u *underlay, fd int, w *worker) *txQueue {
	encap := u.vxlan.Encap()
	q := &txQueue{
		fd: fd, w: w, stats: new(underlayCounters), encap: encap, maxSegs: 1,
		iovs: make([]unix.Iovec, txIovs), hdrs: make([]byte, txHdrLen+txIovs/2*encap),
	}
	if u.gso {
		q.maxSegs = trainSegs
	}
	for i := range q.msgs {
		q.ctls[i].hdr = unix.Cmsghdr{Level: unix.IPPROTO_UDP, Type: unix.UDP_SEGMENT}
		q.ctls[i].hdr.SetLen(unix.CmsgLen(2))
		q.names[i].Family = unix.AF_INET
		q.msgs[i].Hdr.Name = (*byte)(unsafe.Pointer(&q.names[i]))
		q.msgs[i].Hdr.Namelen = unix.SizeofSockaddrInet4
	}
	return q
}

// reserve makes sure that one more segment fits, sending what is queued if not. Headers taken before are then reused.
func (q *txQueue) reserve() {
	if q.n == txMsgs || q.niov+2 > len(q.iovs) || q.nhdr+q.encap+packet.MaxHeaders+smallPiece > len(q.hdrs) {
		q.flush()
	}
}

// header returns n bytes for a segment's headers; they are kept if the segment is added.
func (q *txQueue) header(n int) []byte { return q.hdrs[q.nhdr:][:n] }

// addPacket queues a whole packet for a peer, encapsulated. It is borrowed until flush.
func (q *txQueue) addPacket(to *peer, b []byte) {
	if len(b) <= smallPiece {
		kept := q.header(len(b))
		copy(kept, b)
		q.nhdr += len(b)
		b = kept
	}
	q.add(to, b, nil)
}

// addSegment queues a segment for a peer: hdr, from header, with the encapsulation, and payload, which is borrowed until flush.
func (q *txQueue) addSegment(to *peer, hdr, payload []byte) {
	if len(payload) <= smallPiece {
		hdr = append(hdr, payload...) // in place: header's memory goes on
		payload = nil
	}
	q.nhdr += len(hdr)
	q.add(to, hdr, payload)
}

// add queues a packet of one or two pieces.
func (q *txQueue) add(to *peer, head, tail []byte) {
	size := len(head) + len(tail)
	if size > MaxTrain {
		q.w.drop(DropUnderlayTooBig)
		return
	}
	var t *train
	if q.n > 0 {
		t = &q.trains[q.n-1]
	}
	if t == nil || t.to != to || t.closed || size > t.size || t.segs == q.maxSegs || t.bytes+size > MaxTrain || t.niov+2 > packet.MaxIovs {
		t = &q.trains[q.n]
		*t = train{to: to, iov: q.niov, size: size}
		q.n++
	}
	t.segs++
	t.bytes += size
	t.closed = size < t.size
	q.piece(t, head)
	if len(tail) > 0 {
		q.piece(t, tail)
	}
}

// piece adds b to t, as a part of the piece before it where it follows that in memory.
func (q *txQueue) piece(t *train, b []byte) {
	if t.niov > 0 {
		last := &q.iovs[q.niov-1]
		if unsafe.Add(unsafe.Pointer(last.Base), last.Len) == unsafe.Pointer(&b[0]) {
			last.SetLen(int(last.Len) + len(b))
			return
		}
	}
	v := &q.iovs[q.niov]
	v.Base = &b[0]
	v.SetLen(len(b))
	q.niov++
	t.niov++
}

// flush sends the queue and empties it.
func (q *txQueue) flush() {
	if q.n == 0 {
		return
	}
	for i := range q.trains[:q.n] {
		q.address(i, q.trains[i].to)
		h := &q.msgs[i].Hdr
		t := &q.trains[i]
		h.Iov = &q.iovs[t.iov]
		h.SetIovlen(t.niov)
		h.Control = nil
		h.SetControllen(0)
		if t.segs > 1 {
			q.ctls[i].size = uint16(t.size)
			h.Control = (*byte)(unsafe.Pointer(&q.ctls[i]))
			h.SetControllen(unix.CmsgSpace(2))
		}
	}
	for i := 0; i < q.n; {
		sent, errno := q.sendmmsg(i, q.n)
		if errno == 0 {
			for _, t := range q.trains[i : i+sent] {
				q.count(&t)
			}
			i += sent
			continue
		}
		if errno == unix.EINTR {
			continue
		}
		if errno == unix.EAGAIN {
			if q.waitWritable() {
				continue
			}
			for _, t := range q.trains[i:q.n] {
				q.w.drops[DropUnderlayFull].Add(uint64(t.segs))
			}
			break
		}
		q.refused(i, errno)
		i++
	}
	q.n, q.niov, q.nhdr = 0, 0, 0
}

func (q *txQueue) address(i int, to *peer) {
	q.names[i].Addr = to.addr.ip
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&q.names[i].Port))[:], to.addr.port)
}

func (q *txQueue) count(t *train) {
	inner := uint64(t.bytes - t.segs*q.encap)
	q.stats.trains.Add(1)
	q.stats.packets.Add(uint64(t.segs))
	q.stats.bytes.Add(inner)
	t.to.sentPackets.Add(uint64(t.segs))
	t.to.sentBytes.Add(inner)
}

func (q *txQueue) sendmmsg(from, to int) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(q.fd), uintptr(unsafe.Pointer(&q.msgs[from])), uintptr(to-from), unix.MSG_DONTWAIT, 0, 0)
	q.stats.calls.Add(1)
	return int(n), errno
}

// waitWritable waits for room in the send buffer: this is the back-pressure of the underlay.
func (q *txQueue) waitWritable() bool {
	fds := []unix.PollFd{{Fd: int32(q.fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(fds, sendWait)
	return n > 0 || errors.Is(err, unix.EINTR)
}

// refused deals with train i, which the kernel did not take. A train that the kernel cannot cut (no checksum offload on the
// device: EIO; a segment above the MTU: EMSGSIZE; more segments than an old kernel allows: EINVAL) goes out one by one.
func (q *txQueue) refused(i int, errno unix.Errno) {
	t := &q.trains[i]
	if t.segs == 1 {
		q.w.drop(dropOf(errno))
		return
	}
	switch {
	case errno == unix.EIO:
		q.maxSegs = 1
	case errno == unix.EINVAL && t.segs > oldTrainSegs:
		q.maxSegs = oldTrainSegs
	case errno != unix.EMSGSIZE && errno != unix.EINVAL:
		q.w.drops[dropOf(errno)].Add(uint64(t.segs))
		return
	}
	h := &q.msgs[i].Hdr
	h.Control = nil
	h.SetControllen(0)
	pieces := q.iovs[t.iov : t.iov+t.niov]
	for left := t.bytes; left > 0; {
		size := min(t.size, left)
		left -= size
		n := 0
		for got := 0; got < size; n++ {
			p := &pieces[0]
			q.one[n].Base = p.Base
			q.one[n].SetLen(min(int(p.Len), size-got))
			got += int(q.one[n].Len)
			if q.one[n].Len == p.Len {
				pieces = pieces[1:]
			} else {
				p.Base = (*byte)(unsafe.Add(unsafe.Pointer(p.Base), q.one[n].Len))
				p.Len -= q.one[n].Len
			}
		}
		h.Iov = &q.one[0]
		h.SetIovlen(n)
		_, err := q.sendmmsg(i, i+1)
		for err == unix.EINTR || (err == unix.EAGAIN && q.waitWritable()) {
			_, err = q.sendmmsg(i, i+1)
		}
		if err != 0 {
			q.w.drop(dropOf(err))
			continue
		}
		q.count(&train{to: t.to, segs: 1, bytes: size})
	}
}

func dropOf(errno unix.Errno) Drop {
	switch errno {
	case unix.EMSGSIZE:
		return DropUnderlayTooBig
	case unix.EAGAIN, unix.ENOBUFS:
		return DropUnderlayFull
	}
	return DropUnderlayRefused
}
