// This file is the suite: what a lease.Store must do, and what a Registry must do on any store.

package leasetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// Lab is a store under test and the ways to trouble it.
type Lab struct {
	// Dial makes another client of the one store; the lab closes it when the test ends.
	Dial func(t *testing.T) lease.Store
	// Stop takes the store away, Start brings it back with the data it had.
	Stop, Start func(t *testing.T)
	// Compact forgets the history up to now.
	Compact func(t *testing.T)
	// Wipe makes a store that was taken away forget everything. Save copies the data of one that was; what it returns puts them back,
	// likewise while the store is away.
	Wipe func(t *testing.T)
	Save func(t *testing.T) (restore func(t *testing.T))
}

// Run runs the suite. open makes a fresh, empty store for the test that it is given, and is called several times.
func Run(t *testing.T, open func(t *testing.T) Lab) {
	// These share a store, each under a prefix of its own.
	shared := open(t)
	for name, test := range map[string]func(*testing.T, *room){
		"Store_CommitsUnderGuards":                testGuards,
		"Store_EndsLeases":                        testLeases,
		"Store_WatchReplaysAndFollows":            testStoreWatch,
		"Registry_ConfigLifeCycle":                testConfig,
		"Acquire_IsLikeFlannels":                  testAcquireFresh,
		"Acquire_FindsOwnLeaseByNodeID":           testAcquireAgain,
		"Acquire_ChoosesAmongItsOwn":              testOwnSeveral,
		"Acquire_TakesPreviousIfFree":             testPrevious,
		"Acquire_RefusesForeignLease":             testForeign,
		"Acquire_KeepsReservation":                testReservation,
		"Acquire_LeavesReservationsOfOthers":      testReservationOfAnother,
		"Acquire_SaysExhausted":                   testExhausted,
		"Acquire_LeavesIncompatibleSubnet":        testIncompatible,
		"Acquire_SkipsGarbage":                    testGarbage,
		"Acquire_TwoAtOnceNeverShare":             testTwoAtOnce,
		"Acquire_CrowdNeverShares":                testCrowd,
		"Held_PutsDeletedKeyBack":                 testKeyDeleted,
		"Held_ReplacesRevokedEtcdLease":           testEtcdLeaseRevoked,
		"Held_EndsWhenTaken":                      testTaken,
		"Held_ResistsGarbage":                     testOverwrittenWithGarbage,
		"Held_TellsACopyOfItself":                 testDuplicateNode,
		"Held_EndsWhenStartedAgain":               testRunsTwice,
		"Held_BecomesReservation":                 testBecomesReservation,
		"Held_Updates":                            testUpdate,
		"Held_UpdateRefusesForeignAddress":        testUpdateForeign,
		"Held_GivesBack":                          testRevoke,
		"Held_KeepsShortLeaseAlive":               testEphemeralLives,
		"Watch_HandsOverFullSnapshots":            testWatch,
		"Acquire_DualStackNeverSharesEitherHalf":  testDualStack,
		"Acquire_LosesRaceAgainstEqualIPv4Subnet": testDualStackRival,
		"Names_AreSeenEverywhere":                 testNames,
		"Names_AreNeverStolen":                    testNamesTaken,
		"Names_AreClaimedByOneOfMany":             testNamesRace,
		"Names_ArePutBack":                        testNamesPutBack,
		"Names_WaitUntilTheyAreFree":              testNamesFreed,
		"Names_GoWithTheirNode":                   testNamesGo,
		"Names_OutliveARestart":                   testNamesRestart,
		"Store_WatchDoesNotWaitForTheFuture":      testStoreWatchFuture,
		"Registry_KeepsTheConfig":                 testKeepConfig,
		"Watch_TellsWhoHasLeft":                   testWatchLeft,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, newRoom(t, shared, strings.ToLower("/suite/"+name)))
		})
	}
	// These take the store away, or its history, so each has its own.
	for name, test := range map[string]func(*testing.T, *room){
		"Outage_LeaseIsHeldAfterwards":           testOutage,
		"Outage_UpdateLeavesWhatThereIs":         testUpdateWhileAway,
		"Outage_CompactionListsAgain":            testCompactedWhileAway,
		"Outage_RequestsFailNamed":               testRequestsWhileAway,
		"Outage_OnlyWatchTellsOnceEachWay":       testWatchOutage,
		"Watch_SurvivesCompactionWhileConnected": testWatchCompactedLive,
		"Outage_NamesArePublishedAfterwards":     testNamesOutage,
		"Outage_ComesBackEmpty":                  testComesBackEmpty,
		"Outage_ComesBackFromABackup":            testComesBackFromABackup,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, newRoom(t, open(t), lease.DefaultPrefix))
		})
	}
}

// room is one test's share of a lab.
type room struct {
	Lab
	prefix string
	store  lease.Store
	ctx    context.Context
}

func newRoom(t *testing.T, lab Lab, prefix string) *room {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return &room{lab, prefix, lab.Dial(t), ctx}
}

// network is small on purpose: 14 subnets to lease.
const network = `{"Network":"10.5.0.0/20","SubnetLen":24}`

