// This file is the node's side of the store: opening it, reading or creating the network config, taking a lease and
// keeping it, following the peers. While the store is away every one of these waits; nothing is torn down.

package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/embedded"
)

const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 5 * time.Second
	// usualPatience is Node.patience.
	usualPatience = time.Second
	// revokeTimeout bounds giving back the lease of an ephemeral node.
	revokeTimeout = 3 * time.Second
)

// openedStore is the way to the store, and the embedded server where there is one.
type openedStore struct {
	config   lease.ClientConfig
	server   *embedded.Server // nil with endpoints of others
	client   *lease.Client    // nil until the first dial succeeds
	registry *lease.Registry
	doors    storeDoors
}

// openStore starts the embedded store, unless there are endpoints to go to.
func (n *Node) openStore(ctx context.Context, s *openedStore) error {
	shown := s.config.Endpoints
	if len(s.config.Endpoints) == 0 {
		server, err := embedded.Start(ctx, embedded.Config{
			DataDir:      filepath.Join(n.cfg.StateDir, etcdDir),
			ListenClient: "http://" + n.cfg.ListenEtcd,
			Log:          n.log,
		})
		if err != nil {
			return err
		}
		s.server = server
		n.mu.Lock()
		bind := n.external.bind
		n.mu.Unlock()
		own, others, open := endpointsOf(server.Endpoint(), bind)
		s.config.Endpoints, shown = []string{own}, []string{others}
		n.log.Info("embedded store", "endpoint", others)
		for _, at := range (&storeDoors{ours: server.Doors()}).addrs(ctx) {
			n.listensOn(at, "the embedded store (--listen-etcd)")
		}
		if open {
			n.log.Warn("the embedded store has no password: whoever reaches it can change the overlay; a firewall should let in the nodes only", "listen", n.cfg.ListenEtcd)
		}
	}
	n.mu.Lock()
	n.endpoints = shown
	n.mu.Unlock()
	return nil
}

