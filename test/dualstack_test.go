// Tests of dual-stack networks: IPv6 beside IPv4, in vxlan on the wire, in the lease, in containers.

package test

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// dualMTU is the LAN's MTU without outer IPv6, UDP and VXLAN headers and an inner Ethernet header; IPv4 has the same.
const dualMTU = lab.MTU - 40 - 8 - 8 - 14

const dualConfig = `{"EnableIPv6":true,"Network":"10.66.0.0/16","IPv6Network":"fd66::/48","Backend":{"Type":"vxlan"}}`

var network6 = netip.MustParsePrefix("fd66::/48")

// withDualStack is a lab with an etcd that describes a dual-stack vxlan network.
func withDualStack(t *testing.T, hosts int) (*lab.Lab, *lab.Etcd, *clientv3.Client) {
	t.Helper()
	return withVXLAN(t, hosts, dualConfig, lab.WithIPv6)
}

// outside6 is where addresses lie that a container has for the outside alone.
var outside6 = netip.MustParsePrefix("fdfa:a976:e5a::/64")

// addrs are those of the member that the overlay carries, of one family or both.
func (m *member) addrs() []netip.Addr {
	if m.addr6.IsValid() && !outside6.Contains(m.addr6) {
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

// serve has the member answer HTTP and UDP at every address.
func (m *member) serve(t *testing.T) {
	t.Helper()
	for _, addr := range m.addrs() {
		m.HTTPServer(t, port(addr, 8080))
		m.UDPEcho(t, port(addr, 9000))
	}
}

// dualLease is what a node of a dual-stack vxlan network publishes, in flannel's words.
type dualLease struct {
	PublicIP, PublicIPv6, BackendType string
	BackendData, BackendV6Data        vtepData
}

// dualKey is a node's key in the store.
func dualKey(st lab.Status) string {
	return subnetKey(st.Subnet) + "&" + strings.ReplaceAll(st.Subnet6, "/", "-")
}

func dualLeaseOf(t *testing.T, c *clientv3.Client, st lab.Status) (l dualLease) {
	t.Helper()
	value, ok := keys(t, c, dualKey(st))[dualKey(st)]
	if !ok {
		t.Fatalf("no key %s among %v", dualKey(st), keys(t, c, prefix+"/subnets"))
	}
	if err := json.Unmarshal([]byte(value), &l); err != nil {
		t.Fatalf("lease %q: %v", value, err)
	}
	return l
}

func TestDualStack_ConnectsContainers(t *testing.T) {
	t.Parallel()
	l, e, client := withDualStack(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	d1, d2 := h1.Up("--etcd-endpoints", e.Endpoint), h2.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b, c := join(t, h1, "a"), join(t, h1, "b"), join(t, h2, "c")

	st := d1.Status()
	subnet6 := mustPrefix(t, st.Subnet6)
	if st.MTU != dualMTU || subnet6.Bits() != 64 || !network6.Contains(subnet6.Addr()) || st.Subnet6 == d2.Status().Subnet6 {
		t.Errorf("status %+v and %+v", st, d2.Status())
	}
	published := dualLeaseOf(t, client, st)
	if published.PublicIP != h1.Addr.String() || published.PublicIPv6 != h1.Addr6.String() || published.BackendType != "vxlan" ||
		published.BackendData != published.BackendV6Data || published.BackendData.VNI != 1 {
		t.Errorf("lease %+v", published)
	}
	if p := peerOf(t, d1); p.Subnet6 != d2.Status().Subnet6 || p.PublicIPv6 != h2.Addr6.String() || p.Problem != "" {
		t.Errorf("peer %+v", p)
	}

	t.Run("interface", func(t *testing.T) {
		if a.subnet6 != subnet6.Masked() || a.gateway6 != subnet6.Addr().Next() {
			t.Errorf("attachment %+v of subnet %v", a.at, subnet6)
		}
		a4, a6 := a.addr.As4(), a.addr6.As16()
		if !slices.Equal(a6[12:], a4[:]) {
			t.Errorf("%v does not end with %v", a.addr6, a.addr)
		}
		if i := eth0(t, a.Space); i.MTU != dualMTU || !slices.Contains(i.Addrs6, netip.PrefixFrom(a.addr6, 64)) || !slices.Contains(i.Addrs, netip.PrefixFrom(a.addr, 24)) {
			t.Errorf("interface %+v", i)
		}
		routes, err := a.Routes6()
		if err != nil || !slices.Contains(routes, "default via "+a.gateway6.String()+" dev eth0") {
			t.Errorf("routes %q, %v", routes, err)
		}
	})
	t.Run("neighbours", func(t *testing.T) {
		for _, own := range []netip.Addr{a.gateway6, a.subnet6.Addr()} {
			pings(t, a.Space, own) // both ours
		}
		pings(t, a.Space, b.addr6)
		router := a.Neighbour(a.gateway6)
		if router == "" || router != a.Neighbour(b.addr6) {
			t.Errorf("the gateway is at %q, a container of the same subnet at %q: want the node in both places", router, a.Neighbour(b.addr6))
		}
	})
	for _, m := range []*member{b, c} {
		m.serve(t)
	}
	a.serve(t)
	for _, pair := range []struct {
		name     string
		from, to *member
	}{{"same node", a, b}, {"across nodes", a, c}, {"across nodes, back", c, a}} {
		t.Run(pair.name, func(t *testing.T) {
			for _, to := range pair.to.addrs() {
				everything(t, pair.from, to)
			}
		})
	}
	t.Run("pings of gateways", func(t *testing.T) {
		for _, own := range []netip.Addr{c.gateway, c.gateway6, c.subnet.Addr(), c.subnet6.Addr()} {
			pings(t, a.Space, own)
		}
	})
	t.Run("superpackets", func(t *testing.T) {
		before1, before2 := d1.Status().Counters, d2.Status().Counters
		const size = 64 << 20
		if err := a.Upload(port(c.addr6, 8080), size); err != nil {
			t.Fatal(err)
		}
		after1, after2 := d1.Status().Counters, d2.Status().Counters
		packets := uint64(size / (dualMTU - 72))
		for what, n := range map[string]uint64{
			"TAP reads": delta(t, before1, after1, "tap", "reads"), "UDP sends": delta(t, before1, after1, "underlay", "send_calls"),
			"TAP writes": delta(t, before2, after2, "tap", "writes"),
		} {
			if n == 0 || n > packets/8 {
				t.Errorf("%d %s for %d packets' worth of data: superpackets are cut", n, what, packets)
			}
		}
	})
	t.Run("MTU", func(t *testing.T) {
		wantPathMTU(t, func() { pings(t, a.Space, c.addr) }, dualMTU, d1)
		wantPathMTU6(t, func() { pings(t, a.Space, c.addr6) }, dualMTU, d1)
		widen(t, a, 4000)
		for _, to := range c.addrs() {
			crosses(t, a, to, dualMTU)
			tooBig(t, a, to, dualMTU+1, dualMTU)
		}
	})
	for _, s := range []*lab.Space{a.Space, b.Space, c.Space, h1.Space, h2.Space} {
		if n := csumErrors(t, s); n != 0 {
			t.Errorf("%d wrong checksums", n)
		}
	}
	noDrops(t, d1)
	noDrops(t, d2)
}

// noDrops fails the test if the daemon has dropped what is no noise of a kernel's own.
func noDrops(t *testing.T, d *lab.Daemon) {
	t.Helper()
	for reason, n := range d.Status().Counters["drops"] {
		if n > 0 && reason != "tap-not-ip" && reason != "tap-multicast" && reason != "not-unicast" && reason != "too-big" {
			t.Errorf("%s: %d drops: %s", d.Host.Name, n, reason)
		}
	}
}

// everything sends ping, TCP and UDP to a member that serves at the address.
func everything(t *testing.T, from *member, to netip.Addr) {
	t.Helper()
	pings(t, from.Space, to)
	if got, err := from.Fetch("http://" + port(to, 8080).String() + "/"); err != nil || got != from.like(to).String() {
		t.Errorf("the server at %v saw %q, %v; want %v", to, got, err, from.like(to))
	}
	const size = 20 << 20
	if err := from.Upload(port(to, 8080), size); err != nil {
		t.Errorf("upload to %v: %v", to, err)
	}
	if err := from.Download(port(to, 8080), size); err != nil {
		t.Errorf("download from %v: %v", to, err)
	}
	most := 65507
	if to.Is6() {
		most = 65527 // IPv6's length field does not count its own header
	}
	for _, n := range []int{1, dualMTU - echoHeaders(to), dualMTU - echoHeaders(to) + 1, 9000, most} {
		if err := from.EchoUDP(port(to, 9000), n); err != nil {
			t.Errorf("UDP of %d bytes to %v: %v", n, to, err)
		}
	}
	if r, err := from.PingWith(to, lab.PingOptions{Count: 3, Size: 4000}); err != nil || r.Lost() != 0 {
		t.Errorf("ping of 4000 bytes to %v: %v, %v", to, r, err)
	}
}

func TestDualStack_NarrowPathIsFound(t *testing.T) {
	t.Parallel()
	for _, silent := range []bool{false, true} {
		t.Run(map[bool]string{false: "routers say so", true: "black hole"}[silent], func(t *testing.T) {
			l, e, _ := withDualStack(t, 1)
			tunnel := l.Tunnel(1400)
			if silent {
				tunnel.Silence()
			}
			d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), tunnel.Far.Up("--etcd-endpoints", e.Endpoint)
			waitPeers(t, 1, d1, d2)
			a, b := join(t, l.Host(1), "a"), join(t, tunnel.Far, "b")
			b.serve(t)
			const narrow, narrow6 = 1400 - 50, 1400 - 70
			wantPathMTU(t, func() { pings(t, a.Space, b.addr) }, narrow, d1, d2)
			wantPathMTU6(t, func() { pings(t, a.Space, b.addr6) }, narrow6, d1, d2)
			for to, mtu := range map[netip.Addr]int{b.addr: narrow, b.addr6: narrow6} {
				const size = 20 << 20
				if err := a.Upload(port(to, 8080), size); err != nil {
					t.Errorf("upload to %v: %v", to, err)
				}
				if err := a.Download(port(to, 8080), size); err != nil {
					t.Errorf("download from %v: %v", to, err)
				}
				if err := a.EchoUDP(port(to, 9000), 9000); err != nil {
					t.Errorf("UDP to %v: %v", to, err)
				}
				crosses(t, a, to, mtu)
				tooBig(t, a, to, mtu+1, mtu)
			}
		})
	}
}

func TestDualStack_AnswersWithICMPv6Errors(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 2)
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	nobody := func(p netip.Prefix) netip.Addr {
		bytes := p.Addr().As16()
		bytes[8] = 0xbe
		return netip.AddrFrom16(bytes)
	}
	for _, c := range []struct {
		name string
		dst  netip.Addr
		hops int
		from netip.Addr
		kind byte
		code []byte
	}{
		{"no lease", network6.Addr().Next(), 64, a.gateway6, 1, []byte{0, 3}}, // the first subnet is never leased
		{"own subnet, nobody there", nobody(a.subnet6), 64, a.gateway6, 1, []byte{3}},
		{"peer's subnet, nobody there", nobody(b.subnet6), 64, b.gateway6, 1, []byte{3}},
		{"time exceeded at our node", b.addr6, 1, a.gateway6, 3, []byte{0}},
		{"time exceeded at the peer", b.addr6, 2, b.gateway6, 3, []byte{0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := a.PingWith(c.dst, lab.PingOptions{Count: 3, TTL: c.hops, Interval: 300 * time.Millisecond})
			if err != nil || r.Received != 0 || len(r.Errors) == 0 {
				t.Fatalf("ping: %v, %v; want errors only", r, err)
			}
			if e := r.Errors[0]; e.From != c.from || e.Type != c.kind || !slices.Contains(c.code, e.Code) {
				t.Errorf("got %+v, want type %d code %v from %s", e, c.kind, c.code, c.from)
			}
		})
	}
}

func TestDualStack_DropsWhatIsSentFromAnotherAddress(t *testing.T) {
	t.Parallel()
	l, e, client := withDualStack(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	d1, d2 := h1.Up("--etcd-endpoints", e.Endpoint), h2.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, h1, "a"), join(t, h2, "b")
	seen := b.UDPEcho(t, port(b.addr6, 9000))
	if err := a.EchoUDP(port(b.addr6, 9000), 5); err != nil {
		t.Fatal(err)
	}

	t.Run("by a container", func(t *testing.T) {
		raw, err := a.RawSocket("eth0")
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		for _, src := range []netip.Addr{b.addr6, a.gateway6, a.addr6.Next(), netip.IPv6Loopback(), netip.IPv6Unspecified(), lab.OutsideAddr6} {
			before := d1.Drops("")
			packet := lab.UDPv6(port(src, 1234), port(b.addr6, 9000), []byte("spoof"))
			if err := raw.Send(lab.EthernetFrame(mac(t, a.Neighbour(a.gateway6)), mac(t, eth0(t, a.Space).MAC), packet)); err != nil {
				t.Fatal(err)
			}
			lab.Eventually(t, "the drop of a packet from "+src.String()+" is counted", func() bool { return d1.Drops("") > before })
		}
	})
	t.Run("by a host of the LAN", func(t *testing.T) {
		if _, err := l.Outside.Ping(h2.Addr6, 1); err != nil {
			t.Fatal(err)
		}
		raw, err := l.Outside.RawSocket("lan0")
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		vtep := mac(t, dualLeaseOf(t, client, d2.Status()).BackendV6Data.VtepMAC)
		send := func(src netip.AddrPort, inner []byte) {
			vxlan := append([]byte{8, 0, 0, 0, 0, 0, 1, 0}, lab.EthernetFrame(vtep, [6]byte{2, 0, 0, 0, 0, 1}, inner)...)
			outer := lab.UDPv6(src, port(h2.Addr6, 8472), vxlan)
			if err := raw.Send(lab.EthernetFrame(mac(t, iface(t, h2.Space, "lan0").MAC), mac(t, iface(t, l.Outside.Space, "lan0").MAC), outer)); err != nil {
				t.Fatal(err)
			}
		}
		inner := lab.UDPv6(port(a.addr6, 1234), port(b.addr6, 9000), []byte("spoof"))
		for name, packet := range map[string]struct {
			src   netip.AddrPort
			inner []byte
		}{
			"a stranger as the peer's container":  {port(lab.RouterAddr6, 8472), inner},
			"the peer as our own container":       {port(h1.Addr6, 8472), lab.UDPv6(port(b.addr6, 1), port(b.addr6, 9000), nil)},
			"the peer with an IPv4 packet inside": {port(h1.Addr6, 8472), lab.IPv4(b.addr, b.addr, 17, 64, lab.UDP(1, 9000, nil))},
			"the peer as the outside":             {port(h1.Addr6, 8472), lab.UDPv6(port(lab.OutsideAddr6, 1), port(b.addr6, 9000), nil)},
			"the peer to the outside through us":  {port(h1.Addr6, 8472), lab.UDPv6(port(a.addr6, 1), port(lab.OutsideAddr6, 9000), nil)},
		} {
			before := d2.Drops("")
			send(packet.src, packet.inner)
			lab.Eventually(t, "the drop is counted: "+name, func() bool { return d2.Drops("") > before })
		}
		for len(seen) > 0 {
			if src := <-seen; src.Addr() != a.addr6 || src.Port() == 1234 {
				t.Errorf("a datagram arrived from %s", src)
			}
		}
		send(port(h1.Addr6, 8472), inner)
		lab.Eventually(t, "what the peer may send arrives", func() bool { return len(seen) > 0 })
		if src := <-seen; src != port(a.addr6, 1234) {
			t.Errorf("a datagram arrived from %s", src)
		}
	})
}

func TestDualStack_ReachesTheOutside(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 1)
	h := l.Host(1)
	h.Up("--etcd-endpoints", e.Endpoint)
	a := join(t, h, "a")
	for outside, host := range map[netip.Addr]netip.Addr{lab.OutsideAddr: h.Addr, lab.OutsideAddr6: h.Addr6} {
		l.Outside.HTTPServer(t, port(outside, 8080))
		l.Outside.UDPEcho(t, port(outside, 9000))
		if got, err := a.Fetch("http://" + port(outside, 8080).String() + "/"); err != nil || got != host.String() {
			t.Errorf("the server at %v saw %q, %v; want the host, %v", outside, got, err, host)
		}
		if err := a.EchoUDP(port(outside, 9000), 1000); err != nil {
			t.Errorf("UDP to %v: %v", outside, err)
		}
		pings(t, a.Space, outside)
	}
}

