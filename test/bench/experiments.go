// This file is the catalogue: which rows there are, between which peers, and how each is measured.

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"
)

// row is a line of the report.
type row struct{ name, unit, about string }

// readings are what one measurement of one peer gives, by row. A row may be absent.
type readings map[reading]float64

// reading is a row, and a peer where it is another than the path's.
type reading struct{ row, peer string }

// experiment measures one or more rows.
type experiment struct {
	rows  []row
	peers []string // in the report's order
	// baselines are the peers to compute ratios against.
	baselines []string
	wanted    float64 // of the first row over nic-like, rootless-ovl's ratio to the first baseline; 0: nothing is laid down
	steady    bool    // its lowest run over its median is told
	once      bool    // the underlay makes no difference: measure on one only
	// path picks what to measure between, of a started peer; nil where peers come from open.
	path func(network) *path
	// open, where set, makes paths that only this experiment needs. It runs before the first round.
	open    func(ctx context.Context, b *bench, l *lab) ([]*path, error)
	measure func(ctx context.Context, b *bench, l *lab, p *path) (readings, error)
}

var (
	overlayPeers = []string{peerBare, peerVXLAN, peerNebula, peerOurs}
	egressPeers  = []string{peerBare, peerSlirp, peerPasta, peerPasta1500, peerOurs}
	natPeers     = []string{peerBare, peerSlirp, peerPasta, peerOurs}
	natBases     = []string{peerBare, peerPasta}
	publishPeers = []string{peerBare, peerKit, peerKitSlirp, peerPastaT, peerOursStack, peerOurs}
	overlayBases = []string{peerBare, peerVXLAN}
	egressBases  = []string{peerPasta1500, peerSlirp, peerPasta}
	publishBases = []string{peerKit, peerKitSlirp}
)

func overlayPath(n network) *path { return n.overlay }
func egressPath(n network) *path  { return n.egress }

