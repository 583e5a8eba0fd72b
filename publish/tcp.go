// This file is published TCP: accept, dial into the container, hand both on.

package publish

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"
)

// How long accept waits when the host has no descriptor or no memory left for the client who knocks. Each failure doubles it.
const acceptPause, acceptPauseMax = 5 * time.Millisecond, time.Second

// accept serves the clients of a listener until ctx is done, and returns when the last of their connections is closed.
func (p *Publication) accept(ctx context.Context, l *net.TCPListener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	pause := acceptPause
	for ctx.Err() == nil {
		host, err := l.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// The others are errors of the one connection (accept(2)), or want of something that comes back.
			if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM) {
				p.count.descriptors.Add(1)
			}
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			pause = min(2*pause, acceptPauseMax)
			continue
		}
		pause = acceptPause
		p.count.connections.Add(1)
		if p.count.active.Add(1) > uint64(p.limits.Connections) || !p.places.take() {
			p.count.active.Add(^uint64(0))
			p.count.tooMany.Add(1)
			reset(host)
			continue
		}
		wg.Go(func() {
			defer p.count.active.Add(^uint64(0))
			defer p.places.giveBack()
			p.serve(ctx, host)
		})
	}
}

// serve brings one client to the container. It returns when the connection is over.
func (p *Publication) serve(ctx context.Context, host *net.TCPConn) {
	client := host.RemoteAddr().(*net.TCPAddr).AddrPort()
	from, to, ok := p.addrs.Load().route(client, p.spec.Port, p.spec.SNAT)
	if !ok {
		p.count.noAddress.Add(1)
		reset(host)
		return
	}
	dial, cancel := context.WithTimeout(ctx, dialTimeout)
	container, err := p.inside.DialTCP(dial, from, to)
	cancel()
	switch {
	case err == nil:
		p.count.spliced.Add(1)
		p.join(ctx, host, container)
		return
	case errors.Is(err, errors.ErrUnsupported):
		p.count.carried.Add(1)
		err = p.inside.Carry(ctx, host, from, to)
	default:
		defer reset(host) // it is counted before anybody knows
	}
	switch {
	case err == nil || ctx.Err() != nil:
	case errors.Is(err, syscall.ECONNREFUSED):
		p.count.refused.Add(1)
	default:
		p.count.dial.Add(1)
		p.log.Debug("a client of a published port did not reach the container", "port", p.spec.HostPort, "client", client, "to", to, "error", err)
	}
}
