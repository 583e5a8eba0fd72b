// flanneld's command line and environment on up.

package main

import (
	"bufio"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rootless-ovl/rootless-ovl/node"
)

// flanneld's flags, as its main.go (v0.28) registers them.
var flagsOfFlanneld = strings.Fields(`
	etcd-endpoints etcd-prefix etcd-keyfile etcd-certfile etcd-cafile etcd-username etcd-password iface iface-regex iface-can-reach
	subnet-file public-ip public-ipv6 subnet-lease-renew-margin ip-masq ip-masq-fully-random-disable kube-subnet-mgr kube-api-url
	kube-annotation-prefix kubeconfig-file version healthz-ip healthz-port iptables-resync iptables-forward-rules ip-blackhole-route
	net-config-path set-node-network-unavailable v vmodule log_backtrace_at`)

// upWith runs up with flags and returns the node's Config and what was logged.
func (b *bench) upWith(args ...string) (node.Config, string) {
	b.t.Helper()
	c := b.withNode(&fakeNode{err: errors.New("enough")})
	if code := b.run(append([]string{"up"}, args...)...); code != 1 {
		b.t.Fatalf("%q: exit status %d, %s", args, code, &b.err)
	}
	return *c, b.err.String()
}

func TestUp_HasEveryFlagOfFlanneld(t *testing.T) {
	a := &app{world: newBench(t).world}
	cmd := a.upCommand()
	for _, name := range flagsOfFlanneld {
		if cmd.Flags().Lookup(name) == nil {
			t.Errorf("up has no --%s", name)
		}
	}
	ours := slices.Clone(flanneldFlags)
	for _, f := range idleFlags {
		ours = append(ours, f.name)
	}
	ours = append(ours, "version") // flanneld looks at it before the environment
	slices.Sort(ours)
	theirs := slices.Sorted(slices.Values(flagsOfFlanneld))
	if diff := cmp.Diff(theirs, ours); diff != "" {
		t.Errorf("flags (-flanneld +ours):\n%s", diff)
	}
}

func TestUp_TakesFlanneldsCommandLine(t *testing.T) {
	b := newBench(t)
	for name, args := range map[string][]string{
		"two dashes": {
			"--etcd-endpoints=https://a:2379,https://b:2379", "--etcd-prefix=/p", "--etcd-keyfile=k", "--etcd-certfile=c", "--etcd-cafile=ca",
			"--etcd-username=u", "--etcd-password=pw", "--iface=eth0", "--iface=eth1", "--iface-regex=^en", "--iface-can-reach=192.0.2.9",
			"--public-ip=198.51.100.1", "--public-ipv6=2001:db8::1", "--subnet-file=/f", "--subnet-lease-renew-margin=30", "--ip-masq", "--healthz-ip=127.0.0.1",
			"--healthz-port=8471", "--v=1",
		},
		"one dash, values apart": {
			"-etcd-endpoints", "https://a:2379,https://b:2379", "-etcd-prefix", "/p", "-etcd-keyfile", "k", "-etcd-certfile", "c",
			"-etcd-cafile", "ca", "-etcd-username", "u", "-etcd-password", "pw", "-iface", "eth0", "-iface", "eth1", "-iface-regex", "^en",
			"-iface-can-reach", "192.0.2.9", "-public-ip", "198.51.100.1", "-public-ipv6", "2001:db8::1", "-subnet-file", "/f", "-subnet-lease-renew-margin", "30", "-ip-masq",
			"-healthz-ip", "127.0.0.1", "-healthz-port", "8471", "-v", "1",
		},
		"one dash, values joined": {
			"-etcd-endpoints=https://a:2379,https://b:2379", "-etcd-prefix=/p", "-etcd-keyfile=k", "-etcd-certfile=c", "-etcd-cafile=ca",
			"-etcd-username=u", "-etcd-password=pw", "-iface=eth0", "-iface=eth1", "-iface-regex=^en", "-iface-can-reach=192.0.2.9",
			"-public-ip=198.51.100.1", "-public-ipv6=2001:db8::1", "-subnet-file=/f", "-subnet-lease-renew-margin=30", "-ip-masq=true", "-healthz-ip=127.0.0.1",
			"-healthz-port=8471", "-v=1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, logged := b.upWith(args...)
			e := c.Etcd
			got := []any{
				e.Endpoints, c.EtcdPrefix, e.KeyFile, e.CertFile, e.CAFile, e.Username, e.Password, c.Iface, c.IfaceRegex, c.IfaceCanReach,
				c.PublicIP.String(), c.PublicIPv6.String(), c.SubnetFile, c.RenewMargin, c.NoIPMasq, c.Healthz.String(), c.Log.Enabled(t.Context(), -4),
			}
			want := []any{
				[]string{"https://a:2379", "https://b:2379"}, "/p", "k", "c", "ca", "u", "pw", []string{"eth0", "eth1"}, []string{"^en"}, "192.0.2.9",
				"198.51.100.1", "2001:db8::1", "/f", 30 * time.Minute, false, "127.0.0.1:8471", true,
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if strings.Contains(logged, "pw") || strings.Contains(logged, "no effect") {
				t.Errorf("logged %s", logged)
			}
		})
	}
}