// catalogue is every experiment, in the report's order.
var catalogue = []experiment{
	{
		rows: []row{
			{"overlay-tcp-1", "Gbit/s", "TCP from a container of host 1 to one of host 2, one stream"},
			{"overlay-tcp-1-retransmits", "segments", "TCP segments sent again in that time"},
			{"cpu-per-gb", "CPU s/GB", "CPU seconds of the peer's own processes on both hosts, per GB of that"},
			{"cpu-per-gb-machine", "CPU s/GB", "CPU seconds of the whole machine, per GB of that"},
		},
		peers: overlayPeers, baselines: overlayBases, path: overlayPath,
		measure: measureTCP(tcpLoad{streams: 1}, "overlay-tcp-1"),
	},
	{
		rows:  []row{{"overlay-tcp-1-reverse", "Gbit/s", "TCP the other way, one stream"}},
		peers: overlayPeers, baselines: overlayBases, path: overlayPath,
		measure: measureTCP(tcpLoad{streams: 1, reverse: true}, "overlay-tcp-1-reverse"),
	},
	{
		rows:  []row{{"overlay-tcp-4", "Gbit/s", "TCP, four streams"}},
		peers: overlayPeers, baselines: overlayBases, path: overlayPath,
		measure: measureTCP(tcpLoad{streams: 4}, "overlay-tcp-4"),
	},
	udpExperiment(1400, false),
	udpExperiment(64, false),
	udpExperiment(1400, true),
	udpExperiment(64, true),
	{
		rows: []row{
			{"overlay-rtt-p50", "us", "TCP request and response of one byte, client and server on different CPUs"},
			{"overlay-rtt-p99", "us", "the same, slowest of a hundred"},
		},
		peers: overlayPeers, baselines: overlayBases, path: overlayPath, measure: measureRTT("overlay-rtt"),
	},
	memberExperiment("from a rootless container to one on a flannel host", 1, false),
	memberExperiment("from a container on a flannel host to a rootless one", 1, true),
	memberExperiment("from a rootless container to one on a flannel host", 4, false),
	memberExperiment("from a container on a flannel host to a rootless one", 4, true),
	{
		rows:  []row{{"egress-tcp-up", "Gbit/s", "TCP from a container of host 1 to host 2 itself, one stream"}},
		peers: egressPeers, baselines: egressBases, steady: true, path: egressPath,
		measure: measureTCP(tcpLoad{streams: 1}, "egress-tcp-up"),
	},
	{
		rows:  []row{{"egress-tcp-down", "Gbit/s", "the other way, one stream"}},
		peers: egressPeers, baselines: egressBases, steady: true, path: egressPath,
		measure: measureTCP(tcpLoad{streams: 1, reverse: true}, "egress-tcp-down"),
	},
	{
		rows:  []row{{"egress-tcp-4", "Gbit/s", "from the container, four streams"}},
		peers: egressPeers, baselines: egressBases, steady: true, path: egressPath,
		measure: measureTCP(tcpLoad{streams: 4}, "egress-tcp-4"),
	},
	{
		rows: []row{
			{"egress-rtt-p50", "us", "TCP request and response of one byte from a container to host 2 itself"},
			{"egress-rtt-p99", "us", "the same, slowest of a hundred"},
		},
		peers: natPeers, baselines: natBases, once: true, path: egressPath, measure: measureRTT("egress-rtt"),
	},
	connsExperiment("nat-conns", "from a container to host 2 itself", 16, natPeers, natBases, egressPath),
	connsExperiment("nat-conns", "from a container to host 2 itself", 1, natPeers, natBases, egressPath),
	{
		rows: []row{
			{"nat-long-conns", "conn/s", "the same, 100,000 to one port, 16 at a time, in one go"},
			{"nat-long-conns-end", "of start", "the rate of the last tenth over that of the first"},
		},
		peers: []string{peerOurs}, once: true, path: egressPath, measure: measureManyConns,
	},
	{
		rows:  []row{{"nat-idle-flow", "KB", "resident memory of the daemon for each of 3,000 idle TCP connections of a container"}},
		peers: []string{peerSlirp, peerPasta, peerOurs}, once: true, path: egressPath, measure: measureIdleFlows,
	},
	publishedTCP("published-tcp-in", "TCP from host 2 to a published port of a container of host 1, one stream", tcpLoad{streams: 1}),
	publishedTCP("published-tcp-out", "the other way, one stream", tcpLoad{streams: 1, reverse: true}),
	publishedTCP("published-tcp-4", "to the container, four streams", tcpLoad{streams: 4}),
	connsExperiment("published-conns", "from host 2 to a published port", 16, publishPeers, publishBases, publishedPath),
	connsExperiment("published-conns", "from host 2 to a published port", 1, publishPeers, publishBases, publishedPath),
	{
		rows:  []row{{"same-node-tcp", "Gbit/s", "TCP between two containers of one host, one stream"}},
		peers: []string{peerBridge, peerOurs}, baselines: []string{peerBridge}, once: true,
		path:    func(n network) *path { return n.sameNode },
		measure: measureTCP(tcpLoad{streams: 1}, "same-node-tcp"),
	},
	fairnessExperiment("overlay", "from a container of host 1 to one of host 2", overlayPath),
	fairnessExperiment("same-node", "between two containers of host 1", func(n network) *path { return n.sameNode }),
	fairnessExperiment("egress", "from a container of host 1 to host 2 itself", egressPath),
	{
		rows: []row{
			{"rmem-212992", "Gbit/s", "overlay-tcp-1 of nodes that started with net.core.rmem_max at 212992"},
			{"rmem-212992-retransmits", "segments", "TCP segments sent again in that time"},
		},
		peers: []string{peerOursBuffers, peerOurs}, baselines: []string{peerOursBuffers}, open: openStock,
		measure: measureTCP(tcpLoad{streams: 1}, "rmem-212992"),
	},
	{
		rows:  []row{{"attach-p50", "ms", "from the command to the container's first answered ping"}},
		peers: []string{peerSlirp, peerPasta, peerOurs}, once: true,
		path: egressPath, measure: measureAttach,
	},
	engineExperiment("podman-run", "podman", openPodman),
	engineExperiment("docker-run", "docker", openDocker),
	{
		rows: []row{
			{"rss-peak", "MB", "highest resident set of a daemon under TCP, UDP and egress load at once (nebula: no egress)"},
			{"rss-after", "MB", "its resident set some seconds after the load"},
		},
		peers: []string{peerNebula, peerOursEtcd, peerOurs}, once: true, path: overlayPath, measure: measureMemory,
		open: func(ctx context.Context, b *bench, l *lab) ([]*path, error) {
			return b.paths(ctx, l, []string{peerNebula, peerOurs}, overlayPath)
		},
	},
}

