// This file tests the server: that it starts, reopens its data, and says clearly what is wrong.

package embedded_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/embedded"
)

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func dial(t *testing.T, endpoint string) *lease.Client {
	t.Helper()
	c, err := lease.Dial(testContext(t), lease.ClientConfig{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestServer_ReopensItsData(t *testing.T) {
	dir := t.TempDir()
	var logged bytes.Buffer
	cfg := embedded.Config{DataDir: dir, ListenClient: "http://127.0.0.1:0", Log: slog.New(slog.NewTextHandler(&logged, nil))}
	s, err := embedded.Start(testContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	raw := []byte(`{"Network":"10.9.0.0/16"}`)
	if err := lease.NewRegistry(dial(t, s.Endpoint()), "", nil).PutConfig(testContext(t), raw); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s.Close()
	if err, ok := <-s.Err(); ok {
		t.Errorf("Err after Close: %v", err)
	}

	cfg.ListenClient = s.Endpoint()
	s, err = embedded.Start(testContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got, err := lease.NewRegistry(dial(t, s.Endpoint()), "", nil).Config(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Raw, raw) {
		t.Errorf("config after reopening: %s, want %s", got.Raw, raw)
	}
	if logged.Len() > 0 {
		t.Errorf("a server without trouble logged:\n%s", logged.String())
	}
}

// 0.0.0.0 is IPv4 alone; at either wildcard the members' list has the host's addresses, so that nodes know what to close.
func TestServer_OnEveryAddress(t *testing.T) {
	for host, families := range map[string][]string{"0.0.0.0": {"127.0.0.1"}, "[::]": {"127.0.0.1", "::1"}} {
		s, err := embedded.Start(testContext(t), embedded.Config{DataDir: t.TempDir(), ListenClient: "http://" + host + ":0"})
		if err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(s.Endpoint())
		if err != nil || u.Port() == "0" || !strings.HasPrefix(u.Host, host) {
			t.Errorf("listening at %s, the endpoint is %s, %v", host, s.Endpoint(), err)
		}
		if doors := s.Doors(); len(doors) != 2 || !strings.HasSuffix(doors[0], ":"+u.Port()) || !strings.HasPrefix(doors[1], "127.0.0.1:") {
			t.Errorf("the doors of %s are %q", host, doors)
		}
		for _, a := range []string{"127.0.0.1", "::1"} {
			conn, err := net.Dial("tcp", net.JoinHostPort(a, u.Port()))
			if err == nil {
				conn.Close() //nolint:errcheck // it was of no use but to be there
			}
			if open := err == nil; open != slices.Contains(families, a) {
				t.Errorf("at %s, %s: open %v (%v)", host, a, open, err)
			}
		}
		c := dial(t, "http://"+net.JoinHostPort("127.0.0.1", u.Port()))
		if err := lease.NewRegistry(c, "", nil).PutConfig(testContext(t), []byte(`{"Network":"10.9.0.0/16"}`)); err != nil {
			t.Errorf("%s: %v", host, err)
		}
		members, err := c.MemberURLs(testContext(t))
		if err != nil || len(members) != 1 {
			t.Fatalf("members %q, %v", members, err)
		}
		have, err := net.InterfaceAddrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range have {
			p := netip.MustParsePrefix(h.String())
			want := !p.Addr().IsLoopback() && !p.Addr().IsLinkLocalUnicast() && (p.Addr().Is4() || host == "[::]")
			if has := slices.Contains(members[0], "http://"+net.JoinHostPort(p.Addr().String(), u.Port())); has != want {
				t.Errorf("listening at %s, the member tells of %v: %v, in %q", host, p.Addr(), has, members[0])
			}
		}
		s.Close()
		if conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", u.Port())); err == nil {
			conn.Close() //nolint:errcheck // as above
			t.Errorf("%s: open after Close", host)
		}
	}
}

func TestStart_SaysWhatIsWrong(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // a test's listener
	dir := t.TempDir()
	running, err := embedded.Start(testContext(t), embedded.Config{DataDir: dir, ListenClient: "http://127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer running.Close()

	unusable := t.TempDir() // etcd finds a file where it wants a directory
	if err := os.MkdirAll(filepath.Join(unusable, "member"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(unusable, "member", "snap"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cfg  embedded.Config
		is   error
		says string
	}{
		"port taken":        {embedded.Config{DataDir: t.TempDir(), ListenClient: "http://" + l.Addr().String()}, embedded.ErrPortTaken, l.Addr().String()},
		"port taken at all": {embedded.Config{DataDir: t.TempDir(), ListenClient: "http://0.0.0.0:" + strings.TrimPrefix(l.Addr().String(), "127.0.0.1:")}, embedded.ErrPortTaken, "--listen-etcd"},
		"data dir in use":   {embedded.Config{DataDir: dir, ListenClient: "http://127.0.0.1:0"}, embedded.ErrDataDirInUse, dir},
		"foreign address":   {embedded.Config{DataDir: t.TempDir(), ListenClient: "http://192.0.2.77:2379"}, nil, "--listen-etcd"},
		"data unusable":     {embedded.Config{DataDir: unusable, ListenClient: "http://127.0.0.1:0"}, nil, "not a directory"},
		"no data dir":       {embedded.Config{ListenClient: "http://127.0.0.1:0"}, nil, "no data directory"},
		"name as host":      {embedded.Config{DataDir: t.TempDir(), ListenClient: "http://example.org:1"}, nil, "http://127.0.0.1:2379"},
		"no port":           {embedded.Config{DataDir: t.TempDir(), ListenClient: "http://127.0.0.1"}, nil, "http://127.0.0.1:2379"},
		"https, no files":   {embedded.Config{DataDir: t.TempDir(), ListenClient: "https://127.0.0.1:0"}, nil, "certificate file"},
		"https, bad files":  {embedded.Config{DataDir: t.TempDir(), ListenClient: "https://127.0.0.1:0", CertFile: "/nonexistent", KeyFile: "/nonexistent"}, nil, "/nonexistent"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := embedded.Start(testContext(t), tc.cfg)
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			if tc.is != nil && !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %q, want %v and %q in it", err, tc.is, tc.says)
			}
			t.Log(err)
		})
	}

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	again := embedded.Config{DataDir: t.TempDir(), ListenClient: "http://127.0.0.1:0"}
	if s, err := embedded.Start(ended, again); err == nil {
		s.Close() // ready before anybody looked: fine
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	s, err := embedded.Start(testContext(t), again)
	if err != nil {
		t.Fatalf("a failed start left something behind: %v", err)
	}
	s.Close()
}
