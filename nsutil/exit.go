// This file watches for the end of a process by its descriptor (pidfd): no inotify, no polling of /proc.

package nsutil

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// An Exit tells of the end of one process.
type Exit struct {
	f    *os.File
	done chan struct{}
	quit chan struct{} // closed when the watching goroutine has returned
	once sync.Once
}

// WatchExit watches a process, which need not be a child. A zombie has ended. ErrNoProcess if there is none now.
func WatchExit(pid int) (*Exit, error) {
	if pid <= 0 {
		return nil, fail(ErrInvalid, nil, "%d is not a pid", pid)
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.EINVAL) { // Linux before 5.10 has no such flag
		if fd, err = unix.PidfdOpen(pid, 0); err == nil {
			err = unix.SetNonblock(fd, true)
		}
	}
	switch {
	case err == nil:
	case errors.Is(err, unix.ESRCH):
		return nil, noProcess(pid, err)
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT):
		return nil, fail(ErrNoProcess, err, "%d is a thread, not a process: give the pid of the process", pid)
	default:
		return nil, fmt.Errorf("watching process %d: %w", pid, err)
	}
	e := &Exit{f: os.NewFile(uintptr(fd), "pidfd "+strconv.Itoa(pid)), done: make(chan struct{}), quit: make(chan struct{})}
	conn, err := e.f.SyscallConn()
	if err != nil {
		e.f.Close()
		return nil, fmt.Errorf("watching process %d: %w", pid, err)
	}
	go func() {
		defer close(e.quit)
		ended := false
		// Parked in the runtime's poller, without a thread, until the process ends or Close.
		_ = conn.Read(func(fd uintptr) bool {
			ended = readable(int(fd))
			return ended
		})
		if ended {
			close(e.done)
		}
	}()
	return e, nil
}

// Done is closed when the process has ended.
func (e *Exit) Done() <-chan struct{} { return e.done }

// Close stops watching; the goroutine is gone when it returns. Done stays as it is.
func (e *Exit) Close() error {
	var err error
	e.once.Do(func() { err = e.f.Close() })
	<-e.quit
	return err
}
