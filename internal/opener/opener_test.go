// These tests run an opener of the test program itself.

package opener

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/engine/docker"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

func TestMain(m *testing.M) {
	MaybeServe()
	os.Exit(m.Run())
}

func start(t *testing.T, c Config) *Opener {
	t.Helper()
	o, err := Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	return o
}

func TestOpener_OpensNetworkNamespacesAndNothingElse(t *testing.T) {
	o := start(t, Config{})
	f, err := o.openNetns("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if own, err := nsutil.InodeAt("/proc/self/ns/net"); err != nil || own != st.Ino {
		t.Errorf("net:[%d], %v; want net:[%d]", st.Ino, err, own)
	}
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v: a program that is executed would have it", flags, err)
	}
	for path, want := range map[string]error{
		"/etc/passwd":         nsutil.ErrNotNetns,
		"/proc/self/ns/mnt":   nsutil.ErrNotNetns,
		"/proc/self/ns/user":  nsutil.ErrNotNetns,
		"/dev/null":           nsutil.ErrNotNetns,
		"/nowhere":            os.ErrNotExist,
		"/proc/1073741824/fd": os.ErrNotExist,
	} {
		if f, err := o.openNetns(path); !errors.Is(err, want) || f != nil {
			t.Errorf("%s: %v, %v; want %v", path, f, err, want)
		}
	}
}

func TestOpener_AnswersWhatTheProcessWouldSeeItself(t *testing.T) {
	o := start(t, Config{})
	before := openFiles(t)
	o.Use()
	t.Cleanup(func() { nsutil.SeeThrough(nil) })
	var asking sync.WaitGroup
	for range 50 {
		asking.Go(func() {
			inode, err := nsutil.InodeAt("/proc/self/ns/net")
			if err != nil {
				t.Error(err)
				return
			}
			path, err := nsutil.FindInode(inode, "")
			if err != nil || !strings.HasSuffix(path, "/ns/net") {
				t.Errorf("%s, %v", path, err)
			}
		})
	}
	asking.Wait()
	if all, err := nsutil.NewFinder(0).Processes(); err != nil || len(all) == 0 {
		t.Errorf("%v, %v", all, err)
	}
	if _, err := nsutil.FindInode(1, ""); !errors.Is(err, nsutil.ErrGone) {
		t.Errorf("no namespace: %v", err)
	}
	// Below the root of a process links are followed as it would itself.
	inside := fmt.Sprintf("/proc/%d/root/etc/passwd", os.Getpid())
	var st unix.Stat_t
	if err := unix.Stat("/etc/passwd", &st); err != nil {
		t.Fatal(err)
	}
	if inode, err := nsutil.InodeAt(inside); err != nil || inode != st.Ino {
		t.Errorf("%s: %d, %v; want %d", inside, inode, err, st.Ino)
	}
	if d, own := o.Dockerd(os.Getpid()), docker.Look(os.Getpid()); !reflect.DeepEqual(d, own) || len(d.Resolvers) == 0 {
		t.Errorf("%+v, want %+v", d, own)
	}
	if path := nsutil.DetachedNetns(os.Getpid()); path != "" {
		t.Errorf("detached: %s", path)
	}
	if d := o.Dockerd(1 << 30); len(d.Sockets)+len(d.Resolvers) != 0 {
		t.Errorf("%+v", d)
	}
	if pid, made, err := o.PutDockerLink(); pid != 0 || made || err != nil {
		t.Errorf("%d, %t, %v", pid, made, err)
	}
	if _, err := nsutil.OpenPath("/proc/self/ns/net"); !errors.Is(err, nsutil.ErrHostNamespace) {
		t.Errorf("the host's: %v", err)
	}
	if _, err := o.ask("shell", struct{}{}, nil); err == nil || !strings.Contains(err.Error(), "shell") {
		t.Errorf("no such call: %v", err)
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// An opener has no landlock about it, or it would see nothing; it has no network either.
func TestOpener_IsInItsCage(t *testing.T) {
	o := start(t, Config{Strict: true})
	if _, err := o.openNetns("/proc/self/ns/net"); err != nil { // it has entered it by then
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", o.pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Seccomp:\t2\n", "NoNewPrivs:\t1\n", "Name:\trootless-ovl-op\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("its status has no %q:\n%s", want, b)
		}
	}
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", o.pid)); err != nil || strings.Contains(string(env), "PATH=") {
		t.Errorf("its environment is %q, %v", env, err)
	}
}

func TestOpener_OutlivesTheSignalsOfATerminal(t *testing.T) {
	o := start(t, Config{Ended: func(err error) { t.Error(err) }})
	if _, err := o.openNetns("/proc/self/ns/net"); err != nil {
		t.Fatal(err)
	}
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if err := unix.Kill(o.pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := o.openNetns("/proc/self/ns/net"); err != nil {
		t.Error(err)
	}
}

func TestOpener_ItsEndIsTold(t *testing.T) {
	told := make(chan error, 1)
	o := start(t, Config{Ended: func(err error) { told <- err }})
	if err := unix.Kill(o.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-told; err == nil || !strings.Contains(err.Error(), strconv.Itoa(o.pid)) || !strings.Contains(err.Error(), "start the daemon again") {
		t.Errorf("told %v", err)
	}
	if _, err := o.openNetns("/proc/self/ns/net"); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("afterwards: %v", err)
	}
}

// A daemon that is killed leaves no opener behind.
func TestOpener_EndsWithItsDaemon(t *testing.T) {
	if os.Getenv("OVL_TEST_DAEMON") != "" {
		o, err := Start(Config{})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("opener", o.pid)
		runtime.KeepAlive(o)
		select {}
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestOpener_EndsWithItsDaemon$")
	cmd.Env = append(os.Environ(), "OVL_TEST_DAEMON=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanf(out, "opener %d\n", &pid); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20_000); n != 1 {
		t.Errorf("the opener lives on: %v", err)
	}
	_ = cmd.Wait()
}

func FuzzAnswerOne(f *testing.F) {
	calls := newCalls(mandate{})
	for name := range calls {
		f.Add(name, []byte(`"/proc/self/ns/net"`))
		f.Add(name, []byte(`1`))
		f.Add(name, []byte(`{"inode":1,"last":"/proc/self/ns/net"}`))
	}
	f.Fuzz(func(t *testing.T, name string, arg []byte) {
		a, file := answerOne(calls, question{ID: 7, Call: name, Arg: arg})
		if file != nil {
			_ = file.Close()
		}
		if a.ID != 7 || a.Err == nil && a.Value == nil {
			t.Errorf("%+v", a)
		}
		if a.Err != nil && (a.Err.Kind < 0 || a.Err.Kind > len(kinds) || a.Err.Text == "") {
			t.Errorf("%+v", a.Err)
		}
	})
}
