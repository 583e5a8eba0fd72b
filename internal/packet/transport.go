// This file finds the transport header of an IP packet, and the checksum arithmetic that both ends of the path need.

package packet

import "encoding/binary"

// IP protocol numbers that the packet path knows (IANA).
const (
	ICMP   = 1
	TCP    = 6
	UDP    = 17
	ICMPv6 = 58
)

// Transport tells the transport protocol of an IP packet and where its header begins. ok is false for fragments and for
// IPv6 extension headers, whose transport header is absent or not worth finding: such packets are only ever forwarded
// whole. The IP header must have passed the forwarder's check, or be the container's kernel's.
func Transport(ip []byte) (proto uint8, l4 int, ok bool) {
	if len(ip) < 20 {
		return 0, 0, false
	}
	switch ip[0] >> 4 {
	case 4:
		l4 = int(ip[0]&0xf) * 4
		const moreAndOffset = 0x3fff
		if l4 < 20 || l4 > len(ip) || binary.BigEndian.Uint16(ip[6:])&moreAndOffset != 0 {
			return ip[9], l4, false
		}
		return ip[9], l4, true
	case 6:
		if len(ip) < 40 {
			return 0, 0, false
		}
		switch ip[6] {
		case TCP, UDP, ICMPv6:
			return ip[6], 40, true
		}
		return ip[6], 40, false
	}
	return 0, 0, false
}

// PseudoSum is the folded, not complemented sum of the pseudo header of RFC 9293 3.1 and RFC 8200 8.1: the addresses
// of ip, proto, and length, the bytes of transport header and payload.
func PseudoSum(ip []byte, proto uint8, length int) uint16 {
	sum := uint64(proto) + uint64(length>>16) + uint64(length&0xffff)
	addrs := ip[12:20]
	if ip[0]>>4 == 6 {
		addrs = ip[8:40]
	}
	for len(addrs) >= 4 {
		sum += uint64(binary.BigEndian.Uint32(addrs))
		addrs = addrs[4:]
	}
	return Fold(sum)
}

// Fold reduces a sum of 16- or 32-bit big-endian words to 16 bits in one's complement arithmetic (RFC 1071).
func Fold(sum uint64) uint16 {
	sum = sum>>32 + sum&0xffffffff
	sum = sum>>32 + sum&0xffffffff
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	return uint16(sum)
}

// MarkPartial turns a packet whose transport checksum is known to be right into one whose checksum is owed
// (CHECKSUM_PARTIAL): the receiver then trusts the payload instead of summing it again. It does so for TCP and UDP
// alone and leaves other packets, and UDP without a checksum or with a length of its own, as they are.
func (p *Packet) MarkPartial() {
	ip := p.Bytes()
	proto, l4, ok := Transport(ip)
	if !ok {
		return
	}
	var off int
	switch proto {
	case TCP:
		off = 16
	case UDP:
		off = 6
	default:
		return
	}
	if len(ip) < l4+off+2 {
		return
	}
	// A datagram shorter than its IP packet (RFC 768 allows it) has another sum than the one that would be owed.
	if proto == UDP && (binary.BigEndian.Uint16(ip[l4+off:]) == 0 || int(binary.BigEndian.Uint16(ip[l4+4:])) != len(ip)-l4) {
		return
	}
	binary.BigEndian.PutUint16(ip[l4+off:], PseudoSum(ip, proto, len(ip)-l4))
	p.NeedsCsum, p.CsumStart, p.CsumOffset = true, uint16(l4), uint16(off)
}