// measureTCP measures the row, and with it what it costs: rows with the suffix -retransmits, and cpu-per-gb.
func measureTCP(load tcpLoad, row string) func(context.Context, *bench, *lab, *path) (readings, error) {
	return func(ctx context.Context, b *bench, _ *lab, p *path) (readings, error) {
		load.seconds = b.seconds
		ownBefore, err := cpuTime(p.daemons)
		if err != nil {
			return nil, err
		}
		allBefore, err := machineTime()
		if err != nil {
			return nil, err
		}
		result, err := iperf(ctx, p.a, p.b, load)
		if err != nil {
			return nil, err
		}
		own, err := cpuTime(p.daemons)
		if err != nil {
			return nil, err
		}
		all, err := machineTime()
		if err != nil {
			return nil, err
		}
		values := readings{
			{row: row}:                  result.gbits,
			{row: row + "-retransmits"}: result.retransmits,
			{row: "cpu-per-gb-machine"}: (all - allBefore).Seconds() / result.gigabytes,
		}
		if len(p.daemons) > 0 {
			values[reading{row: "cpu-per-gb"}] = (own - ownBefore).Seconds() / result.gigabytes
		}
		return values, nil
	}
}

// memberExperiment measures TCP between a container of ours and one on a host whose kernel is set up as flannel does it, beside
// two such hosts.
func memberExperiment(about string, streams int, reverse bool) experiment {
	name := fmt.Sprintf("stock-vxlan-tcp-%d", streams)
	if reverse {
		name += "-reverse"
	}
	return experiment{
		rows: []row{
			{name, "Gbit/s", fmt.Sprintf("TCP %s, streams: %d", about, streams)},
			{name + "-retransmits", "segments", "TCP segments sent again in that time"},
		},
		peers: []string{peerVXLAN, peerOurs}, baselines: []string{peerVXLAN}, wanted: 0.5, open: openMember,
		measure: measureTCP(tcpLoad{streams: streams, reverse: reverse}, name),
	}
}

// openMember's paths have the flannel host in common.
func openMember(ctx context.Context, b *bench, l *lab) ([]*path, error) {
	kernel, err := l.peer(ctx, peerVXLAN)
	if err != nil {
		return nil, err
	}
	member, err := l.peer(ctx, peerMember)
	if err != nil {
		return nil, err
	}
	return []*path{kernel.overlay, member.overlay}, nil
}

// The rate search of the UDP rows.
const (
	udpPort      = 5301
	trialLength  = 250 * time.Millisecond
	doubleLength = 500 * time.Millisecond // at twice the rate
	trialSettle  = 40 * time.Millisecond  // for what is on its way
	maxSearches  = 2
)

var udpSearch = rateSearch{first: 60_000, lowest: 500, maxLoss: 0.01, width: 1.06, probes: 12}

