// This file is the HTTP proxy: CONNECT, which becomes a tunnel, and requests in absolute form, which are passed on.

package proxy

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/internal/relay"
)

const (
	// clientIdle is how long a client's connection may stay unused between two requests.
	clientIdle = time.Minute
	// serverIdle is the same for a destination: short, since a container may go and another get its address.
	serverIdle     = 5 * time.Second
	maxHeaderBytes = 64 << 10
)

// webServer serves the clients that speak HTTP.
type webServer struct {
	server    *http.Server
	transport *http.Transport
}

func (p *Proxy) newWebServer(ctx context.Context, running *sync.WaitGroup) webServer {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			host, port, err := hostPort(addr)
			if err != nil {
				return nil, err
			}
			return p.dial(ctx, host, port)
		},
		DisableCompression: true, // what the client asked for is passed on
		IdleConnTimeout:    serverIdle,
	}
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			// What ReverseProxy tidies up for a server behind it is the client's own here.
			r.Out.URL.RawQuery = r.In.URL.RawQuery
			for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if v := r.In.Header[name]; v != nil {
					r.Out.Header[name] = v
				}
			}
		},
		Transport:     transport,
		FlushInterval: -1, // an answer that comes slowly is passed on as it comes
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, err error) { refuse(w, err) },
		ErrorLog:      slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	serve := func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodConnect:
			running.Add(1) // the server waits for this connection no longer when it has become a tunnel
			defer running.Done()
			p.serveTunnel(ctx, w, r)
		case r.URL.Scheme == "http" && r.URL.Host != "":
			p.requests.Add(1)
			if r.URL.Port() != "" {
				if _, _, err := hostPort(r.URL.Host); err != nil {
					p.bad.Add(1)
					http.Error(w, "rootless-ovl: "+err.Error(), http.StatusBadRequest)
					return
				}
			}
			forward.ServeHTTP(w, r)
		default:
			p.bad.Add(1)
			http.Error(w, "rootless-ovl: this is a proxy to the overlay, for CONNECT and for requests of a whole http:// URL: curl -x http://"+r.Context().Value(http.LocalAddrContextKey).(net.Addr).String()+" http://NAME/", http.StatusBadRequest)
		}
	}
	return webServer{
		transport: transport,
		server: &http.Server{
			Handler:                      http.HandlerFunc(serve),
			BaseContext:                  func(net.Listener) context.Context { return ctx },
			DisableGeneralOptionsHandler: true,
			ReadHeaderTimeout:            HandshakeTimeout,
			IdleTimeout:                  clientIdle,
			MaxHeaderBytes:               maxHeaderBytes,
			ErrorLog:                     slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		},
	}
}

// refuse tells a client why it gets no answer.
func refuse(w http.ResponseWriter, err error) {
	_, status := refusal(err)
	http.Error(w, "rootless-ovl: "+err.Error(), status)
}

// hostPort takes an address apart that has a port.
func hostPort(addr string) (string, uint16, error) {
	host, number, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, fmt.Errorf("%q is not host:port", addr)
	}
	port, err := strconv.ParseUint(number, 10, 16)
	if err != nil || port == 0 {
		return "", 0, fmt.Errorf("%q is not a port", number)
	}
	return host, uint16(port), nil
}

// serveTunnel answers CONNECT. ctx is Serve's: the request's ends when a client half-closes early.
func (p *Proxy) serveTunnel(ctx context.Context, w http.ResponseWriter, r *http.Request) {
	p.tunnels.Add(1)
	host, port, err := hostPort(r.Host)
	if err != nil {
		p.bad.Add(1)
		http.Error(w, "rootless-ovl: "+err.Error(), http.StatusBadRequest)
		return
	}
	conn, err := p.dial(ctx, host, port)
	if err != nil {
		refuse(w, err)
		return
	}
	taken, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		relay.Reset(conn)
		p.log.Error("proxy: a connection cannot become a tunnel", "err", err)
		return
	}
	c := taken.(*client) //nolint:errcheck // the listener gives no other
	// What the client sent without waiting is for the other end.
	sent, _ := rw.Reader.Peek(rw.Reader.Buffered()) // it is all there
	c.early = append(bytes.Clone(sent), c.early...)
	_, err = c.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n"))
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	if err != nil {
		relay.Reset(conn)
		relay.Reset(c)
		return
	}
	_ = relay.Join(ctx, c, conn) // whoever broke it knows, and the other was reset
}
