// This file answers for every address but the container's own on a TAP: the router is the only neighbour there is.
//
// ARP (RFC 826), over Ethernet:
//
//	htype 2 | ptype 2 | hlen 1 | plen 1 | oper 2 | sender MAC 6 | sender IP 4 | target MAC 6 | target IP 4
//
// Neighbour solicitation and advertisement (RFC 4861 4.3, 4.4), in ICMPv6:
//
//	type 1 | code 1 | checksum 2 | flags 4 | target 16 | option: type 1, length 1, MAC 6

package tap

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	etherTypeIPv4 = 0x0800
	etherTypeARP  = 0x0806
	etherTypeIPv6 = 0x86dd

	arpLen     = 2 + 2 + 1 + 1 + 2 + 6 + 4 + 6 + 4
	arpRequest = 1
	arpReply   = 2

	ipv6HdrLen   = 40
	ndRouter     = 134
	ndSolicit    = 135
	ndAdvertise  = 136
	ndRedirect   = 137
	ndMsgLen     = 1 + 1 + 2 + 4 + 16
	ndOptLen     = 1 + 1 + 6
	ndOptTarget  = 2
	ndHopLimit   = 255
	ndFlagRouter = 0x80
	ndFlagSolic  = 0x40
)

// accept tells whether frame, which begins with its virtio_net_hdr, carries an IP packet for the router. Other frames
// are answered or dropped and counted here.
func (d *Device) accept(frame []byte) bool {
	eth := frame[vnetHdrLen:]
	switch binary.BigEndian.Uint16(eth[12:]) {
	case etherTypeIPv4:
	case etherTypeIPv6:
		if isSolicitation(eth[ethHdrLen:]) {
			d.reply(d.answerND(eth))
			return false
		}
		if d.claimsND(eth[ethHdrLen:]) {
			d.stats.drop(DropClaim, 1)
			return false
		}
	case etherTypeARP:
		if d.claimsARP(eth[ethHdrLen:]) {
			d.stats.drop(DropClaim, 1)
			return false
		}
		d.reply(d.answerARP(eth))
		return false
	default:
		d.stats.drop(DropNotIP, 1)
		return false
	}
	if [6]byte(eth[:6]) != RouterMAC {
		if eth[0]&1 != 0 {
			d.stats.drop(DropMulticast, 1)
		} else {
			d.stats.drop(DropForeignMAC, 1)
		}
		return false
	}
	if len(eth) == ethHdrLen {
		d.stats.drop(DropFrameShort, 1)
		return false
	}
	return true
}

// claimsARP tells whether a, behind its Ethernet header, says that somebody else's address is in the container: a reply, for which nobody has
// asked, or a gratuitous request. Nobody believes it, since the router learns no neighbours and passes no frames on; but whoever sends it means harm.
func (d *Device) claimsARP(a []byte) bool {
	if len(a) < arpLen || binary.BigEndian.Uint16(a[2:]) != etherTypeIPv4 || a[5] != 4 {
		return false
	}
	sender := netip.AddrFrom4([4]byte(a[14:]))
	says := binary.BigEndian.Uint16(a[6:]) == arpReply || [4]byte(a[14:]) == [4]byte(a[24:])
	return says && !sender.IsUnspecified() && !slices.Contains(d.addrs, sender)
}

// claimsND tells likewise of IPv6. A router's advertisement and a redirect are the router's alone, and that is us.
func (d *Device) claimsND(ip []byte) bool {
	if len(ip) <= ipv6HdrLen || ip[6] != packet.ICMPv6 {
		return false
	}
	msg := ip[ipv6HdrLen:]
	switch msg[0] {
	case ndRouter, ndRedirect:
		return true
	case ndAdvertise:
		if len(msg) < ndMsgLen {
			return true
		}
		target := netip.AddrFrom16([16]byte(msg[8:]))
		return !target.IsLinkLocalUnicast() && !slices.Contains(d.addrs, target)
	}
	return false
}

