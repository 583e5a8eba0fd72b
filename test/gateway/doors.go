// This file is the cases of doors: what containers must not reach, and what opens it.

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

var doorCases = flat(
	both("closed/host-loopback", "the host's loopback, by the gateway's and the subnet's address, TCP and UDP", testCase{}, closedLoopback),
	both("closed/link-local", "link-local addresses", testCase{}, closedLinkLocal),
	both("closed/metadata", "the metadata address of clouds", testCase{}, closedMetadata),
	[]testCase{
		{name: "closed/loopback-frames", about: "frames to 127.0.0.1 and ::1 themselves are dropped and counted", run: closedFrames},
		{name: "closed/store", about: "the embedded store, at every address of the host", run: closedStore},
		{name: "closed/store-elsewhere", about: "a store on another host", run: closedStoreElsewhere},
		{name: "closed/gateway-ports", about: "nothing but DNS answers at the gateway's addresses", limit: 60 * time.Second, run: closedGatewayPorts},
		{name: "closed/api", about: "the API is no socket that a container's network has", run: closedAPI},
		{name: "closed/other-gateway", about: "another node's gateway is no way to its host's loopback, nor outside", run: closedOtherGateway},
		{name: "closed/underlay", about: "a container cannot send packets of a peer through the gateway", run: closedUnderlay},
		{name: "open/host-loopback", about: "up --host-loopback opens the host's loopback at the gateway's address", run: openLoopback},
		{name: "open/link-local", about: "up --allow-link-local opens 169.254.0.0/16", run: openLinkLocal},
		{name: "open/host-access", about: "--host-access PORT opens that port, of that container alone; host.ovl.internal leads there", run: openHostAccess},
		{name: "egress-rule/deny", about: "--egress deny: nothing outside, names neither; overlay, its names and published ports go on", limit: 60 * time.Second, run: egressDeny},
		{name: "egress-rule/cidr", about: "--egress CIDR: that and nothing else; TCP, UDP and ping", limit: 60 * time.Second, run: egressCIDR},
		{name: "egress-rule/allow", about: "--egress allow is the default", run: egressAllow},
	},
)

// Addresses of doors.
var (
	loopback  = map[bool]netip.Addr{false: netip.MustParseAddr("127.0.0.1"), true: netip.IPv6Loopback()}
	metadata6 = netip.MustParseAddr("fd00:ec2::254")
)

// door is a server that containers must not reach, and counts who did.
type door struct{ tcp, udp atomic.Int64 }

// openDoor serves TCP and UDP at an address of a space.
func openDoor(t *trial, in *lab.Space, addr netip.AddrPort) *door {
	d := new(door)
	listen(t, in, addr, func(c *net.TCPConn) {
		d.tcp.Add(1)
		echo(c)
	})
	seen := in.UDPEcho(t, addr)
	go func() {
		for {
			select {
			case <-seen:
				d.udp.Add(1)
			case <-t.Context().Done():
				return
			}
		}
	}()
	return d
}

// staysClosed tries an address by TCP and UDP and fails the trial where somebody answers.
func (s *site) staysClosed(t *trial, from *lab.Space, to netip.AddrPort, what string) {
	if c, err := dialWithin(t, from, to, time.Second); err == nil {
		_ = c.SetDeadline(time.Now().Add(time.Second))
		if err := exchanged(c, 10); err == nil {
			t.Errorf("%s (%s) answers by TCP", what, to)
		} else {
			t.Errorf("%s (%s) accepts a connection: %v", what, to, err)
		}
		c.Close()
	}
	c, err := from.DialContext(t.Context(), "udp", to.String())
	if err != nil {
		return
	}
	defer c.Close()
	for range 2 {
		_, _ = c.Write([]byte("anybody there"))
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if n, err := c.Read(make([]byte, 100)); err == nil {
			t.Errorf("%s (%s) answers by UDP with %d bytes", what, to, n)
			return
		}
	}
}

func (d *door) check(t *trial, what string) {
	if tcp, udp := d.tcp.Load(), d.udp.Load(); tcp+udp != 0 {
		t.Errorf("%s got %d connections and %d datagrams", what, tcp, udp)
	}
}

