// This file is what the tests share: flannel on a host, our node on another, containers on both.

package interop

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// flanneldVar names a built flanneld to run instead of one built for the occasion.
const flanneldVar = "ROOTLESS_OVL_FLANNELD"

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "interop:", err)
		code = 1
	}
	os.Exit(code)
}

// run builds flanneld before the lab takes away the machine's network, and the caches of a root that it gives up.
func run(m *testing.M) (code int, err error) {
	if os.Getenv(flanneldVar) == "" {
		dir, err := os.MkdirTemp("", "rovl-interop-")
		if err != nil {
			return 1, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		path := filepath.Join(dir, "flanneld")
		if err := errors.Join(os.Chmod(dir, 0o755), buildFlanneld(path), os.Setenv(flanneldVar, path)); err != nil {
			return 1, err
		}
	}
	return lab.Main(m.Run), nil
}

// buildFlanneld builds flanneld, whose udp backend is C.
func buildFlanneld(path string) error {
	if _, err := exec.LookPath("gcc"); err != nil && os.Getenv("CC") == "" {
		return errors.New("flannel's udp backend is C, and gcc is not installed: apt-get install gcc libc6-dev")
	}
	cmd := exec.Command("go", "build", "-o", path, "./flanneld")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building flanneld: %w\n%s", err, out)
	}
	return nil
}

const prefix = lease.DefaultPrefix

// site is a LAN with etcd on the outside host, flannel on host 1 and our node on host 2, neither of which runs yet.
type site struct {
	*lab.Lab
	backend backend
	etcd    *lab.Etcd
	client  *clientv3.Client
}

func newSite(t *testing.T, b backend) *site {
	t.Helper()
	if err := lab.HaveEtcd(); err != nil {
		t.Fatal(err)
	}
	var options []lab.Option
	if b.dual {
		options = append(options, lab.WithIPv6)
	}
	s := &site{Lab: lab.New(t, 2, options...), backend: b}
	s.etcd = s.Outside.Etcd(nil, false)
	s.client = s.Outside.EtcdClient(t, s.etcd.Endpoint)
	if _, err := s.client.Put(t.Context(), prefix+"/config", b.config); err != nil {
		t.Fatal(err)
	}
	return s
}

