// This file tests the VXLAN format: its bytes, what is refused, and whose checksums are believed.

package forwarder

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// vtepOf is the MAC address of a test's VTEP.
func vtepOf(n byte) [6]byte { return [6]byte{0x02, 0x11, 0x22, 0x33, 0x44, n} }

// testVXLAN is what a Router under test speaks; it is vtepOf(1).
func testVXLAN() *VXLAN { return &VXLAN{VNI: 1, MAC: vtepOf(1)} }

// framed is ip as a peer sends it to r.
func framed(r *Router, ip []byte) []byte {
	v := r.vxlan
	if v == nil {
		return ip
	}
	return frame(v.VNI, v.MAC, vtepOf(4), ip)
}

// frame is a VXLAN frame with an IP packet.
func frame(vni uint32, to, from [6]byte, ip []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, vni<<8)
	b = append(append(b, to[:]...), from[:]...)
	if len(ip) > 0 && ip[0]>>4 == 6 {
		return append(append(b, 0x86, 0xdd), ip...)
	}
	return append(append(b, 8, 0), ip...)
}

func newVXLANRig(t testing.TB) *rig {
	t.Helper()
	return newRigOn(t, newRouterAsking(t, 1, granted(t), testVXLAN()))
}

// goldenVXLAN is a ping from 10.77.1.0 (VTEP 02:00:0a:4d:01:00) to 10.77.2.0 (VTEP 02:00:0a:4d:02:00).
// Origin: what Linux 6.18 sent, the payload of a UDP datagram, from a device made with
// `ip link add flannel.1 address 02:00:0a:4d:01:00 type vxlan id 1 local 192.0.2.1 dstport 8472 nolearning`, and flannel's
// neighbour, route and forwarding entries.
const goldenVXLAN = "0800000000000100" + "02000a4d0200" + "02000a4d0100" + "0800" +
	"4500002cea164000400139210a4d01000a4d0200" + "0800f7f70007000100000000000000000000000000000000"

// goldenVXLAN6 is a ping from fd77:1:: to fd77:2::, over IPv6. Origin: as goldenVXLAN, from a device made with
// `ip link add flannel-v6.1 address 02:00:0a:4d:01:00 type vxlan id 1 local fd00:99::1 dstport 8472 nolearning`.
const goldenVXLAN6 = "0800000000000100" + "02000a4d0200" + "02000a4d0100" + "86dd" +
	"600022d000183a40" + "fd770001000000000000000000000000" + "fd770002000000000000000000000000" +
	"800010bc73b300018118046b0000000077c6030000000000"

func TestVXLAN_WritesAndReadsWhatTheKernelDoes(t *testing.T) {
	for name, frame := range map[string]string{"IPv4": goldenVXLAN, "IPv6": goldenVXLAN6} {
		t.Run(name, func(t *testing.T) { testGoldenVXLAN(t, frame) })
	}
}

func testGoldenVXLAN(t *testing.T, frame string) {
	t.Helper()
	golden, err := hex.DecodeString(frame)
	if err != nil {
		t.Fatal(err)
	}
	here, there := [6]byte{2, 0, 0x0a, 0x4d, 1, 0}, [6]byte{2, 0, 0x0a, 0x4d, 2, 0}
	ip := golden[vxlanEncap:]
	if err := nettest.Check(ip); err != nil {
		t.Fatal(err)
	}

	sender := &VXLAN{VNI: 1, MAC: here}
	to := &peer{headers: sender.headers(there)}
	p := nettest.Packet(ip)
	got := p.Buf[p.Off-sender.Encap():]
	to.encapsulate(got[:sender.Encap()], ip[0])
	if !bytes.Equal(got, golden) {
		t.Errorf("we write\n%x, the kernel\n%x", got, golden)
	}

	receiver := &VXLAN{VNI: 1, MAC: there}
	q, why := receiver.decapsulate(golden, 0)
	if why != dropNone || !bytes.Equal(q.Bytes(), ip) || q.Off != vxlanEncap || q.Verified {
		t.Errorf("we read %+v, %s", q, dropNames[why])
	}
}

