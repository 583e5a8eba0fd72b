// up: flags become a node.Config, wrong ones an error; signals stop the node.

package main

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/node"
)

// withNode has up run n, and returns where it will note the Config.
func (b *bench) withNode(n nodeRunner) *node.Config {
	c := new(node.Config)
	b.world.newNode = func(given node.Config) (nodeRunner, error) {
		*c = given
		return n, nil
	}
	return c
}

func TestUp_TurnsFlagsIntoAConfig(t *testing.T) {
	b := newBench(t)
	stopped := errors.New("stopped by the test")
	tests := []struct {
		name string
		args []string
		want node.Config
	}{
		{"defaults", nil, node.Config{
			EtcdPrefix: "/coreos.com/network", ListenEtcd: "127.0.0.1:2379", Port: node.PortFromConfig,
			StateDir: "/s", RuntimeDir: b.dir,
		}},
		{"embedded", []string{"--listen-etcd", "http://192.0.2.1:2379", "--network", "10.9.0.0/20", "--allow-overlap"}, node.Config{
			EtcdPrefix: "/coreos.com/network", ListenEtcd: "192.0.2.1:2379", Port: node.PortFromConfig,
			Network: netip.MustParsePrefix("10.9.0.0/20"), NetworkSet: true, AllowOverlap: true,
			StateDir: "/s", RuntimeDir: b.dir,
		}},
		{"everything", []string{
			"--etcd-endpoints", "https://a:2379,https://b:2379", "--etcd-endpoints=https://c:2379", "--etcd-prefix", "/p",
			"--etcd-cafile", "ca", "--etcd-certfile", "cert", "--etcd-keyfile", "key", "--etcd-username", "u", "--etcd-password", "pw",
			"--iface", "eth0", "--iface", "192.0.2.1", "--iface-regex", "^eth[0-9]{1,2}$", "--iface-can-reach", "192.0.2.9", "--public-ip", "198.51.100.1",
			"--public-ipv6", "2001:db8::1",
			"--port", "0", "--ephemeral", "--lease-ttl", "10m", "--subnet-file", "/f", "--host-loopback", "--allow-link-local",
			"--outbound-addr", "192.0.2.2,2001:db8::2", "--outbound-if", "eth1",
			"--subnet-lease-renew-margin", "5", "--ip-masq=false", "--healthz-ip", "192.0.2.1", "--healthz-port", "8471", "--proxy", "1080",
			"--runtime-dir", "/r", "--state-dir", "/t",
		}, node.Config{
			Etcd: lease.ClientConfig{
				Endpoints: []string{"https://a:2379", "https://b:2379", "https://c:2379"},
				CAFile:    "ca", CertFile: "cert", KeyFile: "key", Username: "u", Password: "pw",
			},
			EtcdPrefix: "/p", ListenEtcd: "127.0.0.1:2379",
			Iface: []string{"eth0", "192.0.2.1"}, IfaceRegex: []string{"^eth[0-9]{1,2}$"}, IfaceCanReach: "192.0.2.9",
			PublicIP: netip.MustParseAddr("198.51.100.1"), PublicIPv6: netip.MustParseAddr("2001:db8::1"), Port: node.PortAny, Ephemeral: true, LeaseTTL: 10 * time.Minute,
			RenewMargin: 5 * time.Minute, NoIPMasq: true, Healthz: netip.MustParseAddrPort("192.0.2.1:8471"),
			OutboundAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")}, OutboundIf: "eth1",
			SubnetFile: "/f", Proxy: netip.MustParseAddrPort("127.0.0.1:1080"), HostLoopback: true, LinkLocal: true, StateDir: "/t", RuntimeDir: "/r",
		}},
	}
	t.Setenv(envStateDir, "/s")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := b.withNode(&fakeNode{err: stopped})
			code := b.run(append([]string{"up"}, tt.args...)...)
			b.checkError(code, 1, stopped.Error())
			if diff := cmp.Diff(tt.want, *got, cmpopts.IgnoreFields(node.Config{}, "Log", "Version", "Beside", "Sandbox"),
				cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
				cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("config (-want +got):\n%s", diff)
			}
			if got.Log == nil || got.Version == "" {
				t.Errorf("log %v, version %q", got.Log, got.Version)
			}
		})
	}
}

func TestUp_TakesThePasswordFromTheEnvironment(t *testing.T) {
	b := newBench(t)
	t.Setenv(envEtcdPassword, "secret")
	c := b.withNode(&fakeNode{err: errors.New("enough")})
	b.run("up", "--etcd-endpoints", "http://a:2379", "--etcd-username", "u")
	if c.Etcd.Password != "secret" {
		t.Errorf("password %q", c.Etcd.Password)
	}
	b.run("up", "--etcd-endpoints", "http://a:2379")
	if c.Etcd.Password != "" {
		t.Errorf("password %q without a user", c.Etcd.Password)
	}
}

