// This file makes every test of the package run as an unprivileged user without a capability, and holds the processes
// that tests put into namespaces.

package nsutil

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// roleEnv tells a test binary that was executed again what to be.
const roleEnv = "NSUTIL_TEST_ROLE"

func TestMain(m *testing.M) {
	MaybeChild()
	switch os.Getenv(roleEnv) {
	case "hold":
		hold()
	case "sandbox":
		runSandbox()
	case "overlay":
		overlayRole()
	}
	flag.Parse()
	fuzzing := flag.Lookup("test.fuzz").Value.String() != ""
	if os.Geteuid() == 0 && !fuzzing {
		dropRoot()
	}
	os.Exit(m.Run())
}

// dropRoot executes the test binary again as an unprivileged user, so that nothing is proven as root.
func dropRoot() {
	uid, gid := 65534, 65534
	if u, err := user.Lookup("tester"); err == nil {
		uid, _ = strconv.Atoi(u.Uid)
		gid, _ = strconv.Atoi(u.Gid)
	}
	args := os.Args[:1:1]
	for _, a := range os.Args[1:] {
		// These name files that only root can write.
		if !strings.HasPrefix(a, "-test.testlogfile=") && !strings.HasPrefix(a, "-test.coverprofile=") && !strings.HasPrefix(a, "-test.gocoverdir=") {
			args = append(args, a)
		}
	}
	err := errors.Join(syscall.Setgroups(nil), syscall.Setresgid(gid, gid, gid), syscall.Setresuid(uid, uid, uid))
	if err == nil {
		err = syscall.Exec("/proc/self/exe", args, os.Environ())
	}
	fmt.Fprintln(os.Stderr, "cannot become an unprivileged user:", err)
	os.Exit(1)
}

// mapping is how a holder's user namespace shows our uid.
type mapping struct {
	name   string
	uid    int  // our uid in the new user namespace
	nested bool // one user namespace further in
	userns bool
}

var mappings = []mapping{
	{name: "mapped to root", uid: 0, userns: true},
	{name: "mapped to itself", uid: -1, userns: true},
	{name: "mapped to another uid", uid: 5000, userns: true},
	{name: "nested user namespace", uid: 7, nested: true, userns: true},
}

// A holder is a process that lives in namespaces of its own and runs commands there.
type holder struct {
	t   testing.TB
	cmd *exec.Cmd
	pid int // of the process in the innermost namespace
	in  io.WriteCloser
	out *bufio.Reader
}

type holdAnswer struct {
	Out, Err string
	Code     int
}

func hold() {
	if os.Getenv("NSUTIL_TEST_NESTED") != "" {
		cmd := holdCommand(mapping{uid: 3, userns: true})
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "nested holder:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	out := json.NewEncoder(os.Stdout)
	_ = out.Encode(os.Getpid())
	dec := json.NewDecoder(os.Stdin)
	for {
		var argv []string
		if err := dec.Decode(&argv); err != nil {
			os.Exit(0)
		}
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
		var a holdAnswer
		b, err := cmd.Output()
		a.Out = string(b)
		if err != nil {
			a.Err = err.Error()
			var ee *exec.ExitError
			if errors.As(err, &ee) {
				a.Err += ": " + string(ee.Stderr)
				a.Code = ee.ExitCode()
			}
		}
		_ = out.Encode(a)
	}
}

func holdCommand(m mapping) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=hold", "NSUTIL_TEST_NESTED=")
	cmd.Stderr = os.Stderr
	uid, gid := m.uid, m.uid
	if uid < 0 {
		uid, gid = os.Geteuid(), os.Getegid()
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if m.userns {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER | unix.CLONE_NEWNET
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: os.Getegid(), Size: 1}}
	}
	if m.nested {
		cmd.Env = append(cmd.Env, "NSUTIL_TEST_NESTED=1")
	}
	return cmd
}

