// This file is what a publication is, and its life: listen, run, close.

package publish

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The protocols of a port.
const (
	TCP = "tcp"
	UDP = "udp"
)

// Spec says what is published: a port of the host, and the container's port that it leads to.
type Spec struct {
	HostAddr netip.Addr // invalid: every address of the host, of both families
	HostPort uint16     // 0: one that is free, see Publication.HostPort
	Port     uint16     // the container's
	Proto    string     // TCP or UDP
	SNAT     bool       // the container sees the gateway's address instead of clients'
}

// Inside is how one container is reached. Its methods may be called from several goroutines.
type Inside interface {
	// DialTCP opens a connection of the container's own kernel, with from as its source; its port 0 is any port. An error that
	// is errors.ErrUnsupported has Carry called for this connection.
	DialTCP(ctx context.Context, from, to netip.AddrPort) (*net.TCPConn, error)
	// Carry dials likewise through the gateway's stack, and copies between host and that connection until both
	// directions are done or ctx is. It owns host from the call on. Its error says that the dial failed; host is then reset.
	Carry(ctx context.Context, host *net.TCPConn, from, to netip.AddrPort) error
	// OpenUDP begins a flow of datagrams through the gateway's stack. What the container answers goes to reply, which copies b and
	// does not block.
	OpenUDP(from, to netip.AddrPort, reply func(b []byte)) (UDPFlow, error)
}

// UDPFlow is one client's datagrams to a container. After an error of Send the flow is over and is opened anew.
type UDPFlow interface {
	Send(b []byte) error // borrows b until it returns
	Close()
}

// Limits bound what one publication may hold. A zero is the default.
type Limits struct {
	Connections int // 16,384
	Flows       int // of datagrams, 4,096
}

// Target is where a publication leads.
type Target struct {
	Addresses Addresses
	Inside    Inside
	Limits    Limits
	Places    *Places // what all publications share; nil: nothing is shared
	// Patient has Listen wait for a moment for a port that is taken: one that this process has just closed may stay so for that long, since
	// a process that it is just starting has the descriptor too.
	Patient bool
	// Given are listening sockets of another Publication of the same Spec (Sockets), in the place of new ones: Listen duplicates them.
	Given []int
	Log   *slog.Logger // nil: none
}

// Places are those of the TCP connections that all publications of a process have open together: a process without descriptors
// serves nobody.
type Places struct {
	most  int64
	taken atomic.Int64
}

// NewPlaces makes as many as the files allow that this process may have open (RLIMIT_NOFILE).
func NewPlaces() *Places {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur > math.MaxInt32 {
		l.Cur = math.MaxInt32
	}
	return &Places{most: placesFor(int64(l.Cur))}
}

// placesFor is how many connections fit beside the gateway's flows, which take up to three quarters of so many files, and no more than those
// of 65,536. A connection holds two, and up to four more while bytes are on their way.
func placesFor(files int64) int64 {
	const enough = 65536
	return max(files/16, (files-enough)/4)
}

// take takes a place, if one is free.
func (l *Places) take() bool {
	if l != nil && l.taken.Add(1) > l.most {
		l.taken.Add(-1)
		return false
	}
	return true
}

func (l *Places) giveBack() {
	if l != nil {
		l.taken.Add(-1)
	}
}

const (
	dialTimeout = 20 * time.Second

	defaultConnections = 16384
	defaultFlows       = 4096
)

// Publication is one published port: its listening sockets, and what goes on over them.
type Publication struct {
	spec   Spec
	inside Inside
	limits Limits
	places *Places
	log    *slog.Logger
	tcp    []*net.TCPListener
	udp    []*udpListener

	addrs  atomic.Pointer[Addresses]
	count  counters
	closed atomic.Bool

	mu     sync.Mutex
	cancel context.CancelFunc // of Run
	done   chan struct{}      // closed when Run has ended; nil before Run
}

// Listen binds the sockets of a published port; clients are served once Run is called. Errors are ErrPrivileged, ErrPortTaken,
// ErrNotHere and ErrInvalid, with what to do about it. Where every address is asked for, a host without IPv6, or without IPv4, publishes
// on what it has.
func Listen(spec Spec, to Target) (*Publication, error) {
	if err := spec.check(); err != nil {
		return nil, err
	}
	p := &Publication{spec: spec, inside: to.Inside, limits: to.Limits, places: to.Places, log: to.Log}
	if p.limits.Connections <= 0 {
		p.limits.Connections = defaultConnections
	}
	if p.limits.Flows <= 0 {
		p.limits.Flows = defaultFlows
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	p.SetAddresses(to.Addresses)
	if len(to.Given) > 0 {
		err := p.take(to.Given)
		if err == nil {
			return p, nil
		}
		p.closeListeners()
		return nil, err
	}
	if err := p.listen(to.Patient); err != nil {
		return nil, err
	}
	return p, nil
}

func (s Spec) check() error {
	switch {
	case s.Proto != TCP && s.Proto != UDP:
		return fail(ErrInvalid, nil, "%q is not a protocol of a published port: tcp or udp", s.Proto)
	case s.Port == 0:
		return fail(ErrInvalid, nil, "port 0 of a container cannot be published")
	case s.HostAddr.Is4In6():
		return fail(ErrInvalid, nil, "%v is an IPv4 address written as IPv6: write %v", s.HostAddr, s.HostAddr.Unmap())
	case s.HostAddr.IsMulticast():
		return fail(ErrInvalid, nil, "%v is a multicast address: ports are published on addresses of this host", s.HostAddr)
	}
	return nil
}

// SetAddresses changes where the publication leads and as whom clients are seen. What is open stays as it is.
func (p *Publication) SetAddresses(a Addresses) {
	p.addrs.Store(&a)
}

// HostPort is the port of the host: that of the Spec, or the one that was found free.
func (p *Publication) HostPort() uint16 { return p.spec.HostPort }

// Spec is what is published.
func (p *Publication) Spec() Spec { return p.spec }

// errRunsOnce is what a second Run returns, and one after Close.
var errRunsOnce = errors.New("a publication runs once")

// Run serves clients until ctx is done or Close is called, and returns when everything that it opened is closed: connections that are
// still open are reset. Its error is ctx's, nil after Close.
func (p *Publication) Run(ctx context.Context) error {
	run, cancel := context.WithCancel(ctx)
	defer cancel()
	p.mu.Lock()
	if p.done != nil || p.closed.Load() {
		p.mu.Unlock()
		return errRunsOnce
	}
	p.cancel, p.done = cancel, make(chan struct{})
	p.mu.Unlock()
	defer close(p.done)

	var wg sync.WaitGroup
	for _, l := range p.tcp {
		wg.Go(func() { p.accept(run, l) })
	}
	for _, l := range p.udp {
		wg.Go(func() { l.run(run) })
	}
	<-run.Done()
	p.closed.Store(true)
	p.closeListeners()
	wg.Wait()
	return ctx.Err()
}

// Close ends Run, waits for that, and frees the port. It may be called without Run, and again.
func (p *Publication) Close() {
	p.closed.Store(true)
	p.mu.Lock()
	cancel, done := p.cancel, p.done
	p.mu.Unlock()
	if done == nil {
		p.closeListeners()
		return
	}
	cancel()
	<-done
}

func (p *Publication) closeListeners() {
	for _, l := range p.tcp {
		l.Close()
	}
	for _, l := range p.udp {
		l.conn.Close()
	}
}
