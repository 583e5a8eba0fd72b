// Tests of run: a command on the overlay, as a CI job uses it.

package test

import (
	"bufio"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// run runs `rootless-ovl run -- args` on the host.
func run(h *lab.Host, args ...string) lab.Result {
	return h.CLI(append([]string{"run", "--"}, args...)...)
}

func TestRun_PassesOutputAndExitCodeThrough(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	for _, c := range []struct {
		script string
		code   int
	}{
		{"exit 0", 0}, {"exit 7", 7}, {"exit 255", 255}, {"kill -TERM $$", 128 + 15}, {"kill -KILL $$", 128 + 9},
	} {
		r := run(h, "sh", "-c", "echo out; echo err >&2; "+c.script)
		if r.Code != c.code || r.Stdout != "out\n" || !strings.Contains(r.Stderr, "err\n") {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q; want exit code %d", c.script, r.Code, r.Stdout, r.Stderr, c.code)
		}
	}
	r := h.RunWith(func(cmd *exec.Cmd) { cmd.Stdin = strings.NewReader("hello") }, h.Binary(), "run", "--", "cat")
	if r.Code != 0 || r.Stdout != "hello" {
		t.Errorf("standard input: exit code %d, %q", r.Code, r.Stdout)
	}
	if r := run(h, "no-such-program"); r.Code != 127 || !strings.Contains(r.Stderr, "no-such-program") {
		t.Errorf("a program that is not there: exit code %d, %q; want 127", r.Code, r.Stderr)
	}
	lab.Eventually(t, "nothing stays attached", func() bool { return len(d.Attachments()) == 0 })
}

func TestRun_IsOnTheOverlay(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.Outside.HTTPServer(t, port(lab.OutsideAddr, 80))
	b := join(t, s.h2, "b")
	b.HTTPServer(t, port(b.addr, 80))
	get := func(addr netip.Addr) string {
		return "exec 3<>/dev/tcp/" + addr.String() + "/80; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
	}
	r := run(s.h1, "bash", "-c", get(b.addr))
	subnet := mustPrefix(t, s.d1.Status().Subnet)
	body := r.Stdout[strings.LastIndex(r.Stdout, "\n")+1:]
	if addr, err := netip.ParseAddr(body); r.Code != 0 || err != nil || !subnet.Contains(addr) {
		t.Errorf("across: exit code %d, the peer's container saw %q; want an address of %s\n%s", r.Code, body, subnet, r.Stderr)
	}
	r = run(s.h1, "bash", "-c", get(lab.OutsideAddr))
	if body := r.Stdout[strings.LastIndex(r.Stdout, "\n")+1:]; r.Code != 0 || body != s.h1.Addr.String() {
		t.Errorf("outside: exit code %d, it saw %q, want %s\n%s", r.Code, body, s.h1.Addr, r.Stderr)
	}
}

func TestRun_ResolvConfNamesTheGateway(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	h.SetResolvConf("search lab.test\nnameserver " + lab.RouterAddr.String() + "\n")
	d := upEmbedded(h)
	r := run(h, "cat", "/etc/resolv.conf")
	if r.Code != 0 || !strings.Contains(r.Stdout, "nameserver "+d.Status().Gateway) || strings.Contains(r.Stdout, lab.RouterAddr.String()) {
		t.Errorf("exit code %d, resolv.conf:\n%s", r.Code, r.Stdout)
	}
	if !strings.Contains(r.Stdout, "lab.test") {
		t.Errorf("the host's search domain is lost:\n%s", r.Stdout)
	}
	if b, err := os.ReadFile(h.Dir + "/resolv.conf"); err != nil || !strings.Contains(string(b), lab.RouterAddr.String()) {
		t.Errorf("the host's own resolv.conf was touched: %q, %v", b, err)
	}
}

func TestRun_PassesSignalsOn(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1} {
		// The lab's own first process ignores signals, and run leaves alone what was ignored when it started.
		cmd := h.Command("env", "--default-signal=INT,HUP", h.Binary(), "run", "--name", "job", "--", "bash", "-c",
			`trap 'echo got; exit 42' TERM INT HUP USR1; echo ready; while :; do sleep 0.05; done`)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Start(cmd); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "ready" {
			t.Errorf("%v: the program printed %q first", sig, lines.Text())
		}
		if list := d.Attachments(); len(list) != 1 || list[0].Name != "job" {
			t.Errorf("attachments while it runs: %+v", list)
		}
		_ = cmd.Process.Signal(sig)
		if !lines.Scan() || lines.Text() != "got" {
			t.Errorf("%v did not reach the program: %q", sig, lines.Text())
		}
		_ = cmd.Wait()
		kill.Stop()
		if code := cmd.ProcessState.ExitCode(); code != 42 {
			t.Errorf("%v: exit code %d, want the program's 42", sig, code)
		}
		lab.Eventually(t, "it is detached", func() bool { return len(d.Attachments()) == 0 })
	}
}

// When run itself is killed, its command must not live on beside the overlay.
func TestRun_KilledLeavesNothing(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	cmd := h.Command(h.Binary(), "run", "--", "bash", "-c", "echo $$; exec sleep 300")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	lines.Scan()
	job := lines.Text()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	lab.Eventually(t, "the command is gone", func() bool {
		b, err := os.ReadFile("/proc/" + job + "/stat")
		return err != nil || strings.Contains(string(b), ") Z ")
	})
	lab.Eventually(t, "it is detached", func() bool { return len(d.Attachments()) == 0 })
}

// One run must not take the interface of another that got the same name after it.
func TestRun_DetachesOnlyItsOwn(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	r := h.Run("bash", "-c", `for loop in 1 2 3 4; do
		(for i in $(seq 12); do
			"$0" run --name racer -- sh -c 'sleep 0.02; grep -q eth0: /proc/net/dev && echo kept || echo LOST'
		done) & done; wait`, h.Binary())
	if strings.Contains(r.Stdout, "LOST") || !strings.Contains(r.Stdout, "kept") {
		t.Errorf("%q", r.Stdout)
	}
	lab.Eventually(t, "nothing stays attached", func() bool { return len(d.Attachments()) == 0 })
}

func TestRun_KillsWhatItsCommandLeaves(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	r := run(h, "sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!; exit 3")
	pid, err := strconv.Atoi(strings.TrimSpace(r.Stdout))
	if r.Code != 3 || err != nil {
		t.Fatalf("exit code %d, %q %s", r.Code, r.Stdout, r.Stderr)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("process %d: %v", pid, err)
	}
	// The same in namespaces of its own within.
	r = run(h, "sh", "-c", "unshare -Urn sh -c 'sleep 300 >/dev/null 2>&1 & echo $!'")
	if pid, err = strconv.Atoi(strings.TrimSpace(r.Stdout)); r.Code != 0 || err != nil {
		t.Fatalf("exit code %d, %q %s", r.Code, r.Stdout, r.Stderr)
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("process %d: %v", pid, err)
	}
	lab.Eventually(t, "nothing stays attached", func() bool { return len(d.Attachments()) == 0 })
}

func TestRun_NohupKeepsItAlive(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	upEmbedded(h)
	cmd := h.Command("nohup", h.Binary(), "run", "--", "sh", "-c", "echo ready; read line; exit 7")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Errorf("it printed %q", lines.Text())
	}
	_ = cmd.Process.Signal(unix.SIGHUP)
	in.Close()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 7 {
		t.Errorf("exit code %d, want the program's 7", code)
	}
}

func TestRun_WithoutDaemon(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	refused(t, run(l.Host(1), "true"), "rootless-ovl up")
}
