// This file tests what TCP flows cost: no goroutine while idle, and buffers within their budget.

package stack

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

func TestTCP_IdleFlowsHaveNoGoroutine(t *testing.T) {
	const flows = 200
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = io.Copy(s, s) })
	conns := make([]*gonet.TCPConn, flows)
	var wg sync.WaitGroup
	for i := range conns {
		wg.Go(func() { conns[i] = c.mustDialTCP(server) })
	}
	wg.Wait()
	echo := func() {
		for _, conn := range conns {
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	echo()
	eventually(t, "all rest", func() bool {
		s := stacks()
		return !strings.Contains(s, "(*carrier)") && strings.Count(s, "(*crew).work(") <= crewIdle
	})
	echo()
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, "the flows are gone", func() bool { return w.g.Stats().TCPFlows == 0 })
}

func TestTCP_BuffersKeepToTheirBudget(t *testing.T) {
	const flows, limit = 48, 4 << 20
	w := newWire(t, func(c *Config) { c.Limits.TCPBuffers = limit })
	c := w.container(aliceAddr)
	data := randomBytes(1 << 20)
	server := listenTCP(t, func(s *net.TCPConn) { // more than anybody reads at first
		_, _ = s.Write(data)
	})
	var conns []*gonet.TCPConn
	for range flows {
		conns = append(conns, c.mustDialTCP(server))
	}
	b := &w.g.live.Load().budget
	eventually(t, "all are established", func() bool { return b.flows.Load() == flows })
	most := int64(limit + flows*2*tcpMinBuffer)
	check := func() {
		t.Helper()
		if n := b.lent.Load(); n > most {
			t.Errorf("%d bytes lent, want at most %d", n, most)
		}
	}
	check()
	var wg sync.WaitGroup
	for _, conn := range conns {
		wg.Go(func() {
			defer conn.Close()
			if got, err := io.ReadAll(conn); err != nil || len(got) != len(data) {
				t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
			}
			check()
		})
	}
	wg.Wait()
	eventually(t, "everything is given back", func() bool { return b.lent.Load() == 0 && b.flows.Load() == 0 })
}

func TestBuffers_GrowAndShrink(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	served := make(chan *net.TCPConn, 1)
	release := make(chan struct{})
	server := listenTCP(t, func(s *net.TCPConn) {
		served <- s
		<-release
	})
	defer close(release)
	conn := c.mustDialTCP(server)
	defer conn.Close()
	host := <-served
	b := &w.g.live.Load().budget
	eventually(t, "it is established", func() bool { return b.flows.Load() == 1 })
	if n := b.lent.Load(); n != tcpReceiveBuffer+tcpSendBuffer {
		t.Fatalf("%d bytes lent at first, want %d", n, tcpReceiveBuffer+tcpSendBuffer)
	}
	// The container does not read: its send buffer in the gateway grows until the host waits.
	_ = host.SetWriteDeadline(time.Now().Add(patience))
	wrote := make(chan error, 1)
	data := randomBytes(24 << 20)
	go func() {
		_, err := host.Write(data)
		wrote <- err
	}()
	eventually(t, "the buffer has grown", func() bool { return b.lent.Load() == tcpReceiveBuffer+tcpMaxBuffer })
	f := w.g.live.Load().flows.all(kindTCP)[0].(*tcpFlow)
	tend := func() { // as if seconds had passed, twice: only what was idle since the last time shrinks
		f.tend()
		f.tend()
	}
	tend()
	if n := b.lent.Load(); n != tcpReceiveBuffer+tcpMaxBuffer {
		t.Errorf("%d bytes lent while the buffer is full, want %d", n, tcpReceiveBuffer+tcpMaxBuffer)
	}
	if _, err := io.ReadFull(conn, make([]byte, len(data))); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has shrunk", func() bool {
		tend()
		return b.lent.Load() == tcpReceiveBuffer+tcpSendBuffer
	})
	// It still carries.
	go func() { _, _ = host.Write(data[:1<<20]) }()
	if _, err := io.ReadFull(conn, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
}

// The buffers of a connection may become smaller at any moment.
func TestTCP_NothingIsLostWhenBuffersShrink(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	data := randomBytes(64 << 20)
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = s.Write(data) })
	conn := c.mustDialTCP(server)
	defer conn.Close()
	b := &w.g.live.Load().budget
	eventually(t, "the buffer has grown", func() bool { return b.lent.Load() == tcpReceiveBuffer+tcpMaxBuffer })
	f := w.g.live.Load().flows.all(kindTCP)[0].(*tcpFlow)
	over := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(over)
	wg.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
				f.carrier.moved.Store(false) // as if it had been idle
				f.tend()
			}
		}
	})
	got := make([]byte, len(data))
	if n, err := io.ReadFull(conn, got); err != nil {
		t.Fatalf("%d bytes of %d: %v", n, len(data), err)
	}
	if !bytes.Equal(got, data) {
		t.Error("the bytes differ")
	}
}

