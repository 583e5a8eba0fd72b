// Tests that make each known cause true on a made-up host, and of the probes on real sockets.

package doctor

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/engine/install"
	"github.com/rootless-ovl/rootless-ovl/internal/cage"
	"github.com/rootless-ovl/rootless-ovl/internal/hostnet"
)

const testUID = 1001

// fake is a host where all is well; a test changes what it is about.
type fake struct {
	host
	files map[string]string
	modes map[string]fs.FileMode
	owner map[string]uint32
	env   map[string]string
	paths map[string]string // of programs
}

// limits is /proc/self/limits with a hard limit on open files.
func limits(hard string) string {
	return "Limit                     Soft Limit           Hard Limit           Units     \n" +
		"Max processes             1000                 1000                 processes \n" +
		"Max open files            1024                 " + hard + "               files     \n"
}

func newFake() *fake {
	f := &fake{
		files: map[string]string{
			"/proc/sys/user/max_user_namespaces":  "15000\n",
			"/proc/sys/user/max_net_namespaces":   "15000\n",
			"/proc/sys/net/core/rmem_max":         "4194304\n",
			"/proc/sys/net/core/wmem_max":         "8388608\n",
			"/proc/sys/net/ipv4/ping_group_range": "0\t2147483647\n",
			"/proc/self/status":                   "Name:\tx\nNoNewPrivs:\t0\n",
			"/proc/self/mounts":                   "proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0\n",
			"/etc/subuid":                         "other:100000:65536\nme:165536:65536\n",
			"/etc/subgid":                         "1001:165536:65536\n",
			"/etc/os-release":                     "NAME=Debian\nID=debian\n",
			"/usr/bin/newuidmap":                  "",
			"/usr/bin/newgidmap":                  "",
			"/run/systemd/system":                 "",
			"/var/lib/systemd/linger/me":          "",
			"/run/user/1001":                      "",
			"/proc/self/limits":                   limits("524288"),
		},
		modes: map[string]fs.FileMode{
			"/usr/bin/newuidmap": 0o755 | fs.ModeSetuid, "/usr/bin/newgidmap": 0o755 | fs.ModeSetuid,
			"/run/user/1001": fs.ModeDir | 0o700,
		},
		owner: map[string]uint32{},
		env:   map[string]string{"XDG_RUNTIME_DIR": "/run/user/1001"},
		paths: map[string]string{"newuidmap": "/usr/bin/newuidmap", "newgidmap": "/usr/bin/newgidmap"},
	}
	f.host = host{
		readFile: func(path string) ([]byte, error) {
			s, ok := f.files[path]
			if !ok {
				return nil, fs.ErrNotExist
			}
			return []byte(s), nil
		},
		stat: func(path string) (fs.FileInfo, error) {
			if _, ok := f.files[path]; !ok {
				return nil, &fs.PathError{Op: "stat", Path: path, Err: fs.ErrNotExist}
			}
			uid, ok := f.owner[path]
			if !ok {
				uid = testUID
			}
			mfs := fstest.MapFS{"x": {Mode: f.modes[path], Sys: &syscall.Stat_t{Uid: uid}}}
			return mfs.Stat("x")
		},
		openTun: func() error { return nil },
		hasCap:  func(string) bool { return false },
		kernel:  func() cage.Kernel { return cage.Kernel{Seccomp: true, Landlock: 7} },
		getenv:  func(k string) string { return f.env[k] },
		lookPath: func(name string) (string, error) {
			if p := f.paths[name]; p != "" {
				return p, nil
			}
			return "", exec.ErrNotFound
		},
		user:     func() (string, int) { return "me", testUID },
		groups:   func() []int { return []int{27, 1001} },
		overlaps: func(netip.Prefix) ([]hostnet.Overlap, error) { return nil, nil },
		dial:     (&net.Dialer{}).DialContext,
		now:      time.Now,
		knock:    func(context.Context, netip.AddrPort, time.Duration) error { return nil },
		mtu:      func(netip.AddrPort) (int, error) { return 1500, nil },
		echo:     func(context.Context, netip.Addr, int, time.Duration) (bool, error) { return true, nil },
		view:     installedView(install.Podman, install.Docker, install.Systemd),

		dockerLink: func(string, string) (bool, bool) { return false, false },
	}
	return f
}

