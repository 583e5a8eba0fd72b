// Tests of what the node makes of clocks that jump, and of time in which it did not run.

package node

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
)

// What the last run knew is as old as the host's own time says, whatever became of the date; of an earlier run of the host there is only the date.
func TestLastKnown_IsAsOldAsTheHostSaysNotTheDate(t *testing.T) {
	for name, c := range map[string]struct {
		savedAgo time.Duration // by the date
		boot     string        // by which it was saved
		up       time.Duration // when it was saved
		usable   bool
	}{
		"a minute ago":                           {time.Minute, "now", 10*time.Hour - time.Minute, true},
		"the date was set forward by a year":     {365 * 24 * time.Hour, "now", 10*time.Hour - time.Minute, true},
		"the date was set back by a year":        {-365 * 24 * time.Hour, "now", 10*time.Hour - time.Minute, true},
		"too long ago, and the date was set":     {time.Minute, "now", 10*time.Hour - 2*time.Hour, false},
		"in the host's future, but not the date": {time.Minute, "now", 11 * time.Hour, true}, // no such thing: the date is all there is
		"before a reboot, a minute ago":          {time.Minute, "before", 9 * time.Hour, true},
		"before a reboot, in the future":         {-time.Minute, "before", 9 * time.Hour, false},
		"before a reboot, too long ago":          {2 * time.Hour, "before", 9 * time.Hour, false},
		"by a version that wrote the date only":  {-time.Minute, "", 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
			n.cfg.LeaseTTL = time.Hour
			w.mu.Lock()
			w.boot, w.uptime = "now", 10*time.Hour
			w.mu.Unlock()
			saved := savedLast{V: 1, SavedAt: time.Now().Add(-c.savedAgo), Boot: c.boot, Uptime: c.up,
				Subnet: netip.MustParsePrefix("10.5.72.0/24"), Config: `{"Network":"10.5.0.0/16"}`}
			if err := writeState(n.cfg.StateDir+"/"+lastFile, saved); err != nil {
				t.Fatal(err)
			}
			if _, ok := n.lastKnown().usable(n.cfg, time.Now()); ok != c.usable {
				t.Errorf("usable: %v, want %v", ok, c.usable)
			}
			// Unless the lease is confirmed, the next run is told no later time.
			n.mu.Lock()
			n.boot = "now"
			err := n.saveLastLocked()
			n.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			n.mu.Lock()
			n.savedAt, n.savedUp = time.Time{}, 0
			n.mu.Unlock()
			again := n.lastKnown()
			if c.boot == "now" && c.up < 10*time.Hour && (again.Boot != "now" || again.Uptime != c.up) {
				t.Errorf("written again as %v of run %q", again.Uptime, again.Boot)
			}
			if age := time.Since(again.SavedAt); c.boot != "now" && (age-c.savedAgo).Abs() > time.Minute/2 {
				t.Errorf("written again as %v old, was %v", age, c.savedAgo)
			}
		})
	}
}

func TestWatchClock_TellsOfTimeInWhichItDidNotRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
		var log syncBuffer
		n.log = slog.New(slog.NewTextHandler(&log, nil))
		begin := time.Now()
		var asleep atomic.Int64 // which Go's timers do not count
		n.edges.sinceBoot = func() time.Duration { return time.Hour + time.Since(begin) + time.Duration(asleep.Load()) }
		n.prober.follow([]pathTarget{wireTarget(1472)})
		path := func() *peerPath {
			n.prober.mu.Lock()
			defer n.prober.mu.Unlock()
			return n.prober.paths[wirePeer]
		}
		first := path()
		done := make(chan error)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { done <- n.watchClock(ctx) }()
		pass := func() {
			time.Sleep(time.Minute)
			synctest.Wait() // for who looks at the clock at the same time
		}
		pass()
		asleep.Add(int64(10 * time.Second)) // a busy machine
		pass()
		if got := log.String(); got != "" || path() != first {
			t.Errorf("nothing has happened: %s", got)
		}
		asleep.Add(int64(8 * time.Hour))
		pass()
		if got := log.String(); strings.Count(got, "did not run for a while") != 1 || !strings.Contains(got, "for=8h0m2s") {
			t.Errorf("log: %s", got)
		}
		if path() == first {
			t.Error("paths are not searched anew")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestNoteHeard_KnowsWhenPacketsCame(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	for _, step := range []struct {
		second  int
		packets uint64
		want    int // second; -1: never
	}{
		{0, 0, -1}, {2, 0, -1}, {4, 3, 4}, {6, 3, 4}, {8, 4, 8},
		{10, 0, 8},  // its configuration has changed
		{12, 4, 12}, // as many as there were before that
		{14, 4, 12},
		{16, 2, 16}, // changed, and heard again before anybody looked
	} {
		n.noteHeard(at(step.second), map[netip.AddrPort]forwarder.PeerStats{wirePeer: {RecvPackets: step.packets}})
		want := time.Time{}
		if step.want >= 0 {
			want = at(step.want)
		}
		if got := n.heard[wirePeer].at; !got.Equal(want) {
			t.Errorf("at %d s with %d packets: heard at %v, want %v", step.second, step.packets, got, want)
		}
	}
	n.noteHeard(at(20), nil)
	if len(n.heard) != 0 {
		t.Errorf("peers that are gone are remembered: %v", n.heard)
	}
}

func TestSilence_SaysWhichWayIsClosed(t *testing.T) {
	now := time.Unix(10000, 0)
	ago := func(s int) time.Time { return now.Add(time.Duration(-s) * time.Second) }
	for name, c := range map[string]struct {
		since, last time.Time
		stock       bool
		want        string // part of it; empty: nothing
	}{
		"it answers":                     {last: ago(1)},
		"it was not asked":               {},
		"nothing comes any more":         {since: ago(90), last: ago(95), want: "for 1m30s it has answered nothing, and nothing was received"},
		"nothing ever came":              {since: ago(90), want: "nothing was ever received"},
		"packets come":                   {since: ago(90), last: ago(2), want: "one direction only"},
		"packets come of a flannel host": {since: ago(90), last: ago(2), stock: true},
		"a flannel host is gone":         {since: ago(90), last: ago(100), stock: true, want: "nothing was received"},
	} {
		got := silence(wirePeer, c.stock, c.since, c.last, now)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestProber_TellsOfAPeerThatDoesNotAnswer(t *testing.T) {
	w := &wire{carries: 1472}
	onWire(t, 1472, w, func(p *prober) {
		w.send(5 * time.Second)
		if since := p.silentSince(wirePeer); !since.IsZero() || p.counts().Silent != 0 {
			t.Errorf("silent since %v", since)
		}
		w.change(func(w *wire) { w.carries = 0 })
		begin := time.Now()
		w.send(40 * time.Second)
		since := p.silentSince(wirePeer)
		if since.Before(begin) || time.Since(since) < 10*time.Second || p.counts().Silent != 1 {
			t.Errorf("silent since %v, counts %+v; want about 20 s after %v", since, p.counts(), begin)
		}
		w.send(5 * time.Minute)
		if again := p.silentSince(wirePeer); !again.Equal(since) {
			t.Errorf("silent since %v, then since %v", since, again)
		}
		w.change(func(w *wire) { w.carries = 1472 })
		w.send(2 * time.Minute)
		if !p.silentSince(wirePeer).IsZero() || p.counts().Silent != 0 {
			t.Error("it answers again, and is still silent")
		}
		if !p.silentSince(netip.MustParseAddrPort("192.0.2.99:1")).IsZero() {
			t.Error("somebody who is no peer is silent")
		}
	})
}
