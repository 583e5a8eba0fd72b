// This file joins two connections of the kernel: bytes are spliced from one into a pipe and from there into the other, and never copied
// into this process. io.Copy splices as well, but holds a pipe for as long as it waits: two pipes, four descriptors and, of what
// a user may have in pipes (pipe-user-pages-soft in pipe(7)), 2 MB an idle connection, after which every pipe has two pages. Here a pipe is
// taken when there are bytes to move, and given back when there are none left.

package publish

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is what one splice moves at most. Pipes of one user hold 64 MB by default before new ones get two pages: 128 of these.
	pipeSize = 512 << 10
	// sparePipes are kept open for the next connection with bytes to move.
	sparePipes = 16
	// bufferSize is for connections to which no pipe could be given, for want of descriptors.
	bufferSize = 64 << 10
)

// errOver ends the wait of a direction that has nothing left to move.
var errOver = errors.New("over")

// long ago, as a deadline, wakes whoever waits for a connection.
var longAgo = time.Unix(1, 0)

// join copies between the client and the container until both directions are done, one end is reset, or ctx is done. It closes both: with a
// reset, if one of them was reset.
func (p *Publication) join(ctx context.Context, host, container *net.TCPConn) {
	_ = container.SetKeepAlive(false) // its other end is in the same kernel
	inline(host)
	inline(container)
	j := &joint{host: end{TCPConn: host}, container: end{TCPConn: container}}
	stop := context.AfterFunc(ctx, j.abort)
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { j.stream(&j.host, &j.container, &p.count.bytesOut) })
	j.stream(&j.container, &j.host, &p.count.bytesIn)
	wg.Wait()
	if j.ended.Load() == 2 {
		host.Close()
		container.Close()
	}
}

// joint is two connections that are one to both ends.
type joint struct {
	host, container end
	ended           atomic.Int32 // directions in which everything was said
	once            sync.Once
}

// end is one of the two connections.
type end struct {
	*net.TCPConn
	told atomic.Bool // that there is nothing more to come; set before it is
}

// abort resets both ends.
func (j *joint) abort() {
	j.once.Do(func() {
		reset(j.host.TCPConn)
		reset(j.container.TCPConn)
	})
}

// inline leaves a connection's urgent bytes in their place among the rest: outside of it, they would stop the stream (tcp(7)).
func inline(c *net.TCPConn) {
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	}
}

// reset closes a connection in the way that its peer notices.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
}

// stream moves bytes from src to dst until src has ended, which dst is told. Then it stays until the other direction has ended
// too, since src may yet be reset, of which dst is told as well.
func (j *joint) stream(dst, src *end, moved *atomic.Uint64) {
	d := direction{moved: moved}
	defer d.free()
	from, err := src.SyscallConn()
	if err != nil {
		j.abort()
		return
	}
	to, err := dst.SyscallConn()
	if err != nil {
		j.abort()
		return
	}
	fill, drain := d.fill, d.drain
	for d.err == nil && err == nil {
		if err = from.Read(fill); err == nil && d.held > 0 {
			err = to.Write(drain)
		}
	}
	if err != nil || !errors.Is(d.err, errOver) || !hasEnded(from) && !src.told.Load() {
		j.abort()
		return
	}
	dst.told.Store(true)
	_ = dst.CloseWrite() // fails where dst was reset, which the other direction sees
	if j.ended.Add(1) == 2 {
		_ = src.SetReadDeadline(longAgo)
		_ = dst.SetReadDeadline(longAgo)
		return
	}
	d.free()
	if err := from.Read(wasReset); err == nil {
		j.abort()
	}
}

// tcpCloseWait is the state of a connection of which the peer has ended its direction and we have not, TCP_CLOSE_WAIT in include/net/tcp_states.h.
const tcpCloseWait = 8

