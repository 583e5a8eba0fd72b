// exec: whose namespaces, with what, and that it attaches and detaches nothing.

package main

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

func TestExec_JoinsTheAttachment(t *testing.T) {
	for _, tt := range []struct {
		ref   string
		pid   int
		netns string
	}{{"web", 815, ""}, {"815", 815, ""}, {"job7", 0, "/run/user/1000/netns/x"}} {
		b := newBench(t).serve()
		b.world.hostResolvConf = func() string { return "search lan\nnameserver 192.0.2.53\n" }
		for i := range b.daemon.attachments {
			b.daemon.attachments[i].DNS = &api.DNS{Server: "10.213.7.1", Search: []string{"ovl.internal"}}
		}
		sb := &fakeSandbox{code: 42, notes: b.daemon.notes}
		var spec nsutil.Spec
		b.world.joinSandbox = func(att api.Attachment, s nsutil.Spec) (sandbox, error) {
			if att.PID != tt.pid || att.Netns != tt.netns {
				t.Errorf("%s: joins %d %q", tt.ref, att.PID, att.Netns)
			}
			spec = s
			return sb, nil
		}
		if code := b.run("exec", "--root", tt.ref, "--", "ss", "-tln", "--root"); code != 42 || b.out.Len()+b.err.Len() != 0 {
			t.Errorf("%s: exit status %d, %q %q", tt.ref, code, &b.out, &b.err)
		}
		if strings.Join(spec.Args, " ") != "ss -tln --root" || !spec.MapRoot || !strings.Contains(string(spec.ResolvConf), "nameserver 10.213.7.1\nsearch ovl.internal lan\n") {
			t.Errorf("%s: %+v, %s", tt.ref, spec, spec.ResolvConf)
		}
		if got, want := b.daemon.notes.String(), "forward signals, release, done, wait, stop forwarding, close"; got != want {
			t.Errorf("%s: steps %s, want %s", tt.ref, got, want)
		}
	}
}

func TestExec_LeavesResolvConfWhereAnEngineHasTheGatewaysAddress(t *testing.T) {
	b := newBench(t).serve()
	b.daemon.attachments[1].WholeSubnet = true // and so without DNS
	b.world.joinSandbox = func(_ api.Attachment, s nsutil.Spec) (sandbox, error) {
		if s.ResolvConf != nil {
			t.Errorf("%s", s.ResolvConf)
		}
		return &fakeSandbox{notes: b.daemon.notes}, nil
	}
	b.must("exec", "web", "--", "true")
}

func TestExec_WithoutANameIsRun(t *testing.T) {
	b := newBench(t).serve()
	spec := b.withSandbox(&fakeSandbox{code: 3})
	if code := b.run("exec", "--", "curl", "-s", "http://web/"); code != 3 {
		t.Errorf("exit status %d, %s", code, &b.err)
	}
	if strings.Join(spec.Args, " ") != "curl -s http://web/" || len(b.daemon.attached) != 1 {
		t.Errorf("%+v, attached %v", spec, b.daemon.attached)
	}
}

func TestExec_RefusesWhatItCannotDo(t *testing.T) {
	b := newBench(t).serve()
	for _, args := range [][]string{{"exec"}, {"exec", "web"}, {"exec", "web", "--"}, {"exec", "--"}, {"exec", "web", "job7", "--", "true"}, {"exec", "a b", "--", "true"}, {"exec", "--", ""}} {
		code := b.run(args...)
		b.checkError(code, exitUsage)
	}
	code := b.run("exec", "nobody", "--", "true")
	b.checkError(code, exitFailed, `"nobody"`, "rootless-ovl ps")
	b.world.joinSandbox = func(api.Attachment, nsutil.Spec) (sandbox, error) { return nil, errors.New("process 815 has ended") }
	code = b.run("exec", "web", "--", "true")
	b.checkError(code, exitFailed, "process 815 has ended")
	b.world.joinSandbox = func(api.Attachment, nsutil.Spec) (sandbox, error) {
		return &fakeSandbox{notes: b.daemon.notes, release: &nsutil.CommandError{Code: 126, Text: "/etc: is a directory"}}, nil
	}
	code = b.run("exec", "web", "--", "/etc")
	b.checkError(code, 126, "/etc: is a directory")
}

func TestJoinSandbox_RefusesANamespaceThatIsNotTheAttachments(t *testing.T) {
	child := exec.Command("sleep", "infinity") // in a namespace of its own, as another container under a pid that was another's
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := child.Start(); err != nil {
		t.Skipf("no namespaces here: %v", err)
	}
	t.Cleanup(func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	})
	var st syscall.Stat_t
	if err := syscall.Stat(fmt.Sprintf("/proc/%d/ns/net", child.Process.Pid), &st); err != nil {
		t.Fatal(err)
	}
	sb, err := joinSandbox(api.Attachment{Name: "web", PID: child.Process.Pid, Inode: st.Ino + 1}, nsutil.Spec{Args: []string{"true"}})
	if err == nil {
		sb.Close()
	}
	if err == nil || !strings.Contains(err.Error(), `another network namespace than what was attached as "web"`) {
		t.Errorf("%v", err)
	}
}
