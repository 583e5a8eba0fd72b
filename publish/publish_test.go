// Tests of published ports over loopback, with servers of this process in the place of containers.

package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fake is a container: a server of this process, wherever it is dialled to.
type fake struct {
	server  netip.AddrPort
	dialErr error // of DialTCP
	carry   func(ctx context.Context, host *net.TCPConn) error
	openErr func(from netip.AddrPort) error

	mu    sync.Mutex
	froms []netip.AddrPort
	flows []*fakeFlow
}

func (f *fake) saw(from netip.AddrPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.froms = append(f.froms, from)
}

func (f *fake) seen() []netip.AddrPort {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]netip.AddrPort(nil), f.froms...)
}

func (f *fake) DialTCP(ctx context.Context, from, _ netip.AddrPort) (*net.TCPConn, error) {
	f.saw(from)
	if f.dialErr != nil {
		return nil, f.dialErr
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", f.server.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (f *fake) Carry(ctx context.Context, host *net.TCPConn, _, _ netip.AddrPort) error {
	return f.carry(ctx, host)
}

// fakeFlow answers each datagram with "re: " before it.
type fakeFlow struct {
	from   netip.AddrPort
	reply  func([]byte)
	broken atomic.Bool
	mute   atomic.Bool
	closed atomic.Bool
}

func (f *fakeFlow) Send(b []byte) error {
	if f.broken.Load() {
		return net.ErrClosed
	}
	if !f.mute.Load() {
		f.reply(append([]byte("re: "), b...))
	}
	return nil
}

func (f *fakeFlow) Close() { f.closed.Store(true) }

func (f *fake) OpenUDP(from, _ netip.AddrPort, reply func([]byte)) (UDPFlow, error) {
	if f.openErr != nil {
		if err := f.openErr(from); err != nil {
			return nil, err
		}
	}
	flow := &fakeFlow{from: from, reply: reply}
	f.mu.Lock()
	f.flows = append(f.flows, flow)
	f.mu.Unlock()
	return flow, nil
}

func testAddresses() Addresses {
	return Addresses{
		Container4: netip.MustParseAddr("10.5.1.2"), Container6: netip.MustParseAddr("fd00:5:1::2"),
		Gateway4: netip.MustParseAddr("10.5.1.1"), Gateway6: netip.MustParseAddr("fd00:5:1::1"),
	}
}

// start publishes a free port and serves it until the test ends.
func start(t *testing.T, spec Spec, f *fake, limits Limits) *Publication {
	t.Helper()
	if spec.Port == 0 {
		spec.Port = 80
	}
	p, err := Listen(spec, Target{Addresses: testAddresses(), Inside: f, Limits: limits})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.Run(context.Background()) }()
	t.Cleanup(func() {
		p.Close()
		if err := <-ended; err != nil && !errors.Is(err, errRunsOnce) {
			t.Errorf("Run: %v", err)
		}
		if s := p.Stats(); s.Active != 0 {
			t.Errorf("%d are open after Close", s.Active)
		}
	})
	return p
}

