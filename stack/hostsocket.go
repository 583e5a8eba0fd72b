// This file is the host's end of datagram flows: a connected socket, UDP or unprivileged ICMP.

package stack

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxDatagram is the most that one receive may return in bytes.
const maxDatagram = 64 << 10

var datagramBuffers = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// hostSocket is a connected datagram socket. Errors that come back by ICMP are reported by send and receive.
type hostSocket struct {
	file *os.File
	raw  syscall.RawConn

	mu      sync.Mutex
	payload []byte // what emit sends
	sent    error  // what emit got
	emit    func(fd uintptr) bool
}

// openSocket makes a socket of proto (unix.IPPROTO_UDP, _ICMP, _ICMPV6) connected to to.
func openSocket(proto int, to netip.AddrPort) (*hostSocket, error) {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := connect(fd, to); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	s := &hostSocket{file: os.NewFile(uintptr(fd), "flow")}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		_ = s.file.Close()
		return nil, err
	}
	s.emit = func(fd uintptr) bool {
		_, s.sent = unix.SendmsgN(int(fd), s.payload, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		return true // also when the socket is full: nobody waits here
	}
	return s, nil
}

// connect also asks for all ICMP errors, not just those that are fatal (ip(7), IP_RECVERR).
func connect(fd int, to netip.AddrPort) error {
	var sa unix.Sockaddr
	if a := to.Addr(); a.Is4() {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_RECVERR, 1); err != nil {
			return os.NewSyscallError("setsockopt IP_RECVERR", err)
		}
		sa = &unix.SockaddrInet4{Addr: a.As4(), Port: int(to.Port())}
	} else {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1); err != nil {
			return os.NewSyscallError("setsockopt IPV6_RECVERR", err)
		}
		sa = &unix.SockaddrInet6{Addr: a.As16(), Port: int(to.Port())}
	}
	return os.NewSyscallError("connect", unix.Connect(fd, sa))
}

// send sends one datagram without ever waiting. An error may be about an earlier datagram: then this one has not been sent.
func (s *hostSocket) send(b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.payload, s.sent = b, nil
	err := s.raw.Write(s.emit)
	s.payload = nil
	if err != nil {
		return err
	}
	return s.sent
}

// receive waits for a datagram, until the deadline of the last extend, and lends it to use. An error may be an ICMP
// error about an earlier datagram (a syscall.Errno), the deadline, or the end of the socket.
func (s *hostSocket) receive(use func(b []byte)) error {
	var (
		buf  *[maxDatagram]byte
		n    int
		rerr error
	)
	err := s.raw.Read(func(fd uintptr) bool {
		buf = datagramBuffers.Get().(*[maxDatagram]byte)
		n, _, rerr = unix.Recvfrom(int(fd), buf[:], unix.MSG_DONTWAIT)
		if rerr == nil {
			return true
		}
		datagramBuffers.Put(buf)
		if errors.Is(rerr, unix.EAGAIN) || errors.Is(rerr, unix.EINTR) {
			return false
		}
		emptyErrorQueue(int(fd))
		return true
	})
	if err != nil {
		return err
	}
	if rerr != nil {
		return rerr
	}
	use(buf[:n])
	datagramBuffers.Put(buf)
	return nil
}

// emptyErrorQueue throws away the details of ICMP errors, which are charged to the socket's receive buffer.
func emptyErrorQueue(fd int) {
	const most = 64
	var data [1]byte
	for range most {
		if _, _, _, _, err := unix.Recvmsg(fd, data[:], nil, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT); err != nil {
			return
		}
	}
}

// extend makes receive give up at t.
func (s *hostSocket) extend(t time.Time) error { return s.file.SetReadDeadline(t) }

// close ends receive, too.
func (s *hostSocket) close() {
	// A second close fails, and does no harm.
	_ = s.file.Close()
}
