// This file tests the network config against what flannel accepts, refuses and fills in.

package lease

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestParseConfig_FillsInAsFlannelDoes(t *testing.T) {
	for name, tc := range map[string]struct {
		json             string
		network, lo, hi  string
		bits             int
		backend          string
		lo6, hi6         string
		bits6, udp       int
		udpErr, isIPv6On bool
	}{
		// The first and third are TestConfigDefaults and TestConfigOverrides of flannel's pkg/subnet/config_test.go,
		// the v6 half of "dual-stack" its TestIPv6ConfigDefaults; "documentation" is Documentation/configuration.md.
		"defaults":                 {json: `{ "network": "10.3.0.0/16" }`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udp: 8285},
		"network is masked":        {json: `{"Network":"172.200.5.0/16"}`, network: "172.200.0.0/16", lo: "172.200.1.0", hi: "172.200.255.0", bits: 24, backend: "udp", udp: 8285},
		"overrides":                {json: `{ "Network": "10.3.0.0/16", "SubnetMin": "10.3.5.0", "SubnetMax": "10.3.8.0", "SubnetLen": 28 }`, network: "10.3.0.0/16", lo: "10.3.5.0", hi: "10.3.8.0", bits: 28, backend: "udp", udp: 8285},
		"documentation":            {json: `{"Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0", "Backend": {"Type": "udp", "Port": 7890}}`, network: "10.0.0.0/8", lo: "10.10.0.0", hi: "10.99.0.0", bits: 20, backend: "udp", udp: 7890},
		"/22 gives /24":            {json: `{"Network":"10.0.0.0/22"}`, network: "10.0.0.0/22", lo: "10.0.1.0", hi: "10.0.3.0", bits: 24, backend: "udp", udp: 8285},
		"/23 gives /25":            {json: `{"Network":"10.0.0.0/23"}`, network: "10.0.0.0/23", lo: "10.0.0.128", hi: "10.0.1.128", bits: 25, backend: "udp", udp: 8285},
		"/28 gives /30":            {json: `{"Network":"10.0.0.16/28"}`, network: "10.0.0.16/28", lo: "10.0.0.20", hi: "10.0.0.28", bits: 30, backend: "udp", udp: 8285},
		"zero min counts unset":    {json: `{"Network":"10.3.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0"}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udp: 8285},
		"end of the address space": {json: `{"Network":"255.255.0.0/16"}`, network: "255.255.0.0/16", lo: "255.255.1.0", hi: "255.255.255.0", bits: 24, backend: "udp", udp: 8285},
		"type in capitals":         {json: `{"Network":"10.3.0.0/16","Backend":{"Type":"VXLAN","VNI":7}}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "vxlan", udpErr: true},
		"udp without port":         {json: `{"Network":"10.3.0.0/16","Backend":{"Type":"udp"}}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udp: 8285},
		"udp port 0":               {json: `{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":0}}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udpErr: true},
		"udp port too high":        {json: `{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":65536}}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udpErr: true},
		"udp port is no number":    {json: `{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":"x"}}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udpErr: true},
		"IPv6 that is off":         {json: `{"Network":"10.3.0.0/16","EnableNFTables":true,"IPv6Network":"fc00::/127","IPv6SubnetMin":"fd00::"}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udp: 8285},
		"dual-stack":               {json: `{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48"}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udp: 8285, isIPv6On: true, lo6: "fc00:0:0:1::", hi6: "fc00:0:0:ffff::", bits6: 64},
		"dual-stack overrides":     {json: `{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00:0:0:1::","IPv6SubnetMax":"fc00:0:0:f::","IPv6SubnetLen":124}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udp: 8285, isIPv6On: true, lo6: "fc00:0:0:1::", hi6: "fc00:0:0:f::", bits6: 124},
		"v6 /120 gives /122":       {json: `{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/120"}`, network: "10.3.0.0/16", lo: "10.3.1.0", hi: "10.3.255.0", bits: 24, backend: "udp", udp: 8285, isIPv6On: true, lo6: "fc00::40", hi6: "fc00::c0", bits6: 122},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := ParseConfig([]byte(tc.json))
			if err != nil {
				t.Fatal(err)
			}
			if c.Network.String() != tc.network || c.SubnetMin.String() != tc.lo || c.SubnetMax.String() != tc.hi || c.SubnetLen != tc.bits || c.BackendType != tc.backend {
				t.Errorf("got %v, %v to %v of /%d, backend %s", c.Network, c.SubnetMin, c.SubnetMax, c.SubnetLen, c.BackendType)
			}
			if c.EnableIPv6 != tc.isIPv6On || tc.isIPv6On && (c.IPv6SubnetMin.String() != tc.lo6 || c.IPv6SubnetMax.String() != tc.hi6 || c.IPv6SubnetLen != tc.bits6) {
				t.Errorf("IPv6 %t: %v to %v of /%d", c.EnableIPv6, c.IPv6SubnetMin, c.IPv6SubnetMax, c.IPv6SubnetLen)
			}
			if port, err := c.UDPPort(); port != tc.udp || (err != nil) != tc.udpErr {
				t.Errorf("UDPPort = %d, %v", port, err)
			}
			if !bytes.Equal(c.Raw, []byte(tc.json)) {
				t.Errorf("Raw = %s", c.Raw)
			}
		})
	}
}

func TestParseConfig_RefusesWhatFlannelRefuses(t *testing.T) {
	for name, tc := range map[string]struct{ json, says string }{
		"empty":                  {``, "JSON"},
		"not JSON":               {`garbage`, "JSON"},
		"an array":               {`[]`, "JSON"},
		"trailing bytes":         {`{"Network":"10.3.0.0/16"} x`, "JSON"},
		"huge":                   {`{"Network":"` + strings.Repeat("1", MaxValue) + `"}`, "bytes"},
		"no network":             {`{}`, "please define a correct Network parameter"},
		"network is no prefix":   {`{"Network":"10.3.0.0"}`, "Network"},
		"network is IPv6":        {`{"Network":"fc00::/48"}`, "wrong address family"},
		"network is everything":  {`{"Network":"0.0.0.0/0"}`, "whole address space"},
		"network too small":      {`{"Network":"10.3.0.0/29"}`, "Minimum useful network prefix is /28"},
		"subnets too small":      {`{"Network":"10.3.0.0/16","SubnetLen":31}`, "SubnetLen 31 must be less than /31"},
		"subnets enormous":       {`{"Network":"10.3.0.0/16","SubnetLen":18446744073709551615}`, "must be less than"},
		"too few subnets":        {`{"Network":"10.3.0.0/16","SubnetLen":17}`, "at least four subnets"},
		"negative length":        {`{"Network":"10.3.0.0/16","SubnetLen":-1}`, "SubnetLen"},
		"min outside":            {`{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0"}`, "SubnetMin 10.4.0.0 is not in the range"},
		"max outside":            {`{"Network":"10.3.0.0/16","SubnetMax":"10.4.0.0"}`, "SubnetMax 10.4.0.0 is not in the range"},
		"min not aligned":        {`{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.7"}`, "SubnetMin 10.3.1.7 is not on a SubnetLen boundary"},
		"max not aligned":        {`{"Network":"10.3.0.0/16","SubnetMax":"10.3.9.128"}`, "not on a SubnetLen boundary"},
		"min above max":          {`{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.8.0"}`, "above"},
		"min is no address":      {`{"Network":"10.3.0.0/16","SubnetMin":"x"}`, "SubnetMin"},
		"IPv6 only":              {`{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}`, "without IPv4"},
		"IPv6 network missing":   {`{"EnableIPv6":true,"Network":"10.3.0.0/16"}`, "IPv6Network"},
		"IPv6 network is IPv4":   {`{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"10.4.0.0/16"}`, "wrong address family"},
		"IPv6 network is mapped": {`{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"::ffff:10.4.0.0/112"}`, "IPv6Network"},
		"IPv6 subnets too small": {`{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","IPv6SubnetLen":127}`, "less than /127"},
		"IPv6 network too small": {`{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/125"}`, "/124"},
		"IPv6 min is IPv4":       {`{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","IPv6SubnetMin":"0.0.0.0"}`, "IPv6SubnetMin"},
		"empty network":          {`{"Network":""}`, `Network "" is not a network`},
		"empty min":              {`{"Network":"10.3.0.0/16","SubnetMin":""}`, `SubnetMin "" is not an IP address`},
		"empty IPv6 max":         {`{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","IPv6SubnetMax":""}`, `IPv6SubnetMax "" is not`},
		"bad IPv6 network, off":  {`{"Network":"10.3.0.0/16","IPv6Network":"fc00::"}`, `IPv6Network "fc00::" is not a network`},
		"bad IPv6 min, off":      {`{"Network":"10.3.0.0/16","IPv6SubnetMin":"fe80::1%eth0"}`, `IPv6SubnetMin "fe80::1%eth0" is not`},
		"bad IPv6 max, off":      {`{"Network":"10.3.0.0/16","IPv6SubnetMax":""}`, `IPv6SubnetMax "" is not`},
		"bad EnableNFTables":     {`{"Network":"10.3.0.0/16","EnableNFTables":"yes"}`, "EnableNFTables"},
		"backend is no object":   {`{"Network":"10.3.0.0/16","Backend":"udp"}`, "Backend"},
		"backend without type":   {`{"Network":"10.3.0.0/16","Backend":{}}`, "Type"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseConfig([]byte(tc.json)); !errors.Is(err, ErrBadConfig) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v; want %q", err, tc.says)
			}
		})
	}
}

func TestParseConfig_SpeaksToPeopleAndNotOfGo(t *testing.T) {
	for config, says := range map[string]string{
		`[]`:                "it is of the wrong kind (JSON array): an object is needed",
		`{"Network":5}`:     "Network is of the wrong kind (JSON number): a string is needed",
		`{"Network":"foo"}`: `Network "foo" is not a network: write an address and a length, as in 10.5.0.0/16`,
		`{"Network":"10.3.0.0/16","SubnetLen":"24"}`:                    "SubnetLen is of the wrong kind (JSON string): a whole number, 0 or more is needed",
		`{"Network":"10.3.0.0/16","SubnetLen":-1}`:                      "SubnetLen is of the wrong kind (JSON number -1): a whole number",
		`{"Network":"10.3.0.0/16","EnableIPv6":1}`:                      "true or false is needed",
		`{"Network":"10.3.0.0/16","SubnetMin":"foo"}`:                   `SubnetMin "foo" is not an IP address`,
		`{"Network":"10.3.0.0/16","Backend":"udp"}`:                     "Backend is of the wrong kind (JSON string): an object is needed",
		`{"Network":"10.3.0.0/16","Backend":{"Type":1}}`:                "Backend Type is of the wrong kind",
		`{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":"x"}}`: "Backend Port is not a number from 1 to 65535",
		`{nonsense`: "it is not JSON: invalid character",
	} {
		c, err := ParseConfig([]byte(config))
		if err == nil {
			_, err = c.UDPPort()
		}
		if !errors.Is(err, ErrBadConfig) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v; want %q", config, err, says)
			continue
		}
		for _, word := range []string{"json:", "Go ", "netip", "Parse"} {
			if strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v", config, err)
			}
		}
	}
}

func TestUnknownMembers_AreThoseThatNobodyReads(t *testing.T) {
	for raw, want := range map[string]string{
		`{"Network":"10.5.0.0/16"}`: "[]",
		`{"network":"10.5.0.0/16","SUBNETLEN":24,"EnableIPv4":true,"EnableNFTables":false,"IPv6SubnetMin":"::","Backend":{"Typo":1}}`: "[]",
		`{"Network":"10.5.0.0/16","Backends":{"Type":"vxlan"},"SubnetLenght":24}`:                                                     "[Backends SubnetLenght]",
		`{"Network":"10.5.0.0/16","BackendType":"vxlan"}`:                                                                             "[BackendType]",
		`[`: "[]",
	} {
		if got := fmt.Sprint(UnknownMembers([]byte(raw))); got != want {
			t.Errorf("%s: %s, want %s", raw, got, want)
		}
	}
}

func TestDefaultConfig_Parses(t *testing.T) {
	b := DefaultConfig(netip.MustParsePrefix("10.88.7.0/16"))
	if want := `{"Network":"10.88.0.0/16","Backend":{"Type":"udp"}}`; string(b) != want {
		t.Errorf("got %s, want %s", b, want)
	}
	if c, err := ParseConfig(b); err != nil || c.BackendType != "udp" {
		t.Errorf("%+v, %v", c, err)
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, s := range []string{
		`{"Network":"10.5.0.0/16"}`,
		`{"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0","Backend":{"Type":"udp","Port":7890}}`,
		`{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00:0:0:1::","IPv6SubnetMax":"fc00:0:0:f::","IPv6SubnetLen":124}`,
		`{"Network":"10.5.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan","VNI":1,"Port":8472,"DirectRouting":true}}`,
		`{"Network":"255.255.255.240/28"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseConfig(b)
		if err != nil {
			return
		}
		_, _ = c.StockPort()
		// Whatever is accepted can be leased from, and what is leased fits the config.
		v4, v6, err := pick(c, Request{}, nil)
		if err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if !compatible(c, Lease{Subnet: v4, Subnet6: v6}) || !c.Network.Contains(v4.Addr()) {
			t.Fatalf("%s: picked %v and %v", b, v4, v6)
		}
	})
}