// endpointsOf are the URLs by which this node and others use an embedded store that listens at url: where it listens on all
// addresses, that of loopback and that of our external interface. open tells that others can reach it.
func endpointsOf(listen string, bind netip.Addr) (own, others string, open bool) {
	u, err := url.Parse(listen)
	if err != nil {
		return listen, listen, false
	}
	at, err := netip.ParseAddrPort(u.Host)
	switch {
	case err != nil || at.Addr().IsLoopback():
		return listen, listen, false
	case !at.Addr().IsUnspecified():
		return listen, listen, true
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	with := func(a netip.Addr) string { return u.Scheme + "://" + netip.AddrPortFrom(a, at.Port()).String() }
	return with(loopback), with(bind), true
}

// connectStore makes the client, if there is none yet.
func (n *Node) connectStore(ctx context.Context, s *openedStore) error {
	if s.registry != nil {
		return nil
	}
	client, err := lease.Dial(ctx, s.config)
	if err != nil {
		return err
	}
	s.client = client
	s.registry = lease.NewRegistry(client, n.cfg.EtcdPrefix, n.log)
	n.mu.Lock()
	n.client, n.registry = s.client, s.registry
	n.mu.Unlock()
	return nil
}

// untilConnected makes the client however long it takes; false means that ctx has ended.
func (n *Node) untilConnected(ctx context.Context, s *openedStore) bool {
	var pause retry
	for {
		err := n.connectStore(ctx, s)
		switch {
		case err == nil:
			return true
		case ctx.Err() != nil:
			return false
		case pause.next == 0:
			n.log.Warn("the store is away; trying again", "store", s.config.Endpoints, "err", err)
		}
		n.mu.Lock()
		n.storeErr = err
		n.mu.Unlock()
		pause.wait(ctx, maxBackoff)
	}
}

// wait returns when the embedded store fails, or with ctx.
func (s *openedStore) wait(ctx context.Context) error {
	if s.server == nil {
		<-ctx.Done()
		return nil
	}
	select {
	case err := <-s.server.Err():
		return err
	case <-ctx.Done():
		return nil
	}
}

func (s *openedStore) close() {
	if s.client != nil {
		_ = s.client.Close() // its requests are over; nothing is left to report
	}
	if s.server != nil {
		s.server.Close()
	}
}

// retry is a pause that doubles from firstBackoff to a bound.
type retry struct{ next time.Duration }

// wait pauses, or returns with ctx.
func (r *retry) wait(ctx context.Context, bound time.Duration) {
	r.next = min(max(firstBackoff, 2*r.next), bound)
	t := time.NewTimer(r.next)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// configSource is where a network config comes from.
type configSource int

const (
	stored     configSource = iota // it is in the store
	wanted                         // the store has none; it is what we would create
	remembered                     // the store is away; the last run read it
)

// networkConfig reads the network config from the store; where there is none, it is the one to create. While the store is
// away it waits; if the last run knew enough to forward and still holds its lease, that is used after a while. With ctx it
// returns early, without an error.
func (n *Node) networkConfig(ctx context.Context, s *openedStore, last savedLast) (cfg lease.NetworkConfig, from configSource, err error) {
	var pause retry
	started := time.Now()
	said := false
	for ctx.Err() == nil {
		if err = n.connectStore(ctx, s); err == nil {
			cfg, err = s.registry.Config(ctx)
		}
		switch {
		case err == nil:
			n.setState(api.StateStarting)
			return cfg, stored, nil
		case errors.Is(err, lease.ErrNoConfig):
			n.setState(api.StateStarting)
			if cfg, err = n.cfg.newNetwork(last); err == nil && !n.cfg.NetworkSet && string(cfg.Raw) == last.Config {
				n.log.Warn("the store has no network config: it gets that of this node's last run", "network", cfg.Network, "key", lease.ConfigKey(n.cfg.EtcdPrefix))
			}
			return cfg, wanted, err
		}
		lastCfg, usable := last.usable(n.cfg, time.Now())
		switch {
		case ctx.Err() != nil:
			return cfg, stored, nil
		case !isAway(err), !usable && !errors.Is(err, lease.ErrUnreachable):
			return cfg, stored, withRemedy(err) // waiting does not mend it
		case usable && s.server == nil && time.Since(started) >= n.patience:
			return lastCfg, remembered, nil
		}
		n.storeAway(err)
		if !said && s.registry == nil { // a registry says it by itself
			n.log.Warn("the store is away; trying again", "store", s.config.Endpoints, "err", err)
			said = true
		}
		pause.wait(ctx, maxBackoff)
	}
	return cfg, stored, nil
}

// isAway tells whether an error is about reaching the store, and not about what is in it.
func isAway(err error) bool {
	return errors.Is(err, lease.ErrUnreachable) || errors.Is(err, lease.ErrTLS) || errors.Is(err, lease.ErrAuth)
}

// withRemedy says what to do about a store that does not let us in.
func withRemedy(err error) error {
	says := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(err.Error(), w) })
	}
	switch {
	case errors.Is(err, lease.ErrAuth):
		return fmt.Errorf("%w: give a user that may read and write the keys of the network, with --etcd-username and --etcd-password", err)
	case !errors.Is(err, lease.ErrTLS):
		return err
	case says("remote error: "): // the store does not like ours
		return fmt.Errorf("%w: give a certificate that the store accepts, with --etcd-certfile and --etcd-keyfile", err)
	case says("unknown authority"):
		return fmt.Errorf("%w: give the certificate of the authority that signed the store's, with --etcd-cafile", err)
	}
	return fmt.Errorf("%w: check the names in the store's certificate, this host's clock and --etcd-cafile", err)
}

