// Tests of fairness between containers of a node: one floods as fast as it can, and another still gets its packets through. How much later,
// and how much fewer, is what `make bench ROWS=fairness` measures: on a machine with few cores it depends on who else wants them.

package test

import (
	"net/netip"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// flood sends datagrams from a space as fast as it goes until stop, which tells how many went out.
func flood(t *testing.T, s *lab.Space, to netip.AddrPort, size int) (stop func() int64) {
	t.Helper()
	var over atomic.Bool
	var sent atomic.Int64
	ended := make(chan error, 1)
	go func() {
		ended <- s.Do(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			b, sa := make([]byte, size), &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
			for !over.Load() {
				if unix.Sendto(fd, b, 0, sa) == nil { // an ICMP error may come back
					sent.Add(1)
				}
			}
			return nil
		})
	}()
	return func() int64 {
		over.Store(true)
		if err := <-ended; err != nil {
			t.Errorf("flood of %s: %v", to, err)
		}
		return sent.Load()
	}
}

func TestFairness_AFloodLeavesOthersTheirShare(t *testing.T) {
	s := newSite(t)
	victim, flooder, beside := join(t, s.h1, "victim"), join(t, s.h1, "flooder"), join(t, s.h1, "beside")
	far := join(t, s.h2, "far")
	web := port(far.addr, 8000)
	far.HTTPServer(t, web)
	outside := port(s.h2.Addr, 8000)
	s.h2.HTTPServer(t, outside)
	for name, f := range map[string]struct {
		to   netip.AddrPort
		size int
	}{
		"small datagrams to a peer":      {port(far.addr, 9), 16},
		"large datagrams to a peer":      {port(far.addr, 9), 60000},
		"small datagrams on the node":    {port(beside.addr, 9), 16},
		"small datagrams to the outside": {port(s.h2.Addr, 9), 16},
		"small datagrams to nobody":      {port(netip.MustParseAddr("10.66.255.254"), 9), 16},
		"small datagrams to the gateway": {port(flooder.gateway, 9), 16},
		"questions about no name at all": {port(flooder.gateway, 53), 16},
	} {
		t.Run(name, func(t *testing.T) {
			stop := flood(t, flooder.Space, f.to, f.size)
			defer func() {
				if n := stop(); n < 1000 && f.size < 1000 || n == 0 {
					t.Errorf("only %d datagrams were sent: that is no flood", n)
				}
			}()
			for what, to := range map[string]netip.Addr{"far": far.addr, "beside": beside.addr, "outside": s.h2.Addr} {
				r, err := victim.Ping(to, 20)
				if err != nil || r.Lost() > 2 {
					t.Errorf("ping %s: %v, %v", what, r, err)
				}
			}
			for what, to := range map[string]netip.AddrPort{"far": web, "outside": outside} {
				if err := victim.Download(to, 1<<20); err != nil {
					t.Errorf("download from %s: %v", what, err)
				}
				if err := victim.Upload(to, 1<<20); err != nil {
					t.Errorf("upload to %s: %v", what, err)
				}
			}
		})
	}
}
