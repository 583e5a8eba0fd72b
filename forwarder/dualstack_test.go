// This file tests the underlay with IPv6 beside IPv4: sockets of both on one port, and packets of either family over either.

package forwarder

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Containers of peers in a dualRig, by the family of the packets inside and then that of the underlay.
const (
	over4, over6 = containerC, "10.16.0.2"
	over4v6      = "fd00:14::2"
	over6v6      = containerC6
	overStock6   = "10.46.0.2"
	overStock6v6 = "fd00:46::2"
)

// dualRig is a rig whose underlay has both families, with two peers more.
type dualRig struct {
	*rig
	peer6, stock6       *net.UDPConn // 10.16/16 and fd00:2::/64; 10.46/16 and fd00:46::/64, from any port
	peer6Cfg, stock6Cfg PeerConfig
}

// newDualRouter's Router asks for so much receive buffer; 0 is what this machine grants.
func newDualRouter(t testing.TB, loops, receiveBuffer int, v *VXLAN) *Router {
	t.Helper()
	if c, err := net.ListenUDP("udp6", &net.UDPAddr{IP: net.IPv6loopback}); err != nil {
		t.Skip("this host has no IPv6: ", err)
	} else {
		c.Close()
	}
	if receiveBuffer == 0 {
		receiveBuffer = granted(t)
	}
	return newRouterOn(t, loops, UnderlayConfig{Addr6: netip.IPv6Loopback(), ReceiveBuffer: receiveBuffer, VXLAN: v})
}

func newDualRig(t testing.TB, v *VXLAN) *dualRig {
	t.Helper()
	return newDualRigOn(t, newDualRouter(t, 1, 0, v))
}

func newDualRigOn(t testing.TB, r *Router) *dualRig {
	t.Helper()
	g := &dualRig{rig: newRigOn(t, r), peer6: udpSocketOn(t, outer6), stock6: udpSocketOn(t, outer6)}
	g.peer6Cfg = PeerConfig{Addr: addrPort(g.peer6), MTU: peerMTU}
	g.stock6Cfg = PeerConfig{Addr: addrPort(g.stock6), MTU: peerMTU, AnyPort: true}
	if r.vxlan != nil {
		g.peer6Cfg.VTEP, g.stock6Cfg.VTEP = vtepOf(2), vtepOf(4) // flannel's peers have one for each family; ours the same
		g.peer6Cfg.OuterChecksums = true
	}
	to := netip.MustParsePrefix
	g.table.Routes = append(g.table.Routes,
		Route{to("10.16.0.0/16"), ToPeer(g.peer6Cfg)}, Route{to("fd00:2::/64"), ToPeer(g.peer6Cfg)},
		Route{to("10.46.0.0/16"), ToPeer(g.stock6Cfg)}, Route{to("fd00:46::/64"), ToPeer(g.stock6Cfg)},
		Route{to("fd00:14::/64"), ToPeer(g.peerCfg)}, Route{to(gateway6 + "/128"), ToGateway(g.gw)})
	g.set(g.table)
	return g
}

// own is the address of container a of the family of addr.
func own(addr string) string {
	if strings.Contains(addr, ":") {
		return containerA6
	}
	return containerA
}

// dualPaths are a container of a peer for each family inside and outside.
var dualPaths = map[string]struct {
	addr string
	f    family // of the underlay
}{
	"IPv4 over IPv4": {over4, outer4}, "IPv4 over IPv6": {over6, outer6},
	"IPv6 over IPv4": {over4v6, outer4}, "IPv6 over IPv6": {over6v6, outer6},
}

// on returns the peer of a family, and where it sends to.
func (g *dualRig) on(f family) (peer *net.UDPConn, to netip.AddrPort) {
	if f == outer6 {
		return g.peer6, g.Underlay6()
	}
	return g.peer, g.Underlay()
}

func TestDualStack_HasOnePortForBothFamilies(t *testing.T) {
	for _, loops := range []int{1, 3} {
		for _, buffer := range []int{0, manyLanes} {
			r := newDualRouter(t, loops, buffer, nil)
			if r.Underlay6().Addr() != netip.IPv6Loopback() || r.Underlay6().Port() != r.Underlay().Port() || r.Underlay().Port() == 0 {
				t.Errorf("%v and %v", r.Underlay(), r.Underlay6())
			}
			u := r.under.Load()
			if len(u[outer4].fds) != len(u[outer6].fds) || u[outer4].lanes != u[outer6].lanes || u[outer4].gso != u[outer6].gso || u[outer4].gro != u[outer6].gro {
				t.Errorf("%+v and %+v", u[outer4], u[outer6])
			}
			s := r.Stats().Underlay
			if s.Families != 2 || s.GSO != u[outer4].gso || s.GRO != u[outer4].gro {
				t.Errorf("%+v", s)
			}
		}
	}
	r := newRouter(t, 1)
	if r.Underlay6().IsValid() || r.Stats().Underlay.Families != 1 {
		t.Errorf("a Router of IPv4 alone has %v", r.Underlay6())
	}
}

