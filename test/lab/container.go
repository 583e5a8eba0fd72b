// This file is a container: a process in a user and network namespace of its own, owned by the host's user.

package lab

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Container is a namespace pair with one process in it, as `unshare -Urn` makes it.
type Container struct {
	*Space
	Name string
	PID  int
	Host *Host

	cmd   *exec.Cmd
	stdin io.Closer
	done  chan struct{}
}

// Container starts a container on the host. It ends with the test, or by Stop.
func (h *Host) Container(name string) *Container {
	h.lab.t.Helper()
	return h.ContainerMapped(name, 0)
}

// ContainerMapped is Container with the host's user mapped to uid inside, as podman's --userns=keep-id does.
func (h *Host) ContainerMapped(name string, uid int) *Container {
	t := h.lab.t
	t.Helper()
	cmd := h.Command("cat") // waits for the end of its input
	stdin, err := cmd.StdinPipe()
	must(t, name, err)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Getgid(), Size: 1}},
	}
	must(t, "container "+name, h.Start(cmd))
	c := &Container{Name: name, PID: cmd.Process.Pid, Host: h, cmd: cmd, stdin: stdin, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		_ = cmd.Wait()
	}()
	t.Cleanup(c.Stop)
	ns, err := os.Open(c.NetnsPath())
	must(t, "container "+name, err)
	t.Cleanup(func() { ns.Close() })
	c.Space = &Space{net: ns}
	must(t, "container "+name, c.Do(func() error {
		_ = writeSysctl("net/ipv4/tcp_congestion_control", "cubic") // not every kernel has it
		return linkUp("lo")
	}))
	return c
}

// NetnsPath is the container's network namespace in /proc.
func (c *Container) NetnsPath() string { return fmt.Sprintf("/proc/%d/ns/net", c.PID) }

// Stop ends the container's process and waits for it. The lab itself still holds the namespace until the test ends.
func (c *Container) Stop() {
	c.stdin.Close()
	stop(c.cmd.Process, unix.SIGKILL, c.done, 10*time.Second)
}

// Release stops the container and lets go of its namespace, so that the kernel removes it.
func (c *Container) Release() {
	c.Stop()
	c.net.Close()
}

// Run runs a program in the container's network namespace, with every capability over it.
func (c *Container) Run(name string, args ...string) Result {
	c.Host.lab.t.Helper()
	return finish(c.Host.lab.t, c.Space, c.Host.Command(name, args...), true)
}

// Sysctl sets a sysctl of the network namespace.
func (s *Space) Sysctl(name, value string) error {
	return s.Do(func() error { return writeSysctl(name, value) })
}

// Interface is what a container sees of one of its network interfaces.
type Interface struct {
	Name       string
	Index      int
	MAC        string
	MTU        int
	TxQueueLen int
	Up         bool
	Addrs      []netip.Prefix // IPv4
	Addrs6     []netip.Prefix // IPv6, the link-local one too
}

// Interfaces lists the interfaces of the namespace but lo.
func (s *Space) Interfaces() ([]Interface, error) {
	var found []Interface
	err := s.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, link := range links {
			attrs := link.Attrs()
			if attrs.Name == "lo" || attrs.Name == "sit0" || attrs.Name == "tunl0" || strings.HasPrefix(attrs.Name, "ip6") {
				continue
			}
			i := Interface{
				Name: attrs.Name, Index: attrs.Index, MAC: attrs.HardwareAddr.String(), MTU: attrs.MTU, TxQueueLen: attrs.TxQLen,
				Up: attrs.Flags&unix.IFF_UP != 0,
			}
			addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, a := range addrs {
				addr, _ := netip.AddrFromSlice(a.IP)
				bits, _ := a.Mask.Size()
				if addr = addr.Unmap(); addr.Is4() {
					i.Addrs = append(i.Addrs, netip.PrefixFrom(addr, bits))
				} else {
					i.Addrs6 = append(i.Addrs6, netip.PrefixFrom(addr, bits))
				}
			}
			found = append(found, i)
		}
		return nil
	})
	return found, err
}

// Routes lists the namespace's IPv4 routes as text, such as "default via 100.96.1.1 dev eth0".
func (s *Space) Routes() ([]string, error) { return s.routes(netlink.FAMILY_V4) }