func TestVXLAN_RefusesOtherFrames(t *testing.T) {
	ip, ip6 := udp(containerC, containerA, 30), udp(containerC6, containerA6, 30)
	good := func() []byte { return frame(0xabcdef, vtepOf(1), vtepOf(4), ip) }
	with := func(at int, value byte) []byte { b := good(); b[at] = value; return b }
	arp := append(frame(0xabcdef, [6]byte{255, 255, 255, 255, 255, 255}, vtepOf(4), nil), make([]byte, 28)...)
	arp[20], arp[21] = 8, 6
	for name, c := range map[string]struct {
		d    []byte
		gbp  bool
		want string // a drop reason, or empty: taken
	}{
		"good":                          {d: good()},
		"IPv6":                          {d: frame(0xabcdef, vtepOf(1), vtepOf(4), ip6)},
		"from anybody":                  {d: frame(0xabcdef, vtepOf(1), [6]byte{}, ip)},
		"empty":                         {d: nil, want: "vxlan-bad-header"},
		"cut in its header":             {d: good()[:7], want: "vxlan-bad-header"},
		"cut before its packet":         {d: good()[:22], want: "vxlan-bad-header"},
		"a bare packet":                 {d: ip, want: "vxlan-bad-header"},
		"without its flag":              {d: with(0, 0), want: "vxlan-bad-header"},
		"another flag":                  {d: with(0, 0x0c), want: "vxlan-bad-header"},
		"reserved bits, first":          {d: with(1, 1), want: "vxlan-bad-header"},
		"reserved bits, third":          {d: with(3, 0x80), want: "vxlan-bad-header"},
		"reserved byte at the end":      {d: with(7, 1), want: "vxlan-bad-header"},
		"a policy":                      {d: with(0, 0x88), want: "vxlan-bad-header"},
		"a policy where there are some": {d: append([]byte{0x88, 0x48, 7, 9}, good()[4:]...), gbp: true},
		"none where there are some":     {d: good(), gbp: true},
		"flags where there are some":    {d: with(0, 0x8c), gbp: true, want: "vxlan-bad-header"},
		"VNI, high":                     {d: with(4, 0xaa), want: "vxlan-other-vni"},
		"VNI, low":                      {d: with(6, 0xee), want: "vxlan-other-vni"},
		"to another VTEP":               {d: with(13, 9), want: "vxlan-foreign-mac"},
		"to all VTEPs":                  {d: frame(0xabcdef, [6]byte{255, 255, 255, 255, 255, 255}, vtepOf(4), ip), want: "vxlan-foreign-mac"},
		"ARP":                           {d: arp, want: "vxlan-not-ip"},
		"a VLAN":                        {d: with(20, 0x81), want: "vxlan-not-ip"},
		"IPv6 called IPv4":              {d: append(good()[:22], ip6...), want: "malformed"},
		"IPv4 called IPv6":              {d: append(frame(0xabcdef, vtepOf(1), vtepOf(4), ip6)[:22], ip...), want: "malformed"},
	} {
		v := &VXLAN{VNI: 0xabcdef, MAC: vtepOf(1), GBP: c.gbp}
		buf := append(make([]byte, 10), c.d...)
		p, why := v.decapsulate(buf, 10)
		if dropNames[why] != c.want {
			t.Errorf("%s: %q, want %q", name, dropNames[why], c.want)
		}
		if why == dropNone && !bytes.Equal(p.Bytes(), c.d[22:]) {
			t.Errorf("%s: the packet is %x", name, p.Bytes())
		}
	}
}

func FuzzDecapsulateVXLAN(f *testing.F) {
	for _, ip := range [][]byte{udp(containerC, containerA, 30), udp(containerC6, containerA6, 30), nil} {
		d := frame(1, vtepOf(1), vtepOf(4), ip)
		f.Add(d, false)
		d[0], d[3] = 0x88, 7
		f.Add(d, true)
	}
	f.Add([]byte{8}, false)
	f.Fuzz(func(t *testing.T, d []byte, gbp bool) {
		v := testVXLAN()
		v.GBP = gbp
		_ = v.isSuperpacket(d)
		p, why := v.decapsulate(slices.Clone(d), 0)
		if why != dropNone {
			if dropNames[why] == "" {
				t.Fatalf("dropped for no reason: %d", why)
			}
			return
		}
		// What is taken is what we would send, but for the sender and the policy.
		to := &peer{headers: (&VXLAN{VNI: v.VNI, MAC: [6]byte(d[vxlanSrcAt:])}).headers(v.MAC)}
		again := slices.Clone(d)
		to.encapsulate(again[:vxlanEncap], p.Bytes()[0])
		if gbp {
			copy(again, d[:4])
		}
		if !bytes.Equal(again, d) {
			t.Fatalf("took\n%x, which is\n%x", d, again)
		}
	})
}

