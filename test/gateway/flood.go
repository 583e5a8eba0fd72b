// This file is cases of egress with a node of their own: little room for flows, no ICMP sockets.

package main

import (
	"bytes"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// lone is a lab of one node with the flags, of the case alone.
func lone(t *trial, flags ...string) (*lab.Lab, *lab.Host) {
	l := lab.New(t, 1, lab.WithIPv6)
	h := l.Host(1)
	h.Up(append([]string{"--listen-etcd", h.Addr.String() + ":2379", "--network", overlayNet}, flags...)...)
	return l, h
}

func egressFlood(t *trial, _ *site) {
	l := lab.New(t, 1)
	h := l.Host(1)
	web := at(lab.OutsideAddr, 80)
	listen(t, l.Outside.Space, web, echo)
	var log lockedBuffer
	cmd := h.Command("/bin/sh", "-c", `ulimit -n 1024 && exec "$0" up "$@"`, h.Binary(), "--listen-etcd", h.Addr.String()+":2379", "--network", overlayNet)
	cmd.Stdout, cmd.Stderr = &log, &log
	t.must("node", h.Start(cmd))
	end := sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	t.Cleanup(end)
	lab.Eventually(t, "the daemon is ready", func() bool {
		r := h.CLI("status", "--output", "json")
		return r.Code == 0 && strings.Contains(r.Stdout, `"ready"`)
	})
	a := join(t, h, "a")
	conn, err := a.ListenPacket("udp4", "0.0.0.0:0")
	t.must("socket", err)
	defer conn.Close()
	for n := range uint16(9000) {
		// Errors are about earlier datagrams: ports of the outside are closed.
		_, _ = conn.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(at(lab.OutsideAddr, 10000+n)))
	}
	b := join(t, h, "b")
	c, err := dialWithin(t, b.Space, web, 5*time.Second)
	if err != nil {
		t.Errorf("another container's egress: %v", err)
	} else {
		exchange(t, c, 1000)
		c.Close()
	}
	ok(t, h.CLI("ps"))
	var status lab.Status
	h.CLIJSON(&status, "status")
	var bitten uint64
	for _, counters := range status.Counters {
		for name, n := range counters {
			if strings.Contains(name, "share") || strings.Contains(name, "limit") || strings.Contains(name, "full") {
				bitten += n
			}
		}
	}
	if bitten == 0 {
		t.Errorf("no counter says that a cap bit: %v", status.Counters)
	}
	end()
	if n := strings.Count(log.String(), "LimitNOFILE"); n != 1 {
		t.Errorf("the log names the remedy %d times, want once", n)
	}
	if strings.Contains(log.String(), "too many open files") {
		t.Errorf("the daemon ran out of descriptors")
	}
}

// lockedBuffer takes a program's output while it is read.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func egressNoForgedEcho(t *trial, _ *site) {
	l := lab.New(t, 1, lab.WithoutPing)
	h := l.Host(1)
	h.Up("--listen-etcd", h.Addr.String()+":2379", "--network", overlayNet)
	a := join(t, h, "a")
	r, err := a.PingWith(lab.OutsideAddr, lab.PingOptions{Count: 3, Interval: 300 * time.Millisecond})
	if err != nil || r.Received != 0 || len(r.Errors) == 0 {
		t.Fatalf("ping: %v, %v; want errors only", r, err)
	}
	if e := r.Errors[0]; e.Type != 3 || e.Code != 13 {
		t.Errorf("got %+v, want admin-prohibited (3, 13)", e)
	}
	if r, err := a.Ping(a.gateway, 3); err != nil || r.Lost() != 0 {
		t.Errorf("ping of the gateway: %v, %v", r, err)
	}
}
