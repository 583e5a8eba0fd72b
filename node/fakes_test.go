// Stand-ins for the kernel and the packet path.

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/hostnet"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
	"github.com/rootless-ovl/rootless-ovl/internal/tap"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
	"github.com/rootless-ovl/rootless-ovl/stack"
	"github.com/rootless-ovl/rootless-ovl/stack/dns"
)

// world is the containers of a test host and the node's packet path.
type world struct {
	mu         sync.Mutex
	containers map[int]*container // by pid
	ports      map[*forwarder.Port]forwarder.PortConfig
	table      forwarder.TableConfig
	released   []netip.Prefix
	policies   map[netip.Addr]stack.Policy
	zone       *dns.Zone
	own        []netip.Addr
	carried    []netip.AddrPort // destinations of CarryTCP
	addPortErr error
	boot       string
	uptime     time.Duration // 0: the real one

	callerEnded error
	removing    chan struct{} // what RemovePort waits for; nil: nothing
	host        external      // the external interface; the loopback's if there is none
	also        []netip.Addr  // addresses that the host has beside those of the external interface
	hostErr     error
	watchErr    error
	outside6    bool          // the host has an IPv6 way out
	bound       [2]netip.Addr // by the last Rebind
	rebindErr   error
	hostNews    func()   // tells the node of a change; nil while it does not watch
	trouble     []string // things done in an order that would crash
}

// container is a process with a namespace of its own.
type container struct {
	world     *world
	pid       int
	inode     uint64
	start     uint64
	paths     []string // that lead to its namespace
	held      []string // of these, those by which it is found: a process that is in it, a mount of it
	opened    int      // how often its namespace is open
	exited    chan struct{}
	links     map[string]*fakeLink // TAPs in the namespace by interface name
	createErr error
	changeErr error
	bridges   []nsutil.Bridge

	bridgesErr error
	noIPv6     bool
	transit    *nsutil.Transit // what its firewall lets through
	refuses    error           // of its firewall

	sockets    int // how many pools of sockets are in the namespace
	socketsErr error
	servers    map[netip.AddrPort]netip.AddrPort // where what listens in the container is really
}

// theCaller is the pid of whoever calls the API.
const theCaller = 999

// startApart starts a container that the caller of the API has as a descriptor, and that nobody is in yet.
func (w *world) startApart(pid, fd int) *container {
	c := w.start(pid)
	w.mu.Lock()
	defer w.mu.Unlock()
	c.paths = []string{fmt.Sprintf("/proc/%d/fd/%d", theCaller, fd)}
	return c
}

// hold has the namespace be found by path, or not any more if it is empty.
func (c *container) hold(path string) {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	c.held = nil
	if path != "" {
		c.held = []string{path}
	}
}

func newWorld() *world {
	return &world{containers: make(map[int]*container), ports: make(map[*forwarder.Port]forwarder.PortConfig), policies: make(map[netip.Addr]stack.Policy)}
}

func (w *world) start(pid int) *container {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := &container{world: w, pid: pid, inode: 4026530000 + uint64(pid), start: 1000 + uint64(pid), exited: make(chan struct{}), links: make(map[string]*fakeLink)}
	w.containers[pid] = c
	return c
}

func (w *world) count(n *int, by int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*n += by
}

// exit ends the container; its namespace and TAPs go with it.
func (c *container) exit() {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	delete(c.world.containers, c.pid)
	clear(c.links)
	close(c.exited)
}

func (c *container) interfaces() (names []string) {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	for name := range c.links {
		names = append(names, name)
	}
	return names
}

func (w *world) find(pid int) (*container, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.containers[pid]
	if c == nil {
		return nil, fmt.Errorf("process %d: %w", pid, nsutil.ErrNoProcess)
	}
	return c, nil
}

