// This file is a narrow place on the way between two hosts: a tunnel of a smaller MTU between two routers, as the internet is
// full of.

package lab

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses beyond a tunnel: the far host is on a LAN of its own, whose router is one end of the tunnel; the other end is on
// the lab's LAN.
var (
	nearRouter = netip.MustParsePrefix("192.0.2.2/24")
	nearEnd    = netip.MustParsePrefix("198.51.100.129/30")
	farEnd     = netip.MustParsePrefix("198.51.100.130/30")
	farRouter  = netip.MustParsePrefix("198.51.100.1/25")
	farHost    = netip.MustParsePrefix("198.51.100.11/25")
	farNets    = netip.MustParsePrefix("198.51.100.0/24")

	nearRouter6 = like(LAN6, nearRouter.Addr())
	nearEnd6    = netip.MustParsePrefix("2001:db8:0:5101::1/64")
	farEnd6     = netip.MustParsePrefix("2001:db8:0:5101::2/64")
	farRouter6  = netip.MustParsePrefix("2001:db8:0:5100::1/64")
	farHost6    = netip.MustParsePrefix("2001:db8:0:5100::b/64")
	farNets6    = netip.MustParsePrefix("2001:db8:0:5100::/63")
)

// Tunnel is the link between the two routers.
type Tunnel struct {
	// Far is the host behind it, whose own interface has the LAN's MTU.
	Far *Host

	t         T
	near, far *Space // the routers
}

// Tunnel makes a tunnel and the host behind it. One in a lab.
func (l *Lab) Tunnel(mtu int) *Tunnel {
	l.t.Helper()
	space := func(what string) *Space {
		s, err := newSpace()
		must(l.t, what, err)
		l.t.Cleanup(s.close)
		return s
	}
	n := &Tunnel{t: l.t, far: space("far router")}
	n.near = l.plug("near", nearRouter.Addr()).Space
	n.Far = &Host{Space: space("far host"), Name: "far", Addr: farHost.Addr(), lab: l, Dir: filepath.Join(l.Dir, "far")}
	for _, dir := range []string{n.Far.Dir, n.Far.Home(), n.Far.XDGRuntimeDir()} {
		must(l.t, "far host", os.Mkdir(dir, 0o700))
	}
	l.cable(n.near, n.far, "tunnel0", mtu, nearEnd, farEnd)
	l.cable(n.far, n.Far.Space, "lan0", l.mtu, farRouter, farHost)
	n.routes("net/ipv4/ip_forward", RouterAddr, nearRouter.Addr(), nearEnd.Addr(), farEnd.Addr(), farRouter.Addr(), farNets)
	if l.ipv6 {
		n.Far.Addr6 = farHost6.Addr()
		l.addr6(n.near, n.far, "tunnel0", nearEnd6, farEnd6)
		l.addr6(n.far, n.Far.Space, "lan0", farRouter6, farHost6)
		n.routes("net/ipv6/conf/all/forwarding", RouterAddr6, nearRouter6, nearEnd6.Addr(), farEnd6.Addr(), farRouter6.Addr(), farNets6)
	}
	return n
}

// routes makes routers of the two, for one family, and has everybody know the way.
func (n *Tunnel) routes(forwarding string, router, nearRouter, nearEnd, farEnd, farRouter netip.Addr, farNets netip.Prefix) {
	l := n.Far.lab
	route := func(s *Space, dst netip.Prefix, via netip.Addr) {
		must(l.t, "route", addRoute(s, dst, via))
	}
	for _, s := range []*Space{n.near, n.far} {
		must(l.t, "router", s.Sysctl(forwarding, "1"))
	}
	route(n.near, netip.Prefix{}, router)
	route(n.near, farNets, farEnd)
	route(n.far, netip.Prefix{}, nearEnd)
	route(n.Far.Space, netip.Prefix{}, farRouter)
	route(l.Outside.Space, farNets, nearRouter)
	for _, h := range l.hosts {
		route(h.Space, farNets, nearRouter)
	}
}

// cable lays a cable between two spaces, the same interface name at both ends.
func (l *Lab) cable(a, b *Space, name string, mtu int, addrA, addrB netip.Prefix) {
	l.t.Helper()
	must(l.t, "cable", a.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu}, PeerName: name, PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(b.net.Fd()),
		})
	}))
	for s, addr := range map[*Space]netip.Prefix{a: addrA, b: addrB} {
		must(l.t, "cable", s.AddAddr(name, addr))
		must(l.t, "cable", s.Do(func() error {
			_ = writeSysctl("net/ipv4/tcp_congestion_control", "cubic") // not every kernel has it
			if err := l.setIPv6(name); err != nil {
				return err
			}
			if err := linkUp("lo"); err != nil {
				return err
			}
			return linkUp(name)
		}))
	}
	for _, s := range []*Space{a, b} {
		must(l.t, "cable", s.Do(func() error { return carry(name) }))
	}
}

// addr6 gives a cable's ends their IPv6 addresses.
func (l *Lab) addr6(a, b *Space, name string, addrA, addrB netip.Prefix) {
	l.t.Helper()
	must(l.t, "cable", errors.Join(a.AddAddr(name, addrA), b.AddAddr(name, addrB)))
}

// SetMTU changes what the tunnel carries.
func (n *Tunnel) SetMTU(mtu int) {
	n.t.Helper()
	for _, s := range []*Space{n.near, n.far} {
		must(n.t, "MTU of the tunnel", s.Do(func() error {
			link, err := netlink.LinkByName("tunnel0")
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(link, mtu)
		}))
	}
}

// Silence keeps the routers from sending anything of their own, ICMP errors above all: what does not fit is lost without a word.
// They still forward.
func (n *Tunnel) Silence() {
	n.t.Helper()
	for _, s := range []*Space{n.near, n.far} {
		must(n.t, "silent router", s.Do(func() error {
			families := []int{unix.AF_INET}
			if n.Far.lab.ipv6 {
				families = append(families, unix.AF_INET6)
			}
			for _, family := range families {
				rule := netlink.NewRule()
				rule.Family, rule.Priority, rule.IifName, rule.Type = family, 1, "lo", unix.RTN_BLACKHOLE
				if err := netlink.RuleAdd(rule); err != nil {
					return err
				}
			}
			return nil
		}))
	}
}
