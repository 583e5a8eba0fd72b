// This file is how a poll loop waits: it looks a few times, giving way to whoever wants the core, before it sleeps; and it
// sleeps in two steps, so that Go's scheduler keeps out of the packet path.
//
// Looking before sleeping: waking a core that has gone idle costs tens of microseconds (an interrupt, and in a virtual machine
// an exit to the host), more than all that happens to a packet here, and a round trip between containers has four such
// sleeps in daemons. So a loop whose last wait was short looks again at once, spinTurns times. Each turn ends with
// sched_yield(2): the containers' processes share these cores and must never wait for a loop that only looks.
//
// Keeping the P: a Go system call lets the runtime take the goroutine's P away, and the runtime's monitor thread does so, every
// few tens of microseconds, from a goroutine that has not been rescheduled for 10 ms (runtime.retake in Go 1.26): each time
// two futex calls and a woken thread. So the calls that do not block (here, in underlay.go and in internal/tap) are
// RawSyscalls, and a wait holds the P for heldWait; only then is it given up, and an idle daemon is asleep altogether. The
// garbage collector is not held up: it stops a thread with a signal, and epoll_wait returns EINTR.

package forwarder

import (
	"errors"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	spinTurns = 50                     // some 30 to 50 us on an idle core
	spinBelow = 150 * time.Microsecond // a wait longer than this would not have been found by spinning: sleep at once
	heldWait  = 2                      // milliseconds
)

// wait returns how many events there are; 0 after a signal.
func (l *loop) wait(events []unix.EpollEvent) (int, error) {
	begin := time.Now()
	if l.spin {
		for range spinTurns {
			if n, err := l.poll(events, 0); n > 0 || err != nil {
				return n, err
			}
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
	}
	n, err := l.poll(events, heldWait)
	if n > 0 || err != nil {
		l.spin = time.Since(begin) < spinBelow
		return n, err
	}
	l.spin = false
	n, err = unix.EpollWait(l.epfd, events, -1)
	if errors.Is(err, unix.EINTR) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("epoll_wait: %w", err)
	}
	return n, nil
}

// poll is epoll_wait with the P held.
func (l *loop) poll(events []unix.EpollEvent, milliseconds uintptr) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epfd), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), milliseconds, 0, 0)
	switch errno {
	case 0:
		return int(n), nil
	case unix.EINTR:
		return 0, nil
	}
	return 0, fmt.Errorf("epoll_wait: %w", errno)
}