func (w *world) edges() edges {
	return edges{
		openPID: func(pid int) (namespace, error) {
			c, err := w.find(pid)
			if err != nil {
				return nil, err
			}
			w.count(&c.opened, 1)
			return fakeNamespace{c}, nil
		},
		detached: func(int) string { return "" },
		openPath: func(path string) (namespace, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, c := range w.containers {
				if slices.Contains(c.paths, path) || slices.Contains(c.held, path) {
					c.opened++
					return fakeNamespace{c}, nil
				}
			}
			return nil, fmt.Errorf("%s: %w", path, nsutil.ErrNoPath)
		},
		inodeAt: func(path string) (uint64, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, c := range w.containers {
				if slices.Contains(c.paths, path) || slices.Contains(c.held, path) {
					return c.inode, nil
				}
			}
			return 0, fmt.Errorf("%s: %w", path, syscall.ENOENT)
		},
		namespaceOf: func(int) (namespace, error) { return nil, nsutil.ErrNotOwner },
		findInode: func(inode uint64, _ string) (string, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, c := range w.containers {
				if c.inode == inode && len(c.held) > 0 {
					return c.held[0], nil
				}
			}
			return "", fmt.Errorf("%d: %w", inode, nsutil.ErrGone)
		},
		caller: func(context.Context) (int, error) { return theCaller, nil },
		lives:  func(context.Context) error { return w.callerEnded },
		bootID: func() (string, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.boot, nil
		},
		sinceBoot: func() time.Duration {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.uptime == 0 {
				return sinceBoot()
			}
			return w.uptime
		},
		startTime: func(pid int) (uint64, error) {
			c, err := w.find(pid)
			if err != nil {
				return 0, err
			}
			return c.start, nil
		},
		watchPID: func(pid int) (exitWatch, error) {
			c, err := w.find(pid)
			if err != nil {
				return nil, err
			}
			return &fakeExit{c}, nil
		},
		external: func(c Config, _ external) (external, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.hostErr != nil {
				return external{}, w.hostErr
			}
			if w.host != (external{}) {
				return w.host, nil
			}
			lo := netip.MustParseAddr("127.0.0.1")
			public := lo
			if c.PublicIP.IsValid() {
				public = c.PublicIP
			}
			return external{ifName: "lo", bind: lo, public: public, mtu: 1500}, nil
		},
		hasAddr: func(a netip.Addr) (bool, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return a == w.host.bind || a == w.host.bind6 || slices.Contains(w.also, a), nil
		},
		outside6: func(ifName string) bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.outside6
		},
		netnses: func() (map[uint64]int, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			all := make(map[uint64]int)
			for pid, c := range w.containers {
				all[c.inode] = pid
			}
			return all, nil
		},
		hasIface: func(name string) (bool, error) { return name == "lo", nil },
		watchHost: func(ctx context.Context, _ Config, changed func()) error {
			w.mu.Lock()
			err := w.watchErr
			w.hostNews = changed
			w.mu.Unlock()
			if err != nil {
				return err
			}
			<-ctx.Done()
			return nil
		},
		overlaps: func(netip.Prefix) ([]hostnet.Overlap, error) { return nil, nil },
	}
}

type fakeNamespace struct{ c *container }

func (f fakeNamespace) Inode() uint64 { return f.c.inode }
func (f fakeNamespace) Close() error  { f.c.world.count(&f.c.opened, -1); return nil }

func (f fakeNamespace) connections(int, func(nsutil.TCPConnection) bool) ([]nsutil.TCPConnection, error) {
	return nil, nil
}

func (f fakeNamespace) again() (namespace, error) {
	f.c.world.count(&f.c.opened, 1)
	return f, nil
}

func (f fakeNamespace) create(c nsutil.TAPConfig, _ savedAttachment) (link, error) {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	if f.c.createErr != nil {
		return nil, f.c.createErr
	}
	if f.c.noIPv6 && slices.ContainsFunc(c.Addrs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		return nil, fmt.Errorf("process %d: %w", f.c.pid, nsutil.ErrNoIPv6)
	}
	for name, l := range f.c.links {
		switch {
		case name == c.IfName:
			return nil, fmt.Errorf("%s: %w", c.IfName, nsutil.ErrIfNameTaken)
		case sameRoute(l.config, c):
			return nil, fmt.Errorf("process %d: over %s: %w", f.c.pid, name, nsutil.ErrRouteTaken)
		}
	}
	l := &fakeLink{c: f.c, config: c, held: true}
	f.c.links[c.IfName] = l
	return l, nil
}

func (f fakeNamespace) adopt(s savedAttachment) (link, error) {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	l := f.c.links[s.IfName]
	if l == nil {
		return nil, fmt.Errorf("%s: %w", s.IfName, nsutil.ErrNoTAP)
	}
	l.held = true
	return l, nil
}

func sameRoute(a, b nsutil.TAPConfig) bool {
	return slices.ContainsFunc(a.Routes, func(r nsutil.Route) bool {
		return slices.ContainsFunc(b.Routes, func(s nsutil.Route) bool { return r.Dst == s.Dst })
	})
}

