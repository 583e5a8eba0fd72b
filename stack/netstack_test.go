// This file tests that a stack that cannot be made leaves nothing behind.

package stack

import (
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// openNow is how many files the process has open.
func openNow(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestRun_WithoutDescriptorsLeavesNoneOpen(t *testing.T) {
	g, err := New(Config{Addresses: []netip.Addr{gatewayAddr}, MTU: testMTU, Exit: func([]*packet.Packet) {}, Limits: Limits{Descriptors: enoughDescriptors}})
	if err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was) }()
	before := openNow(t)
	for spare := range uint64(2) { // it takes two
		next, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0) // the lowest that is free
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(next)
		few := unix.Rlimit{Cur: uint64(next) + spare, Max: was.Max}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
			t.Fatal(err)
		}
		err = g.Run(t.Context())
		if rerr := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); rerr != nil {
			t.Fatal(rerr)
		}
		if err == nil {
			t.Fatalf("with %d descriptors: no error", spare)
		}
	}
	if n := openNow(t); n != before {
		t.Errorf("%d files are open, %d before", n, before)
	}
}
