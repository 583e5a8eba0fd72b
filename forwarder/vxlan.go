// This file is the encapsulation of flannel's vxlan backend, as the kernel's VXLAN device writes and reads it.
//
//	+-----------------+-----+----------------------------+--------------------------------------+---------------+
//	| outer IPv4/IPv6 | UDP | VXLAN 8                    | inner Ethernet 14                    | one IP packet |
//	| 20 / 40         | 8   | 08 | 0 0 0 | VNI (3) | 0   | to VTEP 6 | from VTEP 6 | type 08 00 |               |
//	+-----------------+-----+----------------------------+--------------------------------------+---------------+
//
// The type is 86 dd for IPv6. In flannel's dual-stack networks, which have a VXLAN device for each family, packets of IPv4 travel
// over IPv4 and those of IPv6 over IPv6, with the same VNI and port; our VTEP has one MAC address for both.
//
// Sources: RFC 7348 5, linux/drivers/net/vxlan/vxlan_core.c (vxlan_rcv, which drops frames with any reserved bit), flannel
// pkg/backend/vxlan (which VTEP has which MAC address: no ARP ever crosses).
//
// Whose checksum covers a packet differs from the udp format. A kernel may leave the outer UDP checksum out (not over IPv6), and
// what it sends over a virtual cable may still owe the inner one (CHECKSUM_PARTIAL): the field then holds the sum of the pseudo header alone.
// So packets of such peers are summed here: one that is right, or owes its sum, is Verified; another is left to
// the container's kernel, which drops and counts it. Our own nodes always have the outer checksum.

package forwarder

