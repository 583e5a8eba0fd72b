// This file tests what begins outside and ends in a container.

package stack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

var (
	client  = netip.MustParseAddrPort("203.0.113.7:5555")
	client6 = netip.MustParseAddrPort("[2001:db8::7]:5555")
)

// serveTCP has a container answer connections with serve until the test ends.
func (c *container) serveTCP(port uint16, serve func(*gonet.TCPConn)) netip.AddrPort {
	c.w.t.Helper()
	at := netip.AddrPortFrom(c.addr, port)
	a, proto := full(at)
	l, err := gonet.ListenTCP(c.s, a, proto)
	if err != nil {
		c.w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go serve(conn.(*gonet.TCPConn))
		}
	}()
	c.w.t.Cleanup(func() {
		l.Close()
		<-done
	})
	return at
}

// serveUDP has a container answer datagrams with what answer makes of them and of who sent them.
func (c *container) serveUDP(port uint16, answer func(from netip.AddrPort, b []byte) []byte) netip.AddrPort {
	c.w.t.Helper()
	at := netip.AddrPortFrom(c.addr, port)
	a, proto := full(at)
	conn, err := gonet.DialUDP(c.s, &a, nil, proto)
	if err != nil {
		c.w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if b := answer(netip.MustParseAddrPort(from.String()), buf[:n]); b != nil {
				_, _ = conn.WriteTo(b, from)
			}
		}
	}()
	c.w.t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return at
}

// tellPeer says who the container thinks it is talking to, and closes.
func tellPeer(c *gonet.TCPConn) {
	_, _ = io.WriteString(c, c.RemoteAddr().String())
	_ = c.Close()
}

func mustDial(t *testing.T, w *wire, from, to netip.AddrPort) Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := w.g.DialTCP(ctx, from, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

func TestDialTCP_ContainerSeesTheSource(t *testing.T) {
	for name, at := range map[string]struct {
		container netip.Addr
		from      netip.AddrPort
		want      string
	}{
		"the client's own":       {aliceAddr, client, "203.0.113.7:5555"},
		"the client's, any port": {aliceAddr, netip.AddrPortFrom(client.Addr(), 0), "203.0.113.7:"},
		"none":                   {aliceAddr, netip.AddrPort{}, "10.5.1.1:"},
		"the client's, IPv6":     {aliceAddr6, client6, "[2001:db8::7]:5555"},
		"none, IPv6":             {aliceAddr6, netip.AddrPort{}, "[fd00:5::1]:"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, nil)
			server := w.container(at.container).serveTCP(80, tellPeer)
			c := mustDial(t, w, at.from, server)
			got, err := io.ReadAll(c)
			if err != nil || !strings.HasPrefix(string(got), at.want) {
				t.Errorf("the container saw %q, %v; want %q", got, err, at.want)
			}
			if n := w.g.Stats(); n.TCPFlows != 1 || n.TCPInward != 1 {
				t.Errorf("stats: %+v", n)
			}
			c.Close()
			eventually(t, "no flow is left after Close", func() bool { return w.g.Stats().TCPFlows == 0 })
		})
	}
}

