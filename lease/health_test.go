// This file tests what an outage says in the log.

package lease

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestHealth_SaysAnOutageOnceAndAFatalErrorNever(t *testing.T) {
	type report struct {
		source string
		err    error
	}
	wrong, secret, away := fmt.Errorf("x: %w", ErrTLS), fmt.Errorf("x: %w", ErrAuth), fmt.Errorf("x: %w", ErrUnreachable)
	for _, tc := range []struct {
		name       string
		reports    []report
		away, back int
	}{
		{"answers", []report{{"request", nil}, {"watch", nil}}, 0, 0},
		{"comes and goes", slices.Repeat([]report{{"watch", away}, {"watch", nil}}, 20), 3, 3},
		{"an outage", []report{{"request", nil}, {"watch", away}, {"lease", away}, {"watch", nil}, {"lease", nil}}, 1, 1},
		{"away at first", []report{{"request", away}, {"request", away}, {"request", nil}}, 1, 1},
		{"a wrong certificate at first", []report{{"request", wrong}}, 0, 0},
		{"a wrong password at first", []report{{"request", secret}}, 0, 0},
		{"a wrong certificate that somebody waits for", []report{{"request", wrong}, {"request", wrong}, {"request", wrong}, {"request", nil}}, 1, 1},
		{"a wrong certificate later", []report{{"request", nil}, {"watch", wrong}}, 1, 0},
		{"a wrong certificate mended at once", []report{{"request", wrong}, {"request", nil}}, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var log bytes.Buffer
			var h health
			h.init(slog.New(slog.NewTextHandler(&log, nil)), "etcd")
			for _, r := range tc.reports {
				h.report(r.source, r.err)
			}
			last := tc.reports[len(tc.reports)-1]
			if h.now.Connected != (last.err == nil) || h.now.Err == nil && last.err != nil {
				t.Errorf("now %+v", h.now)
			}
			if a, b := strings.Count(log.String(), "store is away"), strings.Count(log.String(), "store is back"); a != tc.away || b != tc.back {
				t.Errorf("said away %d times, back %d times:\n%s", a, b, &log)
			}
		})
	}
}

func TestHealth_SpeaksAgainOfAStoreThatHasStayed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		var h health
		h.init(slog.New(slog.NewTextHandler(&log, nil)), "etcd")
		flap := func() {
			h.report("watch", ErrUnreachable)
			h.report("watch", nil)
		}
		for range 20 {
			flap()
		}
		time.Sleep(toldWithin + time.Second)
		flap()
		if a, b, c := strings.Count(log.String(), "store is away"), strings.Count(log.String(), "store is back"), strings.Count(log.String(), "comes and goes"); a != toldOutages+1 || b != toldOutages+1 || c != 1 {
			t.Errorf("%d, %d and %d lines:\n%s", a, b, c, &log)
		}
	})
}

func TestHealth_AnAnswerEndsThePausesOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h health
		h.init(slog.New(slog.DiscardHandler), "etcd")
		h.report("lease", ErrUnreachable)
		h.report("watch", ErrUnreachable)
		woken := make(chan time.Duration)
		go func() {
			start := time.Now()
			pause := backoff{next: maxBackoff}
			pause.wait(t.Context(), h.answered())
			woken <- time.Since(start)
		}()
		time.Sleep(time.Second)
		h.report("watch", nil)
		if after := <-woken; after != time.Second {
			t.Errorf("woken after %v", after)
		}
		select {
		case <-h.answered():
			t.Error("without another answer nobody is woken again")
		default:
		}
	})
}
