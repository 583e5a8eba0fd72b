// This file is what goes over the socket pair: one message a question, one an answer, in JSON, with at most one descriptor.

package opener

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

const (
	maxMessage = 128 << 10 // bytes; the kernel's usual send buffer takes it
	maxAtOnce  = 32
)

type question struct {
	ID   uint64          `json:"id"`
	Call string          `json:"call"`
	Arg  json.RawMessage `json:"arg"`
}

type answer struct {
	ID    uint64          `json:"id"`
	Value json.RawMessage `json:"value,omitempty"`
	Err   *remoteError    `json:"err,omitempty"`
}

// remoteError is an error that has come over the pair: it is still of its kind, and has its errno.
type remoteError struct {
	Text  string        `json:"text"`
	Kind  int           `json:"kind"` // 1 + index in kinds; 0: none of them
	Errno syscall.Errno `json:"errno,omitempty"`
}

// kinds are the errors that callers ask for.
var kinds = []error{nsutil.ErrNoProcess, nsutil.ErrNotOwner, nsutil.ErrHostNamespace, nsutil.ErrNoPath, nsutil.ErrNotNetns, nsutil.ErrGone, nsutil.ErrInvalid}

func toRemote(err error) *remoteError {
	e := &remoteError{Text: err.Error()}
	for i, k := range kinds {
		if errors.Is(err, k) {
			e.Kind = i + 1
			break
		}
	}
	if !errors.As(err, &e.Errno) {
		e.Errno = 0
	}
	return e
}

func (e *remoteError) Error() string { return e.Text }

func (e *remoteError) Unwrap() []error {
	var wraps []error
	if e.Kind > 0 && e.Kind <= len(kinds) {
		wraps = append(wraps, kinds[e.Kind-1])
	}
	if e.Errno != 0 {
		wraps = append(wraps, e.Errno)
	}
	return wraps
}

// send writes one message, and f's descriptor with it unless f is nil.
func send(conn *net.UnixConn, message any, f *os.File) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("a message of %d bytes is too long: %w", len(b), unix.EMSGSIZE)
	}
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	_, _, err = conn.WriteMsgUnix(b, rights, nil)
	return err
}

// receive reads one message into buf, which has maxMessage bytes. The descriptors that came with it are the caller's, also with an error.
func receive(conn *net.UnixConn, buf []byte, message any) ([]*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	cmsgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for i := range cmsgs {
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue // not descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "from the opener"))
		}
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return files, errors.New("a message was cut off")
	}
	return files, json.Unmarshal(buf[:n], message)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nobody wants it
	}
}

// connOf makes a connection of one end of the pair, which it takes over.
func connOf(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, fmt.Errorf("%T is not a unix socket", c)
	}
	return conn, nil
}
