// This file is a TCP proxy that can be slow, to put between a daemon and what it talks to.

package lab

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Proxy passes connections on, byte by byte in order. It ends with the test.
type Proxy struct {
	Addr netip.AddrPort

	space *Space
	to    netip.AddrPort
	delay atomic.Int64
	t     T

	mu   sync.Mutex
	open map[net.Conn]bool
	done bool
}

// Proxy starts a proxy at addr in the space, to an address that the space reaches.
func (s *Space) Proxy(t T, addr, to netip.AddrPort) *Proxy {
	t.Helper()
	ln, err := s.Listen("tcp", addr.String())
	must(t, "proxy", err)
	p := &Proxy{Addr: addr, space: s, to: to, t: t, open: map[net.Conn]bool{}}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		p.mu.Lock()
		p.done = true
		for c := range p.open {
			c.Close()
		}
		p.mu.Unlock()
		running.Wait()
	})
	return p
}

// SetDelay has everything arrive so much later from now on, in either direction.
func (p *Proxy) SetDelay(d time.Duration) { p.delay.Store(int64(d)) }

// track notes a connection, unless the proxy has ended.
func (p *Proxy) track(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done {
		c.Close()
		return false
	}
	p.open[c] = true
	return true
}

func (p *Proxy) forget(c net.Conn) {
	c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, c)
}

func (p *Proxy) serve(near net.Conn) {
	if !p.track(near) {
		return
	}
	defer p.forget(near)
	far, err := p.space.DialContext(p.t.Context(), "tcp", p.to.String())
	if err != nil || !p.track(far) {
		return
	}
	defer p.forget(far)
	var both sync.WaitGroup
	both.Go(func() { p.copy(far, near) })
	both.Go(func() { p.copy(near, far) })
	both.Wait()
}

// copy passes on what one side sends, late, and then its end.
func (p *Proxy) copy(to, from net.Conn) {
	type piece struct {
		at   time.Time
		data []byte
	}
	pieces := make(chan piece, 1024)
	var writing sync.WaitGroup
	writing.Go(func() {
		for x := range pieces {
			time.Sleep(time.Until(x.at))
			if _, err := to.Write(x.data); err != nil && !errors.Is(err, net.ErrClosed) {
				from.Close()
			}
		}
	})
	for {
		b := make([]byte, 16<<10)
		n, err := from.Read(b)
		if n > 0 {
			pieces <- piece{time.Now().Add(time.Duration(p.delay.Load())), b[:n]}
		}
		if err != nil {
			break
		}
	}
	close(pieces)
	writing.Wait()
	to.Close()
}
