// This file tests the client's token on the etcd that Debian ships: it is one of those that forget a token and then
// refuse it even with the request for another.

package lease_test

import (
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// cheapHashes of passwords keep tests short. The embedded etcd has none: in this process, under the race detector, they
// would take seconds.
var cheapHashes = []string{"--bcrypt-cost", "4"}

// enableAuth makes the users root, node, who may use the default prefix, and nobody, who may do nothing.
func enableAuth(t *testing.T, endpoint string) {
	t.Helper()
	root, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close() //nolint:errcheck // a test's client
	ctx := testContext(t)
	prefix := lease.DefaultPrefix
	for _, f := range []func() error{
		func() error { _, err := root.UserAdd(ctx, "root", "rootpw"); return err },
		func() error { _, err := root.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := root.RoleAdd(ctx, "ovl"); return err },
		func() error {
			_, err := root.RoleGrantPermission(ctx, "ovl", prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := root.UserAdd(ctx, "node", "secret"); return err },
		func() error { _, err := root.UserGrantRole(ctx, "node", "ovl"); return err },
		func() error { _, err := root.UserAdd(ctx, "nobody", "secret"); return err },
		func() error { _, err := root.AuthEnable(ctx); return err },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
}

// age makes the store's raft log longer.
func age(t *testing.T, endpoint string) {
	t.Helper()
	c := dial(t, lease.ClientConfig{Endpoints: []string{endpoint}})
	for range 100 {
		if _, _, err := c.Commit(testContext(t), lease.Txn{Key: "x"}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestHeld_ComesBackAfterARestartWithItsUser(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare func(t *testing.T, first, second *process) // the stores before auth
		forgets bool                                       // the second process has data of its own
	}{
		"the same store": {},
		// The token has a raft index in it, so that a store knows those that it cannot know yet.
		"a restored store, ahead of the token":  {func(t *testing.T, _, second *process) { age(t, second.client) }, true},
		"a restored store, behind of the token": {func(t *testing.T, first, _ *process) { age(t, first.client) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			first := newProcess(t, cheapHashes...)
			first.start(t)
			second := first
			if tc.forgets {
				second = newProcess(t, cheapHashes...)
				second.start(t)
				tc.prepare(t, first, second)
				enableAuth(t, second.client)
				second.terminate(t)
				second.args = strings.Split(strings.ReplaceAll(strings.Join(second.args, "\n"), second.client, first.client), "\n")
			}
			enableAuth(t, first.client)

			ctx := testContext(t)
			client := dial(t, lease.ClientConfig{Endpoints: []string{first.client}, Username: "node", Password: "secret", Timeout: time.Second})
			r := lease.NewRegistry(client, "", nil)
			h, err := r.Acquire(ctx, testNetwork(t), testRequest("node-1", "192.168.0.1"))
			if err != nil {
				t.Fatal(err)
			}
			held := make(chan error, 1)
			go func() { held <- h.Run(ctx) }()
			snapshots := make(chan lease.Snapshot, 100)
			go func() {
				defer close(snapshots)
				_ = r.Watch(ctx, func(s lease.Snapshot) { snapshots <- s })
			}()
			waitFor := func(leases int) {
				t.Helper()
				for s := range snapshots { // closed when ctx ends
					if len(s.Leases) == leases {
						return
					}
				}
				t.Fatalf("no snapshot of %d leases; health %+v", leases, r.Health())
			}
			waitFor(1)
			first.kill(t)
			for h.Connected() && ctx.Err() == nil {
				time.Sleep(5 * time.Millisecond)
			}
			second.launch(t)
			waitFor(1)
			for !h.Connected() && ctx.Err() == nil {
				time.Sleep(5 * time.Millisecond)
			}
			if err := h.Revoke(ctx); err != nil {
				t.Error(err)
			}
			waitFor(0)
			if err := <-held; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestClient_TakesATokenWhenAuthIsEnabledLater(t *testing.T) {
	e := newProcess(t, cheapHashes...)
	e.start(t)
	client := dial(t, lease.ClientConfig{Endpoints: []string{e.client}, Username: "node", Password: "secret"})
	read := func() {
		t.Helper()
		if _, _, err := client.Get(testContext(t), lease.DefaultPrefix, true); err != nil {
			t.Error(err)
		}
	}
	read()
	enableAuth(t, e.client)
	read()
}
