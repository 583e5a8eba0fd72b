// This file is the lab: two hosts on a wire, and containers on the hosts.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The underlays.
const (
	underlayVeth = "veth"
	underlayNIC  = "nic-like"
)

// uplink is every host's interface on the wire.
const uplink = "uplink0"

// wireAddr is the bridge's address and the hosts' default route: it answers ARP and forwards nothing.
var wireAddr = netip.MustParseAddr("192.0.2.254")

// host is a simulated machine.
type host struct {
	*space
	addr netip.Addr // on the wire
	home string     // the user's directory
}

// end is where a path begins or ends.
type end struct {
	*space
	addr netip.Addr
}

func (h *host) end() end { return end{h.space, h.addr} }

// lab is two hosts over one underlay, and the peers that run on them. It is used by one goroutine.
type lab struct {
	underlay string
	dir      string
	program  string // rootless-ovl, where the user can run it
	uid      int
	log      io.Writer // what a person should know about the lab
	wire     *space
	h1, h2   *host
	peers    map[string]started
	fairness *flooder // nil: not made yet
	launched int
	pure     bool // pureCgroups has been
	closers  []func()
}

// newLab makes the hosts. The caller must close it, also after an error.
func newLab(ctx context.Context, underlay, dir, program string, uid int, log io.Writer) (*lab, error) {
	l := &lab{underlay: underlay, dir: filepath.Join(dir, underlay), program: program, uid: uid, log: log, peers: map[string]started{}}
	if err := os.Mkdir(l.dir, 0o755); err != nil {
		return l, err
	}
	var err error
	if l.wire, err = l.newSpace("wire"); err != nil {
		return l, err
	}
	if err := l.wire.ip(ctx, "link add br0 type bridge", "addr add "+wireAddr.String()+"/24 dev br0", "link set br0 up"); err != nil {
		return l, err
	}
	if err := l.wire.do(plainSwitch); err != nil {
		return l, err
	}
	if l.h1, err = l.newHost(ctx, "h1", "192.0.2.1"); err != nil {
		return l, err
	}
	l.h2, err = l.newHost(ctx, "h2", "192.0.2.2")
	return l, err
}

// plainSwitch keeps netfilter out of the wire's bridge, where the machine has br_netfilter: a switch has none.
func plainSwitch() error {
	for _, name := range []string{"net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"} {
		if err := writeSysctl(name, "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// onClose adds to what close does; the last comes first.
func (l *lab) onClose(fn func()) { l.closers = append(l.closers, fn) }

func (l *lab) close() {
	for i := len(l.closers) - 1; i >= 0; i-- {
		l.closers[i]()
	}
	l.closers = nil
	_ = os.RemoveAll(l.dir)
}

func (l *lab) newSpace(name string) (*space, error) {
	s, err := newSpace(name)
	if err == nil {
		l.onClose(s.close)
	}
	return s, err
}

// wirePort is the bridge's port to a host.
func wirePort(host string) string { return "port-" + host }

func (l *lab) newHost(ctx context.Context, name, addr string) (*host, error) {
	s, err := l.newSpace(name)
	if err != nil {
		return nil, err
	}
	h := &host{space: s, addr: netip.MustParseAddr(addr), home: filepath.Join(l.dir, name)}
	if err := os.Mkdir(h.home, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chown(h.home, l.uid, l.uid); err != nil {
		return nil, err
	}
	port := wirePort(name)
	if err := l.wire.ip(ctx,
		fmt.Sprintf("link add %s type veth peer name %s netns %s", port, uplink, s.path()),
		fmt.Sprintf("link set %s master br0 up", port)); err != nil {
		return nil, err
	}
	if err := s.ip(ctx,
		fmt.Sprintf("addr add %s/24 dev %s", addr, uplink), fmt.Sprintf("link set %s up", uplink),
		fmt.Sprintf("route add default via %s", wireAddr)); err != nil {
		return nil, err
	}
	// The kernel peers forward between their bridge and the wire.
	if err := s.do(func() error { return writeSysctl("net/ipv4/ip_forward", "1") }); err != nil {
		return nil, err
	}
	if l.underlay == underlayNIC {
		// The wire's end cuts superpackets, so that the host's end, which runs NAPI GRO, sees packets as a card does.
		if err := l.wire.run(ctx, "ethtool", "-K", port, "tso", "off", "tx-udp-segmentation", "off",
			"tx-udp_tnl-segmentation", "off", "tx-udp_tnl-csum-segmentation", "off"); err != nil {
			return nil, err
		}
		if err := s.run(ctx, "ethtool", "-K", uplink, "gro", "on"); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// container is a user and network namespace of the host's user, as a rootless engine makes it, with one sleeping process.
type container struct {
	*space
	*process
	name string
}

func (l *lab) newContainer(ctx context.Context, h *host, name string) (*container, error) {
	p, err := l.launch(h.space, name, l.command(true, h.home, "unshare", "-Urn", "sleep", "infinity"))
	if err != nil {
		return nil, err
	}
	// It is ready when unshare has become sleep.
	if err := waitFor(ctx, 10*time.Second, p, func() error {
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.pid))
		if err == nil && strings.TrimSpace(string(comm)) != "sleep" {
			err = fmt.Errorf("container %s is still %s", name, strings.TrimSpace(string(comm)))
		}
		return err
	}); err != nil {
		p.stop()
		return nil, err
	}
	s, err := spaceOf(name, p.pid)
	if err != nil {
		p.stop()
		return nil, err
	}
	l.onClose(s.close)
	return &container{space: s, process: p, name: name}, nil
}

// pidText is the process that stands for the container, as a command line names it.
func (c *container) pidText() string { return strconv.Itoa(c.pid) }

// release ends the container before the lab ends.
func (c *container) release() {
	_ = c.cmd.Process.Signal(unix.SIGKILL)
	<-c.done
	c.close()
}
