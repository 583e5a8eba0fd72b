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

// What is waited for. Edge-triggered: an event comes once for what is new, so whoever is called goes on until the socket has no more. Room
// is waited for when there was none, and while a connection is being made: every event costs a wake-up.
const (
	pollEvents = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET
	pollRoom   = unix.EPOLLOUT
)

// polled is called by the goroutine that polls with the events of its socket (epoll_ctl(2)). It must not block, nor call the poller.
type polled interface{ ready(events uint32) }

// poller is an epoll descriptor and who is to be told. The descriptor itself is waited for by Config.Attend, or by Go's own poller, so that no
// thread sleeps in it. All methods are safe for concurrent use, but for poll, which one goroutine calls.
type poller struct {
	ns     *netstack
	epfd   int               // valid until stop
	leave  func()            // of Config.Attend; nil: run is the one goroutine
	file   *os.File          // of run
	ended  chan struct{}     // of run
	events []unix.EpollEvent // of poll

	mu    sync.RWMutex
	slots []pollSlot // by descriptor
}

// pollSlot is who waits for a descriptor. An event that was fetched for an earlier holder of the number has another turn.
type pollSlot struct {
	who  polled
	turn int32
}

func newPoller(ns *netstack) (*poller, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create", err)
	}
	// What is not non-blocking is not taken by Go's poller.
	if err := unix.SetNonblock(epfd, true); err != nil {
		_ = unix.Close(epfd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	p := &poller{ns: ns, epfd: epfd, events: make([]unix.EpollEvent, 128), ended: make(chan struct{})}
	if attend := ns.gw.cfg.Attend; attend != nil {
		if p.leave, err = attend(epfd, func() { p.poll() }); err != nil {
			_ = unix.Close(epfd)
			return nil, fmt.Errorf("stack: poll the flows: %w", err)
		}
		close(p.ended)
		return p, nil
	}
	p.file = os.NewFile(uintptr(epfd), "flows")
	raw, err := p.file.SyscallConn()
	if err != nil {
		_ = p.file.Close()
		return nil, fmt.Errorf("stack: poll the flows: %w", err)
	}
	go p.run(raw)
	return p, nil
}

// run polls until stop.
func (p *poller) run(raw syscall.RawConn) {
	defer close(p.ended)
	for raw.Read(func(uintptr) bool { return p.poll() }) == nil {
		continue
	}
}

// poll tells of the events that there are. No means that there were none.
func (p *poller) poll() bool {
	n, err := unix.EpollWait(p.epfd, p.events, 0)
	if err != nil {
		return !errors.Is(err, unix.EINTR)
	}
	if n == 0 {
		return false
	}
	p.ns.beginTurn()
	for _, ev := range p.events[:n] {
		p.mu.RLock()
		if s := p.slots[ev.Fd]; s.who != nil && s.turn == ev.Pad {
			s.who.ready(ev.Events)
		}
		p.mu.RUnlock()
	}
	p.ns.endTurn()
	return true
}

// stop ends polling. No descriptor is in the poller any more.
func (p *poller) stop() {
	if p.leave != nil {
		p.leave()
		_ = unix.Close(p.epfd)
		return
	}
	_ = p.file.Close()
	<-p.ended
}

// add has who told of the events of fd, beginning with those that there are already; of room in it, if wanted.
func (p *poller) add(fd int, who polled, room bool) error {
	p.mu.Lock()
	for len(p.slots) <= fd {
		p.slots = append(p.slots, pollSlot{})
	}
	s := &p.slots[fd]
	s.who = who
	s.turn++
	turn := s.turn
	p.mu.Unlock()
	events := uint32(pollEvents)
	if room {
		events |= pollRoom
	}
	if err := unix.EpollCtl(p.epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd), Pad: turn}); err != nil {
		p.forget(fd)
		return os.NewSyscallError("epoll_ctl", err)
	}
	return nil
}

// awaitRoom has whoever is told of fd told of room in it from now on, beginning with what there is.
func (p *poller) awaitRoom(fd int) error {
	p.mu.RLock()
	turn := p.slots[fd].turn
	p.mu.RUnlock()
	return unix.EpollCtl(p.epfd, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: pollEvents | pollRoom, Fd: int32(fd), Pad: turn})
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
