// This file tests when a loop looks before it sleeps.

package forwarder

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWaiter_LooksOnlyAfterAShortWaitAndWhilePsAreLeft(t *testing.T) {
	for _, c := range []struct {
		holds bool
		last  time.Duration
		want  bool
	}{{true, 0, true}, {true, spinBelow - 1, true}, {true, spinBelow, false}, {true, time.Second, false}, {false, 0, false}} {
		w := newWaiter(1)
		w.holds, w.last = c.holds, c.last
		if w.looks() != c.want {
			t.Errorf("%+v: looks %v", c, !c.want)
		}
	}
	if w := newWaiter(1); w.looks() {
		t.Error("a loop that has not waited yet looks")
	}
}

func TestWaiter_LeavesOffLookingThatIsInVain(t *testing.T) {
	w := newWaiter(1)
	w.holds, w.last = true, 0
	looked := 0
	const waits = 10 * (spinTries + spinPause)
	for range waits {
		if w.looks() {
			looked++
			w.lookedInVain()
		}
	}
	if want := waits / (spinTries + spinPause) * spinTries; looked != want {
		t.Errorf("looked %d times in %d waits, want %d", looked, waits, want)
	}
	// Once it finds something it goes on, and one miss in between does no harm.
	for !w.looks() {
	}
	for range 100 {
		w.found()
		if !w.looks() {
			t.Fatal("left off although it found something")
		}
		w.lookedInVain()
		if !w.looks() {
			t.Fatal("left off after one miss")
		}
	}
}

func TestWait_HoldsNoPWhereThereAreNotMoreThanLoops(t *testing.T) {
	r := newRouter(t, runtime.GOMAXPROCS(0))
	l := r.loops[0]
	if _, err := unix.Write(l.wakefd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if n, err := l.wait(make([]unix.EpollEvent, 1)); n != 1 || err != nil {
		t.Fatalf("%d events, %v", n, err)
	}
	if l.waiter.holds {
		t.Error("every P can be held: nobody would be left to run the gateway")
	}
}
