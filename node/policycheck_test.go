// Tests of what of a policy is refused because it can have no effect, and of what is only told.

package node

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestAttach_RefusesAPolicyWithoutEffect(t *testing.T) {
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24") // of 10.5.0.0/16
	n.proxyAddr = netip.MustParseAddrPort("127.0.0.1:1080")
	n.denials([]netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:2379")})
	w.start(41)
	for _, tt := range []struct {
		policy api.Policy
		says   string
	}{
		{api.Policy{HostAccess: []int{5432, 2379}}, "port 2379"},
		{api.Policy{HostAccess: []int{1080}}, "port 1080"},
		{api.Policy{Egress: []string{"169.254.169.254"}}, "--allow-link-local"},
		{api.Policy{Egress: []string{"fd00:ec2::254"}}, "--allow-link-local"},
		{api.Policy{Egress: []string{"192.0.2.0/24", "127.0.0.0/8"}}, "--host-access"},
		{api.Policy{Egress: []string{"10.5.9.0/24"}}, "--allow-to"},
		{api.Policy{Egress: []string{"224.0.0.0/8"}}, "no network of hosts"},
		{api.Policy{AllowFrom: []string{"192.0.2.0/24:80"}}, `--allow-from: rule "192.0.2.0/24:80": 192.0.2.0/24 lies outside the overlay, 10.5.0.0/16`},
		{api.Policy{AllowTo: []string{"10.6.0.1"}}, "--allow-to"},
	} {
		_, err := n.Attach(t.Context(), api.AttachRequest{PID: 41, Policy: tt.policy})
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%+v: %v, want %q", tt.policy, err, tt.says)
		}
	}
	if list, err := n.Attachments(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("left behind: %+v, %v", list, err)
	}
}

func TestAttach_WarnsOfWhatHasNoEffect(t *testing.T) {
	for _, tt := range []struct {
		policy api.Policy
		says   []string
	}{
		{api.Policy{AllowFrom: []string{"0.0.0.0/0:80/tcp", "10.5.1.1"}, Egress: []string{"0.0.0.0/0"}, HostAccess: []int{5432}}, nil},
		{api.Policy{AllowFrom: []string{"fd00::/8"}}, []string{"no IPv6"}},
		{api.Policy{AllowFrom: []string{"fd00::1:80"}}, []string{"write [fd00::1]:80"}},
		{api.Policy{Egress: []string{"2001:db8::/32"}}, []string{"no IPv6 address"}},
	} {
		w := newWorld()
		n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
		w.start(41)
		a, err := n.Attach(t.Context(), api.AttachRequest{PID: 41, Policy: tt.policy})
		if err != nil {
			t.Errorf("%+v: %v", tt.policy, err)
			continue
		}
		if len(a.Warnings) != len(tt.says) {
			t.Errorf("%+v: warnings %q, want %q", tt.policy, a.Warnings, tt.says)
			continue
		}
		for i, says := range tt.says {
			if !strings.Contains(a.Warnings[i], says) {
				t.Errorf("%+v: warning %q, want %q", tt.policy, a.Warnings[i], says)
			}
		}
	}
}

func TestMeantPort_IsAHintForAPortWithoutBrackets(t *testing.T) {
	for rule, want := range map[string]string{
		"fd00::1:80": "[fd00::1]:80", "fd00:5::80": "[fd00:5::]:80", "fd00::a": "", "10.5.0.1": "", "[fd00::1]:80": "", "fd00::/64": "",
	} {
		r, err := api.ParseRule(rule)
		if err != nil {
			t.Fatal(err)
		}
		if got := meantPort(r); (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", rule, got, want)
		}
	}
}
