// This file runs the suite of leasetest on an embedded etcd.

package embedded_test

import (
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/embedded"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

func TestServer_PassesTheSuite(t *testing.T) {
	leasetest.Run(t, func(t *testing.T) leasetest.Lab {
		cfg := embedded.Config{DataDir: t.TempDir(), ListenClient: "http://127.0.0.1:0"}
		var s *embedded.Server
		start := func(t *testing.T) {
			t.Helper()
			var err error
			if s, err = embedded.Start(testContext(t), cfg); err != nil {
				t.Fatal(err)
			}
			cfg.ListenClient = s.Endpoint() // the same port after a restart
		}
		start(t)
		t.Cleanup(func() { s.Close() })
		return leasetest.Lab{
			Dial:  func(t *testing.T) lease.Store { return dial(t, cfg.ListenClient) },
			Stop:  func(*testing.T) { s.Close() },
			Start: start,
			Compact: func(t *testing.T) {
				c, err := clientv3.New(clientv3.Config{Endpoints: []string{cfg.ListenClient}, Logger: zap.NewNop()})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close() //nolint:errcheck // a test's client
				resp, err := c.Get(testContext(t), "x")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Compact(testContext(t), resp.Header.Revision); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}
