// This file tests what host sockets are bound to.

package stack

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/hostnet"
)

// addToLoopback gives the loopback interface addresses, which are none of the loopback's.
func addToLoopback(t *testing.T, addrs ...netip.Addr) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		bits := a.BitLen()
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, bits)}}
		if err := netlink.AddrAdd(lo, addr); err != nil {
			t.Fatalf("add %v: %v", a, err)
		}
	}
	// The kernel gives an IPv6 address its route, and lets it be used, some time later, even where duplicates are not looked for.
	for _, a := range addrs {
		eventually(t, "the host has "+a.String(), func() bool {
			has, err := hostnet.Has(a)
			return has && err == nil
		})
	}
}

// sources is a UDP server at an address; it tells where datagrams come from.
func sources(t *testing.T, at netip.Addr) (netip.AddrPort, <-chan netip.Addr) {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	from := make(chan netip.Addr, 16)
	go func() {
		for {
			_, a, err := c.ReadFromUDPAddrPort(make([]byte, 16))
			if err != nil {
				return
			}
			from <- a.Addr().Unmap()
		}
	}()
	return netip.AddrPortFrom(at, c.LocalAddr().(*net.UDPAddr).AddrPort().Port()), from
}

func TestOutbound_IsWhereContainersTrafficComesFrom(t *testing.T) {
	if !inOwnNamespace(t) {
		return
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		t.Fatal(err)
	}
	host, chosen := netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("203.0.113.11")
	host6, chosen6 := netip.MustParseAddr("2001:db8::10"), netip.MustParseAddr("2001:db8::11")
	local := netip.MustParseAddr("127.0.0.1")
	addToLoopback(t, host, chosen, host6, chosen6)
	w := newWire(t, func(c *Config) { c.Outbound = Outbound{Addr4: chosen, Addr6: chosen6, Interface: "lo"} })
	for _, tt := range []struct{ container, to, from netip.Addr }{
		{aliceAddr, host, chosen},
		{aliceAddr6, host6, chosen6},
		{aliceAddr, local, local}, // which can be reached from no other address
	} {
		at, from := sources(t, tt.to)
		c := w.containers[tt.container]
		if c == nil {
			c = w.container(tt.container)
		}
		conn := c.dialUDP(at)
		defer conn.Close()
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		select {
		case got := <-from:
			if got != tt.from {
				t.Errorf("UDP to %v came from %v, want %v", tt.to, got, tt.from)
			}
		case <-time.After(patience):
			t.Errorf("nothing came to %v", tt.to)
		}
	}
	// TCP
	l, err := net.Listen("tcp", netip.AddrPortFrom(host, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn := w.containers[aliceAddr].mustDialTCP(l.Addr().(*net.TCPAddr).AddrPort())
	defer conn.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	if got := far.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); got != chosen {
		t.Errorf("TCP came from %v, want %v", got, chosen)
	}
	// Echo: the reply goes to where the request came from, which must be ours.
	w.send(makeEcho(aliceAddr, host, 1, 1, "hello"))
	eventually(t, "the echo reply", func() bool { return w.icmpSeen(header.ICMPv4EchoReply, 0) == 1 })
}

// What Outbound names can go away while the gateway runs; containers are told so, and never sent out elsewhere.
func TestOutbound_ThatIsGoneIsUnreachable(t *testing.T) {
	if !inOwnNamespace(t) {
		return
	}
	host := netip.MustParseAddr("203.0.113.10")
	addToLoopback(t, host)
	for _, tt := range []struct {
		out  Outbound
		code header.ICMPv4Code
	}{
		{Outbound{Interface: "gone0"}, header.ICMPv4NetUnreachable},
		{Outbound{Addr4: netip.MustParseAddr("203.0.113.99")}, header.ICMPv4HostUnreachable},
	} {
		w := newWire(t, func(c *Config) { c.Outbound = tt.out })
		at, from := sources(t, host)
		w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 7), at, []byte("x")))
		w.send(makeTCP(netip.AddrPortFrom(aliceAddr, 7), at, header.TCPFlagSyn, 1))
		eventually(t, "the errors", func() bool { return w.icmpSeen(header.ICMPv4DstUnreachable, tt.code) == 2 })
		if len(from) != 0 {
			t.Errorf("%+v: the datagram went out all the same", tt.out)
		}
		local, from := sources(t, netip.MustParseAddr("127.0.0.1"))
		w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 7), local, []byte("x")))
		select {
		case <-from:
		case <-time.After(patience):
			t.Errorf("%+v: the loopback is not reached any more", tt.out)
		}
	}
}

func TestNew_RefusesOutboundAddressesOfTheWrongFamily(t *testing.T) {
	for _, o := range []Outbound{
		{Addr4: netip.MustParseAddr("2001:db8::1")},
		{Addr6: netip.MustParseAddr("192.0.2.1")},
		{Addr6: netip.MustParseAddr("::ffff:192.0.2.1")},
	} {
		if err := o.validate(); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
}

func setLoopbackMTU(t *testing.T, mtu int) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetMTU(lo, mtu)
	}
	if err != nil {
		t.Fatal(err)
	}
}
