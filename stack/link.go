// This file is the stack's link endpoint, inbound half: packets from containers are judged, copied and delivered to gVisor. The
// outbound half ends in the exit queue (exit.go).

package stack

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// gsoMaxSize is the largest TCP superpacket in bytes that the stack makes: room for the headers of any encapsulation
// below the 65,507 bytes of a UDP datagram.
const gsoMaxSize = 65000

// link is gVisor's view of the wire. It claims receive checksum offload only: with transmit offload claimed, packets that
// are not superpackets would leave without a checksum.
type link struct {
	exit       *exitQueue
	mtu        atomic.Uint32
	dispatcher atomic.Pointer[gstack.NetworkDispatcher]
}

var (
	_ gstack.LinkEndpoint = (*link)(nil)
	_ gstack.GSOEndpoint  = (*link)(nil)
)

func (l *link) MTU() uint32                      { return l.mtu.Load() }
func (l *link) SetMTU(mtu uint32)                { l.mtu.Store(mtu) }
func (l *link) MaxHeaderLength() uint16          { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress   { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress) {}
func (l *link) Capabilities() gstack.LinkEndpointCapabilities {
	return gstack.CapabilityRXChecksumOffload
}
func (l *link) GSOMaxSize() uint32                      { return gsoMaxSize }
func (l *link) SupportedGSO() gstack.SupportedGSO       { return gstack.HostGSOSupported }
func (l *link) Wait()                                   {}
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*gstack.PacketBuffer)          {}
func (l *link) ParseHeader(*gstack.PacketBuffer) bool   { return true }
func (l *link) IsAttached() bool                        { return l.dispatcher.Load() != nil }

func (l *link) Attach(d gstack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

// WritePackets puts gVisor's packets into the exit queue. It never blocks: gVisor calls it with the locks of an endpoint
// held, also in the middle of a Send, which may come from the very goroutine that drains the queue.
func (l *link) WritePackets(pkts gstack.PacketBufferList) (int, tcpip.Error) {
	for i, p := range pkts.AsSlice() {
		if !l.exit.push(p) {
			return i, &tcpip.ErrNoBufferSpace{}
		}
	}
	return pkts.Len(), nil
}

// deliver copies b into gVisor's memory and hands it to the network layer.
func (l *link) deliver(b []byte, proto tcpip.NetworkProtocolNumber) {
	d := l.dispatcher.Load()
	if d == nil {
		return
	}
	p := gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: copied(b)})
	(*d).DeliverNetworkPacket(proto, p)
	p.DecRef()
}

// copied is a buffer with a copy of b, from gVisor's pools: what is larger than the largest pool's pieces is laid into several.
func copied(b []byte) buffer.Buffer {
	var buf buffer.Buffer
	for len(b) > 0 {
		n := min(len(b), buffer.MaxChunkSize)
		// The only error of Append is about sizes beyond 63 bits.
		_ = buf.Append(buffer.NewViewWithData(b[:n]))
		b = b[n:]
	}
	return buf
}

// Send takes packets from containers: for the outside or for the gateway's own addresses. See packet.Sender.
func (g *Gateway) Send(_ *packet.Scratch, pkts []*packet.Packet) {
	ns := g.live.Load()
	if ns == nil {
		g.count.drops[dropNotRunning].Add(uint64(len(pkts)))
		return
	}
	bytes := 0
	for _, p := range pkts {
		bytes += p.Len()
		ns.receive(p)
	}
	g.count.packetsIn.Add(uint64(len(pkts)))
	g.count.bytesIn.Add(uint64(bytes))
}

// receive judges one packet and delivers it.
func (ns *netstack) receive(p *packet.Packet) {
	b := p.Bytes()
	in, ok := parseIP(b)
	if !ok || !in.later && in.length-in.transport < transportSize(in.proto) {
		ns.count.drop(dropMalformed)
		return
	}
	b = b[:in.length]
	if !ns.gw.isOwn(in.dst) && !ns.admit(b, in) {
		return
	}
	if !p.NeedsCsum && !p.Verified && p.GSO == packet.GSONone && !in.fragment && !checksumRight(b, in) {
		ns.count.drop(dropChecksum)
		return
	}
	if in.fragment {
		ns.count.fragments.Add(1)
	}
	if in.proto == protoICMPv6 && !in.later && isNeighbours(header.ICMPv6(b[in.transport:]).Type()) {
		ns.count.drop(dropNeighbour)
		return
	}
	if !in.later && isICMPError(b, in) && !ns.heeds(b, in) {
		return
	}
	if in.proto == protoTCP && !in.later && header.TCP(b[in.transport:]).Flags()&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn {
		ns.endTimeWait(b, in)
	}
	proto := header.IPv4ProtocolNumber
	if in.dst.Is6() {
		proto = header.IPv6ProtocolNumber
	}
	if p.GSO == packet.GSOUDP && in.proto == protoUDP && !in.fragment {
		ns.deliverDatagrams(b, in, int(p.SegSize), proto)
		return
	}
	ns.link.deliver(b, proto)
}

