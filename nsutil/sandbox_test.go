// Tests of the namespaces that `run` makes, with real commands in them.

package nsutil

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sandboxed runs a command in a Sandbox to the end and returns what it wrote, its exit code and Release's error.
func sandboxed(t *testing.T, spec Spec) (stdout, stderr string, code int, s *Sandbox, released error) {
	t.Helper()
	out, errs := tempFile(t), tempFile(t)
	spec.Stdout, spec.Stderr = out, errs
	s = startSandbox(t, spec)
	released = s.Release()
	code, err := s.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return content(t, out), content(t, errs), code, s, released
}

func startSandbox(t *testing.T, spec Spec) *Sandbox {
	t.Helper()
	if spec.Stdin == nil {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { null.Close() })
		spec.Stdin = null
	}
	s, err := Start(spec)
	if errors.Is(err, ErrNoUserns) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func tempFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func content(t *testing.T, f *os.File) string {
	t.Helper()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func sh(script string, args ...string) []string {
	return append([]string{"/bin/sh", "-c", script, "sh"}, args...)
}

func TestSandbox_PassesExitCodesThrough(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("data"), 0o644); err != nil {
		t.Fatal(err)
	}
	noInterpreter := filepath.Join(dir, "script")
	if err := os.WriteFile(noInterpreter, []byte("#!/absent/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		args   []string
		code   int
		failed bool
	}{
		{"success", []string{"true"}, 0, false},
		{"failure", sh("exit 42"), 42, false},
		{"killed", sh("kill -KILL $$"), 137, false},
		{"terminated", sh("kill -TERM $$"), 143, false},
		{"not in PATH", []string{"no-such-command-anywhere"}, 127, true},
		{"no such file", []string{"/no/such/file"}, 127, true},
		{"not executable", []string{plain}, 126, true},
		{"a directory", []string{dir}, 126, true},
		{"no interpreter", []string{noInterpreter}, 127, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, stderr, code, _, err := sandboxed(t, Spec{Args: tt.args})
			if code != tt.code {
				t.Errorf("exit code %d, want %d (%v, %s)", code, tt.code, err, stderr)
			}
			var ce *CommandError
			if tt.failed != errors.As(err, &ce) {
				t.Errorf("Release: %v", err)
			}
			if tt.failed && (ce.Code != tt.code || !strings.Contains(err.Error(), tt.args[0])) {
				t.Errorf("Release: %d %q", ce.Code, err)
			}
		})
	}
}

func TestSandbox_RunsAsTheUserWithoutCapabilities(t *testing.T) {
	out, stderr, code, _, err := sandboxed(t, Spec{Args: sh("id -u; id -g; grep Cap /proc/self/status; ls -l /proc/self/ns/net")})
	if err != nil || code != 0 {
		t.Fatalf("%v, exit %d: %s", err, code, stderr)
	}
	lines := strings.Split(out, "\n")
	if lines[0] != strconv.Itoa(os.Geteuid()) || lines[1] != strconv.Itoa(os.Getegid()) {
		t.Errorf("runs as %s:%s", lines[0], lines[1])
	}
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb"} {
		if !strings.Contains(out, set+":\t0000000000000000\n") {
			t.Errorf("%s is not empty:\n%s", set, out)
		}
	}
	own, err := pathInode("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out, fmt.Sprintf("net:[%d]", own)) {
		t.Error("runs in our network namespace")
	}
}

func TestSandbox_MapRootIsRootOfItsNamespaces(t *testing.T) {
	out, stderr, code, _, err := sandboxed(t, Spec{MapRoot: true, Args: sh("id -u; ip link set lo up && ip -o link show lo")})
	if err != nil || code != 0 {
		t.Fatalf("%v, exit %d: %s", err, code, stderr)
	}
	if !strings.HasPrefix(out, "0\n") || !strings.Contains(out, "UP") {
		t.Errorf("output %q", out)
	}
}

func TestSandbox_KeepsEnvironmentDirectoryAndArguments(t *testing.T) {
	dir := t.TempDir()
	env := []string{"PATH=/usr/bin:/bin", "PLAIN=a b", "BYTES=\xff\xfe\n", "EMPTY="}
	out, stderr, code, _, err := sandboxed(t, Spec{
		Args: sh(`pwd; printf '%s|' "$@"; tr '\0' '#' </proc/$$/environ`, "one", "", "two words", "\xff"),
		Env:  env,
		Dir:  dir,
	})
	if err != nil || code != 0 {
		t.Fatalf("%v, exit %d: %s", err, code, stderr)
	}
	want := dir + "\none||two words|\xff|" + strings.Join(env, "#") + "#"
	if out != want {
		t.Errorf("got  %q\nwant %q", out, want)
	}
}

