// This file tests whose packets go where, and whose do not.

package forwarder

import (
	"bytes"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// hop1 is ip one hop on: TTL one less, checksum anew.
func hop1(ip []byte) []byte {
	out := bytes.Clone(ip)
	if out[0]>>4 == 6 {
		out[7]--
		return out
	}
	out[8]--
	out[10], out[11] = 0, 0
	s := ^nettest.Sum(out[:int(out[0]&15)*4])
	out[10], out[11] = byte(s>>8), byte(s)
	return out
}

func one(t *testing.T, what string, got []packet.Packet, want []byte) {
	t.Helper()
	if len(got) != 1 {
		t.Fatalf("%s got %d packets, want 1", what, len(got))
	}
	if !bytes.Equal(got[0].Bytes(), want) {
		t.Fatalf("%s got\n%x, want\n%x", what, got[0].Bytes(), want)
	}
}

func TestForward_DeliversToEachNextHop(t *testing.T) {
	g := newRig(t)
	local, remote, remote6 := udp(containerA, containerB, 10), udp(containerA, containerC, 11), udp(containerA6, containerC6, 12)
	ping, egress := nettest.Between(containerA, gateway).ICMP(8, 0, 1, nil), udp(containerA, outside, 13)
	g.fromA(pkt(local), pkt(remote), pkt(ping), pkt(egress), pkt(remote6))
	one(t, "container b", g.b.Take(), hop1(local))
	one(t, "the gateway", g.gw.Take(), ping)
	one(t, "egress", g.egress.Take(), hop1(egress))
	if got := datagrams(t, g.peer); len(got) != 2 || !bytes.Equal(got[0], hop1(remote)) || !bytes.Equal(got[1], hop1(remote6)) {
		t.Errorf("the peer got %x", got)
	}
	g.fromPeer(g.peer, pkt(udp(containerC, containerA, 9)))
	one(t, "container a", g.a.Take(), hop1(udp(containerC, containerA, 9)))
	g.fromPeer(g.peer, pkt(udp(containerC6, containerA6, 9)))
	one(t, "container a", g.a.Take(), hop1(udp(containerC6, containerA6, 9)))
	g.fromPeer(g.peer, pkt(nettest.Between(containerC, gateway).ICMP(8, 0, 1, nil)))
	one(t, "the gateway", g.gw.Take(), nettest.Between(containerC, gateway).ICMP(8, 0, 1, nil))
	inj := g.NewInjector()
	answer, remoteAnswer := udp(outside, containerA, 9), udp(gateway, containerC, 9)
	inj.Forward([]*packet.Packet{pkt(answer), pkt(remoteAnswer)})
	one(t, "container a", g.a.Take(), answer) // the stack has set the TTL
	if got := datagrams(t, g.peer); len(got) != 1 || !bytes.Equal(got[0], remoteAnswer) {
		t.Errorf("the peer got %x", got)
	}
	g.wantDrops(nil)
}

func TestForward_KeepsSuperpacketsWholeOnTheNode(t *testing.T) {
	g := newRig(t)
	super := nettest.Super(nettest.Between(containerA, containerB).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(60000)), 1360)
	want := *super
	g.fromA(super)
	got := g.b.Take()
	if len(got) != 1 || got[0].Len() != want.Len() || got[0].GSO != want.GSO || got[0].SegSize != want.SegSize || !got[0].NeedsCsum || got[0].Verified {
		t.Errorf("%d packets, first %+v", len(got), got)
	}
}

func TestForward_KeepsTheOrderOfAFlow(t *testing.T) {
	g := newRig(t)
	var pkts []*packet.Packet
	for i := range 50 {
		pkts = append(pkts, pkt(udp(containerA, containerB, i)), pkt(udp(containerA, containerC, i)), pkt(udp(containerA, outside, i)))
	}
	g.fromA(pkts...)
	for name, got := range map[string][]packet.Packet{"b": g.b.Take(), "egress": g.egress.Take()} {
		for i := range 50 {
			if len(got) != 50 || got[i].Len() != 28+i {
				t.Fatalf("%s: packet %d of %d is out of order", name, i, len(got))
			}
		}
	}
	for i, d := range datagrams(t, g.peer) {
		if len(d) != 28+i {
			t.Fatalf("peer: datagram %d is out of order", i)
		}
	}
}

