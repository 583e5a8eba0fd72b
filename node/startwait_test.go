// Requests that come while the node starts.

package node

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestOnceStarted_HoldsRequestsBackWhileTheNodeStarts(t *testing.T) {
	for _, then := range []string{api.StateReady, api.StateWaitingForStore, api.StateLeaseLost, api.StateStopping} {
		n := &Node{state: api.StateStarting}
		var answered atomic.Int32
		h := n.onceStarted(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { answered.Add(1) }))
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, api.PathStatus, nil))
		if answered.Load() != 1 {
			t.Fatal("status was not answered")
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, api.PathAttachments, nil))
			if n.state == api.StateStarting {
				t.Error("answered while it started")
			}
		}()
		n.setState(then)
		<-done
		if answered.Load() != 2 {
			t.Errorf("%s: not answered", then)
		}
	}
}

func TestOnceStarted_LetsGoOfWhoGoesAway(t *testing.T) {
	n := &Node{state: api.StateStarting}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h := n.onceStarted(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodGet, api.PathAttachments, nil))
}
