// This file is where the node meets the rooms that need a kernel or a store: small interfaces, so that tests can stand in
// for them, and the real things behind them.

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/hostnet"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
	"github.com/rootless-ovl/rootless-ovl/internal/tap"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
	"github.com/rootless-ovl/rootless-ovl/stack"
	"github.com/rootless-ovl/rootless-ovl/stack/dns"
)

// dataPath is what the node does with a forwarder.Router.
type dataPath interface {
	AddPort(forwarder.PortConfig) (*forwarder.Port, error)
	RemovePort(*forwarder.Port)
	SetTable(forwarder.TableConfig) error
	Rebind(addr, addr6 netip.Addr) error
}

// gateway is what the node does with a stack.Gateway while it runs.
type gateway interface {
	packet.Sender
	SetAddresses([]netip.Addr) error
	Release(containers netip.Prefix)
	SetNames(*dns.Zone)
	CarryTCP(ctx context.Context, host *net.TCPConn, from, to netip.AddrPort) error
	OpenUDP(from, to netip.AddrPort, reply func(b []byte)) (*stack.InwardUDP, error)
	SetPolicy(containers []netip.Addr, p stack.Policy)
	DropPolicy(containers []netip.Addr)
}

// namespace is a container's network namespace.
type namespace interface {
	Inode() uint64
	again() (namespace, error) // the same, to be closed apart
	create(c nsutil.TAPConfig, s savedAttachment) (link, error)
	adopt(s savedAttachment) (link, error)
	inTheWay(c nsutil.TAPConfig) ([]nsutil.Device, error)
	change(c nsutil.TAPConfig) error // of a TAP that is there
	bridges() ([]nsutil.Bridge, error)
	taps() ([]nsutil.Device, error)
	remove(ifName string) error // a TAP that nobody holds
	allow(nsutil.Transit) error // through its firewall
	forbid(ifName string) error // what allow has let through
	connections(most int, wanted func(nsutil.TCPConnection) bool) ([]nsutil.TCPConnection, error)
	sockets(s savedAttachment) (kernelSockets, error) // which own the namespace from then on
	Close() error
}

// link is a TAP that we hold, as the router's device.
type link interface {
	forwarder.Device
	counted
	place() (nsutil.Place, error)      // where it is; nsutil.ErrNoTAP: nowhere any more
	openNamespace() (namespace, error) // in which it is
	duplicate() (fd int, uso bool, err error)
	Close() error  // lets it go; it stays in its namespace
	Delete() error // removes it from its namespace
}

// edges are the calls that reach into the kernel.
type edges struct {
	openPID   func(pid int) (namespace, error)
	openPath  func(path string) (namespace, error)
	caller    func(ctx context.Context) (pid int, err error)           // whose request it is
	lives     func(ctx context.Context) error                          // whether caller's pid is that process still
	inodeAt   func(path string) (uint64, error)                        // of a namespace
	findInode func(inode uint64, last string) (path string, err error) // of a namespace that somebody is in, nsutil.ErrGone: of none
	bootID    func() (string, error)                                   // another after every start of the host
	sinceBoot func() time.Duration                                     // since that start, also while the host was suspended
	// namespaceOf opens the namespace in which the TAP of that descriptor is, nsutil.ErrNoTAP: it is gone.
	namespaceOf func(fd int) (namespace, error)
	givenTAP    func(fd int, uso bool, s savedAttachment) (link, error)
	netnses     func() (map[uint64]int, error) // of processes that we see: by inode, one process of each
	startTime   func(pid int) (uint64, error)
	detached    func(pid int) string // path of the namespace that RootlessKit keeps apart from that process, or ""
	watchPID    func(pid int) (exitWatch, error)

	external  func(c Config, now external) (external, error) // of this host; what is now in use stays if it can
	hasAddr   func(a netip.Addr) (bool, error)               // tells whether it is this host's
	outside6  func(ifName string) bool                       // tells whether it has an IPv6 way out, by that interface if one is named
	hasIface  func(name string) (bool, error)
	watchHost func(ctx context.Context, c Config, changed func()) error // calls changed at first, and when external may answer differently
	overlaps  func(overlay netip.Prefix) ([]hostnet.Overlap, error)     // of this host with the overlay
}

