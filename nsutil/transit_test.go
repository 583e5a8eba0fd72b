// Tests of the firewall of a namespace that has a subnet behind it.

package nsutil

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func testTransit() Transit {
	return Transit{IfName: "rovl0", Network: netip.MustParsePrefix("10.5.0.0/16"), Subnet: netip.MustParsePrefix("10.5.1.0/24"), Masquerade: true}
}

// ruleset are the chains of IPv4 in the namespace, as "table chain", with the number of rules in each.
func ruleset(t *testing.T, n *Namespace) map[string]int {
	t.Helper()
	found := make(map[string]int)
	err := n.netfilter(func(c *nftables) error {
		chains, err := c.do(c.request(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP))
		if err != nil {
			return err
		}
		for _, b := range chains {
			a := attrsOf(b)
			found[unix.ByteSliceToString(a[unix.NFTA_CHAIN_TABLE])+" "+unix.ByteSliceToString(a[unix.NFTA_CHAIN_NAME])] = 0
		}
		rules, err := c.do(c.request(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP))
		for _, b := range rules {
			a := attrsOf(b)
			found[unix.ByteSliceToString(a[unix.NFTA_RULE_TABLE])+" "+unix.ByteSliceToString(a[unix.NFTA_RULE_CHAIN])]++
		}
		return err
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("this kernel has no nftables: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func wantRules(t *testing.T, n *Namespace, want map[string]int) {
	t.Helper()
	got := ruleset(t, n)
	for chain, rules := range want {
		if have, ok := got[chain]; !ok || have != rules {
			t.Errorf("chain %q has %d rules (there: %v), want %d", chain, have, ok, rules)
		}
	}
	for chain := range got {
		if _, ok := want[chain]; !ok {
			t.Errorf("chain %q is there", chain)
		}
	}
}

func TestAllowTransit_MakesAndRemovesRules(t *testing.T) {
	for _, m := range mappings {
		t.Run(m.name, func(t *testing.T) {
			n := open(t, startHolder(t, m).pid)
			wantRules(t, n, nil)
			if err := n.ForbidTransit(); err != nil {
				t.Fatalf("nothing to remove: %v", err)
			}
			for range 2 { // again instead of twice
				if err := n.AllowTransit(testTransit()); err != nil {
					t.Fatal(err)
				}
				wantRules(t, n, map[string]int{"filter FORWARD": 1, "filter DOCKER-USER": 1, "rootless-ovl postrouting": 2})
			}
			without := testTransit()
			without.Masquerade = false
			if err := n.AllowTransit(without); err != nil {
				t.Fatal(err)
			}
			wantRules(t, n, map[string]int{"filter FORWARD": 1, "filter DOCKER-USER": 1})
			if err := n.ForbidTransit(); err != nil {
				t.Fatal(err)
			}
			wantRules(t, n, map[string]int{"filter FORWARD": 0})
		})
	}
}

func TestAllowTransit_LeavesTheRulesOfOthers(t *testing.T) {
	h := startHolder(t, mapping{uid: 0, userns: true})
	n := open(t, h.pid)
	ruleset(t, n)
	theirs := map[string]int{"filter FORWARD": 0, "filter DOCKER-USER": 1, "nat POSTROUTING": 0}
	err := n.netfilter(func(c *nftables) error {
		drop := base("filter", unix.NF_INET_FORWARD, priorityFilter)
		drop[2] = nl.NewRtAttr(unix.NFTA_CHAIN_POLICY, nl.BEUint32Attr(0))
		rule := c.rule(unix.NLM_F_CREATE, filterTable, userChain, slices.Concat(meta(unix.NFT_META_IIFNAME), compare(unix.NFT_CMP_EQ, []byte("rovl0\x00")), verdict(nfAccept)))
		rule.Data = rule.Data[:len(rule.Data)-1] // without the comment
		return c.batch(
			c.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, filterTable),
			c.chain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, filterTable, forwardChain, drop...),
			c.chain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, filterTable, userChain), rule,
			c.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "nat"),
			c.chain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, "nat", "POSTROUTING", base("nat", unix.NF_INET_POST_ROUTING, prioritySrcNAT)...))
	})
	if err != nil {
		t.Fatal(err)
	}
	wantRules(t, n, theirs)
	if err := n.AllowTransit(testTransit()); err != nil {
		t.Fatal(err)
	}
	wantRules(t, n, map[string]int{"filter FORWARD": 1, "filter DOCKER-USER": 2, "nat POSTROUTING": 0, "rootless-ovl postrouting": 2})
	if h.run("sh", "-c", "command -v iptables").Err == "" {
		// What iptables cannot read it refuses to change, and dockerd with it.
		a := h.run("iptables", "-S")
		for _, want := range []string{"-P FORWARD DROP\n", "-A FORWARD -i rovl0 -m comment --comment rootless-ovl -j ACCEPT\n", "-A DOCKER-USER -i rovl0 -m comment --comment rootless-ovl -j ACCEPT\n"} {
			if !strings.Contains(a.Out, want) {
				t.Errorf("iptables -S without %q:\n%s%s", want, a.Out, a.Err)
			}
		}
		if a := h.run("iptables", "-I", "FORWARD", "-j", "DOCKER-USER"); a.Err != "" {
			t.Errorf("iptables -I: %s", a.Err)
		}
		theirs["filter FORWARD"]++
	}
	if err := n.ForbidTransit(); err != nil {
		t.Fatal(err)
	}
	wantRules(t, n, theirs)
}

func TestAllowTransit_RefusesNonsense(t *testing.T) {
	n := open(t, startHolder(t, mapping{uid: 0, userns: true}).pid)
	for name, change := range map[string]func(*Transit){
		"name":    func(c *Transit) { c.IfName = "" },
		"network": func(c *Transit) { c.Network = netip.Prefix{} },
		"IPv6":    func(c *Transit) { c.Subnet = netip.MustParsePrefix("fd00::/64") },
		"address": func(c *Transit) { c.Subnet = netip.MustParsePrefix("10.5.1.1/24") },
	} {
		c := testTransit()
		change(&c)
		if err := n.AllowTransit(c); !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrIfName) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantRules(t, n, nil)
	n.Close()
	if err := n.AllowTransit(testTransit()); !errors.Is(err, ErrGone) {
		t.Errorf("closed: %v", err)
	}
}
