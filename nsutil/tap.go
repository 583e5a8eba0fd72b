// This file makes, adopts and deletes TAP devices in another namespace.

package nsutil

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// TAPConfig says what a TAP is to be. Only IfName and MTU are required.
type TAPConfig struct {
	IfName     string
	Alias      string  // the device's ifalias, up to 255 bytes: it stays with it in every namespace; empty: none
	MAC        [6]byte // zero: the kernel's random one
	MTU        int     // bytes of IP packet
	TxQueueLen int     // packets; 0 leaves the kernel's 1000
	Queues     int     // 0 is 1; more make it a multi-queue device, up to 64
	Addrs      []netip.Prefix
	Routes     []Route
	GSOMaxSegs int  // segments of one superpacket; 0 leaves it. Best effort: not every kernel lets it be set.
	GSOMaxSize int  // bytes of one superpacket; 0 leaves it. Best effort.
	Persist    bool // the device stays when its last descriptor is closed
	Loose      bool // the device is made and left down, for somebody to take; no Addrs and Routes, and nothing else of the namespace is touched

	// What ChangeTAP takes away first, if it is there.
	OldAddrs  []netip.Prefix
	OldRoutes []Route
}

// Route is a route in the namespace, over the TAP.
type Route struct {
	Dst     netip.Prefix
	Gateway netip.Addr // not valid: directly connected
	MTU     int        // bytes of IP packet; 0: that of the device
}

// TAP is a TAP device in another namespace and its descriptors.
type TAP struct {
	// Files has one file a queue: non-blocking, close-on-exec, and not known to the runtime's poller, so that only the
	// poll loop that owns it is woken by it. Flags IFF_TAP|IFF_NO_PI|IFF_VNET_HDR (and IFF_MULTI_QUEUE for more than
	// one) are set; the size of the virtio_net_hdr and the offloads are not.
	Files  []*os.File
	IfName string
	MAC    [6]byte

	mu     sync.Mutex
	closed bool
}

const (
	minMTU = 68         // what IPv4 requires of a link (RFC 791)
	maxMTU = 65535 - 14 // what the tun driver allows a TAP: its frames are 64 KB

	addrGenModeNone = 1 // IN6_ADDR_GEN_MODE_NONE, include/uapi/linux/if_link.h
)

func (c *TAPConfig) check() error {
	if err := checkIfName(c.IfName); err != nil {
		return err
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		return fail(ErrInvalid, nil, "MTU %d is out of range: %d to %d", c.MTU, minMTU, maxMTU)
	}
	if c.Queues < 0 || c.Queues > maxQueues {
		return fail(ErrInvalid, nil, "a TAP has 1 to %d queues, not %d", maxQueues, c.Queues)
	}
	if c.MAC != [6]byte{} && c.MAC[0]&1 != 0 {
		return fail(ErrInvalid, nil, "%s is a multicast address: the first byte of a MAC address must be even", macText(c.MAC))
	}
	if c.Loose && len(c.Addrs)+len(c.Routes) > 0 {
		return fail(ErrInvalid, nil, "addresses and routes are given for %s, which somebody else is to configure", c.IfName)
	}
	for _, p := range c.Addrs {
		if !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			return fail(ErrInvalid, nil, "%v is not an address with a prefix length", p)
		}
	}
	for _, r := range c.Routes {
		if !r.Dst.IsValid() || r.Dst.Masked() != r.Dst || r.Dst.Addr().Is4In6() {
			return fail(ErrInvalid, nil, "%v is not a destination of a route", r.Dst)
		}
		if r.Gateway.IsValid() && r.Gateway.Is4() != r.Dst.Addr().Is4() {
			return fail(ErrInvalid, nil, "route to %v: gateway %v is of the other address family", r.Dst, r.Gateway)
		}
	}
	return nil
}

