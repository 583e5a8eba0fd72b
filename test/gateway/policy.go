// This file is the cases of what containers may do with each other.

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

var policyCases = []testCase{
	{name: "policy/isolate", about: "--isolate: no other container, of this node or another, either way; told at once; egress goes on", limit: 60 * time.Second, run: policyIsolate},
	{name: "policy/allow-from", about: "--allow-from CIDR:PORT/tcp: that and nothing else comes in; what it begins itself is answered", limit: 60 * time.Second, run: policyAllowFrom},
	{name: "policy/allow-to", about: "--allow-to: that and nothing else goes out; what others begin is answered", limit: 60 * time.Second, run: policyAllowTo},
	{name: "policy/isolate-but", about: "--isolate with lists: both directions are closed but for them", limit: 60 * time.Second, run: policyBut},
	{name: "policy/restart", about: "rules hold from the first packet after a restart of the daemon", limit: 60 * time.Second, run: policyRestart},
}

// served is a container that answers TCP and UDP on ports 80 and 81.
func served(t *trial, h *lab.Host, name string, flags ...string) *box {
	b := join(t, h, name, flags...)
	for _, port := range []uint16{80, 81} {
		listen(t, b.Space, at(netip.IPv4Unspecified(), port), echo)
		b.UDPEcho(t, at(netip.IPv4Unspecified(), port))
	}
	return b
}

// reaches fails the trial unless TCP, UDP and, if asked for, pings pass.
func (s *site) reaches(t *trial, from, to *box, port uint16) {
	what := fmt.Sprintf("%s to %s, port %d", from.Name, to.Name, port)
	t.check(what+", TCP", s.answers(t, from.Space, at(to.addr, port)))
	t.check(what+", UDP", s.echoUDP(t, from.Space, at(to.addr, port), 100))
}

// refuses fails the trial if anything passes, or the container is not told.
func (s *site) refuses(t *trial, from, to *box, port uint16) {
	what := fmt.Sprintf("%s to %s, port %d", from.Name, to.Name, port)
	c, err := dialWithin(t, from.Space, at(to.addr, port), 3*time.Second)
	if err == nil {
		c.Close()
		t.Errorf("%s: a connection stands", what)
	} else if isTimeout(err) {
		t.Errorf("%s: nobody told the container: %v", what, err)
	}
	u, err := from.DialContext(t.Context(), "udp", at(to.addr, port).String())
	t.must("socket", err)
	defer u.Close()
	_, _ = u.Write([]byte("x"))
	_ = u.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if _, err := u.Read(make([]byte, 10)); err == nil {
		t.Errorf("%s: a datagram is answered", what)
	}
}

func (s *site) noPing(t *trial, from, to *box) {
	if r, err := from.PingWith(to.addr, lab.PingOptions{Count: 2}); err != nil || r.Received > 0 {
		t.Errorf("ping from %s to %s: %v, %v; want no answer", from.Name, to.Name, r, err)
	}
}

func policyIsolate(t *trial, s *site) {
	alone := served(t, s.h, "alone", "--isolate")
	near, far := served(t, s.h, "near"), served(t, s.h2, "far")
	before := s.d.Drops("policy-denied")
	for _, other := range []*box{near, far} {
		s.refuses(t, alone, other, 80)
		s.refuses(t, other, alone, 80)
		s.noPing(t, alone, other)
		s.noPing(t, other, alone)
	}
	if s.d.Drops("policy-denied") == before {
		t.Errorf("no drop is counted: %v", s.d.Status().Counters["drops"])
	}
	s.reaches(t, near, far, 80)
	port := s.port()
	openDoor(t, s.Outside.Space, at(lab.OutsideAddr, port))
	t.check("egress", errors.Join(s.answers(t, alone.Space, at(lab.OutsideAddr, port)), s.echoUDP(t, alone.Space, at(lab.OutsideAddr, port), 10)))
	if r, err := alone.Ping(alone.gateway, 3); err != nil || r.Lost() != 0 {
		t.Errorf("ping of the gateway: %v, %v", r, err)
	}
}

func policyAllowFrom(t *trial, s *site) {
	near, far := served(t, s.h, "near"), served(t, s.h2, "far")
	web := served(t, s.h, "web", "--allow-from", far.addr.String()+"/32:80/tcp")
	t.check("what is listed", s.answers(t, far.Space, at(web.addr, 80)))
	s.refuses(t, far, web, 81)
	s.refuses(t, near, web, 80)
	s.noPing(t, far, web)
	if err := s.echoUDP(t, far.Space, at(web.addr, 80), 10); err == nil {
		t.Errorf("UDP passes where TCP is listed")
	}
	s.reaches(t, web, far, 81)
	s.reaches(t, web, near, 80)
	if r, err := web.Ping(far.addr, 3); err != nil || r.Lost() != 0 {
		t.Errorf("ping that it begins itself: %v, %v", r, err)
	}
}

func policyAllowTo(t *trial, s *site) {
	near, far := served(t, s.h, "near"), served(t, s.h2, "far")
	job := served(t, s.h, "job", "--allow-to", far.addr.String()+":80-80")
	s.reaches(t, job, far, 80)
	s.refuses(t, job, far, 81)
	s.refuses(t, job, near, 80)
	s.reaches(t, far, job, 80)
	s.reaches(t, near, job, 81)
}

func policyBut(t *trial, s *site) {
	near, far := served(t, s.h, "near"), served(t, s.h2, "far")
	db := served(t, s.h, "db", "--isolate", "--allow-from", near.addr.String()+":80", "--allow-to", far.addr.String()+":81")
	s.reaches(t, near, db, 80)
	s.refuses(t, near, db, 81)
	s.reaches(t, db, far, 81)
	s.refuses(t, db, far, 80)
	s.refuses(t, db, near, 80)
	s.refuses(t, far, db, 80)
}

func policyRestart(t *trial, _ *site) {
	l := lab.New(t, 1)
	h := l.Host(1)
	up := []string{"--listen-etcd", h.Addr.String() + ":2379", "--network", overlayNet}
	d := h.Up(up...)
	alone, other := join(t, h, "alone", "--isolate"), join(t, h, "other")
	pings, err := other.StartPing(alone.addr, lab.PingOptions{Interval: 5 * time.Millisecond})
	t.must("ping", err)
	d.Kill()
	h.Up(up...)
	lab.Eventually(t, "the other container is back", func() bool {
		r, err := other.Ping(other.gateway, 1)
		return err == nil && r.Received == 1
	})
	if r := pings.Stop(); r.Received != 0 {
		t.Errorf("echoes passed: %d", r.Received)
	}
}
