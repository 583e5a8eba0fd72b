// This file is the daemon's cage, seen from within: a live daemon's own thread is made to do what it must not be able to.

package test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// sandboxStatus is what is said of the cage in the answer to GET /v1/status.
type sandboxStatus struct {
	Sandbox struct {
		Seccomp     bool              `json:"seccomp"`
		Landlock    int               `json:"landlock"`
		NoNewPrivs  bool              `json:"no_new_privs"`
		Off         map[string]string `json:"off"`
		MemoryLimit int64             `json:"memory_limit"`
		From        string            `json:"memory_limit_from"`
	} `json:"sandbox"`
}

// puppet is a thread of another process that makes system calls for us. Its process has strings for it in its environment.
type puppet struct {
	t    *testing.T
	tid  int
	regs unix.PtraceRegs
	env  []byte
	at   uintptr // of env in its memory
}

// with runs do with a thread of the process that waits in a system call, on a thread of our own: ptrace is a matter of threads.
func with(t *testing.T, pid int, do func(p *puppet)) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		if err != nil {
			t.Fatal(err)
		}
		if tid == pid { // what waits for the end of the daemon would hear of the stops of its first thread, too
			continue
		}
		p := &puppet{t: t, tid: tid, env: env, at: uintptr(statField(t, pid, 50))}
		if p.attach() {
			do(p)
			p.detach()
			return
		}
	}
	t.Fatal("no thread of the daemon waits in a system call")
}

// statField is a field of /proc/PID/stat, counted as in proc_pid_stat(5).
func statField(t *testing.T, pid, field int) uint64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // from the third on
	n, err := strconv.ParseUint(fields[field-3], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (p *puppet) attach() bool {
	switch err := unix.PtraceAttach(p.tid); err {
	case nil:
	case unix.EPERM:
		p.t.Skip("the daemon may not be traced here: kernel.yama.ptrace_scope?")
	default:
		return false // it has just ended
	}
	if !p.stopped() || unix.PtraceGetRegs(p.tid, &p.regs) != nil {
		return false
	}
	var code [2]byte
	_, err := unix.PtracePeekText(p.tid, uintptr(p.regs.Rip-2), code[:])
	if err != nil || code != [2]byte{0x0f, 0x05} { // SYSCALL
		_ = unix.PtraceDetach(p.tid)
		return false
	}
	return true
}

func (p *puppet) stopped() bool {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(p.tid, &status, unix.WALL, nil)
		if err != unix.EINTR {
			return err == nil && status.Stopped()
		}
	}
}

// call makes one system call.
func (p *puppet) call(number uintptr, args ...uintptr) (uintptr, syscall.Errno) {
	p.t.Helper()
	var a [6]uintptr
	copy(a[:], args)
	r := p.regs
	r.Rip -= 2
	r.Rax, r.Orig_rax = uint64(number), ^uint64(0) // -1: nothing is begun again
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = uint64(a[0]), uint64(a[1]), uint64(a[2]), uint64(a[3]), uint64(a[4]), uint64(a[5])
	if err := unix.PtraceSetRegs(p.tid, &r); err != nil {
		p.t.Fatal(err)
	}
	if err := unix.PtraceSingleStep(p.tid); err != nil || !p.stopped() {
		p.t.Fatalf("the daemon's thread does not step: %v", err)
	}
	if err := unix.PtraceGetRegs(p.tid, &r); err != nil {
		p.t.Fatal(err)
	}
	if result := int64(r.Rax); result < 0 && result > -4096 {
		return 0, syscall.Errno(-result)
	}
	return uintptr(r.Rax), 0
}

// text is where the value of a variable of its environment is in its memory.
func (p *puppet) text(variable string) uintptr {
	p.t.Helper()
	i := bytes.Index(append([]byte{0}, p.env...), []byte("\x00"+variable+"="))
	if i < 0 {
		p.t.Fatalf("%s is not in the daemon's environment", variable)
	}
	return p.at + uintptr(i+len(variable)+1)
}

func (p *puppet) detach() {
	if err := unix.PtraceSetRegs(p.tid, &p.regs); err != nil {
		p.t.Error(err)
	}
	if err := unix.PtraceDetach(p.tid); err != nil {
		p.t.Error(err)
	}
}

// needCage skips where the kernel has too little for the cage.
func needCage(t *testing.T) {
	t.Helper()
	abi, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if e != 0 || abi < 3 {
		t.Skipf("the kernel's landlock: ABI %d, %v", abi, e)
	}
}

