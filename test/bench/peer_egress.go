// This file sets up slirp4netns and pasta, as a rootless engine does, for a container's way to the outside.

package main

import (
	"context"
	"net/netip"
	"strconv"
)

// slirpGateway is the address at which slirp4netns answers pings.
var slirpGateway = netip.MustParseAddr("10.0.2.2")

// slirpCommand is what podman runs.
func slirpCommand(c *container) []string {
	return []string{"slirp4netns", "--configure", "--mtu=" + strconv.Itoa(bigMTU), "--disable-host-loopback", c.pidText(), "tap0"}
}

// bigMTU is the largest that both can have, and what engines give them.
const bigMTU = 65520

// pastaCommand gives the container the host's address.
func pastaCommand(c *container, mtu int) []string {
	return []string{"pasta", "--foreground", "--quiet", "--config-net", "--mtu", strconv.Itoa(mtu), c.pidText()}
}

func (l *lab) startSlirp(ctx context.Context) (network, error) {
	return l.startEgress(ctx, peerSlirp, slirpCommand, slirpGateway)
}

func (l *lab) startPasta(ctx context.Context, name string, mtu int) (network, error) {
	return l.startEgress(ctx, name, func(c *container) []string { return pastaCommand(c, mtu) }, l.h2.addr)
}

// startEgress starts a program that serves one container. target is an address that answers pings then.
func (l *lab) startEgress(ctx context.Context, name string, command func(*container) []string, target netip.Addr) (network, error) {
	launch := func(c *container) (*process, error) {
		args := command(c)
		return l.launch(l.h1.space, name, l.command(true, l.h1.home, args[0], args[1:]...))
	}
	c, err := l.newContainer(ctx, l.h1, "behind-"+name)
	if err != nil {
		return network{}, err
	}
	daemon, err := launch(c)
	if err != nil {
		return network{}, err
	}
	if err := daemon.waitAnswer(ctx, c.space, target); err != nil {
		return network{}, err
	}
	return network{
		egress: &path{peer: name, a: end{space: c.space}, b: l.h2.end(), daemons: []*process{daemon}},
		cards: &cards{
			attach: func(_ context.Context, c *container) (func(), error) {
				p, err := launch(c)
				if err != nil {
					return nil, err
				}
				return p.stop, nil
			},
			target: func() netip.Addr { return target },
		},
	}, nil
}
