// This file tests what senders are told: type, code, quoted bytes, to whom, how often, and when nothing at all; and fragments.

package forwarder

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func lastHop(h nettest.IP) nettest.IP { h.TTL = 1; return h }

func withFrag(h nettest.IP, frag uint16) nettest.IP { h.Frag = frag; return h }

func TestForward_TellsTheSenderWhy(t *testing.T) {
	a, a6 := nettest.Between(containerA, containerC), nettest.Between(containerA6, containerC6)
	u := nettest.UDP{SrcPort: 1, DstPort: 2}
	tcp := nettest.TCP{Flags: nettest.ACK}
	small := withFrag(nettest.Between(containerA, "10.3.0.2"), nettest.DF)
	for name, c := range map[string]struct {
		p          *packet.Packet
		kind, code uint8
		rest       uint32
		why        string
	}{
		"TTL 1":                    {pkt(lastHop(a).UDP(u, nettest.Payload(100))), 11, 0, 0, "ttl-exceeded"},
		"no such container":        {pkt(udp(containerA, "10.1.0.77", 10)), 3, 1, 0, "no-route"},
		"no such node":             {pkt(udp(containerA, "10.77.0.1", 1000)), 3, 0, 0, "no-route"},
		"DF and too large":         {pkt(withFrag(a, nettest.DF).UDP(u, nettest.Payload(1473-28))), 3, 4, peerMTU, "too-big"},
		"DF and too large, TSO":    {nettest.Super(small.TCP(tcp, nettest.Payload(5000)), 1000), 3, 4, smallMTU, "too-big"},
		"USO too large":            {nettest.Super(withFrag(small, 0).UDP(u, nettest.Payload(5000)), 1000), 3, 4, smallMTU, "too-big"},
		"ping too large":           {pkt(withFrag(a, nettest.DF).ICMP(8, 0, 1, nettest.Payload(2000))), 3, 4, peerMTU, "too-big"},
		"hop limit 1":              {pkt(lastHop(a6).UDP(u, nettest.Payload(2000))), 3, 0, 0, "ttl-exceeded"},
		"no such container, IPv6":  {pkt(udp(containerA6, "fd00:1::77", 10)), 1, 3, 0, "no-route"},
		"no route, IPv6":           {pkt(udp(containerA6, "2001:db8::1", 10)), 1, 0, 0, "no-route"},
		"too large, IPv6":          {pkt(a6.UDP(u, nettest.Payload(1473-48))), 2, 0, peerMTU, "too-big"},
		"too large, IPv6 TSO":      {nettest.Super(a6.TCP(tcp, nettest.Payload(5000)), 1450), 2, 0, peerMTU, "too-big"},
		"first fragment, TTL 1":    {pkt(withFrag(lastHop(a), nettest.MF).UDP(u, nettest.Payload(96))), 11, 0, 0, "ttl-exceeded"},
		"timestamp request, TTL 1": {pkt(lastHop(a).ICMP(13, 0, 1, nil)), 11, 0, 0, "ttl-exceeded"},
		"ping6, hop limit 1":       {pkt(lastHop(a6).ICMP(128, 0, 1, nil)), 3, 0, 0, "ttl-exceeded"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			about := bytes.Clone(c.p.Bytes())
			g.fromA(c.p)
			g.wantDrops(map[string]uint64{c.why: 1})
			got := g.a.Take()
			if len(got) != 1 {
				t.Fatalf("%d answers, want 1", len(got))
			}
			if g.Stats().ICMPErrors != 1 {
				t.Error("the error is not counted")
			}
			ip := got[0].Bytes()
			if err := nettest.Check(ip); err != nil {
				t.Fatal(err)
			}
			if got[0].Off < packet.Headroom {
				t.Errorf("headroom %d", got[0].Off)
			}
			l4 := 20
			src, dst := addrs(ip)
			wantSrc, wantDst := gateway, containerA
			if about[0]>>4 == 6 {
				l4, wantSrc, wantDst = 40, gateway6, containerA6
			}
			if src.String() != wantSrc || dst.String() != wantDst {
				t.Errorf("from %v to %v", src, dst)
			}
			m := ip[l4:]
			if m[0] != c.kind || m[1] != c.code || binary.BigEndian.Uint32(m[4:]) != c.rest {
				t.Errorf("type %d code %d rest %d, want %d %d %d", m[0], m[1], binary.BigEndian.Uint32(m[4:]), c.kind, c.code, c.rest)
			}
			if len(ip) > 576 {
				t.Errorf("%d bytes", len(ip))
			}
			quote := m[8:]
			if len(quote) != min(len(about), 576-l4-8) {
				t.Errorf("quotes %d bytes of %d", len(quote), len(about))
			}
			// The header may show the hop that was counted; addresses and everything behind it are the sender's.
			skip := l4
			if !bytes.Equal(quote[skip:], about[skip:len(quote)]) || !bytes.Equal(quote[skip-8:skip], about[skip-8:skip]) {
				t.Error("quotes other bytes")
			}
		})
	}
}

