// The daemon's socket: made where only its user can reach it, by one daemon at a time.

package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// ErrAnotherDaemon tells that a live daemon has the runtime directory.
var ErrAnotherDaemon = errors.New("another daemon is running")

const (
	lockName = "api.lock"
	// maxSocketPath is sizeof(sun_path) without its final zero byte (unix(7)).
	maxSocketPath = 107
)

// Listener accepts connections of its own user only (SO_PEERCRED); others are closed unanswered. While it is open its runtime
// directory is locked.
type Listener struct {
	*net.UnixListener
	path string
	uid  int
	once sync.Once
	lock *os.File

	activated bool
}

// Listen makes the runtime directory (0700) where it is absent, refuses one that others own or may enter, and listens on
// SocketPath(runtimeDir) with mode 0600. A socket left by a dead daemon is replaced; a live one is ErrAnotherDaemon. Whether it is
// alive is decided by a lock on a file beside the socket, which dies with its process, so two starting daemons cannot both win.
//
// Where systemd holds the socket open for this process (sd_listen_fds(3)), that one is taken, and left in its place by Close: clients
// that connect between two daemons wait for the next, which may be of this process.
func Listen(runtimeDir string) (*Listener, error) {
	dir, err := filepath.Abs(runtimeDir)
	if err != nil {
		return nil, fmt.Errorf("runtime directory %s: %w", runtimeDir, err)
	}
	path := SocketPath(dir)
	if len(path) > maxSocketPath {
		return nil, Errorf(CodeInvalid, "the socket's path %s has %d bytes, the kernel allows %d: choose a shorter --runtime-dir", path, len(path), maxSocketPath)
	}
	if err := ownDir(dir); err != nil {
		return nil, err
	}
	lock, err := takeLock(filepath.Join(dir, lockName), path)
	if err != nil {
		return nil, err
	}
	ln, err := handedOver(path)
	if err == nil && ln == nil {
		ln, err = left(path)
	}
	activated := ln != nil
	if err == nil && ln == nil {
		ln, err = listenAt(path)
	}
	if err != nil {
		_ = lock.Close() // the error that matters is err
		return nil, err
	}
	return &Listener{UnixListener: ln, path: path, uid: os.Geteuid(), lock: lock, activated: activated}, nil
}

// Given is a Listener made of another's socket and lock, which another process had. The socket stays in its place when it is closed, until
// SetUnlinkOnClose says otherwise.
func Given(runtimeDir string, ln *net.UnixListener, lock *os.File, activated bool) *Listener {
	return &Listener{UnixListener: ln, path: SocketPath(runtimeDir), uid: os.Geteuid(), lock: lock, activated: activated}
}

// Lock is the file whose lock keeps other daemons off. It stays the Listener's.
func (l *Listener) Lock() *os.File { return l.lock }

// Activated tells whether the socket is systemd's.
func (l *Listener) Activated() bool { return l.activated }

// Path is where the socket is.
func (l *Listener) Path() string { return l.path }

// Accept waits for the next connection of our own user.
func (l *Listener) Accept() (net.Conn, error) { return acceptOwn(l.UnixListener, l.uid) }

// acceptOwn waits for the next connection of a user's.
func acceptOwn(l *net.UnixListener, uid int) (net.Conn, error) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		cred, err := peerCred(conn)
		if err == nil && int(cred.Uid) == uid {
			return conn, nil
		}
		_ = conn.Close() // not our user, or gone already: nothing is owed to it
		if err == nil {
			otherUsers.Add(1)
		}
	}
}

var otherUsers atomic.Uint64

// OtherUsers is how many connections to this process's sockets, of Listen and ListenBeside, came from other users and were closed unanswered.
func OtherUsers() uint64 { return otherUsers.Load() }

// Close stops listening, removes the socket unless it is systemd's, and lets the next daemon have the directory. Calling it again does nothing.
func (l *Listener) Close() error {
	var err error
	l.once.Do(func() {
		if l.activated {
			err = leave(l.path, l.UnixListener)
		}
		err = errors.Join(err, l.UnixListener.Close()) // removes a socket of our own, while we still hold the lock
		err = errors.Join(err, l.lock.Close())         // the file stays: removing it would let two daemons lock two files
	})
	return err
}

// ownDir makes dir, or checks that it is ours alone.
func ownDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Errorf(CodeInvalid, "runtime directory %s cannot be made: %w: choose another with --runtime-dir", dir, err)
	}
	return CheckRuntimeDir(dir)
}