func udpExperiment(size int, gso bool) experiment {
	name, how := fmt.Sprintf("overlay-udp-%d", size), "single datagrams"
	if gso {
		name, how = name+"-gso", "UDP GSO sends"
	}
	return experiment{
		rows: []row{
			{name, "kpps", fmt.Sprintf("highest rate of %d-byte UDP payloads with less than 1%% loss, %s", size, how)},
			{name + "-at-2x", "of max", "rate delivered when twice that rate is sent, over that rate"},
		},
		peers: overlayPeers, baselines: overlayBases, path: overlayPath,
		measure: func(ctx context.Context, _ *bench, _ *lab, p *path) (readings, error) {
			return measureUDP(ctx, p, name, size, gso)
		},
	}
}

func measureUDP(ctx context.Context, p *path, name string, size int, gso bool) (readings, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	u, err := openUDP(ctx, p, size, gso)
	if err != nil {
		return nil, err
	}
	defer u.close()
	if _, err := u.try(10_000, trialLength); err != nil { // warm
		return nil, err
	}
	var best, twice trial
	search := udpSearch
	for range maxSearches {
		if best, err = search.find(func(rate float64) (trial, error) { return u.try(rate, trialLength) }); err != nil {
			return nil, err
		}
		if twice, err = u.try(2*best.offered, doubleLength); err != nil {
			return nil, err
		}
		if twice.loss() >= search.maxLoss || twice.delivered < 1.1*best.delivered {
			break
		}
		search.first = twice.offered // something else held the search up: what it found was not the limit
	}
	return readings{{row: name}: best.delivered / 1000, {row: name + "-at-2x"}: twice.delivered / best.delivered}, nil
}

// udpPair is a sender and a receiver on a path.
type udpPair struct {
	sender, receiver *generator
	trials           int
}

func openUDP(ctx context.Context, p *path, size int, gso bool) (*udpPair, error) {
	args := []string{"--addr", fmt.Sprintf("%s:%d", p.b.addr, udpPort), "--size", strconv.Itoa(size), "--gso=" + strconv.FormatBool(gso)}
	receiver, err := serve(ctx, p.b, append([]string{"udp-receive"}, args...)...)
	if err != nil {
		return nil, err
	}
	sender, err := generate(ctx, p.a, append([]string{"udp-send"}, args...)...)
	if err != nil {
		receiver.close()
		return nil, err
	}
	return &udpPair{sender: sender, receiver: receiver}, nil
}

// try sends at a rate, in packets per second.
func (u *udpPair) try(rate float64, length time.Duration) (trial, error) {
	u.trials++
	var s sent
	if err := u.sender.ask(&s, fmt.Sprintf("%d %.0f %d", u.trials, rate, length.Milliseconds())); err != nil {
		return trial{}, err
	}
	time.Sleep(trialSettle)
	var r received
	if err := u.receiver.ask(&r, strconv.Itoa(u.trials)); err != nil {
		return trial{}, err
	}
	return trial{offered: float64(s.Packets) / s.Seconds, delivered: float64(r.Packets) / s.Seconds}, nil
}

func (u *udpPair) close() {
	u.sender.close()
	u.receiver.close()
}

// rttPort, rttSeconds, connsPort and connsSeconds are those of the load generators.
const (
	rttPort      = 5401
	rttSeconds   = 2
	connsPort    = 5501
	connsSeconds = 2
)

func measureRTT(name string) func(context.Context, *bench, *lab, *path) (readings, error) {
	return func(ctx context.Context, _ *bench, _ *lab, p *path) (readings, error) {
		ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
		defer cancel()
		addr := fmt.Sprintf("%s:%d", p.b.addr, rttPort)
		server, err := serve(ctx, p.b, "rtt-serve", "--addr", addr, "--cpu", "1")
		if err != nil {
			return nil, err
		}
		defer server.close()
		client, err := generate(ctx, p.a, "rtt", "--addr", addr, "--cpu", "0", "--seconds", strconv.Itoa(rttSeconds))
		if err != nil {
			return nil, err
		}
		defer client.close()
		var trips roundTrips
		if err := client.ask(&trips, ""); err != nil {
			return nil, err
		}
		return readings{{row: name + "-p50"}: trips.P50, {row: name + "-p99"}: trips.P99}, nil
	}
}

