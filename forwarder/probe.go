// This file is what path MTU discovery needs of the packet path; who decides is the node (node/pathmtu.go). A probe is an ICMP echo
// request between the two nodes' own overlay addresses, padded to the size that is tried: every peer answers it as it is, our own
// by its stack and a flannel host by its kernel, so there is no format of ours.
//
//	+-------------+-------+------------------+----------------+----------+---------------+
//	| outer IPv4  | UDP   | inner IPv4       | ICMP echo      | token    | zeros         |
//	| 20, DF      | 8     | 20               | 8              | 8        | up to the size|
//	+-------------+-------+------------------+----------------+----------+---------------+
//
// VXLAN puts its headers in between. The token is random: an answer with the right one comes from where the probe went. The inner packet has no DF, for the answer
// would have it too (our stack copies the flags), and a peer that takes the path for narrower than the probe would drop its
// answer instead of sending it in fragments: two nodes that once found a path narrow would never find that it has become wider.

package forwarder

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	tokenLen = 8
	// MinProbe is the size in bytes of the smallest probe.
	MinProbe = header.IPv4MinimumSize + header.ICMPv4MinimumSize + tokenLen

	// probeIdent is the identifier of all probes; nothing else pings from our own addresses.
	probeIdent = 0x6f76 // "ov"

	pathEvents = 256
	// probeSlots bounds the probes that wait for an answer. Two in one slot cost the first its answer: it is sent again.
	probeSlots = 4096
)

// PathEvent is news of a peer's path: exactly one of its fields is set.
type PathEvent struct {
	// Peer is where a container's packet goes, the first since WatchPeer.
	Peer netip.AddrPort
	// Answered is the token of a probe that was answered.
	Answered uint64
}

// Probe is an echo request to a peer.
type Probe struct {
	Peer     netip.AddrPort
	VTEP     [6]byte    // the peer's MAC address, for a Router that speaks VXLAN
	Src, Dst netip.Addr // overlay addresses, IPv4: ours, and one of the peer's own
	Token    uint64     // not 0
	Size     int        // of the inner packet in bytes, MinProbe at least
}

// ErrProbeTooLong says that this host itself cannot send a datagram of that size to the peer in one piece.
var ErrProbeTooLong = errors.New("the probe exceeds the MTU of the interface that leads to the peer")

// PathEvents delivers the news. What nobody takes in time is lost: an answer for good, a packet's until the next.
func (r *Router) PathEvents() <-chan PathEvent { return r.pathEvents }

// WatchPeer asks for an event when the next packet of a container goes to the peer. A peer that is new in the table is
// watched already.
func (r *Router) WatchPeer(c PeerConfig) {
	if p := r.table.Load().peers[c.key()]; p != nil {
		p.watched.Store(true)
	}
}

// stirred tells that a container sends to p. It is called by workers and never blocks.
func (r *Router) stirred(p *peer) {
	if p.watched.CompareAndSwap(true, false) && !r.tellPath(PathEvent{Peer: p.cfg.Addr}) {
		p.watched.Store(true)
	}
}

func (r *Router) tellPath(e PathEvent) bool {
	select {
	case r.pathEvents <- e:
		return true
	default:
		return false
	}
}

// probeAnswered takes a packet for the gateway that answers a probe. The beginning of an answer will do: the peer may have
// to send it in fragments.
func (r *Router) probeAnswered(ip []byte) bool {
	if ip[0]>>4 != 4 || ip[9] != packet.ICMP {
		return false
	}
	h := header.IPv4(ip)
	hl := int(h.HeaderLength())
	if h.FragmentOffset() != 0 || len(ip) < hl+header.ICMPv4MinimumSize+tokenLen {
		return false
	}
	m := header.ICMPv4(ip[hl:])
	if m.Type() != header.ICMPv4EchoReply || m.Ident() != probeIdent {
		return false
	}
	// Only what was asked is news, and once: a container behind a peer may send such replies, but cannot crowd out the real ones.
	if token := binary.BigEndian.Uint64(m[header.ICMPv4MinimumSize:]); token != 0 && r.probes[token%probeSlots].CompareAndSwap(token, 0) {
		r.tellPath(PathEvent{Answered: token})
	}
	return true
}

// SendProbe sends a probe in a datagram of its own. It may be called at any time, and does nothing once the Router has stopped.
func (r *Router) SendProbe(p Probe) error {
	encap := r.under.vxlan.Encap()
	if p.Size < MinProbe || p.Size > MaxTrain-encap {
		return fmt.Errorf("a probe of %d bytes: %d to %d are possible", p.Size, MinProbe, MaxTrain-encap)
	}
	b := make([]byte, encap+p.Size)
	if encap > 0 {
		headers := r.under.vxlan.headers(p.VTEP)
		copy(b, headers[:])
	}
	buildProbe(b[encap:], p)
	r.probes[p.Token%probeSlots].Store(p.Token)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() {
		return nil
	}
	return probeError(p.Peer, unix.Sendto(r.under.fds[0], b, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: p.Peer.Addr().As4(), Port: int(p.Peer.Port())}))
}

func probeError(peer netip.AddrPort, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EMSGSIZE):
		return ErrProbeTooLong
	}
	return fmt.Errorf("send a probe to %v: %w", peer, err)
}

// buildProbe makes p in b, which has its size and is zero.
func buildProbe(b []byte, p Probe) {
	ip := header.IPv4(b)
	ip[0] = 0x45
	ip.SetTotalLength(uint16(p.Size))
	ip.SetID(uint16(p.Token)) // the answer has it too, and may come in fragments
	ip.SetTTL(icmpTTL)
	ip[9] = packet.ICMP
	src, dst := p.Src.As4(), p.Dst.As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	ip.SetChecksum(^checksum.Checksum(ip[:header.IPv4MinimumSize], 0))
	m := header.ICMPv4(b[header.IPv4MinimumSize:])
	m.SetType(header.ICMPv4Echo)
	m.SetIdent(probeIdent)
	m.SetSequence(uint16(p.Token))
	binary.BigEndian.PutUint64(m[header.ICMPv4MinimumSize:], p.Token)
	m.SetChecksum(^checksum.Checksum(m, 0))
}

// KernelMTU is the overlay MTU in bytes that the kernel's route to a peer allows: the interface's, or less where a router has
// sent an ICMP error about our datagrams or the administrator has said so. 0 when the kernel has no route.
func (r *Router) KernelMTU(peer netip.AddrPort) int {
	// The underlay socket ignores all of that (IP_PMTUDISC_PROBE) and is not connected; the route's MTU is told of connected
	// sockets. This one sends nothing.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	if unix.Bind(fd, &unix.SockaddrInet4{Addr: r.under.addr.Addr().As4()}) != nil ||
		unix.Connect(fd, &unix.SockaddrInet4{Addr: peer.Addr().As4(), Port: int(peer.Port())}) != nil {
		return 0
	}
	mtu, err := unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU)
	if err != nil || mtu <= r.Overhead() {
		return 0
	}
	return min(mtu-r.Overhead(), MaxTrain-r.under.vxlan.Encap())
}
