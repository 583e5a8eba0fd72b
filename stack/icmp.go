// This file makes the ICMP errors that containers get, as a router would send them: the gateway's own, and those that the host
// was sent about the containers' datagrams.

package stack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// unreachable is a kind of ICMP error.
type unreachable uint8

const (
	netUnreachable unreachable = iota
	hostUnreachable
	protoUnreachable
	portUnreachable
	adminProhibited
)

// code4 is the code of ICMP type 3 (RFC 792, RFC 1812 section 5.2.7.1).
var code4 = [...]header.ICMPv4Code{
	netUnreachable:   header.ICMPv4NetUnreachable,
	hostUnreachable:  header.ICMPv4HostUnreachable,
	protoUnreachable: header.ICMPv4ProtoUnreachable,
	portUnreachable:  header.ICMPv4PortUnreachable,
	adminProhibited:  header.ICMPv4AdminProhibited,
}

// code6 is the code of ICMPv6 type 1 (RFC 4443 section 3.1). An unknown protocol is a parameter problem there.
var code6 = [...]header.ICMPv6Code{
	netUnreachable:   header.ICMPv6NetworkUnreachable,
	hostUnreachable:  header.ICMPv6AddressUnreachable,
	protoUnreachable: header.ICMPv6UnknownHeader,
	portUnreachable:  header.ICMPv6PortUnreachable,
	adminProhibited:  header.ICMPv6Prohibited,
}

// icmpError is an ICMP error without what it quotes.
type icmpError struct {
	typ, code uint8
	rest      uint32 // the second four bytes of its header
}

// message is the error of a kind, which differs between the families.
func (k unreachable) message(is4 bool) icmpError {
	switch {
	case is4:
		return icmpError{typ: uint8(header.ICMPv4DstUnreachable), code: uint8(code4[k])}
	case k == protoUnreachable: // rest is the offset of the Next Header field
		return icmpError{typ: uint8(header.ICMPv6ParamProblem), code: uint8(code6[k]), rest: 6}
	}
	return icmpError{typ: uint8(header.ICMPv6DstUnreachable), code: uint8(code6[k])}
}

// tooBig says that a packet must not be larger than mtu bytes: it is above 1280 in IPv6, where every link carries that.
func tooBig(is4 bool, mtu uint32) icmpError {
	if is4 {
		return icmpError{typ: uint8(header.ICMPv4DstUnreachable), code: uint8(header.ICMPv4FragmentationNeeded), rest: min(mtu, 0xffff)}
	}
	return icmpError{typ: uint8(header.ICMPv6PacketTooBig), rest: max(mtu, header.IPv6MinimumMTU)}
}

// How much of an ICMP error there may be in bytes, IP header included (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4).
const (
	maxError4 = 576
	maxError6 = header.IPv6MinimumMTU
)

// kindOf turns what a host socket says into the error that a router would send about the same trouble. ok is false for
// trouble that a router would not report: the packet is dropped, and the container's own retransmission tries again.
func kindOf(err error) (kind unreachable, ok bool) {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return hostUnreachable, isTimeout(err)
	}
	switch errno {
	case syscall.ENETUNREACH, syscall.EAFNOSUPPORT, syscall.ENETDOWN, syscall.ENODEV: // ENODEV: the interface of Outbound is gone
		return netUnreachable, true
	case syscall.EHOSTUNREACH, syscall.ETIMEDOUT, syscall.EHOSTDOWN, syscall.ENONET, syscall.EADDRNOTAVAIL:
		// EADDRNOTAVAIL: the host has no address of that family to send from, or no port left.
		return hostUnreachable, true
	case syscall.ECONNREFUSED:
		return portUnreachable, true
	case syscall.ENOPROTOOPT, syscall.EPROTO:
		return protoUnreachable, true
	case syscall.EACCES, syscall.EPERM:
		return adminProhibited, true
	}
	return 0, false
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// sendError answers the packet that orig begins with, from the gateway. Nothing is sent about ICMP errors and later fragments
// (RFC 1122 section 3.2.2), nor beyond errorRate.
func (ns *netstack) sendError(kind unreachable, orig []byte) {
	ns.sendLimited(netip.Addr{}, kind.message(len(orig) > 0 && orig[0]>>4 == 4), orig, kind == adminProhibited || kind == protoUnreachable)
}

// sendClosedPort says that one of the gateway's own addresses, which is given, has nothing at the port that orig was sent to.
func (ns *netstack) sendClosedPort(own netip.Addr, orig []byte) {
	ns.sendLimited(own, portUnreachable.message(own.Is4()), orig, true)
}

// sendErrorFrom is sendError about trouble of which from has told the host.
func (ns *netstack) sendErrorFrom(from netip.Addr, kind unreachable, orig []byte) {
	ns.sendMessage(from, kind.message(len(orig) > 0 && orig[0]>>4 == 4), orig)
}

