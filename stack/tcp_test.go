// This file tests egress TCP with a container's stack against servers on the host.

package stack

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func TestTCP_CarriesBytesBothWaysAtOnce(t *testing.T) {
	const size = 10 << 20
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	server := listenTCP(t, func(s *net.TCPConn) {
		_, _ = io.Copy(s, s)
		_ = s.CloseWrite()
	})
	conn := c.mustDialTCP(server)
	defer conn.Close()
	data := randomBytes(size)
	go func() {
		_, _ = conn.Write(data)
		_ = conn.CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(got) != sha256.Sum256(data) {
		t.Fatalf("the echo differs: %d bytes, want %d", len(got), size)
	}
	if n := w.countSeen(func(o observed) bool { return o.gso == packet.GSOTCPv4 }); n == 0 {
		t.Error("no superpacket left the gateway")
	}
	s := w.g.Stats()
	if s.TCPOpened != 1 || s.BytesIn < size || s.BytesOut < size {
		t.Errorf("stats: %+v", s)
	}
	eventually(t, "the flow is gone", func() bool { return w.g.Stats().TCPFlows == 0 })
}

func TestTCP_IPv6(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr6)
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("the host has no IPv6 loopback")
	}
	defer l.Close()
	go func() {
		s, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = io.Copy(s, s)
		s.Close()
	}()
	// ::1 reached as the gateway's address, as a container would.
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	conn := c.mustDialTCP(netip.AddrPortFrom(gatewayAddr6, port))
	defer conn.Close()
	data := randomBytes(1 << 20)
	go func() {
		_, _ = conn.Write(data)
		_ = conn.CloseWrite()
	}()
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(data), err)
	}
}

func TestTCP_RefusedIsResetBeforeTheHandshake(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	_, err := c.dialTCP(closedPort(t))
	if err == nil || !strings.Contains(err.Error(), "refused") {
		t.Fatalf("dial: %v, want a refusal", err)
	}
	if n := w.tcpSeen(header.TCPFlagSyn | header.TCPFlagAck); n != 0 {
		t.Errorf("%d SYN-ACKs for a connection that the host refused", n)
	}
	if n := w.tcpSeen(header.TCPFlagRst | header.TCPFlagAck); n != 1 {
		t.Errorf("%d RSTs, want 1", n)
	}
	eventually(t, "the flow is gone", func() bool { s := w.g.Stats(); return s.TCPFlows == 0 && s.TCPRefused == 1 })
}

// deafListener is a listener whose queue is full: it lets SYNs fall on the floor, as a host behind a firewall does. open gives it a longer one.
func deafListener(t *testing.T) (at netip.AddrPort, open func()) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback.As4()}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at = netip.AddrPortFrom(loopback, uint16(sa.(*unix.SockaddrInet4).Port))
	for range 8 {
		c, err := net.DialTimeout("tcp4", at.String(), 200*time.Millisecond)
		if err != nil {
			break
		}
		t.Cleanup(func() { c.Close() })
	}
	return at, func() {
		if err := unix.Listen(fd, 64); err != nil {
			t.Error(err)
		}
	}
}

func TestTCP_SilenceIsHostUnreachable(t *testing.T) {
	at, _ := deafListener(t)
	w := newWire(t, func(c *Config) { c.Timeouts.Dial = 50 * time.Millisecond })
	c := w.container(aliceAddr)
	if _, err := c.dialTCP(at); err == nil {
		t.Fatal("connected to a host that says nothing")
	}
	if n := w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4HostUnreachable); n == 0 {
		t.Error("no host unreachable")
	}
	if n := w.tcpSeen(header.TCPFlagSyn | header.TCPFlagAck); n != 0 {
		t.Errorf("%d SYN-ACKs", n)
	}
	if s := w.g.Stats(); s.TCPUnreachable == 0 {
		t.Errorf("stats: %+v", s)
	}
}

// The host does not read, so that both copy loops wait for the host when the container goes away.
func TestTCP_ResetByTheContainerFreesAFlowThatWaitsForTheHost(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	gone := make(chan error, 1)
	release := make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	server := listenTCP(t, func(s *net.TCPConn) {
		<-release
		_, err := io.Copy(io.Discard, s)
		gone <- err
	})
	t.Cleanup(let)
	conn := c.mustDialTCP(server)
	for err := error(nil); err == nil; { // until nothing goes any further
		_ = conn.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		_, err = conn.Write(make([]byte, 1<<20))
	}
	for _, e := range c.s.RegisteredEndpoints() {
		e.Abort()
	}
	conn.Close()
	eventually(t, "the flow is gone", func() bool { return w.g.Stats().TCPFlows == 0 })
	let()
	if err := <-gone; err == nil {
		t.Error("the server saw an orderly end, want a reset")
	}
}

