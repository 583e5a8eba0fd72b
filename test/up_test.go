// Tests of up and of the commands that only look: status, peers, config, doctor, version.

package test

import (
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestUp_WritesSubnetEnv(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	d := upEmbedded(l.Host(1))
	st := d.Status()
	subnet := mustPrefix(t, st.Subnet)
	want := "FLANNEL_NETWORK=" + network.String() + "\nFLANNEL_SUBNET=" + netip.PrefixFrom(subnet.Addr().Next(), subnet.Bits()).String() +
		"\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ="
	path := filepath.Join(d.RuntimeDir, "subnet.env")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if rest, ok := strings.CutPrefix(string(b), want); !ok || rest != "true\n" && rest != "false\n" {
		t.Errorf("subnet.env is\n%s\nwant\n%strue or false", b, want)
	}
	for path, mode := range map[string]os.FileMode{path: 0o644, d.RuntimeDir: 0o700, d.Socket(): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, %v; want %v", path, info.Mode(), err, mode)
		}
	}
}

func TestUp_TellsSystemd(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	path := filepath.Join(h.Dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	d := h.UpEnv([]string{"NOTIFY_SOCKET=" + path}, "--listen-etcd", h.Addr.String()+":2379")
	next := func() string {
		buf := make([]byte, 4096)
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("nothing was told: %v", err)
		}
		return string(buf[:n])
	}
	for got := next(); !strings.Contains(got, "READY=1"); got = next() {
	}
	if _, err := os.Stat(filepath.Join(d.RuntimeDir, "subnet.env")); err != nil {
		t.Errorf("READY was told without subnet.env: %v", err)
	}
	if code := d.Stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM", code)
	}
	for got := next(); !strings.Contains(got, "STOPPING=1"); got = next() {
	}
}

func TestUp_UsesItsDefaultNetwork(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	d := l.Host(1).Up()
	st := d.Status()
	if n := mustPrefix(t, st.Network); !n.Overlaps(mustPrefix(t, st.Subnet)) || !st.Store.Embedded || st.Backend != "udp" {
		t.Errorf("status %+v", st)
	}
	if _, err := l.Outside.DialContext(t.Context(), "tcp", l.Host(1).Addr.String()+":2379"); err == nil {
		t.Error("the embedded etcd listens on the LAN without being told to")
	}
}

func TestUp_TwoNodesOnOneMachine(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d1 := upEmbedded(h)
	other := func(name string) []string {
		return []string{"--runtime-dir", filepath.Join(h.Dir, name, "run"), "--state-dir", filepath.Join(h.Dir, name, "state")}
	}
	d2 := h.Up(append(other("second"), "--etcd-endpoints", etcdURL(h), "--port", "0")...)
	waitPeers(t, 1, d1, d2)
	a := join(t, h, "a")
	b := &member{Container: h.Container("b")}
	h.CLIJSON(&b.at, append(other("second"), "attach", pid(b.Container))...)
	b.read(t)
	b.HTTPServer(t, port(b.addr, 80))
	pings(t, a.Space, b.addr)
	if err := a.Download(port(b.addr, 80), 5<<20); err != nil {
		t.Error(err)
	}
	// A third with the directories of the second must not disturb it.
	third := h.UpNoWait(append(other("second"), "--etcd-endpoints", etcdURL(h), "--port", "0")...)
	if code := third.Wait(); code <= 0 {
		t.Errorf("a second daemon with the same directories: exit code %d", code)
	}
	pings(t, a.Space, b.addr)
	if d2.Status().Attachments != 1 {
		t.Errorf("the second node was disturbed: %+v", d2.Status())
	}
}

func TestUp_RestartKeepsTheSubnet(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	before := s.d2.Status()
	s.d2.Stop()
	s.d2 = s.h2.Up("--etcd-endpoints", etcdURL(s.h1))
	if after := s.d2.Status(); after.Subnet != before.Subnet || after.NodeID != before.NodeID {
		t.Errorf("%s of %s became %s of %s", before.Subnet, before.NodeID, after.Subnet, after.NodeID)
	}
}

func TestUp_EphemeralGivesItsSubnetBack(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	d1 := upEmbedded(l.Host(1))
	d2 := l.Host(2).Up("--etcd-endpoints", etcdURL(l.Host(1)), "--ephemeral")
	waitPeers(t, 1, d1)
	if !d2.Status().Ephemeral {
		t.Errorf("status %+v", d2.Status())
	}
	d2.Stop()
	waitPeers(t, 0, d1)
}

func TestUp_PortOfItsOwn(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	d1 := upEmbedded(l.Host(1), "--port", "20001")
	d2 := l.Host(2).Up("--etcd-endpoints", etcdURL(l.Host(1)), "--port", "0")
	waitPeers(t, 1, d1, d2)
	if p1, p2 := d1.Status().Port, d2.Status().Port; p1 != 20001 || p2 == 0 || p2 == 8285 {
		t.Errorf("ports %d and %d", p1, p2)
	}
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	pings(t, a.Space, b.addr)
	pings(t, b.Space, a.addr)
}

