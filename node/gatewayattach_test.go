// Tests of namespaces that get the whole subnet.

package node

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

func attachGateway(t *testing.T, n *Node, pid int) api.Attachment {
	t.Helper()
	a, err := n.Attach(t.Context(), api.AttachRequest{PID: pid, Gateway: true})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAttachGateway_RoutesTheSubnetToTheNamespace(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	got := attachGateway(t, n, 77)
	if got.Addr != "10.5.72.0/24" || got.Gateway != "192.0.0.8" || got.IfName != "rovl0" || got.DefaultRoute || !got.WholeSubnet || got.Problem != "" {
		t.Errorf("got %+v", got)
	}
	network, subnet := netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("10.5.72.0/24")
	tc := c.links["rovl0"].config
	wantRoutes := []nsutil.Route{{Dst: netip.MustParsePrefix("192.0.0.8/32")}, {Dst: network, Gateway: dummyAddr}}
	if !slices.Equal(tc.Addrs, []netip.Prefix{netip.MustParsePrefix("10.5.72.0/32")}) || !slices.Equal(tc.Routes, wantRoutes) || tc.MTU != 1472 || !tc.Persist || tc.GSOMaxSize != 65536 {
		t.Errorf("TAP: %+v", tc)
	}
	if want := (nsutil.Transit{IfName: "rovl0", Network: network, Subnet: subnet, Masquerade: true}); c.transit == nil || *c.transit != want {
		t.Errorf("firewall: %+v, want %+v", c.transit, want)
	}
	var port *forwarder.Port
	for p, pc := range w.ports {
		port = p
		if !slices.Equal(pc.Sources, []netip.Prefix{subnet}) || pc.Errors != dummyAddr {
			t.Errorf("port %+v", pc)
		}
	}
	for addr, want := range map[string]forwarder.Hop{
		"10.5.72.9":    forwarder.ToPort(port),
		"10.5.72.255":  forwarder.ToPort(port),
		"10.5.72.0":    forwarder.ToOwnAt(port, w),
		"10.5.72.1":    forwarder.ToOwnAt(port, w),
		"192.0.0.8":    forwarder.ToGateway(w),
		"10.5.73.1":    forwarder.UnreachableNet,
		"198.51.100.1": forwarder.ToEgress(w),
	} {
		if got := lookup(t, w.table, addr); got != want {
			t.Errorf("%s leads to %+v, want %+v", addr, got, want)
		}
	}
	if got := fmt.Sprint(w.own); got != "[192.0.0.8 10.5.72.1 10.5.72.0]" {
		t.Errorf("the gateway answers at %s", got)
	}
	if w.table.Gateway.String() != "10.5.72.1" {
		t.Errorf("errors to peers come from %v, which is not of our subnet", w.table.Gateway)
	}
	if err := n.Detach(t.Context(), "77", ""); err != nil {
		t.Fatal(err)
	}
	if len(c.interfaces()) != 0 || c.transit != nil {
		t.Errorf("left in the namespace: %v, %+v", c.interfaces(), c.transit)
	}
	if !slices.Equal(w.released, []netip.Prefix{subnet}) {
		t.Errorf("flows released: %v", w.released)
	}
	if got := lookup(t, w.table, "10.5.72.1"); got != forwarder.ToGateway(w) || lookup(t, w.table, "10.5.72.9") != forwarder.UnreachableHost {
		t.Errorf("after detach .1 leads to %+v", got)
	}
	nothingLeft(t, w, n)
}

func TestAttachGateway_FindsTheNamespaceThatRootlessKitKeepsApart(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	const path = "/proc/77/root/tmp/netns"
	c.paths = []string{path}
	n.edges.detached = func(pid int) string {
		if pid != 77 {
			t.Errorf("asked for pid %d", pid)
		}
		return path
	}
	n.edges.openPath = func(at string) (namespace, error) {
		if at != path {
			t.Errorf("opens %s", at)
		}
		return fakeNamespace{c}, nil
	}
	if got := attachGateway(t, n, 77); got.Name != "pid-77" || got.PID != 0 || got.Netns != path {
		t.Errorf("got %+v", got)
	}
	if err := n.Detach(t.Context(), "pid-77", ""); err != nil {
		t.Fatal(err)
	}
	if c.transit != nil {
		t.Error("the firewall was left as it was")
	}
}

func TestAttachGateway_MasqueradesAsTheSubnetFileSays(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	conf := testConfig(t)
	conf.NoIPMasq = true
	attachGateway(t, readyNode(t, w, conf, "10.5.72.0/24"), 77)
	if c.transit == nil || c.transit.Masquerade {
		t.Errorf("firewall: %+v", c.transit)
	}
}

func TestAttachGateway_AndOthersExcludeEachOther(t *testing.T) {
	for name, tc := range map[string]struct {
		first, second bool
		says          string
	}{
		"an address beside a gateway": {true, false, "rootless-ovl detach pid-1"},
		"a gateway beside an address": {false, true, `"pid-1" has the address 10.5.72.2`},
		"a second gateway":            {true, true, "10.5.72.0/24"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				c := w.start(1)
				w.start(2)
				n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
				if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Gateway: tc.first}); err != nil {
					t.Fatal(err)
				}
				second := api.AttachRequest{PID: 2, Gateway: tc.second}
				if _, err := n.Attach(t.Context(), second); !errors.Is(err, api.ErrInUse) || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), "second node") {
					t.Errorf("got %v", err)
				}
				c.exit()
				synctest.Wait()
				if _, err := n.Attach(t.Context(), second); err != nil {
					t.Errorf("after the end of the first: %v", err)
				}
			})
		})
	}
}