// server serves every connection with serve until the test ends.
func server(t *testing.T, serve func(c *net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // no descriptor
				time.Sleep(time.Millisecond)
				continue
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func dial(t *testing.T, p *Publication, host string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", net.JoinHostPort(host, strconv.Itoa(int(p.HostPort()))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// turnedAway asserts that a client is reset, which it may see as early as in its connect.
func turnedAway(t *testing.T, p *Publication) {
	t.Helper()
	c, err := net.Dial("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(p.HostPort()))))
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client sees %v, want a reset", err)
	}
}

// echo does not splice, so that the pipes of the process are the publication's.
func echo(c *net.TCPConn) {
	_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	_ = c.CloseWrite()
}

func TestTCP_CarriesBytesBothWaysInBothFamilies(t *testing.T) {
	f := &fake{server: server(t, echo)}
	p := start(t, Spec{Proto: TCP}, f, Limits{})
	for _, host := range []string{"127.0.0.1", "::1"} {
		c := dial(t, p, host)
		sent := bytes.Repeat([]byte("0123456789abcdef"), 300_000) // more than all buffers on the way
		go func() {
			_, _ = c.Write(sent)
			_ = c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%s: %d of %d bytes came back: %v", host, len(got), len(sent), err)
		}
	}
	for i, from := range f.seen() {
		if want := []string{"10.5.1.1:0", "[fd00:5:1::1]:0"}[i]; from.String() != want {
			t.Errorf("a client of the loopback is seen as %v, want %s", from, want)
		}
	}
}

func TestTCP_HalfCloseReachesTheServer(t *testing.T) {
	f := &fake{server: server(t, func(c *net.TCPConn) {
		b, _ := io.ReadAll(c) // ends only with the client's FIN
		_, _ = fmt.Fprintf(c, "%d bytes", len(b))
	})}
	c := dial(t, start(t, Spec{Proto: TCP}, f, Limits{}), "127.0.0.1")
	_, _ = c.Write([]byte("hello"))
	_ = c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "5 bytes" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestTCP_ServersHalfCloseReachesTheClient(t *testing.T) {
	told := make(chan string, 1)
	f := &fake{server: server(t, func(c *net.TCPConn) {
		_, _ = c.Write([]byte("bye"))
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c)
		told <- string(b)
	})}
	c := dial(t, start(t, Spec{Proto: TCP}, f, Limits{}), "127.0.0.1")
	if got, err := io.ReadAll(c); err != nil || string(got) != "bye" {
		t.Fatalf("got %q, %v", got, err)
	}
	_, _ = c.Write([]byte("last words"))
	_ = c.CloseWrite()
	if got := <-told; got != "last words" {
		t.Errorf("the server got %q after it ended its direction", got)
	}
}

func TestTCP_ResetsPassBothWays(t *testing.T) {
	t.Run("of the server", func(t *testing.T) {
		f := &fake{server: server(t, func(c *net.TCPConn) {
			_, _ = io.ReadFull(c, make([]byte, 1))
			_ = c.SetLinger(0)
		})}
		c := dial(t, start(t, Spec{Proto: TCP}, f, Limits{}), "127.0.0.1")
		_, _ = c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client reads %v, want a reset", err)
		}
	})
	for _, ended := range []bool{false, true} {
		t.Run(fmt.Sprintf("of a client that ended its direction before: %v", ended), func(t *testing.T) {
			open, told := make(chan bool), make(chan error, 1)
			f := &fake{server: server(t, func(c *net.TCPConn) {
				if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
					t.Error(err)
				}
				if ended {
					if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
						t.Errorf("the server reads %v, want the end", err)
					}
				}
				open <- true
				if !ended {
					_, err := c.Read(make([]byte, 1))
					told <- err
					return
				}
				// What a server that only waits would see by epoll: writing fails in the end.
				for {
					if _, err := c.Write([]byte("y")); err != nil {
						told <- err
						return
					}
					time.Sleep(time.Millisecond)
				}
			})}
			c := dial(t, start(t, Spec{Proto: TCP}, f, Limits{}), "127.0.0.1")
			_, _ = c.Write([]byte("x"))
			if ended {
				_ = c.CloseWrite()
			}
			<-open
			_ = c.SetLinger(0)
			c.Close()
			if err := <-told; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("the server sees %v, want a reset", err)
			}
		})
	}
}

// pair is two ends of one TCP connection.
func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	if b, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	_ = a.SetDeadline(time.Now().Add(20 * time.Second))
	return a, b
}

// A reset is told once by the kernel: where a write was told, a read finds an end.
func TestTCP_AResetOfWhichAWriteWasToldIsNoEnd(t *testing.T) {
	for _, told := range []bool{false, true} {
		client, host := pair(t)
		server, container := pair(t)
		_ = client.SetLinger(0)
		client.Close()
		raw, err := host.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		for taken := 0; taken == 0 && err == nil; {
			err = raw.Control(func(fd uintptr) { taken, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR) })
		}
		if err != nil {
			t.Fatal(err)
		}
		j := &joint{host: end{TCPConn: host}, container: end{TCPConn: container}}
		j.host.told.Store(told)
		go j.stream(&j.container, &j.host, new(atomic.Uint64))
		// Of a client that was told of the server's end, nothing can be known.
		want := map[bool]error{false: syscall.ECONNRESET, true: io.EOF}[told]
		if _, err := server.Read(make([]byte, 1)); !errors.Is(err, want) {
			t.Errorf("told %v: the server reads %v, want %v", told, err, want)
		}
		j.abort()
	}
}