// createConfig puts cfg into a store that has none; it waits while the store is away. created is false if there is one by
// now, or with ctx.
func (n *Node) createConfig(ctx context.Context, r *lease.Registry, cfg lease.NetworkConfig) (created bool, err error) {
	var pause retry
	for ctx.Err() == nil {
		created, err = r.CreateConfig(ctx, cfg.Raw)
		switch {
		case created:
			n.tellCreated(cfg)
			return true, nil
		case err == nil || ctx.Err() != nil:
			return false, nil
		case !errors.Is(err, lease.ErrUnreachable):
			return false, withRemedy(err)
		}
		n.storeAway(err)
		pause.wait(ctx, maxBackoff)
	}
	return false, nil
}

// tellCreated says that there is a new network now. One that nobody asked for by name, in a store of others, may well be
// another than the one that was to be joined.
func (n *Node) tellCreated(cfg lease.NetworkConfig) {
	key := lease.ConfigKey(n.cfg.EtcdPrefix)
	if len(n.cfg.Etcd.Endpoints) == 0 || n.cfg.NetworkSet || n.cfg.NetConfig != nil {
		n.log.Info("network config created", "network", cfg.Network, "key", key)
		return
	}
	n.log.Warn("the store had no network config at this key, so a new network was made: if this node was to join one that is there, stop it, check --etcd-prefix and delete the keys that it made; if a new network was meant, say so with --network",
		"key", key, "network", cfg.Network, "store", strings.Join(n.cfg.Etcd.Endpoints, ","))
}

// checkNetwork says whether the network that the store describes can be joined.
func (n *Node) checkNetwork(cfg lease.NetworkConfig, ext external) error {
	if err := CheckConfig(cfg); err != nil {
		return fmt.Errorf("key %s of the store: %w (`rootless-ovl config set` replaces it)", lease.ConfigKey(n.cfg.EtcdPrefix), err)
	}
	if n.cfg.NetworkSet && cfg.Network != n.cfg.Network {
		return fmt.Errorf("--network is %v, but the network at %s is %v: leave --network out to join it, or replace it with `rootless-ovl config set` and start all its nodes again, or use another --etcd-prefix",
			n.cfg.Network, n.cfg.EtcdPrefix, cfg.Network)
	}
	if n.cfg.NetConfig != nil && !sameJSON(n.cfg.NetConfig, cfg.Raw) {
		n.log.Warn("the store has a network config of its own, so that of --net-config-path is not used", "prefix", n.cfg.EtcdPrefix)
	}
	if allocates(cfg) {
		n.log.Info("the network's backend is alloc: a subnet is leased, and nothing is sent to other nodes")
	}
	if cfg.EnableIPv6 && !carriesIPv6(cfg) {
		n.log.Warn("the network config enables IPv6, which the udp format does not carry: containers reach each other over IPv4 only")
	}
	if err := checkDualStack(cfg, ext, n.overlayMTUOf(cfg, ext)); err != nil {
		return err
	}
	if err := n.checkOverlap(cfg.Network); err != nil || !carriesIPv6(cfg) {
		return err
	}
	return n.checkOverlap(cfg.IPv6Network)
}

// checkOverlap refuses a network that holds addresses which this host reaches elsewhere: containers could not.
func (n *Node) checkOverlap(network netip.Prefix) error {
	found, err := n.edges.overlaps(network)
	if err != nil || len(found) == 0 {
		return err
	}
	var texts []string
	for _, o := range found {
		texts = append(texts, o.String())
	}
	what := strings.Join(texts, ", ")
	if n.cfg.AllowOverlap {
		n.log.Warn("the overlay network hides addresses of this host's surroundings from containers", "network", network, "hidden", what)
		return nil
	}
	return fmt.Errorf("network %v overlaps this host's %s, which containers could then not reach: choose another (--network for a new one, `rootless-ovl config set` for one that is in the store), or accept it with --allow-overlap", network, what)
}

