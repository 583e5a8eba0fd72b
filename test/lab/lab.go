// This file lays the cables: a switch, the outside host, and hosts.

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// T is what the lab needs of a *testing.T; the demo has its own.
type T interface {
	Helper()
	Name() string
	Context() context.Context
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(func())
}

// Addresses of a lab's LAN. The outside host is the LAN's router and has OutsideAddr behind it.
var (
	LAN         = netip.MustParsePrefix("192.0.2.0/24")
	RouterAddr  = netip.MustParseAddr("192.0.2.1")
	OutsideAddr = netip.MustParseAddr("203.0.113.10")
	// MetadataAddr is where clouds serve credentials; the outside host has it too, so that a closed door can be told from
	// an absent one.
	MetadataAddr = netip.MustParseAddr("169.254.169.254")
)

// The same of a lab made with WithIPv6, in which every host has an IPv6 address that ends with the number its IPv4 address ends with.
var (
	LAN6         = netip.MustParsePrefix("2001:db8:0:2::/64")
	RouterAddr6  = like(LAN6, RouterAddr)
	OutsideAddr6 = netip.MustParseAddr("2001:db8:0:203::10")
)

// like is the address of an IPv6 prefix that ends with the last byte of an IPv4 address.
func like(p netip.Prefix, v4 netip.Addr) netip.Addr {
	b := p.Addr().As16()
	b[15] = v4.As4()[3]
	return netip.AddrFrom16(b)
}

// MTU is that of the LAN, unless WithMTU says otherwise.
const MTU = 1500

// Lab is one switch with what is plugged in. Labs are independent of each other.
type Lab struct {
	// Outside is a host that runs no daemon: router, resolver, web server and etcd server of a test.
	Outside *Host
	// Dir is the lab's directory, removed with it.
	Dir string

	t       T
	fabric  *Space
	hosts   []*Host
	capture *capture
	noPing  bool
	ipv6    bool
	mtu     int
}

var labs atomic.Int64

// An Option changes how a lab is made.
type Option func(*Lab)

// WithoutPing leaves net.ipv4.ping_group_range of the hosts as a new network namespace has it: nobody may open ICMP sockets.
func WithoutPing(l *Lab) { l.noPing = true }

// WithMTU makes a LAN of another MTU.
func WithMTU(mtu int) Option { return func(l *Lab) { l.mtu = mtu } }

// WithIPv6 gives the LAN IPv6 addresses too: see LAN6. Without it the hosts have IPv6 switched off.
func WithIPv6(l *Lab) { l.ipv6 = true }

// New makes a lab with the outside host and n hosts named h1, h2, ... at 192.0.2.11, .12, ... It lives as long as t.
func New(t T, n int, options ...Option) *Lab {
	t.Helper()
	l := &Lab{t: t, mtu: MTU, Dir: filepath.Join(os.Getenv(dirVar), "l"+strconv.FormatInt(labs.Add(1), 10))}
	for _, o := range options {
		o(l)
	}
	if os.Getenv(stageVar) != "lab" {
		t.Fatalf("lab: not inside the lab's namespaces: TestMain must call lab.Main")
	}
	must(t, "lab directory", os.Mkdir(l.Dir, 0o755))
	fabric, err := newSpace()
	must(t, "switch", err)
	l.fabric = fabric
	t.Cleanup(func() { l.end() })
	must(t, "switch", fabric.Do(func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "switch", MTU: l.mtu}}
		if err := netlink.LinkAdd(bridge); err != nil {
			return err
		}
		return netlink.LinkSetUp(bridge)
	}))
	l.capture = &capture{space: fabric}

	l.Outside = l.plug("outside", RouterAddr)
	must(t, "outside addresses", l.Outside.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		addrs := []netip.Addr{OutsideAddr, MetadataAddr}
		if l.ipv6 {
			addrs = append(addrs, OutsideAddr6)
		}
		for _, addr := range addrs {
			if err := addAddr(lo, netip.PrefixFrom(addr, addr.BitLen())); err != nil {
				return err
			}
		}
		// The outside host is a machine of the world, whose services need not care about privileges.
		return writeSysctl("net/ipv4/ip_unprivileged_port_start", "0")
	}))
	base := LAN.Addr().As4()
	for i := range n {
		base[3] = byte(11 + i)
		h := l.plug("h"+strconv.Itoa(i+1), netip.AddrFrom4(base))
		must(t, "default route of "+h.Name, addRoute(h.Space, netip.Prefix{}, RouterAddr))
		if l.ipv6 {
			must(t, "default route of "+h.Name, addRoute(h.Space, netip.Prefix{}, RouterAddr6))
		}
		l.hosts = append(l.hosts, h)
	}
	return l
}

