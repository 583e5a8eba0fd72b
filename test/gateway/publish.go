// This file is the cases of published ports: what the LAN does with a container.

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

var publishCases = flat(
	both("publish/tcp", "8 MB from another host to a container and back", testCase{shared: true}, publishTCP),
	both("publish/udp", "datagrams of 1 to 1400 bytes and back", testCase{shared: true}, publishUDP),
	both("publish/udp-large", "datagrams of 9,000 bytes and back", testCase{shared: true}, publishUDPLarge),
	both("publish/source-tcp", "the container sees the client's own address and port", testCase{shared: true}, publishSourceTCP),
	both("publish/source-udp", "the container sees the client's own address and port, and its answers arrive", testCase{shared: true}, publishSourceUDP),
	both("publish/from-the-host", "the host itself reaches it by 127.0.0.1 or ::1, which the container never sees", testCase{shared: true}, publishFromHost),
	both("publish/half-close", "both halves of a connection end on their own", testCase{shared: true}, publishHalfClose),
	both("publish/reset", "resets pass in both directions", testCase{shared: true}, publishReset),
	both("publish/nobody-listens", "a client of a port that the container does not serve is turned away at once", testCase{shared: true}, publishNobody),
	[]testCase{
		{name: "publish/range", about: "100 TCP and 100 UDP ports as two ranges", shared: true, limit: 60 * time.Second, run: publishRange},
		{name: "publish/short", about: "2,000 connections that the server ends, 16 at a time", shared: true, limit: 60 * time.Second, run: publishShort},
		{name: "publish/two-clients", about: "UDP clients of two hosts and of many ports are kept apart", shared: true, run: publishClients},
		{name: "publish/at-runtime", about: "publish and unpublish while the container runs; ps lists it", run: publishAtRuntime},
		{name: "publish/one-address", about: "a port of one address of the host is not on the others", run: publishOneAddress},
		{name: "publish/conflict", about: "a port that another container has, or a program of the host: an error that names who", run: publishConflict},
		{name: "publish/privileged", about: "a port below 1024: an error that names net.ipv4.ip_unprivileged_port_start", run: publishPrivileged},
		{name: "publish/snat", about: "--snat: the container sees the gateway", run: publishSNAT},
		{name: "publish/other-route", about: "--snat serves a container whose default route is elsewhere", run: publishOtherRoute},
		{name: "publish/through-stack", about: "where no sockets can be had in the container's namespace: the same, by the gateway's stack", limit: 60 * time.Second, run: publishStack},
		{name: "publish/restart", about: "published ports come back with the daemon", limit: 60 * time.Second, run: publishRestart},
		{name: "publish/detach", about: "a detached container's ports are free again", run: publishDetach},
		{name: "publish/run", about: "run -p publishes for the time of the command", run: publishRun},
	},
)

const inside = 8080

// tcpPort publishes port 8080 of a new container and serves it there.
func (s *site) tcpPort(t *trial, v6 bool, serve func(*net.TCPConn)) (b *box, to netip.AddrPort) {
	p := published{host: s.port(), inside: inside, proto: "tcp"}
	b = s.boxOf(t, v6, p)
	if serve != nil {
		listen(t, b.Space, at(any6(v6), inside), serve)
	}
	return b, at(hostAddr(s.h, v6), p.host)
}

func publishTCP(t *trial, s *site, v6 bool) {
	_, to := s.tcpPort(t, v6, echo)
	exchange(t, s.mustDial(t, s.h2.Space, to), transferSize)
}

func publishUDP(t *trial, s *site, v6 bool) { publishedUDP(t, s, v6, 1, 512, 1200, 1400) }

func publishUDPLarge(t *trial, s *site, v6 bool) { publishedUDP(t, s, v6, 9000) }

func publishedUDP(t *trial, s *site, v6 bool, sizes ...int) {
	p := published{host: s.port(), inside: inside, proto: "udp"}
	b := s.boxOf(t, v6, p)
	b.UDPEcho(t, at(any6(v6), inside))
	for _, size := range sizes {
		t.check(fmt.Sprint(size, " bytes"), s.echoUDP(t, s.h2.Space, at(hostAddr(s.h, v6), p.host), size))
	}
}

