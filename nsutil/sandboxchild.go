// This file is the child's half of a Sandbox: the first process in the new namespaces, which prepares them and becomes
// the command.

package nsutil

import (
	"bufio"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// MaybeChild must be the first thing main does. In a program that Start has executed again it never returns: it becomes
// the sandbox's command. Otherwise it does nothing.
func MaybeChild() {
	if len(os.Args) != 1 || os.Args[0] != childArg0 {
		return
	}
	// Capabilities and the signal at the parent's death are a thread's: this one executes the command.
	runtime.LockOSThread()
	unix.CloseOnExec(orderFD)
	unix.CloseOnExec(reportFD)
	in := bufio.NewReader(os.NewFile(orderFD, "order"))
	out := gob.NewEncoder(os.NewFile(reportFD, "report"))

	var order sandboxOrder
	if err := gob.NewDecoder(in).Decode(&order); err != nil {
		os.Exit(1) // the parent gave up
	}
	if _, err := in.ReadByte(); err != nil {
		os.Exit(1)
	}
	report := becomeCommand(order, func(format string, args ...any) {
		_ = out.Encode(sandboxReport{Warning: fmt.Sprintf(format, args...)})
	})
	_ = out.Encode(report)
	os.Exit(report.Code)
}

// becomeCommand returns only when the command could not be executed.
func becomeCommand(o sandboxOrder, warn func(format string, args ...any)) sandboxReport {
	if err := become(o.UID, o.GID); err != nil {
		return sandboxReport{Error: fmt.Sprintf("becoming uid %d of the container: %v", o.UID, err), Code: 125}
	}
	if o.Dir != "" {
		if err := os.Chdir(o.Dir); err != nil {
			return sandboxReport{Error: err.Error(), Code: 125}
		}
	}
	// Nothing that is mounted here may show outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		r := sandboxReport{Error: "making the sandbox's mounts private", Code: 125}
		if !errors.As(err, &r.Refused) {
			r.Error += ": " + err.Error()
		}
		return r
	}
	if o.SetResolv {
		if err := overlayFile("/etc/resolv.conf", o.ResolvConf); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				warn("/etc/resolv.conf does not exist on this host, so names will not resolve inside: create it as root (an empty file will do)")
			} else {
				warn("/etc/resolv.conf could not be replaced, so names may not resolve inside: %v", err)
			}
		}
	}
	for _, path := range o.Hide {
		if err := hideSocket(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			warn("%s could not be hidden, so names may be resolved by the host: %v", path, err)
		}
	}
	if o.OwnNetns {
		// What a container engine sets too; a read-only /proc/sys leaves the kernel's stricter values.
		_ = writeSysctl("net/ipv4/ip_unprivileged_port_start", "0")
		gid := strconv.Itoa(os.Getegid())
		_ = writeSysctl("net/ipv4/ping_group_range", gid+" "+gid)
	}

	path, report := lookCommand(o.Args[0], o.Env)
	if path == "" {
		return report
	}
	if !o.KeepCaps {
		if err := dropCapabilities(); err != nil {
			return sandboxReport{Error: fmt.Sprintf("dropping capabilities: %v", err), Code: 125}
		}
	}
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	if os.Getppid() != o.Parent {
		os.Exit(1) // the parent died before this
	}
	err := syscall.Exec(path, o.Args, o.Env)
	code := 126
	if errors.Is(err, unix.ENOENT) {
		code = 127 // the interpreter after #! is not there
	}
	return sandboxReport{Error: fmt.Sprintf("%s: %v", path, err), Code: code}
}

// become changes uid and gid to those that are not -1, and gives up the groups of the host where the namespace allows that.
func become(uid, gid int) error {
	if gid >= 0 {
		_ = syscall.Setgroups(nil) // a namespace of one user has it forbidden
		if err := syscall.Setresgid(gid, gid, gid); err != nil {
			return err
		}
	}
	if uid >= 0 {
		return syscall.Setresuid(uid, uid, uid)
	}
	return nil
}

// overlayFile shows other content in place of a file, in our mount namespace. The content is on a tmpfs that is mounted
// over the file's directory only for as long as it takes, so nothing is left on any disk. A symbolic link is followed:
// the file it points to is overlaid.
func overlayFile(path string, content []byte) error {
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	over, err := unix.Open(target, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: target, Err: err}
	}
	defer unix.Close(over)
	dir := filepath.Dir(target)
	if err := unix.Mount("rootless-ovl", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=1m,mode=0755"); err != nil {
		return &os.PathError{Op: "mount tmpfs", Path: dir, Err: err}
	}
	source := filepath.Join(dir, filepath.Base(target))
	err = os.WriteFile(source, content, 0o644)
	if err == nil {
		err = os.Chmod(source, 0o644) // whatever the umask
	}
	if err == nil {
		if err = unix.Mount(source, "/proc/self/fd/"+strconv.Itoa(over), "", unix.MS_BIND, ""); err != nil {
			err = &os.PathError{Op: "bind mount", Path: target, Err: err}
		}
	}
	if uerr := unix.Unmount(dir, unix.MNT_DETACH); uerr != nil && err == nil {
		err = &os.PathError{Op: "unmount", Path: dir, Err: uerr}
	}
	return err
}

// hideSocket puts /dev/null over a socket: connecting to it is refused, and the C library goes on to DNS.
func hideSocket(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSocket == 0 {
		return nil
	}
	return unix.Mount("/dev/null", path, "", unix.MS_BIND, "")
}

func writeSysctl(name, value string) error {
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.WriteString(f, value)
	return err
}

// lookCommand finds a command as execvp(3) does; without one the report says 127, or 126 where it may not be executed.
func lookCommand(name string, env []string) (string, sandboxReport) {
	if strings.Contains(name, "/") {
		if err := executable(name); err != nil {
			code := 126
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
				code = 127
			}
			return "", sandboxReport{Error: fmt.Sprintf("%s: %v", name, plain(err)), Code: code}
		}
		return name, sandboxReport{}
	}
	path := "/usr/local/bin:/usr/bin:/bin"
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	report := sandboxReport{Error: name + ": command not found", Code: 127}
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		candidate := dir + "/" + name
		err := executable(candidate)
		if err == nil {
			return candidate, sandboxReport{}
		}
		if _, serr := os.Stat(candidate); serr == nil && errors.Is(err, os.ErrPermission) {
			report = sandboxReport{Error: fmt.Sprintf("%s: %v", candidate, plain(err)), Code: 126}
		}
	}
	return "", report
}

func executable(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return fmt.Errorf("is a directory: %w", os.ErrPermission)
	}
	return unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS)
}

// plain takes the path off an error whose text begins with it already.
func plain(err error) error {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// dropCapabilities takes every capability from this thread, and so from what it executes.
func dropCapabilities() error {
	if os.Geteuid() == 0 {
		// Uid 0 would get them all back by executing anything.
		if err := unix.Prctl(unix.PR_SET_SECUREBITS, secbitNoRoot|secbitNoRoot<<1, 0, 0, 0); err != nil {
			return fmt.Errorf("securebits: %w", err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("ambient set: %w", err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// secbitNoRoot is SECBIT_NOROOT; the bit above it locks it (include/uapi/linux/securebits.h).
const secbitNoRoot = 1