func TestDualStack_SetsUpItsSockets(t *testing.T) {
	r := newDualRouter(t, 2, 0, nil)
	for _, fd := range r.under.Load()[outer6].fds {
		for name, c := range map[string]struct{ level, option, want int }{
			"IPV6_V6ONLY":       {unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1},
			"IPV6_MTU_DISCOVER": {unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE},
			// Packets from the underlay are called verified because the outer UDP checksum covers them.
			"UDP_NO_CHECK6_TX": {unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_TX, 0},
			"UDP_NO_CHECK6_RX": {unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX, 0},
		} {
			if v, err := unix.GetsockoptInt(fd, c.level, c.option); err != nil || v != c.want {
				t.Errorf("%s is %d, %v; want %d", name, v, err, c.want)
			}
		}
		if receiveBuffer(fd) != r.ReceiveBuffer() {
			t.Errorf("a receive buffer of %d, want %d", receiveBuffer(fd), r.ReceiveBuffer())
		}
	}
}

func TestDualStack_SaysWhyItCannotListen(t *testing.T) {
	newDualRouter(t, 1, 0, nil)
	taken := addrPort(udpSocketOn(t, outer6))
	for name, c := range map[string]struct {
		port  uint16
		addr6 string
		want  []string
	}{
		"port taken":       {taken.Port(), "::1", []string{fmt.Sprint(taken.Port()), "on ::1", "taken", "--port"}},
		"not our address":  {0, "2001:db8::1", []string{"2001:db8::1", "tentative", "--iface"}},
		"IPv4":             {0, "127.0.0.1", []string{"127.0.0.1", "not an IPv6 address"}},
		"IPv4 in IPv6":     {0, "::ffff:127.0.0.1", []string{"127.0.0.1", "not an IPv6 address"}},
		"link-local":       {0, "fe80::1", []string{"fe80::1", "reached"}},
		"of one interface": {0, "fd00::1%lo", []string{"fd00::1%lo", "reached"}},
	} {
		for _, loops := range []int{1, 3} {
			t.Run(fmt.Sprint(name, loops), func(t *testing.T) {
				refusesRouter(t, loops, UnderlayConfig{
					Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), c.port), Addr6: netip.MustParseAddr(c.addr6),
				}, c.want)
			})
		}
	}
}

