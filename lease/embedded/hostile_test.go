// This file tests what a client makes of a store into which somebody has put more than there should be.

package embedded_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/embedded"
)

func TestClient_ListsWhateverIsInTheStore(t *testing.T) {
	s, err := embedded.Start(testContext(t), embedded.Config{DataDir: t.TempDir(), ListenClient: "http://127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // a test's client
	const small, large = 2300, 70
	subnet := func(i int) string { return fmt.Sprintf("/n/subnets/10.%d.%d.0-24", i/250, i%250) }
	for i := 0; i < small; i += 100 {
		var puts []clientv3.Op
		for j := i; j < i+100; j++ {
			puts = append(puts, clientv3.OpPut(subnet(j), `{"PublicIP":"192.0.2.1","PublicIPv6":null}`))
		}
		if _, err := c.Txn(testContext(t)).Then(puts...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	huge := `{"PublicIP":"192.0.2.1","BackendData":"` + strings.Repeat("x", 1<<20) + `"}`
	for i := range large { // more together than one answer may have
		if _, err := c.Put(testContext(t), subnet(small+i), huge); err != nil {
			t.Fatal(err)
		}
	}
	store := dial(t, s.Endpoint())
	r := lease.NewRegistry(store, "/n", nil)
	snap, err := r.Leases(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(snap.Leases) != small || len(snap.Skipped) != large {
		t.Fatalf("%d leases and %d skipped, want %d and %d", len(snap.Leases), len(snap.Skipped), small, large)
	}
	for _, why := range snap.Skipped {
		if !strings.Contains(why, "more than") {
			t.Errorf("skipped: %s", why)
		}
	}
	pairs, _, err := store.Get(testContext(t), "/n/subnets", true)
	if err != nil {
		t.Fatal(err)
	}
	last := ""
	for _, p := range pairs {
		if p.Key <= last || len(p.Value) > lease.MaxValue+1 {
			t.Errorf("key %s after %s, %d bytes", p.Key, last, len(p.Value))
		}
		last = p.Key
	}

	// The same by a watch, which the store may send in pieces.
	ctx := testContext(t)
	found := make(chan lease.Snapshot)
	go func() {
		_ = r.Watch(ctx, func(s lease.Snapshot) {
			select {
			case found <- s:
			case <-ctx.Done():
			}
		})
	}()
	<-found
	var puts []clientv3.Op
	for i := range 12 {
		puts = append(puts, clientv3.OpPut(subnet(small+large+i), string(bytes.Repeat([]byte("y"), 100<<10))))
	}
	puts = append(puts, clientv3.OpPut("/n/subnets/10.99.0.0-24", `{"PublicIP":"192.0.2.9","PublicIPv6":null}`))
	if _, err := c.Txn(ctx).Then(puts...).Commit(); err != nil {
		t.Fatal(err)
	}
	snap = <-found
	if len(snap.Leases) != small+1 || len(snap.Skipped) != large+12 || snap.Leases[small].Subnet != netip.MustParsePrefix("10.99.0.0/24") {
		t.Errorf("%d leases and %d skipped, want %d and %d", len(snap.Leases), len(snap.Skipped), small+1, large+12)
	}
}
