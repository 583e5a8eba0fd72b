// This file reads the host's sockets of all datagram flows in one goroutine, so that an idle flow costs a few hundred bytes; and it ends
// the flows that are idle for too long.

package stack

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxDatagram is the most that one receive may return in bytes.
const maxDatagram = 64 << 10

// datagramReader waits for the sockets with an epoll instance, which itself is waited for by Go's poller.
type datagramReader struct {
	ns    *netstack
	file  *os.File // the epoll instance
	raw   syscall.RawConn
	ended chan struct{} // closed when run has returned; run begins with the first flow
	every time.Duration // between two looks for idle flows

	mu       sync.Mutex
	flows    map[uint64]*datagramFlow // by number of their socket
	last     uint64                   // number given
	sweeping bool                     // a sweep is to come
}

func newDatagramReader(ns *netstack) (*datagramReader, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true) // which has Go's poller take it
	}
	if err != nil {
		return nil, fmt.Errorf("stack: epoll: %w", err)
	}
	t := &ns.gw.cfg.Timeouts
	r := &datagramReader{
		ns: ns, file: os.NewFile(uintptr(fd), "datagram flows"), ended: make(chan struct{}), flows: make(map[uint64]*datagramFlow),
		every: min(t.UDP, t.UDPConversation, t.UDPDNS, t.Echo) / 4,
	}
	if r.raw, err = r.file.SyscallConn(); err != nil {
		_ = r.file.Close()
		return nil, fmt.Errorf("stack: epoll: %w", err)
	}
	return r, nil
}

// add begins to read a flow, whose mu is held.
func (r *datagramReader) add(f *datagramFlow) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	number := r.last + 1
	f.host.number = number
	var err error
	cerr := r.raw.Control(func(epoll uintptr) {
		err = unix.EpollCtl(int(epoll), unix.EPOLL_CTL_ADD, f.host.fd, &unix.EpollEvent{
			Events: unix.EPOLLIN, Fd: int32(uint32(number)), Pad: int32(uint32(number >> 32)),
		})
	})
	if err := errors.Join(cerr, os.NewSyscallError("epoll_ctl", err)); err != nil {
		return err
	}
	r.last = number
	r.flows[number] = f
	if number == 1 {
		go r.run()
	}
	r.sweepLaterLocked()
	return nil
}

// drop forgets a flow's socket, which is closed next. That alone would leave it in the epoll instance while a process that was forked has it, too:
// then run would be woken for ever by what nobody reads.
func (r *datagramReader) drop(s *hostSocket) {
	r.mu.Lock()
	delete(r.flows, s.number)
	r.mu.Unlock()
	// It fails only when close has been here, which waits for no flow.
	_ = r.raw.Control(func(epoll uintptr) { _ = unix.EpollCtl(int(epoll), unix.EPOLL_CTL_DEL, s.fd, nil) })
}

// readyFlow is a flow whose socket has something; trouble: errors in their queue, too.
type readyFlow struct {
	*datagramFlow
	trouble bool
}

// run reads until close.
func (r *datagramReader) run() {
	defer close(r.ended)
	var (
		events [64]unix.EpollEvent
		ready  []readyFlow
		buf    = make([]byte, maxDatagram)
	)
	for {
		var n int
		err := r.raw.Read(func(epoll uintptr) bool {
			var werr error
			n, werr = unix.EpollWait(int(epoll), events[:], 0)
			return n > 0 && werr == nil
		})
		if err != nil {
			return
		}
		r.mu.Lock()
		for _, e := range events[:n] {
			if f := r.flows[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]; f != nil {
				ready = append(ready, readyFlow{f, e.Events&unix.EPOLLERR != 0})
			}
		}
		r.mu.Unlock()
		r.serve(ready, buf)
		clear(ready)
		ready = ready[:0]
	}
}

// serve reads flows, those last whose containers have to wait for room: nobody else waits for it with them.
func (r *datagramReader) serve(ready []readyFlow, buf []byte) {
	late := 0
	for _, f := range ready {
		if !r.ns.exit.hasRoom(f.line()) {
			ready[late] = f
			late++
			continue
		}
		f.receive(buf, f.trouble)
	}
	for _, f := range ready[:late] {
		r.ns.exit.waitRoom(f.line())
		f.receive(buf, f.trouble)
	}
}

// close ends run and waits for it. The flows have ended.
func (r *datagramReader) close() {
	// A failure would be a second close, which there is none of.
	_ = r.file.Close()
	r.mu.Lock()
	began := r.last > 0
	r.mu.Unlock()
	if began {
		<-r.ended
	}
}

func (r *datagramReader) sweepLaterLocked() {
	if r.sweeping || len(r.flows) == 0 {
		return
	}
	r.sweeping = true
	time.AfterFunc(r.every, func() {
		if r.ns.flows.begin() {
			defer r.ns.flows.wg.Done()
			r.sweep(ticks())
		}
	})
}

// sweep ends the flows that are idle for too long, now in ticks.
func (r *datagramReader) sweep(now int64) {
	var over []*datagramFlow
	r.mu.Lock()
	for _, f := range r.flows {
		if now-f.used.Load() >= int64(f.idle()) {
			over = append(over, f)
		}
	}
	r.mu.Unlock()
	for _, f := range over {
		f.end()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sweeping = false
	if len(r.flows) == 0 {
		r.flows = make(map[uint64]*datagramFlow) // a map never shrinks
	}
	r.sweepLaterLocked()
}
