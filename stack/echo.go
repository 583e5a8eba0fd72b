// This file is egress ping: ICMP echo by the host's unprivileged ICMP datagram sockets, identifiers mapped. No reply is made up.

package stack

import (
	"errors"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// echoHeader is the size in bytes of [type 1][code 1][checksum 2][identifier 2][sequence 2], the same in ICMP and ICMPv6.
const echoHeader = 8

// echoPermission remembers that the lack of permission to ping has been logged.
type echoPermission struct{ once sync.Once }

// acceptEcho takes echo requests, put together from their fragments. False lets gVisor answer for the gateway itself.
func (ns *netstack) acceptEcho(id gstack.TransportEndpointID, pkt *gstack.PacketBuffer) bool {
	h := pkt.TransportHeader().Slice()
	if len(h) < echoHeader {
		return true
	}
	dst := netipAddr(id.LocalAddress)
	proto, socket := protoICMP, unix.IPPROTO_ICMP
	request := uint8(header.ICMPv4Echo)
	if dst.Is6() {
		proto, socket = protoICMPv6, unix.IPPROTO_ICMPV6
		request = uint8(header.ICMPv6EchoRequest)
	}
	if h[0] != request || ns.gw.isOwn(dst) {
		return false
	}
	message := append(append(make([]byte, 0, len(h)+pkt.Data().Size()), h...), pkt.Data().AsRange().ToSlice()...)
	var room [quoteRoom]byte
	d := datagramOf(pkt, message, room[:0])
	key := flowKey{
		proto: proto,
		src:   netip.AddrPortFrom(netipAddr(id.RemoteAddress), id.LocalPort), // gVisor has the identifier there
		dst:   netip.AddrPortFrom(dst, 0),
	}
	if why, ok := ns.gw.refusal(key.src.Addr(), key.dst, key.dst); !ok {
		ns.count.drop(why)
		ns.sendError(adminProhibited, d.quote)
		return true
	}
	if e := ns.flows.find(key); e != nil {
		e.flow.(*datagramFlow).send(d)
		return true
	}
	if err := ns.startDatagrams(key, kindEcho, socket, key.dst, d); err != nil {
		ns.refuseEcho(err, d.quote)
	}
	return true
}

// refuseEcho says that the host does not let us ping, where that is the trouble.
func (ns *netstack) refuseEcho(err error, quote []byte) {
	if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
		ns.count.drop(dropEchoForbidden)
		ns.echo.once.Do(func() {
			ns.gw.log.Warn("containers cannot ping the outside: this host does not let us open ICMP sockets",
				"err", err, "remedy", "sysctl net.ipv4.ping_group_range, so that it includes our group")
		})
	}
	ns.refuseDatagram(err, quote)
}

// sendEcho sends the echo reply b to the container with the identifier that it used. Anything else is not for it.
func (ns *netstack) sendEcho(r *gstack.Route, key flowKey, b []byte) {
	answer := uint8(header.ICMPv4EchoReply)
	if key.dst.Addr().Is6() {
		answer = uint8(header.ICMPv6EchoReply)
	}
	if len(b) < echoHeader || b[0] != answer {
		return
	}
	p := gstack.NewPacketBuffer(gstack.PacketBufferOptions{
		ReserveHeaderBytes: echoHeader + int(r.MaxHeaderLength()),
		Payload:            copied(b[echoHeader:]),
	})
	defer p.DecRef()
	h := p.TransportHeader().Push(echoHeader)
	copy(h, b[:echoHeader])
	icmp := header.ICMPv4(h)
	icmp.SetIdent(key.src.Port())
	icmp.SetChecksum(0)
	sum := checksum.Checksum(b[echoHeader:], 0)
	p.TransportProtocolNumber = header.ICMPv4ProtocolNumber
	if key.dst.Addr().Is6() {
		p.TransportProtocolNumber = header.ICMPv6ProtocolNumber
		sum = checksum.Combine(sum, r.PseudoHeaderChecksum(header.ICMPv6ProtocolNumber, uint16(len(b))))
	}
	icmp.SetChecksum(^checksum.Checksum(h, sum))
	// What the exit queue drops is counted there.
	_ = r.WritePacket(gstack.NetworkHeaderParams{Protocol: p.TransportProtocolNumber, TTL: gatewayTTL}, p)
}
