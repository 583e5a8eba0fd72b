// This file is what a policy remembers of flows, so that replies pass: a table of a fixed size without locks, which every worker reads
// and writes. An entry is a keyed hash of the flow's addresses, ports and protocol, the same for both directions:
//
//	set   0 [hash 8] x 8  [last packet 4, in seconds] x 8
//	      1 ...                                               the set is chosen by the hash
//
// A flow that is forgotten, because its set was full of later ones or because the daemon started anew, is remembered again at its next
// packet in the direction that may begin it; until then replies are refused. Two workers that write one place at once lose one of two
// flows, likewise.

package forwarder

import (
	"encoding/binary"
	"hash/maphash"
	"sync/atomic"
	"time"
)

const (
	flowSets = 2048
	flowWays = 8
)

// For how many seconds flows are remembered without a packet.
const (
	tcpIdle      = 5 * 24 * 3600 // Linux's nf_conntrack_tcp_timeout_established
	otherIdle    = 180           // as of the gateway's UDP flows
	fragmentIdle = 30            // Linux's ipfrag_time, for which fragments wait for each other
)

// flowTable remembers flows. Safe for concurrent use.
type flowTable struct {
	seed maphash.Seed
	sets *[flowSets]flowSet
}

type flowSet struct {
	hashes [flowWays]atomic.Uint64 // 0: free
	seen   [flowWays]atomic.Uint32
}

func newFlowTable() flowTable {
	return flowTable{seed: maphash.MakeSeed(), sets: new([flowSets]flowSet)}
}

// flowKey is what is hashed: [protocol 1][kind 1][0 2][container's port 2][other's port 2][container's address 16][other's address 16].
type flowKey [40]byte

// Kinds of flowKey. The addresses of IPv4 leave zeros behind them.
const (
	key4 = iota
	key6
	keyFragment4 // with an identification in place of the ports
	keyFragment6
)

// key is the flow's, with the container first whichever way the packet goes. An ICMP error goes against the packet that it is about.
func (s *sight) key(dir direction) (k flowKey) {
	container, other, port, otherPort := s.srcAddr, s.dstAddr, s.src, s.dst
	if (dir == inbound) != (s.role == roleAbout) {
		container, other, port, otherPort = other, container, otherPort, port
	}
	k[0] = s.proto
	if !s.v4 {
		k[1] = key6
	}
	binary.NativeEndian.PutUint16(k[4:], port)
	binary.NativeEndian.PutUint16(k[6:], otherPort)
	copy(k[8:24], container)
	copy(k[24:], other)
	return k
}

// fragmentKey is that of all fragments of one datagram.
func (s *sight) fragmentKey(dir direction) (k flowKey) {
	container, other := s.srcAddr, s.dstAddr
	if dir == inbound {
		container, other = other, container
	}
	k[0], k[1], k[2] = s.proto, keyFragment4, byte(dir)
	if !s.v4 {
		k[1] = keyFragment6
	}
	binary.NativeEndian.PutUint32(k[4:], s.id)
	copy(k[8:24], container)
	copy(k[24:], other)
	return k
}

// hash is never 0.
func (t *flowTable) hash(k flowKey) uint64 {
	return max(1, maphash.Bytes(t.seed, k[:]))
}

// knows tells whether a flow has been remembered and had a packet within idle seconds, and takes now for that of its last.
func (t *flowTable) knows(hash uint64, now uint32, idle int32) bool {
	set := &t.sets[hash%flowSets]
	for i := range set.hashes {
		if set.hashes[i].Load() != hash {
			continue
		}
		seen := set.seen[i].Load()
		if int32(now-seen) > idle {
			return false
		}
		if seen != now {
			set.seen[i].Store(now)
		}
		return true
	}
	return false
}

// remember puts a flow into the table, in the place of the one that has been idle for longest if there is none left.
func (t *flowTable) remember(hash uint64, now uint32) {
	set := &t.sets[hash%flowSets]
	at, oldest := 0, int32(-1)
	for i := range set.hashes {
		switch h := set.hashes[i].Load(); h {
		case hash:
			if set.seen[i].Load() != now {
				set.seen[i].Store(now)
			}
			return
		case 0:
			if oldest < 1<<31-1 {
				at, oldest = i, 1<<31-1
			}
		default:
			if age := int32(now - set.seen[i].Load()); age > oldest {
				at, oldest = i, age
			}
		}
	}
	set.seen[at].Store(now)
	set.hashes[at].Store(hash)
}

// started is when clocks are counted from.
var started = time.Now()

// clock is the time in seconds, as of the first packet of the batch that asks for it.
func (w *worker) clock() uint32 {
	if w.now == 0 {
		w.now = 1 + uint32(time.Since(started)/time.Second)
	}
	return w.now
}
