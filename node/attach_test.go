// Tests of attaching and detaching, with a stand-in for the kernel.

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

func savedNames(t *testing.T, n *Node) []string {
	t.Helper()
	var s savedAttachments
	if _, err := readState(filepath.Join(n.cfg.StateDir, attachmentsFile), &s); err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, a := range s.Attachments {
		names = append(names, a.Name)
	}
	return names
}

// nothingLeft checks that no attachment is left anywhere.
func nothingLeft(t *testing.T, w *world, n *Node) {
	t.Helper()
	if list, _ := n.Attachments(context.Background()); len(list) != 0 {
		t.Errorf("attachments: %+v", list)
	}
	if len(w.routed()) != 0 || len(w.ports) != 0 {
		t.Errorf("routes %v, %d ports", w.routed(), len(w.ports))
	}
	if len(n.pool.taken) != 0 {
		t.Errorf("addresses taken: %v", n.pool.taken)
	}
	if names := savedNames(t, n); len(names) != 0 {
		t.Errorf("in the state file: %v", names)
	}
	w.checkOrder(t)
}

func TestAttach_GivesTheContainerWhatItNeeds(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	got, err := n.Attach(t.Context(), api.AttachRequest{PID: 77})
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != "pid-77" || got.Inode != c.inode || got.Addr != "10.5.72.2/24" || got.Gateway != "10.5.72.1" || got.IfName != "eth0" || got.MTU != 1472 || !got.DefaultRoute {
		t.Errorf("got %+v", got)
	}
	tc := c.links["eth0"].config
	gw := netip.MustParseAddr("10.5.72.1")
	wantRoutes := []nsutil.Route{{Dst: netip.MustParsePrefix("10.5.0.0/16"), Gateway: gw}, {Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: gw}}
	if tc.MTU != 1472 || !tc.Persist || tc.TxQueueLen != txQueueLen || tc.GSOMaxSegs != 0 || tc.GSOMaxSize != 44*1420+320+710 || !slices.Equal(tc.Routes, wantRoutes) ||
		!slices.Equal(tc.Addrs, []netip.Prefix{netip.MustParsePrefix("10.5.72.2/24")}) || tc.MAC[0]&3 != 2 || macText(tc.MAC) != got.MAC {
		t.Errorf("TAP: %+v", tc)
	}
	if !w.routed()[netip.MustParseAddr("10.5.72.2")] {
		t.Error("no route to it")
	}
	if names := savedNames(t, n); !slices.Equal(names, []string{"pid-77"}) {
		t.Errorf("state file: %v", names)
	}
	if err := n.Detach(t.Context(), "77", ""); err != nil {
		t.Fatal(err)
	}
	if len(c.interfaces()) != 0 {
		t.Errorf("left in the container: %v", c.interfaces())
	}
	if !slices.Equal(w.released, []netip.Prefix{netip.MustParsePrefix("10.5.72.2/32")}) {
		t.Errorf("flows released: %v", w.released)
	}
	nothingLeft(t, w, n)
}

func TestAttach_TakesWhatIsAskedFor(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	got, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Name: "web", Addr: "10.5.72.99", IfName: "ovl0", MAC: "02:00:00:00:00:07", NoDefaultRoute: true})
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != "web" || got.Addr != "10.5.72.99/24" || got.IfName != "ovl0" || got.MAC != "02:00:00:00:00:07" || got.DefaultRoute {
		t.Errorf("got %+v", got)
	}
	if r := c.links["ovl0"].config.Routes; len(r) != 1 || r[0].Dst.Bits() == 0 {
		t.Errorf("routes %v", r)
	}
}