func TestForward_TellsAPeersSenderToo(t *testing.T) {
	g := newRig(t)
	g.fromPeer(g.peer, pkt(udp(containerC, "10.1.0.77", 10)), pkt(lastHop(nettest.Between(containerC, containerA)).UDP(nettest.UDP{}, nil)))
	got := datagrams(t, g.peer)
	if len(got) != 2 {
		t.Fatalf("%d errors, want 2", len(got))
	}
	for i, want := range [][2]byte{{3, 1}, {11, 0}} {
		if err := nettest.Check(got[i]); err != nil {
			t.Error(err)
		}
		if [2]byte(got[i][20:]) != want || netip.AddrFrom4([4]byte(got[i][12:])).String() != gateway {
			t.Errorf("error %d: %x", i, got[i])
		}
	}
}

func TestForward_TellsNobodyWhereNoneIsDue(t *testing.T) {
	ttl1 := lastHop(nettest.Between(containerA, containerC))
	ttl16 := lastHop(nettest.Between(containerA6, containerC6))
	quoted := udp(containerC, containerA, 10)
	for name, ip := range map[string][]byte{
		"unreachable":           ttl1.ICMP(3, 1, 0, quoted),
		"time exceeded":         ttl1.ICMP(11, 0, 0, quoted),
		"source quench":         ttl1.ICMP(4, 0, 0, quoted),
		"parameter problem":     ttl1.ICMP(12, 0, 0, quoted),
		"unknown ICMP":          ttl1.ICMP(200, 0, 0, nil),
		"ICMP without a byte":   ttl1.Raw(packet.ICMP, nil),
		"later fragment":        withFrag(ttl1, 10).Raw(packet.UDP, nettest.Payload(80)),
		"last fragment":         withFrag(ttl1, nettest.MF|185).Raw(packet.UDP, nettest.Payload(80)),
		"ICMPv6 unreachable":    ttl16.ICMP(1, 0, 0, quoted),
		"ICMPv6 too big":        ttl16.ICMP(2, 0, 1280, quoted),
		"ICMPv6 without a byte": ttl16.Raw(packet.ICMPv6, nil),
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.fromA(pkt(ip))
			g.wantDrops(map[string]uint64{"ttl-exceeded": 1})
			if n := len(g.a.Take()); n != 0 || g.Stats().ICMPErrors != 0 {
				t.Errorf("%d errors", n)
			}
		})
	}
	t.Run("the gateway", func(t *testing.T) {
		g := newRig(t)
		inj := g.NewInjector()
		inj.Forward([]*packet.Packet{
			pkt(udp(gateway, "10.1.0.77", 1)), pkt(udp(gateway, "10.77.0.1", 1)),
			pkt(withFrag(nettest.Between(gateway, containerC), nettest.DF).UDP(nettest.UDP{}, nettest.Payload(2000))),
		})
		g.wantDrops(map[string]uint64{"no-route": 2, "too-big": 1})
		if g.Stats().ICMPErrors != 0 || len(g.gw.Take()) != 0 {
			t.Error("the gateway was sent an error")
		}
	})
	t.Run("spoofed", func(t *testing.T) {
		g := newRig(t)
		g.fromA(pkt(lastHop(nettest.Between(containerB, containerC)).UDP(nettest.UDP{}, nil)))
		if g.Stats().ICMPErrors != 0 || len(g.b.Take()) != 0 {
			t.Error("the owner of a spoofed address was sent an error")
		}
	})
	t.Run("no gateway address", func(t *testing.T) {
		g := newRig(t)
		g.table.Gateway, g.table.Gateway6 = netip.Addr{}, netip.Addr{}
		g.set(g.table)
		g.fromA(pkt(ttl1.UDP(nettest.UDP{}, nil)), pkt(ttl16.UDP(nettest.UDP{}, nil)))
		g.wantDrops(map[string]uint64{"ttl-exceeded": 2})
		if g.Stats().ICMPErrors != 0 {
			t.Error("an error from nobody")
		}
	})
}

