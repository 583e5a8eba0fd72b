// Tests of vxlan networks: among nodes, and with a host whose kernel does what flannel has it do.

package test

import (
	"encoding/json"
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
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// vxlanMTU is the LAN's MTU without outer IPv4, UDP and VXLAN headers and an inner Ethernet header.
const vxlanMTU = lab.MTU - 20 - 8 - 8 - 14

const vxlanConfig = `{"Network":"10.66.0.0/16","Backend":{"Type":"vxlan"}}`

// withVXLAN is a lab with an etcd that describes a vxlan network.
func withVXLAN(t *testing.T, hosts int, config string, options ...lab.Option) (*lab.Lab, *lab.Etcd, *clientv3.Client) {
	t.Helper()
	l, e, client := withEtcd(t, hosts, options...)
	put(t, client, prefix+"/config", config)
	return l, e, client
}

// vtep is what a vxlan node publishes, in flannel's words.
type vtep struct {
	PublicIP    string
	BackendType string
	BackendData vtepData
}

type vtepData struct {
	VNI     int
	VtepMAC string
}

func vtepOf(t *testing.T, c *clientv3.Client, subnet string) (v vtep) {
	t.Helper()
	value := keys(t, c, subnetKey(subnet))[subnetKey(subnet)]
	if err := json.Unmarshal([]byte(value), &v); err != nil {
		t.Fatalf("lease %q: %v", value, err)
	}
	if hw, err := net.ParseMAC(v.BackendData.VtepMAC); err != nil || hw[0]&3 != 2 || v.BackendType != "vxlan" {
		t.Errorf("lease %q: want a local unicast VtepMAC", value)
	}
	return v
}

func TestVXLAN_ConnectsContainersOfTwoNodes(t *testing.T) {
	t.Parallel()
	l, e, client := withVXLAN(t, 2, `{"Network":"10.66.0.0/16","Backend":{"Type":"vxlan","VNI":4242,"Port":14789}}`)
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	if s := d1.Status(); s.Backend != "vxlan" || s.MTU != vxlanMTU || s.Port != 14789 || a.at.MTU != vxlanMTU {
		t.Errorf("status %+v, attachment %+v", s, a.at)
	}
	v := vtepOf(t, client, d1.Status().Subnet)
	if v.BackendData.VNI != 4242 {
		t.Errorf("lease %+v", v)
	}
	b.HTTPServer(t, port(b.addr, 8080))
	b.UDPEcho(t, port(b.addr, 9000))

	pings(t, a.Space, b.addr)
	pings(t, b.Space, a.addr)
	pings(t, a.Space, b.gateway)
	before1, before2 := d1.Status().Counters, d2.Status().Counters
	const size = 64 << 20
	bigTransfers(t, a, b, size)
	after1, after2 := d1.Status().Counters, d2.Status().Counters
	packets := uint64(2 * size / (vxlanMTU - 52))
	for what, n := range map[string]uint64{
		"TAP reads": delta(t, before1, after1, "tap", "reads"), "UDP sends": delta(t, before1, after1, "underlay", "send_calls"),
		"TAP writes": delta(t, before2, after2, "tap", "writes"),
	} {
		if n == 0 || n > packets/8 {
			t.Errorf("%d %s for %d packets' worth of data: superpackets are cut", n, what, packets)
		}
	}
	for _, n := range []int{1, vxlanMTU - 28, vxlanMTU - 27, 9000, 65507} {
		if err := a.EchoUDP(port(b.addr, 9000), n); err != nil {
			t.Errorf("UDP, %d bytes: %v", n, err)
		}
	}
	crosses(t, a, b.addr, vxlanMTU)
	wantPathMTU(t, func() { pings(t, a.Space, b.addr) }, vxlanMTU, d1)
	widen(t, a, 4000)
	tooBig(t, a, b.addr, vxlanMTU+1, vxlanMTU)
	if n := csumErrors(t, a.Space) + csumErrors(t, b.Space); n != 0 {
		t.Errorf("%d wrong checksums", n)
	}

	d1.Stop()
	again := l.Host(1).Up("--etcd-endpoints", e.Endpoint)
	if now := vtepOf(t, client, again.Status().Subnet); now != v {
		t.Errorf("after a restart: %+v, before: %+v", now, v)
	}
	waitPeers(t, 1, again)
	pings(t, a.Space, b.addr)
}

func TestVXLAN_NarrowPathIsFound(t *testing.T) {
	t.Parallel()
	l, e, _ := withVXLAN(t, 1, vxlanConfig)
	tunnel := l.Tunnel(1400)
	tunnel.Silence()
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), tunnel.Far.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, tunnel.Far, "b")
	b.HTTPServer(t, port(b.addr, 8080))
	const narrow = 1400 - 50
	wantPathMTU(t, func() { pings(t, a.Space, b.addr) }, narrow, d1, d2)
	bigTransfers(t, a, b, 20<<20)
	crosses(t, a, b.addr, narrow)
	tooBig(t, a, b.addr, narrow+1, narrow)
}

