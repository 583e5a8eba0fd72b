// This file is the lab for container engines: they map ranges of uids (newuidmap), which nobody can do inside the lab's user
// namespace. So the lab itself is root here, and every program on a host is the unprivileged user's, without a capability.

package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// userVar tells the stages of RootedMain the hosts' user: uid:gid.
const userVar = "ROOTLESS_OVL_LAB_USER"

// RootedMain is Main for root: body runs as root, in a PID and a mount namespace of its own, with which all that it started ends. The
// hosts' programs run as the machine's unprivileged user, who must have subordinate uids. files are Main's.
func RootedMain(body func() int, files ...string) int {
	code, err := 1, error(nil)
	switch os.Getenv(stageVar) {
	case "":
		code, err = outermostRooted(files)
	case "init":
		// The processes of this namespace, in place of the machine's.
		if err = unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err == nil {
			err = unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}
		if err == nil {
			code, err = adopt()
		}
	default:
		return body()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return max(code, 1)
	}
	return code
}

func outermostRooted(files []string) (code int, err error) {
	if os.Geteuid() != 0 || !identityMapped() {
		return 1, errors.New("the lab for container engines needs root, to start what runs without")
	}
	uid, gid := ordinaryUser()
	if err := hasSubordinates(uid); err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "rovl-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := errors.Join(
		os.Chmod(dir, 0o755),
		providePrograms(dir),
		copyFile("/proc/self/exe", filepath.Join(dir, "lab")),
		provideFiles(filepath.Join(dir, repositoryDir), files),
		os.Setenv(dirVar, dir),
		os.Setenv(userVar, fmt.Sprintf("%d:%d", uid, gid)),
	); err != nil {
		return 1, err
	}
	return runStage("init", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS})
}

// hasSubordinates tells whether a user can map ranges of uids and gids.
func hasSubordinates(uid int) error {
	u, err := user.LookupId(strconv.Itoa(uid))
	if err != nil {
		return fmt.Errorf("user %d: %w: make one (useradd --create-home)", uid, err)
	}
	for _, path := range []string{"/etc/subuid", "/etc/subgid"} {
		b, err := os.ReadFile(path)
		text := "\n" + string(b)
		if err != nil || !strings.Contains(text, "\n"+u.Username+":") && !strings.Contains(text, "\n"+u.Uid+":") {
			return fmt.Errorf("%s has no subordinate ids in %s: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s", u.Username, path, u.Username)
		}
	}
	return nil
}

// hostUser is who the hosts' programs run as; not rooted: who we are.
func hostUser() (uid, gid int, rooted bool) {
	if n, err := fmt.Sscanf(os.Getenv(userVar), "%d:%d", &uid, &gid); err == nil && n == 2 {
		return uid, gid, true
	}
	return os.Getuid(), os.Getgid(), false
}

// asHostUser dials as the hosts' user, whom alone the daemon's socket answers.
func asHostUser(dial func() (net.Conn, error)) (c net.Conn, err error) {
	uid, _, rooted := hostUser()
	if !rooted {
		return dial()
	}
	err = onThread(func() (err error) {
		// Of this thread alone, which ends with it.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			return fmt.Errorf("become uid %d: %w", uid, errno)
		}
		c, err = dial()
		return err
	})
	return c, err
}
