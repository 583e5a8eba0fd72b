// This file is what UDP and echo flows have in common: a host socket, one goroutine that reads it, and expiry when idle.

package stack

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// datagramFlow is a flow of datagrams between a container and one host socket.
type datagramFlow struct {
	ns    *netstack
	entry *entry
	idle  func() time.Duration // how long the flow may be idle now
	reply func([]byte)         // sends what the host received to the container

	// Constant once opened is closed.
	socket *hostSocket   // nil: the flow could not be opened
	route  *gstack.Route // to the container
	opened chan struct{}

	used    atomic.Int64 // Unix time in ns when the last datagram passed
	replied atomic.Bool

	mu    sync.Mutex
	quote []byte // headers of the last datagram out, for ICMP errors
}

func (f *datagramFlow) touch() { f.used.Store(time.Now().UnixNano()) }

// open connects the flow's socket and starts reading it. If that fails the flow is gone.
func (f *datagramFlow) open(socket func() (*hostSocket, error)) error {
	defer close(f.opened)
	s, err := socket()
	if err == nil {
		r, terr := f.ns.route(f.entry.key.dst.Addr(), f.entry.key.src.Addr())
		if terr == nil {
			f.socket, f.route = s, r
			f.touch()
			go f.read()
			return nil
		}
		s.close()
		err = errors.New(terr.String())
	}
	f.ns.flows.remove(f.entry)
	return err
}

// send passes one datagram of the container to the host, and reports to the container what the host says about earlier ones.
func (f *datagramFlow) send(b, quote []byte) {
	<-f.opened
	if f.socket == nil {
		return
	}
	f.touch()
	f.mu.Lock()
	f.quote = append(f.quote[:0], quote...)
	f.mu.Unlock()
	err := f.socket.send(b)
	if err != nil && f.report(err) {
		err = f.socket.send(b)
	}
	if err != nil {
		f.ns.count.drop(dropHostBusy)
	}
}

// report sends the container the ICMP error that err stands for, if it does.
func (f *datagramFlow) report(err error) bool {
	kind, ok := kindOf(err)
	if !ok || isTimeout(err) {
		return false
	}
	f.mu.Lock()
	q := append([]byte(nil), f.quote...)
	f.mu.Unlock()
	var outside *outsideError
	if errors.As(err, &outside) {
		f.ns.sendErrorFrom(outside.from, kind, q)
	} else {
		f.ns.sendError(kind, q)
	}
	return true
}

// read is the flow's goroutine.
func (f *datagramFlow) read() {
	defer f.ns.flows.remove(f.entry)
	defer f.route.Release()
	defer f.socket.close()
	take := func(b []byte) {
		f.touch()
		f.replied.Store(true)
		f.reply(b)
	}
	for {
		f.ns.exit.waitRoom()
		if f.socket.extend(time.Unix(0, f.used.Load()).Add(f.idle())) != nil {
			return
		}
		err := f.socket.receive(take)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			if time.Since(time.Unix(0, f.used.Load())) >= f.idle() {
				return
			}
		case isErrno(err):
			f.report(err)
		default: // closed
			return
		}
	}
}

func isErrno(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno)
}

func (f *datagramFlow) end() {
	<-f.opened
	if f.socket != nil {
		f.socket.close()
	}
}
