// This file bounds how many ICMP errors the gateway sends, so that none who provokes them silences what others have to be told.

package stack

import (
	"net/netip"
	"sync"
	"time"
)

// Of ICMP errors there may be so many in a window of time: as many a second as Linux sends (icmp_msgs_per_sec).
const (
	errorWindow    = 100 * time.Millisecond
	errorsInWindow = 100
	errorsEach     = 20                 // to one container
	refusalsAtMost = errorsInWindow / 2 // of them about what the gateway has closed, which nobody has to wait for
)

// errorRate counts the errors of the window that there is now.
type errorRate struct {
	mu       sync.Mutex
	ends     time.Time
	all      int
	refusals int
	each     map[netip.Addr]int // by container, at most errorsInWindow of them
}

// allows pays for an error to a container at a time. No means that it is not to be sent.
func (r *errorRate) allows(to netip.Addr, refusal bool, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !now.Before(r.ends) {
		r.ends, r.all, r.refusals = now.Add(errorWindow), 0, 0
		if r.each == nil {
			r.each = make(map[netip.Addr]int)
		}
		clear(r.each)
	}
	if r.all >= errorsInWindow || r.each[to] >= errorsEach || refusal && r.refusals >= refusalsAtMost {
		return false
	}
	r.all++
	r.each[to]++
	if refusal {
		r.refusals++
	}
	return true
}