func TestSockaddr_IsWhatTheKernelReads(t *testing.T) {
	for text, want := range map[string][]byte{
		"192.0.2.1:8472":          {unix.AF_INET, 0, 0x21, 0x18, 192, 0, 2, 1},
		"[2001:db8::1]:8472":      {unix.AF_INET6, 0, 0x21, 0x18, 0, 0, 0, 0, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
		"[::ffff:192.0.2.1]:8472": {unix.AF_INET6, 0, 0x21, 0x18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1},
	} {
		a := netip.MustParseAddrPort(text)
		s := sockaddrOf(a)
		binary.NativeEndian.PutUint16(want, uint16(want[0]))
		var got bytes.Buffer
		if err := binary.Write(&got, binary.NativeEndian, s.RawSockaddrInet6); err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(got.Bytes(), want) {
			t.Errorf("%v became %x", a, got.Bytes())
		}
		if back := s.addrPort(); back != a {
			t.Errorf("%v came back as %v", a, back)
		}
	}
}

func TestDualStack_CarriesEitherFamilyOverEither(t *testing.T) {
	for _, v := range []*VXLAN{nil, testVXLAN()} {
		for name, c := range dualPaths {
			t.Run(fmt.Sprintf("%s, encapsulation %d", name, v.Encap()), func(t *testing.T) {
				g := newDualRig(t, v)
				peer, to := g.on(c.f)
				there, back := udp(own(c.addr), c.addr, 100), udp(c.addr, own(c.addr), 200)
				framed := func(ip []byte, to, from byte) []byte {
					if v == nil {
						return ip
					}
					return frame(1, vtepOf(to), vtepOf(from), ip)
				}
				g.fromA(pkt(there), pkt(there))
				want := framed(hop1(there), 2, 1)
				if d := datagrams(t, peer); len(d) != 2 || !bytes.Equal(d[0], want) || !bytes.Equal(d[1], want) {
					t.Fatalf("the peer got %x, want %x", d, want)
				}
				if _, err := peer.WriteToUDPAddrPort(framed(back, 1, 2), to); err != nil {
					t.Fatal(err)
				}
				g.receiveOn(c.f, 1)
				got := g.a.Take()
				one(t, "container a", got, hop1(back))
				if !got[0].Verified {
					t.Error("not verified")
				}
				g.wantDrops(nil)
				s := g.Stats()
				if s.Underlay.SentPackets != 2 || s.Underlay.SentBytes != 2*uint64(len(there)) || s.Underlay.RecvPackets != 1 || s.Underlay.RecvBytes != uint64(len(back)) {
					t.Errorf("%+v", s.Underlay)
				}
				if p := s.Peers[addrPort(peer)]; p != (PeerStats{2, 2 * uint64(len(there)), 1, uint64(len(back))}) {
					t.Errorf("%+v", p)
				}
			})
		}
	}
}

// What a container sends in one batch to peers of both families leaves in one call for each.
func TestDualStack_SendsABatchToBothFamilies(t *testing.T) {
	g := newDualRig(t, nil)
	g.fromA(pkt(udp(containerA, over4, 10)), pkt(udp(containerA, over6, 10)), pkt(udp(containerA6, over4v6, 10)), pkt(udp(containerA6, over6v6, 10)))
	if s := g.Stats().Underlay; s.SendCalls != 2 || s.SentPackets != 4 {
		t.Errorf("%+v", s)
	}
	if n, m := len(datagrams(t, g.peer)), len(datagrams(t, g.peer6)); n != 2 || m != 2 {
		t.Errorf("%d and %d datagrams", n, m)
	}
	inj := g.NewInjector()
	inj.Forward([]*packet.Packet{pkt(udp(gateway6, over6v6, 10)), pkt(udp(gateway, over4, 10))})
	if n, m := len(datagrams(t, g.peer)), len(datagrams(t, g.peer6)); n != 1 || m != 1 {
		t.Errorf("%d and %d datagrams of the gateway", n, m)
	}
}

func TestDualStack_SendsSuperpacketsAsTrains(t *testing.T) {
	for _, v := range []*VXLAN{nil, testVXLAN()} {
		g := newDualRig(t, v)
		needGSO(t, g.rig)
		const n = 45 // segments, as long as they can be for a train to hold them
		size := MaxTrain/n - v.Encap() - 60
		super := nettest.Super(nettest.Between(containerA6, over6v6).TCP(nettest.TCP{Flags: nettest.ACK | nettest.PSH}, nettest.Payload(n*size)), size)
		super.Bytes()[7]-- // the hop that it makes
		want := nettest.Segment(super)
		super.Bytes()[7]++
		g.fromA(super)
		if s := g.Stats().Underlay; s.SendCalls != 1 || s.SentTrains != 1 || s.SentPackets != n {
			t.Errorf("%d calls, %d trains, %d packets; want 1, 1, %d (drops %v)", s.SendCalls, s.SentTrains, s.SentPackets, n, g.drops())
		}
		got := datagrams(t, g.peer6)
		if len(got) != len(want) {
			t.Fatalf("%d datagrams, want %d", len(got), len(want))
		}
		for i := range got {
			if ip := got[i][v.Encap():]; nettest.Check(ip) != nil || !bytes.Equal(ip, want[i]) {
				t.Fatalf("segment %d differs", i)
			}
		}
	}
}

func TestDualStack_SplitsTrains(t *testing.T) {
	for _, v := range []*VXLAN{nil, testVXLAN()} {
		g := newDualRig(t, v)
		needGSO(t, g.rig)
		var train []byte
		var want [][]byte
		super := nettest.Super(nettest.Between(over6v6, containerA6).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(20*1000)), 1000)
		for _, ip := range nettest.Segment(super) {
			if want = append(want, hop1(ip)); v != nil {
				ip = frame(1, vtepOf(1), vtepOf(2), ip)
			}
			train = append(train, ip...)
		}
		sendTrain(t, g.peer6, g.Underlay6(), train, len(train)/20)
		g.receiveOn(outer6, 1)
		got := g.a.Packets()
		if len(got) != len(want) {
			t.Fatalf("%d packets, want %d (drops %v)", len(got), len(want), g.drops())
		}
		for i := range got {
			if !bytes.Equal(got[i].Bytes(), want[i]) || !got[i].Verified {
				t.Fatalf("packet %d is not the one that was sent", i)
			}
		}
		if s := g.Stats().Underlay; s.RecvTrains != 1 || s.RecvPackets != 20 {
			t.Errorf("%+v, want one train", s)
		}
	}
}

