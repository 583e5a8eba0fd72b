// Tests of what a node does with attachments that the daemon before still serves. The switch between two processes is in test/replace_test.go.

package node

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/internal/handover"
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

func TestHandoverOr_AnswersNothingAfterTheHandover(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	h := n.handoverOr(t.Context(), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("begun with") }))
	n.gate.Lock()
	body := strings.Repeat("x", 1<<15)
	answers := make(chan *httptest.ResponseRecorder, 4)
	ask := func(method, path string) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		answers <- w
	}
	go ask(http.MethodPost, api.PathAttachments) // and waits, mostly
	n.handed.Store(true)
	n.gate.Unlock()
	ask(http.MethodDelete, api.PathAttachments+"/web")
	ask(http.MethodGet, api.PathStatus)
	ask(http.MethodPost, api.PathDial)
	for range 4 {
		if w := <-answers; w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
			t.Errorf("%d, %v", w.Code, w.Header())
		}
	}
}

// The server gives up reading a body after a time that is shorter than a handover may take.
func TestHandoverOr_ReadsTheBodyOfWhatHasToWait(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	got := ""
	h := n.handoverOr(t.Context(), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got = string(b)
	}))
	read := make(chan struct{})
	body := io.MultiReader(strings.NewReader("all of it"), &onRead{sync.OnceFunc(func() { close(read) })})
	n.gate.Lock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, api.PathAttachments, body))
	}()
	<-read
	n.gate.Unlock()
	if <-done; got != "all of it" {
		t.Errorf("got %q", got)
	}
	w := httptest.NewRecorder()
	n.gate.Lock()
	defer n.gate.Unlock()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, api.PathAttachments, iotest.ErrReader(io.ErrUnexpectedEOF)))
	if w.Code != http.StatusBadRequest {
		t.Errorf("a body that breaks off: %d", w.Code)
	}
}

// onRead is an empty body that tells when it is read.
type onRead struct{ tell func() }

func (r *onRead) Read([]byte) (int, error) { r.tell(); return 0, io.EOF }

func TestLockGate_ComesBetweenChangesThatNeverPause(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	var changes sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for range 4 {
		changes.Go(func() {
			for ctx.Err() == nil {
				n.gate.RLock()
				time.Sleep(2 * time.Millisecond)
				n.gate.RUnlock()
			}
		})
	}
	if n.lockGate(handoverTalk) {
		n.gate.Unlock()
	} else {
		t.Error("gave up")
	}
	cancel()
	changes.Wait()
}

func TestLockGate_GivesUpAndLeavesTheGateOpen(t *testing.T) {
	n := &Node{}
	n.gate.RLock()
	if n.lockGate(time.Millisecond) {
		t.Fatal("locked over a change")
	}
	n.gate.RUnlock()
	n.gate.RLock() // or it would wait for ever
}

func TestSave_LeavesTheFilesOfAnotherAlone(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	n.handed.Store(true)
	n.mu.Lock()
	err := errors.Join(n.saveAttachmentsLocked(), n.saveLastLocked())
	n.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{attachmentsFile, lastFile} {
		if _, err := os.Lstat(filepath.Join(n.cfg.StateDir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// shortDir is a directory whose socket path fits in sun_path, which t.TempDir's may not.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ovl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// pair is two ends of a connection.
func pair(t *testing.T) (a, b *net.UnixConn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return ends[0], ends[1]
}

func TestClaimPlace_EndsWithItsContext(t *testing.T) {
	for _, upgrades := range []bool{false, true} {
		conf := testConfig(t)
		conf.RuntimeDir = shortDir(t)
		n := readyNode(t, newWorld(), conf, "10.5.72.0/24")
		ln, err := net.Listen("unix", conf.Socket())
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		ctx, cancel := context.WithCancel(t.Context())
		go func() { // a daemon that hangs
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 4096))
			if upgrades {
				_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+handoverProtocol+"\r\n\r\n")
				var asked claim
				_ = handover.Read(c, &asked)
			}
			cancel()
			_, _ = io.Copy(io.Discard, c)
			c.Close()
		}()
		if _, err := n.claimPlace(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("upgraded %v: %v", upgrades, err)
		}
		cancel()
	}
}

func TestClaimPlace_AsksNobodyInADirectoryOfOthers(t *testing.T) {
	conf := testConfig(t)
	conf.RuntimeDir = shortDir(t)
	n := readyNode(t, newWorld(), conf, "10.5.72.0/24")
	if err := os.Chmod(conf.RuntimeDir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := n.claimPlace(t.Context()); !errors.Is(err, api.ErrDenied) {
		t.Errorf("got %v", err)
	}
}

func TestMayHandOver_IsOurUserAndWhoeverActivatesSockets(t *testing.T) {
	for uid, want := range map[uint32]bool{uint32(os.Geteuid()): true, 0: true, 4711: false} {
		if got := mayHandOver(uid); got != want {
			t.Errorf("uid %d: %v", uid, got)
		}
	}
}

func TestAwaitReady_EndsWithItsContext(t *testing.T) {
	for name, tt := range map[string]struct {
		says  string
		ends  bool
		ready bool
	}{
		"ready":         {says: "R", ready: true},
		"told to end":   {ends: true},
		"both":          {says: "R", ends: true},
		"another thing": {says: "x"},
	} {
		t.Run(name, func(t *testing.T) {
			mine, theirs := pair(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if _, err := io.WriteString(theirs, tt.says); err != nil {
				t.Fatal(err)
			}
			if tt.ends {
				cancel()
			}
			if err := awaitReady(ctx, mine); (err == nil) != tt.ready || tt.ends && !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestTakePlace_DoesNotBeginWhenItIsToEnd(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	mine, theirs := pair(t)
	n.given = &inheritance{conn: mine}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.takePlace(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	mine.Close()
	if b, err := io.ReadAll(theirs); err != nil || len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
}
