// This file is a lab in which one of the systems gives containers their network.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

const overlayNet = "10.66.0.0/16"

// tunnelMTU is that of the narrow place on the way to the far host.
const tunnelMTU = 1400

// site is a lab: containers live on h, h2 is another host of the same LAN, far a host behind a tunnel and two routers. A site of
// rootless-ovl runs a node on h and on h2.
type site struct {
	*lab.Lab
	system string
	scale  bool
	h, h2  *lab.Host
	far    *lab.Host
	d, d2  *lab.Daemon // rootless-ovl only

	t      *siteT
	noIPv6 bool          // a container that should have IPv6 did not come to it
	next   atomic.Uint32 // port of a server of the outside
}

func newSite(t *trial, system string) *site {
	s := &site{system: system, t: &siteT{trial: t}}
	s.Lab = lab.New(s.t, 2, lab.WithIPv6)
	s.h, s.h2 = s.Host(1), s.Host(2)
	s.far = s.Tunnel(tunnelMTU).Far
	s.next.Store(10000)
	// The outside is a router that says where it has no way to.
	t.must("router", errors.Join(
		s.Outside.Sysctl("net/ipv4/ip_forward", "1"), s.Outside.Sysctl("net/ipv6/conf/all/forwarding", "1"),
		s.Outside.Sysctl("net/ipv4/icmp_ratelimit", "0"), s.Outside.Sysctl("net/ipv6/icmp/ratelimit", "0"),
	))
	if system == systemOurs {
		s.d = s.h.Up("--listen-etcd", s.h.Addr.String()+":2379", "--network", overlayNet)
		s.d2 = s.h2.Up("--etcd-endpoints", "http://"+s.h.Addr.String()+":2379")
	}
	return s
}

// patience is how long a case waits for what comes at once when it works.
func (s *site) patience() time.Duration {
	if s.system == systemOurs {
		return 5 * time.Second
	}
	return 1500 * time.Millisecond
}

// endurance is how long a connection of a case may live.
func (s *site) endurance() time.Duration {
	if s.system == systemOurs {
		return 20 * time.Second
	}
	return 3 * time.Second
}

// port is a port of a host that no other case uses.
func (s *site) port() uint16 { return uint16(s.next.Add(1)) }

// box is a container that the site's system serves.
type box struct {
	*lab.Container
	gateway, gateway6 netip.Addr
	addr, addr6       netip.Addr // addr6 only where it has one of a global scope
}

// published is a port of the host that leads to one of a container.
type published struct {
	host, inside uint16
	proto        string // tcp or udp
	count        uint16 // of neighbouring ports; 0 is one
}

// String is docker's way to write it.
func (p published) String() string {
	if p.count > 1 {
		return fmt.Sprintf("%d-%d:%d-%d/%s", p.host, p.host+p.count-1, p.inside, p.inside+p.count-1, p.proto)
	}
	return fmt.Sprintf("%d:%d/%s", p.host, p.inside, p.proto)
}

// box starts a container and gives it a network with these ports published.
func (s *site) box(t *trial, ports ...published) *box {
	c := s.h.Container("box" + strconv.Itoa(int(s.next.Add(1))))
	switch s.system {
	case systemOurs:
		var flags []string
		for _, p := range ports {
			flags = append(flags, "-p", p.String())
		}
		return s.attach(t, c, flags...)
	case systemSlirp:
		s.slirp(t, c, ports)
	case systemPasta:
		s.pasta(t, c, ports)
	}
	b := &box{Container: c}
	// It serves the container when that has a default route.
	lab.EventuallyWithin(t, 5*time.Second, s.system+" gives the container a default route", func() bool {
		routes, err := c.Routes()
		return err == nil && slices.ContainsFunc(routes, func(r string) bool { return strings.HasPrefix(r, "default") })
	})
	b.addr, b.addr6 = addresses(t, c)
	return b
}

// join starts a container on a host of rootless-ovl and attaches it.
func join(t *trial, h *lab.Host, name string, flags ...string) *box {
	return attachTo(t, h.Container(name), flags...)
}

func (s *site) attach(t *trial, c *lab.Container, flags ...string) *box {
	return attachTo(t, c, flags...)
}

func attachTo(t *trial, c *lab.Container, flags ...string) *box {
	var at lab.Attachment
	c.Host.CLIJSON(&at, append([]string{"attach", strconv.Itoa(c.PID), "--name", c.Name}, flags...)...)
	t.Cleanup(func() { c.Host.CLI("detach", c.Name) }) // a case that did so itself is fine too
	b := &box{Container: c}
	var err error
	if b.gateway, err = netip.ParseAddr(at.Gateway); err != nil {
		t.Fatalf("attach of %s printed the gateway %q: %v", c.Name, at.Gateway, err)
	}
	b.gateway6, _ = netip.ParseAddr(at.Gateway6) // empty where there is none
	b.addr, b.addr6 = addresses(t, c)
	return b
}

// addresses are the container's own.
func addresses(t *trial, c *lab.Container) (v4, v6 netip.Addr) {
	all, err := c.Interfaces()
	t.must("interfaces", err)
	for _, i := range all {
		for _, p := range i.Addrs {
			v4 = p.Addr()
		}
		for _, p := range i.Addrs6 {
			if !p.Addr().IsLinkLocalUnicast() {
				v6 = p.Addr()
			}
		}
	}
	return v4, v6
}

