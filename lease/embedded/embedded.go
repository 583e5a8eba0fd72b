// This file starts and stops the server.

package embedded

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// DefaultListen is etcd's own client port, on loopback only.
const DefaultListen = "http://127.0.0.1:2379"

// Errors of Start.
var (
	// ErrPortTaken: something else listens at the client URL.
	ErrPortTaken = errors.New("the port is taken")
	// ErrDataDirInUse: another daemon runs on the data directory.
	ErrDataDirInUse = errors.New("the data directory is in use")
)

// startTimeout bounds how long a member may take to be ready, which includes reading its data.
const startTimeout = 30 * time.Second

// Config says where the server lives. It listens in the clear with an http URL; with https, CertFile and KeyFile are
// required, and ClientCAFile makes it demand a client certificate of that CA. The host 0.0.0.0 is every address of IPv4, and :: every address.
type Config struct {
	DataDir      string // made with mode 0700 if absent
	ListenClient string // URL with a numeric host; port 0 picks a free one; "" is DefaultListen
	CertFile     string // PEM
	KeyFile      string
	ClientCAFile string
	Log          *slog.Logger // receives what etcd dies of, and at debug level its errors; nil discards
}

// Server is a running member. Methods may be called from any goroutine.
type Server struct {
	etcd   *embed.Etcd
	grpc   *grpcServers
	lock   *os.File
	front  *front // nil unless it listens on every address
	member string // host:port where etcd itself listens
	url    string
	err    chan error

	closeOnce sync.Once
	closing   chan struct{}
}

// Start runs a member on c.DataDir, new or from a previous run, and returns when it answers. If ctx ends first, or
// anything fails, nothing is left running.
func Start(ctx context.Context, c Config) (*Server, error) {
	if c.ListenClient == "" {
		c.ListenClient = DefaultListen
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	u, err := url.Parse(c.ListenClient)
	if err != nil {
		return nil, fmt.Errorf("embedded etcd: listen URL: %w", err)
	}
	at, err := netip.ParseAddrPort(u.Host)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("embedded etcd: listen URL %q is not of the form http://127.0.0.1:2379", c.ListenClient)
	}
	if u.Scheme == "https" {
		if c.CertFile == "" || c.KeyFile == "" {
			return nil, fmt.Errorf("embedded etcd: listening at %s needs a certificate file and a key file", c.ListenClient)
		}
		// etcd notices bad files at the first connection only.
		if _, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile); err != nil {
			return nil, fmt.Errorf("embedded etcd: certificate %s with key %s: %w", c.CertFile, c.KeyFile, err)
		}
	}
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	lock, err := lockDir(c.DataDir)
	if err != nil {
		return nil, fmt.Errorf("embedded etcd: %w", err)
	}
	var words lastWords
	s := &Server{grpc: &grpcServers{}, lock: lock, err: make(chan error, 1), closing: make(chan struct{})}
	inner := *u
	if at.Addr().IsUnspecified() {
		if s.front, err = listenEverywhere(ctx, at); err != nil {
			return nil, errors.Join(explain(err, u.Host), lock.Close())
		}
		at = s.front.addr(at.Addr())
		u.Host, inner.Host = at.String(), "127.0.0.1:0"
	}
	cfg := config(c, inner, advertised(*u, at), &words)
	cfg.ServiceRegister = s.grpc.add
	e, err := start(cfg, &words)
	if err != nil {
		if s.front != nil {
			s.front.close()
		}
		return nil, errors.Join(explain(err, u.Host), lock.Close())
	}
	s.etcd = e
	s.member = e.Clients[0].Addr().String()
	if s.front == nil {
		u.Host = s.member
	}
	s.url = u.String()

	t := time.NewTimer(startTimeout)
	defer t.Stop()
	select {
	case <-e.Server.ReadyNotify():
	case err = <-e.Err():
	case <-e.Server.StopNotify():
		err = errors.New("it stopped while starting")
	case <-ctx.Done():
		err = ctx.Err()
	case <-t.C:
		err = fmt.Errorf("not ready after %v with data in %s", startTimeout, c.DataDir)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("embedded etcd: %w", err)
	}
	if s.front != nil {
		s.front.serve(s.member)
	}
	go s.forward()
	return s, nil
}

// start is embed.StartEtcd, which ends the process on some errors by way of its logger; see quiet.
func start(cfg *embed.Config, words *lastWords) (e *embed.Etcd, err error) {
	defer func() {
		if r := recover(); r != nil {
			text := fmt.Sprint(r)
			if cause := words.get(); cause != "" {
				text += ": " + cause
			}
			err = fmt.Errorf("it cannot start on its data in %s: %s", cfg.Dir, text)
		}
	}()
	return embed.StartEtcd(cfg)
}