func TestTCP_RefusalResetsTheClientAndIsCounted(t *testing.T) {
	for _, c := range []struct {
		err    error
		reason string
	}{{syscall.ECONNREFUSED, dropRefused}, {syscall.EHOSTUNREACH, dropDial}} {
		f := &fake{dialErr: fmt.Errorf("dial: %w", c.err)}
		p := start(t, Spec{Proto: TCP}, f, Limits{})
		turnedAway(t, p)
		p.Close()
		if s := p.Stats(); s.Drops[c.reason] != 1 || s.Spliced != 0 {
			t.Errorf("%v: stats %+v", c.err, s)
		}
	}
}

func TestTCP_WhatTheNamespaceDoesNotSupportIsCarried(t *testing.T) {
	f := &fake{dialErr: fmt.Errorf("no: %w", errors.ErrUnsupported), carry: func(_ context.Context, host *net.TCPConn) error {
		defer host.Close()
		_, err := host.Write([]byte("carried"))
		return err
	}}
	p := start(t, Spec{Proto: TCP}, f, Limits{})
	if got, err := io.ReadAll(dial(t, p, "127.0.0.1")); err != nil || string(got) != "carried" {
		t.Errorf("got %q, %v", got, err)
	}
	p.Close()
	if s := p.Stats(); s.Carried != 1 || s.Spliced != 0 || len(s.Drops) != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestTCP_MoreConnectionsThanAllowedAreReset(t *testing.T) {
	f := &fake{server: server(t, echo)}
	p := start(t, Spec{Proto: TCP}, f, Limits{Connections: 2})
	var open []*net.TCPConn
	for range 2 {
		c := dial(t, p, "127.0.0.1")
		_, _ = c.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	turnedAway(t, p)
	_ = open[0].CloseWrite()
	if _, err := io.ReadAll(open[0]); err != nil {
		t.Fatal(err)
	}
	for p.Stats().Active == 2 {
		time.Sleep(time.Millisecond)
	}
	c := dial(t, p, "127.0.0.1")
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("a client after one has gone: %v", err)
	}
	if s := p.Stats(); s.Drops[dropTooMany] != 1 {
		t.Errorf("stats %+v", s)
	}
}

func TestTCP_PublicationsShareTheirPlaces(t *testing.T) {
	f := &fake{server: server(t, echo)}
	places := &Places{most: 1}
	var both [2]*Publication
	for i := range both {
		p, err := Listen(Spec{Proto: TCP, Port: 80}, Target{Addresses: testAddresses(), Inside: f, Places: places})
		if err != nil {
			t.Fatal(err)
		}
		both[i] = p
		go func() { _ = p.Run(context.Background()) }()
		t.Cleanup(p.Close)
	}
	c := dial(t, both[0], "127.0.0.1")
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	turnedAway(t, both[1])
	both[0].Close()
	if s := both[1].Stats(); s.Drops[dropTooMany] != 1 || s.Active != 0 || places.taken.Load() != 0 {
		t.Errorf("stats %+v, %d places taken", s, places.taken.Load())
	}
	c = dial(t, both[1], "127.0.0.1")
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("with a place that was given back: %v", err)
	}
}

func TestPlaces_LeaveDescriptorsToTheGateway(t *testing.T) {
	for files, want := range map[int64]int64{1024: 64, 4096: 256, 65536: 4096, 524288: 114688, 1 << 20: 245760} {
		if got := placesFor(files); got != want {
			t.Errorf("%d of %d files, want %d", got, files, want)
		}
	}
}

