// This file compares subnet.env: flannel's WriteSubnetFile against ours, byte for byte.

package leases

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/flannel-io/flannel/pkg/subnet"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

func TestSubnetEnv_IsWrittenByteForByte(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 6))
	dir := t.TempDir()
	theirs, ours := filepath.Join(dir, "theirs", "subnet.env"), filepath.Join(dir, "ours", "subnet.env")
	for range 500 {
		v4, v6 := randomSubnets(r)
		e := lease.SubnetEnv{
			Network: wider(v4, r), Subnet: v4, IPv6Network: wider(v6, r), IPv6Subnet: v6, MTU: r.IntN(65536), IPMasq: r.IntN(2) == 0,
		}
		config := &subnet.Config{EnableIPv4: true, EnableIPv6: v6.IsValid(), Network: net4(e.Network), IPv6Network: net6(e.IPv6Network)}
		if err := subnet.WriteSubnetFile(theirs, config, e.IPMasq, net4(v4), net6(v6), e.MTU); err != nil {
			t.Fatal(err)
		}
		if err := lease.WriteSubnetEnv(ours, e); err != nil {
			t.Fatal(err)
		}
		want, err1 := os.ReadFile(theirs)
		got, err2 := os.ReadFile(ours)
		if err1 != nil || err2 != nil || !bytes.Equal(got, want) {
			t.Fatalf("flannel's, %v:\n%s\nours, %v:\n%s", err1, want, err2, got)
		}
		if read, err := lease.ReadSubnetEnv(theirs); err != nil || read != e {
			t.Fatalf("%s\nwas read as %+v, %v; want %+v", want, read, err, e)
		}
	}
	for _, at := range []string{"subnet.env", "."} {
		want, err1 := os.Stat(filepath.Join(dir, "theirs", at))
		got, err2 := os.Stat(filepath.Join(dir, "ours", at))
		if err1 != nil || err2 != nil || got.Mode() != want.Mode() {
			t.Errorf("%s: flannel's mode %v, %v; ours %v, %v", at, want.Mode(), err1, got.Mode(), err2)
		}
	}
}

// wider is a network that contains the subnet.
func wider(p netip.Prefix, r *rand.Rand) netip.Prefix {
	if !p.IsValid() {
		return p
	}
	return netip.PrefixFrom(p.Addr(), 1+r.IntN(p.Bits())).Masked()
}
