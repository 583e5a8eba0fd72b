// This file is the cases of egress: what a container does with the outside.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// both is a case for each family.
func both(name, about string, c testCase, run func(t *trial, s *site, v6 bool)) []testCase {
	var cases []testCase
	for _, v6 := range []bool{false, true} {
		v := c
		v.name, v.about = name+"-v"+family(v6), about+", IPv"+family(v6)
		v.run = func(t *trial, s *site) { run(t, s, v6) }
		cases = append(cases, v)
	}
	return cases
}

// boxOf is a box that has the family: without, a case would pass that wants something unreachable.
func (s *site) boxOf(t *trial, v6 bool, ports ...published) *box {
	b := s.box(t, ports...)
	if !v6 {
		return b
	}
	if s.noIPv6 {
		t.Fatalf("the container has no IPv6")
	}
	s.noIPv6 = true // unless this one comes to it
	lab.EventuallyWithin(t, 5*time.Second, "the container has an IPv6 address and default route", func() bool {
		routes, err := b.Routes6()
		if _, b.addr6 = addresses(t, b.Container); err != nil || !b.addr6.IsValid() {
			return false
		}
		return slices.ContainsFunc(routes, func(r string) bool { return strings.HasPrefix(r, "default") })
	})
	s.noIPv6 = false
	return b
}

func flat(lists ...[]testCase) []testCase {
	var all []testCase
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}

var egressCases = flat(
	both("egress/tcp", "8 MB to a server and back", testCase{shared: true}, egressTCP),
	both("egress/source", "the outside sees the host's address", testCase{shared: true}, egressSource),
	both("egress/half-close-client", "the container ends its half first and reads on", testCase{shared: true}, egressHalfCloseClient),
	both("egress/half-close-server", "the server ends its half first and reads on", testCase{shared: true}, egressHalfCloseServer),
	both("egress/reset-by-server", "a reset reaches the container as a reset", testCase{shared: true}, egressResetByServer),
	both("egress/reset-by-client", "a reset of the container's reaches the server as one", testCase{shared: true}, egressResetByClient),
	both("egress/refused", "a closed TCP port refuses, and the connection never seems to stand", testCase{shared: true}, egressRefused),
	both("egress/unreachable", "a network without a route is unreachable", testCase{shared: true}, egressUnreachable),
	both("egress/silent", "a connection to where nobody answers is never accepted", testCase{shared: true}, egressSilent),
	both("egress/udp", "datagrams of 1 to 1400 bytes and back", testCase{shared: true}, egressUDP),
	both("egress/udp-large", "datagrams of 9,000 and 65,507 bytes and back", testCase{shared: true}, egressUDPLarge),
	both("egress/udp-refused", "a closed UDP port is told to the container", testCase{shared: true}, egressUDPRefused),
	both("egress/udp-one-socket", "one socket speaks with 50 ports at once", testCase{shared: true}, egressUDPOneSocket),
	both("egress/ping", "echo, 56 and 4,000 bytes", testCase{shared: true}, egressPing),
	both("egress/traceroute", "UDP traceroute sees every router by its own address", testCase{shared: true}, egressTraceroute),
	both("egress/path-mtu-udp", "don't-fragment datagrams learn the path MTU and then pass", testCase{shared: true}, egressPathMTU),
	both("egress/path-mtu-tcp", "TCP passes a narrow tunnel, both ways", testCase{shared: true}, egressTunnel),
	both("egress/many-ports", "200 TCP and 200 UDP ports of one host", testCase{shared: true}, egressManyPorts),
	both("egress/server-closes-first", "2,000 connections that the server ends, 16 at a time", testCase{shared: true, limit: 60 * time.Second}, egressServerCloses),
	[]testCase{
		{name: "egress/at-once", about: "64 connections move data at once", shared: true, limit: 60 * time.Second, run: egressAtOnce},
		{name: "egress/idle", about: "connections that were idle for 5 s still stand, with keepalives of the server's", shared: true, run: egressIdle},
		{name: "egress/container-ends", about: "a server learns that a container was detached", run: egressContainerEnds},
		{name: "egress/gateway-ping", about: "the gateway answers pings, large ones too", run: egressGatewayPing},
		{name: "egress/flood-of-flows", about: "a container that opens all flows it can takes none from others; a counter and one line say so", limit: 60 * time.Second, run: egressFlood},
		{name: "egress/no-forged-echo", about: "without permission for ICMP sockets: prohibited, and no made-up answer", run: egressNoForgedEcho},
	},
)

