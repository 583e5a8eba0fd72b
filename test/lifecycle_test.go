// Tests of the life of a lease in a real etcd: reservations, the subnet that was ours before, the range of subnets, peers that change,
// history that is compacted, and whoever has our address already.

package test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// networks are the kinds of network that leases differ in.
var networks = map[string]struct {
	config string
	dual   bool
}{
	"udp":        {`{"Network":"10.66.0.0/16"}`, false},
	"dual-stack": {dualConfig, true},
}

// forNetworks runs a test in a network of each kind, with as many hosts.
func forNetworks(t *testing.T, hosts int, test func(t *testing.T, l *lab.Lab, e *lab.Etcd, client *clientv3.Client, dual bool)) {
	t.Helper()
	for name, n := range networks {
		t.Run(name, func(t *testing.T) {
			l, e, client := withEtcd(t, hosts, lab.WithIPv6)
			put(t, client, prefix+"/config", n.config)
			test(t, l, e, client, n.dual)
		})
	}
}

// leaseKey is the key of subnets in the store; v6 is "" where a lease has none.
func leaseKey(v4, v6 string) string {
	if v6 == "" {
		return subnetKey(v4)
	}
	return subnetKey(v4) + "&" + strings.ReplaceAll(v6, "/", "-")
}

// leaseOf is the node's key and the id of the etcd lease that it has, 0 for none.
func leaseOf(t *testing.T, c *clientv3.Client, st lab.Status) (key, value string, id int64) {
	t.Helper()
	key = leaseKey(st.Subnet, st.Subnet6)
	resp, err := c.Get(t.Context(), key)
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("%s: %v, %v; all: %v", key, resp, err, keys(t, c, prefix+"/subnets"))
	}
	return key, string(resp.Kvs[0].Value), resp.Kvs[0].Lease
}

// A reservation is a key of the operator's, with the host's address and no time to live. The node takes it, and never gives it one.
func TestLifeCycle_ReservationStaysOne(t *testing.T) {
	t.Parallel()
	forNetworks(t, 1, func(t *testing.T, l *lab.Lab, e *lab.Etcd, client *clientv3.Client, dual bool) {
		h := l.Host(1)
		subnet6 := ""
		if dual {
			subnet6 = "fd66:0:0:77::/64"
		}
		put(t, client, leaseKey("10.66.77.0/24", subnet6), `{"PublicIP":"`+h.Addr.String()+`","PublicIPv6":null}`)
		const ttl = 5 * time.Second
		for _, c := range []struct {
			when string
			args []string
			wait time.Duration
		}{
			{"with a short life", []string{"--ephemeral", "--lease-ttl", ttl.String()}, ttl / 2}, // a lease would have been renewed by then
			{"after a restart", nil, 0},
		} {
			d := h.Up(append([]string{"--etcd-endpoints", e.Endpoint}, c.args...)...)
			time.Sleep(c.wait)
			st := d.Status()
			_, value, id := leaseOf(t, client, st)
			if st.Subnet != "10.66.77.0/24" || st.Subnet6 != subnet6 || id != 0 || !strings.Contains(value, st.NodeID) {
				t.Errorf("%s: subnets %s %s, etcd lease %x, value %s", c.when, st.Subnet, st.Subnet6, id, value)
			}
			d.Stop()
			if all := keys(t, client, prefix+"/subnets/"); len(all) != 1 {
				t.Errorf("%s, stopped: %v", c.when, all)
			}
		}
	})
}

