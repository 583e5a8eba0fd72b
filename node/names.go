// This file is the names of attachments: which of them are published in the store, what the gateway's resolver knows of everybody's, and what
// is said when a name is taken. The names of this node's own attachments are resolved here whether or not the store can be reached, and those of
// others as they were last seen.

package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/stack/dns"
)

const (
	// claimPatience is how long an attach waits for the store to say that a name is free; then it goes on without.
	claimPatience = 3 * time.Second
	// dropPatience is how long a detach waits for the store to delete a name.
	dropPatience = time.Second
)

// checkNames puts the aliases of a new attachment into the form in which they are published, and refuses names that nobody can have. One that DNS
// cannot carry is refused only where it would have to.
func checkNames(s *savedAttachment) error {
	for i, a := range s.Aliases {
		a = strings.ToLower(a)
		if err := lease.CheckDNSName(a); err != nil {
			return api.Errorf(api.CodeInvalid, "alias: %w", err)
		}
		s.Aliases[i] = a
	}
	for _, name := range append([]string{strings.ToLower(s.Name)}, s.Aliases...) {
		if dns.Reserved(name) {
			return api.Errorf(api.CodeInvalid, "the name %q is nobody's: host and gateway are every container's gateway, localhost is itself: choose another with --name or --alias", name)
		}
	}
	if err := lease.CheckDNSName(strings.ToLower(s.Name)); err != nil && len(s.Aliases) > 0 {
		return api.Errorf(api.CodeInvalid, "aliases need a name that DNS can carry: %w: choose another with --name", err)
	}
	return nil
}

// nameOfLocked is what of an attachment is published; ok is false if nothing is. Names that nobody gave are not; where there are aliases, they
// get one that is nobody else's.
func (n *Node) nameOfLocked(s *savedAttachment) (name lease.Name, ok bool) {
	name = lease.Name{Name: strings.ToLower(s.Name), NodeID: n.id, Addr: s.Addr.Addr(), Aliases: s.Aliases}
	if s.Addr6.IsValid() && n.netConfig.IPv6Network.Contains(s.Addr6.Addr()) {
		name.Addr6 = s.Addr6.Addr()
	}
	if !s.Named {
		name.Name += "." + n.id[:min(8, len(n.id))]
	}
	return name, (s.Named || len(s.Aliases) > 0) && lease.CheckDNSName(name.Name) == nil
}

// claimName publishes the name of an attachment that is being made, or says who has it. While the store is away it only asks for it.
func (n *Node) claimName(ctx context.Context, a *attachment) error {
	if name, ok := n.publishedAs(&a.saved); ok {
		return n.claim(ctx, name)
	}
	return nil
}

// publishedAs is nameOfLocked.
func (n *Node) publishedAs(s *savedAttachment) (lease.Name, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.nameOfLocked(s)
}

func (n *Node) claim(ctx context.Context, name lease.Name) error {
	n.mu.Lock()
	names, registry := n.names, n.registry
	n.mu.Unlock()
	if names == nil {
		return nil // followNames asks for it
	}
	ctx, cancel := context.WithTimeout(ctx, claimPatience)
	defer cancel()
	if !registry.Health().Connected {
		cancel() // asked for all the same
	}
	return n.takenError(name, names.Claim(ctx, name))
}

// takenError says where the holder of what name cannot have is, and what to do: it may be the name itself or an alias.
func (n *Node) takenError(name lease.Name, err error) error {
	var taken *lease.NameTakenError
	if !errors.As(err, &taken) {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	remedy := "choose another with --name, or make it an alias of both with --alias"
	switch {
	case taken.Name != name.Name:
		remedy = "an alias cannot be somebody's name: choose another with --alias, or give it to both as an alias and that one another --name"
	case taken.Holder.Name != taken.Name:
		remedy = "choose another with --name, or make it an alias here too with --alias"
	}
	return api.Errorf(api.CodeInUse, "%s: %s", n.takenTextLocked(taken), remedy)
}

func (n *Node) takenTextLocked(taken *lease.NameTakenError) string {
	where := "this node"
	if id := taken.Holder.NodeID; id != n.id {
		where = "node " + id
		for _, l := range n.leases {
			if x := l.Attrs.RootlessOvl; x != nil && x.NodeID == id {
				where = fmt.Sprintf("node %s (%v)", id, l.Attrs.PublicIP)
			}
		}
	}
	what := fmt.Sprintf("name %q is taken by %s", taken.Name, taken.Who())
	if taken.Holder.Name != taken.Name {
		what = fmt.Sprintf("name %q is taken: it is an alias of %q, %s", taken.Name, taken.Holder.Name, taken.Who())
	}
	return what + " on " + where
}

// keepNameLocked publishes the name of an attachment that lives, whenever that is possible.
func (n *Node) keepNameLocked(a *attachment) {
	name, ok := n.nameOfLocked(&a.saved)
	if !ok || n.names == nil {
		return
	}
	if a.nameErr = n.names.Keep(name); a.nameErr != nil {
		n.log.Warn("a name is not published", "name", name.Name, "err", a.nameErr)
	}
}

// dropName takes back what claimName has published.
func (n *Node) dropName(a *attachment) {
	s := n.savedOf(a)
	n.dropNameOf(&s)
}

func (n *Node) dropNameOf(s *savedAttachment) {
	n.mu.Lock()
	name, ok := n.nameOfLocked(s)
	names, registry := n.names, n.registry
	n.mu.Unlock()
	if !ok || names == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), dropPatience)
	defer cancel()
	if !registry.Health().Connected {
		cancel() // it is deleted later, or ends with its TTL
	}
	if err := names.Drop(ctx, name); err != nil {
		n.log.Debug("name not deleted yet", "name", name.Name, "err", err)
	}
}

