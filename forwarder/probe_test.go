// Tests of what path MTU discovery gets from the packet path.

package forwarder

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// events takes what waits.
func (g *rig) events() (all []PathEvent) {
	for {
		select {
		case e := <-g.PathEvents():
			all = append(all, e)
		default:
			return all
		}
	}
}

func TestPathEvents_TellTheFirstPacketSinceWatchPeer(t *testing.T) {
	g := newRig(t)
	send := func() {
		g.fromA(pkt(udp(containerA, containerC, 10)), pkt(udp(containerA, containerC, 10)), pkt(udp(containerA, "10.2.9.9", 10)))
	}
	want := func(what string, n int) {
		t.Helper()
		e := g.events()
		if len(e) != n || n == 1 && (e[0] != PathEvent{Peer: g.peerCfg.Addr}) {
			t.Errorf("%s: events %v, want %d", what, e, n)
		}
	}
	send()
	want("a new peer", 1)
	send()
	want("not asked for again", 0)
	g.set(g.table)
	send()
	want("another table", 0)
	narrow := g.peerCfg
	narrow.MTU = 900
	g.WatchPeer(narrow)
	want("asked for, nothing sent", 0)
	send()
	want("asked for", 1)
	g.WatchPeer(PeerConfig{Addr: netip.MustParseAddrPort("192.0.2.1:1")}) // a peer that went
	send()
	want("another peer", 0)
}

// What our stack answers to peers' probes would wake their probing, and theirs ours, for ever.
func TestPathEvents_CountContainersPacketsAlone(t *testing.T) {
	g := newRig(t)
	g.NewInjector().Forward([]*packet.Packet{pkt(udp(gateway, containerC, 10))})
	g.fromPeer(g.peer, pkt(udp(containerC, containerA, 10)))
	if e := g.events(); len(e) != 0 {
		t.Errorf("events %v", e)
	}
}

func TestPathEvents_SurviveThatNobodyTakesThem(t *testing.T) {
	g := newRig(t)
	for range 2 * pathEvents {
		g.WatchPeer(g.peerCfg)
		g.fromA(pkt(udp(containerA, containerC, 10)))
		waitingOn(t, g.peer)
	}
	if n := len(g.events()); n != pathEvents {
		t.Errorf("%d events", n)
	}
	g.fromA(pkt(udp(containerA, containerC, 10)))
	if n := len(g.events()); n != 1 {
		t.Errorf("%d events when there is room again", n)
	}
}

func waitingOn(t *testing.T, c *net.UDPConn) (out [][]byte) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) { out = waiting(int(fd)) })
	return out
}

