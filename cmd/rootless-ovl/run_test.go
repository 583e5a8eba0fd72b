// run: the order of its steps, and that it leaves nothing behind.

package main

import (
	"errors"
	"os"
	"os/signal"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// withSandbox has run start sb, and returns where it will note the Spec.
func (b *bench) withSandbox(sb *fakeSandbox) *nsutil.Spec {
	sb.notes = b.daemon.notes
	spec := new(nsutil.Spec)
	b.world.startSandbox = func(s nsutil.Spec) (sandbox, error) {
		*spec = s
		sb.notes.add("start")
		return sb, nil
	}
	return spec
}

func TestRun_AttachesBeforeTheCommandAndDetachesAfterIt(t *testing.T) {
	b := newBench(t).serve()
	b.world.hostResolvConf = func() string {
		return "# a comment\nnameserver 127.0.0.53\nsearch  example.org lan\n\noptions edns0\nsortlist 10.0.0.0\n"
	}
	b.daemon.status.Domain = "ovl.internal"
	spec := b.withSandbox(&fakeSandbox{code: 42, warnings: []string{"no resolv.conf"}})
	if code := b.run("run", "--name", "job", "--root", "--ip", "10.213.7.9", "--", "sh", "-c", "exit 42"); code != 42 {
		t.Errorf("exit status %d, %s", code, &b.err)
	}
	want := "start, attach 1234, forward signals, release, done, detach 1234, wait, stop forwarding, close"
	if got := b.daemon.notes.String(); got != want {
		t.Errorf("steps %s\nwant  %s", got, want)
	}
	if want := (api.AttachRequest{PID: 1234, Name: "job", Addr: "10.213.7.9"}); !reflect.DeepEqual(b.daemon.attached[0], want) {
		t.Errorf("asked for %+v, want %+v", b.daemon.attached[0], want)
	}
	if strings.Join(spec.Args, "|") != "sh|-c|exit 42" || !spec.MapRoot {
		t.Errorf("spec %+v", spec)
	}
	if got := string(spec.ResolvConf); got != "nameserver 10.213.7.1\nsearch ovl.internal example.org lan\noptions edns0\n" {
		t.Errorf("resolv.conf %q", got)
	}
	if got := b.err.String(); got != "rootless-ovl: warning: no resolv.conf\n" || b.out.Len() != 0 {
		t.Errorf("printed %q and %q", &b.out, got)
	}
}

func TestRun_LeavesTheCommandsFlagsToTheCommand(t *testing.T) {
	for _, args := range [][]string{{"run", "ls", "--root", "-o"}, {"run", "--", "ls", "--root", "-o"}} {
		b := newBench(t).serve()
		spec := b.withSandbox(&fakeSandbox{})
		b.must(args...)
		if strings.Join(spec.Args, " ") != "ls --root -o" || spec.MapRoot {
			t.Errorf("%q: %+v", args, spec)
		}
	}
}

func TestRun_PrintsTheAttachmentApartFromTheCommandsOutput(t *testing.T) {
	b := newBench(t).serve()
	b.withSandbox(&fakeSandbox{})
	b.must("run", "-o", "json", "true")
	if b.out.Len() != 0 {
		t.Errorf("standard output %q", &b.out)
	}
	if got := jsonNames(t, b.err.String()); len(got) == 0 {
		t.Errorf("standard error %q", &b.err)
	}
}

func TestRun_CleansUpWhenAStepFails(t *testing.T) {
	tests := []struct {
		name   string
		break_ func(b *bench, sb *fakeSandbox)
		code   int
		says   string
		steps  string
	}{
		{"no subnet yet", func(b *bench, _ *fakeSandbox) {
			b.daemon.status = api.Status{State: api.StateWaitingForStore}
		}, 1, "no subnet yet (waiting-for-store)", ""},
		{"no sandbox", func(b *bench, _ *fakeSandbox) {
			b.world.startSandbox = func(nsutil.Spec) (sandbox, error) { return nil, errors.New("no user namespaces here") }
		}, 1, "no user namespaces here", ""},
		{"cannot release", func(_ *bench, sb *fakeSandbox) { sb.release = errors.New("broken pipe") },
			1, "broken pipe", "start, attach 1234, forward signals, release, stop forwarding, detach 1234, close"},
		{"not found", func(_ *bench, sb *fakeSandbox) {
			sb.release = &nsutil.CommandError{Code: 127, Text: "nothing: command not found"}
		}, 127, "nothing: command not found", "start, attach 1234, forward signals, release, stop forwarding, detach 1234, close"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t).serve()
			sb := &fakeSandbox{}
			b.withSandbox(sb)
			tt.break_(b, sb)
			code := b.run("run", "-o", "text", "nothing")
			b.checkError(code, tt.code, tt.says)
			if got := b.daemon.notes.String(); got != tt.steps {
				t.Errorf("steps %s\nwant  %s", got, tt.steps)
			}
		})
	}
}