// CheckRuntimeDir refuses a directory that others own or may enter: what answers in it may be theirs. One that is absent is none.
func CheckRuntimeDir(dir string) error {
	fi, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("runtime directory: %w", err)
	}
	if !fi.IsDir() {
		return Errorf(CodeInvalid, "runtime directory %s is not a directory but %s: choose another with --runtime-dir", dir, kindOf(fi.Mode()))
	}
	if owner := ownerOf(fi); owner != os.Geteuid() {
		return Errorf(CodeDenied, "runtime directory %s belongs to uid %d, not to you (uid %d): choose your own with --runtime-dir", dir, owner, os.Geteuid())
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return Errorf(CodeDenied, "runtime directory %s is open to other users (mode %04o): run `chmod 700 %s`", dir, fi.Mode().Perm(), dir)
	}
	return nil
}

func kindOf(m fs.FileMode) string {
	if m.Type() == fs.ModeSymlink {
		return "a symbolic link"
	}
	return "a file"
}

// takeLock locks the file for the life of this process or until it is closed.
func takeLock(name, socket string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock of the runtime directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close() // the error that matters is err
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, anotherDaemon(socket)
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return f, nil
}

// handedOver is the socket at path that systemd has opened for this process, nil where it has opened none. The variables that tell of
// it are taken out of the environment.
func handedOver(path string) (*net.UnixListener, error) {
	var ln *net.UnixListener
	var others []string
	for _, f := range activation.Files(true) {
		given, err := net.FileListener(f) // has a descriptor of its own
		_ = f.Close()
		if err != nil {
			others = append(others, f.Name())
			continue
		}
		if u, ok := given.(*net.UnixListener); ok && u.Addr().String() == path && ln == nil {
			ln = u
			continue
		}
		others = append(others, given.Addr().String())
		_ = given.Close() // nobody asked for it
	}
	if len(others) == 0 {
		return ln, nil
	}
	if ln != nil {
		_ = ln.Close() // the error that matters is the other
	}
	return nil, Errorf(CodeInvalid, "systemd hands over %s, but the daemon's socket is %s: set ListenStream=%[2]s in the socket's unit and nothing else, or --runtime-dir in the service's",
		strings.Join(others, ", "), path)
}

// leftOpen are the sockets of systemd's that Listeners of this process have been closed on, by their paths: systemd hands them over once.
var leftOpen struct {
	sync.Mutex
	files map[string]*os.File
}

// leave keeps a socket of systemd's open for the next Listener.
func leave(path string, ln *net.UnixListener) error {
	f, err := ln.File()
	if err != nil {
		return fmt.Errorf("the socket of systemd's: %w", err)
	}
	leftOpen.Lock()
	defer leftOpen.Unlock()
	if leftOpen.files == nil {
		leftOpen.files = make(map[string]*os.File)
	}
	if before := leftOpen.files[path]; before != nil {
		_ = before.Close() // the same
	}
	leftOpen.files[path] = f
	return nil
}

// left is the socket of systemd's at path that a Listener of this process was closed on, nil where there is none.
func left(path string) (*net.UnixListener, error) {
	leftOpen.Lock()
	defer leftOpen.Unlock()
	f := leftOpen.files[path]
	if f == nil {
		return nil, nil
	}
	delete(leftOpen.files, path)
	given, err := net.FileListener(f) // has a descriptor of its own
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("the socket of systemd's: %w", err)
	}
	return given.(*net.UnixListener), nil // it was made of one
}

// listenAt listens on path, with the lock held: what lies there is stale unless somebody removed a living daemon's lock.
func listenAt(path string) (*net.UnixListener, error) {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("API socket: %w", err)
	case fi.Mode().Type() != fs.ModeSocket:
		return nil, Errorf(CodeInUse, "%s is in the way and is not a socket: move it, or choose another --runtime-dir", path)
	default:
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = conn.Close() // it was only to see whether somebody answers
			return nil, anotherDaemon(path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("stale API socket: %w", err)
		}
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("API socket: %w", err)
	}
	// Between the two calls the directory's mode is what keeps others out.
	if err := os.Chmod(path, 0o600); err != nil {
		_ = ln.Close() // the error that matters is err
		return nil, fmt.Errorf("API socket: %w", err)
	}
	return ln, nil
}