// Routes6 is Routes for IPv6.
func (s *Space) Routes6() ([]string, error) { return s.routes(netlink.FAMILY_V6) }

func (s *Space) routes(family int) ([]string, error) {
	var found []string
	err := s.Do(func() error {
		routes, err := netlink.RouteList(nil, family)
		if err != nil {
			return err
		}
		for _, r := range routes {
			text := "default"
			if r.Dst != nil {
				if ones, _ := r.Dst.Mask.Size(); ones > 0 || !r.Dst.IP.IsUnspecified() {
					text = r.Dst.String()
				}
			}
			if r.Gw != nil {
				text += " via " + r.Gw.String()
			}
			if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
				text += " dev " + link.Attrs().Name
			}
			found = append(found, text)
		}
		return nil
	})
	return found, err
}

// Neighbour is the link address that the namespace's kernel has learnt for addr; empty when none.
func (s *Space) Neighbour(addr netip.Addr) string {
	mac := ""
	_ = s.Do(func() error {
		neighbours, err := netlink.NeighList(0, netlink.FAMILY_ALL)
		for _, n := range neighbours {
			if a, _ := netip.AddrFromSlice(n.IP); a.Unmap() == addr && len(n.HardwareAddr) > 0 {
				mac = n.HardwareAddr.String()
			}
		}
		return err
	})
	return mac
}

// AddAddr gives an interface of the namespace a further address, as a container that lies about its address would.
func (s *Space) AddAddr(ifName string, prefix netip.Prefix) error {
	return s.Do(func() error {
		link, err := netlink.LinkByName(ifName)
		if err != nil {
			return err
		}
		return addAddr(link, prefix)
	})
}

// Blackhole has the space drop what is for the prefix without a word. To do so twice is no error.
func (s *Space) Blackhole(prefix netip.Prefix) error {
	return s.Do(func() error {
		return netlink.RouteReplace(&netlink.Route{
			Dst:  &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())},
			Type: unix.RTN_BLACKHOLE,
		})
	})
}

// Unblackhole undoes Blackhole.
func (s *Space) Unblackhole(prefix netip.Prefix) error {
	return s.Do(func() error {
		return netlink.RouteDel(&netlink.Route{
			Dst:  &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())},
			Type: unix.RTN_BLACKHOLE,
		})
	})
}

// AddRoute has the space send what is for the prefix to a router. To do so twice is no error.
func (s *Space) AddRoute(prefix netip.Prefix, via netip.Addr) error {
	return s.Do(func() error {
		return netlink.RouteReplace(&netlink.Route{
			Dst: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}, Gw: via.AsSlice(),
		})
	})
}

// MarkToMain has the space look up what has the mark in the main table, before all other rules.
func (s *Space) MarkToMain(mark, mask uint32) error {
	return s.Do(func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			rule := netlink.NewRule()
			rule.Family, rule.Priority, rule.Mark, rule.Mask, rule.Table = family, 1, mark, &mask, unix.RT_TABLE_MAIN
			if err := netlink.RuleAdd(rule); err != nil {
				return err
			}
		}
		return nil
	})
}

// Give moves an interface of the space to a container, where it gets another name and is down, as a container engine does.
func (s *Space) Give(ifName string, to *Container, as string) error {
	err := s.Do(func() error {
		link, err := netlink.LinkByName(ifName)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetDown(link); err != nil {
			return err
		}
		return netlink.LinkSetNsFd(link, int(to.net.Fd()))
	})
	if err != nil {
		return err
	}
	return to.Do(func() error {
		link, err := netlink.LinkByName(ifName)
		if err != nil {
			return err
		}
		return netlink.LinkSetName(link, as)
	})
}

// SetUp gives an interface of the space its address and the default route, and brings it up.
func (s *Space) SetUp(ifName string, addr netip.Prefix, gateway netip.Addr) error {
	return s.Do(func() error {
		link, err := netlink.LinkByName(ifName)
		if err != nil {
			return err
		}
		if err := addAddr(link, addr); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway.AsSlice()})
	})
}

// LogPath is where a named log of the host is written.
func (h *Host) LogPath(name string) string { return filepath.Join(h.Dir, name+".log") }

// AddBridge makes an interface of that name in the namespace, to be in the way.
func (s *Space) AddBridge(name string) error {
	return s.Do(func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}})
	})
}
