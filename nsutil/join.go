// This file starts a Sandbox in the namespaces of a container: a fork without exec (see fork.go) joins its user and network namespace, which
// a process with threads cannot, and executes our own program there.

package nsutil

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the child was doing when it failed, beside the steps of fork.go.
const (
	stepMounts = iota + 100
	stepFiles
	stepExec
)

// maxCapability bounds the capabilities that are handed on; the kernel refuses those that it does not have.
const maxCapability = 63

// joinOrder is what the child is to do, laid out beforehand: the child cannot allocate, grow its stack or write a pointer.
type joinOrder struct {
	userns int // -1: stay in the user namespace we are in
	netns  int
	status int    // a pipe: closed by the exec, or told what failed
	files  [5]int // to be 0, 1, 2, orderFD and reportFD
	path   *byte
	argv   []*byte // ends with nil
	envp   []*byte // likewise

	caps struct {
		hdr  unix.CapUserHeader
		data [2]unix.CapUserData
	}
	report struct{ step, errno int32 }
}

// StartIn is Start in the user and network namespace of a container, with a new mount namespace that shows the host's files. Release, and all
// that follows, is as of Start, but the container is left as it is: nothing is set in it. The command is the user as the container's user namespace
// maps him, or its root (uid 0) where it does not map him or with MapRoot. It has the capabilities of the container's user namespace.
func StartIn(ns *Namespace, spec Spec) (*Sandbox, error) {
	order := sandboxOrder{KeepCaps: true, Dir: spec.Dir}
	complete := func(pid int, o *sandboxOrder) error {
		var err error
		if o.UID, err = insideID(pid, "uid_map", os.Geteuid(), spec.MapRoot); err == nil {
			o.GID, err = insideID(pid, "gid_map", os.Getegid(), spec.MapRoot)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", ns.name, err)
		}
		return nil
	}
	return start(spec, order, complete, func(files []*os.File) (*os.Process, error) {
		pid, err := ns.join(files)
		if err != nil {
			return nil, err
		}
		return os.FindProcess(pid)
	})
}

// insideID is the id that a process of a user namespace has to become: -1 if id is one of it already, else 0.
func insideID(pid int, file string, id int, root bool) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0, err
	}
	mapped, hasRoot := lookInMap(string(b), id)
	switch {
	case mapped == 0, mapped > 0 && !root:
		return -1, nil
	case hasRoot:
		return 0, nil
	case root:
		return 0, fail(ErrInvalid, nil, "its user namespace has no root: leave --root out")
	}
	return -1, nil // the ids of the host it is
}

// lookInMap reads a uid_map or gid_map (user_namespaces(7)): what an id of ours is inside, -1 if nothing, and whether there is a 0 inside.
func lookInMap(text string, id int) (mapped int, hasRoot bool) {
	mapped = -1
	for line := range strings.Lines(text) {
		var inside, outside, count int
		if _, err := fmt.Sscan(line, &inside, &outside, &count); err != nil {
			continue
		}
		if id >= outside && id-outside < count {
			mapped = inside + id - outside
		}
		hasRoot = hasRoot || inside == 0 && count > 0
	}
	return mapped, hasRoot
}

// join executes our own program in the namespaces. The calling goroutine keeps its thread for as long as the child is to live.
func (n *Namespace) join(files []*os.File) (pid int, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return 0, fail(ErrGone, os.ErrClosed, "%s: the namespace was closed", n.name)
	}
	o := &joinOrder{userns: -1, argv: make([]*byte, 2)}
	o.caps.hdr.Version = unix.LINUX_CAPABILITY_VERSION_3
	if o.path, err = unix.BytePtrFromString("/proc/self/exe"); err != nil {
		return 0, err
	}
	if o.argv[0], err = unix.BytePtrFromString(childArg0); err != nil {
		return 0, err
	}
	if o.envp, err = syscall.SlicePtrFromStrings(os.Environ()); err != nil {
		return 0, err
	}
	var opened []int
	defer func() {
		for _, fd := range opened {
			unix.Close(fd)
		}
	}()
	// Out of the way of the numbers that the child gives them.
	above := func(f *os.File) (fd int) {
		if err != nil {
			return -1
		}
		if fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, len(o.files)); err == nil {
			opened = append(opened, fd)
		}
		runtime.KeepAlive(f)
		return fd
	}
	o.netns = above(n.net)
	if n.owner != nil {
		o.userns = above(n.owner)
	}
	for i := range o.files {
		o.files[i] = above(files[i])
	}
	statusR, statusW, perr := os.Pipe()
	if perr != nil {
		return 0, perr
	}
	defer statusR.Close()
	o.status = above(statusW)
	statusW.Close()
	if err != nil {
		return 0, fmt.Errorf("descriptors for the sandbox: %w", err)
	}

	forkMu.Lock()
	defer forkMu.Unlock()
	pid, errno := forkJoin(o)
	runtime.KeepAlive(o)
	if errno != 0 {
		return 0, fmt.Errorf("fork: %w", errno)
	}
	unix.Close(o.status)
	opened = opened[:len(opened)-1]
	var failed [8]byte
	if got, _ := statusR.Read(failed[:]); got == len(failed) {
		_, _ = unix.Wait4(pid, nil, 0, nil)
		err := joinError(int32(binary.NativeEndian.Uint32(failed[:])), syscall.Errno(binary.NativeEndian.Uint32(failed[4:])))
		return 0, fail(err, nil, "%s: %v", n.name, err)
	}
	return pid, nil
}