func publishSourceTCP(t *trial, s *site, v6 bool) {
	seen := make(chan netip.AddrPort, 1)
	_, to := s.tcpPort(t, v6, func(c *net.TCPConn) {
		_, _ = c.Write([]byte{1})
		seen <- remote(c)
	})
	c := s.mustDial(t, s.h2.Space, to)
	if got := taken(t, s, seen, "a connection"); got != local(c) {
		t.Errorf("the container saw %s, want the client's own %s", got, local(c))
	}
	if n, err := c.Read(make([]byte, 1)); n != 1 {
		t.Errorf("the server's first byte: %v", err)
	}
}

func publishSourceUDP(t *trial, s *site, v6 bool) {
	p := published{host: s.port(), inside: inside, proto: "udp"}
	seen := s.boxOf(t, v6, p).UDPEcho(t, at(any6(v6), inside))
	c, err := s.h2.DialContext(t.Context(), "udp", at(hostAddr(s.h, v6), p.host).String())
	t.must("socket", err)
	defer c.Close()
	t.check("echo", s.echoOn(c.(*net.UDPConn), 100))
	got := taken(t, s, seen, "a datagram")
	got = at(got.Addr().Unmap(), got.Port())
	if want := c.LocalAddr().(*net.UDPAddr).AddrPort(); got != want {
		t.Errorf("the container saw %s, want the client's own %s", got, want)
	}
}

func publishFromHost(t *trial, s *site, v6 bool) {
	seen := make(chan netip.AddrPort, 1)
	_, to := s.tcpPort(t, v6, func(c *net.TCPConn) { seen <- remote(c) })
	loopback := map[bool]netip.Addr{false: netip.MustParseAddr("127.0.0.1"), true: netip.IPv6Loopback()}[v6]
	s.mustDial(t, s.h.Space, at(loopback, to.Port()))
	if got := taken(t, s, seen, "a connection"); got.Addr().IsLoopback() {
		t.Errorf("the container saw %s: it would take the host's programs for its own", got)
	}
}

func publishHalfClose(t *trial, s *site, v6 bool) {
	_, to := s.tcpPort(t, v6, answerAtEnd)
	halfCloseClient(t, s.mustDial(t, s.h2.Space, to))
	counted := make(chan int64, 1)
	_, to = s.tcpPort(t, v6, endThenCount(counted))
	halfCloseServer(t, s, s.mustDial(t, s.h2.Space, to), counted)
}

func publishReset(t *trial, s *site, v6 bool) {
	_, to := s.tcpPort(t, v6, resetAfterByte)
	seesReset(t, s.mustDial(t, s.h2.Space, to))
	ends := make(chan error, 1)
	_, to = s.tcpPort(t, v6, readToEnd(ends))
	resets(t, s, s.mustDial(t, s.h2.Space, to), ends)
}

func publishNobody(t *trial, s *site, v6 bool) {
	_, to := s.tcpPort(t, v6, nil)
	c, err := s.dial(t, s.h2.Space, to)
	if err == nil { // accepted on behalf of the container: then the connection must end at once
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(s.patience()))
		_, err = c.Read(make([]byte, 1))
	}
	if err == nil || isTimeout(err) {
		t.Errorf("a port that nobody serves: %v", err)
	}
}

func publishRange(t *trial, s *site) {
	const ports = 100
	first := s.port()
	s.next.Add(ports)
	b := s.box(t, published{host: first, inside: 7000, proto: "tcp", count: ports}, published{host: first, inside: 7000, proto: "udp", count: ports})
	for i := range uint16(ports) {
		listen(t, b.Space, at(netip.IPv4Unspecified(), 7000+i), func(c *net.TCPConn) { _, _ = fmt.Fprint(c, local(c).Port()) })
		b.UDPEcho(t, at(netip.IPv4Unspecified(), 7000+i))
	}
	errs := inParallel(t, 8, ports, func(i int) error {
		to := at(s.h.Addr, first+uint16(i))
		c, err := s.dial(t, s.h2.Space, to)
		if err != nil {
			return err
		}
		defer c.Close()
		var port int
		if _, err := fmt.Fscan(c, &port); err != nil || port != 7000+i {
			return fmt.Errorf("port %d answers at %s: %w", port, to, err)
		}
		return s.echoUDP(t, s.h2.Space, to, 100)
	})
	if len(errs) > 0 {
		t.Errorf("%d of %d ports fail, the first: %v", len(errs), ports, errs[0])
	}
}