// leases are the values under <prefix>/subnets by IPv4 subnet. Every key must have the families of the network.
func (s *site) leases(t *testing.T) map[netip.Prefix]string {
	t.Helper()
	resp, err := s.client.Get(t.Context(), prefix+"/subnets/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	found := map[netip.Prefix]string{}
	for _, kv := range resp.Kvs {
		v4, v6, err := lease.ParseKey(string(kv.Key))
		if err != nil || v6.IsValid() != s.backend.dual {
			t.Fatalf("key %s: %v, %v, %v", kv.Key, v4, v6, err)
		}
		found[v4] = string(kv.Value)
	}
	return found
}

// node is our node, unprivileged.
type node struct {
	*lab.Daemon
	subnet, subnet6 netip.Prefix // masked; subnet6 of a dual-stack network only
}

// own are the node's own addresses: first the networks' that stock nodes know, then the gateway's.
func (n *node) own() []netip.Addr {
	own := []netip.Addr{n.subnet.Addr(), n.subnet.Addr().Next()}
	if n.subnet6.IsValid() {
		own = append(own, n.subnet6.Addr(), n.subnet6.Addr().Next())
	}
	return own
}

func (s *site) startOurs(t *testing.T, args ...string) *node {
	t.Helper()
	n := &node{Daemon: s.Host(2).Up(append([]string{"--etcd-endpoints", s.etcd.Endpoint}, args...)...)}
	st := n.Status()
	n.subnet = mustPrefix(t, st.Subnet).Masked()
	if s.backend.dual {
		n.subnet6 = mustPrefix(t, st.Subnet6).Masked()
	}
	return n
}

func mustPrefix(t *testing.T, s string) netip.Prefix {
	t.Helper()
	p, err := netip.ParsePrefix(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// container attaches a new container to our node.
func (n *node) container(t *testing.T, name string) *member {
	t.Helper()
	c := n.Host.Container(name)
	var at lab.Attachment
	n.Host.CLIJSON(&at, "attach", strconv.Itoa(c.PID), "--name", name)
	m := &member{Space: c.Space, name: name, addr: mustPrefix(t, at.Addr).Addr()}
	if n.subnet6.IsValid() {
		m.addr6 = mustPrefix(t, at.Addr6).Addr()
	}
	return m
}

// member is somebody on the overlay: a container, or a flannel host itself.
type member struct {
	*lab.Space
	name  string
	addr  netip.Addr // its source address on the overlay
	addr6 netip.Addr // the same of a dual-stack network
}

// addrs are the member's source addresses.
func (m *member) addrs() []netip.Addr {
	if m.addr6.IsValid() {
		return []netip.Addr{m.addr, m.addr6}
	}
	return []netip.Addr{m.addr}
}

// like is the member's address of the family of another address.
func (m *member) like(other netip.Addr) netip.Addr {
	if other.Is6() {
		return m.addr6
	}
	return m.addr
}

// flannel is flannel on a host, with every capability over the host's namespaces.
type flannel struct {
	host *lab.Host
	env  lease.SubnetEnv
	log  string // path
	cmd  *exec.Cmd
	done chan struct{}
}

// startFlannel starts flanneld on host 1 and waits until it has written subnet.env.
func (s *site) startFlannel(t *testing.T) *flannel {
	t.Helper()
	return s.startFlannelOn(t, s.Host(1))
}

func (s *site) startFlannelOn(t *testing.T, h *lab.Host) *flannel {
	t.Helper()
	f := &flannel{host: h, log: h.LogPath("flanneld"), done: make(chan struct{})}
	file := filepath.Join(f.host.Dir, "flannel", "subnet.env")
	if err := os.RemoveAll(file); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(f.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	f.cmd = f.host.Command(os.Getenv(flanneldVar), "-etcd-endpoints", s.etcd.Endpoint, "-subnet-file", file)
	f.cmd.Stdout, f.cmd.Stderr = log, log
	if err := f.host.Do(f.cmd.Start); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(f.done)
		_ = f.cmd.Wait()
	}()
	t.Cleanup(f.stop)
	lab.Eventually(t, "flanneld has written subnet.env", func() bool {
		select {
		case <-f.done:
			t.Fatalf("flanneld ended:\n%s", f.logText())
		default:
		}
		f.env, err = lease.ReadSubnetEnv(file)
		return err == nil
	})
	return f
}

func (f *flannel) stop() {
	_ = f.cmd.Process.Signal(os.Interrupt)
	select {
	case <-f.done:
	case <-time.After(10 * time.Second):
		_ = f.cmd.Process.Kill()
		<-f.done
	}
}

func (f *flannel) logText() string {
	b, err := os.ReadFile(f.log)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// reaches waits until packets pass between flannel's host and addresses.
func (f *flannel) reaches(t *testing.T, addrs ...netip.Addr) {
	t.Helper()
	for _, addr := range addrs {
		lab.Eventually(t, "flannel's host reaches "+addr.String(), func() bool {
			r, err := f.host.Ping(addr, 1)
			return err == nil && r.Received == 1
		})
	}
}

// member is the host itself, whose source addresses on the overlay are the subnets' first, x.y.z.0 and x:y::.
func (f *flannel) member() *member {
	m := &member{Space: f.host.Space, name: "flannel's host", addr: f.env.Subnet.Addr()}
	if f.env.IPv6Subnet.IsValid() {
		m.addr6 = f.env.IPv6Subnet.Addr()
	}
	return m
}

// subnets are the host's, of one family or both.
func (f *flannel) subnets() []netip.Prefix {
	if f.env.IPv6Subnet.IsValid() {
		return []netip.Prefix{f.env.Subnet, f.env.IPv6Subnet}
	}
	return []netip.Prefix{f.env.Subnet}
}

// bridge makes the host what docker with --bip=$FLANNEL_SUBNET (and --ipv6 --fixed-cidr-v6=$FLANNEL_IPV6_SUBNET) makes of it: a router
// with a bridge for containers.
func (f *flannel) bridge(t *testing.T) {
	t.Helper()
	if err := f.host.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	if err := f.host.AddBridge("docker0"); err != nil {
		t.Fatal(err)
	}
	for _, subnet := range f.subnets() {
		if err := f.host.AddAddr("docker0", netip.PrefixFrom(subnet.Addr().Next(), subnet.Bits())); err != nil {
			t.Fatal(err)
		}
		if subnet.Addr().Is6() {
			if err := f.host.Sysctl("net/ipv6/conf/all/forwarding", "1"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := f.host.Do(func() error { return up("docker0") }); err != nil {
		t.Fatal(err)
	}
}

// delete takes a device away from the host.
func (f *flannel) delete(t *testing.T, name string) {
	t.Helper()
	if err := f.host.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	}); err != nil {
		t.Fatal(err)
	}
}

// gateway is the bridge.
func (f *flannel) gateway() *member {
	m := &member{Space: f.host.Space, name: "flannel's bridge", addr: f.env.Subnet.Addr().Next()}
	if f.env.IPv6Subnet.IsValid() {
		m.addr6 = f.env.IPv6Subnet.Addr().Next()
	}
	return m
}

// container plugs a new container into the bridge, with the second addresses of the subnets and --mtu=$FLANNEL_MTU.
func (f *flannel) container(t *testing.T, name string) *member {
	t.Helper()
	c := f.host.Container(name)
	m := &member{Space: c.Space, name: name}
	err := f.host.Do(func() error {
		port := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "port-" + name, MTU: f.env.MTU}, PeerName: "eth0", PeerMTU: uint32(f.env.MTU), PeerNamespace: netlink.NsPid(c.PID),
		}
		if err := netlink.LinkAdd(port); err != nil {
			return fmt.Errorf("veth: %w", err)
		}
		bridge, err := netlink.LinkByName("docker0")
		if err != nil {
			return err
		}
		link, err := netlink.LinkByName(port.Name)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetMaster(link, bridge), up(port.Name))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Do(func() error { return up("eth0") }); err != nil {
		t.Fatal(err)
	}
	for _, subnet := range f.subnets() {
		gateway := subnet.Addr().Next()
		addr := gateway.Next()
		if err := c.AddAddr("eth0", netip.PrefixFrom(addr, subnet.Bits())); err != nil {
			t.Fatal(err)
		}
		if err := c.Do(func() error { return netlink.RouteAdd(&netlink.Route{Gw: net.IP(gateway.AsSlice())}) }); err != nil {
			t.Fatal(err)
		}
		if addr.Is6() {
			m.addr6 = addr
		} else {
			m.addr = addr
		}
	}
	return m
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// checksumErrors adds up what the space's kernel has counted under InCsumErrors, as `nstat -az` shows it.
func checksumErrors(t *testing.T, s *lab.Space) int {
	t.Helper()
	var text, six []byte
	if err := s.Do(func() (err error) {
		for _, name := range []string{"snmp", "netstat"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			text = append(text, b...)
		}
		six, err = os.ReadFile("/proc/thread-self/net/snmp6")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	// Lines come in pairs: "Tcp: InSegs InCsumErrors ..." and "Tcp: 17 0 ...".
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	sum, columns := 0, 0
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		for j, name := range names {
			if name != "InCsumErrors" {
				continue
			}
			n, err := strconv.Atoi(values[j])
			if err != nil {
				t.Fatal(err)
			}
			columns++
			sum += n
		}
	}
	// Of IPv6 there is a line each: "Udp6InCsumErrors    0".
	for line := range strings.Lines(string(six)) {
		fields := strings.Fields(line)
		if len(fields) != 2 || !strings.HasSuffix(fields[0], "InCsumErrors") {
			continue
		}
		n, err := strconv.Atoi(fields[1])
		if err != nil {
			t.Fatal(err)
		}
		columns++
		sum += n
	}
	if columns < 5 { // ICMP, TCP and UDP, and the two of IPv6 at least
		t.Fatalf("the kernel counts checksum errors in %d places only:\n%s%s", columns, text, six)
	}
	return sum
}