func explain(err error, addr string) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("embedded etcd: %w: %s: if it is an etcd, use it with --etcd-endpoints; else choose another with --listen-etcd", ErrPortTaken, addr)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("embedded etcd: %s is not an address of this host: choose one that is with --listen-etcd (0.0.0.0 for all of them)", addr)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("embedded etcd: you may not listen at %s: choose a port from 1024 up with --listen-etcd", addr)
	}
	return fmt.Errorf("embedded etcd: %w", err)
}

func config(c Config, u url.URL, advertise []url.URL, words *lastWords) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = "rootless-ovl"
	cfg.Dir = c.DataDir
	cfg.ListenClientUrls = []url.URL{u}
	cfg.AdvertiseClientUrls = advertise
	cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = c.CertFile, c.KeyFile
	if c.ClientCAFile != "" {
		cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = c.ClientCAFile, true
	}
	// The peer URL is a label in the member list: nothing listens there.
	cfg.ListenPeerUrls = nil
	cfg.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.TickMs, cfg.ElectionMs = 10, 100
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, "1h"
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(quiet(c.Log, words))
	return cfg
}

// forward turns the first failure of the server, or its unexpected end, into one error.
func (s *Server) forward() {
	defer close(s.err)
	var err error
	select {
	case err = <-s.etcd.Err():
	case <-s.etcd.Server.StopNotify():
	case <-s.closing:
	}
	if err == nil {
		err = errors.New("it stopped by itself")
	}
	select {
	case <-s.closing:
	default:
		s.err <- fmt.Errorf("embedded etcd at %s: %w", s.url, err)
	}
}

// Endpoint is the client URL, with the port that was picked.
func (s *Server) Endpoint() string { return s.url }

// Doors are the host:ports by which the server can be reached: that of Endpoint, and where it listens on every address that of the member
// behind it, on the loopback.
func (s *Server) Doors() []string {
	if s.front == nil {
		return []string{s.member}
	}
	return []string{s.front.ln.Addr().String(), s.member}
}

// Err receives at most one error, if the server fails while running, and is closed when the server ends.
func (s *Server) Err() <-chan error { return s.err }

// grpcServers are the gRPC servers of one member.
type grpcServers struct {
	mu  sync.Mutex
	all []*grpc.Server
}

func (g *grpcServers) add(s *grpc.Server) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all = append(g.all, s)
}

func (g *grpcServers) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.all {
		s.Stop()
	}
}

// Close stops the server and returns when all of it has ended. The data stays. Further calls do nothing.
func (s *Server) Close() {
	s.closeOnce.Do(func() {
		close(s.closing)
		if s.front != nil {
			s.front.close()
		}
		// etcd would wait 5 s for the other nodes' watches, which do not end by themselves.
		s.grpc.stop()
		s.etcd.Close()
		_ = s.lock.Close() // also unlocks
	})
}

// lockDir makes the directory and locks it: etcd itself would wait for another process without end.
func lockDir(dir string) (*os.File, error) {
	if dir == "" {
		return nil, errors.New("no data directory")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %s: is another rootless-ovl running? Give this one its own --state-dir", ErrDataDirInUse, dir), f.Close())
	}
	return f, nil
}

// quiet is a zap logger for etcd, which reports much as an error that needs nobody's attention (a new directory has no
// storage version; a listener that was closed is closed). What matters comes back as an error or is fatal. Where etcd
// would end the process without a word it panics instead.
func quiet(log *slog.Logger, words *lastWords) *zap.Logger {
	return zap.New(&slogCore{log: log, words: words}, zap.WithFatalHook(zapcore.WriteThenPanic))
}

// lastWords is the cause that etcd gave with the message it died of.
type lastWords struct {
	mu    sync.Mutex
	cause string
}

func (w *lastWords) set(cause string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cause = cause
}

func (w *lastWords) get() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cause
}

// slogCore is a zapcore.Core on slog, for errors and worse.
type slogCore struct {
	log    *slog.Logger
	words  *lastWords
	fields []zapcore.Field
}

func (c *slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.ErrorLevel }

func (c *slogCore) With(f []zapcore.Field) zapcore.Core {
	return &slogCore{c.log, c.words, append(c.fields[:len(c.fields):len(c.fields)], f...)}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(c.fields[:len(c.fields):len(c.fields)], fields...) {
		f.AddTo(enc)
	}
	level := slog.LevelDebug
	if e.Level > zapcore.ErrorLevel {
		level = slog.LevelError
		if cause, ok := enc.Fields["error"].(string); ok {
			c.words.set(cause)
		}
	}
	c.log.Log(context.Background(), level, "embedded etcd", "says", e.Message, "details", enc.Fields)
	return nil
}

func (c *slogCore) Sync() error { return nil }
