// This file is the node as the API shows it: api.Backend, but for Attach and Detach (attach.go) and Publish and Unpublish (publish.go).

package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/tap"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

var _ api.Backend = (*Node)(nil)

// storeTimeout bounds a request to the store that somebody waits for at a prompt.
const storeTimeout = 5 * time.Second

// Status is one look at the node, in any state.
func (n *Node) Status(context.Context) (api.Status, error) {
	counters := n.counters()
	n.mu.Lock()
	defer n.mu.Unlock()
	s := api.Status{
		Version:     n.cfg.Version,
		State:       n.state,
		Problem:     joined(n.problem, n.outboundProblem),
		Since:       n.started,
		PID:         os.Getpid(),
		NodeID:      n.id,
		Interface:   n.external.ifName,
		Port:        n.port,
		MTU:         n.mtu,
		Ephemeral:   n.cfg.Ephemeral,
		RunDir:      n.cfg.RuntimeDir,
		StateDir:    n.cfg.StateDir,
		SubnetEnv:   n.cfg.SubnetFile,
		Backend:     n.netConfig.BackendType,
		Attachments: n.listedLocked(),
		Peers:       len(n.peers),
		AddrsFree:   n.pool.left(),
		Counters:    counters,
		Store: api.StoreStatus{
			Endpoints: n.endpoints,
			Prefix:    n.cfg.EtcdPrefix,
			Embedded:  len(n.cfg.Etcd.Endpoints) == 0,
			Since:     n.started,
		},
	}
	if n.cfg.Sandbox != nil {
		s.Sandbox = *n.cfg.Sandbox
	}
	for _, a := range n.cfg.OutboundAddrs {
		s.OutboundAddrs = append(s.OutboundAddrs, a.String())
	}
	s.OutboundIf = n.cfg.OutboundIf
	if n.external.public.IsValid() {
		s.PublicIP = n.external.public.String()
	}
	if n.netConfig.Network.IsValid() {
		s.Network = n.netConfig.Network.String()
	}
	if n.netConfig.Network.IsValid() {
		s.Domain = n.domainLocked()
	}
	if n.pool.subnet.IsValid() {
		s.Subnet = n.pool.subnet.String()
		s.Gateway = gatewayAddr(n.pool.subnet).String()
	}
	if carriesIPv6(n.netConfig) {
		s.Network6 = n.netConfig.IPv6Network.String()
		if n.external.public6.IsValid() {
			s.PublicIPv6 = n.external.public6.String()
		}
		if n.subnet6.IsValid() {
			s.Subnet6, s.Gateway6 = n.subnet6.String(), gatewayAddr(n.subnet6).String()
		}
	}
	if n.proxyAddr.IsValid() {
		s.Proxy = n.proxyAddr.String()
	}
	err := n.storeErr
	if n.registry != nil {
		h := n.registry.Health()
		s.Store.Connected, s.Store.Since, err = h.Connected, h.Since, h.Err
	}
	if err != nil && !s.Store.Connected {
		s.Store.Error = err.Error()
	}
	return s, nil
}

// listedLocked is how many attachments there are, not counting those that are only being made.
func (n *Node) listedLocked() (count int) {
	for _, a := range n.attachments {
		if a.phase != pending {
			count++
		}
	}
	return count
}

