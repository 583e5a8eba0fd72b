// Tests of a container's resolv.conf.

package api

import "testing"

func TestDNS_ResolvConfSearchesTheOverlayFirst(t *testing.T) {
	overlay := DNS{Server: "10.213.7.1", Search: []string{"ovl.internal"}}
	for host, want := range map[string]string{
		"":                               "nameserver 10.213.7.1\nsearch ovl.internal\n",
		"nameserver 192.0.2.1\n":         "nameserver 10.213.7.1\nsearch ovl.internal\n",
		"domain a.example\nsearch b c\n": "nameserver 10.213.7.1\nsearch ovl.internal b c\n",
		"search b c\ndomain a.example\n": "nameserver 10.213.7.1\nsearch ovl.internal a.example\n",
		"search lan ovl.internal.\n":     "nameserver 10.213.7.1\nsearch ovl.internal lan\n",
		"search .\n":                     "nameserver 10.213.7.1\nsearch ovl.internal .\n",
		"options edns0 rotate\noptions timeout:2\nsortlist 10.0.0.0\n": "nameserver 10.213.7.1\nsearch ovl.internal\noptions edns0 timeout:2\n",
		"options rotate\n": "nameserver 10.213.7.1\nsearch ovl.internal\n",
	} {
		if got := string(overlay.ResolvConf(host)); got != want {
			t.Errorf("%q: %q, want %q", host, got, want)
		}
	}
}
