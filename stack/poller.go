// This file waits for the host's sockets of all TCP flows at once, so that a flow with nothing to do costs no goroutine.

package stack

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// What is waited for. Edge-triggered: an event comes once for what is new, so whoever is called goes on until the socket has no more.
const pollEvents = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET

// polled is called by the poller's goroutine with the events of its socket (epoll_ctl(2)). It must not block, nor call the poller.
type polled interface{ ready(events uint32) }

// poller is an epoll descriptor and who is to be told. The descriptor itself is waited for by Go's own poller, so that no thread sleeps
// in it. All methods are safe for concurrent use; run is the one goroutine.
type poller struct {
	file  *os.File
	raw   syscall.RawConn
	epfd  int // valid until stop
	ended chan struct{}

	mu    sync.RWMutex
	slots []pollSlot // by descriptor
}

// pollSlot is who waits for a descriptor. An event that was fetched for an earlier holder of the number has another turn.
type pollSlot struct {
	who  polled
	turn int32
}

func newPoller() (*poller, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create", err)
	}
	// What is not non-blocking is not taken by Go's poller.
	if err := unix.SetNonblock(epfd, true); err != nil {
		_ = unix.Close(epfd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	p := &poller{file: os.NewFile(uintptr(epfd), "flows"), epfd: epfd, ended: make(chan struct{})}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		_ = p.file.Close()
		return nil, fmt.Errorf("stack: poll the flows: %w", err)
	}
	return p, nil
}

// run tells of events until stop.
func (p *poller) run() {
	defer close(p.ended)
	events := make([]unix.EpollEvent, 128)
	n := 0
	look := func(fd uintptr) bool {
		var err error
		if n, err = unix.EpollWait(int(fd), events, 0); err != nil {
			n = 0
			return !errors.Is(err, unix.EINTR)
		}
		return n > 0
	}
	for p.raw.Read(look) == nil {
		for _, ev := range events[:n] {
			p.mu.RLock()
			if s := p.slots[ev.Fd]; s.who != nil && s.turn == ev.Pad {
				s.who.ready(ev.Events)
			}
			p.mu.RUnlock()
		}
	}
}

// stop ends run and waits for it. No descriptor is in the poller any more.
func (p *poller) stop() {
	_ = p.file.Close()
	<-p.ended
}

// add has who told of the events of fd, beginning with those that there are already.
func (p *poller) add(fd int, who polled) error {
	p.mu.Lock()
	for len(p.slots) <= fd {
		p.slots = append(p.slots, pollSlot{})
	}
	s := &p.slots[fd]
	s.who = who
	s.turn++
	turn := s.turn
	p.mu.Unlock()
	if err := unix.EpollCtl(p.epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: pollEvents, Fd: int32(fd), Pad: turn}); err != nil {
		p.forget(fd)
		return os.NewSyscallError("epoll_ctl", err)
	}
	return nil
}

// pass has another told from now on, and returns when nobody is told before. Events that came before are not repeated.
func (p *poller) pass(fd int, who polled) {
	p.mu.Lock()
	p.slots[fd].who = who
	p.mu.Unlock()
}

// close closes fd, of which nobody is told any more. Closing alone would leave it in the poller while a process that was forked has it, too.
func (p *poller) close(fd int) {
	p.forget(fd)
	_ = unix.EpollCtl(p.epfd, unix.EPOLL_CTL_DEL, fd, nil) // it fails for one that was never added
	_ = unix.Close(fd)
}

// reset is close that has the peer get a RST.
func (p *poller) reset(fd int) {
	// A failure means that there is no connection any more.
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	p.close(fd)
}

func (p *poller) forget(fd int) {
	p.mu.Lock()
	p.slots[fd].who = nil
	p.mu.Unlock()
}
