// This file is the hop to our own overlay addresses where an attached namespace has them: flannel's way, in which the address of the
// TAP is the subnet's .0 and that of a bridge behind it is .1. They still are where path MTU discovery asks and is asked, and
// it must not matter whether the namespace answers: its bridge may not be there yet, and its firewall may refuse.

package forwarder

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// ToOwnAt is the hop to an overlay address of ours that an attachment has: to its port, but path MTU discovery is taken out. What
// peers ask goes to s, which must answer for the address, and what they answer to the Router itself.
func ToOwnAt(p *Port, s packet.Sender) Hop { return Hop{kind: hopOwnAt, port: p, sender: s} }

// takesProbe takes a packet to h, an address of our own, if it is of path MTU discovery.
func (w *worker) takesProbe(p *packet.Packet, h *hop, in *ingress) bool {
	if in.kind != fromPeer {
		return false
	}
	ip := p.Bytes()
	if asksProbe(ip) {
		w.enqueue(h.gateway, p)
		return true
	}
	// The namespace may ping with any identifier: it gets all but what was asked for here.
	token, ok := answerToken(ip)
	return ok && w.router.answered(token)
}

// asksProbe tells whether a packet is a peer's probe. They are never sent in fragments.
func asksProbe(ip []byte) bool {
	l4, proto, kind := header.IPv6MinimumSize, ip[6], byte(header.ICMPv6EchoRequest)
	want := byte(packet.ICMPv6)
	if ip[0]>>4 == 4 {
		h := header.IPv4(ip)
		if h.FragmentOffset() != 0 || h.More() {
			return false
		}
		l4, proto, kind, want = int(h.HeaderLength()), ip[9], byte(header.ICMPv4Echo), packet.ICMP
	}
	const identAt = 4 // in both families
	return proto == want && len(ip) >= l4+echoLen+tokenLen && ip[l4] == kind && binary.BigEndian.Uint16(ip[l4+identAt:]) == probeIdent
}