const transferSize = 8 << 20

func egressTCP(t *trial, s *site, v6 bool) {
	to := at(outsideAddr(v6), s.port())
	listen(t, s.Outside.Space, to, echo)
	exchange(t, s.mustDial(t, s.boxOf(t, v6).Space, to), transferSize)
}

// exchange sends n bytes to an echo server, ends its half, and checks what comes back.
func exchange(t *trial, c *net.TCPConn, n int) {
	t.check("exchange", exchanged(c, n))
}

func exchanged(c *net.TCPConn, n int) error {
	want := lab.Pattern(n)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err = errors.Join(err, <-sent); err != nil {
		return fmt.Errorf("%d of %d bytes came back: %w", len(got), n, err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%d bytes came back for %d, or others", len(got), n)
	}
	return nil
}

func egressSource(t *trial, s *site, v6 bool) {
	to := at(outsideAddr(v6), s.port())
	seen := make(chan netip.AddrPort, 1)
	listen(t, s.Outside.Space, to, func(c *net.TCPConn) { seen <- remote(c) })
	s.mustDial(t, s.boxOf(t, v6).Space, to)
	if got, want := taken(t, s, seen, "a connection").Addr(), hostAddr(s.h, v6); got != want {
		t.Errorf("the outside saw %s, want the host's %s", got, want)
	}
}

func remote(c net.Conn) netip.AddrPort {
	a := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func local(c net.Conn) netip.AddrPort {
	a := c.LocalAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// answerAtEnd reads to the end and only then says how much it was.
func answerAtEnd(c *net.TCPConn) {
	n, err := io.Copy(io.Discard, c)
	_, _ = fmt.Fprintf(c, "%d %v", n, err)
}

func egressHalfCloseClient(t *trial, s *site, v6 bool) {
	to := at(outsideAddr(v6), s.port())
	listen(t, s.Outside.Space, to, answerAtEnd)
	halfCloseClient(t, s.mustDial(t, s.boxOf(t, v6).Space, to))
}

func halfCloseClient(t *trial, c *net.TCPConn) {
	_, err := c.Write(lab.Pattern(100_000))
	t.must("send", errors.Join(err, c.CloseWrite()))
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "100000 <nil>" {
		t.Errorf("after its half was closed the container read %q, %v", got, err)
	}
}

func egressHalfCloseServer(t *trial, s *site, v6 bool) {
	to := at(outsideAddr(v6), s.port())
	counted := make(chan int64, 1)
	listen(t, s.Outside.Space, to, endThenCount(counted))
	halfCloseServer(t, s, s.mustDial(t, s.boxOf(t, v6).Space, to), counted)
}

// endThenCount is a server that says a word, ends its half and counts what comes.
func endThenCount(counted chan<- int64) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "over to you")
		_ = c.CloseWrite()
		n, err := io.Copy(io.Discard, c)
		if err == nil {
			counted <- n
		}
	}
}

func halfCloseServer(t *trial, s *site, c *net.TCPConn, counted <-chan int64) {
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "over to you" {
		t.Errorf("read %q, %v", got, err)
	}
	_, err = c.Write(lab.Pattern(100_000))
	t.must("send after the server's end", errors.Join(err, c.CloseWrite()))
	if n := taken(t, s, counted, "what comes after the server's end"); n != 100_000 {
		t.Errorf("the server counted %d bytes after its end, want 100000", n)
	}
}

// resetNow closes with a reset.
func resetNow(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

func resetAfterByte(c *net.TCPConn) {
	_, _ = io.ReadFull(c, make([]byte, 1))
	resetNow(c)
}

func egressResetByServer(t *trial, s *site, v6 bool) {
	to := at(outsideAddr(v6), s.port())
	listen(t, s.Outside.Space, to, resetAfterByte)
	seesReset(t, s.mustDial(t, s.boxOf(t, v6).Space, to))
}

func seesReset(t *trial, c *net.TCPConn) {
	_, err := c.Write([]byte{1})
	t.must("send", err)
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d, %v; want a reset", n, err)
	}
}