func TestDialTCP_ErrorsAreErrnos(t *testing.T) {
	w := newWire(t, func(c *Config) { c.Timeouts.Dial = 200 * time.Millisecond; c.HostLoopback = false })
	c := w.container(aliceAddr)
	nobody := netip.AddrPortFrom(bobAddr, 80)
	for name, d := range map[string]struct {
		from, to netip.AddrPort
		want     error
	}{
		"a closed port":              {client, netip.AddrPortFrom(c.addr, 81), syscall.ECONNREFUSED},
		"nobody there":               {client, nobody, syscall.ETIMEDOUT},
		"the gateway itself":         {client, netip.AddrPortFrom(gatewayAddr, 80), syscall.EADDRNOTAVAIL},
		"loopback":                   {client, netip.AddrPortFrom(loopback, 80), syscall.EADDRNOTAVAIL},
		"port 0":                     {client, netip.AddrPortFrom(c.addr, 0), syscall.EADDRNOTAVAIL},
		"a client on loopback":       {netip.AddrPortFrom(loopback, 7), netip.AddrPortFrom(c.addr, 80), syscall.EADDRNOTAVAIL},
		"a client of another family": {client6, netip.AddrPortFrom(c.addr, 80), syscall.EAFNOSUPPORT},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := w.g.DialTCP(context.Background(), d.from, d.to); !errors.Is(err, d.want) {
				t.Errorf("%v, want %v", err, d.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := w.g.DialTCP(ctx, client, nobody); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
	if n := w.g.Stats(); n.TCPFlows != 0 || n.TCPHalfOpen != 0 {
		t.Errorf("flows are left: %+v", n)
	}
}

func TestDialTCP_AResetOfWhichAWriteWasToldIsNoEnd(t *testing.T) {
	w := newWire(t, nil)
	accept := make(chan *gonet.TCPConn, 1)
	server := w.container(aliceAddr).serveTCP(80, func(c *gonet.TCPConn) { accept <- c })
	conn := mustDial(t, w, client, server)
	inside := <-accept
	in := conn.(*inwardConn).in
	in.flow.ep.Abort()
	eventually(t, "the endpoint knows", func() bool { return tcp.EndpointState(in.flow.ep.State()) == tcp.StateError })
	_, _ = conn.Write([]byte("x")) // may be told
	for range 2 {
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
			t.Error("the reader is told of an end")
		}
	}
	inside.Close()
}

func TestDialTCP_OneClientPortTalksToManyContainers(t *testing.T) {
	w := newWire(t, nil)
	for _, who := range []netip.Addr{aliceAddr, bobAddr} {
		c := w.container(who)
		for port := uint16(80); port < 83; port++ {
			mustDial(t, w, client, c.serveTCP(port, func(*gonet.TCPConn) {}))
		}
	}
	_, err := w.g.DialTCP(context.Background(), client, netip.AddrPortFrom(aliceAddr, 80))
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("the same ends twice: %v", err)
	}
}

// A client may use its port again at once, also when our end of the old connection is in TIME_WAIT.
func TestDialTCP_AgainAfterTimeWait(t *testing.T) {
	w := newWire(t, nil)
	server := w.container(aliceAddr).serveTCP(80, func(c *gonet.TCPConn) {
		_, _ = io.Copy(io.Discard, c)
		tellPeer(c)
	})
	for range 3 {
		c := mustDial(t, w, client, server)
		_ = c.CloseWrite() // we are first, and so the one to wait
		if got, err := io.ReadAll(c); err != nil || string(got) != client.String() {
			t.Fatalf("%q, %v", got, err)
		}
		c.Close()
	}
	if n := w.g.Stats().TimeWaitReused; n == 0 {
		t.Error("TIME_WAIT was never met")
	}
}

func TestDialTCP_ReleaseAndTheEndOfRunEndConnections(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	server := c.serveTCP(80, func(*gonet.TCPConn) {})
	conn := mustDial(t, w, client, server)
	w.g.Release(netip.PrefixFrom(aliceAddr, 32))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read after Release: %v", err)
	}
	eventually(t, "the flow is gone without Close", func() bool { return w.g.Stats().TCPFlows == 0 })
	mustDial(t, w, client, server) // open when Run ends: the test would hang
}

func TestDialTCP_LimitsBite(t *testing.T) {
	w := newWire(t, func(c *Config) { c.Limits.TCPFlowsEach = 2 })
	server := w.container(aliceAddr).serveTCP(80, func(*gonet.TCPConn) {})
	mustDial(t, w, netip.AddrPort{}, server)
	mustDial(t, w, netip.AddrPort{}, server)
	_, err := w.g.DialTCP(context.Background(), client, server)
	if !errors.Is(err, syscall.EAGAIN) || w.drops(dropContainerShare) != 1 {
		t.Errorf("%v, %d drops", err, w.drops(dropContainerShare))
	}
}

// hostPair is a connection on the host: what a listener accepted, and its client's end.
func hostPair(t *testing.T) (accepted, clients *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if clients, err = net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr)); err != nil {
		t.Fatal(err)
	}
	if accepted, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { clients.Close(); accepted.Close() })
	_ = clients.SetDeadline(time.Now().Add(patience))
	return accepted, clients
}

func TestCarryTCP_CarriesBytesAndHalfClose(t *testing.T) {
	w := newWire(t, nil)
	seen := make(chan string, 1)
	server := w.container(aliceAddr).serveTCP(80, func(c *gonet.TCPConn) {
		seen <- c.RemoteAddr().String()
		_, _ = io.Copy(c, c)
		_ = c.Close()
	})
	host, conn := hostPair(t)
	carried := make(chan error, 1)
	go func() { carried <- w.g.CarryTCP(context.Background(), host, client, server) }()
	data := randomBytes(4 << 20)
	go func() {
		_, _ = conn.Write(data)
		_ = conn.CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(data), err)
	}
	if err := <-carried; err != nil {
		t.Errorf("CarryTCP: %v", err)
	}
	if s := <-seen; s != client.String() {
		t.Errorf("the container saw %s", s)
	}
	eventually(t, "the flow is gone", func() bool { return w.g.Stats().TCPFlows == 0 })
}