// checkIfName refuses what the kernel would, and '%', which the kernel replaces by a number.
func checkIfName(name string) error {
	bad := name == "" || len(name) >= unix.IFNAMSIZ || name == "." || name == ".."
	for i := range len(name) {
		bad = bad || strings.IndexByte("/:%\x00 \t\n\v\f\r\xa0", name[i]) >= 0
	}
	if bad {
		return fail(ErrIfName, nil, "%q is not an interface name: 1 to %d bytes without '/', ':', '%%' and spaces", name, unix.IFNAMSIZ-1)
	}
	return nil
}

// CreateTAP makes a TAP in the namespace, up and with its addresses and routes unless it is Loose, and brings the namespace's lo up. On an
// error nothing is left behind. ErrIfNameTaken, ErrRouteTaken and ErrNoIPv6 are the namespace's, ErrTunDevice the host's.
func (n *Namespace) CreateTAP(c TAPConfig) (*TAP, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	queues := max(c.Queues, 1)
	in, err := n.enter(queues)
	if err != nil {
		return nil, err
	}
	defer func() { unix.Close(in.netlink) }()
	t := newTAP(c.IfName, in.tuns)
	if err := n.setUp(t, newRTNL(in.netlink), c); err != nil {
		// Not persistent yet, so the device goes with its descriptors.
		t.Close()
		return nil, err
	}
	return t, nil
}

func (n *Namespace) setUp(t *TAP, rt *rtnl, c TAPConfig) error {
	for _, r := range c.Routes {
		there, found, err := rt.routeTo(r.Dst)
		if err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
		if found {
			return n.routeTaken(r, there.text, nil)
		}
	}
	flags := tapFlags(len(t.Files))
	for i, f := range t.Files {
		excl := uint16(0)
		if i == 0 {
			// Without it the kernel would hand out an existing TAP of that name.
			excl = unix.IFF_TUN_EXCL
		}
		if err := tunSetIff(f, c.IfName, flags|excl); err != nil {
			switch {
			case errors.Is(err, unix.EBUSY) && i == 0:
				return fail(ErrIfNameTaken, err, "%s has an interface %s already: choose another name (--ifname), or start the container without a network of its own (--network none)", n.name, c.IfName)
			case errors.Is(err, unix.EPERM):
				return fail(ErrNotOwner, err, "%s: the kernel does not let you make a TAP there (%v)", n.name, err)
			default:
				return fmt.Errorf("%s: making the TAP %s: %w", n.name, c.IfName, err)
			}
		}
	}
	// Only we, and root of the namespace, may attach to the device while it persists.
	if err := unix.IoctlSetInt(t.fd(), unix.TUNSETOWNER, os.Geteuid()); err != nil {
		return fmt.Errorf("%s: owner of %s: %w", n.name, c.IfName, err)
	}
	link, err := rt.link(c.IfName)
	if err != nil {
		return fmt.Errorf("%s: looking up %s: %w", n.name, c.IfName, err)
	}
	t.MAC = link.mac

	attrs := []*nl.RtAttr{nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(c.MTU)))}
	if c.MAC != [6]byte{} {
		attrs = append(attrs, nl.NewRtAttr(unix.IFLA_ADDRESS, c.MAC[:]))
		t.MAC = c.MAC
	}
	if c.Alias != "" {
		attrs = append(attrs, nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(c.Alias)))
	}
	if c.TxQueueLen > 0 {
		attrs = append(attrs, nl.NewRtAttr(unix.IFLA_TXQLEN, nl.Uint32Attr(uint32(c.TxQueueLen))))
	}
	if err := rt.setLink(link.index, attrs...); err != nil {
		return fmt.Errorf("%s: setting MTU %d, MAC %s and alias of %s: %w", n.name, c.MTU, macText(t.MAC), c.IfName, err)
	}
	// Best effort from here: kernels without IPv6, devices without these limits.
	_ = rt.setLink(link.index, noAddrGen())
	if c.GSOMaxSegs > 0 {
		_ = rt.setLink(link.index, nl.NewRtAttr(unix.IFLA_GSO_MAX_SEGS, nl.Uint32Attr(uint32(c.GSOMaxSegs))))
	}
	if c.GSOMaxSize > 0 {
		_ = rt.setLink(link.index, nl.NewRtAttr(unix.IFLA_GSO_MAX_SIZE, nl.Uint32Attr(uint32(c.GSOMaxSize))))
	}
	if !c.Loose {
		if err := n.bringUp(rt, link.index, c); err != nil {
			return err
		}
	}
	if c.Persist {
		if err := unix.IoctlSetInt(t.fd(), unix.TUNSETPERSIST, 1); err != nil {
			return fmt.Errorf("%s: making %s persistent: %w", n.name, c.IfName, err)
		}
	}
	return nil
}

