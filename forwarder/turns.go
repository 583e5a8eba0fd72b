// This file is fairness between the containers that one loop reads: what is shared is the loop's time.
//
// A batch is bounded in packets and bytes, but what it costs is not: 64 datagrams to the outside, or packets that are only refused, take
// several times as long as a few superpackets. So a port is charged for the time that its batches took, as a process is by a fair
// scheduler, and where several have something to send, one that is ahead of the others by more than a little is passed over for the round.
// Its device stays readable and is looked at again at once; what does not fit its ring meanwhile the kernel drops in the time of the one who
// floods. A port that was idle begins level with those that were not: time is not saved up.
//
// A single busy port costs two looks at the clock a batch, and is never passed over.

package forwarder

import (
	"time"

	"golang.org/x/sys/unix"
)

// aheadAtMost is how far a port may be ahead of the one that is furthest behind: two or three batches.
const aheadAtMost = 250 * time.Microsecond

// owesAtMost bounds what a port may owe. No batch takes so long by itself: what is beyond is the loop's misfortune.
const owesAtMost = 4 * time.Millisecond

// readPorts reads a batch of each port that has something to say and has not had more than its share.
func (l *loop) readPorts(events []unix.EpollEvent) {
	slots := *l.slots.Load()
	ready, behind := 0, time.Duration(1<<62)
	for _, ev := range events {
		if ev.Fd < 0 || int(ev.Fd) >= len(slots) || slots[ev.Fd] == nil {
			continue
		}
		p := slots[ev.Fd]
		// It was idle, or has had less than it might: it is level now.
		p.used = max(p.used, l.level-aheadAtMost)
		behind = min(behind, p.used)
		ready++
	}
	if ready == 0 {
		return
	}
	l.level = max(l.level, behind)
	begin := time.Now()
	for _, ev := range events {
		if ev.Fd < 0 || int(ev.Fd) >= len(slots) || slots[ev.Fd] == nil {
			continue
		}
		p := slots[ev.Fd]
		if ready > 1 && p.used > behind+aheadAtMost {
			continue
		}
		l.readPort(int(ev.Fd))
		end := time.Now()
		// A loop that was stopped in the midst of a batch, by the scheduler or a signal, is not the container's doing.
		p.used = min(p.used+end.Sub(begin), behind+owesAtMost)
		begin = end
	}
}
