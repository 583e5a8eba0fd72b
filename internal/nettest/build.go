// This file builds IP packets, and superpackets as a container's kernel hands them to a TAP.

package nettest

import (
	"encoding/binary"
	"net/netip"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// TCP flags (RFC 9293, RFC 3168).
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// Bits of IP.Frag.
const (
	DF = 0x4000
	MF = 0x2000
)

// IP is an IP header of either family. Zero values are those of an ordinary packet.
type IP struct {
	Src, Dst netip.Addr
	TTL      uint8  // 0 is 64
	TOS      uint8  // also the traffic class of IPv6
	ID       uint16 // IPv4
	Frag     uint16 // IPv4: DF, MF and the offset in units of 8 bytes
	Options  []byte // IPv4; a multiple of 4 bytes
}

// Between is the header of a packet from src to dst.
func Between(src, dst string) IP {
	return IP{Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst)}
}

// TCP is a TCP header.
type TCP struct {
	SrcPort, DstPort uint16
	Seq, Ack         uint32
	Flags            uint8
	Reserved         uint8 // the four bits behind the data offset
	Window           uint16
	Options          []byte // a multiple of 4 bytes
}

// UDP is a UDP header.
type UDP struct {
	SrcPort, DstPort uint16
	NoChecksum       bool
}

// Raw is the packet of h and any payload.
func (h IP) Raw(proto uint8, payload []byte) []byte {
	ttl := h.TTL
	if ttl == 0 {
		ttl = 64
	}
	if h.Src.Is6() {
		b := make([]byte, 40, 40+len(payload))
		b[0], b[1] = 0x60|h.TOS>>4, h.TOS<<4
		binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
		b[6], b[7] = proto, ttl
		copy(b[8:], h.Src.AsSlice())
		copy(b[24:], h.Dst.AsSlice())
		return append(b, payload...)
	}
	hl := 20 + len(h.Options)
	b := make([]byte, hl, hl+len(payload))
	b[0], b[1] = 0x40|byte(hl/4), h.TOS
	binary.BigEndian.PutUint16(b[2:], uint16(hl+len(payload)))
	binary.BigEndian.PutUint16(b[4:], h.ID)
	binary.BigEndian.PutUint16(b[6:], h.Frag)
	b[8], b[9] = ttl, proto
	copy(b[12:], h.Src.AsSlice())
	copy(b[16:], h.Dst.AsSlice())
	copy(b[20:], h.Options)
	binary.BigEndian.PutUint16(b[10:], ^Sum(b))
	return append(b, payload...)
}

// TCP is the packet of h, t and payload, with all checksums.
func (h IP) TCP(t TCP, payload []byte) []byte {
	b := make([]byte, 20+len(t.Options), 20+len(t.Options)+len(payload))
	binary.BigEndian.PutUint16(b, t.SrcPort)
	binary.BigEndian.PutUint16(b[2:], t.DstPort)
	binary.BigEndian.PutUint32(b[4:], t.Seq)
	binary.BigEndian.PutUint32(b[8:], t.Ack)
	b[12], b[13] = byte(len(b)/4)<<4|t.Reserved&0xf, t.Flags
	binary.BigEndian.PutUint16(b[14:], t.Window)
	copy(b[20:], t.Options)
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[16:], ^Sum(append(h.pseudo(packet.TCP, len(b)), b...)))
	return h.Raw(packet.TCP, b)
}

// UDP is the packet of h, u and payload, with all checksums.
func (h IP) UDP(u UDP, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b, u.SrcPort)
	binary.BigEndian.PutUint16(b[2:], u.DstPort)
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	b = append(b, payload...)
	if !u.NoChecksum {
		sum := ^Sum(append(h.pseudo(packet.UDP, len(b)), b...))
		if sum == 0 {
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(b[6:], sum)
	}
	return h.Raw(packet.UDP, b)
}

