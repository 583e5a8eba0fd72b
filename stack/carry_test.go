// This file tests what TCP flows cost: no goroutine while idle, and buffers within their budget.

package stack

import (
	"bytes"
	"io"
	"net"
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
	eventually(t, "it is established", func() bool { return len(w.g.live.Load().flows.all(kindTCP)) == 1 })
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
			case <-time.After(50 * time.Microsecond):
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