func (f fakeNamespace) inTheWay(c nsutil.TAPConfig) (found []nsutil.Device, _ error) {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	for name, l := range f.c.links {
		if name == c.IfName || sameRoute(l.config, c) {
			found = append(found, nsutil.Device{IfName: name, MAC: l.config.MAC})
		}
	}
	return found, nil
}

func (f fakeNamespace) remove(ifName string) error {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	switch l := f.c.links[ifName]; {
	case l == nil:
		return fmt.Errorf("%s: %w", ifName, nsutil.ErrNoTAP)
	case l.held:
		return fmt.Errorf("%s: %w", ifName, nsutil.ErrTAPBusy)
	}
	delete(f.c.links, ifName)
	return nil
}

func (f fakeNamespace) change(c nsutil.TAPConfig) error {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	l := f.c.links[c.IfName]
	switch {
	case l == nil:
		return fmt.Errorf("%s: %w", c.IfName, nsutil.ErrNoTAP)
	case f.c.changeErr != nil:
		return f.c.changeErr
	case f.c.noIPv6 && len(c.Addrs) > 0:
		return fmt.Errorf("process %d: %w", f.c.pid, nsutil.ErrNoIPv6)
	}
	l.config.MTU, l.config.GSOMaxSize = c.MTU, c.GSOMaxSize
	l.config.Addrs = slices.DeleteFunc(l.config.Addrs, func(p netip.Prefix) bool { return slices.Contains(c.OldAddrs, p) })
	l.config.Routes = slices.DeleteFunc(l.config.Routes, func(r nsutil.Route) bool { return slices.Contains(c.OldRoutes, r) })
	l.config.Addrs = append(l.config.Addrs, c.Addrs...)
	l.config.Routes = append(l.config.Routes, c.Routes...)
	return nil
}

func (f fakeNamespace) bridges() ([]nsutil.Bridge, error) { return f.c.bridges, f.c.bridgesErr }

func (f fakeNamespace) allow(t nsutil.Transit) error {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	if f.c.refuses != nil {
		return f.c.refuses
	}
	f.c.transit = &t
	return nil
}

func (f fakeNamespace) forbid(ifName string) error {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	if f.c.transit != nil && f.c.transit.IfName == ifName {
		f.c.transit = nil
	}
	return f.c.refuses
}

// sockets are fakes that dial the server which the test has put into the container.
func (f fakeNamespace) sockets(savedAttachment) (kernelSockets, error) {
	f.c.world.mu.Lock()
	defer f.c.world.mu.Unlock()
	if f.c.socketsErr != nil {
		return nil, f.c.socketsErr
	}
	f.c.sockets++
	return fakeSockets(f), nil
}

type fakeSockets struct{ c *container }

func (s fakeSockets) DialTCP(ctx context.Context, _, to netip.AddrPort) (*net.TCPConn, error) {
	s.c.world.mu.Lock()
	server := s.c.servers[to]
	s.c.world.mu.Unlock()
	if !server.IsValid() {
		return nil, syscall.ECONNREFUSED
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", server.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (s fakeSockets) Close() error {
	s.c.world.mu.Lock()
	defer s.c.world.mu.Unlock()
	s.c.sockets--
	return nil
}

type fakeLink struct {
	c      *container
	config nsutil.TAPConfig
	held   bool
	up     bool
}

func (l *fakeLink) Send(*packet.Scratch, []*packet.Packet) {}
func (l *fakeLink) FD() int                                { return -1 }
func (l *fakeLink) Read(*packet.Rx) error                  { return nil }
func (l *fakeLink) Stats() tap.Stats                       { return tap.Stats{Reads: 1} }
func (l *fakeLink) Drops(m map[string]uint64)              { m["tap-not-ip"]++ }

func (l *fakeLink) duplicate() (int, bool, error) { return -1, false, errLinkClosed }
func (l *fakeLink) Close() error {
	w := l.c.world
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.ports {
		if p.Device == forwarder.Device(l) {
			w.trouble = append(w.trouble, "a TAP was closed that the router still uses")
		}
	}
	if !l.held {
		w.trouble = append(w.trouble, "a TAP was closed twice")
	}
	l.held = false
	return nil
}

func (l *fakeLink) Delete() error {
	err := l.Close()
	l.c.world.mu.Lock()
	defer l.c.world.mu.Unlock()
	if c, name := l.at(); c != nil {
		delete(c.links, name)
	}
	return err
}

type fakeExit struct{ c *container }

func (e *fakeExit) Done() <-chan struct{} { return e.c.exited }
func (e *fakeExit) Close() error          { return nil }

// The packet path and the gateway.

func (w *world) AddPort(c forwarder.PortConfig) (*forwarder.Port, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.addPortErr != nil {
		return nil, w.addPortErr
	}
	p := new(forwarder.Port)
	w.ports[p] = c
	return p, nil
}

func (w *world) RemovePort(p *forwarder.Port) {
	if w.removing != nil {
		<-w.removing
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.table.Routes {
		if r.Hop == forwarder.ToPort(p) {
			w.trouble = append(w.trouble, "a port was removed that the table still leads to")
		}
	}
	delete(w.ports, p)
}

func (w *world) SetTable(t forwarder.TableConfig) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.table = t
	return nil
}

func (w *world) Rebind(addr, addr6 netip.Addr) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.rebindErr != nil {
		return w.rebindErr
	}
	w.bound = [2]netip.Addr{addr, addr6}
	return nil
}