func TestListen_WaitsOnlyIfItIsPatient(t *testing.T) {
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	at := netip.MustParseAddrPort(taken.Addr().String())
	for _, patient := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			_, err := Listen(Spec{HostAddr: at.Addr(), HostPort: at.Port(), Port: 80, Proto: TCP}, Target{Patient: patient})
			if waited := time.Since(began) > 0; !errors.Is(err, ErrPortTaken) || waited != patient {
				t.Errorf("patient %v: waited %v, %v", patient, waited, err)
			}
		})
	}
}

func TestClose_ResetsWhatIsOpenAndFreesThePort(t *testing.T) {
	f := &fake{server: server(t, echo)}
	p := start(t, Spec{Proto: TCP}, f, Limits{})
	c := dial(t, p, "127.0.0.1")
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	p.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("an open connection reads %v after Close, want a reset", err)
	}
	again, err := Listen(Spec{Proto: TCP, HostPort: p.HostPort(), Port: 80}, Target{Inside: f})
	if err != nil {
		t.Fatalf("the port is not free: %v", err)
	}
	again.Close()
}

func TestTCP_IdleConnectionsHoldNoPipe(t *testing.T) {
	f := &fake{server: server(t, echo)}
	p := start(t, Spec{Proto: TCP}, f, Limits{})
	for range 3 * sparePipes {
		c := dial(t, p, "127.0.0.1")
		_, _ = c.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	open := 0
	for patience := 2000; patience > 0; patience-- {
		open = 0
		for _, l := range links {
			if to, _ := os.Readlink(l); strings.HasPrefix(to, "pipe:") {
				open++
			}
		}
		if open <= 2*sparePipes+6 {
			return
		}
		time.Sleep(time.Millisecond)
		links, _ = filepath.Glob("/proc/self/fd/*")
	}
	t.Errorf("%d ends of pipes are open for idle connections", open)
}

// leaveDescriptors has the process be refused all descriptors but so many, until the function that it returns is called.
func leaveDescriptors(t *testing.T, count int) (restore func()) {
	t.Helper()
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	next, err := os.Open("/dev/null") // the lowest that is free
	if err != nil {
		t.Fatal(err)
	}
	limit := was
	limit.Cur = uint64(next.Fd()) + uint64(count)
	next.Close()
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	restore = sync.OnceFunc(func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(restore)
	return restore
}

func TestTCP_ClientsWaitForADescriptor(t *testing.T) {
	f := &fake{server: server(t, echo)}
	p := start(t, Spec{Proto: TCP}, f, Limits{})
	restore := leaveDescriptors(t, 1)
	c := dial(t, p, "127.0.0.1")
	for p.Stats().Drops[dropDescriptors] == 0 {
		time.Sleep(time.Millisecond)
	}
	restore()
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("a client who waited: %v", err)
	}
}

func TestTCP_BytesMoveWithoutAPipeToo(t *testing.T) {
	f := &fake{server: server(t, echo)}
	p := start(t, Spec{Proto: TCP}, f, Limits{})
	c := dial(t, p, "127.0.0.1")
	_, _ = c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for patience := 2000; patience > 0; patience-- { // the pipes of the first byte are given back
		pipes.mu.Lock()
		spare := len(pipes.spare)
		pipes.mu.Unlock()
		if spare > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	restore := leaveDescriptors(t, 0)
	defer restore()
	pipes.mu.Lock()
	taken := pipes.spare
	pipes.spare = nil
	pipes.mu.Unlock()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 300_000)
	go func() {
		_, _ = c.Write(sent)
		_ = c.CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes came back: %v", len(got), len(sent), err)
	}
	for _, pipe := range taken {
		pipe.close()
	}
}

func TestListen_ErrorsNameThePortAndTheRemedy(t *testing.T) {
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).AddrPort().Port()
	for _, c := range []struct {
		name string
		spec Spec
		kind error
		says []string
	}{
		{"taken", Spec{HostPort: port, Port: 80, Proto: TCP}, ErrPortTaken, []string{fmt.Sprintf("port %d/tcp", port), fmt.Sprintf("ss -ltnp 'sport = :%d'", port)}},
		{"taken on an address", Spec{HostAddr: netip.MustParseAddr("127.0.0.1"), HostPort: port, Port: 80, Proto: TCP}, ErrPortTaken, []string{fmt.Sprintf("127.0.0.1:%d/tcp", port)}},
		{"not here", Spec{HostAddr: netip.MustParseAddr("192.0.2.77"), HostPort: 8080, Port: 80, Proto: UDP}, ErrNotHere, []string{"192.0.2.77", "ip address"}},
		{"protocol", Spec{HostPort: 8080, Port: 80, Proto: "sctp"}, ErrInvalid, []string{"sctp", "tcp or udp"}},
		{"no port", Spec{HostPort: 8080, Proto: TCP}, ErrInvalid, []string{"port 0"}},
		{"multicast", Spec{HostAddr: netip.MustParseAddr("224.0.0.1"), HostPort: 8080, Port: 80, Proto: UDP}, ErrInvalid, []string{"multicast"}},
		{"mapped", Spec{HostAddr: netip.MustParseAddr("::ffff:127.0.0.1"), HostPort: 8080, Port: 80, Proto: UDP}, ErrInvalid, []string{"write 127.0.0.1"}},
	} {
		p, err := Listen(c.spec, Target{})
		if err == nil {
			p.Close()
		}
		if !errors.Is(err, c.kind) {
			t.Errorf("%s: %v, want %v", c.name, err, c.kind)
			continue
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %q does not say %q", c.name, err, s)
			}
		}
	}
}

