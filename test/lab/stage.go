// This file runs the calling program again inside the lab's namespaces, and ends what it leaves behind.

package lab

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Environment between the stages. BinaryVar may also be set by the caller: a rootless-ovl binary to test, with
// rootless-ovl-plugin beside it, instead of those built for the occasion.
const (
	BinaryVar = "ROOTLESS_OVL_BIN"
	// DaemonVar names another rootless-ovl, of which the daemons are then, and the commands are not: one that is built to be watched, and slow to start.
	DaemonVar = "ROOTLESS_OVL_DAEMON"
	// ArtifactsVar names a directory that logs and packet captures of failed tests are copied to.
	ArtifactsVar = "ROOTLESS_OVL_ARTIFACTS"

	stageVar = "ROOTLESS_OVL_LAB_STAGE"
	dirVar   = "ROOTLESS_OVL_LAB_DIR"
)

// nobody is the uid and gid that root turns into where the machine has no ordinary account.
const nobody = 65534

// Main runs body inside the lab's namespaces and returns the exit code for os.Exit. Call it first thing in main or TestMain:
//
//	func TestMain(m *testing.M) { os.Exit(lab.Main(m.Run)) }
//
// Called as root, the stages from the first re-execution on, and so the daemons, run as an unprivileged user ($SUDO_UID, or
// the machine's first ordinary account, or nobody). body finds the files, named by their paths in the repository, under Repository.
func Main(body func() int, files ...string) int {
	code, err := 1, error(nil)
	switch stage := os.Getenv(stageVar); stage {
	case "":
		code, err = outermost(files)
	case "user":
		code, err = enter()
	case "init":
		code, err = adopt()
	case "lab":
		return body()
	default:
		err = fmt.Errorf("%s=%q is no stage", stageVar, stage)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		if code == 0 {
			code = 1
		}
	}
	return code
}

// outermost prepares the work directory and goes on as an unprivileged user.
func outermost(files []string) (code int, err error) {
	dir, err := os.MkdirTemp("", "rovl-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		return 1, err
	}
	if err := providePrograms(dir); err != nil {
		return 1, err
	}
	if err := copyFile("/proc/self/exe", filepath.Join(dir, "lab")); err != nil {
		return 1, err
	}
	if err := provideFiles(filepath.Join(dir, repositoryDir), files); err != nil {
		return 1, err
	}
	if err := os.Setenv(dirVar, dir); err != nil {
		return 1, err
	}
	if os.Geteuid() != 0 || !identityMapped() {
		return enter()
	}
	uid, gid := ordinaryUser()
	if err := chownTree(dir, uid, gid); err != nil {
		return 1, err
	}
	return runStage("user", &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
	})
}

// enter makes the namespaces: the same uid, not root, in a user namespace of its own.
func enter() (int, error) {
	uid, gid := os.Geteuid(), os.Getegid()
	inUID, inGID := uid, gid
	if uid == 0 { // root of somebody's user namespace with nothing to drop to: at least not 0 inside
		inUID, inGID = 1000, 1000
	}
	code, err := runStage("init", &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: inUID, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: inGID, HostID: gid, Size: 1}},
		AmbientCaps: allCaps(),
	})
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("%w: this kernel or its policy forbids unprivileged user namespaces: look at the sysctls user.max_user_namespaces, "+
			"kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns", err)
	}
	return code, err
}

// runStage runs this program again as stage and passes its exit code on. The child holds the read end of a pipe as descriptor
// 3: its end tells the init stage that nobody waits any more.
func runStage(stage string, attr *syscall.SysProcAttr) (int, error) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(signals)

	r, w, err := os.Pipe()
	if err != nil {
		return 1, err
	}
	defer w.Close()
	dir := os.Getenv(dirVar)
	cmd := exec.Command(filepath.Join(dir, "lab"), innerArgs(os.Args[1:])...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = stageEnv(stage)
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = attr
	err = cmd.Start()
	r.Close()
	if err != nil {
		return 1, fmt.Errorf("start of stage %q: %w", stage, err)
	}
	go func() {
		for range signals {
			w.Close()
		}
	}()
	return exitCode(cmd.Wait())
}

// adopt is the init stage.
func adopt() (int, error) {
	signal.Ignore(os.Interrupt, unix.SIGTERM, unix.SIGHUP) // the end comes by the pipe
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1, fmt.Errorf("subreaper: %w", err)
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 1, fmt.Errorf("private mounts: %w", err)
	}
	cmd := exec.Command(filepath.Join(os.Getenv(dirVar), "lab"), os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = stageEnv("lab")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return 1, fmt.Errorf("start of stage lab: %w", err)
	}
	go func() {
		// The write end is closed when the stage above ends, or is interrupted.
		_, _ = os.NewFile(3, "alive").Read(make([]byte, 1))
		_ = cmd.Process.Kill()
	}()
	code := 1
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return code, fmt.Errorf("wait: %w", err)
		}
		if pid == cmd.Process.Pid && (status.Exited() || status.Signaled()) {
			if status.Exited() {
				code = status.ExitStatus()
			}
			break
		}
	}
	killChildren()
	return code, nil
}