// hasEnded tells whether a connection that reads as ended was ended by its peer. A reset reads so too, once a write has been told of it: the
// kernel tells it once. Of a connection whose own direction has been ended nothing can be told.
func hasEnded(c syscall.RawConn) bool {
	state := uint8(0)
	err := c.Control(func(fd uintptr) {
		if ti, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = ti.State
		}
	})
	return err == nil && state == tcpCloseWait
}

// wasReset tells whether a connection that has ended in one direction is broken in both.
func wasReset(fd uintptr) bool {
	poll := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(poll, 0)
	return err == nil && n > 0 && poll[0].Revents&unix.POLLERR != 0
}

// direction is the bytes on their way from one connection to the other.
type direction struct {
	pipe  *pipe
	buf   *[bufferSize]byte // instead of a pipe; the bytes are the last `held` of the first `end`
	end   int
	held  int
	err   error // errOver: there will be no more
	moved *atomic.Uint64
}

// fill takes what has come in. It is called for as long as it says that it must wait.
func (d *direction) fill(fd uintptr) (done bool) {
	if d.pipe == nil && d.buf == nil {
		if d.pipe = pipes.get(); d.pipe == nil {
			d.buf = buffers.Get().(*[bufferSize]byte)
		}
	}
	for {
		var n int
		var err error
		if d.pipe != nil {
			n, err = splice(int(fd), d.pipe.in, pipeSize)
		} else {
			n, err = unix.Read(int(fd), d.buf[:])
		}
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case d.pipe != nil && n <= 0 && atUrgent(int(fd)): // a splice ends before it, whatever comes next
			d.free()
			d.buf = buffers.Get().(*[bufferSize]byte)
			continue
		case errors.Is(err, syscall.EAGAIN):
			d.free()
			return false
		case err != nil:
			d.err = err
		case n == 0:
			d.err = errOver
		default:
			d.held, d.end = n, n
		}
		return true
	}
}

// drain sends what fill took.
func (d *direction) drain(fd uintptr) (done bool) {
	for d.held > 0 {
		var n int
		var err error
		if d.pipe != nil {
			n, err = splice(d.pipe.out, int(fd), d.held)
		} else {
			n, err = unix.Write(int(fd), d.buf[d.end-d.held:d.end])
		}
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			return false
		case err != nil:
			d.err = err
			return true
		default:
			d.held -= n
			d.moved.Add(uint64(n))
		}
	}
	return true
}

// free gives back what bytes are moved with.
func (d *direction) free() {
	if d.pipe != nil {
		pipes.put(d.pipe, d.held == 0)
		d.pipe = nil
	}
	if d.buf != nil {
		buffers.Put(d.buf)
		d.buf = nil
	}
}

func splice(from, to, most int) (int, error) {
	n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
	return int(n), err
}

// atUrgent tells whether the next byte of a connection is an urgent one.
func atUrgent(fd int) bool {
	const atMark = 0x8905 // SIOCATMARK
	at, err := unix.IoctlGetInt(fd, atMark)
	return err == nil && at != 0
}

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// pipe is a pipe of pipeSize, or as large as the user may have one.
type pipe struct{ out, in int }

func (p *pipe) close() {
	unix.Close(p.out)
	unix.Close(p.in)
}

// pipes are those that nobody uses.
var pipes pipeList

type pipeList struct {
	mu    sync.Mutex
	spare []*pipe
}

// get is an empty pipe, nil if there is no descriptor for it.
func (l *pipeList) get() *pipe {
	l.mu.Lock()
	if last := len(l.spare) - 1; last >= 0 {
		p := l.spare[last]
		l.spare = l.spare[:last]
		l.mu.Unlock()
		return p
	}
	l.mu.Unlock()
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{out: fds[0], in: fds[1]}
}

// put takes back a pipe; one that has bytes in it is closed.
func (l *pipeList) put(p *pipe, empty bool) {
	if empty {
		l.mu.Lock()
		if len(l.spare) < sparePipes {
			l.spare = append(l.spare, p)
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
	}
	p.close()
}
