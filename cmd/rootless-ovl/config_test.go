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

func TestConfigSet_ChangesTheDomain(t *testing.T) {
	const plain, named = `{"Network":"10.5.0.0/16"}`, `{"Network":"10.5.0.0/16","RootlessOvl":{"Domain":"lab.internal"}}`
	b := newBench(t).serve()
	b.must("config", "set", plain, "--domain", "lab.internal")
	if got := string(b.daemon.config); got != named {
		t.Errorf("of a config that is given: %s", got)
	}
	b.daemon.config = json.RawMessage(plain)
	b.must("config", "set", "--domain", "lab.internal")
	if got := string(b.daemon.config); got != named {
		t.Errorf("of the config in the store: %s", got)
	}
	code := b.run("config", "set", "--domain", "a b")
	b.checkError(code, 2, `domain "a b"`)
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

func TestConfigSet_WarnsOfWhatNoNodeStartsOn(t *testing.T) {
	for config, says := range map[string]string{
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}`:       "VNI 16777216",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":-1}}`:             "VNI -1",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","Port":70000}}`:         "Port 70000",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":70000}}`:           "Port 70000",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":10}}`:             "MTU 10",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":100000}}`:         "MTU 100000",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}`: "DirectRouting",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}`:                    `"host-gw"`,
		`{"Network":"10.5.0.0/16","Backend":{"Type":"nonsense"}}`:                   `"nonsense"`,
		`{"Network":"10.5.0.0/16","Backends":{"Type":"vxlan"}}`:                     `nobody reads "Backends"`,
		`{"Network":"10.5.0.0/16","RootlessOvl":{"Domain":"com"}}`:                  `the domain "com" is one label`,
		`{"Network":"10.5.0.0/16","RootlessOvl":{"Domain":"example.com"}}`:          "",
		`{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`:                      "",
	} {
		for _, direct := range []bool{false, true} {
			b := newBench(t)
			s := &memStore{}
			args := []string{"config", "set", config}
			if direct {
				b.world.openStore = func(context.Context, lease.ClientConfig, string) (configStore, error) { return s, nil }
				args = append(args, "--etcd-endpoints", "http://a:1")
			} else {
				b.serve()
			}
			b.must(args...)
			if !direct {
				s.raw = b.daemon.config
			}
			if string(s.raw) != config {
				t.Errorf("config set %s wrote %s", config, s.raw)
			}
			starts := strings.Contains(says, "nobody reads") || strings.Contains(says, "one label")
			got := b.err.String()
			if says == "" && got != "" || says != "" && (strings.Count(got, "warning: ") != 1 || !strings.Contains(got, says) ||
				strings.Contains(got, "no rootless-ovl node starts on this: ") == starts) {
				t.Errorf("config set %s, direct %t: %q, want a warning of %q", config, direct, got, says)
			}
		}
	}
}

func TestConfigSet_RefusesWhatWorksNowhereOrIsNoConfig(t *testing.T) {
	b := newBench(t)
	for arg, says := range map[string]string{
		`{"Network":"224.0.0.0/8"}`: "Network 224.0.0.0/8 is multicast",
		`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fe80::/10","Backend":{"Type":"vxlan"}}`: "IPv6Network fe80::/10 is link-local",
		`[]`: "not a JSON object", `null`: "not a JSON object", ``: "not a JSON object", `7`: "not a JSON object", `[{`: "not a JSON object",
		`nosuchfile`: "open nosuchfile",
	} {
		for _, flags := range [][]string{nil, {"--etcd-endpoints", "http://a:1"}} {
			code := b.run(append([]string{"config", "set", arg}, flags...)...)
			want := 1
			if says == "not a JSON object" {
				want = 2
			}
			b.checkError(code, want, says)
		}
	}
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
