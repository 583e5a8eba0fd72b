// Tests of path MTU discovery, on a network of their own with a clock of their own.

package node

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// wire is the underlay between the prober and one peer.
type wire struct {
	events chan forwarder.PathEvent

	mu        sync.Mutex
	carries   int  // bytes of the largest inner packet that arrives
	local     int  // of the largest that this host itself can send; 0: any
	kernel    int  // what the kernel says of the route
	told      bool // a router tells the kernel of a probe that is too large
	trip      time.Duration
	loss      float64
	answersAt netip.Addr // zero: at any address
	watched   bool
	sent      []int // sizes of the probes
}

func (w *wire) SendProbe(p forwarder.Probe) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, p.Size)
	if w.local > 0 && p.Size > w.local {
		return forwarder.ErrProbeTooLong
	}
	if p.Size > w.carries && w.told {
		w.kernel = w.carries
	}
	if p.Size > w.carries || rand.Float64() < w.loss || w.answersAt.IsValid() && p.Dst != w.answersAt {
		return nil
	}
	time.AfterFunc(w.trip, func() { w.events <- forwarder.PathEvent{Answered: p.Token} })
	return nil
}

func (w *wire) PathEvents() <-chan forwarder.PathEvent { return w.events }

func (w *wire) WatchPeer(forwarder.PeerConfig) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.watched = true
}

func (w *wire) KernelMTU(netip.AddrPort) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.kernel
}

func (w *wire) Overhead(netip.Addr) int { return forwarder.UDPOverhead }

func (w *wire) change(f func(*wire)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(w)
}

// probes are the sizes since the last call.
func (w *wire) probes() []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	sent := w.sent
	w.sent = nil
	return sent
}

// packet is a container's: the prober hears of it if it watches.
func (w *wire) packet() {
	w.mu.Lock()
	told := w.watched
	w.watched = false
	w.mu.Unlock()
	if told {
		w.events <- forwarder.PathEvent{Peer: wirePeer}
	}
}

// send sends packets for so long.
func (w *wire) send(long time.Duration) {
	for end := time.Now().Add(long); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		w.packet()
	}
}

var wirePeer = netip.MustParseAddrPort("192.0.2.12:8285")

// onWire runs body with a prober that has one peer, whose MTU is that of the nodes.
func onWire(t *testing.T, mtu int, w *wire, body func(p *prober)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w.events = make(chan forwarder.PathEvent, 256)
		w.watched = true
		if w.trip == 0 {
			w.trip = time.Millisecond
		}
		p := newProber(slog.New(slog.DiscardHandler), func() {})
		p.follow([]pathTarget{wireTarget(mtu)})
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() {
			if err := p.run(ctx, w); err != nil {
				t.Error(err)
			}
		})
		body(p)
		cancel()
		run.Wait()
	})
}

func wireTarget(mtu int) pathTarget {
	return pathTarget{
		config:  forwarder.PeerConfig{Addr: wirePeer, MTU: mtu},
		source:  netip.MustParseAddr("10.5.1.1"),
		answers: [2]netip.Addr{netip.MustParseAddr("10.5.2.0"), netip.MustParseAddr("10.5.2.1")},
		least:   minPeerMTU,
	}
}

func wantMTU(t *testing.T, p *prober, what string, least, most int) {
	t.Helper()
	if got := p.mtu(wirePeer, 65507); got < least || got > most {
		t.Errorf("%s: MTU %d, want %d to %d", what, got, least, most)
	}
}