// find is the check with this id.
func find(t *testing.T, checks []Check, id string) Check {
	t.Helper()
	i := slices.IndexFunc(checks, func(c Check) bool { return c.ID == id })
	if i < 0 {
		t.Fatalf("no check %q", id)
	}
	return checks[i]
}

var testPeer = netip.MustParseAddrPort("192.0.2.7:8285")

func testOptions() Options {
	return Options{
		Network: netip.MustParsePrefix("10.5.0.0/16"), Peers: []netip.AddrPort{testPeer}, Program: "/opt/bin/rootless-ovl", Timeout: time.Second,
		Installed: testSetup, Daemon: &Daemon{Version: "v1.0", Ours: "v1.0"},
	}
}

func TestRun_AllIsWell(t *testing.T) {
	checks := run(t.Context(), testOptions(), newFake().host)
	if Failed(checks) {
		t.Error("a healthy host failed")
	}
	ids := map[string]bool{}
	for _, c := range checks {
		if ids[c.ID] || c.ID == "" || c.Title == "" || c.Detail == "" {
			t.Errorf("check %+v", c)
		}
		ids[c.ID] = true
		want := OK
		if c.ID == "etcd" || c.ID == "clock" { // not asked for
			want = Skipped
		}
		if c.Status != want || c.Remedy != "" {
			t.Errorf("check %+v, want %s", c, want)
		}
	}
}

