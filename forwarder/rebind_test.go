// This file tests that a Router follows its host to other addresses: what stays, what fails, and all of it under traffic.

package forwarder

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// All of 127/8 is this host's.
var (
	home    = netip.MustParseAddr("127.0.0.1")
	away    = netip.MustParseAddr("127.0.0.2")
	home6   = netip.IPv6Loopback()
	nowhere netip.Addr
)

// from takes a datagram, with the address that it came from.
func from(t *testing.T, c *net.UDPConn) netip.Addr {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var a netip.Addr
	_ = rc.Control(func(fd uintptr) {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20_000); err != nil {
			t.Fatal(err)
		}
		_, sa, err := unix.Recvfrom(int(fd), make([]byte, 1<<16), unix.MSG_DONTWAIT)
		if err != nil {
			t.Fatal(err)
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			a = netip.AddrFrom4(sa.Addr)
		case *unix.SockaddrInet6:
			a = netip.AddrFrom16(sa.Addr)
		}
	})
	return a
}

// wantBothWays sends a packet each way and checks which address of ours it passes.
func (g *dualRig) wantBothWays(t *testing.T, f family, at netip.Addr) {
	t.Helper()
	addr := [families]string{outer4: over4, outer6: over6v6}[f]
	peer, to := g.on(f)
	g.fromA(pkt(udp(own(addr), addr, 10)))
	if a := from(t, peer); a != at {
		t.Errorf("sent from %v, want %v", a, at)
	}
	if to.Addr() != at {
		t.Errorf("bound to %v, want %v", to, at)
	}
	back := udp(addr, own(addr), 10)
	if _, err := peer.WriteToUDPAddrPort(back, to); err != nil {
		t.Fatal(err)
	}
	g.receiveOn(f, 1)
	one(t, "container a", g.a.Take(), hop1(back))
}

func TestRebind_GoesOverToOtherAddresses(t *testing.T) {
	for _, buffer := range []int{0, manyLanes} {
		before := descriptors(t)
		g := newDualRigOn(t, newDualRouter(t, 1, buffer, nil))
		port, here := g.Underlay().Port(), descriptors(t)
		g.wantBothWays(t, outer4, home)
		g.wantBothWays(t, outer6, home6)
		old := g.under.Load()
		if err := g.Rebind(away, home6); err != nil {
			t.Fatal(err)
		}
		if now := g.under.Load(); now[outer6] != old[outer6] || now[outer4] == old[outer4] {
			t.Error("the family whose address stayed has other sockets, or the other has not")
		}
		g.wantBothWays(t, outer4, away)
		g.wantBothWays(t, outer6, home6)
		if err := g.Rebind(home, nowhere); err != nil {
			t.Fatal(err)
		}
		g.wantBothWays(t, outer4, home)
		g.wantBothWays(t, outer6, home6)
		now := g.under.Load()
		if now[outer6] != old[outer6] {
			t.Error("IPv6, which was not to change, has other sockets")
		}
		for _, addr6 := range []netip.Addr{home6, nowhere} {
			if err := g.Rebind(home, addr6); err != nil || g.under.Load() != now {
				t.Errorf("to the addresses that it has: %v", err)
			}
		}
		if g.Underlay().Port() != port || g.Underlay6().Port() != port {
			t.Errorf("ports %d and %d, want %d", g.Underlay().Port(), g.Underlay6().Port(), port)
		}
		if now := descriptors(t); now != here {
			t.Errorf("%d descriptors, before %d", now, here)
		}
		s := g.Stats()
		if s.Underlay.SentPackets != 6 || s.Underlay.RecvPackets != 6 || s.Peers[g.peerCfg.Addr].SentPackets != 3 {
			t.Errorf("the counters are %+v, %+v", s.Underlay, s.Peers)
		}
		g.Close()
		if now := descriptors(t); now > before+6+3 { // the peers' sockets and the devices of the rig are closed later
			t.Errorf("%d descriptors, before %d", now, before)
		}
	}
}

func TestRebind_GivesAnIPv4NodeIPv6(t *testing.T) {
	newDualRouter(t, 1, 0, nil).Close()
	r := newRouter(t, 2)
	if err := r.Rebind(away, home6); err != nil {
		t.Fatal(err)
	}
	g := newDualRigOn(t, r)
	start(t, r)
	g.a.Inject(pkt(udp(containerA6, over6v6, 10)))
	if a := from(t, g.peer6); a != home6 {
		t.Errorf("sent from %v", a)
	}
	if _, err := g.peer6.WriteToUDPAddrPort(udp(over6v6, containerA6, 10), r.Underlay6()); err != nil {
		t.Fatal(err)
	}
	g.a.Wait(t, 1)
}

