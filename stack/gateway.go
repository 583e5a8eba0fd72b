// This file is the Gateway: its life from New to the end of Run, and what may be changed while it runs.

package stack

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/rootless-ovl/rootless-ovl/internal/hostnet"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
	"github.com/rootless-ovl/rootless-ovl/stack/dns"
)

// Gateway is the containers' way out. It implements packet.Sender. Make one with New; all methods are safe for concurrent
// use.
type Gateway struct {
	cfg      Config
	log      *slog.Logger
	resolver *dns.Resolver

	own       atomic.Pointer[[]netip.Addr] // a published slice is never changed
	deny      atomic.Pointer[denials]
	policies  atomic.Pointer[policies]
	hostAddrs hostAddresses
	live      atomic.Pointer[netstack] // nil when Run is not running
	count     counters

	mu      sync.Mutex // orders SetAddresses with the start and the end of Run, and changes of policies
	running bool
}

var _ packet.Sender = (*Gateway)(nil)

// New checks c and makes a Gateway. It starts nothing and opens nothing.
func New(c Config) (*Gateway, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	c.Limits.setDefaults()
	c.Timeouts.setDefaults()
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Limits.fitDescriptors() {
		c.Limits.logCut(c.Log)
	}
	g := &Gateway{cfg: c, log: c.Log}
	g.resolver = dns.New(dns.Config{ResolvConf: c.ResolvConf, MaxQueries: c.Limits.DNSQueries, Control: g.cfg.Outbound.control, Log: c.Log})
	g.hostAddrs.ask = hostnet.Has
	own := slices.Clone(c.Addresses)
	g.own.Store(&own)
	g.deny.Store(&denials{})
	g.policies.Store(&policies{})
	return g, nil
}

// ErrRunning says that Run was called while another Run of the same Gateway had not returned.
var ErrRunning = errors.New("stack: the gateway is running already")

// Run makes the stack and carries traffic until ctx is done; then every flow is reset, and nil is returned when the last
// goroutine has ended. It gives packets to Config.Exit, but for those that are given at the end of a turn.
func (g *Gateway) Run(ctx context.Context) error {
	g.mu.Lock()
	if g.running {
		g.mu.Unlock()
		return ErrRunning
	}
	ns, err := newNetstack(g)
	if err != nil {
		g.mu.Unlock()
		if ctx.Err() != nil { // whoever attends to the flows may have ended already
			return nil
		}
		return err
	}
	g.running = true
	g.live.Store(ns)
	g.mu.Unlock()

	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		g.mu.Lock()
		g.live.Store(nil)
		g.mu.Unlock()
		ns.shutDown()
	})
	defer stop()
	ns.exit.drain()
	<-ended
	g.mu.Lock()
	g.running = false
	g.mu.Unlock()
	return nil
}

// SetAddresses replaces the gateway's own addresses; the first is the source of ICMP errors. Flows go on.
func (g *Gateway) SetAddresses(addrs []netip.Addr) error {
	if err := validateAddresses(addrs, g.cfg.MTU); err != nil {
		return err
	}
	addrs = slices.Clone(addrs)
	g.mu.Lock()
	defer g.mu.Unlock()
	old := *g.own.Swap(&addrs)
	if ns := g.live.Load(); ns != nil {
		return ns.changeAddresses(old, addrs)
	}
	return nil
}

// Deny replaces the set of addresses and ports that are never dialled, whatever else is open: the store, the API. Port 0 means every port
// of the address. 0.0.0.0, or ::, stands for every address that this host has when a container calls it: for a server that listens on all of
// them. An address of the host's loopback is denied on the way through the gateway's address, too. Flows that exist go on.
func (g *Gateway) Deny(hosts []netip.AddrPort) {
	d := &denials{at: make(map[netip.AddrPort]bool, len(hosts)), onHost: make(map[uint16]bool)}
	for _, h := range hosts {
		if a := h.Addr().Unmap(); a.IsUnspecified() {
			d.onHost[h.Port()] = true
		} else {
			d.at[netip.AddrPortFrom(a, h.Port())] = true
		}
	}
	g.deny.Store(d)
}

// Release ends every flow of a container, or of all in a subnet, so that the next one with its address starts clean.
func (g *Gateway) Release(containers netip.Prefix) {
	if ns := g.live.Load(); ns != nil {
		ns.flows.release(containers)
	}
}

// Stats is a snapshot of the counters.
func (g *Gateway) Stats() Stats {
	s := g.count.snapshot()
	s.DNS = g.resolver.Stats()
	if ns := g.live.Load(); ns != nil {
		n := ns.flows.counts()
		s.TCPFlows = uint64(n[kindTCP] + n[kindHalfOpen] + n[kindEvicted])
		s.TCPHalfOpen = uint64(n[kindHalfOpen])
		s.UDPFlows = uint64(n[kindUDP])
		s.EchoFlows = uint64(n[kindEcho])
		s.ExitQueue = uint64(ns.exit.length())
		if bad := ns.s.Stats().IP.MalformedFragmentsReceived.Value(); bad > 0 {
			s.Drops[dropNames[dropFragment]] = bad
		}
	}
	return s
}

func (g *Gateway) isOwn(a netip.Addr) bool { return slices.Contains(*g.own.Load(), a) }

// errorSource is the address that ICMP errors of a family come from.
func (g *Gateway) errorSource(is4 bool) (netip.Addr, bool) {
	for _, a := range *g.own.Load() {
		if a.Is4() == is4 {
			return a, true
		}
	}
	return netip.Addr{}, false
}