// Attachments lists what is on the overlay here, by name. One that is being taken off is in it until its address is free.
func (n *Node) Attachments(context.Context) ([]api.Attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var list []api.Attachment
	for _, a := range n.attachments {
		if a.phase != pending {
			list = append(list, n.describeLocked(a))
		}
	}
	slices.SortFunc(list, func(a, b api.Attachment) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func (n *Node) describeLocked(a *attachment) api.Attachment {
	s := a.nowLocked()
	if s.Loose {
		s.PID = a.at.pid
	}
	d := api.Attachment{
		Name:         s.Name,
		PID:          s.PID,
		Netns:        s.Netns,
		Inode:        s.Inode,
		Owner:        s.Owner,
		IfName:       s.IfName,
		Addr:         s.Addr.String(),
		MAC:          s.MAC,
		Gateway:      s.gateway().String(),
		MTU:          s.MTU,
		DefaultRoute: !s.NoDefault,
		WholeSubnet:  s.Gateway,
		Loose:        s.Loose,
		DNSAt:        s.DNSAt,
		Problem:      n.troubleLocked(a),
		Since:        s.Since,
		Aliases:      s.Aliases,
		DNS:          n.dnsOfLocked(&s),
		Ports:        a.portsLocked(),
		Policy:       s.Policy,
	}
	if s.Addr6.IsValid() {
		d.Addr6, d.Gateway6 = s.Addr6.String(), gatewayAddr(s.Addr6).String()
	}
	if a.link != nil {
		d.Counters = numbers(a.link.Stats())
		d.Counters["policy_denied"] = a.port.Refused()
	}
	return d
}

// Peers lists the other nodes as the store describes them.
func (n *Node) Peers(context.Context) ([]api.Peer, error) {
	n.mu.Lock()
	peers, router, vanishing := slices.Clone(n.peers), n.router, n.vanishing
	n.mu.Unlock()
	now := time.Now()
	var stats forwarder.Stats
	if router != nil {
		stats = router.Stats()
		n.noteHeard(now, stats.Peers)
	}
	n.mu.Lock()
	last := n.heard
	n.mu.Unlock()
	var list []api.Peer
	for _, p := range peers {
		d := api.Peer{
			Subnet:  p.lease.Subnet.String(),
			Port:    int(p.addr.Port()),
			MTU:     p.mtu,
			PathMTU: cmp.Or(p.pathMTU, p.mtu),
			Stock:   p.stock,
			Backend: p.backend(),
			Problem: p.trouble(),
		}
		if p.v6.addr.IsValid() {
			d.Subnet6, d.PublicIPv6, d.PathMTU6 = p.v6.subnet.String(), p.v6.addr.Addr().String(), cmp.Or(p.v6.pathMTU, p.mtu)
		}
		if until, ok := vanishing[p.lease.Subnet]; ok {
			d.Problem = joined(d.Problem, "its lease is not in the store any more: if its node does not put it back, the peer is gone at "+until.Format(time.TimeOnly))
		}
		if p.lease.Attrs.PublicIP.IsValid() {
			d.PublicIP = p.lease.Attrs.PublicIP.String()
		}
		if e := p.lease.Attrs.RootlessOvl; e != nil {
			d.NodeID = e.NodeID
		}
		for _, w := range p.ways() {
			at := last[w.addr].at
			if at.After(d.LastHeard) {
				d.LastHeard = at
			}
			d.Problem = cmp.Or(d.Problem, silence(w.addr, p.stock, n.prober.silentSince(w.addr), at, now))
			if d.Counters == nil {
				d.Counters = make(map[string]uint64)
			}
			for name, count := range numbers(stats.Peers[w.addr]) {
				d.Counters[name] += count
			}
		}
		list = append(list, d)
	}
	return list, nil
}

// Config is the network config as it stands in the store now.
func (n *Node) Config(ctx context.Context) (json.RawMessage, error) {
	r, err := n.storeNow()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	cfg, err := r.Config(ctx)
	if err != nil {
		return nil, configError(err)
	}
	return cfg.Raw, nil
}

// SetConfig replaces the network config in the store. Running nodes go on with the one that they started with. One that flannel
// takes and no node starts on is written too: it may be for flannel hosts, and whoever sends it can ask CheckConfig.
func (n *Node) SetConfig(ctx context.Context, raw json.RawMessage) error {
	cfg, err := lease.ParseConfig(raw)
	if err == nil {
		err = CheckRanges(cfg)
	}
	if err != nil {
		return api.Errorf(api.CodeInvalid, "%w", err)
	}
	r, err := n.storeNow()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := r.PutConfig(ctx, raw); err != nil {
		return configError(err)
	}
	if err := CheckConfig(cfg); err != nil {
		n.log.Warn("network config replaced by one that no rootless-ovl node starts on", "network", cfg.Network, "err", err)
		return nil
	}
	n.log.Info("network config replaced; nodes follow it when they are started again", "network", cfg.Network)
	return nil
}

// storeNow is the way to the store, if there is one yet.
func (n *Node) storeNow() (*lease.Registry, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.registry == nil {
		return nil, api.Errorf(api.CodeUnavailable, "the store has not answered yet: `rootless-ovl status` says more")
	}
	return n.registry, nil
}

func configError(err error) error {
	switch {
	case errors.Is(err, lease.ErrNoConfig):
		return api.Errorf(api.CodeNotFound, "%w", err)
	case errors.Is(err, lease.ErrUnreachable), errors.Is(err, lease.ErrTLS), errors.Is(err, context.DeadlineExceeded):
		return api.Errorf(api.CodeUnavailable, "%w", err)
	case errors.Is(err, lease.ErrAuth):
		return api.Errorf(api.CodeDenied, "%w", err)
	}
	return err
}

// counters are all totals of the packet path since the start.
func (n *Node) counters() map[string]map[string]uint64 {
	n.mu.Lock()
	router, gw := n.router, n.stack
	taps := n.gone
	drops := make(map[string]uint64)
	for reason, count := range n.goneDrops {
		drops[reason] = count
	}
	for _, a := range n.attachments {
		if a.link != nil {
			taps.Add(a.link.Stats())
			a.link.Drops(drops)
		}
	}
	ports := n.portTotalsLocked()
	n.mu.Unlock()
	for reason, count := range ports.drops {
		drops["publish-"+reason] += count
	}
	drops["api-other-user"] = api.OtherUsers()
	all := map[string]map[string]uint64{"tap": numbers(taps), "published": numbers(ports), "drops": drops, "path_mtu": numbers(n.prober.counts())}
	if router != nil {
		s := router.Stats()
		all["underlay"] = numbers(s.Underlay)
		all["underlay"]["icmp_errors"] = s.ICMPErrors
		for reason, count := range s.Drops {
			drops[reason] += count
		}
	}
	if n.cfg.Proxy.IsValid() {
		all["proxy"] = numbers(n.proxy.Stats())
	}
	if gw != nil {
		s := gw.Stats()
		all["gateway"] = numbers(s)
		for reason, count := range s.Drops {
			drops["gateway-"+reason] += count
		}
	}
	return all
}

// retireLocked keeps the counts of a TAP that goes, so that totals never fall.
func (n *Node) retireLocked(l link) {
	n.gone.Add(l.Stats())
	l.Drops(n.goneDrops)
}

// counted is what a link tells of itself.
type counted interface {
	Stats() tap.Stats
	Drops(m map[string]uint64)
}

// numbers are the numeric members of v's JSON; those of an object inside get its name in front, truth values are 0 or 1.
// Objects named "drops" are left out: they are shown as a group.
func numbers(v any) map[string]uint64 {
	flat := make(map[string]uint64)
	b, err := json.Marshal(v)
	if err != nil {
		return flat
	}
	var members map[string]any
	dec := json.NewDecoder(strings.NewReader(string(b)))
	dec.UseNumber()
	if dec.Decode(&members) == nil {
		flatten(flat, "", members)
	}
	return flat
}

func flatten(flat map[string]uint64, before string, members map[string]any) {
	for name, v := range members {
		switch v := v.(type) {
		case json.Number:
			if u, err := v.Int64(); err == nil && u >= 0 {
				flat[before+name] = uint64(u)
			}
		case bool:
			flat[before+name] = 0
			if v {
				flat[before+name] = 1
			}
		case map[string]any:
			if name != "drops" {
				flatten(flat, before+name+"_", v)
			}
		}
	}
}
