// Tests of what a node does with attachments that the daemon before still serves. The switch between two processes is in test/replace_test.go.

package node

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// heirOf is a node that is to take the place of one with that config, and got the TAP of one attachment, which is in c.
func heirOf(t *testing.T, w *world, conf Config, name string, c *container) *Node {
	const fd = 7
	conf.Replace = true
	n := readyNode(t, w, conf, "10.5.72.0/24")
	n.given = &inheritance{items: make(map[givenKey]givenItem), byKey: map[givenKey][]int{{Kind: givenTAP, Name: name}: {fd}}}
	tap := func(int) *fakeLink {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, l := range c.links {
			return l
		}
		return nil
	}
	n.edges.namespaceOf = func(fd int) (namespace, error) {
		if tap(fd) == nil {
			return nil, nsutil.ErrNoTAP
		}
		return fakeNamespace{c}.again()
	}
	n.edges.givenTAP = func(fd int, _ bool, _ savedAttachment) (link, error) {
		if l := tap(fd); l != nil {
			return l, nil
		}
		return nil, nsutil.ErrNoTAP
	}
	return n
}

// leave ends the container's process. Its namespace and its TAP stay, as long as a daemon holds that.
func (c *container) leave() {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	delete(c.world.containers, c.pid)
	close(c.exited)
}

func TestAdopt_AReplaceLosesNoAttachmentButWhatHasEnded(t *testing.T) {
	const (
		taken = iota
		dropped
		aborted
	)
	const path = "/run/netns/c1"
	byPID, byPath, byInode := api.AttachRequest{PID: 1}, api.AttachRequest{Netns: path}, api.AttachRequest{NetnsFD: 7}
	loose := api.AttachRequest{PID: 1, Loose: true, Owner: "docker"}
	failing := func(heir *Node, err error) { // all that leads to a namespace
		heir.edges.openPID = func(int) (namespace, error) { return nil, err }
		heir.edges.openPath = func(string) (namespace, error) { return nil, err }
		heir.edges.inodeAt = func(string) (uint64, error) { return 0, err }
		heir.edges.findInode = func(uint64, string) (string, error) { return "", err }
		heir.edges.netnses = func() (map[uint64]int, error) { return nil, err }
	}
	for _, tt := range []struct {
		name    string
		r       api.AttachRequest
		happens func(c *container, heir *Node)
		want    int
	}{
		{"pid: nothing", byPID, func(*container, *Node) {}, taken},
		{"pid: no descriptors are left", byPID, func(_ *container, heir *Node) {
			heir.edges.watchPID = func(int) (exitWatch, error) { return nil, unix.EMFILE }
		}, aborted},
		{"pid: it cannot be read since when it runs", byPID, func(_ *container, heir *Node) {
			heir.edges.startTime = func(int) (uint64, error) { return 0, unix.EMFILE }
		}, taken},
		{"pid: its namespace cannot be opened", byPID, func(_ *container, heir *Node) { failing(heir, unix.EMFILE) }, taken},
		{"pid: nor by its TAP", byPID, func(_ *container, heir *Node) {
			failing(heir, unix.EMFILE)
			heir.edges.namespaceOf = func(int) (namespace, error) { return nil, unix.EMFILE }
		}, aborted},
		{"pid: it has gone to another namespace", byPID, func(c *container, heir *Node) {
			heir.edges.openPID = func(int) (namespace, error) { return fakeNamespace{c.world.start(2)}.again() }
		}, taken},
		{"pid: the router does not take it", byPID, func(c *container, _ *Node) { c.world.addPortErr = errKernel }, aborted},
		{"pid: the process has ended", byPID, func(c *container, _ *Node) { c.leave() }, dropped},
		{"pid: it is another process's", byPID, func(c *container, _ *Node) { c.start++ }, dropped},
		{"pid: the process ends in the middle", byPID, func(c *container, heir *Node) {
			watch := heir.edges.watchPID
			heir.edges.watchPID = func(pid int) (exitWatch, error) { c.leave(); return watch(pid) }
		}, dropped},
		{"pid: its interface is gone", byPID, func(c *container, _ *Node) { clear(c.links) }, dropped},

		{"path: nothing", byPath, func(*container, *Node) {}, taken},
		{"path: it is gone", byPath, func(c *container, _ *Node) { c.paths = nil }, dropped},
		{"path: it is the namespace of another", byPath, func(c *container, _ *Node) {
			c.paths = nil
			c.world.start(2).paths = []string{path}
		}, dropped},
		{"path: it goes in the middle", byPath, func(c *container, heir *Node) {
			heir.edges.givenTAP = func(int, bool, savedAttachment) (link, error) { c.paths = nil; return nil, unix.EMFILE }
		}, dropped},
		{"path: no descriptors are left", byPath, func(_ *container, heir *Node) { failing(heir, unix.EMFILE) }, taken},
		{"path: its interface is gone", byPath, func(c *container, _ *Node) { clear(c.links) }, dropped},

		{"inode: nobody is in it yet", byInode, func(*container, *Node) {}, taken},
		{"inode: it cannot be looked for", byInode, func(_ *container, heir *Node) { failing(heir, unix.EMFILE) }, taken},
		{"inode: nor opened by its TAP", byInode, func(_ *container, heir *Node) {
			heir.edges.namespaceOf = func(int) (namespace, error) { return nil, unix.EMFILE }
		}, aborted},
		{"inode: its interface is gone", byInode, func(c *container, _ *Node) { clear(c.links) }, dropped},

		{"loose: nothing", loose, func(*container, *Node) {}, taken},
		{"loose: it cannot be looked for", loose, func(_ *container, heir *Node) { failing(heir, unix.EMFILE) }, taken},
		{"loose: it was made by a process that has ended", loose, func(c *container, _ *Node) { c.leave() }, taken},
		{"loose: its interface is gone", loose, func(c *container, _ *Node) { clear(c.links) }, dropped},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, conf := newWorld(), testConfig(t)
			c := w.startApart(1, 7)
			c.paths = append(c.paths, path)
			old := readyNode(t, w, conf, "10.5.72.0/24")
			a, err := old.Attach(t.Context(), tt.r)
			if err != nil {
				t.Fatal(err)
			}
			heir := heirOf(t, w, conf, a.Name, c)
			tt.happens(c, heir)
			err = heir.adopt()
			got := dropped
			if heir.mu.Lock(); heir.attachments[a.Name] != nil {
				got = taken
			}
			heir.mu.Unlock()
			if err != nil {
				got = aborted
			}
			if got != tt.want {
				t.Errorf("got %d, want %d: %v", got, tt.want, err)
			}
		})
	}
}

