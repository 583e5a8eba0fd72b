// Tests of hostile neighbours: what a peer, a stranger on the LAN, a container, or somebody who writes to the store sends to do harm. Each counts what
// got through, which is nothing, and holds it against the drop's counter. docs/security.md lists them.

package test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// counts fails the test unless one drop counter grows by n, as far as the kernels' own chatter leaves it alone.
func counts(t *testing.T, d *lab.Daemon, reason string, n uint64, send func()) {
	t.Helper()
	before := d.Drops(reason)
	send()
	grown := uint64(0)
	lab.EventuallyWithinOr(t, 30*time.Second, func() string {
		return fmt.Sprintf("%s grew by %d, want %d: %v", reason, grown, n, d.Status().Counters["drops"])
	}, func() bool {
		grown = d.Drops(reason) - before
		return grown >= n
	})
	if grown != n {
		t.Errorf("%s grew by %d, want %d", reason, grown, n)
	}
}

// silent fails the test if a server has seen anybody but those.
func silent(t *testing.T, what string, seen <-chan netip.AddrPort, but ...netip.Addr) {
	t.Helper()
outer:
	for len(seen) > 0 {
		src := <-seen
		for _, good := range but {
			if src.Addr() == good {
				continue outer
			}
		}
		t.Errorf("%s: a datagram from %s got through", what, src)
	}
}

// icmp makes an ICMP message in an IPv4 packet.
func icmp(src, dst netip.Addr, kind byte, body []byte) []byte {
	msg := append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, body...)
	binary.BigEndian.PutUint16(msg[2:], lab.Checksum(msg))
	return lab.IPv4(src, dst, unix.IPPROTO_ICMP, 255, msg)
}

// icmp6 makes an ICMPv6 message in an IPv6 packet with the hop limit of a neighbour.
func icmp6(src, dst netip.Addr, kind byte, body []byte) []byte {
	msg := append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, body...)
	h := make([]byte, 40, 40+len(msg))
	h[0], h[6], h[7] = 0x60, unix.IPPROTO_ICMPV6, 255
	binary.BigEndian.PutUint16(h[4:], uint16(len(msg)))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	pseudo := binary.BigEndian.AppendUint32(append([]byte(nil), h[8:40]...), uint32(len(msg)))
	binary.BigEndian.PutUint16(msg[2:], lab.Checksum(append(append(pseudo, 0, 0, 0, unix.IPPROTO_ICMPV6), msg...)))
	return append(h, msg...)
}

func TestHostile_NothingForgedComesFromTheUnderlay(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	seen := a.UDPEcho(t, port(a.addr, 9000))
	pings(t, a.Space, b.addr)
	node1 := port(s.h1.Addr, uint16(s.d1.Status().Port))
	node2 := port(s.h2.Addr, uint16(s.d2.Status().Port))
	peer := newUnderlay(t, s.h2, s.h1, node2, node1)
	otherPort := newUnderlay(t, s.h2, s.h1, port(s.h2.Addr, node2.Port()+1), node1)
	stranger := newUnderlay(t, s.Outside, s.h1, port(lab.RouterAddr, node2.Port()), node1)
	itself := newUnderlay(t, s.h2, s.h1, node1, node1) // which the kernel already takes for a martian

	udp := func(src, dst netip.Addr) []byte {
		return lab.IPv4(src, dst, 17, 60, lab.UDP(1234, 9000, []byte("x")))
	}
	changed := func(at int, v byte) []byte {
		p := udp(b.addr, a.addr)
		p[at] = v
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], lab.Checksum(p[:20]))
		return p
	}
	badSum := udp(b.addr, a.addr)
	badSum[10] ^= 0xff
	nobody := network.Addr().Next() // the first subnet is never leased
	for _, c := range []struct {
		name   string
		from   *underlay
		packet []byte
		reason string
	}{
		{"outer source: a stranger", stranger, udp(b.addr, a.addr), "spoofed-by-peer"},
		{"outer source: the peer's host, another port", otherPort, udp(b.addr, a.addr), "spoofed-by-peer"},
		{"inner source: the container itself", peer, udp(a.addr, a.addr), "spoofed-by-peer"},
		{"inner source: our gateway", peer, udp(a.gateway, a.addr), "spoofed-by-peer"},
		{"inner source: a subnet that the peer does not own", peer, udp(nobody, a.addr), "spoofed-by-peer"},
		{"inner source: the outside", peer, udp(lab.OutsideAddr, a.addr), "spoofed-by-peer"},
		{"inner source: our host", peer, udp(s.h1.Addr, a.addr), "spoofed-by-peer"},
		{"inner source: loopback", peer, udp(netip.MustParseAddr("127.0.0.1"), a.addr), "spoofed-by-peer"},
		{"IPv6 in a network without", peer, lab.UDPv6(port(netip.MustParseAddr("fd66::2"), 1), port(netip.MustParseAddr("fd66::3"), 9000), nil), "spoofed-by-peer"},
		{"to the outside through us", peer, udp(b.addr, lab.OutsideAddr), "transit-refused"},
		{"to our host through us", peer, udp(b.addr, s.h1.Addr), "transit-refused"},
		{"back to the peer through us", peer, udp(b.addr, b.addr.Next()), "transit-refused"},
		{"to our resolver", peer, lab.IPv4(b.addr, a.gateway, 17, 60, lab.UDP(1234, 53, []byte("x"))), "transit-refused"},
		{"to multicast", peer, udp(b.addr, netip.MustParseAddr("224.0.0.1")), "not-unicast"},
		{"to broadcast", peer, udp(b.addr, netip.MustParseAddr("255.255.255.255")), "not-unicast"},
		{"to loopback", peer, udp(b.addr, netip.MustParseAddr("127.0.0.1")), "not-unicast"},
		{"a redirect", peer, icmp(b.addr, a.addr, 5, udp(a.addr, b.addr)), "link-only-message"},
		{"a router's advertisement", peer, icmp(b.addr, a.addr, 9, make([]byte, 8)), "link-only-message"},
		{"IP version 7", peer, changed(0, 0x75), "malformed"},
		{"header longer than the packet", peer, changed(0, 0x4f), "malformed"},
		{"header shorter than there is", peer, changed(0, 0x44), "malformed"},
		{"longer than it came", peer, changed(2, 0x10), "malformed"},
		{"shorter than its header", peer, changed(3, 8), "malformed"},
		{"header checksum", peer, badSum, "bad-ip-checksum"},
		{"time to live of 1", peer, changed(8, 1), "ttl-exceeded"},
	} {
		t.Run(c.name, func(t *testing.T) {
			const times = 3
			counts(t, s.d1, c.reason, times, func() {
				for range times {
					c.from.send(c.packet)
				}
			})
			silent(t, c.name, seen)
		})
	}
	itself.send(udp(b.addr, a.addr))
	silent(t, "from our own address", seen)
	if err := b.EchoUDP(port(a.addr, 9000), 10); err != nil { // the same from whom it may come
		t.Error(err)
	}
	silent(t, "all of it", seen, b.addr)
}

