// This file is the Node and its life: what Run does, in order, and what it undoes.

package node

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
	"github.com/rootless-ovl/rootless-ovl/internal/tap"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/proxy"
	"github.com/rootless-ovl/rootless-ovl/publish"
	"github.com/rootless-ovl/rootless-ovl/stack"
	"github.com/rootless-ovl/rootless-ovl/stack/dns"
)

const (
	// maxUnderlayMTU is the largest underlay MTU in bytes that is of use: the largest IPv4 packet.
	maxUnderlayMTU = 65535
	// maxMTU is the largest overlay MTU in bytes: the payload of the largest UDP datagram over IPv4.
	maxMTU = maxUnderlayMTU - forwarder.UDPOverhead
)

// Node is one host's daemon. It implements api.Backend; those methods are safe for concurrent use, before, during and
// after Run.
type Node struct {
	// constant after New
	cfg      Config
	log      *slog.Logger
	edges    edges
	loose    looseTimes
	patience time.Duration // how long a start waits for the store before it goes on with what the last run knew

	// constant once open is true, and set before anything that uses it runs
	path     dataPath
	router   *forwarder.Router
	gateway  gateway
	stack    *stack.Gateway
	dialer   inwardDialer
	proxy    *proxy.Proxy
	stopping chan struct{} // closed when Run begins to end
	prober   *prober
	dirty    chan struct{} // has one element when what saveLastLocked writes has changed
	newLease chan struct{} // has one element when a lease was taken that the roamer has not seen
	readied  chan struct{} // closed, by who holds mu, when it was told that the node has a subnet

	// of a handover
	given    *inheritance  // from the daemon that this one replaces; nil: it replaces none
	switched chan struct{} // closed when what was given is this node's alone
	gate     sync.RWMutex  // held for reading by requests that change something, else by a handover
	handed   atomic.Bool   // all of this node is another's
	heir     net.Conn      // to that, until Run ends; set before endRun is called
	endRun   context.CancelFunc
	lock     *os.File
	socket   *api.Listener
	health   *net.TCPListener
	forProxy *net.TCPListener
	besides  map[string]*api.BesideListener // guarded by mu, as is givenBesides

	givenBesides map[string]*net.UnixListener // that nobody listens on yet

	carrying context.Context // of the gateway and the packet path
	quiet    chan struct{}   // closed when both have ended

	stopCarrying context.CancelFunc

	publishing context.Context // done when published ports are to close
	unpublish  context.CancelFunc

	watchers sync.WaitGroup // one goroutine an attachment, see enter, and one a published port

	places  *publish.Places // of connections of all published ports
	portsMu sync.Mutex      // held while published ports are opened or closed; taken before mu

	// guarded by mu
	mu        sync.Mutex
	state     string // of api.State...
	open      bool   // attachments are taken
	id        string
	started   time.Time
	external  external
	port      int              // of the underlay
	vxlan     *forwarder.VXLAN // what is spoken; nil: the udp format
	mtu       int              // of the overlay, bytes
	storeErr  error            // why the store could not be reached while there was no registry
	endpoints []string
	proxyAddr netip.AddrPort
	ownPorts  []ownPort        // that the daemon listens on
	closed    []netip.AddrPort // that no container reaches; never changed in place
	problem   string           // of the external address, for status; empty: there is none
	// outboundProblem is what of the choice of how containers' traffic leaves this host does not have; empty: it has all.
	outboundProblem string
	client          *lease.Client // nil as long as registry is
	registry        *lease.Registry
	netConfig       lease.NetworkConfig
	held            *lease.Held  // nil while no lease is held
	pool            *pool        // pool.subnet is our subnet
	subnet6         netip.Prefix // our IPv6 one; zero unless the network's leases have one
	own             []netip.Addr // the gateway's addresses
	names           *lease.Names // nil as long as the store has not been reached
	known           []lease.Name // everywhere in the overlay, as last seen
	doubts          []string     // what has been told of names that are passed over, sorted
	zone            *dns.Zone    // made of them and of the attachments; nil until there is a gateway
	zoneConfig      dns.ZoneConfig
	leases          []lease.Lease
	vanishing       map[netip.Prefix]time.Time // of leases, by subnet, those that are not in the store any more, until their grace ends
	peers           []peer
	attachments     map[string]*attachment   // by name
	unadopted       []savedAttachment        // of the last run, that adopt has not come to yet
	boot            string                   // of the host: see savedAttachments
	savedAt         time.Time                // when our lease was last known to be held
	heard           map[netip.AddrPort]heard // by underlay address of peers
	savedUp         time.Duration            // the same by edges.sinceBoot; 0: in an earlier run of the host
	configGone      bool                     // netConfig is not the store's any more
	gone            tap.Stats                // of TAPs that are detached
	goneDrops       map[string]uint64
	gonePorts       portTotals // of ports that are unpublished
}

