// This file is the fork without exec: a child with one thread joins a user namespace and a network namespace, opens
// descriptors there and sends them back. See doc.go for why.

package nsutil

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The three hooks that package syscall itself calls around a fork: they block signals in the parent and put the child's
// signal handlers and mask back.

//go:linkname runtimeBeforeFork syscall.runtime_BeforeFork
func runtimeBeforeFork()

//go:linkname runtimeAfterFork syscall.runtime_AfterFork
func runtimeAfterFork()

//go:linkname runtimeAfterForkInChild syscall.runtime_AfterForkInChild
func runtimeAfterForkInChild()

const (
	// maxQueues bounds the queues of one TAP: every queue is a descriptor in one SCM_RIGHTS message, which carries 253.
	maxQueues = 64
	// forkTimeout is how long the child may take. Half a millisecond is usual; loading the tun module takes longest.
	forkTimeout = 5 * time.Second
)

// forkMu lets one fork child exist at a time. A child has copies of all our descriptors for as long as it lives, so a
// TAP that is to go with its last descriptor is closed under this lock too.
var forkMu sync.Mutex

// tunPath is a variable for the tests of a device that cannot be opened.
var tunPath = "/dev/net/tun"

const (
	maxRights = 253 // descriptors in one message, SCM_MAX_FD in include/net/scm.h
	maxFiles  = 4
)

// What the child was doing when it failed.
const (
	stepNone = iota
	stepUserns
	stepNetns
	stepTun
	stepNetlink
	stepStream4
	stepStream6
)

// wish is what a fork child is to open: maxRights descriptors at the most.
type wish struct {
	tuns             int      // of /dev/net/tun
	talks            int      // protocol of the netlink socket; noTalk: none
	files            []string // for reading and writing, maxFiles at the most; one that cannot be opened is no error
	stream4, stream6 int      // sockets for TCP, which do not block
}

const noTalk = -1

func (w *wish) count() int {
	n := w.tuns + len(w.files) + w.stream4 + w.stream6
	if w.talks != noTalk {
		n++
	}
	return n
}

// forkOrder is what one child is to do, laid out beforehand: the child cannot allocate, grow its stack or write a
// pointer.
type forkOrder struct {
	userns int // -1: stay in the user namespace we are in
	netns  int
	sock   int // the child's end of the socket pair
	tuns   int
	talks  int // protocol of the netlink socket; noTalk: none
	files  int
	// How many stream sockets there are when those of IPv4, and all, are made.
	stream4, streams int
	path             *byte
	paths            [maxFiles]*byte

	report forkReport
	msg    unix.Msghdr
	iov    unix.Iovec
	rights struct {
		hdr unix.Cmsghdr
		fds [maxRights]int32 // in the order of wish
	}
}

// forkReport is the child's message beside the descriptors.
type forkReport struct {
	step, errno int32
	missing     int32 // a bit for each of the files that could not be opened: in its place there is a descriptor that means nothing
}

// opened is what a fork child brought back.
type opened struct {
	tuns             []int
	netlink          int   // -1: none
	files            []int // -1: it could not be opened
	stream4, stream6 []int
}