// A kernel's VXLAN device over IPv6 sends outer checksums, but over a virtual cable it may owe the inner one all the same.
func TestDualStack_SettlesWhatAKernelOwes(t *testing.T) {
	g := newDualRig(t, testVXLAN())
	h := nettest.Between(overStock6v6, containerA6)
	p := nettest.Packet(h.TCP(nettest.TCP{SrcPort: 1, Seq: 9, Flags: nettest.ACK}, nettest.Payload(500)))
	nettest.Owe(p)
	broken := bytes.Clone(h.UDP(nettest.UDP{}, nettest.Payload(501)))
	broken[len(broken)-1] ^= 1
	for _, c := range []struct {
		ip       []byte
		verified bool
	}{{p.Bytes(), true}, {broken, false}} {
		if _, err := udpSocketOn(t, outer6).WriteToUDPAddrPort(framed(g.Router, c.ip), g.Underlay6()); err != nil { // from any port
			t.Fatal(err)
		}
		g.receiveOn(outer6, 1)
		got := g.a.Take()
		one(t, "container a", got, hop1(c.ip))
		if got[0].Verified != c.verified {
			t.Errorf("verified: %v", got[0].Verified)
		}
	}
	super := nettest.Super(h.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(30000)), peerMTU-60)
	q := g.loops[0].rxq
	n := copy(q.bufs[0][q.begin:], framed(g.Router, super.Bytes()))
	g.arrived(addrPort(g.stock6), n, 0)
	got := g.a.Take()
	if len(got) != 1 || got[0].GSO != packet.GSOTCPv6 || got[0].SegSize != peerMTU-60 || !got[0].NeedsCsum {
		t.Errorf("%+v", got)
	}
	g.wantDrops(nil)
}

func TestDualStack_RefusesSpoofedSources(t *testing.T) {
	from := func(a string) func(*dualRig) netip.AddrPort {
		return func(*dualRig) netip.AddrPort { return netip.MustParseAddrPort(a) }
	}
	of := func(c func(*dualRig) *net.UDPConn) func(*dualRig) netip.AddrPort {
		return func(g *dualRig) netip.AddrPort { return addrPort(c(g)) }
	}
	peer, peer6 := of(func(g *dualRig) *net.UDPConn { return g.peer }), of(func(g *dualRig) *net.UDPConn { return g.peer6 })
	otherPort := func(a func(*dualRig) netip.AddrPort) func(*dualRig) netip.AddrPort {
		return func(g *dualRig) netip.AddrPort { return netip.AddrPortFrom(a(g).Addr(), a(g).Port()^1) }
	}
	stock := of(func(g *dualRig) *net.UDPConn { return g.stock })
	stock6 := of(func(g *dualRig) *net.UDPConn { return g.stock6 })
	mapped := func(g *dualRig) netip.AddrPort { // what a host of IPv6 could call itself
		return netip.AddrPortFrom(netip.AddrFrom16(addrPort(g.stock).Addr().As16()), addrPort(g.stock).Port())
	}
	for name, c := range map[string]struct {
		outer func(*dualRig) netip.AddrPort
		src   string
		taken bool
	}{
		"IPv6 from its IPv6 peer":                   {peer6, over6v6, true},
		"IPv4 from its IPv6 peer":                   {peer6, over6, true},
		"IPv6 from its IPv4 peer":                   {peer, over4v6, true},
		"IPv6 from an IPv4 peer that has another's": {peer, over6v6, false},
		"IPv4 from an IPv4 peer that has another's": {peer, over6, false},
		"IPv6 from an IPv6 peer that has another's": {peer6, over4v6, false},
		"IPv4 from an IPv6 peer that has another's": {peer6, over4, false},
		"from another port":                         {otherPort(peer6), over6v6, false},
		"from another host":                         {from("[2001:db8::1]:8285"), over6v6, false},
		"from another host, stock":                  {from("[2001:db8::1]:8285"), overStock6v6, false},
		"stock from its port":                       {stock6, overStock6v6, true},
		"stock from another port":                   {otherPort(stock6), overStock6, true},
		"stock over the other family":               {stock, overStock6v6, false},
		"an IPv4 address in IPv6":                   {mapped, "10.4.0.2", false},
		"our own container":                         {peer6, containerA6, false},
		"our gateway":                               {peer6, gateway6, false},
		"nobody's":                                  {peer6, "2001:db8::2", false},
	} {
		t.Run(name, func(t *testing.T) {
			g := newDualRig(t, nil)
			ip := udp(c.src, own(c.src), 10)
			g.arrivedPacket(c.outer(g), ip)
			want := map[string]uint64{}
			if !c.taken {
				want["spoofed-by-peer"] = 1
			}
			g.wantDrops(want)
			if n := len(g.a.Take()); n == 1 != c.taken {
				t.Errorf("%d packets arrived", n)
			}
		})
	}
}

// arrivedPacket makes the Router take one datagram as from a peer.
func (g *rig) arrivedPacket(from netip.AddrPort, d []byte) {
	q := g.loops[0].rxq
	g.arrived(from, copy(q.bufs[0][q.begin:], d), 0)
}

func TestDualStack_ChecksAddressesOfPeers(t *testing.T) {
	single, dual := newRouter(t, 1), newDualRouter(t, 1, 0, nil)
	for text, c := range map[string]struct {
		r    *Router
		want string // in the error, or empty
	}{
		"[2001:db8::1]:8285":      {single, "no IPv6 address in the underlay"},
		"[2001:db8::2]:8285":      {dual, ""},
		"192.0.2.1:8285":          {dual, ""},
		"[2001:db8::1]:0":         {dual, "not an IP address with a port"},
		"[::ffff:192.0.2.1]:8285": {dual, "not an IP address with a port"},
		"[fe80::1%lo]:8285":       {dual, "not an IP address with a port"},
		"[::ffff:192.0.2.1]:8286": {single, "not an IP address with a port"},
	} {
		err := c.r.SetTable(TableConfig{Routes: []Route{{netip.MustParsePrefix("fd00:9::/64"), ToPeer(PeerConfig{Addr: netip.MustParseAddrPort(text), MTU: peerMTU})}}})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "fd00:9::/64")) {
			t.Errorf("%s: %v, want %q", text, err, c.want)
		}
	}
}