// external is how this host is seen from the others.
type external struct {
	ifName string
	bind   netip.Addr // the interface's address
	public netip.Addr // what peers send to
	mtu    int        // of the interface, bytes

	// The same for IPv6; not valid: the interface has none.
	bind6, public6 netip.Addr
}

// attrs are for the log.
func (e external) attrs() []any {
	attrs := []any{"interface", e.ifName, "addr", e.bind, "public_ip", e.public}
	if e.public6.IsValid() {
		attrs = append(attrs, "addr6", e.bind6, "public_ipv6", e.public6)
	}
	return append(attrs, "mtu", e.mtu)
}

// after is attrs with what was before.
func (e external) after(was external) []any {
	attrs := append(e.attrs(), "before", was.bind)
	if was.ifName != e.ifName {
		attrs = append(attrs, "interface_before", was.ifName)
	}
	if was.bind6 != e.bind6 {
		attrs = append(attrs, "before6", was.bind6)
	}
	return attrs
}

// New checks c and makes a Node. It starts nothing and touches no file.
func New(c Config) (*Node, error) {
	c, err := c.checked()
	if err != nil {
		return nil, err
	}
	n := &Node{
		cfg:         c,
		log:         spare(c.Log),
		edges:       kernelEdges(),
		loose:       usualLooseTimes,
		patience:    usualPatience,
		stopping:    make(chan struct{}),
		state:       api.StateStarting,
		pool:        newPool(),
		places:      publish.NewPlaces(),
		attachments: make(map[string]*attachment),
		goneDrops:   make(map[string]uint64),
		dirty:       make(chan struct{}, 1),
		newLease:    make(chan struct{}, 1),
		readied:     make(chan struct{}),
		switched:    make(chan struct{}),
		besides:     make(map[string]*api.BesideListener),
		quiet:       make(chan struct{}),

		givenBesides: make(map[string]*net.UnixListener),
	}
	n.publishing, n.unpublish = context.WithCancel(context.Background())
	n.prober = newProber(n.log, n.republish)
	n.proxy = n.newProxy()
	if !c.Replace {
		close(n.switched)
	}
	return n, nil
}

// Run is the daemon: it returns nil after ctx is done and everything has been stopped, or the error that stopped it; after ErrConfigChanged a new
// Node of the same Config goes on. It is called once. What stays behind is said in the package's doc.
func (n *Node) Run(ctx context.Context) error {
	asked := ctx // to end
	ctx, n.endRun = context.WithCancel(ctx)
	defer n.endRun()
	if n.cfg.Replace {
		var err error
		if n.given, err = n.claimPlace(ctx); err != nil {
			return err
		}
		defer n.given.close()
		if err := n.takeBesides(); err != nil {
			return err
		}
	}
	lock, err := n.openState()
	if err != nil {
		return err
	}
	defer lock.Close()
	n.lock = lock
	id, err := nodeID(n.cfg.StateDir)
	if err != nil {
		return err
	}
	ln, err := n.listenAPI()
	if err != nil {
		return err
	}
	defer ln.Close()
	n.socket = ln
	health, err := n.listenHealth()
	if err != nil {
		return err
	}
	if health != nil {
		defer health.Close()
	}
	forProxy, err := n.listenProxy()
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.id, n.started = id, time.Now()
	n.mu.Unlock()

	defer func() { // the last of all
		if n.heir != nil {
			n.heir.Close()
		}
	}()
	store := &openedStore{config: n.cfg.Etcd}
	defer store.close()

	g, ctx := errgroup.WithContext(ctx)
	run := func(part string, f func(context.Context) error) {
		g.Go(func() error {
			err := f(ctx)
			if err != nil && ctx.Err() == nil {
				return err
			}
			if ctx.Err() == nil && part != "" && !n.handed.Load() {
				return fmt.Errorf("%s ended", part)
			}
			return nil
		})
	}
	serve := func(part string, f func(context.Context) error) {
		run(part, func(ctx context.Context) error {
			if !n.untilSwitched(ctx) {
				return nil
			}
			return f(ctx)
		})
	}
	serve("the API", func(ctx context.Context) error {
		return api.Serve(ctx, ln, n.handoverOr(ctx, n.onceStarted(api.Handler(n))), n.log)
	})
	if n.cfg.Beside != nil {
		serve("what runs beside the API", func(ctx context.Context) error { return n.cfg.Beside(ctx, n.listenBeside) })
	}
	if health != nil {
		serve("the health checks", func(ctx context.Context) error { return api.Serve(ctx, health, n.healthChecks(), n.log) })
	}
	if forProxy != nil {
		serve("the proxy", func(ctx context.Context) error { return n.proxy.Serve(ctx, forProxy) })
	}
	run("the look at idle memory", n.idleMemory().run)
	run("", func(ctx context.Context) error { return n.bringUp(ctx, store, run) })
	g.Go(func() error {
		<-ctx.Done()
		n.mu.Lock()
		n.state, n.open = api.StateStopping, false
		n.mu.Unlock()
		n.unpublish()
		if asked.Err() != nil {
			n.notify(daemon.SdNotifyStopping)
		}
		return nil
	})
	err = g.Wait()
	close(n.stopping)
	n.watchers.Wait()
	n.release()
	switch {
	case n.handed.Load() && asked.Err() == nil:
		n.log.Info("replaced", "err", err)
		return nil
	case err == nil:
		n.log.Info("stopped")
	}
	return err
}

