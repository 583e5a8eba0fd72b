// Tests of containers that take the place of one that is being taken off.

package node

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestAttach_WaitsForWhosePlaceItTakes(t *testing.T) {
	was := api.AttachRequest{PID: 1, Name: "web", Addr: "10.5.72.9", Owner: "oci/1"}
	for name, tc := range map[string]struct {
		r     api.AttachRequest
		waits bool
	}{
		"name":           {api.AttachRequest{PID: 2, Name: "Web"}, true},
		"address":        {api.AttachRequest{PID: 2, Addr: "10.5.72.9"}, true},
		"owner":          {api.AttachRequest{PID: 2, Owner: "oci/1"}, true},
		"all of it":      {api.AttachRequest{PID: 2, Name: "web", Addr: "10.5.72.9", Owner: "oci/1"}, true},
		"nothing of its": {api.AttachRequest{PID: 2, Name: "other", Addr: "10.5.72.10", Owner: "oci/2"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				c := w.start(1)
				w.start(2)
				n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
				if _, err := n.Attach(t.Context(), was); err != nil {
					t.Fatal(err)
				}
				w.removing = make(chan struct{})
				c.exit()
				synctest.Wait() // it is leaving
				ended := make(chan error, 1)
				go func() {
					_, err := n.Attach(t.Context(), tc.r)
					ended <- err
				}()
				synctest.Wait()
				if waits := len(ended) == 0; waits != tc.waits {
					t.Errorf("it waits: %t", waits)
				}
				close(w.removing)
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestAttach_DoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		c := w.start(1)
		w.start(2)
		n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
		if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Name: "web"}); err != nil {
			t.Fatal(err)
		}
		w.removing = make(chan struct{})
		c.exit()
		synctest.Wait()
		begin := time.Now()
		if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 2, Name: "web"}); !errors.Is(err, api.ErrInUse) || time.Since(begin) != leavingPatience {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		close(w.removing)
		synctest.Wait()
	})
}