func TestDualStack_WritesSubnetEnv(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 1)
	d := l.Host(1).Up("--etcd-endpoints", e.Endpoint)
	wantSubnetEnv(t, d, dualMTU)
}

// wantSubnetEnv checks the file of a node in the dual-stack network.
func wantSubnetEnv(t *testing.T, d *lab.Daemon, mtu int) {
	t.Helper()
	first := func(subnet string) string {
		p := mustPrefix(t, subnet)
		return netip.PrefixFrom(p.Masked().Addr().Next(), p.Bits()).String()
	}
	st := d.Status()
	want := "FLANNEL_NETWORK=10.66.0.0/16\nFLANNEL_SUBNET=" + first(st.Subnet) + "\nFLANNEL_IPV6_NETWORK=fd66::/48\nFLANNEL_IPV6_SUBNET=" + first(st.Subnet6) +
		"\nFLANNEL_MTU=" + itoa(mtu) + "\nFLANNEL_IPMASQ=true\n"
	if b, err := os.ReadFile(filepath.Join(d.RuntimeDir, "subnet.env")); err != nil || string(b) != want {
		t.Errorf("subnet.env, %v:\n%swant\n%s", err, b, want)
	}
}

func TestDualStack_ContainerWithoutIPv6HasIPv4(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 1)
	h := l.Host(1)
	d := h.Up("--etcd-endpoints", e.Endpoint)
	six := join(t, h, "six")
	c := h.Container("four")
	for _, conf := range []string{"all", "default"} {
		if err := c.Sysctl("net/ipv6/conf/"+conf+"/disable_ipv6", "1"); err != nil {
			t.Skip(err)
		}
	}
	four := attach(t, c)
	if four.addr6.IsValid() || len(eth0(t, four.Space).Addrs6) != 0 {
		t.Errorf("attachment %+v, interface %+v", four.at, eth0(t, four.Space))
	}
	if n := strings.Count(d.LogText(), "IPv6 switched off"); n != 1 {
		t.Errorf("said %d times that there is no IPv6:\n%s", n, d.LogText())
	}
	pings(t, four.Space, six.addr)
	pings(t, six.Space, four.addr)
	// Its place in the IPv6 subnet stays empty, also for who guesses it.
	bytes, host := six.addr6.As16(), four.addr.As4()
	copy(bytes[12:], host[:])
	noPing(t, six.Space, netip.AddrFrom16(bytes))
	d.Stop()
	d = h.Up("--etcd-endpoints", e.Endpoint)
	lab.Eventually(t, "both are attached again", func() bool { return d.Status().Attachments == 2 })
	pings(t, four.Space, six.addr)
	pings(t, six.Space, six.gateway6)
}