func TestUp_TakesItsOwnFlagsWithOneDashToo(t *testing.T) {
	b := newBench(t)
	c := b.withNode(&fakeNode{err: errors.New("enough")})
	b.run("-o", "json", "up", "-runtime-dir", "/r", "-state-dir=/s", "-ephemeral", "-network", "10.9.0.0/16")
	if c.RuntimeDir != "/r" || c.StateDir != "/s" || !c.Ephemeral || c.Network != netip.MustParsePrefix("10.9.0.0/16") {
		t.Errorf("%+v", c)
	}
	if out := b.must("up", "-help"); !strings.Contains(out, "--etcd-endpoints") || strings.Contains(out, "kube-subnet-mgr") {
		t.Errorf("-help: %s", out)
	}
	if out := b.must("up", "-version"); out != thisBuild().line() {
		t.Errorf("-version: %q", out)
	}
}

func TestUp_NamesVariablesThatStandForNoFlag(t *testing.T) {
	b := newBench(t)
	t.Setenv("FLANNELD_IFACE", "eth0")
	t.Setenv("FLANNELD_VERSION", "true")
	t.Setenv("FLANNELD_KUBE_SUBNET_MGR", "false")
	t.Setenv("FLANNELD_EMPTY", "")
	if _, logged := b.upWith(); strings.Contains(logged, "misspelt") {
		t.Errorf("logged %s", logged)
	}
	t.Setenv("FLANNELD_FOO", "1")
	t.Setenv("FLANNELD_ETCD_ENDPOINT", "http://a:2379")
	_, logged := b.upWith()
	if strings.Count(logged, "level=WARN") != 1 || !strings.Contains(logged, "variables=FLANNELD_ETCD_ENDPOINT,FLANNELD_FOO\n") {
		t.Errorf("logged %s", logged)
	}
}

func TestDoubleDashes_LeaveEverythingElse(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"-iface eth0 -v 2 -v=2 -v2", "--iface eth0 -v 2 -v=2 -v2"},
		{"-o json -ojson -o=json", "-o json -ojson -o=json"},
		{"-o -iface", "-o -iface"},
		{"-subnet-file -iface -iface x", "--subnet-file -iface --iface x"},
		{"--subnet-file -iface -iface x", "--subnet-file -iface --iface x"},
		{"-ip-masq -iface x", "--ip-masq --iface x"},
		{"-kube-subnet-mgr -iface x", "--kube-subnet-mgr --iface x"},
		{"-vmodule=a=2 -log_backtrace_at a:1", "--vmodule=a=2 --log_backtrace_at a:1"},
		{"-nonsense -iface", "-nonsense --iface"},
		{"-- -iface x", "-- -iface x"},
		{"- -= --", "- -= --"},
		{"eth0 ---iface", "eth0 ---iface"},
	} {
		a := &app{world: newBench(t).world, output: choice{of: []string{outputJSON}}}
		cmd, _, err := a.root().Find([]string{upName})
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(doubleDashes(cmd, strings.Fields(tt.args)), " "); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.args, got, tt.want)
		}
	}
}

func TestUp_RefusesFlagsThatFlanneldDoesNotHave(t *testing.T) {
	b := newBench(t)
	for _, args := range []string{"-listen=:8080", "--remote=x", "-etcd-endpoint=http://a:2379"} {
		code := b.run("up", args)
		b.checkError(code, 2, "unknown", "rootless-ovl up --help")
	}
}

func TestUp_NamesWhatHasNoEffectOnce(t *testing.T) {
	b := newBench(t)
	_, logged := b.upWith("-kube-subnet-mgr", "-kube-api-url=", "-kubeconfig-file=/k", "-iptables-resync=5", "-iptables-forward-rules=false",
		"-ip-blackhole-route")
	want := "--kube-subnet-mgr, --kubeconfig-file: " + noKubernetes + "; --iptables-resync, --ip-blackhole-route: " + noFirewall
	if strings.Count(logged, "level=WARN") != 1 || !strings.Contains(logged, want) {
		t.Errorf("logged %s\nwant once %s", logged, want)
	}
	if _, logged := b.upWith("-iptables-forward-rules=false", "-ip-masq"); strings.Contains(logged, "level=WARN") {
		t.Errorf("a warning of what happens anyway: %s", logged)
	}
}

