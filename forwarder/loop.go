// This file is the poll loop: one goroutine that owns an underlay socket of each family and a share of the TAPs, and carries every packet it
// reads to the end. One loop for both directions, because the ACK that a write to a TAP provokes is then in its ring when the
// loop comes round, without a wake-up.

package forwarder

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const (
	// A batch from a TAP ends at this many packets or bytes: enough to fill trains, few enough to stay in the cache.
	batchPackets = 64
	batchBytes   = 256 << 10
	maxEvents    = 64

	// epoll data of what is not a port; ports count from 0, lanes of the underlay down from underlayID, maxLanes for each family.
	// Below them is the guest (Attend).
	wakeID     = -1
	underlayID = -2
	guestID    = underlayID - int32(families)*maxLanes
)

var errStopped = errors.New("the router has stopped")

// defaultLoops is one loop for every two cores (or what a CPU quota leaves of them): the other half runs the containers, the
// gateway and the kernel's share.
func defaultLoops() int { return max(1, runtime.GOMAXPROCS(0)/2) }

// loop is one poll loop.
type loop struct {
	// constant after newLoop
	worker *worker
	rxq    *rxQueue
	rx     *packet.Rx
	epfd   int
	wakefd int

	// of the goroutine of run
	waiter waiter
	level  time.Duration // that ports have been served up to (turns.go)

	// atomic
	slots atomic.Pointer[[]*Port] // by epoll data; a removed port leaves nil
	guest atomic.Pointer[func()]  // see Attend; nil: there is none

	// guarded by mu
	mu     sync.Mutex
	closed bool
}

// newLoop makes the loop of index i.
func newLoop(r *Router, i int, w waiter) (*loop, error) {
	under := r.under.Load()
	lanes := 0
	for _, s := range under {
		if s != nil {
			lanes = max(lanes, s.lanes)
		}
	}
	l := &loop{worker: newWorker(r, i), rxq: newRxQueue(lanes, r.vxlan), rx: packet.NewRx(batchPackets, batchBytes), epfd: -1, wakefd: -1, waiter: w}
	l.worker.turns = true
	l.slots.Store(&[]*Port{})
	var err error
	if l.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll_create: %w", err)
	}
	if l.wakefd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		l.close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err = l.watch(l.wakefd, wakeID); err != nil {
		l.close()
		return nil, err
	}
	for _, s := range under {
		if err := l.watchLanes(s); err != nil {
			l.close()
			return nil, err
		}
	}
	return l, nil
}

func (l *loop) watch(fd int, id int32) error {
	if err := unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: id}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

func (l *loop) unwatch(fd int) { _ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, fd, nil) } // fails if that is done

// watchLanes watches the loop's own of s, if there are any. After an error it watches some of them.
func (l *loop) watchLanes(s *sockets) error {
	if s == nil {
		return nil
	}
	first := underlayID - int32(familyOf(s.addr.Addr()))*maxLanes
	for lane, fd := range s.loopFDs(l.worker.loop) {
		if err := l.watch(fd, first-int32(lane)); err != nil {
			return err
		}
	}
	return nil
}

func (l *loop) unwatchLanes(s *sockets) {
	if s == nil {
		return
	}
	for _, fd := range s.loopFDs(l.worker.loop) {
		l.unwatch(fd)
	}
}

func (l *loop) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	for _, fd := range []int{l.epfd, l.wakefd} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// add begins to read p's device in this loop.
func (l *loop) add(p *Port) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errStopped
	}
	old := *l.slots.Load()
	id := len(old)
	for i, s := range old {
		if s == nil {
			id = i
			break
		}
	}
	// Watched first, so that a device that cannot be watched is never read. An event that finds no port in the slot yet
	// comes again: epoll is level-triggered.
	if err := l.watch(p.cfg.Device.FD(), int32(id)); err != nil {
		return err
	}
	slots := make([]*Port, max(len(old), id+1))
	copy(slots, old)
	slots[id] = p
	l.slots.Store(&slots)
	return nil
}