func TestVXLAN_RefusesWhatANodeCannotBe(t *testing.T) {
	t.Parallel()
	l, e, client := withVXLAN(t, 1, vxlanConfig)
	h := l.Host(1)
	newFlannelHost(t, h, "10.66.251.0/24", "02:00:0a:42:fb:00")
	upRefused(t, h, []string{"--etcd-endpoints", e.Endpoint, "--allow-overlap"}, "8472", "flannel", "--port")
	put(t, client, prefix+"/config", `{"Network":"10.66.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}`)
	upRefused(t, h, []string{"--etcd-endpoints", e.Endpoint}, "DirectRouting", "routes", "leave it out")
}

// flannelHost is a host that runs no node: its kernel has the device, addresses, bridge and entries that flanneld and its CNI
// plugin make.
type flannelHost struct {
	*lab.Host
	t      *testing.T
	subnet netip.Prefix
	mac    string
}

// newFlannelHost sets up what flannel does before it knows a peer: pkg/backend/vxlan/device.go, and a bridge. device are further
// words for the VXLAN device.
func newFlannelHost(t *testing.T, h *lab.Host, subnet, mac string, device ...string) *flannelHost {
	t.Helper()
	f := &flannelHost{Host: h, t: t, subnet: netip.MustParsePrefix(subnet), mac: mac}
	f.device(device...)
	f.ip("link", "add", "cni0", "mtu", strconv.Itoa(vxlanMTU), "type", "bridge")
	f.ip("addr", "add", f.addr(1).String()+"/24", "dev", "cni0")
	f.ip("link", "set", "cni0", "up")
	if err := h.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	return f
}

// device makes the VXLAN device.
func (f *flannelHost) device(words ...string) {
	f.t.Helper()
	f.ip("link", append([]string{"add", "flannel.1", "mtu", strconv.Itoa(vxlanMTU), "address", f.mac, "type", "vxlan", "id", "1", "dev", "lan0",
		"local", f.Addr.String(), "dstport", "8472", "nolearning"}, words...)...)
	f.ip("addr", "add", f.addr(0).String()+"/32", "dev", "flannel.1")
	f.ip("link", "set", "flannel.1", "up")
}

// addr is an address of the host's subnet.
func (f *flannelHost) addr(n byte) netip.Addr {
	b := f.subnet.Addr().As4()
	b[3] = n
	return netip.AddrFrom4(b)
}

// ip runs ip(8) on the host.
func (f *flannelHost) ip(object string, args ...string) {
	f.t.Helper()
	ipIn(f.t, f.Space, append([]string{object}, args...)...)
}

