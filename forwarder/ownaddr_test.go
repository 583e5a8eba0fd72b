// Tests of a namespace that has a whole subnet, our own addresses among it.

package forwarder

import (
	"net/netip"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	bridged   = "10.1.8.20" // a container behind the namespace
	ownNet    = "10.1.8.0"  // its TAP
	ownBridge = "10.1.8.1"  // its bridge
	dummy     = "192.0.0.8"
)

// withSubnet adds a namespace that has 10.1.8.0/24.
func (g *rig) withSubnet() (*nettest.Device, *Port) {
	g.t.Helper()
	subnet := netip.MustParsePrefix("10.1.8.0/24")
	d := nettest.NewDevice(g.t)
	p, err := g.AddPort(PortConfig{Name: "docker", Sources: []netip.Prefix{subnet}, MTU: 1500, Device: d, Errors: netip.MustParseAddr(dummy)})
	if err != nil {
		g.t.Fatal(err)
	}
	own := ToOwnAt(p, g.gw)
	g.table.Routes = append(g.table.Routes, Route{subnet, ToPort(p)},
		Route{alone(netip.MustParseAddr(ownNet)), own}, Route{alone(netip.MustParseAddr(ownBridge)), own})
	g.set(g.table)
	return d, p
}

func TestForward_RoutesASubnetToOneNamespace(t *testing.T) {
	g := newRig(t)
	d, port := g.withSubnet()
	g.fromPeer(g.peer, pkt(udp(containerC, bridged, 10)), pkt(udp(containerC, ownBridge, 10)), pkt(udp(containerC, ownNet, 10)))
	g.fromA(pkt(udp(containerA, bridged, 10)))
	if got := len(d.Take()); got != 4 {
		t.Errorf("%d packets arrived in the namespace, want 4", got)
	}
	in := ingress{kind: fromContainer, port: port}
	for _, src := range []string{bridged, ownNet, ownBridge} {
		g.from(in, pkt(udp(src, containerC, 10)))
	}
	if got := len(datagrams(t, g.peer)); got != 3 {
		t.Errorf("%d packets of the namespace arrived at the peer, want 3", got)
	}
	g.wantDrops(nil)
	for _, src := range []string{"10.1.9.20", containerA, containerC, dummy} {
		g.from(in, pkt(udp(src, containerC, 10)))
	}
	g.wantDrops(map[string]uint64{"spoofed-by-container": 4})
}

func TestForward_TellsANamespaceFromAnotherAddressThanItsOwn(t *testing.T) {
	g := newRig(t)
	d, port := g.withSubnet()
	for _, src := range []string{bridged, ownNet} {
		g.from(ingress{kind: fromContainer, port: port}, pkt(udp(src, "10.9.0.1", 10)))
		got := d.Take()
		if len(got) != 1 {
			t.Fatalf("%d errors for %s", len(got), src)
		}
		if from, to := addrs(got[0].Bytes()); from.String() != dummy || to.String() != src {
			t.Errorf("error from %v to %v", from, to)
		}
	}
	g.fromPeer(g.peer, pkt(lastHop(nettest.Between(containerC, bridged)).UDP(nettest.UDP{}, nil)))
	got := datagrams(t, g.peer)
	if len(got) != 1 {
		t.Fatalf("%d errors for a peer", len(got))
	}
	if from, _ := addrs(got[0]); from.String() != gateway {
		t.Errorf("error to a peer from %v, which is not of our subnet", from)
	}
}

// Both ways path MTU discovery must do without the namespace.
func TestForward_TakesProbesOutOfWhatANamespaceGets(t *testing.T) {
	const token = 0xfeedfacecafebeef
	echo := func(kind uint8, ident uint32, size int) []byte {
		return nettest.Between("10.2.0.1", ownBridge).ICMP(kind, 0, ident<<16|1, make([]byte, size))
	}
	for name, c := range map[string]struct {
		ip                []byte
		gateway, attached int
	}{
		"a probe":                             {echo(8, probeIdent, 1400), 1, 0},
		"somebody's ping":                     {echo(8, 7, 1400), 0, 1},
		"too short for a probe":               {echo(8, probeIdent, 4), 0, 1},
		"a part of a ping":                    {withFrag(nettest.Between("10.2.0.1", ownBridge), nettest.MF).ICMP(8, 0, probeIdent<<16|1, make([]byte, 64)), 0, 1},
		"an answer to its ping":               {echo(0, 7, 1400), 0, 1},
		"an answer nobody asked for":          {echo(0, probeIdent, 64), 0, 1},
		"a datagram":                          {udp("10.2.0.1", ownBridge, 100), 0, 1},
		"a datagram with nothing":             {nettest.Between("10.2.0.1", ownBridge).Raw(packet.ICMP, nil), 0, 1},
		"what a container behind it is asked": {nettest.Between("10.2.0.1", bridged).ICMP(8, 0, probeIdent<<16|1, make([]byte, 64)), 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			d, _ := g.withSubnet()
			g.fromPeer(g.peer, pkt(c.ip))
			if gw, at := len(g.gw.Take()), len(d.Take()); gw != c.gateway || at != c.attached {
				t.Errorf("%d packets for the gateway, %d for the namespace", gw, at)
			}
		})
	}
	t.Run("the answer to ours", func(t *testing.T) {
		g := newRig(t)
		d, _ := g.withSubnet()
		if err := g.SendProbe(Probe{Peer: g.peerCfg.Addr, Src: netip.MustParseAddr(ownBridge), Dst: netip.MustParseAddr("10.2.0.1"), Token: token, Size: 100}); err != nil {
			t.Fatal(err)
		}
		answer := nettest.Between("10.2.0.1", ownBridge).ICMP(0, 0, probeIdent<<16|1, []byte{0xfe, 0xed, 0xfa, 0xce, 0xca, 0xfe, 0xbe, 0xef})
		g.fromPeer(g.peer, pkt(answer))
		if e := g.events(); len(e) != 1 || e[0] != (PathEvent{Answered: token}) {
			t.Errorf("events %v", e)
		}
		if n := len(d.Take()); n != 0 {
			t.Error("the namespace got it")
		}
	})
	t.Run("what another container sends", func(t *testing.T) {
		g := newRig(t)
		d, _ := g.withSubnet()
		g.fromA(pkt(nettest.Between(containerA, ownBridge).ICMP(8, 0, probeIdent<<16|1, make([]byte, 64))))
		if gw, at := len(g.gw.Take()), len(d.Take()); gw != 0 || at != 1 {
			t.Errorf("%d packets for the gateway, %d for the namespace", gw, at)
		}
	})
}
