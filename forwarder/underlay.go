// This file is the way out to the underlay, with as few system calls as the kernel allows: many packets of one size for one peer
// go out in one datagram train (UDP_SEGMENT), many trains in one sendmmsg.

package forwarder

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	// MaxTrain is the payload in bytes of the largest UDP datagram, of which a train is cut: 65535 less the IPv4 and UDP
	// headers. IPv6 would take 20 more, of which nothing is made.
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

// txQueue collects a batch's datagrams of one family and sends them. It belongs to one worker.
type txQueue struct {
	// constant after newTxQueue
	fd    int
	w     *worker
	stats *underlayCounters // the worker's
	encap int               // bytes in front of each packet, in what is queued

	maxSegs int // segments in one train; 1 where the kernel has no UDP_SEGMENT
	n       int // trains queued
	trains  [txMsgs]train
	msgs    [txMsgs]unix.Mmsghdr
	names   [txMsgs]sockaddr
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

// newTxQueue sends from the first lane of the worker's loop.
func newTxQueue(s *sockets, w *worker) *txQueue {
	encap := w.router.vxlan.Encap()
	q := &txQueue{
		fd: s.loopFDs(w.loop)[0], w: w, stats: &w.sent, encap: encap, maxSegs: 1,
		iovs: make([]unix.Iovec, txIovs), hdrs: make([]byte, txHdrLen+txIovs/2*encap),
	}
	if s.gso {
		q.maxSegs = trainSegs
	}
	for i := range q.msgs {
		q.ctls[i].hdr = unix.Cmsghdr{Level: unix.IPPROTO_UDP, Type: unix.UDP_SEGMENT}
		q.ctls[i].hdr.SetLen(unix.CmsgLen(2))
		q.msgs[i].Hdr.Name = (*byte)(unsafe.Pointer(&q.names[i]))
		q.msgs[i].Hdr.Namelen = s.family().nameLen
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
		q.names[i] = q.trains[i].to.name
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
	fewer := q.maxSegs // from now on, if it is the length that the kernel does not take
	switch {
	case errno == unix.EIO:
		fewer = 1
	case errno == unix.EINVAL && t.segs > oldTrainSegs:
		fewer = oldTrainSegs
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
		q.maxSegs = fewer
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