func TestHostile_NothingForgedComesInVXLAN(t *testing.T) {
	t.Parallel()
	l, e, client := withDualStack(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	d1, d2 := h1.Up("--etcd-endpoints", e.Endpoint), h2.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, h1, "a"), join(t, h2, "b")
	seen4, seen6 := b.UDPEcho(t, port(b.addr, 9000)), b.UDPEcho(t, port(b.addr6, 9000))
	pings(t, a.Space, b.addr)
	pings(t, a.Space, b.addr6)
	if _, err := l.Outside.Ping(h2.Addr, 1); err != nil {
		t.Fatal(err)
	}
	raw, err := l.Outside.RawSocket("lan0")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	vtep := mac(t, dualLeaseOf(t, client, d2.Status()).BackendData.VtepMAC)
	toward, from := mac(t, iface(t, h2.Space, "lan0").MAC), mac(t, iface(t, l.Outside.Space, "lan0").MAC)
	source := func(outer netip.Addr) netip.AddrPort { return port(outer, 8472) }
	send := func(src netip.AddrPort, header [8]byte, to [6]byte, etherType uint16, inner []byte) {
		frame := lab.EthernetFrame(to, [6]byte{2, 0, 0, 0, 0, 1}, inner)
		binary.BigEndian.PutUint16(frame[12:], etherType)
		payload := append(header[:], frame...)
		outer := lab.IPv4(src.Addr(), h2.Addr, 17, 64, lab.UDP(src.Port(), 8472, payload))
		if src.Addr().Is6() {
			outer = lab.UDPv6(src, port(h2.Addr6, 8472), payload)
		}
		if err := raw.Send(lab.EthernetFrame(toward, from, outer)); err != nil {
			t.Fatal(err)
		}
	}
	good := [8]byte{8, 0, 0, 0, 0, 0, 1, 0}
	in4 := func(src, dst netip.Addr) []byte { return lab.IPv4(src, dst, 17, 64, lab.UDP(1234, 9000, []byte("x"))) }
	in6 := func(src, dst netip.Addr) []byte { return lab.UDPv6(port(src, 1234), port(dst, 9000), []byte("x")) }
	nobody, nobody6 := network.Addr().Next(), network6.Addr().Next()
	for _, c := range []struct {
		name   string
		outer  netip.Addr
		header [8]byte
		to     [6]byte
		kind   uint16
		inner  []byte
		reason string
	}{
		{"a foreign VNI", h1.Addr, [8]byte{8, 0, 0, 0, 0, 0, 2, 0}, vtep, 0x0800, in4(a.addr, b.addr), "vxlan-other-vni"},
		{"the largest VNI", h1.Addr, [8]byte{8, 0, 0, 0, 255, 255, 255, 0}, vtep, 0x0800, in4(a.addr, b.addr), "vxlan-other-vni"},
		{"a foreign VNI over IPv6", h1.Addr6, [8]byte{8, 0, 0, 0, 0, 1, 1, 0}, vtep, 0x86dd, in6(a.addr6, b.addr6), "vxlan-other-vni"},
		{"no VNI", h1.Addr, [8]byte{0, 0, 0, 0, 0, 0, 1, 0}, vtep, 0x0800, in4(a.addr, b.addr), "vxlan-bad-header"},
		{"reserved bits", h1.Addr, [8]byte{8, 0, 0, 1, 0, 0, 1, 0}, vtep, 0x0800, in4(a.addr, b.addr), "vxlan-bad-header"},
		{"reserved bits behind", h1.Addr, [8]byte{8, 0, 0, 0, 0, 0, 1, 1}, vtep, 0x0800, in4(a.addr, b.addr), "vxlan-bad-header"},
		{"another VTEP", h1.Addr, good, [6]byte{2, 9, 9, 9, 9, 9}, 0x0800, in4(a.addr, b.addr), "vxlan-foreign-mac"},
		{"every VTEP", h1.Addr, good, [6]byte{255, 255, 255, 255, 255, 255}, 0x0800, in4(a.addr, b.addr), "vxlan-foreign-mac"},
		{"ARP", h1.Addr, good, vtep, 0x0806, make([]byte, 28), "vxlan-not-ip"},
		{"IPv4 that says it is IPv6", h1.Addr, good, vtep, 0x86dd, in4(a.addr, b.addr), "malformed"},
		{"outer source: a stranger", lab.RouterAddr, good, vtep, 0x0800, in4(a.addr, b.addr), "spoofed-by-peer"},
		{"outer source: a stranger over IPv6", lab.RouterAddr6, good, vtep, 0x86dd, in6(a.addr6, b.addr6), "spoofed-by-peer"},
		{"inner source: a container of ours", h1.Addr, good, vtep, 0x0800, in4(b.addr, b.addr), "spoofed-by-peer"},
		{"inner source: a container of ours over IPv6", h1.Addr6, good, vtep, 0x86dd, in6(b.addr6, b.addr6), "spoofed-by-peer"},
		{"inner source: our gateway", h1.Addr, good, vtep, 0x0800, in4(b.gateway, b.addr), "spoofed-by-peer"},
		{"inner source: our gateway over IPv6", h1.Addr6, good, vtep, 0x86dd, in6(b.gateway6, b.addr6), "spoofed-by-peer"},
		{"inner source: a subnet that the peer does not own", h1.Addr, good, vtep, 0x0800, in4(nobody, b.addr), "spoofed-by-peer"},
		{"inner source: an IPv6 subnet that the peer does not own", h1.Addr6, good, vtep, 0x86dd, in6(nobody6, b.addr6), "spoofed-by-peer"},
		{"IPv6 of the peer's, by its IPv4 address", h1.Addr, good, vtep, 0x86dd, in6(a.addr6, b.addr6), "spoofed-by-peer"},
		{"to the outside through us", h1.Addr, good, vtep, 0x0800, in4(a.addr, lab.OutsideAddr), "transit-refused"},
		{"to the outside through us over IPv6", h1.Addr6, good, vtep, 0x86dd, in6(a.addr6, lab.OutsideAddr6), "transit-refused"},
		{"a neighbour's advertisement", h1.Addr6, good, vtep, 0x86dd, icmp6(a.addr6, b.addr6, 136, append(b.gateway6.AsSlice(), 2, 1, 2, 0, 0, 0, 0, 9)), "link-only-message"},
		{"a router's advertisement", h1.Addr6, good, vtep, 0x86dd, icmp6(a.addr6, b.addr6, 134, make([]byte, 8)), "link-only-message"},
	} {
		t.Run(c.name, func(t *testing.T) {
			const times = 3
			counts(t, d2, c.reason, times, func() {
				for range times {
					send(source(c.outer), c.header, c.to, c.kind, c.inner)
				}
			})
			silent(t, c.name, seen4)
			silent(t, c.name, seen6)
		})
	}
	for _, to := range b.addrs() {
		if err := a.EchoUDP(port(to, 9000), 10); err != nil {
			t.Error(err)
		}
	}
	silent(t, "all of it", seen4, a.addr)
	silent(t, "all of it", seen6, a.addr6)
}

