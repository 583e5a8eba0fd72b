// Tests of medians, ratios and percentiles.

package main

import (
	"math"
	"testing"
	"time"
)

func TestSeries_SummarisesRoundsThatHaveAValue(t *testing.T) {
	for _, c := range []struct {
		name   string
		values series
		want   summary
		ok     bool
	}{
		{"none", nil, summary{}, false},
		{"only failures", series{math.NaN(), math.NaN()}, summary{}, false},
		{"one", series{7}, summary{7, 7, 7}, true},
		{"odd", series{9, 1, 4}, summary{4, 1, 9}, true},
		{"even", series{4, 1, 9, 6}, summary{5, 1, 9}, true},
		{"a failed round", series{3, math.NaN(), 1}, summary{2, 1, 3}, true},
		{"infinite", series{math.Inf(1), 2}, summary{2, 2, 2}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, ok := c.values.summary()
			if got != c.want || ok != c.ok {
				t.Errorf("got %v %v, want %v %v", got, ok, c.want, c.ok)
			}
		})
	}
}

func TestSeries_KeepsRoundsApart(t *testing.T) {
	var s series
	s.set(2, 5)
	s.set(0, 3)
	if len(s) != 3 || s[0] != 3 || !math.IsNaN(s[1]) || s[2] != 5 {
		t.Errorf("got %v, want 3, nothing, 5", s)
	}
}

func TestSeries_RatioIsWithinARound(t *testing.T) {
	for _, c := range []struct {
		name    string
		s, base series
		want    float64
		ok      bool
	}{
		// The machine was three times as fast in the second round: the ratio of medians would be 12/20, or 6/10.
		{"drift", series{5, 18, 6}, series{10, 30, 10}, 0.6, true},
		{"a failed round of the base", series{5, 18, 6}, series{10, math.NaN(), 10}, 0.55, true},
		{"a failed round of its own", series{math.NaN(), 18, 6}, series{10, 30, 10}, 0.6, true},
		{"no round in common", series{1, math.NaN()}, series{math.NaN(), 2}, 0, false},
		{"a base of zero", series{1, 4}, series{0, 2}, 2, true},
		{"a shorter base", series{1, 4}, series{2}, 0.5, true},
		{"nothing", nil, series{1}, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, ok := c.s.ratio(c.base)
			if math.Abs(got-c.want) > 1e-9 || ok != c.ok {
				t.Errorf("got %v %v, want %v %v", got, ok, c.want, c.ok)
			}
		})
	}
}

func TestPercentile_IsTheNearestRank(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i + 1)
	}
	for _, c := range []struct {
		of   []time.Duration
		p    float64
		want time.Duration
	}{
		{hundred, 50, 50}, {hundred, 99, 99}, {hundred, 100, 100}, {hundred, 0, 1},
		{[]time.Duration{8}, 50, 8}, {[]time.Duration{8}, 99, 8}, {[]time.Duration{1, 2, 3}, 50, 2}, {[]time.Duration{1, 2, 3}, 99, 3},
	} {
		if got := percentile(c.of, c.p); got != c.want {
			t.Errorf("percentile %v of %d values: got %d, want %d", c.p, len(c.of), got, c.want)
		}
	}
}