func TestListen_APrivilegedPortNamesTheSysctl(t *testing.T) {
	portStart = filepath.Join(t.TempDir(), "start")
	t.Cleanup(func() { portStart = "/proc/sys/net/ipv4/ip_unprivileged_port_start" })
	if err := os.WriteFile(portStart, []byte("1024\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := refused(netip.MustParseAddrPort("0.0.0.0:80"), TCP, os.NewSyscallError("bind", syscall.EACCES))
	if !errors.Is(err, ErrPrivileged) || !errors.Is(err, syscall.EACCES) {
		t.Errorf("%v is not ErrPrivileged", err)
	}
	for _, s := range []string{"port 80/tcp", "below 1024", "sysctl -w net.ipv4.ip_unprivileged_port_start=80"} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
}

func TestRefused_SaysHowToGetDescriptors(t *testing.T) {
	err := refused(netip.MustParseAddrPort("0.0.0.0:8080"), TCP, os.NewSyscallError("socket", syscall.EMFILE))
	if !errors.Is(err, ErrDescriptors) || !errors.Is(err, syscall.EMFILE) {
		t.Errorf("%v", err)
	}
	for _, s := range []string{"port 8080/tcp", "takes two", "ulimit -Hn", "LimitNOFILE=", openFiles()} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%v does not say %q", err, s)
		}
	}
}

