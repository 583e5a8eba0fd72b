// install and uninstall as a user has them, beside engines and a configuration that were there before.

package engines

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// snapshot is everything below a directory, with modes, contents and the times of files.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		what := fi.Mode().String()
		switch fi.Mode().Type() {
		case 0:
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += " " + fi.ModTime().String() + " " + string(text)
		case fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " -> " + to
		}
		all[path] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestInstall_LeavesAHomeAsItWasAndPodmansOwnHooksRun(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	p := podman(t, h)
	home := h.Home()
	// What this user has already: a hook of their own, which leaves a mark, and a configuration of docker.
	mark := filepath.Join(home, "mark")
	writeAsUser(t, h, filepath.Join(home, "hooks", "mine.json"),
		`{"version": "1.0.0", "hook": {"path": "/bin/sh", "args": ["sh", "-c", "cat >/dev/null; echo ran >>`+mark+`"]}, "when": {"always": true}, "stages": ["createRuntime"]}`)
	writeAsUser(t, h, filepath.Join(home, ".config", "containers", "containers.conf.d", "10-mine.conf"), "[engine]\nhooks_dir = [\""+filepath.Join(home, "hooks")+"\"]\n")
	writeAsUser(t, h, filepath.Join(home, ".config", "docker", "daemon.json"), `{"storage-driver": "vfs"}`)
	ok(t, h, p, "import", image(t, l.Dir), "localhost/busybox")
	config := filepath.Join(home, ".config")
	before, beforeHooks := snapshot(t, config), snapshot(t, filepath.Join(home, "hooks"))
	beforeLocal := h.Run("find", filepath.Join(home, ".local"), "-not", "-path", "*/containers/*").Stdout

	ok(t, h, h.Binary(), "install", "podman", "docker", "cni", "systemd", "shell")
	if got := ok(t, h, h.Binary(), "install", "podman", "docker", "cni", "systemd", "shell"); !strings.HasPrefix(got, "nothing to do") {
		t.Errorf("installing again: %s", got)
	}
	after := snapshot(t, config)
	for path, what := range before {
		if after[path] != what {
			t.Errorf("install changed %s from %q to %q", path, what, after[path])
		}
	}
	// Podman takes both directories: the user's hook runs, and ours is told of a container that has its annotation, with no daemon to attach it.
	ok(t, h, p, "run", "--rm", "--network", "none", "localhost/busybox", "ip", "link")
	if b, err := os.ReadFile(mark); err != nil || string(b) != "ran\n" {
		t.Errorf("the user's hook: %q, %v", b, err)
	}
	if r := h.Run(p, "run", "--rm", "--network", "none", "--annotation", "run.rootless-ovl.attach=web", "localhost/busybox", "ip", "link"); r.Code == 0 {
		t.Error("without a daemon, a container with the annotation was started")
	} else if !strings.Contains(r.Stderr, "rootless-ovl up") {
		t.Errorf("without a daemon podman says: %s", r.Stderr)
	}
	doctor := h.CLI("doctor")
	for _, want := range []string{"podman knows the hook", "for annotated containers", "installed; dockerd does not run", "files for podman, docker, cni, systemd"} {
		if !strings.Contains(doctor.Stdout, want) {
			t.Errorf("doctor does not say %q:\n%s", want, doctor.Stdout)
		}
	}

	ok(t, h, h.Binary(), "uninstall")
	left := snapshot(t, config)
	for path := range left {
		if _, was := before[path]; !was {
			t.Errorf("after uninstall there is %s", path)
		}
	}
	for path, what := range before {
		if left[path] != what {
			t.Errorf("after uninstall %s is %q, it was %q", path, left[path], what)
		}
	}
	if hooks := snapshot(t, filepath.Join(home, "hooks")); !maps.Equal(hooks, beforeHooks) {
		t.Errorf("after uninstall the user's hooks are %v, they were %v", hooks, beforeHooks)
	}
	if left := h.Run("find", filepath.Join(home, ".local"), "-not", "-path", "*/containers/*").Stdout; left != beforeLocal {
		t.Errorf("below .local there is\n%snot\n%s", left, beforeLocal)
	}
	ok(t, h, p, "run", "--rm", "--network", "none", "--annotation", "run.rootless-ovl.attach=web", "localhost/busybox", "ip", "link")
}

func TestInstall_DockerdFindsThePluginAfterEachStart(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	d := startDocker(t, h, "exec dockerd-rootless.sh")
	d.ready()
	// The daemon comes second, and sees the dockerd that runs.
	socket := filepath.Join(h.Up().RuntimeDir, "docker.sock")
	d.findsPlugin(socket)
	d.stop()
	d = startDocker(t, h, "exec dockerd-rootless.sh")
	d.findsPlugin(socket)
	if got := h.CLI("doctor").Stdout; !strings.Contains(got, "the running dockerd has it") {
		t.Errorf("doctor says\n%s", got)
	}
}