// connsExperiment measures connections that the server closes, some at a time.
func connsExperiment(name, about string, workers int, peers, bases []string, pick func(network) *path) experiment {
	name = fmt.Sprintf("%s-%d", name, workers)
	return experiment{
		rows:  []row{{name, "conn/s", fmt.Sprintf("TCP connections %s, %d at a time, closed by the server", about, workers)}},
		peers: peers, baselines: bases, once: true, path: pick,
		measure: func(ctx context.Context, b *bench, _ *lab, p *path) (readings, error) {
			c, err := measureConns(ctx, b, p, name, 20*time.Second, "--workers", strconv.Itoa(workers), "--seconds", strconv.Itoa(connsSeconds))
			if err != nil {
				return nil, err
			}
			return readings{{row: name}: float64(c.Done) / c.Seconds}, nil
		},
	}
}

// measureConns runs the connections' generator with these flags on a path.
func measureConns(ctx context.Context, b *bench, p *path, name string, limit time.Duration, flags ...string) (connections, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	port := connsPort
	if p.port != 0 {
		port = p.port + 1
	}
	// A container whose port is published does not have the address that it is reached by.
	server, err := serve(ctx, p.b, "conns-serve", "--addr", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return connections{}, err
	}
	defer server.close()
	client, err := generate(ctx, p.a, append([]string{"conns", "--addr", fmt.Sprintf("%s:%d", p.b.addr, port)}, flags...)...)
	if err != nil {
		return connections{}, err
	}
	defer client.close()
	var c connections
	if err := client.ask(&c, ""); err != nil {
		return c, err
	}
	if c.Failed > 0 {
		b.note("%s through %s: %d of %d connections failed, the first: %s", name, p.peer, c.Failed, c.Done+c.Failed, c.Error)
	}
	return c, nil
}

// The long run of connections, and how many of its length a tenth is.
const (
	manyConns      = 100_000
	manyConnsLimit = 2 * time.Minute
)

func measureManyConns(ctx context.Context, b *bench, _ *lab, p *path) (readings, error) {
	c, err := measureConns(ctx, b, p, "nat-long-conns", manyConnsLimit, "--workers", "16", "--count", strconv.Itoa(manyConns), "--ports", "1")
	if err != nil {
		return nil, err
	}
	return readings{{row: "nat-long-conns"}: float64(c.Done) / c.Seconds, {row: "nat-long-conns-end"}: c.FirstTenth / c.LastTenth}, nil
}

// idleFlows is how many idle connections are held: less than the share of one container where 20,000 files may be open.
const idleFlows = 3000

func measureIdleFlows(ctx context.Context, _ *bench, _ *lab, p *path) (readings, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	addr := fmt.Sprintf("%s:%d", p.b.addr, connsPort)
	server, err := serve(ctx, p.b, "hold-serve", "--addr", addr)
	if err != nil {
		return nil, err
	}
	defer server.close()
	_, before, err := p.daemons[0].memory()
	if err != nil {
		return nil, err
	}
	client, err := serve(ctx, p.a, "hold", "--addr", addr, "--count", strconv.Itoa(idleFlows))
	if err != nil {
		return nil, err
	}
	defer client.close()
	_, after, err := p.daemons[0].memory()
	if err != nil {
		return nil, err
	}
	return readings{{row: "nat-idle-flow"}: (after - before) / 1024 / idleFlows}, nil
}

// openStock starts a second overlay with the stock receive buffer.
func openStock(ctx context.Context, b *bench, l *lab) ([]*path, error) {
	large, err := l.peer(ctx, peerOurs)
	if err != nil {
		return nil, err
	}
	stock, err := l.startOurs(ctx, oursStock)
	if err != nil {
		return nil, fmt.Errorf("rootless-ovl with rmem_max %d: %w", stockRmemMax, err)
	}
	baseline := *large.overlay
	baseline.peer = peerOursBuffers
	return []*path{&baseline, stock.overlay}, nil
}

