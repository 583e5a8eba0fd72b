// This file is the errors of the package: what stands in the way of a published port, and the remedy.

package publish

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// What can be wrong, for errors.Is. The errors that Listen returns wrap one of these, and the system's own where there is one.
var (
	ErrPrivileged = errors.New("privileged port")
	ErrPortTaken  = errors.New("port is taken")
	ErrNotHere    = errors.New("not an address of this host")
	ErrInvalid    = errors.New("invalid published port")
	// ErrDescriptors: the process, or the host, has as many files open as it may have.
	ErrDescriptors = errors.New("no descriptor left")
)

// plainError is an error whose text is complete in itself; what it wraps is for errors.Is only.
type plainError struct {
	text  string
	wraps []error
}

func (e *plainError) Error() string   { return e.text }
func (e *plainError) Unwrap() []error { return e.wraps }

func fail(kind, cause error, format string, args ...any) error {
	e := &plainError{text: fmt.Sprintf(format, args...), wraps: []error{kind}}
	if cause != nil {
		e.wraps = append(e.wraps, cause)
	}
	return e
}

// portStart is where the system says which ports are privileged. A variable for tests.
var portStart = "/proc/sys/net/ipv4/ip_unprivileged_port_start"

// unprivileged is the first port that needs no privilege.
func unprivileged() uint16 {
	b, err := os.ReadFile(portStart)
	if err != nil {
		return 1024
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 16)
	if err != nil {
		return 1024
	}
	return uint16(n)
}

// refused puts into words why the host's kernel does not let us listen.
func refused(at netip.AddrPort, proto string, err error) error {
	where := fmt.Sprintf("port %d/%s", at.Port(), proto)
	if !at.Addr().IsUnspecified() {
		where = fmt.Sprintf("%v/%s", at, proto)
	}
	flag := "-ltnp"
	if proto == UDP {
		flag = "-lunp"
	}
	switch start := unprivileged(); {
	case errors.Is(err, syscall.EACCES) && at.Port() < start:
		return fail(ErrPrivileged, err, "%s cannot be published: ports below %d are privileged on this host. Allow it as root (sysctl -w net.ipv4.ip_unprivileged_port_start=%d, and a file in /etc/sysctl.d to keep it), or publish a port from %d on",
			where, start, at.Port(), start)
	case errors.Is(err, syscall.EADDRINUSE):
		return fail(ErrPortTaken, err, "%s is taken by another program on this host: see which with `ss %s 'sport = :%d'`, or publish another port", where, flag, at.Port())
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fail(ErrNotHere, err, "%v is not an address of this host (see `ip address`): publish on one that is, or on all of them by naming none", at.Addr())
	case errors.Is(err, syscall.EMFILE):
		return fail(ErrDescriptors, err, "%s cannot be published: the daemon has as many files open as it may (%s). A port on all addresses takes two, and each of its connections more: publish fewer, or start the daemon with a higher limit (ulimit -Hn, LimitNOFILE= of its systemd unit)",
			where, openFiles())
	case errors.Is(err, syscall.ENFILE):
		return fail(ErrDescriptors, err, "%s cannot be published: this host has as many files open as it may (sysctl fs.file-max)", where)
	default:
		return fmt.Errorf("%s cannot be published: %w", where, err)
	}
}

// openFiles is the limit on open files of this process, for people.
func openFiles() string {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return err.Error()
	}
	return strconv.FormatUint(l.Cur, 10)
}
