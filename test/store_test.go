// Tests of how nodes live with etcd: joining it in every way, its absence, its loss of our key, garbage in it, races.

package test

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

const prefix = "/coreos.com/network"

// withEtcd is a lab whose outside host runs Debian's etcd-server.
func withEtcd(t *testing.T, hosts int, options ...lab.Option) (*lab.Lab, *lab.Etcd, *clientv3.Client) {
	t.Helper()
	if err := lab.HaveEtcd(); err != nil {
		t.Skip(err)
	}
	l := lab.New(t, hosts, options...)
	e := l.Outside.Etcd(nil, false)
	return l, e, l.Outside.EtcdClient(t, e.Endpoint)
}

func put(t *testing.T, c *clientv3.Client, key, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := c.Put(ctx, key, value); err != nil {
		t.Fatal(err)
	}
}

// keys lists keys with their values below a prefix.
func keys(t *testing.T, c *clientv3.Client, under string) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	resp, err := c.Get(ctx, under, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, kv := range resp.Kvs {
		found[string(kv.Key)] = string(kv.Value)
	}
	return found
}

func subnetKey(subnet string) string {
	return prefix + "/subnets/" + strings.ReplaceAll(subnet, "/", "-")
}

func TestStore_DebiansEtcd(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2)
	d1 := l.Host(1).Up("--etcd-endpoints", e.Endpoint, "--network", network.String())
	d2 := l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	pings(t, a.Space, b.addr)
	pings(t, b.Space, a.addr)

	// What is in the store is what flannel reads.
	all := keys(t, client, prefix+"/")
	if !strings.Contains(all[prefix+"/config"], network.String()) {
		t.Errorf("config is %q", all[prefix+"/config"])
	}
	for _, d := range []*lab.Daemon{d1, d2} {
		st := d.Status()
		value := all[subnetKey(st.Subnet)]
		if !strings.Contains(value, `"PublicIP":"`+d.Host.Addr.String()+`"`) || !strings.Contains(value, `"RootlessOvl":`) || !strings.Contains(value, st.NodeID) {
			t.Errorf("lease of %s is %q", st.Subnet, value)
		}
	}
	if st := d1.Status(); st.Store.Embedded || !st.Store.Connected || len(st.Store.Endpoints) != 1 {
		t.Errorf("store in status: %+v", st.Store)
	}
}

func TestStore_Prefix(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2)
	d1 := l.Host(1).Up("--etcd-endpoints", e.Endpoint, "--etcd-prefix", "/one", "--network", network.String())
	d2 := l.Host(2).Up("--etcd-endpoints", e.Endpoint, "--etcd-prefix", "/two", "--network", network.String())
	if len(keys(t, client, "/one/subnets/")) != 1 || len(keys(t, client, "/two/subnets/")) != 1 || len(keys(t, client, prefix)) != 0 {
		t.Errorf("keys: %v", keys(t, client, "/"))
	}
	if d1.Status().Peers != 0 || d2.Status().Peers != 0 {
		t.Error("nodes of two networks know each other")
	}
}

func TestStore_TLS(t *testing.T) {
	t.Parallel()
	if err := lab.HaveEtcd(); err != nil {
		t.Skip(err)
	}
	for _, c := range []struct {
		name       string
		clientAuth bool
	}{{"authority only", false}, {"authority and client certificate", true}} {
		t.Run(c.name, func(t *testing.T) {
			l := lab.New(t, 1)
			certs := l.Outside.NewCerts()
			e := l.Outside.Etcd(certs, c.clientAuth)
			args := []string{"--etcd-endpoints", e.Endpoint, "--etcd-cafile", certs.CA}
			if c.clientAuth {
				args = append(args, "--etcd-certfile", certs.ClientCert, "--etcd-keyfile", certs.ClientKey)
			}
			d := l.Host(1).Up(args...)
			if st := d.Status(); !st.Store.Connected {
				t.Errorf("store in status: %+v", st.Store)
			}
			d.Stop()
			// Without the authority the server is a stranger: no lease, and the status says why.
			d = l.Host(1).UpNoWait("--etcd-endpoints", e.Endpoint)
			storeError(t, d, "certificate")
		})
	}
}

