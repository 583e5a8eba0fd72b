// This file reads what the rest of the package decides on: interfaces, addresses, routes.

package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// iface is one interface of the host.
type iface struct {
	name  string
	index int
	mtu   int
	addrs []addr // in the kernel's order
}

type addr struct {
	ip    netip.Addr
	flags int  // IFA_F_*
	inUse bool // of Options.InUse
}

// route is one unicast route of any table but the local one.
type route struct {
	dst   netip.Prefix // 0 bits: a default route
	index int          // of its interface; 0 if it has none
	main  bool         // in the main table
}

// network is a snapshot of the host's network.
type network struct {
	ifaces []iface // in the kernel's order
	routes []route // in the kernel's order
	// reach asks the kernel by which interface and from which address it would send to dst.
	reach func(dst netip.Addr) (index int, src netip.Addr, err error)
}

// readHost takes the snapshot.
func readHost() (network, error) {
	n := network{reach: reach}
	links, err := retry(netlink.LinkList)
	if err != nil {
		return network{}, fmt.Errorf("listing interfaces: %w", err)
	}
	addrs, err := retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, unix.AF_UNSPEC) })
	if err != nil {
		return network{}, fmt.Errorf("listing addresses: %w", err)
	}
	for _, l := range links {
		a := l.Attrs()
		i := iface{name: a.Name, index: a.Index, mtu: a.MTU}
		for _, x := range addrs {
			if ip, ok := toAddr(x.IP); ok && x.LinkIndex == a.Index {
				i.addrs = append(i.addrs, addr{ip: ip, flags: x.Flags})
			}
		}
		n.ifaces = append(n.ifaces, i)
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := retry(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return network{}, fmt.Errorf("listing routes: %w", err)
		}
		for _, r := range routes {
			if r.Table == unix.RT_TABLE_LOCAL || r.Type != unix.RTN_UNICAST {
				continue
			}
			x := route{dst: defaultOf(family), index: r.LinkIndex, main: r.Table == unix.RT_TABLE_MAIN}
			if r.Dst != nil {
				ip, ok := toAddr(r.Dst.IP)
				ones, bits := r.Dst.Mask.Size()
				if !ok || bits != ip.BitLen() {
					continue
				}
				x.dst = netip.PrefixFrom(ip, ones)
			}
			if x.index == 0 && len(r.MultiPath) > 0 {
				x.index = r.MultiPath[0].LinkIndex
			}
			n.routes = append(n.routes, x)
		}
	}
	return n, nil
}

// retry reads again while the kernel says that its answer was interrupted by a change.
func retry[T any](read func() (T, error)) (T, error) {
	var got T
	var err error
	for range 5 {
		if got, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return got, err
}

// Has tells whether a is an address of this host: whether what is sent to it stays here, by the kernel's own word, which knows of secondary
// addresses and of whole prefixes too. An address of an interface that is down is none. It asks anew at every call, which takes some 20 µs.
func Has(a netip.Addr) (bool, error) {
	routes, err := netlink.RouteGet(a.Unmap().AsSlice())
	for _, nowhere := range []error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL} { // no route, or one to refuse
		if errors.Is(err, nowhere) {
			return false, nil
		}
	}
	if err != nil {
		return false, fmt.Errorf("asking for the route to %v: %w", a, err)
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Type == unix.RTN_LOCAL }), nil
}

// HasInterface tells whether this host has an interface of that name, up or not.
func HasInterface(name string) (bool, error) {
	links, err := retry(netlink.LinkList)
	if err != nil {
		return false, fmt.Errorf("listing interfaces: %w", err)
	}
	return slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Name == name }), nil
}

// somewhere6 is an address of the world that no host has: of the documentation's (RFC 9637), which only default routes lead to.
var somewhere6 = netip.MustParseAddr("3fff::1")

// Outside6 tells whether this host has an IPv6 way to the world, by the interface of that name if it is not "": a route, and an address that is not
// link-local to send from. A socket that is connected, and sends nothing, tells.
func Outside6(ifName string) bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	if ifName != "" && unix.BindToDevice(fd, ifName) != nil {
		return false
	}
	const discard = 9 // a port
	if unix.Connect(fd, &unix.SockaddrInet6{Addr: somewhere6.As16(), Port: discard}) != nil {
		return false
	}
	sa, err := unix.Getsockname(fd)
	from, ok := sa.(*unix.SockaddrInet6)
	return err == nil && ok && netip.AddrFrom16(from.Addr).IsGlobalUnicast()
}

func reach(dst netip.Addr) (int, netip.Addr, error) {
	routes, err := netlink.RouteGet(dst.AsSlice())
	if err != nil {
		return 0, netip.Addr{}, err
	}
	for _, r := range routes {
		src, _ := toAddr(r.Src)
		return r.LinkIndex, src, nil
	}
	return 0, netip.Addr{}, unix.ENETUNREACH
}

func toAddr(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return a.Unmap(), ok
}

func defaultOf(family int) netip.Prefix {
	if family == unix.AF_INET {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

func (n network) byIndex(index int) (iface, bool) {
	i := slices.IndexFunc(n.ifaces, func(i iface) bool { return i.index == index })
	if i < 0 {
		return iface{}, false
	}
	return n.ifaces[i], true
}
