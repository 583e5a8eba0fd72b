// This file is the golden tables of keys, lease values and subnet.env, each entry with its origin, and their fuzzers.

package lease

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

// Origin of the keys: flannel's Documentation/reservations.md, and MakeSubnetKey in pkg/subnet/subnet.go.
var goldenKeys = map[string]struct{ key, v4, v6 string }{
	"reservations.md":         {"10.5.52.0-24", "10.5.52.0/24", ""},
	"reservations.md, second": {"10.5.1.0-24", "10.5.1.0/24", ""},
	"MakeSubnetKey, dual":     {"10.5.34.0-24&fd00:0:0:12::-64", "10.5.34.0/24", "fd00:0:0:12::/64"},
	"MakeSubnetKey, short v6": {"10.5.1.0-24&fc00::-64", "10.5.1.0/24", "fc00::/64"},
}

func TestKey_IsFlannels(t *testing.T) {
	for name, g := range goldenKeys {
		v4 := netip.MustParsePrefix(g.v4)
		var v6 netip.Prefix
		if g.v6 != "" {
			v6 = netip.MustParsePrefix(g.v6)
		}
		if got := Key(v4, v6); got != g.key {
			t.Errorf("%s: Key = %s, want %s", name, got, g.key)
		}
		// flannel does not anchor its expression, so whatever ends like a subnet is one.
		for _, before := range []string{"", "/coreos.com/network/subnets/", "/coreos.com/network/subnets-", "x"} {
			if got4, got6, err := ParseKey(before + g.key); err != nil || got4 != v4 || got6 != v6 {
				t.Errorf("%s: ParseKey(%s) = %v, %v, %v", name, before+g.key, got4, got6, err)
			}
		}
	}
	if v4, _, err := ParseKey("10.5.1.77-24"); err != nil || v4.String() != "10.5.1.0/24" {
		t.Errorf("host bits: %v, %v", v4, err)
	}
}

func TestParseKey_RefusesWhatIsNoSubnet(t *testing.T) {
	for name, key := range map[string]string{
		"empty":                 "",
		"config":                "/coreos.com/network/config",
		"no length":             "/coreos.com/network/subnets/10.5.1.0",
		"slash":                 "10.5.1.0/24",
		"length over 31":        "10.5.1.0-32",
		"length of many digits": "10.5.1.0-" + strings.Repeat("2", 100),
		"octet over 255":        "10.5.256.0-24",
		"leading zero":          "10.05.1.0-24",
		"dots that are not":     "10x5.1.0-24",
		"something after":       "10.5.1.0-24/x",
		"v6 length over 127":    "10.5.1.0-24&fd00::-128",
		"v6 is none":            "10.5.1.0-24&:::-64",
		"v6 in capitals":        "10.5.1.0-24&FD00::-64",
		"v6 alone":              "fd00::-64",
		"very long":             strings.Repeat("1", 1<<20) + ".5.1.0-24",
	} {
		if v4, v6, err := ParseKey(key); err == nil {
			t.Errorf("%s: %v, %v", name, v4, v6)
		}
	}
}

// Origin: what each backend of flannel v0.28 writes. vxlan is verbatim in Documentation/reservations.md; the others are
// json.Marshal of lease.LeaseAttrs as filled in by pkg/backend/udp/udp_amd64.go, pkg/backend/vxlan/vxlan.go (two
// devices), pkg/backend/wireguard/wireguard.go and pkg/backend/hostgw.
var goldenAttrs = map[string]struct {
	json  string
	attrs Attrs
}{
	"udp":            {`{"PublicIP":"192.168.64.3","PublicIPv6":null}`, Attrs{PublicIP: ip("192.168.64.3")}},
	"nothing known":  {`{"PublicIP":"0.0.0.0","PublicIPv6":null}`, Attrs{}},
	"vxlan":          {`{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}`, Attrs{PublicIP: ip("192.168.64.3"), BackendType: "vxlan", BackendData: raw(`{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}`)}},
	"vxlan dual":     {`{"PublicIP":"192.168.64.3","PublicIPv6":"2001:db8::3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}}`, Attrs{PublicIP: ip("192.168.64.3"), PublicIPv6: ip("2001:db8::3"), BackendType: "vxlan", BackendData: raw(`{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}`), BackendV6Data: raw(`{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}`)}},
	"wireguard":      {`{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"+/8=","Port":51820}}`, Attrs{PublicIP: ip("192.168.64.3"), BackendType: "wireguard", BackendData: raw(`{"PublicKey":"+/8=","Port":51820}`)}},
	"host-gw":        {`{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}`, Attrs{PublicIP: ip("192.168.64.3"), BackendType: "host-gw"}},
	"extension":      {`{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"extension","BackendData":"out\n"}`, Attrs{PublicIP: ip("192.168.64.3"), BackendType: "extension", BackendData: raw(`"out\n"`)}},
	"ours":           {`{"PublicIP":"192.168.64.3","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"0123456789abcdef0123456789abcdef","Port":18285,"MTU":1472}}`, Attrs{PublicIP: ip("192.168.64.3"), RootlessOvl: &Extension{V: 1, NodeID: "0123456789abcdef0123456789abcdef", Port: 18285, MTU: 1472}}},
	"ours with more": {`{"PublicIP":"192.168.64.3","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"n","Port":1,"MTU":0,"Caps":["gso"],"PublicKey":"+/8="}}`, Attrs{PublicIP: ip("192.168.64.3"), RootlessOvl: &Extension{V: 1, NodeID: "n", Port: 1, Caps: []string{"gso"}, PublicKey: "+/8="}}},
}

