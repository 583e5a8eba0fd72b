// This file reads what the gateway must know of a packet before gVisor gets it. It is the first parser that a container's bytes meet.

package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The protocol numbers that the gateway knows (IANA).
const (
	protoICMP   = uint8(header.ICMPv4ProtocolNumber)
	protoTCP    = uint8(header.TCPProtocolNumber)
	protoUDP    = uint8(header.UDPProtocolNumber)
	protoICMPv6 = uint8(header.ICMPv6ProtocolNumber)
)

// inbound is what parseIP finds in a packet. Offsets are bytes from the start of the IP header.
type inbound struct {
	src, dst  netip.Addr
	length    int // of the packet as its header says; what follows is padding
	transport int // where the transport header begins, or the fragment's payload
	proto     uint8
	fragment  bool // it is a fragment
	later     bool // it is a fragment without the transport header
}

// maxExtensions bounds the walk over IPv6 extension headers.
const maxExtensions = 8

// parseIP reads the IP header and the IPv6 extension headers of b. It says no to what is too short for what its own header claims.
func parseIP(b []byte) (in inbound, ok bool) {
	if len(b) < header.IPv4MinimumSize {
		return in, false
	}
	switch b[0] >> 4 {
	case 4:
		in.transport = int(b[0]&15) * 4
		in.length = int(binary.BigEndian.Uint16(b[2:]))
		if in.transport < header.IPv4MinimumSize || in.length < in.transport || in.length > len(b) {
			return in, false
		}
		frag := binary.BigEndian.Uint16(b[6:])
		in.fragment = frag&0x3fff != 0 // more fragments, or an offset
		in.later = frag&0x1fff != 0
		in.proto = b[9]
		in.src = netip.AddrFrom4([4]byte(b[12:16]))
		in.dst = netip.AddrFrom4([4]byte(b[16:20]))
		return in, true
	case 6:
		return parseIPv6(b)
	}
	return in, false
}

func parseIPv6(b []byte) (in inbound, ok bool) {
	if len(b) < header.IPv6MinimumSize {
		return in, false
	}
	in.length = header.IPv6MinimumSize + int(binary.BigEndian.Uint16(b[4:]))
	if in.length > len(b) {
		return in, false
	}
	in.src = netip.AddrFrom16([16]byte(b[8:24]))
	in.dst = netip.AddrFrom16([16]byte(b[24:40]))
	in.proto = b[6]
	in.transport = header.IPv6MinimumSize
	for range maxExtensions {
		rest := b[in.transport:in.length]
		switch header.IPv6ExtensionHeaderIdentifier(in.proto) {
		case header.IPv6HopByHopOptionsExtHdrIdentifier, header.IPv6RoutingExtHdrIdentifier, header.IPv6DestinationOptionsExtHdrIdentifier:
			if len(rest) < 8 {
				return in, false
			}
			size := (int(rest[1]) + 1) * 8
			if size > len(rest) {
				return in, false
			}
			in.proto = rest[0]
			in.transport += size
		case header.IPv6FragmentExtHdrIdentifier:
			if len(rest) < header.IPv6FragmentHeaderSize {
				return in, false
			}
			in.fragment = true
			in.later = binary.BigEndian.Uint16(rest[2:])&^7 != 0
			in.proto = rest[0]
			in.transport += header.IPv6FragmentHeaderSize
			if in.later {
				return in, true
			}
		default:
			return in, true
		}
	}
	return in, false
}

// transportSize is the least length of a transport header that the gateway reads fields of.
func transportSize(proto uint8) int {
	switch proto {
	case protoTCP:
		return header.TCPMinimumSize
	case protoUDP:
		return header.UDPMinimumSize
	case protoICMP, protoICMPv6:
		return 8
	}
	return 0
}

// asksPort tells whether a packet, of which b begins with the headers, is TCP or UDP to a port.
func (in *inbound) asksPort(b []byte, port uint16) bool {
	return (in.proto == protoTCP || in.proto == protoUDP) && !in.later && binary.BigEndian.Uint16(b[in.transport+2:]) == port
}

// pseudoSum is the checksum of the pseudo header of TCP and UDP (RFC 9293 section 3.1, RFC 8200 section 8.1).
func pseudoSum(b []byte, in inbound) uint16 {
	var addrs []byte
	if in.dst.Is4() {
		addrs = b[12:20]
	} else {
		addrs = b[8:40]
	}
	n := in.length - in.transport
	return checksum.Combine(checksum.Checksum(addrs, uint16(in.proto)), uint16(n))
}

// checksumRight sums a TCP segment or UDP datagram. It is asked about packets whose sender wrote a full checksum and that
// nobody has checked on the way.
func checksumRight(b []byte, in inbound) bool {
	t := b[in.transport:in.length]
	switch in.proto {
	case protoTCP:
	case protoUDP:
		if header.UDP(t).Checksum() == 0 && in.dst.Is4() {
			return true
		}
	default:
		return true
	}
	return checksum.Checksum(t, pseudoSum(b, in)) == 0xffff
}