import (
	"encoding/binary"
	"fmt"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Sizes in bytes of what VXLAN adds to a packet.
const (
	vxlanHdrLen = 1 + 3 + 3 + 1
	innerEthLen = 6 + 6 + 2
	vxlanEncap  = vxlanHdrLen + innerEthLen
	// VXLANOverhead is the difference between underlay and overlay MTU, for a peer with an IPv4 address.
	VXLANOverhead = UDPOverhead + vxlanEncap
	// VXLANOverhead6 is that for a peer with an IPv6 address, and in a dual-stack network for both families.
	VXLANOverhead6 = UDPOverhead6 + vxlanEncap
)

// Where things are behind the UDP header.
const (
	vxlanDstAt  = vxlanHdrLen
	vxlanSrcAt  = vxlanDstAt + 6
	vxlanTypeAt = vxlanSrcAt + 6
)

// Values of the header's first and last word, as one number.
const (
	vxlanHasVNI   = 0x08 << 56       // the one flag of RFC 7348
	vxlanVNIMask  = 0xffffff << 8    // the one field
	vxlanGBPBits  = 0x80ffffff << 32 // flag and fields of the group policy extension
	etherTypeIPv4 = 0x0800
	etherTypeIPv6 = 0x86dd
)

// MaxVNI is the largest VNI: it has 24 bits.
const MaxVNI = 1<<24 - 1

// VXLAN makes a Router speak VXLAN. A nil *VXLAN is the udp format.
type VXLAN struct {
	VNI uint32
	// MAC is the address of our own VTEP, to which peers send their frames: unicast, and no peer's.
	MAC [6]byte
	// GBP takes frames with the group policy extension, whose policy is passed over. None is ever sent.
	GBP bool
}

func (v *VXLAN) check() error {
	if v == nil {
		return nil
	}
	if v.VNI > MaxVNI {
		return fmt.Errorf("VNI %d is above %d", v.VNI, MaxVNI)
	}
	if !unicastMAC(v.MAC) {
		return fmt.Errorf("the VTEP's MAC address %x is not a unicast one", v.MAC)
	}
	return nil
}

func unicastMAC(m [6]byte) bool { return m != [6]byte{} && m[0]&1 == 0 }

// Encap is how many bytes stand between the UDP header and the packet.
func (v *VXLAN) Encap() int {
	if v == nil {
		return 0
	}
	return vxlanEncap
}

// headers is what stands in front of every IPv4 packet to the VTEP with that MAC address.
func (v *VXLAN) headers(vtep [6]byte) (h [vxlanEncap]byte) {
	if v == nil {
		return h
	}
	binary.BigEndian.PutUint64(h[:], vxlanHasVNI|uint64(v.VNI)<<8)
	copy(h[vxlanDstAt:], vtep[:])
	copy(h[vxlanSrcAt:], v.MAC[:])
	binary.BigEndian.PutUint16(h[vxlanTypeAt:], etherTypeIPv4)
	return h
}

// encapsulate writes to b, of encap bytes, what goes in front of a packet for p that begins with the byte first.
func (p *peer) encapsulate(b []byte, first byte) {
	copy(b, p.headers[:])
	if len(b) == vxlanEncap && first>>4 == 6 {
		binary.BigEndian.PutUint16(b[vxlanTypeAt:], etherTypeIPv6)
	}
}

// decapsulate makes a packet of the datagram at buf[off:], or says why there is none in it. The packet's bytes are the datagram's.
func (v *VXLAN) decapsulate(buf []byte, off int) (packet.Packet, Drop) {
	if v == nil {
		return decapsulateUDP(buf, off), dropNone
	}
	d := buf[off:]
	if len(d) <= vxlanEncap {
		return packet.Packet{}, DropBadVXLAN
	}
	h := binary.BigEndian.Uint64(d)
	if v.GBP {
		h &^= vxlanGBPBits
	}
	switch {
	case h&^vxlanVNIMask != vxlanHasVNI:
		return packet.Packet{}, DropBadVXLAN
	case uint32(h>>8)&MaxVNI != v.VNI:
		return packet.Packet{}, DropOtherVNI
	}
	version := d[vxlanEncap] >> 4
	switch binary.BigEndian.Uint16(d[vxlanTypeAt:]) {
	case etherTypeIPv4:
		if version != 4 {
			return packet.Packet{}, DropMalformed
		}
	case etherTypeIPv6:
		if version != 6 {
			return packet.Packet{}, DropMalformed
		}
	default: // ARP, LLDP: harmless, and of no use to a router
		return packet.Packet{}, DropNotIP
	}
	if [6]byte(d[vxlanDstAt:]) != v.MAC {
		return packet.Packet{}, DropForeignVTEP
	}
	return packet.Packet{Buf: buf, Off: off + vxlanEncap}, dropNone
}

// isSuperpacket tells whether d, which came with the size of segments, is no train but one frame with a superpacket in it: a
// kernel's VXLAN device passes those on whole over a virtual cable.
func (v *VXLAN) isSuperpacket(d []byte) bool {
	if v == nil || len(d) < vxlanEncap+header.IPv6MinimumSize {
		return false
	}
	ip := d[vxlanEncap:]
	if ip[0]>>4 == 6 {
		return header.IPv6MinimumSize+int(binary.BigEndian.Uint16(ip[4:])) == len(ip)
	}
	return int(binary.BigEndian.Uint16(ip[2:])) == len(ip)
}

// settle finds out whether the transport checksum of a peer's packet may be believed, see above, and describes a superpacket
// that came as one.
func settle(p *packet.Packet, in *ingress) {
	if in.peer.cfg.OuterChecksums {
		p.Verified = true
		return
	}
	ip := p.Bytes()
	proto, l4, ok := packet.Transport(ip)
	if !ok {
		return
	}
	hdr, field := l4+header.UDPMinimumSize, l4+6
	switch proto {
	case packet.TCP:
		if len(ip) < l4+header.TCPMinimumSize {
			return
		}
		hdr, field = l4+int(header.TCP(ip[l4:]).DataOffset()), l4+header.TCPChecksumOffset
	case packet.UDP:
		if len(ip) < hdr || int(binary.BigEndian.Uint16(ip[l4+4:])) != len(ip)-l4 || binary.BigEndian.Uint16(ip[field:]) == 0 {
			return // a length of its own, or no checksum
		}
	default:
		return
	}
	// Of packets that are damaged, one in 65536 looks as if it owed its sum: no more than look as if theirs were right.
	owed := packet.PseudoSum(ip, proto, len(ip)-l4)
	if binary.BigEndian.Uint16(ip[field:]) != owed && checksum.Checksum(ip[l4:], owed) != 0xffff {
		return
	}
	p.Verified = true
	var seg int
	switch {
	case proto == packet.UDP:
		seg = in.segment
	case in.mtu > hdr && len(ip) > in.mtu && hdr >= l4+header.TCPMinimumSize:
		seg = in.mtu - hdr
	}
	if seg <= 0 || len(ip)-hdr <= seg {
		return
	}
	p.MarkPartial() // nobody has to cut it on this host, but whoever does will sum its pieces
	p.GSO, p.HdrLen, p.SegSize = packet.GSOUDP, uint16(hdr), uint16(seg)
	if proto == packet.TCP {
		p.GSO = packet.GSOTCPv4
		if ip[0]>>4 == 6 {
			p.GSO = packet.GSOTCPv6
		}
		p.ECN = header.TCP(ip[l4:]).Flags()&header.TCPFlagCwr != 0
	}
}