// ARP, ND, DHCP and redirects of one container: nobody believes them, since nobody gets them.
func TestHostile_NoContainerPoisonsItsNeighbours(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 1)
	d := l.Host(1).Up("--etcd-endpoints", e.Endpoint)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(1), "b")
	for _, from := range []*member{a, b} {
		for _, to := range []netip.Addr{from.gateway, from.gateway6, a.addr, a.addr6, b.addr, b.addr6} {
			pings(t, from.Space, to)
		}
	}
	quiet(t, a, b)
	raw, err := a.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	ear, err := b.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer ear.Close()
	router, own := mac(t, a.Neighbour(a.gateway)), mac(t, eth0(t, a.Space).MAC)
	all, all6 := [6]byte{255, 255, 255, 255, 255, 255}, [6]byte{0x33, 0x33, 0, 0, 0, 1}
	arp := func(to [6]byte, oper byte, sender, target netip.Addr) []byte {
		body := append([]byte{0, 1, 8, 0, 6, 4, 0, oper}, own[:]...)
		body = append(append(body, sender.AsSlice()...), 0, 0, 0, 0, 0, 0)
		f := lab.EthernetFrame(to, own, append(body, target.AsSlice()...))
		f[12], f[13] = 8, 6
		return f
	}
	nodes := netip.MustParseAddr("ff02::1")
	nd := func(to [6]byte, dst netip.Addr, kind byte, target netip.Addr) []byte {
		return lab.EthernetFrame(to, own, icmp6(a.addr6, dst, kind, append(append(target.AsSlice(), 2, 1), own[:]...)))
	}
	dhcp := make([]byte, 244)
	copy(dhcp, []byte{2, 1, 6, 0}) // an offer
	copy(dhcp[236:], []byte{99, 130, 83, 99, 53, 1, 2, 255})
	before := map[string]string{}
	for _, who := range []netip.Addr{b.gateway, b.gateway6, a.addr, a.addr6} {
		before[who.String()] = b.Neighbour(who)
	}
	routes, err := b.Routes6()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		frame  []byte
		reason string
	}{
		{"ARP reply: the gateway is here", arp(router, 2, a.gateway, b.addr), "tap-neighbour-claim"},
		{"ARP reply: a neighbour is here", arp(all, 2, b.addr, b.addr), "tap-neighbour-claim"},
		{"gratuitous ARP for the gateway", arp(all, 1, a.gateway, a.gateway), "tap-neighbour-claim"},
		{"gratuitous ARP for a neighbour", arp(all, 1, b.addr, b.addr), "tap-neighbour-claim"},
		{"router's advertisement to all", nd(all6, nodes, 134, a.addr6), "tap-neighbour-claim"},
		{"router's advertisement to a neighbour", nd(router, b.addr6, 134, a.addr6), "tap-neighbour-claim"},
		{"advertisement: the gateway is here", nd(all6, nodes, 136, a.gateway6), "tap-neighbour-claim"},
		{"advertisement to a neighbour: the gateway is here", nd(router, b.addr6, 136, a.gateway6), "tap-neighbour-claim"},
		{"advertisement to the gateway: a neighbour is here", nd(router, a.gateway6, 136, b.addr6), "tap-neighbour-claim"},
		{"redirect of IPv6", nd(router, b.addr6, 137, a.addr6), "tap-neighbour-claim"},
		{"redirect of IPv4", lab.EthernetFrame(router, own, icmp(a.addr, b.addr, 5, lab.IPv4(b.addr, lab.OutsideAddr, 17, 64, lab.UDP(1, 2, nil)))), "link-only-message"},
		{"router's advertisement of IPv4", lab.EthernetFrame(router, own, icmp(a.addr, b.addr, 9, make([]byte, 8))), "link-only-message"},
		{"DHCP offer to all", lab.EthernetFrame(all, own, lab.IPv4(a.addr, netip.MustParseAddr("255.255.255.255"), 17, 64, lab.UDP(67, 68, dhcp))), "tap-multicast"},
		{"DHCP offer to all by way of the router", lab.EthernetFrame(router, own, lab.IPv4(a.addr, netip.MustParseAddr("255.255.255.255"), 17, 64, lab.UDP(67, 68, dhcp))), "not-unicast"},
		{"frame to the neighbour's MAC address", lab.EthernetFrame(mac(t, eth0(t, b.Space).MAC), own, lab.IPv4(a.addr, b.addr, 17, 64, lab.UDP(1, 2, nil))), "tap-foreign-mac"},
	} {
		t.Run(c.name, func(t *testing.T) {
			const times = 5
			counts(t, d, c.reason, times, func() {
				for range times {
					if err := raw.Send(c.frame); err != nil {
						t.Fatal(err)
					}
				}
			})
		})
	}
	if f, err := ear.Receive(time.Second, func(f lab.Frame) bool {
		return len(f.Data) > 12 && f.Data[12] != 0x86 || len(f.Data) > 54 && f.Data[54] >= 133 && f.Data[54] <= 137
	}); err == nil {
		t.Errorf("the neighbour got %x", f.Data)
	}
	for who, was := range before {
		if now := b.Neighbour(netip.MustParseAddr(who)); was == "" || now != "" && now != was {
			t.Errorf("the neighbour has %s at %q, before at %q", who, now, was)
		}
	}
	if now, err := b.Routes6(); err != nil || strings.Join(now, ";") != strings.Join(routes, ";") {
		t.Errorf("the neighbour's routes %q, before %q, %v", now, routes, err)
	}
	for _, to := range []netip.Addr{b.gateway, b.gateway6, a.addr, a.addr6} {
		pings(t, b.Space, to)
	}
}

