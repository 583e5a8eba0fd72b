// Tests of interfaces that somebody else takes and configures.

package node

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// at is the container that has the interface now, and what it is called there; nil if none does. The world's lock is held.
func (l *fakeLink) at() (*container, string) {
	for _, c := range l.c.world.containers {
		for name, other := range c.links {
			if other == l {
				return c, name
			}
		}
	}
	return nil, ""
}

func (l *fakeLink) place() (nsutil.Place, error) {
	l.c.world.mu.Lock()
	defer l.c.world.mu.Unlock()
	c, name := l.at()
	if c == nil {
		return nsutil.Place{}, nsutil.ErrNoTAP
	}
	return nsutil.Place{Inode: c.inode, IfName: name}, nil
}

func (l *fakeLink) openNamespace() (namespace, error) {
	l.c.world.mu.Lock()
	c, _ := l.at()
	l.c.world.mu.Unlock()
	if c == nil {
		return nil, nsutil.ErrNoTAP
	}
	return l.c.world.edges().openPID(c.pid)
}

func (f fakeNamespace) taps() (list []nsutil.Device, _ error) {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	for name, l := range f.c.links {
		list = append(list, nsutil.Device{IfName: name, Alias: l.config.Alias, MAC: l.config.MAC, Up: l.up})
	}
	return list, nil
}

// give has the container's interface moved to another one, as docker does.
func (c *container) give(name string, to *container, as string) {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	l := c.links[name]
	delete(c.links, name)
	to.links[as] = l
}

// remove deletes an interface in the container.
func (c *container) remove(name string) {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	delete(c.links, name)
}

// setUp brings an interface of the container up.
func (c *container) setUp(name string) {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	c.links[name].up = true
}

// startHeld is a container with a process in it.
func (w *world) startHeld(pid int) *container {
	c := w.start(pid)
	c.hold(fmt.Sprintf("/proc/%d/ns/net", pid))
	return c
}

// only is the one attachment there is.
func only(t *testing.T, n *Node) api.Attachment {
	t.Helper()
	list, err := n.Attachments(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("attachments: %+v, %v", list, err)
	}
	return list[0]
}

