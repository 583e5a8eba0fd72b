// This file remembers for a moment which addresses are this host's, so that a flood of packets is no flood of questions to the kernel.

package stack

import (
	"net/netip"
	"sync"
	"time"
)

// hostAddressKept is how long an answer is believed, and hostAddressesKept how many are.
const (
	hostAddressKept   = 100 * time.Millisecond
	hostAddressesKept = 1024
)

// hostAddresses are the kernel's answers of the last moment. An address that the host got since it was asked about is taken for another host's
// until the moment is over, and for no longer.
type hostAddresses struct {
	ask func(netip.Addr) (bool, error)

	mu      sync.Mutex
	answers map[netip.Addr]hostAnswer
}

type hostAnswer struct {
	has   bool
	until time.Time
}

// has tells whether a is this host's. What the kernel does not tell is.
func (h *hostAddresses) has(a netip.Addr, now time.Time) bool {
	h.mu.Lock()
	answer, ok := h.answers[a]
	h.mu.Unlock()
	if ok && now.Before(answer.until) {
		return answer.has
	}
	has, err := h.ask(a)
	answer = hostAnswer{has || err != nil, now.Add(hostAddressKept)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.answers == nil || len(h.answers) >= hostAddressesKept {
		h.answers = make(map[netip.Addr]hostAnswer)
	}
	h.answers[a] = answer
	return answer.has
}
