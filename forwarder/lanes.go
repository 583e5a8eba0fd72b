// This file is the sockets of one loop, its lanes, and how they are read. They are on one port, and a BPF program (steer.go) says which packet has
// which.
//
// The first few are of what is not TCP, by the sender's address: a container that floods fills one of them, and what comes from most others,
// and all TCP, does not wait behind it, or get lost with it. Each is read a batch in turn.
//
// The others are of TCP alone, and make up for a small receive buffer. The kernel grants an unprivileged socket net.core.rmem_max, of which a stock
// system has 208 KB: three or four datagram trains. A loop that waits a millisecond for its core then loses a burst, and
// TCP sends again what it need not have. So a loop that is granted less than it asks for has several, and TCP is laid across
// them in stripes of its sequence numbers: what one flow sends meanwhile fills them one after the other.
//
// Order: a flow's older data is in another lane than its newer data, but only where the lanes were read at a stripe's
// border. A batch from several lanes is therefore read twice over, so that nothing older than what it holds is left behind,
// and the trains of a flow are put into the order of their sequence numbers.

package forwarder

import (
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	maxLanes    = 16
	mixedLanes  = 4  // at most, of what is not TCP
	maxSockets  = 64 // of all loops in a family: where there are many, a burst meets more of them anyway
	stripeShift = 18 // a stripe is 256 KB of a flow's sequence space: less than a lane holds
)

// lanesFor is how many sockets a loop, of so many, needs for TCP to have the buffer that is asked for, in bytes, and for the rest to be apart.
func lanesFor(asked, loops int) int {
	tcp := 1
	if granted := grantedBuffer(asked); granted > 0 {
		tcp = (asked + granted - 1) / granted
	}
	return max(1, min(maxLanes, maxSockets/loops, mixedLanes+tcp))
}

// mixedOf is how many of so many lanes are not of TCP alone: the first ones. A single lane has everything.
func mixedOf(lanes int) int { return max(1, min(mixedLanes, lanes-1)) }

// tcpOf is how many of so many lanes TCP has: the last ones.
func tcpOf(lanes int) int { return max(1, lanes-mixedOf(lanes)) }

// grantedBuffer is the receive buffer in bytes that the kernel grants a socket that asks for so much, 0 if it does not say.
func grantedBuffer(asked int) int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Close(fd) }()
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, asked)
	return receiveBuffer(fd)
}

// receiveBuffer is the receive buffer of a socket in bytes, 0 if the kernel does not say.
func receiveBuffer(fd int) int {
	twice, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		return 0
	}
	return twice / 2 // the kernel doubles what it grants, for its own bookkeeping
}

// sweep reads several lanes of TCP and puts their trains in order. It returns how many there are.
func (q *rxQueue) sweep(f family, fds []int, ready uint64) int {
	n, gave := 0, 0
	first := q.last[f] // with one flow, it has the oldest
	for range 2 {
		for i := range fds {
			lane := (first + i) % len(fds)
			if ready&(1<<lane) == 0 {
				continue
			}
			before := n
			for {
				got := q.receive(fds[lane], n)
				n += got
				if got < rxMsgs {
					break
				}
			}
			if n > before {
				q.last[f] = lane
				gave++
			}
		}
		if gave < 2 {
			break
		}
	}
	q.inOrderOfArrival(n)
	if gave > 1 {
		q.sort(n)
	}
	return n
}

// trainKey is the flow of a TCP train, and where in it the train begins.
type trainKey struct {
	flow, ports uint64
	seq         uint32
	tcp         bool
}

func (q *rxQueue) key(i int) (k trainKey) {
	end := q.begin + int(q.msgs[i].Len)
	if end < packet.Headroom+40 {
		return trainKey{}
	}
	ip := q.bufs[i][packet.Headroom:end]
	l4 := 0
	switch {
	case ip[0]>>4 == 4 && ip[9] == packet.TCP:
		l4 = int(ip[0]&0xf) * 4
		k.flow = binary.NativeEndian.Uint64(ip[12:])
	case ip[0]>>4 == 6 && ip[6] == packet.TCP:
		l4 = 40
		for at := 8; at < 40; at += 8 {
			k.flow = bits.RotateLeft64(k.flow, 13) ^ binary.NativeEndian.Uint64(ip[at:])
		}
	default:
		return trainKey{}
	}
	if len(ip) < l4+8 {
		return trainKey{}
	}
	k.tcp, k.ports, k.seq = true, uint64(binary.NativeEndian.Uint32(ip[l4:])), binary.BigEndian.Uint32(ip[l4+4:])
	return k
}

// sort moves every train before the first of its flow that comes later in the flow.
func (q *rxQueue) sort(n int) {
	var keys [rxSlots]trainKey
	for i := range n {
		k := q.key(int(q.order[i]))
		keys[i] = k
		if !k.tcp {
			continue
		}
		for j := range i {
			o := keys[j]
			if o.tcp && o.flow == k.flow && o.ports == k.ports && int32(o.seq-k.seq) > 0 {
				x := q.order[i]
				copy(q.order[j+1:i+1], q.order[j:i])
				copy(keys[j+1:i+1], keys[j:i])
				q.order[j], keys[j] = x, k
				break
			}
		}
	}
}