func TestAttach_LooseMakesTheInterfaceOnly(t *testing.T) {
	w := newWorld()
	home := w.startHeld(10)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	got, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true})
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^rovl[0-9a-f]{8}$`).MatchString(got.IfName) || got.Name != got.IfName || !got.Loose || got.Addr != "10.5.72.2/24" || got.Inode != home.inode || got.PID != 0 || !got.DefaultRoute {
		t.Errorf("got %+v", got)
	}
	c := home.links[got.IfName].config
	if !c.Loose || len(c.Addrs)+len(c.Routes) > 0 || !c.Persist || c.MTU != 1472 || macText(c.MAC) != got.MAC {
		t.Errorf("TAP: %+v", c)
	}
	// Others may be there beside it: loose ones, and one that is the namespace's own.
	for _, r := range []api.AttachRequest{{PID: 10, Loose: true, Name: "web", IfName: "veth7"}, {PID: 10, Name: "own"}} {
		if _, err := n.Attach(t.Context(), r); err != nil {
			t.Error(err)
		}
	}
	for _, ref := range []string{got.Name, "web", "10"} {
		if err := n.Detach(t.Context(), ref, ""); err != nil {
			t.Error(err)
		}
	}
	if left := home.interfaces(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	nothingLeft(t, w, n)
}

func TestLoose_IsShownWhereItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		home, c := w.startHeld(10), w.startHeld(20)
		n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
		if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true, Name: "web", IfName: "rovl1"}); err != nil {
			t.Fatal(err)
		}
		home.give("rovl1", c, "eth0")
		time.Sleep(time.Second)
		if a := only(t, n); a.IfName != "eth0" || a.Inode != c.inode || a.PID != 20 {
			t.Errorf("it is shown as %+v", a)
		}
		var saved savedAttachments
		if _, err := readState(filepath.Join(n.cfg.StateDir, attachmentsFile), &saved); err != nil || saved.Attachments[0].IfName != "eth0" || saved.Attachments[0].Inode != c.inode || saved.Attachments[0].Home.Inode != home.inode {
			t.Errorf("saved: %+v, %v", saved, err)
		}
		time.Sleep(time.Hour) // as long as there is a process
		if a := only(t, n); a.Name != "web" {
			t.Errorf("there is %+v", a)
		}
		if err := n.Detach(t.Context(), "20", ""); err != nil { // the pid that was shown
			t.Error(err)
		}
		nothingLeft(t, w, n)
	})
}

func TestLoose_PortsReachItByItsOwnNamespace(t *testing.T) {
	w := newWorld()
	home, c, other := w.startHeld(10), w.startHeld(20), w.startHeld(30)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	n.loose.first, n.loose.poll = time.Millisecond, time.Millisecond
	sockets := func(want ...int) {
		t.Helper()
		var got []int
		for range 5000 {
			w.mu.Lock()
			got = []int{home.sockets, c.sockets, other.sockets}
			w.mu.Unlock()
			if slices.Equal(got, want) {
				return
			}
			time.Sleep(time.Millisecond)
		}
		t.Errorf("sockets at home, in the container and in the other one: %v, want %v", got, want)
	}
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true, Name: "web", IfName: "rovl1", Publish: []string{"127.0.0.1::80"}}); err != nil {
		t.Fatal(err)
	}
	sockets(0, 0, 0)
	home.give("rovl1", c, "eth0")
	sockets(0, 1, 0)
	c.give("eth0", other, "eth0")
	sockets(0, 0, 1)
	w.mu.Lock()
	home.socketsErr = errKernel // which nobody meets
	c.socketsErr = fmt.Errorf("%w: %w", errors.ErrUnsupported, syscall.EADDRNOTAVAIL)
	w.mu.Unlock()
	n.mu.Lock()
	a := n.attachments["web"]
	n.mu.Unlock()
	for _, to := range []*container{c, home} { // it is not configured yet, or at home
		other.give("eth0", to, "eth0")
		sockets(0, 0, 0)
		n.portsMu.Lock()
		if _, err := n.socketsIn(a); !errors.Is(err, errNotTaken) || a.inside.never {
			t.Errorf("sockets: %v, and never: %t", err, a.inside.never)
		}
		n.portsMu.Unlock()
		to.give("eth0", other, "eth0")
		sockets(0, 0, 1)
	}
	if err := n.Detach(t.Context(), "web", ""); err != nil {
		t.Error(err)
	}
	nothingLeft(t, w, n)
}

func TestLoose_EndsWhenNobodyHasIt(t *testing.T) {
	take := func(home, c *container) { home.give("rovl1", c, "eth0") }
	for _, tc := range []struct {
		name         string
		do           func(home, c *container)
		stays, until time.Duration
	}{
		{"nobody has taken it", func(home, c *container) {}, 59 * time.Second, 65 * time.Second},
		{"given back", func(home, c *container) {
			take(home, c)
			time.Sleep(2 * time.Second)
			c.give("eth0", home, "rovl1")
		}, 14 * time.Second, 18 * time.Second},
		{"its container has ended", func(home, c *container) {
			take(home, c)
			time.Sleep(2 * time.Second)
			c.hold("")
		}, 9 * time.Second, 13 * time.Second},
		{"its container has ended, and its namespace is kept", func(home, c *container) {
			take(home, c)
			time.Sleep(2 * time.Second)
			c.hold("/proc/10/root/run/docker/netns/12ab")
		}, 58 * time.Second, 65 * time.Second},
		{"its container never began", func(home, c *container) {
			c.hold("")
			take(home, c)
		}, 59 * time.Second, 65 * time.Second},
		{"deleted", func(home, c *container) {
			take(home, c)
			c.remove("eth0")
		}, 0, 2 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				home, c := w.startHeld(10), w.startHeld(20)
				n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
				if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true, IfName: "rovl1"}); err != nil {
					t.Fatal(err)
				}
				tc.do(home, c)
				time.Sleep(tc.stays)
				if tc.stays > 0 {
					only(t, n)
				}
				time.Sleep(tc.until - tc.stays)
				synctest.Wait()
				if left := append(home.interfaces(), c.interfaces()...); len(left) != 0 || home.opened+c.opened != 0 {
					t.Errorf("left: %v, and %d namespaces open", left, home.opened+c.opened)
				}
				nothingLeft(t, w, n)
			})
		})
	}
}

func TestLoose_StaysWhereItIsInUse(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(home, c *container)
	}{
		{"at home, and up", func(home, c *container) { home.setUp("rovl1") }},
		{"the process is another one", func(home, c *container) {
			home.give("rovl1", c, "eth0")
			time.Sleep(2 * time.Second)
			c.hold("")
			time.Sleep(5 * time.Second)
			c.hold("/proc/21/ns/net")
		}},
		{"mounted, and nobody in it", func(home, c *container) {
			c.hold("/proc/10/root/run/docker/netns/12ab")
			home.give("rovl1", c, "eth0")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				home, c := w.startHeld(10), w.startHeld(20)
				n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
				if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true, IfName: "rovl1"}); err != nil {
					t.Fatal(err)
				}
				tc.do(home, c)
				time.Sleep(10 * time.Minute)
				only(t, n)
			})
		})
	}
}

func TestAdopt_FindsLooseOnesWhereverTheyAre(t *testing.T) {
	for _, tc := range []struct {
		name    string
		before  func(home, c *container) // while there is a daemon
		between func(home, c, other *container)
		want    func(home, c, other *container) (*container, string)
	}{
		{"not taken", nil, nil, func(home, _, _ *container) (*container, string) { return home, "rovl1" }},
		{"taken", func(home, c *container) { home.give("rovl1", c, "eth0") }, nil, func(_, c, _ *container) (*container, string) { return c, "eth0" }},
		{"taken while there was none", nil, func(home, _, other *container) { home.give("rovl1", other, "eth5") }, func(_, _, other *container) (*container, string) { return other, "eth5" }},
		{"given back while there was none", func(home, c *container) { home.give("rovl1", c, "eth0") },
			func(home, c, _ *container) { c.give("eth0", home, "rovl1") }, func(home, _, _ *container) (*container, string) { return home, "rovl1" }},
		{"named otherwise", func(home, c *container) { home.give("rovl1", c, "eth0") },
			func(_, c, _ *container) { c.give("eth0", c, "eth1") }, func(_, c, _ *container) (*container, string) { return c, "eth1" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				home, c, other := w.startHeld(10), w.startHeld(20), w.startHeld(30)
				conf := testConfig(t)
				n := readyNode(t, w, conf, "10.5.72.0/24")
				was, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true, Name: "web", IfName: "rovl1", DNSAt: []string{"10.0.2.3"}})
				if err != nil {
					t.Fatal(err)
				}
				if tc.before != nil {
					tc.before(home, c)
				}
				time.Sleep(time.Second)
				stopNode(n)
				if tc.between != nil {
					tc.between(home, c, other)
				}
				n = readyNode(t, w, conf, "10.5.72.0/24")
				if err := n.adopt(); err != nil {
					t.Fatal(err)
				}
				where, ifName := tc.want(home, c, other)
				if a := only(t, n); a.Name != "web" || a.Addr != was.Addr || a.IfName != ifName || a.Inode != where.inode || !a.Loose || len(a.DNSAt) != 1 {
					t.Errorf("taken up as %+v", a)
				}
				if l := where.links[ifName]; l == nil || !l.held || len(l.config.Addrs) > 0 {
					t.Errorf("the interface: %+v", l)
				}
				if err := n.Detach(t.Context(), "web", ""); err != nil {
					t.Error(err)
				}
				nothingLeft(t, w, n)
				if open := home.opened + c.opened + other.opened; open != 0 {
					t.Errorf("%d namespaces are left open", open)
				}
			})
		})
	}
}

// RootlessKit may keep the namespace that docker's interfaces begin in apart from its child's; after a restart of the daemon there is the path alone.
func TestAttach_LooseIsMadeWhereRootlessKitKeepsItsNamespace(t *testing.T) {
	const path = "/proc/10/root/run/user/1000/dockerd-rootless/netns"
	w := newWorld()
	kept, other := w.start(11), w.startHeld(10)
	kept.hold(path)
	conf := testConfig(t)
	begin := func() *Node {
		n := readyNode(t, w, conf, "10.5.72.0/24")
		n.edges.detached = func(pid int) string {
			if pid == 10 {
				return path
			}
			return ""
		}
		return n
	}
	n := begin()
	if a, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true, IfName: "rovl1"}); err != nil || a.Inode != kept.inode || a.Name != "rovl1" {
		t.Fatalf("attached %+v, %v", a, err)
	}
	stopNode(n)
	n = begin()
	if err := n.adopt(); err != nil {
		t.Fatal(err)
	}
	if a := only(t, n); a.Inode != kept.inode || len(other.interfaces()) != 0 {
		t.Errorf("taken up as %+v", a)
	}
}

func TestAdopt_DropsLooseOnesThatAreGone(t *testing.T) {
	w := newWorld()
	home := w.startHeld(10)
	conf := testConfig(t)
	n := readyNode(t, w, conf, "10.5.72.0/24")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true, IfName: "rovl1"}); err != nil {
		t.Fatal(err)
	}
	stopNode(n)
	home.remove("rovl1")
	n = readyNode(t, w, conf, "10.5.72.0/24")
	if err := n.adopt(); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, w, n)
}

// Whoever makes a TAP in a container of his can give it any MAC address and any name.
func TestAdopt_TakesNoLooseOneForAnother(t *testing.T) {
	for _, tc := range []struct {
		name    string
		marked  bool // as of this version
		moved   bool // it is in a namespace where it was not seen
		removed bool // it is gone, and an impostor is elsewhere
		lives   bool
	}{
		{name: "elsewhere", marked: true, removed: true},
		{name: "the right one is elsewhere, too", marked: true, moved: true, lives: true},
		{name: "without a mark, elsewhere", removed: true},
		{name: "without a mark, where it was", lives: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld()
			home, c, evil := w.startHeld(10), w.startHeld(20), w.startHeld(30)
			conf := testConfig(t)
			n := readyNode(t, w, conf, "10.5.72.0/24")
			if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 10, Loose: true, Name: "web", IfName: "rovl1"}); err != nil {
				t.Fatal(err)
			}
			if !tc.marked {
				n.attachments["web"].saved.Mark = ""
				n.mu.Lock()
				if err := n.saveAttachmentsLocked(); err != nil {
					t.Error(err)
				}
				n.mu.Unlock()
			}
			stopNode(n)
			real := home.links["rovl1"]
			fake := &fakeLink{c: evil, config: real.config}
			fake.config.Alias = ""
			evil.links["rovl1"] = fake
			where := home
			if tc.moved {
				home.give("rovl1", c, "eth0")
				where = c
			}
			if tc.removed {
				home.remove("rovl1")
			}
			n = readyNode(t, w, conf, "10.5.72.0/24")
			if err := n.adopt(); err != nil {
				t.Fatal(err)
			}
			if fake.held {
				t.Error("the impostor was taken up")
			}
			if !tc.lives {
				if list, err := n.Attachments(t.Context()); err != nil || len(list) != 0 {
					t.Errorf("taken up: %+v, %v", list, err)
				}
				return
			}
			if a := only(t, n); a.Inode != where.inode || !real.held {
				t.Errorf("taken up as %+v", a)
			}
		})
	}
}

func TestAttach_DNSAtReachesTheGateway(t *testing.T) {
	w := newWorld()
	w.start(1)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	for _, addr := range []string{"10.5.9.3", "127.0.0.53", "x", "::ffff:10.0.2.3"} {
		if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, DNSAt: []string{addr}}); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("dns_at %s: %v", addr, err)
		}
	}
	a, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, DNSAt: []string{"10.0.2.3", "fd00::3"}})
	if err != nil || len(a.DNSAt) != 2 {
		t.Fatalf("%+v, %v", a, err)
	}
	for _, p := range w.policies {
		if fmt.Sprint(p.DNSAt) != "[10.0.2.3 fd00::3]" {
			t.Errorf("the gateway has %+v", p)
		}
	}
}

func TestAttach_LooseHasIPv6AsAskedFor(t *testing.T) {
	for _, no := range []bool{false, true} {
		w := newWorld()
		w.startHeld(1)
		n := dualStackNode(t, w, testConfig(t))
		a, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Loose: true, NoIPv6: no})
		if err != nil || (a.Addr6 == "") != no || a.Problem != "" {
			t.Errorf("NoIPv6 %t: %+v, %v", no, a, err)
		}
		if r := reserveAddr(t, n, "", ""); r.Addr6 == "" || r.Gateway6 == "" {
			t.Errorf("a reserved address: %+v", r)
		}
	}
}