func TestDualStack_AttachmentsOutliveTheDaemon(t *testing.T) {
	t.Parallel()
	l, e, client := withDualStack(t, 2)
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	before, published := d2.Status(), dualLeaseOf(t, client, d2.Status())
	for name, end := range map[string]func(){"crash": d2.Kill, "stop": func() { d2.Stop() }} {
		t.Run(name, func(t *testing.T) {
			end()
			d2 = l.Host(2).Up("--etcd-endpoints", e.Endpoint)
			lab.Eventually(t, "the container is attached again", func() bool {
				list := d2.Attachments()
				return len(list) == 1 && list[0].Addr == b.at.Addr && list[0].Addr6 == b.at.Addr6
			})
			if now := d2.Status(); now.Subnet != before.Subnet || now.Subnet6 != before.Subnet6 || dualLeaseOf(t, client, now) != published {
				t.Errorf("now %+v, before %+v", now, before)
			}
			if i := eth0(t, b.Space); !slices.Contains(i.Addrs6, netip.PrefixFrom(b.addr6, b.subnet6.Bits())) {
				t.Errorf("interface %+v", i)
			}
			waitPeers(t, 1, d1, d2)
			for _, to := range b.addrs() {
				pings(t, a.Space, to)
				pings(t, b.Space, a.like(to))
			}
		})
	}
	if r := l.Host(2).CLI("detach", "b"); r.Code != 0 {
		t.Errorf("detach: %+v", r)
	}
	noInterface(t, b.Space)
	r, err := a.PingWith(b.addr6, lab.PingOptions{Count: 3, Interval: 300 * time.Millisecond})
	if err != nil || r.Received != 0 || len(r.Errors) == 0 {
		t.Errorf("ping of a detached container: %v, %v; want errors", r, err)
	}
}