func TestVXLAN_SendsFramesToThePeersVTEP(t *testing.T) {
	h, h6 := nettest.Between(containerA, containerC), nettest.Between(containerA6, containerC6)
	owed := func(ip []byte) *packet.Packet { p := nettest.Packet(ip); nettest.Owe(p); return p }
	ack := nettest.TCP{Flags: nettest.ACK}
	for name, p := range map[string]*packet.Packet{
		"small":             pkt(udp(containerA, containerC, 10)),
		"large":             pkt(udp(containerA, containerC, 1400)),
		"small, IPv6":       pkt(udp(containerA6, containerC6, 10)),
		"owes its checksum": owed(h.UDP(nettest.UDP{}, nettest.Payload(700))),
		"superpacket":       nettest.Super(h.TCP(ack, nettest.Payload(44*1398)), 1398),
		"superpacket, IPv6": nettest.Super(h6.TCP(ack, nettest.Payload(9000)), 1378),
		"small segments":    nettest.Super(h.UDP(nettest.UDP{}, nettest.Payload(2000)), 100),
		"more than a train": nettest.Super(h.TCP(ack, nettest.Payload(45*1398)), 1398),
		"longest headers":   nettest.Super(longHeaders(h).TCP(nettest.TCP{Flags: nettest.ACK, Options: bytes.Repeat([]byte{1}, 40)}, nettest.Payload(9000)), 1300),
	} {
		t.Run(name, func(t *testing.T) {
			for _, partial := range []bool{false, true} {
				g := newVXLANRig(t)
				cfg := g.peerCfg
				cfg.PartialChecksums = partial
				for i, r := range g.table.Routes {
					if r.Hop == ToPeer(g.peerCfg) {
						g.table.Routes[i].Hop = ToPeer(cfg)
					}
				}
				g.set(g.table)
				sent := *p
				sent.Buf = bytes.Clone(p.Buf)
				var want [][]byte
				for _, ip := range nettest.Segment(&sent) {
					want = append(want, hop1(ip))
				}
				g.fromA(&sent)
				got := datagrams(t, g.peer)
				if len(got) != len(want) {
					t.Fatalf("%d datagrams, want %d (drops %v)", len(got), len(want), g.drops())
				}
				inner := uint64(0)
				for i, d := range got {
					if header := frame(1, vtepOf(2), vtepOf(1), want[i])[:22]; !bytes.Equal(d[:22], header) {
						t.Fatalf("datagram %d begins with %x, want %x", i, d[:22], header)
					}
					ip := d[22:]
					inner += uint64(len(ip))
					if partial {
						q := packet.Packet{Buf: ip, Verified: true}
						q.MarkPartial()
						ip = nettest.Finish(&q)
					}
					if !bytes.Equal(ip, want[i]) {
						t.Fatalf("partial %v, datagram %d\n%x, want\n%x", partial, i, ip, want[i])
					}
				}
				s := g.Stats()
				if ps := s.Peers[g.peerCfg.Addr]; ps.SentBytes != inner || s.Underlay.SentBytes != inner || ps.SentPackets != uint64(len(got)) {
					t.Errorf("%+v, %+v: want %d bytes of inner packets", ps, s.Underlay, inner)
				}
				g.wantDrops(nil)
			}
		})
	}
}

func longHeaders(h nettest.IP) nettest.IP {
	h.Options = bytes.Repeat([]byte{1}, 40)
	return h
}