// previousSubnets are what we would like to have again.
func (n *Node) previousSubnets(last savedLast) subnets {
	if last.Subnet.IsValid() {
		return subnets{last.Subnet, last.Subnet6}
	}
	env, err := lease.ReadSubnetEnv(n.cfg.SubnetFile)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			n.log.Warn("previous subnet not read", "err", err)
		}
		return subnets{}
	}
	return subnets{env.Subnet, env.IPv6Subnet}
}

// request is what we ask the store for.
func (n *Node) request(previous subnets) lease.Request {
	n.mu.Lock()
	defer n.mu.Unlock()
	me := n.selfLocked()
	caps := []string{lease.CapPartialChecksums}
	if n.router != nil && n.router.Steers() {
		caps = append(caps, lease.CapSteers)
	}
	attrs := lease.Attrs{
		PublicIP:    n.external.public,
		RootlessOvl: &lease.Extension{V: lease.ExtensionVersion, NodeID: n.id, Port: n.port, MTU: n.mtu, Caps: caps},
	}
	if carriesIPv6(n.netConfig) {
		attrs.PublicIPv6 = n.external.public6
	}
	publishVXLAN(&attrs, n.vxlan, n.netConfig.EnableIPv6)
	return lease.Request{
		NodeID:      n.id,
		Attrs:       attrs,
		Previous:    previous.v4,
		Previous6:   previous.v6,
		TTL:         n.cfg.LeaseTTL,
		Ephemeral:   n.cfg.Ephemeral,
		RenewMargin: n.cfg.RenewMargin,
		StockPort:   me.stockPort,
	}
}

// acquire gets the lease at start: it waits for the store, and fails on everything that waiting does not mend. With ctx
// it returns nil, nil.
func (n *Node) acquire(ctx context.Context, r *lease.Registry, previous subnets) (*lease.Held, error) {
	var pause retry
	for ctx.Err() == nil {
		held, err := r.Acquire(ctx, n.netConfig, n.request(previous))
		switch {
		case err == nil:
			return held, nil
		case errors.Is(err, lease.ErrUnreachable):
			n.storeAway(err)
		case !errors.Is(err, lease.ErrContended) && ctx.Err() == nil:
			return nil, withRemedy(err)
		}
		pause.wait(ctx, maxBackoff)
	}
	return nil, nil
}

// acquireAgain gets a lease for a node that is running: it never gives up, because forwarding goes on without.
func (n *Node) acquireAgain(ctx context.Context, r *lease.Registry) *lease.Held {
	var pause retry
	said := ""
	for ctx.Err() == nil {
		n.mu.Lock()
		cfg, previous := n.netConfig, subnets{n.pool.subnet, n.subnet6}
		n.mu.Unlock()
		held, err := r.Acquire(ctx, cfg, n.request(previous))
		if err == nil {
			return held
		}
		if text := err.Error(); text != said && !errors.Is(err, lease.ErrUnreachable) && ctx.Err() == nil {
			n.log.Error("no lease; forwarding on what is known, and trying again", "err", err)
			said = text
		}
		pause.wait(ctx, 2*maxBackoff)
	}
	return nil
}

// follow is the node's life with the store: it holds the lease and watches the peers.
func (n *Node) follow(ctx context.Context, s *openedStore, held *lease.Held) error {
	if !n.untilConnected(ctx, s) {
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.hold(ctx, s.registry, held) })
	g.Go(func() error { return n.watchLeases(ctx, s.registry) })
	g.Go(func() error { return n.followNames(ctx, s.registry) })
	g.Go(func() error { return n.closeDoors(ctx, s) })
	g.Go(func() error { return n.keepConfig(ctx, s.registry) })
	return g.Wait()
}

