// This file ends connections that an earlier gateway had: a container that only waits to receive would wait for ever, for nothing that it sends
// is answered by a reset.

package stack

import (
	"math/rand/v2"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Provoke has a container's kernel say where it is with a TCP connection to outside, if the gateway has none such: it is sent an acknowledgement of
// anything, out of the blue, to which it answers with the numbers that it expects (RFC 9293 3.10.7.4, RFC 5961 5); and the gateway answers that with a
// reset of exactly these. A connection that is not there is reset as well, one of which the gateway knows stays.
func (g *Gateway) Provoke(container, outside netip.AddrPort) {
	ns := g.live.Load()
	if ns == nil || ns.flows.find(flowKey{proto: protoTCP, src: container, dst: outside}) != nil {
		return
	}
	p := gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: copied(bareACK(outside, container))})
	defer p.DecRef()
	ns.exit.push(p)
}

// bareACK is a segment without data and with numbers of no connection.
func bareACK(from, to netip.AddrPort) []byte {
	const ttl = 64
	src, dst := tcpipAddr(from.Addr()), tcpipAddr(to.Addr())
	var b []byte
	var ip int
	if to.Addr().Is4() {
		ip = header.IPv4MinimumSize
		b = make([]byte, ip+header.TCPMinimumSize)
		h := header.IPv4(b)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: ttl, Protocol: uint8(header.TCPProtocolNumber), SrcAddr: src, DstAddr: dst})
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		ip = header.IPv6MinimumSize
		b = make([]byte, ip+header.TCPMinimumSize)
		header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: header.TCPMinimumSize, TransportProtocol: header.TCPProtocolNumber, HopLimit: ttl, SrcAddr: src, DstAddr: dst})
	}
	t := header.TCP(b[ip:])
	t.Encode(&header.TCPFields{SrcPort: from.Port(), DstPort: to.Port(), SeqNum: rand.Uint32(), AckNum: rand.Uint32(), DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagAck})
	sum := header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(header.TCPProtocolNumber), src, dst, header.TCPMinimumSize)
	t.SetChecksum(^t.CalculateChecksum(checksum.Checksum(nil, sum)))
	return b
}