func TestVXLAN_SendsTrains(t *testing.T) {
	g := newVXLANRig(t)
	needGSO(t, g)
	ack := nettest.TCP{Flags: nettest.ACK}
	const fits = MaxTrain / (1450 + vxlanEncap)
	g.fromA(nettest.Super(nettest.Between(containerA, containerC).TCP(ack, nettest.Payload(fits*1410)), 1410))
	if s := g.Stats().Underlay; s.SendCalls != 1 || s.SentTrains != 1 || s.SentPackets != fits {
		t.Errorf("a superpacket: %d calls, %d trains, %d packets; want 1, 1, %d", s.SendCalls, s.SentTrains, s.SentPackets, fits)
	}
	before := g.Stats().Underlay.SentTrains
	var pkts []*packet.Packet
	for range 64 {
		pkts = append(pkts, pkt(udp(containerA, containerC, 64)))
	}
	g.fromA(pkts...)
	if got := g.Stats().Underlay.SentTrains - before; got != 1 {
		t.Errorf("64 small packets: %d trains", got)
	}
	g.wantDrops(nil)
}

// receiveFrom makes the Router read one datagram of d from c.
func (g *rig) receiveFrom(c *net.UDPConn, d []byte) {
	g.t.Helper()
	if _, err := c.WriteToUDPAddrPort(d, g.Underlay()); err != nil {
		g.t.Fatal(err)
	}
	g.receive(1)
}

// withoutChecksums turns a socket's UDP checksums off, as flannel's VXLAN device may have them.
func withoutChecksums(t testing.TB, c *net.UDPConn) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil {
			t.Fatal(err)
		}
	})
}

func TestVXLAN_BelievesChecksumsThatSomethingHasChecked(t *testing.T) {
	const stock = "10.4.0.2"
	h := nettest.Between(stock, containerA)
	tcp := h.TCP(nettest.TCP{SrcPort: 1, Seq: 9, Flags: nettest.ACK}, nettest.Payload(500))
	u := h.UDP(nettest.UDP{SrcPort: 1}, nettest.Payload(501))
	owed := func(ip []byte) []byte { p := nettest.Packet(ip); nettest.Owe(p); return p.Bytes() }
	broken := func(ip []byte) []byte { b := bytes.Clone(ip); b[len(b)-1] ^= 1; return b }
	short := bytes.Clone(u)
	short[25]-- // the datagram ends before its packet
	for name, c := range map[string]struct {
		ip       []byte
		verified bool
	}{
		"TCP":                      {tcp, true},
		"UDP":                      {u, true},
		"TCP that owes its sum":    {owed(tcp), true},
		"UDP that owes its sum":    {owed(u), true},
		"damaged TCP":              {broken(tcp), false},
		"damaged UDP":              {broken(u), false},
		"UDP without a checksum":   {h.UDP(nettest.UDP{NoChecksum: true}, nettest.Payload(50)), false},
		"UDP of another length":    {short, false},
		"ICMP":                     {h.ICMP(8, 0, 1, nettest.Payload(50)), false},
		"a fragment":               {withFrag(h, 100).UDP(nettest.UDP{}, nettest.Payload(64)), false},
		"TCP cut short":            {h.Raw(packet.TCP, make([]byte, 19)), false},
		"UDP cut short":            {h.Raw(packet.UDP, make([]byte, 7)), false},
		"a TCP header of no words": {h.Raw(packet.TCP, make([]byte, 20)), false},
	} {
		t.Run(name, func(t *testing.T) {
			g := newVXLANRig(t)
			withoutChecksums(t, g.stock)
			g.receiveFrom(g.stock, framed(g.Router, c.ip))
			got := g.a.Take()
			if c.verified {
				whole := hop1(c.ip)
				one(t, "container a", got, whole)
				if !got[0].Verified || got[0].NeedsCsum || got[0].GSO != packet.GSONone {
					t.Fatalf("%+v", got[0])
				}
				got[0].MarkPartial() // as its TAP will
				if err := nettest.Check(nettest.Finish(&got[0])); err != nil {
					t.Error(err)
				}
				return
			}
			if len(got) != 1 || got[0].Verified || got[0].NeedsCsum {
				t.Errorf("%+v", got)
			}
		})
	}
	t.Run("our own nodes' without a look", func(t *testing.T) {
		g := newVXLANRig(t)
		ip := owed(nettest.Between(containerC, containerA).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(50)))
		g.receiveFrom(g.peer, frame(1, vtepOf(1), vtepOf(2), ip))
		got := g.a.Take()
		one(t, "container a", got, hop1(ip))
		if !got[0].Verified {
			t.Error("not believed")
		}
	})
}

