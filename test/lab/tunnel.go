// This file is a narrow place on the way between two hosts: a tunnel of a smaller MTU between two routers, as the internet is
// full of.

package lab

import (
	"net"
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
	l.cable(n.near, n.far, "tunnel0", nearEnd, farEnd, mtu)
	l.cable(n.far, n.Far.Space, "lan0", farRouter, farHost, l.mtu)
	for _, router := range []*Space{n.near, n.far} {
		must(l.t, "router", router.Sysctl("net/ipv4/ip_forward", "1"))
	}
	route := func(s *Space, dst netip.Prefix, via netip.Addr) {
		must(l.t, "route", s.Do(func() error {
			r := &netlink.Route{Gw: via.AsSlice()}
			if dst.IsValid() {
				r.Dst = &net.IPNet{IP: dst.Addr().AsSlice(), Mask: net.CIDRMask(dst.Bits(), 32)}
			}
			return netlink.RouteAdd(r)
		}))
	}
	route(n.near, netip.Prefix{}, RouterAddr)
	route(n.near, farNets, farEnd.Addr())
	route(n.far, netip.Prefix{}, nearEnd.Addr())
	route(n.Far.Space, netip.Prefix{}, farRouter.Addr())
	route(l.Outside.Space, farNets, nearRouter.Addr())
	for _, h := range l.hosts {
		route(h.Space, farNets, nearRouter.Addr())
	}
	return n
}

// cable lays a cable between two spaces, the same interface name at both ends.
func (l *Lab) cable(a, b *Space, name string, addrA, addrB netip.Prefix, mtu int) {
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
			_ = writeSysctl("net/ipv6/conf/all/disable_ipv6", "1")      // not every kernel has it
			if err := linkUp("lo"); err != nil {
				return err
			}
			return linkUp(name)
		}))
	}
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
			rule := netlink.NewRule()
			rule.Family, rule.Priority, rule.IifName, rule.Type = unix.AF_INET, 1, "lo", unix.RTN_BLACKHOLE
			return netlink.RuleAdd(rule)
		}))
	}
}