func egressResetByClient(t *trial, s *site, v6 bool) {
	to := at(outsideAddr(v6), s.port())
	ends := make(chan error, 1)
	listen(t, s.Outside.Space, to, readToEnd(ends))
	resets(t, s, s.mustDial(t, s.boxOf(t, v6).Space, to), ends)
}

// readToEnd is a server that tells how a connection ended, after it said that it is there.
func readToEnd(ends chan<- error) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		_, _ = c.Write([]byte{1})
		_, err := io.Copy(io.Discard, c)
		ends <- err
	}
}

func resets(t *trial, s *site, c *net.TCPConn, ends <-chan error) {
	_, err := io.ReadFull(c, make([]byte, 1))
	t.must("the server's first byte", err)
	resetNow(c)
	if err := taken(t, s, ends, "the end of the connection"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server saw %v, want a reset", err)
	}
}

func egressRefused(t *trial, s *site, v6 bool) {
	if _, err := s.dial(t, s.boxOf(t, v6).Space, at(outsideAddr(v6), 81)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connect: %v, want connection refused", err)
	}
}

// Addresses that the outside has no route to, and where it drops what comes.
var (
	nowhere = map[bool]netip.Addr{false: netip.MustParseAddr("203.0.113.99"), true: netip.MustParseAddr("2001:db8:0:203::99")}
	silent  = map[bool]netip.Prefix{false: netip.MustParsePrefix("203.0.113.128/25"), true: netip.MustParsePrefix("2001:db8:0:204::/64")}
)

func egressUnreachable(t *trial, s *site, v6 bool) {
	_, err := s.dial(t, s.boxOf(t, v6).Space, at(nowhere[v6], 80))
	if !errors.Is(err, syscall.ENETUNREACH) && !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("connect: %v, want unreachable", err)
	}
}

