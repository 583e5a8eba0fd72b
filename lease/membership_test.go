// This file tests endpoints that are not of one store, on Debian's etcd.

package lease_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// Two servers that were started with the settings they come with are the same cluster with the same member, by their own account.
func TestClient_KeepsToOneOfTwoStores(t *testing.T) {
	for name, settings := range map[string][]string{
		"of ids of their own": nil,
		"of the same ids":     {"--initial-advertise-peer-urls", "http://127.0.0.1:2380", "--initial-cluster", "suite=http://127.0.0.1:2380"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := newProcess(t), newProcess(t)
			for _, p := range []*process{a, b} {
				p.args = append(p.args, settings...)
				p.start(t)
			}
			only := func(p *process) lease.Store { return dial(t, lease.ClientConfig{Endpoints: []string{p.client}}) }
			fill := only(b)
			for range 20 {
				if _, _, err := fill.Commit(testContext(t), lease.Txn{Key: "/x", Value: []byte("b")}); err != nil {
					t.Fatal(err)
				}
			}
			if _, _, err := only(a).Commit(testContext(t), lease.Txn{Key: "/x", Value: []byte("a")}); err != nil {
				t.Fatal(err)
			}
			both := dial(t, lease.ClientConfig{Endpoints: []string{a.client, b.client}, Timeout: 2 * time.Second})
			settled := func(want string) {
				t.Helper()
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				var refused error
				for streak := 0; streak < 20; {
					pairs, _, err := both.Get(ctx, "/x", false)
					switch {
					case ctx.Err() != nil:
						t.Fatalf("never settled on %s", want)
					case err != nil:
						refused, streak = err, 0
					case string(pairs[0].Value) == want:
						streak++
					default:
						streak = 0
					}
				}
				if refused != nil && !errors.Is(refused, lease.ErrUnreachable) {
					t.Errorf("meanwhile: %v", refused)
				}
			}
			settled("a")
			id, err := both.Grant(testContext(t), time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			if err := only(a).Revoke(testContext(t), id); err != nil {
				t.Fatal(err)
			}
			if _, err := both.KeepAlive(testContext(t), id); !errors.Is(err, lease.ErrLeaseExpired) {
				t.Errorf("of a lease that is not there: %v", err)
			}
			a.kill(t)
			settled("b")
			a.start(t)
			settled("a")
			if got := strings.Join(both.Endpoints(), " "); got != a.client+" "+b.client {
				t.Errorf("endpoints %s", got)
			}
		})
	}
}