// sendMessage sends an ICMP error about the packet that orig begins with, from whoever told the host, or from the gateway. What no container can
// reach is not told by its name, and the gateway speaks for it: the loopback, for one, of a host that refuses a datagram itself.
func (ns *netstack) sendMessage(from netip.Addr, m icmpError, orig []byte) {
	ns.sendLimited(from, m, orig, false)
}

// sendLimited is sendMessage for errors of both kinds that errorRate knows.
func (ns *netstack) sendLimited(from netip.Addr, m icmpError, orig []byte, refusal bool) {
	in, ok := parseQuote(orig)
	if !ok || in.later || isICMPError(orig, in) {
		return
	}
	if !ns.errors.allows(in.src, refusal, time.Now()) {
		ns.count.drop(dropICMPRate)
		return
	}
	src := from
	if !src.IsValid() || src.Is4() != in.dst.Is4() || new(Config).judge(src) != open {
		if src, ok = ns.gw.errorSource(in.dst.Is4()); !ok {
			src = in.dst
		}
	}
	var b []byte
	if in.dst.Is4() {
		b = m.over4(orig, src.As4(), in.src.As4())
	} else {
		b = m.over6(orig, src.As16(), in.src.As16())
	}
	p := gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: copied(b)})
	defer p.DecRef()
	if ns.exit.push(p) {
		ns.count.icmpErrorsOut.Add(1)
	}
}

// parseQuote reads a packet that may have been cut short after its transport header's first eight bytes.
func parseQuote(b []byte) (in inbound, ok bool) {
	in, ok = parseIP(b)
	if ok || len(b) < header.IPv4MinimumSize {
		return in, ok
	}
	// Only the length was wrong, or it is no packet at all: look again with the length that there is.
	fixed := append([]byte(nil), b...)
	if fixed[0]>>4 == 4 {
		binary.BigEndian.PutUint16(fixed[2:], uint16(len(fixed)))
	} else if len(fixed) >= header.IPv6MinimumSize {
		binary.BigEndian.PutUint16(fixed[4:], uint16(len(fixed)-header.IPv6MinimumSize))
	}
	return parseIP(fixed)
}

func isICMPError(b []byte, in inbound) bool {
	if len(b) <= in.transport {
		return false
	}
	switch in.proto {
	case protoICMP:
		switch header.ICMPv4Type(b[in.transport]) {
		case header.ICMPv4Echo, header.ICMPv4EchoReply, header.ICMPv4Timestamp, header.ICMPv4TimestampReply,
			header.ICMPv4InfoRequest, header.ICMPv4InfoReply:
			return false
		}
		return true
	case protoICMPv6:
		return header.ICMPv6Type(b[in.transport]).IsErrorType()
	}
	return false
}

// over4 lays out [IPv4 20][ICMP 8][as much of orig as fits].
func (m icmpError) over4(orig []byte, src, dst [4]byte) []byte {
	const head = header.IPv4MinimumSize + header.ICMPv4MinimumSize
	n := min(len(orig), maxError4-head)
	b := make([]byte, head+n)
	copy(b[head:], orig[:n])
	ip := header.IPv4(b)
	ip[0] = 4<<4 | header.IPv4MinimumSize/4
	ip[1] = 0xc0 // internetwork control, as Linux marks its ICMP errors (RFC 1812 section 4.3.2.5)
	ip.SetTotalLength(uint16(len(b)))
	ip[8] = gatewayTTL
	ip[9] = protoICMP
	copy(ip[12:16], src[:])
	copy(ip[16:20], dst[:])
	ip.SetChecksum(^ip.CalculateChecksum())
	icmp := header.ICMPv4(b[header.IPv4MinimumSize:])
	icmp.SetType(header.ICMPv4Type(m.typ))
	icmp.SetCode(header.ICMPv4Code(m.code))
	binary.BigEndian.PutUint32(icmp[4:], m.rest)
	icmp.SetChecksum(^checksum.Checksum(icmp, 0))
	return b
}

// over6 lays out [IPv6 40][ICMPv6 8][as much of orig as fits].
func (m icmpError) over6(orig []byte, src, dst [16]byte) []byte {
	const head = header.IPv6MinimumSize + header.ICMPv6MinimumSize
	n := min(len(orig), maxError6-head)
	b := make([]byte, head+n)
	copy(b[head:], orig[:n])
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)-header.IPv6MinimumSize))
	b[6] = protoICMPv6
	b[7] = gatewayTTL
	copy(b[8:24], src[:])
	copy(b[24:40], dst[:])
	icmp := header.ICMPv6(b[header.IPv6MinimumSize:])
	icmp.SetType(header.ICMPv6Type(m.typ))
	icmp.SetCode(header.ICMPv6Code(m.code))
	binary.BigEndian.PutUint32(icmp[4:], m.rest)
	sum := checksum.Checksum(b[8:40], uint16(protoICMPv6))
	sum = checksum.Combine(sum, uint16(len(icmp)))
	icmp.SetChecksum(^checksum.Checksum(icmp, sum))
	return b
}