// mutate makes a packet of a good one: some of its bytes changed, most often in the headers, its end cut off or put on.
func mutate(random *rand.Rand, good []byte) []byte {
	p := append([]byte(nil), good...)
	for range random.IntN(4) {
		at := random.IntN(len(p))
		if random.IntN(3) > 0 {
			at = random.IntN(min(len(p), 60))
		}
		p[at] = [...]byte{0, 1, 0x7f, 0x80, 0xff, byte(random.Uint32())}[random.IntN(6)]
	}
	switch random.IntN(5) {
	case 0:
		p = p[:1+random.IntN(len(p))]
	case 1:
		p = append(p, make([]byte, random.IntN(64))...)
	}
	if random.IntN(2) == 0 && len(p) >= 20 && p[0]>>4 == 4 { // so that half of it gets past the first check
		n := min(len(p), int(p[0]&15)*4)
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], lab.Checksum(p[:n]))
	}
	return p
}

// balance is what has come into the router and is not accounted for: every packet is delivered or a drop.
func balance(d *lab.Daemon) int64 {
	c := d.Status().Counters
	in := c["underlay"]["recv_packets"] + c["tap"]["read_packets"] + c["gateway"]["packets_out"] + c["underlay"]["icmp_errors"]
	out := c["tap"]["write_packets"] + c["underlay"]["sent_packets"] + c["gateway"]["packets_in"] + c["drops"]["tap-write-failed"]
	for reason, n := range c["drops"] {
		other := false // counted by those who have it from the router, or before it gets there
		for _, room := range []string{"tap-", "gateway-", "publish-", "api-"} {
			other = other || strings.HasPrefix(reason, room)
		}
		if !other {
			out += n
		}
	}
	return int64(in - out)
}

