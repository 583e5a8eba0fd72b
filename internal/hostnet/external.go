// This file chooses the interface and the address that other nodes reach this host at, as flannel does.

package hostnet

import (
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
	// PublicIP is what peers are told (--public-ip). Without any of the above it chooses the interface too, and then
	// must be an address of this host.
	PublicIP netip.Addr
}

// Ext is the external interface.
type Ext struct {
	Name     string
	Index    int
	MTU      int        // bytes of IP packet
	Addr     netip.Addr // the address of the interface: what the underlay socket binds to
	PublicIP netip.Addr // the address peers send to: Addr, unless given
}

// ErrNoInterface says that no external interface could be chosen.
var ErrNoInterface = errors.New("no external interface")

// noInterface is an ErrNoInterface whose text is complete in itself.
type noInterface struct{ text string }

func (e noInterface) Error() string { return e.text }
func (e noInterface) Unwrap() error { return ErrNoInterface }

func none(format string, args ...any) error { return noInterface{fmt.Sprintf(format, args...)} }

// ExternalInterface chooses in flannel's order: each Iface, each IfaceRegex, CanReach; the first that fits wins. With none
// of these given: the interface that has PublicIP, or without that the one of the first default route. The address is the
// interface's best IPv4 address. The error, an ErrNoInterface unless reading failed, names the flags that help.
func ExternalInterface(o Options) (Ext, error) {
	n, err := readHost()
	if err != nil {
		return Ext{}, err
	}
	return n.external(o)
}

func (n network) external(o Options) (Ext, error) {
	for _, a := range []netip.Addr{o.PublicIP, o.CanReach} {
		if a.IsValid() && !a.Unmap().Is4() {
			return Ext{}, none("%v is not an IPv4 address: give one (nodes reach each other over IPv4)", a)
		}
	}
	o.PublicIP, o.CanReach = o.PublicIP.Unmap(), o.CanReach.Unmap()
	var (
		i   iface
		ip  netip.Addr // not valid: the interface's best
		err error
	)
	switch {
	case len(o.Iface)+len(o.IfaceRegex) > 0 || o.CanReach.IsValid():
		i, ip, err = n.chosen(o)
	case o.PublicIP.IsValid():
		ip = o.PublicIP
		var ok bool
		if i, ok = n.byAddr(ip); !ok {
			err = none("no interface of this host has the address %v: behind NAT give the interface too (--iface NAME --public-ip %v); it has %s", ip, ip, n.list())
		}
	default:
		i, err = n.byDefaultRoute()
	}
	if err == nil && !ip.IsValid() {
		if best := i.best(); len(best) > 0 {
			ip = best[0]
		} else {
			err = none("interface %s has no IPv4 address: choose another (--iface); there is %s", i.name, n.list())
		}
	}
	if err == nil && i.mtu == 0 {
		err = none("interface %s has no MTU: choose another (--iface)", i.name)
	}
	if err != nil {
		return Ext{}, err
	}
	public := ip
	if o.PublicIP.IsValid() {
		public = o.PublicIP
	}
	return Ext{Name: i.name, Index: i.index, MTU: i.mtu, Addr: ip, PublicIP: public}, nil
}

// chosen tries the flags one by one.
func (n network) chosen(o Options) (iface, netip.Addr, error) {
	var tried []string
	for _, want := range o.Iface {
		if ip, err := netip.ParseAddr(want); err == nil {
			if i, ok := n.byAddr(ip.Unmap()); ok {
				return i, ip.Unmap(), nil
			}
		} else if k := slices.IndexFunc(n.ifaces, func(i iface) bool { return i.name == want }); k >= 0 && len(n.ifaces[k].best()) > 0 {
			return n.ifaces[k], netip.Addr{}, nil
		}
		tried = append(tried, "--iface "+want)
	}
	for _, want := range o.IfaceRegex {
		re, err := regexp.Compile(want)
		if err != nil {
			return iface{}, netip.Addr{}, none("--iface-regex %s is not a regular expression: %v", want, err)
		}
		for _, i := range n.ifaces {
			for _, ip := range i.best() {
				if re.MatchString(ip.String()) {
					return i, ip, nil
				}
			}
		}
		for _, i := range n.ifaces {
			if re.MatchString(i.name) && len(i.best()) > 0 {
				return i, netip.Addr{}, nil
			}
		}
		tried = append(tried, "--iface-regex "+want)
	}
	if o.CanReach.IsValid() {
		index, src, err := n.reach(o.CanReach)
		if i, ok := n.byIndex(index); err == nil && ok {
			return i, src, nil
		}
		text := fmt.Sprintf("--iface-can-reach %v", o.CanReach)
		if err != nil {
			text += fmt.Sprintf(" (%v)", err)
		}
		tried = append(tried, text)
	}
	return iface{}, netip.Addr{}, none("no interface of this host fits %s: there is %s", strings.Join(tried, ", "), n.list())
}

func (n network) byAddr(ip netip.Addr) (iface, bool) {
	k := slices.IndexFunc(n.ifaces, func(i iface) bool {
		return slices.ContainsFunc(i.addrs, func(a addr) bool { return a.ip == ip })
	})
	if k < 0 {
		return iface{}, false
	}
	return n.ifaces[k], true
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

// best is the addresses that peers could use, the best first: global before link-local, set by hand before dynamic,
// lasting before temporary; deprecated ones not at all.
func (i iface) best() []netip.Addr {
	usable := slices.DeleteFunc(slices.Clone(i.addrs), func(a addr) bool {
		global := a.ip.IsGlobalUnicast() || a.ip.IsLinkLocalUnicast()
		return !a.ip.Is4() || !global || a.flags&unix.IFA_F_DEPRECATED != 0
	})
	rank := func(a addr) int {
		r := 0
		if a.ip.IsLinkLocalUnicast() {
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