func startHolder(t testing.TB, m mapping) *holder {
	t.Helper()
	cmd := holdCommand(m)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
			t.Skipf("user namespaces cannot be made here: %v", err)
		}
		t.Fatal(err)
	}
	h := &holder{t: t, cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(h.stop)
	line, err := h.out.ReadString('\n')
	if err != nil {
		t.Fatalf("holder did not start: %v", err)
	}
	if h.pid, err = strconv.Atoi(strings.TrimSpace(line)); err != nil {
		t.Fatal(err)
	}
	return h
}

// stop ends the process and reaps it.
func (h *holder) stop() {
	if h.cmd.ProcessState != nil {
		return
	}
	h.in.Close()
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
}

// run runs a command in the holder's namespaces.
func (h *holder) run(argv ...string) holdAnswer {
	h.t.Helper()
	if err := json.NewEncoder(h.in).Encode(argv); err != nil {
		h.t.Fatal(err)
	}
	line, err := h.out.ReadString('\n')
	if err != nil {
		h.t.Fatalf("holder: %v", err)
	}
	var a holdAnswer
	if err := json.Unmarshal([]byte(line), &a); err != nil {
		h.t.Fatalf("holder said %q: %v", line, err)
	}
	return a
}

type ipLink struct {
	IfName   string   `json:"ifname"`
	Flags    []string `json:"flags"`
	MTU      int      `json:"mtu"`
	Address  string   `json:"address"`
	TxQLen   int      `json:"txqlen"`
	AddrInfo []struct {
		Family    string `json:"family"`
		Local     string `json:"local"`
		PrefixLen int    `json:"prefixlen"`
		Tentative bool   `json:"tentative"`
	} `json:"addr_info"`
}

type ipDetails struct {
	GenMode    string `json:"inet6_addr_gen_mode"`
	GSOMaxSegs int    `json:"gso_max_segs"`
	GSOMaxSize int    `json:"gso_max_size"`
}

type ipRoute struct {
	Dst     string           `json:"dst"`
	Gateway string           `json:"gateway"`
	Dev     string           `json:"dev"`
	Metrics []map[string]int `json:"metrics"`
}

// details is what `ip -d -j link show DEV` says.
func (h *holder) details(dev string) ipDetails {
	h.t.Helper()
	a := h.run("ip", "-d", "-j", "link", "show", "dev", dev)
	var list []ipDetails
	if err := json.Unmarshal([]byte(a.Out), &list); err != nil || len(list) != 1 {
		h.t.Fatalf("ip link: %v in %q %s", err, a.Out, a.Err)
	}
	return list[0]
}

// links is what `ip -j addr` shows in the namespace, by name.
func (h *holder) links() map[string]ipLink {
	h.t.Helper()
	a := h.run("ip", "-j", "addr")
	var list []ipLink
	if a.Err != "" {
		h.t.Fatalf("ip addr: %s", a.Err)
	}
	if err := json.Unmarshal([]byte(a.Out), &list); err != nil {
		h.t.Fatalf("ip addr: %v", err)
	}
	by := map[string]ipLink{}
	for _, l := range list {
		by[l.IfName] = l
	}
	return by
}

func (h *holder) routes(family string) map[string]ipRoute {
	h.t.Helper()
	a := h.run("ip", family, "-j", "route")
	var list []ipRoute
	if a.Err != "" {
		h.t.Fatalf("ip route: %s", a.Err)
	}
	if strings.TrimSpace(a.Out) != "" {
		if err := json.Unmarshal([]byte(a.Out), &list); err != nil {
			h.t.Fatalf("ip route: %v in %q", err, a.Out)
		}
	}
	by := map[string]ipRoute{}
	for _, r := range list {
		by[r.Dst] = r
	}
	return by
}

// fdCount is how many descriptors we have open.
func fdCount(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// goroutineCount is how many goroutines there are, once those that have said they are done have taken their last steps.
func goroutineCount(expected int) int {
	for patience := 5000; runtime.NumGoroutine() > expected && patience > 0; patience-- {
		time.Sleep(time.Millisecond)
	}
	return runtime.NumGoroutine()
}

// children is the pids of our children, zombies too.
func children(t testing.TB) []string {
	t.Helper()
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range lists {
		b, _ := os.ReadFile(f)
		all = append(all, strings.Fields(string(b))...)
	}
	return all
}
