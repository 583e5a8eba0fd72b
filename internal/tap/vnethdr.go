// This file is the virtio_net_hdr in front of every frame of a TAP that was opened with IFF_VNET_HDR.
//
//	 0      1          2        4          6            8             10
//	+------+----------+--------+----------+------------+-------------+
//	| flags| gso_type | hdr_len| gso_size | csum_start | csum_offset |
//	+------+----------+--------+----------+------------+-------------+
//
// Source: linux/virtio_net.h, struct virtio_net_hdr: little-endian on the machines we build for (a TAP uses the byte
// order of the host). Offsets count from the start of the Ethernet frame.

package tap

import (
	"encoding/binary"
	"errors"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Sizes in bytes of what stands in front of the IP packet.
const (
	vnetHdrLen = 1 + 1 + 2 + 2 + 2 + 2
	ethHdrLen  = 6 + 6 + 2
	linkHdrLen = vnetHdrLen + ethHdrLen
)

// Values of the fields, linux/virtio_net.h.
const (
	vnetNeedsCsum = 1
	gsoNone       = 0
	gsoTCPv4      = 1
	gsoTCPv6      = 4
	gsoUDPL4      = 5
	gsoECN        = 0x80
)

// What one superpacket may become, so that a frame of 64 KB is not cut into as many packets of a byte. A kernel's TCP puts 8 bytes into a
// segment at least (TCP_MIN_SND_MSS without the options), and UDP_SEGMENT makes 128 datagrams at most (UDP_MAX_SEGMENTS; it was 64, and may grow).
const (
	minTCPSegment = 8
	maxDatagrams  = 512
)

var errBadOffload = errors.New("virtio_net_hdr does not fit its packet")

// putVnetHdr writes the header that describes p.
func putVnetHdr(b []byte, p *packet.Packet) {
	_ = b[vnetHdrLen-1]
	clear(b[:vnetHdrLen])
	if p.NeedsCsum {
		b[0] = vnetNeedsCsum
		binary.LittleEndian.PutUint16(b[6:], p.CsumStart+ethHdrLen)
		binary.LittleEndian.PutUint16(b[8:], p.CsumOffset)
	}
	if p.GSO == packet.GSONone {
		return
	}
	switch p.GSO {
	case packet.GSOTCPv4:
		b[1] = gsoTCPv4
	case packet.GSOTCPv6:
		b[1] = gsoTCPv6
	case packet.GSOUDP:
		b[1] = gsoUDPL4
	}
	if p.ECN {
		b[1] |= gsoECN
	}
	binary.LittleEndian.PutUint16(b[2:], p.HdrLen+ethHdrLen)
	binary.LittleEndian.PutUint16(b[4:], p.SegSize)
}

// readVnetHdr copies what the header says into p, whose bytes are the IP packet, and checks it against the packet: the
// container's root can hand the kernel a header of its own making (PACKET_VNET_HDR). hdr_len is not believed: the
// lengths are taken from the IP and transport headers. A checksum is never owed to the IP header, which the forwarder has
// judged by the time that the checksum is written. Superpackets have their transport header right behind the IP header:
// none that is cut here has IPv6 extension headers, and headers stay within packet.MaxHeaders.
func readVnetHdr(b []byte, p *packet.Packet) error {
	_ = b[vnetHdrLen-1]
	ip := p.Bytes()
	if b[0]&vnetNeedsCsum != 0 {
		start, off := binary.LittleEndian.Uint16(b[6:]), binary.LittleEndian.Uint16(b[8:])
		if start < ethHdrLen || int(start-ethHdrLen)+int(off)+2 > len(ip) || int(start-ethHdrLen) < ipHeaderLen(ip) {
			return errBadOffload
		}
		p.NeedsCsum, p.CsumStart, p.CsumOffset = true, start-ethHdrLen, off
	}
	kind := b[1] &^ gsoECN
	if kind == gsoNone {
		return nil
	}
	proto, l4, ok := packet.Transport(ip)
	if !ok || !p.NeedsCsum || int(p.CsumStart) != l4 { // the kernel never segments what it does not checksum
		return errBadOffload
	}
	hdr := l4 + header.UDPMinimumSize
	switch {
	case kind == gsoTCPv4 && proto == packet.TCP && ip[0]>>4 == 4:
		p.GSO = packet.GSOTCPv4
	case kind == gsoTCPv6 && proto == packet.TCP && ip[0]>>4 == 6:
		p.GSO = packet.GSOTCPv6
	case kind == gsoUDPL4 && proto == packet.UDP && p.CsumOffset == header.UDPMinimumSize-2:
		p.GSO = packet.GSOUDP
	default:
		return errBadOffload
	}
	if proto == packet.TCP {
		if p.CsumOffset != header.TCPChecksumOffset || len(ip) < l4+header.TCPMinimumSize {
			return errBadOffload
		}
		n := int(header.TCP(ip[l4:]).DataOffset())
		if n < header.TCPMinimumSize {
			return errBadOffload
		}
		hdr = l4 + n
		p.ECN = b[1]&gsoECN != 0
	}
	p.HdrLen, p.SegSize = uint16(hdr), binary.LittleEndian.Uint16(b[4:])
	switch seg := int(p.SegSize); {
	case seg == 0, len(ip) <= hdr:
		return errBadOffload
	case proto == packet.TCP && seg < minTCPSegment && len(ip)-hdr > seg:
		return errBadOffload
	case proto == packet.UDP && len(ip)-hdr > maxDatagrams*seg:
		return errBadOffload
	}
	return nil
}

// ipHeaderLen is the least offset of a transport header in ip, before ip is checked.
func ipHeaderLen(ip []byte) int {
	if ip[0]>>4 == 6 {
		return header.IPv6MinimumSize
	}
	return max(header.IPv4MinimumSize, int(ip[0]&0xf)*4)
}