func TestLifeCycle_PreviousSubnetIsTakenAgain(t *testing.T) {
	t.Parallel()
	forNetworks(t, 1, func(t *testing.T, l *lab.Lab, e *lab.Etcd, client *clientv3.Client, _ bool) {
		h := l.Host(1)
		d := h.Up("--etcd-endpoints", e.Endpoint)
		before := d.Status()
		key, value, _ := leaseOf(t, client, before)
		d.Stop()
		drop := func() {
			t.Helper()
			if resp, err := client.Delete(t.Context(), key); err != nil || resp.Deleted != 1 {
				t.Fatalf("delete: %v, %v", resp, err)
			}
		}
		drop() // as its etcd lease would when it ends
		d = h.Up("--etcd-endpoints", e.Endpoint)
		if now := d.Status(); now.Subnet != before.Subnet || now.Subnet6 != before.Subnet6 {
			t.Errorf("now %s %s, before %s %s", now.Subnet, now.Subnet6, before.Subnet, before.Subnet6)
		}
		d.Stop()
		drop()
		// Somebody else has taken it in between.
		theirs := strings.NewReplacer(before.NodeID, "0123456789abcdef0123456789abcdef", h.Addr.String(), "192.0.2.77", h.Addr6.String(), "2001:db8:0:2::4d").Replace(value)
		put(t, client, key, theirs)
		d = h.Up("--etcd-endpoints", e.Endpoint)
		if now := d.Status(); now.Subnet == before.Subnet || now.Subnet6 != "" && now.Subnet6 == before.Subnet6 {
			t.Errorf("now %s %s, which is another's", now.Subnet, now.Subnet6)
		}
		if got := keys(t, client, key)[key]; got != theirs {
			t.Errorf("the other's lease is now %s", got)
		}
	})
}

func TestLifeCycle_SubnetsAreOfTheRange(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		config   string
		subnets  []string
		subnets6 []string
	}{
		"IPv4": {
			`{"Network":"10.66.0.0/16","SubnetLen":26,"SubnetMin":"10.66.7.64","SubnetMax":"10.66.7.128"}`,
			[]string{"10.66.7.64/26", "10.66.7.128/26"}, []string{""},
		},
		"dual-stack": {
			`{"EnableIPv6":true,"Network":"10.66.0.0/16","SubnetLen":26,"SubnetMin":"10.66.7.64","SubnetMax":"10.66.7.128",
				"IPv6Network":"fd66::/48","IPv6SubnetLen":80,"IPv6SubnetMin":"fd66::5:0:0:0","IPv6SubnetMax":"fd66::6:0:0:0",
				"Backend":{"Type":"vxlan","VNI":4242,"Port":14789}}`,
			[]string{"10.66.7.64/26", "10.66.7.128/26"}, []string{"fd66::5:0:0:0/80", "fd66::6:0:0:0/80"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, e, client := withEtcd(t, 3, lab.WithIPv6)
			put(t, client, prefix+"/config", c.config)
			d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
			got, got6 := map[string]bool{}, map[string]bool{}
			for _, d := range []*lab.Daemon{d1, d2} {
				st := d.Status()
				got[st.Subnet], got6[st.Subnet6] = true, true
			}
			for _, want := range c.subnets {
				if !got[want] {
					t.Errorf("nobody has %s: %v", want, got)
				}
			}
			for _, want := range c.subnets6 {
				if !got6[want] {
					t.Errorf("nobody has %s: %v", want, got6)
				}
			}
			waitPeers(t, 1, d1, d2)
			a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
			for _, to := range b.addrs() {
				pings(t, a.Space, to)
			}
			upRefused(t, l.Host(3), []string{"--etcd-endpoints", e.Endpoint}, "10.66.7.64", "10.66.7.128", "subnet")
		})
	}
}

// etcd forgets its history while nodes watch it, and while one cannot.
func TestLifeCycle_WatchOutlivesCompaction(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 3)
	put(t, client, prefix+"/config", networks["udp"].config)
	d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	compact := func() {
		t.Helper()
		for i := range 20 {
			put(t, client, "/elsewhere", itoa(i)) // history that nobody here is told of
		}
		resp, err := client.Get(t.Context(), "/elsewhere")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.Compact(t.Context(), resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Defragment(t.Context(), e.Endpoint); err != nil {
			t.Fatal(err)
		}
	}

	compact()
	d3 := l.Host(3).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 2, d1, d2, d3)
	c := join(t, l.Host(3), "c")
	pings(t, a.Space, c.addr)
	pings(t, c.Space, b.addr)

	// One sleeps, loses its connection and what happened since.
	d1.Signal(unix.SIGSTOP)
	e.Stop()
	e.Start()
	subnet := d3.Status().Subnet
	d3.Stop()
	if _, err := client.Delete(t.Context(), subnetKey(subnet)); err != nil {
		t.Fatal(err)
	}
	put(t, client, subnetKey("10.66.250.0/24"), `{"PublicIP":"192.0.2.77","PublicIPv6":null}`)
	compact()
	d1.Signal(unix.SIGCONT)
	lab.EventuallyWithin(t, 90*time.Second, "it knows what is in the store now", func() bool {
		var peers []onlyPeer
		if err := d1.Get("/v1/peers", &peers); err != nil {
			return false
		}
		seen := map[string]bool{}
		for _, p := range peers {
			seen[p.Subnet] = true
		}
		return len(peers) == 2 && seen["10.66.250.0/24"] && seen[d2.Status().Subnet]
	})
	pings(t, a.Space, b.addr)
	for _, d := range []*lab.Daemon{d1, d2} {
		if d.Status().State != "ready" {
			t.Errorf("%s: %+v", d.Host.Name, d.Status())
		}
	}
	compact()
	d3 = l.Host(3).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 3, d1, d2)
	lab.Eventually(t, "the one that came back is reached", func() bool {
		r, err := a.Ping(mustPrefix(t, d3.Status().Subnet).Addr().Next(), 1)
		return err == nil && r.Lost() == 0
	})
}

