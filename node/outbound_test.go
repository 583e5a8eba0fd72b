// Which outbound addresses a node takes.

package node

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/stack"
)

func TestOutbound_IsOneAddressAFamily(t *testing.T) {
	addrs := func(s ...string) (a []netip.Addr) {
		for _, x := range s {
			a = append(a, netip.MustParseAddr(x))
		}
		return a
	}
	for _, tt := range []struct {
		addrs []netip.Addr
		want  stack.Outbound
		says  string
	}{
		{addrs(), stack.Outbound{}, ""},
		{addrs("2001:db8::1", "192.0.2.1"), stack.Outbound{Addr4: addrs("192.0.2.1")[0], Addr6: addrs("2001:db8::1")[0]}, ""},
		{addrs("192.0.2.1", "192.0.2.2"), stack.Outbound{}, "192.0.2.1 and 192.0.2.2"},
		{addrs("2001:db8::1", "2001:db8::2"), stack.Outbound{}, "one of each family"},
		{addrs("127.0.0.1"), stack.Outbound{}, "--outbound-addr"},
		{addrs("::"), stack.Outbound{}, "--outbound-addr"},
		{addrs("fe80::1"), stack.Outbound{}, "--outbound-addr"},
		{addrs("::ffff:192.0.2.1"), stack.Outbound{}, "--outbound-addr"},
	} {
		c := testConfig(t)
		c.OutboundAddrs = tt.addrs
		_, err := New(c)
		if tt.says != "" {
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v: %v, want one that says %q", tt.addrs, err, tt.says)
			}
			continue
		}
		if got, oerr := c.outbound(); err != nil || oerr != nil || got != tt.want {
			t.Errorf("%v: %+v, %v, %v", tt.addrs, got, oerr, err)
		}
	}
}

func TestOutbound_IsAProblemWhileItIsGone(t *testing.T) {
	chosen := netip.MustParseAddr("192.0.2.77")
	travel(t, udpConfig, func(c *Config, _ *external) { c.OutboundAddrs = []netip.Addr{chosen} }, func(t *testing.T, r *traveller) {
		wants := func(problem string) {
			t.Helper()
			s := r.status()
			if problem == "" && s.Problem != "" || !strings.Contains(s.Problem, problem) || len(s.OutboundAddrs) != 1 || s.OutboundAddrs[0] != chosen.String() {
				t.Errorf("problem %q, outbound %v; want %q", s.Problem, s.OutboundAddrs, problem)
			}
		}
		r.moves(func(w *world) { w.also = []netip.Addr{chosen} })
		wants("")
		r.read = len(r.logged.String())
		for range 3 { // it is told once
			r.moves(func(w *world) { w.also = nil })
			wants(chosen.String() + " (--outbound-addr)")
		}
		r.logs("WARN " + outboundGone)
		r.moves(func(w *world) { w.also = []netip.Addr{chosen} })
		wants("")
		r.logs("INFO what containers send outside leaves again")
	})
}

func TestOutbound_IsNotTheLoopback(t *testing.T) {
	if _, err := (Config{OutboundIf: "lo"}).outbound(); err == nil || !strings.Contains(err.Error(), "--outbound-if") {
		t.Errorf("lo: %v", err)
	}
}
