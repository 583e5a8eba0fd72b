// This file searches the highest rate that a path carries with little loss.

package main

import (
	"errors"
	"fmt"
	"math"
)

// trial is what became of sending at some rate, in packets per second.
type trial struct {
	offered   float64 // what the sender managed to send
	delivered float64
}

func (t trial) loss() float64 {
	if t.offered <= 0 {
		return 1
	}
	return 1 - t.delivered/t.offered
}

// rateSearch finds the highest rate at which less than maxLoss is lost: it doubles the rate until too much is lost or the sender
// cannot go faster, then bisects. It is bounded: at most probes rates are tried, each at most twice.
type rateSearch struct {
	first   float64 // packets per second
	lowest  float64 // give up below
	maxLoss float64 // share, such as 0.01
	width   float64 // stop when the bounds are this close: 1.05 is 5 %
	probes  int
}

// errNoRate is a path that loses too much at any rate.
var errNoRate = errors.New("too much is lost even at the lowest rate")

// find calls try at rates of its choice. The result is the trial with the highest delivered rate among those that passed.
func (s rateSearch) find(try func(rate float64) (trial, error)) (trial, error) {
	var best trial
	good, bad := 0.0, 0.0 // rates
	rate := s.first
	for range s.probes {
		t, verdict, err := s.probe(rate, best.offered, try)
		if err != nil {
			return best, fmt.Errorf("at %.0f packets/s: %w", rate, err)
		}
		if verdict != tooMuchLost && t.delivered > best.delivered {
			best = t
		}
		switch verdict {
		case passed:
			good = rate
		case tooMuchLost:
			bad = rate
		case senderLimited:
			return best, nil
		}
		switch {
		case bad == 0:
			rate = 2 * good
		case good == 0:
			if rate /= 2; rate < s.lowest {
				return best, errNoRate
			}
		case bad/good < s.width:
			return best, nil
		default:
			rate = math.Sqrt(good * bad)
		}
	}
	if best.delivered == 0 {
		return best, errNoRate
	}
	return best, nil
}

// verdict is what a rate came to.
type verdict int

const (
	passed verdict = iota
	tooMuchLost
	senderLimited // little was lost, but the sender got no further than at a lower rate
)

// probe tries a rate, and once more when it does not pass: one hiccup of the machine is not the path's limit. before is the
// highest rate that the sender has reached.
func (s rateSearch) probe(rate, before float64, try func(rate float64) (trial, error)) (t trial, v verdict, err error) {
	for range 2 {
		if t, err = try(rate); err != nil {
			return t, tooMuchLost, err
		}
		switch {
		case t.loss() >= s.maxLoss:
			v = tooMuchLost
		case t.offered < 0.95*rate && t.offered < 1.05*before:
			v = senderLimited
		default:
			return t, passed, nil
		}
	}
	return t, v, nil
}