func TestHostile_MutatedPacketsAreAllAccountedFor(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	wantPathMTU(t, func() { pings(t, a.Space, b.addr); pings(t, b.Space, a.addr) }, overlayMTU, s.d1, s.d2) // nothing is probed any more
	quiet(t, a, b)
	node1 := port(s.h1.Addr, uint16(s.d1.Status().Port))
	peer := newUnderlay(t, s.h2, s.h1, port(s.h2.Addr, uint16(s.d2.Status().Port)), node1)
	raw, err := a.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	router, own := mac(t, a.Neighbour(a.gateway)), mac(t, eth0(t, a.Space).MAC)
	random := rand.New(rand.NewPCG(7, 3))
	syn := lab.TCPSegment(port(b.addr, 4000), port(a.addr, 5000), nil)
	syn[33] = 2
	inward := [][]byte{
		lab.IPv4(b.addr, a.addr, 17, 60, lab.UDP(1, 9, make([]byte, 100))), syn,
		icmp(b.addr, a.addr, 8, make([]byte, 56)), icmp(b.addr, a.gateway, 8, make([]byte, 56)), icmp(b.addr, a.addr, 3, syn),
		lab.UDPv6(port(netip.MustParseAddr("fd66::2"), 1), port(netip.MustParseAddr("fd66::3"), 9), make([]byte, 40)),
	}
	outward := [][]byte{
		lab.IPv4(a.addr, b.addr, 17, 60, lab.UDP(1, 9, make([]byte, 100))),
		lab.TCPSegment(port(a.addr, 4000), port(b.addr, 5000), make([]byte, 30)),
		icmp(a.addr, b.addr, 8, make([]byte, 56)), icmp(a.addr, a.gateway, 8, make([]byte, 56)), icmp(a.addr, b.addr, 11, syn),
		lab.IPv4(a.addr, a.gateway, 17, 60, lab.UDP(1, 53, make([]byte, 40))),
		lab.IPv4(a.addr, lab.OutsideAddr, 17, 60, lab.UDP(1, 9, make([]byte, 100))),
		lab.UDPv6(port(netip.MustParseAddr("fd66::2"), 1), port(netip.MustParseAddr("fd66::3"), 9), make([]byte, 40)),
	}
	start := balance(s.d1)
	const rounds, each = 40, 50
	received := s.d1.Status().Counters["underlay"]["recv_packets"]
	frames := func() uint64 {
		c := s.d1.Status().Counters
		return c["tap"]["reads"]
	}
	read := frames()
	for range rounds {
		for range each {
			peer.send(mutate(random, inward[random.IntN(len(inward))]))
			f := lab.EthernetFrame(router, own, mutate(random, outward[random.IntN(len(outward))]))
			if random.IntN(20) == 0 { // its Ethernet header too
				f[random.IntN(14)] ^= 1 << random.IntN(8)
			}
			if err := raw.Send(f); err != nil {
				t.Fatal(err)
			}
		}
		received, read = received+each, read+each
		lab.Eventually(t, "the daemon has read what was sent", func() bool {
			return s.d1.Status().Counters["underlay"]["recv_packets"] >= received && frames() >= read
		})
	}
	last := int64(0)
	lab.EventuallyWithinOr(t, 30*time.Second, func() string {
		return fmt.Sprintf("%d packets are not accounted for: %v", last, s.d1.Status().Counters)
	}, func() bool {
		last = balance(s.d1) - start
		return last == 0
	})
	if !s.d1.Running() {
		t.Fatalf("the daemon ended:\n%s", s.d1.LogText())
	}
	pings(t, a.Space, b.addr)
	pings(t, b.Space, a.addr)
	pings(t, a.Space, a.gateway)
}

// rss is the daemon's memory in bytes.
func rss(t *testing.T, d *lab.Daemon) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.PID))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	t.Fatalf("no VmRSS in %s", b)
	return 0
}

