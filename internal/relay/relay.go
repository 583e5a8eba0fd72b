// Package relay joins two connections: what comes in on one goes out on the other, until both directions are done.
//
// Place in the journey: none of a container's packet. Behind it are the connections that host processes open into the overlay: a stream
// of the API, a client of the proxy, a port of `rootless-ovl forward`.
//
// A half-close is passed on as one. What ends without one - a reset, a broken connection, the end of the context - resets both, so that
// nobody takes a part of the data for all of it.
//
// Ownership: Join owns both connections and closes them. It runs one direction on its caller's goroutine and one on a goroutine of its own,
// and both have ended when it returns. A direction borrows its buffer from a pool: a small one while little comes, a large one while much does, so
// that an idle connection costs 8 KB.
package relay

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Conn is a connection that can be half-closed: a *net.TCPConn, a *net.UnixConn, an *api.Stream, a stack.Conn.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// end is one of two joined connections.
type end struct {
	Conn
	told atomic.Bool // that nothing more comes; set before it is
}

// Join copies between a and b until both have ended their half, or one of them breaks, or ctx ends; then it closes both. The error is what
// broke, nil when nothing did.
func Join(ctx context.Context, a, b Conn) error {
	var (
		once  sync.Once
		broke error
		both  sync.WaitGroup
	)
	fail := func(err error) {
		once.Do(func() {
			broke = err
			Reset(a)
			Reset(b)
		})
	}
	stop := context.AfterFunc(ctx, func() { fail(context.Cause(ctx)) })
	defer stop()
	pump := func(dst, src *end) {
		if err := copyHalf(dst, src); err != nil {
			fail(err)
		}
	}
	left, right := &end{Conn: a}, &end{Conn: b}
	both.Go(func() { pump(right, left) })
	pump(left, right)
	both.Wait()
	once.Do(func() { broke = errors.Join(a.Close(), b.Close()) })
	return broke
}

// Reset closes a connection so that the other end sees it broken rather than ended, as far as its kind can say so.
func Reset(c Conn) {
	switch c := c.(type) {
	case interface{ Abort() }:
		c.Abort()
		return
	case interface{ SetLinger(sec int) error }: // TCP of the kernel: closing it sends RST
		_ = c.SetLinger(0) // what has gone already needs no reset
	}
	_ = c.Close() // nobody is left to be told
}

// Sizes of buffers in bytes. The largest fills a fast path; more per call gains nothing measurable.
var sizes = [...]int{4 << 10, 32 << 10, 256 << 10}

// smallReads is how many reads in a row that a smaller buffer would have held make it smaller.
const smallReads = 8

var pools [len(sizes)]sync.Pool // of *[]byte

// buffer is what one direction reads into.
type buffer struct {
	level int
	bytes *[]byte
	small int
}

func (b *buffer) take(level int) {
	b.level, b.small = level, 0
	var ok bool
	if b.bytes, ok = pools[level].Get().(*[]byte); !ok {
		fresh := make([]byte, sizes[level])
		b.bytes = &fresh
	}
}

func (b *buffer) giveBack() { pools[b.level].Put(b.bytes) }

// fit follows the size of a read.
func (b *buffer) fit(n int) {
	switch {
	case n == sizes[b.level] && b.level < len(sizes)-1:
		b.giveBack()
		b.take(b.level + 1)
	case b.level > 0 && n <= sizes[b.level-1]:
		if b.small++; b.small >= smallReads {
			b.giveBack()
			b.take(b.level - 1)
		}
	default:
		b.small = 0
	}
}

// copyHalf copies one direction and ends it at dst when src has ended it.
func copyHalf(dst, src *end) error {
	var b buffer
	b.take(0)
	defer func() { b.giveBack() }()
	for {
		n, err := src.Read(*b.bytes)
		if n > 0 {
			if _, werr := dst.Write((*b.bytes)[:n]); werr != nil {
				return werr
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			if wasReset(src.Conn) && !src.told.Load() {
				return syscall.ECONNRESET
			}
			dst.told.Store(true)
			// One that was closed altogether has its last answer on the way: a reset would cut that off.
			_ = dst.CloseWrite()
			return nil
		case err != nil:
			return err
		}
		b.fit(n)
	}
}

// tcpCloseWait is the state of a connection of which the peer has ended its half and we have not, TCP_CLOSE_WAIT in include/net/tcp_states.h.
const tcpCloseWait = 8

// wasReset tells whether a TCP connection of the kernel that reads as ended was reset in truth: the kernel tells of a reset once, and a write
// may have been told. It cannot be known of one whose other half has been ended.
func wasReset(c Conn) bool {
	s, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	reset := false
	_ = raw.Control(func(fd uintptr) { // fails where it is closed, as both are after a failure
		ti, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		reset = err == nil && ti.State != tcpCloseWait
	})
	return reset
}
