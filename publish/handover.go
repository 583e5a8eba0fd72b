// This file hands listening sockets over to another process, where a publication goes on with them: no client is refused meanwhile.

package publish

import (
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Sockets are duplicates of the listening sockets, which the caller owns.
func (p *Publication) Sockets() (fds []int, err error) {
	var conns []syscall.Conn
	for _, l := range p.tcp {
		conns = append(conns, l)
	}
	for _, l := range p.udp {
		conns = append(conns, l.conn)
	}
	for _, c := range conns {
		raw, err := c.SyscallConn()
		if err == nil {
			var dup int
			var derr error
			err = raw.Control(func(fd uintptr) { dup, derr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
			if err == nil && derr == nil {
				fds = append(fds, dup)
				continue
			}
			if err == nil {
				err = derr
			}
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil, fmt.Errorf("duplicate a listening socket: %w", err)
	}
	return fds, nil
}

// take makes sockets of another Publication with the same Spec ours. They stay open whatever happens, and belong to the caller.
func (p *Publication) take(fds []int) error {
	for _, fd := range fds {
		own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("listening socket: %w", err)
		}
		if err := p.takeOne(os.NewFile(uintptr(own), "listening socket")); err != nil {
			return err
		}
	}
	return nil
}

func (p *Publication) takeOne(f *os.File) error {
	defer f.Close()
	if p.spec.Proto == TCP {
		l, err := net.FileListener(f)
		if err != nil {
			return fmt.Errorf("listening socket: %w", err)
		}
		t, ok := l.(*net.TCPListener)
		if !ok {
			l.Close()
			return fmt.Errorf("a listening socket is of %v and not TCP", l.Addr())
		}
		p.tcp = append(p.tcp, t)
		return p.fits(t.Addr().(*net.TCPAddr).AddrPort().Port())
	}
	c, err := net.FilePacketConn(f)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	u, ok := c.(*net.UDPConn)
	if !ok {
		c.Close()
		return fmt.Errorf("a socket is of %v and not UDP", c.LocalAddr())
	}
	l, err := newUDPListener(p, u)
	if err != nil {
		u.Close()
		return err
	}
	p.udp = append(p.udp, l)
	return p.fits(u.LocalAddr().(*net.UDPAddr).AddrPort().Port())
}

func (p *Publication) fits(port uint16) error {
	if port != p.spec.HostPort {
		return fmt.Errorf("a socket listens on port %d and not %d", port, p.spec.HostPort)
	}
	return nil
}
