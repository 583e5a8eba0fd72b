// Tests of what a node does with attachments that the daemon before still serves. The switch between two processes is in test/replace_test.go.

package node

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// heirOf is a node that is to take the place of one with that config, and got the TAPs of those attachments.
func heirOf(t *testing.T, w *world, conf Config, names ...string) *Node {
	conf.Replace = true
	n := readyNode(t, w, conf, "10.5.72.0/24")
	n.given = &inheritance{items: make(map[givenKey]givenItem), byKey: make(map[givenKey][]int)}
	for _, name := range names {
		n.given.byKey[givenKey{Kind: givenTAP, Name: name}] = []int{-1}
	}
	return n
}

func TestAdopt_AbortsAReplaceRatherThanLoseAnAttachment(t *testing.T) {
	for _, tt := range []struct {
		name    string
		happens func(c *container, heir *Node)
		aborts  bool
	}{
		{"no descriptors are left", func(_ *container, heir *Node) {
			heir.edges.watchPID = func(int) (exitWatch, error) { return nil, unix.EMFILE }
		}, true},
		{"its namespace is not found", func(_ *container, heir *Node) {
			heir.edges.openPID = func(int) (namespace, error) { return nil, nsutil.ErrGone }
		}, true},
		{"its process has ended", func(c *container, _ *Node) { c.start++ }, false},
		{"its interface is gone", func(_ *container, heir *Node) {
			heir.edges.openPID = func(int) (namespace, error) { return nil, nsutil.ErrGone }
			heir.edges.namespaceOf = func(int) (namespace, error) { return nil, nsutil.ErrNoTAP }
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, conf := newWorld(), testConfig(t)
			c := w.start(1)
			old := readyNode(t, w, conf, "10.5.72.0/24")
			if _, err := old.Attach(t.Context(), api.AttachRequest{PID: 1}); err != nil {
				t.Fatal(err)
			}
			heir := heirOf(t, w, conf, "pid-1")
			tt.happens(c, heir)
			if err := heir.adopt(); (err != nil) != tt.aborts {
				t.Errorf("got %v", err)
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
	heir := heirOf(t, w, conf, a.Name)
	heir.edges.namespaceOf = func(int) (namespace, error) { return fakeNamespace{c}.again() }
	s := old.savedOf(old.attachments[a.Name])
	ns, err := heir.findSaved(&s)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if s.Inode++; ns.Inode() != c.inode {
		t.Errorf("got %d, want %d", ns.Inode(), c.inode)
	}
	if _, err := heir.findSaved(&s); !errors.Is(err, nsutil.ErrGone) {
		t.Errorf("another namespace: %v", err)
	}
}

func TestAdopt_LeavesTheNamespaceAsItIsUntilTheSwitch(t *testing.T) {
	w, conf := newWorld(), testConfig(t)
	c := w.start(77)
	old := readyNode(t, w, conf, "10.5.72.0/24")
	name := attachGateway(t, old, 77).Name
	transit := c.transit
	heir := heirOf(t, w, conf, name)
	heir.mtu = 1400
	if err := heir.adopt(); err == nil { // descriptor -1 is no TAP
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
