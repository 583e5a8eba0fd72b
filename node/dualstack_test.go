// Tests of a dual-stack network: the addresses of containers, the ways to peers, what is published, who is refused.

package node

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

const dualStackConfig = `{"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`

func dualStackSelf() self {
	me := vxlanSelf()
	me.mtu = 1430
	me.subnet6, me.network6, me.subnetLen6 = netip.MustParsePrefix("fd00:5:0:72::/64"), netip.MustParsePrefix("fd00:5::/48"), 64
	me.public6 = netip.MustParseAddrPort("[2001:db8::1]:18285")
	return me
}

// dualStackLease is a vxlan node's lease with what it has for IPv6.
func dualStackLease(l lease.Lease, subnet6, public6 string, mac, mac6 byte) lease.Lease {
	l = vxlanLease(l, 1, [6]byte{0xc6, 0, 0, 0, 0, mac})
	l.Subnet6 = netip.MustParsePrefix(subnet6)
	if public6 != "" {
		l.Attrs.PublicIPv6 = netip.MustParseAddr(public6)
	}
	l.Attrs.BackendV6Data = lease.VXLANData{VNI: 1, VtepMAC: [6]byte{0xc6, 0, 0, 0, 0, mac6}}.JSON()
	return l
}

func TestAddr6Of_PutsTheIPv4AddressIntoTheSubnet(t *testing.T) {
	for _, tc := range []struct{ addr, subnet6, want string }{
		{"10.5.72.9/24", "fd00:5:0:72::/64", "fd00:5:0:72::a05:4809/64"},
		{"10.5.72.9/24", "fd00:5::7200:0:0/96", "fd00:5::7200:a05:4809/96"},
		{"10.5.72.9/24", "fd00:5::7200/120", "fd00:5::7209/120"},
		{"10.5.72.130/25", "fd00:5::7200/121", "fd00:5::7202/121"},
		{"10.5.72.9/24", "fd00:5::7200/121", "fd00:5::7209/121"},
		{"10.5.72.129/24", "fd00:5::7200/121", ""}, // there is no room for it
		{"10.5.72.4/24", "fd00:5::7200/126", ""},
	} {
		got, ok := addr6Of(netip.MustParsePrefix(tc.addr), netip.MustParsePrefix(tc.subnet6))
		if ok != (tc.want != "") || ok && got.String() != tc.want {
			t.Errorf("%s in %s: %v, %v; want %q", tc.addr, tc.subnet6, got, ok, tc.want)
		}
	}
}