func TestDualStack_FallsBackWhereTheKernelCannotCut(t *testing.T) {
	g := newDualRig(t, nil)
	needGSO(t, g.rig)
	w := g.loops[0].worker
	w.begin()
	q := w.tx[outer6]
	to := w.table.lookup(netip.MustParseAddr(over6v6)).peer
	for range 10 {
		q.reserve()
		q.addPacket(to, udp(containerA6, over6v6, 172))
	}
	q.names[0] = to.name
	q.refused(0, unix.EIO)
	q.n, q.niov, q.nhdr = 0, 0, 0
	w.end()
	if n := len(datagrams(t, g.peer6)); n != 10 || q.maxSegs != 1 || w.tx[outer4].maxSegs != trainSegs {
		t.Errorf("%d datagrams; trains of %d, and of %d over IPv4", n, q.maxSegs, w.tx[outer4].maxSegs)
	}
}

func TestDualStack_KernelSteersAndLaysFlowsAcrossLanes(t *testing.T) {
	const loops, stripe = 3, 1 << stripeShift
	for _, v := range []*VXLAN{nil, testVXLAN()} {
		r := newDualRouter(t, loops, manyLanes, v)
		s := r.under.Load()[outer6]
		if !s.steered || !r.Steers() {
			t.Skip("this kernel attaches no program to a group of sockets")
		}
		if s.lanes != maxLanes {
			t.Fatalf("%d lanes", s.lanes)
		}
		c := udpSocketOn(t, outer6)
		want := make([][][]byte, len(s.fds))
		for _, to := range []string{containerA, containerB, containerA6, "fd00:1::7", "10.1.0.7"} {
			from := containerC
			if strings.Contains(to, ":") {
				from = containerC6
			}
			for _, seq := range []uint32{0, stripe, 5*stripe + 7, maxLanes * stripe} {
				d := framed(r, nettest.Between(from, to).TCP(nettest.TCP{Seq: seq, Flags: nettest.ACK}, nettest.Payload(10)))
				if _, err := c.WriteToUDPAddrPort(d, r.Underlay6()); err != nil {
					t.Fatal(err)
				}
				i := steerIndex(netip.MustParseAddr(to), loops)*maxLanes + tcpLane(seq)
				want[i] = append(want[i], d)
			}
		}
		wantOnSockets(t, r, outer6, want)
		wantOnSockets(t, r, outer4, make([][][]byte, len(r.under.Load()[outer4].fds)))
	}
}

func TestDualStack_RunsBothFamilies(t *testing.T) {
	for _, buffer := range []int{0, manyLanes} {
		g := newDualRigOn(t, newDualRouter(t, 2, buffer, nil))
		start(t, g.Router)
		const n = 100
		for i := range n {
			g.a.Inject(pkt(udp(containerA, over4, 100)), pkt(udp(containerA6, over6v6, 100)))
			for _, c := range dualPaths {
				peer, to := g.on(c.f)
				if _, err := peer.WriteToUDPAddrPort(udp(c.addr, own(c.addr), 100), to); err != nil {
					t.Fatal(err)
				}
			}
			g.a.Wait(t, 4*(i+1))
		}
		for _, c := range []*net.UDPConn{g.peer, g.peer6} {
			for got := 0; got < n; {
				d := datagrams(t, c)
				if got += len(d); len(d) == 0 {
					t.Fatalf("%d datagrams, want %d (drops %v)", got, n, g.drops())
				}
			}
		}
		g.wantDrops(nil)
	}
}