// findAge is how old what is known of the machine's namespaces may be. However many attachments are watched by their numbers alone, or are taken up
// at a start, the processes are looked through once in that time.
const findAge = time.Second

func kernelEdges() edges {
	finder := nsutil.NewFinder(findAge)
	return edges{
		openPID:     func(pid int) (namespace, error) { return asNamespace(nsutil.OpenPID(pid)) },
		openPath:    func(path string) (namespace, error) { return asNamespace(nsutil.OpenPath(path)) },
		caller:      api.CallerPID,
		lives:       api.CallerLives,
		inodeAt:     nsutil.InodeAt,
		findInode:   finder.Find,
		bootID:      nsutil.BootID,
		namespaceOf: func(fd int) (namespace, error) { return asNamespace(nsutil.NamespaceOf(fd)) },
		givenTAP:    givenTAPLink,
		sinceBoot:   sinceBoot,
		netnses:     finder.Processes,
		startTime:   nsutil.StartTime,
		detached:    nsutil.DetachedNetns,
		watchPID: func(pid int) (exitWatch, error) {
			e, err := nsutil.WatchExit(pid)
			if err != nil {
				return nil, err
			}
			return e, nil
		},
		external:  hostExternal,
		hasAddr:   hostnet.Has,
		outside6:  hostnet.Outside6,
		hasIface:  hostnet.HasInterface,
		watchHost: watchHost,
		overlaps:  hostnet.Overlaps,
	}
}

// choiceOf are the flags of the choice of the external interface.
func choiceOf(c Config) (hostnet.Options, error) {
	o := hostnet.Options{Iface: c.Iface, IfaceRegex: c.IfaceRegex, PublicIP: c.PublicIP, PublicIPv6: c.PublicIPv6}
	if c.IfaceCanReach != "" {
		a, err := netip.ParseAddr(c.IfaceCanReach)
		if err != nil {
			return o, fmt.Errorf("--iface-can-reach %s: an address is needed: %w", c.IfaceCanReach, err)
		}
		o.CanReach = a
	}
	return o, nil
}

func watchHost(ctx context.Context, c Config, changed func()) error {
	o, err := choiceOf(c)
	if err != nil {
		return err
	}
	return hostnet.Watch(ctx, o, changed)
}

func hostExternal(c Config, now external) (external, error) {
	o, err := choiceOf(c)
	if err != nil {
		return external{}, err
	}
	o.InUse = []netip.Addr{now.bind, now.bind6}
	e, err := hostnet.ExternalInterface(o)
	return external{ifName: e.Name, bind: e.Addr, public: e.PublicIP, bind6: e.Addr6, public6: e.PublicIPv6, mtu: e.MTU}, err
}

type kernelNamespace struct{ *nsutil.Namespace }

func asNamespace(ns *nsutil.Namespace, err error) (namespace, error) {
	if err != nil {
		return nil, err
	}
	return kernelNamespace{ns}, nil
}

func (ns kernelNamespace) again() (namespace, error) { return asNamespace(ns.Dup()) }

func (ns kernelNamespace) create(c nsutil.TAPConfig, s savedAttachment) (link, error) {
	t, err := ns.CreateTAP(c)
	if err != nil {
		return nil, err
	}
	l, err := newTAPLink(t, s)
	if err != nil {
		return nil, errors.Join(err, t.Delete())
	}
	return l, nil
}

func (ns kernelNamespace) adopt(s savedAttachment) (link, error) {
	t, err := ns.AdoptTAP(s.IfName, 1)
	if err != nil {
		return nil, err
	}
	l, err := newTAPLink(t, s)
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return l, nil
}

func (ns kernelNamespace) inTheWay(c nsutil.TAPConfig) ([]nsutil.Device, error) {
	return ns.TAPsInTheWay(c)
}

func (ns kernelNamespace) change(c nsutil.TAPConfig) error { return ns.ChangeTAP(c) }

func (ns kernelNamespace) bridges() ([]nsutil.Bridge, error) { return ns.Bridges() }

