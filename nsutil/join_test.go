// Tests of commands in the namespaces of containers that are there.

package nsutil

import (
	"errors"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// runIn runs a command in the namespaces of a process to the end.
func runIn(t *testing.T, pid int, spec Spec) (stdout, stderr string, code int) {
	t.Helper()
	ns, err := OpenPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	out, errs := tempFile(t), tempFile(t)
	spec.Stdout, spec.Stderr = out, errs
	if spec.Stdin == nil {
		if spec.Stdin, err = os.Open(os.DevNull); err != nil {
			t.Fatal(err)
		}
		defer spec.Stdin.Close()
	}
	s, err := StartIn(ns, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Release(); err != nil && !errors.As(err, new(*CommandError)) {
		t.Fatal(err)
	}
	if code, err = s.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, w := range s.Warnings() {
		t.Logf("warning: %s", w)
	}
	return content(t, out), content(t, errs), code
}

func TestStartIn_IsInTheContainersNetworkWithTheHostsFiles(t *testing.T) {
	for _, m := range mappings {
		t.Run(m.name, func(t *testing.T) {
			h := startHolder(t, m)
			before := h.run("cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start").Out
			own := filepath.Join(t.TempDir(), "mine")
			if err := os.WriteFile(own, []byte("my file"), 0o600); err != nil {
				t.Fatal(err)
			}
			out, stderr, code := runIn(t, h.pid, Spec{
				Args:       sh(`readlink /proc/self/ns/net; readlink /proc/self/ns/user; cat "$1"; echo; cat /etc/resolv.conf; id -u; grep CapEff /proc/self/status; ip link add dummyless type veth && echo may`, own),
				ResolvConf: []byte("nameserver 10.213.7.1\n"),
			})
			if code != 0 {
				t.Fatalf("exit %d: %s%s", code, out, stderr)
			}
			lines := strings.Split(strings.TrimSpace(out), "\n")
			net, _ := os.Readlink("/proc/" + strconv.Itoa(h.pid) + "/ns/net")
			userns, _ := os.Readlink("/proc/" + strconv.Itoa(h.pid) + "/ns/user")
			uid := strconv.Itoa(m.uid)
			switch {
			case m.uid < 0:
				uid = strconv.Itoa(os.Geteuid())
			case m.nested:
				uid = "3"
			}
			want := []string{net, userns, "my file", "nameserver 10.213.7.1", uid}
			for i, w := range want {
				if len(lines) <= i || lines[i] != w {
					t.Fatalf("line %d is not %q:\n%s%s", i, w, out, stderr)
				}
			}
			if strings.HasSuffix(lines[5], "\t0000000000000000") || lines[len(lines)-1] != "may" {
				t.Errorf("without capabilities:\n%s%s", out, stderr)
			}
			if after := h.run("cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start").Out; after != before {
				t.Errorf("ip_unprivileged_port_start of the container was %s, is %s", before, after)
			}
			if b, err := os.ReadFile("/etc/resolv.conf"); err == nil && strings.Contains(string(b), "10.213.7.1") {
				t.Error("the host's resolv.conf was changed")
			}
		})
	}
}

func TestStartIn_PassesExitCodesThrough(t *testing.T) {
	h := startHolder(t, mappings[1])
	for _, tt := range []struct {
		args []string
		code int
	}{
		{[]string{"true"}, 0}, {sh("exit 42"), 42}, {sh("kill -TERM $$"), 143}, {[]string{"no-such-command-anywhere"}, 127}, {[]string{os.TempDir()}, 126},
	} {
		if _, stderr, code := runIn(t, h.pid, Spec{Args: tt.args}); code != tt.code {
			t.Errorf("%q: exit code %d, want %d: %s", tt.args, code, tt.code, stderr)
		}
	}
}

func TestStartIn_BecomesRootIfAsked(t *testing.T) {
	out, stderr, code := runIn(t, startHolder(t, mappings[0]).pid, Spec{Args: sh("id -u"), MapRoot: true})
	if code != 0 || out != "0\n" {
		t.Errorf("exit %d, %q %s", code, out, stderr)
	}
	h := startHolder(t, mappings[1])
	ns, err := OpenPID(h.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if _, err := StartIn(ns, Spec{Args: []string{"true"}, MapRoot: true}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "--root") {
		t.Errorf("where there is none: %v", err)
	}
}

// Podman's --userns=auto has nobody of the host inside: neither the user nor his files' owner.
func TestStartIn_IsRootWhereTheUserIsNotMapped(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("newuidmap"); err != nil {
		t.Skip(err)
	}
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	pid := strconv.Itoa(cmd.Process.Pid)
	for tool, file := range map[string]string{"newuidmap": "/etc/subuid", "newgidmap": "/etc/subgid"} {
		first := ""
		b, _ := os.ReadFile(file)
		for line := range strings.Lines(string(b)) {
			if f := strings.Split(strings.TrimSpace(line), ":"); len(f) == 3 && (f[0] == me.Username || f[0] == me.Uid) {
				first = f[1]
			}
		}
		if first == "" {
			t.Skipf("%s has no entry for %s", file, me.Username)
		}
		if out, err := exec.Command(tool, pid, "0", first, "1000").CombinedOutput(); err != nil {
			t.Skipf("%s: %v: %s", tool, err, out)
		}
	}
	out, stderr, code := runIn(t, cmd.Process.Pid, Spec{Args: sh("id -u; id -g; cat /etc/resolv.conf"), ResolvConf: []byte("nameserver 10.213.7.1\n")})
	if code != 0 || out != "0\n0\nnameserver 10.213.7.1\n" {
		t.Errorf("exit %d: %q %s", code, out, stderr)
	}
}

func TestStartIn_LeavesNothingBehind(t *testing.T) {
	h := startHolder(t, mappings[1])
	fds, procs := fdCount(t), len(children(t))
	for range 3 {
		if out, stderr, code := runIn(t, h.pid, Spec{Args: sh("sleep 300 >/dev/null 2>&1 & echo $!")}); code != 0 {
			t.Fatalf("%s %s", out, stderr)
		} else if pid, err := strconv.Atoi(strings.TrimSpace(out)); err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			t.Errorf("%q lives on", out)
		}
	}
	// The test holds these until its end: what its commands wrote.
	if got := fdCount(t); got != fds+6 {
		t.Errorf("%d descriptors, want %d", got, fds+6)
	}
	if got := len(children(t)); got != procs {
		t.Errorf("%d children, want %d", got, procs)
	}
}

func TestLookInMap(t *testing.T) {
	const auto = "         0     100000       1000\n"
	const podman = "         0       1001          1\n         1     100000      65536\n"
	for _, tt := range []struct {
		text   string
		id     int
		mapped int
		root   bool
	}{
		{podman, 1001, 0, true}, {podman, 100004, 5, true}, {podman, 1000, -1, true}, {auto, 1001, -1, true},
		{"1001 1001 1\n", 1001, 1001, false}, {"", 1001, -1, false}, {"x y z\n", 0, -1, false},
	} {
		if mapped, root := lookInMap(tt.text, tt.id); mapped != tt.mapped || root != tt.root {
			t.Errorf("%q, %d: %d %v, want %d %v", tt.text, tt.id, mapped, root, tt.mapped, tt.root)
		}
	}
}