func TestCage_ForbidsCallsAndPathsInsideTheDaemon(t *testing.T) {
	needCage(t)
	l := lab.New(t, 2)
	tries := func(h *lab.Host, flags ...string) map[string]syscall.Errno {
		t.Helper()
		secret := filepath.Join(h.Home(), "id_ed25519")
		if err := os.WriteFile(secret, []byte("secret"), 0o644); err != nil {
			t.Fatal(err)
		}
		made := fmt.Sprintf("/tmp/rovl-cage-%d-%s", os.Getpid(), h.Name)
		t.Cleanup(func() { _ = os.Remove(made) })
		d := h.UpEnv([]string{"CAGE_SECRET=" + secret, "CAGE_TMP=" + made, "CAGE_PROGRAM=/nowhere"}, append(flags, "--network", network.String())...)
		got := make(map[string]syscall.Errno)
		with(t, d.PID, func(p *puppet) {
			call := func(name string, number uintptr, args ...uintptr) {
				fd, errno := p.call(number, args...)
				got[name] = errno
				if errno == 0 {
					_, _ = p.call(unix.SYS_CLOSE, fd)
				}
			}
			here := ^uintptr(99) // AT_FDCWD
			call("execve", unix.SYS_EXECVE, p.text("CAGE_PROGRAM"), 0, 0)
			call("ptrace", unix.SYS_PTRACE, unix.PTRACE_PEEKDATA, uintptr(d.PID))
			call("mount", unix.SYS_MOUNT, 1, 1, 1)
			call("io_uring_setup", unix.SYS_IO_URING_SETUP, 1, 0)
			call("unshare", unix.SYS_UNSHARE, unix.CLONE_FS)
			call("socket of the kernel's ciphers", unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET, 0)
			call("read in the home", unix.SYS_OPENAT, here, p.text("CAGE_SECRET"), unix.O_RDONLY)
			call("write in the home", unix.SYS_OPENAT, here, p.text("CAGE_SECRET"), unix.O_WRONLY)
			call("make in /tmp", unix.SYS_OPENAT, here, p.text("CAGE_TMP"), unix.O_WRONLY|unix.O_CREAT, 0o600)
		})
		if s := d.Status(); s.State != "ready" {
			t.Errorf("afterwards the daemon is %s", s.State)
		}
		return got
	}
	shut := tries(l.Host(1))
	open := tries(l.Host(2), "--sandbox=off")
	for name, errno := range shut {
		if errno != unix.EPERM && errno != unix.EACCES {
			t.Errorf("%s in the daemon: %v, want it forbidden", name, errno)
		}
	}
	// What fails without a cage, too, would prove nothing.
	for name, errno := range open {
		if name == "write in the home" { // the file is root's
			continue
		}
		if errno == unix.EPERM || errno == unix.EACCES {
			t.Errorf("%s with --sandbox=off: %v: it is forbidden anyway", name, errno)
		}
	}
	if len(shut) != 9 || len(open) != 9 {
		t.Errorf("%v, %v", shut, open)
	}
}

func TestCage_IsOnByDefaultAndStatusTells(t *testing.T) {
	needCage(t)
	l := lab.New(t, 1)
	d := l.Host(1).UpEnv([]string{"GOMEMLIMIT=700MiB"}, "--network", network.String())
	var s sandboxStatus
	if err := d.Get("/v1/status", &s); err != nil {
		t.Fatal(err)
	}
	if b := s.Sandbox; !b.Seccomp || b.Landlock < 3 || !b.NoNewPrivs || len(b.Off) != 0 || b.MemoryLimit != 700<<20 || b.From != "GOMEMLIMIT" {
		t.Errorf("%+v", b)
	}
	if text := l.Host(1).CLI("status").Stdout; !strings.Contains(text, "seccomp, landlock (ABI ") || !strings.Contains(text, "700 MiB (GOMEMLIMIT)") {
		t.Errorf("status says\n%s", text)
	}
	for _, pid := range []int{d.PID, openerOf(t, d)} {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/status", pid, task.Name()))
			if err == nil && (!strings.Contains(string(b), "\nSeccomp:\t2\n") || !strings.Contains(string(b), "\nNoNewPrivs:\t1\n")) {
				t.Errorf("thread %s of %d is not in the cage:\n%s", task.Name(), pid, b)
			}
		}
	}
}

// openerOf is the daemon's second process.
func openerOf(t *testing.T, d *lab.Daemon) int {
	t.Helper()
	var children []string
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", d.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", d.PID, task.Name()))
		if err == nil {
			children = append(children, strings.Fields(string(b))...)
		}
	}
	if len(children) != 1 {
		t.Fatalf("children of the daemon: %v, want one", children)
	}
	pid, err := strconv.Atoi(children[0])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestCage_ADaemonWithoutItsOpenerEndsAndTheNextFindsAllAsItWas(t *testing.T) {
	needCage(t)
	h := lab.New(t, 1).Host(1)
	d := upEmbedded(h)
	a := join(t, h, "a")
	if err := unix.Kill(openerOf(t, d), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := d.Wait(); code != 1 {
		t.Errorf("the daemon ended with %d", code)
	}
	if log := d.LogText(); !strings.Contains(log, "opener") || strings.Contains(log, "detached") {
		t.Errorf("the log says\n%s", log)
	}
	d = upEmbedded(h)
	if list := d.Attachments(); len(list) != 1 || list[0].Addr != a.at.Addr {
		t.Errorf("attachments of the next daemon: %+v", list)
	}
	pings(t, a.Space, a.gateway)
}

func TestUp_MakesNoFileThatOthersCanRead(t *testing.T) {
	l, _ := lone(t)
	h := l.Host(1)
	seen := 0
	for _, root := range []string{filepath.Join(h.Home(), ".local/state/rootless-ovl"), filepath.Join(h.XDGRuntimeDir(), "rootless-ovl")} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := e.Info()
			if err != nil {
				return err
			}
			seen++
			if mode := fi.Mode(); mode.Perm()&0o077 != 0 && filepath.Base(path) != "subnet.env" {
				t.Errorf("%s has mode %v", path, mode)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if seen < 12 {
		t.Errorf("%d files only", seen)
	}
}
