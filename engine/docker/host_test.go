// What is read of a dockerd's process: where it listens, and whom its containers ask for names.

package docker

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestHostFlags_AreUnixSockets(t *testing.T) {
	for line, want := range map[string][]string{
		"dockerd": nil,
		"dockerd -H unix:///a -H tcp://0.0.0.0:1":              {"/a"},
		"dockerd --host unix:///a --host=unix:///b//c -Hfd://": {"/a", "/b/c"},
		"dockerd -Hunix:///a -H=unix:///b --hosts=unix:///c":   {"/a", "/b"},
		"dockerd -H":                 nil,
		"dockerd -H unix://relative": nil,
	} {
		if got := hostFlags(strings.Fields(line)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", line, got, want)
		}
	}
}

func TestSocketsOf_AProcess(t *testing.T) {
	if got := socketsOf(1 << 30); got != nil {
		t.Errorf("of a process that is not: %v", got)
	}
}

func TestSockets_AreRemembered(t *testing.T) {
	dir := t.TempDir()
	s, err := openSockets(dir, "/first")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/a", "/first", "/a"} {
		if err := s.add(path); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2 * maxSockets {
		if err := s.add("/more/" + strings.Repeat("x", i+1)); err != nil {
			t.Fatal(err)
		}
	}
	again, err := openSockets(dir, "/other")
	if err != nil {
		t.Fatal(err)
	}
	if got := again.all(); len(got) != maxSockets || !slices.Equal(got[:3], []string{"/other", "/first", "/a"}) {
		t.Errorf("%v", got)
	}
	if err := os.WriteFile(filepath.Join(dir, socketsFile), []byte("relative\n\n/a\n/a"), 0o600); err != nil {
		t.Fatal(err)
	}
	if again, err = openSockets(dir, ""); err != nil || !slices.Equal(again.all(), []string{"/a"}) {
		t.Errorf("%v %v", again.all(), err)
	}
}

func TestOpenNetworks_SaysThatItsFileIsBroken(t *testing.T) {
	dir := t.TempDir()
	for _, text := range []string{"{", `{"v":2}`} {
		if err := os.WriteFile(filepath.Join(dir, networksFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		n, err := openNetworks(dir)
		if err == nil || !strings.Contains(err.Error(), networksFile) {
			t.Errorf("%s: %v", text, err)
		}
		if err := n.put("a", options{SNAT: true}); err != nil {
			t.Fatal(err)
		}
		if n, err = openNetworks(dir); err != nil || !n.byID["a"].SNAT {
			t.Errorf("%s: written again: %v %v", text, n.byID, err)
		}
	}
}

func TestOpenNetworks_KeepsABrokenFileAside(t *testing.T) {
	dir := t.TempDir()
	const text = `{"v":2,"networks":{"a":{"isolate":true}}}`
	if err := os.WriteFile(filepath.Join(dir, networksFile), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := openNetworks(dir)
	aside, _ := filepath.Glob(filepath.Join(dir, networksFile+".bad-*"))
	if len(aside) != 1 || err == nil || !strings.Contains(err.Error(), aside[0]) || !strings.Contains(err.Error(), "docker network rm NAME") {
		t.Fatalf("kept %v: %v", aside, err)
	}
	if err := n.put("b", options{}); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(aside[0]); err != nil || string(b) != text {
		t.Errorf("kept %q, %v", b, err)
	}

	n = &networks{path: filepath.Join(dir, "nowhere", networksFile)}
	if err := n.setAside(os.ErrInvalid); !strings.Contains(err.Error(), n.path) {
		t.Errorf("what cannot be moved: %v", err)
	}
	if err := n.put("b", options{}); err == nil || !strings.Contains(err.Error(), n.path) {
		t.Errorf("it would be overwritten: %v", err)
	}
}

func TestHowToRemake_NamesTheNetworkAndItsOptions(t *testing.T) {
	given := map[string]string{"isolate": "true", "snat": "true", "allow-from": "10.213.9.0/24:80/tcp,10.213.8.0/24", "egress": "10.0.0.0/8", "host-access": "80,5432"}
	o, err := options{}.with(given)
	if err != nil {
		t.Fatal(err)
	}
	text := howToRemake("abc", o)
	for _, want := range []string{"docker network disconnect -f abc CONTAINER", "docker network rm abc", "docker network create -d rootless-ovl --ipam-driver rootless-ovl -o isolate=true " +
		"-o allow-from=10.213.9.0/24:80/tcp,10.213.8.0/24 -o egress=10.0.0.0/8 -o host-access=80,5432 -o snat=true NAME", "docker network connect NAME"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in %q", want, text)
		}
	}
}

func TestNameservers_AreEachOnce(t *testing.T) {
	text := "# nameserver 1.1.1.1\nnameserver 10.0.2.3\n nameserver\t10.0.2.3 # again\nsearch x\nnameserver fe80::1%eth0\nnameserver home\nnameserver\nnameserver ::ffff:192.0.2.1\n"
	want := []netip.Addr{netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("192.0.2.1")}
	if got := nameservers([]byte(text)); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// rootWith is a directory as a process's root, with links that lead out of it.
func rootWith(t *testing.T, files map[string]string) *os.File {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, isLink := strings.CutPrefix(text, "-> "); isLink {
			err = os.Symlink(to, path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func TestResolversIn_AreThoseThatContainersReach(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("nameserver 192.0.2.66\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		files map[string]string
		want  []string
	}{
		{"RootlessKit's with slirp4netns", map[string]string{"etc/resolv.conf": "nameserver 10.0.2.3\n"}, []string{"10.0.2.3"}},
		{"none", map[string]string{"etc/resolv.conf": "search x\n"}, []string{"8.8.8.8", "8.8.4.4"}},
		{"no file", map[string]string{"etc/passwd": ""}, []string{"8.8.8.8", "8.8.4.4"}},
		{"systemd-resolved", map[string]string{resolvConf: "-> ../run/systemd/resolve/stub-resolv.conf", "run/systemd/resolve/stub-resolv.conf": "nameserver 127.0.0.53\n",
			stubFile: "nameserver 192.0.2.1\nnameserver 2001:db8::1\nnameserver fe80::1%eth0\n"}, []string{"192.0.2.1", "2001:db8::1"}},
		{"a resolver on the host's loopback", map[string]string{resolvConf: "nameserver 127.0.0.1\n"}, nil},
		{"a link within the root", map[string]string{resolvConf: "-> /run/resolv.conf", "run/resolv.conf": "nameserver 192.0.2.2\n"}, []string{"192.0.2.2"}},
		{"a link out of it", map[string]string{resolvConf: "-> " + outside}, []string{"8.8.8.8", "8.8.4.4"}},
		{"no file but a directory", map[string]string{resolvConf + "/x": ""}, []string{"8.8.8.8", "8.8.4.4"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := resolversIn(rootWith(t, c.files)); !slices.Equal(got, c.want) {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
	if got := resolversOf(1 << 30); got != nil {
		t.Errorf("of a process that is not: %v", got)
	}
}
