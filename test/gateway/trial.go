// This file is a case, and a trial of it: what a *testing.T is to a test.

package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// testCase is one thing that a gateway must do.
type testCase struct {
	name   string // section/what, for -run
	about  string // for the table
	shared bool   // slirp4netns and pasta are asked too
	limit  time.Duration
	run    func(t *trial, s *site)
}

// defaultLimit ends a case that sets none; straggle is how long what it started may take to notice.
const (
	defaultLimit = 30 * time.Second
	straggle     = 40 * time.Second
)

// trial is one run of a case; it is a lab.T. Its methods may be called from any goroutine, but Fatalf ends the caller.
type trial struct {
	name    string
	verbose bool
	ctx     context.Context
	cancel  context.CancelFunc

	mu       sync.Mutex
	bad      bool
	log      strings.Builder
	cleanups []func()
}

func newTrial(ctx context.Context, name string, o options) *trial {
	t := &trial{name: name, verbose: o.verbose}
	t.ctx, t.cancel = context.WithCancel(ctx)
	return t
}

func (t *trial) Helper()                  {}
func (t *trial) Name() string             { return t.name }
func (t *trial) Context() context.Context { return t.ctx }

func (t *trial) Failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bad
}

func (t *trial) Cleanup(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cleanups = append(t.cleanups, f)
}

func (t *trial) Logf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(&t.log, format+"\n", args...)
}

func (t *trial) Errorf(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bad = true
	fmt.Fprintf(&t.log, format+"\n", args...)
}

func (t *trial) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	runtime.Goexit()
}

// check fails the trial if err is one, and goes on.
func (t *trial) check(what string, err error) {
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// must ends the trial if err is an error.
func (t *trial) must(what string, err error) {
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// do runs f to its end or until it calls Fatalf, and says whether nothing failed.
func (t *trial) do(f func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
	return !t.Failed()
}

// try runs a case in bounded time and cleans up after it.
func (t *trial) try(c testCase, s *site) bool {
	limit := c.limit
	if limit == 0 {
		limit = defaultLimit
	}
	over := time.AfterFunc(limit, func() {
		t.Errorf("still running after %v", limit)
		t.cancel()
	})
	// Nothing of the lab outlives its process, so that a hang of the suite itself ends with it.
	stuck := time.AfterFunc(limit+straggle, func() {
		fmt.Printf("FAIL  %s hangs:\n%s", c.name, t.text())
		debug.SetTraceback("all")
		panic("a case does not end")
	})
	t.do(func() { c.run(t, s) })
	over.Stop()
	t.end()
	stuck.Stop()
	return !t.Failed()
}

// end runs the clean-ups, the last one first, each even when another gave up.
func (t *trial) end() {
	t.cancel()
	for {
		t.mu.Lock()
		n := len(t.cleanups)
		if n == 0 {
			t.mu.Unlock()
			return
		}
		last := t.cleanups[n-1]
		t.cleanups = t.cleanups[:n-1]
		t.mu.Unlock()
		t.do(last)
	}
}

func (t *trial) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.log.String()
}

// said is what the trial logged, indented, where somebody wants to read it.
func (t *trial) said(fine bool) string {
	text := strings.TrimSpace(t.text())
	if text == "" || fine && !t.verbose {
		return ""
	}
	return "\n        " + strings.ReplaceAll(text, "\n", "\n        ")
}

// note says something of a load case that is worth reading though nothing failed.
func note(format string, args ...any) { fmt.Fprintf(os.Stdout, "      "+format+"\n", args...) }

// siteT is the lab.T of a site that many trials share: what is said and made during a trial is the trial's.
type siteT struct {
	*trial  // the site's own
	current atomic.Pointer[trial]
	broken  atomic.Bool // a trial failed
}

func (s *siteT) set(t *trial) {
	if last := s.current.Swap(t); last != nil && last.Failed() {
		s.broken.Store(true)
	}
}

func (s *siteT) now() *trial {
	if t := s.current.Load(); t != nil {
		return t
	}
	return s.trial
}

func (s *siteT) Context() context.Context          { return s.now().Context() }
func (s *siteT) Cleanup(f func())                  { s.now().Cleanup(f) }
func (s *siteT) Logf(format string, args ...any)   { s.now().Logf(format, args...) }
func (s *siteT) Errorf(format string, args ...any) { s.now().Errorf(format, args...) }
func (s *siteT) Fatalf(format string, args ...any) { s.now().Fatalf(format, args...) }
func (s *siteT) Failed() bool                      { return s.broken.Load() || s.trial.Failed() }