func TestStart_RefusesWhatCannotRun(t *testing.T) {
	dir := t.TempDir()
	if s, err := Start(Spec{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("no command: %v %v", s, err)
	}
	absent := filepath.Join(dir, "absent")
	if s, err := Start(Spec{Args: []string{"true"}, Dir: absent}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), absent) {
		t.Errorf("absent directory: %v %v", s, err)
	}
}

func TestSandbox_HasItsOwnResolvConf(t *testing.T) {
	before, err := os.ReadFile("/etc/resolv.conf")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("no /etc/resolv.conf here")
	}
	if err != nil {
		t.Fatal(err)
	}
	const text = "nameserver 10.5.1.1\nsearch ovl\n"
	out, stderr, code, s, err := sandboxed(t, Spec{ResolvConf: []byte(text), Args: sh("cat /etc/resolv.conf; ls /etc | wc -l")})
	if err != nil || code != 0 {
		t.Fatalf("%v, exit %d: %s", err, code, stderr)
	}
	if !strings.HasPrefix(out, text) {
		t.Errorf("resolv.conf inside: %q", out)
	}
	list, err := os.ReadDir("/etc")
	if err != nil {
		t.Fatal(err)
	}
	if n, _ := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(out, text))); n < len(list)/2 {
		t.Errorf("only %d of %d files are left in /etc", n, len(list))
	}
	if w := s.Warnings(); len(w) != 0 {
		t.Errorf("warnings: %q", w)
	}
	if after, _ := os.ReadFile("/etc/resolv.conf"); !bytes.Equal(before, after) {
		t.Error("the host's resolv.conf has changed")
	}
	out, _, _, _, err = sandboxed(t, Spec{Args: sh("cat /etc/resolv.conf")})
	if err != nil || out != string(before) {
		t.Errorf("without one of its own: %v %q", err, out)
	}
}

// The steps of overlayFile and hideSocket, on files that a test can arrange: run in a mapped-root sandbox by the test
// binary itself.
func TestOverlayFile_FollowsLinksAndSparesNeighbours(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"run/stub.conf": "host\n", "run/neighbour": "here\n"} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"link": "run/stub.conf", "dangling": "run/absent"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	sock := filepath.Join(dir, "sock")
	l, err := unixListener(sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	out, stderr, code, _, err := sandboxed(t, Spec{
		MapRoot: true,
		Args:    []string{"/proc/self/exe"}, // which there is still this test binary
		Env:     []string{roleEnv + "=overlay", "DIR=" + dir},
	})
	if err != nil || code != 0 {
		t.Fatalf("%v, exit %d: %s", err, code, stderr)
	}
	var got overlayResult
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	want := overlayResult{Link: "new\n", Stub: "new\n", Neighbour: "here\n", DanglingAbsent: true, Connect: unix.ECONNREFUSED.Error()}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "link")); string(b) != "host\n" {
		t.Errorf("outside the file is now %q", b)
	}
}

type overlayResult struct {
	Link, Stub, Neighbour string
	DanglingAbsent        bool
	Connect               string
}

// overlayRole is the inside of TestOverlayFile.
func overlayRole() {
	dir := os.Getenv("DIR")
	var r overlayResult
	if err := overlayFile(filepath.Join(dir, "link"), []byte("new\n")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	r.Link, r.Stub, r.Neighbour = read("link"), read("run/stub.conf"), read("run/neighbour")
	r.DanglingAbsent = errors.Is(overlayFile(filepath.Join(dir, "dangling"), nil), os.ErrNotExist)
	if err := hideSocket(filepath.Join(dir, "sock")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(dir, "sock")})
	}
	if err != nil {
		r.Connect = err.Error()
	}
	_ = json.NewEncoder(os.Stdout).Encode(r)
	os.Exit(0)
}

