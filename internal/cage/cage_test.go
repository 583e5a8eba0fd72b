// These tests shut a child in, which is the test program once more, and have it try things: there is no way out of a cage.

package cage

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

const (
	childVar = "OVL_CAGE_CHILD"
	dirVar   = "OVL_CAGE_DIR"
)

// outcome is what a child has found.
type outcome struct {
	Report  Report
	Error   string
	Results map[string]string
}

var children = map[string]func() outcome{
	"forbidden":   tryForbidden,
	"needed":      tryNeeded,
	"no landlock": func() outcome { return withoutLandlock(Auto) },
	"on":          func() outcome { return withoutLandlock(On) },
	"off":         func() outcome { r, err := Enter(Off, Paths{}); return outcome{Report: r, Error: text(err)} },
}

func TestMain(m *testing.M) {
	if name := os.Getenv(childVar); name != "" {
		if err := json.NewEncoder(os.Stdout).Encode(children[name]()); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(t *testing.T, name string) outcome {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVar+"="+name, dirVar+"="+dir, "HOME="+t.TempDir())
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	var o outcome
	if err := json.Unmarshal(out, &o); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	return o
}

func needKernel(t *testing.T) {
	t.Helper()
	if k := OfKernel(); !k.Seccomp || k.Landlock < 6 {
		t.Skipf("this kernel has too little: %+v", k)
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func errnoText(e syscall.Errno) string {
	if e == 0 {
		return "ok"
	}
	return unix.ErrnoName(e)
}

func entered(r Report, err error) outcome {
	return outcome{Report: r, Error: text(err), Results: make(map[string]string)}
}

func tryForbidden() outcome {
	home, dir := os.Getenv("HOME"), os.Getenv(dirVar)
	secret := filepath.Join(home, "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		panic(err)
	}
	o := entered(Enter(On, Paths{Write: []string{dir}}))
	raw := func(name string, number uintptr, args ...uintptr) {
		var a [6]uintptr
		copy(a[:], args)
		_, _, e := syscall.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5])
		o.Results[name] = errnoText(e)
	}
	path, err := unix.BytePtrFromString("/bin/true")
	if err != nil {
		panic(err)
	}
	p := uintptr(unsafe.Pointer(path))
	all := ^uintptr(0)
	raw("execve", unix.SYS_EXECVE, p, 0, 0)
	raw("execveat", unix.SYS_EXECVEAT, all-99, p, 0, 0)
	raw("ptrace", unix.SYS_PTRACE, unix.PTRACE_TRACEME)
	raw("mount", unix.SYS_MOUNT, p, p, 0, unix.MS_BIND)
	raw("unshare", unix.SYS_UNSHARE, unix.CLONE_NEWUSER)
	raw("clone into a user namespace", unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD))
	raw("setns into a mount namespace", unix.SYS_SETNS, 0, unix.CLONE_NEWNS)
	raw("io_uring_setup", unix.SYS_IO_URING_SETUP, 1, 0)
	raw("bpf", unix.SYS_BPF)
	raw("keyctl", unix.SYS_KEYCTL)
	raw("userfaultfd", unix.SYS_USERFAULTFD)
	raw("perf_event_open", unix.SYS_PERF_EVENT_OPEN)
	raw("process_vm_readv", unix.SYS_PROCESS_VM_READV)
	raw("pidfd_getfd", unix.SYS_PIDFD_GETFD)
	raw("kexec_load", unix.SYS_KEXEC_LOAD)
	raw("init_module", unix.SYS_INIT_MODULE)
	raw("memfd_create", unix.SYS_MEMFD_CREATE, p, 0)
	raw("chroot", unix.SYS_CHROOT, p)
	raw("seccomp", unix.SYS_SECCOMP, 1, 0, 0)
	raw("packet socket", unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW, 0)
	raw("raw socket", unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	raw("vsock", unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	raw("alg socket", unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET, 0)
	raw("another netlink", unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT)
	raw("memory that can be run", unix.SYS_MMAP, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON, all, 0)
	raw("input for a terminal", unix.SYS_IOCTL, 0, unix.TIOCSTI, p)
	raw("kill all", unix.SYS_KILL, all, 0)
	raw("kill all by SIGKILL", unix.SYS_KILL, 0xffffffff, uintptr(unix.SIGKILL)) // as the kernel reads it, -1; landlock is behind it
	raw("signal to the parent", unix.SYS_KILL, uintptr(os.Getppid()), uintptr(unix.SIGKILL))
	raw("write to the limits of others", unix.SYS_PRLIMIT64, uintptr(os.Getppid()), unix.RLIMIT_NOFILE, 0, 0)
	raw("clone3", unix.SYS_CLONE3, 0, 0)
	raw("openat2", unix.SYS_OPENAT2, all-99, p, 0, 0)

	file := func(name string, err error) {
		var e syscall.Errno
		if err != nil && !errors.As(err, &e) {
			panic(err)
		}
		o.Results[name] = errnoText(e)
	}
	_, err = os.ReadFile(secret)
	file("read a file of the home", err)
	_, err = os.ReadDir(home)
	file("list the home", err)
	file("make a file in the home", os.WriteFile(filepath.Join(home, "new"), nil, 0o600))
	file("truncate a file of the home", os.Truncate(secret, 0))
	file("remove a file of the home", os.Remove(secret))
	file("make a file in /tmp", os.WriteFile(fmt.Sprintf("/tmp/rovl-cage-%d", os.Getpid()), nil, 0o600))
	file("make a link", os.Symlink("/", filepath.Join(dir, "link")))
	file("make a FIFO", unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	file("write to /etc", os.WriteFile("/etc/passwd", nil, 0))
	_, err = os.Readlink(fmt.Sprintf("/proc/%d/ns/net", os.Getppid()))
	file("look into another process", err)
	return o
}

func TestEnter_ForbidsWhatADaemonDoesNotDo(t *testing.T) {
	needKernel(t)
	o := child(t, "forbidden")
	if o.Error != "" || !o.Report.Seccomp || !o.Report.NoNewPrivs || o.Report.Landlock < 6 || len(o.Report.Why) != 0 {
		t.Fatalf("%+v", o)
	}
	if len(o.Results) < 40 {
		t.Errorf("%d results", len(o.Results))
	}
	for name, got := range o.Results {
		want := []string{"EPERM", "EACCES"}
		switch name {
		case "clone3", "openat2":
			want = []string{"ENOSYS"}
		}
		if !slices.Contains(want, got) {
			t.Errorf("%s: %s, want one of %v", name, got, want)
		}
	}
}

// tryNeeded does a little of all that a daemon does.
func tryNeeded() outcome {
	dir := os.Getenv(dirVar)
	var bare []int // threads before there was a cage
	for range 3 {
		go func() { _, _ = unix.Poll(nil, 1000) }()
	}
	time.Sleep(20 * time.Millisecond)
	o := entered(Enter(On, Paths{Write: []string{dir}}))
	try := func(name string, do func() error) { o.Results[name] = text(do()) }
	try("all threads", func() error {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, task := range tasks {
			b, err := os.ReadFile("/proc/self/task/" + task.Name() + "/status")
			if err != nil {
				return err
			}
			if !strings.Contains(string(b), "\nSeccomp:\t2\n") || !strings.Contains(string(b), "\nNoNewPrivs:\t1\n") {
				bare = append(bare, len(bare))
			}
		}
		if len(tasks) < 4 || len(bare) > 0 {
			return fmt.Errorf("of %d threads %d are not in the cage", len(tasks), len(bare))
		}
		return nil
	})
	try("files", func() error {
		from, to := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		return errors.Join(os.WriteFile(from, []byte("x"), 0o644), os.Rename(from, to), os.WriteFile(to, nil, 0), os.Remove(to),
			os.Mkdir(from, 0o700), os.Remove(from))
	})
	try("a socket's file", func() error {
		ln, err := net.Listen("unix", filepath.Join(dir, "s"))
		if err != nil {
			return err
		}
		return ln.Close()
	})
	try("tcp", func() error {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer ln.Close()
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			return err
		}
		return conn.Close()
	})
	try("udp", func() error {
		conn, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		return conn.Close()
	})
	try("netlink", func() error { _, err := net.Interfaces(); return err })
	try("names", func() error { _, err := net.LookupHost("localhost"); return err })
	try("the time zone", func() error { _, err := os.ReadFile("/etc/hostname"); return ignoreAbsent(err) })
	try("/dev/net/tun", func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(fd)
			ifr, err := unix.NewIfreq("none0")
			if err != nil {
				return err
			}
			if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); !errors.Is(err, unix.EBADFD) { // it has got to the driver
				return fmt.Errorf("TUNGETIFF: %w", err)
			}
			return nil
		}
		return ignoreAbsent(err)
	})
	return o
}

