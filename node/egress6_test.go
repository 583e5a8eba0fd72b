// Tests of the IPv6 way out of an overlay without IPv6.

package node

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

func TestEgress6_IsUniqueLocal(t *testing.T) { // RFC 4193 3.1: fc00::/7 with the L bit, and a subnet of 64 bits
	if b := egress6.Addr().As16(); b[0] != 0xfd || egress6.Bits() != 64 || egress6 != egress6.Masked() {
		t.Errorf("%v", egress6)
	}
}

func TestAttach_GivesAnIPv6WayOutWhereTheHostHasOne(t *testing.T) {
	for name, tc := range map[string]struct {
		request api.AttachRequest
		change  func(w *world, n *Node)
		want    string
	}{
		"plain":              {api.AttachRequest{}, func(*world, *Node) {}, "fdfa:a976:e5a::a05:4802/64"},
		"no IPv6 outside":    {api.AttachRequest{}, func(w *world, _ *Node) { w.outside6 = false }, ""},
		"another way out":    {api.AttachRequest{NoDefaultRoute: true}, func(*world, *Node) {}, ""},
		"a gateway":          {api.AttachRequest{Gateway: true}, func(*world, *Node) {}, ""},
		"MTU below IPv6's":   {api.AttachRequest{}, func(_ *world, n *Node) { n.mtu = 1279 }, ""},
		"IPv6 is off inside": {api.AttachRequest{}, func(w *world, _ *Node) { w.containers[77].noIPv6 = true }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.outside6 = true
			c := w.start(77)
			n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
			tc.change(w, n)
			tc.request.PID = 77
			got, err := n.Attach(t.Context(), tc.request)
			if err != nil {
				t.Fatal(err)
			}
			if got.Addr6 != tc.want || got.Problem != "" {
				t.Errorf("got %+v", got)
			}
			six := slices.ContainsFunc(w.own, netip.Addr.Is6)
			if six != (tc.want != "") {
				t.Errorf("the gateway's addresses: %v", w.own)
			}
			if tc.want == "" {
				return
			}
			tap, gw := c.links[got.IfName].config, netip.MustParseAddr("fdfa:a976:e5a::1")
			if got.Gateway6 != gw.String() || !slices.Contains(tap.Addrs, netip.MustParsePrefix(tc.want)) ||
				!slices.Contains(tap.Routes, nsutil.Route{Dst: netip.MustParsePrefix("::/0"), Gateway: gw}) || len(tap.Routes) != 3 {
				t.Errorf("got %+v, TAP %+v", got, tap)
			}
			if !w.routed()[netip.MustParsePrefix(tc.want).Addr()] || !slices.Contains(w.own, gw) {
				t.Errorf("routed %v, the gateway's %v", w.routed(), w.own)
			}
		})
	}
}

func TestAttach_PrefersTheOverlaysIPv6(t *testing.T) {
	w := newWorld()
	w.outside6 = true
	w.start(77)
	got, err := dualStackNode(t, w, testConfig(t)).Attach(t.Context(), api.AttachRequest{PID: 77})
	if err != nil || got.Addr6 != "fd00:5:0:72::a05:4802/64" {
		t.Errorf("%+v, %v", got, err)
	}
}

// A host that gains, or loses, IPv6: what is attached follows when the daemon starts again, as far as it can.
func TestAdopt_FollowsTheHostsIPv6(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	if got, err := n.Attach(t.Context(), api.AttachRequest{PID: 77}); err != nil || got.Addr6 != "" {
		t.Fatalf("%+v, %v", got, err)
	}
	again := func(change func(*Node)) api.Attachment {
		t.Helper()
		stopNode(n)
		n = readyNode(t, w, n.cfg, "10.5.72.0/24")
		change(n)
		if err := n.adopt(); err != nil {
			t.Fatal(err)
		}
		list, err := n.Attachments(t.Context())
		if err != nil || len(list) != 1 {
			t.Fatalf("%+v, %v", list, err)
		}
		return list[0]
	}
	const addr6 = "fdfa:a976:e5a::a05:4802"
	w.outside6 = true
	if got := again(func(*Node) {}); got.Addr6 != addr6+"/64" || got.Problem != "" || !w.routed()[netip.MustParseAddr(addr6)] {
		t.Errorf("IPv6 has come: %+v, routed %v", got, w.routed())
	}
	if changed := c.links["eth0"].config; !slices.Contains(changed.Addrs, netip.MustParsePrefix(addr6+"/64")) {
		t.Errorf("TAP %+v", changed)
	}
	w.outside6 = false
	if got := again(func(*Node) {}); got.Addr6 != addr6+"/64" || got.Problem != "" || !w.routed()[netip.MustParseAddr(addr6)] {
		t.Errorf("IPv6 has gone: %+v, routed %v", got, w.routed())
	}
	if got := again(func(n *Node) { n.mtu = 1200 }); !strings.Contains(got.Problem, "1280") || w.routed()[netip.MustParseAddr(addr6)] || slices.ContainsFunc(w.own, netip.Addr.Is6) {
		t.Errorf("the MTU is too small: %+v, routed %v, the gateway's %v", got, w.routed(), w.own)
	}
	stopNode(n)
	n = dualStackNode(t, w, n.cfg)
	if err := n.adopt(); err != nil {
		t.Fatal(err)
	}
	list, err := n.Attachments(t.Context())
	if err != nil || len(list) != 1 || list[0].Addr6 != "fd00:5:0:72::a05:4802/64" || list[0].Problem != "" {
		t.Errorf("the network has become dual-stack: %+v, %v", list, err)
	}
	inside, gw := c.links["eth0"].config, netip.MustParseAddr("fd00:5:0:72::1")
	if len(inside.Addrs) != 2 || len(inside.Routes) != 4 || !slices.Contains(inside.Routes, nsutil.Route{Dst: netip.MustParsePrefix("::/0"), Gateway: gw}) {
		t.Errorf("TAP %+v", inside)
	}
}

func TestRoutes_OfIPv6ForTheOutsideAlone(t *testing.T) {
	gw, port := &nowhere{}, new(forwarder.Port)
	attachment := attachedPort{addr: netip.MustParsePrefix("10.5.72.9/24"), addr6: netip.MustParsePrefix("fdfa:a976:e5a::a05:4809/64"), port: port}
	for name, me := range map[string]self{"IPv4": testSelf(), "dual-stack": dualStackSelf()} {
		table := routes(routeSources{me: me, gateway: gw, attachments: []attachedPort{attachment}})
		for addr, want := range map[string]forwarder.Hop{
			"fdfa:a976:e5a::a05:4809": forwarder.ToPort(port),
			"fdfa:a976:e5a::1":        forwarder.ToGateway(gw),
			"fdfa:a976:e5a::a05:107":  forwarder.UnreachableHost, // another node's, or nobody's
			"2001:db8:9::1":           forwarder.ToEgress(gw),
		} {
			if got := lookup(t, table, addr); got != want {
				t.Errorf("%s: %s leads to %+v, want %+v", name, addr, got, want)
			}
		}
		want := gatewayAddr(egress6)
		if me.subnet6.IsValid() {
			want = gatewayAddr(me.subnet6)
		}
		if table.Gateway6 != want {
			t.Errorf("%s: gateway %v", name, table.Gateway6)
		}
	}
}
