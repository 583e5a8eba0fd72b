// down ends the daemon that answers, and nobody else; status --wait waits for one.

package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestDown_EndsTheDaemonThatAnswers(t *testing.T) {
	b := newBench(t).serve()
	ended := 0
	b.world.endDaemon = func(_ context.Context, pid int) error { ended = pid; return nil }
	if got := b.must("down"); ended != 4711 || got != "stopped, pid 4711\n" {
		t.Errorf("ended pid %d, printed %q", ended, got)
	}
	b.world.endDaemon = func(context.Context, int) error { return errors.New("it does not end") }
	if code := b.run("down"); code != 1 || !strings.Contains(b.err.String(), "it does not end") {
		t.Errorf("exit status %d, %q", code, &b.err)
	}
}

func TestDown_IsDoneWhereNoDaemonRuns(t *testing.T) {
	b := newBench(t)
	if got := b.must("down"); got != "no daemon is running\n" {
		t.Errorf("printed %q", got)
	}
}

func TestEndDaemon_LeavesProcessesOfOtherNamesAlone(t *testing.T) {
	other := exec.Command("sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	for commOf(other.Process.Pid) == commOf(os.Getpid()) { // not executed yet
		time.Sleep(time.Millisecond)
	}
	err := endDaemon(t.Context(), other.Process.Pid)
	if err == nil || !strings.Contains(err.Error(), "PID namespace") {
		t.Errorf("another program: %v", err)
	}
	if commOf(other.Process.Pid) != "sleep" {
		t.Error("another program was ended")
	}
	// One that has ended is nobody.
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	if err := endDaemon(t.Context(), gone.Process.Pid); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("nobody: %v", err)
	}
}

func TestStatus_WaitsForADaemonThatIsYetToStart(t *testing.T) {
	b := newBench(t)
	code := make(chan int)
	go func() { code <- b.run("status", "--wait", "1m") }()
	b.serve()
	if got := <-code; got != 0 || !strings.Contains(b.out.String(), "ready") {
		t.Errorf("exit status %d, %s%s", got, &b.out, &b.err)
	}
}

func TestStatus_SaysWhyTheNodeIsNotReadyInTime(t *testing.T) {
	b := newBench(t)
	if code := b.run("status", "--wait", "1ms"); code != 1 || !strings.Contains(b.err.String(), "not ready after 1ms: the daemon is not running") {
		t.Errorf("without a daemon: exit status %d, %q", code, &b.err)
	}
	b.serve()
	b.daemon.status = api.Status{State: api.StateWaitingForStore, Store: api.StoreStatus{Error: "connection refused"}}
	code := b.run("status", "--wait", "200ms", "-o", "json")
	if code != 1 || !strings.Contains(b.err.String(), "waiting-for-store: connection refused") || !strings.Contains(b.out.String(), `"unavailable"`) {
		t.Errorf("without a store: exit status %d, %s%s", code, &b.out, &b.err)
	}
	if code := b.run("status", "--wait", "0s"); code != 2 || !strings.Contains(b.err.String(), "30s") {
		t.Errorf("no time: exit status %d, %q", code, &b.err)
	}
}
