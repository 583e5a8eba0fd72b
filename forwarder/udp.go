// This file is the encapsulation of flannel's udp backend: there is none.
//
//	+-----------------+-------+-----------------------+
//	| outer IPv4/IPv6 | UDP   | one bare IP packet    |
//	| 20 / 40         | 8     | (no header, no magic) |
//	+-----------------+-------+-----------------------+
//
// Source: flannel pkg/backend/udp/proxy_amd64.c, udp_network_amd64.go, which speaks it over IPv4, of IPv4.
//
// A datagram's outer UDP checksum is always on (we never set SO_NO_CHECK, nor does flannel's udp backend), so the kernel
// has verified every inner byte: packets from here are Verified, and a container's kernel need not sum them again.

package forwarder

import "github.com/rootless-ovl/rootless-ovl/internal/packet"

// Sizes in bytes of what the udp format adds to a packet.
const (
	outerIPv4Len = 20
	outerIPv6Len = 40
	outerUDPLen  = 8
	// UDPOverhead is the difference between underlay and overlay MTU, for a peer with an IPv4 address.
	UDPOverhead = outerIPv4Len + outerUDPLen
	// UDPOverhead6 is that for a peer with an IPv6 address.
	UDPOverhead6 = outerIPv6Len + outerUDPLen
)

// decapsulateUDP makes a packet of a datagram's payload; the packet's bytes are the datagram's.
func decapsulateUDP(buf []byte, off int) packet.Packet {
	return packet.Packet{Buf: buf, Off: off, Verified: true}
}