// bringUp takes the node from nothing to ready. Each step fails cleanly: what is in the store is written last.
func (n *Node) bringUp(ctx context.Context, store *openedStore, run func(string, func(context.Context) error)) error {
	ext, err := n.edges.external(n.cfg, external{})
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.external = ext
	n.mu.Unlock()
	n.log.Info("external interface", ext.attrs()...)
	if err := n.checkOutbound(); err != nil {
		return err
	}
	last := n.lastKnown()
	cfg, router, err := n.resume(last)
	if err != nil {
		return err
	}
	atOnce := router != nil
	if n.given != nil && !atOnce {
		return fmt.Errorf("the daemon that runs has another store or network than this one would have: stop it (`rootless-ovl down`) and start this one without --replace")
	}
	fromLast := atOnce
	if !atOnce {
		if err := n.openStore(ctx, store); err != nil {
			return err
		}
		run("the embedded store", store.wait)
		if cfg, fromLast, router, err = n.prepare(ctx, store, last); err != nil || router == nil {
			return err
		}
	}
	injector := router.NewInjector()
	n.carrying, n.stopCarrying = context.WithCancel(ctx)
	gatewayEnded, gatewayRuns := make(chan struct{}), false
	defer func() {
		if !gatewayRuns {
			close(gatewayEnded)
		}
	}()
	run("the packet path", func(ctx context.Context) error {
		defer close(n.quiet)
		if !n.untilSwitched(ctx) {
			router.Close()
			return nil
		}
		return outlive(n.carrying, gatewayEnded, router.Run)
	})
	run("path MTU discovery", func(ctx context.Context) error {
		if !n.untilSwitched(ctx) {
			return nil
		}
		return n.prober.run(ctx, router)
	})

	n.mu.Lock()
	n.netConfig, n.router, n.path = cfg, router, router
	n.port = int(router.Underlay().Port())
	n.mtu = n.overlayMTUOf(cfg, n.external)
	n.mu.Unlock()
	if !atOnce {
		run("the external address", (&roamer{n: n, store: store}).run)
	}

	var held *lease.Held
	handedOver := false
	defer func() {
		// A subnet that was ours before stays so.
		if !handedOver && held != nil && (n.cfg.Ephemeral || held.Lease().Subnet != last.Subnet) {
			n.giveBack(held)
		}
	}()
	own := subnets{last.Subnet, last.Subnet6}
	var denied []netip.AddrPort
	switch {
	case atOnce:
		n.setLeases(last.restore())
		n.setNames(lease.NamesSnapshot{Names: last.restoreNames()})
		n.log.Info("forwarding on what the last run knew; the store is asked", "subnet", own.v4, "known_at", last.SavedAt)
		denied = append(literal(store, n.cfg.ListenEtcd), last.Closed...)
	case fromLast:
		n.setLeases(last.restore())
		n.log.Warn("the store is away: forwarding on the last known leases", "subnet", own.v4, "known_at", last.SavedAt)
	default:
		if held, err = n.acquire(ctx, store.registry, n.previousSubnets(last)); err != nil || held == nil {
			return err
		}
		own = subnetsOf(held.Lease())
	}
	if !atOnce {
		denied, _ = n.storeAddrs(ctx, store, !fromLast) // it is asked again: closeDoors
	}
	gw, err := n.newGateway(own, router, injector, n.denials(denied))
	if err != nil {
		return err
	}
	gatewayRuns = true
	run("the gateway", func(ctx context.Context) error {
		defer close(gatewayEnded)
		return gw.Run(n.carrying)
	})
	n.mu.Lock()
	n.stack, n.gateway, n.dialer = gw, gw, gw
	n.pool.subnet, n.subnet6 = own.v4, own.v6
	n.mu.Unlock()
	if atOnce {
		if err := n.forwardOn(own); err != nil {
			return err
		}
	}
	if err := n.adopt(); err != nil {
		return err
	}
	if atOnce {
		if n.given != nil {
			n.gate.Lock() // a change would come between
			err := n.takePlace(ctx)
			if err == nil {
				n.settle()
			}
			n.gate.Unlock()
			if err != nil {
				return err
			}
		}
		run("the lease", func(ctx context.Context) error { return n.confirm(ctx, store, own, run) })
	} else {
		if err := n.leased(held, own); err != nil {
			return err
		}
		handedOver = true
		n.tellReady()
		run("the lease", func(ctx context.Context) error { return n.follow(ctx, store, held) })
	}
	run("", n.saveWhenDirty)
	run("", n.watchClock)
	run("", n.endStale)
	return nil
}

