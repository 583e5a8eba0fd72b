// Tests of what a store does to a node into which somebody has written what he liked.

package node

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// A hundred thousand leases, most of which cannot be: those that can are routed to, the others are shown with their problem, memory stays within
// bounds, and so does the log.
func TestNode_LivesWithAFloodOfLeases(t *testing.T) {
	w, c, logged := newWorld(), testConfig(t), &bytes.Buffer{}
	c.Log = slog.New(slog.NewTextHandler(logged, nil))
	n := readyNode(t, w, c, "10.5.1.0/24")
	n.setLeases(nil)
	const flood = 100_000
	leases := make([]lease.Lease, 0, flood+1)
	for i := range flood {
		subnet := fmt.Sprintf("10.%d.%d.%d/30", 128+i>>14, i>>6&255, i&63*4) // outside the network
		if i%2 == 0 {
			subnet = fmt.Sprintf("10.5.%d.%d/%d", 4+i%4, i%256, 24+i%8) // one in another
		}
		leases = append(leases, lease.Lease{
			Subnet: netip.MustParsePrefix(subnet), ModRevision: int64(i + 10),
			Attrs: lease.Attrs{PublicIP: netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), RootlessOvl: &lease.Extension{V: 1, NodeID: fmt.Sprintf("n%d", i), Port: 8285}},
		})
	}
	good := leaseOf("10.5.2.0/24", "b")
	good.Attrs.RootlessOvl.Port, good.ModRevision = 8285, 5
	leases = append(leases, good)

	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	n.setLeases(leases)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 256<<20 {
		t.Errorf("%d leases take %d MB", flood, grown>>20)
	}
	n.mu.Lock()
	peers := n.peers
	n.mu.Unlock()
	usable, told := 0, 0
	for _, p := range peers {
		switch {
		case p.problem != "":
			told++
		case p.lease.Subnet == good.Subnet:
			usable++
		}
	}
	if usable != 1 || told < flood/2 || len(peers) != len(leases) {
		t.Errorf("%d of %d peers: the good one %d times, %d with a problem", len(peers), len(leases), usable, told)
	}
	if lines := strings.Count(logged.String(), "\n"); lines > 4*sameLines {
		t.Errorf("%d lines of log", lines)
	}
	n.setLeases(nil)
	if lines := strings.Count(logged.String(), "\n"); lines > 8*sameLines {
		t.Errorf("%d lines of log when they have gone", lines)
	}
}

// What one lease can say that is bad: nothing is sent there, and the problem says why.
func TestPeersOf_RefusesHostileValues(t *testing.T) {
	me := testSelf()
	for name, l := range map[string]lease.Lease{
		"everything":         ovlLease("0.0.0.0/0", "192.0.2.66", "x", 8285, 1472),
		"half of everything": ovlLease("0.0.0.0/1", "192.0.2.66", "x", 8285, 1472),
		"the network":        ovlLease(me.network.String(), "192.0.2.66", "x", 8285, 1472),
		"our own subnet":     ovlLease(me.subnet.String(), "192.0.2.66", "x", 8285, 1472),
		"a part of our own":  ovlLease(netip.PrefixFrom(me.subnet.Addr(), 30).String(), "192.0.2.66", "x", 8285, 1472),
		"loopback":           ovlLease("10.5.9.0/24", "127.0.0.1", "x", 8285, 1472),
		"multicast":          ovlLease("10.5.9.0/24", "224.0.0.1", "x", 8285, 1472),
		"broadcast":          ovlLease("10.5.9.0/24", "255.255.255.255", "x", 8285, 1472),
		"this network":       ovlLease("10.5.9.0/24", "0.0.0.1", "x", 8285, 1472),
		"link-local":         ovlLease("10.5.9.0/24", "169.254.169.254", "x", 8285, 1472),
		"ourselves":          ovlLease("10.5.9.0/24", me.public.Addr().String(), "x", int(me.public.Port()), 1472),
	} {
		t.Run(name, func(t *testing.T) {
			peers := peersOf([]lease.Lease{l}, me)
			if len(peers) != 1 || peers[0].problem == "" || peers[0].addr.IsValid() || len(peers[0].ways()) != 0 {
				t.Errorf("%+v", peers)
			}
		})
	}
}

func TestSparing_LeavesOutAFloodAndSaysSo(t *testing.T) {
	var out bytes.Buffer
	h := spare(slog.New(slog.NewTextHandler(&out, nil))).With("node", "a").Handler()
	at := time.Unix(1000, 0)
	say := func(message string, after time.Duration) {
		r := slog.NewRecord(at.Add(after), slog.LevelWarn, message, 0)
		if err := h.Handle(context.Background(), r); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 * sameLines {
		say("flood", 0)
	}
	say("other", 0)
	if n := strings.Count(out.String(), "\n"); n != sameLines+2 || !strings.Contains(out.String(), "left out") || !strings.Contains(out.String(), "other") {
		t.Errorf("%d lines", n)
	}
	out.Reset()
	say("flood", sameFor)
	if want := fmt.Sprintf("left_out_before=%d", 9*sameLines); !strings.Contains(out.String(), want) {
		t.Errorf("%q does not say %s", out.String(), want)
	}
}