func TestDualStack_TellsNobodyToSendLessThanEveryPathOfIPv6Carries(t *testing.T) {
	const narrow = 1200
	g := newDualRig(t, nil)
	g.table.Routes = append(g.table.Routes, Route{netip.MustParsePrefix("fd00:9::/64"), ToPeer(PeerConfig{Addr: g.peer6Cfg.Addr, MTU: narrow})})
	g.set(g.table)
	const beyond = "fd00:9::2"
	h := nettest.Between(containerA6, beyond)

	g.fromA(pkt(h.UDP(nettest.UDP{}, nettest.Payload(minMTU6-48))), pkt(h.UDP(nettest.UDP{}, nettest.Payload(minMTU6-47))))
	if d := datagrams(t, g.peer6); len(d) != 1 || len(d[0]) != minMTU6 {
		t.Errorf("%d datagrams, want the one of %d bytes", len(d), minMTU6)
	}
	g.wantDrops(map[string]uint64{"too-big": 1})
	errs := g.a.Take()
	if len(errs) != 1 || errs[0].Bytes()[40] != 2 || binary.BigEndian.Uint32(errs[0].Bytes()[44:]) != minMTU6 {
		t.Errorf("%v, want packet too big with an MTU of %d", errs, minMTU6)
	}

	g.fromA(nettest.Super(h.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(10*(minMTU6-60))), minMTU6-60))
	if d := datagrams(t, g.peer6); len(d) != 10 {
		t.Errorf("%d segments of %d bytes, want 10", len(d), minMTU6)
	}

	syn := nettest.TCP{Flags: nettest.SYN, Options: mssOption(1440)}
	mss := func(ip []byte) int { return int(binary.BigEndian.Uint16(ip[62:])) }
	g.fromA(pkt(h.TCP(syn, nil)))
	if d := datagrams(t, g.peer6); len(d) != 1 || mss(d[0]) != minMTU6-60 || nettest.Check(d[0]) != nil {
		t.Errorf("%x", d)
	}
	g.fromPeer(g.peer6, pkt(nettest.Between(beyond, containerA6).TCP(syn, nil)))
	if p := g.a.Take(); len(p) != 1 || mss(p[0].Bytes()) != minMTU6-60 || nettest.Check(p[0].Bytes()) != nil {
		t.Errorf("%v", p)
	}
	if mtuFor(true, narrow) != narrow || mtuFor(false, narrow) != minMTU6 || mtuFor(false, 1281) != 1281 || mtuFor(false, 0) != 0 {
		t.Error("mtuFor")
	}
}

// probe6 is a probe over IPv6 to the gateway behind the IPv6 peer.
func (g *dualRig) probe6(token uint64, size int) Probe {
	return Probe{Peer: g.peer6Cfg.Addr, VTEP: g.peer6Cfg.VTEP, Src: netip.MustParseAddr(gateway6), Dst: netip.MustParseAddr("fd00:2::1"), Token: token, Size: size}
}

func TestSendProbe_SpeaksICMPv6(t *testing.T) {
	const token = 0x0102030405060708
	for _, v := range []*VXLAN{nil, testVXLAN()} {
		g := newDualRig(t, v)
		for _, size := range []int{MinProbe6, 1280, 1430, 60000} {
			p := g.probe6(token, size)
			if err := g.SendProbe(p); err != nil {
				t.Fatal(err)
			}
			d := datagrams(t, g.peer6)
			if len(d) != 1 || len(d[0]) != size+v.Encap() {
				t.Fatalf("%d datagrams", len(d))
			}
			ip := d[0][v.Encap():]
			if err := nettest.Check(ip); err != nil {
				t.Error(err)
			}
			src, dst := addrs(ip)
			if src != p.Src || dst != p.Dst || ip[6] != packet.ICMPv6 || ip[40] != 128 || ip[41] != 0 || binary.BigEndian.Uint64(ip[48:]) != token {
				t.Errorf("%x", ip[:MinProbe6])
			}
			if v != nil && !bytes.Equal(d[0][:22], frame(1, vtepOf(2), vtepOf(1), []byte{0x60})[:22]) {
				t.Errorf("in a frame %x", d[0][:22])
			}
		}
		over4 := g.probe6(token, 1400) // IPv6 inside, IPv4 outside, and the other way round
		over4.Peer, over4.VTEP = g.peerCfg.Addr, g.peerCfg.VTEP
		inner4 := g.probe6(token, MinProbe)
		inner4.Src, inner4.Dst = netip.MustParseAddr(gateway), netip.MustParseAddr("10.16.0.1")
		for c, p := range map[*net.UDPConn]Probe{g.peer: over4, g.peer6: inner4} {
			if err := g.SendProbe(p); err != nil {
				t.Fatal(err)
			}
			if d := datagrams(t, c); len(d) != 1 || len(d[0]) != p.Size+v.Encap() || nettest.Check(d[0][v.Encap():]) != nil {
				t.Errorf("%x", d)
			}
		}
	}
}