func TestAttach_RefusesAndLeavesNothingBehind(t *testing.T) {
	for _, tc := range []struct {
		name    string
		request api.AttachRequest
		prepare func(w *world, n *Node)
		want    error
		says    string
	}{
		{"no process", api.AttachRequest{PID: 5}, nil, api.ErrNotFound, "5"},
		{"no such path", api.AttachRequest{Netns: "/run/netns/none"}, nil, api.ErrNotFound, "/run/netns/none"},
		{"attached already", api.AttachRequest{PID: 1, Name: "again"}, nil, api.ErrInUse, `"first"`},
		{"namespace attached by another pid", api.AttachRequest{PID: 3}, func(w *world, _ *Node) {
			w.start(3).inode = w.containers[1].inode
		}, api.ErrInUse, "rootless-ovl detach first"},
		{"name taken", api.AttachRequest{PID: 2, Name: "first"}, nil, api.ErrInUse, "pid 1"},
		{"address taken", api.AttachRequest{PID: 2, Addr: "10.5.72.9"}, nil, api.ErrInUse, `"first"`},
		{"address outside", api.AttachRequest{PID: 2, Addr: "10.5.73.9"}, nil, api.ErrInvalid, "10.5.72.0/24"},
		{"gateway's address", api.AttachRequest{PID: 2, Addr: "10.5.72.1"}, nil, api.ErrInvalid, "gateway"},
		{"bad name", api.AttachRequest{PID: 2, Name: "../x"}, nil, api.ErrInvalid, "../x"},
		{"interface taken", api.AttachRequest{PID: 2}, func(w *world, _ *Node) {
			c := w.containers[2]
			c.links["eth0"] = &fakeLink{c: c}
		}, api.ErrInUse, "eth0"},
		{"kernel refuses the TAP", api.AttachRequest{PID: 2}, func(w *world, _ *Node) {
			w.containers[2].createErr = fmt.Errorf("/dev/net/tun: %w", nsutil.ErrTunDevice)
		}, api.ErrDenied, "/dev/net/tun"},
		{"router refuses the port", api.AttachRequest{PID: 2}, func(w *world, _ *Node) { w.addPortErr = errKernel }, errKernel, ""},
		{"state cannot be written", api.AttachRequest{PID: 2}, func(_ *world, n *Node) {
			path := filepath.Join(n.cfg.StateDir, attachmentsFile)
			if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
				panic(err)
			}
		}, nil, attachmentsFile},
		{"not ready", api.AttachRequest{PID: 2}, func(_ *world, n *Node) {
			n.open, n.state = false, api.StateWaitingForStore
		}, api.ErrUnavailable, api.StateWaitingForStore},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld()
			w.start(1)
			w.start(2)
			n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
			if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Name: "first", Addr: "10.5.72.9"}); err != nil {
				t.Fatal(err)
			}
			if tc.prepare != nil {
				tc.prepare(w, n)
			}
			before := len(w.containers[2].interfaces())
			_, err := n.Attach(t.Context(), tc.request)
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.says) {
				t.Fatalf("got %v, want %v with %q", err, tc.want, tc.says)
			}
			if got := w.containers[2].interfaces(); len(got) != before {
				t.Errorf("interfaces in the container: %v", got)
			}
			if len(n.attachments) != 1 || len(n.pool.taken) != 1 || len(w.ports) != 1 {
				t.Errorf("left: %d attachments, %d addresses, %d ports", len(n.attachments), len(n.pool.taken), len(w.ports))
			}
			w.checkOrder(t)
		})
	}
}

func TestAttach_UndoneWhenItsCallerHasGone(t *testing.T) {
	w := newWorld()
	c := w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.Attach(ctx, api.AttachRequest{PID: 77}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if len(c.interfaces()) != 0 {
		t.Errorf("left in the container: %v", c.interfaces())
	}
	nothingLeft(t, w, n)
}

func TestAttach_SaysWhenTheSubnetIsFull(t *testing.T) {
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.64/28")
	for pid := 1; pid <= 13; pid++ {
		w.start(pid)
		if _, err := n.Attach(t.Context(), api.AttachRequest{PID: pid}); err != nil {
			t.Fatal(err)
		}
	}
	w.start(14)
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 14}); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("got %v", err)
	}
	if err := n.Detach(t.Context(), "pid-3", ""); err != nil {
		t.Fatal(err)
	}
	if a, err := n.Attach(t.Context(), api.AttachRequest{PID: 14}); err != nil || a.Addr != "10.5.72.68/28" {
		t.Errorf("after a detach: %+v, %v", a, err)
	}
}