func TestForward_LimitsErrors(t *testing.T) {
	g := newRig(t)
	for range 100 {
		var pkts []*packet.Packet
		for range 50 {
			pkts = append(pkts, pkt(udp(containerA, "10.1.0.77", 1)))
		}
		g.fromA(pkts...)
	}
	d := g.drops()
	sent := g.Stats().ICMPErrors
	if d["no-route"] != 5000 || sent+d["no-scratch"] != 5000 {
		t.Errorf("%d errors sent, drops %v: they do not add up", sent, d)
	}
	if sent >= 5000 || sent < ownSlots {
		t.Errorf("%d errors for 5000 packets", sent)
	}
	if n := uint64(len(g.a.Take())); n != sent {
		t.Errorf("%d errors came, %d counted", n, sent)
	}
}

func TestForward_ErrorsForOneContainerCostAnotherNone(t *testing.T) {
	g := newRig(t)
	for range 1000 {
		g.fromA(pkt(udp(containerA, "10.1.0.77", 10)))
	}
	before := g.Stats().ICMPErrors
	for range 10 {
		g.from(ingress{kind: fromContainer, port: g.portB}, pkt(udp(containerB, "10.1.0.77", 10)))
	}
	if n := g.Stats().ICMPErrors - before; n != 10 || before >= 1000 {
		t.Errorf("%d errors for the ten packets of a container, after %d for a thousand of another", n, before)
	}
}

func TestAllowance_RefillsAtItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a allowance
		drain := func() (n int) {
			for a.take(icmpBurst, icmpPerSecond) {
				n++
			}
			return n
		}
		if n := drain(); n != icmpBurst {
			t.Errorf("a burst of %d, want %d", n, icmpBurst)
		}
		time.Sleep(50 * time.Millisecond)
		if n := drain(); n < icmpPerSecond/20-1 || n > icmpPerSecond/20 {
			t.Errorf("%d in 50 ms, want %d", n, icmpPerSecond/20)
		}
		time.Sleep(time.Hour)
		if n := drain(); n != icmpBurst {
			t.Errorf("a burst of %d after an hour, want %d", n, icmpBurst)
		}
	})
}

func TestForward_CutsSuperpacketsSmallerForASmallPeer(t *testing.T) {
	g := newRig(t)
	super := nettest.Super(nettest.Between(containerA, "10.3.0.2").TCP(nettest.TCP{Seq: 5, Flags: nettest.ACK | nettest.PSH}, nettest.Payload(5000)), 1360)
	whole := bytes.Clone(super.Bytes())
	g.fromA(super)
	var payload []byte
	for _, d := range datagrams(t, g.small) {
		if err := nettest.Check(d); err != nil {
			t.Error(err)
		}
		if len(d) > smallMTU {
			t.Errorf("a packet of %d bytes", len(d))
		}
		payload = append(payload, d[40:]...)
	}
	if !bytes.Equal(payload, whole[40:]) {
		t.Error("other payload")
	}
	g.wantDrops(nil)
}

func TestForward_FragmentsWithoutDF(t *testing.T) {
	h := nettest.Between(containerA, "10.3.0.2")
	h.ID = 0x1234
	options := h
	options.Options = []byte{1, 1, 1, 1, 1, 1, 1, 1}
	for name, c := range map[string]struct {
		p *packet.Packet
		n int
	}{
		"one byte too many":  {pkt(h.UDP(nettest.UDP{}, nettest.Payload(smallMTU-28+1))), 2},
		"three":              {pkt(h.UDP(nettest.UDP{}, nettest.Payload(1600))), 3},
		"as large as can be": {pkt(h.UDP(nettest.UDP{}, nettest.Payload(65535-28))), (65515 + 575) / 576},
		"with IP options":    {pkt(options.UDP(nettest.UDP{}, nettest.Payload(1600))), 3},
		"owed": {func() *packet.Packet {
			p := pkt(h.UDP(nettest.UDP{SrcPort: 9}, nettest.Payload(1000)))
			nettest.Owe(p)
			return p
		}(), 2},
		"ICMP":              {pkt(h.ICMP(8, 0, 1, nettest.Payload(1000))), 2},
		"a first fragment":  {pkt(withFrag(h, nettest.MF).Raw(packet.UDP, nettest.Payload(800))), 2},
		"a middle fragment": {pkt(withFrag(h, nettest.MF|100).Raw(packet.UDP, nettest.Payload(800))), 2},
		"a last fragment":   {pkt(withFrag(h, 100).Raw(packet.UDP, nettest.Payload(801))), 2},
		"the last there is": {pkt(withFrag(h, 8100).Raw(packet.UDP, nettest.Payload(735))), 2},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			want := nettest.Finish(c.p)
			g.fromA(c.p)
			frags := datagrams(t, g.small)
			if len(frags) != c.n {
				t.Fatalf("%d fragments, want %d (drops %v)", len(frags), c.n, g.drops())
			}
			hl := int(want[0]&15) * 4
			base := int(binary.BigEndian.Uint16(want[6:])&0x1fff) * 8
			wantMore := want[6]&0x20 != 0
			var payload []byte
			for i, f := range frags {
				if err := nettest.Check(f); err != nil {
					t.Fatal(err)
				}
				if len(f) > smallMTU {
					t.Errorf("fragment of %d bytes", len(f))
				}
				word := binary.BigEndian.Uint16(f[6:])
				if at := int(word&0x1fff) * 8; at != base+len(payload) {
					t.Errorf("fragment %d is at %d, want %d", i, at, base+len(payload))
				}
				if more := word&nettest.MF != 0; more != (i < len(frags)-1 || wantMore) {
					t.Errorf("fragment %d: more is %v", i, more)
				}
				if binary.BigEndian.Uint16(f[4:]) != 0x1234 || f[8] != 63 || f[9] != want[9] || !bytes.Equal(f[12:20], want[12:20]) {
					t.Errorf("fragment %d has another header", i)
				}
				payload = append(payload, f[hl:]...)
			}
			if !bytes.Equal(payload, want[hl:]) {
				t.Error("the fragments are of another payload")
			}
			g.wantDrops(nil)
		})
	}
}

