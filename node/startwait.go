// This file has requests wait for a node that starts: who holds the API's socket open over a restart (systemd) lets engines in before there is
// anything to answer with, and what they would see is a node without attachments.

package node

import (
	"context"
	"net/http"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	// startPatience is less than what the server gives a request to be read in (api.Serve).
	startPatience = 8 * time.Second
	startLook     = 20 * time.Millisecond
)

// onceStarted holds back all requests but those for the status while the node starts and the store has not been found away, for startPatience
// at most.
func (n *Node) onceStarted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != api.PathStatus {
			n.awaitStart(r.Context())
		}
		h.ServeHTTP(w, r)
	})
}

func (n *Node) awaitStart(ctx context.Context) {
	starting := func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.state == api.StateStarting
	}
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	look := time.NewTicker(startLook)
	defer look.Stop()
	for starting() {
		select {
		case <-look.C:
		case <-ctx.Done():
			return
		}
	}
}
