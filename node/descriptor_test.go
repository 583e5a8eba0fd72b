// Tests of attachments by a descriptor, of which nothing is known but the number of their namespace, and of their owners.

package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestAttach_ByDescriptorOfTheCaller(t *testing.T) {
	w := newWorld()
	c := w.startApart(77, 7)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	got, err := n.Attach(t.Context(), api.AttachRequest{NetnsFD: 7, Owner: "cni/net/77/eth0"})
	if err != nil {
		t.Fatal(err)
	}
	if got.PID != 0 || got.Netns != "" || got.Inode != c.inode || got.Name != "netns-4026530077" || got.Owner != "cni/net/77/eth0" || got.Addr != "10.5.72.2/24" {
		t.Errorf("got %+v", got)
	}
	if where := n.attachments[got.Name].saved.where(); where != "net:[4026530077]" {
		t.Errorf("it is %s", where)
	}
	if _, err := n.Attach(t.Context(), api.AttachRequest{NetnsFD: 8}); !errors.Is(err, api.ErrNotFound) || !strings.Contains(err.Error(), "descriptor 8") {
		t.Errorf("of a descriptor that is not there: %v", err)
	}
	if err := n.Detach(t.Context(), got.Name, ""); err != nil {
		t.Fatal(err)
	}
	if c.opened != 0 {
		t.Errorf("its namespace is still open %d times", c.opened)
	}
	nothingLeft(t, w, n)
}

func TestAttach_OfACallerThatHasEndedTakesNothing(t *testing.T) {
	w := newWorld()
	c := w.startApart(77, 7)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	w.callerEnded = api.Errorf(api.CodeNotFound, "it has ended")
	if _, err := n.Attach(t.Context(), api.AttachRequest{NetnsFD: 7}); !errors.Is(err, api.ErrNotFound) || c.opened != 0 {
		t.Errorf("got %v; its namespace is open %d times", err, c.opened)
	}
	nothingLeft(t, w, n)
}

func TestAttach_ErrorsNameTheContainer(t *testing.T) {
	w := newWorld()
	w.start(1)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	for _, tc := range []struct {
		r    api.AttachRequest
		want string
	}{
		{api.AttachRequest{NetnsFD: 8, Name: "web", Owner: "cni/net/1/eth0"}, `attach "web": `},
		{api.AttachRequest{NetnsFD: 8, Owner: "cni/net/1/eth0"}, "attach cni/net/1/eth0: "},
		{api.AttachRequest{NetnsFD: 8}, "attach descriptor 8: "},
		{api.AttachRequest{PID: 2, Loose: true, Name: "web"}, `attach "web": `},
	} {
		if _, err := n.Attach(t.Context(), tc.r); err == nil || !strings.HasPrefix(err.Error(), tc.want) {
			t.Errorf("%+v: %v, want %q", tc.r, err, tc.want)
		}
	}
}

func TestAttach_OwnersAreUnique(t *testing.T) {
	w := newWorld()
	w.start(1)
	w.start(2)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Name: "web", Owner: "docker/abc"}); err != nil {
		t.Fatal(err)
	}
	_, err := n.Attach(t.Context(), api.AttachRequest{PID: 2, Owner: "docker/abc"})
	if !errors.Is(err, api.ErrInUse) || !strings.Contains(err.Error(), `"web"`) || !strings.Contains(err.Error(), "10.5.72.2") {
		t.Errorf("got %v", err)
	}
	for _, detach := range []func(context.Context, string, string) error{n.Detach, n.DetachSoon} {
		if err := detach(t.Context(), "web", "docker/def"); !errors.Is(err, api.ErrNotFound) || only(t, n).Name != "web" {
			t.Errorf("detached for another owner: %v", err)
		}
	}
	if err := n.Detach(t.Context(), "web", "docker/abc"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 2, Owner: "docker/abc"}); err != nil {
		t.Errorf("after a detach: %v", err)
	}
}

func TestAttach_ByDescriptorHasSocketsInTheNamespaceBeforeAnybodyIsInIt(t *testing.T) {
	w := newWorld()
	c := w.startApart(77, 7)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	if _, err := n.Attach(t.Context(), api.AttachRequest{NetnsFD: 7, Publish: []string{"127.0.0.1::80"}}); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.sockets != 1 {
		t.Errorf("%d pools of sockets in the namespace", c.sockets)
	}
}

// What there is is when a step ends; the attachment lives as long as steps say.
func TestAttachment_ByDescriptorGoesWhenNobodyIsLeftInItsNamespace(t *testing.T) {
	type step struct {
		hold  string // "": nothing
		wait  time.Duration
		lives bool
	}
	const process, mount = "/proc/5/ns/net", "/proc/6/root/run/netns/x"
	for name, steps := range map[string][]step{
		"nobody comes":                       {{"", 50 * time.Second, true}, {"", 15 * time.Second, false}},
		"a process comes late and ends":      {{"", 50 * time.Second, true}, {process, time.Hour, true}, {"", 5 * time.Second, true}, {"", 10 * time.Second, false}},
		"another process in time":            {{process, time.Hour, true}, {"", 5 * time.Second, true}, {"/proc/8/ns/net", time.Hour, true}, {"", 15 * time.Second, false}},
		"it is mounted before it is entered": {{mount, time.Hour, true}, {process, time.Hour, true}, {mount, 50 * time.Second, true}, {process, time.Hour, true}, {mount, 65 * time.Second, false}},
		"it is mounted and then not":         {{process, time.Hour, true}, {mount, 40 * time.Second, true}, {"", 5 * time.Second, true}, {"", 10 * time.Second, false}},
		"it is mounted and never entered":    {{mount, time.Hour, true}, {"", 50 * time.Second, true}, {"", 15 * time.Second, false}},
		"its process is seen at the start":   {{process, 3 * time.Second, true}, {"", 15 * time.Second, false}},
		"it is started again once a minute":  {{process, time.Minute, true}, {"", 7 * time.Second, true}, {process, time.Minute, true}, {"", 7 * time.Second, true}, {process, time.Minute, true}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				c := w.startApart(77, 7)
				n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
				if _, err := n.Attach(t.Context(), api.AttachRequest{NetnsFD: 7, Name: "web"}); err != nil {
					t.Fatal(err)
				}
				for i, s := range steps {
					c.hold(s.hold)
					time.Sleep(s.wait)
					synctest.Wait()
					if list, _ := n.Attachments(t.Context()); (len(list) == 1) != s.lives {
						t.Fatalf("after step %d: %+v", i, list)
					}
					if !s.lives {
						nothingLeft(t, w, n)
					}
				}
			})
		})
	}
}