func TestRebind_ChangesNothingOnAnError(t *testing.T) {
	for _, loops := range []int{1, 2} {
		g := newDualRigOn(t, newDualRouter(t, loops, 0, nil))
		if loops > 1 {
			g.loops = g.loops[:1:1] // the test drives the first alone
		}
		port := int(g.Underlay().Port())
		blocker, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 3), Port: port})
		if err != nil {
			t.Fatal(err)
		}
		defer blocker.Close()
		was, fds := *g.under.Load(), descriptors(t)
		for name, c := range map[string]struct {
			addr, addr6 netip.Addr
			want        string
		}{
			"not our address":           {netip.MustParseAddr("192.0.2.1"), home6, "192.0.2.1"},
			"not our address, IPv6":     {away, netip.MustParseAddr("2001:db8::1"), "2001:db8::1"},
			"port taken":                {netip.MustParseAddr("127.0.0.3"), nowhere, "taken"},
			"no IPv4":                   {nowhere, home6, "not IPv4"},
			"IPv6 where IPv4 is wanted": {home6, home6, "not IPv4"},
			"IPv4 where IPv6 is wanted": {away, home, "not an IPv6 address"},
			"link-local":                {away, netip.MustParseAddr("fe80::1"), "fe80::1"},
		} {
			err := g.Rebind(c.addr, c.addr6)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: error %v, want one with %q", name, err, c.want)
			}
			if now := *g.under.Load(); now != was {
				t.Errorf("%s: the sockets changed", name)
			}
			if now := descriptors(t); now != fds {
				t.Errorf("%s: %d descriptors, before %d", name, now, fds)
			}
		}
		if loops == 1 {
			g.wantBothWays(t, outer4, home)
			g.wantBothWays(t, outer6, home6)
		}
	}
}

func TestRebind_IsRefusedByARouterThatHasStopped(t *testing.T) {
	for name, stop := range map[string]func(*Router){
		"Close": func(r *Router) { r.Close() },
		"Run":   func(r *Router) { start(t, r)() },
	} {
		r := newRouter(t, 2)
		stop(r)
		fds := descriptors(t)
		if err := r.Rebind(away, nowhere); !errors.Is(err, errStopped) {
			t.Errorf("after %s: %v", name, err)
		}
		if now := descriptors(t); now != fds {
			t.Errorf("after %s: %d descriptors, before %d", name, now, fds)
		}
	}
}

// rebindTraffic is traffic in all directions through a Router that runs, until done is called.
type rebindTraffic struct {
	*dualRig
	quit chan struct{}
	wg   sync.WaitGroup
}

func (r *rebindTraffic) keep(f func()) {
	r.wg.Go(func() {
		for {
			select {
			case <-r.quit:
				return
			default:
				f()
			}
		}
	})
}

func (r *rebindTraffic) done() {
	close(r.quit)
	r.wg.Wait()
}

