// Tests of the route table and of reading leases as peers.

package node

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

type nowhere struct{ _ int }

func (*nowhere) Send(*packet.Scratch, []*packet.Packet) {}

func testSelf() self {
	return self{
		nodeID:    "aa",
		subnet:    netip.MustParsePrefix("10.5.72.0/24"),
		network:   netip.MustParsePrefix("10.5.0.0/16"),
		public:    netip.MustParseAddrPort("192.0.2.1:18285"),
		mtu:       1472,
		stockPort: 8285,
		subnetLen: 24,
	}
}

func stockLease(subnet, public string) lease.Lease {
	l := lease.Lease{Subnet: netip.MustParsePrefix(subnet)}
	if public != "" {
		l.Attrs.PublicIP = netip.MustParseAddr(public)
	}
	return l
}

func ovlLease(subnet, public, id string, port, mtu int) lease.Lease {
	l := stockLease(subnet, public)
	l.Attrs.RootlessOvl = &lease.Extension{V: 1, NodeID: id, Port: port, MTU: mtu}
	return l
}

// lookup is what the longest matching prefix of the table leads to.
func lookup(t *testing.T, table forwarder.TableConfig, addr string) forwarder.Hop {
	t.Helper()
	var best netip.Prefix
	var hop forwarder.Hop
	seen := make(map[netip.Prefix]bool)
	for _, r := range table.Routes {
		if seen[r.Prefix] {
			t.Errorf("two routes to %v", r.Prefix)
		}
		seen[r.Prefix] = true
		if r.Prefix.Contains(netip.MustParseAddr(addr)) && (!best.IsValid() || r.Prefix.Bits() > best.Bits()) {
			best, hop = r.Prefix, r.Hop
		}
	}
	return hop
}

func TestRoutes_LeadEveryAddressToItsHop(t *testing.T) {
	gw := &nowhere{}
	web, old := new(forwarder.Port), new(forwarder.Port)
	me := testSelf()
	capable := ovlLease("10.5.6.0/24", "192.0.2.6", "ee", 18285, 1472)
	capable.Attrs.RootlessOvl.Caps = []string{"of-the-future", lease.CapPartialChecksums}
	steering := ovlLease("10.5.7.0/24", "192.0.2.7", "ff", 18285, 1472)
	steering.Attrs.RootlessOvl.Caps = []string{lease.CapSteers}
	table := routes(routeSources{
		me: me,
		peers: peersOf([]lease.Lease{
			stockLease("10.5.1.0/24", "192.0.2.2"),
			ovlLease("10.5.2.0/24", "192.0.2.3", "bb", 18285, 1400),
			ovlLease("10.5.3.0/24", "192.0.2.1", "cc", 18286, 9000), // another node on this host
			ovlLease("10.5.72.0/24", "192.0.2.1", "aa", 18285, 1472),
			ovlLease("10.5.4.0/24", "192.0.2.4", "dd", 0, 0),
			stockLease("10.5.5.0/24", ""),
			capable,
			steering,
		}, me),
		attachments: []attachedPort{
			{addr: netip.MustParsePrefix("10.5.72.9/24"), port: web},
			{addr: netip.MustParsePrefix("10.5.90.4/24"), port: old},
		},
		gateway: gw,
	})
	peer := func(addr string, mtu int, anyPort bool) forwarder.Hop {
		return forwarder.ToPeer(forwarder.PeerConfig{Addr: netip.MustParseAddrPort(addr), MTU: mtu, AnyPort: anyPort})
	}
	for _, tc := range []struct {
		name, addr string
		want       forwarder.Hop
	}{
		{"attachment", "10.5.72.9", forwarder.ToPort(web)},
		{"gateway", "10.5.72.1", forwarder.ToGateway(gw)},
		{"network address, which stock hosts speak from", "10.5.72.0", forwarder.ToGateway(gw)},
		{"free address of ours", "10.5.72.10", forwarder.UnreachableHost},
		{"broadcast of ours", "10.5.72.255", forwarder.UnreachableHost},
		{"stock peer", "10.5.1.7", peer("192.0.2.2:8285", 1472, true)},
		{"stock peer's network address", "10.5.1.0", peer("192.0.2.2:8285", 1472, true)},
		{"peer with a port and a smaller MTU", "10.5.2.7", peer("192.0.2.3:18285", 1400, false)},
		{"peer with a larger MTU than ours", "10.5.3.7", peer("192.0.2.1:18286", 1472, false)},
		{"peer that names neither port nor MTU", "10.5.4.7", peer("192.0.2.4:8285", 1472, false)},
		{"peer without an address", "10.5.5.7", forwarder.UnreachableNet},
		{"peer that takes partial checksums", "10.5.6.7", forwarder.ToPeer(forwarder.PeerConfig{
			Addr: netip.MustParseAddrPort("192.0.2.6:18285"), MTU: 1472, PartialChecksums: true,
		})},
		{"peer that steers", "10.5.7.7", forwarder.ToPeer(forwarder.PeerConfig{
			Addr: netip.MustParseAddrPort("192.0.2.7:18285"), MTU: 1472, Steers: true,
		})},
		{"subnet that nobody leases", "10.5.200.7", forwarder.UnreachableNet},
		{"outside", "198.51.100.1", forwarder.ToEgress(gw)},
		{"attachment of an earlier subnet", "10.5.90.4", forwarder.ToPort(old)},
		{"gateway of an earlier subnet", "10.5.90.1", forwarder.ToGateway(gw)},
		{"the rest of an earlier subnet", "10.5.90.5", forwarder.UnreachableNet},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := lookup(t, table, tc.addr); got != tc.want {
				t.Errorf("%s goes to %+v, want %+v", tc.addr, got, tc.want)
			}
		})
	}
	if want := netip.MustParseAddr("10.5.72.1"); table.Gateway != want {
		t.Errorf("gateway %v, want %v", table.Gateway, want)
	}
}

