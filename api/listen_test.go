// The socket: who may have it, who may reach it, and what a dead daemon leaves.

package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestListen_MakesAPrivateSocketInAPrivateDirectory(t *testing.T) {
	dir := shortDir(t) + "/a/b"
	old := syscall.Umask(0)
	ln, err := Listen(dir)
	syscall.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, SocketPath(dir): 0o600, filepath.Join(dir, lockName): 0o600} {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != want {
			t.Errorf("%s: mode %04o, want %04o", path, fi.Mode().Perm(), want)
		}
	}
	if err := ln.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := ln.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := os.Lstat(SocketPath(dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Close left the socket: %v", err)
	}
}

func TestListen_RefusesDirectoriesThatOthersMayEnter(t *testing.T) {
	base := shortDir(t)
	open := filepath.Join(base, "open")
	link := filepath.Join(base, "link")
	file := filepath.Join(base, "file")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o755), os.Symlink(base, link), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	notOurs := "/usr"
	if os.Geteuid() == 0 {
		notOurs = filepath.Join(base, "theirs")
		if err := errors.Join(os.Mkdir(notOurs, 0o700), os.Chown(notOurs, 12345, 12345)); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct{ dir, says string }{
		{open, "chmod 700 " + open},
		{link, "is not a directory but a symbolic link"},
		{file, "--runtime-dir"},
		{file + "/under", "--runtime-dir"},
		{notOurs, "not to you"},
		{filepath.Join(base, strings.Repeat("x", 110)), "shorter --runtime-dir"},
	}
	for _, tt := range tests {
		ln, err := Listen(tt.dir)
		if err == nil {
			_ = ln.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want an error that says %q", tt.dir, err, tt.says)
		}
	}
	if left, err := os.ReadDir(open); err != nil || len(left) != 0 {
		t.Errorf("something was left in the open directory: %v, %v", left, err)
	}
}

func TestListen_OneDaemonPerDirectory(t *testing.T) {
	dir := shortDir(t) + "/run"
	first, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Listen(dir)
	if !errors.Is(err, ErrAnotherDaemon) || !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), SocketPath(dir)) {
		t.Errorf("second Listen: %v, want ErrAnotherDaemon that names the socket", err)
	}
	// A cleaner of temporary files took the lock away: the living socket still counts.
	if err := os.Remove(filepath.Join(dir, lockName)); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(dir); !errors.Is(err, ErrAnotherDaemon) {
		t.Errorf("Listen without the lock file: %v, want ErrAnotherDaemon", err)
	}
	if conn, err := net.Dial("unix", SocketPath(dir)); err != nil {
		t.Errorf("the first daemon's socket is gone: %v", err)
	} else {
		_ = conn.Close()
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Listen(dir)
	if err != nil {
		t.Fatalf("Listen after Close: %v", err)
	}
	_ = again.Close()
}

func TestListen_ReplacesADeadDaemonsSocketOnly(t *testing.T) {
	dir := shortDir(t) + "/run"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	leaveSocket(t, SocketPath(dir))
	ln, err := Listen(dir)
	if err != nil {
		t.Fatalf("Listen over a stale socket: %v", err)
	}
	_ = ln.Close()

	if err := os.WriteFile(SocketPath(dir), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(dir); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("Listen over a file: %v", err)
	}
	if b, err := os.ReadFile(SocketPath(dir)); err != nil || string(b) != "precious" {
		t.Errorf("the file became %q, %v", b, err)
	}
}