func TestTCP_HalfClose(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	t.Run("by the container", func(t *testing.T) {
		server := listenTCP(t, func(s *net.TCPConn) {
			all, _ := io.ReadAll(s) // ends only with the container's FIN
			_, _ = s.Write(append([]byte("after: "), all...))
		})
		conn := c.mustDialTCP(server)
		defer conn.Close()
		_, _ = conn.Write([]byte("request"))
		_ = conn.CloseWrite()
		if got, err := io.ReadAll(conn); string(got) != "after: request" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("by the host", func(t *testing.T) {
		heard := make(chan string, 1)
		server := listenTCP(t, func(s *net.TCPConn) {
			_, _ = s.Write([]byte("bye"))
			_ = s.CloseWrite()
			all, _ := io.ReadAll(s)
			heard <- string(all)
		})
		conn := c.mustDialTCP(server)
		if got, err := io.ReadAll(conn); string(got) != "bye" {
			t.Errorf("got %q, %v", got, err)
		}
		_, _ = conn.Write([]byte("still here"))
		conn.Close()
		if got := <-heard; got != "still here" {
			t.Errorf("the server heard %q", got)
		}
	})
}

func TestTCP_ResetIsPassedOn(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	t.Run("from the host", func(t *testing.T) {
		server := listenTCP(t, func(s *net.TCPConn) {
			_, _ = s.Read(make([]byte, 1))
			_ = s.SetLinger(0) // Close sends a RST
		})
		conn := c.mustDialTCP(server)
		defer conn.Close()
		_, _ = conn.Write([]byte("x"))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("read: %v, want a reset", err)
		}
	})
	t.Run("from the container", func(t *testing.T) {
		heard := make(chan error, 1)
		server := listenTCP(t, func(s *net.TCPConn) {
			_, err := io.ReadAll(s)
			heard <- err
		})
		conn := c.mustDialTCP(server)
		eventually(t, "the server has it", func() bool { return w.g.Stats().TCPFlows == 1 })
		for _, e := range c.s.RegisteredEndpoints() {
			e.Abort()
		}
		conn.Close()
		if err := <-heard; err == nil {
			t.Error("the server saw an orderly end, want a reset")
		}
	})
	eventually(t, "the flows are gone", func() bool { return w.g.Stats().TCPFlows == 0 })
}

// The server closes first, so that the gateway's end goes into TIME_WAIT, and the client comes back with the same port at
// once: the trap of every stack that accepts without a listening socket.
func TestTCP_ReusesFourTuplesInTimeWait(t *testing.T) {
	const connections, ports = 2000, 8
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = s.Write([]byte("x")) })
	var wg sync.WaitGroup
	for p := range ports {
		wg.Go(func() {
			for i := range connections / ports {
				if err := c.once(uint16(20000+p), server); err != nil {
					t.Errorf("port %d, connection %d: %v", 20000+p, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
	s := w.g.Stats()
	if s.TCPOpened != connections {
		t.Errorf("%d connections opened, want %d", s.TCPOpened, connections)
	}
	if s.TimeWaitReused == 0 {
		t.Error("no four-tuple was met in TIME_WAIT: the test has missed its point")
	}
	eventually(t, "the flows are gone", func() bool { return w.g.Stats().TCPFlows == 0 })
}

// once connects from port, reads one byte and the end, and closes.
func (c *container) once(port uint16, server netip.AddrPort) error {
	a, proto := full(server)
	local := tcpip.FullAddress{NIC: nicID, Addr: tcpipAddr(c.addr), Port: port}
	var conn *gonet.TCPConn
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		var err error
		// The container's own end may hold the port until its last ACK has come.
		if conn, err = gonet.DialTCPWithBind(c.w.t.Context(), c.s, local, a, proto); err == nil {
			break
		}
		if !strings.Contains(err.Error(), "in use") && !strings.Contains(err.Error(), "already") || time.Now().After(end) {
			return err
		}
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	got, err := io.ReadAll(conn)
	if err == nil && string(got) != "x" {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func TestTCP_LimitsBiteAndCount(t *testing.T) {
	hold := func(s *net.TCPConn) { _, _ = io.ReadAll(s) }
	t.Run("flows", func(t *testing.T) {
		w := newWire(t, func(c *Config) { c.Limits.TCPFlows = 3 })
		c := w.container(aliceAddr)
		server := listenTCP(t, hold)
		for range 3 {
			defer c.mustDialTCP(server).Close()
		}
		w.send(makeTCP(netip.AddrPortFrom(bobAddr, 999), server, header.TCPFlagSyn, 1))
		if n := w.drops(dropTCPFlows); n != 1 {
			t.Errorf("%d drops, want 1", n)
		}
	})
	t.Run("share of a container", func(t *testing.T) {
		w := newWire(t, func(c *Config) { c.Limits.TCPFlowsEach = 2 })
		alice, bob := w.container(aliceAddr), w.container(bobAddr)
		server := listenTCP(t, hold)
		for range 2 {
			defer alice.mustDialTCP(server).Close()
		}
		w.send(makeTCP(netip.AddrPortFrom(aliceAddr, 999), server, header.TCPFlagSyn, 1))
		if n := w.drops(dropContainerShare); n != 1 {
			t.Errorf("%d drops, want 1", n)
		}
		bob.mustDialTCP(server).Close()
	})
	t.Run("half-open that are not stale", func(t *testing.T) {
		w := newWire(t, func(c *Config) { c.Limits.TCPHalfOpenEach, c.Timeouts.Stale = 3, time.Hour })
		server := listenTCP(t, hold)
		for i := range 10 {
			w.send(makeTCP(netip.AddrPortFrom(aliceAddr, uint16(1000+i)), server, header.TCPFlagSyn, 1))
		}
		if n, e := w.drops(dropContainerShare), w.drops(dropEvicted); n != 7 || e != 0 {
			t.Errorf("%d drops and %d evicted, want 7 and none", n, e)
		}
	})
	t.Run("half-open", func(t *testing.T) {
		w := newWire(t, func(c *Config) { c.Limits.TCPHalfOpen, c.Limits.TCPHalfOpenEach, c.Timeouts.Stale = 4, 3, 1 })
		bob := w.container(bobAddr)
		server := listenTCP(t, hold)
		// Alice sends SYNs and never an ACK.
		for i := range 10 {
			w.send(makeTCP(netip.AddrPortFrom(aliceAddr, uint16(1000+i)), server, header.TCPFlagSyn, 1))
		}
		// Each beyond the share evicts the oldest, or is refused while those have not ended.
		if n := w.drops(dropContainerShare) + w.drops(dropEvicted); n != 7 {
			t.Errorf("%d drops, want 7", n)
		}
		if s := w.g.Stats(); s.TCPHalfOpen != 3 {
			t.Errorf("%d half-open, want 3", s.TCPHalfOpen)
		}
		eventually(t, "the evicted are gone", func() bool { return w.g.Stats().TCPFlows == 3 })
		bob.mustDialTCP(server).Close() // a flood from one container does not stop another
		carol := netip.MustParseAddr("10.5.1.4")
		eventually(t, "bob's is established", func() bool { return w.g.Stats().TCPHalfOpen == 3 })
		// Nor its own clients for long: the newest is there.
		w.send(makeTCP(netip.AddrPortFrom(aliceAddr, 2000), server, header.TCPFlagSyn, 1))
		eventually(t, "the newest is answered", func() bool {
			return w.countSeen(func(o observed) bool {
				h := header.TCP(o.b[o.in.transport:])
				return o.in.proto == protoTCP && h.DestinationPort() == 2000 && h.Flags() == header.TCPFlagSyn|header.TCPFlagAck
			}) == 1
		})
		eventually(t, "the oldest is gone", func() bool { return w.g.Stats().TCPFlows == 3 })
		if s := w.g.Stats(); s.TCPHalfOpen != 3 {
			t.Errorf("%d half-open, want 3", s.TCPHalfOpen)
		}
		w.send(makeTCP(netip.AddrPortFrom(carol, 1), server, header.TCPFlagSyn, 1),
			makeTCP(netip.AddrPortFrom(carol, 2), server, header.TCPFlagSyn, 1))
		if n := w.drops(dropTCPHalfOpen); n != 1 {
			t.Errorf("%d drops, want 1", n)
		}
	})
}

func TestTCP_ReleaseEndsTheFlowsOfOneContainer(t *testing.T) {
	w := newWire(t, nil)
	alice, bob := w.container(aliceAddr), w.container(bobAddr)
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = io.Copy(s, s) })
	a, b := alice.mustDialTCP(server), bob.mustDialTCP(server)
	defer a.Close()
	defer b.Close()
	eventually(t, "both are established", func() bool { s := w.g.Stats(); return s.TCPFlows == 2 && s.TCPHalfOpen == 0 })
	w.g.Release(netip.PrefixFrom(aliceAddr, 32))
	if _, err := a.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read: %v, want a reset", err)
	}
	eventually(t, "one flow is left", func() bool { return w.g.Stats().TCPFlows == 1 })
	_, _ = b.Write([]byte("y"))
	if n, err := b.Read(make([]byte, 1)); n != 1 {
		t.Errorf("the other container's connection: %v", err)
	}
	a = alice.mustDialTCP(server)
	defer a.Close()
	eventually(t, "there are two again", func() bool { s := w.g.Stats(); return s.TCPFlows == 2 && s.TCPHalfOpen == 0 })
	w.g.Release(netip.MustParsePrefix("10.99.0.0/16"))
	w.g.Release(netip.PrefixFrom(aliceAddr, 24).Masked())
	eventually(t, "none of the subnet is left", func() bool { return w.g.Stats().TCPFlows == 0 })
}

// A receiver that does not read must not stop others, nor the goroutine that sends for all of them.
func TestTCP_SlowReaderDoesNotStopOthers(t *testing.T) {
	w := newWire(t, func(c *Config) { c.Limits.ExitQueue = 64 })
	c := w.container(aliceAddr)
	data := randomBytes(4 << 20)
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = s.Write(data) })
	slow := c.mustDialTCP(server)
	defer slow.Close()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			conn := c.mustDialTCP(server)
			defer conn.Close()
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
			}
		})
	}
	wg.Wait()
	if got, err := io.ReadAll(slow); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the slow one: %d bytes of %d, %v", len(got), len(data), err)
	}
}

