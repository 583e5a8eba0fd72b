// This file is the listener's side: connections are counted, bounded, and told apart by their first byte.

package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rootless-ovl/rootless-ovl/internal/relay"
)

const (
	// DefaultMaxConns is Config.MaxConns when it is 0.
	DefaultMaxConns = 1024
	// HandshakeTimeout is how long a client may take to say what it wants.
	HandshakeTimeout = 10 * time.Second
	// DialTimeout is how long a destination may take to answer.
	DialTimeout = 20 * time.Second
	// endPatience bounds what the end of Serve waits for answers that are under way.
	endPatience = 5 * time.Second
)

// Kinds of errors of Config.Dial that clients are told apart. Errors that wrap a syscall.Errno are told as what they are, too.
var (
	// ErrForbidden: the destination is none that is dialled here.
	ErrForbidden = errors.New("destination is not allowed")
	// ErrNoName: there is no such name.
	ErrNoName = errors.New("no such name")
)

// Conn is a connection to a destination.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Config is what a Proxy is made of.
type Config struct {
	// Dial opens a connection to a host, as the client wrote it: a name or an address. Its error's text is shown to the client. Required.
	Dial func(ctx context.Context, host string, port uint16) (Conn, error)
	// MaxConns is how many connections of clients are held at a time.
	MaxConns int
	Log      *slog.Logger // default slog.Default()
}

// Stats counts since New; Open is now.
type Stats struct {
	Open         uint64 `json:"open"`
	Connections  uint64 `json:"connections"`
	SOCKS        uint64 `json:"socks"`
	HTTPTunnels  uint64 `json:"http_tunnels"`
	HTTPRequests uint64 `json:"http_requests"`
	Forbidden    uint64 `json:"forbidden"`     // destinations that are not dialled
	Failed       uint64 `json:"failed"`        // destinations that did not answer
	BadHandshake uint64 `json:"bad_handshake"` // what was neither SOCKS5 nor a request to a proxy, or too slow
	OverLimit    uint64 `json:"over_limit"`    // connections beyond MaxConns
}

// Proxy serves clients. All methods are safe for concurrent use.
type Proxy struct {
	cfg    Config
	log    *slog.Logger
	places chan struct{} // holds one element a connection

	connections, socks, tunnels, requests, forbidden, failed, bad, over atomic.Uint64
}

// New makes a Proxy. It starts nothing.
func New(c Config) *Proxy {
	if c.MaxConns <= 0 {
		c.MaxConns = DefaultMaxConns
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return &Proxy{cfg: c, log: c.Log, places: make(chan struct{}, c.MaxConns)}
}

// Stats is a snapshot of the counters.
func (p *Proxy) Stats() Stats {
	return Stats{
		Open:         uint64(len(p.places)),
		Connections:  p.connections.Load(),
		SOCKS:        p.socks.Load(),
		HTTPTunnels:  p.tunnels.Load(),
		HTTPRequests: p.requests.Load(),
		Forbidden:    p.forbidden.Load(),
		Failed:       p.failed.Load(),
		BadHandshake: p.bad.Load(),
		OverLimit:    p.over.Load(),
	}
}

// Serve answers on ln until ctx ends, then resets all connections, closes ln and returns nil. It returns an error only when ln fails
// before that.
func (p *Proxy) Serve(ctx context.Context, ln *net.TCPListener) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	requests := &handover{addr: ln.Addr(), conns: make(chan net.Conn), done: ctx.Done()}
	web := p.newWebServer(ctx, &running)
	running.Go(func() { _ = web.server.Serve(requests) }) // ends when requests does
	context.AfterFunc(ctx, func() { ln.Close() })
	err := p.acceptAll(ctx, ln, func(c *client) {
		running.Go(func() { p.serveClient(ctx, c, requests) })
	})
	cancel()
	last, stop := context.WithTimeout(context.Background(), endPatience)
	defer stop()
	if web.server.Shutdown(last) != nil {
		_ = web.server.Close() // ends what did not end in time
	}
	running.Wait()
	web.transport.CloseIdleConnections()
	return err
}