// TestListen_TakesTheSocketThatSystemdHolds is systemd: it holds the socket, and starts a copy of this program with it, twice.
func TestListen_TakesTheSocketThatSystemdHolds(t *testing.T) {
	if dir := os.Getenv("OVL_TEST_ACTIVATED"); dir != "" {
		beActivated(dir)
		return
	}
	dir := shortDir(t) + "/run"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := SocketPath(dir)
	held, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	descriptor := func(ln interface{ File() (*os.File, error) }) *os.File {
		f, err := ln.File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	start := func(dir string, files ...*os.File) string {
		cmd := exec.Command("/bin/sh", "-c", fmt.Sprintf(`LISTEN_PID=$$ LISTEN_FDS=%d exec "$0" "$@"`, len(files)),
			"/proc/self/exe", "-test.run=^TestListen_TakesTheSocketThatSystemdHolds$")
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Args[3] = self
		cmd.Env = []string{"OVL_TEST_ACTIVATED=" + dir}
		cmd.ExtraFiles = files
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	for range 2 { // the second finds what the first has left
		early, err := net.Dial("unix", path) // before there is a daemon
		if err != nil {
			t.Fatal(err)
		}
		out := start(dir, descriptor(held))
		if !strings.Contains(out, "again: <nil>, of systemd: true\n") {
			t.Errorf("the second of one process: %s", out)
		}
		if !strings.Contains(out, "served one at "+path+"\n") || !strings.Contains(out, "environment: \"\"\n") {
			t.Errorf("with the socket of systemd: %s", out)
		}
		b := make([]byte, 10)
		if n, _ := early.Read(b); string(b[:n]) != "hello" {
			t.Errorf("who connected early got %q", b[:n])
		}
		_ = early.Close()
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("Close took systemd's socket away: %v", err)
		}
	}
	for _, files := range [][]*os.File{{descriptor(held), descriptor(other.(*net.TCPListener))}, {descriptor(other.(*net.TCPListener))}} {
		if out := start(dir, files...); !strings.Contains(out, "ListenStream="+path) || !strings.Contains(out, other.Addr().String()) {
			t.Errorf("with another socket: %s", out)
		}
	}
	if out := start(shortDir(t), descriptor(held)); !strings.Contains(out, "ListenStream=") || !strings.Contains(out, path) {
		t.Errorf("with the socket of another runtime directory: %s", out)
	}
}

func beActivated(dir string) {
	ln, err := Listen(dir)
	if err != nil {
		fmt.Println("error:", err)
		return
	}
	conn, err := ln.Accept()
	if err != nil {
		fmt.Println("accept:", err)
		return
	}
	_, _ = conn.Write([]byte("hello"))
	_ = conn.Close()
	fmt.Printf("served one at %s\nenvironment: %q\n", ln.Path(), os.Getenv("LISTEN_FDS"))
	_ = ln.Close()
	again, err := Listen(dir) // systemd listens there, no other daemon
	fmt.Printf("again: %v, of systemd: %t\n", err, err == nil && again.Activated())
	if err == nil {
		_ = again.Close()
	}
}

// leaveSocket leaves what a killed daemon leaves.
func leaveSocket(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
}

// TestListener_AnswersItsOwnUserOnly needs root to become another user, in a copy of this program.
func TestListener_AnswersItsOwnUserOnly(t *testing.T) {
	if path := os.Getenv("OVL_TEST_DIAL"); path != "" {
		beAnotherUser(path)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	c := serve(t, &fakeBackend{})
	run := filepath.Dir(c.socket)
	base := filepath.Dir(run)
	for _, p := range []string{base, run, c.socket} { // open every door but the one under test
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(base, "other.test")
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestListener_AnswersItsOwnUserOnly$")
	cmd.Dir = "/"
	cmd.Env = []string{"OVL_TEST_DIAL=" + c.socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	before := OtherUsers()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if n := OtherUsers() - before; n == 0 {
		t.Error("the other user's connection is not counted")
	}
	if !strings.Contains(string(out), "belongs to uid 0") || !strings.Contains(string(out), "closed: ") {
		t.Errorf("another user saw:\n%s", out)
	}
	if _, err := c.Status(context.Background()); err != nil {
		t.Errorf("after that our own request: %v", err)
	}
}

func beAnotherUser(path string) {
	_, err := NewClient(path).Status(context.Background())
	fmt.Println("client:", err)
	conn, err := net.Dial("unix", path)
	if err != nil {
		fmt.Println("dial:", err)
		return
	}
	_, _ = conn.Write([]byte("GET /v1/status HTTP/1.0\r\n\r\n"))
	b := make([]byte, 100)
	n, err := conn.Read(b)
	if n > 0 {
		fmt.Printf("answered: %s\n", b[:n])
		return
	}
	fmt.Println("closed:", err)
}

func TestServer_RefusesPIDsOfAnotherNamespace(t *testing.T) {
	if path := os.Getenv("OVL_TEST_FOREIGN"); path != "" {
		c := NewClient(path)
		_, byPID := c.Attach(context.Background(), AttachRequest{PID: 1})
		_, byPath := c.Attach(context.Background(), AttachRequest{Netns: "/x/../proc/1/ns/net"})
		fmt.Printf("attach pid: %v\nattach path: %v\ndetach pid: %v\n", byPID, byPath, c.Detach(context.Background(), "1", ""))
		_, status := c.Status(context.Background())
		_, named := c.Attach(context.Background(), AttachRequest{Netns: "/run/netns/x"})
		_, byFD := c.Attach(context.Background(), AttachRequest{NetnsFD: 5})
		fmt.Printf("others: %v %v %v %v\n", status, named, byFD, c.Detach(context.Background(), "web", ""))
		return
	}
	b := &fakeBackend{}
	c := serve(t, b)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestServer_RefusesPIDsOfAnotherNamespace$")
	cmd.Env = []string{"OVL_TEST_FOREIGN=" + c.socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) {
		t.Skipf("user namespaces cannot be made here: %v", err)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, what := range []string{"attach pid", "attach path", "detach pid"} {
		if !strings.Contains(string(out), what+": you are in another PID namespace") {
			t.Errorf("%s was not refused:\n%s", what, out)
		}
	}
	if !strings.Contains(string(out), "others: <nil> <nil> <nil> <nil>\n") {
		t.Errorf("what names no pid was refused:\n%s", out)
	}
	if b.caller != cmd.Process.Pid {
		t.Errorf("its descriptor was taken for one of process %d, it is %d", b.caller, cmd.Process.Pid)
	}
	if _, err := c.Attach(context.Background(), AttachRequest{PID: 1}); err != nil {
		t.Errorf("from our own PID namespace: %v", err)
	}
	if err := c.Detach(context.Background(), "1", ""); err != nil {
		t.Errorf("from our own PID namespace: %v", err)
	}
}

func TestCallerPID_IsWhoeverHasConnected(t *testing.T) {
	b := &fakeBackend{}
	c := serve(t, b)
	if _, err := c.Attach(t.Context(), AttachRequest{NetnsFD: 3}); err != nil || b.caller != os.Getpid() {
		t.Errorf("caller %d, %v; want %d", b.caller, err, os.Getpid())
	}
	if _, err := CallerPID(t.Context()); !errors.Is(err, ErrInvalid) {
		t.Errorf("without a connection: %v", err)
	}
}

func TestCallerLives_UntilItEnds(t *testing.T) {
	if path := os.Getenv("OVL_TEST_CALLER"); path != "" {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Read(make([]byte, 1)) // until it is told
		return
	}
	path := filepath.Join(shortDir(t), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestCallerLives_UntilItEnds$")
	cmd.Env = []string{"OVL_TEST_CALLER=" + path}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx := withPeer(t.Context(), conn)
	if pid, err := CallerPID(ctx); err != nil || pid != cmd.Process.Pid {
		t.Errorf("caller %d, %v; want %d", pid, err, cmd.Process.Pid)
	}
	if err := CallerLives(ctx); err != nil {
		t.Errorf("while it waits: %v", err)
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := CallerLives(ctx); !errors.Is(err, ErrNotFound) {
		t.Errorf("when it has ended: %v", err)
	}
	if err := CallerLives(t.Context()); !errors.Is(err, ErrInvalid) {
		t.Errorf("without a connection: %v", err)
	}
}

func TestClient_SaysWhenNobodyIsThere(t *testing.T) {
	dir := shortDir(t)
	stale := filepath.Join(dir, "stale.sock")
	leaveSocket(t, stale)
	for _, path := range []string{filepath.Join(dir, "none.sock"), stale} {
		_, err := NewClient(path).Status(context.Background())
		if !errors.Is(err, ErrNotRunning) || !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), path) ||
			!strings.Contains(err.Error(), "rootless-ovl up") {
			t.Errorf("%s: %v", path, err)
		}
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewClient(file).Status(context.Background()); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
}

func TestClient_SurvivesStrangeServers(t *testing.T) {
	tests := []struct{ name, answer, says string }{
		{"closes", "", "went away"},
		{"not HTTP", "hello\r\n\r\n", "went away"},
		{"HTML error", "HTTP/1.1 500 Oops\r\nContent-Length: 3\r\n\r\n<p>", "500 Oops"},
		{"not JSON", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "something else than expected"},
		{"cut short", "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}", "went away"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "s")
			ln, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Read(make([]byte, 4096))
					_, _ = conn.Write([]byte(tt.answer))
					_ = conn.Close()
				}
			}()
			_, err = NewClient(path).Status(context.Background())
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v, want an error that says %q", err, tt.says)
			}
		})
	}
}

func TestClient_SaysWhenTheDaemonDoesNotAnswer(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	ln, err := net.Listen("unix", path) // whose connections the kernel takes
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = NewClient(path).Status(ctx)
	_, derr := NewClient(path).Dial(ctx, "web:80")
	for _, err := range []error{err, derr} {
		if !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "the daemon at "+path+" does not answer") ||
			!strings.Contains(err.Error(), "log") || !strings.Contains(err.Error(), "start it again") {
			t.Errorf("%v", err)
		}
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = NewClient(path).Status(gone); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "does not answer") {
		t.Errorf("given up: %v", err)
	}
}

