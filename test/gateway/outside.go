// This file is the cases of the host's way into the overlay: forward, the proxy, exec.

package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

var outsideCases = []testCase{
	{name: "outside/forward", about: "forward: a port of the host leads to a container of another node, by name and by address", run: outsideForward},
	{name: "outside/socks5", about: "up --proxy: SOCKS5, by name and by address", run: outsideSOCKS},
	{name: "outside/http-proxy", about: "up --proxy: HTTP CONNECT and plain requests", run: outsideHTTPProxy},
	{name: "outside/proxy-closed", about: "the proxy leads to the overlay only, and listens on the loopback only", run: outsideProxyClosed},
	{name: "outside/exec", about: "exec: a program of the host on the overlay, with the host's files", run: outsideExec},
}

// background runs rootless-ovl on a host until the trial ends.
func background(t *trial, h *lab.Host, args ...string) *lockedBuffer {
	cmd := h.Command(h.Binary(), args...)
	said := new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = said, said
	t.must(args[0], h.Start(cmd))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		if t.Failed() {
			t.Logf("%s said: %s", args[0], said)
		}
	})
	return said
}

func outsideForward(t *trial, s *site) {
	name := fmt.Sprint("web-", s.port())
	web := join(t, s.h2, name)
	listen(t, web.Space, at(netip.IPv4Unspecified(), 80), echo)
	byName, byAddr := s.port(), s.port()
	background(t, s.h, "forward", fmt.Sprint(byName), name+":80", fmt.Sprint(byAddr), at(web.addr, 80).String())
	for _, port := range []uint16{byName, byAddr} {
		to := at(loopback[false], port)
		lab.EventuallyWithin(t, 10*time.Second, "the forwarded port", func() bool { return s.answers(t, s.h.Space, to) == nil })
		exchange(t, s.mustDial(t, s.h.Space, to), transferSize)
		if err := s.answers(t, s.h2.Space, at(s.h.Addr, port)); err == nil {
			t.Errorf("the LAN reaches the forwarded port, which is the loopback's")
		}
	}
}

// proxied is a lab of two nodes, the first with a proxy, and a container of the second.
func proxied(t *trial) (l *lab.Lab, web *box, proxy netip.AddrPort) {
	l = lab.New(t, 2)
	h, h2 := l.Host(1), l.Host(2)
	proxy = at(loopback[false], 1080)
	h.Up("--listen-etcd", h.Addr.String()+":2379", "--network", overlayNet, "--proxy", proxy.String())
	h2.Up("--etcd-endpoints", "http://"+h.Addr.String()+":2379")
	web = join(t, h2, "web")
	// The first node knows the name when its own containers do.
	local := join(t, h, "local")
	soon(t, 5*time.Second, "known", func() error { return knows(local, "web"+domain, web.addr) })
	return l, web, proxy
}

// socks asks a SOCKS5 proxy (RFC 1928) for a connection and returns it with the proxy's reply code.
func socks(t *trial, from *lab.Space, proxy netip.AddrPort, host string, port uint16) (*net.TCPConn, byte) {
	c, err := dialWithin(t, from, proxy, 5*time.Second)
	t.must("proxy", err)
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = c.Write([]byte{5, 1, 0})
	b := make([]byte, 10)
	if _, err := io.ReadFull(c, b[:2]); err != nil || b[1] != 0 {
		t.Fatalf("the proxy's greeting: %v, %v", b[:2], err)
	}
	request := []byte{5, 1, 0}
	if addr, err := netip.ParseAddr(host); err == nil {
		request = append(append(request, 1), addr.AsSlice()...)
	} else {
		request = append(append(request, 3, byte(len(host))), host...)
	}
	_, _ = c.Write(binary.BigEndian.AppendUint16(request, port))
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatalf("the proxy's reply: %v", err)
	}
	return c, b[1]
}

func outsideSOCKS(t *trial, _ *site) {
	l, web, proxy := proxied(t)
	listen(t, web.Space, at(netip.IPv4Unspecified(), 80), echo)
	for _, host := range []string{"web.ovl.internal", web.addr.String()} {
		c, code := socks(t, l.Host(1).Space, proxy, host, 80)
		if code != 0 {
			t.Errorf("%s: reply %d", host, code)
			continue
		}
		exchange(t, c, 1<<20)
	}
}

func outsideHTTPProxy(t *trial, _ *site) {
	l, web, proxy := proxied(t)
	web.HTTPServer(t, at(netip.IPv4Unspecified(), 80))
	listen(t, web.Space, at(netip.IPv4Unspecified(), 81), echo)
	c, err := dialWithin(t, l.Host(1).Space, proxy, 5*time.Second)
	t.must("proxy", err)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = fmt.Fprintf(c, "CONNECT web.ovl.internal:81 HTTP/1.1\r\nHost: web.ovl.internal:81\r\n\r\n")
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("CONNECT: %v, %v", resp, err)
	} else {
		exchange(t, c, 1000)
	}
	c, err = dialWithin(t, l.Host(1).Space, proxy, 5*time.Second)
	t.must("proxy", err)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = fmt.Fprintf(c, "GET http://web.ovl.internal/bytes?n=1000 HTTP/1.1\r\nHost: web.ovl.internal\r\nConnection: close\r\n\r\n")
	resp, err = http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("GET: %v, %v", resp, err)
		return
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || len(b) != 1000 {
		t.Errorf("GET: %d bytes, %v", len(b), err)
	}
}

func outsideProxyClosed(t *trial, _ *site) {
	l, _, proxy := proxied(t)
	h := l.Host(1)
	d := openDoor(t, l.Outside.Space, at(lab.OutsideAddr, 80))
	own := openDoor(t, h.Space, at(loopback[false], 8080))
	for _, to := range []netip.AddrPort{at(lab.OutsideAddr, 80), at(loopback[false], 8080), at(h.Addr, 2379)} {
		if _, code := socks(t, h.Space, proxy, to.Addr().String(), to.Port()); code == 0 {
			t.Errorf("the proxy leads to %s", to)
		}
	}
	d.check(t, "the outside")
	own.check(t, "the host's loopback")
	if c, err := dialWithin(t, l.Host(2).Space, at(h.Addr, proxy.Port()), time.Second); err == nil {
		c.Close()
		t.Errorf("the LAN reaches the proxy")
	}
	local := join(t, h, "guest")
	if c, err := dialWithin(t, local.Space, at(local.gateway, proxy.Port()), time.Second); err == nil {
		c.Close()
		t.Errorf("a container reaches the proxy")
	}
}

func outsideExec(t *trial, s *site) {
	web := join(t, s.h2, fmt.Sprint("web-", s.port()))
	seen := make(chan netip.AddrPort, 1)
	listen(t, web.Space, at(netip.IPv4Unspecified(), 80), func(c *net.TCPConn) {
		seen <- remote(c)
		_, _ = io.WriteString(c, "hello")
	})
	r := ok(t, s.h.CLI("exec", "--", executable(t), fetchCommand, at(web.addr, 80).String()))
	if strings.TrimSpace(r.Stdout) != "hello" {
		t.Errorf("the program read %q", r.Stdout)
	}
	if got := taken(t, s, seen, "a connection").Addr(); got == s.h.Addr {
		t.Errorf("the container saw the host itself, %s", got)
	}
}
