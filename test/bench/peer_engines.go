// This file sets up podman and docker, rootless, on host 1 with the main overlay, and times what a network adds to a run of theirs: ours, and
// the one that the engine has by itself, by turns with no network at all.

package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// engineRuns is how often a round runs each.
const engineRuns = 21

// dockerContrib is where Debian's docker.io puts dockerd-rootless.sh.
const dockerContrib = "/usr/share/docker.io/contrib"

const busyboxPath = "/bin/busybox"

// engine is a container engine of the host's user. A run is what follows `run --rm` on its command line.
type engine struct {
	lab     *lab
	home    string // the user's, for this engine
	command []string
	own     []string // flags of a run on a network that the engine has by itself
	ours    []string
}

// networks are what runs are compared, by their peers.
func (e *engine) networks() []engineNetwork {
	return []engineNetwork{{peerNone, []string{"--network", "none"}}, {peerOwn, e.own}, {peerOurs, e.ours}}
}

type engineNetwork struct {
	peer  string
	flags []string
}

func engineExperiment(name, of string, open func(context.Context, *lab) (*engine, error)) experiment {
	return experiment{
		rows: []row{
			{name, "ms", fmt.Sprintf("what a network adds to `%s run --rm` of true: p50 of %d runs, each beside one with --network none", of, engineRuns)},
			{name + "-whole", "ms", "the whole run, p50"},
		},
		peers: []string{peerNone, peerOwn, peerOurs}, once: true, measure: measureRuns(name),
		open: func(ctx context.Context, b *bench, l *lab) ([]*path, error) {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
			defer cancel()
			e, err := open(ctx, l)
			if errors.Is(err, errMissing) {
				fmt.Fprintf(b.log, "MISSING: %s\n", err)
				b.missing = append(b.missing, err.Error())
				return nil, nil
			}
			if err != nil {
				return nil, err
			}
			return []*path{{peer: peerOurs, engine: e}}, nil
		},
	}
}

func measureRuns(name string) func(context.Context, *bench, *lab, *path) (readings, error) {
	return func(ctx context.Context, _ *bench, _ *lab, p *path) (readings, error) {
		networks := p.engine.networks()
		whole, added := make([][]time.Duration, len(networks)), make([][]time.Duration, len(networks))
		for i := range engineRuns + 1 {
			took := make([]time.Duration, len(networks))
			for j := range networks {
				which := (i + j) % len(networks) // none is always the first
				begin := time.Now()
				if err := p.engine.run(ctx, networks[which].flags); err != nil {
					return nil, err
				}
				took[which] = time.Since(begin)
			}
			if i == 0 {
				continue // it fills caches
			}
			for j := range networks {
				whole[j], added[j] = append(whole[j], took[j]), append(added[j], took[j]-took[0])
			}
		}
		values := readings{}
		for j, n := range networks {
			slices.Sort(whole[j])
			slices.Sort(added[j])
			values[reading{name + "-whole", n.peer}] = microseconds(percentile(whole[j], 50)) / 1000
			if j > 0 {
				values[reading{name, n.peer}] = microseconds(percentile(added[j], 50)) / 1000
			}
		}
		return values, nil
	}
}

// run is `run --rm` of true.
func (e *engine) run(ctx context.Context, network []string) error {
	return e.do(ctx, append(append([]string{"run", "--rm"}, network...), "localhost/bench", "/bin/true")...)
}

// do runs a command of the engine's.
func (e *engine) do(ctx context.Context, args ...string) error {
	return e.userDo(ctx, append(slices.Clone(e.command), args...)...)
}

// userDo runs a command of host 1's user.
func (e *engine) userDo(ctx context.Context, argv ...string) error {
	cmd := e.lab.command(true, e.home, "/proc/self/exe", append([]string{reapCommand}, argv...)...)
	limit := time.AfterFunc(commandLimit, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	if _, err := e.lab.h1.output(cmd); err != nil {
		return err
	}
	return ctx.Err()
}

// reapCommand runs a command and waits for its orphans too. podman waits for the end of its conmon, which is nobody's child; the bench is the
// first process of its PID namespace, and waits for none but its own.
const reapCommand = "reap"

func reap(argv []string) (int, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1, fmt.Errorf("subreaper: %w", err)
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return 1, err
	}
	p, err := os.StartProcess(path, argv, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return 1, err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		case pid == p.Pid && status.Exited():
			return status.ExitStatus(), nil
		case pid == p.Pid:
			return 1, fmt.Errorf("%s: ended by signal %v", argv[0], status.Signal())
		}
	}
}

// openPodman sets up podman with our hook.
func openPodman(ctx context.Context, l *lab) (*engine, error) {
	if err := l.canHaveEngine(program{"podman", "podman"}, program{"crun", "crun"}); err != nil {
		return nil, err
	}
	main, err := l.peer(ctx, peerOurs)
	if err != nil {
		return nil, err
	}
	// podman 4.3 hangs where its paths are longer than a user's.
	home, err := os.MkdirTemp("", "rovl")
	if err != nil {
		return nil, err
	}
	l.onClose(func() { _ = os.RemoveAll(home) })
	if err := errors.Join(os.Chmod(home, 0o700), os.Chown(home, l.uid, l.uid)); err != nil {
		return nil, err
	}
	e := &engine{
		lab: l, home: home, command: []string{"podman"}, own: []string{"--network", "slirp4netns"},
		ours: []string{"--network", "none", "--annotation", "run.rootless-ovl.attach=bench"},
	}
	for name, text := range map[string]string{
		"containers.conf": "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"crun\"\n",
		"storage.conf":    "[storage]\ndriver = \"vfs\"\n", // works on every file system
	} {
		if err := e.userFile(".config/containers/"+name, text); err != nil {
			return nil, err
		}
	}
	if err := l.pureCgroups(); err != nil {
		return nil, err
	}
	return e, main.ours.teach(ctx, "podman", e)
}

