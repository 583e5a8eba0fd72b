// This file has a container wait for another to be off the overlay whose place it takes: engines start a container that has died again at once,
// with the name, the address and the owner that it had.

package node

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// leavingPatience is how long it is waited. To take one off takes milliseconds, and up to dropPatience while the store does not answer.
const leavingPatience = 3 * time.Second

// awaitLeaving waits until no attachment that is being taken off has what r asks for.
func (n *Node) awaitLeaving(ctx context.Context, r api.AttachRequest) error {
	ctx, cancel := context.WithTimeout(ctx, leavingPatience)
	defer cancel()
	for {
		off := n.leavingBefore(r)
		if off == nil {
			return nil
		}
		select {
		case <-off:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return nil // reserve tells what is in use
			}
			return ctx.Err()
		}
	}
}

// leavingBefore is closed when such an attachment is off; nil: there is none.
func (n *Node) leavingBefore(r api.AttachRequest) <-chan struct{} {
	addr, _ := netip.ParseAddr(r.Addr)
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.attachments {
		s := &a.saved
		if a.phase == leaving && (r.Name != "" && strings.EqualFold(s.Name, r.Name) || r.Owner != "" && s.Owner == r.Owner ||
			addr.IsValid() && s.Addr.Addr() == addr || r.PID != 0 && s.PID == r.PID || r.Netns != "" && s.Netns == r.Netns || s.Gateway || r.Gateway) {
			return a.off
		}
	}
	return nil
}