func TestSendProbe_SendsAnEchoRequestWhoseAnswerMayBeFragmented(t *testing.T) {
	g := newRig(t)
	for _, size := range []int{MinProbe, 577, 1472, MaxTrain} {
		p := Probe{Peer: g.peerCfg.Addr, Src: netip.MustParseAddr(gateway), Dst: netip.MustParseAddr("10.2.0.1"), Token: 0x0102030405060708, Size: size}
		if err := g.SendProbe(p); err != nil {
			t.Fatal(err)
		}
		d := datagrams(t, g.peer)
		if len(d) != 1 || len(d[0]) != size {
			t.Fatalf("%d datagrams", len(d))
		}
		ip := d[0]
		if err := nettest.Check(ip); err != nil {
			t.Error(err)
		}
		src, dst := addrs(ip)
		if src != p.Src || dst != p.Dst || ip[6]&0x40 != 0 || ip[20] != 8 || binary.BigEndian.Uint64(ip[28:]) != p.Token {
			t.Errorf("%x", ip[:MinProbe])
		}
	}
	for _, size := range []int{0, MinProbe - 1, MaxTrain + 1} {
		if g.SendProbe(Probe{Peer: g.peerCfg.Addr, Size: size}) == nil {
			t.Errorf("a probe of %d bytes was sent", size)
		}
	}
	g.Close()
	if err := g.SendProbe(Probe{Peer: g.peerCfg.Addr, Src: netip.MustParseAddr(gateway), Dst: netip.MustParseAddr("10.2.0.1"), Size: 100}); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

// reply is the answer to a probe, or a part of it.
func reply(token uint64, frag uint16, size int) []byte {
	payload := make([]byte, size)
	if size >= 8 {
		binary.BigEndian.PutUint64(payload, token)
	}
	return withFrag(nettest.Between("10.2.0.1", gateway), frag).ICMP(0, 0, probeIdent<<16|1, payload)
}

// asked sends a probe with that token.
func (g *rig) asked(t *testing.T, token uint64) {
	t.Helper()
	p := Probe{Peer: g.peerCfg.Addr, Src: netip.MustParseAddr(gateway), Dst: netip.MustParseAddr("10.2.0.1"), Token: token, Size: 100}
	if err := g.SendProbe(p); err != nil {
		t.Fatal(err)
	}
	datagrams(t, g.peer)
}

func TestPathEvents_TellAnswers(t *testing.T) {
	const token = 0xfeedfacecafebeef
	request := nettest.Between("10.2.0.1", gateway).ICMP(8, 0, probeIdent<<16|1, make([]byte, 100))
	other := nettest.Between("10.2.0.1", gateway).ICMP(0, 0, 7<<16|1, make([]byte, 100))
	for name, c := range map[string]struct {
		ip         []byte
		event      bool
		forGateway bool
	}{
		"an answer":                   {reply(token, 0, 1400), true, false},
		"the smallest answer":         {reply(token, 0, 8), true, false},
		"with DF":                     {reply(token, nettest.DF, 1400), true, false},
		"its first fragment":          {reply(token, nettest.MF, 800), true, false},
		"its second fragment":         {reply(token, 100, 800), false, true},
		"without a token":             {reply(token, 0, 7), false, true},
		"token 0":                     {reply(0, 0, 100), false, false},
		"what nobody asked":           {reply(token+1, 0, 100), false, false},
		"nor with that slot":          {reply(token+probeSlots, 0, 100), false, false},
		"a request":                   {request, false, true},
		"an answer to somebody else":  {other, false, true},
		"a datagram, not an answer":   {udp("10.2.0.1", gateway, 100), false, true},
		"as long as an empty message": {reply(token, 0, 0), false, true},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			g.asked(t, token)
			g.fromPeer(g.peer, pkt(c.ip))
			e := g.events()
			if c.event != (len(e) == 1 && e[0] == PathEvent{Answered: token}) || !c.event && len(e) != 0 {
				t.Errorf("events %v", e)
			}
			if got := len(g.gw.Take()); got != 0 != c.forGateway {
				t.Errorf("%d packets for the gateway", got)
			}
		})
	}
	t.Run("twice", func(t *testing.T) {
		g := newRig(t)
		g.asked(t, token)
		g.fromPeer(g.peer, pkt(reply(token, 0, 100)), pkt(reply(token, 0, 100)))
		if e := g.events(); len(e) != 1 {
			t.Errorf("events %v", e)
		}
	})
	t.Run("from somebody else's address", func(t *testing.T) {
		g := newRig(t)
		g.asked(t, token)
		g.fromPeer(g.small, pkt(reply(token, 0, 100)))
		if e := g.events(); len(e) != 0 {
			t.Errorf("events %v", e)
		}
	})
	t.Run("from a container", func(t *testing.T) {
		g := newRig(t)
		g.fromA(pkt(nettest.Between(containerA, gateway).ICMP(0, 0, probeIdent<<16|1, make([]byte, 100))))
		if e := g.events(); len(e) != 0 || len(g.gw.Take()) != 1 {
			t.Errorf("events %v", e)
		}
	})
}

func TestKernelMTU_IsThatOfTheRoute(t *testing.T) {
	g := newRig(t)
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Skip(err)
	}
	if got, want := g.KernelMTU(g.peerCfg.Addr), min(lo.MTU-UDPOverhead, MaxTrain); got != want {
		t.Errorf("%d, want %d", got, want)
	}
	if got := g.KernelMTU(netip.MustParseAddrPort("240.0.0.1:9")); got != 0 {
		t.Errorf("no route, and %d", got)
	}
}

func TestUnderlay_SetsDFAndIgnoresThePathMTUOfTheKernel(t *testing.T) {
	g := newRig(t)
	for _, fd := range g.under.Load()[outer4].fds {
		if v, err := unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER); err != nil || v != unix.IP_PMTUDISC_PROBE {
			t.Errorf("IP_MTU_DISCOVER is %d, %v", v, err)
		}
	}
}

func TestSendProbe_TellsWhatThisHostCannotSend(t *testing.T) {
	for errno, long := range map[error]bool{unix.EMSGSIZE: true, unix.ENETUNREACH: false} {
		if got := probeError(netip.AddrPort{}, errno); errors.Is(got, ErrProbeTooLong) != long || got == nil {
			t.Errorf("%v became %v", errno, got)
		}
	}
}
