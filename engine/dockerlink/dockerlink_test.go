// The link is made, mended and left alone as it should be, below a made-up root and in a real mount namespace.

package dockerlink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestPutIn_MakesMendsAndLeavesLinks(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	const socket = "/run/user/1/rootless-ovl/docker.sock"
	link := func(to string) func(string) error {
		return func(dir string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, filepath.Dir(place)), 0o755), os.Symlink(to, filepath.Join(dir, place)))
		}
	}
	tests := []struct {
		name    string
		before  func(dir string) error
		running bool
		made    bool
		leads   string // afterwards; empty: there is none
		says    string
	}{
		{"nothing there yet", func(string) error { return nil }, true, true, socket, ""},
		{"no dockerd yet", func(string) error { return nil }, false, false, "", ""},
		{"the host's directory, not removed yet", func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "run"), 0o755), os.Symlink("/run/.ro1/docker", filepath.Join(dir, "run/docker")))
		}, false, false, "", ""},
		{"a directory of dockerd's", func(dir string) error { return os.MkdirAll(filepath.Join(dir, "run/docker"), 0o755) }, false, true, socket, ""},
		{"done before", link(socket), true, false, socket, ""},
		{"stale", link("/run/user/1/gone/docker.sock"), true, true, socket, ""},
		{"another node's", link(elsewhere), true, false, elsewhere, "another node"},
		{"a way out", func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "run"), 0o755), os.Symlink(t.TempDir(), filepath.Join(dir, "run/docker")))
		}, true, false, "", "escapes"},
		{"a file in the way", func(dir string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, filepath.Dir(place)), 0o755), os.WriteFile(filepath.Join(dir, place), nil, 0o600))
		}, true, false, "", "invalid argument"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := tt.before(dir); err != nil {
				t.Fatal(err)
			}
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			made, err := putIn(root, socket, tt.running)
			if made != tt.made || (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("made %t, %v; want %t, %q", made, err, tt.made, tt.says)
			}
			if to, _ := os.Readlink(filepath.Join(dir, place)); to != tt.leads {
				t.Errorf("it leads to %q, want %q", to, tt.leads)
			}
		})
	}
}

// TestKeep_PutsTheLinkBackForEachDockerd has programs called dockerd, in mount namespaces with a /run of their own.
func TestKeep_PutsTheLinkBackForEachDockerd(t *testing.T) {
	runtimeDir := t.TempDir()
	const socket = "/somewhere/docker.sock"
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Keep(ctx, func() (int, bool, error) { return Put(runtimeDir, socket) }, slog.New(slog.DiscardHandler))
	}()
	defer func() {
		cancel()
		<-done
	}()
	for range 2 {
		dockerd := startDockerd(t)
		pid := strconv.Itoa(dockerd.Process.Pid)
		if err := os.WriteFile(filepath.Join(runtimeDir, "docker.pid"), []byte(pid), 0o600); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if runs, linked := Linked(runtimeDir, socket); runs && linked {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("there is no link")
			}
		}
		_ = dockerd.Process.Kill()
		_ = dockerd.Wait()
	}
	if runs, _ := Linked(runtimeDir, socket); runs {
		t.Error("a dockerd that has ended is taken for one that runs")
	}
	if runs, linked := Linked(t.TempDir(), socket); runs || linked {
		t.Error("a dockerd is seen where there is none")
	}
}

func startDockerd(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", `mount -t tmpfs run /run && printf dockerd >/proc/$$/comm && echo ready && read -r forever`)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) {
		t.Skipf("user namespaces cannot be made here: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var word string
	if _, err := fmt.Fscan(out, &word); err != nil || word != "ready" {
		t.Fatalf("%q, %v", word, err)
	}
	return cmd
}

// TestPutFor_TakesOnlyRootlessKitsChild has a shell called rootlesskit, and what a stale child_pid may name.
func TestPutFor_TakesOnlyRootlessKitsChild(t *testing.T) {
	other := startDockerd(t).Process.Pid
	if err := os.Mkdir(fmt.Sprintf("/proc/%d/root/run/docker", other), 0o755); err != nil {
		t.Fatal(err)
	}
	runtimeDir := t.TempDir()
	if err := os.Mkdir(filepath.Join(runtimeDir, "dockerd-rootless"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(runtimeDir, "dockerd-rootless", "child_pid"), []byte(strconv.Itoa(other)), 0o600); err != nil {
		t.Fatal(err)
	}
	if pid, made, err := Put(runtimeDir, "/somewhere/docker.sock"); pid != 0 || made || err != nil {
		t.Errorf("a process that took the pid since: %d %t %v", pid, made, err)
	}

	shell, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	for name, is := range map[string]bool{"rootlesskit": true, "crun": false} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, shell, 0o700); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(path, "-c", `exec 3<&0; "$0" -c 'echo ready $$; read -r forever <&3; :' & wait`, path)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var word string
		var child int
		if _, err := fmt.Fscan(out, &word, &child); err != nil {
			t.Fatal(err)
		}
		if got := isRootlessKits(child); got != is {
			t.Errorf("a child of %s: %t", name, got)
		}
		if isRootlessKits(cmd.Process.Pid) {
			t.Errorf("%s itself, whose parent is another program, is taken for RootlessKit's child", name)
		}
		stdin.Close()
		_ = cmd.Wait()
	}
	if isRootlessKits(1 << 30) {
		t.Error("a process that is not")
	}
}

func TestPidIn_TakesOnlyPids(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	for text, want := range map[string]int{"42\n": 42, "": 0, "x": 0, "-1": 0, "0": 0} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := pidIn(path); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if got := pidIn(path + ".gone"); got != 0 {
		t.Errorf("no file: %d", got)
	}
}