// bringUp gives the device c's addresses and routes, and brings it and lo up.
func (n *Namespace) bringUp(rt *rtnl, index int32, c TAPConfig) error {
	for _, p := range c.Addrs {
		if err := rt.addAddr(index, p); err != nil {
			return n.addrRefused(p, c.IfName, err)
		}
	}
	if err := rt.setUp(index); err != nil {
		return fmt.Errorf("%s: bringing %s up: %w", n.name, c.IfName, err)
	}
	for _, r := range c.Routes {
		err := rt.addRoute(index, r, r.Gateway.IsValid() && !covers(c.Addrs, r.Gateway))
		switch {
		case err == nil:
		case errors.Is(err, unix.EEXIST):
			there, _, _ := rt.routeTo(r.Dst)
			return n.routeTaken(r, there.text, err)
		default:
			return fmt.Errorf("%s: route to %v over %s: %w", n.name, r.Dst, c.IfName, err)
		}
	}
	lo, err := rt.link("lo")
	if err == nil {
		err = rt.setUp(lo.index)
	}
	if err != nil {
		return fmt.Errorf("%s: bringing lo up: %w", n.name, err)
	}
	return nil
}

func (n *Namespace) addrRefused(p netip.Prefix, ifName string, err error) error {
	if p.Addr().Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)) {
		return fail(ErrNoIPv6, err, "%s: address %v on %s: IPv6 is switched off in the namespace, or the MTU is below 1280 (%v)", n.name, p, ifName, err)
	}
	return fmt.Errorf("%s: address %v on %s: %w", n.name, p, ifName, err)
}

// routeTaken names the route that is in the way.
func (n *Namespace) routeTaken(r Route, text string, cause error) error {
	if r.Dst.Bits() == 0 {
		return fail(ErrRouteTaken, cause, "%s has a default route already (default%s): start the container without a network of its own (--network none), or attach with --no-default-route", n.name, text)
	}
	return fail(ErrRouteTaken, cause, "%s has a route to %v already (%v%s): start the container without a network of its own (--network none), or remove the route inside the container", n.name, r.Dst, r.Dst, text)
}

// Device is a network device in a namespace.
type Device struct {
	IfName string
	Alias  string
	MAC    [6]byte
	Up     bool
}

// TAPsInTheWay are the TUN and TAP devices because of which CreateTAP of c says ErrIfNameTaken or ErrRouteTaken: the one of
// its name, then those that its routes lead over, each once.
func (n *Namespace) TAPsInTheWay(c TAPConfig) ([]Device, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	in, err := n.enter(0)
	if err != nil {
		return nil, err
	}
	defer func() { unix.Close(in.netlink) }()
	rt := newRTNL(in.netlink)
	names := []string{c.IfName}
	for _, r := range c.Routes {
		there, found, err := rt.routeTo(r.Dst)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", n.name, err)
		}
		if found && there.device != "" && !slices.Contains(names, there.device) {
			names = append(names, there.device)
		}
	}
	var devices []Device
	for _, name := range names {
		link, err := rt.link(name)
		switch {
		case errors.Is(err, syscall.ENODEV):
		case err != nil:
			return nil, fmt.Errorf("%s: looking up %s: %w", n.name, name, err)
		case link.kind == "tun":
			devices = append(devices, Device{IfName: name, Alias: link.alias, MAC: link.mac, Up: link.up})
		}
	}
	return devices, nil
}