func TestHostile_FragmentsAndFloodsOfAContainer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b, c := join(t, s.h1, "a"), join(t, s.h1, "b", "--publish", "8080:8080"), join(t, s.h2, "c")
	o := join(t, s.h1, "o") // gets none of it: b's own kernel keeps what it is sent of fragments, and has no room for others then
	b.HTTPServer(t, port(b.addr, 8080))
	s.Outside.HTTPServer(t, port(lab.OutsideAddr, 8080))
	seen := b.UDPEcho(t, port(b.addr, 9000))
	pings(t, a.Space, a.gateway)
	pings(t, a.Space, c.addr)
	raw, err := a.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	rawC, err := c.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer rawC.Close()
	pings(t, c.Space, c.gateway)
	router, own := mac(t, a.Neighbour(a.gateway)), mac(t, eth0(t, a.Space).MAC)
	routerC, ownC := mac(t, c.Neighbour(c.gateway)), mac(t, eth0(t, c.Space).MAC)
	send := func(packet []byte) {
		t.Helper()
		// A queue that is full is the container's loss.
		if err := raw.Send(lab.EthernetFrame(router, own, packet)); err != nil && !errors.Is(err, unix.ENOBUFS) {
			t.Fatal(err)
		}
	}
	others := func(t *testing.T, what string) {
		t.Helper()
		for to, from := range map[netip.AddrPort]*lab.Space{port(b.addr, 8080): c.Space, port(lab.OutsideAddr, 8080): o.Space, port(s.h1.Addr, 8080): s.h2.Space} {
			if _, err := from.Fetch("http://" + to.String() + "/"); err != nil {
				t.Errorf("%s: another's connection to %v: %v", what, to, err)
			}
		}
		if r, err := o.PingWith(o.gateway, lab.PingOptions{Count: 3, Size: 4000}); err != nil || r.Lost() != 0 {
			t.Errorf("%s: another's large ping: %v, %v", what, r, err)
		}
	}
	fragment := func(dst netip.Addr, id uint16, offset int, more bool, payload []byte) []byte {
		p := lab.IPv4(a.addr, dst, 17, 64, payload)
		binary.BigEndian.PutUint16(p[4:], id)
		word := uint16(offset / 8)
		if more {
			word |= 0x2000
		}
		binary.BigEndian.PutUint16(p[6:], word)
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], lab.Checksum(p[:20]))
		return p
	}
	before := rss(t, s.d1)

	t.Run("fragments", func(t *testing.T) {
		first := lab.UDP(1234, 9000, make([]byte, 792))
		binary.BigEndian.PutUint16(first[4:], 1600)
		for _, dst := range []netip.Addr{b.addr, a.gateway} {
			send(fragment(dst, 1, 0, true, first)) // overlapping
			send(fragment(dst, 1, 400, false, make([]byte, 1200)))
		}
		send(fragment(a.gateway, 2, 0, true, first[:7])) // tiny
		for id := range 60000 {
			send(fragment([]netip.Addr{b.addr, a.gateway}[id%2], uint16(id+10), 0, true, first))
		}
		lab.Eventually(t, "the refusals are counted", func() bool {
			return s.d1.Drops("gateway-bad-fragment") > 0 && s.d1.Drops("gateway-malformed") > 0
		})
		others(t, "fragments that are never completed")
		silent(t, "fragments", seen)
	})
	t.Run("tiny segments", func(t *testing.T) {
		sent := s.d1.Status().Counters["underlay"]["sent_packets"]
		tiny := lab.TCPSegment(port(a.addr, 1), port(c.addr, 2), make([]byte, 60000))
		refused := s.d1.Drops("tap-bad-offload")
		for range 100 {
			for _, size := range []int{1, 2, 7} {
				_ = raw.SendTSO(lab.EthernetFrame(router, own, tiny), size) // a kernel may refuse it by itself
			}
		}
		others(t, "tiny segments")
		now := s.d1.Status().Counters["underlay"]["sent_packets"]
		t.Logf("%d refused, %d packets sent", s.d1.Drops("tap-bad-offload")-refused, now-sent)
		if now-sent > 10000 {
			t.Errorf("300 frames became %d packets", now-sent)
		}
	})
	t.Run("SYNs", func(t *testing.T) {
		syn := func(src, dst netip.AddrPort) []byte {
			p := lab.TCPSegment(src, dst, nil)
			p[33] = 2
			p[36], p[37] = 0, 0 // the whole sum
			pseudo := append(append(src.Addr().AsSlice(), dst.Addr().AsSlice()...), 0, 6, 0, 20)
			binary.BigEndian.PutUint16(p[36:], lab.Checksum(append(pseudo, p[20:]...)))
			return p
		}
		silentHost := netip.MustParseAddr("192.0.2.250") // nobody on the LAN
		for i := range 20000 {
			from := port(a.addr, uint16(1024+i))
			send(syn(from, port(silentHost, 80)))
			if i%4 == 0 {
				send(syn(from, port(a.gateway, uint16(1+i))))
				send(syn(from, port(s.h1.Addr, 8080))) // a published port
			}
		}
		shares := func() uint64 {
			return s.d1.Drops("gateway-container-share") + s.d1.Drops("gateway-tcp-half-open-evicted") + s.d1.Drops("gateway-tcp-half-open-limit")
		}
		lab.Eventually(t, "the flood is counted", func() bool { return shares() > 1000 })
		if n := s.d1.Status().Counters["gateway"]["tcp_half_open"]; n > 1024 {
			t.Errorf("%d connections are half open", n)
		}
		others(t, "SYNs of a container")
		opened := s.d1.Status().Counters["gateway"]["tcp_opened"]
		for i := range 5000 { // from a peer's container, which is forwarded and nothing else
			_ = rawC.Send(lab.EthernetFrame(routerC, ownC, syn(port(c.addr, uint16(1024+i)), port(b.addr, uint16(1+i)))))
		}
		others(t, "SYNs of a peer's container")
		if n := s.d1.Status().Counters["gateway"]["tcp_opened"] - opened; n > 20 {
			t.Errorf("the gateway has opened %d connections for what it only forwards", n)
		}
	})
	if grown := rss(t, s.d1) - before; grown > 192<<20 {
		t.Errorf("the daemon has grown by %d MB", grown>>20)
	}
}