func TestRun_FindsEachCause(t *testing.T) {
	tests := []struct {
		name   string
		change func(*fake)
		id     string
		status Status
		detail string // must be in Detail
		remedy string // must be in Remedy
	}{
		{"no tun device", func(f *fake) { f.openTun = func() error { return unix.ENOENT } }, "tun-device", Fail, "/dev/net/tun: it does not exist", "modprobe tun"},
		{"no tun module", func(f *fake) { f.openTun = func() error { return unix.ENODEV } }, "tun-device", Fail, "module is missing", "reboot"},
		{"tun device closed", func(f *fake) { f.openTun = func() error { return unix.EACCES } }, "tun-device", Fail, "no permission", "chmod 0666 /dev/net/tun"},
		{"tun device forbidden", func(f *fake) { f.openTun = func() error { return unix.EPERM } }, "tun-device", Fail, "device cgroup", "--device /dev/net/tun"},
		{"tun device broken", func(f *fake) { f.openTun = func() error { return unix.EIO } }, "tun-device", Fail, "input/output error", "ip tuntap"},
		{"AppArmor", func(f *fake) {
			f.files["/proc/sys/kernel/apparmor_restrict_unprivileged_userns"] = "1\n"
			f.files["/proc/self/attr/current"] = "unconfined\n"
		}, "apparmor-userns", Warn, "apparmor_restrict_unprivileged_userns", "\"/opt/bin/rootless-ovl\" flags=(unconfined) {\n  userns,\n"},
		{"AppArmor with a profile", func(f *fake) {
			f.files["/proc/sys/kernel/apparmor_restrict_unprivileged_userns"] = "1\n"
			f.files["/proc/self/attr/current"] = "rootless-ovl (unconfined)\n"
		}, "apparmor-userns", OK, "rootless-ovl (unconfined)", ""},
		{"user namespaces off", func(f *fake) { f.files["/proc/sys/kernel/unprivileged_userns_clone"] = "0\n" }, "userns-clone", Fail, "unprivileged_userns_clone is 0", "kernel.unprivileged_userns_clone = 1"},
		{"no user namespaces", func(f *fake) { f.files["/proc/sys/user/max_user_namespaces"] = "0\n" }, "max-user-namespaces", Fail, "max_user_namespaces is 0", "user.max_user_namespaces = "},
		{"no network namespaces", func(f *fake) { f.files["/proc/sys/user/max_net_namespaces"] = "0\n" }, "max-net-namespaces", Fail, "max_net_namespaces is 0", "user.max_net_namespaces = "},
		{"namespaces unknown", func(f *fake) { delete(f.files, "/proc/sys/user/max_net_namespaces") }, "max-net-namespaces", Skipped, "cannot be read", ""},
		{"newuidmap absent", func(f *fake) { delete(f.paths, "newuidmap") }, "newuidmap", Warn, "not installed", "apt-get install uidmap"},
		{"newgidmap absent on Fedora", func(f *fake) {
			delete(f.paths, "newgidmap")
			f.files["/etc/os-release"] = "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n"
		}, "newgidmap", Warn, "not installed", "dnf install shadow-utils"},
		{"newuidmap absent elsewhere", func(f *fake) {
			delete(f.paths, "newuidmap")
			delete(f.files, "/etc/os-release")
		}, "newuidmap", Warn, "not installed", "uidmap on Debian"},
		{"newgidmap not setuid", func(f *fake) { f.modes["/usr/bin/newgidmap"] = 0o755 }, "newgidmap", Warn, "neither setuid", "chmod u+s /usr/bin/newgidmap"},
		{"newgidmap with a capability", func(f *fake) {
			f.modes["/usr/bin/newgidmap"] = 0o755
			f.hasCap = func(string) bool { return true }
		}, "newgidmap", OK, "/usr/bin/newgidmap", ""},
		{"no subuid range", func(f *fake) { f.files["/etc/subuid"] = "other:100000:65536\nme:x:y\n" }, "subuid", Warn, "no range for me", "usermod --add-subuids"},
		{"no subgid file", func(f *fake) { delete(f.files, "/etc/subgid") }, "subgid", Warn, "no range for me", "usermod --add-subgids"},
		{"small subuid range", func(f *fake) { f.files["/etc/subuid"] = "me:100000:1000\n" }, "subuid", Warn, "1000 ids", "usermod"},
		{"subids from elsewhere", func(f *fake) {
			f.files["/etc/nsswitch.conf"] = "passwd: files\nsubid: sss\n"
			delete(f.files, "/etc/subuid")
		}, "subuid", Skipped, "sss", ""},
		{"root needs no range", func(f *fake) { f.user, f.owner["/run/user/1001"] = func() (string, int) { return "root", 0 }, 0 }, "subuid", Skipped, "root", ""},
		{"NoNewPrivileges", func(f *fake) { f.files["/proc/self/status"] = "NoNewPrivs:\t1\n" }, "no-new-privileges", Warn, "newuidmap", "NoNewPrivileges"},
		{"hidepid", func(f *fake) {
			f.files["/proc/self/mounts"] = "proc /proc proc rw 0 0\nproc /proc proc rw,hidepid=invisible 0 0\n"
		}, "hidepid", Warn, "hidepid=invisible", "--netns"},
		{"hidepid off", func(f *fake) { f.files["/proc/self/mounts"] = "proc /proc proc rw,hidepid=0 0 0\n" }, "hidepid", OK, "", ""},
		{"no pings", func(f *fake) { f.files["/proc/sys/net/ipv4/ping_group_range"] = "1\t0\n" }, "ping-group-range", Warn, "1 0", "net.ipv4.ping_group_range = 0 2147483647"},
		{"pings for another group", func(f *fake) { f.files["/proc/sys/net/ipv4/ping_group_range"] = "2000\t3000\n" }, "ping-group-range", Warn, "2000 3000", "ping_group_range"},
		{"pings by a supplementary group", func(f *fake) { f.files["/proc/sys/net/ipv4/ping_group_range"] = "27\t27\n" }, "ping-group-range", OK, "group 27", ""},
		{"pings unknown", func(f *fake) { delete(f.files, "/proc/sys/net/ipv4/ping_group_range") }, "ping-group-range", Skipped, "", ""},
		{"small receive buffers", func(f *fake) { f.files["/proc/sys/net/core/rmem_max"] = "65536\n" }, "rmem-max", Warn, "65536", "net.core.rmem_max = 212992"},
		{"stock receive buffers", func(f *fake) { f.files["/proc/sys/net/core/rmem_max"] = "212992\n" }, "rmem-max", OK, "", ""},
		{"small send buffers", func(f *fake) { f.files["/proc/sys/net/core/wmem_max"] = "65536\n" }, "wmem-max", Warn, "65536", "net.core.wmem_max = 212992"},
		{"buffers unknown", func(f *fake) { delete(f.files, "/proc/sys/net/core/rmem_max") }, "rmem-max", Skipped, "", ""},
		{"no runtime directory", func(f *fake) { f.env["XDG_RUNTIME_DIR"] = "" }, "runtime-dir", Warn, "not set", "--runtime-dir"},
		{"runtime directory gone", func(f *fake) { delete(f.files, "/run/user/1001") }, "runtime-dir", Fail, "not exist", "log in"},
		{"runtime directory is a file", func(f *fake) { f.modes["/run/user/1001"] = 0o600 }, "runtime-dir", Fail, "not a directory", "log in"},
		{"runtime directory of another", func(f *fake) { f.owner["/run/user/1001"] = 0 }, "runtime-dir", Fail, "belongs to uid 0", "log in"},
		{"runtime directory open", func(f *fake) { f.modes["/run/user/1001"] = fs.ModeDir | 0o755 }, "runtime-dir", Warn, "open to others", "chmod 0700 /run/user/1001"},
		{"linger off", func(f *fake) { delete(f.files, "/var/lib/systemd/linger/me") }, "linger", Warn, "linger is off for me", "loginctl enable-linger me"},
		{"no systemd", func(f *fake) { delete(f.files, "/run/systemd/system") }, "linger", Skipped, "no systemd", ""},
		{"few open files", func(f *fake) { f.files["/proc/self/limits"] = limits("4096") }, "open-files", Warn, "hard limit is 4096", "LimitNOFILE=65536"},
		{"open files without limit", func(f *fake) { f.files["/proc/self/limits"] = limits("unlimited") }, "open-files", OK, "no limit", ""},
		{"open files unknown", func(f *fake) { delete(f.files, "/proc/self/limits") }, "open-files", Skipped, "", ""},
		{"overlap", func(f *fake) {
			f.overlaps = func(n netip.Prefix) ([]hostnet.Overlap, error) {
				return []hostnet.Overlap{{Prefix: netip.MustParsePrefix("10.5.3.0/24"), Device: "wg0"}, {Prefix: netip.MustParsePrefix("10.5.0.2/32"), File: "/etc/resolv.conf"}}, nil
			}
		}, "network-overlap", Fail, "route to 10.5.3.0/24 over wg0, name server 10.5.0.2", "--allow-overlap"},
		{"overlap unknown", func(f *fake) {
			f.overlaps = func(netip.Prefix) ([]hostnet.Overlap, error) { return nil, errors.New("listing routes: no") }
		}, "network-overlap", Skipped, "listing routes", ""},
		{"peer's port closed", func(f *fake) { f.knock = knockWith(unix.ECONNREFUSED) }, "peer-port", Fail, "port unreachable", "UDP port 8285"},
		{"peer unreachable", func(f *fake) { f.knock = knockWith(unix.EHOSTUNREACH) }, "peer-port", Fail, "no route to host", "192.0.2.7"},
		{"own firewall", func(f *fake) { f.knock = knockWith(unix.EPERM) }, "peer-port", Fail, "not permitted", "outgoing UDP to port 8285"},
		{"knock fails", func(f *fake) { f.knock = knockWith(unix.ENOBUFS) }, "peer-port", Skipped, "buffer", ""},
		{"narrow path", func(f *fake) { f.echo = pathOf(1400) }, "peer-mtu", Warn, "only 1400 bytes get through, the interface has 1500", "packets of 1372 bytes at most"},
		{"peer without pings", func(f *fake) { f.echo = pathOf(0) }, "peer-mtu", Skipped, "does not answer pings", ""},
		{"pings not allowed", func(f *fake) {
			f.echo = func(context.Context, netip.Addr, int, time.Duration) (bool, error) { return false, unix.EACCES }
		}, "peer-mtu", Skipped, "ping-group-range", ""},
		{"no route to the peer", func(f *fake) {
			f.mtu = func(netip.AddrPort) (int, error) { return 0, unix.ENETUNREACH }
		}, "peer-mtu", Skipped, "unreachable", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake()
			tt.change(f)
			checks := run(t.Context(), testOptions(), f.host)
			c := find(t, checks, tt.id)
			if c.Status != tt.status || !strings.Contains(c.Detail, tt.detail) || !strings.Contains(c.Remedy, tt.remedy) {
				t.Errorf("%+v", c)
			}
			if (c.Remedy != "") != (c.Status == Warn || c.Status == Fail) {
				t.Errorf("status %s with remedy %q", c.Status, c.Remedy)
			}
			if strings.Contains(c.Detail, "\n") {
				t.Errorf("detail has several lines: %q", c.Detail)
			}
			if Failed(checks) != (tt.status == Fail) {
				t.Errorf("Failed is %v", Failed(checks))
			}
		})
	}
}

