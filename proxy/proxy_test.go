// A proxy on loopback, with destinations on loopback that it knows by made-up names.

package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"testing"
)

// site is a proxy that dials names of its own.
type site struct {
	t     *testing.T
	proxy *Proxy
	addr  string
	end   func() error

	names map[string]string // what a name and port stand for
}

func newSite(t *testing.T, maxConns int) *site {
	t.Helper()
	s := &site{t: t, names: map[string]string{}}
	s.proxy = New(Config{MaxConns: maxConns, Log: slog.New(slog.DiscardHandler), Dial: func(ctx context.Context, host string, port uint16) (Conn, error) {
		to, ok := s.names[fmt.Sprintf("%s:%d", host, port)]
		switch {
		case host == "isolated":
			return nil, fmt.Errorf("%s: %w: its policy", host, syscall.EACCES)
		case strings.HasSuffix(host, ".example.com") || host == "127.0.0.1" || host == "::1":
			return nil, fmt.Errorf("%s is not in the overlay: %w", host, ErrForbidden)
		case !ok:
			return nil, fmt.Errorf("%s: %w", host, ErrNoName)
		}
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", to)
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	}})
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.proxy.Serve(ctx, ln) }()
	ended := false
	s.end = func() error {
		if ended {
			return nil
		}
		ended = true
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if err := s.end(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s
}

// through is a client with the proxy's URL in that scheme.
func (s *site) through(scheme string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		Proxy:             http.ProxyURL(&url.URL{Scheme: scheme, Host: s.addr}),
		DisableKeepAlives: true,
	}}
}

func (s *site) dial() *net.TCPConn {
	s.t.Helper()
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

func get(c *http.Client, u string) (status int, body string, err error) {
	resp, err := c.Get(u)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func TestProxy_SpeaksSOCKSAndHTTPOnOnePort(t *testing.T) {
	s := newSite(t, 0)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "hello from "+r.Host) }))
	defer web.Close()
	s.names["web:80"] = web.Listener.Addr().String()
	s.names["10.213.7.2:8080"] = s.names["web:80"]
	s.names["fd00::7:8080"] = s.names["web:80"]
	for _, scheme := range []string{"socks5", "socks5h", "http"} {
		for u, host := range map[string]string{"http://web/": "web", "http://10.213.7.2:8080/": "10.213.7.2:8080", "http://[fd00::7]:8080/": "[fd00::7]:8080"} {
			if scheme == "socks5" && host == "web" {
				continue // the client would look it up
			}
			if status, body, err := get(s.through(scheme), u); err != nil || status != http.StatusOK || body != "hello from "+host {
				t.Errorf("%s, %s: %d %q, %v", scheme, u, status, body, err)
			}
		}
	}
	st := s.proxy.Stats()
	if st.SOCKS != 5 || st.HTTPRequests != 3 || st.Connections != 8 || st.Forbidden+st.Failed+st.BadHandshake+st.OverLimit != 0 {
		t.Errorf("%+v", st)
	}
}

func TestProxy_TunnelsTLS(t *testing.T) {
	s := newSite(t, 0)
	web := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "secret") }))
	defer web.Close()
	s.names["example.com:443"] = web.Listener.Addr().String() // the name of httptest's certificate
	client := web.Client()
	client.Transport.(*http.Transport).Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: s.addr})
	if status, body, err := get(client, "https://example.com/"); err != nil || status != http.StatusOK || body != "secret" {
		t.Errorf("%d %q, %v", status, body, err)
	}
	if st := s.proxy.Stats(); st.HTTPTunnels != 1 {
		t.Errorf("%+v", st)
	}
}

func TestProxy_TakesHopByHopHeadersOut(t *testing.T) {
	s := newSite(t, 0)
	var seen *http.Request
	web := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen = r }))
	defer web.Close()
	s.names["web:80"] = web.Listener.Addr().String()
	conn := s.dial()
	_, _ = io.WriteString(conn, "GET http://web/p?a=1;b=2 HTTP/1.1\r\nHost: other\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic eDp5\r\n"+
		"Connection: X-Mine\r\nX-Mine: 1\r\nX-Kept: 2\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%v, %v", resp, err)
	}
	for _, name := range []string{"Proxy-Connection", "Proxy-Authorization", "X-Mine"} {
		if v := seen.Header.Get(name); v != "" {
			t.Errorf("%s: %q was passed on", name, v)
		}
	}
	if seen.Host != "web" || seen.RequestURI != "/p?a=1;b=2" || seen.Header.Get("X-Kept") != "2" || seen.Header.Get("X-Forwarded-For") != "192.0.2.7" {
		t.Errorf("%s %s %v", seen.Host, seen.RequestURI, seen.Header)
	}
}