// remove ends it. An event already fetched finds the slot empty or, in a batch that quiesce waits for, the port marked gone.
func (l *loop) remove(p *Port) {
	l.mu.Lock()
	defer l.mu.Unlock()
	slots := append([]*Port(nil), *l.slots.Load()...)
	for i, s := range slots {
		if s == p {
			slots[i] = nil
		}
	}
	l.slots.Store(&slots)
	if !l.closed {
		l.unwatch(p.cfg.Device.FD())
	}
}

// run polls until stop is set and the loop is woken.
func (l *loop) run(stop *atomic.Bool) error {
	defer l.worker.endTurn()
	events := make([]unix.EpollEvent, maxEvents)
	for !stop.Load() {
		n, err := l.wait(events)
		if err != nil {
			return err
		}
		var lanes uint64
		for _, ev := range events[:n] {
			if ev.Fd <= underlayID && ev.Fd > guestID {
				lanes |= 1 << (underlayID - ev.Fd)
			}
		}
		for f := outer4; lanes != 0; f++ {
			if ready := lanes & (1<<maxLanes - 1); ready != 0 {
				l.worker.begin()
				l.rxq.read(l.worker, f, ready)
				l.worker.end()
			}
			lanes >>= maxLanes
		}
		for _, ev := range events[:n] {
			if ev.Fd == guestID {
				l.attend()
			}
		}
		l.readPorts(events[:n])
	}
	return nil
}

// attend has the guest polled.
func (l *loop) attend() {
	l.worker.begin()
	defer l.worker.end()
	if poll := l.guest.Load(); poll != nil {
		(*poll)()
		l.worker.roused = true
	}
}

// Attend has poll called by a loop, which is awake often, whenever the descriptor fd is readable and the router runs: for the gateway, whose
// sockets' events come in the midst of packets, so that no other thread needs to wake for them. There is one such guest at a time. When leave
// has returned poll is not called any more. It fails when the router has stopped.
func (r *Router) Attend(fd int, poll func()) (leave func(), err error) {
	l := r.loops[0]
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errStopped
	}
	l.guest.Store(&poll)
	if err := l.watch(fd, guestID); err != nil {
		l.guest.Store(nil)
		return nil, err
	}
	return func() {
		l.mu.Lock()
		if !l.closed {
			l.unwatch(fd)
		}
		l.guest.Store(nil)
		l.mu.Unlock()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.quiesceLocked()
	}, nil
}

// readPort forwards one batch of a container's packets.
func (l *loop) readPort(id int) {
	l.worker.begin()
	defer l.worker.end()
	// The slots are loaded inside the batch: RemovePort clears them before it waits for the batch to end.
	slots := *l.slots.Load()
	if id >= len(slots) || slots[id] == nil {
		return
	}
	p := slots[id]
	if p.gone.Load() {
		return
	}
	l.rx.Reset()
	if err := p.cfg.Device.Read(l.rx); err != nil {
		l.unwatch(p.cfg.Device.FD())
		if p.cfg.Gone != nil {
			go p.cfg.Gone(err)
		}
	}
	in := ingress{kind: fromContainer, port: p}
	pkts := l.rx.Packets()
	for i := range pkts {
		l.worker.forward(&pkts[i], &in)
	}
}

// Run forwards packets until ctx ends, then closes the underlay sockets. Ports that are still there keep their devices open:
// they are the caller's.
func (r *Router) Run(ctx context.Context) error {
	var stop atomic.Bool
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range r.loops {
		g.Go(func() error { return l.run(&stop) })
	}
	g.Go(func() error {
		<-ctx.Done()
		stop.Store(true)
		for _, l := range r.loops {
			_, _ = unix.Write(l.wakefd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		}
		return nil
	})
	err := g.Wait()
	r.Close()
	return err
}

// Close closes the underlay sockets and the loops of a Router that does not run. Run does it itself. An Injector may still be
// called; it drops what it is given.
func (r *Router) Close() {
	if r.closed.Swap(true) {
		return
	}
	r.mu.Lock()
	r.quiesceLocked()
	r.mu.Unlock()
	for _, l := range r.loops {
		l.close()
	}
	for _, s := range r.under.Load() {
		if s != nil {
			s.close()
		}
	}
}
