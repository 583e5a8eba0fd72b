// Tests of a node's whole run, on a real embedded etcd and a real underlay socket on loopback. Containers are not needed
// for them: test/ has those.

package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/internal/hostnet"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/embedded"
)

// deadline bounds every wait of these tests; nothing is said about how long things take.
const deadline = 60 * time.Second

// running is a node whose Run is under way.
type running struct {
	t      *testing.T
	n      *Node
	c      Config
	stop   context.CancelFunc
	ended  chan struct{}
	err    error // of Run, once ended is closed
	client *api.Client
}

func startNode(t *testing.T, c Config) *running {
	t.Helper()
	n, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	n.edges = newWorld().edges()
	return runNode(t, n)
}

func runNode(t *testing.T, n *Node) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{t: t, n: n, c: n.cfg, stop: cancel, ended: make(chan struct{}), client: api.NewClient(n.cfg.Socket())}
	go func() {
		defer close(r.ended)
		r.err = n.Run(ctx)
	}()
	t.Cleanup(func() {
		r.client.Close()
		cancel()
		<-r.ended
	})
	return r
}

// until waits for a status that ok likes, asked for over the socket.
func (r *running) until(what string, ok func(api.Status) bool) api.Status {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	var last api.Status
	var err error
	for ctx.Err() == nil {
		select {
		case <-r.ended:
			r.t.Fatalf("%s: the node ended: %v", what, r.err)
		case <-time.After(5 * time.Millisecond):
		}
		if last, err = r.client.Status(ctx); err == nil && ok(last) {
			return last
		}
	}
	r.t.Fatalf("%s: still %+v, %v", what, last, err)
	return last
}

func (r *running) ready() api.Status {
	r.t.Helper()
	return r.until("ready", func(s api.Status) bool { return s.State == api.StateReady })
}

// end stops the node and gives Run's error.
func (r *running) end() error {
	r.stop()
	<-r.ended
	return r.err
}

// fails waits for Run to end by itself, and gives its error.
func (r *running) fails() error {
	r.t.Helper()
	select {
	case <-r.ended:
		return r.err
	case <-time.After(deadline):
		r.t.Fatal("the node still runs")
		return nil
	}
}

