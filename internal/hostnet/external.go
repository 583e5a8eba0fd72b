// This file chooses the interface and the address that other nodes reach this host at, as flannel does.

package hostnet

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Options are the flags of the choice. With none, it is the interface of the default route.
type Options struct {
	Iface      []string   // --iface: names or addresses, tried in order
	IfaceRegex []string   // --iface-regex: matched against addresses, then names; tried in order after Iface
	CanReach   netip.Addr // --iface-can-reach: the interface of the route to this address; tried last
	// PublicIP and PublicIPv6 are what peers are told (--public-ip, --public-ipv6). Without any of the above the first of the two
	// that is given chooses the interface too, and then must be an address of this host.
	PublicIP, PublicIPv6 netip.Addr
	// InUse are addresses that were chosen before. They stay the choice for as long as their interface is it and they are usable, so that
	// one which is added beside them changes nothing.
	InUse []netip.Addr
}

// Ext is the external interface.
type Ext struct {
	Name     string
	Index    int
	MTU      int        // bytes of IP packet
	Addr     netip.Addr // the IPv4 address of the interface: what the underlay socket binds to
	PublicIP netip.Addr // the address peers send to: Addr, unless given
	// Addr6 is the IPv6 address of the same interface; not valid: it has none. A link-local one, which flannel would take, is none.
	Addr6      netip.Addr
	PublicIPv6 netip.Addr // the IPv6 address peers send to: Addr6, unless given
}

// ErrNoInterface says that no external interface could be chosen.
var ErrNoInterface = errors.New("no external interface")

// noInterface is an ErrNoInterface whose text is complete in itself.
type noInterface struct{ text string }

func (e noInterface) Error() string { return e.text }
func (e noInterface) Unwrap() error { return ErrNoInterface }

func none(format string, args ...any) error { return noInterface{fmt.Sprintf(format, args...)} }

// ExternalInterface chooses in flannel's order: each Iface, each IfaceRegex, CanReach; the first that fits wins. With none
// of these given: the interface that has PublicIP (or PublicIPv6), or without that the one of the first default route of IPv4. It
// must have an IPv4 address, and need not have an IPv6 one. Of each family its address is the public one if that is an address of
// it, or the one that a flag named, or the best. The error, an ErrNoInterface unless reading failed, names the flags that help.
func ExternalInterface(o Options) (Ext, error) {
	n, err := readHost()
	if err != nil {
		return Ext{}, err
	}
	return n.external(o)
}

func (n network) external(o Options) (Ext, error) {
	o.PublicIP, o.CanReach = o.PublicIP.Unmap(), o.CanReach.Unmap()
	switch {
	case o.PublicIP.IsValid() && !o.PublicIP.Is4():
		return Ext{}, none("%v is not an IPv4 address: give one (--public-ip), and an IPv6 one besides if there is one (--public-ipv6)", o.PublicIP)
	case o.PublicIPv6.IsValid() && (!o.PublicIPv6.Is6() || o.PublicIPv6.Is4In6() || o.PublicIPv6.IsLinkLocalUnicast()):
		return Ext{}, none("%v is not an IPv6 address that peers could send to: give one (--public-ipv6)", o.PublicIPv6)
	}
	for i := range n.ifaces {
		for k := range n.ifaces[i].addrs {
			a := &n.ifaces[i].addrs[k]
			a.inUse = slices.Contains(o.InUse, a.ip)
		}
	}
	var (
		c   choice
		err error
	)
	switch given := cmp.Or(o.PublicIP, o.PublicIPv6); {
	case len(o.Iface)+len(o.IfaceRegex) > 0 || o.CanReach.IsValid():
		c, err = n.chosen(o)
	case given.IsValid():
		var ok bool
		if c.iface, ok = n.byAddr(given); !ok {
			flag := "--public-ip"
			if given.Is6() {
				flag = "--public-ipv6"
			}
			err = none("no interface of this host has the address %v: behind NAT give the interface too (--iface NAME %s %v); it has %s", given, flag, given, n.list())
		}
	default:
		c.iface, err = n.byDefaultRoute()
	}
	if err != nil {
		return Ext{}, err
	}
	e := Ext{
		Name: c.iface.name, Index: c.iface.index, MTU: c.iface.mtu,
		Addr:  c.iface.address(v4, o.PublicIP, c.addr),
		Addr6: c.iface.address(v6, o.PublicIPv6, c.addr6),
	}
	switch {
	case !e.Addr.IsValid():
		return Ext{}, none("interface %s has no IPv4 address: choose another (--iface); there is %s", e.Name, n.list())
	case e.MTU == 0:
		return Ext{}, none("interface %s has no MTU: choose another (--iface)", e.Name)
	}
	for _, given := range []netip.Addr{o.PublicIP, o.PublicIPv6} {
		if given.IsValid() && !fits(given, e.Addr) {
			return Ext{}, none("other hosts cannot send to %v: give an address that they reach this host at; interface %s has %v", given, e.Name, e.Addr)
		}
	}
	e.PublicIP, e.PublicIPv6 = cmp.Or(o.PublicIP, e.Addr), cmp.Or(o.PublicIPv6, e.Addr6)
	return e, nil
}

