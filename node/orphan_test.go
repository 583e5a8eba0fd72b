// Tests of attaching where an earlier node has left its TAP behind.

package node

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

func TestAttach_ReplacesWhatALostStateFileLeftBehind(t *testing.T) {
	for _, tc := range []struct {
		name       string
		was, again api.AttachRequest
		want       string
	}{
		{"the same", api.AttachRequest{PID: 77}, api.AttachRequest{PID: 77}, "eth0"},
		{"another interface name", api.AttachRequest{PID: 77}, api.AttachRequest{PID: 77, IfName: "eth1"}, "eth1"},
		{"a MAC of its own", api.AttachRequest{PID: 77, MAC: "02-00-00-00-00-09"}, api.AttachRequest{PID: 77, MAC: "02:00:00:00:00:09"}, "eth0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld()
			container := w.start(77)
			c := testConfig(t)
			first := readyNode(t, w, c, "10.5.72.0/24")
			if _, err := first.Attach(t.Context(), tc.was); err != nil {
				t.Fatal(err)
			}
			stopNode(first)
			if err := os.Remove(filepath.Join(c.StateDir, attachmentsFile)); err != nil {
				t.Fatal(err)
			}
			second := readyNode(t, w, c, "10.5.72.0/24")
			if err := second.adopt(); err != nil {
				t.Fatal(err)
			}
			if _, err := second.Attach(t.Context(), tc.again); err != nil {
				t.Fatal(err)
			}
			if got := container.interfaces(); !slices.Equal(got, []string{tc.want}) {
				t.Errorf("interfaces %v", got)
			}
			if err := second.Detach(t.Context(), "77", ""); err != nil {
				t.Fatal(err)
			}
			nothingLeft(t, w, second)
		})
	}
}

func TestAttach_LeavesInterfacesOfOthersAlone(t *testing.T) {
	attached := func(w *world, t *testing.T) *container {
		c := w.start(77)
		if _, err := readyNode(t, w, testConfig(t), "10.5.72.0/24").Attach(t.Context(), api.AttachRequest{PID: 77}); err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, tc := range []struct {
		name    string
		prepare func(w *world, t *testing.T) *container
		says    string
	}{
		{"a node that runs", attached, "another node"},
		{"a TAP of somebody else", func(w *world, t *testing.T) *container {
			c := attached(w, t)
			l := c.links["eth0"]
			l.config.MAC = [6]byte{0x02, 0x42, 1, 2, 3, 4}
			return c
		}, nsutil.ErrIfNameTaken.Error()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld()
			c := tc.prepare(w, t)
			l := c.links["eth0"]
			n := readyNode(t, w, testConfig(t), "10.5.73.0/24")
			_, err := n.Attach(t.Context(), api.AttachRequest{PID: 77})
			if !errors.Is(err, api.ErrInUse) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, want in use, %q", err, tc.says)
			}
			if c.links["eth0"] != l || len(n.attachments) != 0 {
				t.Errorf("it was touched: %v, attachments %v", c.interfaces(), n.attachments)
			}
		})
	}
}

func TestAttach_NamesEachThingOnceAndMACsOneWay(t *testing.T) {
	w := newWorld()
	w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	for _, r := range []api.AttachRequest{{PID: 5}, {Netns: "/nonexist"}} {
		_, err := n.Attach(t.Context(), r)
		name := "/nonexist"
		if r.PID != 0 {
			name = "5"
		}
		if err == nil || strings.Count(err.Error(), name) != 1 {
			t.Errorf("%v", err)
		}
	}
	a, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, MAC: "02-00-00-00-00-0A"})
	if err != nil || a.MAC != "02:00:00:00:00:0a" {
		t.Errorf("%+v, %v", a, err)
	}
}
