// This file is the errors of the package: the sentinels callers test for, and the one type that gives them a text with
// the name of the thing and the remedy.

package nsutil

import (
	"errors"
	"fmt"
	"syscall"
)

// What can be wrong, for errors.Is. The errors that are returned wrap one of these, and the system's own error where
// there is one, and say in one line what it was about and what to do.
var (
	ErrNoProcess     = errors.New("no such process")
	ErrNotOwner      = errors.New("namespace of another user")
	ErrHostNamespace = errors.New("the host's own network namespace")
	ErrNoPath        = errors.New("no such network namespace file")
	ErrNotNetns      = errors.New("not a network namespace")
	ErrGone          = errors.New("network namespace is gone")
	ErrTunDevice     = errors.New("/dev/net/tun cannot be used")
	ErrIfName        = errors.New("invalid interface name")
	ErrIfNameTaken   = errors.New("interface name is taken")
	ErrRouteTaken    = errors.New("route exists already")
	ErrNoTAP         = errors.New("no such TAP device")
	ErrTAPBusy       = errors.New("TAP device is in use")
	ErrInvalid       = errors.New("invalid argument")
	ErrNoUserns      = errors.New("user namespaces cannot be made here")
	ErrTimeout       = errors.New("timed out in the namespace")
	ErrNoIPv6        = errors.New("no IPv6 in the network namespace")
)

// plainError is an error whose text is complete in itself; what it wraps is for errors.Is only.
type plainError struct {
	text  string
	wraps []error
}

func (e *plainError) Error() string   { return e.text }
func (e *plainError) Unwrap() []error { return e.wraps }

// fail makes an error of the given kind. cause may be nil; its text is not added, the format says all.
func fail(kind, cause error, format string, args ...any) error {
	e := &plainError{text: fmt.Sprintf(format, args...), wraps: []error{kind}}
	if cause != nil {
		e.wraps = append(e.wraps, cause)
	}
	return e
}

// TunTrouble puts into words why /dev/net/tun could not be opened, and what to do: each errno has its own cause.
func TunTrouble(errno syscall.Errno) (cause, remedy string) {
	switch errno {
	case syscall.ENOENT:
		return "it does not exist", "load the tun module as root (modprobe tun), or give this container the device (--device /dev/net/tun)"
	case syscall.ENODEV, syscall.ENXIO:
		return "the tun module is missing", "load it as root (modprobe tun); after a kernel update, reboot first"
	case syscall.EACCES:
		return "no permission", "it is 0666 on most systems, make it so as root (chmod 0666 /dev/net/tun)"
	case syscall.EPERM:
		return "the device cgroup forbids it", "allow it for this container or service (--device /dev/net/tun, or DeviceAllow=/dev/net/tun rw)"
	default:
		return errno.Error(), "see whether anything else on this machine can use TUN devices (ip tuntap add mode tap)"
	}
}

func tunError(path string, errno syscall.Errno) error {
	cause, remedy := TunTrouble(errno)
	return fail(ErrTunDevice, errno, "cannot open %s: %s: %s", path, cause, remedy)
}
