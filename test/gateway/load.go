// This file is the cases of load: many connections one after the other, many flows at once, a flood, many questions. They look at what
// fails and at memory, and tell rates, which nobody holds them to: that is test/bench.

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

var loadCases = []testCase{
	{name: "load/short-connections", about: "30,000 connections to one port (-scale: 100,000), 16 at a time, that the server ends: none fails, memory returns", limit: 5 * time.Minute, run: loadShort},
	{name: "load/idle-tcp", about: "10,000 idle connections of two containers are all answered; memory returns within a minute", limit: 4 * time.Minute, run: loadIdleTCP},
	{name: "load/idle-udp", about: "10,000 UDP flows of two containers are all answered; memory returns within a minute", limit: 4 * time.Minute, run: loadIdleUDP},
	{name: "load/syn-flood", about: "a container that floods with SYNs stops nobody else's connections; the drops are counted", limit: 60 * time.Second, run: loadFlood},
	{name: "load/dns", about: "20,000 questions, 64 at a time (A, AAAA, TXT above 512 bytes, NXDOMAIN, TCP): the answers are dnsmasq's own", limit: 2 * time.Minute, run: loadDNS},
}

const (
	manyConnections = 100_000
	someConnections = 30_000 // more than a container has local ports, so that they come round
	manyFlows       = 10_000
	leftoverMemory  = 16 << 20 // bytes that may stay of what a load took
	memoryPerFlow   = 16 << 10 // bytes that an idle TCP flow may take
	memoryReturns   = time.Minute
	flowsAtATime    = 64
	flowContainers  = 2 // a container has a share of the flows, no more
)