func TestVXLAN_TakesTheSuperpacketsOfAKernel(t *testing.T) {
	const stock = "10.4.0.2"
	h := nettest.Between(stock, containerA)
	for name, c := range map[string]struct {
		super *packet.Packet
		size  int // that comes with the datagram
		seg   int // payload of each segment
	}{
		"TCP":           {nettest.Super(h.TCP(nettest.TCP{Flags: nettest.ACK | nettest.PSH | nettest.CWR, Seq: 5}, nettest.Payload(60000)), peerMTU-40), 0, peerMTU - 40},
		"TCP, just one": {nettest.Super(h.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(peerMTU-39)), peerMTU-40), 0, peerMTU - 40},
		"UDP":           {nettest.Super(h.UDP(nettest.UDP{}, nettest.Payload(20*1000+7)), 1000), 1000, 1000},
	} {
		t.Run(name, func(t *testing.T) {
			g := newVXLANRig(t)
			want := nettest.Segment(c.super)
			l := g.loops[0]
			q := l.rxq
			n := copy(q.bufs[0][q.begin:], framed(g.Router, c.super.Bytes()))
			g.arrived(addrPort(g.stock), n, c.size)
			got := g.a.Take()
			if len(got) != 1 {
				t.Fatalf("%d packets (drops %v)", len(got), g.drops())
			}
			p := got[0]
			if p.GSO != c.super.GSO || int(p.SegSize) != c.seg || p.HdrLen != c.super.HdrLen || p.ECN != c.super.ECN || !p.NeedsCsum ||
				p.CsumStart != c.super.CsumStart || p.CsumOffset != c.super.CsumOffset {
				t.Errorf("%+v, want %+v", p, *c.super)
			}
			for i, seg := range nettest.Segment(&p) {
				if !bytes.Equal(seg, hop1(want[i])) {
					t.Fatalf("segment %d differs", i)
				}
			}
			if s := g.Stats(); s.Underlay.RecvPackets != 1 || s.Underlay.RecvBytes != uint64(n-vxlanEncap) {
				t.Errorf("%+v", s.Underlay)
			}
			g.wantDrops(nil)
		})
	}
}

func TestVXLAN_SplitsTrains(t *testing.T) {
	g := newVXLANRig(t)
	needGSO(t, g)
	if !g.Stats().Underlay.GRO {
		t.Skip("this kernel has no UDP_GRO")
	}
	var want [][]byte
	var train []byte
	for i := range 20 {
		h := nettest.Between(containerC, containerA)
		h.ID = uint16(i)
		n := 1000
		if i == 19 {
			n = 300
		}
		ip := h.UDP(nettest.UDP{SrcPort: uint16(i)}, nettest.Payload(n))
		want, train = append(want, hop1(ip)), append(train, frame(1, vtepOf(1), vtepOf(2), ip)...)
	}
	train[5*(1028+22)+6] = 2 // one of another network in between
	want = slices.Delete(want, 5, 6)
	sendTrain(t, g.peer, g.Underlay(), train, 1028+22)
	g.receive(1)
	got := g.a.Packets()
	if len(got) != len(want) {
		t.Fatalf("%d packets, want %d (drops %v)", len(got), len(want), g.drops())
	}
	for i := range got {
		if !bytes.Equal(got[i].Bytes(), want[i]) || !got[i].Verified {
			t.Fatalf("packet %d is not the one that was sent", i)
		}
	}
	if got[0].Off != packet.Headroom {
		t.Errorf("the first packet has %d bytes of headroom", got[0].Off)
	}
	g.wantDrops(map[string]uint64{"vxlan-other-vni": 1})
}