// AdoptTAP opens a persistent TAP again after whoever held it has died. The device keeps its MAC, addresses and routes;
// header size and offloads must be set again. queues must be what it was made with. ErrNoTAP if there is no TAP of that
// name, ErrTAPBusy if somebody holds it.
func (n *Namespace) AdoptTAP(ifName string, queues int) (*TAP, error) {
	if err := checkIfName(ifName); err != nil {
		return nil, err
	}
	queues = max(queues, 1)
	if queues > maxQueues {
		return nil, fail(ErrInvalid, nil, "a TAP has 1 to %d queues, not %d", maxQueues, queues)
	}
	in, err := n.enter(queues)
	if err != nil {
		return nil, err
	}
	defer func() { unix.Close(in.netlink) }()
	t := newTAP(ifName, in.tuns)
	if err := n.adopt(t, newRTNL(in.netlink)); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (n *Namespace) adopt(t *TAP, rt *rtnl) error {
	link, err := rt.link(t.IfName)
	switch {
	case errors.Is(err, syscall.ENODEV):
		return fail(ErrNoTAP, err, "%s has no interface %s", n.name, t.IfName)
	case err != nil:
		return fmt.Errorf("%s: looking up %s: %w", n.name, t.IfName, err)
	case link.kind != "tun":
		return fail(ErrNoTAP, nil, "%s: %s is not a TAP", n.name, t.IfName)
	}
	t.MAC = link.mac
	for _, f := range t.Files {
		err := tunSetIff(f, t.IfName, tapFlags(len(t.Files)))
		switch {
		case err == nil:
		case errors.Is(err, unix.EBUSY):
			return fail(ErrTAPBusy, err, "%s: the TAP %s is held by another program: is a second daemon running?", n.name, t.IfName)
		case errors.Is(err, unix.EINVAL):
			return fail(ErrNoTAP, err, "%s: %s is not a TAP with %d queue(s)", n.name, t.IfName, len(t.Files))
		case errors.Is(err, unix.EPERM):
			return fail(ErrNotOwner, err, "%s: the TAP %s belongs to another user", n.name, t.IfName)
		default:
			return fmt.Errorf("%s: opening the TAP %s: %w", n.name, t.IfName, err)
		}
	}
	// Had the device gone in between, the kernel would have made a new one, which goes with its descriptors.
	again, err := rt.link(t.IfName)
	if err != nil || again.index != link.index {
		return fail(ErrNoTAP, err, "%s: the TAP %s has just gone", n.name, t.IfName)
	}
	return nil
}

// ChangeTAP gives a TAP that is there c's MTU and GSOMaxSize, and c's addresses and routes beside those that it has, without the old ones that c names. The rest of c does
// not count. An address of it that is there already stays, as does a route to the same destination. After an error, ErrNoTAP and
// ErrNoIPv6 among them, a part of it may have been done.
func (n *Namespace) ChangeTAP(c TAPConfig) error {
	if err := c.check(); err != nil {
		return err
	}
	in, err := n.enter(0)
	if err != nil {
		return err
	}
	defer func() { unix.Close(in.netlink) }()
	rt := newRTNL(in.netlink)
	link, err := rt.link(c.IfName)
	switch {
	case errors.Is(err, syscall.ENODEV), err == nil && link.kind != "tun":
		return fail(ErrNoTAP, err, "%s has no TAP %s", n.name, c.IfName)
	case err != nil:
		return fmt.Errorf("%s: looking up %s: %w", n.name, c.IfName, err)
	}
	if err := rt.setLink(link.index, nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(c.MTU)))); err != nil {
		return fmt.Errorf("%s: setting MTU %d of %s: %w", n.name, c.MTU, c.IfName, err)
	}
	if c.GSOMaxSize > 0 { // best effort, as in CreateTAP
		_ = rt.setLink(link.index, nl.NewRtAttr(unix.IFLA_GSO_MAX_SIZE, nl.Uint32Attr(uint32(c.GSOMaxSize))))
	}
	for _, r := range c.OldRoutes {
		if err := rt.removeRoute(link.index, r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("%s: removing the route to %v over %s: %w", n.name, r.Dst, c.IfName, err)
		}
	}
	for _, p := range c.OldAddrs {
		if err := rt.removeAddr(link.index, p); err != nil && !noSuchAddr(err) {
			return fmt.Errorf("%s: removing %v from %s: %w", n.name, p, c.IfName, err)
		}
	}
	for _, p := range c.Addrs {
		if err := rt.addAddr(link.index, p); err != nil && !errors.Is(err, unix.EEXIST) {
			return n.addrRefused(p, c.IfName, err)
		}
	}
	for _, r := range c.Routes {
		_, there, err := rt.routeTo(r.Dst)
		if err == nil && !there {
			err = rt.addRoute(link.index, r, r.Gateway.IsValid() && !covers(c.Addrs, r.Gateway))
		}
		if err != nil {
			return fmt.Errorf("%s: route to %v over %s: %w", n.name, r.Dst, c.IfName, err)
		}
	}
	return nil
}