func (p *Proxy) acceptAll(ctx context.Context, ln *net.TCPListener, serve func(*client)) error {
	pause := time.Duration(0)
	for {
		conn, err := ln.AcceptTCP()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		default: // too many open files, say: it passes
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			p.log.Warn("proxy: connection not accepted", "err", err)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			continue
		}
		pause = 0
		p.connections.Add(1)
		select {
		case p.places <- struct{}{}:
		default:
			p.over.Add(1)
			relay.Reset(conn)
			continue
		}
		c := &client{TCPConn: conn}
		c.leave = sync.OnceFunc(func() { <-p.places })
		c.stop = context.AfterFunc(ctx, func() { relay.Reset(conn) }) // whoever serves c closes it then
		serve(c)
	}
}

// serveClient finds out what a client speaks.
func (p *Proxy) serveClient(ctx context.Context, c *client, requests *handover) {
	_ = c.SetReadDeadline(time.Now().Add(HandshakeTimeout))
	first := make([]byte, 1)
	if _, err := io.ReadFull(c.TCPConn, first); err != nil {
		if !errors.Is(err, io.EOF) { // one that says nothing at all only looked whether the port is open
			p.bad.Add(1)
		}
		c.Close()
		return
	}
	c.early = first
	switch first[0] {
	case socks5Version:
		p.serveSOCKS(ctx, c)
	case socks4Version:
		p.bad.Add(1)
		_, _ = c.Write(socks4Refusal) // it is closed in any case
		c.Close()
	default:
		_ = c.SetReadDeadline(time.Time{}) // the server has deadlines of its own
		if !requests.give(c) {
			c.Close()
		}
	}
}

// dial opens a connection to what a client asked for, and counts it if that fails.
func (p *Proxy) dial(ctx context.Context, host string, port uint16) (Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, DialTimeout)
	defer cancel()
	conn, err := p.cfg.Dial(ctx, host, port)
	switch {
	case err == nil:
	case errors.Is(err, ErrForbidden):
		p.forbidden.Add(1)
	default:
		p.failed.Add(1)
	}
	return conn, err
}

// refusal is how the two protocols tell of an error: a reply of RFC 1928 and a status of HTTP.
func refusal(err error) (reply byte, status int) {
	var errno syscall.Errno
	switch {
	case errors.Is(err, ErrForbidden):
		return replyNotAllowed, http.StatusForbidden
	case errors.Is(err, ErrNoName):
		return replyHostUnreachable, http.StatusBadGateway
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return replyHostUnreachable, http.StatusGatewayTimeout
	case errors.As(err, &errno):
		switch errno {
		case syscall.ECONNREFUSED:
			return replyRefused, http.StatusBadGateway
		case syscall.EACCES: // of the destination's: its policy
			return replyNotAllowed, http.StatusBadGateway
		case syscall.ENETUNREACH:
			return replyNetUnreachable, http.StatusBadGateway
		case syscall.EHOSTUNREACH:
			return replyHostUnreachable, http.StatusBadGateway
		}
	}
	return replyFailure, http.StatusBadGateway
}

// client is a client's connection.
type client struct {
	*net.TCPConn
	early []byte      // read already, to be read again
	leave func()      // its place is free
	stop  func() bool // the end of Serve does not concern it any more
}

func (c *client) Read(b []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(b, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	return c.TCPConn.Read(b)
}

func (c *client) Close() error {
	c.stop()
	defer c.leave()
	return c.TCPConn.Close()
}

// handover is the web server's listener: it accepts the connections that are given to it.
type handover struct {
	addr  net.Addr
	conns chan net.Conn
	done  <-chan struct{}
}

// give has the server serve a connection; no means that there is no server any more.
func (h *handover) give(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.done:
		return false
	}
}

func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handover) Close() error   { return nil }
func (h *handover) Addr() net.Addr { return h.addr }