func TestSandbox_WithoutADaemonIsWhatTheKernelHas(t *testing.T) {
	for _, c := range []struct {
		kernel cage.Kernel
		status Status
		detail string
	}{
		{cage.Kernel{Seccomp: true, Landlock: 3}, OK, "landlock (ABI 3)"},
		{cage.Kernel{Seccomp: true, LandlockErr: errors.New("left out")}, Warn, "landlock is off: left out"},
		{cage.Kernel{Landlock: 1}, Warn, "seccomp is off"},
	} {
		h := newFake().host
		h.kernel = func() cage.Kernel { return c.kernel }
		if got := h.sandbox(nil); got.Status != c.status || !strings.Contains(got.Detail, c.detail) {
			t.Errorf("%+v: %+v", c.kernel, got)
		}
	}
}

func TestSandbox_IsThatOfTheRunningDaemon(t *testing.T) {
	h := newFake().host
	for _, c := range []struct {
		off    map[string]string
		status Status
		detail string
	}{
		{nil, OK, "landlock (ABI 7)"},
		{map[string]string{"landlock": "left out"}, Warn, "landlock is off: left out"},
		{map[string]string{"landlock": cage.AskedOff, "seccomp": cage.AskedOff, "no_new_privs": cage.AskedOff}, Warn, "--sandbox=off"},
	} {
		if got := h.sandbox(&Daemon{SandboxOff: c.off}); got.Status != c.status || !strings.Contains(got.Detail, c.detail) {
			t.Errorf("%v: %+v", c.off, got)
		}
	}
}