// resident is a process's resident memory in bytes.
func resident(t *trial, pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	t.must("memory", err)
	for line := range strings.Lines(string(text)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	t.Fatalf("process %d has no VmRSS", pid)
	return 0
}

func mb(bytes int64) string { return fmt.Sprintf("%.1f MB", float64(bytes)/(1<<20)) }

// returns waits until the daemon's memory is about what it was.
func (s *site) returns(t *trial, before, loaded int64) {
	begin := time.Now()
	now := loaded
	lab.EventuallyWithinOr(t, memoryReturns, func() string {
		return fmt.Sprintf("the daemon's memory returns: %s before, %s under load, %s now", mb(before), mb(loaded), mb(now))
	}, func() bool {
		now = resident(t, s.d.PID)
		return now <= before+leftoverMemory
	})
	note("memory: %s before, %s under load, %s %.0f s after", mb(before), mb(loaded), mb(now), time.Since(begin).Seconds())
}

func loadShort(t *trial, s *site) {
	total := someConnections
	if s.scale {
		total = manyConnections
	}
	to := at(lab.OutsideAddr, s.port())
	listen(t, s.Outside.Space, to, oneByteThenEnd)
	b := s.box(t)
	before := resident(t, s.d.PID)
	var done atomic.Int64
	var tenth, ninth time.Duration // when the first tenth was over, when the last began
	begin := time.Now()
	errs := inParallel(t, 16, total, func(int) error {
		c, err := s.dial(t, b.Space, to)
		if err == nil {
			err = shortConnection(c)
		}
		switch done.Add(1) {
		case int64(total / 10):
			tenth = time.Since(begin)
		case int64(total - total/10):
			ninth = time.Since(begin)
		}
		return err
	})
	took := time.Since(begin)
	if len(errs) > 0 {
		t.Fatalf("%d connections fail, the first: %v", len(errs), errs[0])
	}
	loaded := resident(t, s.d.PID)
	share := float64(total) / 10
	note("%d connections: %.0f a second; %.0f in the first tenth, %.0f in the last", total, float64(total)/took.Seconds(), share/tenth.Seconds(), share/(took-ninth).Seconds())
	s.returns(t, before, loaded)
}

// echoElsewhere is an echo server in a process of its own, since each may open only so many files.
func (s *site) echoElsewhere(t *trial, addr netip.AddrPort) {
	cmd := s.Outside.Command(executable(t), echoCommand, addr.String())
	t.must("server", s.Outside.Start(cmd))
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	lab.EventuallyWithin(t, 10*time.Second, "the server", func() bool {
		c, err := dialWithin(t, s.Outside.Space, addr, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// flows is how many flows of one kind the limit on open files allows: the daemon, this process with the containers' ends, and the servers
// have as many each, and the daemon leaves a part of its own to what is not of that kind (docs/gateway.md).
func flows(t *trial) int {
	var limit unix.Rlimit
	t.must("limit of open files", unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	n := min(manyFlows, int(min(limit.Max, 1<<20))/2)
	if n < manyFlows {
		note("only %d flows: the limit on open files is %d, and %d wanted (ulimit -Hn)", n, limit.Max, 2*manyFlows)
	}
	return n
}

func loadIdleTCP(t *trial, s *site) {
	n := flows(t)
	to := at(lab.OutsideAddr, s.port())
	s.echoElsewhere(t, to)
	var boxes []*box
	for range flowContainers {
		boxes = append(boxes, s.box(t))
	}
	before := resident(t, s.d.PID)
	conns := make([]net.Conn, n)
	defer closeAll(conns)
	errs := inParallel(t, flowsAtATime, n, func(i int) error {
		c, err := boxes[i%len(boxes)].DialContext(t.Context(), "tcp", to.String())
		conns[i] = c
		if err != nil {
			conns[i] = nil
		}
		return err
	})
	if len(errs) > 0 {
		t.Fatalf("%d of %d connections fail, the first: %v", len(errs), n, errs[0])
	}
	answered(t, conns)
	loaded := resident(t, s.d.PID)
	perFlow := (loaded - before) / int64(n)
	note("%d idle connections: %.1f KB each (%s before, %s with them)", n, float64(perFlow)/1024, mb(before), mb(loaded))
	if perFlow > memoryPerFlow {
		t.Errorf("an idle connection takes %.1f KB, want at most %d", float64(perFlow)/1024, memoryPerFlow>>10)
	}
	closeAll(conns)
	s.returns(t, before, loaded)
}

// answered sends a byte on every connection and waits for it.
func answered(t *trial, conns []net.Conn) {
	errs := inParallel(t, flowsAtATime, len(conns), func(i int) error {
		var b [1]byte
		var err error
		for range 4 { // a datagram may be lost, and then is sent again
			_ = conns[i].SetDeadline(time.Now().Add(5 * time.Second))
			if _, err = conns[i].Write([]byte{byte(i)}); err != nil {
				return err
			}
			if _, err = io.ReadFull(conns[i], b[:]); err == nil {
				if b[0] != byte(i) {
					return fmt.Errorf("%d came for %d", b[0], byte(i))
				}
				return nil
			}
			if _, isUDP := conns[i].(*net.UDPConn); !isUDP {
				return err
			}
		}
		return err
	})
	if len(errs) > 0 {
		t.Fatalf("%d of %d flows are not answered, the first: %v", len(errs), len(conns), errs[0])
	}
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
}

func loadIdleUDP(t *trial, s *site) {
	n := flows(t)
	to := at(lab.OutsideAddr, s.port())
	s.Outside.UDPEcho(t, to)
	before := resident(t, s.d.PID)
	var boxes []*box
	for range flowContainers {
		boxes = append(boxes, s.box(t))
	}
	conns := make([]net.Conn, n)
	defer closeAll(conns)
	errs := inParallel(t, flowsAtATime, n, func(i int) error {
		c, err := boxes[i%len(boxes)].DialContext(t.Context(), "udp", to.String())
		if err == nil {
			conns[i] = c
		}
		return err
	})
	if len(errs) > 0 {
		t.Fatalf("sockets: %v", errs[0])
	}
	answered(t, conns)
	// Once more, all of them: none was put out by another.
	answered(t, conns)
	loaded := resident(t, s.d.PID)
	note("%d UDP flows: %.1f KB each (%s before, %s with them)", n, float64(loaded-before)/float64(n)/1024, mb(before), mb(loaded))
	closeAll(conns)
	// Nobody is told that a UDP socket is closed. That its container goes is seen.
	for _, b := range boxes {
		ok(t, s.h.CLI("detach", b.Name))
	}
	s.returns(t, before, loaded)
}

// syn is a TCP segment that asks for a connection, in an IPv4 packet.
func syn(src, dst netip.AddrPort, seq uint32) []byte {
	tcp := binary.BigEndian.AppendUint16(nil, src.Port())
	tcp = binary.BigEndian.AppendUint16(tcp, dst.Port())
	tcp = binary.BigEndian.AppendUint32(tcp, seq)
	tcp = append(tcp, 0, 0, 0, 0, 5<<4, 2, 0xff, 0xff, 0, 0, 0, 0)
	pseudo := append(append(append([]byte(nil), src.Addr().AsSlice()...), dst.Addr().AsSlice()...), 0, unix.IPPROTO_TCP, 0, byte(len(tcp)))
	binary.BigEndian.PutUint16(tcp[16:], lab.Checksum(append(pseudo, tcp...)))
	return lab.IPv4(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, 64, tcp)
}

func loadFlood(t *trial, s *site) {
	t.must("black hole", s.Outside.Blackhole(silent[false]))
	to := at(lab.OutsideAddr, s.port())
	listen(t, s.Outside.Space, to, echo)
	bad, good := s.box(t), s.box(t)
	if r, err := bad.Ping(bad.gateway, 1); err != nil || r.Lost() != 0 { // so that its link address is known
		t.Fatalf("ping: %v, %v", r, err)
	}
	all, err := bad.Interfaces()
	t.must("interfaces", err)
	raw, err := bad.RawSocket("eth0")
	t.must("raw socket", err)
	defer raw.Close()
	gateway, mine := hardware(t, bad.Neighbour(bad.gateway)), hardware(t, all[0].MAC)
	base := silent[false].Addr().As4()
	over := make(chan struct{})
	sent := make(chan int)
	go func() {
		n := 0
		defer func() { sent <- n }()
		for {
			select {
			case <-over:
				return
			default:
			}
			target := base
			target[3] += byte(rand.Uint32() % 120)
			if n%4 == 0 { // some where somebody listens, and never hears of it again
				target = lab.OutsideAddr.As4()
			}
			src, dst := at(bad.addr, uint16(1024+rand.Uint32()%60000)), at(netip.AddrFrom4(target), to.Port())
			if raw.Send(lab.EthernetFrame(gateway, mine, syn(src, dst, rand.Uint32()))) == nil {
				n++
			}
			if n%64 == 0 {
				time.Sleep(time.Millisecond) // some 50,000 a second: a flood, on a machine that others use too
			}
		}
	}()
	time.Sleep(500 * time.Millisecond)
	errs := inParallel(t, 4, 200, func(int) error { return s.answers(t, good.Space, to) })
	close(over)
	n := <-sent
	if len(errs) > 0 {
		t.Errorf("%d of another container's connections fail beside %d SYNs, the first: %v", len(errs), n, errs[0])
	}
	if n == 0 {
		t.Errorf("there was no flood")
	}
	counted := uint64(0)
	drops := s.d.Status().Counters["drops"]
	for name, count := range drops {
		if strings.Contains(name, "share") || strings.Contains(name, "half-open") || strings.Contains(name, "limit") {
			counted += count
		}
	}
	if counted == 0 {
		t.Errorf("no counter tells of %d SYNs: %v", n, drops)
	}
	note("%d SYNs beside 200 connections", n)
}
