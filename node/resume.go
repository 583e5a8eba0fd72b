// This file has a node that starts forward at once on what the last one knew, while the store is asked in the background: a daemon that was killed
// is missed for as long as a process takes to start, and not for as long as the store takes to answer, or the embedded one to open its data.
//
//	last-known.json, attachments.json -> sockets, TAPs, route table, names: containers reach each other
//	the store: the same config? the lease still ours?              -> subnet.env, ready, told to systemd, attachments are taken
//
// Until the store has answered nobody is told that the node is ready; when it does not within patience, the node goes on as one whose lease is
// not confirmed. A subnet that is another's by now is given up as that of a running node is.

package node

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// ErrConfigChanged ends a node that had begun with the network config of its last run, which is not the store's any more. The next node made of the
// same Config begins with the store's.
var ErrConfigChanged = errors.New("the network config has changed since the last run")

// storeOf tells stores apart: what was known of another is of no use.
func storeOf(c Config) string {
	if len(c.Etcd.Endpoints) == 0 {
		return "embedded " + c.EtcdPrefix
	}
	return strings.Join(slices.Sorted(slices.Values(c.Etcd.Endpoints)), ",") + " " + c.EtcdPrefix
}

// resume opens what is needed to forward on what the last run knew; a nil router means that the store is to be asked first.
func (n *Node) resume(last savedLast) (cfg lease.NetworkConfig, router *forwarder.Router, err error) {
	c := n.cfg
	c.Ephemeral = c.Ephemeral && n.given == nil // whose lease lives
	cfg, ok := last.usable(c, time.Now())
	if !ok || last.Store != storeOf(n.cfg) || n.cfg.NetworkSet && cfg.Network != n.cfg.Network {
		return cfg, nil, nil
	}
	if err := checkSubnetFile(n.cfg.SubnetFile); err != nil {
		return cfg, nil, err
	}
	n.mu.Lock()
	ext := n.external
	n.mu.Unlock()
	if n.checkNetwork(cfg, ext) != nil { // of the store's there is perhaps nothing to say
		return cfg, nil, nil
	}
	router, err = n.openRouter(cfg, ext, last)
	return cfg, router, err
}

// forwardOn makes the subnets of the last run ours for packets alone.
func (n *Node) forwardOn(own subnets) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pool.subnet, n.subnet6 = own.v4, own.v6
	n.peers = peersOf(n.leases, n.selfLocked())
	return n.publishLocked()
}

// confirm asks the store for what a node that forwards already takes for granted, and is its life with the store from then on.
func (n *Node) confirm(ctx context.Context, s *openedStore, own subnets, run func(string, func(context.Context) error)) error {
	n.awaitEnd(ctx)
	if err := n.openStore(ctx, s); err != nil {
		return err
	}
	run("the embedded store", s.wait)
	run("the external address", (&roamer{n: n, store: s}).run)
	if s.server != nil {
		addrs, _ := n.storeAddrs(ctx, s, false) // it is asked again: closeDoors
		n.stack.Deny(n.denials(addrs))
	}
	run("", func(ctx context.Context) error { return n.unconfirmed(ctx, own) })
	return n.follow(ctx, s, nil)
}

// unconfirmed has the node go on with the subnets of the last run when the store has not answered for a while.
func (n *Node) unconfirmed(ctx context.Context, own subnets) error {
	t := time.NewTimer(n.patience)
	defer t.Stop()
	select {
	case <-t.C:
	case <-n.readied:
		return nil
	case <-ctx.Done():
		return nil
	}
	if err := n.leaseUnconfirmed(own); err != nil {
		return err
	}
	n.tellReady()
	return nil
}

func (n *Node) leaseUnconfirmed(own subnets) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open || n.state == api.StateStopping {
		return nil
	}
	n.log.Warn("the store is away: forwarding on the last known leases", "subnet", own.v4, "known_at", n.savedAt)
	return n.leasedLocked(nil, own)
}

// tellReady says, once, that the node has a subnet: to systemd and in the log.
func (n *Node) tellReady() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.open { // it is stopping
		return
	}
	select {
	case <-n.readied:
		return
	default:
		close(n.readied)
	}
	n.notify(daemon.SdNotifyReady)
	args := []any{"subnet", n.pool.subnet, "network", n.netConfig.Network, "port", n.port, "mtu", n.mtu, "node_id", n.id}
	if n.subnet6.IsValid() {
		args = append(args, "subnet6", n.subnet6)
	}
	if n.held == nil {
		n.log.Info("forwarding; the lease of the last run is not confirmed yet, as the store is away", args...)
		return
	}
	n.log.Info("ready", args...)
}

// literal are those of the store's addresses that can be told without asking a name server.
func literal(s *openedStore, listen string) (addrs []netip.AddrPort) {
	doors := s.config.Endpoints
	if len(doors) == 0 {
		doors = []string{listen}
	}
	for _, door := range doors {
		host, port, ok := splitDoor(door)
		if a, err := netip.ParseAddr(host); ok && err == nil {
			addrs = append(addrs, netip.AddrPortFrom(a.Unmap().WithZone(""), port))
			if a.IsLoopback() {
				addrs = append(addrs, netip.AddrPortFrom(netip.IPv4Unspecified(), port))
			}
		}
	}
	return addrs
}