func egressSilent(t *trial, s *site, v6 bool) {
	t.must("black hole", s.Outside.Blackhole(silent[v6]))
	c, err := dialWithin(t, s.boxOf(t, v6).Space, at(silent[v6].Addr().Next(), 80), 1500*time.Millisecond)
	if err == nil {
		c.Close()
		t.Errorf("a connection to where nobody answers stands")
	} else if !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
		t.Errorf("connect: %v, want no answer yet", err)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

func egressUDP(t *trial, s *site, v6 bool) { echoesUDP(t, s, v6, 1, 512, 1200, 1400) }

func egressUDPLarge(t *trial, s *site, v6 bool) { echoesUDP(t, s, v6, 9000, 65507) }

func echoesUDP(t *trial, s *site, v6 bool, sizes ...int) {
	to := at(outsideAddr(v6), s.port())
	s.Outside.UDPEcho(t, to)
	b := s.boxOf(t, v6)
	for _, size := range sizes {
		t.check(strconv.Itoa(size)+" bytes", s.echoUDP(t, b.Space, to, size))
	}
}

// echoUDP sends a datagram and waits for the same, a few times over, since datagrams may be lost.
func (s *site) echoUDP(t *trial, from *lab.Space, to netip.AddrPort, size int) error {
	c, err := from.DialContext(t.Context(), "udp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	return s.echoOn(c.(*net.UDPConn), size)
}

func (s *site) echoOn(c *net.UDPConn, size int) error {
	_ = c.SetWriteBuffer(1 << 20)
	want, got := lab.Pattern(size), make([]byte, 70000)
	var err error
	for range 4 {
		if _, err = c.Write(want); err != nil {
			continue
		}
		_ = c.SetReadDeadline(time.Now().Add(s.patience() / 4))
		var n int
		if n, err = c.Read(got); err == nil && !bytes.Equal(got[:n], want) {
			return fmt.Errorf("%d bytes came back for %d, or others", n, size)
		}
		if err == nil {
			return nil
		}
	}
	return err
}

func egressUDPRefused(t *trial, s *site, v6 bool) {
	c, err := s.boxOf(t, v6).DialContext(t.Context(), "udp", at(outsideAddr(v6), 81).String())
	t.must("socket", err)
	defer c.Close()
	for range 10 {
		_, _ = c.Write([]byte("x"))
		_ = c.SetReadDeadline(time.Now().Add(s.patience() / 10))
		if _, err = c.Read(make([]byte, 10)); errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
	}
	t.Errorf("a closed port: %v, want connection refused", err)
}

func egressUDPOneSocket(t *trial, s *site, v6 bool) {
	const ports = 50
	first := s.port()
	s.next.Add(ports)
	for i := range uint16(ports) {
		s.Outside.UDPEcho(t, at(outsideAddr(v6), first+i))
	}
	c, err := s.boxOf(t, v6).ListenPacket("udp"+family(v6), at(any6(v6), 0).String())
	t.must("socket", err)
	defer c.Close()
	left := map[uint16]bool{}
	for i := range uint16(ports) {
		left[first+i] = true
	}
	for range 4 {
		for port := range left {
			_, _ = c.WriteTo(binary.BigEndian.AppendUint16(nil, port), net.UDPAddrFromAddrPort(at(outsideAddr(v6), port)))
		}
		_ = c.SetReadDeadline(time.Now().Add(s.patience() / 4))
		for b := make([]byte, 10); len(left) > 0; {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				break
			}
			if source := from.(*net.UDPAddr).AddrPort(); n != 2 || binary.BigEndian.Uint16(b) != source.Port() || source.Addr().Unmap() != outsideAddr(v6) {
				t.Fatalf("%x came from %s", b[:n], source)
			}
			delete(left, from.(*net.UDPAddr).AddrPort().Port())
		}
	}
	if len(left) > 0 {
		t.Errorf("%d of %d ports never answered", len(left), ports)
	}
}

func egressPing(t *trial, s *site, v6 bool) {
	b := s.boxOf(t, v6)
	for _, size := range []int{56, 4000} {
		r, err := b.PingWith(outsideAddr(v6), lab.PingOptions{Count: 3, Size: size})
		if err != nil || r.Lost() != 0 {
			t.Errorf("%d bytes: %v, %v", size, r, err)
		}
	}
}

// probe is what came back of a UDP datagram that was not to arrive: an ICMP error, as a traceroute reads it.
type probe struct {
	from  netip.Addr
	errno syscall.Errno
}

// traceProbe sends a datagram with a hop limit and reads the error queue. The zero probe: nothing came.
func (s *site) traceProbe(from *lab.Space, to netip.AddrPort, hops int) (p probe, err error) {
	err = from.Do(func() error {
		domain, level, recvErr, ttl := unix.AF_INET, unix.IPPROTO_IP, unix.IP_RECVERR, unix.IP_TTL
		if to.Addr().Is6() {
			domain, level, recvErr, ttl = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, unix.IPV6_UNICAST_HOPS
		}
		fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := errors.Join(unix.SetsockoptInt(fd, level, recvErr, 1), unix.SetsockoptInt(fd, level, ttl, hops)); err != nil {
			return err
		}
		if err := unix.Sendto(fd, []byte("probe"), 0, sockaddr(to)); err != nil {
			return err
		}
		for deadline := time.Now().Add(s.patience() / 4); time.Now().Before(deadline); {
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, 50)
			var data, oob [512]byte
			_, n, _, _, err := unix.Recvmsg(fd, data[:], oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if err != nil {
				continue
			}
			messages, err := unix.ParseSocketControlMessage(oob[:n])
			if err != nil {
				return err
			}
			for _, m := range messages {
				if int(m.Header.Level) == level && int(m.Header.Type) == recvErr {
					p = parseExtendedError(m.Data)
				}
			}
			return nil
		}
		return nil
	})
	return p, err
}

// parseExtendedError reads a struct sock_extended_err and the offender's address behind it (ip(7)):
//
//	0   4      5    6    7   8    12   16
//	errno origin type code - info data sockaddr of the offender
func parseExtendedError(b []byte) (p probe) {
	if len(b) < 16+8 {
		return p
	}
	p.errno = syscall.Errno(binary.NativeEndian.Uint32(b))
	switch offender := b[16:]; binary.NativeEndian.Uint16(offender) {
	case unix.AF_INET:
		p.from = netip.AddrFrom4([4]byte(offender[4:8]))
	case unix.AF_INET6:
		if len(offender) >= 24 {
			p.from = netip.AddrFrom16([16]byte(offender[8:24]))
		}
	}
	return p
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// The routers on the way to the far host, and the host.
func (s *site) way(v6 bool) []netip.Addr {
	if v6 {
		return []netip.Addr{netip.MustParseAddr("2001:db8:0:2::2"), netip.MustParseAddr("2001:db8:0:5101::2"), s.far.Addr6}
	}
	return []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("198.51.100.130"), s.far.Addr}
}

func egressTraceroute(t *trial, s *site, v6 bool) {
	b := s.boxOf(t, v6)
	way := s.way(v6)
	target := way[len(way)-1]
	var seen []string
	met := 0
	for hops := 1; hops <= len(way)+2; hops++ {
		var p probe
		for range 2 { // an ICMP error may be lost
			var err error
			p, err = s.traceProbe(b.Space, at(target, uint16(33434+hops)), hops)
			t.must("probe", err)
			if p.from.IsValid() {
				break
			}
		}
		seen = append(seen, fmt.Sprintf("%s (%v)", p.from, p.errno))
		if met < len(way) && p.from == way[met] {
			met++
		}
		if p.from == target || met == 0 && hops == 2 {
			break
		}
	}
	if met != len(way) {
		t.Errorf("saw %v, want %v after at most a hop of the gateway", seen, way)
	}
}

// egressPathMTU has no route that is narrower than the LAN but the tunnel, so the container must be told.
func egressPathMTU(t *trial, s *site, v6 bool) {
	to := at(hostAddr(s.far, v6), s.port())
	s.far.UDPEcho(t, to)
	conn, err := s.boxOf(t, v6).DialContext(t.Context(), "udp", to.String())
	t.must("socket", err)
	defer conn.Close()
	c := conn.(*net.UDPConn)
	level, discover, do, mtu, headers := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO, unix.IP_MTU, 28
	if v6 {
		level, discover, do, mtu, headers = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO, unix.IPV6_MTU, 48
	}
	t.must("don't fragment", control(c, func(fd int) error { return unix.SetsockoptInt(fd, level, discover, do) }))
	known := 0
	for range 20 {
		_, _ = c.Write(make([]byte, tunnelMTU+40-headers))
		_ = c.SetReadDeadline(time.Now().Add(s.patience() / 20))
		_, _ = c.Read(make([]byte, 2000))
		t.must("path MTU", control(c, func(fd int) (err error) {
			known, err = unix.GetsockoptInt(fd, level, mtu)
			return err
		}))
		if known <= tunnelMTU {
			break
		}
	}
	if known > tunnelMTU || known < tunnelMTU-100 {
		t.Errorf("the container takes the path MTU for %d, want %d", known, tunnelMTU)
		return
	}
	t.check("a datagram that just fits", s.echoOn(c, known-headers))
}

func control(c *net.UDPConn, fn func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	return errors.Join(raw.Control(func(fd uintptr) { inner = fn(int(fd)) }), inner)
}

func egressTunnel(t *trial, s *site, v6 bool) {
	to := at(hostAddr(s.far, v6), s.port())
	listen(t, s.far.Space, to, echo)
	exchange(t, s.mustDial(t, s.boxOf(t, v6).Space, to), 1<<20)
}

func egressManyPorts(t *trial, s *site, v6 bool) {
	const ports = 200
	first := s.port()
	s.next.Add(ports)
	for i := range uint16(ports) {
		to := at(outsideAddr(v6), first+i)
		listen(t, s.Outside.Space, to, echo)
		s.Outside.UDPEcho(t, to)
	}
	b := s.boxOf(t, v6)
	errs := inParallel(t, 8, ports, func(i int) error {
		to := at(outsideAddr(v6), first+uint16(i))
		c, err := s.dial(t, b.Space, to)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := exchanged(c, 100); err != nil {
			return err
		}
		return s.echoUDP(t, b.Space, to, 100)
	})
	if len(errs) > 0 {
		t.Errorf("%d of %d ports fail, the first with: %v", len(errs), ports, errs[0])
	}
}

// inParallel calls fn for 0 to n-1, workers at a time, and gives up after 2 errors.
func inParallel(t *trial, workers, n int, fn func(i int) error) []error {
	var mu sync.Mutex
	var errs []error
	next := 0
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for t.Context().Err() == nil {
				mu.Lock()
				i, enough := next, len(errs) >= 2
				next++
				mu.Unlock()
				if i >= n || enough {
					return
				}
				if err := fn(i); err != nil {
					mu.Lock()
					errs = append(errs, fmt.Errorf("%d: %w", i, err))
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return errs
}

// oneByteThenEnd answers one byte with one byte and ends first, as many servers do.
func oneByteThenEnd(c *net.TCPConn) {
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err == nil {
		_, _ = c.Write(b[:])
	}
}

// shortConnection is a request, an answer and the server's end.
func shortConnection(c *net.TCPConn) error {
	defer c.Close()
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && len(b) != 1 {
		err = fmt.Errorf("%d bytes for an answer instead of one", len(b))
	}
	return err
}

func egressServerCloses(t *trial, s *site, v6 bool) {
	to := at(outsideAddr(v6), s.port())
	listen(t, s.Outside.Space, to, oneByteThenEnd)
	b := s.boxOf(t, v6)
	errs := inParallel(t, 16, 2000, func(int) error {
		c, err := s.dial(t, b.Space, to)
		if err != nil {
			return err
		}
		return shortConnection(c)
	})
	if len(errs) > 0 {
		t.Errorf("%d connections fail, the first: %v", len(errs), errs[0])
	}
}

func egressAtOnce(t *trial, s *site) {
	to := at(lab.OutsideAddr, s.port())
	listen(t, s.Outside.Space, to, echo)
	b := s.box(t)
	errs := inParallel(t, 64, 64, func(int) error {
		c, err := s.dial(t, b.Space, to)
		if err != nil {
			return err
		}
		defer c.Close()
		return exchanged(c, 256<<10)
	})
	if len(errs) > 0 {
		t.Errorf("%d connections fail, the first: %v", len(errs), errs[0])
	}
}

func egressIdle(t *trial, s *site) {
	to := at(lab.OutsideAddr, s.port())
	listen(t, s.Outside.Space, to, func(c *net.TCPConn) {
		_ = c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2})
		echo(c)
	})
	b := s.box(t)
	var conns []*net.TCPConn
	for range 20 {
		conns = append(conns, s.mustDial(t, b.Space, to))
	}
	time.Sleep(5 * time.Second)
	for _, c := range conns {
		_ = c.SetDeadline(time.Now().Add(s.patience()))
		t.must("exchange", exchanged(c, 100))
	}
}

func egressContainerEnds(t *trial, s *site) {
	to := at(lab.OutsideAddr, s.port())
	ends := make(chan error, 1)
	listen(t, s.Outside.Space, to, readToEnd(ends))
	b := s.box(t)
	c := s.mustDial(t, b.Space, to)
	_, err := io.ReadFull(c, make([]byte, 1))
	t.must("the server's first byte", err)
	ok(t, s.h.CLI("detach", b.Name))
	if err := taken(t, s, ends, "the end of the connection"); err == nil {
		t.Errorf("the server saw a clean end of a connection that was cut")
	}
}

// ok fails the trial unless the program ended well.
func ok(t *trial, r lab.Result) lab.Result {
	if r.Code != 0 {
		t.Fatalf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	return r
}

func egressGatewayPing(t *trial, s *site) {
	b := s.box(t)
	for _, to := range []netip.Addr{b.gateway, b.gateway6} {
		if !to.IsValid() {
			t.Errorf("no gateway of one family: %s, %s", b.gateway, b.gateway6)
			continue
		}
		for _, size := range []int{56, 4000} {
			if r, err := b.PingWith(to, lab.PingOptions{Count: 3, Size: size}); err != nil || r.Lost() != 0 {
				t.Errorf("ping of %s, %d bytes: %v, %v", to, size, r, err)
			}
		}
	}
}