func unixListener(path string) (io.Closer, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		f.Close()
		return nil, err
	}
	if err := unix.Listen(fd, 1); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func TestSandbox_OpensPortsAndPingInside(t *testing.T) {
	out, stderr, code, _, err := sandboxed(t, Spec{Args: sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range")})
	if err != nil || code != 0 {
		t.Fatalf("%v, exit %d: %s", err, code, stderr)
	}
	gid := strconv.Itoa(os.Getegid())
	if f := strings.Fields(out); len(f) != 3 || f[0] != "0" || f[1] != gid || f[2] != gid {
		t.Errorf("settings inside: %q", out)
	}
}

func TestSandbox_WaitsToBeAttached(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "ran")
	out := tempFile(t)
	s := startSandbox(t, Spec{Args: sh(`touch "$1"; ip -j addr show dev eth0; ip -j route`, marker), Stdout: out})
	tap, err := open(t, s.PID()).CreateTAP(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Delete() }()
	if _, err := os.Stat(marker); err == nil {
		t.Fatal("the command ran before Release")
	}
	if err := s.Release(); err != nil {
		t.Fatal(err)
	}
	if code, err := s.Wait(); code != 0 || err != nil {
		t.Fatalf("exit %d, %v", code, err)
	}
	if text := content(t, out); !strings.Contains(text, `"10.5.1.2"`) || !strings.Contains(text, `"default"`) {
		t.Errorf("inside: %s", text)
	}
	if err := s.Release(); !errors.Is(err, ErrInvalid) {
		t.Errorf("second Release: %v", err)
	}
}

func TestSandbox_CloseBeforeReleaseRunsNothing(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "ran")
	cycle := func() {
		s, err := Start(Spec{Args: sh(`touch "$1"`, marker)})
		if errors.Is(err, ErrNoUserns) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		s.Close()
		if _, err := s.Wait(); err != nil {
			t.Error(err)
		}
	}
	cycle() // the runtime's poller opens its own descriptors at first use
	fds, goroutines, kids := fdCount(t), runtime.NumGoroutine(), len(children(t))
	for range 5 {
		cycle()
	}
	if _, err := os.Stat(marker); err == nil {
		t.Error("the command ran")
	}
	if now := goroutineCount(goroutines); fdCount(t) > fds || now > goroutines || len(children(t)) > kids {
		t.Errorf("descriptors %d -> %d, goroutines %d -> %d, children %d -> %d", fds, fdCount(t), goroutines, now, kids, len(children(t)))
	}
}

func TestSandbox_DiesWithItsParent(t *testing.T) {
	// A program of ours runs a sandbox whose command would sleep for long, and is killed.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=sandbox", "SCRIPT=echo $$; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, err = fmt.Fscan(out, &pid)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Skipf("no sandbox here: %v", err)
	}
	e, err := WatchExit(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	select {
	case <-e.Done():
	case <-time.After(10 * time.Second):
		t.Error("the command outlived us")
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

func TestSandbox_KillsWhatTheCommandLeaves(t *testing.T) {
	for _, tt := range []struct{ name, leave string }{ // each writes its pid to the pipe f
		{"in the background", `sleep 1000 & echo $! >f &`},
		{"in a session of its own", `setsid sh -c 'echo $$ >f; exec sleep 1000' &`},
		{"twice removed", `(sh -c 'sleep 1000 & echo $! >f; wait' &)`},
		{"deaf", `sh -c 'trap "" TERM HUP INT; echo $$ >f; while :; do sleep 0.01; done' &`},
		{"stopped", `sleep 1000 & kill -STOP $!; echo $! >f &`},
		{"in a user namespace within", `unshare -Urn sh -c 'echo $$ >f; exec sleep 1000' &`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bystander := exec.Command("sleep", "1000") // a child of ours that is none of the sandbox's
			if err := bystander.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = bystander.Process.Kill()
				_ = bystander.Wait()
			}()
			out, stderr, code, s, err := sandboxed(t, Spec{Dir: t.TempDir(), Args: sh("mkfifo f; " + tt.leave + "\nread pid <f; echo $pid; exit 3")})
			if err != nil || code != 3 || len(s.Warnings()) != 0 {
				t.Fatalf("%v, exit %d: %s; warnings %q", err, code, stderr, s.Warnings())
			}
			pid, err := strconv.Atoi(strings.TrimSpace(out))
			if err != nil {
				t.Fatalf("output %q, %s", out, stderr)
			}
			if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("process %d is still there: %v", pid, err)
			}
			if _, err := StartTime(bystander.Process.Pid); err != nil {
				t.Errorf("another child of ours is gone too: %v", err)
			}
		})
	}
}

func TestSandbox_ReapsOrphansWhileTheCommandRuns(t *testing.T) {
	// The orphan ends; the command waits until nobody has that pid any more, not even as a zombie.
	out, stderr, code, _, err := sandboxed(t, Spec{Args: sh(`pid=$(sh -c 'sleep 0.05 >/dev/null & echo $!')
i=0; while kill -0 $pid; do i=$((i+1)); [ $i -lt 1000 ] || exit 1; sleep 0.01; done 2>/dev/null; echo gone`)})
	if err != nil || code != 0 || out != "gone\n" {
		t.Errorf("%v, exit %d: %q %s", err, code, out, stderr)
	}
}

func TestSandbox_KeepsThePIDUntilWait(t *testing.T) {
	s := startSandbox(t, Spec{Args: []string{"true"}})
	if err := s.Release(); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if err := unix.Kill(s.PID(), 0); err != nil {
		t.Errorf("before Wait: %v", err)
	}
	if code, err := s.Wait(); err != nil || code != 0 {
		t.Errorf("Wait: %d, %v", code, err)
	}
	if err := unix.Kill(s.PID(), 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("after Wait: %v", err)
	}
}

