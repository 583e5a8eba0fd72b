// This file is egress UDP: one connected host socket for every pair of container port and destination.

package stack

import (
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// datagramTaker is a flow of UDP: of egress, or one that began outside. send takes a datagram of the container.
type datagramTaker interface {
	flow
	send(d datagram)
}

// acceptUDP takes every datagram of containers, put together from its fragments. False would make gVisor answer port unreachable, at its own
// rate.
func (ns *netstack) acceptUDP(id gstack.TransportEndpointID, pkt *gstack.PacketBuffer) bool {
	u := header.UDP(pkt.TransportHeader().Slice())
	size := int(u.Length()) - header.UDPMinimumSize
	if size < 0 || size > pkt.Data().Size() {
		ns.count.drop(dropMalformed)
		return true
	}
	payload, ok := pkt.Data().PullUp(size)
	if !ok && size > 0 {
		ns.count.drop(dropMalformed)
		return true
	}
	key := keyOf(protoUDP, id)
	if ns.isResolver(key) {
		ns.resolve(key, payload)
		return true
	}
	var room [quoteRoom]byte
	d := datagramOf(pkt, payload, room[:0])
	if e := ns.flows.find(key); e != nil {
		e.flow.(datagramTaker).send(d)
		return true
	}
	to, ok := ns.gw.target(key.src.Addr(), key.dst)
	if !ok {
		ns.sendClosedPort(key.dst.Addr(), d.quote)
		return true
	}
	if why, ok := ns.gw.refusal(key.src.Addr(), key.dst, to); !ok {
		ns.count.drop(why)
		ns.sendError(adminProhibited, d.quote)
		return true
	}
	if err := ns.startDatagrams(key, kindUDP, unix.IPPROTO_UDP, to, d); err != nil {
		ns.refuseDatagram(err, d.quote)
	}
	return true
}

// refuseDatagram answers a datagram that the host cannot send.
func (ns *netstack) refuseDatagram(err error, quote []byte) {
	if kind, ok := kindOf(err); ok {
		ns.sendError(kind, quote)
		return
	}
	ns.count.drop(dropNoSocket)
}

// sendDatagram sends b to the container of key, from where the container sent to. gVisor cuts it into fragments where it must.
func (ns *netstack) sendDatagram(r *gstack.Route, key flowKey, b []byte) {
	p := gstack.NewPacketBuffer(gstack.PacketBufferOptions{
		ReserveHeaderBytes: header.UDPMinimumSize + int(r.MaxHeaderLength()),
		Payload:            copied(b),
	})
	defer p.DecRef()
	u := header.UDP(p.TransportHeader().Push(header.UDPMinimumSize))
	p.TransportProtocolNumber = header.UDPProtocolNumber
	length := uint16(header.UDPMinimumSize + len(b))
	u.Encode(&header.UDPFields{SrcPort: key.dst.Port(), DstPort: key.src.Port(), Length: length})
	sum := checksum.Combine(r.PseudoHeaderChecksum(header.UDPProtocolNumber, length), checksum.Checksum(b, 0))
	sum = ^u.CalculateChecksum(sum)
	if sum == 0 { // zero would mean that there is none (RFC 768)
		sum = 0xffff
	}
	u.SetChecksum(sum)
	// What the exit queue drops is counted there.
	_ = r.WritePacket(gstack.NetworkHeaderParams{Protocol: header.UDPProtocolNumber, TTL: gatewayTTL}, p)
}

// resolve has a query answered in a goroutine of its own; the resolver bounds their number.
func (ns *netstack) resolve(key flowKey, query []byte) {
	query = append([]byte(nil), query...)
	if !ns.flows.begin() {
		return
	}
	go func() {
		defer ns.flows.wg.Done()
		answer := ns.gw.resolver.Answer(ns.ctx, ns.gw.asks(key), query)
		if answer == nil {
			return
		}
		r, terr := ns.route(key.dst.Addr(), key.src.Addr())
		if terr != nil {
			return
		}
		defer r.Release()
		ns.sendDatagram(r, key, answer)
	}()
}
