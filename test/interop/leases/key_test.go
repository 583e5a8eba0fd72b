// This file compares the keys of leases: flannel's ParseSubnetKey and MakeSubnetKey against ours.

package leases

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/subnet"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// net4 and net6 are a prefix as flannel holds it; no prefix is flannel's empty one.
func net4(p netip.Prefix) ip.IP4Net {
	if !p.IsValid() {
		return ip.IP4Net{}
	}
	return ip.IP4Net{IP: ip.FromIP(net.IP(p.Addr().AsSlice())), PrefixLen: uint(p.Bits())}
}

func net6(p netip.Prefix) ip.IP6Net {
	if !p.IsValid() {
		return ip.IP6Net{}
	}
	return ip.IP6Net{IP: ip.FromIP6(net.IP(p.Addr().AsSlice())), PrefixLen: uint(p.Bits())}
}

// randomSubnets is a pair of subnets; the second may be none.
func randomSubnets(r *rand.Rand) (v4, v6 netip.Prefix) {
	var b [16]byte
	for i := range b {
		if r.IntN(3) > 0 { // runs of zeros, for the short forms
			b[i] = byte(r.Uint32())
		}
	}
	v4 = netip.PrefixFrom(netip.AddrFrom4([4]byte(b[:4])), 1+r.IntN(31)).Masked()
	if r.IntN(2) == 0 {
		b[0] |= 0x20 // flannel writes the addresses of ::/64 as IPv4
		v6 = netip.PrefixFrom(netip.AddrFrom16(b), 4+r.IntN(124)).Masked()
	}
	return v4, v6
}

func TestKey_IsWrittenAsFlannelWritesIt(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 10000 {
		v4, v6 := randomSubnets(r)
		if ours, theirs := lease.Key(v4, v6), subnet.MakeSubnetKey(net4(v4), net6(v6)); ours != theirs {
			t.Fatalf("%v and %v: ours %q, flannel's %q", v4, v6, ours, theirs)
		}
	}
}

// compareKey fails the test where only one of the two takes a key for a lease, or they read different subnets.
func compareKey(t *testing.T, key string) (accepted bool) {
	t.Helper()
	theirs4, theirs6 := subnet.ParseSubnetKey(key)
	v4, v6, err := lease.ParseKey(key)
	if (theirs4 != nil) != (err == nil) {
		t.Fatalf("%q: flannel reads %v, ours %v, %v", key, theirs4, v4, err)
	}
	if err != nil {
		return false
	}
	// flannel keeps bits beyond the length, and nobody leases such a subnet.
	if got := prefix4(*theirs4).Masked(); got != v4 {
		t.Fatalf("%q: flannel reads %v, ours %v", key, got, v4)
	}
	if (theirs6 != nil) != v6.IsValid() || theirs6 != nil && prefix6(*theirs6).Masked() != v6 {
		t.Fatalf("%q: flannel reads IPv6 %v, ours %v", key, theirs6, v6)
	}
	return true
}

func TestKey_IsReadAsFlannelReadsIt(t *testing.T) {
	for key, want := range map[string]bool{
		"10.5.34.0-24": true, "/coreos.com/network/subnets/10.5.34.0-24": true, "/x/subnetsold/10.5.34.0-24": true,
		"10.5.34.0-24&fd00:0:0:12::-64": true, "10.5.34.7-24": true, "0.0.0.0-0": true, "10.5.34.0-024": true,
		"10.5.34.0-31": true, "10.5.34.0-32": false, "10.5.34.0-": false, "10.5.34.0": false, "": false, "10.5.34.0-24/": false,
		"10.5.34.0-24&fd00::-127": true, "10.5.34.0-24&fd00::-128": false, "10.5.34.0-24&fd00::": false, "10.5.34.0-24&-64": false,
		"10.5.34.0-24&fd00:::-64": false, "10.5.34.0-24&FD00::-64": false, "10.5.34.0-24&10.6.0.0-16": true, "fd00::-64": false,
		"010.5.34.0-24": false, "256.5.34.0-24": false, "10.5.34-24": false, "10x5x34x0-24": false, "10.5x34x0-24": false,
		"1.10.5.34.0-24": true, "10.5.34.0-99999999999999999999": false, "reservation of 10.5.34.0-24": true,
	} {
		if got := compareKey(t, key); got != want {
			t.Errorf("%q is taken for a lease: %t, want %t", key, got, want)
		}
	}
	// Keys with a few letters changed, left out or doubled.
	const letters = "0123456789.:-&/af xF"
	r := rand.New(rand.NewPCG(2, 2))
	accepted := 0
	const count = 20000
	for range count {
		v4, v6 := randomSubnets(r)
		key := []byte(lease.Key(v4, v6))
		for range r.IntN(3) {
			switch at := r.IntN(len(key)); r.IntN(3) {
			case 0:
				key[at] = letters[r.IntN(len(letters))]
			case 1:
				key = append(key[:at], key[at+1:]...)
			default:
				key = append(key[:at+1], key[at:]...)
			}
		}
		if compareKey(t, "/coreos.com/network/subnets/"+string(key)) {
			accepted++
		}
	}
	if accepted < count/10 || accepted > count*9/10 {
		t.Errorf("%d of %d keys accepted: the generator leans to one side", accepted, count)
	}
}

func TestKey_OfNoSensibleLengthIsRefusedUnread(t *testing.T) {
	key := strings.Repeat("x", 5000) + "10.5.34.0-24"
	if theirs, _ := subnet.ParseSubnetKey(key); theirs == nil {
		t.Error("flannel refuses it too: no difference any more")
	}
	if _, _, err := lease.ParseKey(key); err == nil {
		t.Error("we read it")
	}
}
