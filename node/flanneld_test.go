// Tests of what flanneld's flags ask of a node: health checks, the renew margin, subnet.env's word on masquerading, a network
// config from a file; and that the store's password is not shown.

package node

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// ask is a health check: the status and what it says.
func ask(t *testing.T, addr, path string) (int, string) {
	t.Helper()
	resp, err := http.Get("http://" + addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func TestHealth_IsReadyWhenTheSubnetFileIsWritten(t *testing.T) {
	etcdAddr, addr := freeAddr(t), freeAddr(t)
	c := joinConfig(t, "http://"+etcdAddr) // nobody is there yet
	c.Healthz = netip.MustParseAddrPort(addr)
	r := startNode(t, c)
	r.until("waiting", func(s api.Status) bool { return s.State == api.StateWaitingForStore })
	check := func(path string, wantStatus int, want string) {
		t.Helper()
		if status, text := ask(t, addr, path); status != wantStatus || text != want {
			t.Errorf("%s: %d %q, want %d %q", path, status, text, wantStatus, want)
		}
	}
	check("/healthz", http.StatusOK, "flanneld is running")
	check("/readyz", http.StatusServiceUnavailable, "flanneld is not ready yet")
	startEtcd(t, t.TempDir(), etcdAddr)
	s := r.ready()
	check("/readyz", http.StatusOK, "flanneld is ready")
	check("/healthz", http.StatusOK, "flanneld is running")
	if env, err := lease.ReadSubnetEnv(s.SubnetEnv); err != nil || env.Subnet.String() != s.Subnet {
		t.Errorf("subnet file %+v, %v", env, err)
	}
	if status, _ := ask(t, addr, "/v1/status"); status != http.StatusNotFound {
		t.Errorf("the API is open to everybody: %d", status)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if _, err := http.Get("http://" + addr + "/healthz"); err == nil {
		t.Error("a node that has ended still says that it runs")
	}
}

func TestHealth_NamesTheFlagWhenThePortIsTaken(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	c := joinConfig(t, etcd.Endpoint())
	c.Healthz = netip.MustParseAddrPort(strings.TrimPrefix(etcd.Endpoint(), "http://"))
	if err := startNode(t, c).fails(); err == nil || !strings.Contains(err.Error(), "--healthz-port") {
		t.Error(err)
	}
	if left := leasesIn(t, etcd.Endpoint()); len(left) != 0 {
		t.Errorf("left in the store: %+v", left)
	}
}

func TestConfig_TakesARenewMarginShorterThanTheLease(t *testing.T) {
	c := testConfig(t)
	c.RenewMargin = time.Hour
	n, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if got := n.request(subnets{}).RenewMargin; got != time.Hour {
		t.Errorf("asks for %v", got)
	}
	c.Ephemeral = true
	if _, err := New(c); err == nil || !strings.Contains(err.Error(), "--subnet-lease-renew-margin") || !strings.Contains(err.Error(), "30s") {
		t.Error(err)
	}
}

func TestRun_WritesWhoMasquerades(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	for _, noIPMasq := range []bool{false, true} {
		c := joinConfig(t, etcd.Endpoint())
		c.NoIPMasq = noIPMasq
		env, err := lease.ReadSubnetEnv(startNode(t, c).ready().SubnetEnv)
		if err != nil || env.IPMasq == noIPMasq {
			t.Errorf("NoIPMasq %t: %+v, %v", noIPMasq, env, err)
		}
	}
}

func TestRun_CreatesTheGivenNetworkConfig(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	var logged syncBuffer
	c := joinConfig(t, etcd.Endpoint())
	c.NetConfig = []byte(`{"Network": "10.5.0.0/16", "SubnetLen": 25, "Backend": {"Type": "udp", "Port": 9999}}`)
	c.Log = slog.New(slog.NewTextHandler(&logged, nil))
	r := startNode(t, c)
	s := r.ready()
	if s.Network != "10.5.0.0/16" || !strings.HasSuffix(s.Subnet, "/25") {
		t.Errorf("status %+v", s)
	}
	if raw, err := r.client.Config(t.Context()); err != nil || !sameJSON(raw, c.NetConfig) {
		t.Errorf("in the store: %s, %v", raw, err)
	}
	if strings.Contains(logged.String(), "--net-config-path") {
		t.Errorf("a warning of nothing:\n%s", logged.String())
	}

	late := joinConfig(t, etcd.Endpoint())
	late.NetConfig = []byte(`{"Network": "10.6.0.0/16"}`)
	late.Log = c.Log
	if s := startNode(t, late).ready(); s.Network != "10.5.0.0/16" {
		t.Errorf("status %+v", s)
	}
	if strings.Count(logged.String(), "--net-config-path is not used") != 1 {
		t.Errorf("no warning:\n%s", logged.String())
	}

	bad := testConfig(t)
	bad.ListenEtcd = "127.0.0.1:0"
	bad.NetConfig = []byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}`)
	if err := startNode(t, bad).fails(); err == nil || !strings.Contains(err.Error(), "--net-config-path") || !strings.Contains(err.Error(), "host-gw") {
		t.Error(err)
	}
}

func TestRun_WarnsOfANetworkThatNobodyAskedFor(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	for name, tc := range map[string]struct {
		level   string
		prepare func(c *Config)
	}{
		"a prefix of nothing":   {"WARN", func(*Config) {}},
		"--network":             {"INFO", func(c *Config) { c.Network, c.NetworkSet = netip.MustParsePrefix("10.5.0.0/16"), true }},
		"--net-config-path":     {"INFO", func(c *Config) { c.NetConfig = []byte(`{"Network": "10.5.0.0/16"}`) }},
		"a store of the node's": {"INFO", func(c *Config) { c.Etcd, c.ListenEtcd = lease.ClientConfig{}, "127.0.0.1:0" }},
	} {
		t.Run(name, func(t *testing.T) {
			var logged syncBuffer
			c := joinConfig(t, etcd.Endpoint())
			c.EtcdPrefix = "/coreos.com/" + strings.ReplaceAll(name, " ", "-") + "/"
			c.Log = slog.New(slog.NewTextHandler(&logged, nil))
			tc.prepare(&c)
			startNode(t, c).ready()
			var line string
			for l := range strings.Lines(logged.String()) {
				if strings.Contains(l, "key=") && strings.Contains(l, "/config") {
					line += l
				}
			}
			if strings.Count(line, "\n") != 1 || !strings.Contains(line, "level="+tc.level) || !strings.Contains(line, path.Join(c.EtcdPrefix, "config")) {
				t.Errorf("got %q, want one line of %s", line, tc.level)
			}
			if tc.level == "WARN" && !(strings.Contains(line, "--etcd-prefix") && strings.Contains(line, "--network") && strings.Contains(line, "new network was made")) {
				t.Errorf("no remedy in %q", line)
			}
			if tc.level != "WARN" {
				return
			}
			// Whoever joins it is told nothing.
			var joined syncBuffer
			again := joinConfig(t, etcd.Endpoint())
			again.EtcdPrefix, again.Log = strings.TrimSuffix(c.EtcdPrefix, "/"), slog.New(slog.NewTextHandler(&joined, nil))
			startNode(t, again).ready()
			if strings.Contains(joined.String(), "--etcd-prefix") {
				t.Errorf("a joiner logs:\n%s", joined.String())
			}
		})
	}
}

func TestStatus_DoesNotShowThePassword(t *testing.T) {
	var logged syncBuffer
	c := joinConfig(t, "http://"+freeAddr(t))
	c.Etcd.Username, c.Etcd.Password = "overlay", "hunter2"
	c.Log = slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
	r := startNode(t, c)
	s := r.until("why the store is away", func(s api.Status) bool { return s.Store.Error != "" })
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if text := string(b) + logged.String(); strings.Contains(text, "hunter2") {
		t.Errorf("it is in %s", text)
	}
}