func knockWith(err error) func(context.Context, netip.AddrPort, time.Duration) error {
	return func(context.Context, netip.AddrPort, time.Duration) error { return err }
}

// pathOf answers pings up to a size.
func pathOf(mtu int) func(context.Context, netip.Addr, int, time.Duration) (bool, error) {
	return func(_ context.Context, _ netip.Addr, size int, _ time.Duration) (bool, error) {
		return size <= mtu, nil
	}
}

func TestRun_SaysWhatWasNotAskedFor(t *testing.T) {
	checks := run(t.Context(), Options{}, newFake().host)
	for _, id := range []string{"network-overlap", "etcd", "clock", "peer-port", "peer-mtu"} {
		if c := find(t, checks, id); c.Status != Skipped || c.Detail == "" {
			t.Errorf("%+v", c)
		}
	}
}

func TestCheck_HasStableJSON(t *testing.T) {
	b, err := json.Marshal(bad("tun-device", "title", "detail", "remedy"))
	if err != nil || string(b) != `{"id":"tun-device","title":"title","status":"fail","detail":"detail","remedy":"remedy"}` {
		t.Errorf("%s, %v", b, err)
	}
	b, err = json.Marshal(good("x", "y", "z"))
	if err != nil || string(b) != `{"id":"x","title":"y","status":"ok","detail":"z"}` {
		t.Errorf("%s, %v", b, err)
	}
}

