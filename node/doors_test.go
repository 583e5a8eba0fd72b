// Tests of which addresses of the store are closed to containers.

package node

import (
	"net/netip"
	"slices"
	"testing"
)

func TestStoreDoors_AreEveryKnownAddress(t *testing.T) {
	here := netip.MustParseAddr("192.0.2.12")
	hasAddr := func(a netip.Addr) (bool, error) { return a == here, nil }
	for _, tt := range []struct {
		name    string
		ours    []string
		given   []string
		members [][]string
		want    []string
	}{
		{"an endpoint elsewhere", nil, []string{"http://192.0.2.13:2379"}, nil, []string{"192.0.2.13:2379"}},
		{"one without a scheme", nil, []string{"[2001:db8::13]:2379"}, nil, []string{"[2001:db8::13]:2379"}},
		{"one on this host", nil, []string{"https://192.0.2.12:2379"}, nil, []string{"0.0.0.0:2379", "192.0.2.12:2379"}},
		{"one on loopback", nil, []string{"http://127.0.0.1:2379"}, nil, []string{"0.0.0.0:2379", "127.0.0.1:2379"}},
		{"ours", []string{"0.0.0.0:2379", "127.0.0.1:40000"}, nil, nil, []string{"0.0.0.0:2379", "127.0.0.1:40000"}},
		{"members", nil, []string{"http://192.0.2.13:2379"}, [][]string{
			{"http://192.0.2.13:2379", "http://[2001:db8::13]:2379", "http://127.0.0.1:0"},
			{"http://localhost:2379", "http://192.0.2.14:2380"},
			{"http://0.0.0.0:2379", "unix://sock", "nonsense"},
		}, []string{"192.0.2.13:2379", "192.0.2.14:2379", "192.0.2.14:2380", "[2001:db8::13]:2379"}},
	} {
		d := &storeDoors{hasAddr: hasAddr, ours: tt.ours, given: tt.given, members: tt.members}
		var got []string
		for _, a := range d.addrs(t.Context()) {
			got = append(got, a.String())
		}
		if slices.Sort(got); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestStoreDoors_StayWhenANameIsNotFound(t *testing.T) {
	d := &storeDoors{given: []string{"http://nobody.invalid:2379"}, found: map[string][]netip.Addr{"nobody.invalid": {netip.MustParseAddr("192.0.2.13")}},
		hasAddr: func(netip.Addr) (bool, error) { return false, nil }}
	if got := d.addrs(t.Context()); len(got) != 1 || got[0].String() != "192.0.2.13:2379" {
		t.Errorf("%v", got)
	}
}
