// Tests of what is kept on disk.

package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestOpenStateDir_SecondDaemonIsToldThePidOfTheFirst(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "state")
	lock, err := openStateDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", fi.Mode(), err)
	}
	_, err = openStateDir(dir)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("second open: %v", err)
	}
	lock.Close()
	again, err := openStateDir(dir)
	if err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	again.Close()
}

func TestOpenStateDir_RefusesADirectoryOpenToOthers(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := openStateDir(dir); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("got %v", err)
	}
}

func TestOpenStateDir_DoesNotFollowALinkedLock(t *testing.T) {
	dir, victim := t.TempDir(), filepath.Join(t.TempDir(), "victim")
	if err := errors.Join(os.Chmod(dir, 0o700), os.WriteFile(victim, []byte("precious"), 0o600),
		os.Symlink(victim, filepath.Join(dir, lockFile))); err != nil {
		t.Fatal(err)
	}
	if _, err := openStateDir(dir); err == nil {
		t.Error("opened")
	}
	if b, _ := os.ReadFile(victim); string(b) != "precious" {
		t.Errorf("the link's target now holds %q", b)
	}
}

func TestNodeID_StaysTheSame(t *testing.T) {
	dir := t.TempDir()
	first, err := nodeID(dir)
	if err != nil || len(first) != 32 {
		t.Fatalf("%q, %v", first, err)
	}
	if second, err := nodeID(dir); err != nil || second != first {
		t.Errorf("%q, %v, want %q", second, err, first)
	}
	if other, _ := nodeID(t.TempDir()); other == first {
		t.Error("two nodes have one id")
	}
}

func TestNodeID_RefusesGarbageAndKeepsIt(t *testing.T) {
	for _, garbage := range []string{"", "xyz", "0123", strings.Repeat("0", 31) + "g", strings.Repeat("0", 34)} {
		dir := t.TempDir()
		path := filepath.Join(dir, nodeIDFile)
		if err := os.WriteFile(path, []byte(garbage), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := nodeID(dir); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v", garbage, err)
		}
		if b, _ := os.ReadFile(path); string(b) != garbage {
			t.Errorf("%q became %q", garbage, b)
		}
	}
}

func TestState_ComesBackAsWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), attachmentsFile)
	want := savedAttachments{V: 1, LastAddr: netip.MustParseAddr("10.5.72.9"), Attachments: []savedAttachment{
		{Name: "web", PID: 77, StartTime: 123456, Inode: 4026532000, IfName: "eth0", Addr: netip.MustParsePrefix("10.5.72.9/24"), MAC: "02:00:0a:05:48:09",
			Ports: []savedPort{{HostPort: 8080, Port: 80, Proto: "tcp"}, {HostAddr: netip.IPv6Loopback(), HostPort: 53, Port: 53, Proto: "udp", SNAT: true}}},
	}}
	if err := writeState(path, want); err != nil {
		t.Fatal(err)
	}
	var got savedAttachments
	if found, err := readState(path, &got); !found || err != nil {
		t.Fatal(found, err)
	}
	if got.LastAddr != want.LastAddr || len(got.Attachments) != 1 || !reflect.DeepEqual(got.Attachments[0], want.Attachments[0]) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if names := dirNames(t, filepath.Dir(path)); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
}

func TestState_AbsentFileIsNoError(t *testing.T) {
	var got savedLast
	if found, err := readState(filepath.Join(t.TempDir(), "x"), &got); found || err != nil {
		t.Error(found, err)
	}
}

func TestState_GarbageIsMovedAsideAndNeverOverwritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), attachmentsFile)
	for i, garbage := range []string{"{\"attachments\": [", "", "\x00\x01"} {
		if err := os.WriteFile(path, []byte(garbage), 0o600); err != nil {
			t.Fatal(err)
		}
		var got savedAttachments
		found, err := readState(path, &got)
		var broken *brokenStateError
		if found || !errors.As(err, &broken) {
			t.Fatalf("garbage %d: %v, %v", i, found, err)
		}
		if b, err := os.ReadFile(broken.aside); err != nil || string(b) != garbage {
			t.Errorf("garbage %d: kept %q, %v", i, b, err)
		}
	}
	if names := dirNames(t, filepath.Dir(path)); len(names) != 3 {
		t.Errorf("want three broken files, have %v", names)
	}
}

func TestWriteFile_FailureLeavesTheOldFileAndNothingElse(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	if err := os.Mkdir(path, 0o700); err != nil { // a directory cannot be replaced by a file
		t.Fatal(err)
	}
	err := writeFile(path, []byte("new"))
	if err == nil {
		t.Fatal("no error")
	}
	if strings.Count(err.Error(), dir) != 1 || strings.Contains(err.Error(), "rename") {
		t.Errorf("it names what nobody asked about: %v", err)
	}
	if names := dirNames(t, dir); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
}

func FuzzLastKnown_TakesAnyFile(f *testing.F) {
	f.Add([]byte(`{"v":1,"saved_at":"2026-01-02T03:04:05Z","subnet":"10.5.72.0/24","port":8285,"config":"{\"Network\":\"10.5.0.0/16\"}",` +
		`"leases":[{"subnet":"10.5.1.0/24","attrs":{"PublicIP":"192.0.2.2","PublicIPv6":null}},{"subnet":"10.5.2.0/24","attrs":7}]}`))
	f.Add([]byte(`{"subnet":"fd00::/64","port":-1,"leases":[{}]}`))
	conf, err := testConfig(f).checked()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var last savedLast
		if json.Unmarshal(b, &last) != nil {
			return
		}
		last.clean()
		if cfg, ok := last.usable(conf, last.SavedAt); ok && !inside(cfg.Network, last.Subnet) {
			t.Errorf("subnet %v would be used in %v", last.Subnet, cfg.Network)
		}
		for _, p := range peersOf(last.restore(), testSelf()) {
			if p.problem == "" && !inside(testSelf().network, p.lease.Subnet) {
				t.Errorf("peer %+v", p)
			}
		}
	})
}

func dirNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