func TestEtcd_SaysWhyItIsNotReached(t *testing.T) {
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/version" {
			http.NotFound(w, r)
		}
	})
	serve := func(h http.Handler, start func(*httptest.Server)) *httptest.Server {
		s := httptest.NewUnstartedServer(h)
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		start(s)
		t.Cleanup(s.Close)
		return s
	}
	plain := serve(answer, (*httptest.Server).Start)
	secure := serve(answer, (*httptest.Server).StartTLS)
	mutual := serve(answer, func(s *httptest.Server) {
		s.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
		s.StartTLS()
	})
	other := serve(http.NotFoundHandler(), (*httptest.Server).Start)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := closed.Addr().String()
	closed.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	swap := strings.NewReplacer("https://", "http://", "http://", "https://")
	trust := secure.Client().Transport.(*http.Transport).TLSClientConfig

	for _, tt := range []struct {
		name, endpoint string
		conf           *tls.Config
		timeout        time.Duration
		status         Status
		detail, remedy string
	}{
		{"plain", plain.URL, nil, 0, OK, "answers", ""},
		{"host and port", strings.TrimPrefix(plain.URL, "http://"), nil, 0, OK, "answers", ""},
		{"TLS", secure.URL, trust, 0, OK, "answers", ""},
		{"unknown authority", secure.URL, nil, 0, Fail, "unknown authority", "--etcd-cafile"},
		{"client certificate wanted", mutual.URL, trust, 0, Fail, "certificate required", "--etcd-certfile"},
		{"TLS endpoint given as plain", swap.Replace(secure.URL), nil, 0, Fail, "plain HTTP", "https://"},
		{"plain endpoint given as TLS", swap.Replace(plain.URL), nil, 0, Fail, "does not speak TLS", "http://"},
		{"another server", other.URL, nil, 0, Fail, "404", "2379"},
		{"refused", "http://" + refused, nil, 0, Fail, "refused", "start etcd"},
		{"silent", "http://" + silent.Addr().String(), nil, 100 * time.Millisecond, Fail, "no answer in time", "firewall"},
		{"no endpoint", "unix:///x", nil, 0, Fail, "not an endpoint", "http://HOST:2379"},
		{"no URL", "http://[", nil, 0, Fail, "not an endpoint", "http://HOST:2379"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.timeout == 0 {
				tt.timeout = 20 * time.Second
			}
			o := Options{Endpoints: []string{tt.endpoint}, TLS: tt.conf, Timeout: tt.timeout}
			checks := run(t.Context(), o, newFake().host)
			c := find(t, checks, "etcd")
			if c.Status != tt.status || !strings.Contains(c.Detail, tt.detail) || !strings.Contains(c.Remedy, tt.remedy) {
				t.Errorf("%+v", c)
			}
			if clock := find(t, checks, "clock"); tt.status == OK && clock.Status != OK || clock.Status == Warn {
				t.Errorf("%+v", clock)
			}
		})
	}
}

func TestClock_IsComparedWithEtcd(t *testing.T) {
	for _, tt := range []struct {
		off    time.Duration
		hidden bool
		status Status
		detail string
	}{
		{0, false, OK, ""},
		{20 * time.Second, false, OK, ""},
		{-20 * time.Second, false, OK, ""},
		{time.Hour, false, Warn, "ahead"},
		{-time.Hour, false, Warn, "behind"},
		{time.Hour, true, Skipped, "does not say its time"},
	} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if tt.hidden {
				w.Header()["Date"] = nil
			}
		}))
		f := newFake()
		f.now = func() time.Time { return time.Now().Add(tt.off) }
		c := find(t, run(t.Context(), Options{Endpoints: []string{s.URL}}, f.host), "clock")
		s.Close()
		if c.Status != tt.status || !strings.Contains(c.Detail, tt.detail) {
			t.Errorf("%v: %+v", tt.off, c)
		}
	}
}

func TestRun_ReadsTheRealHost(t *testing.T) {
	checks := Run(t.Context(), Options{})
	if len(checks) < 20 {
		t.Errorf("only %d checks", len(checks))
	}
	for _, c := range checks {
		if c.Detail == "" || (c.Remedy != "") != (c.Status == Warn || c.Status == Fail) {
			t.Errorf("%+v", c)
		}
	}
}

// probed is what the probes see from a network namespace whose way to 192.0.2.2 takes 1400 bytes at most, silently.
type probed struct {
	Setup                 string
	Open, Closed, NoRoute string
	MTU                   int
	Peer                  Check
	Loopback              Check
	NotAllowed            Check
}

