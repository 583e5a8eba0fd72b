// Tests of the judgement of leaks, without a lab.

package main

import "testing"

func TestRisen_TellsALeakFromNoise(t *testing.T) {
	ramp, noise, step, spikes := []int{}, []int{}, []int{}, []int{}
	for i := range 24 {
		ramp = append(ramp, 100+i*3)
		noise = append(noise, 100+i*7%5)
		step = append(step, 100+min(i, 4)*20) // a warm-up
		spikes = append(spikes, 100+i%6/5*500)
	}
	for _, c := range []struct {
		name        string
		figures     []int
		least, most int
	}{
		{"nothing", nil, 0, 0},
		{"one", []int{7}, 0, 0},
		{"a ramp", ramp, 50, 70},
		{"noise", noise, -3, 3},
		{"a warm-up", step, 0, 0},
		{"spikes", spikes, 0, 0},
	} {
		if got := risen(c.figures); got < c.least || got > c.most {
			t.Errorf("%s: %d, want %d to %d", c.name, got, c.least, c.most)
		}
	}
}