func (ns kernelNamespace) taps() ([]nsutil.Device, error) { return ns.TAPs() }

func (ns kernelNamespace) remove(ifName string) error {
	t, err := ns.AdoptTAP(ifName, 1)
	if err != nil {
		return err
	}
	return t.Delete()
}

func (ns kernelNamespace) allow(t nsutil.Transit) error { return ns.AllowTransit(t) }

func (ns kernelNamespace) forbid(ifName string) error { return ns.ForbidTransit(ifName) }

func (ns kernelNamespace) connections(most int, wanted func(nsutil.TCPConnection) bool) ([]nsutil.TCPConnection, error) {
	return ns.TCPConnections(most, wanted)
}

func (ns kernelNamespace) sockets(s savedAttachment) (kernelSockets, error) {
	in, err := ns.OpenInside(nsutil.InsideConfig{IfName: s.IfName, Addrs: s.addrs()})
	if err != nil {
		return nil, err
	}
	return namespaceSockets{in, ns.Namespace}, nil
}

// namespaceSockets are what kernelNamespace makes sockets with.
type namespaceSockets struct {
	*nsutil.Inside
	ns *nsutil.Namespace
}

func (s namespaceSockets) Close() error { return errors.Join(s.Inside.Close(), s.ns.Close()) }

// tapLink is a link whose other end is in a container.
type tapLink struct {
	*tap.Device

	mu     sync.Mutex // held while the descriptor is used for anything but packets
	closed bool
}

// givenTAPLink is a link of a TAP that another daemon holds, with a descriptor of its own.
func givenTAPLink(fd int, uso bool, s savedAttachment) (link, error) {
	mac, err := api.ParseMAC(s.MAC)
	if err != nil {
		return nil, err
	}
	d, err := tap.NewGiven(fd, uso, tap.Config{MAC: mac, Addrs: s.addrs()})
	if err != nil {
		return nil, err
	}
	return &tapLink{Device: d}, nil
}

func newTAPLink(t *nsutil.TAP, s savedAttachment) (link, error) {
	mac, err := api.ParseMAC(s.MAC)
	if err != nil {
		return nil, err
	}
	d, err := tap.New(tap.Config{File: t.Files[0], MAC: mac, Addrs: s.addrs()})
	if err != nil {
		return nil, err
	}
	return &tapLink{Device: d}, nil
}

var errLinkClosed = errors.New("the TAP is no longer held")

func (l *tapLink) place() (nsutil.Place, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nsutil.Place{}, errLinkClosed
	}
	return nsutil.PlaceOf(l.FD())
}

func (l *tapLink) duplicate() (fd int, uso bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return -1, false, errLinkClosed
	}
	fd, err = unix.FcntlInt(uintptr(l.FD()), unix.F_DUPFD_CLOEXEC, 0)
	return fd, l.USO(), err
}

func (l *tapLink) openNamespace() (namespace, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errLinkClosed
	}
	return asNamespace(nsutil.NamespaceOf(l.FD()))
}

func (l *tapLink) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	return l.Device.Close()
}

// Delete makes the TAP end with its descriptor, which is then closed.
func (l *tapLink) Delete() error {
	l.mu.Lock()
	err := unix.IoctlSetInt(l.FD(), unix.TUNSETPERSIST, 0)
	if errors.Is(err, unix.EBADFD) { // the namespace took it along
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("TUNSETPERSIST: %w", err)
	}
	l.mu.Unlock()
	return errors.Join(err, l.Close())
}

// openUnderlay binds the underlay sockets.
func openUnderlay(log *slog.Logger, addr netip.AddrPort, addr6 netip.Addr, vxlan *forwarder.VXLAN, given []forwarder.GivenSockets) (*forwarder.Router, error) {
	return forwarder.NewRouter(forwarder.Config{Log: log, Underlay: forwarder.UnderlayConfig{Addr: addr, Addr6: addr6, VXLAN: vxlan, Given: given}})
}

var (
	_ dataPath = (*forwarder.Router)(nil)
	_ gateway  = (*stack.Gateway)(nil)
)
