// Tests of the firewall of a namespace that has a subnet behind it.

package nsutil

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"syscall"
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
		chains, err := dump(c.rtnl, c.request(unix.NFT_MSG_GETCHAIN, 0), func(b []byte) (string, bool) {
			a := attrsOf(b)
			return unix.ByteSliceToString(a[unix.NFTA_CHAIN_TABLE]) + " " + unix.ByteSliceToString(a[unix.NFTA_CHAIN_NAME]), true
		})
		if err != nil {
			return err
		}
		for _, chain := range chains {
			found[chain] = 0
		}
		rules, err := dump(c.rtnl, c.request(unix.NFT_MSG_GETRULE, 0), func(b []byte) (string, bool) {
			a := attrsOf(b)
			return unix.ByteSliceToString(a[unix.NFTA_RULE_TABLE]) + " " + unix.ByteSliceToString(a[unix.NFTA_RULE_CHAIN]), true
		})
		for _, chain := range rules {
			found[chain]++
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
			if err := n.ForbidTransit("rovl0"); err != nil {
				t.Fatalf("nothing to remove: %v", err)
			}
			for range 2 { // again instead of twice
				if err := n.AllowTransit(testTransit()); err != nil {
					t.Fatal(err)
				}
				wantRules(t, n, map[string]int{"filter FORWARD": 1, "filter DOCKER-USER": 1, "rootless-ovl-rovl0 postrouting": 2})
			}
			without := testTransit()
			without.Masquerade = false
			if err := n.AllowTransit(without); err != nil {
				t.Fatal(err)
			}
			wantRules(t, n, map[string]int{"filter FORWARD": 1, "filter DOCKER-USER": 1})
			if err := n.ForbidTransit("rovl0"); err != nil {
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
		rule := c.rule(unix.NLM_F_CREATE, filterTable, userChain, "", slices.Concat(meta(unix.NFT_META_IIFNAME), compare(unix.NFT_CMP_EQ, []byte("rovl0\x00")), verdict(nfAccept)))
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
	wantRules(t, n, map[string]int{"filter FORWARD": 1, "filter DOCKER-USER": 2, "nat POSTROUTING": 0, "rootless-ovl-rovl0 postrouting": 2})
	if h.run("sh", "-c", "command -v iptables").Err == "" {
		// What iptables cannot read it refuses to change, and dockerd with it.
		a := h.run("iptables", "-S")
		for _, want := range []string{"-P FORWARD DROP\n", "-A FORWARD -i rovl0 -m comment --comment rootless-ovl-rovl0 -j ACCEPT\n", "-A DOCKER-USER -i rovl0 -m comment --comment rootless-ovl-rovl0 -j ACCEPT\n"} {
			if !strings.Contains(a.Out, want) {
				t.Errorf("iptables -S without %q:\n%s%s", want, a.Out, a.Err)
			}
		}
		if a := h.run("iptables", "-I", "FORWARD", "-j", "DOCKER-USER"); a.Err != "" {
			t.Errorf("iptables -I: %s", a.Err)
		}
		theirs["filter FORWARD"]++
	}
	if err := n.ForbidTransit("rovl0"); err != nil {
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
	if err := n.ForbidTransit(""); !errors.Is(err, ErrIfName) {
		t.Errorf("no name: %v", err)
	}
}

// rulesOf are the rules of a chain of the filter table, in order: "TAP" for ours, their comment for others, "return" for one that is that alone.
func rulesOf(t *testing.T, n *Namespace, chain string) (found []string) {
	t.Helper()
	err := n.netfilter(func(c *nftables) (err error) {
		found, err = dump(c.rtnl, c.ruleRequest(unix.NFT_MSG_GETRULE, 0, filterTable, chain), func(b []byte) (string, bool) {
			a := attrsOf(b)
			if returnsAlways(a[unix.NFTA_RULE_EXPRESSIONS]) {
				return "return", true
			}
			return strings.TrimPrefix(unix.ByteSliceToString(a[unix.NFTA_RULE_USERDATA][2:]), "rootless-ovl-"), true
		})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// dockers makes the chains of dockerd; the rules are as rulesOf has them.
func dockers(t *testing.T, n *Namespace, forward, user []string) {
	t.Helper()
	err := n.netfilter(func(c *nftables) error {
		b := append(c.withoutTable(filterTable), c.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, filterTable),
			c.chain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, filterTable, forwardChain, base("filter", unix.NF_INET_FORWARD, priorityFilter)...),
			c.chain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, filterTable, userChain))
		for chain, rules := range map[string][]string{forwardChain: forward, userChain: user} {
			for _, r := range rules {
				exprs := slices.Concat(expr("counter"), verdict(0)) // drop
				if r == "return" {
					exprs = slices.Concat(expr("counter"), verdict(1<<32+unix.NFT_RETURN))
				} else if strings.HasPrefix(r, "rovl") {
					r = mark(r)
				}
				b = append(b, c.rule(unix.NLM_F_CREATE|unix.NLM_F_APPEND, filterTable, chain, r, exprs))
			}
		}
		return c.batch(b...)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAllowTransit_LeavesTheLastWordToTheUser(t *testing.T) {
	n := open(t, startHolder(t, mapping{uid: 0, userns: true}).pid)
	ruleset(t, n)
	for name, tc := range map[string]struct {
		forward, user, wantForward, wantUser []string
	}{
		"nothing":                     {nil, nil, []string{"rovl0"}, []string{"rovl0"}},
		"docker's own":                {[]string{"isolation", "bridge"}, []string{"return"}, []string{"isolation", "bridge", "rovl0"}, []string{"rovl0", "return"}},
		"rules of the user":           {nil, []string{"a", "b", "return"}, []string{"rovl0"}, []string{"a", "b", "rovl0", "return"}},
		"rules without a return":      {nil, []string{"a", "b"}, []string{"rovl0"}, []string{"a", "b", "rovl0"}},
		"rules behind the return":     {nil, []string{"a", "return", "b", "return"}, []string{"rovl0"}, []string{"a", "rovl0", "return", "b", "return"}},
		"it is there":                 {[]string{"rovl0", "a"}, []string{"a", "rovl0", "b", "return"}, []string{"rovl0", "a"}, []string{"a", "rovl0", "b", "return"}},
		"it is there twice":           {[]string{"rovl0", "a", "rovl0"}, []string{"rovl0", "rovl0", "rovl0"}, []string{"rovl0", "a"}, []string{"rovl0"}},
		"it is there and not reached": {nil, []string{"a", "return", "rovl0"}, []string{"rovl0"}, []string{"a", "rovl0", "return"}},
		"another node's":              {[]string{"rovl1"}, []string{"rovl1", "return"}, []string{"rovl1", "rovl0"}, []string{"rovl1", "rovl0", "return"}},
	} {
		t.Run(name, func(t *testing.T) {
			dockers(t, n, tc.forward, tc.user)
			for range 2 {
				if err := n.AllowTransit(testTransit()); err != nil {
					t.Fatal(err)
				}
				if got := rulesOf(t, n, forwardChain); !slices.Equal(got, tc.wantForward) {
					t.Errorf("FORWARD: %q, want %q", got, tc.wantForward)
				}
				if got := rulesOf(t, n, userChain); !slices.Equal(got, tc.wantUser) {
					t.Errorf("DOCKER-USER: %q, want %q", got, tc.wantUser)
				}
			}
		})
	}
}

func TestAllowTransit_OfTwoTAPsInANamespace(t *testing.T) {
	n := open(t, startHolder(t, mapping{uid: 0, userns: true}).pid)
	ruleset(t, n)
	first, second := testTransit(), testTransit()
	second.IfName, second.Subnet = "rovl1", netip.MustParsePrefix("10.5.2.0/24")
	for _, c := range []Transit{first, second} {
		if err := n.AllowTransit(c); err != nil {
			t.Fatal(err)
		}
	}
	wantRules(t, n, map[string]int{"filter FORWARD": 2, "filter DOCKER-USER": 2, "rootless-ovl-rovl0 postrouting": 2, "rootless-ovl-rovl1 postrouting": 2})
	if err := n.ForbidTransit("rovl0"); err != nil {
		t.Fatal(err)
	}
	wantRules(t, n, map[string]int{"filter FORWARD": 1, "filter DOCKER-USER": 1, "rootless-ovl-rovl1 postrouting": 2})
	if got := rulesOf(t, n, userChain); !slices.Equal(got, []string{"rovl1"}) {
		t.Errorf("left: %q", got)
	}
	if err := n.ForbidTransit("rovl1"); err != nil {
		t.Fatal(err)
	}
	wantRules(t, n, map[string]int{"filter FORWARD": 0})
}

// A list that is longer than what the kernel answers at once.
func TestDump_OfALongListThatIsChangedMeanwhile(t *testing.T) {
	n := open(t, startHolder(t, mapping{uid: 0, userns: true}).pid)
	ruleset(t, n)
	dockers(t, n, nil, nil)
	const many = 1200
	insert := func(comments ...string) {
		t.Helper()
		err := n.netfilter(func(c *nftables) error {
			var b []*nl.NetlinkRequest
			for _, text := range comments {
				b = append(b, c.rule(unix.NLM_F_CREATE, filterTable, forwardChain, text, expr("counter")))
			}
			return c.batch(b...)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		insert(slices.Repeat([]string{"a"}, many/3)...)
	}
	all := func(c *nftables) *nl.NetlinkRequest {
		return c.ruleRequest(unix.NFT_MSG_GETRULE, 0, filterTable, forwardChain)
	}
	err := n.netfilter(func(c *nftables) error {
		read := 0
		got, err := dump(c.rtnl, all(c), func(b []byte) (string, bool) {
			if read++; read == 1 {
				insert(mark("rovl0"))
			}
			return "", bytes.Equal(attrsOf(b)[unix.NFTA_RULE_USERDATA], userData(mark("rovl0")))
		})
		if len(got) != 1 || read <= many+1 {
			t.Errorf("found %d in %d answers, %v", len(got), read, err)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	err = n.netfilter(func(c *nftables) error {
		read := 0
		_, err := dump(c.rtnl, all(c), func([]byte) (int, bool) {
			if read++; read%100 == 0 {
				insert("b")
			}
			return 0, false
		})
		return err
	})
	if !errors.Is(err, errInterrupted) {
		t.Errorf("changed in every try: %v", err)
	}
	err = n.netfilter(func(c *nftables) error {
		_, err := dump(c.rtnl, all(c), func([]byte) (int, bool) { return 0, true })
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "more than 1024") {
		t.Errorf("all of them: %v", err)
	}
}

func TestDump_ThatEndsEarlyIsAnError(t *testing.T) {
	for errno, data := range map[syscall.Errno][]byte{
		0:           binary.NativeEndian.AppendUint32(nil, 0),
		unix.ENOMEM: binary.NativeEndian.AppendUint32(nil, ^uint32(unix.ENOMEM)+1),
	} {
		if err := doneError(syscall.NetlinkMessage{Data: data}); errno == 0 && err != nil || errno != 0 && !errors.Is(err, errno) {
			t.Errorf("%v: %v", errno, err)
		}
	}
	if err := doneError(syscall.NetlinkMessage{}); err != nil {
		t.Errorf("without a number: %v", err)
	}
}