// storeError waits until the daemon says that it cannot use the store, naming word; it may also have ended with such an error.
func storeError(t *testing.T, d *lab.Daemon, word string) {
	t.Helper()
	lab.Eventually(t, "the daemon says "+word, func() bool {
		if !d.Running() {
			return strings.Contains(d.LogText(), word)
		}
		var st lab.Status
		return d.Get("/v1/status", &st) == nil && !st.Store.Connected && strings.Contains(st.Store.Error, word)
	})
}

func TestStore_UserAndPassword(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 1)
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	must(client.UserAdd(ctx, "root", "root-secret"))
	must(client.UserGrantRole(ctx, "root", "root"))
	must(client.RoleAdd(ctx, "overlay"))
	must(client.RoleGrantPermission(ctx, "overlay", prefix+"/", clientv3.GetPrefixRangeEnd(prefix+"/"), clientv3.PermissionType(clientv3.PermReadWrite)))
	must(client.RoleGrantPermission(ctx, "overlay", prefix+"/subnets", clientv3.GetPrefixRangeEnd(prefix+"/subnets"), clientv3.PermissionType(clientv3.PermReadWrite)))
	must(client.UserAdd(ctx, "node", "node-secret"))
	must(client.UserGrantRole(ctx, "node", "overlay"))
	must(client.AuthEnable(ctx))

	d := l.Host(1).Up("--etcd-endpoints", e.Endpoint, "--etcd-username", "node", "--etcd-password", "node-secret")
	if !d.Status().Store.Connected {
		t.Errorf("store in status: %+v", d.Status().Store)
	}
	d.Stop()
	d = l.Host(1).UpNoWait("--etcd-endpoints", e.Endpoint, "--etcd-username", "node", "--etcd-password", "wrong")
	storeError(t, d, "password")
}

// outage is how long the store stays away in tests of it.
func outage() time.Duration {
	if testing.Short() {
		return 5 * time.Second
	}
	return time.Minute
}

func TestStore_OutageLosesNoPing(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2)
	d1 := l.Host(1).Up("--etcd-endpoints", e.Endpoint, "--network", network.String())
	d2 := l.Host(2).Up("--etcd-endpoints", e.Endpoint, "--ephemeral")
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	st1, st2 := d1.Status(), d2.Status()

	ping, err := a.StartPing(b.addr, lab.PingOptions{})
	if err != nil {
		t.Fatal(err)
	}
	e.Stop()
	lab.Eventually(t, "both say that the store is away", func() bool {
		return !d1.Status().Store.Connected && !d2.Status().Store.Connected && d1.Status().Store.Error != ""
	})
	c := join(t, l.Host(2), "c") // containers come and go without the store
	pings(t, a.Space, c.addr)
	time.Sleep(outage())
	complaints := strings.Count(d1.LogText(), "level=WARN") + strings.Count(d1.LogText(), "level=ERROR")
	if complaints > 5 {
		t.Errorf("the log complains %d times about one outage:\n%s", complaints, d1.LogText())
	}
	e.Start()
	lab.Eventually(t, "both say that the store is back", func() bool {
		return d1.Status().Store.Connected && d2.Status().Store.Connected
	})
	// The store gives keys their time again after a restart, so a lease that is not renewed goes only now.
	time.Sleep(outage() / 2)
	if r := ping.Stop(); r.Lost() != 0 {
		t.Errorf("ping: %v", r)
	}
	for d, before := range map[*lab.Daemon]lab.Status{d1: st1, d2: st2} {
		if now := d.Status(); now.Subnet != before.Subnet || now.State != "ready" || now.Peers != 1 {
			t.Errorf("%s: %+v, before %+v", d.Host.Name, now, before)
		}
		if value := keys(t, client, subnetKey(before.Subnet))[subnetKey(before.Subnet)]; !strings.Contains(value, before.NodeID) {
			t.Errorf("the lease of %s is %q", before.Subnet, value)
		}
	}
}