func TestUp_ChoosesTheExternalInterface(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{nil, {"--iface", "lan0"}, {"--iface", "192.0.2.11"}, {"--iface-regex", "^lan"}, {"--iface-can-reach", "192.0.2.1"}, {"--public-ip", "192.0.2.11"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			l := lab.New(t, 1)
			d := upEmbedded(l.Host(1), args...)
			if st := d.Status(); st.PublicIP != l.Host(1).Addr.String() || st.Interface != "lan0" {
				t.Errorf("chose %s on %s", st.PublicIP, st.Interface)
			}
		})
	}
}

func TestUp_BadInput(t *testing.T) {
	t.Parallel()
	listen := func(h *lab.Host) string { return h.Addr.String() + ":2379" }
	for _, c := range []struct {
		name  string
		args  func(t *testing.T, h *lab.Host) []string
		words []string
	}{
		{"underlay port taken", func(t *testing.T, h *lab.Host) []string {
			h.UDPEcho(t, port(h.Addr, 8285))
			return []string{"--listen-etcd", listen(h)}
		}, []string{"8285", "--port"}},
		{"etcd port taken", func(t *testing.T, h *lab.Host) []string {
			h.HTTPServer(t, port(h.Addr, 2379))
			return []string{"--listen-etcd", listen(h)}
		}, []string{"2379", "--listen-etcd"}},
		{"network overlaps a route", func(_ *testing.T, h *lab.Host) []string {
			return []string{"--listen-etcd", listen(h), "--network", "192.0.2.0/23"}
		}, []string{"192.0.2.0/23", "overlap"}},
		{"network of an address of ours", func(_ *testing.T, h *lab.Host) []string {
			return []string{"--listen-etcd", listen(h), "--network", "192.0.0.0/16"}
		}, []string{"192.0.0.0/16", "192.0.0.8"}},
		{"network overlaps a resolver", func(_ *testing.T, h *lab.Host) []string {
			h.SetResolvConf("nameserver 10.66.0.53\n")
			return []string{"--listen-etcd", listen(h), "--network", network.String()}
		}, []string{"10.66.0.53", "overlap"}},
		{"network too small", func(_ *testing.T, h *lab.Host) []string {
			return []string{"--listen-etcd", listen(h), "--network", "10.66.0.0/30"}
		}, []string{"small"}},
		{"no network", func(_ *testing.T, h *lab.Host) []string { return []string{"--network", "10.66.0.0"} }, []string{"10.66.0.0"}},
		{"no such interface", func(_ *testing.T, h *lab.Host) []string { return []string{"--iface", "eth9"} }, []string{"eth9"}},
		{"public IP that is not here", func(_ *testing.T, h *lab.Host) []string { return []string{"--public-ip", "198.51.100.7"} }, []string{"198.51.100.7"}},
		{"certificate without key", func(_ *testing.T, h *lab.Host) []string {
			return []string{"--etcd-endpoints", "https://127.0.0.1:1", "--etcd-certfile", "x.pem"}
		}, []string{"--etcd-keyfile"}},
		{"certificate file missing", func(_ *testing.T, h *lab.Host) []string {
			return []string{"--etcd-endpoints", "https://127.0.0.1:1", "--etcd-cafile", "/nowhere/ca.pem"}
		}, []string{"/nowhere/ca.pem"}},
		{"unknown flag", func(_ *testing.T, h *lab.Host) []string { return []string{"--no-such-flag"} }, []string{"--no-such-flag"}},
		{"argument", func(_ *testing.T, h *lab.Host) []string { return []string{"something"} }, []string{"something"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := lab.New(t, 1).Host(1)
			upRefused(t, h, c.args(t, h), c.words...)
		})
	}
}

func TestUp_OverlapIsAllowedWhenTold(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	l.Host(1).SetResolvConf("nameserver 10.66.0.53\n")
	upEmbedded(l.Host(1), "--allow-overlap")
}

func TestUp_LeavesAStaleSocketBehindNothing(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	d.Kill() // the socket stays
	if _, err := os.Stat(d.Socket()); err != nil {
		t.Fatalf("no socket after a crash, so this tests nothing: %v", err)
	}
	refused(t, h.CLI("status"), "rootless-ovl up")
	upEmbedded(h)
	if r := h.CLI("status"); r.Code != 0 {
		t.Errorf("status: exit code %d: %s", r.Code, r.Stderr)
	}
}

func TestCommands_SayThatNoDaemonRuns(t *testing.T) {
	t.Parallel()
	h := lab.New(t, 1).Host(1)
	for _, args := range [][]string{{"status"}, {"ps"}, {"peers"}, {"attach", "1"}, {"detach", "x"}, {"config", "get"}} {
		t.Run(args[0], func(t *testing.T) { refused(t, h.CLI(args...), "rootless-ovl up") })
	}
}