func TestVXLAN_TakesTheLargestDatagram(t *testing.T) {
	g := newVXLANRig(t)
	ip := udp(containerC, containerA, MaxTrain-28-vxlanEncap)
	g.receiveFrom(g.peer, frame(1, vtepOf(1), vtepOf(2), ip))
	one(t, "container a", g.a.Take(), hop1(ip))
}

// A kernel chooses the source port by the flow; one of our nodes sends from the port in its lease, and what comes from
// another, such as a container's own datagram through its node's gateway, is not the node's.
func TestVXLAN_TakesAnyPortOfAKernelAlone(t *testing.T) {
	g := newVXLANRig(t)
	other := udpSocket(t)
	host := udp("10.4.0.0", containerA, 10) // a flannel host's own processes
	g.receiveFrom(other, framed(g.Router, host))
	one(t, "container a", g.a.Take(), hop1(host))
	g.receiveFrom(other, framed(g.Router, udp(containerC, containerA, 10)))
	g.wantDrops(map[string]uint64{"spoofed-by-peer": 1})
}

func TestVXLAN_AnswersErrorsInFrames(t *testing.T) {
	g := newVXLANRig(t)
	g.receiveFrom(g.peer, frame(1, vtepOf(1), vtepOf(2), udp(containerC, "10.1.0.77", 10)))
	got := datagrams(t, g.peer)
	if len(got) != 1 || !bytes.Equal(got[0][:20], frame(1, vtepOf(2), vtepOf(1), nil)[:20]) || nettest.Check(got[0][22:]) != nil || got[0][22+20] != 3 {
		t.Errorf("%x", got)
	}
}

func TestVXLAN_ProbesAreFrames(t *testing.T) {
	g := newVXLANRig(t)
	for _, size := range []int{MinProbe, 1450, MaxTrain - vxlanEncap} {
		p := Probe{Peer: g.peerCfg.Addr, VTEP: g.peerCfg.VTEP, Src: netip.MustParseAddr(gateway), Dst: netip.MustParseAddr("10.2.0.1"), Token: 7, Size: size}
		if err := g.SendProbe(p); err != nil {
			t.Fatal(err)
		}
		d := datagrams(t, g.peer)
		if len(d) != 1 || len(d[0]) != size+22 || !bytes.Equal(d[0][:22], frame(1, vtepOf(2), vtepOf(1), []byte{0x45})[:22]) {
			t.Fatalf("%d datagrams", len(d))
		}
		if err := nettest.Check(d[0][22:]); err != nil {
			t.Error(err)
		}
	}
	if g.SendProbe(Probe{Peer: g.peerCfg.Addr, VTEP: g.peerCfg.VTEP, Size: MaxTrain - vxlanEncap + 1}) == nil {
		t.Error("a probe was sent that no datagram holds")
	}
	if lo, err := net.InterfaceByName("lo"); err == nil {
		if got, want := g.KernelMTU(g.peerCfg.Addr), min(lo.MTU-50, MaxTrain-22); got != want {
			t.Errorf("the kernel's MTU is %d, want %d", got, want)
		}
	}
	if g.Overhead(g.peerCfg.Addr.Addr()) != 50 || newRig(t).Overhead(g.peerCfg.Addr.Addr()) != 28 {
		t.Error("another overhead")
	}
}

func TestVXLAN_TrainsForAPeerThatSteersAreForOneContainer(t *testing.T) {
	g := newVXLANRig(t)
	needGSO(t, g)
	for i, r := range g.table.Routes {
		if r.Hop == ToPeer(g.peerCfg) {
			g.table.Routes[i].Hop.peer.Steers = true
		}
	}
	g.set(g.table)
	g.fromA(pkt(udp(containerA, containerC, 100)), pkt(udp(containerA, containerC, 100)), pkt(udp(containerA, "10.2.0.3", 100)))
	if got := g.Stats().Underlay.SentTrains; got != 2 {
		t.Errorf("%d trains, want 2", got)
	}
}