func TestAdopt_FindsANamespaceByItsNumber(t *testing.T) {
	w := newWorld()
	conf := testConfig(t)
	first := readyNode(t, w, conf, "10.5.72.0/24")
	lives, ended := w.startApart(1, 11), w.startApart(2, 12)
	for i, fd := range []int{11, 12} {
		r := api.AttachRequest{NetnsFD: fd, Name: []string{"lives", "ended"}[i], Owner: []string{"cni/net/1/eth0", "cni/net/2/eth0"}[i]}
		if _, err := first.Attach(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	stopNode(first)
	if lives.opened != 0 || ended.opened != 0 {
		t.Errorf("after the end of the node namespaces are open %d and %d times", lives.opened, ended.opened)
	}
	w.table.Routes = nil
	lives.paths, ended.paths = nil, nil // the caller has ended
	lives.hold("/proc/5/ns/net")

	second := readyNode(t, w, conf, "10.5.72.0/24")
	if err := second.adopt(); err != nil {
		t.Fatal(err)
	}
	list, _ := second.Attachments(t.Context())
	if len(list) != 1 || list[0].Name != "lives" || list[0].Owner != "cni/net/1/eth0" || list[0].Addr != "10.5.72.2/24" {
		t.Errorf("got %+v", list)
	}
	if names := savedNames(t, second); !slices.Equal(names, []string{"lives"}) {
		t.Errorf("state file: %v", names)
	}
	if r := w.routed(); len(r) != 1 || !r[netip.MustParseAddr("10.5.72.2")] {
		t.Errorf("routes %v", r)
	}
	w.startApart(3, 13)
	if a, err := second.Attach(t.Context(), api.AttachRequest{NetnsFD: 13, Addr: "10.5.72.3", Name: "ended", Owner: "cni/net/2/eth0"}); err != nil {
		t.Errorf("what the ended one had is not free: %+v, %v", a, err)
	}
	w.checkOrder(t)
}

// An engine mounts the namespace first and starts the container when it likes, also while the daemon is started again.
func TestAdopt_RemembersWhetherAContainerHasBegun(t *testing.T) {
	const mount = "/proc/6/root/run/netns/x"
	for _, loose := range []bool{false, true} {
		for _, begun := range []bool{false, true} {
			t.Run(fmt.Sprintf("loose %t, begun %t", loose, begun), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld()
					conf := testConfig(t)
					n := readyNode(t, w, conf, "10.5.72.0/24")
					c, r := w.startApart(77, 7), api.AttachRequest{NetnsFD: 7, Name: "web"}
					c.hold(mount)
					if loose {
						w.startHeld(10)
						r = api.AttachRequest{PID: 10, Loose: true, Name: "web", IfName: "rovl1"}
					}
					if _, err := n.Attach(t.Context(), r); err != nil {
						t.Fatal(err)
					}
					if loose {
						w.containers[10].give("rovl1", c, "eth0")
					}
					time.Sleep(10 * time.Second)
					if begun {
						c.hold("/proc/5/ns/net")
						time.Sleep(10 * time.Second)
						c.hold(mount)
					}
					time.Sleep(5 * time.Second)
					stopNode(n)
					n = readyNode(t, w, conf, "10.5.72.0/24")
					if err := n.adopt(); err != nil {
						t.Fatal(err)
					}
					only(t, n)
					time.Sleep(10 * time.Minute)
					synctest.Wait()
					if list, err := n.Attachments(t.Context()); err != nil || (len(list) == 1) == begun {
						t.Errorf("after a while: %+v, %v", list, err)
					}
				})
			})
		}
	}
}

// The numbers of processes and namespaces begin anew with the host, and so may be those of others.
func TestAdopt_TakesNothingUpAfterTheHostWasStartedAgain(t *testing.T) {
	for _, tc := range []struct {
		before, after string
		lives         bool
	}{
		{"one", "one", true},
		{"one", "two", false},
		{"", "two", true}, // of a version that did not write it
		{"one", "", true}, // it cannot be told
	} {
		w := newWorld()
		w.boot = tc.before
		conf := testConfig(t)
		first := readyNode(t, w, conf, "10.5.72.0/24")
		if err := first.adopt(); err != nil {
			t.Fatal(err)
		}
		w.start(1)
		if _, err := first.Attach(t.Context(), api.AttachRequest{PID: 1}); err != nil {
			t.Fatal(err)
		}
		stopNode(first)
		w.table.Routes = nil
		w.boot = tc.after
		second := readyNode(t, w, conf, "10.5.72.0/24")
		if err := second.adopt(); err != nil {
			t.Fatal(err)
		}
		if list, _ := second.Attachments(t.Context()); (len(list) == 1) != tc.lives {
			t.Errorf("%q, %q: %+v", tc.before, tc.after, list)
		}
		if !tc.lives {
			nothingLeft(t, w, second)
		}
	}
}