func TestPeersOf_FindsTheIPv6WayOfADualStackPeer(t *testing.T) {
	me := dualStackSelf()
	v4, stock6 := "10.5.1.0/24", "fd00:5:0:1::/64"
	flannel := func(l lease.Lease) lease.Lease { return dualStackLease(l, stock6, "2001:db8::2", 1, 2) }
	of := func(change func(*lease.Lease)) lease.Lease {
		l := flannel(stockLease(v4, "192.0.2.2"))
		change(&l)
		return l
	}
	ours := dualStackLease(ovlLease(v4, "192.0.2.3", "bb", 18472, 1400), stock6, "2001:db8::3", 3, 3)
	small := dualStackLease(ovlLease(v4, "192.0.2.3", "bb", 18472, 1200), stock6, "2001:db8::3", 3, 3)
	for _, tc := range []struct {
		name  string
		lease lease.Lease
		says  string // what is wrong with IPv6
		want  forwarder.PeerConfig
	}{
		{"a flannel host", of(func(*lease.Lease) {}), "",
			forwarder.PeerConfig{Addr: netip.MustParseAddrPort("[2001:db8::2]:8472"), MTU: 1430, AnyPort: true, VTEP: [6]byte{0xc6, 0, 0, 0, 0, 2}}},
		{"one of ours", ours, "",
			forwarder.PeerConfig{Addr: netip.MustParseAddrPort("[2001:db8::3]:18472"), MTU: 1400, VTEP: [6]byte{0xc6, 0, 0, 0, 0, 3}, OuterChecksums: true}},
		{"without a subnet", of(func(l *lease.Lease) { l.Subnet6 = netip.Prefix{} }), "no IPv6 subnet", forwarder.PeerConfig{}},
		{"outside the network", of(func(l *lease.Lease) { l.Subnet6 = netip.MustParsePrefix("fd00:6::/64") }), "outside the network fd00:5::/48", forwarder.PeerConfig{}},
		{"over ours", of(func(l *lease.Lease) { l.Subnet6 = me.subnet6 }), "overlaps ours", forwarder.PeerConfig{}},
		{"without an address", of(func(l *lease.Lease) { l.Attrs.PublicIPv6 = netip.Addr{} }), "no PublicIPv6", forwarder.PeerConfig{}},
		{"link-local", of(func(l *lease.Lease) { l.Attrs.PublicIPv6 = netip.MustParseAddr("fe80::1") }), "cannot be sent to", forwarder.PeerConfig{}},
		{"multicast", of(func(l *lease.Lease) { l.Attrs.PublicIPv6 = netip.MustParseAddr("ff02::1") }), "cannot be sent to", forwarder.PeerConfig{}},
		{"loopback", of(func(l *lease.Lease) { l.Attrs.PublicIPv6 = netip.IPv6Loopback() }), "cannot be sent to", forwarder.PeerConfig{}},
		{"without data", of(func(l *lease.Lease) { l.Attrs.BackendV6Data = nil }), "no BackendV6Data", forwarder.PeerConfig{}},
		{"a small MTU", small, "below the 1280", forwarder.PeerConfig{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := peersOf([]lease.Lease{tc.lease}, me)[0]
			if p.problem != "" || !p.addr.IsValid() || !p.addr.Addr().Is4() {
				t.Fatalf("IPv4: %+v", p)
			}
			if tc.says != "" {
				if !strings.Contains(p.trouble(), "no IPv6: ") || !strings.Contains(p.trouble(), tc.says) || p.v6.addr.IsValid() || len(p.ways()) != 1 {
					t.Errorf("%+v, want a problem with %q", p.v6, tc.says)
				}
				return
			}
			if p.trouble() != "" || p.config(p.v6) != tc.want || len(p.ways()) != 2 {
				t.Errorf("%+v, want %+v; %s", p.config(p.v6), tc.want, p.trouble())
			}
		})
	}
	t.Run("two with one subnet", func(t *testing.T) {
		older, younger := flannel(stockLease(v4, "192.0.2.2")), flannel(stockLease("10.5.2.0/24", "192.0.2.4"))
		older.ModRevision, younger.ModRevision = 5, 7
		peers := peersOf([]lease.Lease{younger, older}, me)
		if peers[0].problem != "" || !strings.Contains(peers[0].trouble(), "overlaps") || peers[1].trouble() != "" {
			t.Errorf("%+v", peers)
		}
	})
	t.Run("one that gets nothing takes nothing", func(t *testing.T) {
		at := func(subnet, subnet6, public string, rev int64) lease.Lease {
			l := dualStackLease(stockLease(subnet, public), subnet6, "2001:db8::9", 1, 2)
			l.ModRevision = rev
			return l
		}
		peers := peersOf([]lease.Lease{at("10.5.1.0/24", "fd00:5:0:1::/64", "192.0.2.2", 5), at("10.5.1.0/24", "fd00:5:0:2::/64", "192.0.2.3", 6), at("10.5.2.0/24", "fd00:5:0:2::/64", "192.0.2.4", 7)}, me)
		if peers[0].trouble() != "" || peers[1].problem == "" || peers[2].trouble() != "" || len(peers[2].ways()) != 2 {
			t.Errorf("%+v", peers)
		}
	})
	t.Run("a peer of another backend", func(t *testing.T) {
		odd := of(func(l *lease.Lease) { l.Attrs.BackendType = "host-gw" })
		if p := peersOf([]lease.Lease{odd}, me)[0]; !strings.Contains(p.problem, "host-gw") || p.trouble() != p.problem || len(p.ways()) != 0 {
			t.Errorf("%+v", p)
		}
	})
}

