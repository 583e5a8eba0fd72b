// This file is the UDP load generator: a paced sender and a counting receiver, many packets a system call.
//
// A datagram's payload begins with the number of the trial it belongs to:
//
//	0        4              size
//	+--------+----------------+
//	| number |     zeros      |
//	+--------+----------------+

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	udpBatch     = 32      // messages a system call
	maxTrials    = 1 << 12 // numbers
	maxSegments  = 64      // datagrams a UDP_SEGMENT send; Linux before 6.9 takes no more
	maxTrain     = 62_000  // bytes a UDP_SEGMENT send
	receiveSpace = 64 << 10
	receiveQueue = 8 << 20 // the receiver must not be what loses
)

// sent is the sender's answer to "NUMBER RATE MILLISECONDS".
type sent struct {
	Packets int     `json:"packets"`
	Seconds float64 `json:"seconds"`
}

// received is the receiver's answer to "NUMBER".
type received struct {
	Packets uint64 `json:"packets"`
}

// message is struct mmsghdr of recvmmsg(2), on a 64-bit machine.
type message struct {
	header unix.Msghdr
	length uint32
	_      uint32
}

func mmsg(trap uintptr, fd int, messages []message, flags uintptr) (int, error) {
	n, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func udpSocket(addr netip.AddrPort) (int, unix.Sockaddr, error) {
	if !addr.Addr().Is4() {
		return -1, nil, fmt.Errorf("%v is not an IPv4 address", addr)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	return fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}, err
}

// udpReceive counts datagrams by their number until in ends.
func udpReceive(_ context.Context, o loadOptions, in io.Reader, out io.Writer) error {
	fd, addr, err := udpSocket(o.addr)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveQueue); err != nil {
		return fmt.Errorf("receive buffer: %w", err)
	}
	if o.gso {
		if err := unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1); err != nil {
			return fmt.Errorf("UDP_GRO: %w", err)
		}
	}
	if err := unix.Bind(fd, addr); err != nil {
		return fmt.Errorf("bind %v: %w", o.addr, err)
	}
	if err := sayReady(out); err != nil {
		return err
	}
	counts := new([maxTrials]atomic.Uint64)
	failed := make(chan error, 1)
	go func() { failed <- countDatagrams(fd, counts) }() // ends with the program
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		select {
		case err := <-failed:
			return err
		default:
		}
		var number int
		if _, err := fmt.Sscan(lines.Text(), &number); err != nil || number < 0 || number >= maxTrials {
			return fmt.Errorf("which trial is %q?", lines.Text())
		}
		if err := answer(out, received{counts[number].Load()}); err != nil {
			return err
		}
	}
	return lines.Err()
}

func countDatagrams(fd int, counts *[maxTrials]atomic.Uint64) error {
	const controlSpace = 64
	buffers := make([]byte, udpBatch*receiveSpace)
	controls := make([]byte, udpBatch*controlSpace)
	messages := make([]message, udpBatch)
	vectors := make([]unix.Iovec, udpBatch)
	for i := range messages {
		vectors[i].Base = &buffers[i*receiveSpace]
		vectors[i].SetLen(receiveSpace)
		messages[i].header.Iov = &vectors[i]
		messages[i].header.SetIovlen(1)
		messages[i].header.Control = &controls[i*controlSpace]
	}
	for {
		for i := range messages {
			messages[i].header.SetControllen(controlSpace)
		}
		n, err := mmsg(unix.SYS_RECVMMSG, fd, messages, unix.MSG_WAITFORONE)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("receive: %w", err)
		}
		for i, m := range messages[:n] {
			if m.length < 4 {
				continue
			}
			number := binary.BigEndian.Uint32(buffers[i*receiveSpace:])
			if number >= maxTrials {
				continue
			}
			packets := uint64(1)
			if segment := segmentSize(controls[i*controlSpace:][:m.header.Controllen]); segment > 0 {
				packets = (uint64(m.length) + segment - 1) / segment
			}
			counts[number].Add(packets)
		}
	}
}

