// Tests of giving out addresses.

package node

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
)

func testPool(subnet string) *pool {
	p := newPool()
	p.subnet = netip.MustParsePrefix(subnet)
	return p
}

func TestPool_RefusesAddressesThatAreNotForAttachments(t *testing.T) {
	for _, tc := range []struct {
		name, addr string
		want       error
	}{
		{"network", "10.5.72.0", ErrAddrInvalid},
		{"gateway", "10.5.72.1", ErrAddrInvalid},
		{"broadcast", "10.5.72.255", ErrAddrInvalid},
		{"another subnet", "10.5.73.5", ErrAddrInvalid},
		{"IPv6", "fd00::5", ErrAddrInvalid},
		{"taken", "10.5.72.9", ErrAddrInUse},
		{"free", "10.5.72.10", nil},
		{"last usable", "10.5.72.254", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := testPool("10.5.72.0/24")
			if err := p.take(netip.MustParseAddr("10.5.72.9"), "web"); err != nil {
				t.Fatal(err)
			}
			if err := p.take(netip.MustParseAddr(tc.addr), "db"); !errors.Is(err, tc.want) {
				t.Errorf("take(%s) = %v, want %v", tc.addr, err, tc.want)
			}
		})
	}
}

func TestPool_CountsWhatIsLeft(t *testing.T) {
	p := testPool("10.5.72.64/28")
	for _, a := range []string{"10.5.72.64", "10.5.72.70", "10.5.9.9"} { // the gateway of an engine, ours, one of an earlier subnet
		if err := p.keep(netip.MustParseAddr(a), a); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []string{"10.5.72.70", "10.5.72.71", "10.5.9.8"} { // in use too, not in use, of an earlier subnet
		p.reserved[netip.MustParseAddr(a)] = savedAddress{}
	}
	if left := p.left(); left != 11 {
		t.Errorf("%d are left of 13 less two", left)
	}
	if left := newPool().left(); left != 0 {
		t.Errorf("%d are left without a subnet", left)
	}
}

func TestPool_GivesEveryAddressOnceThenSaysNoneLeft(t *testing.T) {
	for _, tc := range []struct {
		subnet string
		want   int
	}{{"10.5.72.0/24", 253}, {"10.5.72.64/28", 13}, {"10.5.72.64/30", 1}} {
		t.Run(tc.subnet, func(t *testing.T) {
			p := testPool(tc.subnet)
			seen := make(map[netip.Addr]bool)
			for i := range tc.want {
				if left := p.left(); left != tc.want-i {
					t.Errorf("%d addresses are left after %d of %d", left, i, tc.want)
				}
				a, err := p.any(fmt.Sprint(i))
				if err != nil {
					t.Fatalf("address %d: %v", i, err)
				}
				if seen[a] || !p.subnet.Contains(a) || a == gatewayAddr(p.subnet) || a == networkAddr(p.subnet) || a == broadcastAddr(p.subnet) {
					t.Fatalf("address %d is %v", i, a)
				}
				seen[a] = true
			}
			if a, err := p.any("one more"); !errors.Is(err, ErrNoAddrsLeft) {
				t.Errorf("one more: %v, %v", a, err)
			}
		})
	}
}

func TestPool_FreedAddressComesRoundLast(t *testing.T) {
	p := testPool("10.5.72.64/28")
	first, _ := p.any("a")
	p.free(first)
	for i := range p.size() - 1 {
		if a, err := p.any(fmt.Sprint(i)); err != nil || a == first {
			t.Fatalf("%d: got %v, %v before every other address was used", i, a, err)
		}
	}
	if a, err := p.any("z"); err != nil || a != first {
		t.Errorf("got %v, %v, want %v", a, err, first)
	}
}

func TestPool_StartsAtTheFirstAddressWhenLastIsOfAnotherSubnet(t *testing.T) {
	p := testPool("10.5.72.0/24")
	p.last = netip.MustParseAddr("10.9.9.9")
	if a, err := p.any("a"); err != nil || a != netip.MustParseAddr("10.5.72.2") {
		t.Errorf("got %v, %v", a, err)
	}
}

func TestPool_KeepsAddressesOfAnEarlierSubnetApart(t *testing.T) {
	p := testPool("10.5.72.0/24")
	old := netip.MustParseAddr("10.5.9.4")
	if err := p.keep(old, "web"); err != nil {
		t.Fatal(err)
	}
	if err := p.keep(old, "db"); !errors.Is(err, ErrAddrInUse) {
		t.Errorf("second keep: %v", err)
	}
}

func TestPool_SaysThatNoSubnetIsHeld(t *testing.T) {
	p := newPool()
	if _, err := p.any("a"); !errors.Is(err, errNoSubnetHeld) {
		t.Errorf("any: %v", err)
	}
	if err := p.take(netip.MustParseAddr("10.5.72.9"), "a"); !errors.Is(err, errNoSubnetHeld) {
		t.Errorf("take: %v", err)
	}
}