// outlive runs something until ctx ends and then until other is closed: the packet path carries the last words of the gateway, which are
// the resets of its connections.
func outlive(ctx context.Context, other <-chan struct{}, f func(context.Context) error) error {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		<-other
		cancel()
	})
	defer stop()
	return f(longer)
}

// prepare finds the network config, and everything that can fail on this host before others are told of it: the underlay's
// port and the subnet file. A config that is not there yet is created when all that is known to be good. With ctx it
// returns no router and no error. fromLast is as of networkConfig.
func (n *Node) prepare(ctx context.Context, store *openedStore, last savedLast) (cfg lease.NetworkConfig, fromLast bool, router *forwarder.Router, err error) {
	if err := checkSubnetFile(n.cfg.SubnetFile); err != nil {
		return cfg, false, nil, err
	}
	for ctx.Err() == nil {
		var from configSource
		if cfg, from, err = n.networkConfig(ctx, store, last); err != nil || ctx.Err() != nil {
			return cfg, false, nil, err
		}
		ext := n.stillExternal()
		if err := n.checkNetwork(cfg, ext); err != nil {
			return cfg, false, nil, err
		}
		if router, err = n.openRouter(cfg, ext, last); err != nil {
			return cfg, false, nil, err
		}
		if from != wanted {
			return cfg, from == remembered, router, nil
		}
		created, err := n.createConfig(ctx, store.registry, cfg)
		if created {
			return cfg, false, router, nil
		}
		router.Close()
		if err != nil {
			return cfg, false, nil, err
		}
		// Another node was faster, and its config may say something else.
	}
	return cfg, false, nil, nil
}

// stillExternal is the external interface as it is now: the store may have been long in answering, and nothing is bound yet.
func (n *Node) stillExternal() external {
	n.mu.Lock()
	was := n.external
	n.mu.Unlock()
	ext, err := n.edges.external(n.cfg, was)
	if err != nil || ext == was {
		return was
	}
	n.log.Info("the external address has changed", ext.after(was)...)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.external = ext
	return ext
}

// openRouter binds the underlay's port before anything tells others of it, and decides what is spoken there.
func (n *Node) openRouter(cfg lease.NetworkConfig, ext external, last savedLast) (*forwarder.Router, error) {
	vxlan, err := n.vxlanOf(cfg)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.vxlan = vxlan
	n.mu.Unlock()
	port, bind := n.cfg.Port, ext.bind
	var bind6 netip.Addr
	if carriesIPv6(cfg) {
		bind6 = ext.bind6
	}
	switch {
	case allocates(cfg):
		port, bind, bind6 = max(port, PortAny), allocUnderlay, netip.Addr{}
	case port == PortFromConfig:
		stock, err := cfg.StockPort()
		if err != nil {
			return nil, err
		}
		port = stock
	}
	if port == PortAny && last.Port != 0 { // peers and firewalls know it; if it is taken now, any other does
		if r, err := openUnderlay(n.log, netip.AddrPortFrom(bind, uint16(last.Port)), bind6, vxlan, n.givenSockets()); err == nil {
			return r, nil
		}
	}
	return openUnderlay(n.log, netip.AddrPortFrom(bind, uint16(port)), bind6, vxlan, n.givenSockets())
}

