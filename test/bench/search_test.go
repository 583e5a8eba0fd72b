// Tests of the rate search, on simulated links.

package main

import (
	"errors"
	"math"
	"testing"
)

// link carries up to capacity packets per second and drops the rest; the sender offers up to sender.
type link struct {
	capacity, sender float64
	collapse         float64 // what it still carries when it is overloaded; 0: capacity
	hiccups          map[int]bool
	calls            int
}

func (l *link) try(rate float64) (trial, error) {
	l.calls++
	t := trial{offered: min(rate, l.sender)}
	t.delivered = min(t.offered, l.capacity)
	if t.offered > l.capacity && l.collapse > 0 {
		t.delivered = l.collapse
	}
	if l.hiccups[l.calls] {
		t.delivered *= 0.9
	}
	return t, nil
}

var testSearch = rateSearch{first: 50_000, lowest: 500, maxLoss: 0.01, width: 1.05, probes: 16}

func TestRateSearch_FindsWhatALinkCarries(t *testing.T) {
	unlimited := math.Inf(1)
	for _, c := range []struct {
		name string
		link link
		want float64
	}{
		{"faster than the first rate", link{capacity: 173_000, sender: unlimited}, 173_000},
		{"slower than the first rate", link{capacity: 7_000, sender: unlimited}, 7_000},
		{"about the first rate", link{capacity: 50_000, sender: unlimited}, 50_000},
		{"very fast", link{capacity: 3e6, sender: unlimited}, 3e6},
		{"faster than the sender", link{capacity: 1e6, sender: 230_000}, 230_000},
		{"faster than a slow sender", link{capacity: 1e6, sender: 20_000}, 20_000},
		{"one that collapses", link{capacity: 120_000, sender: unlimited, collapse: 10_000}, 120_000},
		{"one with single hiccups", link{capacity: 173_000, sender: unlimited, hiccups: map[int]bool{1: true, 4: true}}, 173_000},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := testSearch.find(c.link.try)
			if err != nil {
				t.Fatal(err)
			}
			if got.delivered < c.want/1.06 || got.delivered > c.want*1.001 {
				t.Errorf("got %.0f packets/s, want %.0f", got.delivered, c.want)
			}
			if got.loss() >= testSearch.maxLoss {
				t.Errorf("the result lost %.3f", got.loss())
			}
			if c.link.calls > 2*testSearch.probes {
				t.Errorf("%d trials, at most %d were to be made", c.link.calls, 2*testSearch.probes)
			}
		})
	}
}

func TestRateSearch_GivesUpOnADeadLink(t *testing.T) {
	l := link{capacity: 0, sender: math.Inf(1)}
	if _, err := testSearch.find(l.try); !errors.Is(err, errNoRate) {
		t.Errorf("got %v, want %v", err, errNoRate)
	}
	if l.calls > 2*testSearch.probes {
		t.Errorf("%d trials", l.calls)
	}
}

func TestRateSearch_StopsAtAnError(t *testing.T) {
	broken := errors.New("cable cut")
	calls := 0
	_, err := testSearch.find(func(rate float64) (trial, error) {
		calls++
		return trial{offered: rate, delivered: rate}, broken
	})
	if !errors.Is(err, broken) || calls != 1 {
		t.Errorf("got %v after %d calls, want %v after one", err, calls, broken)
	}
}