func TestSendProbe_RefusesWhatCannotBe(t *testing.T) {
	g := newDualRig(t, nil)
	mixed, none, far := g.probe6(1, 1400), g.probe6(1, 1400), g.probe6(1, 1400)
	mixed.Src, none.Dst, far.Peer = netip.MustParseAddr(gateway), netip.Addr{}, netip.MustParseAddrPort("[::ffff:192.0.2.1]:1")
	for name, p := range map[string]Probe{
		"too short": g.probe6(1, MinProbe6-1), "too long": g.probe6(1, MaxTrain+1), "of two families": mixed, "to nowhere": none, "an IPv4 address in IPv6": far,
	} {
		if err := g.SendProbe(p); err == nil || errors.Is(err, ErrProbeTooLong) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := newRig(t).SendProbe(g.probe6(1, 1400)); err == nil || !strings.Contains(err.Error(), "no IPv6 address") {
		t.Errorf("without IPv6 in the underlay: %v", err)
	}
}

// reply6 is the answer to a probe over IPv6.
func reply6(token uint64, size int) []byte {
	payload := make([]byte, size)
	if size >= tokenLen {
		binary.BigEndian.PutUint64(payload, token)
	}
	return nettest.Between("fd00:2::1", gateway6).ICMP(129, 0, probeIdent<<16|1, payload)
}

// fragment6 is the fragment of ip that begins at byte at of what follows its header.
func fragment6(ip []byte, at, size int) []byte {
	f := bytes.Clone(ip[:40])
	f = append(f, f[6], 0, byte(at>>8), byte(at)|1, 1, 2, 3, 4)
	f[6] = 44
	f = append(f, ip[40+at:][:size]...)
	binary.BigEndian.PutUint16(f[4:], uint16(len(f)-40))
	return f
}

func TestPathEvents_TellAnswersOverIPv6(t *testing.T) {
	const token = 0xfeedfacecafebeef
	h := nettest.Between("fd00:2::1", gateway6)
	for name, c := range map[string]struct {
		ip         []byte
		event      bool
		forGateway bool
	}{
		"an answer":                   {reply6(token, 1400), true, false},
		"the smallest answer":         {reply6(token, tokenLen), true, false},
		"its first fragment":          {fragment6(reply6(token, 1400), 0, 1232), true, false},
		"its second fragment":         {fragment6(reply6(token, 1400), 1232, 176), false, true},
		"a fragment without a token":  {fragment6(reply6(token, 1400), 0, 8), false, true},
		"a fragment header cut short": {h.Raw(44, []byte{packet.ICMPv6, 0, 0, 1, 1, 2, 3}), false, true},
		"without a token":             {reply6(token, tokenLen-1), false, true},
		"token 0":                     {reply6(0, 100), false, false},
		"what nobody asked":           {reply6(token+1, 100), false, false},
		"a request":                   {h.ICMP(128, 0, probeIdent<<16|1, make([]byte, 100)), false, true},
		"an answer to somebody else":  {h.ICMP(129, 0, 7<<16|1, make([]byte, 100)), false, true},
		"the message of IPv4":         {h.ICMP(0, 0, probeIdent<<16|1, reply6(token, 100)[48:]), false, true},
		"a datagram, not an answer":   {udp("fd00:2::1", gateway6, 100), false, true},
	} {
		t.Run(name, func(t *testing.T) {
			g := newDualRig(t, nil)
			if err := g.SendProbe(g.probe6(token, 1400)); err != nil {
				t.Fatal(err)
			}
			g.fromPeer(g.peer6, pkt(c.ip))
			e := g.events()
			if c.event != (len(e) == 1 && e[0] == PathEvent{Answered: token}) || !c.event && len(e) != 0 {
				t.Errorf("events %v", e)
			}
			if got := len(g.gw.Take()); got != 0 != c.forGateway {
				t.Errorf("%d packets for the gateway", got)
			}
		})
	}
	t.Run("from somebody else's address", func(t *testing.T) {
		g := newDualRig(t, nil)
		if err := g.SendProbe(g.probe6(token, 1400)); err != nil {
			t.Fatal(err)
		}
		g.fromPeer(g.peer, pkt(reply6(token, 100)))
		if e := g.events(); len(e) != 0 {
			t.Errorf("events %v", e)
		}
	})
}

// A node that takes the path for narrow answers a wide probe all the same, or the path would stay narrow for ever.
func TestForward_CutsAnswersToProbesOfIPv6(t *testing.T) {
	const token = 7
	g := newDualRig(t, nil)
	g.table.Routes = append(g.table.Routes, Route{netip.MustParsePrefix("fd00:9::/64"), ToPeer(PeerConfig{Addr: g.peer6Cfg.Addr, MTU: 1300})})
	g.set(g.table)
	inj := g.NewInjector()
	answer := func(ident uint32, size int) []byte {
		payload := make([]byte, size)
		binary.BigEndian.PutUint64(payload, token)
		return nettest.Between(gateway6, "fd00:9::1").ICMP(129, 0, ident<<16|1, payload)
	}
	fits, long := answer(probeIdent, 1300-48), answer(probeIdent, 1300-47)
	owed := pkt(bytes.Clone(long))
	owed.NeedsCsum, owed.CsumStart, owed.CsumOffset = true, 40, 2
	inj.Forward([]*packet.Packet{pkt(fits), pkt(long), owed})
	d := datagrams(t, g.peer6)
	if len(d) != 3 || !bytes.Equal(d[0], fits) {
		t.Fatalf("%d datagrams (drops %v)", len(d), g.drops())
	}
	for _, cut := range d[1:] {
		if got, ok := answerToken(cut); !ok || got != token || len(cut) != MinProbe6 || nettest.Check(cut) != nil {
			t.Errorf("cut to %x: %v", cut, nettest.Check(cut))
		}
	}
	g.wantDrops(nil)
	inj.Forward([]*packet.Packet{pkt(answer(7, 1300)), pkt(udp(gateway6, "fd00:9::1", 1300))}) // what is no answer to a probe
	g.fromA(pkt(nettest.Between(containerA6, "fd00:9::1").ICMP(129, 0, probeIdent<<16|1, make([]byte, 1300))))
	g.wantDrops(map[string]uint64{"too-big": 3})
}

func FuzzAnswerToken(f *testing.F) {
	for _, ip := range [][]byte{
		reply(7, 0, 100), reply(7, nettest.MF, 800), reply(7, 100, 800), reply6(7, 100), reply6(7, 7), fragment6(reply6(7, 1400), 0, 1232),
		fragment6(reply6(7, 1400), 1232, 176), udp(containerC6, gateway6, 100), nettest.Between(containerC6, gateway6).Raw(44, []byte{58}),
	} {
		f.Add(ip)
	}
	f.Fuzz(func(t *testing.T, ip []byte) {
		p := pkt(ip)
		if check(p) != dropNone {
			return
		}
		token, ok := answerToken(p.Bytes())
		if !ok && token != 0 {
			t.Fatalf("no answer, but token %d: %x", token, ip)
		}
		was := p.Len()
		if cutAnswer(p) {
			if again, ok := answerToken(p.Bytes()); !ok || again != token || p.Len() > was || check(p) != dropNone || nettest.Check(p.Bytes()) != nil {
				t.Fatalf("%x was cut to %x", ip, p.Bytes())
			}
		}
	})
}

func TestKernelMTU_IsOfThePeersFamily(t *testing.T) {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Skip(err)
	}
	for _, v := range []*VXLAN{nil, testVXLAN()} {
		g := newDualRig(t, v)
		if got, want := g.KernelMTU(g.peer6Cfg.Addr), min(lo.MTU-UDPOverhead6, MaxTrain)-v.Encap(); got != want {
			t.Errorf("%d, want %d", got, want)
		}
		if got, want := g.Overhead(g.peer6Cfg.Addr.Addr()), 48+v.Encap(); got != want {
			t.Errorf("an overhead of %d, want %d", got, want)
		}
	}
	if got := newRig(t).KernelMTU(netip.MustParseAddrPort("[::1]:9")); got != 0 {
		t.Errorf("without IPv6 in the underlay: %d", got)
	}
	if UDPOverhead != 28 || UDPOverhead6 != 48 || VXLANOverhead != 50 || VXLANOverhead6 != 70 {
		t.Error("another overhead")
	}
}

