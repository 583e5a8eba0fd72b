// This file is the way in: the datagram trains that peers sent (UDP_GRO), several in one recvmmsg, read from the sockets of one
// loop and cut into packets again.

package forwarder

import (
	"encoding/binary"
	"math/bits"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	rxMsgs   = 8          // datagram trains in one recvmmsg
	rxSlots  = 8 * rxMsgs // trains in one batch from several lanes of TCP
	rxSingle = 4 * rxMsgs // datagrams in one batch from one lane, where they come one by one
	rxBufLen = packet.Headroom + 1<<16
	rxPkts   = 1024
)

// rxQueue reads the sockets of one loop, of one family in a batch. It belongs to the loop.
type rxQueue struct {
	// constant after newRxQueue
	vxlan *VXLAN
	begin int // where datagrams begin in bufs, so that their first packet begins at packet.Headroom
	stats *underlayCounters

	last  [families]int // lane of TCP that gave the last train
	msgs  []unix.Mmsghdr
	names []sockaddr
	ctls  [][64]byte
	iovs  []unix.Iovec
	bufs  [][]byte
	order []uint8 // of msgs
	pkts  []packet.Packet
}

// newRxQueue has room for what so many lanes hold.
func newRxQueue(lanes int, v *VXLAN) *rxQueue {
	n := rxSingle
	if tcpOf(lanes) > 1 {
		n = rxSlots
	}
	q := &rxQueue{
		vxlan: v, begin: packet.Headroom - v.Encap(), stats: new(underlayCounters), pkts: make([]packet.Packet, 0, rxPkts),
		msgs: make([]unix.Mmsghdr, n), names: make([]sockaddr, n), ctls: make([][64]byte, n), iovs: make([]unix.Iovec, n),
		bufs: make([][]byte, n), order: make([]uint8, n),
	}
	for i := range q.msgs {
		q.bufs[i] = make([]byte, rxBufLen)
		q.iovs[i].Base = &q.bufs[i][q.begin]
		q.iovs[i].SetLen(rxBufLen - q.begin)
		h := &q.msgs[i].Hdr
		h.Name = (*byte)(unsafe.Pointer(&q.names[i]))
		h.Iov = &q.iovs[i]
		h.SetIovlen(1)
		h.Control = &q.ctls[i][0]
	}
	return q
}

// read takes what the lanes have whose bit is set in ready, at most a batch of each that is not TCP's and one of TCP's, and forwards it. w is
// in a batch; what its loop was told of sockets that Rebind has replaced meanwhile says nothing of those that there are now.
func (q *rxQueue) read(w *worker, f family, ready uint64) {
	s := w.under[f]
	if s == nil {
		return
	}
	fds := s.loopFDs(w.loop)
	ready &= 1<<len(fds) - 1
	mixed := mixedOf(len(fds))
	for rest := ready & (1<<mixed - 1); rest != 0; rest &= rest - 1 {
		n := q.drain(fds[bits.TrailingZeros64(rest)])
		q.inOrderOfArrival(n)
		q.forward(w, n)
		w.flush() // its buffers are used again
	}
	ready, fds = ready>>mixed, fds[mixed:]
	switch bits.OnesCount64(ready) {
	case 0:
	case 1:
		lane := bits.TrailingZeros64(ready)
		n := q.drain(fds[lane])
		if n > 0 {
			q.last[f] = lane
		}
		q.inOrderOfArrival(n)
		q.forward(w, n)
	default:
		q.forward(w, q.sweep(f, fds, ready))
	}
}

// drain reads a socket and returns how many trains there were. One call brings enough, unless all it brings is TCP in single
// datagrams, as from a peer's kernel where nothing on the way joins them: eight of them are a small superpacket for the container,
// and each superpacket costs an ACK. Other datagrams are not held up: to their receivers, more at once is more to lose.
func (q *rxQueue) drain(fd int) (n int) {
	for bytes := 0; n < rxSingle && bytes < batchBytes; {
		got := q.receive(fd, n)
		n += got
		if got < rxMsgs {
			break
		}
		for i := n - got; i < n; i++ {
			if q.segmentSize(i) > 0 || !q.key(i).tcp {
				return n
			}
			bytes += int(q.msgs[i].Len)
		}
	}
	return n
}

