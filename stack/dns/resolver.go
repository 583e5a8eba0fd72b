// This file is the Resolver: which server is asked when, and what becomes of its answer.

package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
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
	Local     uint64 `json:"local"`     // answered from the zone
	Cached    uint64 `json:"cached"`    // answered from the cache
	Shared    uint64 `json:"shared"`    // got the answer to the same question of another, asked at the same time
	Refused   uint64 `json:"refused"`   // names outside the zone, for containers that may not ask for them
	Failed    uint64 `json:"failed"`    // no server answered: SERVFAIL
	Retried   uint64 `json:"retried"`   // asked again over TCP because the answer was truncated
	Malformed uint64 `json:"malformed"` // dropped: not a query
	Overload  uint64 `json:"overload"`  // dropped: too many in flight
	Streams   uint64 `json:"streams"`   // connections closed at once: too many are open
}

// Query is who asks, and where.
type Query struct {
	From   netip.Addr // the container
	At     netip.Addr // the gateway's address that it asked
	Closed bool       // it may not resolve names outside the zone
}

// Resolver answers from the zone and forwards other queries. All methods are safe for concurrent use.
type Resolver struct {
	cfg     Config
	file    follower
	zone    atomic.Pointer[Zone]
	cache   cache
	servers upstream

	queries, answered, local, cached, shared atomic.Uint64
	refused, failed, retried                 atomic.Uint64
	malformed, overload, streams             atomic.Uint64

	mu      sync.Mutex
	asking  shares // queries that wait for a server
	open    shares // connections
	flights map[flightKey]*flight
}

// flightKey tells apart what one answer of a server does not do for, beside the key of a query.
type flightKey struct {
	key        string
	generation uint64
	stream     bool
}

// flight is a query on its way to the servers. answer is constant once done is closed; nil: whoever asked has given up.
type flight struct {
	done   chan struct{}
	answer []byte
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
		cfg:     c,
		file:    follower{path: c.ResolvConf, port: c.Port, log: c.Log},
		servers: upstream{control: c.Control},
		asking:  shares{most: c.MaxQueries, each: make(map[netip.Addr]int)},
		open:    shares{most: maxStreams, each: make(map[netip.Addr]int)},
		flights: make(map[flightKey]*flight),
	}
}

// Stats is a snapshot of the counters.
func (r *Resolver) Stats() Stats {
	return Stats{
		Queries:   r.queries.Load(),
		Answered:  r.answered.Load(),
		Local:     r.local.Load(),
		Cached:    r.cached.Load(),
		Shared:    r.shared.Load(),
		Refused:   r.refused.Load(),
		Failed:    r.failed.Load(),
		Retried:   r.retried.Load(),
		Malformed: r.malformed.Load(),
		Overload:  r.overload.Load(),
		Streams:   r.streams.Load(),
	}
}

// SetZone replaces the zone that the resolver answers from by itself; nil: there is none.
func (r *Resolver) SetZone(z *Zone) { r.zone.Store(z) }

// Answer returns the answer to the query in a datagram, or nil when there is to be none: the datagram is no query, or too
// many queries are in flight, or ctx ended. It does not keep b.
func (r *Resolver) Answer(ctx context.Context, who Query, b []byte) []byte {
	q, err := parseQuery(b)
	if err != nil {
		r.malformed.Add(1)
		return nil
	}
	answer := r.answer(ctx, who, q, false)
	if answer == nil {
		return nil
	}
	return q.fit(answer, q.datagram)
}

// streamIdle is how long a connection without a query is kept (RFC 7766 section 6.2.3 asks for a few seconds).
const streamIdle = 10 * time.Second

// streamQueries is how many queries of one connection are answered at a time; more wait to be read.
const streamQueries = 64

// maxStreams is how many connections are served at a time. One holds a goroutine, and for as long as a query is being read its bytes.
const maxStreams = 512