// A host whose address has changed, and whose VTEP has: the same key is put with other attributes.
func TestLifeCycle_ChangedPeerIsFollowed(t *testing.T) {
	t.Parallel()
	l, e, client := withVXLAN(t, 2, vxlanConfig)
	f := newFlannelHost(t, l.Host(2), "10.66.252.0/24", "02:00:0a:42:fc:00")
	put(t, client, subnetKey(f.subnet.String()), f.lease())
	d := l.Host(1).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d)
	f.learn(mustPrefix(t, d.Status().Subnet), vtepOf(t, client, d.Status().Subnet))
	a, p := join(t, l.Host(1), "a"), f.pod("p", 2)
	reaches := func(what string) {
		t.Helper()
		lab.Eventually(t, what, func() bool {
			r, err := a.Ping(f.addr(2), 1)
			return err == nil && r.Lost() == 0
		})
	}
	reaches("the pod is reached")

	moved := netip.MustParseAddr("192.0.2.212")
	f.ip("link", "delete", "flannel.1")
	f.ip("addr", "delete", f.Addr.String()+"/24", "dev", "lan0")
	f.ip("addr", "add", moved.String()+"/24", "dev", "lan0")
	f.Addr, f.mac = moved, "02:00:0a:42:fb:77"
	f.device()
	f.learn(mustPrefix(t, d.Status().Subnet), vtepOf(t, client, d.Status().Subnet))
	put(t, client, subnetKey(f.subnet.String()), f.lease())
	reaches("the new address and VtepMAC are followed")
	pings(t, p.Space, a.addr)
	if peer := peerOf(t, d); peer.PublicIP != moved.String() || peer.Problem != "" {
		t.Errorf("peer %+v", peer)
	}
}

// One of ours whose host has other addresses when it comes back: it has its subnets again, and everybody follows.
func TestLifeCycle_NodeComesBackElsewhere(t *testing.T) {
	t.Parallel()
	forNetworks(t, 2, func(t *testing.T, l *lab.Lab, e *lab.Etcd, client *clientv3.Client, dual bool) {
		h := l.Host(2)
		d1, d2 := l.Host(1).Up("--etcd-endpoints", e.Endpoint), h.Up("--etcd-endpoints", e.Endpoint)
		waitPeers(t, 1, d1, d2)
		a, b := join(t, l.Host(1), "a"), join(t, h, "b")
		before := d2.Status()
		d2.Stop()
		ipIn(t, h.Space, "addr", "flush", "dev", "lan0", "scope", "global")
		for _, args := range [][]string{
			{"addr", "add", "192.0.2.212/24", "dev", "lan0"}, {"addr", "add", "2001:db8:0:2::212/64", "dev", "lan0"},
			{"route", "add", "default", "via", lab.RouterAddr.String()}, {"route", "replace", "default", "via", lab.RouterAddr6.String()},
		} {
			ipIn(t, h.Space, args...)
		}
		d2 = h.Up("--etcd-endpoints", e.Endpoint)
		if now := d2.Status(); now.Subnet != before.Subnet || now.Subnet6 != before.Subnet6 || now.PublicIP != "192.0.2.212" {
			t.Errorf("now %+v, before %+v", now, before)
		}
		for _, to := range b.addrs() {
			lab.Eventually(t, "the new address is followed", func() bool {
				r, err := a.Ping(to, 1)
				return err == nil && r.Lost() == 0
			})
			pings(t, b.Space, a.like(to))
		}
		if peer := peerOf(t, d1); peer.PublicIP != "192.0.2.212" || dual && peer.PublicIPv6 != "2001:db8:0:2::212" {
			t.Errorf("peer %+v", peer)
		}
		if all := keys(t, client, prefix+"/subnets/"); len(all) != 2 {
			t.Errorf("leases %v", all)
		}
	})
}

