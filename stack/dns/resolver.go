// This file is the Resolver: which server is asked when, and what becomes of its answer.

package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
)

// Config is what New needs. A zero field takes its default.
type Config struct {
	ResolvConf string        // the host's file: /etc/resolv.conf
	Port       uint16        // of the servers in it: 53
	MaxQueries int           // in flight; more are dropped: 512
	Timeout    time.Duration // for one server, at most; "options timeout" of the file can shorten it: 2 s
	// Control binds the socket to a server before it is connected, as that of a net.Dialer.
	Control func(network, address string, c syscall.RawConn) error
	Log     *slog.Logger // slog.Default()
}

// Stats is a snapshot of the resolver's counters.
type Stats struct {
	Queries   uint64 `json:"queries"`
	Answered  uint64 `json:"answered"`  // by a server, whatever it said
	Failed    uint64 `json:"failed"`    // no server answered: SERVFAIL
	Retried   uint64 `json:"retried"`   // asked again over TCP because the answer was truncated
	Malformed uint64 `json:"malformed"` // dropped: not a query
	Overload  uint64 `json:"overload"`  // dropped: too many in flight
}

// Resolver forwards queries. All methods are safe for concurrent use.
type Resolver struct {
	cfg   Config
	file  follower
	slots chan struct{} // one element for every query in flight

	queries, answered, failed, retried, malformed, overload atomic.Uint64
}

// New makes a Resolver. It opens nothing: the file is read with the first query.
func New(c Config) *Resolver {
	if c.ResolvConf == "" {
		c.ResolvConf = defaultResolvConf
	}
	if c.Port == 0 {
		c.Port = 53
	}
	if c.MaxQueries <= 0 {
		c.MaxQueries = 512
	}
	if c.Timeout <= 0 {
		c.Timeout = 2 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return &Resolver{
		cfg:   c,
		file:  follower{path: c.ResolvConf, port: c.Port, log: c.Log},
		slots: make(chan struct{}, c.MaxQueries),
	}
}

// Stats is a snapshot of the counters.
func (r *Resolver) Stats() Stats {
	return Stats{
		Queries:   r.queries.Load(),
		Answered:  r.answered.Load(),
		Failed:    r.failed.Load(),
		Retried:   r.retried.Load(),
		Malformed: r.malformed.Load(),
		Overload:  r.overload.Load(),
	}
}

// Answer returns the answer to the query in a datagram, or nil when there is to be none: the datagram is no query, or too
// many queries are in flight, or ctx ended. It does not keep b.
func (r *Resolver) Answer(ctx context.Context, b []byte) []byte {
	q, err := parseQuery(b)
	if err != nil {
		r.malformed.Add(1)
		return nil
	}
	answer := r.answer(ctx, q, false)
	if answer == nil {
		return nil
	}
	return q.fit(answer, q.datagram)
}

// streamIdle is how long a connection without a query is kept (RFC 7766 section 6.2.3 asks for a few seconds).
const streamIdle = 10 * time.Second

// ServeStream answers the queries on c, one after the other, until the container closes it, is idle, or sends what is no query.
// It returns soon after ctx is done. The caller closes c.
func (r *Resolver) ServeStream(ctx context.Context, c net.Conn) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	defer stop()
	// The second look at ctx is for an end between the first and the new deadline, which would undo that of stop.
	extend := func() bool {
		return ctx.Err() == nil && c.SetDeadline(time.Now().Add(streamIdle)) == nil && ctx.Err() == nil
	}
	for extend() {
		b, err := readStream(c)
		if err != nil {
			return
		}
		q, err := parseQuery(b)
		if err != nil {
			r.malformed.Add(1)
			return
		}
		answer := r.answer(ctx, q, true)
		if answer == nil || !extend() || writeStream(c, answer) != nil {
			return
		}
	}
}

// answer asks the servers. nil means to be silent.
func (r *Resolver) answer(ctx context.Context, q query, stream bool) []byte {
	r.queries.Add(1)
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	default:
		r.overload.Add(1)
		return nil
	}
	if q.opcode != dns.OpcodeQuery {
		return q.refusal(dns.RcodeNotImplemented)
	}
	c := r.file.get()
	timeout := r.cfg.Timeout
	if c.timeout > 0 {
		timeout = min(timeout, c.timeout)
	}
	var unwilling []byte // an answer of a server that could not or would not help
	for range c.attempts {
		for _, s := range c.order() {
			b, err := r.ask(ctx, s.addr, q, stream, timeout)
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				s.silentUntil.Store(time.Now().Add(silentFor).UnixNano())
				continue
			}
			s.silentUntil.Store(0)
			binary.BigEndian.PutUint16(b, q.id())
			switch rcode(b) {
			case dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
				// The next server may know better, as the C library hopes, too.
				unwilling = b
				continue
			}
			r.answered.Add(1)
			return b
		}
		if unwilling != nil {
			r.answered.Add(1)
			return unwilling
		}
	}
	r.failed.Add(1)
	return q.refusal(dns.RcodeServerFailure)
}

// ask asks one server: a query from a datagram by datagram, and again over TCP if the answer was truncated; a query from a
// connection over TCP, and by datagram where the server has none.
func (r *Resolver) ask(ctx context.Context, s netip.AddrPort, q query, stream bool, timeout time.Duration) ([]byte, error) {
	if stream {
		b, err := r.exchange(ctx, "tcp", s, q, timeout)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return b, err
		}
		return r.exchange(ctx, "udp", s, q, timeout)
	}
	b, err := r.exchange(ctx, "udp", s, q, timeout)
	if err != nil || !truncated(b) {
		return b, err
	}
	r.retried.Add(1)
	if whole, err := r.exchange(ctx, "tcp", s, q, timeout); err == nil {
		return whole, nil
	}
	return b, nil
}

var messages = sync.Pool{New: func() any { return new([maxMessage]byte) }}

// exchange sends q with an identifier of its own and returns the answer to it, in memory of its own.
func (r *Resolver) exchange(ctx context.Context, network string, s netip.AddrPort, q query, timeout time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	d := net.Dialer{Control: r.cfg.Control}
	c, err := d.DialContext(ctx, network, s.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	defer stop()
	id := uint16(rand.Uint32())
	out := q.withID(id)
	if network == "tcp" {
		if err := writeStream(c, out); err != nil {
			return nil, err
		}
		b, err := readStream(c)
		if err == nil && !q.answeredBy(b, id) {
			return nil, errMalformed
		}
		return b, err
	}
	if _, err := c.Write(out); err != nil {
		return nil, err
	}
	buf := messages.Get().(*[maxMessage]byte)
	defer messages.Put(buf)
	for {
		n, err := c.Read(buf[:])
		if err != nil {
			return nil, err
		}
		if q.answeredBy(buf[:n], id) { // anything else is a stray or a forgery: wait for the answer
			return append([]byte(nil), buf[:n]...), nil
		}
	}
}

// readStream reads [length 2][message] (RFC 1035 section 4.2.2).
func readStream(c net.Conn) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(c, b)
	return b, err
}

func writeStream(c net.Conn, b []byte) error {
	out := make([]byte, 2, 2+len(b))
	binary.BigEndian.PutUint16(out, uint16(len(b)))
	_, err := c.Write(append(out, b...))
	return err
}