func ip(s string) netip.Addr       { return netip.MustParseAddr(s) }
func raw(s string) json.RawMessage { return json.RawMessage(s) }

func TestAttrs_AreFlannelsByteForByte(t *testing.T) {
	for name, g := range goldenAttrs {
		b, err := json.Marshal(g.attrs)
		if err != nil || string(b) != g.json {
			t.Errorf("%s: wrote %s, %v\nwant %s", name, b, err, g.json)
		}
		a, err := ParseAttrs([]byte(g.json))
		if err != nil || !reflect.DeepEqual(a, g.attrs) {
			t.Errorf("%s: read %+v, %v", name, a, err)
		}
	}
}

func TestParseAttrs_ReadsWhatFlannelReads(t *testing.T) {
	for name, tc := range map[string]struct {
		json string
		want Attrs
	}{
		"members missing":          {`{}`, Attrs{}},
		"members unknown":          {`{"PublicIP":"1.2.3.4","Future":{"a":[1]}}`, Attrs{PublicIP: ip("1.2.3.4")}},
		"other case":               {`{"publicip":"1.2.3.4","BACKENDTYPE":"vxlan"}`, Attrs{PublicIP: ip("1.2.3.4"), BackendType: "vxlan"}},
		"extension with unknown":   {`{"PublicIP":"1.2.3.4","RootlessOvl":{"V":2,"NodeID":"n","Port":1,"MTU":2,"New":true}}`, Attrs{PublicIP: ip("1.2.3.4"), RootlessOvl: &Extension{V: 2, NodeID: "n", Port: 1, MTU: 2}}},
		"unspecified IPv6 is none": {`{"PublicIP":"1.2.3.4","PublicIPv6":"::"}`, Attrs{PublicIP: ip("1.2.3.4")}},
	} {
		if a, err := ParseAttrs([]byte(tc.json)); err != nil || !reflect.DeepEqual(a, tc.want) {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
}

func TestParseAttrs_RefusesGarbage(t *testing.T) {
	for name, s := range map[string]string{
		"empty":               ``,
		"not JSON":            `garbage`,
		"a string":            `"x"`,
		"bad address":         `{"PublicIP":"1.2.3"}`,
		"IPv6 as IPv4":        `{"PublicIP":"2001:db8::1"}`,
		"IPv4 as IPv6":        `{"PublicIP":"1.2.3.4","PublicIPv6":"1.2.3.4"}`,
		"IPv6 with zone":      `{"PublicIP":"1.2.3.4","PublicIPv6":"fe80::1%eth0"}`,
		"extension is text":   `{"PublicIP":"1.2.3.4","RootlessOvl":"x"}`,
		"no NodeID":           `{"PublicIP":"1.2.3.4","RootlessOvl":{"V":1}}`,
		"NodeID for terminal": `{"PublicIP":"1.2.3.4","RootlessOvl":{"V":1,"NodeID":"\u001b[2J"}}`,
		"NodeID too long":     `{"PublicIP":"1.2.3.4","RootlessOvl":{"V":1,"NodeID":"` + strings.Repeat("a", 129) + `"}}`,
		"port too high":       `{"PublicIP":"1.2.3.4","RootlessOvl":{"V":1,"NodeID":"n","Port":65536}}`,
		"negative MTU":        `{"PublicIP":"1.2.3.4","RootlessOvl":{"V":1,"NodeID":"n","MTU":-1}}`,
		"huge":                `{"PublicIP":"1.2.3.4","BackendData":"` + strings.Repeat("x", MaxValue) + `"}`,
		"deep":                strings.Repeat("[", MaxValue),
	} {
		a, err := ParseAttrs([]byte(s))
		if err == nil {
			t.Errorf("%s: %+v", name, a)
		} else if len(err.Error()) > 500 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
	if _, err := json.Marshal(Attrs{PublicIP: ip("2001:db8::1")}); err == nil {
		t.Error("an IPv6 address was written as PublicIP")
	}
}

// Origin: flannel's Documentation/running.md and reservations.md for the first, WriteSubnetFile of
// pkg/subnet/subnet.go for the order of a dual-stack file.
var goldenSubnetEnv = map[string]struct {
	file string
	env  SubnetEnv
}{
	"reservations.md": {
		"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
		SubnetEnv{Network: prefix("10.5.0.0/16"), Subnet: prefix("10.5.52.0/24"), MTU: 1450},
	},
	"dual-stack": {
		"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
		SubnetEnv{prefix("10.5.0.0/16"), prefix("10.5.72.0/24"), prefix("2001:cafe:42::/56"), prefix("2001:cafe:42::/64"), 1450, true, false},
	},
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestSubnetEnv_IsFlannelsByteForByte(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	for name, g := range goldenSubnetEnv {
		path := filepath.Join(t.TempDir(), "new", "subnet.env")
		for range 2 { // the second replaces the first
			if err := WriteSubnetEnv(path, g.env); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != g.file {
			t.Errorf("%s: wrote %q, %v", name, b, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 {
			t.Errorf("%s: mode %v, %v", name, info.Mode(), err)
		}
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
			t.Errorf("%s: left %v, %v", name, left, err)
		}
		if e, err := ReadSubnetEnv(path); err != nil || e != g.env {
			t.Errorf("%s: read %+v, %v", name, e, err)
		}
	}
	if _, err := ReadSubnetEnv(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	dir := t.TempDir()
	if err := WriteSubnetEnv(dir, SubnetEnv{}); err == nil {
		t.Error("wrote over a directory")
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*")); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestParseSubnetEnv_ForgivesPeople(t *testing.T) {
	want := SubnetEnv{Network: prefix("10.5.0.0/16"), Subnet: prefix("10.5.52.0/24"), MTU: 1450, IPMasqAbsent: true}
	for name, s := range map[string]string{
		"quotes, export, CRLF": "export FLANNEL_NETWORK=\"10.5.0.0/16\"\r\n\r\n# mine\r\nFLANNEL_SUBNET='10.5.52.1/24'\r\nFLANNEL_MTU=1450\r\nOTHER=1",
		"several networks":     "FLANNEL_NETWORK=10.5.0.0/16,10.6.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\nFLANNEL_MTU=1450\n",
	} {
		if e, err := ParseSubnetEnv([]byte(s)); err != nil || e != want {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
	if e, err := ParseSubnetEnv([]byte("FLANNEL_SUBNET=10.5.52.1/24\n")); err != nil || e != (SubnetEnv{Subnet: prefix("10.5.52.0/24"), IPMasqAbsent: true}) {
		t.Errorf("a subnet alone: %+v, %v", e, err)
	}
	for name, s := range map[string]string{
		"no equals sign":       "FLANNEL_NETWORK",
		"subnet is no prefix":  "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.52.1",
		"subnet of other kind": "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=fd00::1/64",
		"MTU is no number":     "FLANNEL_MTU=x",
		"MTU too large":        "FLANNEL_MTU=65536",
		"IPMASQ is no truth":   "FLANNEL_IPMASQ=perhaps",
		"far too long":         strings.Repeat("#", MaxValue+1),
	} {
		if e, err := ParseSubnetEnv([]byte(s)); err == nil {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	for _, g := range goldenKeys {
		f.Add(g.key)
		f.Add("/coreos.com/network/subnets/" + g.key)
	}
	f.Add("not-a-subnet")
	f.Fuzz(func(t *testing.T, key string) {
		v4, v6, err := ParseKey(key)
		if err != nil {
			return
		}
		if !v4.Addr().Is4() || v4 != v4.Masked() || v6.IsValid() && (!v6.Addr().Is6() || v6 != v6.Masked()) {
			t.Fatalf("%q: %v, %v", key, v4, v6)
		}
		if v6.Addr().Is4In6() {
			return // flannel has no key for it either
		}
		if a, b, err := ParseKey(Key(v4, v6)); err != nil || a != v4 || b != v6 {
			t.Fatalf("%q: %v, %v again gives %v, %v, %v", key, v4, v6, a, b, err)
		}
	})
}

func FuzzParseAttrs(f *testing.F) {
	for _, g := range goldenAttrs {
		f.Add([]byte(g.json))
	}
	f.Add([]byte(`{"PublicIP":"2001:db8::1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseAttrs(b)
		if err != nil {
			return
		}
		// What was read can be written, and is then stable.
		once, err := json.Marshal(a)
		if err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		again, err := ParseAttrs(once)
		if err != nil && len(once) <= MaxValue {
			t.Fatalf("%s: wrote %s: %v", b, once, err)
		}
		twice, err := json.Marshal(again)
		if err != nil || len(once) <= MaxValue && !bytes.Equal(once, twice) {
			t.Fatalf("%s: wrote %s, then %s, %v", b, once, twice, err)
		}
		_ = a.who()
	})
}

func FuzzReadSubnetEnv(f *testing.F) {
	for _, g := range goldenSubnetEnv {
		f.Add([]byte(g.file))
	}
	f.Add([]byte("export FLANNEL_NETWORK=\"10.5.0.0/16,10.6.0.0/16\"\n#x\nFLANNEL_SUBNET=10.5.1.1/24"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseSubnetEnv(b)
		if err != nil {
			return
		}
		if again, err := ParseSubnetEnv(e.Bytes()); err != nil || again != e {
			t.Fatalf("%q: %+v, again %+v, %v", b, e, again, err)
		}
	})
}
