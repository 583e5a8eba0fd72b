// This file makes a packet fit a next hop whose MTU it exceeds: smaller segments, fragments, or an error to its sender.

package forwarder

import (
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// maxReassembled is the longest payload that fragments may say they are of; beyond it offsets would wrap.
const maxReassembled = 65535

// fit handles p, whose wireLen is above mtu, that of h. It returns true if p itself may be sent now; otherwise p has been replaced
// or dropped.
func (w *worker) fit(p *packet.Packet, h *hop, mtu int, in *ingress) bool {
	ip := p.Bytes()
	if (h.kind == hopPort || h.kind == hopOwnAt) && in.kind == fromPeer {
		// It came over the network already; a TAP takes any length, and the container's kernel too.
		return true
	}
	if in.kind == fromGateway && cutAnswer(p) {
		return true
	}
	if ip[0]>>4 == 6 || header.IPv4(ip).Flags()&header.IPv4FlagDontFragment != 0 {
		w.tooBig(p, in, mtu)
		return false
	}
	if p.GSO == packet.GSOTCPv4 && mtu > int(p.HdrLen) {
		p.SegSize = uint16(mtu - int(p.HdrLen))
		return true
	}
	if p.GSO != packet.GSONone {
		// Datagrams of one size each: a fragment of a superpacket is not worth its code.
		w.tooBig(p, in, mtu)
		return false
	}
	w.fragment(p, h, mtu)
	return false
}

// fragment cuts p into fragments of mtu bytes (RFC 791 3.2) and enqueues them for h. Options are copied to the first fragment and
// those with the copied flag are few enough in practice that the others carry none.
func (w *worker) fragment(p *packet.Packet, h *hop, mtu int) {
	if p.NeedsCsum {
		completeChecksum(p)
	}
	ip := header.IPv4(p.Bytes())
	hl := int(ip.HeaderLength())
	payload := ip[hl:]
	if int(ip.FragmentOffset())+len(payload) > maxReassembled {
		w.drop(DropMalformed)
		return
	}
	step := (mtu - hl) &^ 7
	if step <= 0 {
		w.drop(DropTooBig)
		return
	}
	if w.own.fragBuf == nil {
		w.own.fragBuf = make([]byte, fragArena) // once in a worker's life, and only where MTUs differ
	}
	count := (len(payload) + step - 1) / step
	if len(w.own.frags)+count > cap(w.own.frags) || w.own.fragUsed+len(payload)+count*(packet.Headroom+hl) > len(w.own.fragBuf) {
		w.drop(DropScratch)
		return
	}
	base, more := ip.FragmentOffset(), ip.More()
	for off := 0; off < len(payload); off += step {
		size := min(step, len(payload)-off)
		buf := w.own.fragBuf[w.own.fragUsed:][: packet.Headroom+hl+size : packet.Headroom+hl+size]
		w.own.fragUsed += len(buf)
		f := header.IPv4(buf[packet.Headroom:])
		copy(f, ip[:hl])
		if off > 0 {
			for i := header.IPv4MinimumSize; i < hl; i++ {
				f[i] = 1 // no operation
			}
		}
		copy(f[hl:], payload[off:off+size])
		f.SetTotalLength(uint16(hl + size))
		var flags uint8
		if more || off+size < len(payload) {
			flags = header.IPv4FlagMoreFragments
		}
		f.SetFlagsFragmentOffset(flags, base+uint16(off))
		f.SetChecksum(0)
		f.SetChecksum(^checksum.Checksum(f[:hl], 0))
		w.own.frags = append(w.own.frags, packet.Packet{Buf: buf, Off: packet.Headroom})
		w.enqueue(h, &w.own.frags[len(w.own.frags)-1])
	}
}
