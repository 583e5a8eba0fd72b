// Tests of the network configs that no node starts on.

package node

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

func TestCheckRanges_RefusesNetworksThatNeverWork(t *testing.T) {
	for _, tc := range []struct{ network, ipv6, says string }{
		{"10.5.0.0/16", "fd00:5::/48", ""},
		{"100.64.0.0/10", "2001:db8::/48", ""},
		{"192.0.2.0/24", "", ""},
		{"172.16.0.0/12", "", ""},
		{"224.0.0.0/8", "", "Network 224.0.0.0/8 is multicast: "},
		{"239.1.0.0/16", "", "multicast"},
		{"127.0.0.0/8", "", "loopback"},
		{"169.254.0.0/16", "", "link-local"},
		{"169.0.0.0/8", "", "contains 169.254.0.0/16, which is link-local"},
		{"0.0.0.0/8", "", "unspecified"},
		{"240.0.0.0/4", "", "reserved"},
		{"255.255.0.0/16", "", "reserved"},
		{"192.0.0.0/24", "", "contains 192.0.0.8, "},
		{"192.0.0.0/16", "", "contains 192.0.0.8, "},
		{"10.5.0.0/16", "ff00::/8", "IPv6Network ff00::/8 is multicast: "},
		{"10.5.0.0/16", "fe80::/10", "IPv6Network fe80::/10 is link-local"},
		{"10.5.0.0/16", "::/8", "IPv6Network ::/8 is loopback"},
		{"10.5.0.0/16", "8000::/1", "contains fe80::/10"},
	} {
		for _, backend := range []string{"vxlan", "udp"} {
			raw := fmt.Sprintf(`{"Network":%q,"Backend":{"Type":%q}}`, tc.network, backend)
			if tc.ipv6 != "" {
				raw = fmt.Sprintf(`{"Network":%q,"EnableIPv6":true,"IPv6Network":%q,"Backend":{"Type":%q}}`, tc.network, tc.ipv6, backend)
			}
			cfg, err := lease.ParseConfig([]byte(raw))
			if err != nil {
				t.Fatalf("%s: flannel takes it, %v", raw, err)
			}
			err = CheckConfig(cfg)
			switch {
			case tc.says == "" || backend == "udp" && strings.Contains(tc.network, "10.5."): // udp carries no IPv6
				if err != nil {
					t.Errorf("%s: %v", raw, err)
				}
			case err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), "use a "):
				t.Errorf("%s: %v; want %q", raw, err, tc.says)
			}
		}
	}
}

func TestSetConfig_WritesWhatFlannelTakesAndWarns(t *testing.T) {
	var logged syncBuffer
	c := testConfig(t)
	c.ListenEtcd = "127.0.0.1:0"
	c.Log = slog.New(slog.NewTextHandler(&logged, nil))
	r := startNode(t, c)
	r.ready()
	for _, raw := range []string{
		`{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}`,
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}`,
		`{"Network":"10.5.0.0/16","Backend":{"Type":"nonsense"}}`,
	} {
		before := strings.Count(logged.String(), "no rootless-ovl node starts on")
		if err := r.client.SetConfig(t.Context(), []byte(raw)); err != nil {
			t.Errorf("%s: %v", raw, err)
		}
		if got, err := r.client.Config(t.Context()); err != nil || string(got) != raw {
			t.Errorf("wrote %s: %s, %v", raw, got, err)
		}
		if strings.Count(logged.String(), "no rootless-ovl node starts on") != before+1 {
			t.Errorf("%s: no warning in\n%s", raw, logged.String())
		}
	}
}