func publishShort(t *trial, s *site) {
	_, to := s.tcpPort(t, false, oneByteThenEnd)
	errs := inParallel(t, 16, 2000, func(int) error {
		c, err := s.dial(t, s.h2.Space, to)
		if err != nil {
			return err
		}
		return shortConnection(c)
	})
	if len(errs) > 0 {
		t.Errorf("%d connections fail, the first: %v", len(errs), errs[0])
	}
}

func publishClients(t *trial, s *site) {
	p := published{host: s.port(), inside: inside, proto: "udp"}
	s.box(t, p).UDPEcho(t, at(netip.IPv4Unspecified(), inside))
	errs := inParallel(t, 8, 64, func(i int) error {
		from := s.h2.Space
		if i%2 == 1 {
			from = s.Outside.Space
		}
		return s.echoUDP(t, from, at(s.h.Addr, p.host), 100+i)
	})
	if len(errs) > 0 {
		t.Errorf("%d clients fail, the first: %v", len(errs), errs[0])
	}
}

// answers says whether a connection to the published port stands and is served.
func (s *site) answers(t *trial, from *lab.Space, to netip.AddrPort) error {
	c, err := s.dial(t, from, to)
	if err != nil {
		return err
	}
	defer c.Close()
	return exchanged(c, 1000)
}

func publishAtRuntime(t *trial, s *site) {
	b := s.box(t)
	listen(t, b.Space, at(netip.IPv4Unspecified(), inside), echo)
	b.UDPEcho(t, at(netip.IPv4Unspecified(), inside))
	port := s.port()
	to := at(s.h.Addr, port)
	if err := s.answers(t, s.h2.Space, to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("before: %v, want connection refused", err)
	}
	for _, proto := range []string{"tcp", "udp"} {
		ok(t, s.h.CLI("publish", fmt.Sprintf("%d:%d/%s", port, inside, proto), b.Name))
	}
	t.check("published", s.answers(t, s.h2.Space, to))
	t.check("published UDP", s.echoUDP(t, s.h2.Space, to, 100))
	if text := ok(t, s.h.CLI("ps")).Stdout; !strings.Contains(text, fmt.Sprint(port)) {
		t.Errorf("ps does not list port %d:\n%s", port, text)
	}
	for _, proto := range []string{"tcp", "udp"} {
		ok(t, s.h.CLI("unpublish", fmt.Sprintf("%d:%d/%s", port, inside, proto), b.Name))
	}
	if err := s.answers(t, s.h2.Space, to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("unpublished: %v, want connection refused", err)
	}
	if text := ok(t, s.h.CLI("ps")).Stdout; strings.Contains(text, fmt.Sprint(port)) {
		t.Errorf("ps still lists port %d:\n%s", port, text)
	}
}

func publishOneAddress(t *trial, s *site) {
	port := s.port()
	b := join(t, s.h, fmt.Sprint("box", s.port()), "-p", fmt.Sprintf("127.0.0.1:%d:%d", port, inside))
	listen(t, b.Space, at(netip.IPv4Unspecified(), inside), echo)
	t.check("at its address", s.answers(t, s.h.Space, at(netip.MustParseAddr("127.0.0.1"), port)))
	for from, to := range map[*lab.Space]netip.Addr{s.h2.Space: s.h.Addr, s.h.Space: s.h.Addr} {
		if err := s.answers(t, from, at(to, port)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("at %s: %v, want connection refused", to, err)
		}
	}
}

// refused fails the trial unless the program ended with one line of error that holds each of the words.
func refused(t *trial, r lab.Result, words ...string) {
	line := strings.TrimSuffix(r.Stderr, "\n")
	if r.Code == 0 || line == "" || strings.Contains(line, "\n") {
		t.Errorf("want one line of error, got exit code %d, %q (stdout %q)", r.Code, r.Stderr, r.Stdout)
		return
	}
	for _, word := range words {
		if !strings.Contains(line, word) {
			t.Errorf("the error does not say %q: %s", word, line)
		}
	}
}

