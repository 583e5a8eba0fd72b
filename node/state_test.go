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

	"golang.org/x/sys/unix"
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

// What may lie in place of a state file: nothing of it is read, nothing is waited for, and it stays what it was.
func TestReadOwn_ReadsPlainFilesOfOursAlone(t *testing.T) {
	for name, c := range map[string]struct {
		make func(path string) error
		says string
	}{
		"a symbolic link to a good file": {func(p string) error {
			good := filepath.Join(t.TempDir(), "good")
			return errors.Join(os.WriteFile(good, []byte(`{"v":1}`), 0o600), os.Symlink(good, p))
		}, "symbolic link"},
		"a link to endless bytes": {func(p string) error { return os.Symlink("/dev/zero", p) }, "symbolic link"},
		"a link to itself":        {func(p string) error { return os.Symlink(p, p) }, "symbolic link"},
		"a FIFO":                  {func(p string) error { return unix.Mkfifo(p, 0o600) }, "not a plain file"},
		"a directory":             {func(p string) error { return os.Mkdir(p, 0o700) }, "not a plain file"},
		"a group's file": {func(p string) error {
			return errors.Join(os.WriteFile(p, []byte(`{"v":1}`), 0o600), os.Chmod(p, 0o660))
		}, "chmod 600"},
		"everybody's file": {func(p string) error {
			return errors.Join(os.WriteFile(p, []byte(`{"v":1}`), 0o600), os.Chmod(p, 0o602))
		}, "chmod 600"},
		"another's file": {func(p string) error {
			return errors.Join(os.WriteFile(p, []byte(`{"v":1}`), 0o644), os.Chown(p, 12345, 12345))
		}, "uid 12345"},
		"a huge file": {func(p string) error {
			return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, 1<<40)) // sparse
		}, "bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "another's file" && os.Geteuid() != 0 {
				t.Skip("needs root to give a file away")
			}
			path := filepath.Join(t.TempDir(), "state")
			if err := c.make(path); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := readOwn(path, 100); err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("%q, %v; want an error that names the path and says %q", b, err, c.says)
			}
			if after, err := os.Lstat(path); err != nil || after.Mode() != before.Mode() || after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
				t.Errorf("it was %v, and is %v, %v", before, after, err)
			}
		})
	}
	good := filepath.Join(t.TempDir(), "good")
	if err := os.WriteFile(good, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := readOwn(good, 100); err != nil || len(b) != 100 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// The same in place of each file of the directory: a start never hangs, and what has an answer to give names the file.
func TestState_FilesThatAreNoneAreNamed(t *testing.T) {
	read := map[string]func(dir string) error{
		nodeIDFile:  func(dir string) error { _, err := nodeID(dir); return err },
		vtepMACFile: func(dir string) error { _, err := vtepMAC(dir); return err },
		attachmentsFile: func(dir string) error {
			_, err := readState(filepath.Join(dir, attachmentsFile), new(savedAttachments))
			return err
		},
		lastFile: func(dir string) error { _, err := readState(filepath.Join(dir, lastFile), new(savedLast)); return err },
		lockFile: func(dir string) error {
			f, err := openStateDir(dir)
			if err == nil {
				f.Close()
			}
			return err
		},
	}
	for name, read := range read {
		for what, make := range map[string]func(path string) error{
			"FIFO":      func(p string) error { return unix.Mkfifo(p, 0o600) },
			"directory": func(p string) error { return os.Mkdir(p, 0o700) },
			"link":      func(p string) error { return os.Symlink("/etc/passwd", p) },
		} {
			dir := t.TempDir()
			if err := errors.Join(os.Chmod(dir, 0o700), make(filepath.Join(dir, name))); err != nil {
				t.Fatal(err)
			}
			if err := read(dir); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, name)) {
				t.Errorf("%s as a %s: %v", name, what, err)
			}
		}
	}
}

// A write replaces what is in its place and never goes through it.
func TestWriteFile_GoesThroughNoLink(t *testing.T) {
	dir, victim := t.TempDir(), filepath.Join(t.TempDir(), "victim")
	path := filepath.Join(dir, attachmentsFile)
	if err := errors.Join(os.WriteFile(victim, []byte("precious"), 0o600), os.Symlink(victim, path)); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(path, []byte("ours")); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(victim); string(b) != "precious" {
		t.Errorf("the link's target now holds %q", b)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
}