func TestTCP_NoReplyToStraySegments(t *testing.T) {
	w := newWire(t, nil)
	src, dst := netip.AddrPortFrom(aliceAddr, 5), netip.MustParseAddrPort("203.0.113.9:80")
	w.send(makeTCP(src, dst, header.TCPFlagRst, 1))
	w.send(makeTCP(src, dst, header.TCPFlagAck, 1))
	eventually(t, "the ACK is reset", func() bool { return w.tcpSeen(header.TCPFlagRst) == 1 })
	if n := w.countSeen(func(observed) bool { return true }); n != 1 {
		t.Errorf("%d packets, want only the answer to the ACK", n)
	}
}

// sendUrgent sends b, the last byte of it as urgent.
func sendUrgent(t *testing.T, c *net.TCPConn, b string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	if err := errors.Join(raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte(b), unix.MSG_OOB, nil) }), err); err != nil {
		t.Error(err)
	}
}

func TestTCP_UrgentBytesOfTheHostAreCarriedInTheirPlace(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	next := make(chan struct{}, 2)
	server := listenTCP(t, func(s *net.TCPConn) {
		_, _ = s.Write([]byte("abc"))
		<-next // so that nothing lies before the urgent byte
		sendUrgent(t, s, "!")
		<-next
		_, _ = s.Write([]byte("def"))
		sendUrgent(t, s, "ghi?")
	})
	conn := c.mustDialTCP(server)
	defer conn.Close()
	defer close(next)
	for _, want := range []string{"abc", "!"} {
		got := make([]byte, len(want))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
			t.Fatalf("got %q, %v, want %q", got, err, want)
		}
		next <- struct{}{}
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "defghi?" {
		t.Errorf("got %q, %v", got, err)
	}
}