func TestRoutes_AttachmentOfAnEarlierSubnetBeatsItsNewOwner(t *testing.T) {
	gw, port := &nowhere{}, new(forwarder.Port)
	me := testSelf()
	table := routes(routeSources{
		me:          me,
		peers:       peersOf([]lease.Lease{ovlLease("10.5.90.0/24", "192.0.2.3", "bb", 18285, 1472)}, me),
		attachments: []attachedPort{{addr: netip.MustParsePrefix("10.5.90.4/24"), port: port}},
		gateway:     gw,
	})
	if got := lookup(t, table, "10.5.90.4"); got != forwarder.ToPort(port) {
		t.Errorf("the attachment: %+v", got)
	}
	if got := lookup(t, table, "10.5.90.5"); got == forwarder.UnreachableNet {
		t.Error("the new owner's containers are cut off")
	}
}

func TestPeersOf_RefusesLeasesThatMakeNoSense(t *testing.T) {
	for _, tc := range []struct {
		name  string
		lease lease.Lease
		good  bool
	}{
		{"ordinary", stockLease("10.5.1.0/24", "192.0.2.2"), true},
		{"no public IP", stockLease("10.5.1.0/24", ""), false},
		{"multicast", stockLease("10.5.1.0/24", "224.0.0.1"), false},
		{"broadcast", stockLease("10.5.1.0/24", "255.255.255.255"), false},
		{"unspecified", stockLease("10.5.1.0/24", "0.0.0.0"), false},
		{"loopback", stockLease("10.5.1.0/24", "127.0.0.1"), false},
		{"link-local", stockLease("10.5.1.0/24", "169.254.169.254"), false},
		{"of no network", stockLease("10.5.1.0/24", "0.1.2.3"), false},
		{"reserved", stockLease("10.5.1.0/24", "240.0.0.1"), false},
		{"our subnet", stockLease("10.5.72.0/24", "192.0.2.2"), false},
		{"a part of our subnet", stockLease("10.5.72.128/25", "192.0.2.2"), false},
		{"around our subnet", stockLease("10.5.0.0/17", "192.0.2.2"), false},
		{"the whole network", stockLease("10.5.0.0/16", "192.0.2.2"), false},
		{"outside the network", stockLease("10.6.1.0/24", "192.0.2.2"), false},
		{"the whole internet", stockLease("0.0.0.0/0", "192.0.2.2"), false},
		{"our address and port", ovlLease("10.5.1.0/24", "192.0.2.1", "bb", 18285, 0), false},
		{"our address, another port", ovlLease("10.5.1.0/24", "192.0.2.1", "bb", 18286, 0), true},
		{"impossible port", ovlLease("10.5.1.0/24", "192.0.2.2", "bb", 70000, 0), false},
		{"tiny MTU", ovlLease("10.5.1.0/24", "192.0.2.2", "bb", 18285, 1), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			peers := peersOf([]lease.Lease{tc.lease}, testSelf())
			if len(peers) != 1 || (peers[0].problem == "") != tc.good {
				t.Errorf("got %+v", peers)
			}
			if tc.good && peers[0].mtu != 1472 {
				t.Errorf("MTU %d", peers[0].mtu)
			}
		})
	}
}