func TestDualStack_AllocatesNothing(t *testing.T) {
	// The addresses of over4 are those of the peers that containerC and containerC6 stand for in traffic.
	for _, v := range []*VXLAN{nil, testVXLAN()} {
		g := newDualRig(t, v)
		for i, r := range g.table.Routes {
			if r.Hop == ToPeer(g.peerCfg) {
				g.table.Routes[i].Hop = ToPeer(g.peer6Cfg)
			}
		}
		g.set(g.table)
		p := &path{rig: g.rig, w: g.loops[0].worker, in: ingress{kind: fromContainer, port: g.portA}, discard: new(nettest.Discard)}
		g.portA.cfg.Device = sink{nettest.NewDevice(t), p.discard}
		for name, orig := range traffic() {
			if !strings.HasSuffix(name, "6") && name != "tso" && name != "small" {
				continue
			}
			pkts := copies(orig)
			for range 5 {
				p.batch(orig, pkts)
			}
			if n := testing.AllocsPerRun(50, func() { p.batch(orig, pkts) }); n != 0 {
				t.Errorf("encapsulation %d: sending %s: %v allocations a batch", v.Encap(), name, n)
			}
		}
		if s := g.Stats(); s.Peers[g.peer6Cfg.Addr].SentPackets == 0 || s.Peers[g.peerCfg.Addr].SentPackets != 0 {
			t.Errorf("nothing was sent over IPv6: %+v", s.Peers)
		}
		if v != nil {
			continue
		}
		needGSO(t, g.rig)
		for name, train := range receiveTrains() {
			receive := func() {
				sendTrain(t, g.peer6, g.Underlay6(), train.bytes, train.size)
				g.receiveOn(outer6, 1)
			}
			for range 5 {
				receive()
			}
			with := testing.AllocsPerRun(50, receive)
			without := testing.AllocsPerRun(50, func() { sendTrain(t, g.stock6, addrPort(g.peer6), train.bytes, train.size) })
			if with > without {
				t.Errorf("receiving %s: %v allocations a train", name, with-without)
			}
		}
		if p.discard.Packets < 4*40*50 {
			t.Errorf("%d packets arrived: the test tests nothing (drops %v)", p.discard.Packets, g.drops())
		}
	}
}
