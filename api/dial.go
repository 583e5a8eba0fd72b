// Connections into the overlay: the client's call and the daemon's answer, before they become a Stream.

package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// PathDial is where POST, with ?to=HOST:PORT and an upgrade to StreamProtocol, opens a connection to a container.
const PathDial = "/v1/dial"

// MaxStreams is how many connections of clients into the overlay a daemon holds at a time.
const MaxStreams = 1024

// SplitTarget takes "name:port", "10.213.7.20:80" or "[fd00::7]:80" apart and checks what can be checked without the node. Errors have
// CodeInvalid.
func SplitTarget(to string) (host string, port uint16, err error) {
	host, number, err := net.SplitHostPort(to)
	if err != nil {
		return "", 0, Errorf(CodeInvalid, "%q does not say where to: write it as web:80, 10.213.7.20:80 or [fd00::7]:80", clip(to))
	}
	p, err := strconv.ParseUint(number, 10, 16)
	if err != nil || p == 0 {
		return "", 0, Errorf(CodeInvalid, "%q is not a port, in %q: use 1 to 65535", clip(number), clip(to))
	}
	if a, err := netip.ParseAddr(host); (err != nil || a.Zone() != "") && !hostName(host) {
		return "", 0, Errorf(CodeInvalid, "%q is neither a name nor an address, in %q", clip(host), clip(to))
	}
	return host, uint16(p), nil
}

// hostName tells whether a name could be one of the overlay's: labels that CheckName takes, with or without a dot at the end.
func hostName(name string) bool {
	const maxDomainName = 253 // RFC 1035 without the root
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > maxDomainName {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > maxName {
			return false
		}
	}
	return strings.IndexFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '.' || r == '-')
	}) < 0
}

// Dial opens a connection to a container, "HOST:PORT" with a name or address of the overlay, from the gateway's address. The daemon's
// error says what is wrong with it. ctx is about the dialling alone.
func (c *Client) Dial(ctx context.Context, to string) (*Stream, error) {
	if _, _, err := SplitTarget(to); err != nil {
		return nil, err
	}
	return again(ctx, func() (*Stream, error) { return c.dial(ctx, to) })
}

func (c *Client) dial(ctx context.Context, to string) (*Stream, error) {
	if err := c.checkSocket(); err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	// What ends the waiting on a connection is a deadline that has passed.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	s, err := c.upgrade(ctx, conn, to)
	if !stop() && err == nil {
		err = c.transportError(ctx, context.Cause(ctx))
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

func (c *Client) upgrade(ctx context.Context, conn net.Conn, to string) (*Stream, error) {
	path := PathDial + "?to=" + url.QueryEscape(to)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://rootless-ovl"+path, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", StreamProtocol)
	if err := req.Write(conn); err != nil {
		return nil, c.transportError(ctx, err)
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols && resp.Header.Get("Upgrade") == StreamProtocol {
		return newStream(conn, in), nil
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, MaxBody))
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	return nil, c.refusal(http.MethodPost, PathDial, resp, b)
}

// serving is what the requests of one Serve share.
type serving struct {
	ctx     context.Context // ends with Serve's
	streams sync.WaitGroup  // net/http forgets connections that were taken from it
}

// servingKey is its key in a request's context.
type servingKey struct{}

// dialing answers PathDial.
func dialing(b Backend) http.HandlerFunc {
	places := make(chan struct{}, MaxStreams)
	return func(w http.ResponseWriter, r *http.Request) {
		to := r.URL.Query().Get("to")
		if r.Method != http.MethodPost || !strings.EqualFold(r.Header.Get("Upgrade"), StreamProtocol) {
			writeError(w, Errorf(CodeInvalid, "%s is done with POST and an upgrade to %s", PathDial, StreamProtocol))
			return
		}
		if _, _, err := SplitTarget(to); err != nil {
			writeError(w, err)
			return
		}
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
		default:
			writeError(w, Errorf(CodeExhausted, "the daemon holds %d connections into the overlay already: end some", MaxStreams))
			return
		}
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		if s, ok := ctx.Value(servingKey{}).(*serving); ok {
			s.streams.Add(1)
			defer s.streams.Done()
			defer context.AfterFunc(s.ctx, func() { cancel(errors.New("the daemon stops")) })()
		}
		control := http.NewResponseController(w)
		_ = control.SetReadDeadline(time.Time{}) // of the request, which has been read; dialling may take longer
		var stream *Stream
		err := b.Forward(ctx, to, func() (*Stream, error) {
			var err error
			stream, err = accept(control)
			return stream, err
		})
		if stream == nil && err != nil {
			writeError(w, err)
		}
	}
}

// accept takes the connection from net/http and says that it is a stream from here on.
func accept(control *http.ResponseController) (*Stream, error) {
	conn, rw, err := control.Hijack()
	if err != nil {
		return nil, fmt.Errorf("the connection cannot become a stream: %w", err)
	}
	err = conn.SetDeadline(time.Time{})
	if err == nil {
		_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", StreamProtocol)
	}
	s := newStream(conn, rw.Reader)
	if err != nil {
		s.Abort()
		return s, fmt.Errorf("the client has gone: %w", err)
	}
	return s, nil
}