// Everything that a container sends arrives at its peer, whatever the sockets do meanwhile; and what peers send to an address arrives
// as long as the address is there.
func TestRebind_LosesNothingThatContainersSend(t *testing.T) {
	for _, buffer := range []int{0, manyLanes} {
		r := &rebindTraffic{dualRig: newDualRigOn(t, newDualRouter(t, 2, buffer, nil)), quit: make(chan struct{})}
		fds := descriptors(t)
		start(t, r.Router)
		inj := r.NewInjector()
		var given atomic.Uint64
		var arrived [families]atomic.Uint64
		full := func() bool { // the peers' sockets shall not overflow
			runtime.Gosched()
			return given.Load() > arrived[outer4].Load()+arrived[outer6].Load()+60
		}
		r.keep(func() {
			if full() {
				return
			}
			given.Add(2)
			inj.Forward([]*packet.Packet{pkt(udp(gateway, over4, 10)), pkt(udp(gateway6, over6v6, 10))})
		})
		r.keep(func() {
			for _, c := range dualPaths {
				if peer, to := r.on(c.f); to.IsValid() {
					_, _ = peer.WriteToUDPAddrPort(udp(c.addr, own(c.addr), 10), to)
				}
			}
		})
		r.keep(func() {
			r.Stats()
			r.KernelMTU(r.peerCfg.Addr)
			_ = r.SendProbe(Probe{Peer: r.stock6Cfg.Addr, Src: netip.MustParseAddr(gateway), Dst: netip.MustParseAddr("10.46.0.1"), Size: 100})
		})
		senders := [families][]netip.Addr{outer4: {home, away}, outer6: {home6}}
		var readers sync.WaitGroup
		for f, c := range []*net.UDPConn{r.peer, r.peer6} {
			readers.Go(func() {
				b := make([]byte, 1<<16)
				for {
					n, a, err := c.ReadFromUDPAddrPort(b)
					if err != nil || bytes.Equal(b[:n], []byte("end")) {
						return
					}
					arrived[f].Add(1)
					if !slices.Contains(senders[f], a.Addr().Unmap()) {
						t.Errorf("a datagram came from %v", a)
						return
					}
				}
			})
		}
		const rounds, each = 30, 10
		for i := range rounds {
			want := []netip.Addr{away, home}[i%2]
			for range each {
				for begin := time.Now(); full(); {
					if time.Since(begin) > 20*time.Second {
						t.Fatal("packets are missing")
					}
				}
				given.Add(2)
				r.a.Inject(pkt(udp(containerA, over4, 10)), pkt(udp(containerA6, over6v6, 10)))
			}
			if err := r.Rebind(want, home6); err != nil {
				t.Fatal(err)
			}
			if r.Underlay().Addr() != want {
				t.Errorf("at %v", r.Underlay())
			}
			before := len(r.a.Packets()) // the next of a peer arrives at the new address
			r.a.Wait(t, before+1)
		}
		r.done()
		for { // until the loops have read the device
			s := r.Stats()
			if s.Peers[r.peerCfg.Addr].SentPackets+s.Peers[r.peer6Cfg.Addr].SentPackets == given.Load() {
				break
			}
			runtime.Gosched()
		}
		for _, c := range []*net.UDPConn{r.peer, r.peer6} {
			if _, err := c.WriteToUDPAddrPort([]byte("end"), addrPort(c)); err != nil {
				t.Fatal(err)
			}
		}
		readers.Wait()
		s := r.Stats()
		for f, cfg := range []PeerConfig{r.peerCfg, r.peer6Cfg} {
			if got, want := arrived[f].Load(), s.Peers[cfg.Addr].SentPackets; got != want {
				t.Errorf("family %d: %d of %d packets arrived", f, got, want)
			}
		}
		r.wantDrops(nil)
		if now := descriptors(t); now > fds+2 { // and those of the runtime's poller
			t.Errorf("%d descriptors, before %d", now, fds)
		}
	}
}

// Addresses change, while tables, ports and the end of the Router come in between.
func TestRebind_InTheMidstOfEverything(t *testing.T) {
	for range 4 {
		r := &rebindTraffic{dualRig: newDualRigOn(t, newDualRouter(t, 3, 0, nil)), quit: make(chan struct{})}
		stop := start(t, r.Router)
		inj := r.NewInjector()
		r.keep(func() { inj.Forward([]*packet.Packet{pkt(udp(gateway, over4, 10)), pkt(udp(gateway6, over6v6, 10))}) })
		r.keep(func() {
			for _, c := range dualPaths {
				if peer, to := r.on(c.f); to.IsValid() {
					_, _ = peer.WriteToUDPAddrPort(udp(c.addr, own(c.addr), 10), to)
				}
			}
		})
		r.keep(func() { _ = r.SetTable(r.table) })
		r.keep(func() {
			p, err := r.AddPort(PortConfig{Name: "x", Sources: []netip.Prefix{netip.MustParsePrefix("10.1.0.8/32")}, Device: nettest.NewDevice(t)})
			if err == nil {
				r.RemovePort(p)
			}
		})
		r.keep(func() { r.NewInjector().Forward([]*packet.Packet{pkt(udp(gateway6, over6v6, 10))}) })
		var rebinds atomic.Uint64
		r.keep(func() {
			i := int(rebinds.Load())
			if err := r.Rebind([]netip.Addr{home, away}[i%2], []netip.Addr{home6, nowhere}[i/2%2]); err != nil && !errors.Is(err, errStopped) {
				t.Error(err)
			}
			rebinds.Add(1)
		})
		for rebinds.Load() < 20 {
			r.a.Inject(pkt(udp(containerA, over4, 10)), pkt(udp(containerA6, over6v6, 10)))
			runtime.Gosched()
		}
		stop()
		for n := rebinds.Load(); rebinds.Load() < n+3; {
			runtime.Gosched()
		}
		r.done()
	}
}

func TestRebind_LeavesThePathWithoutAllocations(t *testing.T) {
	p := newPath(t)
	if err := p.Rebind(away, nowhere); err != nil {
		t.Fatal(err)
	}
	orig := traffic()["tso6"]
	pkts := copies(orig)
	for range 5 {
		p.batch(orig, pkts)
	}
	if n := testing.AllocsPerRun(50, func() { p.batch(orig, pkts) }); n != 0 {
		t.Errorf("%v allocations a batch", n)
	}
}