// overhead is the bytes of an underlay packet that are not overlay. What travels over IPv6 has the larger one, and a container's
// interface has one MTU for both families.
func overhead(cfg lease.NetworkConfig) int {
	switch {
	case cfg.BackendType == backendAlloc:
		return 0 // nothing is encapsulated
	case cfg.BackendType == backendVXLAN && cfg.EnableIPv6:
		return forwarder.VXLANOverhead6
	case cfg.BackendType == backendVXLAN:
		return forwarder.VXLANOverhead
	}
	return forwarder.UDPOverhead
}

// overlayMTUOf is the MTU in bytes of containers' interfaces.
func (n *Node) overlayMTUOf(cfg lease.NetworkConfig, ext external) int {
	return min(n.underlayMTU(cfg, ext)-overhead(cfg), maxMTU)
}

// newGateway makes the stack behind the gateway address.
func (n *Node) newGateway(own subnets, router *forwarder.Router, injector *forwarder.Injector, denied []netip.AddrPort) (*stack.Gateway, error) {
	out, err := n.cfg.outbound()
	if err != nil {
		return nil, err
	}
	gw, err := stack.New(stack.Config{
		Addresses:     gatewayAddrs(n.carried(own), nil),
		SubnetLen:     max(own.v4.Bits(), 0),
		IPv6SubnetLen: max(own.v6.Bits(), 0),
		MTU:           n.overlayMTU(),
		Exit:          func(pkts []*packet.Packet) { injector.Forward(pkts) },
		Attend:        router.Attend,
		Log:           n.log,
		HostLoopback:  n.cfg.HostLoopback,
		LinkLocal:     n.cfg.LinkLocal,
		Outbound:      out,
	})
	if err != nil {
		return nil, err
	}
	gw.Deny(denied)
	return gw, nil
}

func (n *Node) overlayMTU() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mtu
}

// republish puts another path MTU into the route table.
func (n *Node) republish() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.publishLocked(); err != nil {
		n.log.Error("route table not replaced", "err", err)
	}
}

// publishLocked replaces the router's table by one made of what is known now.
func (n *Node) publishLocked() error {
	src := routeSources{me: n.selfLocked(), peers: n.peers, gateway: n.gateway}
	n.prober.follow(pathTargets(n.peers, src.me.subnets()))
	for _, a := range n.attachments {
		if a.phase == live {
			src.attachments = append(src.attachments, attachedPort{a.saved.Addr, src.me.routed6(&a.saved), a.port, a.saved.Gateway})
		}
	}
	slices.SortFunc(src.attachments, func(a, b attachedPort) int { return a.addr.Addr().Compare(b.addr.Addr()) })
	if own := gatewayAddrs(src.me.subnets(), src.attachments); !slices.Equal(own, n.own) {
		if err := n.gateway.SetAddresses(own); err != nil {
			return err
		}
		n.own = own
	}
	for i := range n.peers {
		p := &n.peers[i]
		p.pathMTU = n.prober.mtu(p.addr, p.mtu)
		p.v6.pathMTU = n.prober.mtu(p.v6.addr, p.mtu)
	}
	n.renameLocked()
	return n.path.SetTable(routes(src))
}

func (n *Node) selfLocked() self {
	stock, err := n.netConfig.StockPort()
	if err != nil {
		stock = lease.DefaultUDPPort // openRouter has refused such a config
	}
	me := self{
		nodeID:    n.id,
		subnet:    n.pool.subnet,
		network:   n.netConfig.Network,
		public:    netip.AddrPortFrom(n.external.public, uint16(n.port)),
		mtu:       n.mtu,
		vxlan:     n.vxlan,
		stockPort: stock,
		alloc:     allocates(n.netConfig),
		subnetLen: n.netConfig.SubnetLen,
	}
	if carriesIPv6(n.netConfig) {
		me.subnet6, me.network6, me.subnetLen6 = n.subnet6, n.netConfig.IPv6Network, n.netConfig.IPv6SubnetLen
		me.public6 = netip.AddrPortFrom(n.external.public6, uint16(n.port))
	}
	return me
}

func (n *Node) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn("systemd not told, and may think that the service has not started", "state", state, "err", err)
	}
}
