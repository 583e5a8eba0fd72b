// This file tests the values of names.

package lease

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestParseName(t *testing.T) {
	addr := cmpopts.EquateComparable(netip.Addr{})
	for value, want := range map[string]Name{
		`{"NodeID":"3fa2","Addr":"10.213.7.3"}`: {Name: "web", NodeID: "3fa2", Addr: netip.MustParseAddr("10.213.7.3")},
		`{"NodeID":"3fa2","Addr":"10.213.7.3","Addr6":"fd00::3","Aliases":["a","b_1.c-d"],"New":1}`: {
			Name: "web", NodeID: "3fa2", Addr: netip.MustParseAddr("10.213.7.3"), Addr6: netip.MustParseAddr("fd00::3"), Aliases: []string{"a", "b_1.c-d"}},
	} {
		got, err := ParseName("/coreos.com/network/rootless-ovl/names/web", []byte(value))
		if err != nil || !cmp.Equal(got, want, addr) {
			t.Errorf("%s: %+v, %v", value, got, err)
		}
		b, err := got.value()
		if again, perr := ParseName("web", b); err != nil || perr != nil || !cmp.Equal(again, want, addr) {
			t.Errorf("written as %s: %v %v", b, err, perr)
		}
	}
	for key, value := range map[string]string{
		"no JSON":  `x`,
		"no node":  `{"Addr":"10.213.7.3"}`,
		"no addr":  `{"NodeID":"3fa2"}`,
		"v6":       `{"NodeID":"3fa2","Addr":"fd00::3"}`,
		"loopback": `{"NodeID":"3fa2","Addr":"127.0.0.1"}`,
		"mapped":   `{"NodeID":"3fa2","Addr":"10.213.7.3","Addr6":"::ffff:10.0.0.1"}`,
		"zone":     `{"NodeID":"3fa2","Addr":"10.213.7.3","Addr6":"fd00::1%eth0"}`,
		"alias":    `{"NodeID":"3fa2","Addr":"10.213.7.3","Aliases":["A"]}`,
		"log":      `{"NodeID":"3f\na2","Addr":"10.213.7.3"}`,
		"large":    `{"NodeID":"3fa2","Addr":"10.213.7.3"}` + strings.Repeat(" ", MaxValue),
	} {
		if n, err := ParseName("web", []byte(value)); err == nil {
			t.Errorf("%s: %+v", key, n)
		}
	}
	for _, key := range []string{"Web", "a b", "", "a..b", "-a", "a.", strings.Repeat("a", 64), strings.Repeat("a.", 60) + "a"} {
		if n, err := ParseName("/names/"+key, []byte(`{"NodeID":"3fa2","Addr":"10.213.7.3"}`)); err == nil {
			t.Errorf("key %q: %+v", key, n)
		}
	}
}

// FuzzName reads what anybody may have written.
func FuzzName(f *testing.F) {
	f.Add("/coreos.com/network/rootless-ovl/names/web", []byte(`{"NodeID":"3fa2","Addr":"10.213.7.3","Addr6":"fd00::3","Aliases":["a","b"]}`))
	f.Add("web", []byte(`{}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		n, err := ParseName(key, value)
		if err != nil {
			return
		}
		b, err := n.value()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseName(n.Name, b)
		if err != nil || !again.equal(n) {
			t.Fatalf("%+v is written as %s and read as %+v, %v", n, b, again, err)
		}
		if CheckDNSName(n.Name) != nil || !n.Addr.Is4() {
			t.Fatalf("%+v", n)
		}
	})
}
