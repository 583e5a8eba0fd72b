// This file finds network namespaces: by process, by path; whose they are, and that they are not the host's.

package nsutil

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"sync"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// nsfsMagic is the type of the file system that namespace files live on (linux/magic.h).
const nsfsMagic = 0x6e736673

// A Namespace is a network namespace that we may open a TAP in. It stays valid, and keeps the namespace alive, until
// Close, whatever happens to the process it was found by.
type Namespace struct {
	name string // for errors: "process 12", or the path
	ino  uint64

	mu     sync.Mutex
	net    *os.File
	owner  *os.File // the user namespace it belongs to; nil where that is our own
	closed bool
}

// OpenPID opens the network namespace of a process. The process must live (ErrNoProcess; a zombie does not), its
// namespace must belong to a user namespace that we own (ErrNotOwner) and must not be the one we are in ourselves
// (ErrHostNamespace).
func OpenPID(pid int) (*Namespace, error) {
	if pid <= 0 {
		return nil, fail(ErrInvalid, nil, "%d is not a pid", pid)
	}
	if _, err := StartTime(pid); err != nil {
		// Where /proc hides other users' processes (hidepid), the kernel still says that they are there.
		if errors.Is(err, ErrNoProcess) && OfAnother(pid) {
			return nil, fail(ErrNotOwner, err, "process %d belongs to another user: only your own containers can be attached", pid)
		}
		return nil, err
	}
	// The descriptor of the process, taken first, tells afterwards that it was one process all the time.
	pidfd, err := unix.PidfdOpen(pid, 0)
	switch {
	case err == nil:
		defer unix.Close(pidfd)
	case errors.Is(err, unix.ESRCH):
		return nil, noProcess(pid, err)
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT):
		return nil, fail(ErrNoProcess, err, "%d is a thread, not a process: give the pid of the process", pid)
	default:
		pidfd = -1
	}
	name := "process " + strconv.Itoa(pid)
	path := "/proc/" + strconv.Itoa(pid) + "/ns/net"
	f, err := openNetns(path)
	switch {
	case err == nil:
	case errors.Is(err, os.ErrPermission):
		return nil, fail(ErrNotOwner, err, "process %d belongs to %s, not to you: only your own containers can be attached", pid, ownerText(pid))
	case errors.Is(err, os.ErrNotExist):
		return nil, noProcess(pid, err)
	default:
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	n, err := newNamespace(f, name)
	if err != nil {
		return nil, err
	}
	if pidfd >= 0 && readable(pidfd) {
		n.Close()
		return nil, noProcess(pid, nil)
	}
	return n, nil
}

// OpenPath opens a network namespace by a path: /proc/PID/ns/net or a bind mount of one. Links below /proc/PID/root are followed as
// that process would, and those of /proc not at all. Errors are as for OpenPID, and ErrNoPath and ErrNotNetns.
func OpenPath(path string) (*Namespace, error) {
	f, err := openNetns(path)
	switch {
	case err == nil:
		return newNamespace(f, path)
	case errors.Is(err, os.ErrNotExist):
		return nil, fail(ErrNoPath, err, "%s does not exist: give the path of a network namespace (a container's is /proc/PID/ns/net)", path)
	case errors.Is(err, os.ErrPermission):
		return nil, fail(ErrNotOwner, err, "%s is not yours to open: only your own containers can be attached", path)
	default:
		return nil, err
	}
}

var procRoot = regexp.MustCompile(`(?s)^(/proc/[0-9]+/root)/(.+)$`) // a name may have newlines