// Host returns host number i, from 1.
func (l *Lab) Host(i int) *Host { return l.hosts[i-1] }

// plug makes a host and its cable.
func (l *Lab) plug(name string, addr netip.Addr) *Host {
	l.t.Helper()
	space, err := newSpace()
	must(l.t, name, err)
	h := &Host{Space: space, Name: name, Addr: addr, lab: l, Dir: filepath.Join(l.Dir, name)}
	if l.ipv6 {
		h.Addr6 = like(LAN6, addr)
	}
	l.t.Cleanup(space.close)
	uid, gid, _ := hostUser()
	for _, dir := range []string{h.Dir, h.Home(), h.XDGRuntimeDir()} {
		must(l.t, name, os.Mkdir(dir, 0o700))
		must(l.t, name, os.Chown(dir, uid, gid))
	}
	h.SetResolvConf("nameserver " + RouterAddr.String() + "\n")

	port := "to-" + name
	must(l.t, "cable of "+name, l.fabric.Do(func() error {
		veth := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: port, MTU: l.mtu}, PeerName: "lan0", PeerNamespace: netlink.NsFd(space.net.Fd()),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		bridge, err := netlink.LinkByName("switch")
		if err != nil {
			return err
		}
		link, err := netlink.LinkByName(port)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMaster(link, bridge); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	}))
	must(l.t, "network of "+name, space.Do(func() error {
		// ping_group_range: what a distribution sets for its users. cubic: BBR paces bare veth and hides everything.
		if gid := strconv.Itoa(gid); !l.noPing {
			if err := writeSysctl("net/ipv4/ping_group_range", gid+" "+gid); err != nil {
				return err
			}
		}
		_ = writeSysctl("net/ipv4/tcp_congestion_control", "cubic") // not every kernel has it
		if err := l.setIPv6("lan0"); err != nil {
			return err
		}
		if err := linkUp("lo"); err != nil {
			return err
		}
		link, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		if err := addAddr(link, netip.PrefixFrom(addr, LAN.Bits())); err != nil {
			return err
		}
		if l.ipv6 {
			if err := addAddr(link, netip.PrefixFrom(h.Addr6, LAN6.Bits())); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	}))
	must(l.t, "cable of "+name, errors.Join(space.Do(func() error { return carry("lan0") }), l.fabric.Do(func() error { return carry(port) })))
	must(l.t, "resolv.conf of "+name, space.Do(func() error {
		return bindOver(h.resolvConf(), "/etc/resolv.conf")
	}))
	must(l.t, "capture of "+name, l.capture.add(port))
	return h
}

// setIPv6 switches IPv6 on or off in the calling thread's network namespace, which has the interface already. On means: addresses are
// usable at once, and none comes from a router.
func (l *Lab) setIPv6(ifName string) error {
	if !l.ipv6 {
		_ = writeSysctl("net/ipv6/conf/all/disable_ipv6", "1") // not every kernel has it
		return nil
	}
	for _, conf := range []string{"all", "default", ifName} {
		for _, name := range []string{"accept_dad", "accept_ra"} {
			if err := writeSysctl("net/ipv6/conf/"+conf+"/"+name, "0"); err != nil {
				return err
			}
		}
	}
	return nil
}

