// This file binds the host's sockets to what the host's owner chose for what containers send: an address, an interface.

package stack

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Outbound is where what containers send leaves the host. The zero value leaves it to the host's routes. A destination on the host's
// loopback is no matter of it.
type Outbound struct {
	Addr4, Addr6 netip.Addr // the source address, one a family; not valid: the host chooses
	Interface    string     // the only interface it may leave by; "": the host's routes say which
}

func (o *Outbound) validate() error {
	if o.Addr4.IsValid() && !o.Addr4.Is4() {
		return fmt.Errorf("stack: outbound address %v is not an IPv4 address", o.Addr4)
	}
	if o.Addr6.IsValid() && (!o.Addr6.Is6() || o.Addr6.Is4In6()) {
		return fmt.Errorf("stack: outbound address %v is not an IPv6 address", o.Addr6)
	}
	return nil
}

// bind is called between socket and connect. The port is left to connect, which can then give one port to several destinations
// (ip(7), IP_BIND_ADDRESS_NO_PORT). To bind to an interface needs no privilege since Linux 5.7.
func (o *Outbound) bind(fd int, to netip.Addr) error {
	if to.IsLoopback() {
		return nil
	}
	if o.Interface != "" {
		if err := unix.BindToDevice(fd, o.Interface); err != nil {
			return os.NewSyscallError("setsockopt SO_BINDTODEVICE", err)
		}
	}
	from := o.Addr4
	if to.Is6() {
		from = o.Addr6
	}
	if !from.IsValid() {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return os.NewSyscallError("setsockopt IP_BIND_ADDRESS_NO_PORT", err)
	}
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: to4(from)}
	if from.Is6() {
		sa = &unix.SockaddrInet6{Addr: from.As16()}
	}
	return os.NewSyscallError("bind", unix.Bind(fd, sa))
}

// to4 is the four bytes of an IPv4 address, and zero for any other.
func to4(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}

// control is bind for a net.Dialer.
func (o *Outbound) control(_, address string, c syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("stack: outbound socket: %w", err)
	}
	var berr error
	err = c.Control(func(fd uintptr) { berr = o.bind(int(fd), to.Addr().Unmap()) })
	return errors.Join(berr, err)
}