func publishConflict(t *trial, s *site) {
	first, to := s.tcpPort(t, false, echo)
	second := s.box(t)
	spec := fmt.Sprintf("%d:%d", to.Port(), inside)
	refused(t, s.h.CLI("publish", spec, second.Name), first.Name, fmt.Sprint(to.Port()))
	t.check("the first keeps it", s.answers(t, s.h2.Space, to))
	// Nor does an attach half succeed.
	third := s.h.Container(fmt.Sprint("box", s.port()))
	refused(t, s.h.CLI("attach", fmt.Sprint(third.PID), "--name", third.Name, "-p", spec), first.Name, fmt.Sprint(to.Port()))
	if all, err := third.Interfaces(); err != nil || len(all) != 0 {
		t.Errorf("the container whose port was refused is left with %v, %v", all, err)
	}
	taken := s.port()
	listen(t, s.h.Space, at(netip.IPv4Unspecified(), taken), echo)
	refused(t, s.h.CLI("publish", fmt.Sprintf("%d:%d", taken, inside), second.Name), fmt.Sprint(taken), "another program")
}

func publishPrivileged(t *trial, s *site) {
	refused(t, s.h.CLI("publish", "443:8080", s.box(t).Name), "443", "net.ipv4.ip_unprivileged_port_start")
}

func publishSNAT(t *trial, s *site) {
	port := s.port()
	b := join(t, s.h, fmt.Sprint("box", port), "--snat", "-p", fmt.Sprintf("%d:%d", port, inside), "-p", fmt.Sprintf("%d:%d/udp", port, inside))
	seen := make(chan netip.AddrPort, 1)
	listen(t, b.Space, at(netip.IPv4Unspecified(), inside), func(c *net.TCPConn) {
		seen <- remote(c)
		echo(c)
	})
	t.check("TCP", s.answers(t, s.h2.Space, at(s.h.Addr, port)))
	if got := taken(t, s, seen, "a connection").Addr(); got != b.gateway {
		t.Errorf("the container saw %s, want its gateway %s", got, b.gateway)
	}
	datagrams := b.UDPEcho(t, at(netip.IPv4Unspecified(), inside))
	t.check("UDP", s.echoUDP(t, s.h2.Space, at(s.h.Addr, port), 100))
	if got := taken(t, s, datagrams, "a datagram").Addr().Unmap(); got != b.gateway {
		t.Errorf("the container saw datagrams of %s, want its gateway %s", got, b.gateway)
	}
}

func publishOtherRoute(t *trial, s *site) {
	port := s.port()
	b := join(t, s.h, fmt.Sprint("box", port), "--snat", "--no-default-route", "-p", fmt.Sprintf("%d:%d", port, inside), "-p", fmt.Sprintf("%d:%d/udp", port, inside))
	listen(t, b.Space, at(netip.IPv4Unspecified(), inside), echo)
	b.UDPEcho(t, at(netip.IPv4Unspecified(), inside))
	t.check("TCP", s.answers(t, s.h2.Space, at(s.h.Addr, port)))
	t.check("UDP", s.echoUDP(t, s.h2.Space, at(s.h.Addr, port), 100))
}

