// This file binds the host's sockets of a published port.

package publish

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// keepAlive finds clients that are gone for good; the default of package net asks idle ones every 15 seconds.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: 30 * time.Second, Count: 4}

const (
	// freeTries is how often a port is looked for that is free in both families.
	freeTries = 16
	// How often a patient one tries a port that is taken, and how long it waits before each time but the first.
	takenTries, takenPause = 3, 30 * time.Millisecond
)

func (p *Publication) listen(patient bool) error {
	both := !p.spec.HostAddr.IsValid()
	tries := 1
	if both && p.spec.HostPort == 0 {
		tries = freeTries
	}
	var err error
	for range tries {
		var port uint16
		if port, err = p.listenOn(p.spec.HostPort, both, patient); err == nil {
			p.spec.HostPort = port
			return nil
		}
		p.closeListeners()
		p.tcp, p.udp = nil, nil
		if !errors.Is(err, ErrPortTaken) {
			break
		}
	}
	return err
}

func (p *Publication) listenOn(port uint16, both, patient bool) (uint16, error) {
	if !both {
		return p.listenAt(netip.AddrPortFrom(p.spec.HostAddr, port), patient)
	}
	var missing error
	for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		got, err := p.listenAt(netip.AddrPortFrom(any, port), patient)
		switch {
		case err == nil:
			port = got
		case errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL):
			missing = err // a host without this family
		default:
			return 0, err
		}
	}
	if len(p.tcp)+len(p.udp) == 0 {
		return 0, missing
	}
	return port, nil
}

func (p *Publication) listenAt(at netip.AddrPort, patient bool) (port uint16, err error) {
	for i := range takenTries {
		if i > 0 {
			time.Sleep(takenPause)
		}
		if port, err = p.bind(at); !patient || !errors.Is(err, ErrPortTaken) {
			break
		}
	}
	return port, err
}

// bind makes one socket, of the address's family alone.
func (p *Publication) bind(at netip.AddrPort) (uint16, error) {
	family := "4"
	if at.Addr().Is6() {
		family = "6"
	}
	lc := net.ListenConfig{KeepAliveConfig: keepAlive}
	lc.SetMultipathTCP(false) // its connections cannot be spliced
	if p.spec.Proto == TCP {
		l, err := lc.Listen(context.Background(), TCP+family, at.String())
		if err != nil {
			return 0, refused(at, TCP, err)
		}
		p.tcp = append(p.tcp, l.(*net.TCPListener))
		return l.Addr().(*net.TCPAddr).AddrPort().Port(), nil
	}
	c, err := lc.ListenPacket(context.Background(), UDP+family, at.String())
	if err != nil {
		return 0, refused(at, UDP, err)
	}
	l, err := newUDPListener(p, c.(*net.UDPConn))
	if err != nil {
		c.Close()
		return 0, err
	}
	p.udp = append(p.udp, l)
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port(), nil
}
