// This file sets up rootless-ovl: a node on each host, the first with the embedded etcd that the second joins.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"time"
)

// oursSpec is one overlay of ours: several can run on the same hosts.
type oursSpec struct {
	name     string
	network  string
	port     int // UDP
	etcdPort int
	rmemMax  int // net.core.rmem_max while the nodes start: a socket keeps what it was granted
}

const (
	stockRmemMax = 212992
	largeRmemMax = 4 << 20
)

var (
	oursMain  = oursSpec{name: "ovl", network: "10.210.0.0/16", port: 8285, etcdPort: 2379, rmemMax: largeRmemMax}
	oursStock = oursSpec{name: "ovl-stock", network: "10.211.0.0/16", port: 8286, etcdPort: 2479, rmemMax: stockRmemMax}
)

// ours is a running overlay of rootless-ovl.
type ours struct {
	lab      *lab
	spec     oursSpec
	nodes    [2]*process
	remote   netip.Addr // of a container on host 2
	attached int
}

// startOurs starts both nodes and attaches two containers of host 1 and one of host 2.
func (l *lab) startOurs(ctx context.Context, spec oursSpec) (network, error) {
	o := &ours{lab: l, spec: spec}
	if err := withRmemMax(spec.rmemMax, func() error { return o.startNodes(ctx) }); err != nil {
		return network{}, err
	}
	var ends []end
	for i, h := range []*host{l.h1, l.h2, l.h1} {
		c, err := l.newContainer(ctx, h, fmt.Sprintf("%s-c%d", spec.name, i+1))
		if err != nil {
			return network{}, err
		}
		addr, err := o.attach(ctx, h, c)
		if err != nil {
			return network{}, err
		}
		ends = append(ends, end{c.space, addr})
	}
	o.remote = ends[1].addr
	for _, e := range ends[1:] {
		if err := o.nodes[1].waitAnswer(ctx, ends[0].space, e.addr); err != nil {
			return network{}, err
		}
	}
	var published *path
	if spec == oursMain {
		var err error
		if published, err = o.publish(ctx, peerOurs, false); err != nil {
			return network{}, err
		}
	}
	return network{
		published: published,

		overlay:  &path{peer: peerOurs, a: ends[0], b: ends[1], daemons: o.nodes[:]},
		egress:   &path{peer: peerOurs, a: ends[0], b: l.h2.end(), daemons: o.nodes[:1]},
		egress2:  &path{peer: peerOurs, a: ends[1], b: l.h1.end(), daemons: o.nodes[1:]},
		sameNode: &path{peer: peerOurs, a: ends[0], b: ends[2], daemons: o.nodes[:1]},
		ours:     o,
		cards: &cards{
			attach: func(ctx context.Context, c *container) (func(), error) {
				_, err := o.attach(ctx, l.h1, c)
				return func() {}, err
			},
			target: func() netip.Addr { return o.remote },
		},
	}, nil
}

// withRmemMax runs fn with that net.core.rmem_max.
func withRmemMax(bytes int, fn func() error) error {
	before, err := keepSysctls(sysctlRmemMax)
	if err != nil {
		return err
	}
	if err := writeSysctl(sysctlRmemMax, strconv.Itoa(bytes)); err != nil {
		return err
	}
	return errors.Join(fn(), before.restore())
}

func (o *ours) startNodes(ctx context.Context) error {
	store := fmt.Sprintf("%s:%d", o.lab.h1.addr, o.spec.etcdPort)
	for i, h := range []*host{o.lab.h1, o.lab.h2} {
		args := []string{"--port", strconv.Itoa(o.spec.port), "--network", o.spec.network}
		if i == 0 {
			args = append(args, "--listen-etcd", store)
		} else {
			args = append(args, "--etcd-endpoints", "http://"+store)
		}
		var err error
		if o.nodes[i], err = o.startNode(ctx, h, args...); err != nil {
			return err
		}
	}
	for i, h := range []*host{o.lab.h1, o.lab.h2} {
		if err := o.waitPeers(ctx, h, o.nodes[i], 1); err != nil {
			return err
		}
	}
	return nil
}

// startNode starts a node of the overlay on a host and waits until it is ready.
func (o *ours) startNode(ctx context.Context, h *host, args ...string) (*process, error) {
	args = o.args(h, append([]string{"up", "--iface", uplink}, args...)...)
	node, err := o.lab.launch(h.space, o.spec.name+"-"+h.name, o.lab.command(true, h.home, o.lab.program, args...))
	if err != nil {
		return nil, err
	}
	if err := o.waitPeers(ctx, h, node, 0); err != nil {
		return nil, err
	}
	return node, node.checkUnprivileged()
}

// waitPeers waits until the node is ready and knows that many peers.
func (o *ours) waitPeers(ctx context.Context, h *host, node *process, peers int) error {
	return waitFor(ctx, 20*time.Second, node, func() error {
		var status struct {
			State string `json:"state"`
			Peers int    `json:"peers"`
		}
		if err := o.cli(ctx, h, &status, "status"); err != nil {
			return err
		}
		if status.State != "ready" || status.Peers < peers {
			return fmt.Errorf("state %s, %d peers", status.State, status.Peers)
		}
		return nil
	})
}

// attach attaches a container of a host, with further flags.
func (o *ours) attach(ctx context.Context, h *host, c *container, flags ...string) (netip.Addr, error) {
	o.attached++
	var attachment struct {
		Addr netip.Prefix `json:"addr"`
	}
	err := o.cli(ctx, h, &attachment, append([]string{"attach", c.pidText(), "--name", fmt.Sprintf("%s-%d", c.name, o.attached)}, flags...)...)
	return attachment.Addr.Addr(), err
}

// args adds the directories of this overlay on the host.
func (o *ours) args(h *host, args ...string) []string {
	dir := filepath.Join(h.home, o.spec.name)
	return append(args, "--runtime-dir", filepath.Join(dir, "run"), "--state-dir", filepath.Join(dir, "state"))
}

// cli runs rootless-ovl as the host's user and decodes its answer.
func (o *ours) cli(ctx context.Context, h *host, into any, args ...string) error {
	cmd := o.lab.command(true, h.home, o.lab.program, append(o.args(h, args...), "--output", "json")...)
	limit := time.AfterFunc(commandLimit, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	out, err := h.output(cmd)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}
