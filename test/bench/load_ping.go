// This file is the ping load generator: echo requests at a steady rate, whose answers are timed.

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pingEvery = 2 * time.Millisecond
	pingWait  = 200 * time.Millisecond // for the last answers
)

// pinged is the answer of ping, in microseconds. A request that was not answered in time counts as the longest wait there was.
type pinged struct {
	P50  float64 `json:"p50"`
	P99  float64 `json:"p99"`
	Sent int     `json:"sent"`
	Lost int     `json:"lost"`
}

// pingLoad sends requests whether or not earlier ones are answered.
func pingLoad(ctx context.Context, o loadOptions, _ io.Reader, out io.Writer) error {
	if err := pin(o.cpu); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMP)
	if err != nil {
		return fmt.Errorf("ICMP socket: %w", err)
	}
	defer unix.Close(fd)
	target := o.addr.Addr()
	to := &unix.SockaddrInet4{Addr: target.As4()}
	count := int(o.seconds * float64(time.Second) / float64(pingEvery))
	id := uint16(unix.Getpid())
	sent := make([]time.Time, count)
	trips := make([]time.Duration, count)
	begin := time.Now()
	var packet [2048]byte
	for next := 0; ctx.Err() == nil; {
		due := time.Until(begin.Add(time.Duration(next) * pingEvery))
		if next == count {
			due = time.Until(begin.Add(time.Duration(count)*pingEvery + pingWait))
			if due <= 0 {
				break
			}
		} else if due <= 0 {
			sent[next] = time.Now()
			if err := unix.Sendto(fd, echoRequest(id, uint16(next)), 0, to); err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EAGAIN) {
				return fmt.Errorf("ping %v: %w", target, err)
			}
			next++
			continue
		}
		ts := unix.NsecToTimespec(int64(due))
		if _, err := unix.Ppoll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, &ts, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		for {
			n, _, err := unix.Recvfrom(fd, packet[:], 0)
			if err != nil {
				break
			}
			b := packet[:n]
			if n < 28 || b[20] != 0 || binary.BigEndian.Uint16(b[24:]) != id {
				continue
			}
			if seq := int(binary.BigEndian.Uint16(b[26:])); seq < next && trips[seq] == 0 {
				trips[seq] = time.Since(sent[seq])
			}
		}
	}
	r := pinged{Sent: count}
	for i, t := range trips {
		if t == 0 {
			r.Lost++
			trips[i] = pingWait
		}
	}
	slices.Sort(trips)
	r.P50, r.P99 = microseconds(percentile(trips, 50)), microseconds(percentile(trips, 99))
	return answer(out, r)
}