// nameTroubleLocked is why an attachment cannot be found by its name, for people.
func (n *Node) nameTroubleLocked(a *attachment) string {
	s := &a.saved
	if err := lease.CheckDNSName(strings.ToLower(s.Name)); s.Named && err != nil {
		return fmt.Sprintf("it cannot be found by its name: %v", err)
	}
	name, ok := n.nameOfLocked(s)
	if !ok || a.phase != live {
		return ""
	}
	unknown := "other nodes do not know its name yet"
	if s.Since.Before(n.started) { // the last daemon may have published it a moment ago
		unknown = "other nodes may not know its name"
	}
	if n.names == nil {
		return unknown + ": the store has not answered since this node was started"
	}
	err := n.names.Problem(name.Name)
	var taken *lease.NameTakenError
	switch {
	case a.nameErr != nil:
		return fmt.Sprintf("it cannot be found by its name: %v: attach it again with another", a.nameErr)
	case errors.As(err, &taken):
		return fmt.Sprintf("it cannot be found by its name: %s, since before the store could be asked; it gets the name when that is free", n.takenTextLocked(taken))
	case err != nil:
		return fmt.Sprintf("%s: %v", unknown, err)
	}
	return ""
}

// followNames publishes the names of the attachments and follows everybody's until ctx ends; then it takes its own back.
func (n *Node) followNames(ctx context.Context, r *lease.Registry) error {
	names := r.NewNames(n.id, lease.NamesTTL)
	n.mu.Lock()
	n.names = names
	for _, a := range n.attachments {
		if a.phase != leaving {
			n.keepNameLocked(a)
		}
	}
	n.mu.Unlock()
	err := names.Run(ctx, n.setNames)
	if !r.Health().Connected || n.handed.Load() {
		return err // they go with their TTL, or another has them
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTimeout)
	defer cancel()
	if rerr := names.Revoke(ctx); rerr != nil {
		n.log.Warn("names not given back; they end by themselves", "ttl", lease.NamesTTL, "err", rerr)
	}
	return err
}

// setNames takes a new snapshot of the names.
func (n *Node) setNames(s lease.NamesSnapshot) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.known = s.Names
	if n.gateway != nil {
		n.renameLocked()
	}
	select {
	case n.dirty <- struct{}{}:
	default:
	}
}

// domainLocked is the network's domain; a config with a bad one is not started on.
func (n *Node) domainLocked() string {
	d, err := n.netConfig.Domain()
	if err != nil {
		return lease.DefaultDomain
	}
	return d
}

// renameLocked replaces what the gateway's resolver knows by what is known now, if that has changed: a new zone begins anew with whose turn it is.
func (n *Node) renameLocked() {
	believed, doubts := n.believedNamesLocked()
	n.tellDoubtsLocked(doubts)
	c := n.zoneConfigLocked(believed)
	if n.zone != nil && c.Equal(n.zoneConfig) {
		return
	}
	n.zone, n.zoneConfig = dns.NewZone(c), c
	n.gateway.SetNames(n.zone)
}

// zoneConfigLocked is the zone of others' names and the attachments.
func (n *Node) zoneConfigLocked(theirs []lease.Name) dns.ZoneConfig {
	c := dns.ZoneConfig{Domain: n.domainLocked(), Networks: []netip.Prefix{n.netConfig.Network, egress6}, Gateways: make(map[netip.Addr][]netip.Addr)}
	if carriesIPv6(n.netConfig) {
		c.Networks = append(c.Networks, n.netConfig.IPv6Network)
	}
	others := make(map[string]bool, len(theirs))
	add := func(name lease.Name) {
		h := dns.Host{Name: name.Name, Addrs: []netip.Addr{name.Addr}, Aliases: name.Aliases}
		if name.Addr6.IsValid() {
			h.Addrs = append(h.Addrs, name.Addr6)
		}
		c.Hosts = append(c.Hosts, h)
	}
	for _, name := range theirs {
		others[name.Name] = true
		add(name)
	}
	for _, key := range slices.Sorted(maps.Keys(n.attachments)) {
		a := n.attachments[key]
		if a.phase != live {
			continue
		}
		if name, ok := n.nameOfLocked(&a.saved); ok && a.nameErr == nil && !others[name.Name] {
			add(name)
		}
		if gateways := a.saved.gateways(); !a.saved.Gateway {
			for _, addr := range a.saved.addrs() {
				c.Gateways[addr] = gateways
			}
		}
	}
	return c
}

// gateways are the addresses by which the container knows its gateway.
func (s *savedAttachment) gateways() (list []netip.Addr) {
	for _, p := range []netip.Prefix{s.Addr, s.Addr6} {
		if p.IsValid() {
			list = append(list, gatewayAddr(p))
		}
	}
	return list
}

// dnsOfLocked is what belongs into an attachment's resolv.conf.
func (n *Node) dnsOfLocked(s *savedAttachment) *api.DNS {
	if s.Gateway {
		return nil
	}
	return &api.DNS{Server: s.gateway().String(), Search: []string{n.domainLocked()}}
}