func (r *room) config(t *testing.T, raw string) lease.NetworkConfig {
	t.Helper()
	c, err := lease.ParseConfig([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// node is one node's registry with its log.
type node struct {
	*lease.Registry
	store lease.Store
	log   *logBuffer
}

func (r *room) node(t *testing.T) *node {
	t.Helper()
	n := &node{store: r.Dial(t), log: &logBuffer{}}
	n.Registry = lease.NewRegistry(n.store, r.prefix, slog.New(slog.NewTextHandler(n.log, nil)))
	return n
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// request is node i's, on an address of its own.
func request(i int) lease.Request {
	return lease.Request{
		NodeID: fmt.Sprintf("node-%d", i),
		Attrs: lease.Attrs{
			PublicIP:    netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)}),
			RootlessOvl: &lease.Extension{Port: 18285, MTU: 1472},
		},
		TTL: time.Hour,
	}
}

func (r *room) acquire(t *testing.T, n *node, cfg lease.NetworkConfig, q lease.Request) *lease.Held {
	t.Helper()
	h, err := n.Acquire(r.ctx, cfg, q)
	if err != nil {
		t.Fatalf("Acquire: %v", err)
	}
	return h
}

// run keeps h in the background until the test ends; the channel has Run's result.
func (r *room) run(t *testing.T, h *lease.Held) <-chan error {
	ctx, cancel := context.WithCancel(r.ctx)
	result := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		result <- h.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return result
}

func (r *room) key(p netip.Prefix) string {
	return r.prefix + "/subnets/" + lease.Key(p, netip.Prefix{})
}

// put writes by hand, as an operator with etcdctl does.
func (r *room) put(t *testing.T, key, value string, ttl time.Duration) {
	t.Helper()
	var id lease.LeaseID
	if ttl > 0 {
		var err error
		if id, err = r.store.Grant(r.ctx, ttl); err != nil {
			t.Fatal(err)
		}
	}
	if ok, _, err := r.store.Commit(r.ctx, lease.Txn{Key: key, Value: []byte(value), Lease: id}); err != nil || !ok {
		t.Fatalf("putting %s: %t %v", key, ok, err)
	}
}

func (r *room) delete(t *testing.T, key string) {
	t.Helper()
	if ok, _, err := r.store.Commit(r.ctx, lease.Txn{Key: key, Delete: true}); err != nil || !ok {
		t.Fatalf("deleting %s: %t %v", key, ok, err)
	}
}

// get is the pair at key, or nil.
func (r *room) get(t *testing.T, key string) *lease.Pair {
	t.Helper()
	pairs, _, err := r.store.Get(r.ctx, key, false)
	if err != nil {
		t.Fatal(err)
	}
	if len(pairs) == 0 {
		return nil
	}
	return &pairs[0]
}

// eventually waits until ok, for as long as the room's context allows.
func (r *room) eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for !ok() {
		select {
		case <-r.ctx.Done():
			t.Fatalf("never: %s", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func testGuards(t *testing.T, r *room) {
	a, b := r.prefix+"/a", r.prefix+"/b"
	commit := func(x lease.Txn, want bool) int64 {
		t.Helper()
		ok, rev, err := r.store.Commit(r.ctx, x)
		if err != nil || ok != want {
			t.Fatalf("Commit(%+v) = %t, %v; want %t", x, ok, err, want)
		}
		return rev
	}
	absent := []lease.Guard{{Key: a}}
	first := commit(lease.Txn{If: absent, Key: a, Value: []byte("1")}, true)
	commit(lease.Txn{If: absent, Key: a, Value: []byte("2")}, false)
	second := commit(lease.Txn{If: []lease.Guard{{Key: a, ModRevision: first}}, Key: a, Value: []byte("3")}, true)
	commit(lease.Txn{If: []lease.Guard{{Key: a, ModRevision: first}}, Key: a, Value: []byte("4")}, false)

	// A prefix guard speaks for every key in range, and for none of them as for an absent one.
	none := lease.Guard{Key: r.prefix + "/none", Prefix: true}
	all := lease.Guard{Key: r.prefix, Prefix: true, AtMost: true, ModRevision: second}
	third := commit(lease.Txn{If: []lease.Guard{none, all}, Key: b, Value: []byte("5")}, true)
	commit(lease.Txn{If: []lease.Guard{all}, Key: b, Value: []byte("6")}, false)
	commit(lease.Txn{If: []lease.Guard{{Key: r.prefix, Prefix: true}}, Key: b, Value: []byte("7")}, false)
	commit(lease.Txn{If: []lease.Guard{{Key: r.prefix + "/none", Prefix: true, AtMost: true, ModRevision: third}}, Key: b, Value: []byte("8")}, true)

	pairs, rev, err := r.store.Get(r.ctx, r.prefix, true)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, p := range pairs {
		got[p.Key] = string(p.Value)
	}
	if diff := cmp.Diff(map[string]string{a: "3", b: "8"}, got); diff != "" {
		t.Errorf("after the transactions (-want +got):\n%s", diff)
	}
	if len(pairs) == 2 && (pairs[0].Key != a || pairs[0].ModRevision != second || rev < pairs[1].ModRevision) {
		t.Errorf("order or revisions: %+v at %d", pairs, rev)
	}
	commit(lease.Txn{Key: a, Delete: true}, true)
	if p := r.get(t, a); p != nil {
		t.Errorf("deleted, yet there: %+v", p)
	}
}

func testLeases(t *testing.T, r *room) {
	long, err := r.store.Grant(r.ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	short, err := r.store.Grant(r.ctx, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	for key, id := range map[string]lease.LeaseID{"/long": long, "/short": short} {
		if _, _, err := r.store.Commit(r.ctx, lease.Txn{Key: r.prefix + key, Lease: id}); err != nil {
			t.Fatal(err)
		}
		if p := r.get(t, r.prefix+key); p == nil || p.Lease != id {
			t.Errorf("%s: %+v, want it on lease %x", key, p, id)
		}
	}
	if ttl, err := r.store.KeepAlive(r.ctx, long); err != nil || ttl != time.Hour {
		t.Errorf("KeepAlive = %v, %v; want 1h", ttl, err)
	}
	if err := r.store.Revoke(r.ctx, long); err != nil {
		t.Error(err)
	}
	if p := r.get(t, r.prefix+"/long"); p != nil {
		t.Errorf("its lease is revoked, yet there: %+v", p)
	}
	if err := r.store.Revoke(r.ctx, long); err != nil {
		t.Errorf("revoking what is gone: %v", err)
	}
	if _, err := r.store.KeepAlive(r.ctx, long); !errors.Is(err, lease.ErrLeaseExpired) {
		t.Errorf("KeepAlive of a revoked lease: %v", err)
	}
	if _, _, err := r.store.Commit(r.ctx, lease.Txn{Key: r.prefix + "/long", Lease: long}); !errors.Is(err, lease.ErrLeaseExpired) {
		t.Errorf("put on a revoked lease: %v", err)
	}
	r.eventually(t, "the short lease expires", func() bool { return r.get(t, r.prefix+"/short") == nil })
}

func testStoreWatch(t *testing.T, r *room) {
	a, ab := r.prefix+"/a", r.prefix+"/ab"
	_, first, err := r.store.Commit(r.ctx, lease.Txn{Key: a, Value: []byte("1")})
	if err != nil {
		t.Fatal(err)
	}
	r.put(t, a, "2", 0)
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	exact := r.store.Watch(ctx, a, false, first)
	prefix := r.store.Watch(ctx, a, true, first+1)
	r.put(t, ab, "3", 0)
	r.delete(t, a)

	read := func(ch <-chan lease.Events, n int) (got []string) {
		var last int64
		for len(got) < n {
			e, ok := <-ch
			if !ok || e.Err != nil {
				t.Fatalf("after %v: closed %t, %v", got, !ok, e.Err)
			}
			for _, c := range e.Changes {
				if c.ModRevision < last || c.ModRevision > e.Revision {
					t.Errorf("revision %d after %d in events at %d", c.ModRevision, last, e.Revision)
				}
				last = c.ModRevision
				s := strings.TrimPrefix(c.Key, r.prefix) + "=" + string(c.Value)
				if c.Deleted {
					s = "-" + s
				}
				got = append(got, s)
			}
		}
		return got
	}
	if diff := cmp.Diff([]string{"/a=1", "/a=2", "-/a="}, read(exact, 3)); diff != "" {
		t.Errorf("exact (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"/a=2", "/ab=3", "-/a="}, read(prefix, 3)); diff != "" {
		t.Errorf("prefix (-want +got):\n%s", diff)
	}
	cancel()
	for range exact { // closes
	}
	for range prefix {
	}
}

func testConfig(t *testing.T, r *room) {
	n := r.node(t)
	if _, err := n.Config(r.ctx); !errors.Is(err, lease.ErrNoConfig) || !strings.Contains(err.Error(), r.prefix+"/config") {
		t.Errorf("no config: %v", err)
	}
	r.put(t, r.prefix+"/config", "garbage", 0)
	if _, err := n.Config(r.ctx); !errors.Is(err, lease.ErrBadConfig) || !strings.Contains(err.Error(), r.prefix+"/config") {
		t.Errorf("garbage: %v", err)
	}
	r.delete(t, r.prefix+"/config")
	if _, err := n.CreateConfig(r.ctx, []byte(`{"Network":"10.5.0.0/31"}`)); !errors.Is(err, lease.ErrBadConfig) {
		t.Errorf("creating a bad config: %v", err)
	}
	if created, err := n.CreateConfig(r.ctx, []byte(network)); !created || err != nil {
		t.Errorf("CreateConfig: %t, %v", created, err)
	}
	if created, err := n.CreateConfig(r.ctx, lease.DefaultConfig(netip.MustParsePrefix("10.6.0.0/16"))); created || err != nil {
		t.Errorf("CreateConfig over a config: %t, %v", created, err)
	}
	if c, err := n.Config(r.ctx); err != nil || c.Network != netip.MustParsePrefix("10.5.0.0/20") {
		t.Errorf("Config = %v, %v", c.Network, err)
	}
	if err := n.PutConfig(r.ctx, []byte(`{}`)); !errors.Is(err, lease.ErrBadConfig) {
		t.Errorf("putting a bad config: %v", err)
	}
	if err := n.PutConfig(r.ctx, []byte(`{"Network":"10.7.0.0/16"}`)); err != nil {
		t.Error(err)
	}
	if c, err := n.Config(r.ctx); err != nil || c.Network != netip.MustParsePrefix("10.7.0.0/16") {
		t.Errorf("Config after PutConfig = %v, %v", c.Network, err)
	}
	if !n.Health().Connected {
		t.Error("a store that answers counts as away")
	}
}

func testAcquireFresh(t *testing.T, r *room) {
	h := r.acquire(t, r.node(t), r.config(t, network), request(1))
	l := h.Lease()
	if l.Subnet.Bits() != 24 || !netip.MustParsePrefix("10.5.0.0/20").Contains(l.Subnet.Addr()) || l.Subnet.Addr() == netip.MustParseAddr("10.5.0.0") {
		t.Errorf("subnet %v", l.Subnet)
	}
	p := r.get(t, r.key(l.Subnet))
	if p == nil {
		t.Fatalf("no key %s", r.key(l.Subnet))
	}
	want := `{"PublicIP":"192.168.0.1","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"node-1","Port":18285,"MTU":1472}}`
	if string(p.Value) != want {
		t.Errorf("value %s\nwant  %s", p.Value, want)
	}
	if p.Lease == 0 || l.Reservation || l.ModRevision != p.ModRevision {
		t.Errorf("pair %+v, lease %+v", p, l)
	}
	if ttl, err := r.store.KeepAlive(r.ctx, p.Lease); err != nil || ttl != time.Hour {
		t.Errorf("TTL %v, %v; want 1h", ttl, err)
	}
}

func testAcquireAgain(t *testing.T, r *room) {
	cfg := r.config(t, network)
	n := r.node(t)
	q := request(1)
	first := r.acquire(t, n, cfg, q).Lease()
	before := r.get(t, r.key(first.Subnet))

	if again := r.acquire(t, n, cfg, q).Lease(); again.Subnet != first.Subnet || again.ModRevision != first.ModRevision {
		t.Errorf("same node, nothing new: %+v, then %+v; want no write", first, again)
	}
	// The address changed: the subnet stays, and the old etcd lease is not left behind.
	q.Attrs.PublicIP = netip.MustParseAddr("172.16.0.9")
	again := r.acquire(t, n, cfg, q).Lease()
	if again.Subnet != first.Subnet || again.Attrs.PublicIP != q.Attrs.PublicIP {
		t.Errorf("same node, other address: %+v", again)
	}
	after := r.get(t, r.key(first.Subnet))
	if after.Lease == before.Lease || after.Lease == 0 {
		t.Errorf("etcd lease %x, then %x", before.Lease, after.Lease)
	}
	if _, err := r.store.KeepAlive(r.ctx, before.Lease); !errors.Is(err, lease.ErrLeaseExpired) {
		t.Errorf("the old etcd lease lives on: %v", err)
	}
}

// Several keys with our NodeID: a reservation goes before a lease, and what fits the config before what does not.
func testOwnSeveral(t *testing.T, r *room) {
	cfg := r.config(t, network)
	const own = `{"PublicIP":"10.1.1.1","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"node-1","Port":1,"MTU":0}}`
	r.put(t, r.key(netip.MustParsePrefix("10.5.2.0/25")), own, 0) // of another length
	r.put(t, r.key(netip.MustParsePrefix("10.5.3.0/24")), own, time.Hour)
	r.put(t, r.key(netip.MustParsePrefix("10.5.4.0/24")), own, 0)
	r.put(t, r.prefix+"/subnets-of-old/10.5.1.0-24", own, 0) // counts as occupied, and is no key of ours
	n := r.node(t)
	if l := r.acquire(t, n, cfg, request(1)).Lease(); l.Subnet.String() != "10.5.4.0/24" || !l.Reservation {
		t.Errorf("got %+v, want the reservation that fits", l)
	}
	r.delete(t, r.key(netip.MustParsePrefix("10.5.4.0/24")))
	if l := r.acquire(t, n, cfg, request(1)).Lease(); l.Subnet.String() != "10.5.3.0/24" || l.Reservation {
		t.Errorf("got %+v, want the lease", l)
	}
	r.delete(t, r.key(netip.MustParsePrefix("10.5.3.0/24")))
	q := request(1)
	q.Previous = netip.MustParsePrefix("10.5.1.0/24")
	l := r.acquire(t, n, cfg, q).Lease()
	if l.Reservation || l.Subnet.Bits() != 24 || l.Subnet == q.Previous || l.Subnet.String() == "10.5.2.0/24" {
		t.Errorf("got %+v, want a free subnet", l)
	}
	if r.get(t, r.key(netip.MustParsePrefix("10.5.2.0/25"))) == nil {
		t.Error("a reservation that does not fit was deleted")
	}
}

func testPrevious(t *testing.T, r *room) {
	cfg := r.config(t, network)
	n := r.node(t)
	for i, tc := range []struct {
		previous string
		keep     bool
	}{
		{"10.5.9.0/24", true},
		{"10.5.9.0/24", false},  // somebody has it now
		{"10.5.9.0/25", false},  // of another length
		{"10.5.0.0/24", false},  // below SubnetMin
		{"10.5.16.0/24", false}, // outside
	} {
		q := request(i + 1)
		q.Previous = netip.MustParsePrefix(tc.previous)
		if got := r.acquire(t, n, cfg, q).Lease().Subnet; (got == q.Previous) != tc.keep {
			t.Errorf("%d: previous %v, got %v; want it kept: %t", i, q.Previous, got, tc.keep)
		}
	}
}

func testForeign(t *testing.T, r *room) {
	cfg := r.config(t, network)
	n := r.node(t)
	r.put(t, r.key(netip.MustParsePrefix("10.5.3.0/24")), `{"PublicIP":"192.168.0.1","PublicIPv6":null}`, time.Hour)
	r.put(t, r.key(netip.MustParsePrefix("10.5.4.0/24")), `{"PublicIP":"192.168.0.2","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"other","Port":18285,"MTU":1472}}`, time.Hour)
	r.put(t, r.key(netip.MustParsePrefix("10.5.5.0/24")), `{"PublicIP":"192.168.0.3","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"stockport","Port":0,"MTU":1472}}`, time.Hour)
	r.put(t, r.key(netip.MustParsePrefix("10.5.6.0/24")), `{"PublicIP":"192.168.9.6","PublicIPv6":"2001:db8::6"}`, time.Hour)
	r.put(t, r.key(netip.MustParsePrefix("10.5.7.0/24")), `{"PublicIP":"192.168.9.7","PublicIPv6":"2001:db8::7","RootlessOvl":{"V":1,"NodeID":"six","Port":18285,"MTU":1472}}`, time.Hour)
	for name, tc := range map[string]struct {
		node, port int
		says       string // "" if it is to succeed
	}{
		"stock, IPv6 address alone": {6, 18285, ""}, // to flannel another node
		"ours, IPv6, same port":     {7, 18285, "node six at 2001:db8::7 port 18285 holds 10.5.7.0/24"},
		"ours, IPv6, other port":    {7, 18286, ""},

		"stock":                 {1, 18285, "flannel node at 192.168.0.1"},
		"stock, other port":     {1, 20000, "10.5.3.0/24"},
		"ours, same port":       {2, 18285, "node other at 192.168.0.2 port 18285"},
		"ours, other port":      {2, 18286, ""},
		"both on stock port":    {3, 8285, "stockport"},
		"not on stock port":     {3, 8286, ""},
		"an address unheard of": {4, 18285, ""},
	} {
		t.Run(name, func(t *testing.T) {
			q := request(tc.node)
			q.NodeID = fmt.Sprintf("me-%d-%d", tc.node, tc.port)
			q.Attrs.RootlessOvl.Port = tc.port
			q.Attrs.PublicIPv6 = netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", tc.node))
			h, err := n.Acquire(r.ctx, cfg, q)
			switch {
			case tc.says == "" && err != nil:
				t.Error(err)
			case tc.says != "" && (h != nil || !errors.Is(err, lease.ErrForeignLease) || !strings.Contains(err.Error(), tc.says)):
				t.Errorf("error %v; want ErrForeignLease with %q", err, tc.says)
			}
		})
	}
}

func testReservation(t *testing.T, r *room) {
	cfg := r.config(t, network)
	for name, tc := range map[string]struct {
		value, subnet string
	}{
		"by address, as flannel's documentation has it": {`{"PublicIP":"192.168.0.1"}`, "10.5.5.0/24"},
		"by NodeID": {`{"PublicIP":"10.1.1.1","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"node-1","Port":1,"MTU":0}}`, "10.5.6.0/24"},
	} {
		t.Run(name, func(t *testing.T) {
			key := r.key(netip.MustParsePrefix(tc.subnet))
			r.put(t, key, tc.value, 0)
			defer r.delete(t, key)
			n := r.node(t)
			// Another node leaves it alone.
			if other := r.acquire(t, n, cfg, request(2)); other.Lease().Subnet.String() == tc.subnet {
				t.Fatal("another node took the reservation")
			}
			h := r.acquire(t, n, cfg, request(1))
			if l := h.Lease(); l.Subnet.String() != tc.subnet || !l.Reservation {
				t.Errorf("got %+v, want reservation %s", l, tc.subnet)
			}
			p := r.get(t, key)
			if p == nil || p.Lease != 0 || !strings.Contains(string(p.Value), `"192.168.0.1"`) || !strings.Contains(string(p.Value), `"node-1"`) {
				t.Errorf("in the store: %+v", p)
			}
			// Writing again, and giving back, leave it a reservation.
			a := request(1).Attrs
			a.RootlessOvl.MTU = 1400
			if err := h.Update(r.ctx, a); err != nil {
				t.Error(err)
			}
			if err := h.Revoke(r.ctx); err != nil {
				t.Error(err)
			}
			if p := r.get(t, key); p == nil || p.Lease != 0 || !strings.Contains(string(p.Value), "1400") {
				t.Errorf("after Update and Revoke: %+v", p)
			}
		})
	}
}

// testReservationOfAnother: flannel goes by the IPv4 address alone, so a reservation that has our IPv6 address is not ours.
func testReservationOfAnother(t *testing.T, r *room) {
	cfg := r.config(t, network)
	key := r.key(netip.MustParsePrefix("10.5.5.0/24"))
	value := `{"PublicIP":"192.168.9.9","PublicIPv6":"2001:db8::1"}`
	r.put(t, key, value, 0)
	q := request(1)
	q.Attrs.PublicIPv6 = netip.MustParseAddr("2001:db8::1")
	h := r.acquire(t, r.node(t), cfg, q)
	if l := h.Lease(); l.Subnet.String() == "10.5.5.0/24" || l.Reservation {
		t.Errorf("took %+v", l)
	}
	if err := h.Update(r.ctx, q.Attrs); err != nil {
		t.Error(err)
	}
	if p := r.get(t, key); p == nil || string(p.Value) != value || p.Lease != 0 {
		t.Errorf("the reservation is now %+v", p)
	}
	// Written over our own key it takes the subnet from us.
	run := r.run(t, h)
	r.put(t, r.key(h.Lease().Subnet), value, 0)
	if err := <-run; !errors.Is(err, lease.ErrTaken) || !strings.Contains(err.Error(), "192.168.9.9") {
		t.Errorf("got %v, want ErrTaken", err)
	}
}

func testExhausted(t *testing.T, r *room) {
	cfg := r.config(t, `{"Network":"10.5.0.0/26","SubnetLen":28}`)
	n := r.node(t)
	got := map[netip.Prefix]bool{}
	for i := range 3 { // the first of four is not leased
		got[r.acquire(t, n, cfg, request(i+1)).Lease().Subnet] = true
	}
	if len(got) != 3 {
		t.Errorf("subnets %v", got)
	}
	if _, err := n.Acquire(r.ctx, cfg, request(4)); !errors.Is(err, lease.ErrExhausted) || !strings.Contains(err.Error(), "10.5.0.0/26") {
		t.Errorf("a fourth: %v", err)
	}
	// A lease of another length blocks whatever it overlaps.
	wide := r.config(t, `{"Network":"10.5.0.0/24","SubnetLen":26}`)
	for i, want := range []string{"10.5.0.64/26", "10.5.0.128/26", "10.5.0.192/26"} {
		q := request(10 + i)
		q.Previous = netip.MustParsePrefix(want)
		if l := r.acquire(t, n, wide, q).Lease(); l.Subnet != q.Previous {
			t.Errorf("got %v, want %v", l.Subnet, want)
		}
	}
	narrow := r.config(t, `{"Network":"10.5.0.0/24","SubnetLen":28}`)
	if _, err := n.Acquire(r.ctx, narrow, request(20)); !errors.Is(err, lease.ErrExhausted) {
		t.Errorf("everything is inside a /28 or a /26 of others: %v", err)
	}
}

func testIncompatible(t *testing.T, r *room) {
	n := r.node(t)
	old := r.acquire(t, n, r.config(t, network), request(1)).Lease().Subnet
	h := r.acquire(t, n, r.config(t, `{"Network":"10.50.0.0/16"}`), request(1))
	if l := h.Lease(); !netip.MustParsePrefix("10.50.0.0/16").Contains(l.Subnet.Addr()) {
		t.Errorf("subnet %v", l.Subnet)
	}
	if p := r.get(t, r.key(old)); p != nil {
		t.Errorf("the old lease is still there: %+v", p)
	}
}

func testGarbage(t *testing.T, r *room) {
	cfg := r.config(t, `{"Network":"10.5.0.0/26","SubnetLen":28}`)
	n := r.node(t)
	garbage := map[string]string{
		r.key(netip.MustParsePrefix("10.5.0.16/28")): "not JSON",
		r.key(netip.MustParsePrefix("10.5.0.32/28")): `{"PublicIP":"` + strings.Repeat("9", lease.MaxValue) + `"}`,
		r.prefix + "/subnets/no-subnet":              `{"PublicIP":"192.168.0.9"}`,
		r.prefix + "/subnets/10.5.0.999-28":          `{"PublicIP":"192.168.0.9"}`,
	}
	for k, v := range garbage {
		r.put(t, k, v, 0)
	}
	h := r.acquire(t, n, cfg, request(1))
	if got := h.Lease().Subnet.String(); got != "10.5.0.48/28" {
		t.Errorf("got %s; want the one subnet without a key", got)
	}
	s, err := n.Leases(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Leases) != 1 || len(s.Skipped) != len(garbage) {
		t.Errorf("leases %v, skipped %q", s.Leases, s.Skipped)
	}
	for k := range garbage {
		if !slices.ContainsFunc(s.Skipped, func(x string) bool { return strings.HasPrefix(x, k+": ") && len(x) < 1000 }) {
			t.Errorf("%s is not named in %q", k, s.Skipped)
		}
	}
}

func testTwoAtOnce(t *testing.T, r *room) {
	a, b := r.node(t), r.node(t)
	for round := range 50 {
		// Two free subnets: without a retry one of the nodes would often go without.
		cfg := r.config(t, fmt.Sprintf(`{"Network":"10.%d.0.0/26","SubnetLen":28,"SubnetMax":"10.%[1]d.0.32"}`, round+1))
		var got [2]netip.Prefix
		var errs [2]error
		start := make(chan struct{})
		var wg sync.WaitGroup
		for i, n := range []*node{a, b} {
			wg.Go(func() {
				<-start
				h, err := n.Acquire(r.ctx, cfg, request(100*i+round+1))
				if err == nil {
					got[i] = h.Lease().Subnet
				}
				errs[i] = err
			})
		}
		close(start)
		wg.Wait()
		if errs[0] != nil || errs[1] != nil || got[0] == got[1] {
			t.Fatalf("round %d: %v and %v, errors %v", round, got[0], got[1], errs)
		}
	}
}

func testCrowd(t *testing.T, r *room) {
	const crowd = 14
	cfg := r.config(t, network) // 15 subnets
	nodes := []*node{r.node(t), r.node(t), r.node(t)}
	var mu sync.Mutex
	got := map[netip.Prefix]int{}
	var wg sync.WaitGroup
	for i := range crowd {
		wg.Go(func() {
			h, err := nodes[i%len(nodes)].Acquire(r.ctx, cfg, request(i+1))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			got[h.Lease().Subnet]++
		})
	}
	wg.Wait()
	if len(got) != crowd {
		t.Errorf("%d nodes hold %v", crowd, got)
	}
}

func testKeyDeleted(t *testing.T, r *room) {
	n := r.node(t)
	h := r.acquire(t, n, r.config(t, network), request(1))
	r.run(t, h)
	key := r.key(h.Lease().Subnet)
	for range 3 {
		before := r.get(t, key)
		if before == nil {
			t.Fatalf("no key %s", key)
		}
		r.delete(t, key)
		r.eventually(t, "the key is back", func() bool { return r.get(t, key) != nil })
		after := r.get(t, key)
		if !bytes.Equal(after.Value, before.Value) || after.Lease == 0 {
			t.Errorf("put back as %+v, was %+v", after, before)
		}
		r.eventually(t, "the lease knows its revision", func() bool { return h.Lease().ModRevision == after.ModRevision })
	}
	if h.Err() != nil {
		t.Error(h.Err())
	}
	if got := n.log.count("put it back"); got != 3 {
		t.Errorf("%d log lines for 3 deletions:\n%s", got, n.log)
	}
}

func testEtcdLeaseRevoked(t *testing.T, r *room) {
	h := r.acquire(t, r.node(t), r.config(t, network), request(1))
	r.run(t, h)
	key := r.key(h.Lease().Subnet)
	before := r.get(t, key)
	if err := r.store.Revoke(r.ctx, before.Lease); err != nil {
		t.Fatal(err)
	}
	r.eventually(t, "the key is back on another etcd lease", func() bool {
		p := r.get(t, key)
		return p != nil && p.Lease != before.Lease && p.Lease != 0
	})
	if h.Err() != nil {
		t.Error(h.Err())
	}
}

func testTaken(t *testing.T, r *room) {
	for name, tc := range map[string]struct{ value, says string }{
		"by a stock node":          {`{"PublicIP":"192.168.0.77","PublicIPv6":null}`, "flannel node at 192.168.0.77"},
		"by flanneld on this host": {`{"PublicIP":"192.168.0.1","PublicIPv6":null}`, "flannel node at 192.168.0.1"},
		"by one of ours":           {`{"PublicIP":"192.168.0.78","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"thief","Port":1,"MTU":1}}`, "thief"},
	} {
		t.Run(name, func(t *testing.T) {
			n := r.node(t)
			q := request(1)
			h := r.acquire(t, n, r.config(t, network), q)
			result := r.run(t, h)
			key := r.key(h.Lease().Subnet)
			r.put(t, key, tc.value, time.Hour)
			defer r.delete(t, key)
			<-h.Done()
			if err := <-result; !errors.Is(err, lease.ErrTaken) || !strings.Contains(err.Error(), tc.says) || !errors.Is(h.Err(), lease.ErrTaken) {
				t.Errorf("Run: %v; want ErrTaken with %q", err, tc.says)
			}
			if p := r.get(t, key); string(p.Value) != tc.value {
				t.Errorf("fought over the key: %s", p.Value)
			}
			if err := h.Update(r.ctx, q.Attrs); !errors.Is(err, lease.ErrTaken) {
				t.Errorf("Update afterwards: %v", err)
			}
		})
	}
}

func testOverwrittenWithGarbage(t *testing.T, r *room) {
	n := r.node(t)
	h := r.acquire(t, n, r.config(t, network), request(1))
	r.run(t, h)
	snapshots := make(chan lease.Snapshot, 100)
	ctx, cancel := context.WithCancel(r.ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		_ = n.Watch(ctx, func(s lease.Snapshot) { snapshots <- s })
	}()
	defer func() {
		cancel()
		<-watched
	}()
	<-snapshots
	key := r.key(h.Lease().Subnet)
	before := r.get(t, key)
	for i, ttl := range []time.Duration{time.Hour, 0} { // 0: a plain etcdctl put, which makes no reservation of it
		r.put(t, key, "\x00garbage", ttl)
		r.eventually(t, "the value is back", func() bool { return bytes.Equal(r.get(t, key).Value, before.Value) })
		if p := r.get(t, key); p.Lease != before.Lease {
			t.Errorf("TTL %v: put back on etcd lease %x, was %x", ttl, p.Lease, before.Lease)
		}
		r.eventually(t, "the log tells", func() bool { return n.log.count("overwritten") == i+1 })
	}
	for { // the watch has seen all of it
		s := <-snapshots
		if len(s.Leases) == 1 && s.Leases[0].ModRevision == r.get(t, key).ModRevision {
			break
		}
	}
	if h.Err() != nil || h.Lease().Reservation || n.log.count("reservation=true") != 0 || n.log.count("skipping a key") != 0 {
		t.Errorf("%v, %+v:\n%s", h.Err(), h.Lease(), n.log)
	}
}

func testDuplicateNode(t *testing.T, r *room) {
	cfg := r.config(t, network)
	h := r.acquire(t, r.node(t), cfg, request(1))
	result := r.run(t, h)
	copied := request(1)
	copied.Attrs.PublicIP = netip.MustParseAddr("192.168.0.200")
	r.acquire(t, r.node(t), cfg, copied)
	if err := <-result; !errors.Is(err, lease.ErrDuplicateNode) || !strings.Contains(err.Error(), "192.168.0.200") {
		t.Errorf("Run: %v", err)
	}
}

func testRunsTwice(t *testing.T, r *room) {
	cfg := r.config(t, network)
	h := r.acquire(t, r.node(t), cfg, request(1))
	result := r.run(t, h)
	again := request(1)
	again.Attrs.RootlessOvl.MTU = 1400
	second := r.acquire(t, r.node(t), cfg, again)
	r.run(t, second)
	if err := <-result; !errors.Is(err, lease.ErrDuplicateNode) {
		t.Errorf("Run of the first: %v", err)
	}
	if second.Err() != nil || second.Lease().Subnet != h.Lease().Subnet {
		t.Errorf("the second: %+v, %v", second.Lease(), second.Err())
	}
}

func testBecomesReservation(t *testing.T, r *room) {
	h := r.acquire(t, r.node(t), r.config(t, network), request(1))
	r.run(t, h)
	key := r.key(h.Lease().Subnet)
	r.put(t, key, string(r.get(t, key).Value), 0) // what flannel's documentation says to do
	r.eventually(t, "the lease counts as a reservation", func() bool { return h.Lease().Reservation })
	if p := r.get(t, key); p.Lease != 0 {
		t.Errorf("put back on a lease: %+v", p)
	}
	if h.Err() != nil {
		t.Error(h.Err())
	}
}

func testUpdate(t *testing.T, r *room) {
	h := r.acquire(t, r.node(t), r.config(t, network), request(1))
	r.run(t, h)
	key := r.key(h.Lease().Subnet)
	before := r.get(t, key)
	a := request(1).Attrs
	a.PublicIP = netip.MustParseAddr("172.16.0.5")
	a.RootlessOvl.NodeID = "ignored"
	if err := h.Update(r.ctx, a); err != nil {
		t.Fatal(err)
	}
	after := r.get(t, key)
	got, err := lease.ParseAttrs(after.Value)
	if err != nil {
		t.Fatal(err)
	}
	if got.PublicIP != a.PublicIP || got.RootlessOvl.NodeID != "node-1" || after.Lease != before.Lease {
		t.Errorf("published %s on lease %x (was %x)", after.Value, after.Lease, before.Lease)
	}
	if l := h.Lease(); l.Attrs.PublicIP != a.PublicIP || l.ModRevision != after.ModRevision {
		t.Errorf("Lease() = %+v", l)
	}
	if err := h.Update(r.ctx, a); err != nil {
		t.Fatal(err)
	}
	if p := r.get(t, key); p.ModRevision != after.ModRevision {
		t.Error("an update without a change was written")
	}
}

func testUpdateForeign(t *testing.T, r *room) {
	cfg := r.config(t, network)
	h := r.acquire(t, r.node(t), cfg, request(1))
	r.run(t, h)
	key := r.key(h.Lease().Subnet)
	other := r.acquire(t, r.node(t), cfg, request(2)).Lease()
	var stock netip.Prefix
	for _, s := range []string{"10.5.7.0/24", "10.5.8.0/24", "10.5.9.0/24"} {
		if stock = netip.MustParsePrefix(s); stock != h.Lease().Subnet && stock != other.Subnet {
			break
		}
	}
	r.put(t, r.key(stock), `{"PublicIP":"172.16.0.5","PublicIPv6":null}`, time.Hour)
	before := r.get(t, key)
	theirs := r.get(t, r.key(stock))

	moved := func(ip netip.Addr, port int) lease.Attrs {
		a := request(1).Attrs
		a.PublicIP = ip
		a.RootlessOvl.Port = port
		return a
	}
	address := netip.MustParseAddr("172.16.0.5")
	for what, a := range map[string]lease.Attrs{
		"of a flannel node":               moved(address, 18285),
		"and port of a rootless-ovl node": moved(other.Attrs.PublicIP, other.Attrs.RootlessOvl.Port),
	} {
		if err := h.Update(r.ctx, a); !errors.Is(err, lease.ErrForeignLease) || !strings.Contains(err.Error(), a.PublicIP.String()) {
			t.Errorf("Update to the address %s: %v", what, err)
		}
	}
	if now := r.get(t, key); now.ModRevision != before.ModRevision || h.Lease().Attrs.PublicIP != request(1).Attrs.PublicIP {
		t.Errorf("published %s", now.Value)
	}
	// What is refused is not made up for later either, such as when somebody deletes the key.
	r.delete(t, key)
	r.eventually(t, "the own key is put back", func() bool { return r.get(t, key) != nil })
	if now := r.get(t, key); !bytes.Equal(now.Value, before.Value) {
		t.Errorf("put back as %s", now.Value)
	}
	if now := r.get(t, r.key(stock)); now.ModRevision != theirs.ModRevision {
		t.Errorf("the flannel node's lease became %s", now.Value)
	}
	// A port of its own beside a rootless-ovl node is fine, and so is the address once the other has gone.
	if err := h.Update(r.ctx, moved(other.Attrs.PublicIP, other.Attrs.RootlessOvl.Port+1)); err != nil {
		t.Error(err)
	}
	r.delete(t, r.key(stock))
	if err := h.Update(r.ctx, moved(address, 18285)); err != nil {
		t.Error(err)
	}
	if got := h.Lease(); got.Attrs.PublicIP != address || r.get(t, key) == nil {
		t.Errorf("Lease() = %+v", got)
	}
}

func testRevoke(t *testing.T, r *room) {
	q := request(1)
	q.Ephemeral, q.TTL = true, 0
	h := r.acquire(t, r.node(t), r.config(t, network), q)
	result := r.run(t, h)
	key := r.key(h.Lease().Subnet)
	id := r.get(t, key).Lease
	if ttl, err := r.store.KeepAlive(r.ctx, id); err != nil || ttl != lease.DefaultEphemeralTTL {
		t.Errorf("TTL %v, %v", ttl, err)
	}
	if err := h.Revoke(r.ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-result; err != nil {
		t.Errorf("Run after Revoke: %v", err)
	}
	if !errors.Is(h.Err(), lease.ErrReleased) {
		t.Errorf("Err = %v", h.Err())
	}
	if p := r.get(t, key); p != nil {
		t.Errorf("still there: %+v", p)
	}
	if _, err := r.store.KeepAlive(r.ctx, id); !errors.Is(err, lease.ErrLeaseExpired) {
		t.Errorf("the etcd lease lives on: %v", err)
	}
}

func testEphemeralLives(t *testing.T, r *room) {
	q := request(1)
	q.Ephemeral, q.TTL = true, time.Second
	h := r.acquire(t, r.node(t), r.config(t, network), q)
	r.run(t, h)
	before := h.Lease().ModRevision
	time.Sleep(3 * time.Second) // three times its TTL
	if p := r.get(t, r.key(h.Lease().Subnet)); p == nil || p.ModRevision != before {
		t.Errorf("after three TTLs: %+v, written at %d", p, before)
	}
}

// follow watches in the background; the function waits for a snapshot with exactly the subnets given.
func (r *room) follow(t *testing.T, n *node) func(want ...string) lease.Snapshot {
	ctx, cancel := context.WithCancel(r.ctx)
	snapshots := make(chan lease.Snapshot, 1000)
	ended := make(chan error)
	go func() { ended <- n.Watch(ctx, func(s lease.Snapshot) { snapshots <- s }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
	return func(want ...string) lease.Snapshot {
		t.Helper()
		var last []string
		for {
			select {
			case s := <-snapshots:
				last = nil
				for _, l := range s.Leases {
					last = append(last, l.Subnet.String())
				}
				if cmp.Equal(want, last, cmpopts.EquateEmpty()) {
					return s
				}
			case <-r.ctx.Done():
				t.Fatalf("no snapshot of %v, the last was %v", want, last)
			}
		}
	}
}

func testWatch(t *testing.T, r *room) {
	n := r.node(t)
	const stock = `{"PublicIP":"192.168.0.50","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1}}`
	r.put(t, r.key(netip.MustParsePrefix("10.5.7.0/24")), stock, time.Hour)
	wait := r.follow(t, n)
	s := wait("10.5.7.0/24")
	if l := s.Leases[0]; l.Attrs.PublicIP.String() != "192.168.0.50" || l.Attrs.BackendType != "vxlan" || l.Reservation || l.Attrs.RootlessOvl != nil {
		t.Errorf("lease %+v", l)
	}
	r.put(t, r.prefix+"/subnets/10.5.3.0-24&fd00::-64", `{"PublicIP":"192.168.0.51"}`, 0)
	s = wait("10.5.3.0/24", "10.5.7.0/24")
	if l := s.Leases[0]; !l.Reservation || l.Subnet6.String() != "fd00::/64" {
		t.Errorf("lease %+v", l)
	}
	r.put(t, r.prefix+"/subnets/10.5.4.0-24", "garbage", 0)
	r.put(t, r.prefix+"/rootless-ovl/10.5.5.0-24", stock, 0) // not under subnets
	r.put(t, r.key(netip.MustParsePrefix("10.5.6.0/24")), stock, 0)
	s = wait("10.5.3.0/24", "10.5.6.0/24", "10.5.7.0/24")
	if len(s.Skipped) != 1 || !strings.Contains(s.Skipped[0], "10.5.4.0-24") {
		t.Errorf("skipped %q", s.Skipped)
	}
	r.delete(t, r.key(netip.MustParsePrefix("10.5.7.0/24")))
	wait("10.5.3.0/24", "10.5.6.0/24")
	r.put(t, r.prefix+"/subnets/10.5.4.0-24", stock, 0)
	if s = wait("10.5.3.0/24", "10.5.4.0/24", "10.5.6.0/24"); len(s.Skipped) != 0 {
		t.Errorf("skipped %q", s.Skipped)
	}
	r.put(t, r.prefix+"/subnets/10.5.4.0-24", strings.Replace(stock, "0.50", "0.60", 1), 0)
	r.eventually(t, "the new address arrives", func() bool {
		return wait("10.5.3.0/24", "10.5.4.0/24", "10.5.6.0/24").Leases[1].Attrs.PublicIP.String() == "192.168.0.60"
	})
	if got := n.log.count("skipping"); got != 1 {
		t.Errorf("%d log lines for one garbage value:\n%s", got, n.log)
	}
}

func testWatchCompactedLive(t *testing.T, r *room) {
	wait := r.follow(t, r.node(t))
	wait()
	r.put(t, r.key(netip.MustParsePrefix("10.5.3.0/24")), `{"PublicIP":"192.168.0.50"}`, 0)
	wait("10.5.3.0/24")
	r.Compact(t)
	r.put(t, r.key(netip.MustParsePrefix("10.5.4.0/24")), `{"PublicIP":"192.168.0.51"}`, 0)
	wait("10.5.3.0/24", "10.5.4.0/24")
}

const dualNetwork = `{"EnableIPv6":true,"Network":"10.5.0.0/20","SubnetLen":24,"IPv6Network":"fd00:5::/60"}`

func testDualStack(t *testing.T, r *room) {
	const crowd = 10
	cfg := r.config(t, dualNetwork)
	nodes := []*node{r.node(t), r.node(t)}
	var mu sync.Mutex
	v4, v6 := map[netip.Prefix]int{}, map[netip.Prefix]int{}
	var wg sync.WaitGroup
	for i := range crowd {
		wg.Go(func() {
			h, err := nodes[i%2].Acquire(r.ctx, cfg, request(i+1))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			v4[h.Lease().Subnet]++
			v6[h.Lease().Subnet6]++
		})
	}
	wg.Wait()
	if len(v4) != crowd || len(v6) != crowd {
		t.Errorf("%d nodes hold %v and %v", crowd, v4, v6)
	}
	s, err := nodes[0].Leases(r.ctx)
	if err != nil || len(s.Leases) != crowd || !s.Leases[0].Subnet6.IsValid() {
		t.Errorf("%+v, %v", s, err)
	}
}

// A dual-stack key and a key of the same IPv4 subnet alone are different keys of one subnet.
func testDualStackRival(t *testing.T, r *room) {
	q := request(1)
	h := r.acquire(t, r.node(t), r.config(t, dualNetwork), q)
	result := r.run(t, h)
	l := h.Lease()
	r.put(t, r.key(l.Subnet), `{"PublicIP":"192.168.0.90"}`, time.Hour)
	r.delete(t, r.prefix+"/subnets/"+lease.Key(l.Subnet, l.Subnet6))
	if err := <-result; !errors.Is(err, lease.ErrTaken) || !strings.Contains(err.Error(), "192.168.0.90") {
		t.Errorf("Run: %v", err)
	}
}

// One outage: the lease is held before, during and after, and the log has two lines of it.
func testOutage(t *testing.T, r *room) {
	n := r.node(t)
	cfg := r.config(t, network)
	h := r.acquire(t, n, cfg, request(1))
	r.run(t, h)
	wait := r.follow(t, n)
	own := h.Lease().Subnet
	wait(own.String())

	r.Stop(t)
	r.eventually(t, "the outage is noticed", func() bool { return !h.Connected() })
	if err := h.LastError(); !errors.Is(err, lease.ErrUnreachable) {
		t.Errorf("LastError = %v", err)
	}
	time.Sleep(500 * time.Millisecond) // several attempts
	if h.Err() != nil || h.Lease().Subnet != own {
		t.Errorf("the outage ended the lease: %v", h.Err())
	}
	r.Start(t)
	r.eventually(t, "the store is back", h.Connected)
	wait(own.String())
	if p := r.get(t, r.key(own)); p == nil || p.Lease == 0 {
		t.Errorf("own key after the outage: %+v", p)
	}
	if h.Err() != nil || h.Lease().Subnet != own {
		t.Errorf("after the outage: %v, %v", h.Lease(), h.Err())
	}
	// Everything works as before: another node comes, the own key is deleted.
	other := r.acquire(t, r.node(t), cfg, request(2)).Lease().Subnet
	both := []string{own.String(), other.String()}
	slices.SortFunc([]netip.Prefix{own, other}, netip.Prefix.Compare)
	if other.Addr().Less(own.Addr()) {
		slices.Reverse(both)
	}
	wait(both...)
	r.delete(t, r.key(own))
	r.eventually(t, "the own key is put back", func() bool { return r.get(t, r.key(own)) != nil })
	if away, back := n.log.count("the store is away"), n.log.count("the store is back"); away != 1 || back != 1 {
		t.Errorf("%d lines for going and %d for coming back:\n%s", away, back, n.log)
	}
}

func testUpdateWhileAway(t *testing.T, r *room) {
	n := r.node(t)
	h := r.acquire(t, n, r.config(t, network), request(1))
	r.run(t, h)
	key := r.key(h.Lease().Subnet)
	before := r.get(t, key)
	// A stock node had the address, and is gone. Its subnet is none that we may have been given.
	r.put(t, r.key(netip.MustParsePrefix("10.9.9.0/24")), `{"PublicIP":"172.16.0.5"}`, time.Hour)
	r.Stop(t)
	taken, free := request(1).Attrs, request(1).Attrs
	taken.PublicIP, free.PublicIP = netip.MustParseAddr("172.16.0.5"), netip.MustParseAddr("172.16.0.6")
	for _, a := range []lease.Attrs{free, taken} {
		if err := h.Update(r.ctx, a); !errors.Is(err, lease.ErrUnreachable) {
			t.Errorf("Update while the store is away: %v", err)
		}
		if err := h.Allows(r.ctx, a); !errors.Is(err, lease.ErrUnreachable) {
			t.Errorf("Allows while the store is away: %v", err)
		}
	}
	r.Start(t)
	r.eventually(t, "the lease is held again", h.Connected)
	r.eventually(t, "the test's own requests succeed again", func() bool {
		_, _, err := r.store.Get(r.ctx, key, false)
		return err == nil
	})
	r.delete(t, key)
	r.eventually(t, "the own key is put back", func() bool { return r.get(t, key) != nil })
	if now := r.get(t, key); !bytes.Equal(now.Value, before.Value) {
		t.Errorf("nobody looked whether the address is free, yet the lease became %s", now.Value)
	}
	for _, ask := range []func(context.Context, lease.Attrs) error{h.Allows, h.Update} {
		if err := ask(r.ctx, taken); !errors.Is(err, lease.ErrForeignLease) {
			t.Errorf("with the address of another: %v", err)
		}
	}
	if err := h.Allows(r.ctx, free); err != nil {
		t.Error(err)
	}
	if now := r.get(t, key); !bytes.Equal(now.Value, before.Value) {
		t.Errorf("Allows wrote %s", now.Value)
	}
	if err := h.Update(r.ctx, free); err != nil {
		t.Error(err)
	}
	if now := r.get(t, key); !bytes.Contains(now.Value, []byte("172.16.0.6")) {
		t.Errorf("the lease has %s", now.Value)
	}
	if h.Err() != nil {
		t.Error(h.Err())
	}
}

func testCompactedWhileAway(t *testing.T, r *room) {
	r.put(t, r.key(netip.MustParsePrefix("10.5.3.0/24")), `{"PublicIP":"192.168.0.50"}`, 0)
	_, rev, err := r.store.Get(r.ctx, r.prefix, true)
	if err != nil {
		t.Fatal(err)
	}
	wait := r.follow(t, r.node(t))
	wait("10.5.3.0/24")
	r.put(t, r.key(netip.MustParsePrefix("10.5.4.0/24")), `{"PublicIP":"192.168.0.51"}`, 0)
	r.delete(t, r.key(netip.MustParsePrefix("10.5.3.0/24")))
	r.Compact(t)
	e := <-r.store.Watch(r.ctx, r.prefix, true, rev)
	if !errors.Is(e.Err, lease.ErrCompacted) {
		t.Errorf("watch from before the compaction: %+v", e)
	}
	r.Stop(t)
	r.Start(t)
	wait("10.5.4.0/24")
	late := r.follow(t, r.node(t))
	late("10.5.4.0/24")
}

func testRequestsWhileAway(t *testing.T, r *room) {
	n := r.node(t)
	cfg := r.config(t, network)
	r.Stop(t)
	for name, f := range map[string]func() error{
		"Config":  func() error { _, err := n.Config(r.ctx); return err },
		"Acquire": func() error { _, err := n.Acquire(r.ctx, cfg, request(1)); return err },
		"Leases":  func() error { _, err := n.Leases(r.ctx); return err },
	} {
		err := f()
		if !errors.Is(err, lease.ErrUnreachable) || !strings.Contains(err.Error(), n.store.String()) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if h := n.Health(); h.Connected || !errors.Is(h.Err, lease.ErrUnreachable) {
		t.Errorf("health %+v", h)
	}
	if got := n.log.count("the store is away"); got != 1 {
		t.Errorf("%d log lines:\n%s", got, n.log)
	}
	r.Start(t)
	r.eventually(t, "a request succeeds", func() bool {
		_, err := n.Leases(r.ctx)
		return err == nil
	})
	if !n.Health().Connected || n.log.count("the store is back") != 1 {
		t.Errorf("health %+v, log:\n%s", n.Health(), n.log)
	}
}

func testWatchOutage(t *testing.T, r *room) {
	n := r.node(t)
	r.put(t, r.key(netip.MustParsePrefix("10.5.3.0/24")), `{"PublicIP":"192.168.0.50"}`, 0)
	wait := r.follow(t, n)
	wait("10.5.3.0/24")
	for i := 1; i <= 2; i++ {
		r.Stop(t)
		r.eventually(t, "the outage is noticed", func() bool { return !n.Health().Connected })
		r.Start(t)
		wait("10.5.3.0/24")
		if away, back := n.log.count("the store is away"), n.log.count("the store is back"); away != i || back != i {
			t.Errorf("outage %d: %d and %d lines:\n%s", i, away, back, n.log)
		}
	}
}
