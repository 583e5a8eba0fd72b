// This file tests the words of policies.

package api

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestParseRule_ReadsWhatItDocuments(t *testing.T) {
	p := netip.MustParsePrefix
	for s, want := range map[string]Rule{
		"10.213.7.0/24":           {Prefix: p("10.213.7.0/24")},
		"10.213.7.5":              {Prefix: p("10.213.7.5/32")},
		"10.213.7.5:443":          {Prefix: p("10.213.7.5/32"), First: 443, Last: 443},
		"10.213.7.0/24:443/tcp":   {Prefix: p("10.213.7.0/24"), First: 443, Last: 443, Proto: "tcp"},
		"10.213.7.5:8000-8010":    {Prefix: p("10.213.7.5/32"), First: 8000, Last: 8010},
		"10.213.7.5/icmp":         {Prefix: p("10.213.7.5/32"), Proto: "icmp"},
		"0.0.0.0/0/udp":           {Prefix: p("0.0.0.0/0"), Proto: "udp"},
		"fd00:5::/64":             {Prefix: p("fd00:5::/64")},
		"fd00:5::7":               {Prefix: p("fd00:5::7/128")},
		"fd00:5::7/tcp":           {Prefix: p("fd00:5::7/128"), Proto: "tcp"},
		"fd00:5::/64/icmp":        {Prefix: p("fd00:5::/64"), Proto: "icmp"},
		"[fd00:5::/64]:53/udp":    {Prefix: p("fd00:5::/64"), First: 53, Last: 53, Proto: "udp"},
		"[fd00:5::7]:1-65535":     {Prefix: p("fd00:5::7/128"), First: 1, Last: 65535},
		"[fd00:5::7]":             {Prefix: p("fd00:5::7/128")},
		"[10.213.7.0/24]:80":      {Prefix: p("10.213.7.0/24"), First: 80, Last: 80},
		"[2001:db8:1::/48]:80-80": {Prefix: p("2001:db8:1::/48"), First: 80, Last: 80},
	} {
		got, err := ParseRule(s)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", s, got, err, want)
		}
		if again, err := ParseRule(got.String()); err != nil || again != got {
			t.Errorf("%s: written as %q, read as %+v, %v", s, got, again, err)
		}
	}
}

func TestParseRule_SaysWhatIsWrong(t *testing.T) {
	for s, says := range map[string]string{
		"":                          "CIDR",
		"web":                       "CIDR",
		"10.213.7.9/24":             "10.213.7.0/24",
		"10.213.7.0/33":             "CIDR",
		"10.213.7.0/24:":            "port",
		"10.213.7.0/24:0":           "port",
		"10.213.7.0/24:65536":       "port",
		"10.213.7.0/24:90-80":       "port",
		"10.213.7.0/24:+80":         "port",
		"10.213.7.0/24:80-":         "port",
		"10.213.7.0/24:80/sctp":     "protocol",
		"10.213.7.0/24/":            "protocol",
		"10.213.7.0/24:80/icmp":     "icmp has no ports",
		"fd00:5::/64:80":            "CIDR",
		"[fd00:5::/64":              "write",
		"[fd00:5::/64]80":           "write",
		"fe80::1%eth0":              "CIDR",
		"::ffff:10.0.0.0/104":       "CIDR",
		"10.0.0.0/8:80/tcp/udp":     "CIDR",
		strings.Repeat("x", 100000): "CIDR",
	} {
		_, err := ParseRule(s)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), says) || len(err.Error()) > 500 {
			t.Errorf("%s: %v, want ErrInvalid that says %q", clip(s), err, says)
		}
	}
}