func TestForward_RefusesSpoofedSources(t *testing.T) {
	fromA := func(g *rig, p *packet.Packet) { g.fromA(p) }
	from := func(c func(*rig) *net.UDPConn) func(*rig, *packet.Packet) {
		return func(g *rig, p *packet.Packet) { g.fromPeer(c(g), p) }
	}
	peer := from(func(g *rig) *net.UDPConn { return g.peer })
	stock := from(func(g *rig) *net.UDPConn { return g.stock })
	stranger := from(func(g *rig) *net.UDPConn { return udpSocket(g.t) })
	otherHost := func(g *rig, p *packet.Packet) {
		g.from(ingress{kind: fromPeer, outer: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), addrPort(g.stock).Port())}, p)
	}
	const c, s = "spoofed-by-container", "spoofed-by-peer"
	for name, k := range map[string]struct {
		send func(*rig, *packet.Packet)
		ip   []byte
		why  string
	}{
		"container as itself":           {fromA, udp(containerA, containerB, 1), ""},
		"container as itself, IPv6":     {fromA, udp(containerA6, containerC6, 1), ""},
		"container as its neighbour":    {fromA, udp(containerB, containerA, 1), c},
		"container as the gateway":      {fromA, udp(gateway, containerB, 1), c},
		"container as a peer's":         {fromA, udp(containerC, containerB, 1), c},
		"container as the outside":      {fromA, udp(outside, containerB, 1), c},
		"container as nobody":           {fromA, udp("0.0.0.0", containerB, 1), c},
		"container as link-local":       {fromA, udp("fe80::2", containerC6, 1), c},
		"container as multicast":        {fromA, udp("224.0.0.5", containerB, 1), c},
		"peer as its own":               {peer, udp(containerC, containerA, 1), ""},
		"peer as its own, IPv6":         {peer, udp(containerC6, containerA6, 1), ""},
		"peer as our container":         {peer, udp(containerB, containerA, 1), s},
		"peer as our gateway":           {peer, udp(gateway, containerA, 1), s},
		"peer as another peer's":        {peer, udp("10.3.0.2", containerA, 1), s},
		"peer as the outside":           {peer, udp(outside, containerA, 1), s},
		"peer as a subnet of nobody":    {peer, udp("10.9.0.2", containerA, 1), s},
		"peer as no family of ours":     {peer, udp("2001:db8::1", containerA6, 1), s},
		"stranger as a peer's":          {stranger, udp(containerC, containerA, 1), s},
		"stranger as a stock peer's":    {stranger, udp("10.4.0.2", containerA, 1), ""}, // loopback: only its port is strange
		"stock peer from its port":      {stock, udp("10.4.0.2", containerA, 1), ""},
		"stock peer from other address": {otherHost, udp("10.4.0.2", containerA, 1), s},
		"stock peer as another peer's":  {stock, udp(containerC, containerA, 1), s},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			k.send(g, pkt(k.ip))
			want := map[string]uint64{}
			if k.why != "" {
				want[k.why] = 1
			}
			g.wantDrops(want)
			got := len(g.a.Take()) + len(g.b.Take()) + len(datagrams(t, g.peer))
			if arrived := got == 1; arrived != (k.why == "") {
				t.Errorf("%d packets arrived", got)
			}
		})
	}
}

func TestForward_ChecksEverySourceOfABatch(t *testing.T) {
	// The verdict on one packet's addresses is kept for its neighbours: only for those with the same addresses.
	g := newRig(t)
	g.fromA(pkt(udp(containerA, containerB, 1)), pkt(udp("10.1.0.9", containerB, 1)), pkt(udp(containerA, containerB, 1)), pkt(udp("10.1.0.9", containerB, 1)))
	g.wantDrops(map[string]uint64{"spoofed-by-container": 2})
	if n := len(g.b.Take()); n != 2 {
		t.Errorf("%d packets arrived, want 2", n)
	}
	g.fromPeer(g.peer, pkt(udp(containerC, containerA, 1)), pkt(udp("10.3.0.2", containerA, 1)), pkt(udp(containerC, containerA, 1)))
	g.wantDrops(map[string]uint64{"spoofed-by-container": 2, "spoofed-by-peer": 1})
	if n := len(g.a.Take()); n != 2 {
		t.Errorf("%d packets arrived, want 2", n)
	}
}

func TestForward_CarriesNoTransit(t *testing.T) {
	for name, ip := range map[string][]byte{
		"to another peer":       udp(containerC, "10.3.0.2", 1),
		"back to the same peer": udp(containerC, "10.2.0.3", 1),
		"to the outside":        udp(containerC, outside, 1),
	} {
		g := newRig(t)
		g.fromPeer(g.peer, pkt(ip))
		g.wantDrops(map[string]uint64{"transit-refused": 1})
		if len(g.egress.Take())+len(datagrams(t, g.small))+len(datagrams(t, g.peer)) != 0 {
			t.Errorf("%s: it was carried", name)
		}
	}
	g := newRig(t)
	inj := g.NewInjector()
	inj.Forward([]*packet.Packet{pkt(udp(gateway, outside, 1)), pkt(udp(outside, gateway, 1))})
	g.wantDrops(map[string]uint64{"transit-refused": 1, "gateway-loop": 1})
}

func TestForward_DropsMalformedPackets(t *testing.T) {
	g := newRig(t)
	bad := udp(containerA, containerB, 1)
	bad[10] ^= 0xff
	g.fromA(pkt([]byte{0x45}), pkt(bad), pkt(udp(containerA, "224.0.0.1", 1)))
	g.wantDrops(map[string]uint64{"malformed": 1, "bad-ip-checksum": 1, "not-unicast": 1})
}