// closedPort is an address on which nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func TestProxy_SaysWhatItRefuses(t *testing.T) {
	s := newSite(t, 0)
	s.names["down:80"] = closedPort(t)
	for _, tt := range []struct {
		host   string
		status int
		says   string
		reply  byte
	}{
		{"www.example.com", http.StatusForbidden, "not in the overlay", replyNotAllowed},
		{"127.0.0.1", http.StatusForbidden, "not in the overlay", replyNotAllowed},
		{"nobody", http.StatusBadGateway, "no such name", replyHostUnreachable},
		{"down", http.StatusBadGateway, "refused", replyRefused},
		{"isolated", http.StatusBadGateway, "its policy", replyNotAllowed},
	} {
		if status, body, err := get(s.through("http"), "http://"+tt.host+"/"); err != nil || status != tt.status || !strings.Contains(body, tt.says) {
			t.Errorf("http://%s: %d %q, %v; want %d and %q", tt.host, status, body, err, tt.status, tt.says)
		}
		conn := s.dial()
		_, _ = fmt.Fprintf(conn, "CONNECT %s:80 HTTP/1.1\r\nHost: x\r\n\r\n", tt.host)
		resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: http.MethodConnect})
		if err != nil || resp.StatusCode != tt.status {
			t.Errorf("CONNECT %s: %v, %v; want %d", tt.host, resp, err, tt.status)
		}
		conn = s.dial()
		_, _ = conn.Write(append([]byte{5, 1, 0, 5, 1, 0, 3, byte(len(tt.host))}, tt.host+"\x00\x50"...))
		if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, []byte{5, 0, 5, tt.reply, 0, 1, 0, 0, 0, 0, 0, 0}) {
			t.Errorf("SOCKS to %s: % x, %v; want reply %d", tt.host, got, err, tt.reply)
		}
	}
	if st := s.proxy.Stats(); st.Forbidden != 6 || st.Failed != 9 {
		t.Errorf("%+v", st)
	}
}

func TestProxy_AnswersWhatItCannotDo(t *testing.T) {
	s := newSite(t, 0)
	for _, tt := range []struct{ name, say, want string }{
		{"a password alone", "\x05\x01\x02", "\x05\xff"},
		{"BIND", "\x05\x01\x00\x05\x02\x00\x01\x01\x02\x03\x04\x00\x50", "\x05\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"UDP ASSOCIATE", "\x05\x02\x02\x00\x05\x03\x00\x03\x01a\x00\x50", "\x05\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"an address of another type", "\x05\x01\x00\x05\x01\x00\x09\x01\x02\x03\x04\x00\x50", "\x05\x00\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"SOCKS4", "\x04\x01\x00\x50\x0a\xd5\x07\x02\x00", string(socks4Refusal)},
	} {
		conn := s.dial()
		_, _ = io.WriteString(conn, tt.say)
		_ = conn.CloseWrite()
		got, err := io.ReadAll(conn)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) || !strings.HasPrefix(string(got), tt.want) {
			t.Errorf("%s: %q, %v; want %q", tt.name, got, err, tt.want)
		}
	}
	for _, req := range []string{
		"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "GET https://web/ HTTP/1.1\r\nHost: web\r\n\r\n",
		"CONNECT web:0 HTTP/1.1\r\nHost: web\r\n\r\n", "GET http://web:0/ HTTP/1.1\r\nHost: web:0\r\n\r\n",
		"CONNECT web HTTP/1.1\r\nHost: web\r\n\r\n", "\x16\x03\x01\x00\x05hello\r\n\r\n",
	} {
		conn := s.dial()
		_, _ = io.WriteString(conn, req)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%q: %v, %v", req, resp, err)
		}
	}
}