// A client may ask for one port of a container by way of two ports of the host, from one port of its own.
func TestCarryTCP_TwiceFromOnePort(t *testing.T) {
	w := newWire(t, nil)
	seen := make(chan string, 2)
	server := w.container(aliceAddr).serveTCP(80, func(c *gonet.TCPConn) { seen <- c.RemoteAddr().String() })
	for _, want := range []string{client.String(), client.Addr().String() + ":"} {
		host, _ := hostPair(t)
		go func() { _ = w.g.CarryTCP(context.Background(), host, client, server) }()
		if got := <-seen; !strings.HasPrefix(got, want) {
			t.Errorf("the container saw %s, want %s", got, want)
		}
	}
}

func TestCarryTCP_ClientIsResetWithTheReason(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	t.Run("nobody listens", func(t *testing.T) {
		host, conn := hostPair(t)
		err := w.g.CarryTCP(context.Background(), host, client, netip.AddrPortFrom(c.addr, 81))
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("CarryTCP: %v", err)
		}
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client: %v", err)
		}
	})
	accept := make(chan *gonet.TCPConn, 1)
	server := c.serveTCP(80, func(c *gonet.TCPConn) { accept <- c })
	for name, end := range map[string]func(context.CancelFunc){
		"ctx":     func(cancel context.CancelFunc) { cancel() },
		"Release": func(context.CancelFunc) { w.g.Release(netip.PrefixFrom(aliceAddr, 32)) },
	} {
		t.Run(name, func(t *testing.T) {
			host, conn := hostPair(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			carried := make(chan error, 1)
			go func() { carried <- w.g.CarryTCP(ctx, host, client, server) }()
			inside := <-accept
			_ = inside.SetDeadline(time.Now().Add(patience))
			eventually(t, "it is established", func() bool { s := w.g.Stats(); return s.TCPFlows == 1 && s.TCPHalfOpen == 0 })
			end(cancel)
			if err := <-carried; err != nil {
				t.Errorf("CarryTCP: %v", err)
			}
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the client: %v", err)
			}
			if _, err := inside.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("the container: %v", err)
			}
		})
	}
}

func TestOpenUDP_CarriesDatagramsWithTheClientsAddress(t *testing.T) {
	for name, at := range map[string]struct {
		container netip.Addr
		from      netip.AddrPort
	}{
		"IPv4":           {aliceAddr, client},
		"IPv6":           {aliceAddr6, client6},
		"of the gateway": {aliceAddr, netip.AddrPort{}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, nil)
			server := w.container(at.container).serveUDP(53, func(from netip.AddrPort, b []byte) []byte {
				return append([]byte(from.String()+" "), b...)
			})
			answers := make(chan []byte, 8)
			u, err := w.g.OpenUDP(at.from, server, func(b []byte) { answers <- bytes.Clone(b) })
			if err != nil {
				t.Fatal(err)
			}
			if at.from.IsValid() && u.From() != at.from || u.From().Port() == 0 {
				t.Errorf("From: %v", u.From())
			}
			for _, size := range []int{0, 1, 1400, 9000} { // the last in fragments, both ways
				data := randomBytes(size)
				if err := u.Send(data); err != nil {
					t.Fatal(err)
				}
				if got, want := <-answers, append([]byte(u.From().String()+" "), data...); !bytes.Equal(got, want) {
					t.Fatalf("size %d: %d bytes", size, len(got))
				}
			}
			if s := w.g.Stats(); s.UDPFlows != 1 || s.UDPInward != 1 || s.UDPOpened != 0 {
				t.Errorf("stats: %+v", s)
			}
			u.Close()
			u.Close()
			if err := u.Send([]byte("late")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Send after Close: %v", err)
			}
			if n := w.g.Stats().UDPFlows; n != 0 {
				t.Errorf("%d flows are left", n)
			}
		})
	}
}

func TestOpenUDP_RefusalEndsTheFlow(t *testing.T) {
	for name, at := range map[string]struct {
		container netip.Addr
		from      netip.AddrPort
	}{
		"IPv4":           {aliceAddr, client},
		"IPv6":           {aliceAddr6, client6},
		"of the gateway": {aliceAddr, netip.AddrPort{}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, nil)
			w.container(at.container)
			u, err := w.g.OpenUDP(at.from, netip.AddrPortFrom(at.container, 99), func([]byte) {})
			if err != nil {
				t.Fatal(err)
			}
			if err := u.Send([]byte("anybody?")); err != nil {
				t.Fatal(err)
			}
			select {
			case <-u.Done():
			case <-time.After(patience):
				t.Fatal("the refusal never came")
			}
			if err := u.Send(nil); !errors.Is(u.Err(), syscall.ECONNREFUSED) || !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("Err %v, Send %v", u.Err(), err)
			}
		})
	}
}