// isNeighbours tells whether a message is neighbour discovery's (RFC 4861). There are no neighbours here: the TAP answers for us, and the router
// passes none on, unless it hides behind extension headers.
func isNeighbours(t header.ICMPv6Type) bool {
	return t >= header.ICMPv6RouterSolicit && t <= header.ICMPv6RedirectMsg
}

// admit says whether a packet for the outside may go on. If not it has been dropped, counted, and answered where an answer
// is due.
func (ns *netstack) admit(b []byte, in inbound) bool {
	if in.asksPort(b, dnsPort) && ns.gw.resolvesAt(in.src, in.dst) { // wherever that is: nothing is sent there
		return true
	}
	switch ns.gw.cfg.judge(in.dst) {
	case silence:
		ns.count.drop(dropMulticast)
		return false
	case closed:
		ns.count.drop(dropClosed)
		ns.sendError(adminProhibited, b)
		return false
	}
	switch {
	case in.proto == protoTCP, in.proto == protoUDP, in.later:
		return true
	case in.proto == protoICMP && in.dst.Is4():
		switch header.ICMPv4(b[in.transport:]).Type() {
		case header.ICMPv4Echo, header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
			return true
		}
		ns.count.drop(dropICMPType)
		return false
	case in.proto == protoICMPv6 && in.dst.Is6():
		switch t := header.ICMPv6(b[in.transport:]).Type(); {
		case t == header.ICMPv6EchoRequest, t.IsErrorType():
			return true
		}
		ns.count.drop(dropICMPType)
		return false
	}
	ns.count.drop(dropProtocol)
	ns.sendError(protoUnreachable, b)
	return false
}

// deliverDatagrams cuts a UDP superpacket (USO) into the datagrams that it stands for. Their UDP checksums are left: the
// link claims that they were checked.
func (ns *netstack) deliverDatagrams(b []byte, in inbound, size int, proto tcpip.NetworkProtocolNumber) {
	head := in.transport + header.UDPMinimumSize
	payload := b[head:]
	if size == 0 || len(payload) <= size {
		ns.link.deliver(b, proto)
		return
	}
	d := make([]byte, head+size)
	for len(payload) > 0 {
		n := min(size, len(payload))
		copy(d, b[:head])
		copy(d[head:], payload[:n])
		payload = payload[n:]
		one := d[:head+n]
		header.UDP(one[in.transport:]).SetLength(uint16(header.UDPMinimumSize + n))
		if in.dst.Is4() {
			h := header.IPv4(one)
			h.SetTotalLength(uint16(len(one)))
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
		} else {
			binary.BigEndian.PutUint16(one[4:], uint16(len(one)-header.IPv6MinimumSize))
		}
		ns.link.deliver(one, proto)
	}
}

// endTimeWait clears the way for a SYN whose four-tuple is still in TIME_WAIT here. gVisor gives such a SYN to a listening
// endpoint; there is none behind an accept function, so it would be dropped without a word, and a client whose ports have
// wrapped round within the minute would hang. A path through a TAP neither repeats nor reorders packets, so the SYN is no
// old duplicate (RFC 6191 asks for that).
func (ns *netstack) endTimeWait(b []byte, in inbound) {
	t := header.TCP(b[in.transport:])
	e := ns.endpoint(flowKey{
		proto: protoTCP,
		src:   netip.AddrPortFrom(in.src, t.SourcePort()), dst: netip.AddrPortFrom(in.dst, t.DestinationPort()),
	})
	if e != nil && tcp.EndpointState(e.State()) == tcp.StateTimeWait {
		e.Abort()
		ns.count.timeWaitReused.Add(1)
	}
}

func tcpipAddr(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

func netipAddr(a tcpip.Address) netip.Addr {
	if a.Len() == 4 {
		return netip.AddrFrom4(a.As4())
	}
	return netip.AddrFrom16(a.As16())
}