// breakDevices makes every device fail, as when root in the container deletes its interface.
func (w *world) breakDevices() {
	w.mu.Lock()
	var gone []func(error)
	for _, p := range w.ports {
		gone = append(gone, p.Gone)
	}
	w.mu.Unlock()
	for _, g := range gone {
		g(errKernel)
	}
}

func (w *world) Send(*packet.Scratch, []*packet.Packet) {}

func (w *world) SetAddresses(addrs []netip.Addr) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.own = addrs
	return nil
}

func (w *world) SetNames(z *dns.Zone) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.zone = z
}

func (w *world) Release(a netip.Prefix) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.released = append(w.released, a)
}

// CarryTCP notes that the connection came and ends it.
func (w *world) CarryTCP(_ context.Context, host *net.TCPConn, _, to netip.AddrPort) error {
	w.mu.Lock()
	w.carried = append(w.carried, to)
	w.mu.Unlock()
	return host.Close()
}

func (w *world) OpenUDP(_, _ netip.AddrPort, _ func([]byte)) (*stack.InwardUDP, error) {
	return nil, syscall.ENETDOWN
}

func (w *world) SetPolicy(containers []netip.Addr, p stack.Policy) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range containers {
		w.policies[a] = p
	}
}

func (w *world) DropPolicy(containers []netip.Addr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range containers {
		delete(w.policies, a)
	}
}

// routed are the addresses that the table leads to ports.
func (w *world) routed() map[netip.Addr]bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	m := make(map[netip.Addr]bool)
	for _, r := range w.table.Routes {
		for p := range w.ports {
			if r.Hop == forwarder.ToPort(p) {
				m[r.Prefix.Addr()] = true
			}
		}
	}
	return m
}

func (w *world) checkOrder(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.trouble {
		t.Error(s)
	}
}

func testConfig(t testing.TB) Config {
	t.Helper()
	dir := t.TempDir()
	return Config{
		StateDir:   filepath.Join(dir, "state"),
		RuntimeDir: filepath.Join(dir, "run"),
		Port:       PortAny,
		Log:        slog.New(slog.DiscardHandler),
	}
}

// readyNode is a node on w that holds a subnet, without anything running but its watchers, which end with the test.
func readyNode(t *testing.T, w *world, c Config, subnet string) *Node {
	t.Helper()
	n, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg, err := lease.ParseConfig(lease.DefaultConfig(netip.MustParsePrefix("10.5.0.0/16")))
	if err != nil {
		t.Fatal(err)
	}
	n.edges = w.edges()
	n.path, n.gateway, n.netConfig, n.mtu = w, w, cfg, 1472
	n.pool.subnet = netip.MustParsePrefix(subnet)
	n.state, n.open = api.StateReady, true
	t.Cleanup(func() { stopNode(n) })
	return n
}

// stopNode ends a node as the end of Run does.
func stopNode(n *Node) {
	select {
	case <-n.stopping:
		return
	default:
	}
	n.unpublish()
	close(n.stopping)
	n.watchers.Wait()
	if w, ok := n.path.(*world); ok {
		w.mu.Lock()
		clear(w.ports) // the router has ended
		w.mu.Unlock()
	}
	n.release()
}

var errKernel = errors.New("the kernel says no")