// attachTimes is how many containers are attached in a round.
const attachTimes = 9

func measureAttach(ctx context.Context, _ *bench, l *lab, p *path) (readings, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	n, err := l.peer(ctx, p.peer)
	if err != nil {
		return nil, err
	}
	var times []time.Duration
	for range attachTimes {
		t, err := attachOnce(ctx, l, n.cards)
		if err != nil {
			return nil, err
		}
		times = append(times, t)
	}
	slices.Sort(times)
	return readings{{row: "attach-p50"}: microseconds(percentile(times, 50)) / 1000}, nil
}

// attachOnce is the time from the command to the first answered ping, of a new container of host 1.
func attachOnce(ctx context.Context, l *lab, a *cards) (time.Duration, error) {
	c, err := l.newContainer(ctx, l.h1, "new")
	if err != nil {
		return 0, err
	}
	defer c.release()
	type answered struct {
		at  time.Time
		err error
	}
	answer := make(chan answered, 1)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	go func() {
		at, err := firstAnswer(ctx, c.space, a.target())
		answer <- answered{at, err}
	}()
	begin := time.Now()
	stop, err := a.attach(ctx, c)
	if err != nil {
		cancel()
		<-answer
		return 0, err
	}
	defer stop()
	first := <-answer
	return first.at.Sub(begin), first.err
}

// How long the load of the memory rows takes, and the rest after it.
const (
	memorySeconds = 3
	memoryRest    = 8 * time.Second
)

// measureMemory loads a peer with everything at once and looks at its daemons' memory.
func measureMemory(ctx context.Context, _ *bench, l *lab, p *path) (readings, error) {
	n, err := l.peer(ctx, p.peer)
	if err != nil {
		return nil, err
	}
	for _, d := range p.daemons {
		if err := d.resetPeak(); err != nil {
			return nil, err
		}
	}
	tcp := func(p *path, port int, reverse bool) func() error {
		return func() error {
			_, err := iperf(ctx, p.a, p.b, tcpLoad{streams: 4, reverse: reverse, seconds: memorySeconds, port: port})
			return err
		}
	}
	load := []func() error{
		tcp(p, iperfPort, false), tcp(p, iperfPort+1, true), func() error { return flood(ctx, p, memorySeconds*time.Second) },
	}
	if n.egress != nil && n.egress2 != nil {
		load = append(load, tcp(n.egress, iperfPort+2, false), tcp(n.egress2, iperfPort+3, true))
	}
	if err := together(load); err != nil {
		return nil, err
	}
	values := readings{}
	read := func(row string, of func(*process) (float64, error)) error {
		for i, d := range p.daemons {
			bytes, err := of(d)
			if err != nil {
				return err
			}
			where := reading{row: row}
			if n.ours != nil && i == 0 {
				where.peer = peerOursEtcd
			}
			values[where] = max(values[where], bytes/1e6)
		}
		return nil
	}
	if err := read("rss-peak", func(d *process) (float64, error) { peak, _, err := d.memory(); return peak, err }); err != nil {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(memoryRest):
	}
	err = read("rss-after", func(d *process) (float64, error) { _, now, err := d.memory(); return now, err })
	return values, err
}

// flood sends small datagrams as fast as it goes.
func flood(ctx context.Context, p *path, length time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, length+10*time.Second)
	defer cancel()
	u, err := openUDP(ctx, p, 64, false)
	if err != nil {
		return err
	}
	defer u.close()
	_, err = u.try(1e6, length)
	return err
}

// together runs all functions at once and waits for them.
func together(fns []func() error) error {
	var wg sync.WaitGroup
	errs := make([]error, len(fns))
	for i, fn := range fns {
		wg.Go(func() { errs[i] = fn() })
	}
	wg.Wait()
	return errors.Join(errs...)
}