func TestProber_FindsWhatThePathCarries(t *testing.T) {
	for name, c := range map[string]struct {
		mtu   int // of the nodes
		w     *wire
		least int // of the result; 0: exactly what the path carries
	}{
		"all of it":                         {mtu: 1472, w: &wire{carries: 1472}},
		"all of a jumbo frame":              {mtu: 8972, w: &wire{carries: 8972}},
		"all of the largest datagram":       {mtu: 65507, w: &wire{carries: 65507}},
		"a tunnel, and the kernel knows":    {mtu: 1472, w: &wire{carries: 1379, kernel: 1379}},
		"a tunnel, and a router says so":    {mtu: 1472, w: &wire{carries: 1399, told: true}},
		"a tunnel, and nobody says so":      {mtu: 1472, w: &wire{carries: 1372}},
		"an odd size, and nobody says so":   {mtu: 1472, w: &wire{carries: 1399}, least: 1399 - granularity},
		"a plain frame among jumbo hosts":   {mtu: 8972, w: &wire{carries: 1472}},
		"an odd size below jumbo":           {mtu: 8972, w: &wire{carries: 5000}, least: 5000 - granularity},
		"an odd size far below the largest": {mtu: 65507, w: &wire{carries: 21000}, least: 21000 - granularity},
		"less than the common base":         {mtu: 1472, w: &wire{carries: 700}, least: 700 - granularity},
		"the least":                         {mtu: 1472, w: &wire{carries: 576}},
		"a narrow interface of this host":   {mtu: 1472, w: &wire{carries: 1392, local: 1392, kernel: 1392}},
		"the kernel is wrong":               {mtu: 1472, w: &wire{carries: 1472, kernel: 600}},
		"the kernel is too hopeful":         {mtu: 1472, w: &wire{carries: 1372, kernel: 1452}},
		"far away":                          {mtu: 1472, w: &wire{carries: 1372, trip: 300 * time.Millisecond}},
		"at .1 alone":                       {mtu: 1472, w: &wire{carries: 1372, answersAt: netip.MustParseAddr("10.5.2.1")}},
		"small nodes":                       {mtu: 600, w: &wire{carries: 1472}, least: 600},
		"the smallest nodes":                {mtu: 576, w: &wire{carries: 1472}, least: 576},
	} {
		t.Run(name, func(t *testing.T) {
			onWire(t, c.mtu, c.w, func(p *prober) {
				wantMTU(t, p, "before anything was sent", c.mtu, c.mtu)
				c.w.send(8 * time.Second)
				if c.least == 0 {
					c.least = c.w.carries
				}
				wantMTU(t, p, "after the search", c.least, min(c.w.carries, c.mtu))
			})
		})
	}
}

func TestProber_HealsABlackHoleWithinASecond(t *testing.T) {
	for _, trip := range []time.Duration{time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond} {
		w := &wire{carries: 1372, trip: trip}
		onWire(t, 1472, w, func(p *prober) {
			w.send(1010 * time.Millisecond)
			wantMTU(t, p, trip.String(), 1372, 1372)
		})
	}
}

func TestProber_IsSilentWithoutTraffic(t *testing.T) {
	w := &wire{carries: 1472}
	onWire(t, 1472, w, func(*prober) {
		time.Sleep(24 * time.Hour)
		if n := len(w.probes()); n != 0 {
			t.Errorf("%d probes without any traffic", n)
		}
		w.send(time.Second)
		if n := len(w.probes()); n == 0 || n > 10 {
			t.Errorf("%d probes for the first traffic", n)
		}
		time.Sleep(24 * time.Hour)
		if n := len(w.probes()); n != 0 {
			t.Errorf("%d probes when the traffic had ended", n)
		}
	})
}

func TestProber_ConfirmsCheaply(t *testing.T) {
	for _, carries := range []int{1472, 1372} {
		w := &wire{carries: carries}
		onWire(t, 1472, w, func(*prober) {
			w.send(5 * time.Second)
			w.probes()
			w.send(5 * time.Minute)
			if n := len(w.probes()); n < 20 || n > 2*21 {
				t.Errorf("%d probes in five minutes on a path of %d", n, carries)
			}
		})
	}
}

func TestProber_FollowsThePath(t *testing.T) {
	w := &wire{carries: 1472}
	onWire(t, 1472, w, func(p *prober) {
		w.send(time.Minute)
		wantMTU(t, p, "at first", 1472, 1472)

		w.change(func(w *wire) { w.carries = 1372 })
		w.send(17 * time.Second)
		wantMTU(t, p, "after it turned into a black hole", 1372, 1372)

		w.change(func(w *wire) { w.carries, w.kernel = 1280, 1280 })
		w.send(2 * time.Second)
		wantMTU(t, p, "after the kernel heard of a tunnel", 1280, 1280)

		w.change(func(w *wire) { w.carries, w.kernel = 1472, 0 })
		w.send(raiseEvery + 2*time.Second)
		wantMTU(t, p, "after it is as it was", 1472, 1472)

		w.change(func(w *wire) { w.local, w.kernel, w.carries = 1352, 1352, 1352 })
		w.send(2 * time.Second)
		wantMTU(t, p, "after our interface became smaller", 1352, 1352)
	})
}

func TestProber_AsksOnceWhenTheKernelIsWrong(t *testing.T) {
	w := &wire{carries: 1472}
	onWire(t, 1472, w, func(p *prober) {
		w.send(5 * time.Second)
		w.probes()
		w.change(func(w *wire) { w.kernel = 600 }) // somebody forges ICMP errors
		w.send(10 * time.Second)
		wantMTU(t, p, "a forged error", 1472, 1472)
		if n := len(w.probes()); n > 4 {
			t.Errorf("%d probes for one forged error", n)
		}
	})
}

