// Tests of the cables that are hurt.

package lab_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestImpair_HurtsAsMuchAsItSaysAndMends(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	web := netip.AddrPortFrom(h2.Addr, 8080)
	h2.HTTPServer(t, web)
	const sent = 400
	ping := func(size int) int {
		t.Helper()
		r, err := h1.PingWith(h2.Addr, lab.PingOptions{Count: sent, Interval: time.Millisecond, Size: size, DontFrag: true})
		if err != nil {
			t.Fatal(err)
		}
		return r.Received
	}
	for name, c := range map[string]struct {
		out, in     lab.Impairment
		size        int
		least, most int // echoes that come back
		carries     bool
	}{
		"good":               {least: sent, most: sent, carries: true},
		"loss":               {out: lab.Impairment{Loss: 0.1}, in: lab.Impairment{Loss: 0.1}, least: sent / 2, most: sent * 19 / 20, carries: true},
		"reorder and double": {out: lab.Impairment{Reorder: 0.2, Duplicate: 0.2}, in: lab.Impairment{Reorder: 0.2, Duplicate: 0.2}, least: sent, most: sent, carries: true},
		"delay and jitter":   {in: lab.Impairment{Delay: 3 * time.Millisecond, Jitter: 3 * time.Millisecond}, least: sent, most: sent, carries: true},
		"one way":            {in: lab.Impairment{Loss: 1}},
		"black hole":         {out: lab.Impairment{MaxPacket: 1000}, size: 1100},
		"below black hole":   {out: lab.Impairment{MaxPacket: 1000}, size: 900, least: sent, most: sent},
	} {
		if err := h1.ImpairWays(c.out, c.in); err != nil {
			t.Fatal(err)
		}
		if got := ping(c.size); got < c.least || got > c.most {
			t.Errorf("%s: %d of %d echoes came back, want %d to %d", name, got, sent, c.least, c.most)
		}
		if c.carries {
			if err := h1.Download(web, 300<<10); err != nil {
				t.Errorf("%s: download: %v", name, err)
			}
			if err := h1.Upload(web, 300<<10); err != nil {
				t.Errorf("%s: upload: %v", name, err)
			}
		}
	}
	if err := h1.Mend(); err != nil {
		t.Fatal(err)
	}
	if got := ping(1400); got != sent {
		t.Errorf("mended: %d of %d echoes came back", got, sent)
	}
}

func TestImpair_CablesAndInterfacesGoDownAndComeBack(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1, lab.WithIPv6)
	h := l.Host(1)
	reaches := func(want bool) {
		t.Helper()
		for _, to := range []netip.Addr{lab.OutsideAddr, lab.OutsideAddr6} {
			r, err := h.Ping(to, 2)
			if got := err == nil && r.Received > 0; got != want {
				t.Errorf("ping %s: %v, %v; want an answer: %v", to, r, err, want)
			}
		}
	}
	for _, way := range []struct{ down, up func() error }{{h.Unplug, h.Plug}, {h.LinkDown, h.LinkUp}} {
		if err := way.down(); err != nil {
			t.Fatal(err)
		}
		reaches(false)
		if err := way.up(); err != nil {
			t.Fatal(err)
		}
		lab.Eventually(t, "the outside answers", func() bool {
			r, err := h.Ping(lab.OutsideAddr, 1)
			r6, err6 := h.Ping(lab.OutsideAddr6, 1)
			return err == nil && err6 == nil && r.Lost()+r6.Lost() == 0
		})
		reaches(true)
	}
}