// segmentSize is what UDP_GRO says of a message, 0 when it says nothing. The kernel aligns a control message as it aligns
// its header: a length of 8 bytes, level and type of 4 each.
func segmentSize(control []byte) uint64 {
	if len(control) < 20 {
		return 0
	}
	level := int32(binary.NativeEndian.Uint32(control[8:]))
	kind := int32(binary.NativeEndian.Uint32(control[12:]))
	if level != unix.SOL_UDP || kind != unix.UDP_GRO {
		return 0
	}
	return uint64(binary.NativeEndian.Uint32(control[16:]))
}

// udpSend sends trials as in asks for them.
func udpSend(ctx context.Context, o loadOptions, in io.Reader, out io.Writer) error {
	if err := pin(o.cpu); err != nil {
		return err
	}
	s, err := newUDPSender(o)
	if err != nil {
		return err
	}
	defer unix.Close(s.fd)
	// Sleeps of some ten microseconds are not to become a hundred.
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0); err != nil {
		return fmt.Errorf("timer slack: %w", err)
	}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var number uint32
		var rate float64
		var milliseconds int
		if _, err := fmt.Fscan(strings.NewReader(lines.Text()), &number, &rate, &milliseconds); err != nil {
			return fmt.Errorf("what trial is %q: %w", lines.Text(), err)
		}
		result, err := s.send(ctx, number, rate, time.Duration(milliseconds)*time.Millisecond)
		if err != nil {
			return err
		}
		if err := answer(out, result); err != nil {
			return err
		}
	}
	return lines.Err()
}

// udpSender sends equal datagrams to one address. One goroutine uses it.
type udpSender struct {
	fd       int
	payload  []byte // one message: a datagram, or with GSO a train of them
	size     int    // of a datagram's payload
	train    int    // datagrams a message
	messages []message
}

func newUDPSender(o loadOptions) (*udpSender, error) {
	if o.size < 4 {
		return nil, fmt.Errorf("%d bytes have no room for the number", o.size)
	}
	s := &udpSender{size: o.size, train: 1}
	if o.gso {
		s.train = min(maxSegments, maxTrain/o.size)
	}
	fd, addr, err := udpSocket(o.addr)
	if err != nil {
		return nil, err
	}
	s.fd = fd
	if err := unix.Connect(fd, addr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect %v: %w", o.addr, err)
	}
	if o.gso {
		if err := unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, o.size); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("UDP_SEGMENT: %w", err)
		}
	}
	s.payload = make([]byte, s.size*s.train)
	vector := &unix.Iovec{Base: &s.payload[0]}
	vector.SetLen(len(s.payload))
	s.messages = make([]message, udpBatch)
	for i := range s.messages {
		s.messages[i].header.Iov = vector
		s.messages[i].header.SetIovlen(1)
	}
	return s, nil
}

// pause is how long the sender sleeps when nothing is due.
const pause = 30 * time.Microsecond

// send keeps to the rate in packets per second. What it could not send for a millisecond is let go rather than made up for in a
// burst, and then shows as an offered rate below the rate.
func (s *udpSender) send(ctx context.Context, number uint32, rate float64, length time.Duration) (sent, error) {
	for i := range s.train {
		binary.BigEndian.PutUint32(s.payload[i*s.size:], number)
	}
	late := max(rate/1000, float64(s.train))
	begin := time.Now()
	due, before := 0.0, begin
	packets := 0
	for {
		now := time.Now()
		if now.Sub(begin) >= length || ctx.Err() != nil {
			return sent{packets, now.Sub(begin).Seconds()}, ctx.Err()
		}
		due = min(due+now.Sub(before).Seconds()*rate, late)
		before = now
		n := min(int(due)/s.train, udpBatch)
		if n == 0 {
			ts := unix.NsecToTimespec(int64(pause))
			_ = unix.Nanosleep(&ts, nil) // a signal may shorten it
			continue
		}
		done, err := mmsg(unix.SYS_SENDMMSG, s.fd, s.messages[:n], 0)
		switch {
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNREFUSED):
			continue // still due
		case err != nil:
			return sent{}, fmt.Errorf("send: %w", err)
		}
		packets += done * s.train
		due -= float64(done * s.train)
	}
}
