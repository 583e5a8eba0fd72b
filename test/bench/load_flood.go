// This file is the flood load generator: datagrams as fast as they go, until its standard input ends.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// udpFlood sends to a number of neighbouring ports, one after the other.
func udpFlood(ctx context.Context, o loadOptions, in io.Reader, _ io.Writer) error {
	ports := max(1, o.ports)
	s, err := newUDPSender(o)
	if err != nil {
		return err
	}
	defer unix.Close(s.fd)
	var ended atomic.Bool
	go func() {
		untilEOF(in)
		ended.Store(true)
	}()
	for port := 0; !ended.Load() && ctx.Err() == nil; {
		var err error
		if ports == 1 {
			_, err = mmsg(unix.SYS_SENDMMSG, s.fd, s.messages, 0)
		} else {
			to := &unix.SockaddrInet4{Addr: o.addr.Addr().As4(), Port: int(o.addr.Port()) + port}
			err = unix.Sendto(s.fd, s.payload, 0, to)
			port = (port + 1) % ports
		}
		switch {
		case err == nil, errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNREFUSED),
			errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		default:
			return fmt.Errorf("flood %v: %w", o.addr, err)
		}
	}
	return nil
}
