// This file is the program: flags, the run, and its end.

package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func main() {
	if len(os.Args) == 5 && os.Args[1] == descriptorRole {
		os.Exit(attachDescriptor(os.Args[2], os.Args[3], os.Args[4]))
	}
	length := flag.Duration("for", time.Hour, "how `long`")
	seed := flag.Uint64("seed", 0, "the `number` that decides what happens; 0: a random one")
	flag.Parse()
	os.Exit(lab.Main(func() int { return soak(*length, *seed) }))
}

func soak(length time.Duration, seed uint64) int {
	if err := lab.HaveEtcd(); err != nil {
		fmt.Println("soak:", err)
		return 1
	}
	if seed == 0 {
		seed = rand.Uint64N(1_000_000) + 1
	}
	fmt.Printf("soak: %v, seed %d: make soak SOAK=%v SEED=%d\n", length, seed, length, seed)
	t := newTrial("soak")
	t.run(func() {
		r := newRun(t, seed)
		r.rounds(length)
	})
	t.end()
	if t.Failed() {
		fmt.Printf("soak: failed, seed %d\n", seed)
		return 1
	}
	fmt.Println("soak: ok")
	return 0
}

// trial is to the lab what a *testing.T is to a test. A part of it, for something that ends before the whole, has cleanups of its own. Its
// methods may be called from any goroutine; Fatalf ends the caller.
type trial struct {
	name   string
	ctx    context.Context
	cancel context.CancelFunc
	whole  *trial // of a part; nil: the whole

	mu       sync.Mutex
	bad      bool
	cleanups []func()
}

func newTrial(name string) *trial {
	t := &trial{name: name}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// part is a trial that ends earlier.
func (t *trial) part(name string) *trial {
	p := &trial{name: name, whole: t}
	p.ctx, p.cancel = context.WithCancel(t.ctx)
	return p
}

func (t *trial) Helper()                  {}
func (t *trial) Name() string             { return t.name }
func (t *trial) Context() context.Context { return t.ctx }

func (t *trial) Failed() bool {
	if t.whole != nil {
		return t.whole.Failed()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bad
}

func (t *trial) Cleanup(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cleanups = append(t.cleanups, f)
}

func (t *trial) Logf(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func (t *trial) Errorf(format string, args ...any) {
	if t.whole != nil {
		t.whole.Errorf(t.name+": "+format, args...)
		return
	}
	t.mu.Lock()
	t.bad = true
	t.mu.Unlock()
	fmt.Printf("FAILED: "+format+"\n", args...)
}

func (t *trial) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	runtime.Goexit()
}

// run runs f to its end or until it calls Fatalf.
func (t *trial) run(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
}

// end runs the cleanups, the last one first, each even when another gave up.
func (t *trial) end() {
	t.cancel()
	t.mu.Lock()
	left := t.cleanups
	t.cleanups = nil
	t.mu.Unlock()
	for len(left) > 0 {
		last := left[len(left)-1]
		left = left[:len(left)-1]
		t.run(last)
	}
}