func TestCommands_SpeakJSON(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := join(t, s.h1, "a")
	var status, version, config map[string]any
	var ps, peers []map[string]any
	s.h1.CLIJSON(&status, "status")
	s.h1.CLIJSON(&ps, "ps")
	s.h1.CLIJSON(&peers, "peers")
	s.h1.CLIJSON(&version, "version")
	s.h1.CLIJSON(&config, "config", "get")
	has := func(what string, got map[string]any, fields ...string) {
		t.Helper()
		for _, f := range fields {
			if _, ok := got[f]; !ok {
				t.Errorf("%s has no field %q: %v", what, f, got)
			}
		}
	}
	has("status", status, "version", "state", "pid", "node_id", "public_ip", "interface", "port", "subnet", "network", "gateway", "backend",
		"mtu", "ephemeral", "store", "attachments", "peers", "counters")
	if len(ps) != 1 || len(peers) != 1 {
		t.Fatalf("ps %v, peers %v", ps, peers)
	}
	has("ps", ps[0], "name", "pid", "ifname", "addr", "mac", "gateway", "mtu", "since")
	has("peers", peers[0], "subnet", "public_ip", "port", "mtu", "node_id", "stock", "backend")
	has("version", version, "version")
	has("config", config, "Network")
	if ps[0]["addr"] != a.at.Addr || peers[0]["public_ip"] != s.h2.Addr.String() || config["Network"] != network.String() {
		t.Errorf("ps %v, peers %v, config %v", ps, peers, config)
	}
	// People get tables with the same facts.
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"ps"}, a.addr.String()},
		{[]string{"status"}, s.d1.Status().Subnet},
		{[]string{"peers"}, s.h2.Addr.String()},
		{[]string{"version"}, version["version"].(string)},
		{[]string{"config", "get"}, network.String()},
	} {
		if r := s.h1.CLI(c.args...); r.Code != 0 || !strings.Contains(r.Stdout, c.want) {
			t.Errorf("%v: exit code %d, want %q in\n%s%s", c.args, r.Code, c.want, r.Stdout, r.Stderr)
		}
	}
	// Errors too.
	r := s.h1.CLI("detach", "nobody", "--output", "json")
	var e map[string]any
	if err := json.Unmarshal([]byte(r.Stdout), &e); err != nil || r.Code == 0 || e["error"] == nil || e["code"] != "not-found" {
		t.Errorf("error as JSON: exit code %d, %q, %v", r.Code, r.Stdout, err)
	}
}

func TestCommands_ConfigSet(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	upEmbedded(h)
	good := `{"Network":"10.99.0.0/16","Backend":{"Type":"udp","Port":9999}}`
	if r := h.CLI("config", "set", good); r.Code != 0 {
		t.Fatalf("exit code %d: %s", r.Code, r.Stderr)
	}
	var config map[string]any
	h.CLIJSON(&config, "config", "get")
	if config["Network"] != "10.99.0.0/16" {
		t.Errorf("config is now %v", config)
	}
	for _, bad := range []string{`{`, `[]`, `{}`, `{"Network":"x"}`, `{"Network":"10.0.0.0/30"}`, `{"Network":"224.0.0.0/8"}`} {
		if r := h.CLI("config", "set", bad); r.Code == 0 {
			t.Errorf("config %s was taken", bad)
		}
	}
	h.CLIJSON(&config, "config", "get")
	if config["Network"] != "10.99.0.0/16" {
		t.Errorf("a refused config changed the store: %v", config)
	}
	// flannel takes it, so it is written; but not without a word.
	r := h.CLI("config", "set", `{"Network":"10.98.0.0/16","Backend":{"Type":"udp","Port":70000}}`)
	if r.Code != 0 || !strings.Contains(r.Stderr, "70000") {
		t.Errorf("exit code %d: %s", r.Code, r.Stderr)
	}
	h.CLIJSON(&config, "config", "get")
	if config["Network"] != "10.98.0.0/16" {
		t.Errorf("config is now %v", config)
	}
}

func TestCommands_Doctor(t *testing.T) {
	t.Parallel()
	h := lab.New(t, 1, lab.WithoutPing).Host(1)
	look := func() string {
		t.Helper()
		r := h.CLI("doctor")
		for _, word := range []string{"/dev/net/tun", "ping_group_range"} {
			if !strings.Contains(r.Stdout, word) {
				t.Errorf("exit code %d, doctor does not speak of %s:\n%s%s", r.Code, word, r.Stdout, r.Stderr)
			}
		}
		return r.Stdout
	}
	without := look()
	upEmbedded(h)
	if with := look(); with == without {
		t.Errorf("doctor says the same with and without a daemon:\n%s", with)
	}
	var checks any
	j := h.CLI("doctor", "--output", "json")
	if err := json.Unmarshal([]byte(j.Stdout), &checks); err != nil {
		t.Errorf("doctor --output json: %v\n%s", err, j.Stdout)
	}
}

func TestCommands_Completion(t *testing.T) {
	t.Parallel()
	h := lab.New(t, 1).Host(1)
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := h.CLI("completion", shell); r.Code != 0 || len(r.Stdout) < 100 {
			t.Errorf("%s: exit code %d, %d bytes", shell, r.Code, len(r.Stdout))
		}
	}
}