func udpClient(t *testing.T, p *Publication, host string) *net.UDPConn {
	t.Helper()
	c, err := net.Dial("udp", net.JoinHostPort(host, strconv.Itoa(int(p.HostPort()))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.UDPConn)
}

// ask sends a datagram and returns the answer: a connected socket takes none from another address than it asked.
func ask(t *testing.T, c *net.UDPConn, text string) string {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestUDP_AnswersLeaveFromTheAddressThatWasAsked(t *testing.T) {
	f := &fake{}
	p := start(t, Spec{Proto: UDP}, f, Limits{})
	for _, host := range []string{"127.0.0.1", "127.0.0.5", "127.3.2.1", "::1"} {
		c := udpClient(t, p, host)
		for _, text := range []string{"one", "", "two"} {
			if got := ask(t, c, text); got != "re: "+text {
				t.Errorf("%s: %q is answered by %q", host, text, got)
			}
		}
	}
	p.Close()
	if s := p.Stats(); s.Flows != 4 || s.Active != 0 || s.BytesIn != 4*6 || s.BytesOut != 4*(6+3*4) {
		t.Errorf("stats %+v", s)
	}
}

func TestUDP_AFlowThatTheGatewayEndedIsOpenedAnew(t *testing.T) {
	f := &fake{}
	p := start(t, Spec{Proto: UDP}, f, Limits{})
	c := udpClient(t, p, "127.0.0.1")
	ask(t, c, "one")
	f.mu.Lock()
	f.flows[0].broken.Store(true)
	f.mu.Unlock()
	if got := ask(t, c, "two"); got != "re: two" {
		t.Errorf("answer %q", got)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.flows) != 2 || !f.flows[0].closed.Load() {
		t.Errorf("%d flows, the first closed: %v", len(f.flows), f.flows[0].closed.Load())
	}
}

func TestUDP_AClientOfTwoPortsOfOneServerGetsAnotherPortForTheSecond(t *testing.T) {
	f := &fake{openErr: func(from netip.AddrPort) error {
		if from.Port() != 0 {
			return fmt.Errorf("flow: %w", syscall.EADDRINUSE)
		}
		return nil
	}}
	l := &udpListener{p: &Publication{inside: f, limits: Limits{Flows: 4}, spec: Spec{Port: 53}}, now: time.Now, flows: map[netip.AddrPort]*udpFlow{}}
	a := testAddresses()
	l.p.addrs.Store(&a)
	client := netip.MustParseAddrPort("203.0.113.7:5353")
	if l.begin(client, nil, netip.Addr{}) == nil || f.flows[0].from != netip.MustParseAddrPort("203.0.113.7:0") {
		t.Errorf("the second flow is from %v", f.flows)
	}
}

// tableOf is a listener without a socket, whose clients get no answers.
func tableOf(f *fake, flows int, now *time.Time) *udpListener {
	l := &udpListener{
		p:   &Publication{inside: f, limits: Limits{Flows: flows}, spec: Spec{Port: 53}},
		now: func() time.Time { return *now }, flows: map[netip.AddrPort]*udpFlow{},
	}
	a := testAddresses()
	l.p.addrs.Store(&a)
	return l
}

type muteInside struct{ fake }

func (m *muteInside) OpenUDP(from, to netip.AddrPort, _ func([]byte)) (UDPFlow, error) {
	return m.fake.OpenUDP(from, to, func([]byte) {})
}

func clientNumber(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), 5353)
}

func TestUDP_IdleFlowsEnd(t *testing.T) {
	now := time.Unix(1000, 0)
	m := &muteInside{}
	l := tableOf(&m.fake, 10, &now)
	l.p.inside = m
	for i := range 3 {
		l.datagram(clientNumber(i), nil, netip.Addr{}, []byte("x"))
	}
	l.flows[clientNumber(1)].answered.Store(true)
	now = now.Add(unansweredIdle - time.Second)
	l.datagram(clientNumber(2), nil, netip.Addr{}, []byte("x"))
	now = now.Add(time.Second)
	l.sweep(now)
	if l.flows[clientNumber(0)] != nil || l.flows[clientNumber(1)] == nil || l.flows[clientNumber(2)] == nil {
		t.Errorf("after %v there are %v", unansweredIdle, l.flows)
	}
	now = now.Add(answeredIdle - unansweredIdle)
	l.sweep(now)
	if len(l.flows) != 0 || l.waiting.Len() != 0 || l.p.Stats().Active != 0 {
		t.Errorf("after %v there are %v", answeredIdle, l.flows)
	}
	for i, f := range m.flows {
		if !f.closed.Load() {
			t.Errorf("flow %d is not closed", i)
		}
	}
}