func TestAttach_ManyAtOnceGetDifferentAddresses(t *testing.T) {
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	const count = 50
	addrs := make([]string, count)
	var wg sync.WaitGroup
	for i := range count {
		w.start(i + 1)
		wg.Go(func() {
			a, err := n.Attach(t.Context(), api.AttachRequest{PID: i + 1})
			if err != nil {
				t.Error(err)
			}
			addrs[i] = a.Addr
		})
	}
	wg.Wait()
	slices.Sort(addrs)
	if got := len(slices.Compact(addrs)); got != count {
		t.Errorf("%d addresses for %d containers", got, count)
	}
	for i := range count {
		wg.Go(func() {
			if err := n.Detach(t.Context(), fmt.Sprintf("pid-%d", i+1), ""); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	nothingLeft(t, w, n)
}

func TestDetachSoon_DoesNotWaitForTheKernel(t *testing.T) {
	w := newWorld()
	w.start(1)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	first, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Name: "web"})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.DetachSoon(t.Context(), "web", ""); err != nil {
		t.Fatal(err)
	}
	// Whoever wants what it had waits.
	w.start(2)
	again, err := n.Attach(t.Context(), api.AttachRequest{PID: 2, Name: "web", Addr: netip.MustParsePrefix(first.Addr).Addr().String()})
	if err != nil || again.Addr != first.Addr {
		t.Fatalf("attached again: %+v, %v", again, err)
	}
	if err := n.DetachSoon(t.Context(), "nobody", ""); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("of nobody: %v", err)
	}
	if err := n.DetachSoon(t.Context(), "web", ""); err != nil {
		t.Fatal(err)
	}
	if a, err := n.ReserveAddress(t.Context(), api.AddressRequest{Addr: netip.MustParsePrefix(first.Addr).Addr().String(), Owner: "docker/1"}); err != nil || a.Addr != first.Addr {
		t.Errorf("reserved: %+v, %v", a, err)
	}
}

func TestDetach_SaysWhenThereIsNoSuchAttachment(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	for _, ref := range []string{"web", "77", "-1"} {
		if err := n.Detach(t.Context(), ref, ""); !errors.Is(err, api.ErrNotFound) || !strings.Contains(err.Error(), ref) {
			t.Errorf("%s: %v", ref, err)
		}
	}
}

func TestAttachment_GoesWithItsContainer(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(w *world, c *container)
	}{
		{"process ends", func(_ *world, c *container) { c.exit() }},
		{"interface removed inside", func(w *world, _ *container) { w.breakDevices() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				c := w.start(77)
				n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
				if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 77}); err != nil {
					t.Fatal(err)
				}
				tc.end(w, c)
				synctest.Wait()
				nothingLeft(t, w, n)
			})
		})
	}
}

func TestAdopt_TakesUpTheLivingAndDropsTheRest(t *testing.T) {
	w := newWorld()
	conf := testConfig(t)
	first := readyNode(t, w, conf, "10.5.72.0/24")
	for pid := 1; pid <= 5; pid++ {
		w.start(pid)
		if _, err := first.Attach(t.Context(), api.AttachRequest{PID: pid}); err != nil {
			t.Fatal(err)
		}
	}
	stopNode(first)
	w.table.Routes = nil
	w.containers[2].exit()       // gone
	w.containers[3].start++      // another process with that pid
	w.containers[4].inode += 100 // another namespace
	delete(w.containers[5].links, "eth0")

	second := readyNode(t, w, conf, "10.5.72.0/24")
	if err := second.adopt(); err != nil {
		t.Fatal(err)
	}
	list, _ := second.Attachments(t.Context())
	if len(list) != 1 || list[0].Name != "pid-1" || list[0].Addr != "10.5.72.2/24" {
		t.Errorf("got %+v", list)
	}
	if names := savedNames(t, second); !slices.Equal(names, []string{"pid-1"}) {
		t.Errorf("state file: %v", names)
	}
	if !w.routed()[netip.MustParseAddr("10.5.72.2")] {
		t.Error("no route to it")
	}
	w.start(6)
	if a, err := second.Attach(t.Context(), api.AttachRequest{PID: 6}); err != nil || a.Addr != "10.5.72.7/24" {
		t.Errorf("the next address does not go on where the last run stopped: %+v, %v", a, err)
	}
	w.checkOrder(t)
}