// hold keeps the lease for as long as the node runs; held is nil where the node started without the store.
func (n *Node) hold(ctx context.Context, r *lease.Registry, held *lease.Held) error {
	if held == nil {
		if err := n.configStands(ctx, r); err != nil {
			return err
		}
	}
	for ctx.Err() == nil {
		if held == nil {
			if held = n.acquireAgain(ctx, r); held == nil {
				break
			}
			if err := n.leased(held, subnetsOf(held.Lease())); err != nil {
				return err
			}
			n.tellReady()
		}
		err := held.Run(ctx)
		if err == nil {
			break
		}
		held = nil
		if errors.Is(err, lease.ErrDuplicateNode) {
			return err
		}
		n.log.Warn("lease lost; forwarding goes on while another is acquired", "err", err)
		n.mu.Lock()
		n.held, n.state = nil, api.StateLeaseLost
		n.mu.Unlock()
	}
	if held != nil && n.cfg.Ephemeral && !n.handed.Load() { // others keep theirs
		n.giveBack(held)
	}
	return nil
}

// giveBack revokes a lease, and removes the subnet file that tells of it.
func (n *Node) giveBack(held *lease.Held) {
	if err := removeSubnetFile(n.cfg.SubnetFile, held.Lease().Subnet); err != nil {
		n.log.Warn("subnet file not removed, though its subnet is given back", "err", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), revokeTimeout)
	defer cancel()
	if err := held.Revoke(ctx); err != nil {
		n.log.Warn("lease not given back; it ends by itself", "ttl", n.cfg.LeaseTTL, "err", err)
	}
}

// configStands waits for the store and makes sure that the network config is still the one of the last run. A store that
// came back empty gets it again.
func (n *Node) configStands(ctx context.Context, r *lease.Registry) error {
	var pause retry
	n.mu.Lock()
	raw := n.netConfig.Raw
	n.mu.Unlock()
	for ctx.Err() == nil {
		now, err := r.Config(ctx)
		switch {
		case err == nil && bytes.Equal(now.Raw, raw):
			return nil
		case err == nil:
			n.forgetConfig()
			return fmt.Errorf("%w: start again to follow it", ErrConfigChanged)
		case errors.Is(err, lease.ErrBadConfig):
			return err
		case errors.Is(err, lease.ErrNoConfig):
			var created bool
			if created, err = r.CreateConfig(ctx, raw); created {
				n.log.Warn("the store had lost the network config; put back that of the last run", "key", lease.ConfigKey(n.cfg.EtcdPrefix))
				return nil
			}
			if err == nil {
				continue // another node was faster
			}
		}
		pause.wait(ctx, maxBackoff)
	}
	return nil
}

// keepConfig keeps the network config in the store: one that was made anew has none, and a node that starts there without one
// would begin another network. It tells of one that differs from ours, which a running node does not follow.
func (n *Node) keepConfig(ctx context.Context, r *lease.Registry) error {
	n.mu.Lock()
	ours := n.netConfig.Raw
	n.mu.Unlock()
	told := ours
	return r.KeepConfig(ctx, ours, func(now []byte) {
		if sameJSON(now, told) {
			return
		}
		told = now
		switch _, err := lease.ParseConfig(now); {
		case sameJSON(now, ours):
			n.log.Info("the network config in the store is that of this node again")
		case err != nil:
			n.log.Warn("the network config in the store cannot be read; this node goes on with its own, and no other can start: mend it with `rootless-ovl config set`",
				"key", lease.ConfigKey(n.cfg.EtcdPrefix), "err", err)
		default:
			n.log.Warn("the network config in the store is another than this node runs with; it goes on, and follows when it is started again", "key", lease.ConfigKey(n.cfg.EtcdPrefix))
		}
	})
}

// leased makes subnets ours - addresses, routes, files - and takes attachments from then on. held is nil where only the last
// run knows of it.
func (n *Node) leased(held *lease.Held, own subnets) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.leasedLocked(held, own)
}

