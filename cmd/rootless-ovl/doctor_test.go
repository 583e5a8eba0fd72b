// doctor: what it is told to look at, and how it says what it found.

package main

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/rootless-ovl/rootless-ovl/engine/install"
	"github.com/rootless-ovl/rootless-ovl/internal/doctor"
	"github.com/rootless-ovl/rootless-ovl/node"
)

// withChecks has doctor find these, and returns where it will note the Options.
func (b *bench) withChecks(checks ...doctor.Check) *doctor.Options {
	o := new(doctor.Options)
	b.world.diagnose = func(_ context.Context, given doctor.Options) []doctor.Check {
		*o = given
		return checks
	}
	return o
}

func TestDoctor_PrintsTheTableThenTheRemedies(t *testing.T) {
	b := newBench(t)
	b.withChecks(
		doctor.Check{ID: "tun", Title: "/dev/net/tun can be opened", Status: doctor.Fail, Detail: "permission denied", Remedy: "as root:\n  chmod 666 /dev/net/tun"},
		doctor.Check{ID: "rmem_max", Title: "buffers", Status: doctor.Warn, Detail: "212992 bytes", Remedy: "sysctl -w net.core.rmem_max=4194304"},
		doctor.Check{ID: "clock", Title: "the clock is right", Status: doctor.Skipped, Detail: "not asked for"},
		doctor.Check{ID: "x", Title: "all else", Status: doctor.OK},
	)
	if code := b.run("doctor"); code != 1 || b.err.Len() != 0 {
		t.Errorf("exit status %d, %q", code, &b.err)
	}
	want := `STATUS   CHECK                       FOUND
fail     /dev/net/tun can be opened  permission denied
warn     buffers                     212992 bytes
skipped  the clock is right          not asked for
ok       all else                    -

fail: /dev/net/tun can be opened
    as root:
      chmod 666 /dev/net/tun

warn: buffers
    sysctl -w net.core.rmem_max=4194304

1 ok, 1 warn, 1 fail, 1 skipped
`
	if got := b.out.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if code := b.run("doctor", "-o", "json"); code != 1 {
		t.Errorf("as JSON: exit status %d", code)
	}
	if got := strings.Join(jsonNames(t, b.out.String()), " "); got != "detail id remedy status title" {
		t.Errorf("names %s", got)
	}
}

func TestDoctor_SucceedsWithWarnings(t *testing.T) {
	b := newBench(t)
	b.withChecks(doctor.Check{ID: "x", Title: "x", Status: doctor.Warn, Remedy: "y"})
	b.must("doctor")
}

func TestDoctor_LooksAtWhatFlagsOrTheDaemonName(t *testing.T) {
	peers := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.9:18285"), netip.MustParseAddrPort("192.0.2.12:8285")}
	network := netip.MustParsePrefix("10.213.0.0/16")
	tests := []struct {
		name  string
		serve bool
		https bool
		args  []string
		want  doctor.Options
	}{
		{"no daemon", false, false, nil, doctor.Options{Network: node.DefaultNetwork}},
		{"a daemon", true, false, nil, doctor.Options{Network: network, Endpoints: []string{"http://127.0.0.1:2379"}, Peers: peers}},
		{"a store with TLS", true, true, nil, doctor.Options{Network: network, Peers: peers}},
		{"flags", true, true, []string{"--network", "10.5.0.0/16", "--etcd-endpoints", "https://a,https://b"},
			doctor.Options{Network: netip.MustParsePrefix("10.5.0.0/16"), Endpoints: []string{"https://a", "https://b"}, Peers: peers}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			if tt.serve {
				b.serve()
			}
			if tt.https {
				b.daemon.status.Store.Endpoints = []string{"https://etcd:2379"}
			}
			got := b.withChecks()
			b.must(append([]string{"doctor"}, tt.args...)...)
			if (got.Daemon.Err == nil) != tt.serve || got.Daemon.Ours != thisBuild().Version || tt.serve && got.Daemon.Version != "v1.2.3" {
				t.Errorf("the daemon is %+v", got.Daemon)
			}
			if got.Installed.RuntimeDir != b.dir || got.Installed.ConfigHome != home(t, ".config") || got.Installed.Program != "/usr/bin/rootless-ovl" {
				t.Errorf("what is installed is looked for at %+v", got.Installed)
			}
			got.Daemon, got.Installed = nil, install.Setup{}
			if diff := cmp.Diff(tt.want, *got, cmpopts.EquateComparable(netip.Prefix{}, netip.AddrPort{})); diff != "" {
				t.Errorf("options (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDoctor_RefusesCertificatesThatAreNone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "not.pem")
	if err := os.WriteFile(file, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--etcd-cafile", file}, 1, file},
		{[]string{"--etcd-cafile", "/does/not/exist"}, 1, "/does/not/exist"},
		{[]string{"--etcd-certfile", file}, 2, "--etcd-keyfile"},
		{[]string{"--etcd-certfile", file, "--etcd-keyfile", file}, 1, "--etcd-certfile"},
		{[]string{"--network", "x"}, 2, "--network"},
	}
	b := newBench(t)
	for _, tt := range tests {
		code := b.run(append([]string{"doctor"}, tt.args...)...)
		b.checkError(code, tt.code, tt.says)
	}
}
