// This file tests that flows leave the process descriptors to work with.

package stack

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestLimits_FitDescriptors(t *testing.T) {
	all := func(l Limits) int { return l.shared + l.EchoFlows + l.DNSQueries }
	var full Limits
	full.Descriptors = 1 << 20
	full.setDefaults()
	for _, n := range []int{enoughDescriptors - 1, 1 << 20} { // package syscall leaves one of the hard limit
		l := full
		l.Descriptors = n
		want := l
		if l.fitDescriptors() || l != want {
			t.Errorf("%d descriptors: limits were cut to %+v", n, l)
		}
	}
	for _, n := range []int{0, 1, 20, 256, 1024, 4096, 20000, 40000} {
		l := full
		l.Descriptors = n
		if !l.fitDescriptors() {
			t.Errorf("%d descriptors: limits were not cut: %+v", n, l)
		}
		if least := min(reservedDescriptors, n/2); n >= 256 && n-all(l) < least {
			t.Errorf("%d descriptors: %d are left, want %d: %+v", n, n-all(l), least, l)
		}
		for _, v := range []int{l.TCPFlows, l.TCPHalfOpen, l.UDPFlows, l.EchoFlows, l.DNSQueries, l.TCPFlowsEach, l.TCPHalfOpenEach, l.UDPFlowsEach, l.EchoFlowsEach} {
			if v < 1 {
				t.Errorf("%d descriptors: a limit below 1, which is none: %+v", n, l)
			}
		}
		if n >= 256 && (l.TCPFlows >= l.shared || l.UDPFlows >= l.shared || l.sharedEach > l.shared*3/4 || l.TCPFlowsEach > l.sharedEach ||
			l.UDPFlowsEach > l.sharedEach || l.EchoFlowsEach > l.EchoFlows/2 || l.TCPHalfOpen > l.shared/4 || l.TCPHalfOpenEach > l.shared/8) {
			t.Errorf("%d descriptors: a share leaves too little for others: %+v", n, l)
		}
	}
	l := full
	l.Descriptors = 20000
	l.fitDescriptors()
	if l.TCPFlowsEach < 10_000 || l.UDPFlowsEach < 10_000 {
		t.Errorf("20,000 descriptors: a container has no 10,000 flows of a kind: %+v", l)
	}
	// What somebody has set low stays as it is.
	l = Limits{TCPFlows: 5, TCPHalfOpen: 4, Descriptors: 1024}
	l.setDefaults()
	if cut := l.fitDescriptors(); !cut || l.TCPFlows != 5 || l.TCPHalfOpen != 4 || l.UDPFlows <= 208 {
		t.Errorf("low limits were cut, or what they leave was not used: %+v", l)
	}
}

// With few descriptors either kind of flow may take most of them, but a container leaves some for others.
func TestFlows_TCPAndUDPShareDescriptors(t *testing.T) {
	w := newWire(t, func(c *Config) { c.Limits.Descriptors = 256 })
	l := &w.g.cfg.Limits
	server := listenTCP(t, func(s *net.TCPConn) { _, _ = s.Read(make([]byte, 1)) })
	silent := listenUDP(t, func([]byte) []byte { return nil })
	alice, bob := w.container(aliceAddr), w.container(bobAddr)
	const tcp = 20
	for range tcp {
		defer alice.mustDialTCP(server).Close()
	}
	send := func(from netip.Addr) {
		for i := range uint16(l.Descriptors) {
			w.send(makeUDP(netip.AddrPortFrom(from, 1000+i), silent, []byte("x")))
		}
	}
	send(aliceAddr)
	if n := w.g.Stats().UDPFlows; int(n) != l.sharedEach-tcp || int(n)+tcp <= l.shared/2 {
		t.Errorf("%d UDP flows of a container that has %d connections: %+v", n, tcp, *l)
	}
	w.send(makeTCP(netip.AddrPortFrom(aliceAddr, 999), server, header.TCPFlagSyn, 1))
	if n := w.g.Stats().TCPFlows; n != tcp {
		t.Errorf("%d connections, want %d", n, tcp)
	}
	defer bob.mustDialTCP(server).Close()
	send(bobAddr)
	if s := w.g.Stats(); int(s.TCPFlows+s.UDPFlows) != l.shared || w.drops(dropUDPFlows) == 0 {
		t.Errorf("%d connections and %d UDP flows, want %d in all", s.TCPFlows, s.UDPFlows, l.shared)
	}
}

func TestNew_SaysThatFlowsWereCut(t *testing.T) {
	w := newWire(t, func(c *Config) { c.Limits.Descriptors = 1024 })
	if n := strings.Count(w.log.String(), "LimitNOFILE"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, w.log)
	}
	w = newWire(t, func(c *Config) { c.Limits.Descriptors = enoughDescriptors })
	if strings.Contains(w.log.String(), "LimitNOFILE") {
		t.Errorf("logged though nothing was cut:\n%s", w.log)
	}
}

// One container opens all the flows that it can in a process of 1024 descriptors. The test starts itself again with that limit.
func TestGateway_AFloodLeavesDescriptors(t *testing.T) {
	const again = "STACK_TEST_FEW_DESCRIPTORS"
	if os.Getenv(again) == "" {
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `ulimit -n 1024 && exec "$0" "$@"`, os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), again+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Errorf("with 1024 descriptors: %v\n%s", err, out)
		}
		return
	}
	if n := openFiles(); n != 1024 {
		t.Fatalf("the limit is %d, want 1024", n)
	}
	w := newWire(t, nil)
	silent := listenUDP(t, func([]byte) []byte { return nil })
	server := listenTCP(t, func(c *net.TCPConn) { _, _ = c.Write([]byte("hello")) })
	const flood = 9000
	for i := range uint16(flood) {
		w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 1000+i), silent, []byte("x")))
	}
	opened := w.g.Stats().UDPFlows
	if share := w.g.cfg.Limits.UDPFlowsEach; opened != uint64(share) || w.drops(dropContainerShare) != flood-opened {
		t.Errorf("%d flows of %d and drops %v; the share is %d", opened, flood, w.g.Stats().Drops, share)
	}
	// Half-open connections are those of a container that never answers.
	carol := netip.MustParseAddr("10.5.1.4")
	for i := range uint16(flood) {
		w.send(makeTCP(netip.AddrPortFrom(aliceAddr, 1000+i), server, header.TCPFlagSyn, 1))
		w.send(makeTCP(netip.AddrPortFrom(carol, 1000+i), server, header.TCPFlagSyn, 1))
	}
	if n := w.g.Stats().TCPFlows; n == 0 || int(n) > 2*w.g.cfg.Limits.TCPHalfOpenEach {
		t.Errorf("%d connections of a container that has no flows yet, beside one with all that it may have", n)
	}
	if n := w.drops(dropNoSocket); n != 0 {
		t.Errorf("%d flows found no descriptor", n)
	}

	bob := w.container(bobAddr)
	conn := bob.dialUDP(listenUDP(t, same))
	defer conn.Close()
	b := make([]byte, 8)
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("another container's datagrams: %q, %v", b[:n], err)
	}
	tcp := bob.mustDialTCP(server)
	defer tcp.Close()
	if n, err := tcp.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("another container's connection: %q, %v", b[:n], err)
	}
	for i := range reservedDescriptors / 2 {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatalf("file %d: %v", i, err)
		}
		defer f.Close()
	}
}
