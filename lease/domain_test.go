// This file tests the network's domain.

package lease

import (
	"errors"
	"strings"
	"testing"
)

func TestCheckDomain(t *testing.T) {
	for in, want := range map[string]string{"ovl.internal": "ovl.internal", "Lab.Example.": "lab.example", "corp": "corp", "a-b.c_d.x": "a-b.c_d.x"} {
		if got, err := CheckDomain(in); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, bad := range []string{"", ".", "a..b", "-a.b", "a-.b", "a b", "10", "x.10", "in-addr.arpa", "local", "x.localhost", strings.Repeat("a", 64), strings.Repeat("a.", 80), "ä.b"} {
		if got, err := CheckDomain(bad); err == nil {
			t.Errorf("%q: %q", bad, got)
		}
	}
}

func TestNetworkConfig_Domain(t *testing.T) {
	for config, want := range map[string]string{
		`{"Network":"10.5.0.0/16"}`:                                                  DefaultDomain,
		`{"Network":"10.5.0.0/16","RootlessOvl":null}`:                               DefaultDomain,
		`{"Network":"10.5.0.0/16","RootlessOvl":{}}`:                                 DefaultDomain,
		`{"Network":"10.5.0.0/16","RootlessOvl":{"Domain":"Lab.Example","Other":1}}`: "lab.example",
		`{"Network":"10.5.0.0/16","rootlessovl":{"domain":"lab"}}`:                   "lab",
		`{"Network":"10.5.0.0/16","RootlessOvl":7}`:                                  "",
		`{"Network":"10.5.0.0/16","RootlessOvl":{"Domain":7}}`:                       "",
		`{"Network":"10.5.0.0/16","RootlessOvl":{"Domain":"a b"}}`:                   "",
	} {
		c, err := ParseConfig([]byte(config))
		if err != nil { // flannel takes them all
			t.Errorf("%s: %v", config, err)
			continue
		}
		got, err := c.Domain()
		if got != want || (want == "") != errors.Is(err, ErrBadConfig) {
			t.Errorf("%s: %q, %v", config, got, err)
		}
		if len(UnknownMembers([]byte(config))) > 0 {
			t.Errorf("%s: a member is unknown", config)
		}
	}
}

func TestWithDomain(t *testing.T) {
	for _, config := range []string{
		`{"Network":"10.5.0.0/16","SubnetLen":26,"Backend":{"Type":"vxlan","VNI":7}}`,
		`{"Network":"10.5.0.0/16","SubnetLen":26,"Backend":{"Type":"vxlan","VNI":7},"rootlessOVL":{"domain":"old","Other":[1]}}`,
		`{"Network":"10.5.0.0/16","SubnetLen":26,"Backend":{"Type":"vxlan","VNI":7},"RootlessOvl":null}`,
	} {
		b, err := WithDomain([]byte(config), "lab.example")
		if err != nil {
			t.Errorf("%s: %v", config, err)
			continue
		}
		c, err := ParseConfig(b)
		if err != nil || c.SubnetLen != 26 || c.BackendType != "vxlan" || string(c.Backend) != `{"Type":"vxlan","VNI":7}` {
			t.Errorf("%s became %s: %v", config, b, err)
		}
		if d, err := c.Domain(); d != "lab.example" || err != nil {
			t.Errorf("%s became %s: %q, %v", config, b, d, err)
		}
		if strings.Contains(config, "Other") != strings.Contains(string(b), `"Other":[1]`) {
			t.Errorf("%s became %s", config, b)
		}
	}
	for config, domain := range map[string]string{
		`{"Network":"10.5.0.0/16"}`: "a b",
		`[]`:                        "lab",
		`{"Network":"10.5.0.0/16","RootlessOvl":"x"}`: "lab",
	} {
		if b, err := WithDomain([]byte(config), domain); !errors.Is(err, ErrBadConfig) {
			t.Errorf("%s %s: %s, %v", config, domain, b, err)
		}
	}
}