// fits tells whether public could be an address of a host that is bound to bind. Loopback and link-local ones are good among hosts that
// use such ones for everything.
func fits(public, bind netip.Addr) bool {
	switch {
	case public.IsMulticast(), public.IsUnspecified(), public == broadcast:
		return false
	case public.IsLoopback():
		return bind.IsLoopback()
	case public.IsLinkLocalUnicast():
		return bind.IsLinkLocalUnicast()
	}
	return true
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// choice is an interface, and the addresses of it that the flags named; not valid: the best ones.
type choice struct {
	iface       iface
	addr, addr6 netip.Addr
}

// named makes ip the address of its family. A link-local one of IPv6 names its interface alone.
func (c *choice) named(ip netip.Addr) {
	switch {
	case ip.Is4():
		c.addr = ip
	case !ip.IsLinkLocalUnicast():
		c.addr6 = ip
	}
}

// chosen tries the flags one by one. flannel looks at IPv6 addresses in a dual-stack network only; so that the choice is the same
// in every network, a pattern that fits them and nothing else comes last.
func (n network) chosen(o Options) (choice, error) {
	var tried []string
	for _, want := range o.Iface {
		c, ok := n.byIface(want)
		if ok {
			return c, nil
		}
		tried = append(tried, "--iface "+want)
	}
	for _, want := range o.IfaceRegex {
		re, err := regexp.Compile(want)
		if err != nil {
			return choice{}, none("--iface-regex %s is not a regular expression: %v", want, err)
		}
		if c, ok := n.byRegex(re); ok {
			return c, nil
		}
		tried = append(tried, "--iface-regex "+want)
	}
	if o.CanReach.IsValid() {
		index, src, err := n.reach(o.CanReach)
		if i, ok := n.byIndex(index); err == nil && ok {
			c := choice{iface: i}
			c.named(src)
			return c, nil
		}
		text := fmt.Sprintf("--iface-can-reach %v", o.CanReach)
		if err != nil {
			text += fmt.Sprintf(" (%v)", err)
		}
		tried = append(tried, text)
	}
	return choice{}, none("no interface of this host fits %s: there is %s", strings.Join(tried, ", "), n.list())
}

func (n network) byIface(want string) (choice, bool) {
	ip, err := netip.ParseAddr(want)
	if err != nil {
		k := slices.IndexFunc(n.ifaces, func(i iface) bool { return i.name == want })
		if k < 0 || len(n.ifaces[k].best(v4)) == 0 {
			return choice{}, false
		}
		return choice{iface: n.ifaces[k]}, true
	}
	i, ok := n.byAddr(ip.Unmap())
	if !ok || ip.Is6() && len(i.best(v4)) == 0 {
		return choice{}, false
	}
	c := choice{iface: i}
	c.named(ip.Unmap())
	return c, true
}

func (n network) byRegex(re *regexp.Regexp) (choice, bool) {
	matching := func(ips []netip.Addr) netip.Addr {
		for _, ip := range ips {
			if re.MatchString(ip.String()) {
				return ip
			}
		}
		return netip.Addr{}
	}
	for _, fits := range []func(iface, choice) bool{
		func(_ iface, c choice) bool { return c.addr.IsValid() },
		func(i iface, _ choice) bool { return re.MatchString(i.name) },
		func(_ iface, c choice) bool { return c.addr6.IsValid() },
	} {
		for _, i := range n.ifaces {
			c := choice{iface: i, addr: matching(i.best(v4)), addr6: matching(i.best(v6))}
			if len(i.best(v4)) > 0 && fits(i, c) {
				return c, true
			}
		}
	}
	return choice{}, false
}

func (n network) byAddr(ip netip.Addr) (iface, bool) {
	k := slices.IndexFunc(n.ifaces, func(i iface) bool {
		return (ip.Zone() == "" || ip.Zone() == i.name) && i.has(ip.WithZone(""))
	})
	if k < 0 {
		return iface{}, false
	}
	return n.ifaces[k], true
}

func (i iface) has(ip netip.Addr) bool {
	return slices.ContainsFunc(i.addrs, func(a addr) bool { return a.ip == ip })
}

func (n network) byDefaultRoute() (iface, error) {
	for _, r := range n.routes {
		if !r.main || r.dst.Bits() != 0 || !r.dst.Addr().Is4() {
			continue
		}
		i, ok := n.byIndex(r.index)
		if !ok {
			return iface{}, none("the default route of this host has no interface: choose one (--iface NAME, or --public-ip ADDRESS of this host); there is %s", n.list())
		}
		return i, nil
	}
	return iface{}, none("this host has no default route to choose the interface by: name the interface (--iface NAME) or its address (--public-ip ADDRESS); there is %s", n.list())
}

// list is the interfaces and their addresses, for an error.
func (n network) list() string {
	var all []string
	for _, i := range n.ifaces {
		text := i.name
		for _, a := range i.addrs {
			text += " " + a.ip.String()
		}
		all = append(all, text)
	}
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, ", ")
}

