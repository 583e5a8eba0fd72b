// This file is what path MTU discovery needs of the packet path; who decides is the node (node/pathmtu.go). A probe is an ICMP echo
// request between the two nodes' own overlay addresses, padded to the size that is tried: every peer answers it as it is, our own
// by its stack and a flannel host by its kernel, so there is no format of ours.
//
//	+-----------------+-------+------------------+------------------+----------+---------------+
//	| outer IPv4/IPv6 | UDP   | inner IPv4/IPv6  | ICMP/ICMPv6 echo | token    | zeros         |
//	| 20, DF / 40     | 8     | 20 / 40          | 8                | 8        | up to the size|
//	+-----------------+-------+------------------+------------------+----------+---------------+
//
// VXLAN puts its headers in between. The families of the two IP headers are independent of each other. The token is random: an
// answer with the right one comes from where the probe went.
//
// Two nodes that once found a path narrow would never find that it has become wider, if a peer that takes the path for narrower than
// the probe dropped its answer for being too long. So an IPv4 probe has no DF, which the answer would have too (our stack copies the
// flags), and the peer sends its answer in fragments. Nobody cuts IPv6 on the way: there our own node cuts its answer short
// (cutAnswer), and a kernel sends fragments.

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
	echoLen  = header.ICMPv4MinimumSize // type, code, checksum, identifier, sequence number: the same in ICMPv6
	// MinProbe is the size in bytes of the smallest probe of IPv4.
	MinProbe = header.IPv4MinimumSize + echoLen + tokenLen
	// MinProbe6 is that of IPv6.
	MinProbe6 = header.IPv6MinimumSize + echoLen + tokenLen

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
	Src, Dst netip.Addr // overlay addresses of one family, whichever the peer's is: ours, and one of the peer's own
	Token    uint64     // not 0
	Size     int        // of the inner packet in bytes, MinProbe or MinProbe6 at least
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
	token, ok := answerToken(ip)
	r.answered(token)
	return ok
}

// answered tells of the answer with that token, if it is one that was asked for. Only that is news, and once: a container behind a
// peer may send such replies, but cannot crowd out the real ones.
func (r *Router) answered(token uint64) bool {
	if token == 0 || !r.probes[token%probeSlots].CompareAndSwap(token, 0) {
		return false
	}
	r.tellPath(PathEvent{Answered: token})
	return true
}

// answerToken reads the token of an answer to a probe, whole or its first fragment.
func answerToken(ip []byte) (token uint64, ok bool) {
	l4, kind, proto := 0, byte(header.ICMPv4EchoReply), byte(packet.ICMP)
	if ip[0]>>4 == 4 {
		h := header.IPv4(ip)
		l4 = int(h.HeaderLength())
		if ip[9] != proto || h.FragmentOffset() != 0 {
			return 0, false
		}
	} else {
		l4, kind, proto = header.IPv6MinimumSize, byte(header.ICMPv6EchoReply), packet.ICMPv6
		next := ip[6]
		if next == byte(header.IPv6FragmentHeader) && len(ip) >= l4+header.IPv6FragmentHeaderSize {
			if f := header.IPv6Fragment(ip[l4:]); f.FragmentOffset() == 0 {
				next = ip[l4]
				l4 += header.IPv6FragmentHeaderSize
			}
		}
		if next != proto {
			return 0, false
		}
	}
	const identAt = 4 // in both families
	if len(ip) < l4+echoLen+tokenLen || ip[l4] != kind || binary.BigEndian.Uint16(ip[l4+identAt:]) != probeIdent {
		return 0, false
	}
	return binary.BigEndian.Uint64(ip[l4+echoLen:]), true
}

// cutAnswer shortens p to the token if it is our own answer to an IPv6 probe, which is too long for what the path is taken to carry.
func cutAnswer(p *packet.Packet) bool {
	ip := p.Bytes()
	if ip[0]>>4 != 6 || ip[6] != packet.ICMPv6 {
		return false
	}
	if _, ok := answerToken(ip); !ok {
		return false
	}
	p.Buf = p.Buf[:p.Off+MinProbe6]
	p.NeedsCsum = false
	ip = p.Bytes()
	header.IPv6(ip).SetPayloadLength(MinProbe6 - header.IPv6MinimumSize)
	sumICMPv6(ip)
	return true
}

