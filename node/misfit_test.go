// Tests of attachments that the network or the lease has changed under.

package node

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

func TestAdopt_GivesTheInterfaceWhatTheNetworkHasNow(t *testing.T) {
	for _, tc := range []struct {
		name    string
		change  func(*container)
		mtu     int
		addr6   string
		problem string // and so in the log
	}{
		{"dual-stack with another MTU", func(*container) {}, 1430, "fd00:5:0:72::a05:4802/64", ""},
		{"IPv6 switched off", func(c *container) { c.noIPv6 = true }, 1430, "", "IPv6 is not switched off"},
		{"not changed", func(c *container) { c.changeErr = errKernel }, 1472, "", "MTU of the network, 1430"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var logged syncBuffer
			conf := testConfig(t)
			w := newWorld()
			c := w.start(77)
			first := readyNode(t, w, conf, "10.5.72.0/24")
			if a, err := first.Attach(t.Context(), api.AttachRequest{PID: 77}); err != nil || a.MTU != 1472 || a.Problem != "" {
				t.Fatalf("%+v, %v", a, err)
			}
			stopNode(first)
			tc.change(c)
			conf.Log = slog.New(slog.NewTextHandler(&logged, nil))
			second := dualStackNode(t, w, conf)
			if err := second.adopt(); err != nil {
				t.Fatal(err)
			}
			if err := second.leased(nil, second.selfLocked().subnets()); err != nil {
				t.Fatal(err)
			}
			list, err := second.Attachments(t.Context())
			if err != nil || len(list) != 1 {
				t.Fatalf("%+v, %v", list, err)
			}
			inside := c.links["eth0"].config
			if a := list[0]; a.MTU != tc.mtu || a.Addr6 != tc.addr6 || a.Addr != "10.5.72.2/24" || inside.MTU != tc.mtu || (a.Problem == "") != (tc.problem == "") || !strings.Contains(a.Problem, tc.problem) {
				t.Errorf("shown as %+v, and is %+v", a, inside)
			}
			if tc.problem != "" && strings.Count(logged.String(), tc.problem) != 1 {
				t.Errorf("log: %s", logged.String())
			}
			if tc.addr6 == "" {
				if len(inside.Addrs) != 1 || len(inside.Routes) != 2 {
					t.Errorf("TAP: %+v", inside)
				}
				return
			}
			addr6, gw6 := netip.MustParsePrefix(tc.addr6), netip.MustParseAddr("fd00:5:0:72::1")
			if !slices.Contains(inside.Addrs, addr6) || len(inside.Addrs) != 2 || len(inside.Routes) != 4 ||
				!slices.Contains(inside.Routes, nsutil.Route{Dst: netip.MustParsePrefix("::/0"), Gateway: gw6}) || inside.GSOMaxSize != gsoMaxSize(1430, second.vxlan.Encap()) {
				t.Errorf("TAP: %+v", inside)
			}
			if !w.routed()[addr6.Addr()] {
				t.Errorf("routed: %v", w.routed())
			}
			stopNode(second) // and nothing is left to be done the next time
			c.changeErr = errors.New("changed again")
			logged = syncBuffer{}
			third := dualStackNode(t, w, conf)
			if err := third.adopt(); err != nil || strings.Contains(logged.String(), "changed") {
				t.Errorf("%v, %s", err, logged.String())
			}
		})
	}
}

func TestAttachments_TellWhatDoesNotFitTheLease(t *testing.T) {
	for name, tc := range map[string]struct {
		gateway bool
		change  func(*Node)
		problem string
	}{
		"nothing":                                {false, func(*Node) {}, ""},
		"another subnet":                         {false, func(n *Node) { n.pool.subnet = netip.MustParsePrefix("10.5.90.0/24") }, "no peer"},
		"another subnet of a gateway":            {true, func(n *Node) { n.pool.subnet = netip.MustParsePrefix("10.5.90.0/24") }, "--bip"},
		"another length of a gateway's subnet":   {true, func(n *Node) { n.pool.subnet = netip.MustParsePrefix("10.5.72.0/25") }, "--bip"},
		"another IPv6 subnet":                    {false, func(n *Node) { n.subnet6 = netip.MustParsePrefix("fd00:5:0:73::/64") }, "no peer over IPv6"},
		"no IPv6 any more":                       {false, func(n *Node) { n.netConfig.EnableIPv6 = false }, "no IPv6 any more"},
		"a gateway in a dual-stack network":      {true, func(*Node) {}, "IPv6 of the subnet is not routed"},
		"a gateway when the network had no IPv6": {true, func(n *Node) { n.netConfig.EnableIPv6 = false }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.start(77)
			n := dualStackNode(t, w, testConfig(t))
			if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Gateway: tc.gateway}); err != nil {
				t.Fatal(err)
			}
			n.mu.Lock()
			tc.change(n)
			n.mu.Unlock()
			list, err := n.Attachments(t.Context())
			if err != nil || len(list) != 1 || (list[0].Problem == "") != (tc.problem == "") || !strings.Contains(list[0].Problem, tc.problem) {
				t.Errorf("%+v, %v", list, err)
			}
		})
	}
}

func TestAttachGateway_TellsOfABridgeElsewhere(t *testing.T) {
	bridge := func(name string, addrs ...string) nsutil.Bridge {
		b := nsutil.Bridge{IfName: name}
		for _, a := range addrs {
			b.Addrs = append(b.Addrs, netip.MustParsePrefix(a))
		}
		return b
	}
	for name, tc := range map[string]struct {
		bridges []nsutil.Bridge
		err     error
		told    bool
	}{
		"none":              {nil, nil, false},
		"without addresses": {[]nsutil.Bridge{bridge("docker0")}, nil, false},
		"in the subnet":     {[]nsutil.Bridge{bridge("docker0", "10.5.72.1/24")}, nil, false},
		"one of two":        {[]nsutil.Bridge{bridge("docker0", "172.17.0.1/16"), bridge("br-x", "10.5.72.1/24")}, nil, false},
		"elsewhere":         {[]nsutil.Bridge{bridge("docker0", "172.17.0.1/16")}, nil, true},
		"not known":         {nil, errKernel, false},
	} {
		t.Run(name, func(t *testing.T) {
			var logged syncBuffer
			conf := testConfig(t)
			conf.Log = slog.New(slog.NewTextHandler(&logged, nil))
			w := newWorld()
			c := w.start(77)
			c.bridges, c.bridgesErr = tc.bridges, tc.err
			c.refuses = errors.New("no nftables here")
			got := attachGateway(t, readyNode(t, w, conf, "10.5.72.0/24"), 77)
			const remedy = "docker0 has 172.17.0.1/16: start dockerd with --bip=10.5.72.1/24"
			if strings.Contains(got.Problem, remedy) != tc.told || strings.Contains(logged.String(), remedy) != tc.told || !strings.HasSuffix(got.Problem, "no nftables here") {
				t.Errorf("%+v\n%s", got, logged.String())
			}
		})
	}
}

func TestAttachGateway_WarnsOnceThatItHasNoIPv6(t *testing.T) {
	var logged syncBuffer
	conf := testConfig(t)
	conf.Log = slog.New(slog.NewTextHandler(&logged, nil))
	w := newWorld()
	w.start(77)
	got := attachGateway(t, dualStackNode(t, w, conf), 77)
	if !strings.Contains(got.Problem, "IPv6 of the subnet is not routed") || strings.Count(logged.String(), "level=WARN") != 1 || !strings.Contains(logged.String(), got.Problem) {
		t.Errorf("%+v\n%s", got, logged.String())
	}
}
