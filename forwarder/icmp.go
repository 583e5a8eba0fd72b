// This file tells senders why their packets ended here: unreachable, time exceeded, fragmentation needed / packet too big
// (RFC 792, RFC 1191, RFC 4443). Errors are paid for from a token bucket, and never answer errors (RFC 1812 4.3.2.7).

package forwarder

import (
	"encoding/binary"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	icmpErrorLen = 8 // type, code, checksum, rest (RFC 792)
	// icmpMax is the longest error: RFC 1812 4.3.2.3 for IPv4; well below the 1280 of RFC 4443 for IPv6, so that
	// one slot size serves both.
	icmpMax = 576
	icmpTTL = 64

	icmpPerSecond = 1000 // to peers' containers, of each worker
	icmpBurst     = 100
	// To each container of ours, which so takes none away from another: one that floods addresses without anybody must not keep its
	// neighbours from learning the MTU of their path.
	icmpPerSecondEach = 200
	icmpBurstEach     = 50

	ownSlots    = 32
	fragArena   = 160 << 10 // room for two 64 KB packets in fragments with their headroom
	maxOwnFrags = 128
)

// reach says what is unreachable.
type reach uint8

const (
	reachNet reach = iota
	reachHost
)

// ownPackets is the memory of packets that a worker makes itself during a batch: ICMP errors and fragments.
type ownPackets struct {
	icmp     []packet.Packet
	icmpBufs []byte
	frags    []packet.Packet
	fragBuf  []byte
	fragUsed int

	peers allowance // for errors to peers' containers
}

// allowance is what is left of a token bucket of ICMP errors. It belongs to one goroutine.
type allowance struct {
	tokens float64
	filled time.Time
}

// fill adds what has come since the last time, up to the burst; it begins full.
func (a *allowance) fill(burst, perSecond float64) {
	now := time.Now()
	if a.filled.IsZero() {
		a.tokens = burst
	} else {
		a.tokens = min(burst, a.tokens+now.Sub(a.filled).Seconds()*perSecond)
	}
	a.filled = now
}

// take pays for one error.
func (a *allowance) take(burst, perSecond float64) bool {
	a.fill(burst, perSecond)
	if a.tokens < 1 {
		return false
	}
	a.tokens--
	return true
}

func newOwnPackets() ownPackets {
	return ownPackets{
		icmp:     make([]packet.Packet, 0, ownSlots),
		icmpBufs: make([]byte, ownSlots*(packet.Headroom+icmpMax)),
		frags:    make([]packet.Packet, 0, maxOwnFrags),
	}
}

func (o *ownPackets) reset() { o.icmp, o.frags, o.fragUsed = o.icmp[:0], o.frags[:0], 0 }

// pays takes one ICMP error from what the sender of a packet has.
func (w *worker) pays(in *ingress) bool {
	if in.kind == fromContainer {
		return in.port.errors.take(icmpBurstEach, icmpPerSecondEach)
	}
	return w.own.peers.take(icmpBurst, icmpPerSecond)
}

// abounds tells whether the sender of a packet has enough for errors that matter less, such as those to who knocks at closed doors: path
// MTU discovery must not wait for them.
func (w *worker) abounds(in *ingress) bool {
	a, burst, perSecond := &w.own.peers, float64(icmpBurst), float64(icmpPerSecond)
	if in.kind == fromContainer {
		a, burst, perSecond = &in.port.errors, icmpBurstEach, icmpPerSecondEach
	}
	a.fill(burst, perSecond)
	return a.tokens > burst/2 && len(w.own.icmp) < cap(w.own.icmp)/2
}

func (w *worker) unreachable(p *packet.Packet, in *ingress, what reach) {
	w.drop(DropNoRoute)
	code4, code6 := header.ICMPv4NetUnreachable, header.ICMPv6NetworkUnreachable
	if what == reachHost {
		code4, code6 = header.ICMPv4HostUnreachable, header.ICMPv6AddressUnreachable
	}
	w.icmpError(p, in, header.ICMPv4DstUnreachable, code4, header.ICMPv6DstUnreachable, code6, 0)
}

func (w *worker) timeExceeded(p *packet.Packet, in *ingress) {
	w.icmpError(p, in, header.ICMPv4TimeExceeded, header.ICMPv4TTLExceeded, header.ICMPv6TimeExceeded, header.ICMPv6HopLimitExceeded, 0)
}

func (w *worker) tooBig(p *packet.Packet, in *ingress, mtu int) {
	w.drop(DropTooBig)
	w.icmpError(p, in, header.ICMPv4DstUnreachable, header.ICMPv4FragmentationNeeded, header.ICMPv6PacketTooBig, 0, uint32(mtu))
}