// The store is away, and so is what a node had in memory.
func TestDualStack_StartsOnTheLastKnownLeases(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 2)
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	d1.Stop()
	e.Stop()
	d1 = l.Host(1).UpNoWait("--etcd-endpoints", e.Endpoint)
	lab.Eventually(t, "the node forwards without the store", func() bool {
		var st lab.Status
		return d1.Get("/v1/status", &st) == nil && st.State == "lease-lost" && st.Attachments == 1
	})
	for _, to := range b.addrs() {
		pings(t, a.Space, to)
		pings(t, b.Space, a.like(to))
	}
	e.Start()
	d1.WaitReady()
	for _, to := range b.addrs() {
		pings(t, a.Space, to)
	}
}

// A host has several addresses; peers take a node's packets from the published ones only.
func TestDualStack_PublishesTheAddressesThatItIsTold(t *testing.T) {
	t.Parallel()
	l, e, client := withDualStack(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	second, second6 := netip.MustParseAddr("192.0.2.99"), netip.MustParseAddr("2001:db8:0:2::99")
	for _, p := range []netip.Prefix{netip.PrefixFrom(second, 24), netip.PrefixFrom(second6, 64)} {
		if err := h1.AddAddr("lan0", p); err != nil {
			t.Fatal(err)
		}
	}
	d1 := h1.Up("--etcd-endpoints", e.Endpoint, "--public-ip", second.String(), "--public-ipv6", second6.String(), "--port", "18472")
	d2 := h2.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	if v := dualLeaseOf(t, client, d1.Status()); v.PublicIP != second.String() || v.PublicIPv6 != second6.String() {
		t.Errorf("lease %+v", v)
	}
	a, b := join(t, h1, "a"), join(t, h2, "b")
	b.serve(t)
	for _, to := range b.addrs() {
		everything(t, a, to)
	}
	noDrops(t, d2)
}

func TestDualStack_RunHasBothFamilies(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 1)
	h := l.Host(1)
	d := h.Up("--etcd-endpoints", e.Endpoint)
	r := h.CLI("run", "--", "cat", "/proc/net/if_inet6")
	head := strings.ReplaceAll(mustPrefix(t, d.Status().Subnet6).Addr().StringExpanded(), ":", "")[:16]
	if r.Code != 0 || !strings.Contains(r.Stdout, head) || !strings.Contains(r.Stdout, "eth0") {
		t.Errorf("exit code %d, addresses\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

func TestDualStack_WithoutDefaultRouteReachesPeers(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 2)
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a", "--no-default-route"), join(t, l.Host(2), "b")
	routes, err := a.Routes6()
	if err != nil || !slices.Contains(routes, network6.String()+" via "+a.gateway6.String()+" dev eth0") || strings.Contains(strings.Join(routes, "\n"), "default") {
		t.Errorf("routes %q, %v", routes, err)
	}
	for _, to := range b.addrs() {
		pings(t, a.Space, to)
	}
	if _, err := a.DialContext(t.Context(), "tcp", port(lab.OutsideAddr6, 80).String()); err == nil || !strings.Contains(err.Error(), "unreachable") {
		t.Errorf("the outside: %v, want no route", err)
	}
}

// Two users of a host share its addresses, each with a port.
func TestDualStack_TwoNodesOnOneMachine(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 1)
	h := l.Host(1)
	second := filepath.Join(h.Dir, "second")
	d1 := h.Up("--etcd-endpoints", e.Endpoint)
	d2 := h.Up("--etcd-endpoints", e.Endpoint, "--port", "18472", "--runtime-dir", second+"/run", "--state-dir", second+"/state")
	waitPeers(t, 1, d1, d2)
	a := join(t, h, "a")
	b := &member{Container: h.Container("b")}
	h.CLIJSON(&b.at, "--runtime-dir", second+"/run", "attach", pid(b.Container))
	b.read(t)
	b.serve(t)
	for _, to := range b.addrs() {
		everything(t, a, to)
	}
}

// A peer's IPv6 half is missing, or makes no sense: its IPv4 half counts all the same.
func TestDualStack_PeerWithHalfALease(t *testing.T) {
	t.Parallel()
	l, e, client := withDualStack(t, 2)
	f := newFlannelHost(t, l.Host(2), "10.66.251.0/24", "02:00:0a:42:fb:00")
	key := leaseKey(f.subnet.String(), "fd66:0:0:fb::/64")
	d := l.Host(1).Up("--etcd-endpoints", e.Endpoint)
	a, _ := join(t, l.Host(1), "a"), f.pod("p", 2)
	ours := dualLeaseOf(t, client, d.Status())
	f.learn(a.subnet, vtep{PublicIP: ours.PublicIP, BackendData: ours.BackendData})
	with := func(public, data string) string {
		return strings.Replace(f.lease(), `"PublicIPv6":null`, `"PublicIPv6":`+public+`,"BackendV6Data":`+data, 1)
	}
	const theirs, good = `"2001:db8:0:2::c"`, `{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}`
	for _, c := range []struct{ value, problem string }{
		{f.lease(), "names no PublicIPv6"},
		{strings.Replace(f.lease(), "null", theirs, 1), "BackendV6Data"},
		{with(`"`+ours.PublicIPv6+`"`, good), "is our own"},
		{with(`"fe80::1"`, good), "fe80::1 cannot be sent to"},
		{with(theirs, `{"VNI":1,"VtepMAC":"x"}`), "VtepMAC"},
		{with(theirs, `{"VNI":1,"VtepMAC":"`+ours.BackendV6Data.VtepMAC+`"}`), "our own VTEP MAC"},
		{with("null", good), "names no PublicIPv6"},
	} {
		put(t, client, key, c.value)
		last := ""
		lab.EventuallyWithinOr(t, 20*time.Second, func() string { return "want a problem with " + c.problem + ", got " + last + " for " + c.value }, func() bool {
			if d.Status().Peers != 1 {
				return false
			}
			p := peerOf(t, d)
			last = p.Problem
			return strings.Contains(p.Problem, c.problem) && p.Subnet6 == ""
		})
		pings(t, a.Space, f.addr(2))
		r, err := a.PingWith(netip.MustParseAddr("fd66:0:0:fb::2"), lab.PingOptions{Count: 2, Interval: 300 * time.Millisecond})
		if err != nil || r.Received != 0 || len(r.Errors) == 0 {
			t.Errorf("%s: ping over IPv6: %v, %v; want errors", c.value, r, err)
		}
	}
}

func TestDualStack_AllocGivesAddressesOfBothFamilies(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 1, lab.WithIPv6)
	put(t, client, prefix+"/config", strings.Replace(dualConfig, "vxlan", "alloc", 1))
	h := l.Host(1)
	d := h.Up("--etcd-endpoints", e.Endpoint)
	a, b := join(t, h, "a"), join(t, h, "b")
	b.serve(t)
	wantSubnetEnv(t, d, lab.MTU)
	for _, to := range b.addrs() {
		everything(t, a, to)
	}
	if value := keys(t, client, dualKey(d.Status()))[dualKey(d.Status())]; strings.Contains(value, "Backend") {
		t.Errorf("lease %s", value)
	}
	r, err := a.PingWith(network6.Addr().Next(), lab.PingOptions{Count: 3, Interval: 300 * time.Millisecond})
	if err != nil || r.Received != 0 || len(r.Errors) == 0 {
		t.Errorf("ping of another subnet: %v, %v; want errors", r, err)
	}
}

