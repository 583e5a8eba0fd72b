// This file is the host's end of datagram flows: a connected socket, UDP or unprivileged ICMP.

package stack

import (
	"encoding/binary"
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
func (ns *netstack) openSocket(proto int, to netip.AddrPort) (*hostSocket, error) {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err = ns.gw.cfg.Outbound.bind(fd, to.Addr()); err == nil {
		err = connect(fd, to)
	}
	if err != nil {
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
		if s.sent != nil && !errors.Is(s.sent, unix.EAGAIN) {
			s.sent = reported(int(fd), s.sent)
		}
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
// error about an earlier datagram (a syscall.Errno, or an outsideError around it), the deadline, or the end of the socket.
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
		rerr = reported(int(fd), rerr)
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

// outsideError is an error that came back from the network, with the address of who sent it.
type outsideError struct {
	errno syscall.Errno
	from  netip.Addr
}

func (e *outsideError) Error() string { return e.errno.Error() + ", says " + e.from.String() }
func (e *outsideError) Unwrap() error { return e.errno }

// reporter is who sent an error from the network; not valid for any other error.
func reporter(err error) netip.Addr {
	var outside *outsideError
	if errors.As(err, &outside) {
		return outside.from
	}
	return netip.Addr{}
}

// reported empties the socket's error queue, which is charged to its receive buffer, and makes err an outsideError if
// an ICMP error in the queue is the cause of it.
func reported(fd int, err error) error {
	const most = 64
	var data [1]byte
	var control [256]byte
	var errno syscall.Errno
	known := errors.As(err, &errno)
	for range most {
		_, n, _, _, qerr := unix.Recvmsg(fd, data[:], control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if qerr != nil {
			break
		}
		if cause, from := offender(control[:n]); known && cause == errno && from.IsValid() {
			err = &outsideError{errno: errno, from: from}
		}
	}
	return err
}

// offender reads the control messages of an entry of the error queue (ip(7), IP_RECVERR): what it says, and who said so. The
// address is not valid if the error is no ICMP error. Layout of such a message, in host byte order:
//
//	0       4        5      6      7     8      12     16
//	| errno | origin | type | code | pad | info | data | sockaddr of the offender
func offender(control []byte) (cause syscall.Errno, from netip.Addr) {
	msgs, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return 0, netip.Addr{}
	}
	for _, m := range msgs {
		v4 := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR
		v6 := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
		const fixed = 16 // bytes before the offender
		if !v4 && !v6 || len(m.Data) < fixed+2 {
			continue
		}
		cause = syscall.Errno(binary.NativeEndian.Uint32(m.Data))
		origin, sa := m.Data[4], m.Data[fixed:]
		switch family := binary.NativeEndian.Uint16(sa); {
		case origin == unix.SO_EE_ORIGIN_ICMP && family == unix.AF_INET && len(sa) >= 8: // family, port, address
			return cause, netip.AddrFrom4([4]byte(sa[4:8]))
		case origin == unix.SO_EE_ORIGIN_ICMP6 && family == unix.AF_INET6 && len(sa) >= 24: // family, port, flow, address
			return cause, netip.AddrFrom16([16]byte(sa[8:24])).Unmap()
		}
	}
	return cause, netip.Addr{}
}

// extend makes receive give up at t.
func (s *hostSocket) extend(t time.Time) error { return s.file.SetReadDeadline(t) }

// close ends receive, too.
func (s *hostSocket) close() {
	// A second close fails, and does no harm.
	_ = s.file.Close()
}