// icmpError sends an error about p to its source, if one is due. rest is the second word of the ICMP header: the MTU where
// there is one (for IPv4 its lower half, RFC 1191; the upper is zero).
func (w *worker) icmpError(p *packet.Packet, in *ingress, t4 header.ICMPv4Type, c4 header.ICMPv4Code, t6 header.ICMPv6Type, c6 header.ICMPv6Code, rest uint32) {
	ip := p.Bytes()
	v4 := ip[0]>>4 == 4
	from := w.table.gateway
	if !v4 {
		from = w.table.gateway6
	}
	if in.kind == fromContainer && v4 && in.port.cfg.Errors.IsValid() {
		from = in.port.cfg.Errors
	}
	if !from.IsValid() || in.kind == fromGateway || !deservesError(ip) {
		return
	}
	src, _ := addrs(ip)
	h := w.table.lookup(src)
	if h == nil || (h.kind != hopPort && h.kind != hopOwnAt && h.kind != hopPeer) {
		return
	}
	if !w.pays(in) || len(w.own.icmp) == cap(w.own.icmp) {
		w.drop(DropScratch)
		return
	}
	const slot = packet.Headroom + icmpMax
	buf := w.own.icmpBufs[len(w.own.icmp)*slot:][:slot]
	var n int
	if v4 {
		n = buildICMPv4(buf[packet.Headroom:], from.AsSlice(), ip, t4, c4, rest)
	} else {
		n = buildICMPv6(buf[packet.Headroom:], from.AsSlice(), ip, t6, c6, rest)
	}
	w.own.icmp = append(w.own.icmp, packet.Packet{Buf: buf[: packet.Headroom+n : packet.Headroom+n], Off: packet.Headroom})
	w.enqueue(h, &w.own.icmp[len(w.own.icmp)-1])
	w.icmps.Add(1)
}

// deservesError tells whether RFC 1812 4.3.2.7 and RFC 4443 2.4 allow an error about ip.
func deservesError(ip []byte) bool {
	if ip[0]>>4 == 4 {
		h := header.IPv4(ip)
		if h.FragmentOffset() != 0 || ip[12] == 0 || ip[12] == 127 || ip[12] >= 224 {
			return false
		}
		hl := int(h.HeaderLength())
		if ip[9] != packet.ICMP {
			return true
		}
		if len(ip) <= hl {
			return false
		}
		switch header.ICMPv4Type(ip[hl]) {
		case header.ICMPv4Echo, header.ICMPv4EchoReply, header.ICMPv4Timestamp, header.ICMPv4TimestampReply:
			return true
		}
		return false
	}
	if ip[8] == 0xff {
		return false
	}
	if ip[6] != packet.ICMPv6 {
		return true
	}
	const infoMessages = 128 // ICMPv6 types below are errors
	return len(ip) > header.IPv6MinimumSize && ip[header.IPv6MinimumSize] >= infoMessages &&
		header.ICMPv6Type(ip[header.IPv6MinimumSize]) != header.ICMPv6RedirectMsg
}

func buildICMPv4(b, from, about []byte, t header.ICMPv4Type, c header.ICMPv4Code, rest uint32) int {
	quote := min(len(about), icmpMax-header.IPv4MinimumSize-icmpErrorLen)
	n := header.IPv4MinimumSize + icmpErrorLen + quote
	ip := header.IPv4(b[:n])
	clear(ip[:header.IPv4MinimumSize+icmpErrorLen])
	ip[0] = 0x45
	ip[1] = 0xc0 // precedence internetwork control (RFC 1812 4.3.2.5)
	ip.SetTotalLength(uint16(n))
	ip.SetTTL(icmpTTL)
	ip[9] = packet.ICMP
	copy(ip[12:], from)
	copy(ip[16:], about[12:16])
	ip.SetChecksum(^checksum.Checksum(ip[:header.IPv4MinimumSize], 0))
	m := ip[header.IPv4MinimumSize:]
	m[0], m[1] = byte(t), byte(c)
	binary.BigEndian.PutUint32(m[4:], rest)
	copy(m[icmpErrorLen:], about[:quote])
	binary.BigEndian.PutUint16(m[2:], ^checksum.Checksum(m, 0))
	return n
}

func buildICMPv6(b, from, about []byte, t header.ICMPv6Type, c header.ICMPv6Code, rest uint32) int {
	quote := min(len(about), icmpMax-header.IPv6MinimumSize-icmpErrorLen)
	n := header.IPv6MinimumSize + icmpErrorLen + quote
	ip := b[:n]
	clear(ip[:header.IPv6MinimumSize+icmpErrorLen])
	ip[0], ip[6], ip[7] = 0x60, packet.ICMPv6, icmpTTL
	binary.BigEndian.PutUint16(ip[4:], uint16(icmpErrorLen+quote))
	copy(ip[8:], from)
	copy(ip[24:], about[8:24])
	m := ip[header.IPv6MinimumSize:]
	m[0], m[1] = byte(t), byte(c)
	binary.BigEndian.PutUint32(m[4:], rest)
	copy(m[icmpErrorLen:], about[:quote])
	sumICMPv6(ip)
	return n
}

// sumICMPv6 sets the checksum of the ICMPv6 message in ip, which has no extension headers.
func sumICMPv6(ip []byte) {
	m := ip[header.IPv6MinimumSize:]
	m[2], m[3] = 0, 0
	sum := uint64(packet.PseudoSum(ip, packet.ICMPv6, len(m))) + uint64(checksum.Checksum(m, 0))
	binary.BigEndian.PutUint16(m[2:], ^packet.Fold(sum))
}