func TestDirs_FollowTheXDGVariables(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	t.Setenv("XDG_STATE_HOME", "/s")
	t.Setenv("HOME", "/home/u")
	if got, err := RuntimeDir(); err != nil || got != "/run/user/7/rootless-ovl" {
		t.Errorf("RuntimeDir: %q, %v", got, err)
	}
	if got, err := StateDir(); err != nil || got != "/s/rootless-ovl" {
		t.Errorf("StateDir: %q, %v", got, err)
	}
	if got := SocketPath("/run/user/7/rootless-ovl"); got != "/run/user/7/rootless-ovl/api.sock" {
		t.Errorf("SocketPath: %q", got)
	}
	t.Setenv("XDG_STATE_HOME", "relative")
	if got, err := StateDir(); err != nil || got != "/home/u/.local/state/rootless-ovl" {
		t.Errorf("StateDir with a relative XDG_STATE_HOME: %q, %v", got, err)
	}
	t.Setenv("HOME", "")
	if _, err := StateDir(); err == nil || !strings.Contains(err.Error(), "--state-dir") {
		t.Errorf("StateDir without HOME: %v", err)
	}
	for _, bad := range []string{"", "relative"} {
		t.Setenv("XDG_RUNTIME_DIR", bad)
		if _, err := RuntimeDir(); err == nil || !strings.Contains(err.Error(), "export XDG_RUNTIME_DIR=/run/user/$UID") {
			t.Errorf("RuntimeDir with XDG_RUNTIME_DIR=%q: %v", bad, err)
		}
	}
}
