// config: where the config comes from and goes to.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/embedded"
)

func TestConfigSet_TakesAFileStandardInputOrJSON(t *testing.T) {
	const config = `{"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "Port": 18285}}`
	file := filepath.Join(t.TempDir(), "net.json")
	if err := os.WriteFile(file, []byte(config+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, arg := range []string{config, "  " + config, file, "-"} {
		b := newBench(t).serve()
		b.world.stdin = strings.NewReader(config + "\n")
		b.must("config", "set", arg)
		if got := string(b.daemon.config); got != config {
			t.Errorf("config set %s: the daemon got %s", arg, got)
		}
	}
}

func TestConfigSet_DoesNotReadWithoutEnd(t *testing.T) {
	b := newBench(t).serve()
	code := b.run("config", "set", "/dev/zero")
	b.checkError(code, 1, "/dev/zero")
	b.world.stdin = zeroes{}
	code = b.run("config", "set", "-")
	b.checkError(code, 1, "standard input")
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { return len(p), nil }

// memStore is a configStore.
type memStore struct {
	raw    json.RawMessage
	closed bool
}

func (s *memStore) Config(context.Context) (json.RawMessage, error) { return s.raw, nil }
func (s *memStore) Close()                                          { s.closed = true }

func (s *memStore) SetConfig(_ context.Context, raw json.RawMessage) error {
	s.raw = raw
	return nil
}

func TestConfig_WithEndpointsNeedsNoDaemon(t *testing.T) {
	b := newBench(t)
	s := &memStore{raw: json.RawMessage(`{"Network":"10.5.0.0/16"}`)}
	var asked lease.ClientConfig
	var prefix string
	b.world.openStore = func(_ context.Context, c lease.ClientConfig, p string) (configStore, error) {
		asked, prefix = c, p
		return s, nil
	}
	flags := []string{
		"--etcd-endpoints", "https://a:1,https://b:2", "--etcd-prefix", "/p", "--etcd-cafile", "ca", "--etcd-certfile", "c",
		"--etcd-keyfile", "k", "--etcd-username", "u", "--etcd-password", "pw",
	}
	if got := b.must(append([]string{"config", "get"}, flags...)...); !strings.Contains(got, "10.5.0.0/16") {
		t.Errorf("config get: %q", got)
	}
	want := lease.ClientConfig{
		Endpoints: []string{"https://a:1", "https://b:2"}, CAFile: "ca", CertFile: "c", KeyFile: "k", Username: "u", Password: "pw",
	}
	if diff := cmp.Diff(want, asked); diff != "" || prefix != "/p" || !s.closed {
		t.Errorf("prefix %s, closed %t, client (-want +got):\n%s", prefix, s.closed, diff)
	}
	b.must(append([]string{"config", "set", `{"Network":"10.6.0.0/16"}`}, flags...)...)
	if string(s.raw) != `{"Network":"10.6.0.0/16"}` {
		t.Errorf("config set wrote %s", s.raw)
	}
}

func TestConfig_SpeaksToARealStore(t *testing.T) {
	b := newBench(t)
	b.world.openStore = openEtcd
	server, err := embedded.Start(context.Background(), embedded.Config{DataDir: t.TempDir(), ListenClient: "http://127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	flags := []string{"--etcd-endpoints", server.Endpoint()}
	code := b.run(append([]string{"config", "get", "-o", "json"}, flags...)...)
	b.checkError(code, 1, "no network config", "/coreos.com/network/config", "config set")
	var e api.Error
	if err := json.Unmarshal(b.out.Bytes(), &e); err != nil || e.Code != api.CodeNotFound {
		t.Errorf("%q: %v", &b.out, err)
	}
	b.must(append([]string{"config", "set", `{"Network":"10.5.0.0/16"}`}, flags...)...)
	if got := b.must(append([]string{"config", "get"}, flags...)...); got != "{\n  \"Network\": \"10.5.0.0/16\"\n}\n" {
		t.Errorf("config get: %q", got)
	}
	server.Close()
	code = b.run(append([]string{"config", "get"}, flags...)...)
	b.checkError(code, 1, server.Endpoint())
}

func TestStoreError_HasTheCodeOfItsKind(t *testing.T) {
	for err, want := range map[error]error{
		lease.ErrNoConfig: api.ErrNotFound, lease.ErrBadConfig: api.ErrInvalid, lease.ErrAuth: api.ErrDenied,
		lease.ErrUnreachable: api.ErrUnavailable, lease.ErrTLS: api.ErrUnavailable,
	} {
		if got := storeError(err); !errors.Is(got, want) || !errors.Is(got, err) {
			t.Errorf("%v: %v", err, got)
		}
	}
	if storeError(nil) != nil {
		t.Error("an error out of none")
	}
}
