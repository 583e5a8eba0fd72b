// This file is the ICMP errors that come in about what the gateway has sent: which are believed, and what becomes of a flow of datagrams.
// gVisor believes whatever quotes one of its connections, which could be that of another container (RFC 5927).

package stack

import (
	"encoding/binary"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// icmpHeader is the size in bytes of what comes before the quote, the same in ICMP and ICMPv6.
const icmpHeader = 8

// Path MTUs in bytes below which a message is not believed: no link that anybody uses has less, and segments as short as a message can ask for
// cost more than they carry (RFC 5927 section 7.2, RFC 8201 section 4).
const (
	minPathMTU4 = 576
	minPathMTU6 = header.IPv6MinimumMTU
)

// heeds tells whether gVisor may have an ICMP error: one about a connection, by the container at its other end or by the router of its node.
// What it may not is counted, or has ended a flow of datagrams, which gVisor knows nothing of.
func (ns *netstack) heeds(b []byte, in inbound) bool {
	message := b[in.transport:]
	quoted := message[icmpHeader:]
	src, dst, ok := quotedEnds(quoted, in.dst.Is4())
	// They are too short to come in fragments, which would be judged before they are put together.
	if !ok || in.fragment || src != in.dst || dst != in.src && !ns.gw.cfg.routes(in.src, dst) {
		ns.count.drop(dropICMPForged)
		return false
	}
	q, ok := parseQuote(quoted)
	switch {
	case !ok || q.later:
	case q.proto == protoTCP:
		if !tooSmall(message, in) {
			ns.refuseDial(message, in, q, quoted)
			return true
		}
	case q.proto == protoUDP && saysPortUnreachable(message, in) && ns.endDatagrams(q, quoted):
		return false
	}
	ns.count.drop(dropICMPUnused)
	return false
}

// quotedEnds are the addresses of the packet that an ICMP error quotes.
func quotedEnds(quoted []byte, is4 bool) (src, dst netip.Addr, ok bool) {
	switch {
	case is4 && len(quoted) >= header.IPv4MinimumSize && quoted[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(quoted[12:])), netip.AddrFrom4([4]byte(quoted[16:])), true
	case !is4 && len(quoted) >= header.IPv6MinimumSize && quoted[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(quoted[8:])), netip.AddrFrom16([16]byte(quoted[24:])), true
	}
	return src, dst, false
}

// routes tells whether router is that of the node that has the container: of every node's subnet .0 and .1 are the node's own, and a flannel
// host's too. The forwarder sees to it that nobody else sends from there.
func (c *Config) routes(router, container netip.Addr) bool {
	bits := c.SubnetLen
	if router.Is6() {
		bits = c.IPv6SubnetLen
	}
	if bits == 0 || router.BitLen() != container.BitLen() {
		return false
	}
	subnet := netip.PrefixFrom(router, bits).Masked()
	first := subnet.Addr()
	return subnet.Contains(container) && (router == first || router == first.Next())
}

// tooSmall tells whether an ICMP error asks for packets that are smaller than is believed.
func tooSmall(message []byte, in inbound) bool {
	if in.proto == protoICMPv6 {
		return header.ICMPv6Type(message[0]) == header.ICMPv6PacketTooBig && binary.BigEndian.Uint32(message[4:]) < minPathMTU6
	}
	return header.ICMPv4Type(message[0]) == header.ICMPv4DstUnreachable && header.ICMPv4Code(message[1]) == header.ICMPv4FragmentationNeeded &&
		binary.BigEndian.Uint16(message[6:]) < minPathMTU4
}

func saysPortUnreachable(message []byte, in inbound) bool {
	if in.proto == protoICMPv6 {
		return header.ICMPv6Type(message[0]) == header.ICMPv6DstUnreachable && header.ICMPv6Code(message[1]) == header.ICMPv6PortUnreachable
	}
	return header.ICMPv4Type(message[0]) == header.ICMPv4DstUnreachable && header.ICMPv4Code(message[1]) == header.ICMPv4PortUnreachable
}

// endDatagrams ends the flow that the quoted datagram to a container is of. No means that there is none.
func (ns *netstack) endDatagrams(q inbound, quoted []byte) bool {
	if len(quoted) < q.transport+header.UDPMinimumSize {
		return false
	}
	u := header.UDP(quoted[q.transport:])
	e := ns.flows.find(flowKey{
		proto: protoUDP,
		src:   netip.AddrPortFrom(q.dst, u.DestinationPort()),
		dst:   netip.AddrPortFrom(q.src, u.SourcePort()),
	})
	if e == nil {
		return false
	}
	switch f := e.flow.(type) {
	case *InwardUDP:
		f.endWith(syscall.ECONNREFUSED)
	case *datagramFlow: // its socket goes, and the host answers what comes next with port unreachable
		f.end()
	}
	return true
}