func ignoreAbsent(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func TestEnter_LetsADaemonWork(t *testing.T) {
	needKernel(t)
	o := child(t, "needed")
	if o.Error != "" || len(o.Results) < 9 {
		t.Fatalf("%+v", o)
	}
	for name, err := range o.Results {
		if err != "" {
			t.Errorf("%s: %s", name, err)
		}
	}
}

// withoutLandlock is on a kernel without it: a filter says so.
func withoutLandlock(m Mode) outcome {
	p := seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		Syscalls: []seccomp.SyscallGroup{{
			Names:  []string{"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"},
			Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS),
		}},
	}
	if err := load(p); err != nil {
		panic(err)
	}
	return entered(Enter(m, Paths{}))
}

func TestEnter_AutoMakesDoWithWhatThereIsAndOnDoesNot(t *testing.T) {
	needKernel(t)
	o := child(t, "no landlock")
	if r := o.Report; o.Error != "" || !r.Seccomp || !r.NoNewPrivs || r.Landlock != 0 || !strings.Contains(r.Why["landlock"], "no Landlock") || len(r.Why) != 1 {
		t.Errorf("auto: %+v", o)
	}
	o = child(t, "on")
	if !strings.Contains(o.Error, "landlock") || !strings.Contains(o.Error, "--sandbox=auto") {
		t.Errorf("on: %+v", o)
	}
	o = child(t, "off")
	if r := o.Report; o.Error != "" || r.Seccomp || r.Landlock != 0 || r.NoNewPrivs || len(r.Why) != 3 {
		t.Errorf("off: %+v", o)
	}
}