// A frozen store does not even refuse connections.
func TestStore_FrozenLosesNoPing(t *testing.T) {
	t.Parallel()
	l, e, _ := withEtcd(t, 2)
	d1 := l.Host(1).Up("--etcd-endpoints", e.Endpoint, "--network", network.String())
	d2 := l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	ping, err := a.StartPing(b.addr, lab.PingOptions{})
	if err != nil {
		t.Fatal(err)
	}
	e.Freeze()
	lab.EventuallyWithin(t, 90*time.Second, "both say that the store is away", func() bool {
		return !d1.Status().Store.Connected && !d2.Status().Store.Connected
	})
	e.Thaw()
	lab.EventuallyWithin(t, 90*time.Second, "both say that the store is back", func() bool {
		return d1.Status().Store.Connected && d2.Status().Store.Connected
	})
	if r := ping.Stop(); r.Lost() != 0 {
		t.Errorf("ping: %v", r)
	}
}

func TestStore_OwnKeyDeletedByHand(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2)
	d1 := l.Host(1).Up("--etcd-endpoints", e.Endpoint, "--network", network.String())
	d2 := l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	before := d2.Status()
	key := subnetKey(before.Subnet)
	ping, err := a.StartPing(b.addr, lab.PingOptions{Interval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		resp, err := client.Delete(t.Context(), key)
		if err != nil || resp.Deleted != 1 {
			t.Fatalf("delete %s: %v, %v", key, resp, err)
		}
		lab.Eventually(t, "the node has taken its subnet again", func() bool {
			return strings.Contains(keys(t, client, key)[key], before.NodeID) && d2.Status().State == "ready"
		})
	}
	if r := ping.Stop(); r.Lost() != 0 {
		t.Errorf("ping: %v", r)
	}
	if after := d2.Status(); after.Subnet != before.Subnet || after.Attachments != 1 {
		t.Errorf("before %+v, after %+v", before, after)
	}
	waitPeers(t, 1, d1)
}

func TestStore_UnreachableIsWaitedFor(t *testing.T) {
	t.Parallel()
	if err := lab.HaveEtcd(); err != nil {
		t.Skip(err)
	}
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.UpNoWait("--etcd-endpoints", "http://192.0.2.1:2379", "--network", network.String())
	lab.Eventually(t, "status tells that the store is awaited", func() bool {
		var st lab.Status
		return d.Get("/v1/status", &st) == nil && st.State == "waiting-for-store" && !st.Store.Connected && st.Store.Error != ""
	})
	refused(t, h.CLI("attach", pid(h.Container("early"))), "ready")
	time.Sleep(4 * time.Second)
	said := 0
	for line := range strings.Lines(d.LogText()) {
		if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
			said++
		}
	}
	if said != 1 {
		t.Errorf("said %d times that the store is away, want once:\n%s", said, d.LogText())
	}
	l.Outside.Etcd(nil, false)
	d.WaitReady()
	pings(t, join(t, h, "a").Space, mustPrefix(t, d.Status().Subnet).Addr().Next())
}

