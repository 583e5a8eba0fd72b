// This file tests connections that both sides have ended while the container has not taken everything yet.

package stack

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// smallWindow has a container take next to nothing that its programs do not read.
func (c *container) smallWindow() {
	c.w.t.Helper()
	size := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4096, Default: 4096, Max: 4096}
	moderate := tcpip.TCPModerateReceiveBufferOption(false)
	for _, o := range []tcpip.SettableTransportProtocolOption{&size, &moderate} {
		if err := c.s.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			c.w.t.Fatal(err)
		}
	}
}

// unsettled opens connections whose container has sent its FIN and does not read, to a server that has said data and its FIN.
func unsettled(t *testing.T, c *container, count int, data []byte) (conns []*gonet.TCPConn) {
	t.Helper()
	c.smallWindow()
	server := listenTCP(t, func(s *net.TCPConn) {
		_, _ = s.Write(data)
		_ = s.CloseWrite()
		_, _ = io.Copy(io.Discard, s)
	})
	for range count {
		conn := c.mustDialTCP(server)
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	eventually(t, "the host's side is over", func() bool {
		flows := c.w.g.live.Load().flows.all(kindTCP)
		for _, f := range flows {
			f := f.(*tcpFlow)
			f.mu.Lock()
			carrier := f.carrier
			f.mu.Unlock()
			if carrier == nil || !carrier.settling.Load() {
				return false
			}
		}
		return len(flows) == count
	})
	return conns
}

// endpoints is how many connections gVisor has bytes for.
func (w *wire) endpoints() (n int) {
	for _, e := range w.g.live.Load().s.RegisteredEndpoints() {
		if e, ok := e.(*tcp.Endpoint); ok && !settled(e) {
			n++
		}
	}
	return n
}

func TestSettle_WhatTheContainerHasNotTakenKeepsItsPlace(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	data := randomBytes(200 << 10)
	conns := unsettled(t, c, 3, data)
	b := &w.g.live.Load().budget
	for _, f := range w.g.live.Load().flows.all(kindTCP) {
		f.(*tcpFlow).tend()
	}
	if s := w.g.Stats(); s.TCPFlows != 3 || b.flows.Load() != 3 || b.lent.Load() < int64(3*len(data)) {
		t.Errorf("%d flows in the table, %d in the budget with %d bytes", s.TCPFlows, b.flows.Load(), b.lent.Load())
	}
	for _, conn := range conns { // nothing is lost
		if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
		}
		conn.Close()
	}
	eventually(t, "they are gone", func() bool {
		return w.g.Stats().TCPFlows == 0 && b.lent.Load() == 0 && b.flows.Load() == 0 && w.endpoints() == 0
	})
}

func TestSettle_ReleaseEndsIt(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	conns := unsettled(t, c, 3, randomBytes(200<<10))
	w.g.Release(netip.PrefixFrom(aliceAddr, 32))
	eventually(t, "they are gone", func() bool {
		return w.g.Stats().TCPFlows == 0 && w.g.live.Load().budget.lent.Load() == 0 && w.endpoints() == 0
	})
	for _, conn := range conns {
		if _, err := io.ReadAll(conn); err == nil {
			t.Error("the container saw an orderly end, want a reset")
		}
	}
}

func TestSettle_AContainerThatTakesNothingIsGivenUp(t *testing.T) {
	w := newWire(t, func(c *Config) { c.Timeouts.TCPLast = time.Second })
	c := w.container(aliceAddr)
	unsettled(t, c, 3, randomBytes(200<<10))
	eventually(t, "they are gone", func() bool { return w.g.Stats().TCPFlows == 0 && w.endpoints() == 0 })
}

// A connection into a container that its dialler has closed.
func TestSettle_DialledConnectionsToo(t *testing.T) {
	w := newWire(t, nil)
	c := w.container(aliceAddr)
	c.smallWindow()
	data := randomBytes(64 << 10)
	a, proto := full(netip.AddrPortFrom(aliceAddr, 80))
	l, err := gonet.ListenTCP(c.s, a, proto)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, release := range []bool{false, true} {
		conn, err := w.g.DialTCP(t.Context(), netip.AddrPort{}, netip.AddrPortFrom(aliceAddr, 80))
		if err != nil {
			t.Fatal(err)
		}
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(data); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		conn.Close()
		if n := w.g.Stats().TCPFlows; n != 1 {
			t.Errorf("%d flows in the table, want 1", n)
		}
		if release {
			w.g.Release(netip.PrefixFrom(aliceAddr, 32))
		} else if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
		}
		server.Close()
		eventually(t, "it is gone", func() bool { return w.g.Stats().TCPFlows == 0 && w.endpoints() == 0 })
	}
}
