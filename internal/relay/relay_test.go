package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pair is two ends of one TCP connection.
func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.DialTCP("tcp", nil, ln.Addr().(*net.TCPAddr)); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
	})
	return a, b
}

// joined is a client and a server whose connections are joined in the middle, and what Join returns.
func joined(ctx context.Context, t *testing.T) (client, server *net.TCPConn, done <-chan error) {
	t.Helper()
	client, left := pair(t)
	server, right := pair(t)
	ended := make(chan error, 1)
	go func() { ended <- Join(ctx, left, right) }()
	return client, server, ended
}

func TestJoin_CarriesBothWaysAndHalfCloses(t *testing.T) {
	client, server, done := joined(t.Context(), t)
	question := bytes.Repeat([]byte("question "), 300_000) // larger than every buffer
	go func() {
		_, _ = client.Write(question)
		_ = client.CloseWrite()
	}()
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, question) {
		t.Fatalf("the server got %d bytes, %v; want %d", len(got), err, len(question))
	}
	// The client has ended its half, and still gets the answer.
	if _, err := server.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	server.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != "answer" {
		t.Errorf("the client got %q, %v", got, err)
	}
	if err := <-done; err != nil {
		t.Errorf("Join: %v", err)
	}
}

func TestJoin_PassesAResetOn(t *testing.T) {
	for _, who := range []string{"client", "server"} {
		t.Run(who, func(t *testing.T) {
			client, server, done := joined(t.Context(), t)
			from, to := client, server
			if who == "server" {
				from, to = server, client
			}
			// Data both ways, so that both directions run.
			_, _ = from.Write([]byte("x"))
			if _, err := io.ReadFull(to, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			_ = from.SetLinger(0)
			from.Close()
			if _, err := to.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the other end reads %v, want a reset", err)
			}
			if err := <-done; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("Join: %v", err)
			}
		})
	}
}

// resetTaken is a connection that its peer has reset, of which a write has been told.
func resetTaken(t *testing.T) *net.TCPConn {
	t.Helper()
	peer, c := pair(t)
	_ = peer.SetLinger(0)
	peer.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var taken int
	for taken == 0 && err == nil {
		err = raw.Control(func(fd uintptr) { taken, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR) })
	}
	if syscall.Errno(taken) != syscall.ECONNRESET {
		t.Fatalf("error %d, %v", taken, err)
	}
	return c
}

func TestJoin_AResetOfWhichAWriteWasToldIsNoEnd(t *testing.T) {
	server, right := pair(t)
	_ = server.SetReadDeadline(time.Now().Add(20 * time.Second))
	left, done := resetTaken(t), make(chan error, 1)
	go func() { done <- Join(t.Context(), left, right) }()
	if n, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the other end reads %d, %v, want a reset", n, err)
	}
	server.Close()
	if err := <-done; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Join: %v", err)
	}
}

func TestJoin_EndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	client, server, done := joined(ctx, t)
	why := errors.New("enough")
	cancel(why)
	if err := <-done; !errors.Is(err, why) {
		t.Errorf("Join: %v", err)
	}
	for _, c := range []*net.TCPConn{client, server} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v, want a reset", err)
		}
	}
}

// script is a Conn that reads what it is given, in pieces, and takes what is written.
type script struct {
	pieces  []int
	reads   []int // the room that each read offered
	written strings.Builder
	aborted bool
}

func (s *script) Read(p []byte) (int, error) {
	s.reads = append(s.reads, len(p))
	if len(s.pieces) == 0 {
		return 0, io.EOF
	}
	n := min(s.pieces[0], len(p))
	s.pieces = s.pieces[1:]
	return n, nil
}

func (s *script) Write(p []byte) (int, error) { return s.written.Write(p) }
func (s *script) Close() error                { return nil }
func (s *script) CloseWrite() error           { return nil }
func (s *script) Abort()                      { s.aborted = true }

func TestCopyHalf_FitsItsBufferToTheTraffic(t *testing.T) {
	src, dst := &script{}, &script{}
	full := []int{1, sizes[0], sizes[1], sizes[2], sizes[2]}
	src.pieces = append(src.pieces, full...)
	for range 2 * smallReads {
		src.pieces = append(src.pieces, 1)
	}
	if err := copyHalf(&end{Conn: dst}, &end{Conn: src}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{sizes[0], sizes[0], sizes[1], sizes[2], sizes[2], sizes[2]} {
		if src.reads[i] != want {
			t.Errorf("read %d has room for %d bytes, want %d", i, src.reads[i], want)
		}
	}
	if last := src.reads[len(src.reads)-1]; last != sizes[0] {
		t.Errorf("after small reads there is room for %d bytes, want %d", last, sizes[0])
	}
	if want := 1 + sizes[0] + sizes[1] + 2*sizes[2] + 2*smallReads; dst.written.Len() != want {
		t.Errorf("%d bytes were written, want %d", dst.written.Len(), want)
	}
}

func TestReset_PrefersTheConnectionsOwnWay(t *testing.T) {
	s := &script{}
	Reset(s)
	if !s.aborted {
		t.Error("it was closed as if it had ended well")
	}
}