func TestHostile_DNSOfOneContainerLeavesOthersAnswered(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	l.Outside.DNSServer(t, port(lab.RouterAddr, 53), map[string]netip.Addr{"www.lab.test.": lab.OutsideAddr})
	h.SetResolvConf("nameserver " + lab.RouterAddr.String() + "\n")
	d := upEmbedded(h)
	a, b := join(t, h, "a"), join(t, h, "b")
	resolves := func(what string) {
		t.Helper()
		for _, network := range []string{"udp4", "tcp4"} {
			m, err := b.Resolve(network, port(b.gateway, 53), "www.lab.test.", dns.TypeA)
			if err != nil || len(m.Answer) != 1 {
				t.Errorf("%s: another container over %s: %v, %v", what, network, m, err)
			}
		}
	}
	resolves("before")
	dnsCount := func(name string) uint64 { return d.Status().Counters["gateway"]["dns_"+name] }

	conn, err := a.DialContext(t.Context(), "udp4", port(a.gateway, 53).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	malformed := dnsCount("malformed")
	const times = 20
	for range times {
		for _, b := range [][]byte{
			{0}, make([]byte, 12), make([]byte, 9000),
			append([]byte{1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, 0xc0, 12, 0, 1, 0, 1), // a name that is itself
		} {
			if _, err := conn.Write(b); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Millisecond)
	}
	lab.Eventually(t, "malformed queries are counted", func() bool { return dnsCount("malformed") >= malformed+4*times })

	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for range 400 {
		c, err := a.DialContext(t.Context(), "tcp4", port(a.gateway, 53).String())
		if err != nil {
			break
		}
		held = append(held, c)
		_, _ = c.Write([]byte{0}) // half of a length
	}
	lab.Eventually(t, "connections beyond the share are counted", func() bool { return dnsCount("streams") > 0 })
	resolves("connections held open")

	if err := l.Outside.Blackhole(netip.PrefixFrom(h.Addr, 32)); err != nil { // the server hears, and is not heard any more
		t.Fatal(err)
	}
	query := new(dns.Msg)
	for i := range 4000 {
		query.SetQuestion(fmt.Sprintf("n%d.lab.test.", i), dns.TypeA)
		b, err := query.Pack()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write(b)
	}
	lab.Eventually(t, "queries beyond the share are counted", func() bool { return dnsCount("overload") > 0 })
	if m, err := b.Resolve("udp4", port(b.gateway, 53), "www.lab.test.", dns.TypeA); err != nil || len(m.Answer) != 1 { // it is remembered
		t.Errorf("another container in the flood: %v, %v", m, err)
	}
	pings(t, b.Space, b.gateway)
}

// What lies in place of the daemon's files: it is refused in words, and not followed.
func TestHostile_TricksInTheDaemonsDirectories(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	args := []string{"--listen-etcd", h.Addr.String() + ":2379", "--network", network.String()}
	d := h.Up(args...)
	id := d.Status().NodeID
	d.Stop()
	state, run := filepath.Join(h.Home(), ".local/state/rootless-ovl"), d.RuntimeDir
	victim := filepath.Join(h.Home(), "victim")
	if err := os.WriteFile(victim, []byte(`{"v":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	link := func(p string) error { return os.Symlink(victim, p) }
	fifo := func(p string) error { return unix.Mkfifo(p, 0o600) }
	dir := func(p string) error { return os.Mkdir(p, 0o700) }
	group := func(p string) error {
		return errors.Join(os.WriteFile(p, []byte(`{"v":1}`), 0o600), os.Chmod(p, 0o660))
	}
	huge := func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, 1<<40)) }
	for _, c := range []struct {
		name string
		path string
		make func(p string) error
		says string
	}{
		{"attachments, a link", filepath.Join(state, "attachments.json"), link, "symbolic link"},
		{"attachments, a FIFO", filepath.Join(state, "attachments.json"), fifo, "plain file"},
		{"attachments, a group's", filepath.Join(state, "attachments.json"), group, "chmod 600"},
		{"attachments, huge", filepath.Join(state, "attachments.json"), huge, "bytes"},
		{"node id, a link", filepath.Join(state, "node-id"), link, "symbolic link"},
		{"node id, a FIFO", filepath.Join(state, "node-id"), fifo, "plain file"},
		{"lock, a link", filepath.Join(state, "lock"), link, "lock"},
		{"lock, a FIFO", filepath.Join(state, "lock"), fifo, "plain file"},
		{"lock, a directory", filepath.Join(state, "lock"), dir, "lock"},
		{"subnet.env, a directory", filepath.Join(run, "subnet.env"), dir, "--subnet-file"},
		{"subnet.env, a FIFO", filepath.Join(run, "subnet.env"), fifo, "--subnet-file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			kept := c.path + ".kept"
			had := os.Rename(c.path, kept) == nil
			if err := c.make(c.path); err != nil {
				t.Fatal(err)
			}
			upRefused(t, h, args, c.says, filepath.Base(c.path))
			if err := os.Remove(c.path); err != nil {
				t.Errorf("it is gone: %v", err)
			}
			if had {
				if err := os.Rename(kept, c.path); err != nil {
					t.Fatal(err)
				}
			}
			if b, err := os.ReadFile(victim); err != nil || string(b) != `{"v":1}` {
				t.Errorf("the link's target now holds %q, %v", b, err)
			}
		})
	}
	for _, c := range []struct{ name, path string }{{"state directory", state}, {"runtime directory", run}} {
		t.Run(c.name+", a group's", func(t *testing.T) {
			if err := os.Chmod(c.path, 0o770); err != nil {
				t.Fatal(err)
			}
			upRefused(t, h, args, "chmod 700")
			if err := os.Chmod(c.path, 0o700); err != nil {
				t.Fatal(err)
			}
		})
	}
	for name, plant := range map[string]func(p string) error{"link": link, "FIFO": fifo, "directory": dir} {
		t.Run("socket, a "+name, func(t *testing.T) {
			path := filepath.Join(run, "api.sock")
			if err := plant(path); err != nil {
				t.Fatal(err)
			}
			d := h.UpNoWait(args...)
			if code := d.Wait(); code <= 0 || !strings.Contains(lastLine(d), "not a socket") {
				t.Errorf("exit code %d: %s", code, lastLine(d))
			}
			if err := os.Remove(path); err != nil {
				t.Errorf("it is gone: %v", err)
			}
		})
	}
	// A link in place of what is only written is replaced, not followed.
	last := filepath.Join(state, "last-known.json")
	if err := errors.Join(os.Remove(last), link(last)); err != nil {
		t.Fatal(err)
	}
	again := h.Up(args...)
	if now := again.Status().NodeID; now != id {
		t.Errorf("node %s, before %s", now, id)
	}
	lab.Eventually(t, "the link is replaced", func() bool {
		fi, err := os.Lstat(last)
		return err == nil && fi.Mode().IsRegular()
	})
	if b, err := os.ReadFile(victim); err != nil || string(b) != `{"v":1}` {
		t.Errorf("the link's target now holds %q, %v", b, err)
	}
}

// Whoever can write to the store can write anything: the overlay goes on, what cannot be is told of, and nobody is led astray.
func TestHostile_ValuesInTheStore(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2)
	put(t, client, prefix+"/config", `{"Network":"10.66.0.0/16"}`)
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	pings(t, a.Space, b.addr)
	before := rss(t, d1)
	ping, err := a.StartPing(b.addr, lab.PingOptions{Interval: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}

	st1, st2 := d1.Status(), d2.Status()
	ovl := func(public string, port, mtu int) string {
		return fmt.Sprintf(`{"PublicIP":%q,"PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"evil","Port":%d,"MTU":%d}}`, public, port, mtu)
	}
	bad := map[string]string{ // subnet -> value, each of which is to have a problem
		"10.66.201.0/24": ovl("127.0.0.1", 8285, 1472),
		"10.66.202.0/24": ovl("224.0.0.1", 8285, 1472),
		"10.66.203.0/24": ovl("255.255.255.255", 8285, 1472),
		"10.66.204.0/24": ovl(l.Host(1).Addr.String(), st1.Port, 1472),
		"10.67.0.0/24":   ovl("192.0.2.99", 8285, 1472),
		"0.0.0.0/0":      ovl("192.0.2.99", 8285, 1472),
		"10.66.0.0/16":   ovl("192.0.2.99", 8285, 1472),
		mustPrefix(t, st1.Subnet).Masked().Addr().String() + "/25": ovl("192.0.2.99", 8285, 1472),
		mustPrefix(t, st2.Subnet).Masked().Addr().String() + "/28": ovl("192.0.2.99", 8285, 1472),
	}
	for subnet, value := range bad {
		put(t, client, subnetKey(subnet), value)
	}
	garbage := map[string]string{
		"10.66.211.0/24": `{"PublicIP":"192.0.2.99","BackendData":"` + strings.Repeat("x", 1<<20) + `"}`,
		"10.66.212.0/24": strings.Repeat(`{"a":`, 20000),
		"10.66.213.0/24": `{"PublicIP":"192.0.2.99","PublicIP":7}`,
		"10.66.214.0/24": ovl("192.0.2.99", 8285, -1),
		"10.66.215.0/24": ovl("192.0.2.99", 65536, 1472),
		"10.66.216.0/24": ovl("192.0.2.99\x00", 8285, 1472),
		"10.66.217.0/24": "\x1b]0;title\x07",
	}
	for subnet, value := range garbage {
		put(t, client, subnetKey(subnet), value)
	}
	const flood = 3000
	for i := 0; i < flood; i += 100 { // names: of others' addresses, with control characters, and many
		var puts []clientv3.Op
		for j := i; j < i+100; j++ {
			name, addr := fmt.Sprintf("n%d", j), b.addr.String()
			if j%3 == 0 {
				name = fmt.Sprintf("n%d\x1b[2J\n", j)
			}
			if j%3 == 1 {
				addr = a.addr.String()
			}
			puts = append(puts, clientv3.OpPut(prefix+"/rootless-ovl/names/"+name, fmt.Sprintf(`{"NodeID":"evil","Addr":%q}`, addr)))
		}
		if _, err := client.Txn(t.Context()).Then(puts...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	var peers []struct {
		Subnet  string `json:"subnet"`
		Problem string `json:"problem"`
	}
	lab.Eventually(t, "peers shows each problem", func() bool {
		if err := d1.Get("/v1/peers", &peers); err != nil {
			t.Fatal(err)
		}
		problems := 0
		for _, p := range peers {
			if _, ok := bad[p.Subnet]; ok && p.Problem != "" {
				problems++
			}
		}
		return problems == len(bad)
	})
	for _, p := range peers {
		if _, is := garbage[p.Subnet]; is {
			t.Errorf("a peer of what is no lease: %+v", p)
		}
	}
	for _, name := range []string{"n1.ovl.internal.", "n2.ovl.internal."} { // an address of ours, one of another peer's
		if m, err := a.Resolve("udp4", port(a.gateway, 53), name, dns.TypeA); err != nil || len(m.Answer) != 0 {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
	pings(t, b.Space, a.addr)
	if r := ping.Stop(); r.Lost() > 0 {
		t.Errorf("meanwhile: %v", r)
	}
	for _, d := range []*lab.Daemon{d1, d2} {
		if n := strings.Count(d.LogText(), "\n"); n > 1500 {
			t.Errorf("%s has logged %d lines", d.Host.Name, n)
		}
		if strings.ContainsAny(d.LogText(), "\x1b\x07\x00") {
			t.Errorf("%s has control characters of others in its log", d.Host.Name)
		}
	}
	if grown := rss(t, d1) - before; grown > 128<<20 {
		t.Errorf("the daemon has grown by %d MB", grown>>20)
	}
}