func TestProber_ChangesNothingWhilePeersAreAway(t *testing.T) {
	w := &wire{carries: 1372}
	onWire(t, 1472, w, func(p *prober) {
		w.send(5 * time.Second)
		w.change(func(w *wire) { w.carries = 0 })
		w.probes()
		w.send(10 * time.Minute)
		wantMTU(t, p, "away", 1372, 1372)
		if n := len(w.probes()); n > 400 {
			t.Errorf("%d probes to a peer that is away", n)
		}
		w.change(func(w *wire) { w.carries = 1472 })
		w.send(awayMost + 5*time.Second)
		wantMTU(t, p, "back", 1472, 1472)
	})
}

func TestProber_TakesTheKernelsWordOfASilentPeer(t *testing.T) {
	w := &wire{carries: 0, kernel: 1372}
	onWire(t, 1472, w, func(p *prober) {
		w.send(10 * time.Second)
		wantMTU(t, p, "silent", 1372, 1372)
		w.change(func(w *wire) { w.kernel = 20 })
		w.send(2 * awayMost)
		wantMTU(t, p, "within what may be", minPeerMTU, minPeerMTU)
		w.change(func(w *wire) { w.carries = 1472 })
		w.send(2 * awayMost)
		wantMTU(t, p, "when it answers after all", 1472, 1472)
	})
}

func TestProber_IsNotFooledByLoss(t *testing.T) {
	for _, carries := range []int{1472, 1372} {
		w := &wire{carries: carries, loss: 0.05}
		onWire(t, 1472, w, func(p *prober) {
			below := 0
			for range 600 {
				w.send(time.Second)
				if p.mtu(wirePeer, 1472) < carries-granularity {
					below++
				}
			}
			if below > 60 {
				t.Errorf("below what the path of %d carries for %d s of 600", carries, below)
			}
			w.change(func(w *wire) { w.loss = 0 })
			w.send(raiseEvery + 20*time.Second)
			wantMTU(t, p, "afterwards", carries, carries)
		})
	}
}

func TestProber_StartsAnewWhenThePeerChanges(t *testing.T) {
	w := &wire{carries: 8972}
	onWire(t, 1472, w, func(p *prober) {
		w.send(5 * time.Second)
		p.follow([]pathTarget{wireTarget(1472)})
		w.probes()
		w.send(5 * time.Second)
		if n := len(w.probes()); n != 0 {
			t.Errorf("%d probes because the same peer came again", n)
		}
		p.follow([]pathTarget{wireTarget(8972)})
		wantMTU(t, p, "announced", 8972, 8972)
		w.change(func(w *wire) { w.carries = 4068 })
		w.send(3 * time.Second)
		wantMTU(t, p, "probed again", 4068, 4068)
		p.follow(nil)
		if got := p.mtu(wirePeer, 1234); got != 1234 {
			t.Errorf("a peer that is not there has the MTU %d", got)
		}
		w.probes()
		w.send(5 * time.Second)
		if n := len(w.probes()); n != 0 {
			t.Errorf("%d probes to a peer that is not there", n)
		}
	})
}

func TestProber_BelievesNoAnswerThatItDidNotAskFor(t *testing.T) {
	w := &wire{carries: 1372}
	onWire(t, 1472, w, func(p *prober) {
		for range 1000 {
			w.packet()
			w.events <- forwarder.PathEvent{Answered: rand.Uint64()}
			time.Sleep(5 * time.Millisecond)
		}
		wantMTU(t, p, "among made-up answers", 1372, 1372)
		synctest.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.asked) != 0 {
			t.Errorf("%d probes are remembered", len(p.asked))
		}
	})
}

func TestProber_ForgetsWhatWasAsked(t *testing.T) {
	w := &wire{carries: 1372}
	onWire(t, 1472, w, func(p *prober) {
		w.send(time.Minute)
		time.Sleep(time.Minute)
		synctest.Wait()
		c := p.counts()
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.asked) != 0 {
			t.Errorf("%d probes are remembered", len(p.asked))
		}
		if c.Narrow != 1 || c.Searches != 1 || c.SearchesVain != 0 || c.ProbesSent == 0 || c.ProbesAnswered == 0 || c.ProbesAnswered >= c.ProbesSent {
			t.Errorf("%+v", c)
		}
	})
}

// many is a router with peers that never answer.
type many struct {
	wire
	errs int
}

func (m *many) SendProbe(forwarder.Probe) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.errs++
	return errors.New("no route")
}