func TestUDP_WhoNeverGotAnAnswerMakesRoom(t *testing.T) {
	now := time.Unix(1000, 0)
	m := &muteInside{}
	l := tableOf(&m.fake, 2, &now)
	l.p.inside = m
	l.datagram(clientNumber(0), nil, netip.Addr{}, []byte("x"))
	l.datagram(clientNumber(1), nil, netip.Addr{}, []byte("x"))
	l.flows[clientNumber(0)].answered.Store(true)
	l.datagram(clientNumber(2), nil, netip.Addr{}, []byte("x"))
	if l.flows[clientNumber(0)] == nil || l.flows[clientNumber(1)] != nil || l.flows[clientNumber(2)] == nil {
		t.Errorf("there are %v", l.flows)
	}
	if s := l.p.Stats(); s.Drops[dropTooMany] != 1 || s.Active != 2 {
		t.Errorf("stats %+v", s)
	}
}

func TestUDP_WhoHasTheMostMakesRoomWhereAllAreAnswered(t *testing.T) {
	now := time.Unix(1000, 0)
	m := &muteInside{}
	l := tableOf(&m.fake, 4, &now)
	l.p.inside = m
	many := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(clientNumber(1).Addr(), port) }
	for _, client := range []netip.AddrPort{clientNumber(0), many(1), many(2), many(3)} {
		l.datagram(client, nil, netip.Addr{}, []byte("x"))
		l.flows[client].answered.Store(true)
		now = now.Add(time.Millisecond)
	}
	for _, tt := range []struct{ comes, goes netip.AddrPort }{
		{clientNumber(2), many(1)}, // of the address that has three, the one idle for longest
		{clientNumber(3), many(2)},
		{clientNumber(4), clientNumber(0)}, // all have one: the one idle for longest
		{clientNumber(5), many(3)},
	} {
		l.datagram(tt.comes, nil, netip.Addr{}, []byte("x"))
		if l.flows[tt.comes] == nil || l.flows[tt.goes] != nil || len(l.flows) != 4 {
			t.Fatalf("%v comes, %v is to go: %v", tt.comes, tt.goes, l.flows)
		}
		l.flows[tt.comes].answered.Store(true)
		now = now.Add(time.Millisecond)
	}
	// One that was active since the choice stays.
	l.pick(now)
	l.datagram(clientNumber(2), nil, netip.Addr{}, []byte("x"))
	now = now.Add(time.Millisecond)
	l.datagram(clientNumber(6), nil, netip.Addr{}, []byte("x"))
	if l.flows[clientNumber(2)] == nil || l.flows[clientNumber(3)] != nil {
		t.Errorf("there are %v", l.flows)
	}
	if s := l.p.Stats(); s.Drops[dropTooMany] != 5 || s.Active != 4 {
		t.Errorf("stats %+v", s)
	}
}

// sendUrgent sends b, the last byte of it as urgent.
func sendUrgent(t *testing.T, c *net.TCPConn, b string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(raw.Control(func(fd uintptr) { err = syscall.Sendto(int(fd), []byte(b), syscall.MSG_OOB, nil) }), err); err != nil {
		t.Fatal(err)
	}
}

func TestTCP_UrgentBytesAreCarriedInTheirPlace(t *testing.T) {
	conns := make(chan *net.TCPConn, 1)
	over := make(chan struct{})
	defer close(over)
	f := &fake{server: server(t, func(c *net.TCPConn) {
		conns <- c
		<-over
	})}
	p := start(t, Spec{Proto: TCP}, f, Limits{})
	client := dial(t, p, "127.0.0.1")
	inside := <-conns
	_ = inside.SetDeadline(time.Now().Add(20 * time.Second))
	for _, way := range []struct{ from, to *net.TCPConn }{{client, inside}, {inside, client}} {
		for _, b := range []string{"abc", "!", "def", "ghi?"} {
			if strings.ContainsAny(b, "!?") {
				sendUrgent(t, way.from, b)
			} else if _, err := way.from.Write([]byte(b)); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(b))
			if n, err := io.ReadFull(way.to, got); err != nil || string(got) != b {
				t.Fatalf("got %q, %v, want %q", got[:n], err, b)
			}
		}
		sendUrgent(t, way.from, "!") // the last before the end
		_ = way.from.CloseWrite()
		if got, err := io.ReadAll(way.to); err != nil || string(got) != "!" {
			t.Errorf("at the end: %q, %v", got, err)
		}
	}
}
