// This file decides which packets are well-formed enough to be routed (RFC 1812 5.2.2, RFC 8200).

package forwarder

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// check validates the IP header of p and trims what the link added behind the packet. After it, the header's lengths can be
// believed.
func check(p *packet.Packet) Drop {
	ip := p.Bytes()
	if len(ip) == 0 {
		return DropMalformed
	}
	var total int
	switch ip[0] >> 4 {
	case 4:
		if len(ip) < header.IPv4MinimumSize {
			return DropMalformed
		}
		h := header.IPv4(ip)
		hl := int(h.HeaderLength())
		total = int(h.TotalLength())
		if hl < header.IPv4MinimumSize || total < hl || total > len(ip) {
			return DropMalformed
		}
		if checksum.Checksum(ip[:hl], 0) != 0xffff {
			return DropBadChecksum
		}
		if dst := ip[16]; dst == 0 || dst == 127 || dst >= 224 {
			return DropNotUnicast
		}
		if ip[9] == packet.ICMP && ip[6]&0x1f == 0 && ip[7] == 0 && total > hl && linkOnly4(ip[hl]) {
			return DropLinkOnly
		}
	case 6:
		if len(ip) < header.IPv6MinimumSize {
			return DropMalformed
		}
		total = header.IPv6MinimumSize + int(binary.BigEndian.Uint16(ip[4:]))
		if total > len(ip) {
			return DropMalformed
		}
		if ip[24] == 0xff || (ip[24] == 0xfe && ip[25]&0xc0 == 0x80) || [15]byte(ip[24:39]) == [15]byte{} {
			return DropNotUnicast // multicast, link-local, loopback or unspecified
		}
		if ip[6] == packet.ICMPv6 && total > header.IPv6MinimumSize && linkOnly6(ip[header.IPv6MinimumSize]) {
			return DropLinkOnly
		}
	default:
		return DropMalformed
	}
	if total == len(ip) {
		return dropNone
	}
	if p.GSO != packet.GSONone || (p.NeedsCsum && int(p.CsumStart)+int(p.CsumOffset)+2 > total) {
		return DropMalformed
	}
	p.Buf = p.Buf[:p.Off+total]
	return dropNone
}

// linkOnly4 tells whether an ICMP message of that type is for neighbours on one link alone. Behind us there are none, so it could only
// lead somebody's traffic elsewhere.
func linkOnly4(t byte) bool {
	switch header.ICMPv4Type(t) {
	case header.ICMPv4Redirect, icmpv4RouterAdvert, icmpv4RouterSolicit:
		return true
	}
	return false
}

// Router discovery of IPv4 (RFC 1256).
const (
	icmpv4RouterAdvert  = header.ICMPv4Type(9)
	icmpv4RouterSolicit = header.ICMPv4Type(10)
)

// linkOnly6 is linkOnly4 for ICMPv6: neighbour discovery (RFC 4861). One that hides behind extension headers is refused by its receiver: its hop
// limit must be 255, and no router leaves it so.
func linkOnly6(t byte) bool {
	return header.ICMPv6Type(t) >= header.ICMPv6RouterSolicit && header.ICMPv6Type(t) <= header.ICMPv6RedirectMsg
}