func TestAdopt_FindsANamespaceThatOnlyTheDaemonBeforeKeeps(t *testing.T) {
	w, conf := newWorld(), testConfig(t)
	c := w.startApart(1, 7)
	old := readyNode(t, w, conf, "10.5.72.0/24")
	a, err := old.Attach(t.Context(), api.AttachRequest{NetnsFD: 7})
	if err != nil {
		t.Fatal(err)
	}
	heir := heirOf(t, w, conf, a.Name, c)
	s := old.savedOf(old.attachments[a.Name])
	ns, err := heir.findSaved(&s)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if ns.Inode() != c.inode {
		t.Errorf("got %d, want %d", ns.Inode(), c.inode)
	}
}

func TestAdopt_LeavesTheNamespaceAsItIsUntilTheSwitch(t *testing.T) {
	w, conf := newWorld(), testConfig(t)
	c := w.start(77)
	old := readyNode(t, w, conf, "10.5.72.0/24")
	name := attachGateway(t, old, 77).Name
	transit := c.transit
	heir := heirOf(t, w, conf, name, c)
	heir.mtu = 1400
	w.addPortErr = errKernel
	if err := heir.adopt(); err == nil {
		t.Error("adopted")
	}
	if c.transit != transit || c.links["rovl0"].config.MTU != 1472 {
		t.Errorf("firewall %+v, MTU %d", c.transit, c.links["rovl0"].config.MTU)
	}
}

func TestSettle_GivesTheNamespaceWhatTheNodeHasNow(t *testing.T) {
	w, conf := newWorld(), testConfig(t)
	c := w.start(77)
	n := readyNode(t, w, conf, "10.5.72.0/24")
	attachGateway(t, n, 77)
	c.transit, n.mtu = nil, 1400
	n.settle()
	if mtu := c.links["rovl0"].config.MTU; c.transit == nil || mtu != 1400 {
		t.Errorf("firewall %+v, MTU %d", c.transit, mtu)
	}
}
