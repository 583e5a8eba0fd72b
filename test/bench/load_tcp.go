// This file is the TCP load generators: request and response on one connection, and many short connections.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// roundTrips is the answer of rtt, in microseconds.
type roundTrips struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// warmShare is the part of the time, at its beginning, whose round trips do not count.
const warmShare = 0.1

// rttServe sends every byte back, on one connection after the other. It blocks in system calls on a thread of its own, so that
// Go's scheduler is not measured.
func rttServe(_ context.Context, o loadOptions, in io.Reader, out io.Writer) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(o.addr.Port()), Addr: o.addr.Addr().As4()}); err != nil {
		return fmt.Errorf("bind %v: %w", o.addr, err)
	}
	if err := unix.Listen(fd, 8); err != nil {
		return err
	}
	if err := sayReady(out); err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { // ends with the program
		failed <- func() error {
			if err := pin(o.cpu); err != nil {
				return err
			}
			for {
				conn, _, err := unix.Accept(fd)
				if err != nil {
					return err
				}
				err = echoBytes(conn)
				unix.Close(conn)
				if err != nil {
					return err
				}
			}
		}()
	}()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		untilEOF(in)
	}()
	select {
	case err := <-failed:
		return err
	case <-ended:
		return nil
	}
}

func echoBytes(conn int) error {
	if err := unix.SetsockoptInt(conn, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	var b [1]byte
	for {
		n, err := unix.Read(conn, b[:])
		if n == 0 || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		if err == nil {
			_, err = unix.Write(conn, b[:n])
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// rttClient measures round trips of one byte.
func rttClient(ctx context.Context, o loadOptions, _ io.Reader, out io.Writer) error {
	if err := pin(o.cpu); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(o.addr.Port()), Addr: o.addr.Addr().As4()}); err != nil {
		return fmt.Errorf("connect %v: %w", o.addr, err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return err
	}
	var trips []time.Duration
	var b [1]byte
	length := time.Duration(o.seconds * float64(time.Second))
	begin := time.Now()
	warm := begin.Add(time.Duration(warmShare * float64(length)))
	for time.Since(begin) < length && ctx.Err() == nil {
		at := time.Now()
		if _, err := unix.Write(fd, b[:]); err != nil {
			return err
		}
		if n, err := unix.Read(fd, b[:]); err != nil || n == 0 {
			return errors.Join(err, errors.New("no answer"))
		}
		if at.After(warm) {
			trips = append(trips, time.Since(at))
		}
	}
	if len(trips) == 0 {
		return errors.New("no round trip in time")
	}
	slices.Sort(trips)
	return answer(out, roundTrips{microseconds(percentile(trips, 50)), microseconds(percentile(trips, 99))})
}

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// connections is the answer of conns.
type connections struct {
	Done    int64   `json:"done"`
	Failed  int64   `json:"failed"`
	Seconds float64 `json:"seconds"`
	Error   string  `json:"error,omitempty"` // the first failure

	// Seconds of the first and the last tenth, of a counted run.
	FirstTenth float64 `json:"first_tenth,omitempty"`
	LastTenth  float64 `json:"last_tenth,omitempty"`
}

// connsPorts is on how many ports, beginning with the given one, conns-serve listens and conns dials.
const connsPorts = 4

// connsServe answers one byte with one byte and closes first, as many servers do.
func connsServe(ctx context.Context, o loadOptions, in io.Reader, out io.Writer) error {
	for i := range connsPorts {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", netip.AddrPortFrom(o.addr.Addr(), o.addr.Port()+uint16(i)).String())
		if err != nil {
			return err
		}
		defer l.Close()
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
					var b [1]byte
					if _, err := io.ReadFull(conn, b[:]); err == nil {
						_, _ = conn.Write(b[:]) // the client counts what fails
					}
				}()
			}
		}()
	}
	if err := sayReady(out); err != nil {
		return err
	}
	untilEOF(in)
	return nil
}

// connsClient opens connections, some at a time, for the given time or until there were enough.
func connsClient(ctx context.Context, o loadOptions, _ io.Reader, out io.Writer) error {
	length := time.Duration(o.seconds * float64(time.Second))
	var begun, done, failed atomic.Int64
	var first atomic.Pointer[error]
	var wg sync.WaitGroup
	begin := time.Now()
	more := func() bool {
		if o.count > 0 {
			return begun.Add(1) <= int64(o.count)
		}
		return time.Since(begin) < length
	}
	var firstTenth, lastTenth time.Duration // one worker each writes them
	for w := range o.workers {
		wg.Go(func() {
			for i := w; ctx.Err() == nil && more(); i++ {
				addr := netip.AddrPortFrom(o.addr.Addr(), o.addr.Port()+uint16(i%max(o.ports, 1)))
				if err := oneConnection(ctx, addr); err != nil {
					failed.Add(1)
					first.CompareAndSwap(nil, &err)
					continue
				}
				switch n := done.Add(1); {
				case o.count == 0:
				case n == int64(o.count/10):
					firstTenth = time.Since(begin)
				case n == int64(o.count-o.count/10):
					lastTenth = time.Since(begin)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	result := connections{Done: done.Load(), Failed: failed.Load(), Seconds: took.Seconds()}
	if lastTenth > 0 {
		result.FirstTenth, result.LastTenth = firstTenth.Seconds(), (took - lastTenth).Seconds()
	}
	if err := first.Load(); err != nil {
		result.Error = (*err).Error()
	}
	return answer(out, result)
}

// holdServe takes connections and holds them, after a byte each way.
func holdServe(ctx context.Context, o loadOptions, in io.Reader, out io.Writer) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", o.addr.String())
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	if err := sayReady(out); err != nil {
		return err
	}
	untilEOF(in)
	return nil
}

// holdClient opens connections, has each answered once, and then holds them.
func holdClient(ctx context.Context, o loadOptions, in io.Reader, out io.Writer) error {
	const limit = 3 * time.Second
	for range o.count {
		conn, err := (&net.Dialer{Timeout: limit, KeepAlive: -1}).DialContext(ctx, "tcp", o.addr.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(limit))
		if _, err := conn.Write([]byte{1}); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			return err
		}
	}
	if err := sayReady(out); err != nil {
		return err
	}
	untilEOF(in)
	return nil
}

// oneConnection is a request, an answer and the server's end of the connection.
func oneConnection(ctx context.Context, addr netip.AddrPort) error {
	const limit = 3 * time.Second
	conn, err := (&net.Dialer{Timeout: limit}).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	b, err := io.ReadAll(conn)
	if err == nil && len(b) != 1 {
		err = fmt.Errorf("%d bytes for an answer instead of one", len(b))
	}
	return err
}