func TestOpenUDP_ReplacesEgressAndNothingElse(t *testing.T) {
	w := newWire(t, nil) // without a container, which would refuse what comes to a port that it has not opened, and end whichever flow there is
	outside := listenUDP(t, same)
	inside := netip.AddrPortFrom(aliceAddr, 4000)
	w.send(makeUDP(inside, outside, []byte("out")))
	eventually(t, "the echo", func() bool {
		return w.countSeen(func(o observed) bool { return o.in.proto == protoUDP }) == 1
	})
	got := make(chan string, 4)
	u, err := w.g.OpenUDP(outside, inside, func(b []byte) { got <- string(b) })
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the egress flow ends", func() bool { return w.g.Stats().UDPFlows == 1 })
	w.send(makeUDP(inside, outside, []byte("answer")))
	if s := <-got; s != "answer" {
		t.Errorf("got %q", s)
	}
	if _, err := w.g.OpenUDP(outside, inside, func([]byte) {}); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second one: %v", err)
	}
	w.g.Release(netip.PrefixFrom(aliceAddr, 32))
	if !errors.Is(u.Err(), net.ErrClosed) {
		t.Errorf("after Release: %v", u.Err())
	}
}

func TestInward_NotRunning(t *testing.T) {
	g, err := New(Config{Addresses: []netip.Addr{gatewayAddr}, MTU: testMTU, Exit: (&wire{t: t}).exit})
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(aliceAddr, 80)
	if _, err := g.DialTCP(context.Background(), client, to); !errors.Is(err, syscall.ENETDOWN) {
		t.Errorf("DialTCP: %v", err)
	}
	if _, err := g.OpenUDP(client, to, func([]byte) {}); !errors.Is(err, syscall.ENETDOWN) {
		t.Errorf("OpenUDP: %v", err)
	}
	host, conn := hostPair(t)
	if err := g.CarryTCP(context.Background(), host, client, to); !errors.Is(err, syscall.ENETDOWN) {
		t.Errorf("CarryTCP: %v", err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client: %v", err)
	}
}

// An ICMP error that a container makes up ends no flow but its own.
func TestRefuseInward_OnlyOfTheContainerItself(t *testing.T) {
	w := newWire(t, nil)
	w.container(aliceAddr)
	u, err := w.g.OpenUDP(client, netip.AddrPortFrom(aliceAddr, 99), func([]byte) {})
	if err != nil {
		t.Fatal(err)
	}
	quoted := makeUDP(client, netip.AddrPortFrom(aliceAddr, 99), []byte("x"))
	forged := portUnreachable.message(true).over4(quoted, bobAddr.As4(), client.Addr().As4())
	w.send(forged)
	w.send(forged[:header.IPv4MinimumSize+header.ICMPv4MinimumSize]) // cut short
	if u.Err() != nil {
		t.Errorf("ended by another container: %v", u.Err())
	}
	w.send(portUnreachable.message(true).over4(quoted, aliceAddr.As4(), client.Addr().As4()))
	if !errors.Is(u.Err(), syscall.ECONNREFUSED) {
		t.Errorf("after its own: %v", u.Err())
	}
}

// A dial ends at once with what is said of its SYN, in either family.
func TestDialTCP_FailsWithWhatICMPSays(t *testing.T) {
	for _, tt := range []struct {
		what unreachable
		want syscall.Errno
	}{
		{hostUnreachable, syscall.EHOSTUNREACH},
		{netUnreachable, syscall.ENETUNREACH},
		{adminProhibited, syscall.EACCES},
	} {
		for _, to := range []netip.AddrPort{netip.AddrPortFrom(aliceAddr, 80), netip.AddrPortFrom(aliceAddr6, 80)} {
			w := newWire(t, nil)
			dialled := make(chan error, 1)
			go func() {
				_, err := w.g.DialTCP(context.Background(), netip.AddrPort{}, to)
				dialled <- err
			}()
			var syn observed
			eventually(t, "the SYN", func() bool {
				return w.countSeen(func(o observed) bool {
					if o.in.proto == protoTCP {
						syn = o
					}
					return o.in.proto == protoTCP
				}) > 0
			})
			if to.Addr().Is4() {
				w.send(tt.what.message(true).over4(syn.b, aliceAddr.As4(), syn.in.src.As4()))
			} else {
				w.send(tt.what.message(false).over6(syn.b, aliceAddr6.As16(), syn.in.src.As16()))
			}
			select {
			case err := <-dialled:
				if !errors.Is(err, tt.want) {
					t.Errorf("%v: %v, want %v", to, err, tt.want)
				}
			case <-time.After(patience):
				t.Errorf("%v, %v: the dial goes on", to, tt.want)
			}
		}
	}
}
