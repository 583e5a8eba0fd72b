// Tests of starts that fail, and of what they leave behind: nothing.

package node

import (
	"crypto/tls"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// takenPort is a UDP port that somebody has.
func takenPort(t *testing.T) int {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn.LocalAddr().(*net.UDPAddr).Port
}

func TestRun_AFailedStartDoesNotFixTheNetwork(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		prepare func(c *Config)
		says    string
	}{
		{"port taken", func(c *Config) { c.Port = takenPort(t) }, "--port"},
		{"subnet file in no directory", func(c *Config) { c.SubnetFile = filepath.Join(file, "subnet.env") }, "--subnet-file"},
		{"subnet file is a directory", func(c *Config) { c.SubnetFile = t.TempDir() }, "--subnet-file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			good := testConfig(t)
			good.ListenEtcd, good.NetworkSet = "127.0.0.1:0", true
			typo := good
			typo.Network, good.Network = netip.MustParsePrefix("10.6.0.0/16"), netip.MustParsePrefix("10.5.0.0/16")
			tc.prepare(&typo)
			if err := startNode(t, typo).fails(); err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Fatalf("got %v, want %q", err, tc.says)
			}
			if s := startNode(t, good).ready(); s.Network != "10.5.0.0/16" {
				t.Errorf("network %s", s.Network)
			}
		})
	}
}

func TestRun_AFailedStartGivesItsNewSubnetBack(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	c := joinConfig(t, etcd.Endpoint())
	blocked := filepath.Join(c.StateDir, attachmentsFile)
	if err := os.MkdirAll(blocked, 0o700); err != nil { // a file is expected
		t.Fatal(err)
	}
	if err := os.Chmod(c.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := startNode(t, c).fails(); err == nil || !strings.Contains(err.Error(), attachmentsFile) {
		t.Fatal(err)
	}
	if left := leasesIn(t, etcd.Endpoint()); len(left) != 0 {
		t.Errorf("left in the store: %+v", left)
	}
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	r := startNode(t, c)
	subnet := r.ready().Subnet
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	// A subnet that it had before it keeps.
	if err := errors.Join(os.Remove(blocked), os.Mkdir(blocked, 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := startNode(t, c).fails(); err == nil {
		t.Fatal("no error")
	}
	if left := leasesIn(t, etcd.Endpoint()); len(left) != 1 || left[0].Subnet.String() != subnet {
		t.Errorf("had %s, left in the store: %+v", subnet, left)
	}
}

func TestRun_SaysWhichFileTheStoreWants(t *testing.T) {
	server := httptest.NewUnstartedServer(nil)
	server.EnableHTTP2 = true
	server.TLS = &tls.Config{}
	picky := httptest.NewUnstartedServer(nil)
	picky.EnableHTTP2 = true
	picky.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	for _, s := range []*httptest.Server{server, picky} {
		s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
		s.StartTLS()
		t.Cleanup(s.Close)
	}
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, ca string
		server   *httptest.Server
		says     string
	}{
		{"a stranger", "", server, "--etcd-cafile"},
		{"one that wants to know us", ca, picky, "--etcd-certfile and --etcd-keyfile"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var logged syncBuffer
			c := joinConfig(t, tc.server.URL)
			c.Etcd.CAFile = tc.ca
			c.Log = slog.New(slog.NewTextHandler(&logged, nil))
			err := startNode(t, c).fails()
			if !errors.Is(err, lease.ErrTLS) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, want %q", err, tc.says)
			}
			if strings.Contains(logged.String(), "level=WARN") {
				t.Errorf("it speaks of an outage:\n%s", logged.String())
			}
		})
	}
}

func TestWithRemedy_NamesTheUser(t *testing.T) {
	if err := withRemedy(lease.ErrAuth); !errors.Is(err, lease.ErrAuth) || !strings.Contains(err.Error(), "--etcd-username") {
		t.Error(err)
	}
	if err := withRemedy(lease.ErrExhausted); err != lease.ErrExhausted { //nolint:errorlint // the very same
		t.Error(err)
	}
}

func TestEndpointsOf_AreSuchThatOneCanUseThem(t *testing.T) {
	for _, tc := range []struct {
		listen, own, others string
		open                bool
	}{
		{"http://127.0.0.1:2379", "http://127.0.0.1:2379", "http://127.0.0.1:2379", false},
		{"http://[::1]:2379", "http://[::1]:2379", "http://[::1]:2379", false},
		{"http://192.0.2.1:2379", "http://192.0.2.1:2379", "http://192.0.2.1:2379", true},
		{"http://[::]:23790", "http://127.0.0.1:23790", "http://192.0.2.7:23790", true},
		{"http://0.0.0.0:23790", "http://127.0.0.1:23790", "http://192.0.2.7:23790", true},
	} {
		own, others, open := endpointsOf(tc.listen, netip.MustParseAddr("192.0.2.7"))
		if own != tc.own || others != tc.others || open != tc.open {
			t.Errorf("%s: %s, %s, %v", tc.listen, own, others, open)
		}
	}
}

func TestRun_WarnsOfAStoreThatOthersReach(t *testing.T) {
	for listen, want := range map[string]int{"127.0.0.1:0": 0, "0.0.0.0:0": 1} {
		var logged syncBuffer
		c := testConfig(t)
		c.ListenEtcd = listen
		c.Log = slog.New(slog.NewTextHandler(&logged, nil))
		s := startNode(t, c).ready()
		if n := strings.Count(logged.String(), "has no password"); n != want {
			t.Errorf("%s: warned %d times, want %d:\n%s", listen, n, want, logged.String())
		}
		if e := s.Store.Endpoints; len(e) != 1 || !strings.HasPrefix(e[0], "http://127.0.0.1:") || !strings.Contains(logged.String(), "endpoint="+e[0]) {
			t.Errorf("%s: endpoints %v:\n%s", listen, e, logged.String())
		}
	}
}

func TestRequest_TellsPeersThatTheNodeSteers(t *testing.T) {
	for _, loops := range []int{1, 2} {
		r, err := forwarder.NewRouter(forwarder.Config{Log: slog.New(slog.DiscardHandler), Loops: loops,
			Underlay: forwarder.UnderlayConfig{Addr: netip.MustParseAddrPort("127.0.0.1:0")}})
		if err != nil {
			t.Fatal(err)
		}
		n := &Node{pool: newPool(), router: r}
		caps := n.request(subnets{}).Attrs.RootlessOvl.Caps
		if got := slices.Contains(caps, lease.CapSteers); got != r.Steers() || got && loops == 1 {
			t.Errorf("%d loops, steers %v: %v in the lease", loops, r.Steers(), caps)
		}
		r.Close()
	}
}