// Whoever holds our public address without our name is not touched: flanneld would take our lease for its own.
// flannel knows a lease by its IPv4 address alone.
func TestLifeCycle_AFlannelHostWithOurIPv6AddressKeepsItsLease(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 1, lab.WithIPv6)
	put(t, client, prefix+"/config", networks["dual-stack"].config)
	h := l.Host(1)
	const vtep = `{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}`
	key := leaseKey("10.66.5.0/24", "fd66:0:0:5::/64")
	value := `{"PublicIP":"192.0.2.77","PublicIPv6":"` + h.Addr6.String() + `","BackendType":"vxlan","BackendData":` + vtep + `,"BackendV6Data":` + vtep + `}`
	put(t, client, key, value)
	d := h.Up("--etcd-endpoints", e.Endpoint)
	if s := d.Status(); s.Subnet == "10.66.5.0/24" {
		t.Errorf("the node took it for its own: %+v", s)
	}
	if got := keys(t, client, prefix+"/subnets"); len(got) != 2 || got[key] != value {
		t.Errorf("the other's lease was touched: %v", got)
	}
	var peers []struct{ Problem string }
	lab.Eventually(t, "peers tells that its IPv6 address is ours", func() bool {
		h.CLIJSON(&peers, "peers")
		return len(peers) == 1 && strings.Contains(peers[0].Problem, "is our own")
	})
}

func TestLifeCycle_ForeignLeaseOnOurAddressIsRefused(t *testing.T) {
	t.Parallel()
	const vtep = `{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}`
	for name, c := range map[string]struct {
		network string
		value   func(h *lab.Host) string
	}{
		"flannel, udp": {"udp", func(h *lab.Host) string {
			return `{"PublicIP":"` + h.Addr.String() + `","PublicIPv6":null}`
		}},
		"flannel, dual-stack vxlan": {"dual-stack", func(h *lab.Host) string {
			return `{"PublicIP":"` + h.Addr.String() + `","PublicIPv6":"` + h.Addr6.String() + `","BackendType":"vxlan","BackendData":` + vtep + `,"BackendV6Data":` + vtep + `}`
		}},
		"one of ours on the same port": {"dual-stack", func(h *lab.Host) string {
			return `{"PublicIP":"` + h.Addr.String() + `","PublicIPv6":"` + h.Addr6.String() + `","BackendType":"vxlan","BackendData":` + vtep + `,"BackendV6Data":` + vtep +
				`,"RootlessOvl":{"V":1,"NodeID":"0123456789abcdef0123456789abcdef","Port":8472,"MTU":1430}}`
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l, e, client := withEtcd(t, 1, lab.WithIPv6)
			put(t, client, prefix+"/config", networks[c.network].config)
			h := l.Host(1)
			key, value := subnetKey("10.66.5.0/24"), c.value(h)
			if networks[c.network].dual {
				key = leaseKey("10.66.5.0/24", "fd66:0:0:5::/64")
			}
			grant, err := client.Grant(t.Context(), 86400)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := client.Put(t.Context(), key, value, clientv3.WithLease(grant.ID)); err != nil {
				t.Fatal(err)
			}
			upRefused(t, h, []string{"--etcd-endpoints", e.Endpoint}, "10.66.5.0/24", key, "public IP")
			if got := keys(t, client, prefix+"/subnets"); len(got) != 1 || got[key] != value {
				t.Errorf("the other's lease was touched: %v", got)
			}
		})
	}
}