func TestForwardSignals_LeavesIgnoredOnesIgnored(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", `trap '' HUP INT; exec "$0"`, "/proc/self/exe")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[3] = self
	wantTrapped(t, cmd, "TERM", unix.SIGHUP, unix.SIGINT, unix.SIGTERM)
}

// wantTrapped starts cmd, which is runSandbox without a terminal, with a command that traps the signal of that name, and checks
// that of sigs it gets that one.
func wantTrapped(t *testing.T, cmd *exec.Cmd, name string, sigs ...syscall.Signal) {
	t.Helper()
	cmd.Env = append(os.Environ(), roleEnv+"=sandbox",
		"SCRIPT=trap 'echo got "+name+"; exit 9' "+name+"; echo ready; while :; do sleep 0.01; done")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	var word string
	if _, err := fmt.Fscan(out, &word); err != nil {
		t.Skipf("no sandbox here: %v", err)
	}
	for _, sig := range sigs {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	rest, _ := io.ReadAll(out)
	if strings.TrimSpace(string(rest)) != "got "+name {
		t.Errorf("the command said %q", rest)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 9 {
		t.Errorf("exit: %v", err)
	}
}

// runSandbox is a program like `rootless-ovl run`: SCRIPT in a sandbox, signals passed on, its exit code ours.
func runSandbox() {
	s, err := Start(Spec{Args: sh(os.Getenv("SCRIPT"))})
	if err == nil {
		defer s.ForwardSignals()()
		err = s.Release()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(125)
	}
	code, err := s.Wait()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

func TestForwardSignals_PassesThemOn(t *testing.T) {
	for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGINT, unix.SIGQUIT} {
		t.Run(unix.SignalName(sig), func(t *testing.T) {
			wantTrapped(t, exec.Command("/proc/self/exe"), strings.TrimPrefix(unix.SignalName(sig), "SIG"), sig)
		})
	}
}

func TestForwardSignals_InterruptFromTheTerminalArrivesOnce(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer master.Close()
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Skip(err)
	}
	tty, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer tty.Close()
	cmd := exec.Command("/proc/self/exe")
	// The count goes to descriptor 1; after the first interrupt it waits long enough for a second to show.
	cmd.Env = append(os.Environ(), roleEnv+"=sandbox",
		"SCRIPT=n=0; trap 'n=$((n+1))' INT; echo ready; i=0; while [ $i -lt 300 ]; do sleep 0.01; [ $n -gt 0 ] && i=$((i+10)); done; echo interrupts $n")
	cmd.Stdin, cmd.Stderr = tty, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	var word string
	if _, err := fmt.Fscan(out, &word); err != nil {
		t.Skipf("no sandbox here: %v", err)
	}
	if _, err := master.Write([]byte{3}); err != nil { // ^C
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(out)
	_ = cmd.Wait()
	if strings.TrimSpace(string(rest)) != "interrupts 1" {
		t.Errorf("the command said %q", rest)
	}
}

func TestUsernsRefusal_NamesTheSetting(t *testing.T) {
	for _, tt := range []struct {
		path, value, cause, remedy string
	}{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "unprivileged_userns_clone", "sysctl -w kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/user/max_user_namespaces", "0", "max_user_namespaces", "sysctl -w user.max_user_namespaces"},
		{"/proc/sys/user/max_net_namespaces", "0", "max_net_namespaces", "sysctl -w user.max_net_namespaces"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor", "doctor"},
		{"", "", "forbids", "seccomp"},
	} {
		cause, remedy := usernsRefusal(func(path string) string {
			if path == tt.path {
				return tt.value
			}
			return ""
		})
		if !strings.Contains(cause, tt.cause) || !strings.Contains(remedy, tt.remedy) {
			t.Errorf("%s=%s: %q, %q", tt.path, tt.value, cause, remedy)
		}
	}
	if err := usernsError(&os.PathError{Op: "fork/exec", Path: "/proc/self/exe", Err: unix.EPERM}); !errors.Is(err, ErrNoUserns) || !errors.Is(err, unix.EPERM) {
		t.Errorf("error %v", err)
	}
}

func TestAppArmorProfile_AllowsUserns(t *testing.T) {
	p := AppArmorProfile("/home/me/bin/rootless-ovl")
	for _, line := range []string{`profile home.me.bin.rootless-ovl "/home/me/bin/rootless-ovl" flags=(unconfined) {`, "  userns,"} {
		if !strings.Contains(p, line+"\n") {
			t.Errorf("no line %q in\n%s", line, p)
		}
	}
}