func TestVXLAN_FlowsComeOutOfLanesInOrder(t *testing.T) {
	r := newLanes(t, 1, testVXLAN())
	q := r.loops[0].rxq
	for i := range uint32(4) {
		ip := nettest.Between(containerC, containerA).TCP(nettest.TCP{Seq: (4 - i) << stripeShift, Flags: nettest.ACK}, nettest.Payload(8))
		q.msgs[i].Len = uint32(copy(q.bufs[i][q.begin:], framed(r, ip)))
	}
	q.msgs[4].Len = 30
	q.inOrderOfArrival(5)
	q.sort(5)
	if want := []uint8{3, 2, 1, 0, 4}; !slices.Equal(q.order[:5], want) {
		t.Errorf("order %v, want %v", q.order[:5], want)
	}
}

func TestVXLAN_AllocatesNothing(t *testing.T) {
	g := newVXLANRig(t)
	p := &path{rig: g, w: g.loops[0].worker, in: ingress{kind: fromContainer, port: g.portA}, discard: new(nettest.Discard)}
	g.portA.cfg.Device = sink{nettest.NewDevice(t), p.discard}
	for name, orig := range traffic() {
		if name == "tso" || name == "tso6" || name == "uso" || name == "small" {
			pkts := copies(orig)
			for range 5 {
				p.batch(orig, pkts)
			}
			if n := testing.AllocsPerRun(50, func() { p.batch(orig, pkts) }); n != 0 {
				t.Errorf("sending %s: %v allocations a batch", name, n)
			}
		}
	}
	h := nettest.Between("10.4.0.2", containerA)
	for name, c := range map[string]struct {
		frames []byte
		size   int
	}{
		"a train":       {bytes.Repeat(framed(g.Router, h.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(1000))), 20), 1062},
		"a superpacket": {framed(g.Router, h.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(60000))), 0},
		"other frames":  {bytes.Repeat(frame(2, vtepOf(1), vtepOf(4), nil), 20), 22},
	} {
		q := g.loops[0].rxq
		receive := func() {
			copy(q.bufs[0][q.begin:], c.frames)
			g.arrived(addrPort(g.stock), len(c.frames), c.size)
		}
		for range 5 {
			receive()
		}
		control := testing.AllocsPerRun(50, func() { addrPort(g.stock) })
		if n := testing.AllocsPerRun(50, receive); n > control {
			t.Errorf("receiving %s: %v allocations, %v of them of the test", name, n, control)
		}
	}
}

func TestVXLAN_FollowsAPeersNewVTEP(t *testing.T) {
	g := newVXLANRig(t)
	for i, r := range g.table.Routes {
		if r.Hop == ToPeer(g.peerCfg) {
			g.table.Routes[i].Hop.peer.VTEP = vtepOf(9)
		}
	}
	g.set(g.table)
	g.fromA(pkt(udp(containerA, containerC, 100)))
	if d := datagrams(t, g.peer); len(d) != 1 || [6]byte(d[0][8:]) != vtepOf(9) {
		t.Errorf("%x", d)
	}
}

func TestVXLAN_RefusesNonsense(t *testing.T) {
	for name, v := range map[string]*VXLAN{
		"VNI": {VNI: MaxVNI + 1, MAC: vtepOf(1)}, "without an address": {VNI: 1}, "multicast": {VNI: 1, MAC: [6]byte{1, 0, 0, 0, 0, 1}},
	} {
		r, err := NewRouter(Config{Log: slog.New(slog.DiscardHandler), Loops: 1, Underlay: UnderlayConfig{Addr: netip.MustParseAddrPort("127.0.0.1:0"), VXLAN: v}})
		if err == nil {
			r.Close()
			t.Errorf("%s: taken", name)
		}
	}
	g := newVXLANRig(t)
	err := g.SetTable(TableConfig{Routes: []Route{{netip.MustParsePrefix("10.9.0.0/16"), ToPeer(PeerConfig{Addr: g.peerCfg.Addr, MTU: 1450})}}})
	if err == nil || !strings.Contains(err.Error(), "MAC") {
		t.Errorf("a peer without an address: %v", err)
	}
	_, err = NewRouter(Config{Log: slog.New(slog.DiscardHandler), Loops: 1, Underlay: UnderlayConfig{Addr: g.Underlay(), VXLAN: testVXLAN()}})
	if err == nil || !strings.Contains(err.Error(), "flannel") || !strings.Contains(err.Error(), "--port") {
		t.Errorf("a port that is taken: %v", err)
	}
}
