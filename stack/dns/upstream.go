// This file is one question to one server of the host, over UDP or TCP.

package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"
)

// upstream asks servers. A datagram has a socket of its own, so that every query leaves from a port that nobody can guess (RFC 5452);
// connections are used again for a moment.
type upstream struct {
	control func(network, address string, c syscall.RawConn) error // of a new socket; nil: nothing is done to it

	mu   sync.Mutex
	idle map[netip.AddrPort][]*idleStream
}

// An idle connection is kept for streamKept, and streamsKept of them for a server: there are servers that have few (dnsmasq has 20).
const (
	streamKept  = 2 * time.Second
	streamsKept = 4
)

type idleStream struct {
	conn  net.Conn
	timer *time.Timer
}

// ask asks one server: a query from a datagram by datagram, and again over TCP if the answer was truncated; a query from a
// connection over TCP, and by datagram where the server has none.
func (u *upstream) ask(ctx context.Context, s netip.AddrPort, q query, stream bool, timeout time.Duration, retried func()) ([]byte, error) {
	if stream {
		b, err := u.overTCP(ctx, s, q, timeout)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return b, err
		}
		return u.overUDP(ctx, s, q, timeout)
	}
	b, err := u.overUDP(ctx, s, q, timeout)
	if err != nil || !truncated(b) {
		return b, err
	}
	retried()
	if whole, err := u.overTCP(ctx, s, q, timeout); err == nil {
		return whole, nil
	}
	return b, nil
}

func (u *upstream) dial(ctx context.Context, network string, s netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Control: u.control}
	return d.DialContext(ctx, network, s.String())
}

var messages = sync.Pool{New: func() any { return new([maxMessage]byte) }}

// overUDP sends q with an identifier of its own and returns the answer to it, in memory of its own.
func (u *upstream) overUDP(ctx context.Context, s netip.AddrPort, q query, timeout time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, err := u.dial(ctx, "udp", s)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	defer stop()
	id := uint16(rand.Uint32())
	if _, err := c.Write(q.toServer(id)); err != nil {
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

// overTCP is overUDP on a connection. One that was idle may have been closed by the server: then another is made.
func (u *upstream) overTCP(ctx context.Context, s netip.AddrPort, q query, timeout time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if c := u.take(s); c != nil {
		if b, err := u.exchange(ctx, s, c, q); err == nil || ctx.Err() != nil {
			return b, err
		}
	}
	c, err := u.dial(ctx, "tcp", s)
	if err != nil {
		return nil, err
	}
	return u.exchange(ctx, s, c, q)
}

// exchange asks on c, which it keeps or closes.
func (u *upstream) exchange(ctx context.Context, s netip.AddrPort, c net.Conn, q query) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Now()) })
	id := uint16(rand.Uint32())
	err := writeStream(c, q.toServer(id))
	var b []byte
	if err == nil {
		b, err = readStream(c, maxMessage)
	}
	if err == nil && !q.answeredBy(b, id) {
		err = errMalformed
	}
	if !stop() || err != nil {
		_ = c.Close() // what there was to say has been said
		return b, err
	}
	u.keep(s, c)
	return b, nil
}

func (u *upstream) take(s netip.AddrPort) net.Conn {
	u.mu.Lock()
	defer u.mu.Unlock()
	list := u.idle[s]
	if len(list) == 0 {
		return nil
	}
	last := list[len(list)-1]
	u.forget(s, last)
	last.timer.Stop()
	return last.conn
}

// forget takes an idle connection out of the list. No means that it was not in it.
func (u *upstream) forget(s netip.AddrPort, i *idleStream) bool {
	list := u.idle[s]
	at := slices.Index(list, i)
	if at < 0 {
		return false
	}
	if list = slices.Delete(list, at, at+1); len(list) == 0 {
		delete(u.idle, s)
	} else {
		u.idle[s] = list
	}
	return true
}

func (u *upstream) keep(s netip.AddrPort, c net.Conn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.idle[s]) >= streamsKept {
		_ = c.Close()
		return
	}
	if u.idle == nil {
		u.idle = make(map[netip.AddrPort][]*idleStream)
	}
	i := &idleStream{conn: c}
	i.timer = time.AfterFunc(streamKept, func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.forget(s, i) {
			_ = c.Close()
		}
	})
	u.idle[s] = append(u.idle[s], i)
}

// readStream reads [length 2][message] (RFC 1035 section 4.2.2), of most bytes; a longer one is errMalformed and is not read.
func readStream(c net.Conn, most int) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > most {
		return nil, errMalformed
	}
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	return b, err
}

func writeStream(c net.Conn, b []byte) error {
	out := make([]byte, 2, 2+len(b))
	binary.BigEndian.PutUint16(out, uint16(len(b)))
	_, err := c.Write(append(out, b...))
	return err
}
