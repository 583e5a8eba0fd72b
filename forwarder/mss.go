// This file keeps TCP from ever sending what a path cannot carry: the MSS option of a SYN that is forwarded between hops of
// different MTUs is lowered to what the smaller one takes (RFC 9293 3.7.1, RFC 4821 is what it saves TCP from).
//
//	+------+-----+-----------+
//	| kind | len | MSS       |   option 2 (RFC 9293 3.2), 4 bytes, in a SYN or SYN/ACK alone
//	| 2    | 4   | 2 bytes   |
//	+------+-----+-----------+
//
// The MSS is never raised, and a header that makes no sense is left to the receiver as it is.

package forwarder

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	mssKind = 2
	mssLen  = 4
	// minMSS and minMSS6 bound what a SYN is lowered to: the path of a host that takes no more than it must (RFC 791, RFC 8200 5).
	minMSS  = 576 - header.IPv4MinimumSize - header.TCPMinimumSize
	minMSS6 = minMTU6 - header.IPv6MinimumSize - header.TCPMinimumSize
)

// clampMSS lowers the MSS option of a SYN to what fits into packets of mtu bytes. Other packets are left as they are.
func clampMSS(p *packet.Packet, mtu int) {
	ip := p.Bytes()
	proto, l4, ok := packet.Transport(ip)
	if !ok || proto != packet.TCP || len(ip) < l4+header.TCPMinimumSize || ip[l4+header.TCPFlagsOffset]&uint8(header.TCPFlagSyn) == 0 {
		return
	}
	tcp := ip[l4:]
	hl := int(tcp[header.TCPDataOffset]>>4) * 4
	if hl < header.TCPMinimumSize || hl > len(tcp) {
		return
	}
	at := findMSS(tcp[:hl])
	if at == 0 {
		return
	}
	most := max(minMSS, mtu-header.TCPMinimumSize-header.IPv4MinimumSize)
	if ip[0]>>4 == 6 {
		most = max(minMSS6, mtu-header.TCPMinimumSize-header.IPv6MinimumSize)
	}
	old := binary.BigEndian.Uint16(tcp[at:])
	if int(old) <= most {
		return
	}
	binary.BigEndian.PutUint16(tcp[at:], uint16(most))
	if p.NeedsCsum {
		return // the field holds the sum of the pseudo header, which knows no options
	}
	// RFC 1624. At an odd offset the option's bytes stand in two words, each in the other half: their sum is that of the
	// value with its bytes swapped.
	was, is := old, uint16(most)
	if at&1 == 1 {
		was, is = was<<8|was>>8, is<<8|is>>8
	}
	sum := tcp[header.TCPChecksumOffset : header.TCPChecksumOffset+2]
	x := uint64(^binary.BigEndian.Uint16(sum)) + uint64(^was) + uint64(is)
	binary.BigEndian.PutUint16(sum, ^packet.Fold(x))
}

// findMSS returns where the value of the MSS option begins in a TCP header, or 0.
func findMSS(tcp []byte) int {
	for i := header.TCPMinimumSize; i < len(tcp); {
		switch tcp[i] {
		case header.TCPOptionEOL:
			return 0
		case header.TCPOptionNOP:
			i++
			continue
		}
		if i+1 >= len(tcp) {
			return 0
		}
		n := int(tcp[i+1])
		if n < 2 || i+n > len(tcp) {
			return 0
		}
		if tcp[i] == mssKind {
			if n != mssLen {
				return 0
			}
			return i + 2
		}
		i += n
	}
	return 0
}