// A container that has said its last word and does not read either, as a server does that is told to stop, makes no work.
func TestTCP_AHalfClosedContainerThatDoesNotReadIsWaitedFor(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	data := randomBytes(24 << 20)
	server := listenTCP(t, func(s *net.TCPConn) {
		if _, err := io.Copy(io.Discard, s); err == nil {
			_, _ = s.Write(data)
		}
	})
	conn := c.mustDialTCP(server)
	defer conn.Close()
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b := &w.g.live.Load().budget
	eventually(t, "the buffer has grown", func() bool { return b.lent.Load() == tcpReceiveBuffer+tcpMaxBuffer })
	f := w.g.live.Load().flows.all(kindTCP)[0].(*tcpFlow)
	eventually(t, "it waits", func() bool { return f.carrier.toContainer.state.Load() == resting && !writable(f.ep) })
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d, or others: %v", len(got), len(data), err)
	}
}

func TestBuffers_OneContainerLeavesOthersTheirPart(t *testing.T) {
	const limit, greedy = 32 << 20, 40
	w := newWire(t, func(c *Config) { c.Limits.TCPBuffers = limit })
	alice, bob := w.container(aliceAddr), w.container(bobAddr)
	endless := listenTCP(t, func(s *net.TCPConn) {
		for b := make([]byte, 1<<20); ; {
			if _, err := s.Write(b); err != nil {
				return
			}
		}
	})
	b := &w.g.live.Load().budget
	for range greedy { // that never read
		defer alice.mustDialTCP(endless).Close()
	}
	// Each has taken what it can get: its send buffer is full, and does not grow.
	eventually(t, "all wait", func() bool {
		for _, f := range w.g.live.Load().flows.all(kindTCP) {
			f := f.(*tcpFlow)
			f.mu.Lock()
			c := f.carrier
			f.mu.Unlock()
			if c == nil || c.toContainer.state.Load() != resting || writable(f.ep) {
				return false
			}
		}
		return b.flows.Load() == greedy
	})
	if n, most := b.lent.Load(), int64(limit/2+greedy*2*tcpMinBuffer); n > most {
		t.Errorf("one container has %d bytes, want at most %d", n, most)
	}
	quiet := listenTCP(t, func(s *net.TCPConn) { _, _ = io.Copy(io.Discard, s) })
	defer bob.mustDialTCP(quiet).Close()
	eventually(t, "the other is established", func() bool { return b.flows.Load() == greedy+1 })
	f := w.g.live.Load().flows.find(flowOf(t, w, bobAddr)).flow.(*tcpFlow)
	eventually(t, "it is carried", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.carrier != nil
	})
	s := &f.carrier.buffers
	s.mu.Lock()
	defer s.mu.Unlock()
	if want := b.part(tcpReceiveBuffer); want <= tcpMinBuffer || s.receive != want || s.send != min(want, tcpSendBuffer) {
		t.Errorf("another's connection has %d and %d bytes, want %d", s.receive, s.send, want)
	}
}

// flowOf is the key of a container's only flow.
func flowOf(t *testing.T, w *wire, container netip.Addr) flowKey {
	t.Helper()
	table := w.g.live.Load().flows
	table.mu.RLock()
	defer table.mu.RUnlock()
	for k := range table.flows {
		if k.src.Addr() == container {
			return k
		}
	}
	t.Fatalf("%v has no flow", container)
	return flowKey{}
}

func TestBudget_GrowthLeavesHalfToThoseThatBegin(t *testing.T) {
	b := &budget{limit: 64}
	var alice, bob, carol account
	for _, c := range []struct {
		grant func(*account, int64) bool
		to    *account
		size  int64
		want  bool
	}{
		{b.grow, &alice, 17, false}, {b.grow, &alice, 16, true}, // a quarter each
		{b.begin, &alice, 17, false}, {b.begin, &alice, 16, true}, // a half each
		{b.grow, &bob, 1, false}, // half of it is lent
		{b.begin, &bob, 32, true}, {b.begin, &carol, 1, false},
	} {
		if got := c.grant(c.to, c.size); got != c.want {
			t.Errorf("%d bytes: %v, want %v; %d are lent", c.size, got, c.want, b.lent.Load())
		}
	}
	if n := b.lent.Load(); n != 64 || alice.lent.Load() != 32 || bob.lent.Load() != 32 || carol.lent.Load() != 0 {
		t.Errorf("%d lent: %d, %d, %d", n, alice.lent.Load(), bob.lent.Load(), carol.lent.Load())
	}
}

func TestDialTCP_IsInTheBudget(t *testing.T) {
	w := newWire(t, nil)
	c := mustDial(t, w, netip.AddrPort{}, w.container(aliceAddr).serveTCP(80, func(c *gonet.TCPConn) {
		_, _ = io.Copy(io.Discard, c)
		c.Close()
	}))
	b := &w.g.live.Load().budget
	if n, flows := b.lent.Load(), b.flows.Load(); n != tcpReceiveBuffer+tcpSendBuffer || flows != 1 {
		t.Errorf("%d bytes lent to %d flows", n, flows)
	}
	c.Close()
	eventually(t, "everything is given back", func() bool { return b.lent.Load() == 0 && b.flows.Load() == 0 })
}

func TestBudget_PartsShrinkWithTheirNumber(t *testing.T) {
	b := &budget{limit: 256 << 20}
	for _, c := range []struct{ flows, receive int64 }{
		{1, tcpReceiveBuffer}, {64, 1 << 20}, {128, 512 << 10}, {1024, 64 << 10}, {10_000, 6710}, {20_000, tcpMinBuffer},
	} {
		b.flows.Store(c.flows)
		if n := b.part(tcpReceiveBuffer); n != c.receive {
			t.Errorf("%d flows: %d bytes, want %d", c.flows, n, c.receive)
		}
	}
}
