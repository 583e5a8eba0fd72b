// This file is the rows about fairness: what one container keeps of its path while another of the same node floods.

package main

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"time"
)

// The columns of the fairness rows are floods, by the container beside. Some cost the daemon as much as they can, others the path.
const (
	floodSmall    = "small UDP to a peer"
	floodLarge    = "UDP superpackets to a peer"
	floodTCP      = "TCP to a peer, 8 streams"
	floodSameNode = "small UDP on the node"
	floodEgress   = "small UDP to the outside"
	floodFlows    = "a UDP flow a packet to the outside"
	floodNowhere  = "small UDP to nobody"
	floodBeside   = "small UDP, not through the daemon" // what the flooder's share of the CPUs alone does
)

// floods are the columns but for the one without, which is rootless-ovl's.
var floods = []string{floodBeside, floodSmall, floodLarge, floodTCP, floodSameNode, floodEgress, floodFlows, floodNowhere}

// Ports of the measurement and of the floods.
const (
	fairPort     = 5601
	floodPort    = 5701
	floodFlowsOf = 5000 // ports
	floodSettle  = 300 * time.Millisecond
	floodSeconds = 60 // at most
	fairPingTime = 2.0
)

// nobody is an address of the network's that no container has.
var nobody = netip.MustParseAddr("10.210.255.254")

func fairnessExperiment(name, about string, pick func(network) *path) experiment {
	row1 := "fairness-" + name
	return experiment{
		rows: []row{
			{row1 + "-ping", "us", "p99 of pings every 2 ms " + about + ", alone and while a container beside floods"},
			{row1 + "-ping-lost", "of 1000", "of these, those without an answer"},
			{row1 + "-tcp", "Gbit/s", "TCP " + about + ", one stream, likewise"},
			{row1 + "-tcp-share", "of alone", "the same, of what it is alone"},
		},
		peers: append([]string{peerOurs}, floods...), once: true,
		open: func(ctx context.Context, _ *bench, l *lab) ([]*path, error) {
			n, err := l.peer(ctx, peerOurs)
			if err != nil {
				return nil, err
			}
			p := pick(n)
			return []*path{p}, nil
		},
		measure: func(ctx context.Context, b *bench, l *lab, p *path) (readings, error) {
			return measureFairness(ctx, b, l, p, row1)
		},
	}
}

// measureFairness measures a path alone and under each flood.
func measureFairness(ctx context.Context, b *bench, l *lab, p *path, name string) (readings, error) {
	f, err := l.flooder(ctx)
	if err != nil {
		return nil, err
	}
	values := readings{}
	var alone float64
	for _, flood := range append([]string{peerOurs}, floods...) {
		stop := func() {}
		if flood != peerOurs {
			if stop, err = f.flood(ctx, flood); err != nil {
				return nil, fmt.Errorf("flood of %s: %w", flood, err)
			}
		}
		r, err := measureBeside(ctx, b, p)
		stop()
		if err != nil {
			b.note("%s under %s: %v", name, flood, err)
			continue
		}
		if flood == peerOurs {
			alone = r.gbits
		}
		values[reading{name + "-ping", flood}] = r.p99
		values[reading{name + "-ping-lost", flood}] = r.lost
		values[reading{name + "-tcp", flood}] = r.gbits
		values[reading{name + "-tcp-share", flood}] = r.gbits / alone
	}
	return values, nil
}

// besideResult is what a path gives. p99 is in microseconds, lost of a thousand.
type besideResult struct{ p99, lost, gbits float64 }

func measureBeside(ctx context.Context, b *bench, p *path) (besideResult, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	pinger, err := generate(ctx, p.a, "ping", "--addr", netip.AddrPortFrom(p.b.addr, 0).String(), "--seconds", fmt.Sprint(fairPingTime))
	if err != nil {
		return besideResult{}, err
	}
	defer pinger.close()
	var r pinged
	if err := pinger.ask(&r, ""); err != nil {
		return besideResult{}, err
	}
	tcp, err := iperf(ctx, p.a, p.b, tcpLoad{streams: 1, seconds: b.seconds, port: fairPort})
	if err != nil {
		return besideResult{}, err
	}
	return besideResult{p99: r.P99, lost: 1000 * float64(r.Lost) / float64(r.Sent), gbits: tcp.gbits}, nil
}

// flooder is a container of host 1, and a namespace beside the network whose packets go nowhere.
type flooder struct {
	lab    *lab
	inside end
	peer   end // on host 2
	other  end // on host 1
	beside *space
}

// flooder makes it when it is first asked for.
func (l *lab) flooder(ctx context.Context) (*flooder, error) {
	if l.fairness != nil {
		return l.fairness, nil
	}
	n, err := l.peer(ctx, peerOurs)
	if err != nil {
		return nil, err
	}
	c, err := l.newContainer(ctx, l.h1, "flooder")
	if err != nil {
		return nil, err
	}
	addr, err := n.ours.attach(ctx, l.h1, c)
	if err != nil {
		return nil, err
	}
	s, err := l.newSpace("beside")
	if err != nil {
		return nil, err
	}
	if err := s.ip(ctx, "link add v0 type veth peer name v1", "addr add 192.0.2.1/24 dev v0", "link set v0 up", "link set v1 up",
		"neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev v0"); err != nil {
		return nil, err
	}
	l.fairness = &flooder{lab: l, inside: end{c.space, addr}, peer: n.overlay.b, other: n.sameNode.b, beside: s}
	return l.fairness, nil
}

// flood begins a flood; stop ends it.
func (f *flooder) flood(ctx context.Context, name string) (stop func(), err error) {
	from, to := f.inside, f.peer.addr
	flags := []string{"--size", "16", "--ports", "1"}
	switch name {
	case floodTCP:
		return f.floodTCP(ctx)
	case floodLarge:
		flags = []string{"--size", "1400", "--ports", "1", "--gso"}
	case floodSameNode:
		to = f.other.addr
	case floodEgress:
		to = f.lab.h2.addr
	case floodFlows:
		to = f.lab.h2.addr
		flags[3] = strconv.Itoa(floodFlowsOf)
	case floodNowhere:
		to = nobody
	case floodBeside:
		from, to = end{f.beside, netip.Addr{}}, netip.MustParseAddr("192.0.2.2")
	}
	g, err := generate(ctx, from, append([]string{"udp-flood", "--addr", netip.AddrPortFrom(to, floodPort).String()}, flags...)...)
	if err != nil {
		return nil, err
	}
	time.Sleep(floodSettle)
	return g.close, nil
}

// floodTCP runs iperf3 until stop.
func (f *flooder) floodTCP(ctx context.Context) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// How it ends does not matter: it is cut off.
		_, _ = iperf(ctx, f.inside, f.peer, tcpLoad{streams: 8, seconds: floodSeconds, port: floodPort})
	}()
	time.Sleep(floodSettle)
	return func() { cancel(); <-ended }, nil
}