func joinError(step int32, errno syscall.Errno) error {
	switch step {
	case stepMounts:
		return fmt.Errorf("a mount namespace in the container's user namespace: %w", errno)
	case stepFiles:
		return fmt.Errorf("descriptors in the container: %w", errno)
	case stepExec:
		return fmt.Errorf("executing this program again in the container's namespaces: %w", errno)
	}
	return stepError(step, errno)
}

// forkJoin forks. In the parent it returns the child's pid; the child never returns from it. It makes raw system calls only, as forkChild's
// does.
//
//go:noinline
//go:norace
//go:nocheckptr
func forkJoin(o *joinOrder) (pid int, errno syscall.Errno) {
	var (
		r  uintptr
		e  syscall.Errno
		i  int
		st int32
	)
	runtimeBeforeFork()
	r, _, e = syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if e != 0 || r != 0 {
		runtimeAfterFork()
		return int(r), e
	}
	runtimeAfterForkInChild()

	if o.userns >= 0 {
		st = stepUserns
		if _, _, e = syscall.RawSyscall(unix.SYS_SETNS, uintptr(o.userns), unix.CLONE_NEWUSER, 0); e != 0 {
			goto failed
		}
	}
	st = stepNetns
	if _, _, e = syscall.RawSyscall(unix.SYS_SETNS, uintptr(o.netns), unix.CLONE_NEWNET, 0); e != 0 {
		goto failed
	}
	st = stepMounts
	if _, _, e = syscall.RawSyscall(unix.SYS_UNSHARE, unix.CLONE_NEWNS, 0, 0); e != 0 {
		goto failed
	}
	// Joining a user namespace gave us all its capabilities, and the exec takes those from a uid other than 0 that are not ambient.
	_, _, e = syscall.RawSyscall(unix.SYS_CAPGET, uintptr(unsafe.Pointer(&o.caps.hdr)), uintptr(unsafe.Pointer(&o.caps.data[0])), 0)
	if e == 0 {
		o.caps.data[0].Inheritable = o.caps.data[0].Permitted
		o.caps.data[1].Inheritable = o.caps.data[1].Permitted
		_, _, _ = syscall.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&o.caps.hdr)), uintptr(unsafe.Pointer(&o.caps.data[0])), 0)
		for i = 0; i <= maxCapability; i++ {
			_, _, _ = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(i), 0, 0, 0)
		}
	}
	// Joining a user namespace clears this, so it is asked for here. It cannot fail.
	_, _, _ = syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	st = stepFiles
	for i = 0; i < len(o.files); i++ {
		if _, _, e = syscall.RawSyscall(unix.SYS_DUP3, uintptr(o.files[i]), uintptr(i), 0); e != 0 {
			goto failed
		}
	}
	st = stepExec
	_, _, e = syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(o.path)), uintptr(unsafe.Pointer(&o.argv[0])), uintptr(unsafe.Pointer(&o.envp[0])))

failed:
	o.report.step = st
	o.report.errno = int32(e)
	_, _, _ = syscall.RawSyscall(unix.SYS_WRITE, uintptr(o.status), uintptr(unsafe.Pointer(&o.report)), unsafe.Sizeof(o.report))
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT_GROUP, 1, 0, 0)
	}
}