func closedLoopback(t *trial, s *site, v6 bool) {
	port := s.port()
	d := openDoor(t, s.h.Space, at(loopback[v6], port))
	b := s.boxOf(t, v6)
	ways := []netip.Addr{b.gateway, netip.MustParsePrefix(s.d.Status().Subnet).Addr()}
	if v6 {
		ways = append(ways, b.gateway6)
	}
	for _, way := range ways {
		s.staysClosed(t, b.Space, at(way, port), "the host's loopback")
	}
	d.check(t, "the host's loopback")
}

func closedLinkLocal(t *trial, s *site, v6 bool) {
	addr := map[bool]netip.Addr{false: netip.MustParseAddr("169.254.7.7"), true: netip.MustParseAddr("fe80::7")}[v6]
	b := s.boxOf(t, v6)
	if v6 {
		// What fe80:: is depends on the link; the container's router answers for all.
		if r, err := b.PingWith(addr, lab.PingOptions{Count: 2}); err == nil && r.Received > 0 {
			t.Errorf("ping of %s: %v", addr, r)
		}
		return
	}
	t.must("address", addLoopback(s.Outside.Space, addr))
	t.must("route", s.h.AddRoute(netip.MustParsePrefix("169.254.7.0/24"), lab.RouterAddr))
	port := s.port()
	d := openDoor(t, s.Outside.Space, at(addr, port))
	t.check("the host itself reaches it", s.echoUDP(t, s.h.Space, at(addr, port), 10))
	d.udp.Store(0)
	s.staysClosed(t, b.Space, at(addr, port), "a link-local address")
	d.check(t, "a link-local address")
}

// addLoopback gives a space a further address; one that is there is fine.
func addLoopback(s *lab.Space, addr netip.Addr) error {
	if err := s.AddAddr("lo", netip.PrefixFrom(addr, addr.BitLen())); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func closedMetadata(t *trial, s *site, v6 bool) {
	addr := lab.MetadataAddr
	if v6 {
		addr = metadata6
		t.must("address", addLoopback(s.Outside.Space, addr))
	}
	d := openDoor(t, s.Outside.Space, at(addr, 80))
	t.check("the host itself reaches it", s.echoUDP(t, s.h.Space, at(addr, 80), 10))
	time.Sleep(50 * time.Millisecond) // until the door has counted it
	d.udp.Store(0)
	b := s.boxOf(t, v6)
	s.staysClosed(t, b.Space, at(addr, 80), "the metadata address")
	if r, err := b.PingWith(addr, lab.PingOptions{Count: 2}); err == nil && r.Received > 0 {
		t.Errorf("ping of the metadata address: %v", r)
	}
	d.check(t, "the metadata address")
}

func closedFrames(t *trial, s *site) {
	port := s.port()
	for _, v6 := range []bool{false, true} {
		b := s.boxOf(t, v6)
		d := openDoor(t, s.h.Space, at(loopback[v6], port))
		if r, err := b.Ping(b.gateway, 1); err != nil || r.Lost() != 0 { // so that its link address is known
			t.Fatalf("ping: %v, %v", r, err)
		}
		raw, err := b.RawSocket("eth0")
		t.must("raw socket", err)
		defer raw.Close()
		mine, err := b.Interfaces()
		t.must("interfaces", err)
		packet := lab.IPv4(b.addr, loopback[false], 17, 64, lab.UDP(1234, port, []byte("x")))
		if v6 {
			packet = lab.UDPv6(at(b.addr6, 1234), at(loopback[true], port), []byte("x"))
		}
		before := s.d.Drops("")
		t.must("send", raw.Send(lab.EthernetFrame(hardware(t, b.Neighbour(b.gateway)), hardware(t, mine[0].MAC), packet)))
		lab.Eventually(t, "the drop is counted", func() bool { return s.d.Drops("") > before })
		d.check(t, "the host's loopback")
	}
}

func hardware(t *trial, text string) [6]byte {
	mac, err := net.ParseMAC(text)
	if err != nil || len(mac) != 6 {
		t.Fatalf("link address %q: %v", text, err)
	}
	return [6]byte(mac)
}

func closedStore(t *trial, s *site) {
	b := s.box(t)
	for _, addr := range []netip.Addr{s.h.Addr, s.h.Addr6, b.gateway} {
		s.staysClosed(t, b.Space, at(addr, 2379), "the embedded store")
		s.staysClosed(t, b.Space, at(addr, 2380), "the embedded store's peer port")
	}
	far := join(t, s.h2, "far-from-store")
	s.staysClosed(t, far.Space, at(s.h.Addr, 2379), "the store of another node")
}

func closedStoreElsewhere(t *trial, _ *site) {
	l := lab.New(t, 1)
	e := l.Outside.Etcd(nil, false)
	h := l.Host(1)
	h.Up("--etcd-endpoints", e.Endpoint, "--network", overlayNet)
	s := &site{system: systemOurs}
	s.staysClosed(t, join(t, h, "a").Space, e.Addr, "the store")
}

func closedGatewayPorts(t *trial, s *site) {
	b := s.box(t)
	ways := []netip.Addr{b.gateway, netip.MustParsePrefix(s.d.Status().Subnet).Addr()}
	if b.gateway6.IsValid() {
		ways = append(ways, b.gateway6)
	}
	ports := []int{2379, 2380, 5000, 6443, 8080, 8285, 8472, 9090, 10250}
	for port := 1; port <= 1024; port++ {
		ports = append(ports, port)
	}
	for _, way := range ways {
		errs := inParallel(t, 16, len(ports), func(i int) error {
			to := at(way, uint16(ports[i]))
			c, err := dialWithin(t, b.Space, to, 2*time.Second)
			if err != nil {
				return nil
			}
			c.Close()
			if ports[i] == 53 {
				return nil
			}
			return fmt.Errorf("%s is open", to)
		})
		for _, err := range errs {
			t.Errorf("%v", err)
		}
	}
}

func closedAPI(t *trial, s *site) {
	b := s.box(t)
	t.must("sockets", b.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/unix")
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, "rootless-ovl") || strings.Contains(line, "api.sock") {
				t.Errorf("the container's namespace has %s", line)
			}
		}
		return err
	}))
}

