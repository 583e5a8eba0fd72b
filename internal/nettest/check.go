// This file judges packets from scratch, and cuts superpackets as the documents say, to compare with.

package nettest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Check tells what is wrong with the lengths and checksums of an IP packet that owes nothing, or nil.
func Check(ip []byte) error {
	if len(ip) < 20 {
		return fmt.Errorf("%d bytes are no IP packet", len(ip))
	}
	switch ip[0] >> 4 {
	case 4:
		hl := int(ip[0]&0xf) * 4
		if hl < 20 || hl > len(ip) {
			return fmt.Errorf("IPv4 header of %d bytes in %d", hl, len(ip))
		}
		if n := int(binary.BigEndian.Uint16(ip[2:])); n != len(ip) {
			return fmt.Errorf("IPv4 total length is %d, the packet has %d bytes", n, len(ip))
		}
		if s := Sum(ip[:hl]); s != 0xffff {
			return fmt.Errorf("IPv4 header checksum %#04x is wrong", binary.BigEndian.Uint16(ip[10:]))
		}
		if binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
			return nil // a fragment
		}
	case 6:
		if len(ip) < 40 {
			return fmt.Errorf("%d bytes are no IPv6 packet", len(ip))
		}
		if n := int(binary.BigEndian.Uint16(ip[4:])); n != len(ip)-40 {
			return fmt.Errorf("IPv6 payload length is %d, the packet has %d bytes", n, len(ip)-40)
		}
	default:
		return fmt.Errorf("IP version %d", ip[0]>>4)
	}
	h, proto, l4 := dissect(ip)
	t := ip[l4:]
	switch proto {
	case packet.TCP:
		if len(t) < 20 || int(t[12]>>4)*4 < 20 || int(t[12]>>4)*4 > len(t) {
			return fmt.Errorf("TCP header does not fit %d bytes", len(t))
		}
	case packet.UDP:
		if len(t) < 8 || int(binary.BigEndian.Uint16(t[4:])) != len(t) {
			return fmt.Errorf("UDP length does not fit %d bytes", len(t))
		}
		if t[6] == 0 && t[7] == 0 && h.Src.Is4() {
			return nil
		}
	case packet.ICMP:
		if len(t) < 8 {
			return fmt.Errorf("%d bytes are no ICMP message", len(t))
		}
		if Sum(t) != 0xffff {
			return fmt.Errorf("ICMP checksum %#04x is wrong", binary.BigEndian.Uint16(t[2:]))
		}
		return nil
	case packet.ICMPv6:
	default:
		return nil
	}
	if s := Sum(append(h.pseudo(proto, len(t)), t...)); s != 0xffff {
		return fmt.Errorf("transport checksum (protocol %d) is wrong: sum %#04x", proto, s)
	}
	return nil
}

// Segment cuts a superpacket as Documentation/networking/segmentation-offloads.rst and RFC 9293 have it: one whole packet
// after the other, every checksum computed anew.
func Segment(p *packet.Packet) [][]byte {
	ip := bytes.Clone(p.Bytes())
	if p.GSO == packet.GSONone {
		return [][]byte{Finish(p)}
	}
	h, proto, l4 := dissect(ip)
	head, payload := ip[:p.HdrLen], ip[p.HdrLen:]
	var out [][]byte
	for at := 0; at < len(payload); at += int(p.SegSize) {
		end := min(at+int(p.SegSize), len(payload))
		seg := append(bytes.Clone(head), payload[at:end]...)
		t := seg[l4:]
		if h.Src.Is4() {
			binary.BigEndian.PutUint16(seg[2:], uint16(len(seg)))
			binary.BigEndian.PutUint16(seg[4:], binary.BigEndian.Uint16(ip[4:])+uint16(len(out)))
			seg[10], seg[11] = 0, 0
			binary.BigEndian.PutUint16(seg[10:], ^Sum(seg[:l4]))
		} else {
			binary.BigEndian.PutUint16(seg[4:], uint16(len(t)))
		}
		field := t[6:8]
		if proto == packet.TCP {
			field = t[16:18]
			binary.BigEndian.PutUint32(t[4:], binary.BigEndian.Uint32(ip[l4+4:])+uint32(at))
			if at > 0 {
				t[13] &^= CWR
			}
			if end < len(payload) {
				t[13] &^= FIN | PSH
			}
		} else {
			binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
		}
		field[0], field[1] = 0, 0
		sum := ^Sum(append(h.pseudo(proto, len(t)), t...))
		if sum == 0 && proto == packet.UDP {
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(field, sum)
		out = append(out, seg)
	}
	return out
}

// Finish is an ordinary packet with the checksum that it owes.
func Finish(p *packet.Packet) []byte {
	ip := bytes.Clone(p.Bytes())
	if p.NeedsCsum {
		at := int(p.CsumStart) + int(p.CsumOffset)
		sum := ^Sum(ip[p.CsumStart:])
		if sum == 0 && p.CsumOffset == 6 {
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(ip[at:], sum)
	}
	return ip
}

// Payload is n bytes that look random and are the same in every run.
func Payload(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}