func TestStore_GarbageConfig(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ config, word string }{
		"not JSON":        {"}{", prefix + "/config"},
		"no network":      {"{}", prefix + "/config"},
		"other type":      {`"x"`, prefix + "/config"},
		"bad network":     {`{"Network":"10.66.0.0"}`, prefix + "/config"},
		"unknown backend": {`{"Network":"10.66.0.0/16","Backend":{"Type":"carrier-pigeon"}}`, "carrier-pigeon"},
		"bad port":        {`{"Network":"10.66.0.0/16","Backend":{"Type":"udp","Port":"x"}}`, "port"},
		"host-gw":         {`{"Network":"10.66.0.0/16","Backend":{"Type":"host-gw"}}`, "host-gw"},
	} {
		t.Run(name, func(t *testing.T) {
			l, e, client := withEtcd(t, 1)
			put(t, client, prefix+"/config", c.config)
			upRefused(t, l.Host(1), []string{"--etcd-endpoints", e.Endpoint}, "network config", c.word)
			if left := keys(t, client, prefix+"/subnets"); len(left) != 0 {
				t.Errorf("left in the store: %v", left)
			}
		})
	}
	t.Run("another network than --network", func(t *testing.T) {
		l, e, client := withEtcd(t, 1)
		put(t, client, prefix+"/config", `{"Network":"10.67.0.0/16"}`)
		upRefused(t, l.Host(1), []string{"--etcd-endpoints", e.Endpoint, "--network", network.String()}, "10.67.0.0/16", network.String())
	})
}

func TestStore_GarbageLeases(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2)
	put(t, client, prefix+"/config", `{"Network":"`+network.String()+`"}`)
	put(t, client, prefix+"/subnets/10.66.9.0-24", "}{")
	put(t, client, prefix+"/subnets/10.66.10.0-24", `{"PublicIP":"not an address"}`)
	put(t, client, prefix+"/subnets/10.66.11.0-99", `{"PublicIP":"192.0.2.77"}`)
	put(t, client, prefix+"/subnets/readme", "hello")
	put(t, client, prefix+"/subnets-old", "hello")
	put(t, client, prefix+"/subnets/10.200.0.0-24", `{"PublicIP":"192.0.2.78"}`)
	d1 := l.Host(1).Up("--etcd-endpoints", e.Endpoint)
	d2 := l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	lab.Eventually(t, "the nodes know each other", func() bool { return d1.Status().Peers >= 1 && d2.Status().Peers >= 1 })
	pings(t, a.Space, b.addr)
	put(t, client, prefix+"/subnets/10.66.12.0-24", strings.Repeat("x", 100_000)) // while they run, too
	put(t, client, prefix+"/config", "}{")
	pings(t, b.Space, a.addr)
	if !d1.Running() || !d2.Running() {
		t.Errorf("a daemon ended:\n%s", d1.LogText())
	}
}

func TestStore_Exhausted(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 1)
	put(t, client, prefix+"/config", `{"Network":"10.66.0.0/24","SubnetLen":26}`)
	for _, subnet := range []string{"10.66.0.64-26", "10.66.0.128-26", "10.66.0.192-26"} {
		put(t, client, prefix+"/subnets/"+subnet, `{"PublicIP":"198.51.100.9"}`)
	}
	upRefused(t, l.Host(1), []string{"--etcd-endpoints", e.Endpoint}, "10.66.0.0/24", "subnet")
}

func TestStore_AnotherNodeHasOurPublicIP(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 1)
	put(t, client, prefix+"/config", `{"Network":"`+network.String()+`"}`)
	stock := `{"PublicIP":"` + l.Host(1).Addr.String() + `","PublicIPv6":null}`
	grant, err := client.Grant(t.Context(), 86400) // without an etcd lease it would be a reservation for our address
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(t.Context(), prefix+"/subnets/10.66.5.0-24", stock, clientv3.WithLease(grant.ID)); err != nil {
		t.Fatal(err)
	}
	upRefused(t, l.Host(1), []string{"--etcd-endpoints", e.Endpoint}, l.Host(1).Addr.String(), "10.66.5.0/24")
	if got := keys(t, client, prefix+"/subnets"); len(got) != 1 || got[prefix+"/subnets/10.66.5.0-24"] != stock {
		t.Errorf("the other node's lease was touched: %v", got)
	}
}

