// This file is the Packet itself: where its bytes are, and what is still owed to it (checksum, segmentation).

package packet

import "golang.org/x/sys/unix"

// Sizes in bytes.
const (
	// Headroom is what must be free in front of the IP packet in every buffer that a packet is read into. It holds
	// the link header of a TAP frame (virtio_net_hdr 10 + Ethernet 14) as well as the largest encapsulation
	// (VXLAN 8 + inner Ethernet 14), and keeps the IP header aligned to 64.
	Headroom = 64
	// MaxIP is the largest IP packet: the 16-bit total length of IPv4, and IPv6 without jumbograms
	// (40 + 65535).
	MaxIP = 40 + 65535
	// MaxHeaders is the longest IP header with the longest TCP header, of a packet that may be a superpacket:
	// IPv6 extension headers are not among them.
	MaxHeaders = 60 + 60
)

// GSO says how a superpacket is to be cut into segments, as virtio_net_hdr.gso_type does.
type GSO uint8

// The kinds of superpacket.
const (
	GSONone  GSO = iota // an ordinary packet
	GSOTCPv4            // TCP over IPv4
	GSOTCPv6            // TCP over IPv6
	GSOUDP              // UDP over either family, cut into datagrams of SegSize (USO, virtio UDP_L4)
)

// Packet is one IP packet, beginning at Buf[Off]. Buf[:Off] is headroom that the current holder may overwrite.
// All offsets are bytes from the start of the IP header.
type Packet struct {
	Buf []byte
	Off int

	// CsumStart and CsumOffset are valid with NeedsCsum: the transport checksum field at CsumStart+CsumOffset holds
	// the sum of the pseudo header only, and the sum from CsumStart to the end is still owed (CHECKSUM_PARTIAL).
	CsumStart, CsumOffset uint16
	// HdrLen is the length of the IP and transport headers, SegSize the payload bytes of each segment. Both are
	// valid when GSO is not GSONone.
	HdrLen, SegSize uint16
	GSO             GSO
	// ECN: the TCP superpacket carries CWR, which belongs to its first segment alone (VIRTIO_NET_HDR_GSO_ECN).
	ECN       bool
	NeedsCsum bool
	// Verified: the transport checksum is known to be right (the outer UDP checksum covered it), so a receiver on
	// this machine need not sum the payload again.
	Verified bool
}

// Bytes is the IP packet.
func (p *Packet) Bytes() []byte { return p.Buf[p.Off:] }

// Len is the length of the IP packet in bytes.
func (p *Packet) Len() int { return len(p.Buf) - p.Off }

// Reset makes p an ordinary packet at buf[off:] with nothing owed.
func (p *Packet) Reset(buf []byte, off int) { *p = Packet{Buf: buf, Off: off} }

// Scratch is the working memory of one goroutine of the packet path. It is handed down to Send so that devices, which
// several goroutines share, need none of their own.
type Scratch struct {
	Iovs []unix.Iovec // for readv/writev; at least MaxIovs long
	Hdrs []byte       // link, IP and transport headers under construction
}

// MaxIovs is UIO_MAXIOV of the kernel: the most iovecs that one call takes.
const MaxIovs = 1024

// NewScratch allocates a Scratch.
func NewScratch() *Scratch {
	return &Scratch{Iovs: make([]unix.Iovec, MaxIovs), Hdrs: make([]byte, 64<<10)}
}

// Sender is a next hop that takes packets: a TAP, or the stack. Send never blocks and never fails: what cannot be
// delivered is dropped and counted by the sender. Packets and scratch are lent until it returns. Several goroutines
// may call Send at once, each with a Scratch of its own.
type Sender interface {
	Send(s *Scratch, pkts []*Packet)
}

// Turner is a Sender for which other goroutines go on with what it was sent. Whoever calls Send within a turn lends it its own goroutine for
// what comes of it, so that none needs to be woken: after Send it lets other goroutines run once, and calls End. Nil: there are no turns now.
type Turner interface {
	Sender
	Begin() Turn
}

// Turn is one that has begun. End is called once; it may call Send of other Senders.
type Turn interface{ End() }