// addRoute adds a route in the space, the default route when dst is none.
func addRoute(s *Space, dst netip.Prefix, via netip.Addr) error {
	return s.Do(func() error {
		r := &netlink.Route{Gw: via.AsSlice()}
		if dst.IsValid() {
			r.Dst = &net.IPNet{IP: dst.Addr().AsSlice(), Mask: net.CIDRMask(dst.Bits(), dst.Addr().BitLen())}
		}
		return netlink.RouteAdd(r)
	})
}

// addAddr gives an interface of the calling thread's network namespace an address, which is usable at once.
func addAddr(link netlink.Link, prefix netip.Prefix) error {
	addr, err := netlink.ParseAddr(prefix.String())
	if err != nil {
		return err
	}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(link, addr)
}

// end keeps what tells of a failure and removes the lab's directory.
func (l *Lab) end() {
	for _, h := range append(l.hosts, l.Outside) {
		if h == nil {
			continue
		}
		if err := h.Mend(); err != nil {
			l.t.Logf("lab: %v", err)
		}
	}
	if l.capture != nil {
		l.capture.stop()
	}
	if l.t.Failed() {
		l.keep()
	}
	l.fabric.close()
	if err := os.RemoveAll(l.Dir); err != nil {
		l.t.Logf("lab: %v", err)
	}
}

// keep saves logs and packets of a failed test where ArtifactsVar says, and shows the ends of the logs.
func (l *Lab) keep() {
	logs, _ := filepath.Glob(filepath.Join(l.Dir, "*", "*.log"))
	for _, path := range logs {
		if b, err := os.ReadFile(path); err == nil {
			const most = 8 << 10
			if len(b) > most {
				b = append([]byte("[...]\n"), b[len(b)-most:]...)
			}
			l.t.Logf("%s:\n%s", strings.TrimPrefix(path, l.Dir+"/"), b)
		}
	}
	dir := os.Getenv(ArtifactsVar)
	if dir == "" {
		l.t.Logf("set %s to a directory that everybody can write, to get the whole logs and a packet capture", ArtifactsVar)
		return
	}
	dir = filepath.Join(dir, strings.ReplaceAll(l.t.Name(), "/", "_"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Logf("lab: artifacts: %v", err)
		return
	}
	for _, path := range logs {
		name := filepath.Base(filepath.Dir(path)) + "-" + filepath.Base(path)
		if err := copyTo(path, filepath.Join(dir, name)); err != nil {
			l.t.Logf("lab: artifacts: %v", err)
		}
	}
	if err := l.capture.save(filepath.Join(dir, "lan.pcap")); err != nil {
		l.t.Logf("lab: artifacts: %v", err)
	}
	l.t.Logf("logs and packets are in %s", dir)
}

func copyTo(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// must ends the test where the lab itself fails.
func must(t T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("lab: %s: %v", what, err)
	}
}

func linkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// carry waits until interfaces of the calling thread's network namespace, which were set up, send and receive. The kernel finds out by itself, a while
// after the other end was set up, that a virtual cable is whole; until then what is sent is lost, and a bridge leaves the port out.
func carry(names ...string) error {
	const limit = 30 * time.Second
	deadline := time.Now().Add(limit)
	for _, name := range names {
		for {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if link.Attrs().OperState == netlink.OperUp {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s is %v after %v", name, link.Attrs().OperState, limit)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// writeSysctl sets a sysctl of the calling thread's network namespace.
func writeSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644)
}

// bindOver mounts file over target in the calling thread's mount namespace.
func bindOver(file, target string) error {
	real, err := filepath.EvalSymlinks(target)
	if err != nil {
		return err
	}
	if err := unix.Mount(file, real, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s over %s: %w", file, real, err)
	}
	return nil
}