func TestProxy_PassesHalfCloseAndResetOn(t *testing.T) {
	s := newSite(t, 0)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s.names["peer:7"] = ln.Addr().String()
	for _, tt := range []struct{ name, say, answer string }{
		{"SOCKS", "\x05\x01\x00\x05\x01\x00\x03\x04peer\x00\x07", "\x05\x00\x05\x00\x00\x01"},
		{"CONNECT", "CONNECT peer:7 HTTP/1.1\r\nHost: peer:7\r\n\r\n", "HTTP/1.1 200"},
	} {
		conn := s.dial()
		_, _ = io.WriteString(conn, tt.say+"early") // before the answer
		_ = conn.CloseWrite()
		server, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(server); err != nil || string(got) != "early" {
			t.Errorf("%s: the server got %q, %v", tt.name, got, err)
		}
		_, _ = io.WriteString(server, "late")
		server.Close()
		if got, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(got), tt.answer) || !strings.HasSuffix(string(got), "late") {
			t.Errorf("%s: the client got %q, %v", tt.name, got, err)
		}

		conn = s.dial()
		_, _ = io.WriteString(conn, tt.say+"x")
		if server, err = ln.Accept(); err != nil {
			t.Fatal(err)
		}
		_, _ = io.ReadFull(server, make([]byte, 1))
		_ = server.(*net.TCPConn).SetLinger(0)
		server.Close()
		if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: after a reset the client reads %v", tt.name, err)
		}
	}
}

func TestProxy_HoldsSoManyConnectionsAndEndsThem(t *testing.T) {
	s := newSite(t, 2)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s.names["peer:7"] = ln.Addr().String()
	tunnel := func(say string) *net.TCPConn {
		conn := s.dial()
		_, _ = io.WriteString(conn, say)
		if _, err := io.ReadFull(conn, make([]byte, 12)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	held := []*net.TCPConn{
		tunnel("\x05\x01\x00\x05\x01\x00\x03\x04peer\x00\x07"),
		tunnel("CONNECT peer:7 HTTP/1.1\r\nHost: peer:7\r\n\r\n"),
	}
	if over, err := net.Dial("tcp", s.addr); err == nil { // or it is reset before Dial has looked
		if _, err := over.Read(make([]byte, 1)); err == nil {
			t.Error("a third connection is served")
		}
		over.Close()
	}
	if st := s.proxy.Stats(); st.OverLimit != 1 || st.Open != 2 {
		t.Errorf("%+v", st)
	}
	if err := s.end(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	for _, conn := range held {
		if _, err := io.ReadAll(conn); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("when the proxy has ended a client reads %v", err)
		}
	}
	if st := s.proxy.Stats(); st.Open != 0 {
		t.Errorf("still open: %+v", st)
	}
}

func TestProxy_EndsClientsThatSayNothing(t *testing.T) {
	s := newSite(t, 0)
	silent := s.dial()
	half := s.dial()
	_, _ = io.WriteString(half, "GET http://")
	kept := s.dial()
	_, _ = io.WriteString(kept, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := http.ReadResponse(bufio.NewReader(kept), nil); err != nil {
		t.Fatal(err)
	}
	if err := s.end(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	for _, conn := range []*net.TCPConn{silent, half} {
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("a client is answered after the end")
		}
	}
}

// talk is a client that says what it is given and takes any answer.
type talk struct {
	io.Reader
	answers bytes.Buffer
}

func (c *talk) Write(b []byte) (int, error) { return c.answers.Write(b) }

func FuzzSOCKS(f *testing.F) {
	f.Add([]byte("\x05\x01\x00\x05\x01\x00\x03\x03web\x00\x50"))
	f.Add([]byte("\x05\x01\x00\x05\x01\x00\x01\x0a\xd5\x07\x02\x00\x50"))
	f.Add([]byte("\x05\x02\x02\x00\x05\x01\x00\x04\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x00\x50"))
	f.Add([]byte("\x05\x01\x02"))
	f.Add([]byte("\x05\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &talk{Reader: bytes.NewReader(b)}
		host, _, err := greet(c)
		if err == nil && (len(b) < 3 || b[0] != 5 || len(host) > 255) {
			t.Errorf("% x asks for %q", b, host)
		}
		if n := c.answers.Len(); n > 0 && c.answers.Bytes()[0] != 5 || err == nil && n != 2 {
			t.Errorf("% x is answered % x", b, c.answers.Bytes())
		}
	})
}

func TestReply_CarriesTheBoundAddress(t *testing.T) {
	for bound, want := range map[string]string{
		"10.213.7.1:4660": "\x05\x00\x00\x01\x0a\xd5\x07\x01\x12\x34",
		"[fd00::1]:4660":  "\x05\x00\x00\x04\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x12\x34",
	} {
		if got := string(reply(replySucceeded, netip.MustParseAddrPort(bound))); got != want {
			t.Errorf("%s: % x, want % x", bound, got, want)
		}
	}
}