func TestCalls_AreKnownOnEveryArchitecture(t *testing.T) {
	for name, a := range map[string]*arch.Info{"amd64": arch.X86_64, "arm64": arch.AARCH64} {
		calls := slices.Concat(plainCalls, probed)
		if name == runtime.GOARCH {
			calls = append(calls, archCalls...)
		}
		for _, c := range conditions() {
			calls = append(calls, c.Name)
		}
		for _, c := range calls {
			if _, known := a.SyscallNames[c]; !known {
				t.Errorf("%s has no %s", name, c)
			}
		}
	}
	p := daemonCalls()
	if _, err := p.Assemble(); err != nil {
		t.Error(err)
	}
}

func TestPathRules_LetNoHomeIn(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_RUNTIME_DIR", filepath.Join(home, "run"))
	certs := filepath.Join(home, "certs")
	if err := os.Mkdir(certs, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		file, path string
		whole      bool
	}{
		{certs + "/ca.pem", certs, true},
		{home + "/ca.pem", home + "/ca.pem", false},
		{filepath.Dir(home) + "/ca.pem", filepath.Dir(home) + "/ca.pem", false},
		{"/tmp/ca.pem", "/tmp/ca.pem", false},
		{"/ca.pem", "/ca.pem", false},
		{"/etc/ca.pem", "/etc", true},
		{"/nowhere/at/all/ca.pem", "/nowhere/at/all/ca.pem", false},
	} {
		if path, whole := letIn(c.file); path != c.path || whole != c.whole {
			t.Errorf("%s: %s, %t", c.file, path, whole)
		}
	}
	if _, left, err := pathRules(Paths{Read: []string{home + "/ca.pem", certs + "/ca.pem"}}); err != nil || len(left) != 1 || !strings.Contains(left[0], home+"/ca.pem") {
		t.Errorf("left %q, %v", left, err)
	}
}

func TestLimitMemory_LeavesGOMEMLIMITToGo(t *testing.T) {
	before := memoryNow("")
	t.Setenv("GOMEMLIMIT", "off")
	if m, err := LimitMemory(); err != nil || m.Limit != before.Limit {
		t.Errorf("%+v, %v", m, err)
	}
}