func TestUp_TakesFlanneldsEnvironment(t *testing.T) {
	b := newBench(t)
	for name, value := range map[string]string{
		"FLANNELD_ETCD_ENDPOINTS": "http://a:2379,http://b:2379", "FLANNELD_ETCD_USERNAME": "u", "FLANNELD_ETCD_PASSWORD": "hunter2",
		"FLANNELD_IFACE": "eth7", "FLANNELD_HEALTHZ_PORT": "8471", "FLANNELD_IP_MASQ": "false", "FLANNELD_PUBLIC_IP": "198.51.100.1",
		"FLANNELD_IPTABLES_RESYNC": "7", "FLANNELD_VERSION": "true", "FLANNELD_SUBNET_FILE": "",
	} {
		t.Setenv(name, value)
	}
	c, logged := b.upWith("-iface", "eth0")
	if !slices.Equal(c.Etcd.Endpoints, []string{"http://a:2379", "http://b:2379"}) || c.Etcd.Username != "u" || c.Etcd.Password != "hunter2" ||
		c.Healthz.Port() != 8471 || !c.NoIPMasq || c.PublicIP.String() != "198.51.100.1" || c.SubnetFile != "" {
		t.Errorf("config %+v", c)
	}
	if !slices.Equal(c.Iface, []string{"eth0"}) {
		t.Errorf("interfaces %q: the flag goes before the environment", c.Iface)
	}
	if strings.Contains(logged, "hunter2") || !strings.Contains(logged, "FLANNELD_ETCD_PASSWORD") || !strings.Contains(logged, "--iptables-resync") {
		t.Errorf("logged %s", logged)
	}
	t.Setenv(envEtcdPassword, "ours")
	if c, _ := b.upWith(); c.Etcd.Password != "ours" {
		t.Errorf("password %q: our variable goes before flanneld's", c.Etcd.Password)
	}
	if c, _ := b.upWith("--etcd-password", "flag"); c.Etcd.Password != "flag" {
		t.Errorf("password %q: the flag goes before the environment", c.Etcd.Password)
	}
}

func TestUp_NamesTheVariableThatIsWrong(t *testing.T) {
	b := newBench(t)
	t.Setenv("FLANNELD_HEALTHZ_PORT", "http")
	code := b.run("up")
	b.checkError(code, 2, "FLANNELD_HEALTHZ_PORT", "http")
	t.Setenv("FLANNELD_HEALTHZ_PORT", "70000")
	code = b.run("up")
	b.checkError(code, 2, "FLANNELD_HEALTHZ_PORT", "70000")
}

func TestUp_ReadsTheNetworkConfigFromAFile(t *testing.T) {
	b := newBench(t)
	file := filepath.Join(t.TempDir(), "net-conf.json")
	const config = `{"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}`
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, _ := b.upWith("-net-config-path", file); string(c.NetConfig) != config {
		t.Errorf("%s", c.NetConfig)
	}
	if err := os.WriteFile(file, []byte(`{"Network": "10.5.0.0/29"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	code := b.run("up", "-net-config-path", file)
	b.checkError(code, 2, file, "/28")
	code = b.run("up", "-net-config-path", file+".not")
	b.checkError(code, 1, "--net-config-path", file+".not")
}

func TestUp_LogsMoreWhenFlanneldWould(t *testing.T) {
	b := newBench(t)
	for args, debug := range map[string]bool{"": false, "-v=0": false, "-v=1": true, "-v 4": true, "-v=4 --log-level info": false} {
		if c, _ := b.upWith(strings.Fields(args)...); c.Log.Enabled(t.Context(), -4) != debug {
			t.Errorf("%q: debug %t", args, !debug)
		}
	}
}

// The page for people who come from flanneld has a row for each of its flags.
func TestDocs_HaveEveryFlagOfFlanneld(t *testing.T) {
	f, err := os.Open("../../docs/flannel.md")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	first := regexp.MustCompile("`--([a-z0-9_-]+)`")
	var rows []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if !strings.HasPrefix(lines.Text(), "| `--") {
			continue
		}
		cell := strings.Split(lines.Text(), "|")[1]
		for _, m := range first.FindAllStringSubmatch(cell, -1) {
			rows = append(rows, m[1])
		}
	}
	slices.Sort(rows)
	if diff := cmp.Diff(slices.Sorted(slices.Values(flagsOfFlanneld)), rows); diff != "" {
		t.Errorf("rows of docs/flannel.md (-flanneld +page):\n%s", diff)
	}
}
