// This file publishes ports of a container of host 1, so that host 2 reaches it: RootlessKit's two port drivers, pasta, and ours by
// each of its ways.

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The published ports of a peer, the same on the host and in the container: iperf3's, and behind it those of the connections. Each peer has
// some of its own, since all are there at once.
const (
	publishedFirst = 5600
	publishedEach  = 1 + connsPorts
)

// publishedPort is a peer's first port.
func publishedPort(peer string) int {
	return publishedFirst + publishedEach*slices.Index(publishPeers, peer)
}

// publishedPorts are all of a peer's.
func publishedPorts(peer string) []string {
	var ports []string
	for i := range publishedEach {
		ports = append(ports, strconv.Itoa(publishedPort(peer)+i))
	}
	return ports
}

// markedRule takes what a published port's socket in the container's namespace marks off its way, so that a node cannot use such sockets
// and goes through its stack: see nsutil/inside.go.
const markedRule = "rule add priority 1 fwmark 0x6f760000/0xffff0000 lookup main"

// startRootlessKit starts a namespace of RootlessKit's with a port driver.
func (l *lab) startRootlessKit(ctx context.Context, name, driver string) (network, error) {
	if err := subordinateIDs(l.uid); err != nil {
		return network{}, err
	}
	state := filepath.Join(l.h1.home, name)
	args := []string{"--state-dir", state, "--net=slirp4netns", "--mtu=65520", "--disable-host-loopback", "--copy-up=/etc", "--port-driver=" + driver}
	for _, port := range publishedPorts(name) {
		args = append(args, "-p", fmt.Sprintf("0.0.0.0:%s:%s/tcp", port, port))
	}
	p, err := l.launch(l.h1.space, name, l.command(true, l.h1.home, "rootlesskit", append(args, "sleep", "infinity")...))
	if err != nil {
		return network{}, err
	}
	var child int
	if err := waitFor(ctx, 20*time.Second, p, func() error {
		text, err := os.ReadFile(filepath.Join(state, "child_pid"))
		if err != nil {
			return err
		}
		if child, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
			return err
		}
		_, err = os.Stat(filepath.Join(state, "api.sock")) // there when the ports are
		return err
	}); err != nil {
		return network{}, err
	}
	s, err := spaceOf(name, child)
	if err != nil {
		return network{}, err
	}
	l.onClose(s.close)
	return network{published: &path{peer: name, a: l.h2.end(), b: end{s, l.h1.addr}, port: publishedPort(name), daemons: []*process{p}}}, nil
}

// subordinateIDs says whether RootlessKit can map a range of uids.
func subordinateIDs(uid int) error {
	text, err := os.ReadFile("/etc/subuid")
	if err != nil {
		return fmt.Errorf("%w: rootlesskit needs /etc/subuid", errMissing)
	}
	name := userName(uid)
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, name+":") || strings.HasPrefix(line, strconv.Itoa(uid)+":") {
			return nil
		}
	}
	return fmt.Errorf("%w: rootlesskit needs a user with subordinate uids: sudo -u USER sudo make bench, or ARGS='-uid UID'", errMissing)
}

func userName(uid int) string {
	text, _ := os.ReadFile("/etc/passwd")
	for line := range strings.Lines(string(text)) {
		if fields := strings.Split(line, ":"); len(fields) > 2 && fields[2] == strconv.Itoa(uid) {
			return fields[0]
		}
	}
	return strconv.Itoa(uid)
}

// startPastaPublished starts pasta with a container's ports.
func (l *lab) startPastaPublished(ctx context.Context) (network, error) {
	c, err := l.newContainer(ctx, l.h1, "behind-pasta-t")
	if err != nil {
		return network{}, err
	}
	args := pastaCommand(c, bigMTU)
	ports := []string{"-t", strings.Join(publishedPorts(peerPastaT), ",")}
	args = append(args[:len(args)-1], append(ports, c.pidText())...)
	p, err := l.launch(l.h1.space, peerPastaT, l.command(true, l.h1.home, args[0], args[1:]...))
	if err != nil {
		return network{}, err
	}
	if err := p.waitAnswer(ctx, c.space, l.h2.addr); err != nil {
		return network{}, err
	}
	return network{published: &path{peer: peerPastaT, a: l.h2.end(), b: end{c.space, l.h1.addr}, port: publishedPort(peerPastaT), daemons: []*process{p}}}, nil
}

// startPublished is the main overlay with ports published by its gateway's stack.
func (l *lab) startPublished(ctx context.Context, name string) (network, error) {
	main, err := l.peer(ctx, peerOurs)
	if err != nil {
		return network{}, err
	}
	p, err := main.ours.publish(ctx, name, true)
	return network{published: p}, err
}

// publish attaches a container of host 1 with its ports published. stack: by the gateway's stack.
func (o *ours) publish(ctx context.Context, name string, stack bool) (*path, error) {
	l := o.lab
	c, err := l.newContainer(ctx, l.h1, "published-"+name)
	if err != nil {
		return nil, err
	}
	if stack {
		if err := c.ip(ctx, markedRule); err != nil {
			return nil, err
		}
	}
	var flags []string
	for _, port := range publishedPorts(name) {
		flags = append(flags, "-p", port+":"+port)
	}
	if _, err := o.attach(ctx, l.h1, c, flags...); err != nil {
		return nil, err
	}
	return &path{peer: name, a: l.h2.end(), b: end{c.space, l.h1.addr}, port: publishedPort(name), daemons: o.nodes[:1]}, nil
}

func publishedPath(n network) *path { return n.published }

// publishedTCP measures TCP through a published port: in is to the container.
func publishedTCP(name, about string, load tcpLoad) experiment {
	return experiment{
		rows:  []row{{name, "Gbit/s", about}},
		peers: publishPeers, baselines: publishBases, once: true, path: publishedPath,
		measure: func(ctx context.Context, b *bench, l *lab, p *path) (readings, error) {
			load := load
			load.port = p.port
			values, err := measureTCP(load, name)(ctx, b, l, p)
			if err != nil {
				return nil, err
			}
			return readings{{row: name}: values[reading{row: name}]}, nil
		},
	}
}