// findsPlugin waits until the link to the node's socket is where dockerd looks for plugins.
func (d *docker) findsPlugin(socket string) {
	d.t.Helper()
	d.started("the plugin's link", func() bool {
		pid, err := d.childPID()
		if err != nil {
			return false
		}
		to, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/root/run/docker/plugins/rootless-ovl.sock")
		return err == nil && to == socket
	})
}

// TestInstall_SystemdRunsTheDaemonAndHoldsItsSocket has a user instance of systemd read the units: with all of their hardening a daemon gets ready,
// attaches a container, is started again when it is killed, and nobody who asks meanwhile is turned away.
func TestInstall_SystemdRunsTheDaemonAndHoldsItsSocket(t *testing.T) {
	const systemd = "/lib/systemd/systemd"
	if _, err := os.Stat(systemd); err != nil {
		t.Skip("systemd is not installed")
	}
	l := lab.New(t, 1)
	h := l.Host(1)
	group := startSystemd(t, h, systemd)
	if out := ok(t, h, h.Binary(), "install", "systemd"); !strings.Contains(out, "systemctl --user daemon-reload") {
		t.Errorf("install says\n%s", out)
	}
	ok(t, h, "systemctl", "--user", "daemon-reload")
	ok(t, h, "systemctl", "--user", "restart", "rootless-ovl.socket", "rootless-ovl.service") // returns when the daemon is ready
	var status lab.Status
	h.CLIJSON(&status, "status")
	if b, err := os.ReadFile("/proc/" + strconv.Itoa(status.PID) + "/cgroup"); err != nil || !strings.Contains(string(b), filepath.Base(group)) {
		t.Errorf("the daemon is not systemd's: %v, %s", err, b)
	}
	ok(t, h, h.Binary(), "attach", strconv.Itoa(sandbox(t, h, "-Urn", "")), "--name", "web", "--publish", "8080:80")
	for _, ask := range [][]string{{"ps"}, {"run", "--", h.Binary(), "ps"}} {
		was := status.PID
		if err := unix.Kill(was, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if got := ok(t, h, append([]string{h.Binary()}, ask...)...); !strings.Contains(got, "web") {
			t.Errorf("right after the daemon was killed %s says\n%s", ask[0], got)
		}
		if h.CLIJSON(&status, "status"); status.PID == was {
			t.Error("the daemon that was killed answers")
		}
	}
	doctor := h.CLI("doctor", "-o", "json").Stdout
	for _, id := range []string{"daemon", "daemon-version", "systemd-units", "installed-files"} {
		if i := strings.Index(doctor, `"id": "`+id+`"`); i < 0 || !strings.Contains(doctor[i:min(i+200, len(doctor))], `"status": "ok"`) {
			t.Errorf("doctor does not find %s in order:\n%s", id, doctor)
		}
	}
	ok(t, h, h.Binary(), "detach", "web")
	ok(t, h, "systemctl", "--user", "stop", "rootless-ovl.socket", "rootless-ovl.service")
	if r := h.CLI("ps"); r.Code == 0 {
		t.Error("a daemon answers after its socket was stopped")
	}
}

// startSystemd starts a user instance on a host that seems to have been booted by systemd, and returns the path of its control group.
func startSystemd(t *testing.T, h *lab.Host, program string) string {
	t.Helper()
	home, err := os.Stat(h.Home())
	if err != nil {
		t.Fatal(err)
	}
	owner := home.Sys().(*syscall.Stat_t)
	group := filepath.Join("/sys/fs/cgroup", "rootless-ovl-"+strconv.Itoa(os.Getpid()))
	cmd := h.Command("sh", "-c", `read -r go && exec "$0" --user --log-target=console`, program)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(h.LogPath("systemd"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	err = h.Do(func() error {
		return errors.Join(
			unix.Mount("tmpfs", "/run/systemd", "tmpfs", 0, ""), os.Mkdir("/run/systemd/system", 0o755),
			unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""), os.Mkdir(group, 0o755),
			os.Chown(group, int(owner.Uid), int(owner.Gid)), os.Chown(group+"/cgroup.procs", int(owner.Uid), int(owner.Gid)),
		)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		h.Run("systemctl", "--user", "exit")
		limit := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		limit.Stop()
		_ = h.Do(func() error { // what is inside goes first; a group with a process that is not reaped yet stays
			var dirs []string
			_ = filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			for _, dir := range slices.Backward(dirs) {
				_ = os.Remove(dir)
			}
			return nil
		})
	})
	err = h.Do(func() error {
		return os.WriteFile(group+"/cgroup.procs", []byte(strconv.Itoa(cmd.Process.Pid)), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stdin.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "systemd", func() bool { return h.Run("systemctl", "--user", "is-system-running").Stdout == "running\n" })
	return group
}