func (q *rxQueue) inOrderOfArrival(n int) {
	for i := range q.order[:n] {
		q.order[i] = uint8(i)
	}
}

// receive reads a socket once, into the messages from at, and returns how many trains there were.
func (q *rxQueue) receive(fd, at int) int {
	most := min(rxMsgs, len(q.msgs)-at)
	if most == 0 {
		return 0
	}
	for i := at; i < at+most; i++ {
		q.msgs[i].Hdr.Namelen = unix.SizeofSockaddrInet6 // room enough for either family
		q.msgs[i].Hdr.SetControllen(len(q.ctls[i]))
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&q.msgs[at])), uintptr(most), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0 // nothing there, or an ICMP error of an earlier send, which is forgotten
	}
	q.stats.calls.Add(1)
	q.stats.trains.Add(uint64(n))
	return int(n)
}

// forward cuts the first n trains in the order of q.order into packets and routes them.
func (q *rxQueue) forward(w *worker, n int) {
	q.pkts = q.pkts[:0]
	in := ingress{kind: fromPeer}
	for _, i := range q.order[:n] {
		q.forwardTrain(w, int(i), &in)
	}
}

// forwardTrain does so with train i; in is what was found out about the one before it, which often came from the same peer.
func (q *rxQueue) forwardTrain(w *worker, i int, in *ingress) {
	n := int(q.msgs[i].Len)
	size := q.segmentSize(i)
	if size <= 0 || size > n {
		size = n
	}
	if n == 0 {
		return // somebody looks whether the port is open: no packet, and no damage
	}
	if q.msgs[i].Hdr.Flags&unix.MSG_TRUNC != 0 {
		w.drop(DropMalformed)
		return
	}
	if outer := q.names[i].addrPort(); outer != in.outer {
		*in = ingress{kind: fromPeer, outer: outer}
	}
	in.segment = 0
	buf := q.bufs[i]
	if size < n && q.vxlan.isSuperpacket(buf[q.begin:q.begin+n]) {
		in.segment, size = size, n
	}
	var packets, bytes uint64
	for at := q.begin; at < q.begin+n; at += size {
		end := min(at+size, q.begin+n)
		if len(q.pkts) == cap(q.pkts) {
			w.flush()
			q.pkts = q.pkts[:0]
		}
		from := 0
		if at > q.begin {
			from = at // what stands before it is the packet before it: no headroom
		}
		p, why := q.vxlan.decapsulate(buf[from:end:end], at-from)
		packets++
		if why != dropNone {
			w.drop(why)
			continue
		}
		q.pkts = append(q.pkts, p)
		w.forward(&q.pkts[len(q.pkts)-1], in)
		bytes += uint64(p.Len())
	}
	q.stats.packets.Add(packets)
	q.stats.bytes.Add(bytes)
	if in.peer != nil {
		in.peer.recvPackets.Add(packets)
		in.peer.recvBytes.Add(bytes)
	}
}

// segmentSize is the UDP_GRO control message of train i: the size of each datagram in it, 0 if it is a single one.
func (q *rxQueue) segmentSize(i int) int {
	b := q.ctls[i][:q.msgs[i].Hdr.Controllen]
	for len(b) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		if h.Len < unix.SizeofCmsghdr || uint64(h.Len) > uint64(len(b)) {
			return 0
		}
		if h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && int(h.Len) >= unix.CmsgLen(4) {
			return int(binary.NativeEndian.Uint32(b[unix.CmsgLen(0):]))
		}
		b = b[min(len(b), unix.CmsgSpace(int(h.Len)-unix.CmsgLen(0))):]
	}
	return 0
}