// find opens what a path leads to for asking about it alone. What is below the root of a process is of the process's making: a link there
// leads no further than the process itself can go.
func find(path string) (int, error) {
	m := procRoot.FindStringSubmatch(path)
	if m == nil {
		at, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return at, nil
	}
	root, err := unix.Open(m[1], unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: m[1], Err: err}
	}
	defer unix.Close(root)
	for range 8 { // a rename somewhere, or a mount, makes the kernel unsure of ".."
		var at int
		at, err = unix.Openat2(root, m[2], &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
		if err == nil {
			return at, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return -1, &os.PathError{Op: "open", Path: path, Err: err}
}

// InodeAt is the number of the namespace, or of another file, that a path leads to, found as by OpenPath.
func InodeAt(path string) (uint64, error) {
	if s := sight.Load(); s != nil {
		return s.InodeAt(path)
	}
	at, err := find(path)
	if err != nil {
		return 0, err
	}
	defer unix.Close(at)
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// openNetns opens a namespace file without touching anything that is not one: opening a FIFO would block, and opening a
// device may do things.
func openNetns(path string) (*os.File, error) {
	if s := sight.Load(); s != nil {
		return s.OpenNetns(path)
	}
	at, err := find(path)
	if err != nil {
		return nil, err
	}
	defer unix.Close(at)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(at, &fs); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	notOne := fail(ErrNotNetns, nil, "%s is not a network namespace (a container's is /proc/PID/ns/net)", path)
	if int64(fs.Type) != nsfsMagic {
		return nil, notOne
	}
	ns, err := netns.GetFromPath("/proc/self/fd/" + strconv.Itoa(at))
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if t, err := unix.IoctlRetInt(int(ns), unix.NS_GET_NSTYPE); err != nil || t != unix.CLONE_NEWNET {
		ns.Close()
		return nil, notOne
	}
	return os.NewFile(uintptr(ns), path), nil
}

// newNamespace takes f over. It checks that the namespace is not ours and that we rule over it.
func newNamespace(f *os.File, name string) (*Namespace, error) {
	n := &Namespace{name: name, net: f}
	var err error
	if n.ino, err = fileInode(f); err == nil {
		err = n.findOwner()
	}
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

func (n *Namespace) findOwner() error {
	host, err := netns.Get()
	if err != nil {
		return fmt.Errorf("our own network namespace: %w", err)
	}
	same := host.Equal(netns.NsHandle(n.net.Fd()))
	host.Close()
	if same {
		return fail(ErrHostNamespace, nil, "%s is in the host's own network namespace: attach a process that has one of its own (podman run --network none, docker run --network none, unshare -Urn)", n.name)
	}
	self, err := pathInode("/proc/self/ns/user")
	if err != nil {
		return err
	}
	foreign := func(whose string, cause error) error {
		return fail(ErrNotOwner, cause, "the network namespace of %s belongs to %s, not to a user namespace of yours: only containers that you started without root can be attached", n.name, whose)
	}
	owner, err := nsIoctl(n.net, unix.NS_GET_USERNS)
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return foreign("another user", err)
		}
		return fmt.Errorf("user namespace of %s: %w", n.name, err)
	}
	at, err := fileInode(owner)
	if err != nil {
		owner.Close()
		return err
	}
	if at == self {
		owner.Close()
		if capable(unix.CAP_SYS_ADMIN) && capable(unix.CAP_NET_ADMIN) {
			return nil
		}
		return foreign("the root of this machine", nil)
	}
	n.owner = owner
	if capable(unix.CAP_SYS_ADMIN) {
		return nil
	}
	// Whoever made a user namespace rules over it and over all below it. So the one that hangs right below our own counts.
	step := owner
	for {
		parent, err := nsIoctl(step, unix.NS_GET_PARENT)
		if err != nil {
			if step != owner {
				step.Close()
			}
			if errors.Is(err, unix.EPERM) {
				return foreign("another user", err)
			}
			return fmt.Errorf("parent of the user namespace of %s: %w", n.name, err)
		}
		at, err := fileInode(parent)
		if err == nil && at != self {
			if step != owner {
				step.Close()
			}
			step = parent
			continue
		}
		parent.Close()
		var uid int
		if err == nil {
			uid, err = ownerUID(step)
		}
		if step != owner {
			step.Close()
		}
		switch {
		case err != nil:
			return fmt.Errorf("owner of the user namespace of %s: %w", n.name, err)
		case uid != os.Geteuid():
			return foreign("uid "+strconv.Itoa(uid), nil)
		}
		return nil
	}
}

// Inode is the number of the namespace, as in `ls -l /proc/PID/ns/net`: it tells two namespaces that exist at the same
// time apart.
func (n *Namespace) Inode() uint64 { return n.ino }

// Dup is the same namespace with a life of its own.
func (n *Namespace) Dup() (*Namespace, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, fail(ErrGone, os.ErrClosed, "%s: the namespace was closed", n.name)
	}
	again := &Namespace{name: n.name, ino: n.ino}
	var err error
	if again.net, err = dup(n.net); err != nil {
		return nil, err
	}
	if n.owner != nil {
		if again.owner, err = dup(n.owner); err != nil {
			again.net.Close()
			return nil, err
		}
	}
	return again, nil
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "dup", Path: f.Name(), Err: err}
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// Close lets the namespace go. Its TAPs stay.
func (n *Namespace) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	if n.owner != nil {
		n.owner.Close()
	}
	return n.net.Close()
}

// enter forks a child into the namespace, for TUN descriptors and an rtnetlink socket.
func (n *Namespace) enter(tuns int) (*opened, error) {
	return n.enterFor(wish{tuns: tuns, talks: unix.NETLINK_ROUTE})
}

func (n *Namespace) enterFor(w wish) (*opened, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, fail(ErrGone, os.ErrClosed, "%s: the namespace was closed", n.name)
	}
	userns := -1
	if n.owner != nil {
		userns = int(n.owner.Fd())
	}
	in, err := forkInside(userns, int(n.net.Fd()), w)
	if err != nil {
		return nil, fail(err, nil, "%s: %v", n.name, err)
	}
	return in, nil
}

func nsIoctl(f *os.File, req uint) (*os.File, error) {
	fd, err := unix.IoctlRetInt(int(f.Fd()), req)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "userns"), nil
}

func ownerUID(f *os.File) (int, error) {
	uid, err := unix.IoctlGetUint32(int(f.Fd()), unix.NS_GET_OWNER_UID)
	return int(uid), err
}

// fileInode and pathInode are the number of a namespace: all of them are files of one file system.
func fileInode(f *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st.Ino, nil
}

func pathInode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// readable tells whether a descriptor can be read right now; for that of a process it means that the process has ended.
func readable(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		k, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && k > 0
	}
}