// The families of best and address.
const (
	v4 = 32 // bits of an address
	v6 = 128
)

// address is the one to be reached at: public if the interface has it, else named, else the best; not valid: there is none.
func (i iface) address(family int, public, named netip.Addr) netip.Addr {
	if public.IsValid() && i.has(public) {
		return public
	}
	if named.IsValid() {
		return named
	}
	if best := i.best(family); len(best) > 0 {
		return best[0]
	}
	return netip.Addr{}
}

// best is the addresses of a family that peers could use, the best first: global before link-local, in use before others, set by
// hand before dynamic, lasting before temporary. Deprecated ones are not in it, nor link-local ones of IPv6, nor those that another host
// has or may still turn out to have.
func (i iface) best(family int) []netip.Addr {
	usable := slices.DeleteFunc(slices.Clone(i.addrs), func(a addr) bool {
		global := a.ip.IsGlobalUnicast() || a.ip.IsLinkLocalUnicast() && a.ip.Is4()
		unsure := a.flags&unix.IFA_F_TENTATIVE != 0 && a.flags&unix.IFA_F_OPTIMISTIC == 0
		return a.ip.BitLen() != family || !global || unsure || a.flags&(unix.IFA_F_DEPRECATED|unix.IFA_F_DADFAILED) != 0
	})
	rank := func(a addr) int {
		r := 0
		if a.ip.IsLinkLocalUnicast() {
			r += 8
		}
		if !a.inUse {
			r += 4
		}
		if a.flags&unix.IFA_F_PERMANENT == 0 {
			r += 2
		}
		if a.flags&unix.IFA_F_TEMPORARY != 0 {
			r++
		}
		return r
	}
	slices.SortStableFunc(usable, func(a, b addr) int { return rank(a) - rank(b) })
	ips := make([]netip.Addr, len(usable))
	for k, a := range usable {
		ips[k] = a.ip
	}
	return ips
}
