// A connection into the overlay on the daemon's socket. After the answer "101 Switching Protocols" each direction is a sequence of
// chunks:
//
//	0               4
//	+---------------+------------- - -
//	| length n (BE) | n bytes of data       n in 1..MaxChunk
//	+---------------+------------- - -
//	| 0 0 0 0       |                       the end of this direction; none follows
//	+---------------+
//
// A unix socket that closes looks the same whether the data had ended or a program had died. Here only the chunk of length 0 is an end; a
// socket that closes without it is a reset.

package api

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

const (
	// StreamProtocol is what a request to PathDial asks to upgrade to.
	StreamProtocol = "rootless-ovl-stream"
	// MaxChunk is the most bytes of data that a chunk has.
	MaxChunk = 1 << 20

	chunkHeader = 4
	// closePatience bounds how long Close waits for room for its last chunk.
	closePatience = time.Second
)

// Stream is one connection into the overlay, as the client and as the daemon have it. One goroutine may read while another writes;
// everything else may be called at any time.
type Stream struct {
	net.Conn // Read, Write and Close are our own
	in       *bufio.Reader
	left     int  // bytes of the current chunk that were not read
	ended    bool // the other side has ended its direction

	writing sync.Mutex
	closed  bool // our direction has ended
}

// newStream takes conn over. in holds what was read from it already.
func newStream(conn net.Conn, in *bufio.Reader) *Stream { return &Stream{Conn: conn, in: in} }

// Read reads data; io.EOF is the end that the other side has made, ECONNRESET any other.
func (s *Stream) Read(p []byte) (int, error) {
	if s.ended {
		return 0, io.EOF
	}
	if s.left == 0 {
		var header [chunkHeader]byte
		if _, err := io.ReadFull(s.in, header[:]); err != nil {
			return 0, s.broken(err)
		}
		n := binary.BigEndian.Uint32(header[:])
		if n > MaxChunk {
			return 0, fmt.Errorf("a chunk of %d bytes, more than %d: is that a rootless-ovl of this version?", n, MaxChunk)
		}
		if n == 0 {
			s.ended = true
			return 0, io.EOF
		}
		s.left = int(n)
	}
	n, err := s.in.Read(p[:min(len(p), s.left)])
	s.left -= n
	if err != nil {
		return n, s.broken(err)
	}
	return n, nil
}

// broken makes a reset of the end of the socket.
func (s *Stream) broken(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF { //nolint:errorlint // io's own readers do not wrap these
		err = syscall.ECONNRESET
	}
	return &net.OpError{Op: "read", Net: StreamProtocol, Addr: s.RemoteAddr(), Err: err}
}

// Write sends data.
func (s *Stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.closed {
		return 0, &net.OpError{Op: "write", Net: StreamProtocol, Addr: s.RemoteAddr(), Err: syscall.EPIPE}
	}
	sent := 0
	for sent < len(p) {
		piece := p[sent:min(len(p), sent+MaxChunk)]
		var header [chunkHeader]byte
		binary.BigEndian.PutUint32(header[:], uint32(len(piece)))
		chunk := net.Buffers{header[:], piece}
		n, err := chunk.WriteTo(s.Conn)
		sent += max(0, int(n)-chunkHeader)
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// CloseWrite ends our direction; the other goes on.
func (s *Stream) CloseWrite() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	return s.endLocked()
}

func (s *Stream) endLocked() error {
	if s.closed {
		return nil
	}
	s.closed = true
	_, err := s.Conn.Write(make([]byte, chunkHeader))
	return err
}

// Close ends our direction, unless a Write is under way, and closes the stream.
func (s *Stream) Close() error {
	if s.writing.TryLock() {
		if !s.closed {
			_ = s.SetWriteDeadline(time.Now().Add(closePatience)) // a socket without deadlines has room or is closed
			_ = s.endLocked()                                     // who has gone needs no end
		}
		s.writing.Unlock()
	}
	return s.Conn.Close()
}

// Abort closes the stream as one that broke: unless our direction had ended, the other side reads a reset.
func (s *Stream) Abort() { _ = s.Conn.Close() } // closing it twice is no error that matters