// reply writes the frame of an answer; nil means that the request was malformed, an empty one that none is due.
func (d *Device) reply(frame []byte) {
	if frame == nil {
		d.stats.drop(DropBadARP, 1)
		return
	}
	if len(frame) == 0 {
		return
	}
	if _, err := unix.Write(d.fd, frame); err != nil {
		d.stats.drop(DropTAPWrite, 1)
	}
}

var noAnswer = []byte{}

// answerARP returns the reply to the ARP frame eth, with a virtio_net_hdr in front of it.
func (d *Device) answerARP(eth []byte) []byte {
	if len(eth) < ethHdrLen+arpLen {
		return nil
	}
	a := eth[ethHdrLen:]
	if binary.BigEndian.Uint16(a) != 1 || binary.BigEndian.Uint16(a[2:]) != etherTypeIPv4 || a[4] != 6 || a[5] != 4 {
		return nil
	}
	sender, target := netip.AddrFrom4([4]byte(a[14:])), netip.AddrFrom4([4]byte(a[24:]))
	// A gratuitous ARP or a probe for the container's own address gets no answer: nobody else has it.
	if binary.BigEndian.Uint16(a[6:]) != arpRequest || sender == target || slices.Contains(d.addrs, target) || !target.IsValid() || target.IsUnspecified() {
		return noAnswer
	}
	out := make([]byte, linkHdrLen+arpLen)
	copy(out[vnetHdrLen:], eth[6:12])
	copy(out[vnetHdrLen+6:], RouterMAC[:])
	binary.BigEndian.PutUint16(out[vnetHdrLen+12:], etherTypeARP)
	r := out[linkHdrLen:]
	copy(r, a[:6])
	binary.BigEndian.PutUint16(r[6:], arpReply)
	copy(r[8:], RouterMAC[:])
	copy(r[14:], a[24:28])
	copy(r[18:], a[8:14])
	copy(r[24:], a[14:18])
	return out
}

func isSolicitation(ip []byte) bool {
	return len(ip) > ipv6HdrLen && ip[6] == packet.ICMPv6 && ip[ipv6HdrLen] == ndSolicit
}

// answerND returns the advertisement for the solicitation in eth, with a virtio_net_hdr in front of it.
func (d *Device) answerND(eth []byte) []byte {
	ip := eth[ethHdrLen:]
	n := int(binary.BigEndian.Uint16(ip[4:]))
	if n < ndMsgLen || len(ip) < ipv6HdrLen+n || ip[7] != ndHopLimit || ip[ipv6HdrLen+1] != 0 {
		return nil
	}
	msg := ip[ipv6HdrLen : ipv6HdrLen+n]
	src, target := netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(msg[8:]))
	if packet.Fold(uint64(packet.PseudoSum(ip, packet.ICMPv6, n))+uint64(checksum.Checksum(msg, 0))) != 0xffff || target.IsMulticast() {
		return nil
	}
	// Duplicate address detection (unspecified source) asks whether somebody else has the address: nobody does.
	if src.IsUnspecified() || slices.Contains(d.addrs, target) {
		return noAnswer
	}
	out := make([]byte, linkHdrLen+ipv6HdrLen+ndMsgLen+ndOptLen)
	copy(out[vnetHdrLen:], eth[6:12])
	copy(out[vnetHdrLen+6:], RouterMAC[:])
	binary.BigEndian.PutUint16(out[vnetHdrLen+12:], etherTypeIPv6)
	r := out[linkHdrLen:]
	r[0], r[6], r[7] = 0x60, packet.ICMPv6, ndHopLimit
	binary.BigEndian.PutUint16(r[4:], ndMsgLen+ndOptLen)
	copy(r[8:], msg[8:24])
	copy(r[24:], ip[8:24])
	m := r[ipv6HdrLen:]
	m[0], m[4] = ndAdvertise, ndFlagRouter|ndFlagSolic
	copy(m[8:], msg[8:24])
	m[24], m[25] = ndOptTarget, 1
	copy(m[26:], RouterMAC[:])
	sum := packet.Fold(uint64(packet.PseudoSum(r, packet.ICMPv6, len(m))) + uint64(checksum.Checksum(m, 0)))
	binary.BigEndian.PutUint16(m[2:], ^sum)
	return out
}