func TestAdopt_KeepsWhatItHasNotComeToYet(t *testing.T) {
	w := newWorld()
	conf := testConfig(t)
	first := readyNode(t, w, conf, "10.5.72.0/24")
	for pid := 1; pid <= 3; pid++ {
		w.start(pid)
		r := api.AttachRequest{PID: pid}
		if pid == 2 {
			r.Publish = []string{"127.0.0.1::80"}
		}
		if _, err := first.Attach(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	ports := savedPortsOf(t, first)
	stopNode(first)

	second := readyNode(t, w, conf, "10.5.72.0/24")
	second.open = false // it is only starting
	open, watch := second.edges.openPID, second.edges.watchPID
	opened := false
	second.edges.openPID = func(pid int) (namespace, error) {
		if pid == 2 && !opened {
			opened = true
			_, err := second.Publish(t.Context(), "pid-1", api.PublishRequest{Publish: []string{"127.0.0.1::81"}})
			if !errors.Is(err, api.ErrUnavailable) {
				t.Errorf("Publish: %v", err)
			}
			if _, err := second.Unpublish(t.Context(), "pid-1", api.UnpublishRequest{}); !errors.Is(err, api.ErrUnavailable) {
				t.Errorf("Unpublish: %v", err)
			}
			if err := second.Detach(t.Context(), "pid-1", ""); err != nil {
				t.Error(err)
			}
			if names, saved := savedNames(t, second), savedPortsOf(t, second); !slices.Equal(names, []string{"pid-2", "pid-3"}) || !slices.Equal(saved, ports) {
				t.Errorf("before the second is taken up the state file has %v, %v", names, saved)
			}
		}
		return open(pid)
	}
	second.edges.watchPID = func(pid int) (exitWatch, error) {
		if pid == 2 {
			second.mu.Lock()
			err := second.saveAttachmentsLocked()
			second.mu.Unlock()
			if names, saved := savedNames(t, second), savedPortsOf(t, second); err != nil || !slices.Equal(names, []string{"pid-2", "pid-3"}) || !slices.Equal(saved, ports) {
				t.Errorf("while the second is taken up the state file has %v, %v, %v", names, saved, err)
			}
		}
		return watch(pid)
	}
	if err := second.adopt(); err != nil {
		t.Fatal(err)
	}
	if names, saved := savedNames(t, second), savedPortsOf(t, second); !opened || !slices.Equal(names, []string{"pid-2", "pid-3"}) || !slices.Equal(saved, ports) {
		t.Errorf("at the end the state file has %v, %v", names, saved)
	}
}

func TestAdopt_KeepsAddressesOfAnEarlierSubnet(t *testing.T) {
	w := newWorld()
	conf := testConfig(t)
	w.start(1)
	first := readyNode(t, w, conf, "10.5.90.0/24")
	if _, err := first.Attach(t.Context(), api.AttachRequest{PID: 1}); err != nil {
		t.Fatal(err)
	}
	stopNode(first)
	second := readyNode(t, w, conf, "10.5.72.0/24")
	if err := second.adopt(); err != nil {
		t.Fatal(err)
	}
	list, _ := second.Attachments(t.Context())
	if len(list) != 1 || list[0].Addr != "10.5.90.2/24" || list[0].Gateway != "10.5.90.1" {
		t.Errorf("got %+v", list)
	}
	want := []string{"10.5.72.1", "10.5.72.0", "10.5.90.1", "10.5.90.0"}
	if got := fmt.Sprint(w.own); got != "["+strings.Join(want, " ")+"]" {
		t.Errorf("the gateway answers at %v, want %v", got, want)
	}
}

func TestAdopt_GoesOnWithoutABrokenStateFile(t *testing.T) {
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	path := filepath.Join(n.cfg.StateDir, attachmentsFile)
	if err := os.WriteFile(path, []byte("{garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.adopt(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path + ".broken"); err != nil || string(b) != "{garbage" {
		t.Errorf("kept: %q, %v", b, err)
	}
	nothingLeft(t, w, n)
}

func TestAdopt_RefusesEntriesThatMakeNoSense(t *testing.T) {
	var logged syncBuffer
	conf := testConfig(t)
	conf.Log = slog.New(slog.NewTextHandler(&logged, nil))
	w := newWorld()
	c := w.start(1)
	n := readyNode(t, w, conf, "10.5.72.0/24")
	good := savedAttachment{Name: "web", PID: 1, StartTime: c.start, Inode: c.inode, IfName: "eth0", Addr: netip.MustParsePrefix("10.5.72.9/24"), MAC: "02:00:00:00:00:07"}
	noName, noAddr, badIf, both := good, good, good, good
	noName.Name, noAddr.Addr, badIf.IfName, both.Netns = "", netip.Prefix{}, "../x", "/x"
	if err := writeState(filepath.Join(n.cfg.StateDir, attachmentsFile), savedAttachments{Attachments: []savedAttachment{noName, noAddr, badIf, both, {}}}); err != nil {
		t.Fatal(err)
	}
	if err := n.adopt(); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, w, n)
	if text := logged.String(); strings.Count(text, "level=WARN") != 5 || strings.Contains(text, `\n`) {
		t.Errorf("log: %s", text)
	}
}

func TestDefaultName_IsAlwaysValid(t *testing.T) {
	for path, want := range map[string]string{
		"/run/netns/blue":                "blue",
		"/proc/77/ns/net":                "pid-77",
		"/proc/77/task/78/ns/net":        "pid-77",
		"/run/netns/7":                   "ns-7",
		"/run/netns/a b":                 "a-b",
		"/":                              "ns",
		"/x/...":                         "ns",
		"/x/" + strings.Repeat("y", 200): strings.Repeat("y", 59),
	} {
		got := defaultName(api.AttachRequest{Netns: path})
		if err := api.CheckName(got); err != nil || got != want {
			t.Errorf("%s: %q, want %q (%v)", path, got, want, err)
		}
	}
}

func TestWatchPath_EndsWhenThePathIsNoLongerWhatItWas(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(path string) error
	}{
		{"removed", os.Remove},
		{"made anew", func(path string) error {
			return errors.Join(os.Rename(path, path+".old"), os.WriteFile(path, nil, 0o600))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ns")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				w := watchPath(path, inodeOf(t, path), nsutil.InodeAt)
				time.Sleep(10 * pathPoll)
				select {
				case <-w.Done():
					t.Fatal("ended too early")
				default:
				}
				if err := tc.do(path); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * pathPoll)
				select {
				case <-w.Done():
				default:
					t.Error("still watching")
				}
				w.Close()
				w.Close()
			})
		})
	}
}

func TestLeadsElsewhere_ConcludesNothingFromALookThatFails(t *testing.T) {
	for _, tt := range []struct {
		inode uint64
		err   error
		want  bool
	}{
		{7, nil, false},
		{8, nil, true},
		{0, &os.PathError{Op: "open", Err: syscall.ENOENT}, true},
		{0, &os.PathError{Op: "open", Err: syscall.EACCES}, true}, // another user's process has the pid
		{0, &os.PathError{Op: "open", Err: syscall.EMFILE}, false},
		{0, syscall.ENOMEM, false},
		{0, errors.New("who looks in our place has gone"), false},
	} {
		at := func(string) (uint64, error) { return tt.inode, tt.err }
		if got := leadsElsewhere("/proc/1/ns/net", 7, at); got != tt.want {
			t.Errorf("%d, %v: got %v", tt.inode, tt.err, got)
		}
	}
}

func TestWatchPath_CloseEndsItsGoroutine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) { // fails if a goroutine is left
		w := watchPath(path, inodeOf(t, path), nsutil.InodeAt)
		w.Close()
	})
}

func inodeOf(t *testing.T, path string) uint64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Ino
}
