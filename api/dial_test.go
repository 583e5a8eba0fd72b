// Connections through the daemon: what arrives, how they end, what is refused.

package api

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
)

func TestDial_CarriesBothWaysAndHalfCloses(t *testing.T) {
	var asked string
	b := &fakeBackend{carry: func(_ context.Context, to string, s *Stream) {
		asked = to
		question, err := io.ReadAll(s)
		if err != nil {
			t.Errorf("the daemon reads %v", err)
		}
		_, _ = s.Write(append([]byte("you said "), question...))
		s.Close()
	}}
	c := serve(t, b)
	s, err := c.Dial(t.Context(), "web.ovl.internal:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	question := bytes.Repeat([]byte("0123456789abcdef"), MaxChunk/8) // two chunks
	go func() {
		_, _ = s.Write(question)
		_ = s.CloseWrite()
		if _, err := s.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("a write after the end: %v", err)
		}
	}()
	answer, err := io.ReadAll(s)
	if want := "you said " + string(question); err != nil || string(answer) != want {
		t.Errorf("%d bytes, %v; want %d", len(answer), err, len(want))
	}
	if asked != "web.ovl.internal:80" {
		t.Errorf("the daemon dials %q", asked)
	}
}

// What ends without saying so was cut off, by whoever it was.
func TestStream_TellsAResetFromAnEnd(t *testing.T) {
	got := make(chan error, 1)
	b := &fakeBackend{carry: func(_ context.Context, to string, s *Stream) {
		if to == "reset:1" {
			_, _ = s.Write([]byte("half of"))
			s.Abort()
			return
		}
		_, err := io.ReadAll(s)
		got <- err
		s.Close()
	}}
	c := serve(t, b)
	s, err := c.Dial(t.Context(), "reset:1")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(s); !errors.Is(err, syscall.ECONNRESET) || string(b) != "half of" {
		t.Errorf("the client reads %q, %v; want a reset", b, err)
	}
	s.Close()
	if s, err = c.Dial(t.Context(), "listen:1"); err != nil {
		t.Fatal(err)
	}
	_, _ = s.Write([]byte("half of"))
	s.Abort()
	if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the daemon reads %v; want a reset", err)
	}
}

func TestDial_SaysWhyThereIsNoConnection(t *testing.T) {
	b := &fakeBackend{err: Errorf(CodeNotFound, "no container is called web")}
	c := serve(t, b)
	if _, err := c.Dial(t.Context(), "web:80"); !errors.Is(err, ErrNotFound) || err.Error() != "no container is called web" {
		t.Errorf("%v", err)
	}
	for _, to := range []string{"", "web", "web:", "web:0", "web:65536", "web:http", "a b:80", "10.0.0.1", "fd00::1:80", ":80", "we/b:80", "a..b:80", "-\n:80"} {
		if _, err := c.Dial(t.Context(), to); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", to, err)
		}
	}
	if _, err := NewClient(shortDir(t)+"/api.sock").Dial(t.Context(), "web:80"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without a daemon: %v", err)
	}
}

func TestDial_EndsWithItsContext(t *testing.T) {
	dialling, gaveUp := make(chan struct{}), make(chan error, 1)
	c := serve(t, &slowDial{begun: dialling, ended: gaveUp})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-dialling
		cancel()
	}()
	if _, err := c.Dial(ctx, "web:80"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Errorf("the daemon goes on dialling: %v", err)
	}
}

// slowDial dials until its context ends.
type slowDial struct {
	fakeBackend
	begun chan struct{}
	ended chan error
}

func (b *slowDial) Forward(ctx context.Context, _ string, _ func() (*Stream, error)) error {
	close(b.begun)
	<-ctx.Done()
	b.ended <- ctx.Err()
	return ctx.Err()
}

func TestServe_EndsStreamsWithItsContext(t *testing.T) {
	ln, err := Listen(shortDir(t) + "/run")
	if err != nil {
		t.Fatal(err)
	}
	b := &fakeBackend{carry: func(ctx context.Context, _ string, s *Stream) {
		<-ctx.Done()
		s.Abort()
	}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, Handler(b), slog.New(slog.DiscardHandler)) }()
	s, err := NewClient(ln.Path()).Dial(t.Context(), "web:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %v, want a reset", err)
	}
}

func TestDial_IsAnUpgradeByPost(t *testing.T) {
	c := serve(t, &fakeBackend{})
	for _, req := range []string{
		"GET " + PathDial + "?to=web:80 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + StreamProtocol + "\r\n\r\n",
		"POST " + PathDial + "?to=web:80 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
		"POST " + PathDial + "?to=web HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + StreamProtocol + "\r\n\r\n",
	} {
		conn, err := net.Dial("unix", c.socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, req)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%q: %v, %v", req, resp, err)
		}
		conn.Close()
	}
}

// The bytes of a stream, as they are on the socket.
func TestStream_GoldenBytes(t *testing.T) {
	ours, theirs := net.Pipe()
	s := newStream(ours, bufio.NewReader(ours))
	go func() {
		_, _ = s.Write([]byte("hi"))
		_, _ = s.Write(nil)
		_ = s.CloseWrite()
		_ = s.CloseWrite()
		s.Close()
	}()
	got, err := io.ReadAll(theirs)
	if want := "\x00\x00\x00\x02hi\x00\x00\x00\x00"; err != nil || string(got) != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

func FuzzStreamRead(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02hi\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x00\x00\x02h"))
	f.Add([]byte("\xff\xff\xff\xffhi"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		conn, other := net.Pipe()
		defer conn.Close()
		defer other.Close()
		got, err := io.ReadAll(newStream(conn, bufio.NewReader(bytes.NewReader(b))))
		if len(got) > len(b) {
			t.Errorf("%d bytes of %d", len(got), len(b))
		}
		if err == nil && !bytes.Contains(b, make([]byte, chunkHeader)) {
			t.Errorf("%q ends without an end", b)
		}
	})
}

func FuzzSplitTarget(f *testing.F) {
	for _, to := range []string{"web:80", "10.213.7.20:80", "[fd00::7]:80", "a.b.c.:1", "[fe80::1%eth0]:1"} {
		f.Add(to)
	}
	f.Fuzz(func(t *testing.T, to string) {
		host, port, err := SplitTarget(to)
		if err == nil && (host == "" || port == 0 || strings.ContainsAny(host, "\r\n /")) {
			t.Errorf("%q: %q, %d", to, host, port)
		}
		if err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", to, err)
		}
	})
}
