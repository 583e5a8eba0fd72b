// This file joins neighbouring packets of one flow into a superpacket, as the kernel's GRO does, so that a container
// takes them with one pass through its stack. Nothing is copied: the superpacket is the first packet's headers and a list
// of payloads, written with one writev.

package tap

import (
	"bytes"
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// run is a superpacket under construction: packets[first:first+n] of the batch.
type run struct {
	proto   uint8
	l4      int // length of the IP header
	hdr     int // length of IP and transport headers
	seg     int // payload bytes of the first packet; all but the last have as many
	payload int // payload bytes of all packets
	nextSeq uint32
	most    int  // packets that it may hold
	closed  bool // a short segment or PSH ended it
}

// The most packets that are joined. For TCP it bounds the iovecs of one write; at any real MTU 64 KB are full before. For UDP
// the kernel refuses more than UDP_MAX_SEGMENTS, which was 64 until Linux 6.9.
const (
	maxRunTCP = 256
	maxRunUDP = 64
)

// startRun tells whether p can begin a superpacket, and how.
func startRun(p *packet.Packet) (r run, ok bool) {
	if p.GSO != packet.GSONone || p.NeedsCsum || !p.Verified {
		return run{}, false
	}
	ip := p.Bytes()
	proto, l4, ok := packet.Transport(ip)
	if !ok {
		return run{}, false
	}
	r = run{proto: proto, l4: l4}
	switch proto {
	case packet.TCP:
		if len(ip) < l4+header.TCPMinimumSize {
			return run{}, false
		}
		tcp := header.TCP(ip[l4:])
		off := int(tcp.DataOffset())
		// Only plain data segments: SYN, FIN, RST, URG and the ECN echoes mean something of their own.
		if off < header.TCPMinimumSize || len(ip) <= l4+off || tcp.Flags()&^header.TCPFlagPsh != header.TCPFlagAck {
			return run{}, false
		}
		r.hdr, r.most = l4+off, maxRunTCP
		r.closed = tcp.Flags()&header.TCPFlagPsh != 0
	case packet.UDP:
		if len(ip) <= l4+header.UDPMinimumSize || binary.BigEndian.Uint16(ip[l4+4:]) != uint16(len(ip)-l4) ||
			binary.BigEndian.Uint16(ip[l4+6:]) == 0 {
			return run{}, false
		}
		r.hdr, r.most = l4+header.UDPMinimumSize, maxRunUDP
	default:
		return run{}, false
	}
	r.seg = len(ip) - r.hdr
	r.payload = r.seg
	if proto == packet.TCP {
		r.nextSeq = header.TCP(ip[l4:]).SequenceNumber() + uint32(r.seg)
	}
	return r, true
}

// extend takes p into the run that first began, if it is the next segment of the same flow.
func (r *run) extend(first, p *packet.Packet, n int) bool {
	if r.closed || n == r.most || !p.Verified || p.NeedsCsum || p.GSO != packet.GSONone {
		return false
	}
	a, b := first.Bytes(), p.Bytes()
	size := len(b) - r.hdr
	if size <= 0 || size > r.seg || r.hdr+r.payload+size > packet.MaxIP-40 {
		return false
	}
	if !sameIP(a, b, r.l4) {
		return false
	}
	if r.proto == packet.UDP {
		// Ports equal, and a length and a checksum that are as in startRun.
		if !bytes.Equal(a[r.l4:r.l4+4], b[r.l4:r.l4+4]) || binary.BigEndian.Uint16(b[r.l4+4:]) != uint16(len(b)-r.l4) ||
			binary.BigEndian.Uint16(b[r.l4+6:]) == 0 {
			return false
		}
	} else {
		ta, tb := header.TCP(a[r.l4:]), header.TCP(b[r.l4:])
		if !bytes.Equal(a[r.l4:r.l4+4], b[r.l4:r.l4+4]) || tb.SequenceNumber() != r.nextSeq ||
			ta.AckNumber() != tb.AckNumber() || ta.WindowSize() != tb.WindowSize() || ta[header.TCPDataOffset] != tb[header.TCPDataOffset] ||
			!bytes.Equal(a[r.l4+20:r.hdr], b[r.l4+20:r.hdr]) {
			return false
		}
		switch tb.Flags() {
		case header.TCPFlagAck:
		case header.TCPFlagAck | header.TCPFlagPsh:
			r.closed = true
		default:
			return false
		}
		r.nextSeq += uint32(size)
	}
	if size < r.seg {
		r.closed = true
	}
	r.payload += size
	return true
}

// sameIP tells whether two IP headers of l4 bytes differ only in what differs between the segments of a superpacket:
// length, identification and header checksum.
func sameIP(a, b []byte, l4 int) bool {
	if len(b) < l4 || a[0] != b[0] {
		return false
	}
	if a[0]>>4 == 6 {
		return bytes.Equal(a[:4], b[:4]) && bytes.Equal(a[6:40], b[6:40])
	}
	return a[1] == b[1] && // TOS and ECN
		bytes.Equal(a[6:10], b[6:10]) && // flags and fragment offset, TTL, protocol
		bytes.Equal(a[12:l4], b[12:l4]) // addresses, options
}

// describe fills in hdr, a copy of the first packet's IP and transport headers, for the whole run of several packets,
// and returns the offload facts that go into its virtio_net_hdr.
func (r *run) describe(hdr []byte, psh bool) (p packet.Packet) {
	total := r.hdr + r.payload
	if hdr[0]>>4 == 4 {
		ip := header.IPv4(hdr)
		ip.SetTotalLength(uint16(total))
		ip.SetChecksum(0)
		ip.SetChecksum(^checksum.Checksum(hdr[:r.l4], 0))
	} else {
		header.IPv6(hdr).SetPayloadLength(uint16(total - header.IPv6MinimumSize))
	}
	p.NeedsCsum, p.CsumStart = true, uint16(r.l4)
	p.HdrLen, p.SegSize = uint16(r.hdr), uint16(r.seg)
	pseudo := packet.PseudoSum(hdr, r.proto, total-r.l4)
	if r.proto == packet.TCP {
		p.CsumOffset = header.TCPChecksumOffset
		p.GSO = packet.GSOTCPv4
		if hdr[0]>>4 == 6 {
			p.GSO = packet.GSOTCPv6
		}
		if psh {
			hdr[r.l4+header.TCPFlagsOffset] |= uint8(header.TCPFlagPsh)
		}
	} else {
		p.CsumOffset = 6
		p.GSO = packet.GSOUDP
		binary.BigEndian.PutUint16(hdr[r.l4+4:], uint16(total-r.l4))
	}
	binary.BigEndian.PutUint16(hdr[r.l4+int(p.CsumOffset):], pseudo)
	return p
}
