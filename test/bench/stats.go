// This file computes medians, ratios within a round, and percentiles.

package main

import (
	"math"
	"slices"
	"time"
)

// series are the values of one row and peer, one a round; NaN is a round without a value.
type series []float64

// set puts the value of a round.
func (s *series) set(round int, value float64) {
	for len(*s) <= round {
		*s = append(*s, math.NaN())
	}
	(*s)[round] = value
}

// valid are the values that there are, sorted.
func (s series) valid() []float64 {
	var v []float64
	for _, x := range s {
		if !math.IsNaN(x) && !math.IsInf(x, 0) {
			v = append(v, x)
		}
	}
	slices.Sort(v)
	return v
}

// summary is what a series comes to.
type summary struct{ median, min, max float64 }

// summary is false when no round has a value.
func (s series) summary() (summary, bool) {
	v := s.valid()
	if len(v) == 0 {
		return summary{}, false
	}
	return summary{median(v), v[0], v[len(v)-1]}, true
}

// median of sorted values; there must be one.
func median(sorted []float64) float64 {
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// ratio is the median of s/base, computed within each round that has both; false when no round has.
func (s series) ratio(base series) (float64, bool) {
	var r series
	for i := range min(len(s), len(base)) {
		if base[i] != 0 {
			r = append(r, s[i]/base[i])
		}
	}
	sum, ok := r.summary()
	return sum.median, ok
}

// percentile of sorted durations, by the nearest rank; there must be one.
func percentile(sorted []time.Duration, p float64) time.Duration {
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}
