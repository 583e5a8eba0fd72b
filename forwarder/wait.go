// This file is how a poll loop waits: it looks a few times, giving way to whoever wants the core, before it sleeps; and under load
// it sleeps in a way that keeps Go's scheduler out of the packet path.
//
// Looking before sleeping: waking a core that has gone idle costs tens of microseconds (an interrupt, and in a virtual machine
// an exit to the host), more than all that happens to a packet here, and a round trip between containers has four such
// sleeps in daemons. So a loop whose last wait was short looks again at once, spinTurns times. Each turn ends with
// sched_yield(2): the containers' processes share these cores and must never wait for a loop that only looks. When looking
// finds nothing a few times over, as at a steady rate of some thousand packets a second, it is left off for a while.
//
// Keeping the P: a Go system call lets the runtime take the goroutine's P away, and the runtime's monitor thread does so, every
// few tens of microseconds, from a goroutine that has not been rescheduled for 10 ms (runtime.retake in Go 1.26): each time
// two futex calls and a woken thread. So the calls that do not block (here, in underlay.go, receive.go and internal/tap) are
// RawSyscalls, and a wait that is likely to be short holds the P. The garbage collector is not held up: it stops a thread with
// a signal, and epoll_wait returns EINTR. Other goroutines are not, either: a loop that has given the gateway something lets its
// goroutines run first, does what they leave to it (packet.Turner), and where there are not more Ps than loops none is held.

package forwarder

import (
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	spinTurns  = 50                     // some 30 to 50 us on an idle core
	spinBelow  = 100 * time.Microsecond // after a wait longer than this, the next is not likely to be found by looking
	spinTries  = 4                      // times to look in vain, before
	spinPause  = 32                     // so many waits without looking
	heldWait   = 2 * time.Millisecond   // the longest that a P is held
	recheck    = 256                    // waits between looks at the number of Ps
	heldWaitMS = uintptr(heldWait / time.Millisecond)
)

// waiter is the state of a loop's waits. It belongs to the goroutine of the loop.
type waiter struct {
	loops int
	holds bool          // there are more Ps than loops
	waits uint          // so far
	last  time.Duration // how long the last wait was
	tries int           // times left to look in vain
	pause int           // waits left without looking
}

func newWaiter(loops int) waiter {
	return waiter{loops: loops, last: heldWait, tries: spinTries}
}

// looks tells whether to look before sleeping.
func (w *waiter) looks() bool {
	if !w.holds || w.last >= spinBelow {
		return false
	}
	if w.pause > 0 {
		w.pause--
		return false
	}
	return true
}

// found notes that looking found something.
func (w *waiter) found() { w.last, w.tries = 0, spinTries }

// lookedInVain notes that it did not.
func (w *waiter) lookedInVain() {
	if w.tries--; w.tries == 0 {
		w.tries, w.pause = spinTries, spinPause
	}
}

// wait returns how many events there are; 0 after a signal.
func (l *loop) wait(events []unix.EpollEvent) (int, error) {
	if l.worker.roused {
		l.worker.roused = false
		runtime.Gosched()
		l.worker.endTurn()
	}
	w := &l.waiter
	if w.waits%recheck == 0 { // a CPU quota or an affinity may change; the runtime follows
		w.holds = runtime.GOMAXPROCS(0) > w.loops
	}
	w.waits++
	begin := time.Now()
	if w.looks() {
		for range spinTurns {
			if n, err := l.poll(events, 0); n > 0 || err != nil {
				w.found()
				return n, err
			}
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
		w.lookedInVain()
	}
	if w.holds && w.last < heldWait {
		if n, err := l.poll(events, heldWaitMS); n > 0 || err != nil {
			w.last = time.Since(begin)
			return n, err
		}
	}
	n, err := unix.EpollWait(l.epfd, events, -1)
	w.last = time.Since(begin)
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
