// This file is what a node knew last, kept on disk: its subnet, so that it gets it again, and everything that forwarding
// needs, so that a start while the store is away does not cut off containers.

package node

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// saveDelay joins changes of a busy overlay into one write.
const saveDelay = time.Second

// lastKnown reads what the last run saved; nothing, if that cannot be read.
func (n *Node) lastKnown() savedLast {
	var last savedLast
	_, err := readState(filepath.Join(n.cfg.StateDir, lastFile), &last)
	if err != nil {
		n.log.Warn("last known leases not read", "err", err)
		return savedLast{}
	}
	last.clean()
	n.mu.Lock()
	n.savedAt = last.SavedAt
	if boot := n.bootID(); boot != "" && boot == last.Boot && last.Uptime > 0 {
		// The host's own clock may have been set meanwhile.
		if age := n.edges.sinceBoot() - last.Uptime; age >= 0 {
			last.SavedAt = time.Now().Add(-age)
			n.savedAt, n.savedUp = last.SavedAt, last.Uptime
		}
	}
	n.mu.Unlock()
	return last
}

// clean takes out what cannot be: the file is ours, but people edit files.
func (l *savedLast) clean() {
	l.Subnet = l.Subnet.Masked()
	if !l.Subnet.Addr().Is4() {
		l.Subnet = netip.Prefix{}
	}
	l.Subnet6 = l.Subnet6.Masked()
	if !l.Subnet6.Addr().Is6() {
		l.Subnet6 = netip.Prefix{}
	}
	if l.Port < 0 || l.Port > 65535 {
		l.Port = 0
	}
}

// usable gives the network config of the last run if the node may forward on it: the lease that it held cannot have
// expired by now.
func (l savedLast) usable(c Config, now time.Time) (lease.NetworkConfig, bool) {
	age := now.Sub(l.SavedAt)
	if !l.Subnet.IsValid() || c.Ephemeral || age < 0 || age >= c.LeaseTTL {
		return lease.NetworkConfig{}, false
	}
	cfg, err := lease.ParseConfig([]byte(l.Config))
	return cfg, err == nil && inside(cfg.Network, l.Subnet) && cfg.EnableIPv6 == l.Subnet6.IsValid() && (!cfg.EnableIPv6 || inside(cfg.IPv6Network, l.Subnet6))
}

// restore are the leases of the last run, those that cannot be read left out.
func (l savedLast) restore() []lease.Lease {
	var leases []lease.Lease
	for _, s := range l.Leases {
		attrs, err := lease.ParseAttrs(s.Attrs)
		if err == nil && s.Subnet.IsValid() {
			leases = append(leases, lease.Lease{Subnet: s.Subnet.Masked(), Subnet6: s.Subnet6.Masked(), Attrs: attrs})
		}
	}
	return leases
}

// restoreNames are the names of the last run, those that cannot be left out.
func (l savedLast) restoreNames() []lease.Name {
	return slices.DeleteFunc(slices.Clone(l.Names), func(n lease.Name) bool {
		return lease.CheckDNSName(n.Name) != nil || !n.Addr.Is4() || n.Addr6.IsValid() && !n.Addr6.Is6() ||
			slices.ContainsFunc(n.Aliases, func(a string) bool { return lease.CheckDNSName(a) != nil })
	})
}

// forgetConfig has the next start ask the store first.
func (n *Node) forgetConfig() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.configGone = true
	if err := n.saveLastLocked(); err != nil {
		n.log.Error("last known leases not saved, which a start without the store would need: see whether the disk is full", "err", err)
	}
}

// saveLastLocked writes what restore and usable read.
func (n *Node) saveLastLocked() error {
	if n.handed.Load() {
		return nil // the file is another's
	}
	if n.held != nil && (n.registry == nil || n.registry.Health().Connected) {
		n.savedAt, n.savedUp = time.Now(), n.edges.sinceBoot()
	}
	last := savedLast{V: 1, SavedAt: n.savedAt, Subnet: n.pool.subnet, Subnet6: n.subnet6, Port: n.port, Config: string(n.netConfig.Raw),
		Store: storeOf(n.cfg), Names: n.known, Closed: n.closed}
	if n.savedUp > 0 {
		last.Boot, last.Uptime = n.boot, n.savedUp
	}
	if n.configGone {
		last.Config = ""
	}
	for _, l := range n.leases {
		attrs, err := json.Marshal(l.Attrs)
		if err != nil {
			return err
		}
		last.Leases = append(last.Leases, savedLease{Subnet: l.Subnet, Subnet6: l.Subnet6, Attrs: attrs})
	}
	return writeState(filepath.Join(n.cfg.StateDir, lastFile), last)
}

// saveWhenDirty writes changes down, and now and then the time until which our lease is known to be held.
func (n *Node) saveWhenDirty(ctx context.Context) error {
	tick := time.NewTicker(max(n.cfg.LeaseTTL/24, 10*time.Second))
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-n.dirty:
			select {
			case <-time.After(saveDelay):
			case <-ctx.Done():
			}
			select {
			case <-n.dirty: // what came meanwhile is written, too
			default:
			}
		case <-tick.C:
		case <-ctx.Done():
		}
		n.mu.Lock()
		err := n.saveLastLocked()
		n.mu.Unlock()
		if err != nil && !errors.Is(err, context.Canceled) {
			n.log.Error("last known leases not saved, which a start without the store would need: see whether the disk is full", "err", err)
		}
	}
	return nil
}