// ipIn runs ip(8) in a namespace, with every capability over it.
func ipIn(t *testing.T, s *lab.Space, args ...string) {
	t.Helper()
	if err := s.Do(func() error {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// lease is the host's in the store.
func (f *flannelHost) lease() string {
	return fmt.Sprintf(`{"PublicIP":%q,"PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":%q}}`, f.Addr, f.mac)
}

// learn does what flannel does when it sees a peer's lease: handleSubnetEvents in pkg/backend/vxlan/vxlan_network.go.
func (f *flannelHost) learn(subnet netip.Prefix, v vtep) {
	f.t.Helper()
	via := subnet.Masked().Addr().String()
	f.ip("neigh", "replace", via, "lladdr", v.BackendData.VtepMAC, "dev", "flannel.1", "nud", "permanent")
	f.ip("route", "replace", subnet.Masked().String(), "via", via, "dev", "flannel.1", "onlink")
	mac, err := net.ParseMAC(v.BackendData.VtepMAC)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.Do(func() error {
		link, err := netlink.LinkByName("flannel.1")
		if err != nil {
			return err
		}
		return netlink.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
			IP: net.ParseIP(v.PublicIP), HardwareAddr: mac,
		})
	}); err != nil {
		f.t.Fatal(err)
	}
}

// pod is a container on the host's bridge, with the address of that number.
func (f *flannelHost) pod(name string, n byte) *lab.Container {
	f.t.Helper()
	c := f.Container(name)
	mtu := strconv.Itoa(vxlanMTU)
	f.ip("link", "add", "veth-"+name, "mtu", mtu, "type", "veth", "peer", "name", "eth0", "mtu", mtu, "netns", pid(c))
	f.ip("link", "set", "veth-"+name, "master", "cni0", "up")
	ipIn(f.t, c.Space, "addr", "add", f.addr(n).String()+"/24", "dev", "eth0")
	ipIn(f.t, c.Space, "link", "set", "eth0", "up")
	ipIn(f.t, c.Space, "route", "add", "default", "via", f.addr(1).String())
	return c
}

// csumErrors is how many packets the namespace's kernel has dropped for their checksums.
func csumErrors(t *testing.T, s *lab.Space) (n int) {
	t.Helper()
	if err := s.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		lines := strings.Split(string(b), "\n")
		for i := 0; i+1 < len(lines); i += 2 {
			values := strings.Fields(lines[i+1])
			for k, name := range strings.Fields(lines[i]) {
				if name == "InCsumErrors" && k < len(values) {
					v, aerr := strconv.Atoi(values[k])
					n, err = n+v, errors.Join(err, aerr)
				}
			}
		}
		if err != nil {
			return err
		}
		b, err = os.ReadFile("/proc/thread-self/net/snmp6")
		for line := range strings.Lines(string(b)) {
			if fields := strings.Fields(line); len(fields) == 2 && strings.HasSuffix(fields[0], "InCsumErrors") {
				v, aerr := strconv.Atoi(fields[1])
				n, err = n+v, errors.Join(err, aerr)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestVXLAN_IsAMemberAmongFlannelHosts(t *testing.T) {
	t.Parallel()
	for name, device := range map[string][]string{
		"checksums off": {"noudpcsum"},
		"checksums on":  {"udpcsum"},
		"as it comes":   nil,
	} {
		t.Run(name, func(t *testing.T) {
			l, e, client := withVXLAN(t, 2, vxlanConfig)
			f := newFlannelHost(t, l.Host(2), "10.66.251.0/24", "02:00:0a:42:fb:00", device...)
			put(t, client, subnetKey(f.subnet.String()), f.lease()) // before the node: the other order is below
			d := l.Host(1).Up("--etcd-endpoints", e.Endpoint)
			waitPeers(t, 1, d)
			subnet := mustPrefix(t, d.Status().Subnet)
			f.learn(subnet, vtepOf(t, client, d.Status().Subnet))
			a, p := join(t, l.Host(1), "a"), f.pod("p", 2)
			node, host, pod := a.gateway, f.addr(0), f.addr(2)

			// Its containers, its own processes, which speak from .0, and our two own addresses.
			for _, c := range []struct {
				what string
				from *lab.Space
				to   netip.Addr
			}{
				{"container to pod", a.Space, pod}, {"pod to container", p.Space, a.addr},
				{"container to host", a.Space, host}, {"container to the host's bridge", a.Space, f.addr(1)},
				{"host to container", f.Space, a.addr},
				{"pod to our .1", p.Space, node}, {"host to our .1", f.Space, node}, {"host to our .0", f.Space, subnet.Masked().Addr()},
			} {
				r, err := c.from.Ping(c.to, 5)
				if err != nil || r.Lost() != 0 {
					t.Errorf("%s: %v, %v", c.what, r, err)
				}
			}

			a.HTTPServer(t, port(a.addr, 8080))
			p.HTTPServer(t, port(pod, 8080))
			f.HTTPServer(t, port(host, 8080))
			const size = 30 << 20
			for _, c := range []struct {
				what string
				from *lab.Space
				to   netip.Addr
				seen netip.Addr
			}{
				{"container to pod", a.Space, pod, a.addr}, {"pod to container", p.Space, a.addr, pod},
				{"container to host", a.Space, host, a.addr}, {"host to container", f.Space, a.addr, host},
			} {
				if got, err := c.from.Fetch("http://" + port(c.to, 8080).String() + "/"); err != nil || got != c.seen.String() {
					t.Errorf("%s: the server saw %q, %v; want %s", c.what, got, err, c.seen)
				}
				if err := c.from.Upload(port(c.to, 8080), size); err != nil {
					t.Errorf("%s: upload: %v", c.what, err)
				}
				if err := c.from.Download(port(c.to, 8080), size); err != nil {
					t.Errorf("%s: download: %v", c.what, err)
				}
			}

			a.UDPEcho(t, port(a.addr, 9000))
			p.UDPEcho(t, port(pod, 9000))
			f.UDPEcho(t, port(host, 9000))
			for _, n := range []int{1, vxlanMTU - 28, vxlanMTU - 27, 9000, 65507} {
				for what, err := range map[string]error{
					"container to pod": a.EchoUDP(port(pod, 9000), n), "pod to container": p.EchoUDP(port(a.addr, 9000), n),
					"container to host": a.EchoUDP(port(host, 9000), n), "host to container": f.EchoUDP(port(a.addr, 9000), n),
				} {
					if err != nil {
						t.Errorf("UDP of %d bytes, %s: %v", n, what, err)
					}
				}
			}
			udpTrain(t, p.Space, a, 2000)
			udpTrain(t, a.Space, &member{Container: p, addr: pod}, 2001)

			wantPathMTU(t, func() { pings(t, a.Space, pod) }, vxlanMTU, d)
			crosses(t, a, pod, vxlanMTU)
			for who, s := range map[string]*lab.Space{"container": a.Space, "pod": p.Space, "flannel host": f.Space, "our host": l.Host(1).Space} {
				if n := csumErrors(t, s); n != 0 {
					t.Errorf("%s: %d wrong checksums", who, n)
				}
			}
			for reason, n := range d.Status().Counters["drops"] {
				if n > 0 && reason != "tap-not-ip" && reason != "tap-multicast" && reason != "not-unicast" {
					t.Errorf("%d drops: %s", n, reason)
				}
			}

			// flanneld starts anew, with another device address, as after a reboot. The kernel forgets its neighbours.
			f.mac = "02:00:0a:42:fb:99"
			f.ip("link", "set", "flannel.1", "address", f.mac)
			f.learn(subnet, vtepOf(t, client, d.Status().Subnet))
			put(t, client, subnetKey(f.subnet.String()), f.lease())
			lab.Eventually(t, "the new VtepMAC is followed", func() bool {
				r, err := a.Ping(pod, 1)
				return err == nil && r.Lost() == 0
			})
			pings(t, p.Space, a.addr)

			// It leaves, and comes again: at once, and once after it has been given up, which takes a minute.
			if _, err := client.Delete(t.Context(), subnetKey(f.subnet.String())); err != nil {
				t.Fatal(err)
			}
			if device == nil {
				lab.EventuallyWithin(t, 2*time.Minute, "the peer is gone", func() bool { return d.Status().Peers == 0 })
			}
			put(t, client, subnetKey(f.subnet.String()), f.lease())
			lab.Eventually(t, "the peer is back", func() bool {
				r, err := a.Ping(pod, 1)
				return err == nil && r.Lost() == 0
			})
			// One of another backend is passed over, and said so once.
			put(t, client, subnetKey("10.66.250.0/24"), `{"PublicIP":"192.0.2.77","PublicIPv6":null}`)
			lab.Eventually(t, "the log tells of the other backend", func() bool {
				return strings.Count(d.LogText(), "this network's is vxlan") == 1
			})
		})
	}
}

// udpTrain has many datagrams of one size sent with one call (UDP_SEGMENT), which a kernel keeps together for as long as it can, and
// counts what arrives.
func udpTrain(t *testing.T, from *lab.Space, to *member, at uint16) {
	t.Helper()
	const size, count = 1000, 20
	server, err := to.ListenPacket("udp4", port(to.addr, at).String())
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	conn, err := from.DialContext(t.Context(), "udp4", port(to.addr, at).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	rc, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) })
	if err != nil {
		t.Fatal(err)
	}
	payload := lab.Pattern(size*count - 7)
	if _, err := conn.Write(payload); err != nil {
		t.Fatal(err)
	}
	var got []byte
	buf := make([]byte, 65536)
	_ = server.SetReadDeadline(time.Now().Add(10 * time.Second))
	for i := range count {
		n, _, err := server.ReadFrom(buf)
		if err != nil {
			t.Errorf("datagram %d of %d: %v", i+1, count, err)
			return
		}
		if i < count-1 && n != size {
			t.Errorf("datagram %d has %d bytes, want %d", i+1, n, size)
		}
		got = append(got, buf[:n]...)
	}
	if string(got) != string(payload) {
		t.Error("the datagrams are not those that were sent")
	}
}

func TestVXLAN_KeepsItsMACInItsStateDirectory(t *testing.T) {
	t.Parallel()
	l, e, client := withVXLAN(t, 1, vxlanConfig)
	h := l.Host(1)
	d := h.Up("--etcd-endpoints", e.Endpoint)
	b, err := os.ReadFile(filepath.Join(h.Home(), ".local/state/rootless-ovl/vtep-mac"))
	if v := vtepOf(t, client, d.Status().Subnet); err != nil || strings.TrimSpace(string(b)) != v.BackendData.VtepMAC {
		t.Errorf("the file says %q, %v; the lease %q", b, err, v.BackendData.VtepMAC)
	}
}
