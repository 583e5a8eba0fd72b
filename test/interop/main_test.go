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
	s := &site{Lab: lab.New(t, 2), backend: b}
	s.etcd = s.Outside.Etcd(nil, false)
	s.client = s.Outside.EtcdClient(t, s.etcd.Endpoint)
	if _, err := s.client.Put(t.Context(), prefix+"/config", b.config); err != nil {
		t.Fatal(err)
	}
	return s
}

// leases are the values under <prefix>/subnets by subnet.
func (s *site) leases(t *testing.T) map[netip.Prefix]string {
	t.Helper()
	resp, err := s.client.Get(t.Context(), prefix+"/subnets/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	found := map[netip.Prefix]string{}
	for _, kv := range resp.Kvs {
		v4, _, err := lease.ParseKey(string(kv.Key))
		if err != nil {
			t.Fatal(err)
		}
		found[v4] = string(kv.Value)
	}
	return found
}

// node is our node, unprivileged.
type node struct {
	*lab.Daemon
	subnet netip.Prefix
}

func (s *site) startOurs(t *testing.T, args ...string) *node {
	t.Helper()
	d := s.Host(2).Up(append([]string{"--etcd-endpoints", s.etcd.Endpoint}, args...)...)
	p, err := netip.ParsePrefix(d.Status().Subnet)
	if err != nil {
		t.Fatal(err)
	}
	return &node{Daemon: d, subnet: p.Masked()}
}

// container attaches a new container to our node.
func (n *node) container(t *testing.T, name string) *member {
	t.Helper()
	c := n.Host.Container(name)
	var at lab.Attachment
	n.Host.CLIJSON(&at, "attach", strconv.Itoa(c.PID), "--name", name)
	p, err := netip.ParsePrefix(at.Addr)
	if err != nil {
		t.Fatal(err)
	}
	return &member{Space: c.Space, name: name, addr: p.Addr()}
}

// member is somebody on the overlay: a container, or a flannel host itself.
type member struct {
	*lab.Space
	name string
	addr netip.Addr // its source address on the overlay
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
	f := &flannel{host: s.Host(1), log: s.Host(1).LogPath("flanneld"), done: make(chan struct{})}
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

// reaches waits until packets pass between flannel's host and our node's own address.
func (f *flannel) reaches(t *testing.T, n *node) {
	t.Helper()
	lab.Eventually(t, "flannel's host reaches "+n.subnet.String(), func() bool {
		r, err := f.host.Ping(n.subnet.Addr().Next(), 1)
		return err == nil && r.Received == 1
	})
}

// member is the host itself, whose source address on the overlay is the subnet's first, x.y.z.0.
func (f *flannel) member() *member {
	return &member{Space: f.host.Space, name: "flannel's host", addr: f.env.Subnet.Addr()}
}

// bridge makes the host what docker with --bip=$FLANNEL_SUBNET makes of it: a router with a bridge for containers.
func (f *flannel) bridge(t *testing.T) {
	t.Helper()
	if err := f.host.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	if err := f.host.AddBridge("docker0"); err != nil {
		t.Fatal(err)
	}
	if err := f.host.AddAddr("docker0", netip.PrefixFrom(f.gateway(), f.env.Subnet.Bits())); err != nil {
		t.Fatal(err)
	}
	if err := f.host.Do(func() error { return up("docker0") }); err != nil {
		t.Fatal(err)
	}
}

func (f *flannel) gateway() netip.Addr { return f.env.Subnet.Addr().Next() }

// container plugs a new container into the bridge, with the second address of the subnet and --mtu=$FLANNEL_MTU.
func (f *flannel) container(t *testing.T, name string) *member {
	t.Helper()
	c := f.host.Container(name)
	addr := f.gateway().Next()
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
	if err := c.AddAddr("eth0", netip.PrefixFrom(addr, f.env.Subnet.Bits())); err != nil {
		t.Fatal(err)
	}
	err = c.Do(func() error {
		if err := up("eth0"); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Gw: net.IP(f.gateway().AsSlice())})
	})
	if err != nil {
		t.Fatal(err)
	}
	return &member{Space: c.Space, name: name, addr: addr}
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
	var text []byte
	if err := s.Do(func() error {
		for _, name := range []string{"snmp", "netstat"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			text = append(text, b...)
		}
		return nil
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
	if columns < 3 { // ICMP, TCP and UDP at least
		t.Fatalf("the kernel counts checksum errors in %d places only:\n%s", columns, text)
	}
	return sum
}