// The network becomes a dual-stack vxlan one while containers live.
func TestDualStack_ContainersFollowTheNetwork(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2, lab.WithIPv6)
	put(t, client, prefix+"/config", `{"Network":"10.66.0.0/16"}`)
	h1, h2 := l.Host(1), l.Host(2)
	d1, d2 := h1.Up("--etcd-endpoints", e.Endpoint), h2.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, h1, "a"), join(t, h2, "b")
	d1.Stop()
	d2.Stop()
	put(t, client, prefix+"/config", dualConfig)
	d1, d2 = h1.Up("--etcd-endpoints", e.Endpoint), h2.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	for d, m := range map[*lab.Daemon]*member{d1: a, d2: b} {
		var at lab.Attachment
		lab.Eventually(t, "the container is attached again", func() bool {
			list := d.Attachments()
			if len(list) == 1 {
				at = list[0]
			}
			return len(list) == 1
		})
		inside := eth0(t, m.Space)
		if addr6, err := netip.ParsePrefix(at.Addr6); err != nil || at.Addr != m.at.Addr || at.MTU != dualMTU || inside.MTU != dualMTU || !slices.Contains(inside.Addrs6, addr6) {
			t.Errorf("attached as %+v, which was %+v, and inside it is %+v", at, m.at, inside)
		} else {
			m.addr6 = addr6.Addr()
		}
	}
	for _, to := range b.addrs() {
		pings(t, a.Space, to)
	}
}

