// This file is the message.
//
//	0       4         8        12
//	+-------+---------+--------+---------------- - -
//	| magic | version | length | length bytes of JSON      integers are big-endian
//	+-------+---------+--------+---------------- - -
//	then, for every perMessage descriptors or a part of them, one byte that carries them
//
// The version is of everything: a daemon that reads another than its own reads no further.

package handover

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Version is what this program speaks.
	Version = 1
	// MaxDescription bounds the JSON in bytes.
	MaxDescription = 8 << 20
	// MaxDescriptors bounds what one message hands over.
	MaxDescriptors = 1 << 16

	magic      = "rovH"
	headerLen  = 12
	perMessage = 250 // SCM_MAX_FD is 253
)

// ErrVersion tells that the other program is of a version that cannot be understood.
var ErrVersion = errors.New("another version of the handover")

// Send writes v and the descriptors, which stay the caller's.
func Send(c *net.UnixConn, v any, fds []int, limit time.Duration) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	if len(body) > MaxDescription || len(fds) > MaxDescriptors {
		return fmt.Errorf("handover: %d descriptors with %d bytes of description are more than can be handed over", len(fds), len(body))
	}
	_ = c.SetDeadline(time.Now().Add(limit))
	head := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte(magic), Version), uint32(len(body)))
	if _, err := c.Write(append(head, body...)); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	for len(fds) > 0 {
		some := fds[:min(len(fds), perMessage)]
		if _, _, err := c.WriteMsgUnix([]byte{1}, unix.UnixRights(some...), nil); err != nil {
			return fmt.Errorf("handover of descriptors: %w", err)
		}
		fds = fds[len(some):]
	}
	return nil
}

// Receive reads into v what Send wrote, and as many descriptors as count says then.
func Receive(c *net.UnixConn, v any, count func() int, limit time.Duration) (fds []int, err error) {
	_ = c.SetDeadline(time.Now().Add(limit))
	if err := Read(c, v); err != nil {
		return nil, err
	}
	want := count()
	if want < 0 || want > MaxDescriptors {
		return nil, fmt.Errorf("handover: %d descriptors are announced, at most %d are taken: is the limit on open files large enough?", want, MaxDescriptors)
	}
	defer func() {
		if err != nil {
			CloseAll(fds)
			fds = nil
		}
	}()
	for len(fds) < want {
		some, err := rights(c)
		fds = append(fds, some...)
		if err != nil {
			return fds, err
		}
		if len(fds) > want || len(some) != min(want-len(fds)+len(some), perMessage) {
			return fds, fmt.Errorf("handover: %d descriptors came instead of %d: is the limit on open files (ulimit -n) reached?", len(fds), want)
		}
	}
	return fds, nil
}

// Read reads the description alone.
func Read(r io.Reader, v any) error {
	var head [headerLen]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	if string(head[:4]) != magic {
		return errors.New("handover: what came is none")
	}
	if version := binary.BigEndian.Uint32(head[4:]); version != Version {
		return fmt.Errorf("%w: %d, this program speaks %d: stop the daemon that runs and start this one", ErrVersion, version, Version)
	}
	n := binary.BigEndian.Uint32(head[8:])
	if n > MaxDescription {
		return fmt.Errorf("handover: a description of %d bytes is longer than %d", n, MaxDescription)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	return nil
}

// rights reads one byte and the descriptors that it carries.
func rights(c *net.UnixConn) (fds []int, err error) {
	one, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4*perMessage))
	n, oobn, flags, _, err := c.ReadMsgUnix(one, oob) // close-on-exec
	if err != nil {
		return nil, fmt.Errorf("handover of descriptors: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	for i := range messages {
		some, perr := unix.ParseUnixRights(&messages[i])
		fds, err = append(fds, some...), errors.Join(err, perr)
	}
	switch {
	case err != nil:
		return fds, fmt.Errorf("handover of descriptors: %w", err)
	case n == 0:
		return fds, fmt.Errorf("handover of descriptors: %w", io.ErrUnexpectedEOF)
	case flags&unix.MSG_CTRUNC != 0:
		return fds, errors.New("handover: not all descriptors fit into this process: raise the limit on open files (ulimit -n)")
	}
	return fds, nil
}

// CloseAll closes descriptors.
func CloseAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