func TestUp_RefusesFlagsThatCannotBeRight(t *testing.T) {
	tests := []struct {
		args string
		says string
	}{
		{"now", `"now"`},
		{"--etcd-endpoints http://a:2379 --listen-etcd 127.0.0.1:1", "give one of the two"},
		{"--listen-etcd 2379", "host:port"},
		{"--proxy web", `--proxy "web" is not a port`},
		{"--proxy :1080", "--proxy"},
		{"--proxy example.com:1080", "example.com"},
		{"--listen-etcd :2379", "host:port"},
		{"--listen-etcd a:b", "host:port"},
		{"--listen-etcd a:99999", "host:port"},
		{"--listen-etcd https://a:2379", "host:port"},
		{"--etcd-endpoints https://a --etcd-certfile c", "--etcd-keyfile"},
		{"--etcd-endpoints https://a --etcd-username u", envEtcdPassword},
		{"--etcd-endpoints https://a --etcd-password p", "--etcd-username"},
		{"--etcd-cafile ca", "--etcd-endpoints"},
		{"--network 10.0.0.0", "--network"},
		{"--network fd00::/64", "IPv4"},
		{"--network 10.1.2.3/16", "10.1.0.0/16?"},
		{"--network=", "--network is empty"},
		{"--etcd-endpoints=", "--etcd-endpoints is empty"},
		{"--etcd-endpoints http://a:2379,,http://b:2379", `""`},
		{"--etcd-endpoints ftp://x", "ftp://x"},
		{"--etcd-endpoints http://", "http://"},
		{"--iface-regex [", "--iface-regex"},
		{"--iface-can-reach foo", "--iface-can-reach"},
		{"--public-ip host", "--public-ip"},
		{"--public-ip fd00::1", "IPv4"},
		{"--public-ipv6 192.0.2.1", "IPv6"},
		{"--public-ipv6 ::ffff:192.0.2.1", "IPv6"},
		{"--public-ipv6 fe80::1%eth0", "IPv6"},
		{"--port 65536", "65536"},
		{"--port -1", "-1"},
		{"--port http", "--port"},
		{"--lease-ttl 1s", "5s"},
		{"--lease-ttl 60", "--lease-ttl"},
		{"--subnet-lease-renew-margin 0", "1439"},
		{"--subnet-lease-renew-margin 1440", "1439"},
		{"--healthz-port 65536", "65536"},
		{"--healthz-port -1", "-1"},
		{"--healthz-ip localhost --healthz-port 1", "--healthz-ip"},
		{"--net-config-path f --network 10.5.0.0/16", "give one of the two"},
		{"--net-config-path /dev/null", "/dev/null"},
		{"--ip-masq maybe", `"maybe"`},
		{"--ip-masq=maybe", "--ip-masq"},
		{"--kube-subnet-mgr=maybe", "true or false"},
		{"--etcd-endpoints http://u:hunter2@a:2379", "--etcd-username"},
		{"--outbound-addr eth0", "--outbound-addr"},
		{"--outbound-if=", "--outbound-if is empty"},
		{"-v loud", "loud"},
		{"--subnet-lease-renew-margin 60m", `--subnet-lease-renew-margin: "60m" is not a number of minutes`},
		{"--public-ip junk", `--public-ip: "junk" is not an IP address`},
		{"--network junk", `--network: "junk" is not a network in CIDR form`},
		{"--port http", `"http" is not a number`},
		{"--port 99999999999999999999", "is not a number"},
		{"--lease-ttl 60", `"60" is not a time with its unit`},
		{"--ephemeral=perhaps", `"perhaps" is not true or false`},
		{"-logtostderr", "unknown flag: -logtostderr"},
		{"-alsologtostderr=true", "unknown flag: -alsologtostderr=true"},
		{"--log-level loud", "debug or info or warn or error"},
		{"--log-format xml", "text or json"},
	}
	b := newBench(t)
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			code := b.run(append([]string{"up"}, strings.Fields(tt.args)...)...)
			b.checkError(code, 2, tt.says)
			for _, word := range []string{"strconv", "ParsePrefix", "ParseAddr", "netip", "parsing", "invalid syntax"} {
				if strings.Contains(b.err.String(), word) && !strings.Contains(tt.says, "regex") {
					t.Errorf("it speaks of Go: %s", &b.err)
				}
			}
		})
	}
}

func TestUp_ResolvesDirectoriesAgainstTheWorkingDirectory(t *testing.T) {
	b := newBench(t)
	t.Chdir(t.TempDir())
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(envRuntimeDir, "relative")
	t.Setenv(envStateDir, "./state")
	c := b.withNode(&fakeNode{err: errors.New("enough")})
	b.run("up")
	if c.RuntimeDir != here+"/relative" || c.StateDir != here+"/state" {
		t.Errorf("in %s: %s and %s", here, c.RuntimeDir, c.StateDir)
	}
}

func TestUp_RefusesWhatTheNodeRefuses(t *testing.T) {
	b := newBench(t)
	b.world.newNode = func(node.Config) (nodeRunner, error) { return nil, errors.New("these do not go together") }
	code := b.run("up")
	b.checkError(code, 2, "these do not go together")
}

func TestUp_StopsInOrderOnASignal(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		b := newBench(t)
		n := &fakeNode{running: make(chan struct{})}
		b.withNode(n)
		code := make(chan int, 1)
		go func() { code <- b.run("up") }()
		<-n.running
		if err := syscall.Kill(syscall.Getpid(), sig); err != nil {
			t.Fatal(err)
		}
		if got := <-code; got != 0 || b.err.Len() != 0 {
			t.Errorf("%v: exit status %d, %q", sig, got, &b.err)
		}
	}
}

func TestUp_LogsAsAskedFor(t *testing.T) {
	tests := []struct {
		args []string
		json bool
		info bool
	}{
		{nil, false, true},
		{[]string{"-o", "json"}, true, true},
		{[]string{"--log-format", "json", "--log-level", "warn"}, true, false},
		{[]string{"-o", "json", "--log-format", "text"}, false, true},
	}
	for _, tt := range tests {
		b := newBench(t)
		c := b.withNode(&fakeNode{err: errors.New("enough")})
		b.run(append([]string{"up"}, tt.args...)...)
		if b.out.Len() != 0 {
			t.Errorf("%q: standard output %q", tt.args, &b.out)
		}
		b.err.Reset()
		c.Log.Info("hello", slog.Int("n", 1))
		got := b.err.String()
		if (got != "") != tt.info || strings.HasPrefix(got, "{") != (tt.json && tt.info) {
			t.Errorf("%q: logged %q", tt.args, got)
		}
	}
}