func TestForward_VerifiedComesFromTheUnderlayAlone(t *testing.T) {
	g := newRig(t)
	g.fromA(pkt(udp(containerA, containerB, 1)), pkt(udp(containerA, outside, 1)))
	for _, p := range append(g.b.Take(), g.egress.Take()...) {
		if p.Verified {
			t.Error("a container's packet is called verified")
		}
	}
	if p := decapsulateUDP(make([]byte, 100), 64); !p.Verified {
		t.Error("a peer's packet is not called verified")
	}
}

func TestSetTable_RefusesNonsense(t *testing.T) {
	g := newRig(t)
	v4 := netip.MustParsePrefix("10.9.0.0/16")
	for name, c := range map[string]struct {
		route Route
		text  string
	}{
		"no prefix":      {Route{Hop: UnreachableNet}, "no prefix"},
		"no hop":         {Route{Prefix: v4}, "no next hop"},
		"no port":        {Route{v4, ToPort(nil)}, "no next hop"},
		"no gateway":     {Route{v4, ToGateway(nil)}, "no next hop"},
		"no egress":      {Route{v4, ToEgress(nil)}, "no next hop"},
		"no own":         {Route{v4, ToOwnAt(&Port{}, nil)}, "no next hop"},
		"peer's IPv6":    {Route{v4, ToPeer(PeerConfig{Addr: netip.MustParseAddrPort("[::1]:8285")})}, "10.9.0.0/16"},
		"peer's port 0":  {Route{v4, ToPeer(PeerConfig{Addr: netip.MustParseAddrPort("127.0.0.1:0")})}, "10.9.0.0/16"},
		"peer's nothing": {Route{v4, ToPeer(PeerConfig{})}, "10.9.0.0/16"},
	} {
		t.Run(name, func(t *testing.T) {
			err := g.SetTable(TableConfig{Routes: []Route{c.route}})
			if err == nil || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %v, want one with %q", err, c.text)
			}
		})
	}
	g.fromA(pkt(udp(containerA, containerB, 1)))
	if len(g.b.Take()) != 1 {
		t.Error("the table before is not in force any more")
	}
}

func TestSetTable_KeepsPeersCounters(t *testing.T) {
	g := newRig(t)
	g.fromA(pkt(udp(containerA, containerC, 72)), pkt(udp(containerA, containerC, 72)))
	want := PeerStats{SentPackets: 2, SentBytes: 200}
	if got := g.Stats().Peers[g.peerCfg.Addr]; got != want {
		t.Fatalf("%+v, want %+v", got, want)
	}
	g.set(g.table)
	g.fromA(pkt(udp(containerA, containerC, 72)))
	want = PeerStats{SentPackets: 3, SentBytes: 300}
	if got := g.Stats().Peers[g.peerCfg.Addr]; got != want {
		t.Fatalf("after another table: %+v, want %+v", got, want)
	}
	replace := func(by PeerConfig) {
		for i := range g.table.Routes {
			if h := g.table.Routes[i].Hop; h.kind == hopPeer && h.peer.Addr == by.Addr {
				g.table.Routes[i].Hop = ToPeer(by)
			}
		}
		g.set(g.table)
	}
	replace(PeerConfig{Addr: g.peerCfg.Addr, MTU: 1400})
	if got := g.Stats().Peers[g.peerCfg.Addr]; got != want {
		t.Fatalf("after another MTU: %+v, want %+v", got, want)
	}
	replace(PeerConfig{Addr: g.peerCfg.Addr, MTU: 1400, AnyPort: true})
	if got := g.Stats().Peers[g.peerCfg.Addr]; got != (PeerStats{}) {
		t.Fatalf("after a change of the peer: %+v, want zeros", got)
	}
}

func TestSetTable_TakesTheLongestPrefix(t *testing.T) {
	g := newRig(t)
	g.table.Routes = append(g.table.Routes, Route{netip.MustParsePrefix("10.2.7.9/24"), ToPort(g.portB)}) // host bits are masked
	g.set(g.table)
	g.fromA(pkt(udp(containerA, "10.2.7.200", 1)), pkt(udp(containerA, "10.2.8.200", 1)))
	if len(g.b.Take()) != 1 || len(datagrams(t, g.peer)) != 1 {
		t.Error("the longest prefix did not win")
	}
}

func TestStats_NamesEveryReason(t *testing.T) {
	g := newRig(t)
	d := g.Stats().Drops
	if len(d) != int(numDrops)-1 || d[""] != 0 {
		t.Errorf("%d reasons, want %d: %v", len(d), int(numDrops)-1, d)
	}
}

func TestAddPort_NeedsADeviceAndAnAddress(t *testing.T) {
	g := newRig(t)
	if _, err := g.AddPort(PortConfig{Name: "x", Sources: []netip.Prefix{alone(netip.MustParseAddr(containerA))}}); err == nil {
		t.Error("a port without a device")
	}
	if _, err := g.AddPort(PortConfig{Name: "x", Device: g.a}); err == nil {
		t.Error("a port without an address")
	}
	if _, err := g.AddPort(PortConfig{Name: "again", Device: g.a, Sources: []netip.Prefix{alone(netip.MustParseAddr("10.1.0.77"))}}); err == nil || !strings.Contains(err.Error(), "again") {
		t.Errorf("a device polled twice: %v", err)
	}
}
