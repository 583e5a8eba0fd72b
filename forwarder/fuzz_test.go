// This file feeds the Router with anything at all, from a container and from the network.

package forwarder

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// FuzzForwardContainer forwards any bytes of a container, with any offload facts that internal/tap lets through. What
// arrives at a next hop is from the container's own address.
func FuzzForwardContainer(f *testing.F) {
	for _, ip := range [][]byte{
		udp(containerA, containerC, 100), udp(containerA6, containerC6, 100), udp(containerA, "10.3.0.2", 1400), udp(containerA, "10.1.0.9", 9),
		nettest.Between(containerA, containerB).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(3000)),
		nettest.Between(containerA, outside).ICMP(8, 0, 1, nil), {0x45}, {},
	} {
		f.Add(ip, uint16(0), uint16(0), uint8(0), uint16(0), true)
		f.Add(ip, uint16(20), uint16(6), uint8(3), uint16(50), true)
		f.Add(ip, uint16(20), uint16(16), uint8(1), uint16(500), true)
		f.Add(ip, uint16(40), uint16(16), uint8(2), uint16(500), false)
	}
	g := newRig(f)
	var peers []int
	for _, c := range []*net.UDPConn{g.peer, g.small, g.stock} {
		rc, err := c.SyscallConn()
		if err != nil {
			f.Fatal(err)
		}
		_ = rc.Control(func(fd uintptr) { peers = append(peers, int(fd)) })
	}
	f.Fuzz(func(t *testing.T, ip []byte, start, off uint16, gso uint8, seg uint16, fix bool) {
		if len(ip) == 0 || len(ip) > packet.MaxIP {
			return
		}
		if fix {
			nettest.Fix(ip)
		}
		p := nettest.Packet(ip)
		owe(p, start, off, packet.GSO(gso), seg)
		before := totals(g)
		g.fromA(p)
		if totals(g) == before {
			t.Fatalf("the packet ended nowhere: %x", ip[:min(len(ip), 100)])
		}
		for _, next := range []*nettest.Recorder{g.a.Recorder, g.b.Recorder, g.gw, g.egress} {
			for _, p := range next.Take() {
				src, _ := addrs(p.Bytes())
				if !g.portA.owns(src) && src.String() != gateway && src.String() != gateway6 {
					t.Fatalf("a packet from %v was delivered", src)
				}
			}
		}
		for _, fd := range peers {
			for _, d := range waiting(fd) {
				if len(d) < 20 {
					t.Fatalf("a datagram of %d bytes was sent", len(d))
				}
				if src, _ := addrs(d); !g.portA.owns(src) {
					t.Fatalf("a datagram from %v was sent", src)
				}
			}
		}
	})
}

// owe gives p the offload facts, if internal/tap's readVnetHdr would.
func owe(p *packet.Packet, start, off uint16, gso packet.GSO, seg uint16) {
	ip := p.Bytes()
	proto, l4, ok := packet.Transport(ip)
	if (start == 0 && off == 0) || start < 20 || int(start) < l4 || int(start)+int(off)+2 > len(ip) {
		return
	}
	p.NeedsCsum, p.CsumStart, p.CsumOffset = true, start, off
	if !ok || int(start) != l4 || seg == 0 {
		return
	}
	hdr := l4 + 8
	switch {
	case gso == packet.GSOUDP && proto == packet.UDP && off == 6:
	case ((gso == packet.GSOTCPv4 && ip[0]>>4 == 4) || (gso == packet.GSOTCPv6 && ip[0]>>4 == 6)) && proto == packet.TCP && off == 16 && ip[l4+12]>>4 >= 5:
		hdr = l4 + int(ip[l4+12]>>4)*4
	default:
		return
	}
	if hdr < len(ip) {
		p.GSO, p.HdrLen, p.SegSize = gso, uint16(hdr), seg
	}
}

// totals counts every way a packet can end.
func totals(g *rig) (n uint64) {
	s := g.Stats()
	for _, d := range s.Drops {
		n += d
	}
	n += s.Underlay.SentPackets
	for _, r := range []*nettest.Recorder{g.a.Recorder, g.b.Recorder, g.gw, g.egress} {
		n += uint64(len(r.Packets()))
	}
	return n
}

// FuzzForwardDatagram forwards any datagram train of a peer, cut at any size. What arrives is the peer's own.
func FuzzForwardDatagram(f *testing.F) {
	g := newRig(f)
	// The stock peer's subnet as well: on loopback it has the same address, and may send from any port.
	fuzzDatagrams(f, g, g.peer, "10.2.0.0/16", "fd00:2::/64", "10.4.0.0/16")
}

// FuzzForwardDatagramOver6 is the same of a peer over IPv6.
func FuzzForwardDatagramOver6(f *testing.F) {
	g := newDualRig(f, nil)
	f.Add(udp(over6, containerA, 12), uint16(0), true)
	f.Add(udp(over4, containerA, 12), uint16(0), true)
	f.Add(udp(overStock6v6, containerA6, 12), uint16(0), false)
	f.Add(reply6(7, 100), uint16(0), false)
	fuzzDatagrams(f, g.rig, g.peer6, "10.16.0.0/16", "fd00:2::/64", "10.46.0.0/16", "fd00:46::/64")
}

func fuzzDatagrams(f *testing.F, g *rig, peer *net.UDPConn, prefixes ...string) {
	f.Helper()
	good := udp(containerC, containerA, 12)
	f.Add(good, uint16(0), true)
	f.Add(append(slices.Clone(good), good...), uint16(len(good)), true)
	f.Add(append(slices.Clone(good), good[:30]...), uint16(len(good)), false)
	f.Add(udp(containerC6, containerA6, 12), uint16(0), false)
	f.Add(udp(containerC, "10.1.0.9", 12), uint16(0), true)
	f.Add([]byte{0x45}, uint16(1), true)
	f.Add([]byte{}, uint16(42), true)
	from := addrPort(peer)
	var own []netip.Prefix
	for _, p := range prefixes {
		own = append(own, netip.MustParsePrefix(p))
	}
	f.Fuzz(func(t *testing.T, b []byte, size uint16, fix bool) {
		if len(b) > rxBufLen-packet.Headroom {
			return
		}
		if fix {
			nettest.Fix(b)
		}
		copy(g.loops[0].rxq.bufs[0][packet.Headroom:], b)
		before := totals(g)
		g.arrived(from, len(b), int(size))
		answer := bytes.Contains(b, []byte{probeIdent >> 8, probeIdent & 0xff}) // to a probe: taken out on the way to the gateway
		if counted := totals(g) != before; counted != (len(b) > 0) && !answer {
			t.Fatalf("%d bytes were counted: %v", len(b), counted)
		}
		for _, next := range []*nettest.Recorder{g.a.Recorder, g.b.Recorder, g.gw, g.egress} {
			for _, p := range next.Take() {
				if src, _ := addrs(p.Bytes()); !slices.ContainsFunc(own, func(s netip.Prefix) bool { return s.Contains(src) }) {
					t.Fatalf("a packet from %v was delivered", src)
				}
			}
		}
	})
}
