// This file is the host's end of datagram flows: a connected socket, UDP or unprivileged ICMP, and what its queue of errors says.

package stack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// hostSocket is a connected datagram socket that never blocks. One goroutine uses it at a time.
type hostSocket struct {
	fd     int
	number uint64 // of the reader
	is4    bool

	// What the kernel was told last.
	told     bool
	carriage carriage
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
	return &hostSocket{fd: fd, is4: family == unix.AF_INET}, nil
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

// send sends one datagram, as it is to be carried. An error may be about an earlier datagram: then this one has not been sent.
func (s *hostSocket) send(b []byte, c carriage) error {
	if !s.told || s.carriage != c {
		if err := s.tell(c); err != nil {
			return err
		}
	}
	_, err := unix.SendmsgN(s.fd, b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	return os.NewSyscallError("sendmsg", err)
}

// tell sets what the socket's datagrams get in their headers. Not to fragment means for the kernel, too: what is larger than the path's MTU,
// as far as it is known, is refused.
func (s *hostSocket) tell(c carriage) error {
	level, hops, mtu := unix.IPPROTO_IP, unix.IP_TTL, unix.IP_MTU_DISCOVER
	if !s.is4 {
		level, hops, mtu = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER
	}
	discover := unix.IP_PMTUDISC_DONT // the same numbers in IPv6
	if c.dontFragment {
		discover = unix.IP_PMTUDISC_DO
	}
	if !s.told || s.carriage.hops != c.hops {
		if err := unix.SetsockoptInt(s.fd, level, hops, int(c.hops)); err != nil {
			return os.NewSyscallError("setsockopt TTL", err)
		}
	}
	if err := unix.SetsockoptInt(s.fd, level, mtu, discover); err != nil {
		return os.NewSyscallError("setsockopt MTU_DISCOVER", err)
	}
	s.told, s.carriage = true, c
	return nil
}

// receive takes one datagram that is there. An error may be about an earlier datagram, as those of send.
func (s *hostSocket) receive(buf []byte) (int, error) {
	for {
		n, _, err := unix.Recvfrom(s.fd, buf, unix.MSG_DONTWAIT)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// close also ends the host's willingness to get datagrams: it answers them with port unreachable.
func (s *hostSocket) close() {
	// Nothing is lost if it fails, and the descriptor is gone either way.
	_ = unix.Close(s.fd)
}

// errors empties the socket's queue of errors into into.
func (s *hostSocket) errors(into []outsideError) []outsideError { return readErrors(s.fd, into) }

// outsideError is an error that came back from the network, or from the host's own kernel about the size of a datagram.
type outsideError struct {
	errno syscall.Errno
	is4   bool
	typ   uint8      // of the ICMP message
	code  uint8      // of the ICMP message
	extra uint32     // the MTU, or the pointer of a parameter problem
	from  netip.Addr // who says so; not valid: the host itself
	about []byte     // what it quotes behind the headers of the datagram that it is about
}

func (e *outsideError) Error() string { return e.errno.Error() + ", says " + e.from.String() }
func (e *outsideError) Unwrap() error { return e.errno }

// message is the ICMP error for the container. No means that a router would not send one.
func (e *outsideError) message() (icmpError, bool) {
	m := icmpError{typ: e.typ, code: e.code}
	if !e.from.IsValid() {
		if e.errno != syscall.EMSGSIZE {
			return m, false
		}
		return tooBig(e.is4, e.extra), true
	}
	if e.is4 {
		switch header.ICMPv4Type(e.typ) {
		case header.ICMPv4DstUnreachable:
			if header.ICMPv4Code(e.code) == header.ICMPv4FragmentationNeeded {
				return tooBig(true, e.extra), true
			}
			return m, true
		case header.ICMPv4TimeExceeded:
			return m, true
		case header.ICMPv4ParamProblem:
			m.rest = e.extra << 24
			return m, true
		}
		return m, false
	}
	switch header.ICMPv6Type(e.typ) {
	case header.ICMPv6PacketTooBig:
		return tooBig(false, e.extra), true
	case header.ICMPv6DstUnreachable, header.ICMPv6TimeExceeded:
		return m, true
	case header.ICMPv6ParamProblem:
		m.rest = e.extra
		return m, true
	}
	return m, false
}

// reporter is who sent an error from the network; not valid for any other error.
func reporter(err error) netip.Addr {
	var outside *outsideError
	if errors.As(err, &outside) {
		return outside.from
	}
	return netip.Addr{}
}

// reported empties the socket's queue of errors, which is charged to its receive buffer, and makes err an outsideError if an ICMP error in
// the queue is the cause of it.
func reported(fd int, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err
	}
	for _, e := range readErrors(fd, nil) {
		if e.errno == errno && e.from.IsValid() {
			err = &e
		}
	}
	return err
}

// readErrors appends what is in a socket's queue of errors, up to a bound.
func readErrors(fd int, into []outsideError) []outsideError {
	const most = 64
	var data [maxError4]byte
	var control [256]byte
	for range most {
		n, cn, _, _, err := unix.Recvmsg(fd, data[:], control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			break
		}
		if e, ok := parseError(control[:cn]); ok {
			e.about = append([]byte(nil), data[:n]...)
			into = append(into, e)
		}
	}
	return into
}

// parseError reads the control messages of an entry of the queue of errors (ip(7), IP_RECVERR): what it says, and who said so. ok is false
// if it is neither an ICMP error nor the host's own word about a size. Layout of such a message, in host byte order:
//
//	0       4        5      6      7     8      12     16
//	| errno | origin | type | code | pad | info | data | sockaddr of the offender
func parseError(control []byte) (e outsideError, ok bool) {
	msgs, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return e, false
	}
	for _, m := range msgs {
		v4 := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR
		v6 := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
		const fixed = 16 // bytes before the offender
		if !v4 && !v6 || len(m.Data) < fixed+2 {
			continue
		}
		e = outsideError{
			errno: syscall.Errno(binary.NativeEndian.Uint32(m.Data)), is4: v4, typ: m.Data[5], code: m.Data[6],
			extra: binary.NativeEndian.Uint32(m.Data[8:]),
		}
		origin, sa := m.Data[4], m.Data[fixed:]
		switch family := binary.NativeEndian.Uint16(sa); {
		case origin == unix.SO_EE_ORIGIN_LOCAL && e.errno == syscall.EMSGSIZE:
			return e, true
		case origin == unix.SO_EE_ORIGIN_ICMP && family == unix.AF_INET && len(sa) >= 8: // family, port, address
			e.from = netip.AddrFrom4([4]byte(sa[4:8]))
			return e, true
		case origin == unix.SO_EE_ORIGIN_ICMP6 && family == unix.AF_INET6 && len(sa) >= 24: // family, port, flow, address
			e.from = netip.AddrFrom16([16]byte(sa[8:24])).Unmap()
			return e, true
		}
	}
	return e, false
}