func TestDualStack_UDPBackendCarriesIPv4Only(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2, lab.WithIPv6)
	put(t, client, prefix+"/config", strings.Replace(dualConfig, "vxlan", "udp", 1))
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	if strings.HasPrefix(a.at.Addr6, "fd66:") || len(keys(t, client, prefix+"/subnets/")) != 2 {
		t.Errorf("attachment %+v, leases %v", a.at, keys(t, client, prefix+"/subnets/"))
	}
	for key := range keys(t, client, prefix+"/subnets/") {
		if !strings.Contains(key, "&fd66:") {
			t.Errorf("key %s", key)
		}
	}
	pings(t, a.Space, b.addr)
}

func TestDualStack_RefusesWhatCannotBe(t *testing.T) {
	t.Parallel()
	l, e, client := withDualStack(t, 1)
	h := l.Host(1)
	refuse := func(name, config string, words ...string) {
		t.Run(name, func(t *testing.T) {
			put(t, client, prefix+"/config", config)
			upRefused(t, h, []string{"--etcd-endpoints", e.Endpoint}, words...)
			if left := keys(t, client, prefix+"/subnets"); len(left) != 0 {
				t.Errorf("left in the store: %v", left)
			}
		})
	}
	refuse("MTU below IPv6's", strings.Replace(dualConfig, `"vxlan"`, `"vxlan","MTU":1300`, 1), "1280", "MTU")
	refuse("IPv6 network that the host is in", strings.Replace(dualConfig, "fd66::/48", "2001:db8::/48", 1), "2001:db8::/48", "overlaps")
	refuse("DirectRouting", strings.Replace(dualConfig, `"vxlan"`, `"vxlan","DirectRouting":true`, 1), "DirectRouting")
	ipIn(t, h.Space, "link", "add", "flannel-v6.1", "type", "vxlan", "id", "1", "dev", "lan0", "local", h.Addr6.String(), "dstport", "8472", "nolearning")
	ipIn(t, h.Space, "link", "set", "flannel-v6.1", "up")
	refuse("kernel flannel's IPv6 device", dualConfig, "8472", "flannel", "--port")
	ipIn(t, h.Space, "link", "delete", "flannel-v6.1")
	ipIn(t, h.Space, "addr", "delete", h.Addr6.String()+"/64", "dev", "lan0")
	refuse("host without IPv6", dualConfig, "IPv6", "lan0", "--iface")
}