func closedOtherGateway(t *trial, s *site) {
	port := s.port()
	d := openDoor(t, s.h2.Space, at(loopback[false], port))
	outside := openDoor(t, s.Outside.Space, at(lab.OutsideAddr, port))
	b, far := s.box(t), join(t, s.h2, "behind-the-other")
	for _, way := range []netip.Addr{far.gateway, netip.MustParsePrefix(s.d2.Status().Subnet).Addr()} {
		s.staysClosed(t, b.Space, at(way, port), "the other node's gateway")
	}
	d.check(t, "the other host's loopback")
	outside.check(t, "the outside through the other node")
}

// closedUnderlay sends what a peer would: a packet of another container in UDP, to the other node's port.
func closedUnderlay(t *trial, s *site) {
	port := s.port()
	far := join(t, s.h2, "victim")
	d := openDoor(t, far.Space, at(netip.IPv4Unspecified(), port))
	b, other := s.box(t), s.box(t)
	c, err := b.DialContext(t.Context(), "udp", at(s.h2.Addr, uint16(s.d2.Status().Port)).String())
	t.must("socket", err)
	defer c.Close()
	for _, src := range []netip.Addr{b.addr, other.addr} {
		_, _ = c.Write(lab.IPv4(src, far.addr, 17, 64, lab.UDP(1234, port, []byte("x"))))
	}
	t.check("what may pass does", s.echoUDP(t, other.Space, at(far.addr, port), 10))
	time.Sleep(50 * time.Millisecond) // until the door has counted it
	if n := d.udp.Load(); n < 1 || n > 4 {
		t.Errorf("the door counts %d", n)
	}
	if s.d2.Drops("spoofed-by-peer") == 0 {
		t.Errorf("no drop is counted: %v", s.d2.Status().Counters["drops"])
	}
}

func openLoopback(t *trial, _ *site) {
	_, h := lone(t, "--host-loopback")
	openDoor(t, h.Space, at(loopback[false], 8080))
	b := join(t, h, "a")
	s := &site{system: systemOurs}
	t.check("TCP", s.answers(t, b.Space, at(b.gateway, 8080)))
	t.check("UDP", s.echoUDP(t, b.Space, at(b.gateway, 8080), 100))
}

func openLinkLocal(t *trial, _ *site) {
	l, h := lone(t, "--allow-link-local")
	openDoor(t, l.Outside.Space, at(lab.MetadataAddr, 80))
	b := join(t, h, "a")
	s := &site{system: systemOurs}
	t.check("TCP", s.answers(t, b.Space, at(lab.MetadataAddr, 80)))
	t.check("UDP", s.echoUDP(t, b.Space, at(lab.MetadataAddr, 80), 100))
}