// openDocker starts dockerd and gives it a network of ours.
func openDocker(ctx context.Context, l *lab) (*engine, error) {
	script := filepath.Join(dockerContrib, "dockerd-rootless.sh")
	if err := l.canHaveEngine(program{script, "docker.io"}, program{"rootlesskit", "rootlesskit"}, program{"slirp4netns", "slirp4netns"}, program{"iptables", "iptables"}); err != nil {
		return nil, err
	}
	main, err := l.peer(ctx, peerOurs)
	if err != nil {
		return nil, err
	}
	e := &engine{
		lab: l, home: l.h1.home, command: []string{"/usr/bin/docker", "--host", "unix://" + filepath.Join(l.h1.home, "docker.sock")},
		own: []string{"--network", "own"}, ours: []string{"--network", "ovl"},
	}
	if err := e.userFile(".config/docker/daemon.json", `{"storage-driver": "vfs"}`); err != nil {
		return nil, err
	}
	if err := l.pureCgroups(); err != nil {
		return nil, err
	}
	cmd := l.command(true, l.h1.home, script)
	cmd.Env = append(cmd.Env, "PATH="+dockerContrib+":/usr/bin:/usr/sbin:/bin:/sbin",
		"DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS=--state-dir="+filepath.Join(l.h1.home, "dockerd-rootless"))
	dockerd, err := l.launch(l.h1.space, "dockerd", cmd)
	if err != nil {
		return nil, err
	}
	if err := waitFor(ctx, time.Minute, dockerd, func() error { return e.do(ctx, "version") }); err != nil {
		return nil, err
	}
	if err := main.ours.teach(ctx, "docker", e); err != nil {
		return nil, err
	}
	// Not docker0: for containers of a network with a name docker has a resolver of its own, on any of its drivers.
	if err := e.do(ctx, "network", "create", "own"); err != nil {
		return nil, err
	}
	return e, e.do(ctx, "network", "create", "-d", "rootless-ovl", "--ipam-driver", "rootless-ovl", "ovl")
}

// teach installs what makes an engine know our node, and gives it an image.
func (o *ours) teach(ctx context.Context, part string, e *engine) error {
	if err := e.userDo(ctx, append([]string{o.lab.program}, o.args(o.lab.h1, "install", part)...)...); err != nil {
		return err
	}
	image := filepath.Join(e.home, part+".tar")
	if err := writeImage(image); err != nil {
		return err
	}
	return e.do(ctx, "import", image, "localhost/bench")
}

// canHaveEngine says whether the user can run an engine of these programs.
func (l *lab) canHaveEngine(programs ...program) error {
	programs = append(programs, program{"newuidmap", "uidmap"}, program{busyboxPath, "busybox-static"})
	if pkgs := missingPackages(programs); len(pkgs) > 0 {
		return fmt.Errorf("%w: %s", errMissing, installLine(pkgs...))
	}
	return subordinateIDs(l.uid)
}

// pureCgroups gives the bench cgroups of one kind, whatever the machine has: crun wants it so. Further calls of the lab's change nothing.
func (l *lab) pureCgroups() error {
	const at = "/sys/fs/cgroup"
	if l.pure {
		return nil
	}
	if err := unix.Mount("cgroup2", at, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("cgroup2 on %s: %w", at, err)
	}
	l.pure = true
	l.onClose(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	return nil
}

// userFile writes a file into the user's home directory.
func (e *engine) userFile(name, text string) error {
	path, uid := e.home, e.lab.uid
	for _, dir := range splitPath(filepath.Dir(name)) {
		path = filepath.Join(path, dir)
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := os.Chown(path, uid, uid); err != nil {
			return err
		}
	}
	path = filepath.Join(e.home, name)
	return errors.Join(os.WriteFile(path, []byte(text), 0o644), os.Chown(path, uid, uid))
}

func splitPath(path string) []string {
	if path == "." {
		return nil
	}
	return append(splitPath(filepath.Dir(path)), filepath.Base(path))
}

// writeImage writes the smallest root of a container that has a true.
func writeImage(path string) (err error) {
	busybox, err := os.ReadFile(busyboxPath)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	defer func() { err = errors.Join(err, w.Close(), f.Chmod(0o644), f.Close()) }()
	for _, h := range []tar.Header{
		{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(busybox))},
		{Name: "bin/true", Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777},
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "proc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "sys/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "dev/", Typeflag: tar.TypeDir, Mode: 0o755},
	} {
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		if h.Size > 0 {
			if _, err := w.Write(busybox); err != nil {
				return err
			}
		}
	}
	return nil
}
