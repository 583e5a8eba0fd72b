// This file tests that what is stopped has stopped.

package lease_test

import (
	"context"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/embedded"
)

func TestRegistry_LeavesNoGoroutine(t *testing.T) {
	before := stacks()
	cycle := func() {
		s, err := embedded.Start(testContext(t), embedded.Config{DataDir: t.TempDir(), ListenClient: "http://127.0.0.1:0"})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		client, err := lease.Dial(testContext(t), lease.ClientConfig{Endpoints: []string{s.Endpoint()}})
		if err != nil {
			t.Fatal(err)
		}
		r := lease.NewRegistry(client, "", nil)
		h, err := r.Acquire(testContext(t), testNetwork(t), testRequest("node-1", "192.168.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(testContext(t))
		ended := make(chan error, 2)
		snapshots := make(chan lease.Snapshot, 10)
		go func() { ended <- h.Run(ctx) }()
		go func() { ended <- r.Watch(ctx, func(s lease.Snapshot) { snapshots <- s }) }()
		<-snapshots
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	}
	for range 3 {
		cycle()
	}
	var left []string
	for range 400 { // what was told to end takes a moment
		left = nil
		for id, s := range stacks() {
			// One sampler of OpenCensus or one grpc pool belongs to the process; a leak of ours has our code in it, or a
			// connection.
			if _, old := before[id]; !old && (strings.Contains(s, "rootless-ovl/lease.") || strings.Contains(s, "transport.(*http2") || strings.Contains(s, "etcdserver")) {
				left = append(left, s)
			}
		}
		if len(left) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines are left, the first:\n%s", len(left), left[0])
}

// stacks is every goroutine's stack by the goroutine's number.
func stacks() map[string]string {
	buf := make([]byte, 4<<20)
	buf = buf[:runtime.Stack(buf, true)]
	all := make(map[string]string)
	for s := range strings.SplitSeq(string(buf), "\n\n") {
		head, _, _ := strings.Cut(s, " [")
		all[head] = s
	}
	return all
}