func anotherDaemon(socket string) error {
	return Errorf(CodeInUse, "%w on %s: stop it first, or give this one its own --runtime-dir and --state-dir", ErrAnotherDaemon, socket)
}

// peerCred is the process at the other end: its pid and uid in our namespaces, as they were when it connected.
func peerCred(conn *net.UnixConn) (*syscall.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *syscall.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err = errors.Join(err, credErr); err != nil {
		return nil, err
	}
	return cred, nil
}

// peerKey is a request's context key for its connection.
type peerKey struct{}

// withPeer is an http.Server's ConnContext.
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, conn)
}

// CallerPID is the process that sent the request whose context it is, by its pid in our own PID namespace, as it was when it connected: see
// CallerLives. Its error has CodeInvalid where that cannot be seen.
func CallerPID(ctx context.Context) (int, error) {
	conn, ok := ctx.Value(peerKey{}).(*net.UnixConn)
	if !ok {
		return 0, Errorf(CodeInvalid, "no process is known to have asked: a descriptor can be given through the daemon's socket only")
	}
	cred, err := peerCred(conn)
	if err != nil {
		return 0, fmt.Errorf("who asks cannot be seen: %w", err)
	}
	if cred.Pid == 0 {
		return 0, Errorf(CodeInvalid, "you are in a PID namespace that the daemon cannot see into, nor your descriptors: attach from the host")
	}
	return int(cred.Pid), nil
}

// CallerLives tells whether the process of CallerPID still lives, after something was read that /proc has of it: else that may have been another
// process's, for pids are used again.
func CallerLives(ctx context.Context) error {
	conn, ok := ctx.Value(peerKey{}).(*net.UnixConn)
	if !ok {
		return Errorf(CodeInvalid, "no process is known to have asked")
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	lives := false
	if err := raw.Control(func(fd uintptr) { lives = peerLives(int(fd)) }); err != nil {
		return err
	}
	if !lives {
		return Errorf(CodeNotFound, "the process that asked has ended meanwhile: it has to wait for the answer")
	}
	return nil
}

// peerLives asks the descriptor that the kernel has of the process at the other end. Linux before 6.5 gives none: there its end of the
// connection, which is closed with it, stands for it.
func peerLives(conn int) bool {
	poll := unix.PollFd{Fd: int32(conn), Events: unix.POLLRDHUP}
	pidfd, err := unix.GetsockoptInt(conn, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch {
	case err == nil:
		defer func() { _ = unix.Close(pidfd) }()
		poll = unix.PollFd{Fd: int32(pidfd), Events: unix.POLLIN}
	case !errors.Is(err, unix.ENOPROTOOPT):
		return false // it has been reaped
	}
	for {
		k, err := unix.Poll([]unix.PollFd{poll}, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && k == 0
		}
	}
}

// PIDNamespace names the PID namespace of a process, as `ls -l /proc/PID/ns/pid` does.
func PIDNamespace(pid int) (string, error) { return os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)) }

var pidNamespace atomic.Pointer[func(pid int) (string, error)]

func init() { SeePIDNamespaces(PIDNamespace) }

// SeePIDNamespaces has this process see the PID namespaces of those that ask it by a function: for a daemon that may not look into others itself.
func SeePIDNamespaces(by func(pid int) (string, error)) { pidNamespace.Store(&by) }

// checkPIDs refuses a request that names a pid (named), when the process that sent it counts pids in another PID namespace
// than we do: the number would be of some other process here.
func checkPIDs(ctx context.Context, named bool) error {
	conn, ok := ctx.Value(peerKey{}).(*net.UnixConn)
	if !named || !ok {
		return nil
	}
	cred, err := peerCred(conn)
	if err != nil {
		return fmt.Errorf("who asks cannot be seen: %w", err)
	}
	if cred.Pid != 0 { // 0: it is in no PID namespace that we can see
		theirs, err := (*pidNamespace.Load())(int(cred.Pid))
		if err != nil {
			return nil // it has gone, or hides (prctl PR_SET_DUMPABLE): nothing speaks against it
		}
		if ours, err := os.Readlink("/proc/self/ns/pid"); err != nil || theirs == ours {
			return nil
		}
	}
	return Errorf(CodeInvalid, "you are in another PID namespace than the daemon, as in a container, so your pids mean other processes to it: "+
		"attach from the host")
}

// ownerOf is the uid that owns a file, -1 where the file system does not tell.
func ownerOf(fi fs.FileInfo) int {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}