func (o *opened) close() {
	for _, fd := range slices.Concat(o.tuns, o.files, o.stream4, o.stream6, []int{o.netlink}) {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// forkInside opens what is wished for in the given namespaces. All descriptors are close-on-exec. It returns within forkTimeout, and the
// child is reaped.
func forkInside(userns, netns int, w wish) (*opened, error) {
	if w.tuns < 0 || w.tuns > maxQueues {
		return nil, fail(ErrInvalid, nil, "a TAP has 1 to %d queues, not %d", maxQueues, w.tuns)
	}
	if w.count() > maxRights || len(w.files) > maxFiles {
		return nil, fail(ErrInvalid, nil, "%d descriptors cannot be sent at once", w.count())
	}
	path, err := unix.BytePtrFromString(tunPath)
	if err != nil {
		return nil, err
	}
	o := &forkOrder{userns: userns, netns: netns, tuns: w.tuns, talks: w.talks, files: len(w.files), stream4: w.stream4, streams: w.stream4 + w.stream6, path: path}
	for i, f := range w.files {
		if o.paths[i], err = unix.BytePtrFromString(f); err != nil {
			return nil, err
		}
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	defer unix.Close(pair[0])

	o.sock = pair[1]
	o.iov.Base = (*byte)(unsafe.Pointer(&o.report))
	o.iov.SetLen(int(unsafe.Sizeof(o.report)))
	o.msg.Iov = &o.iov
	o.msg.Iovlen = 1
	o.msg.Control = (*byte)(unsafe.Pointer(&o.rights))
	o.msg.SetControllen(unix.CmsgSpace(4 * w.count()))
	o.rights.hdr.Level = unix.SOL_SOCKET
	o.rights.hdr.Type = unix.SCM_RIGHTS
	o.rights.hdr.SetLen(unix.CmsgLen(4 * w.count()))

	forkMu.Lock()
	defer forkMu.Unlock()

	// The child asks to die with the thread that made it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, errno := forkChild(o)
	runtime.KeepAlive(o)
	unix.Close(pair[1])
	if errno != 0 {
		return nil, fmt.Errorf("fork: %w", errno)
	}
	in, err := receive(pair[0], w)
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	reap(pid)
	return in, err
}

// forkChild forks. In the parent it returns the child's pid; the child never returns from it. The child makes raw
// system calls only, as package syscall's own forkAndExecInChild does: no allocation, no lock, no growing stack.
//
//go:noinline
//go:norace
//go:nocheckptr
func forkChild(o *forkOrder) (pid int, errno syscall.Errno) {
	var (
		r  uintptr
		e  syscall.Errno
		i  int
		n  int // descriptors opened
		st int32

		family uintptr
	)
	runtimeBeforeFork()
	// No exit signal: the child is nobody's business but ours, and only a wait with __WALL sees it.
	r, _, e = syscall.RawSyscall6(syscall.SYS_CLONE, 0, 0, 0, 0, 0, 0)
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
	// Joining a user namespace clears this, so it is asked for here. It cannot fail.
	_, _, _ = syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	st = stepTun
	for i = 0; i < o.tuns; i++ {
		r, _, e = syscall.RawSyscall6(unix.SYS_OPENAT, atFDCWD, uintptr(unsafe.Pointer(o.path)), unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0, 0)
		if e != 0 {
			goto failed
		}
		o.rights.fds[i] = int32(r)
	}
	n = o.tuns
	if o.talks != noTalk {
		st = stepNetlink
		r, _, e = syscall.RawSyscall(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, uintptr(o.talks))
		if e != 0 {
			goto failed
		}
		o.rights.fds[n] = int32(r)
		n++
	}
	for i = 0; i < o.files; i++ {
		r, _, e = syscall.RawSyscall6(unix.SYS_OPENAT, atFDCWD, uintptr(unsafe.Pointer(o.paths[i])), unix.O_RDWR|unix.O_CLOEXEC, 0, 0, 0)
		if e != 0 {
			o.report.missing |= 1 << i
			r = uintptr(o.sock)
		}
		o.rights.fds[n] = int32(r)
		n++
	}
	st = stepStream4
	family = unix.AF_INET
	for i = 0; i < o.streams; i++ {
		if i == o.stream4 {
			st = stepStream6
			family = unix.AF_INET6
		}
		r, _, e = syscall.RawSyscall(unix.SYS_SOCKET, family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if e != 0 {
			goto failed
		}
		o.rights.fds[n] = int32(r)
		n++
	}
	goto send

failed:
	o.report.step = st
	o.report.errno = int32(e)
	o.msg.Controllen = 0

send:
	_, _, _ = syscall.RawSyscall(unix.SYS_SENDMSG, uintptr(o.sock), uintptr(unsafe.Pointer(&o.msg)), unix.MSG_NOSIGNAL)
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}

// atFDCWD is AT_FDCWD as a register value.
const atFDCWD = ^uintptr(99) // -100

// receive waits for the child's one message.
func receive(sock int, w wish) (*opened, error) {
	deadline := time.Now().Add(forkTimeout)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return nil, fail(ErrTimeout, os.ErrDeadlineExceeded, "entering the namespace took longer than %v: is %s stuck loading its module?", forkTimeout, tunPath)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(sock), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("poll: %w", err)
		}
		if err == nil && n > 0 {
			break
		}
	}
	var report forkReport
	data := unsafe.Slice((*byte)(unsafe.Pointer(&report)), unsafe.Sizeof(report))
	oob := make([]byte, unix.CmsgSpace(4*w.count()))
	n, oobn, flags, _, err := unix.Recvmsg(sock, data, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("receiving descriptors: %w", err)
	}
	var fds []int
	cmsgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err == nil {
		for i := range cmsgs {
			var some []int
			if some, err = unix.ParseUnixRights(&cmsgs[i]); err != nil {
				break
			}
			fds = append(fds, some...)
		}
	}
	switch {
	case n == 0:
		err = errors.New("the process forked into the namespace died before it answered")
	case n != len(data):
		err = fmt.Errorf("the process forked into the namespace answered with %d bytes instead of %d", n, len(data))
	case report.step != stepNone:
		err = stepError(report.step, syscall.Errno(report.errno))
	case err != nil:
		err = fmt.Errorf("receiving descriptors: %w", err)
	case flags&unix.MSG_CTRUNC != 0 || len(fds) != w.count():
		err = fmt.Errorf("received %d descriptors from the namespace instead of %d: is the limit on open files (ulimit -n) reached?", len(fds), w.count())
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, err
	}
	take := func(count int) []int {
		some := fds[:count:count]
		fds = fds[count:]
		return some
	}
	o := &opened{tuns: take(w.tuns), netlink: -1}
	if w.talks != noTalk {
		o.netlink = take(1)[0]
	}
	o.files = take(len(w.files))
	for i, fd := range o.files {
		if report.missing&(1<<i) != 0 {
			unix.Close(fd)
			o.files[i] = -1
		}
	}
	o.stream4, o.stream6 = take(w.stream4), take(w.stream6)
	return o, nil
}

func stepError(step int32, errno syscall.Errno) error {
	switch {
	case step == stepTun:
		return tunError(tunPath, errno)
	case step == stepNetlink:
		return fmt.Errorf("netlink socket in the namespace: %w", errno)
	case step == stepStream4:
		return fmt.Errorf("TCP socket in the namespace: %w", errno)
	case step == stepStream6 && errno == syscall.EAFNOSUPPORT:
		return fail(ErrNoIPv6, errno, "no IPv6 in the namespace (%v)", errno)
	case step == stepStream6:
		return fmt.Errorf("TCP socket of IPv6 in the namespace: %w", errno)
	case errno == syscall.EPERM || errno == syscall.EACCES:
		return fail(ErrNotOwner, errno, "the kernel does not let you into this namespace: it must belong to a user namespace that you made (%v)", errno)
	case step == stepUserns:
		return fmt.Errorf("joining the user namespace: %w", errno)
	default:
		return fmt.Errorf("joining the network namespace: %w", errno)
	}
}

// reap waits for the child. After its message, or a SIGKILL, it is gone within microseconds; should it hang in the
// kernel, a goroutine waits on.
func reap(pid int) {
	gone := func(options int) bool {
		for {
			got, err := unix.Wait4(pid, nil, unix.WALL|options, nil)
			if !errors.Is(err, unix.EINTR) {
				return err != nil || got == pid
			}
		}
	}
	for wait := 50 * time.Microsecond; wait < time.Second; wait *= 2 {
		if gone(unix.WNOHANG) {
			return
		}
		time.Sleep(wait)
	}
	go gone(0)
}