// SendProbe sends a probe in a datagram of its own. It may be called at any time, and does nothing once the Router has stopped.
func (r *Router) SendProbe(p Probe) error {
	encap := r.vxlan.Encap()
	least, most := MinProbe, MaxTrain-encap
	if p.Dst.Is6() {
		least = MinProbe6
	}
	switch {
	case p.Size < least || p.Size > most:
		return fmt.Errorf("a probe of %d bytes: %d to %d are possible", p.Size, least, most)
	case !p.Dst.IsValid() || p.Src.Is4() != p.Dst.Is4() || p.Src.Is6() != p.Dst.Is6():
		return fmt.Errorf("a probe from %v to %v: they are not of one family", p.Src, p.Dst)
	}
	b := make([]byte, encap+p.Size)
	buildProbe(b[encap:], p)
	if encap > 0 {
		to := peer{headers: r.vxlan.headers(p.VTEP)}
		to.encapsulate(b[:encap], b[encap])
	}
	r.probes[p.Token%probeSlots].Store(p.Token)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() {
		return nil
	}
	u := r.under.Load()
	if err := checkPeerAddr(p.Peer, u); err != nil {
		return err
	}
	return probeError(p.Peer, unix.Sendto(u[familyOf(p.Peer.Addr())].fds[0], b, unix.MSG_DONTWAIT, unixSockaddr(p.Peer)))
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
	l4, kind := header.IPv4MinimumSize, byte(header.ICMPv4Echo)
	if p.Dst.Is6() {
		l4, kind = header.IPv6MinimumSize, byte(header.ICMPv6EchoRequest)
	}
	m := b[l4:]
	m[0] = kind
	binary.BigEndian.PutUint16(m[4:], probeIdent)
	binary.BigEndian.PutUint16(m[6:], uint16(p.Token))
	binary.BigEndian.PutUint64(m[echoLen:], p.Token)
	if p.Dst.Is6() {
		ip := header.IPv6(b)
		ip[0], ip[6], ip[7] = 0x60, packet.ICMPv6, icmpTTL
		ip.SetPayloadLength(uint16(len(m)))
		copy(ip[8:], p.Src.AsSlice())
		copy(ip[24:], p.Dst.AsSlice())
		sumICMPv6(b)
		return
	}
	ip := header.IPv4(b)
	ip[0] = 0x45
	ip.SetTotalLength(uint16(p.Size))
	ip.SetID(uint16(p.Token)) // the answer has it too, and may come in fragments
	ip.SetTTL(icmpTTL)
	ip[9] = packet.ICMP
	copy(ip[12:], p.Src.AsSlice())
	copy(ip[16:], p.Dst.AsSlice())
	ip.SetChecksum(^checksum.Checksum(ip[:header.IPv4MinimumSize], 0))
	header.ICMPv4(m).SetChecksum(^checksum.Checksum(m, 0))
}

// KernelMTU is the overlay MTU in bytes that the kernel's route to a peer allows: the interface's, or less where a router has
// sent an ICMP error about our datagrams or the administrator has said so. 0 when the kernel has no route.
func (r *Router) KernelMTU(peer netip.AddrPort) int {
	u := r.under.Load()
	if checkPeerAddr(peer, u) != nil {
		return 0
	}
	// The underlay socket ignores all of that (IP_PMTUDISC_PROBE) and is not connected; the route's MTU is told of connected
	// sockets. This one sends nothing.
	spec := familySpecs[familyOf(peer.Addr())]
	fd, err := unix.Socket(spec.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	own := netip.AddrPortFrom(u[familyOf(peer.Addr())].addr.Addr(), 0)
	if unix.Bind(fd, unixSockaddr(own)) != nil || unix.Connect(fd, unixSockaddr(peer)) != nil {
		return 0
	}
	mtu, err := unix.GetsockoptInt(fd, spec.level, spec.mtu)
	overhead := r.Overhead(peer.Addr())
	if err != nil || mtu <= overhead {
		return 0
	}
	return min(mtu-overhead, MaxTrain-r.vxlan.Encap())
}

// unixSockaddr is a as x/sys/unix wants it.
func unixSockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