func TestMain(m *testing.M) {
	if os.Getenv("DOCTOR_TEST_INSIDE") != "" {
		_ = json.NewEncoder(os.Stdout).Encode(inside())
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func inside() (r probed) {
	do := func(argv ...string) {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil && r.Setup == "" {
			r.Setup = fmt.Sprintf("%v: %v: %s", argv, err, out)
		}
	}
	other := exec.Command("unshare", "--net", "sleep", "1000")
	other.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := other.Start(); err != nil {
		r.Setup = err.Error()
		return r
	}
	defer func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	pid := fmt.Sprint(other.Process.Pid)
	own, _ := os.Readlink("/proc/self/ns/net")
	for range 1000 { // until unshare has done it
		if its, _ := os.Readlink("/proc/" + pid + "/ns/net"); its != own {
			break
		}
		time.Sleep(time.Millisecond)
	}
	there := func(argv ...string) { do(append([]string{"nsenter", "--net=/proc/" + pid + "/ns/net"}, argv...)...) }
	do("ip", "link", "set", "lo", "up")
	do("ip", "link", "add", "a0", "type", "veth", "peer", "name", "b0")
	do("ip", "link", "set", "b0", "netns", pid)
	do("ip", "addr", "add", "192.0.2.1/24", "dev", "a0")
	do("ip", "link", "set", "a0", "up")
	there("ip", "addr", "add", "192.0.2.2/24", "dev", "b0")
	there("ip", "link", "set", "b0", "mtu", "1400", "up") // veth drops what its end cannot take
	for range 1000 {                                      // until the kernel has activated it: what is sent before is lost
		if up, _ := exec.Command("ip", "-brief", "link", "show", "dev", "a0").Output(); strings.Contains(string(up), " UP ") {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if r.Setup != "" {
		return r
	}
	ctx := context.Background()
	h := realHost()
	text := func(err error) string {
		if err == nil {
			return ""
		}
		return err.Error()
	}
	peer := netip.MustParseAddrPort("192.0.2.2:8285")
	r.NotAllowed = h.peerMTU(ctx, peer, 3*time.Second)
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		r.Setup = err.Error()
		return r
	}
	r.Peer = h.peerMTU(ctx, peer, 3*time.Second)
	do("ip", "route", "change", "192.0.2.0/24", "dev", "a0", "src", "192.0.2.1", "mtu", "1300") // as if an ICMP error had said so
	r.MTU, _ = h.mtu(peer)
	r.Loopback = h.peerMTU(ctx, netip.MustParseAddrPort("127.0.0.1:1"), 3*time.Second)
	r.Closed = text(h.knock(ctx, peer, 3*time.Second))
	r.NoRoute = text(h.knock(ctx, netip.MustParseAddrPort("198.51.100.1:1"), time.Second))
	l, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		r.Setup = err.Error()
		return r
	}
	defer l.Close()
	r.Open = text(h.knock(ctx, l.LocalAddr().(*net.UDPAddr).AddrPort(), 300*time.Millisecond))
	return r
}

func TestProbes_SeeARealPath(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "DOCTOR_TEST_INSIDE=1", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
	}
	out, err := cmd.Output()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
		t.Skipf("user namespaces cannot be made here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	var r probed
	if err := json.Unmarshal(out, &r); err != nil || r.Setup != "" {
		t.Fatalf("%v %s", err, r.Setup)
	}
	if r.Open != "" || r.Closed != unix.ECONNREFUSED.Error() || r.NoRoute != unix.ENETUNREACH.Error() {
		t.Errorf("knocks: open %q, closed %q, no route %q", r.Open, r.Closed, r.NoRoute)
	}
	if r.MTU != 1500 {
		t.Errorf("MTU of the interface is %d", r.MTU)
	}
	// veth forgives a VLAN tag, 4 bytes.
	if r.Peer.Status != Warn || !strings.Contains(r.Peer.Detail, "only 1404 bytes") {
		t.Errorf("path of 1400 bytes: %+v", r.Peer)
	}
	if r.Loopback.Status != OK {
		t.Errorf("loopback: %+v", r.Loopback)
	}
	if r.NotAllowed.Status != Skipped || !strings.Contains(r.NotAllowed.Detail, "ping-group-range") {
		t.Errorf("without permission to ping: %+v", r.NotAllowed)
	}
}