func TestRoutes_OfADualStackNode(t *testing.T) {
	me, gw, port := dualStackSelf(), &nowhere{}, new(forwarder.Port)
	peers := peersOf([]lease.Lease{dualStackLease(stockLease("10.5.1.0/24", "192.0.2.2"), "fd00:5:0:1::/64", "2001:db8::2", 1, 2)}, me)
	src := routeSources{
		me: me, peers: peers, gateway: gw,
		attachments: []attachedPort{{addr: netip.MustParsePrefix("10.5.72.9/24"), addr6: netip.MustParsePrefix("fd00:5:0:72::a05:4809/64"), port: port}},
	}
	table := routes(src)
	for addr, want := range map[string]forwarder.Hop{
		"fd00:5:0:72::a05:4809": forwarder.ToPort(port),
		"fd00:5:0:72::1":        forwarder.ToGateway(gw),
		"fd00:5:0:72::":         forwarder.ToGateway(gw),
		"fd00:5:0:72::2":        forwarder.UnreachableHost,
		"fd00:5:0:1::a05:102":   forwarder.ToPeer(peers[0].config(peers[0].v6)),
		"fd00:5:0:1::":          forwarder.ToPeer(peers[0].config(peers[0].v6)),
		"fd00:5:0:2::1":         forwarder.UnreachableNet,
		"2001:db8:9::1":         forwarder.ToEgress(gw),
		"10.5.72.9":             forwarder.ToPort(port),
		"10.5.1.7":              forwarder.ToPeer(peers[0].config(peers[0].way)),
	} {
		if got := lookup(t, table, addr); got != want {
			t.Errorf("%s leads to %+v, want %+v", addr, got, want)
		}
	}
	if table.Gateway6.String() != "fd00:5:0:72::1" || table.Gateway.String() != "10.5.72.1" {
		t.Errorf("gateways %v and %v", table.Gateway, table.Gateway6)
	}
	want := []netip.Addr{netip.MustParseAddr("10.5.72.1"), netip.MustParseAddr("10.5.72.0"), netip.MustParseAddr("fd00:5:0:72::1"), netip.MustParseAddr("fd00:5:0:72::")}
	if got := gatewayAddrs(me.subnets(), src.attachments); !slices.Equal(got, want) {
		t.Errorf("the gateway's addresses %v", got)
	}
	targets := pathTargets(peers, me.subnets())
	if len(targets) != 2 || targets[1].source != table.Gateway6 || targets[1].least != 1280 ||
		targets[1].answers != [2]netip.Addr{netip.MustParseAddr("fd00:5:0:1::"), netip.MustParseAddr("fd00:5:0:1::1")} || targets[0].source != table.Gateway {
		t.Errorf("paths %+v", targets)
	}
	for _, r := range routes(routeSources{me: testSelf(), gateway: gw}).Routes {
		if r.Prefix.Addr().Is6() {
			t.Errorf("an IPv4 network has a route to %v", r.Prefix)
		}
	}
}

func dualStackNode(t *testing.T, w *world, c Config) *Node {
	t.Helper()
	n := readyNode(t, w, c, "10.5.72.0/24")
	cfg, err := lease.ParseConfig([]byte(dualStackConfig))
	if err != nil {
		t.Fatal(err)
	}
	n.netConfig, n.mtu, n.subnet6, n.vxlan = cfg, 1430, netip.MustParsePrefix("fd00:5:0:72::/64"), vxlanSelf().vxlan
	n.external.public6 = netip.MustParseAddr("2001:db8::1")
	return n
}

func TestAttach_GivesBothAddressesInADualStackNetwork(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := dualStackNode(t, w, testConfig(t))
	got, err := n.Attach(t.Context(), api.AttachRequest{PID: 77})
	if err != nil {
		t.Fatal(err)
	}
	if got.Addr != "10.5.72.2/24" || got.Addr6 != "fd00:5:0:72::a05:4802/64" || got.Gateway6 != "fd00:5:0:72::1" || got.MTU != 1430 {
		t.Errorf("got %+v", got)
	}
	addr6 := netip.MustParsePrefix(got.Addr6)
	tc := c.links["eth0"].config
	gw6 := netip.MustParseAddr("fd00:5:0:72::1")
	if !slices.Contains(tc.Addrs, addr6) || len(tc.Addrs) != 2 ||
		!slices.Contains(tc.Routes, nsutil.Route{Dst: netip.MustParsePrefix("fd00:5::/48"), Gateway: gw6}) || !slices.Contains(tc.Routes, nsutil.Route{Dst: netip.MustParsePrefix("::/0"), Gateway: gw6}) {
		t.Errorf("TAP: %+v", tc)
	}
	if !w.routed()[addr6.Addr()] || !slices.Contains(w.own, gw6) {
		t.Errorf("routed %v, the gateway's %v", w.routed(), w.own)
	}
	// Another daemon finds them again.
	stopNode(n)
	again := dualStackNode(t, w, n.cfg)
	if err := again.adopt(); err != nil {
		t.Fatal(err)
	}
	list, err := again.Attachments(t.Context())
	if err != nil || len(list) != 1 || list[0].Addr6 != got.Addr6 || !w.routed()[addr6.Addr()] {
		t.Errorf("taken up again: %+v, %v, routed %v", list, err, w.routed())
	}
	if err := again.Detach(t.Context(), "77", ""); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(w.released, netip.PrefixFrom(addr6.Addr(), 128)) {
		t.Errorf("flows released: %v", w.released)
	}
	nothingLeft(t, w, again)
}