// startEtcd runs a store for several nodes, at a port or at any.
func startEtcd(t *testing.T, dir, addr string) *embedded.Server {
	t.Helper()
	s, err := embedded.Start(t.Context(), embedded.Config{DataDir: dir, ListenClient: "http://" + addr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func dial(t *testing.T, endpoint string) (*lease.Client, *lease.Registry) {
	t.Helper()
	c, err := lease.Dial(t.Context(), lease.ClientConfig{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, lease.NewRegistry(c, DefaultEtcdPrefix, nil)
}

func leasesIn(t *testing.T, endpoint string) []lease.Lease {
	t.Helper()
	_, r := dial(t, endpoint)
	s, err := r.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.Leases
}

func joinConfig(t *testing.T, endpoint string) Config {
	c := testConfig(t)
	c.Etcd.Endpoints = []string{endpoint}
	return c
}

// put writes a key as somebody else would.
func put(t *testing.T, endpoint, key, value string) {
	t.Helper()
	c, _ := dial(t, endpoint)
	if ok, _, err := c.Commit(t.Context(), lease.Txn{Key: key, Value: []byte(value)}); err != nil || !ok {
		t.Fatal(ok, err)
	}
}

// putLease writes the lease of another node, which lives as long as the test.
func putLease(t *testing.T, endpoint, subnet, value string) {
	t.Helper()
	c, _ := dial(t, endpoint)
	id, err := c.Grant(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	key := DefaultEtcdPrefix + "/subnets/" + subnet
	if ok, _, err := c.Commit(t.Context(), lease.Txn{Key: key, Value: []byte(value), Lease: id}); err != nil || !ok {
		t.Fatal(ok, err)
	}
}

func TestRun_FromNothingToReadyAndBackToTheSameSubnet(t *testing.T) {
	c := testConfig(t)
	c.ListenEtcd = "127.0.0.1:0"
	c.Network, c.NetworkSet = netip.MustParsePrefix("10.5.0.0/16"), true
	r := startNode(t, c)
	s := r.ready()
	if s.Network != "10.5.0.0/16" || s.MTU != 1472 || s.PublicIP != "127.0.0.1" || s.Port == 0 || len(s.NodeID) != 32 || !s.Store.Embedded || !s.Store.Connected {
		t.Errorf("status %+v", s)
	}
	env, err := lease.ReadSubnetEnv(filepath.Join(c.RuntimeDir, "subnet.env"))
	if err != nil || env.Subnet.String() != s.Subnet || env.MTU != 1472 || env.Network.String() != s.Network {
		t.Errorf("subnet.env %+v, %v", env, err)
	}
	leases := leasesIn(t, s.Store.Endpoints[0])
	if len(leases) != 1 || leases[0].Subnet.String() != s.Subnet || leases[0].Attrs.BackendType != "" {
		t.Fatalf("leases %+v", leases)
	}
	if e := leases[0].Attrs.RootlessOvl; e == nil || e.NodeID != s.NodeID || e.Port != s.Port || e.MTU != 1472 || e.V != 1 {
		t.Errorf("extension %+v", e)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(r.c.Socket()); err == nil {
		t.Error("the socket is still there")
	}
	again := startNode(t, c).ready()
	if again.Subnet != s.Subnet || again.NodeID != s.NodeID || again.Port != s.Port {
		t.Errorf("second run: %s port %d, first: %s port %d", again.Subnet, again.Port, s.Subnet, s.Port)
	}
}

func TestRun_TwoNodesSeeEachOther(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	a, b := startNode(t, joinConfig(t, etcd.Endpoint())), startNode(t, joinConfig(t, etcd.Endpoint()))
	sa, sb := a.ready(), b.ready()
	if sa.Subnet == sb.Subnet {
		t.Fatalf("both have %s", sa.Subnet)
	}
	a.until("one peer", func(s api.Status) bool { return s.Peers == 1 })
	peers, err := a.client.Peers(t.Context())
	if err != nil || len(peers) != 1 || peers[0].Subnet != sb.Subnet || peers[0].Port != sb.Port || peers[0].NodeID != sb.NodeID || peers[0].Stock || peers[0].Problem != "" {
		t.Errorf("peers %+v, %v", peers, err)
	}
}

func TestRun_ToleratesGarbageAmongTheLeases(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	put(t, etcd.Endpoint(), DefaultEtcdPrefix+"/config", `{"Network":"10.213.0.0/16","SubnetMin":"10.213.20.0"}`) // the node's is none of these
	put(t, etcd.Endpoint(), DefaultEtcdPrefix+"/subnets/10.213.9.0-24", "{garbage")
	put(t, etcd.Endpoint(), DefaultEtcdPrefix+"/subnets/10.213.8.0-24", `{"PublicIP":"224.0.0.1"}`)
	put(t, etcd.Endpoint(), DefaultEtcdPrefix+"/subnets/10.213.7.0-24", `{"PublicIP":"192.0.2.7","PublicIPv6":null}`)
	var logged syncBuffer
	c := joinConfig(t, etcd.Endpoint())
	c.Log = slog.New(slog.NewTextHandler(&logged, nil))
	r := startNode(t, c)
	r.ready()
	r.until("two peers", func(s api.Status) bool { return s.Peers == 2 })
	peers, err := r.client.Peers(t.Context())
	if err != nil || len(peers) != 2 || peers[0].Problem != "" || !peers[0].Stock || peers[0].Port != 8285 || peers[0].Backend != "udp" || peers[1].Problem == "" {
		t.Errorf("peers %+v, %v", peers, err)
	}
	putLease(t, etcd.Endpoint(), "10.213.6.0-24", `{"PublicIP":"192.0.2.6","PublicIPv6":null,"BackendType":"vxlan"}`)
	r.until("three peers", func(s api.Status) bool { return s.Peers == 3 })
	peers, err = r.client.Peers(t.Context())
	if err != nil || len(peers) != 3 || peers[0].Backend != "vxlan" || !strings.Contains(peers[0].Problem, "vxlan") || peers[0].Port != 8285 {
		t.Errorf("peers %+v, %v", peers, err)
	}
	if key := "key=" + DefaultEtcdPrefix + "/subnets/10.213.9.0-24 reason="; !strings.Contains(logged.String(), key) {
		t.Errorf("the log has no %q:\n%s", key, logged.String())
	}
}

func TestRun_EphemeralNodeGivesItsLeaseBack(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	c := joinConfig(t, etcd.Endpoint())
	c.Ephemeral = true
	r := startNode(t, c)
	r.ready()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if left := leasesIn(t, etcd.Endpoint()); len(left) != 0 {
		t.Errorf("left in the store: %+v", left)
	}
	if _, err := os.Stat(filepath.Join(c.RuntimeDir, "subnet.env")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("subnet.env tells of a subnet that is given back: %v", err)
	}
}

func TestRun_TellsSystemd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	c := testConfig(t)
	c.ListenEtcd = "127.0.0.1:0"
	r := startNode(t, c)
	next := func() string {
		b := make([]byte, 100)
		if err := conn.SetReadDeadline(time.Now().Add(deadline)); err != nil {
			t.Fatal(err)
		}
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	if got := next(); got != "READY=1" {
		t.Errorf("first %q", got)
	}
	if s, _ := r.n.Status(t.Context()); s.State != api.StateReady {
		t.Errorf("told systemd in state %s", s.State)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "STOPPING=1" {
		t.Errorf("second %q", got)
	}
}

func TestRun_WaitsForTheStoreAndSaysSo(t *testing.T) {
	addr := freeAddr(t)
	var logged syncBuffer
	c := joinConfig(t, "http://"+addr)
	c.Log = slog.New(slog.NewTextHandler(&logged, nil))
	r := startNode(t, c)
	s := r.until("waiting", func(s api.Status) bool { return s.State == api.StateWaitingForStore })
	if s.Store.Connected || s.Store.Error == "" {
		t.Errorf("store %+v", s.Store)
	}
	if _, err := r.client.Attach(t.Context(), api.AttachRequest{PID: 1}); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("attach: %v", err)
	}
	startEtcd(t, t.TempDir(), addr)
	r.ready()
	if n := strings.Count(logged.String(), "store is away"); n != 1 {
		t.Errorf("said %d times that the store is away:\n%s", n, logged.String())
	}
}

func TestRun_RefusesWithOneClearError(t *testing.T) {
	for _, tc := range []struct {
		name    string
		config  string // in the store
		lease   [2]string
		prepare func(t *testing.T, c *Config)
		says    []string
	}{
		{name: "garbage config", config: "{nonsense", says: []string{DefaultEtcdPrefix + "/config", "rootless-ovl config set"}},
		{name: "impossible config", config: `{"Network":"10.5.0.0/30"}`, says: []string{"too small"}},
		{name: "multicast network", config: `{"Network":"224.0.0.0/8"}`, says: []string{"key " + DefaultEtcdPrefix + "/config", ": Network 224.0.0.0/8 is multicast: ", "rootless-ovl config set"}},
		{name: "wireguard", config: `{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard"}}`, says: []string{"wireguard", "udp", "vxlan"}},
		{name: "vxlan without encapsulation", config: `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}`, says: []string{"DirectRouting", "root", "leave it out"}},
		{name: "dual-stack vxlan", config: `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}`, says: []string{"EnableIPv6", "IPv6 address", "--iface"}},
		{name: "impossible VNI", config: `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":99999999}}`, says: []string{"VNI", "16777215", "rootless-ovl config set"}},
		{name: "broken VTEP address", config: `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}`, prepare: func(t *testing.T, c *Config) {
			if err := errors.Join(os.MkdirAll(c.StateDir, 0o700), os.WriteFile(filepath.Join(c.StateDir, vtepMACFile), []byte("?"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}, says: []string{vtepMACFile, "remove it"}},
		{name: "host-gw", config: `{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}`, says: []string{"host-gw", "root"}},
		{name: "unknown backend", config: `{"Network":"10.5.0.0/16","Backend":{"Type":"pigeons"}}`, says: []string{"pigeons"}},
		{name: "another network", config: `{"Network":"10.5.0.0/16"}`, prepare: func(_ *testing.T, c *Config) {
			c.Network, c.NetworkSet = netip.MustParsePrefix("10.6.0.0/16"), true
		}, says: []string{"10.5.0.0/16", "10.6.0.0/16", "--network", "rootless-ovl config set"}},
		{name: "stock node with our address", config: `{"Network":"10.5.0.0/16"}`,
			lease: [2]string{"10.5.9.0-24", `{"PublicIP":"127.0.0.1","PublicIPv6":null}`}, says: []string{"127.0.0.1", "10.5.9.0/24"}},
		{name: "full network", config: `{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.9.0"}`,
			lease: [2]string{"10.5.9.0-24", `{"PublicIP":"192.0.2.7","PublicIPv6":null}`}, says: []string{"out of subnets", DefaultEtcdPrefix + "/config", "rootless-ovl config set"}},
		{name: "port taken", config: `{"Network":"10.5.0.0/16"}`, prepare: func(t *testing.T, c *Config) {
			conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = conn.Close() })
			c.Port = conn.LocalAddr().(*net.UDPAddr).Port
		}, says: []string{"taken", "--port"}},
		{name: "outbound address of another host", config: `{"Network":"10.5.0.0/16"}`, prepare: func(_ *testing.T, c *Config) {
			c.OutboundAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.99")}
		}, says: []string{"192.0.2.99", "--outbound-addr", "`ip addr`"}},
		{name: "outbound interface that is not there", config: `{"Network":"10.5.0.0/16"}`, prepare: func(_ *testing.T, c *Config) {
			c.OutboundIf = "gone0"
		}, says: []string{"gone0", "--outbound-if", "`ip link`"}},
		{name: "broken node id", config: `{"Network":"10.5.0.0/16"}`, prepare: func(t *testing.T, c *Config) {
			if err := errors.Join(os.MkdirAll(c.StateDir, 0o700), os.WriteFile(filepath.Join(c.StateDir, nodeIDFile), []byte("?"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}, says: []string{nodeIDFile}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
			put(t, etcd.Endpoint(), DefaultEtcdPrefix+"/config", tc.config)
			if tc.lease[0] != "" {
				putLease(t, etcd.Endpoint(), tc.lease[0], tc.lease[1])
			}
			c := joinConfig(t, etcd.Endpoint())
			if tc.prepare != nil {
				tc.prepare(t, &c)
			}
			before := len(leasesIn(t, etcd.Endpoint()))
			err := startNode(t, c).fails()
			if err == nil {
				t.Fatal("no error")
			}
			for _, s := range tc.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
			if now := len(leasesIn(t, etcd.Endpoint())); now != before {
				t.Errorf("%d leases in the store, %d before", now, before)
			}
			if _, err := os.Stat(filepath.Join(c.RuntimeDir, "subnet.env")); err == nil {
				t.Error("subnet.env was written")
			}
		})
	}
}

func TestRun_RefusesAnOverlapUnlessAllowed(t *testing.T) {
	for _, allow := range []bool{false, true} {
		t.Run(fmt.Sprintf("allow=%v", allow), func(t *testing.T) {
			etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
			c := joinConfig(t, etcd.Endpoint())
			c.AllowOverlap = allow
			n, err := New(c)
			if err != nil {
				t.Fatal(err)
			}
			n.edges = newWorld().edges()
			n.edges.overlaps = func(netip.Prefix) ([]hostnet.Overlap, error) {
				return []hostnet.Overlap{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Device: "tun0"}}, nil
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- n.Run(ctx) }()
			if allow {
				for s, _ := n.Status(ctx); s.State != api.StateReady; s, _ = n.Status(ctx) {
					time.Sleep(5 * time.Millisecond)
				}
				cancel()
			}
			err = <-ended
			cancel()
			if allow && err != nil || !allow && (err == nil || !strings.Contains(err.Error(), "tun0") || !strings.Contains(err.Error(), "--allow-overlap")) {
				t.Errorf("got %v", err)
			}
			_, reg := dial(t, etcd.Endpoint())
			if _, err := reg.Config(t.Context()); !allow && !errors.Is(err, lease.ErrNoConfig) {
				t.Errorf("a refused network was created: %v", err)
			}
		})
	}
}

func TestRun_OneDaemonAStateDirectory(t *testing.T) {
	c := testConfig(t)
	c.ListenEtcd = "127.0.0.1:0"
	startNode(t, c).ready()
	other := c
	other.RuntimeDir += "2"
	if err := startNode(t, other).fails(); !errors.Is(err, ErrLocked) {
		t.Errorf("same state directory: %v", err)
	}
	other = c
	other.StateDir += "2"
	if err := startNode(t, other).fails(); !errors.Is(err, api.ErrAnotherDaemon) {
		t.Errorf("same runtime directory: %v", err)
	}
}

func TestRun_PutsItsLeaseBackWhenItIsDeleted(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	r := startNode(t, joinConfig(t, etcd.Endpoint()))
	s := r.ready()
	c, _ := dial(t, etcd.Endpoint())
	key := DefaultEtcdPrefix + "/subnets/" + lease.Key(netip.MustParsePrefix(s.Subnet), netip.Prefix{})
	if ok, _, err := c.Commit(t.Context(), lease.Txn{Key: key, Delete: true}); err != nil || !ok {
		t.Fatal(ok, err)
	}
	r.until("lease back", func(api.Status) bool {
		l := leasesIn(t, etcd.Endpoint())
		return len(l) == 1 && l[0].Subnet.String() == s.Subnet
	})
	if now := r.ready(); now.Subnet != s.Subnet {
		t.Errorf("subnet %s, was %s", now.Subnet, s.Subnet)
	}
}

func TestRun_TakesAnotherSubnetWhenItsOwnIsTaken(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	r := startNode(t, joinConfig(t, etcd.Endpoint()))
	s := r.ready()
	key := DefaultEtcdPrefix + "/subnets/" + lease.Key(netip.MustParsePrefix(s.Subnet), netip.Prefix{})
	put(t, etcd.Endpoint(), key, `{"PublicIP":"192.0.2.7","PublicIPv6":null}`)
	now := r.until("another subnet", func(now api.Status) bool { return now.State == api.StateReady && now.Subnet != s.Subnet })
	env, err := lease.ReadSubnetEnv(filepath.Join(r.c.RuntimeDir, "subnet.env"))
	if err != nil || env.Subnet.String() != now.Subnet {
		t.Errorf("subnet.env %+v, %v", env, err)
	}
	r.until("the taker as a peer", func(now api.Status) bool { return now.Peers == 1 })
	if l := leasesIn(t, etcd.Endpoint()); len(l) != 2 {
		t.Errorf("leases %+v", l)
	}
}

func TestRun_StartsOnTheLastKnownLeasesWhileTheStoreIsAway(t *testing.T) {
	addr, dir := freeAddr(t), t.TempDir()
	etcd := startEtcd(t, dir, addr)
	put(t, etcd.Endpoint(), DefaultEtcdPrefix+"/subnets/10.213.7.0-24", `{"PublicIP":"192.0.2.7","PublicIPv6":null}`)
	c := joinConfig(t, etcd.Endpoint())
	r := startNode(t, c)
	s := r.ready()
	r.until("one peer", func(s api.Status) bool { return s.Peers == 1 })
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	etcd.Close()

	r = startNode(t, c)
	away := r.until("forwarding without the store", func(s api.Status) bool { return s.State == api.StateLeaseLost })
	if away.Subnet != s.Subnet || away.Port != s.Port || away.Peers != 1 || away.Store.Connected {
		t.Errorf("status %+v", away)
	}
	// It has read the config before, and means to write none.
	r.until("its requests are told of", func(s api.Status) bool { return s.Store.Error != "" })
	for range 20 {
		if s, err := r.client.Status(t.Context()); err != nil || strings.Contains(s.Store.Error, "writing") {
			t.Fatalf("%q, %v", s.Store.Error, err)
		}
	}
	startEtcd(t, dir, addr)
	back := r.ready()
	if back.Subnet != s.Subnet || back.Port != s.Port {
		t.Errorf("subnet %s port %d, was %s port %d", back.Subnet, back.Port, s.Subnet, s.Port)
	}
}

func TestRun_KeepsItsStateWhenTheStoreGoesAwayAndComesBack(t *testing.T) {
	addr, dir := freeAddr(t), t.TempDir()
	etcd := startEtcd(t, dir, addr)
	r := startNode(t, joinConfig(t, etcd.Endpoint()))
	s := r.ready()
	etcd.Close()
	away := r.until("store away", func(s api.Status) bool { return !s.Store.Connected })
	if away.State != api.StateReady || away.Subnet != s.Subnet || away.Store.Error == "" {
		t.Errorf("status %+v", away)
	}
	startEtcd(t, dir, addr)
	back := r.until("store back", func(s api.Status) bool { return s.Store.Connected })
	if back.State != api.StateReady || back.Subnet != s.Subnet {
		t.Errorf("status %+v", back)
	}
}

func TestConfig_OfTheNetworkIsReadAndReplaced(t *testing.T) {
	c := testConfig(t)
	c.ListenEtcd = "127.0.0.1:0"
	r := startNode(t, c)
	r.ready()
	raw, err := r.client.Config(t.Context())
	if err != nil || !strings.Contains(string(raw), DefaultNetwork.String()) {
		t.Errorf("%s, %v", raw, err)
	}
	for _, bad := range []string{`{}`, `{"Network":"224.0.0.0/8"}`, `{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"ff00::/8","Backend":{"Type":"vxlan"}}`} {
		if err := r.client.SetConfig(t.Context(), []byte(bad)); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	want := `{"Network":"10.7.0.0/16"}`
	if err := r.client.SetConfig(t.Context(), []byte(want)); err != nil {
		t.Fatal(err)
	}
	if raw, err := r.client.Config(t.Context()); err != nil || string(raw) != want {
		t.Errorf("%s, %v", raw, err)
	}
}

// freeAddr is a loopback address that nobody listens on right now.
func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// syncBuffer is a log that goroutines write and a test reads.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
