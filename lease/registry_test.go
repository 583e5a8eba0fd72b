// This file tests where a Registry keeps its keys.

package lease_test

import (
	"path"
	"slices"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

func TestRegistry_KeysAreFlannelsToTheByte(t *testing.T) {
	for prefix, clean := range map[string]string{
		"/coreos.com/network":   "/coreos.com/network",
		"/coreos.com/network/":  "/coreos.com/network",
		"coreos.com/nn":         "coreos.com/nn",
		"/":                     "",
		"//x//y/":               "/x/y",
		"x/../y":                "y",
		"/coreos.com/./network": "/coreos.com/network",
	} {
		s := leasetest.NewStore()
		r := lease.NewRegistry(s, prefix, nil)
		if created, err := r.CreateConfig(t.Context(), []byte(`{"Network":"10.5.0.0/16"}`)); err != nil || !created {
			t.Fatal(created, err)
		}
		h, err := r.Acquire(t.Context(), testNetwork(t), testRequest("node-1", "192.168.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		pairs, _, err := s.Get(t.Context(), "", true)
		if err != nil {
			t.Fatal(err)
		}
		var keys []string
		for _, p := range pairs {
			keys = append(keys, p.Key)
		}
		// flannel: path.Join(Prefix, "config"), path.Join(Prefix, "subnets", MakeSubnetKey(sn, sn6))
		last := lease.Key(h.Lease().Subnet, h.Lease().Subnet6)
		want := []string{path.Join(prefix, "config"), path.Join(prefix, "subnets", last)}
		if !slices.Equal(keys, want) || want[0] != clean+"/config" || lease.ConfigKey(prefix) != want[0] {
			t.Errorf("%q: keys %q, want %q", prefix, keys, want)
		}
		if found, err := r.Leases(t.Context()); err != nil || len(found.Leases) != 1 {
			t.Errorf("%q: it does not find its own lease: %+v, %v", prefix, found, err)
		}
	}
}
