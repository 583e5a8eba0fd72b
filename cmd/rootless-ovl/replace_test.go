// up --replace --background: who waits for the daemon to take the place, and what becomes of it when nobody does any more.

package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// The program is a script: descriptor 3 is told to, 4 ends with ctx.
func TestInBackground_LeavesADaemonAloneThatHasTakenThePlace(t *testing.T) {
	for _, c := range []struct {
		name, script string
		want         error
	}{
		{"taken while the wait was given up", `cat <&4; printf x >&3; exec sleep 1000`, nil},
		{"not taken any more", `cat <&4; exit 7`, exitStatus(7)},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			program, pidFile := filepath.Join(dir, "program"), filepath.Join(dir, "pid")
			if err := os.WriteFile(program, []byte("#!/bin/sh\necho $$ >"+pidFile+"\n"+c.script+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			b := newBench(t)
			b.world.programPath = func() string { return program }
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if err := (&app{world: b.world}).inBackground(ctx); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			text, err := os.ReadFile(pidFile)
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(string(text[:len(text)-1]))
			if err != nil {
				t.Fatal(err)
			}
			if c.want != nil {
				return
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Errorf("the daemon: %v", err)
			}
			var status syscall.WaitStatus
			if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil || status.Signal() != syscall.SIGKILL {
				t.Errorf("the daemon has ended of itself, or of another signal: %v, %v", status, err)
			}
		})
	}
}

func TestStarter_HasAPlaceTakenWholeOrNotAtAll(t *testing.T) {
	start := func(t *testing.T) (s *starter, ask *os.File, ctx context.Context) {
		asked, ask, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		s = &starter{asked: asked}
		ctx, release := s.heed(t.Context())
		t.Cleanup(func() {
			ask.Close()
			release()
			asked.Close()
		})
		return s, ask, ctx
	}
	t.Run("it has gone before", func(t *testing.T) {
		s, ask, ctx := start(t)
		ask.Close()
		<-ctx.Done()
		if err := s.begin(); err == nil {
			t.Error("the place may be taken")
		}
	})
	t.Run("it goes while the place is taken", func(t *testing.T) {
		s, ask, ctx := start(t)
		if err := s.begin(); err != nil {
			t.Fatal(err)
		}
		ask.Close()
		select {
		case <-ctx.Done():
			t.Error("the daemon that has the place ends")
		case <-time.After(100 * time.Millisecond):
		}
	})
	t.Run("there is none", func(t *testing.T) {
		var s *starter
		ctx, release := s.heed(t.Context())
		if err := errors.Join(s.begin(), ctx.Err()); err != nil {
			t.Error(err)
		}
		s.done()
		release()
	})
}