// publishStack keeps the node from using sockets in the container's namespace: what they mark does not come back to them.
func publishStack(t *trial, s *site) {
	port := s.port()
	c := s.h.Container(fmt.Sprint("box", port))
	t.must("rule", c.MarkToMain(0x6f760000, 0xffff0000))
	b := attachTo(t, c, "-p", fmt.Sprintf("%d-%d:%d-%d", port, port+3, inside, inside+3))
	s.next.Add(3)
	for _, v6 := range []bool{false, true} {
		to := hostAddr(s.h, v6)
		seen := make(chan netip.AddrPort, 1)
		listen(t, b.Space, at(any6(v6), inside), func(c *net.TCPConn) {
			seen <- remote(c)
			echo(c)
		})
		conn := s.mustDial(t, s.h2.Space, at(to, port))
		exchange(t, conn, transferSize)
		if got := taken(t, s, seen, "a connection"); got != local(conn) {
			t.Errorf("the container saw %s, want the client's own %s", got, local(conn))
		}
		listen(t, b.Space, at(any6(v6), inside+1), answerAtEnd)
		halfCloseClient(t, s.mustDial(t, s.h2.Space, at(to, port+1)))
		listen(t, b.Space, at(any6(v6), inside+2), resetAfterByte)
		seesReset(t, s.mustDial(t, s.h2.Space, at(to, port+2)))
		ends := make(chan error, 1)
		listen(t, b.Space, at(any6(v6), inside+3), readToEnd(ends))
		resets(t, s, s.mustDial(t, s.h2.Space, at(to, port+3)), ends)
	}
}

func publishRestart(t *trial, _ *site) {
	l := lab.New(t, 2)
	h, h2 := l.Host(1), l.Host(2)
	up := []string{"--listen-etcd", h.Addr.String() + ":2379", "--network", overlayNet}
	d := h.Up(up...)
	b := join(t, h, "a", "-p", "8080:8080", "-p", "5353:5353/udp")
	seen := make(chan netip.AddrPort, 10)
	listen(t, b.Space, at(netip.IPv4Unspecified(), inside), func(c *net.TCPConn) {
		seen <- remote(c)
		echo(c)
	})
	datagrams := b.UDPEcho(t, at(netip.IPv4Unspecified(), 5353))
	s := &site{system: systemOurs}
	for i, stop := range []func(){nil, func() { d.Stop() }, d.Kill} {
		if stop != nil {
			stop()
			d = h.Up(up...)
		}
		t.check(fmt.Sprint("TCP, start ", i+1), s.answers(t, h2.Space, at(h.Addr, 8080)))
		if got := taken(t, s, seen, "a connection").Addr(); got != h2.Addr {
			t.Errorf("start %d: the container saw %s, want %s", i+1, got, h2.Addr)
		}
		t.check(fmt.Sprint("UDP, start ", i+1), s.echoUDP(t, h2.Space, at(h.Addr, 5353), 100))
		if got := taken(t, s, datagrams, "a datagram").Addr().Unmap(); got != h2.Addr {
			t.Errorf("start %d: the container saw datagrams of %s, want %s", i+1, got, h2.Addr)
		}
	}
}

func publishDetach(t *trial, s *site) {
	b, to := s.tcpPort(t, false, echo)
	t.check("before", s.answers(t, s.h2.Space, to))
	ok(t, s.h.CLI("detach", b.Name))
	if err := s.answers(t, s.h2.Space, to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after: %v, want connection refused", err)
	}
	other := s.box(t)
	listen(t, other.Space, at(netip.IPv4Unspecified(), inside), echo)
	ok(t, s.h.CLI("publish", fmt.Sprintf("%d:%d", to.Port(), inside), other.Name))
	t.check("another container's", s.answers(t, s.h2.Space, to))
}

func publishRun(t *trial, s *site) {
	port := s.port()
	cmd := s.h.Command(s.h.Binary(), "run", "-p", fmt.Sprintf("%d:%d", port, inside), "--",
		executable(t), serveOnceCommand, fmt.Sprint(inside))
	var said lockedBuffer
	cmd.Stdout, cmd.Stderr = &said, &said
	t.must("run", s.h.Start(cmd))
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	var got string
	lab.EventuallyWithin(t, 15*time.Second, "the command's port", func() bool {
		c, err := s.dial(t, s.h2.Space, at(s.h.Addr, port))
		if err != nil {
			return false
		}
		defer c.Close()
		b := make([]byte, 100)
		n, err := c.Read(b)
		got = string(b[:n])
		return err == nil
	})
	if got != s.h2.Addr.String() {
		t.Errorf("the command saw %q, want %s", got, s.h2.Addr)
	}
	if err := taken(t, s, done, "the command's end"); err != nil {
		t.Errorf("run: %v\n%s", err, said.String())
	}
	if err := s.answers(t, s.h2.Space, at(s.h.Addr, port)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after the command: %v, want connection refused", err)
	}
}
