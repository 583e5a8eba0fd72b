// This file turns a packet into what a peer may see: superpackets cut into segments, checksums completed
// (Documentation/networking/segmentation-offloads.rst). Payloads are not copied: a segment is a header made here and a piece of
// the superpacket, joined by the kernel when it sends.
//
// A peer that says so in its lease (PeerConfig.PartialChecksums) takes TCP and UDP whose checksum is still owed, with only the
// pseudo header summed, as two containers on one host do: the outer UDP checksum covers every byte in between, and
// summing the payload once more, in Go, is the largest part of the path that is not the kernel's.

package forwarder

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// completeChecksum pays the transport checksum that p owes.
func completeChecksum(p *packet.Packet) {
	l4 := p.Bytes()[p.CsumStart:]
	sum := ^checksum.Checksum(l4, 0) // the field holds the pseudo header's sum
	if sum == 0 && p.CsumOffset == 6 {
		sum = 0xffff // UDP: zero would mean none (RFC 768)
	}
	binary.BigEndian.PutUint16(l4[p.CsumOffset:], sum)
	p.NeedsCsum = false
}

// mayStayPartial tells whether a peer that takes partial checksums will recognise p's: plain TCP or UDP whose field is not
// zero. packet.MarkPartial is its counterpart on the other side.
func mayStayPartial(p *packet.Packet) bool {
	ip := p.Bytes()
	proto, l4, ok := packet.Transport(ip)
	return ok && l4 == int(p.CsumStart) && (proto == packet.TCP && p.CsumOffset == header.TCPChecksumOffset ||
		proto == packet.UDP && p.CsumOffset == 6 && int(binary.BigEndian.Uint16(ip[l4+4:])) == len(ip)-l4 && binary.BigEndian.Uint16(ip[l4+6:]) != 0)
}

// segmenter cuts a superpacket, one segment a call.
type segmenter struct {
	ip      []byte // the superpacket's headers
	payload []byte // not yet cut
	seg     int
	l4      int
	hdr     int
	proto   uint8
	first   bool
	partial bool // leave the sum of the payload to the receiver
	id      uint16
	seq     uint32
	flags   uint8
	ipSum   uint16 // sum of the IPv4 header without length, id and checksum
	pseudo  uint16 // sum of the pseudo header without length
	l4Sum   uint16 // pseudo, and the transport header without what changes
}

func newSegmenter(p *packet.Packet, partial bool) segmenter {
	b := p.Bytes()
	s := segmenter{
		ip: b[:p.HdrLen], payload: b[p.HdrLen:], seg: int(p.SegSize), l4: int(p.CsumStart), hdr: int(p.HdrLen),
		proto: packet.TCP, first: true, partial: partial,
	}
	if p.GSO == packet.GSOUDP {
		s.proto = packet.UDP
	}
	if s.ip[0]>>4 == 4 {
		h := header.IPv4(s.ip)
		s.id = h.ID()
		sum := uint64(checksum.Checksum(s.ip[:s.l4], 0))
		s.ipSum = packet.Fold(sum + uint64(^h.TotalLength()) + uint64(^h.ID()) + uint64(^h.Checksum()))
	}
	s.pseudo = packet.PseudoSum(s.ip, s.proto, 0)
	s.l4Sum = s.pseudo
	if s.proto == packet.TCP {
		t := header.TCP(s.ip[s.l4:])
		s.seq, s.flags = t.SequenceNumber(), uint8(t.Flags())
		sum := uint64(s.l4Sum) + uint64(checksum.Checksum(t[:s.hdr-s.l4], 0))
		sum += uint64(^uint16(s.seq>>16)) + uint64(^uint16(s.seq)) + uint64(^t.Checksum())
		sum += uint64(^binary.BigEndian.Uint16(t[header.TCPDataOffset:]))
		s.l4Sum = packet.Fold(sum)
	} else {
		s.l4Sum = packet.Fold(uint64(s.l4Sum) + uint64(checksum.Checksum(s.ip[s.l4:s.l4+4], 0)))
	}
	return s
}

// next writes the headers of the next segment to hdr, which must have room for s.hdr bytes, and returns its payload; false
// when the superpacket is used up.
func (s *segmenter) next(hdr []byte) (payload []byte, ok bool) {
	if len(s.payload) == 0 {
		return nil, false
	}
	n := min(s.seg, len(s.payload))
	payload, s.payload = s.payload[:n], s.payload[n:]
	copy(hdr, s.ip)
	total := s.hdr + n
	if hdr[0]>>4 == 4 {
		binary.BigEndian.PutUint16(hdr[2:], uint16(total))
		binary.BigEndian.PutUint16(hdr[4:], s.id)
		binary.BigEndian.PutUint16(hdr[10:], ^packet.Fold(uint64(s.ipSum)+uint64(total)+uint64(s.id)))
		s.id++
	} else {
		binary.BigEndian.PutUint16(hdr[4:], uint16(total-header.IPv6MinimumSize))
	}
	l4 := hdr[s.l4:]
	l4len := total - s.l4
	owed := packet.Fold(uint64(s.pseudo) + uint64(l4len))
	// Zero in UDP would say that there is no checksum, so such a datagram is summed after all.
	partial := s.partial && (owed != 0 || s.proto == packet.TCP)
	sum := uint64(s.l4Sum) + uint64(l4len)
	if !partial {
		sum += uint64(checksum.Checksum(payload, 0))
	}
	if s.proto == packet.TCP {
		flags := s.flags
		if len(s.payload) > 0 {
			flags &^= uint8(header.TCPFlagFin | header.TCPFlagPsh)
		}
		if !s.first {
			flags &^= uint8(header.TCPFlagCwr)
		}
		l4[header.TCPFlagsOffset] = flags
		binary.BigEndian.PutUint32(l4[4:], s.seq)
		sum += uint64(s.seq>>16) + uint64(s.seq&0xffff) + uint64(binary.BigEndian.Uint16(l4[header.TCPDataOffset:]))
		x := ^packet.Fold(sum)
		if partial {
			x = owed
		}
		binary.BigEndian.PutUint16(l4[header.TCPChecksumOffset:], x)
		s.seq += uint32(n)
		s.first = false
		return payload, true
	}
	sum += uint64(l4len) // in the header as well as in the pseudo header
	binary.BigEndian.PutUint16(l4[4:], uint16(l4len))
	x := ^packet.Fold(sum)
	if x == 0 {
		x = 0xffff
	}
	if partial {
		x = owed
	}
	binary.BigEndian.PutUint16(l4[6:], x)
	return payload, true
}

// sendTo puts p on the transmit queue for a peer, cut where it is a superpacket.
func (q *txQueue) sendTo(to *peer, p *packet.Packet) {
	if to.cfg.Steers {
		q.part(p.Bytes())
	}
	encap := q.encap
	if p.GSO == packet.GSONone {
		if p.NeedsCsum && !(to.cfg.PartialChecksums && mayStayPartial(p)) {
			completeChecksum(p)
		}
		q.reserve()
		frame := p.Buf[p.Off-encap:] // only later packets of a train that came in lack headroom, and those go to no peer
		to.encapsulate(frame[:encap], frame[encap])
		q.addPacket(to, frame)
		return
	}
	s := newSegmenter(p, to.cfg.PartialChecksums)
	for {
		q.reserve()
		hdr := q.header(encap + s.hdr)
		payload, ok := s.next(hdr[encap:])
		if !ok {
			return
		}
		to.encapsulate(hdr[:encap], s.ip[0])
		q.addSegment(to, hdr, payload)
	}
}