// An operator may reserve a subnet for a host: a key with the host's address and no etcd lease.
func TestStore_ReservationForOurAddressIsTaken(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 1)
	put(t, client, prefix+"/config", `{"Network":"`+network.String()+`"}`)
	put(t, client, prefix+"/subnets/10.66.5.0-24", `{"PublicIP":"`+l.Host(1).Addr.String()+`","PublicIPv6":null}`)
	d := l.Host(1).Up("--etcd-endpoints", e.Endpoint)
	if st := d.Status(); st.Subnet != "10.66.5.0/24" {
		t.Errorf("leased %s, not the reserved subnet", st.Subnet)
	}
}

func TestStore_ReservationIsKept(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 1)
	d := l.Host(1).Up("--etcd-endpoints", e.Endpoint, "--network", network.String())
	subnet, id := d.Status().Subnet, d.Status().NodeID
	d.Stop()
	key := subnetKey(subnet)
	put(t, client, key, keys(t, client, key)[key]) // an operator's Put: the key has no etcd lease any more
	d = l.Host(1).Up("--etcd-endpoints", e.Endpoint)
	resp, err := client.Get(t.Context(), key)
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("%v, %v", resp, err)
	}
	if kv := resp.Kvs[0]; kv.Lease != 0 || !strings.Contains(string(kv.Value), id) || d.Status().Subnet != subnet {
		t.Errorf("the reservation became %v; the node has %s", kv, d.Status().Subnet)
	}
}

// Two nodes that start at the same instant never hold one subnet. The network is so small that they often want the same one.
func TestStore_SimultaneousStartsNeverShareASubnet(t *testing.T) {
	t.Parallel()
	rounds := 50
	if testing.Short() {
		rounds = 10
	}
	race := func(t *testing.T, l *lab.Lab, client *clientv3.Client, endpoint string) {
		h1, h2 := l.Host(1), l.Host(2)
		for i := range rounds {
			under := fmt.Sprintf("/race/%d", i)
			put(t, client, under+"/config", `{"Network":"10.66.0.0/24","SubnetLen":26}`)
			args := func(h *lab.Host) []string {
				dir := filepath.Join(h.Dir, fmt.Sprint(i))
				return []string{"--etcd-endpoints", endpoint, "--etcd-prefix", under, "--port", "0",
					"--runtime-dir", filepath.Join(dir, "run"), "--state-dir", filepath.Join(dir, "state")}
			}
			d1 := h1.UpNoWait(args(h1)...)
			d2 := h2.UpNoWait(args(h2)...)
			d1.WaitReady()
			d2.WaitReady()
			p1, p2 := mustPrefix(t, d1.Status().Subnet), mustPrefix(t, d2.Status().Subnet)
			if p1.Overlaps(p2) {
				t.Errorf("round %d: both hold %s", i, p1)
			}
			if held := keys(t, client, under+"/subnets/"); len(held) != 2 {
				t.Errorf("round %d: leases %v", i, held)
			}
			d1.Stop()
			d2.Stop()
		}
	}
	t.Run("Debian's etcd", func(t *testing.T) {
		l, e, client := withEtcd(t, 2)
		race(t, l, client, e.Endpoint)
	})
	t.Run("embedded etcd", func(t *testing.T) {
		l := lab.New(t, 3)
		h := l.Host(3)
		upEmbedded(h)
		race(t, l, h.EtcdClient(t, etcdURL(h)), etcdURL(h))
	})
}

// The embedded store and its joiner, both started from nothing at the same instant.
func TestStore_EmbeddedAndJoinerStartTogether(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	d2 := h2.UpNoWait("--etcd-endpoints", etcdURL(h1), "--network", network.String())
	d1 := h1.UpNoWait("--listen-etcd", netip.AddrPortFrom(h1.Addr, 2379).String(), "--network", network.String())
	d1.WaitReady()
	d2.WaitReady()
	waitPeers(t, 1, d1, d2)
	a, b := join(t, h1, "a"), join(t, h2, "b")
	pings(t, a.Space, b.addr)
}