func TestAttach_GivesIPv4OnlyWhereIPv6IsSwitchedOff(t *testing.T) {
	var logged syncBuffer
	c := testConfig(t)
	c.Log = slog.New(slog.NewTextHandler(&logged, nil))
	w := newWorld()
	box := w.start(77)
	box.noIPv6 = true
	n := dualStackNode(t, w, c)
	got, err := n.Attach(t.Context(), api.AttachRequest{PID: 77})
	if err != nil || got.Addr6 != "" || got.Addr == "" {
		t.Fatalf("%+v, %v", got, err)
	}
	if tc := box.links["eth0"].config; len(tc.Addrs) != 1 || len(tc.Routes) != 2 {
		t.Errorf("TAP: %+v", tc)
	}
	if text := logged.String(); strings.Count(text, "IPv6 switched off") != 1 || !strings.Contains(text, "disable_ipv6") {
		t.Errorf("log: %s", text)
	}
	for addr := range w.routed() {
		if addr.Is6() {
			t.Errorf("%v is routed", addr)
		}
	}
}

func TestAttach_SaysThatTheIPv6SubnetIsTooSmall(t *testing.T) {
	w := newWorld()
	w.start(77)
	n := dualStackNode(t, w, testConfig(t))
	n.subnet6 = netip.MustParsePrefix("fd00:5::7200/126")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Addr: "10.5.72.9"}); err == nil || !strings.Contains(err.Error(), "IPv6SubnetLen") {
		t.Errorf("%v", err)
	}
	nothingLeft(t, w, n)
}

func TestAttach_GivesNoIPv6AddressTwice(t *testing.T) {
	w := newWorld()
	w.start(77)
	w.start(78)
	n := dualStackNode(t, w, testConfig(t))
	n.subnet6 = netip.MustParsePrefix("fd00:5::7200/120")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Addr: "10.5.72.9"}); err != nil {
		t.Fatal(err)
	}
	n.pool.subnet = netip.MustParsePrefix("10.5.90.0/24") // another lease, with the same IPv6 subnet
	_, err := n.Attach(t.Context(), api.AttachRequest{PID: 78, Addr: "10.5.90.9"})
	if err == nil || !strings.Contains(err.Error(), "fd00:5::7209") || !strings.Contains(err.Error(), `"pid-77"`) {
		t.Errorf("%v", err)
	}
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 78, Addr: "10.5.90.10"}); err != nil {
		t.Error(err)
	}
}

func TestRequest_PublishesWhatDualStackFlannelDoes(t *testing.T) {
	n := dualStackNode(t, newWorld(), testConfig(t))
	a := n.request(subnets{}).Attrs
	if a.PublicIPv6.String() != "2001:db8::1" || a.BackendType != "vxlan" || string(a.BackendV6Data) != `{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}` || string(a.BackendV6Data) != string(a.BackendData) {
		t.Errorf("%+v, %s", a, a.BackendV6Data)
	}
}

func TestCheckDualStack_RefusesWhatCannotBe(t *testing.T) {
	cfg, err := lease.ParseConfig([]byte(dualStackConfig))
	if err != nil {
		t.Fatal(err)
	}
	good := external{ifName: "eth7", bind6: netip.MustParseAddr("2001:db8::1")}
	if err := checkDualStack(cfg, good, 1280); err != nil {
		t.Error(err)
	}
	for _, tc := range []struct {
		ext  external
		mtu  int
		says string
	}{{external{ifName: "eth7"}, 1430, "--iface"}, {good, 1279, "1280"}} {
		if err := checkDualStack(cfg, tc.ext, tc.mtu); err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), "eth7") {
			t.Errorf("%+v: %v", tc, err)
		}
	}
	for _, other := range []string{`{"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00:5::/48"}`, `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`} {
		cfg, err := lease.ParseConfig([]byte(other))
		if err != nil {
			t.Fatal(err)
		}
		if err := checkDualStack(cfg, external{}, 576); err != nil {
			t.Errorf("%s: %v", other, err)
		}
	}
}
