// This file tests for how long the kernel's word about addresses is taken.

package stack

import (
	"errors"
	"net/netip"
	"testing"
	"time"
)

func TestHostAddresses_AskOnceInAMoment(t *testing.T) {
	asked, has, err := 0, false, error(nil)
	h := hostAddresses{ask: func(netip.Addr) (bool, error) { asked++; return has, err }}
	now := time.Unix(1000, 0)
	a := netip.MustParseAddr("192.0.2.1")
	for range 1000 {
		if h.has(a, now) {
			t.Fatal("it is not the host's")
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	has = true
	if h.has(a, now.Add(hostAddressKept-1)) {
		t.Error("asked before the moment was over")
	}
	now = now.Add(hostAddressKept)
	if !h.has(a, now) {
		t.Error("an address that came is not seen when the moment is over")
	}
	has, err = false, errors.New("no answer")
	if !h.has(a.Next(), now) {
		t.Error("what the kernel does not tell is open")
	}
	for range 3 * hostAddressesKept {
		a = a.Next()
		h.has(a, now)
	}
	if n := len(h.answers); n > hostAddressesKept {
		t.Errorf("%d answers are kept", n)
	}
}

// A container that calls and calls does not have the kernel asked for every packet.
func TestDeny_AsksTheKernelSeldom(t *testing.T) {
	w := newWire(t, nil)
	asked := 0
	w.g.hostAddrs.ask = func(netip.Addr) (bool, error) { asked++; return true, nil }
	w.g.Deny([]netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:2379")})
	const calls = 200
	began := time.Now()
	for i := range calls {
		w.send(makeUDP(netip.AddrPortFrom(aliceAddr, uint16(1000+i)), netip.MustParseAddrPort("127.0.0.1:2379"), nil))
	}
	if n := w.drops(dropDenied); n != calls {
		t.Errorf("%d drops, want %d", n, calls)
	}
	if most := 1 + int(time.Since(began)/hostAddressKept); asked > most {
		t.Errorf("asked %d times, want %d at most", asked, most)
	}
}
