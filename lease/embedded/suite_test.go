// This file runs the suite of leasetest on an embedded etcd.

package embedded_test

import (
	"errors"
	"os"
	"path/filepath"
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
			Wipe: func(t *testing.T) {
				if err := os.RemoveAll(cfg.DataDir); err != nil {
					t.Fatal(err)
				}
			},
			Save: func(t *testing.T) func(*testing.T) {
				saved := filepath.Join(t.TempDir(), "saved")
				if err := os.CopyFS(saved, os.DirFS(cfg.DataDir)); err != nil {
					t.Fatal(err)
				}
				return func(t *testing.T) {
					if err := errors.Join(os.RemoveAll(cfg.DataDir), os.CopyFS(cfg.DataDir, os.DirFS(saved)), os.Chmod(cfg.DataDir, 0o700)); err != nil {
						t.Fatal(err)
					}
				}
			},
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