func TestPeersOf_SaysHowToMoveToAReservation(t *testing.T) {
	me := testSelf()
	me.stockPort = int(me.public.Port())
	reserved := stockLease("10.5.1.0/24", "192.0.2.1")
	reserved.Reservation = true
	other := stockLease("10.5.2.0/24", "192.0.2.2")
	other.Reservation = true
	peers := peersOf([]lease.Lease{reserved, other, stockLease("10.5.3.0/24", "192.0.2.1")}, me)
	if p := peers[0]; !p.forUs || p.addr.IsValid() || !strings.Contains(p.problem, "holds 10.5.72.0/24") || !strings.Contains(p.problem, "subnets/10.5.72.0-24") {
		t.Errorf("reserved for us: %+v", p)
	}
	if p := peers[1]; p.forUs || p.problem != "" {
		t.Errorf("reserved for another: %+v", p)
	}
	if p := peers[2]; p.forUs || !strings.Contains(p.problem, "our own") {
		t.Errorf("not a reservation: %+v", p)
	}
}

func TestNode_TellsOfPeersWithBothAddresses(t *testing.T) {
	var logged syncBuffer
	c := testConfig(t)
	c.Log = slog.New(slog.NewTextHandler(&logged, nil))
	n := dualStackNode(t, newWorld(), c)
	peer := dualStackLease(ovlLease("10.5.1.0/24", "192.0.2.2", "bb", 18285, 1430), "fd00:5:0:1::/64", "2001:db8::2", 5, 5)
	n.setLeases(nil)
	n.setLeases([]lease.Lease{peer})
	n.setLeases(nil)
	for _, want := range []string{
		`msg=peer subnet=10.5.1.0/24 addr=192.0.2.2:18285 subnet6=fd00:5:0:1::/64 addr6=[2001:db8::2]:18285 mtu=1430`,
		`msg="peer gone" subnet=10.5.1.0/24 addr=192.0.2.2:18285 subnet6=fd00:5:0:1::/64 addr6=[2001:db8::2]:18285`,
	} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("%q is not in the log:\n%s", want, logged.String())
		}
	}
}

func TestPeersOf_FirstOfTwoLeasesOfOneSubnetWins(t *testing.T) {
	peers := peersOf([]lease.Lease{stockLease("10.5.1.0/24", "192.0.2.2"), stockLease("10.5.1.0/24", "192.0.2.3")}, testSelf())
	if len(peers) != 2 || peers[0].problem != "" || peers[1].problem == "" {
		t.Errorf("got %+v", peers)
	}
}