// What cannot be sent to the host for want of something else than the host must not be passed over.
func TestTCP_AnErrorOfTheSocketResetsBothSides(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	heard := make(chan error, 1)
	server := listenTCP(t, func(s *net.TCPConn) {
		_, err := io.Copy(io.Discard, s)
		heard <- err
	})
	conn := c.mustDialTCP(server)
	defer conn.Close()
	var f *tcpFlow
	eventually(t, "it is carried", func() bool {
		flows := w.g.live.Load().flows.all(kindTCP)
		if len(flows) == 0 {
			return false
		}
		f = flows[0].(*tcpFlow)
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.carrier != nil
	})
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	f.carrier.out.fd = int(null.Fd()) // to which nothing can be sent
	_, _ = conn.Write([]byte("x"))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the container sees %v, want a reset", err)
	}
	if err := <-heard; err == nil {
		t.Error("the server saw an orderly end, want a reset")
	}
	eventually(t, "the flow is gone", func() bool { return w.g.Stats().TCPFlows == 0 })
}

// A connection that is being dialled and has to make room is no refusal.
func TestTCP_AnEvictedConnectionIsDialledAgain(t *testing.T) {
	at, open := deafListener(t)
	w := newWire(t, func(c *Config) { c.Limits.TCPHalfOpenEach, c.Timeouts.Stale = 1, 1 })
	c := w.container(aliceAddr)
	dialled := make(chan error, 1)
	go func() {
		conn, err := c.dialTCP(at)
		if err == nil {
			conn.Close()
		}
		dialled <- err
	}()
	eventually(t, "it is dialled", func() bool { return w.g.Stats().TCPHalfOpen == 1 })
	w.send(makeTCP(netip.AddrPortFrom(aliceAddr, 999), at, header.TCPFlagSyn, 1))
	eventually(t, "it has made room", func() bool { return w.drops(dropEvicted) > 0 })
	open()
	if err := <-dialled; err != nil {
		t.Errorf("dial: %v", err)
	}
}