func TestForward_CopiesNoOptionsToLaterFragments(t *testing.T) {
	g := newRig(t)
	h := nettest.Between(containerA, "10.3.0.2")
	h.Options = []byte{7, 7, 4, 0, 0, 0, 0, 0} // record route: for the first fragment alone (RFC 791 3.1)
	g.fromA(pkt(h.UDP(nettest.UDP{}, nettest.Payload(1600))))
	frags := datagrams(t, g.small)
	if len(frags) != 3 || !bytes.Equal(frags[0][20:28], h.Options) || !bytes.Equal(frags[1][20:28], bytes.Repeat([]byte{1}, 8)) {
		t.Errorf("fragments %x", frags)
	}
}

func TestForward_FragmentsABatch(t *testing.T) {
	// A container whose MTU is the peers' sends a batch of full packets to a peer with a smaller one.
	g := newRig(t)
	var pkts []*packet.Packet
	for range batchPackets {
		pkts = append(pkts, pkt(udp(containerA, "10.3.0.2", 1100)))
	}
	g.fromA(pkts...)
	g.wantDrops(nil)
	if n := len(datagrams(t, g.small)); n != 2*batchPackets {
		t.Errorf("%d fragments, want %d", n, 2*batchPackets)
	}
}

func TestForward_RunsOutOfFragmentsCountably(t *testing.T) {
	g := newRig(t)
	var pkts []*packet.Packet
	for range 10 {
		pkts = append(pkts, pkt(udp(containerA, "10.3.0.2", 20000)))
	}
	g.fromA(pkts...)
	lost := g.drops()["no-scratch"]
	whole := len(datagrams(t, g.small)) / ((20008 + 575) / 576)
	if lost == 0 || uint64(whole)+lost != 10 {
		t.Errorf("%d packets whole, %d lost, want 10 together", whole, lost)
	}
	g.fromA(pkt(udp(containerA, "10.3.0.2", 20000)))
	if len(datagrams(t, g.small)) == 0 {
		t.Error("the next batch has no room either")
	}
}

func TestForward_DropsFragmentsBeyondAPacket(t *testing.T) {
	g := newRig(t)
	g.fromA(pkt(withFrag(nettest.Between(containerA, "10.3.0.2"), nettest.MF|0x1fff).Raw(packet.UDP, nettest.Payload(800))))
	g.wantDrops(map[string]uint64{"malformed": 1})
}

func TestForward_DropsWhereNoFragmentFits(t *testing.T) {
	g := newRig(t)
	g.table.Routes = append(g.table.Routes, Route{netip.MustParsePrefix("10.5.0.0/16"), ToPeer(PeerConfig{Addr: g.peerCfg.Addr, MTU: 20})})
	g.set(g.table)
	g.fromA(pkt(udp(containerA, "10.5.0.1", 1)))
	g.wantDrops(map[string]uint64{"too-big": 1})
}

func TestForward_DeliversWhatCameOverTheNetworkWhole(t *testing.T) {
	// A peer over a link with offloads may send more than the container's MTU in one packet, DF or not.
	for _, ip := range [][]byte{
		withFrag(nettest.Between(containerC, containerA), nettest.DF).UDP(nettest.UDP{}, nettest.Payload(30000)),
		nettest.Between(containerC6, containerA6).UDP(nettest.UDP{}, nettest.Payload(30000)),
	} {
		g := newRig(t)
		g.fromPeer(g.peer, pkt(ip))
		one(t, "container a", g.a.Take(), hop1(ip))
	}
}