func TestPolicy_Validate(t *testing.T) {
	for _, c := range []struct {
		p    Policy
		says string // "": it is valid
	}{
		{Policy{}, ""},
		{Policy{Isolate: true, AllowFrom: []string{"10.213.7.0/24:80"}, AllowTo: []string{"fd00::/64"}, Egress: []string{"deny"}, HostAccess: []int{1, 65535}}, ""},
		{Policy{Egress: []string{"allow"}}, ""},
		{Policy{Egress: []string{"192.0.2.0/24", "2001:db8::/32", "192.0.3.1"}}, ""},
		{Policy{AllowFrom: []string{"x"}}, "--allow-from"},
		{Policy{AllowTo: []string{"10.0.0.0/8", "x"}}, "--allow-to"},
		{Policy{Egress: []string{"deny", "192.0.2.0/24"}}, "alone"},
		{Policy{Egress: []string{"allow", "deny"}}, "alone"},
		{Policy{Egress: []string{"no"}}, "--egress"},
		{Policy{Egress: []string{"192.0.2.1/24"}}, "192.0.2.0/24"},
		{Policy{Egress: []string{""}}, "--egress"},
		{Policy{HostAccess: []int{0}}, "--host-access"},
		{Policy{HostAccess: []int{65536}}, "65535"},
		{Policy{HostAccess: []int{80, 53}}, "resolver"},
		{Policy{HostAccess: make([]int, maxHostPorts+1)}, "--host-loopback"},
		{Policy{AllowTo: slices.Repeat([]string{"10.0.0.0/8"}, maxRules+1)}, "--allow-to"},
		{Policy{Egress: slices.Repeat([]string{"10.0.0.0/8"}, maxRules+1)}, "--egress"},
	} {
		err := AttachRequest{PID: 1, Policy: c.p}.Validate()
		switch {
		case c.says == "" && err != nil:
			t.Errorf("%+v: %v", c.p, err)
		case c.says != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%+v: %v, want ErrInvalid that says %q", c.p, err, c.says)
		}
	}
	for flag, p := range map[string]Policy{
		"--isolate": {Isolate: true}, "--allow-from": {AllowFrom: []string{"10.0.0.0/8"}}, "--allow-to": {AllowTo: []string{"10.0.0.0/8"}},
		"--egress": {Egress: []string{"deny"}}, "--host-access": {HostAccess: []int{80}},
	} {
		if err := (AttachRequest{PID: 1, Gateway: true, Policy: p}).Validate(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), flag) {
			t.Errorf("%s with --gateway: %v", flag, err)
		}
	}
}

func TestPolicy_SaysWhatItMeans(t *testing.T) {
	p := Policy{Isolate: true, AllowFrom: []string{"10.0.0.0/8", "fd00::/8"}, AllowTo: []string{"10.0.0.0/8"}, Egress: []string{"192.0.2.0/24"}, HostAccess: []int{80, 5432}}
	if got, want := p.Summary(), "isolate, from 2, to 1, egress 1, host 80+5432"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if networks, all, err := p.EgressNetworks(); err != nil || all || !reflect.DeepEqual(networks, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}) {
		t.Errorf("egress %v, %v, %v", networks, all, err)
	}
	for _, open := range []Policy{{}, {Egress: []string{"allow"}}} {
		if _, all, err := open.EgressNetworks(); !all || err != nil || open.Summary() != "" {
			t.Errorf("%+v: all %v, %v, summary %q", open, all, err, open.Summary())
		}
	}
	if got := (Policy{Egress: []string{"deny"}}); got.Summary() != "egress deny" {
		t.Errorf("%q", got.Summary())
	}
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{"10.213.7.0/24:443/tcp", "10.213.7.5:8000-8010", "[fd00:5::/64]:53/udp", "fd00:5::7/tcp", "0.0.0.0/0/icmp", "[]:", "a:b/", "1.2.3.4/5:6-7/udp"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%q: %v is not ErrInvalid", s, err)
			}
			return
		}
		if !r.Prefix.IsValid() || r.Prefix != r.Prefix.Masked() || r.First > r.Last || (r.First == 0) != (r.Last == 0) || r.Proto == "icmp" && r.Last != 0 {
			t.Errorf("%q: %+v", s, r)
		}
		if again, err := ParseRule(r.String()); err != nil || again != r {
			t.Errorf("%q: written as %q, read as %+v, %v", s, r, again, err)
		}
	})
}