// killChildren ends the orphans that this process adopted, and theirs, within some seconds.
func killChildren() {
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		for _, pid := range childrenOf(os.Getpid()) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if errors.Is(err, unix.ECHILD) {
				return
			}
			if err != nil || pid == 0 {
				break
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// childrenOf reads /proc for the processes whose parent is pid.
func childrenOf(pid int) []int {
	var found []int
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		_, rest, ok := strings.Cut(string(b), ") ")
		fields := strings.Fields(rest)
		if !ok || len(fields) < 2 || fields[1] != strconv.Itoa(pid) {
			continue
		}
		if child, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			found = append(found, child)
		}
	}
	return found
}

// innerArgs leaves out what go test wants written into directories that only its own user can write.
func innerArgs(args []string) []string {
	var kept []string
	for _, a := range args {
		if strings.HasPrefix(a, "-test.testlogfile=") || strings.HasPrefix(a, "-test.gocoverdir=") {
			continue
		}
		kept = append(kept, a)
	}
	return kept
}

func stageEnv(stage string) []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		switch name {
		case stageVar, "NOTIFY_SOCKET", "TMPDIR":
			continue
		}
		env = append(env, kv)
	}
	return append(env, stageVar+"="+stage)
}

func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode(), nil
	default:
		return 1, err
	}
}

// pluginName is the program that container engines start, which is beside the program under test.
const pluginName = "rootless-ovl-plugin"

// providePrograms puts the programs under test into dir: the one that BinaryVar names with the one beside it, or both built now.
func providePrograms(dir string) error {
	if given := os.Getenv(DaemonVar); given != "" {
		if err := os.Mkdir(filepath.Join(dir, "daemon"), 0o755); err != nil {
			return err
		}
		if err := copyFile(given, daemonIn(dir)); err != nil {
			return fmt.Errorf("%s: %w", DaemonVar, err)
		}
	}
	if given := os.Getenv(BinaryVar); given != "" {
		err := copyFile(given, filepath.Join(dir, "rootless-ovl"))
		if err == nil {
			err = copyFile(filepath.Join(filepath.Dir(given), pluginName), filepath.Join(dir, pluginName))
		}
		if err != nil {
			return fmt.Errorf("%s, with %s beside it: %w", BinaryVar, pluginName, err)
		}
		return nil
	}
	cmd := exec.Command("go", "build", "-o", dir, "github.com/rootless-ovl/rootless-ovl/cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}

// repositoryDir holds the repository's files that Main was given.
const repositoryDir = "repository"

// Repository is the directory in which the files that Main was given are at their paths in the repository. The hosts' user can read it,
// which need not be so with the repository itself.
func Repository() string { return filepath.Join(os.Getenv(dirVar), repositoryDir) }

// provideFiles copies files of the repository, which the working directory is in.
func provideFiles(to string, files []string) error {
	if len(files) == 0 {
		return nil
	}
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	for ; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, files[0])); err == nil {
			break
		}
		if root == filepath.Dir(root) {
			return fmt.Errorf("no directory above the working directory has %s: run this in the repository", files[0])
		}
	}
	for _, name := range files {
		path := filepath.Join(to, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := copyFile(filepath.Join(root, name), path); err != nil {
			return err
		}
	}
	return nil
}

// copyFile copies an executable.
func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}

func chownTree(dir string, uid, gid int) error {
	return filepath.Walk(dir, func(path string, _ os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	})
}

// identityMapped says whether this process is in the machine's first user namespace, so that root is root.
func identityMapped() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	fields := strings.Fields(string(b))
	return err == nil && len(fields) == 3 && fields[0] == "0" && fields[1] == "0" && fields[2] == "4294967295"
}

// ordinaryUser is whom root turns into.
func ordinaryUser() (uid, gid int) {
	if uid, err := strconv.Atoi(os.Getenv("SUDO_UID")); err == nil && uid > 0 {
		gid, err := strconv.Atoi(os.Getenv("SUDO_GID"))
		if err != nil || gid <= 0 {
			gid = uid
		}
		return uid, gid
	}
	passwd, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return nobody, nobody
	}
	for line := range strings.Lines(string(passwd)) {
		name, _, _ := strings.Cut(line, ":")
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err1 == nil && err2 == nil && uid >= 1000 && uid < 60000 {
			return uid, gid
		}
	}
	return nobody, nobody
}

// daemonIn is where the program of the daemons is, if it is another.
func daemonIn(dir string) string { return filepath.Join(dir, "daemon", "rootless-ovl") }

// daemonProgram is the path of the program that daemons are of.
func daemonProgram() string {
	if os.Getenv(DaemonVar) != "" {
		return daemonIn(os.Getenv(dirVar))
	}
	return program()
}

// program is the path of the program under test, seen from inside the lab.
func program() string { return filepath.Join(os.Getenv(dirVar), "rootless-ovl") }