func TestAttachGateway_TellsOfAFirewallThatCannotBeChanged(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	c.refuses = errors.New("no nftables here")
	conf := testConfig(t)
	var logged bytes.Buffer
	conf.Log = slog.New(slog.NewTextHandler(&logged, nil))
	got := attachGateway(t, readyNode(t, w, conf, "10.5.72.0/24"), 77)
	if !strings.Contains(got.Problem, "no nftables here") || !strings.Contains(logged.String(), "iptables -A FORWARD -i rovl0 -j ACCEPT") {
		t.Errorf("%+v\n%s", got, logged.String())
	}
}

func TestAttachGateway_LeavesNothingWhereTheRouterRefuses(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	w.addPortErr = errors.New("no more ports")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Gateway: true}); !errors.Is(err, w.addPortErr) {
		t.Fatalf("got %v", err)
	}
	if len(c.interfaces()) != 0 || c.transit != nil {
		t.Errorf("left in the namespace: %v, %+v", c.interfaces(), c.transit)
	}
	nothingLeft(t, w, n)
}

func TestAttachGateway_HasNoIPv6(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := dualStackNode(t, w, testConfig(t))
	attachGateway(t, n, 77)
	if tc := c.links["rovl0"].config; len(tc.Addrs) != 1 || len(tc.Routes) != 2 {
		t.Errorf("TAP: %+v", tc)
	}
}

func TestAdopt_TakesUpAGatewayWithItsFirewall(t *testing.T) {
	w := newWorld()
	conf := testConfig(t)
	c := w.start(1)
	first := readyNode(t, w, conf, "10.5.72.0/24")
	attachGateway(t, first, 1)
	stopNode(first)
	w.table.Routes, c.transit = nil, nil

	second := readyNode(t, w, conf, "10.5.72.0/24")
	if err := second.adopt(); err != nil {
		t.Fatal(err)
	}
	list, _ := second.Attachments(t.Context())
	if len(list) != 1 || !list[0].WholeSubnet || list[0].Addr != "10.5.72.0/24" {
		t.Errorf("got %+v", list)
	}
	for p := range w.ports {
		if got := lookup(t, w.table, "10.5.72.9"); got != forwarder.ToPort(p) {
			t.Errorf("a container is at %+v", got)
		}
	}
	if c.transit == nil {
		t.Error("its firewall was not looked at again")
	}
	w.start(2)
	if _, err := second.Attach(t.Context(), api.AttachRequest{PID: 2}); !errors.Is(err, api.ErrInUse) {
		t.Errorf("an address beside it: %v", err)
	}
}

func TestAdopt_TakesBackTheFirewallOfAGatewayThatIsGone(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*container)
		stays  bool
	}{
		"the interface was removed": {func(c *container) { delete(c.links, "rovl0") }, false},
		"another namespace":         {func(c *container) { c.inode++ }, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			conf := testConfig(t)
			c := w.start(1)
			first := readyNode(t, w, conf, "10.5.72.0/24")
			attachGateway(t, first, 1)
			stopNode(first)
			tc.change(c)
			second := readyNode(t, w, conf, "10.5.72.0/24")
			if err := second.adopt(); err != nil {
				t.Fatal(err)
			}
			if list, _ := second.Attachments(t.Context()); len(list) != 0 {
				t.Errorf("got %+v", list)
			}
			if got := c.transit != nil; got != tc.stays {
				t.Errorf("firewall: %+v", c.transit)
			}
		})
	}
}

// A subnet that was ours may be a peer's now.
func TestAdopt_RoutesNoEarlierSubnetToAGateway(t *testing.T) {
	w := newWorld()
	conf := testConfig(t)
	var logged bytes.Buffer
	conf.Log = slog.New(slog.NewTextHandler(&logged, nil))
	w.start(1)
	first := readyNode(t, w, conf, "10.5.90.0/24")
	attachGateway(t, first, 1)
	stopNode(first)
	second := readyNode(t, w, conf, "10.5.72.0/24")
	if err := second.adopt(); err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]forwarder.Hop{
		"10.5.90.9": forwarder.UnreachableNet, "10.5.90.1": forwarder.UnreachableNet,
		"10.5.72.9": forwarder.UnreachableHost, "10.5.72.1": forwarder.ToGateway(w),
	} {
		if got := lookup(t, w.table, addr); got != want {
			t.Errorf("%s leads to %+v, want %+v", addr, got, want)
		}
	}
	if list, _ := second.Attachments(t.Context()); len(list) != 1 {
		t.Errorf("got %+v", list)
	}
	if err := second.leased(nil, subnets{v4: netip.MustParsePrefix("10.5.72.0/24")}); err != nil {
		t.Fatal(err)
	}
	if got := logged.String(); strings.Count(got, "level=WARN") != 1 || !strings.Contains(got, "start its engine again") || !strings.Contains(got, "now=10.5.72.0/24") {
		t.Errorf("logged:\n%s", got)
	}
}