// ICMP is an ICMP or ICMPv6 message, with all checksums.
func (h IP) ICMP(kind, code uint8, rest uint32, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	b[0], b[1] = kind, code
	binary.BigEndian.PutUint32(b[4:], rest)
	b = append(b, payload...)
	if h.Src.Is6() {
		binary.BigEndian.PutUint16(b[2:], ^Sum(append(h.pseudo(packet.ICMPv6, len(b)), b...)))
		return h.Raw(packet.ICMPv6, b)
	}
	binary.BigEndian.PutUint16(b[2:], ^Sum(b))
	return h.Raw(packet.ICMP, b)
}

// pseudo is the pseudo header of RFC 9293 3.1 and RFC 8200 8.1, as bytes.
func (h IP) pseudo(proto uint8, length int) []byte {
	b := append(h.Src.AsSlice(), h.Dst.AsSlice()...)
	if h.Src.Is6() {
		b = binary.BigEndian.AppendUint32(b, uint32(length))
		return append(b, 0, 0, 0, proto)
	}
	return binary.BigEndian.AppendUint16(append(b, 0, proto), uint16(length))
}

// Sum is the Internet checksum of RFC 1071, not complemented, one word after the other.
func Sum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		word := uint32(b[i]) << 8
		if i+1 < len(b) {
			word |= uint32(b[i+1])
		}
		sum += word
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// Packet puts the bytes of an IP packet into a buffer of its own, behind packet.Headroom.
func Packet(ip []byte) *packet.Packet {
	p := new(packet.Packet)
	p.Reset(append(make([]byte, packet.Headroom), ip...), packet.Headroom)
	return p
}

// Super makes a superpacket of a TCP or UDP packet, to be cut into segments of seg payload bytes: its checksum is owed, as
// when a container's kernel leaves the work to the TAP.
func Super(ip []byte, seg int) *packet.Packet {
	p := Packet(ip)
	Owe(p)
	b := p.Bytes()
	l4 := int(p.CsumStart)
	if p.CsumOffset == 6 {
		p.GSO, p.HdrLen = packet.GSOUDP, uint16(l4+8)
	} else {
		p.GSO, p.HdrLen = packet.GSOTCPv4, uint16(l4)+uint16(b[l4+12]>>4)*4
		if b[0]>>4 == 6 {
			p.GSO = packet.GSOTCPv6
		}
		p.ECN = b[l4+13]&CWR != 0
	}
	p.SegSize = uint16(seg)
	return p
}

// Owe takes the transport checksum out of a TCP or UDP packet and leaves the sum of the pseudo header in its place.
func Owe(p *packet.Packet) {
	b := p.Bytes()
	h, proto, l4 := dissect(b)
	p.NeedsCsum, p.CsumStart, p.CsumOffset = true, uint16(l4), 16
	if proto == packet.UDP {
		p.CsumOffset = 6
	}
	binary.BigEndian.PutUint16(b[l4+int(p.CsumOffset):], Sum(h.pseudo(proto, len(b)-l4)))
}

// dissect reads what the pseudo header is made of.
func dissect(b []byte) (h IP, proto uint8, l4 int) {
	if b[0]>>4 == 6 {
		h.Src, h.Dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		return h, b[6], 40
	}
	h.Src, h.Dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	return h, b[9], int(b[0]&0xf) * 4
}

// Fix writes the checksums of an IP packet anew where its headers let them be found: after its bytes were edited.
func Fix(ip []byte) {
	if len(ip) < 20 {
		return
	}
	switch hl := int(ip[0]&0xf) * 4; {
	case ip[0]>>4 == 6 && len(ip) >= 40:
	case ip[0]>>4 == 4 && hl >= 20 && hl <= len(ip):
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^Sum(ip[:hl]))
		if binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
			return
		}
	default:
		return
	}
	h, proto, l4 := dissect(ip)
	field := l4 + 16
	if proto == packet.UDP {
		field = l4 + 6
	}
	if (proto != packet.TCP && proto != packet.UDP) || len(ip) < field+2 {
		return
	}
	ip[field], ip[field+1] = 0, 0
	sum := ^Sum(append(h.pseudo(proto, len(ip)-l4), ip[l4:]...))
	if sum == 0 && proto == packet.UDP {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(ip[field:], sum)
}
