// This file tests the bounds of ICMP errors.

package stack

import (
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestErrorRate_LeavesRoomForOthers(t *testing.T) {
	now := time.Unix(1000, 0)
	var r errorRate
	provoke := func(a netip.Addr, refusal bool, n int) (sent int) {
		for range n {
			if r.allows(a, refusal, now) {
				sent++
			}
		}
		return sent
	}
	a := aliceAddr
	for i, want := range []int{errorsEach, errorsEach, refusalsAtMost - 2*errorsEach, 0} {
		if n := provoke(a, true, 1000); n != want {
			t.Errorf("knocker %d: %d errors, want %d", i, n, want)
		}
		a = a.Next()
	}
	if n := provoke(a, false, 1); n != 1 {
		t.Error("a container that knocked nowhere is told nothing")
	}
	if n := provoke(aliceAddr, false, 1); n != 0 {
		t.Error("a container that has its share gets more")
	}
	sent := 0
	for range 10 {
		a = a.Next()
		sent += provoke(a, false, 1000)
	}
	if want := errorsInWindow - refusalsAtMost - 1; sent != want {
		t.Errorf("%d errors in all, want %d", sent, want)
	}
	now = now.Add(errorWindow)
	if n := provoke(aliceAddr, true, 1000); n != errorsEach {
		t.Errorf("%d errors in the next window, want %d", n, errorsEach)
	}
}

// One that knocks at closed doors, of all the kinds that there are, does not take from another what it must be told.
func TestErrors_AreNotSilencedByAnotherContainer(t *testing.T) {
	w := newWire(t, func(c *Config) { c.HostLoopback = false; c.Limits.UDPFlows = 1 })
	knock := [][]byte{
		makeUDP(netip.AddrPortFrom(aliceAddr, 7), netip.AddrPortFrom(loopback, 9), nil),
		makeUDP(netip.AddrPortFrom(aliceAddr, 7), netip.AddrPortFrom(gatewayAddr, 9), nil),
		makeIPv4(132, aliceAddr, netip.MustParseAddr("192.0.2.1"), make([]byte, 12)),
	}
	for range 1000 {
		w.send(knock...)
	}
	w.send(makeUDP(netip.AddrPortFrom(bobAddr, 7), netip.AddrPortFrom(gatewayAddr, 9), nil))
	eventually(t, "the other's error", func() bool {
		return w.countSeen(func(o observed) bool {
			return o.in.dst == bobAddr && o.in.src == gatewayAddr && header.ICMPv4(o.b[o.in.transport:]).Code() == header.ICMPv4PortUnreachable
		}) == 1
	})
	if w.drops(dropICMPRate) == 0 {
		t.Error("nothing was held back")
	}
}