func TestRun_ClosesTheSandboxWhenItCannotBeAttached(t *testing.T) {
	b := newBench(t).serve()
	b.withSandbox(&fakeSandbox{})
	b.daemon.attachErr = api.Errorf(api.CodeExhausted, "no free address")
	code := b.run("run", "true")
	b.checkError(code, 1, "no free address")
	if got := b.daemon.notes.String(); got != "start, attach 1234, close" {
		t.Errorf("steps %s", got)
	}
}

func TestRun_KeepsTheCommandsStatusWhenDetachFails(t *testing.T) {
	for _, tt := range []struct {
		err  error
		says string
	}{
		{api.Errorf(api.CodeNotFound, "no attachment"), ""}, // the daemon was faster
		{api.Errorf(api.CodeInternal, "netlink broke"), "rootless-ovl: warning: the command has ended and could not be detached: netlink broke\n"},
	} {
		b := newBench(t).serve()
		b.withSandbox(&fakeSandbox{code: 3})
		b.daemon.detachErr = tt.err
		if code := b.run("run", "true"); code != 3 || b.err.String() != tt.says {
			t.Errorf("%v: exit status %d, %q", tt.err, code, &b.err)
		}
	}
}

func TestRun_EndsAsItsCommandWouldWhenASignalComesFirst(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if signal.Ignored(sig) {
			continue // nohup runs these tests, and `run` leaves ignored what it found ignored
		}
		b := newBench(t).serve()
		b.withSandbox(&fakeSandbox{})
		start := b.world.startSandbox
		b.world.startSandbox = func(s nsutil.Spec) (sandbox, error) {
			// The signal is delivered, to us too, before the sandbox is there.
			ch := make(chan os.Signal, 1)
			signal.Notify(ch, sig)
			defer signal.Stop(ch)
			if err := syscall.Kill(syscall.Getpid(), sig); err != nil {
				t.Error(err)
			}
			<-ch
			return start(s)
		}
		if code := b.run("run", "true"); code != 128+int(sig) || b.err.Len() != 0 {
			t.Errorf("%v: exit status %d, %q", sig, code, &b.err)
		}
		if steps := b.daemon.notes.String(); strings.Contains(steps, "release") || !strings.Contains(steps, "close") { // the daemon may note its part late
			t.Errorf("%v: steps %s", sig, steps)
		}
	}
}

func TestCatchSignals_KeepsOneThatComesLate(t *testing.T) {
	c := catchSignals(t.Context())
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if sig := c.stop(); sig != syscall.SIGTERM || c.stop() != sig {
		t.Errorf("%v", sig)
	}
	if sig := catchSignals(t.Context()).stop(); sig != 0 {
		t.Errorf("without a signal: %v", sig)
	}
}

func TestReadResolvConf_IsTheHosts(t *testing.T) {
	want, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Skipf("no resolv.conf here: %v", err)
	}
	if got := readResolvConf(); got != string(want) {
		t.Errorf("%q", got)
	}
}

func TestRunError_NamesTheRun(t *testing.T) {
	failed := api.Errorf(api.CodeInUse, "attach pid 77: name taken")
	for name, want := range map[string]string{"a": "run a: name taken", "": "run: name taken"} {
		err := runError(failed, api.AttachRequest{PID: 77, Name: name})
		if err.Error() != want || !errors.Is(err, api.ErrInUse) {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
	if err := runError(failed, api.AttachRequest{PID: 7}); err.Error() != failed.Error() {
		t.Errorf("of another pid: %v", err)
	}
}