func TestPeersOf_GivesEveryAddressToOnePeer(t *testing.T) {
	at := func(l lease.Lease, rev int64) lease.Lease { l.ModRevision = rev; return l }
	ordinary := at(ovlLease("10.5.48.0/24", "192.0.2.2", "bb", 18285, 0), 9)
	for _, tc := range []struct {
		name   string
		leases []lease.Lease
		good   []bool
	}{
		{"nested, though it is older", []lease.Lease{ordinary, at(stockLease("10.5.48.0/25", "192.0.2.9"), 5)}, []bool{true, false}},
		{"nested, first in the store", []lease.Lease{at(stockLease("10.5.48.0/25", "192.0.2.9"), 5), ordinary}, []bool{false, true}},
		{"around", []lease.Lease{at(stockLease("10.5.48.0/20", "192.0.2.9"), 5), ordinary}, []bool{false, true}},
		{"the older of two that fit", []lease.Lease{ordinary, at(stockLease("10.5.48.0/24", "192.0.2.9"), 5)}, []bool{false, true}},
		{"the older of two that do not", []lease.Lease{at(stockLease("10.5.48.0/25", "192.0.2.8"), 7), at(stockLease("10.5.48.0/26", "192.0.2.9"), 5)}, []bool{false, true}},
		{"apart", []lease.Lease{at(stockLease("10.5.49.0/25", "192.0.2.9"), 5), ordinary, at(stockLease("10.5.49.128/25", "192.0.2.9"), 6)}, []bool{true, true, true}},
		{"with one that is no peer", []lease.Lease{at(stockLease("10.5.48.0/24", "224.0.0.1"), 5), ordinary}, []bool{false, true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			peers := peersOf(tc.leases, testSelf())
			if len(peers) != len(tc.good) {
				t.Fatalf("got %+v", peers)
			}
			for i, p := range peers {
				if (p.problem == "") != tc.good[i] || (p.addr == netip.AddrPort{}) != (p.problem != "") || p.lease.Subnet != tc.leases[i].Subnet {
					t.Errorf("%v: problem %q, addr %v", p.lease.Subnet, p.problem, p.addr)
				}
			}
		})
	}
	if peers := peersOf([]lease.Lease{ordinary, stockLease("10.5.48.0/25", "192.0.2.9")}, testSelf()); !strings.Contains(peers[1].problem, "10.5.48.0/24 at 192.0.2.2:18285") {
		t.Errorf("the problem does not name the other: %q", peers[1].problem)
	}
}

// Flannel's udp backend sends to every lease, whatever its BackendType.
func TestPeersOf_TellsOfAnotherBackendAndSendsAllTheSame(t *testing.T) {
	odd := stockLease("10.5.1.0/24", "192.0.2.2")
	odd.Attrs.BackendType = "vxlan"
	peers := peersOf([]lease.Lease{odd, stockLease("10.5.2.0/24", "192.0.2.3")}, testSelf())
	if p := peers[0]; p.problem != "" || p.backend() != "vxlan" || !strings.Contains(p.doubt, "vxlan") || p.addr.String() != "192.0.2.2:8285" {
		t.Errorf("%+v", p)
	}
	if p := peers[1]; p.problem+p.doubt != "" || p.backend() != "udp" {
		t.Errorf("%+v", p)
	}
}

func TestPeersOf_LoopbackIsGoodAmongItsOwn(t *testing.T) {
	me := testSelf()
	me.public = netip.MustParseAddrPort("127.0.0.1:18285")
	if peers := peersOf([]lease.Lease{stockLease("10.5.1.0/24", "127.0.0.2")}, me); peers[0].problem != "" {
		t.Errorf("%+v", peers)
	}
}

func TestPeersOf_LeavesOutEveryLeaseOfOurs(t *testing.T) {
	peers := peersOf([]lease.Lease{ovlLease("10.5.1.0/24", "192.0.2.9", "aa", 1, 0), ovlLease("10.5.72.0/24", "192.0.2.1", "aa", 18285, 0)}, testSelf())
	if len(peers) != 0 {
		t.Errorf("got %+v", peers)
	}
}