func (n *Node) leasedLocked(held *lease.Held, own subnets) error {
	old, subnet := n.pool.subnet, own.v4
	n.held, n.pool.subnet, n.subnet6 = held, subnet, own.v6
	n.peers = peersOf(n.leases, n.selfLocked())
	if err := n.publishLocked(); err != nil {
		return err
	}
	env := lease.SubnetEnv{
		Network: n.netConfig.Network, Subnet: subnet, IPv6Network: n.netConfig.IPv6Network, IPv6Subnet: own.v6,
		MTU: n.mtu, IPMasq: !n.cfg.NoIPMasq,
	}
	if err := lease.WriteSubnetEnv(n.cfg.SubnetFile, env); err != nil {
		return err
	}
	if err := n.saveLastLocked(); err != nil {
		return err
	}
	if old.IsValid() && old != subnet {
		n.log.Warn("the node has another subnet now", "old", old, "new", subnet)
	}
	for _, a := range n.attachments {
		n.tellMisfitLocked(a)
	}
	if n.state != api.StateStopping {
		if n.state == api.StateLeaseLost && held != nil {
			n.log.Info("ready: the lease is held", "subnet", subnet)
		}
		n.state, n.open = api.StateReady, true
		if held == nil {
			n.state = api.StateLeaseLost
		}
	}
	select {
	case n.newLease <- struct{}{}:
	default:
	}
	return nil
}

// setLeases takes a new snapshot of the leases.
func (n *Node) setLeases(leases []lease.Lease) {
	n.mu.Lock()
	defer n.mu.Unlock()
	old, first := n.peers, n.leases == nil
	n.leases = append([]lease.Lease{}, leases...)
	n.peers = peersOf(n.leases, n.selfLocked())
	n.tellPeersLocked(old, first)
	if n.gateway != nil {
		if err := n.publishLocked(); err != nil {
			n.log.Error("route table not replaced", "err", err)
		}
	}
	select {
	case n.dirty <- struct{}{}:
	default:
	}
}

// tellPeersLocked logs what has changed between two snapshots.
func (n *Node) tellPeersLocked(old []peer, first bool) {
	if allocates(n.netConfig) {
		return // each would be one that cannot be used
	}
	type key struct {
		subnet         netip.Prefix
		addr           netip.AddrPort
		addr6          netip.AddrPort
		problem, doubt string
	}
	keyOf := func(p peer) key {
		k := key{p.lease.Subnet, p.addr, p.v6.addr, p.problem, ""}
		if k.problem == "" {
			k.doubt = p.trouble()
		}
		return k
	}
	before, after := make(map[key]peer), make(map[key]bool)
	for _, p := range old {
		before[keyOf(p)] = p
	}
	for _, p := range n.peers {
		k := keyOf(p)
		after[k] = true
		same, known := before[k]
		switch {
		case known && (same.vtep != p.vtep || same.v6.vtep != p.v6.vtep):
			n.log.Info("peer has another VTEP MAC address", p.where("mac", macText(p.vtep), "before", macText(same.vtep))...)
		case known:
		case p.forUs:
			n.log.Warn("a reservation for this node is not used", "subnet", k.subnet, "public_ip", p.publicIP(), "problem", p.problem)
		case p.problem != "":
			n.log.Warn("peer cannot be used", "subnet", k.subnet, "public_ip", p.publicIP(), "problem", p.problem)
		case k.doubt != "":
			n.log.Warn("peer may not be reachable", p.where("problem", k.doubt)...)
		case !first:
			n.log.Info("peer", p.where("mtu", p.mtu, "kind", p.kind())...)
		}
	}
	if first {
		n.log.Info("peers", "count", len(n.peers))
	}
	for _, p := range old {
		switch k := keyOf(p); {
		case after[k]:
		case p.problem != "":
			n.log.Info("lease of an unusable peer gone or changed", "subnet", k.subnet, "public_ip", p.publicIP())
		default:
			n.log.Info("peer gone", p.where()...)
		}
	}
}

func (n *Node) setState(state string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state = state
}

func (n *Node) storeAway(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state, n.storeErr = api.StateWaitingForStore, err
}
