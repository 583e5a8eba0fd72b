// Tests of the grace that vanished leases have.

package node

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

func TestLingering_KeepsVanishedLeasesForTheGrace(t *testing.T) {
	of := func(subnet, node string) lease.Lease {
		l := lease.Lease{Subnet: netip.MustParsePrefix(subnet)}
		if node != "" {
			l.Attrs.RootlessOvl = &lease.Extension{NodeID: node, Port: 18285}
			l.Attrs.PublicIP = netip.AddrFrom4([4]byte{192, 0, 2, node[0]})
		}
		return l
	}
	of6 := func(subnet, subnet6 string) lease.Lease {
		l := of(subnet, "")
		l.Subnet6 = netip.MustParsePrefix(subnet6)
		return l
	}
	a, b, stock := of("10.5.1.0/24", "a"), of("10.5.2.0/24", "b"), of6("10.5.3.0/24", "fd00:5:0:3::/64")
	leaving := of("10.5.2.0/24", "b")
	leaving.Attrs.RootlessOvl.Left = true
	at := func(subnet, node string, like lease.Lease) lease.Lease {
		l := of(subnet, node)
		l.Attrs.PublicIP = like.Attrs.PublicIP
		return l
	}
	for name, c := range map[string]struct {
		then  []lease.Lease // what the store has after it had a, b and stock
		wait  time.Duration
		want  []lease.Lease
		timed bool // whether a change is still to come
		left  []lease.Lease
	}{
		"nothing vanished":                 {[]lease.Lease{a, b, stock}, 0, []lease.Lease{a, b, stock}, false, nil},
		"one vanished":                     {[]lease.Lease{a, stock}, 0, []lease.Lease{a, b, stock}, true, nil},
		"all vanished":                     {nil, peerGrace - 1, []lease.Lease{a, b, stock}, true, nil},
		"the grace is over":                {[]lease.Lease{a}, peerGrace, []lease.Lease{a}, false, nil},
		"another node has the subnet":      {[]lease.Lease{a, of("10.5.2.0/24", "c")}, 0, []lease.Lease{a, of("10.5.2.0/24", "c"), stock}, true, nil},
		"another subnet overlaps":          {[]lease.Lease{a, of("10.5.2.0/23", "c")}, 0, []lease.Lease{a, of("10.5.2.0/23", "c")}, false, nil},
		"another node has its IPv6 subnet": {[]lease.Lease{a, b, of6("10.5.7.0/24", "fd00:5:0:3::/64")}, 0, []lease.Lease{a, b, of6("10.5.7.0/24", "fd00:5:0:3::/64")}, false, nil},
		"one has left":                     {[]lease.Lease{a, stock}, 0, []lease.Lease{a, stock}, false, []lease.Lease{b}},
		"one says that it leaves":          {[]lease.Lease{a, leaving, stock}, 0, []lease.Lease{a, stock}, false, nil},
		"another receives where it did":    {[]lease.Lease{a, stock, at("10.5.8.0/24", "d", b)}, 0, []lease.Lease{a, stock, at("10.5.8.0/24", "d", b)}, false, nil},
		"the node has moved":               {[]lease.Lease{a, stock, of("10.5.9.0/24", "b")}, 0, []lease.Lease{a, stock, of("10.5.9.0/24", "b")}, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Unix(1000, 0)
			var g lingering
			g.take(start, []lease.Lease{a, b, stock}, nil)
			g.take(start, c.then, c.left)
			got, next := g.leases(start.Add(c.wait))
			same := func(x, y lease.Lease) bool {
				return x.Subnet == y.Subnet && (x.Attrs.RootlessOvl == nil) == (y.Attrs.RootlessOvl == nil) &&
					(x.Attrs.RootlessOvl == nil || x.Attrs.RootlessOvl.NodeID == y.Attrs.RootlessOvl.NodeID)
			}
			if !slices.EqualFunc(got, c.want, same) || next.IsZero() == c.timed {
				t.Errorf("got %v, next change %v; want %v", got, next, c.want)
			}
		})
	}
}

func TestLingering_ALeaseThatComesBackIsStoredAgain(t *testing.T) {
	start := time.Unix(1000, 0)
	l := lease.Lease{Subnet: netip.MustParsePrefix("10.5.1.0/24"), ModRevision: 1}
	again := l
	again.ModRevision = 2
	var g lingering
	g.take(start, []lease.Lease{l}, nil)
	if gone := g.take(start, nil, nil); len(gone) != 1 {
		t.Errorf("vanished: %v", gone)
	}
	if gone := g.take(start.Add(time.Second), nil, nil); len(gone) != 0 {
		t.Errorf("vanished again: %v", gone)
	}
	g.take(start.Add(time.Second), []lease.Lease{again}, nil)
	got, next := g.leases(start.Add(time.Second))
	if len(got) != 1 || got[0].ModRevision != 2 || !next.IsZero() {
		t.Errorf("got %v, next change %v", got, next)
	}
}