// serve runs a program that serves one container until the trial ends.
func (s *site) serve(t *trial, name string, args ...string) {
	cmd := s.h.Command(name, args...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	t.must(name, s.h.Start(cmd))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		<-done
		if t.Failed() && said.Len() > 0 {
			t.Logf("%s said: %.2000s", name, said.String())
		}
	})
}

// slirp serves a container as podman has slirp4netns do it, with IPv6.
func (s *site) slirp(t *trial, c *lab.Container, ports []published) {
	socket := filepath.Join(s.h.Dir, "slirp"+strconv.Itoa(c.PID))
	s.serve(t, "slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-ipv6", "--api-socket", socket, strconv.Itoa(c.PID), "tap0")
	for _, p := range ports {
		for i := range max(p.count, 1) {
			for _, family := range []struct{ proto, host string }{{p.proto, "0.0.0.0"}, {p.proto + "6", "::"}} {
				if err := hostForward(t, socket, family.proto, family.host, p.host+i, p.inside+i); err != nil {
					t.Logf("%v", err) // the case that needs it fails
				}
			}
		}
	}
}

// hostForward asks slirp4netns to publish a port.
func hostForward(t *trial, socket, proto, addr string, host, inside uint16) error {
	var conn net.Conn
	lab.EventuallyWithin(t, 5*time.Second, "slirp4netns's API socket", func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", socket)
		return err == nil
	})
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	request, err := json.Marshal(map[string]any{"execute": "add_hostfwd", "arguments": map[string]any{
		"proto": proto, "host_addr": addr, "host_port": host, "guest_port": inside,
	}})
	if err != nil {
		return err
	}
	if _, err := conn.Write(request); err != nil {
		return err
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	if !bytes.Contains(answer, []byte(`"return"`)) {
		return fmt.Errorf("slirp4netns: add_hostfwd %s %s: %s", request, addr, bytes.TrimSpace(answer))
	}
	return nil
}

// pasta serves a container as podman has it do, with these ports alone.
func (s *site) pasta(t *trial, c *lab.Container, ports []published) {
	specs := map[string][]string{}
	for _, p := range ports {
		spec := fmt.Sprintf("%d:%d", p.host, p.inside)
		if p.count > 1 {
			spec = fmt.Sprintf("%d-%d:%d-%d", p.host, p.host+p.count-1, p.inside, p.inside+p.count-1)
		}
		specs[p.proto] = append(specs[p.proto], spec)
	}
	args := []string{"--foreground", "--quiet", "--config-net", "--no-map-gw", "--tcp-ns", "none", "--udp-ns", "none"}
	for _, proto := range []struct{ name, flag string }{{"tcp", "-t"}, {"udp", "-u"}} {
		spec := "none"
		if of := specs[proto.name]; len(of) > 0 {
			spec = strings.Join(of, ",")
		}
		args = append(args, proto.flag, spec)
	}
	s.serve(t, "pasta", append(args, strconv.Itoa(c.PID))...)
}

// outsideAddr is the outside's address of a family.
func outsideAddr(v6 bool) netip.Addr {
	if v6 {
		return lab.OutsideAddr6
	}
	return lab.OutsideAddr
}

// hostAddr is a host's address of a family.
func hostAddr(h *lab.Host, v6 bool) netip.Addr {
	if v6 {
		return h.Addr6
	}
	return h.Addr
}

// any is the unspecified address of a family.
func any6(v6 bool) netip.Addr {
	if v6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// v6 is a suffix of socket networks.
func family(v6 bool) string {
	if v6 {
		return "6"
	}
	return "4"
}

func at(addr netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(addr, port) }

// dial opens a connection from a space within the site's patience.
func (s *site) dial(t *trial, from *lab.Space, to netip.AddrPort) (*net.TCPConn, error) {
	c, err := dialWithin(t, from, to, s.patience())
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(s.endurance()))
	}
	return c, err
}

func dialWithin(t *trial, from *lab.Space, to netip.AddrPort, limit time.Duration) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	c, err := from.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// mustDial is dial that ends the trial where it fails.
func (s *site) mustDial(t *trial, from *lab.Space, to netip.AddrPort) *net.TCPConn {
	c, err := s.dial(t, from, to)
	t.must("connect", err)
	t.Cleanup(func() { c.Close() })
	return c
}

// listen serves connections in a space with a goroutine each, until the trial ends.
func listen(t *trial, in *lab.Space, addr netip.AddrPort, serve func(c *net.TCPConn)) {
	l, err := in.Listen("tcp"+family(addr.Addr().Is6()), addr.String())
	t.must("server", err)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(60 * time.Second))
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	t.Cleanup(func() { l.Close() })
}

// taken waits for a value that a server hands over.
func taken[T any](t *trial, s *site, from <-chan T, what string) (v T) {
	select {
	case v = <-from:
	case <-time.After(2 * s.patience()):
		t.Fatalf("waited in vain: %s", what)
	case <-t.Context().Done():
		t.Fatalf("the case ended before: %s", what)
	}
	return v
}

// echo sends back what comes, until it ends, and then ends. It does not splice, which would hold a pipe, two files more, for each connection
// that is idle.
func echo(c *net.TCPConn) { _, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) }
