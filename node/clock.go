// This file notices that time has passed in which the daemon did not run: the host was suspended, or a virtual machine or the process was
// stopped. Go's timers do not count the time of a suspended host, so that a keepalive which is long overdue would wait for hours more; and a
// store which has not heard of us for so long may have ended our lease, and forgotten the connection.
//
// The other clocks of the node: intervals are measured by time.Time with its monotonic reading, which nobody sets, and what outlives a run is
// compared by sinceBoot (lastknown.go). The date is for people.

package node

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pulse is how often the clock is looked at.
	pulse = 2 * time.Second
	// lapse is the least time that counts: a busy machine lets a daemon wait, too.
	lapse = 15 * time.Second
)

// sinceBoot is how long ago the host was started, also counting the time that it was suspended; 0 where the kernel does not tell.
func sinceBoot() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// watchClock looks at the clock, and at which peers are heard, until ctx ends.
func (n *Node) watchClock(ctx context.Context) error {
	tick := time.NewTicker(pulse)
	defer tick.Stop()
	last := n.edges.sinceBoot()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		now := n.edges.sinceBoot()
		if gap := now - last; gap >= lapse {
			n.afterLapse(gap)
		}
		last = now
		n.listen()
	}
}

// afterLapse has the lease looked at at once: whoever follows the store begins anew when its connection ends.
func (n *Node) afterLapse(gap time.Duration) {
	n.log.Info("this daemon did not run for a while, as the host or the process was suspended: the store is asked what has become of the lease", "for", gap.Round(time.Second))
	n.mu.Lock()
	client := n.client
	n.mu.Unlock()
	if client != nil {
		client.DropAll()
	}
	n.prober.restart()
}