// noSuchAddr tells whether an address was not there to be removed: where a device, or a kernel, has no IPv6 at all it is said in other words.
func noSuchAddr(err error) bool {
	return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// Bridge is a bridge in a namespace.
type Bridge struct {
	IfName string
	Addrs  []netip.Prefix // its IPv4 addresses
}

// Bridges lists the bridges of the namespace.
func (n *Namespace) Bridges() ([]Bridge, error) {
	in, err := n.enter(0)
	if err != nil {
		return nil, err
	}
	defer func() { unix.Close(in.netlink) }()
	rt := newRTNL(in.netlink)
	links, err := rt.links("bridge")
	if err != nil {
		return nil, fmt.Errorf("%s: listing bridges: %w", n.name, err)
	}
	var bridges []Bridge
	for _, l := range links {
		addrs, err := rt.addrsOf(l.index)
		if err != nil {
			return nil, fmt.Errorf("%s: addresses of %s: %w", n.name, l.name, err)
		}
		bridges = append(bridges, Bridge{l.name, addrs})
	}
	return bridges, nil
}

// newTAP wraps descriptors. They are made non-blocking only after os.NewFile, which otherwise would register them with
// the runtime's poller.
func newTAP(ifName string, fds []int) *TAP {
	t := &TAP{IfName: ifName}
	for _, fd := range fds {
		_ = unix.SetNonblock(fd, false)
		f := os.NewFile(uintptr(fd), "tap "+ifName)
		_ = unix.SetNonblock(fd, true)
		t.Files = append(t.Files, f)
	}
	return t
}

func (t *TAP) fd() int { return int(t.Files[0].Fd()) }

// Close closes the descriptors and leaves a persistent device in its namespace.
func (t *TAP) Close() error { return t.end(false) }

// Delete makes the device go: it is no longer persistent, and its descriptors are closed. A device whose namespace has
// gone is deleted already.
func (t *TAP) Delete() error { return t.end(true) }

func (t *TAP) end(unpersist bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	// A fork child has copies of the descriptors: the device would outlive this call by as much as the child lives.
	forkMu.Lock()
	defer forkMu.Unlock()
	var first error
	if unpersist {
		err := unix.IoctlSetInt(t.fd(), unix.TUNSETPERSIST, 0)
		if err != nil && !errors.Is(err, unix.EBADFD) {
			first = fmt.Errorf("TAP %s: giving up persistence: %w", t.IfName, err)
		}
	}
	for _, f := range t.Files {
		if err := f.Close(); err != nil && first == nil && !errors.Is(err, os.ErrClosed) {
			first = err
		}
	}
	return first
}

func tapFlags(queues int) uint16 {
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	return flags
}

func tunSetIff(f *os.File, name string, flags uint16) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(flags)
	return unix.IoctlIfreq(int(f.Fd()), unix.TUNSETIFF, ifr)
}

// noAddrGen keeps the kernel from giving the device a link-local address and soliciting routers: the overlay has none.
func noAddrGen() *nl.RtAttr {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	inet6 := spec.AddRtAttr(unix.AF_INET6, nil)
	inet6.AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, nl.Uint8Attr(addrGenModeNone))
	return spec
}

func covers(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func macText(m [6]byte) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}