func openHostAccess(t *trial, s *site) {
	port, shut := s.port(), s.port()
	openDoor(t, s.h.Space, at(loopback[false], port))
	d := openDoor(t, s.h.Space, at(loopback[false], shut))
	b := join(t, s.h, "may-"+fmt.Sprint(port), "--host-access", fmt.Sprint(port))
	t.check("by the gateway's address", s.answers(t, b.Space, at(b.gateway, port)))
	m, err := ask(b, "udp4", "host"+domain, dns.TypeA)
	if err != nil || len(addrsOf(m)) != 1 {
		t.Errorf("host.ovl.internal: %v, %v", m, err)
	} else {
		t.check("by host.ovl.internal", s.answers(t, b.Space, at(addrsOf(m)[0], port)))
	}
	s.staysClosed(t, b.Space, at(b.gateway, shut), "another port of the host")
	s.staysClosed(t, s.box(t).Space, at(b.gateway, port), "the port for another container")
	d.check(t, "another port of the host")
}

// outsideClosed tries the outside by all means.
func (s *site) outsideClosed(t *trial, b *box, to netip.AddrPort) {
	s.staysClosed(t, b.Space, to, "the outside")
	if r, err := b.PingWith(to.Addr(), lab.PingOptions{Count: 2}); err == nil && r.Received > 0 {
		t.Errorf("ping of %s: %v", to.Addr(), r)
	}
}

func egressDeny(t *trial, s *site) {
	s.resolver(t)
	port := s.port()
	d := openDoor(t, s.Outside.Space, at(lab.OutsideAddr, port))
	b := join(t, s.h, "denied-"+fmt.Sprint(port), "--egress", "deny", "-p", fmt.Sprintf("%d:%d", port, inside))
	s.outsideClosed(t, b, at(lab.OutsideAddr, port))
	d.check(t, "the outside")
	// It is told so, and need not wait.
	if _, err := dialWithin(t, b.Space, at(lab.OutsideAddr, port), 3*time.Second); err == nil || isTimeout(err) {
		t.Errorf("connect: %v, want an error at once", err)
	}
	if m, err := ask(b, "udp4", "name.lab.test.", dns.TypeA); err != nil || m.Rcode != dns.RcodeRefused {
		t.Errorf("a name of the outside: %v, %v; want REFUSED", m, err)
	}
	soon(t, 5*time.Second, "its own name", func() error { return knows(b, b.Name+domain, b.addr) })
	far := join(t, s.h2, "far-"+fmt.Sprint(port))
	listen(t, far.Space, at(netip.IPv4Unspecified(), 80), echo)
	t.check("the overlay", s.answers(t, b.Space, at(far.addr, 80)))
	listen(t, b.Space, at(netip.IPv4Unspecified(), inside), echo)
	t.check("its published port", s.answers(t, s.h2.Space, at(s.h.Addr, port)))
}

func egressCIDR(t *trial, s *site) {
	port := s.port()
	openDoor(t, s.Outside.Space, at(lab.OutsideAddr, port))
	d := openDoor(t, s.Outside.Space, at(lab.RouterAddr, port))
	b := join(t, s.h, "some-"+fmt.Sprint(port), "--egress", "203.0.113.0/24,198.51.100.0/24")
	t.check("TCP", s.answers(t, b.Space, at(lab.OutsideAddr, port)))
	t.check("UDP", s.echoUDP(t, b.Space, at(lab.OutsideAddr, port), 100))
	if r, err := b.Ping(lab.OutsideAddr, 3); err != nil || r.Lost() != 0 {
		t.Errorf("ping: %v, %v", r, err)
	}
	s.outsideClosed(t, b, at(lab.RouterAddr, port))
	d.check(t, "what is not listed")
}

func egressAllow(t *trial, s *site) {
	port := s.port()
	openDoor(t, s.Outside.Space, at(lab.OutsideAddr, port))
	b := join(t, s.h, "all-"+fmt.Sprint(port), "--egress", "allow")
	t.check("TCP", s.answers(t, b.Space, at(lab.OutsideAddr, port)))
}