// ServeStream answers the queries on c, each as soon as its answer is there (RFC 7766 section 6.2.1.1), until the container closes it, is
// idle, or sends what is no query; what was asked by then is answered first. It returns soon after ctx is done, and at once where too many connections are open. The
// caller closes c.
func (r *Resolver) ServeStream(ctx context.Context, who Query, c net.Conn) {
	if !r.take(&r.open, who.From) {
		r.streams.Add(1)
		return
	}
	defer r.give(&r.open, who.From)
	ctx, cancel := context.WithCancel(ctx)
	var answers sync.WaitGroup
	broken := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	defer func() {
		answers.Wait()
		broken()
		cancel()
	}()
	// The second look at ctx is for an end between the first and the new deadline, which would undo that of broken.
	within := func(set func(time.Time) error) bool {
		return ctx.Err() == nil && set(time.Now().Add(streamIdle)) == nil && ctx.Err() == nil
	}
	slots := make(chan struct{}, streamQueries)
	var writing sync.Mutex
	for within(c.SetReadDeadline) {
		b, err := readStream(c, maxQuery)
		var q query
		if err == nil {
			q, err = parseQuery(b)
		} else if !errors.Is(err, errMalformed) {
			return
		}
		if err != nil {
			r.malformed.Add(1)
			return
		}
		slots <- struct{}{}
		answers.Go(func() {
			defer func() { <-slots }()
			answer := r.answer(ctx, who, q, true)
			writing.Lock()
			defer writing.Unlock()
			if answer == nil || !within(c.SetWriteDeadline) || writeStream(c, answer) != nil {
				cancel() // of no use any more
			}
		})
	}
}

// answer answers from the zone, from the cache, or with what a server says. nil means to be silent.
func (r *Resolver) answer(ctx context.Context, who Query, q query, stream bool) []byte {
	r.queries.Add(1)
	if q.opcode != dns.OpcodeQuery {
		return q.refusal(dns.RcodeNotImplemented)
	}
	if z := r.zone.Load(); z != nil {
		if b := z.answer(&q, who); b != nil {
			r.local.Add(1)
			return b
		}
	}
	if who.Closed {
		r.refused.Add(1)
		return q.refusal(dns.RcodeRefused)
	}
	c := r.file.get()
	key, keyed := q.key()
	if keyed {
		if b := r.cache.get(c.generation, key, &q, time.Now()); b != nil {
			r.cached.Add(1)
			return b
		}
	}
	if !r.take(&r.asking, who.From) {
		r.overload.Add(1)
		return nil
	}
	defer r.give(&r.asking, who.From)
	if !keyed {
		return r.forward(ctx, c, q, stream)
	}
	return r.share(ctx, flightKey{key, c.generation, stream}, c, q)
}

// shares count what containers hold of something that there is a bound for. Guarded by Resolver.mu.
type shares struct {
	most int // constant
	all  int
	each map[netip.Addr]int
}

// take counts one more for a container. No means that it has its share: half of what the others leave. So one alone leaves a half, and
// each that joins in a flood leaves a half of that: there is something for the next.
func (r *Resolver) take(s *shares, from netip.Addr) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	others := s.all - s.each[from]
	if s.all >= s.most || s.each[from] >= max(1, (s.most-others)/2) {
		return false
	}
	s.all++
	s.each[from]++
	return true
}

// give takes back what take has counted.
func (r *Resolver) give(s *shares, from netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.all--
	if s.each[from]--; s.each[from] == 0 {
		delete(s.each, from)
	}
}

// share has a question asked once for all who ask it at the same time.
func (r *Resolver) share(ctx context.Context, k flightKey, c *conf, q query) []byte {
	for {
		r.mu.Lock()
		f := r.flights[k]
		if f == nil {
			// One may have come back since we looked: fly keeps the answer before it takes the flight away.
			if b := r.cache.get(k.generation, k.key, &q, time.Now()); b != nil {
				r.mu.Unlock()
				r.cached.Add(1)
				return b
			}
			f = &flight{done: make(chan struct{})}
			r.flights[k] = f
			r.mu.Unlock()
			return r.fly(ctx, k, f, c, q)
		}
		r.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil
		}
		if f.answer != nil {
			r.shared.Add(1)
			return q.readdressed(f.answer)
		}
	}
}

// fly asks for all who share f, and keeps the answer.
func (r *Resolver) fly(ctx context.Context, k flightKey, f *flight, c *conf, q query) []byte {
	answer := r.forward(ctx, c, q, k.stream)
	if answer != nil {
		r.cache.put(k.generation, k.key, &q, answer, time.Now())
	}
	r.mu.Lock()
	delete(r.flights, k)
	r.mu.Unlock()
	f.answer = answer
	close(f.done)
	return answer
}

// forward asks the servers. nil means that ctx has ended.
func (r *Resolver) forward(ctx context.Context, c *conf, q query, stream bool) []byte {
	timeout := r.cfg.Timeout
	if c.timeout > 0 {
		timeout = min(timeout, c.timeout)
	}
	var unwilling []byte // an answer of a server that could not or would not help
	for range c.attempts {
		for _, s := range c.order() {
			b, err := r.servers.ask(ctx, s.addr, q, stream, timeout, func() { r.retried.Add(1) })
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				s.silentUntil.Store(ticks() + int64(silentFor))
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