func TestProber_EndsWithItsContextInTheMiddleOfSearches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &wire{events: make(chan forwarder.PathEvent, 2000)}
		p := newProber(slog.New(slog.DiscardHandler), func() { t.Error("a result without answers") })
		var targets []pathTarget
		for i := range 1000 {
			target := wireTarget(1472)
			target.config.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)}), 8285)
			targets = append(targets, target)
			w.events <- forwarder.PathEvent{Peer: target.config.Addr}
		}
		p.follow(targets)
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		if err := p.run(ctx, w); err != nil {
			t.Error(err)
		}
		if n := len(w.probes()); n == 0 || n > 2*3*2*maxSearches {
			t.Errorf("%d probes at once", n)
		}
	})
}

func TestProber_SurvivesAnUnderlayThatRefuses(t *testing.T) {
	m := &many{wire: wire{events: make(chan forwarder.PathEvent, 2000), watched: true}}
	synctest.Test(t, func(t *testing.T) {
		m.events = make(chan forwarder.PathEvent, 2000)
		p := newProber(slog.New(slog.DiscardHandler), func() {})
		p.follow([]pathTarget{wireTarget(1472)})
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { _ = p.run(ctx, m) })
		m.send(10 * time.Minute)
		wantMTU(t, p, "refused", 1472, 1472)
		if m.errs == 0 || m.errs > 1000 {
			t.Errorf("%d probes", m.errs)
		}
		cancel()
		run.Wait()
	})
}

func TestNode_RoutesByThePathMTU(t *testing.T) {
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	n.external.public = netip.MustParseAddr("192.0.2.1")
	narrow, other := ovlLease("10.5.2.0/24", "192.0.2.12", "bb", 8285, 1472), stockLease("10.5.3.0/24", "192.0.2.13")
	n.setLeases([]lease.Lease{narrow, other})
	check := func(what string, mtu int) {
		t.Helper()
		w.mu.Lock()
		table := w.table
		w.mu.Unlock()
		if got, want := lookup(t, table, "10.5.2.7"), forwarder.ToPeer(forwarder.PeerConfig{Addr: wirePeer, MTU: mtu}); got != want {
			t.Errorf("%s: %+v, want %+v", what, got, want)
		}
		peers, err := n.Peers(t.Context())
		if err != nil || len(peers) != 2 {
			t.Fatalf("%v, %v", peers, err)
		}
		if peers[0].MTU != 1472 || peers[0].PathMTU != mtu || peers[1].PathMTU != 1472 {
			t.Errorf("%s: peers %+v", what, peers)
		}
	}
	check("before probing", 1472)
	(&search{prober: n.prober, path: n.prober.paths[wirePeer]}).set(1372, "")
	check("found", 1372)
	n.setLeases([]lease.Lease{narrow, other, stockLease("10.5.9.0/24", "192.0.2.12")}) // a further subnet of one that there is
	n.setLeases([]lease.Lease{narrow, other})
	check("with another snapshot", 1372)
	s, err := n.Status(t.Context())
	if err != nil || s.Counters["path_mtu"]["narrow_peers"] != 1 {
		t.Errorf("counters %v, %v", s.Counters["path_mtu"], err)
	}
	narrow.Attrs.RootlessOvl.MTU = 1300
	n.setLeases([]lease.Lease{narrow, other})
	w.mu.Lock()
	defer w.mu.Unlock()
	if got := lookup(t, w.table, "10.5.2.7"); got != forwarder.ToPeer(forwarder.PeerConfig{Addr: wirePeer, MTU: 1300}) {
		t.Errorf("announced anew: %+v", got)
	}
}

func TestPathTargets_AreWherePeersAnswer(t *testing.T) {
	me := testSelf()
	targets := pathTargets(peersOf([]lease.Lease{
		ovlLease("10.5.2.0/24", "192.0.2.3", "bb", 18285, 1400),
		stockLease("10.5.1.0/24", "192.0.2.2"),
		stockLease("10.5.5.0/24", ""),
	}, me), me.subnets())
	addr := netip.MustParseAddr
	want := []pathTarget{
		{forwarder.PeerConfig{Addr: netip.MustParseAddrPort("192.0.2.3:18285"), MTU: 1400}, addr("10.5.72.1"), [2]netip.Addr{addr("10.5.2.1")}, 576},
		{forwarder.PeerConfig{Addr: netip.MustParseAddrPort("192.0.2.2:8285"), MTU: 1472, AnyPort: true}, addr("10.5.72.1"), [2]netip.Addr{addr("10.5.1.0"), addr("10.5.1.1")}, 576},
	}
	if !slices.Equal(targets, want) {
		t.Errorf("got  %+v\nwant %+v", targets, want)
	}
}
