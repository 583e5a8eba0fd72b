// This file names the peers, and starts each of them once a lab.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// The peers.
const (
	peerBare        = "bare"
	peerVXLAN       = "kernel-vxlan"
	peerBridge      = "kernel-bridge"
	peerNebula      = "nebula"
	peerSlirp       = "slirp4netns"
	peerPasta       = "pasta"
	peerPasta1500   = "pasta-1500"
	peerPastaT      = "pasta -t"
	peerKit         = "rootlesskit-builtin"
	peerKitSlirp    = "rootlesskit-slirp4netns"
	peerNone        = "no network"   // of a container engine: --network none
	peerOwn         = "engine's own" // network of a container engine
	peerOurs        = "rootless-ovl"
	peerOursStack   = "rootless-ovl-stack" // published ports where no sockets can be had in the container's namespace
	peerOursBuffers = "rootless-ovl-4MiB"  // beside rootless-ovl with the stock receive buffer
	peerOursEtcd    = "rootless-ovl+etcd"  // a node that runs the embedded etcd too
	peerMember      = "rootless-ovl among flannel hosts"
)

// optional are the peers that come from packages of their own.
var optional = map[string][]program{
	peerNebula: {{"nebula", "nebula"}, {"nebula-cert", "nebula"}},
	peerSlirp:  {{"slirp4netns", "slirp4netns"}},
	peerPasta:  {{"pasta", "passt"}},

	peerPasta1500: {{"pasta", "passt"}},
	peerPastaT:    {{"pasta", "passt"}},
	peerKit:       {{"rootlesskit", "rootlesskit"}, {"slirp4netns", "slirp4netns"}, {"newuidmap", "uidmap"}},
	peerKitSlirp:  {{"rootlesskit", "rootlesskit"}, {"slirp4netns", "slirp4netns"}, {"newuidmap", "uidmap"}},
}

// errMissing is a peer that is not installed.
var errMissing = errors.New("not installed")

// path is a peer's way from one end to another.
type path struct {
	peer    string
	a, b    end
	port    int        // the first of the published ports that lead to b; 0 where all do
	daemons []*process // whose CPU time and memory are the peer's; nil for the kernel's own
	engine  *engine    // of the rows about a container engine, which have no ends
}

// network is what a started peer offers.
type network struct {
	overlay  *path // from a container of host 1 to one of host 2
	egress   *path // from a container of host 1 to host 2 itself
	egress2  *path // from a container of host 2 to host 1 itself
	sameNode *path // between two containers of host 1
	// published is from host 2 to a container of host 1, by host 1's address.
	published *path
	ours      *ours // of rootless-ovl only
	cards     *cards
}

// cards are for peers whose start is what puts a container on the network.
type cards struct {
	// attach puts c on the network; it returns when the command has done so, or runs on and serves it. target answers pings.
	attach func(ctx context.Context, c *container) (stop func(), err error)
	target func() netip.Addr
}

// started is the outcome of a peer's start.
type started struct {
	network network
	err     error
}

// peer starts a peer unless it runs already.
func (l *lab) peer(ctx context.Context, name string) (network, error) {
	if s, ok := l.peers[name]; ok {
		return s.network, s.err
	}
	n, err := l.startPeer(ctx, name)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%s: %w", name, err)
	}
	l.peers[name] = started{n, err}
	return n, err
}

func (l *lab) startPeer(ctx context.Context, name string) (network, error) {
	if pkgs := missingPackages(optional[name]); len(pkgs) > 0 {
		return network{}, fmt.Errorf("%w: %s", errMissing, installLine(pkgs...))
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	switch name {
	case peerBare:
		return network{
			overlay: &path{peer: name, a: l.h1.end(), b: l.h2.end()},
			egress:  &path{peer: name, a: l.h1.end(), b: l.h2.end()},

			published: &path{peer: name, a: l.h2.end(), b: l.h1.end()},
		}, nil
	case peerVXLAN, peerBridge:
		return l.startVXLAN(ctx)
	case peerNebula:
		return l.startNebula(ctx)
	case peerSlirp:
		return l.startSlirp(ctx)
	case peerPasta:
		return l.startPasta(ctx, name, bigMTU)
	case peerPasta1500:
		return l.startPasta(ctx, name, 1500)
	case peerPastaT:
		return l.startPastaPublished(ctx)
	case peerKit:
		return l.startRootlessKit(ctx, name, "builtin")
	case peerKitSlirp:
		return l.startRootlessKit(ctx, name, "slirp4netns")
	case peerOursStack:
		return l.startPublished(ctx, name)
	case peerOurs:
		return l.startOurs(ctx, oursMain)
	case peerMember:
		return l.startMember(ctx)
	}
	return network{}, fmt.Errorf("no such peer")
}
