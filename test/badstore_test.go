// Tests of the store's bad days: what becomes of nodes and their containers when etcd is away, slow, empty, restored, split, or when somebody
// meddles with a node's key. During each a ping across nodes goes on; after each all nodes and the store agree.

package test

import (
	"context"
	"fmt"
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

// agreement is within how long after a bad day everybody agrees.
const agreement = 10 * time.Second

// badDay is nodes with a container each, on one store.
type badDay struct {
	*lab.Lab
	t       *testing.T
	client  *clientv3.Client
	daemons []*lab.Daemon
	members []*member
	logged  []int // bytes of each daemon's log before the day
	pings   []*lab.Pinger
}

// newBadDay starts the nodes of a lab and begins to ping.
func newBadDay(t *testing.T, l *lab.Lab, nodes int, client *clientv3.Client, args func(node int) []string) *badDay {
	t.Helper()
	b := &badDay{Lab: l, t: t, client: client}
	for i := range nodes {
		b.daemons = append(b.daemons, l.Host(i+1).Up(args(i+1)...))
	}
	waitPeers(t, nodes-1, b.daemons...)
	for i := range nodes {
		b.members = append(b.members, join(t, l.Host(i+1), fmt.Sprintf("c%d", i+1)))
	}
	b.agree()
	b.begin()
	return b
}

// begin pings between every two nodes, ten times a second, and marks the logs.
func (b *badDay) begin() {
	b.t.Helper()
	b.logged, b.pings = nil, nil
	for _, d := range b.daemons {
		b.logged = append(b.logged, len(d.LogText()))
	}
	for i, m := range b.members {
		to := b.members[(i+1)%len(b.members)]
		p, err := m.StartPing(to.addr, lab.PingOptions{Interval: 100 * time.Millisecond})
		if err != nil {
			b.t.Fatal(err)
		}
		b.pings = append(b.pings, p)
	}
}

// end is the end of the day: all agree, no ping was lost, no peer has gone, and no log has more than so many complaints.
func (b *badDay) end(complaints int) {
	b.t.Helper()
	b.agree()
	for _, p := range b.pings {
		if r := p.Stop(); r.Lost() != 0 {
			b.t.Errorf("ping: %v", r)
		}
	}
	for i, d := range b.daemons {
		log := d.LogText()[b.logged[i]:]
		if n := strings.Count(log, "level=WARN") + strings.Count(log, "level=ERROR"); n > complaints {
			b.t.Errorf("%s complains %d times, at most %d are fair:\n%s", d.Host.Name, n, complaints, log)
		}
		if strings.Contains(log, `msg="peer gone"`) {
			b.t.Errorf("%s has lost a peer:\n%s", d.Host.Name, log)
		}
	}
	for i, m := range b.members {
		pings(b.t, m.Space, b.members[(i+1)%len(b.members)].addr)
	}
}

// answers waits until the store does.
func (b *badDay) answers() {
	b.t.Helper()
	lab.EventuallyWithin(b.t, time.Minute, "the store answers", func() bool {
		ctx, cancel := context.WithTimeout(b.t.Context(), 2*time.Second)
		defer cancel()
		_, err := b.client.Get(ctx, "x")
		return err == nil
	})
}

// away waits until every daemon says that the store is away.
func (b *badDay) away() {
	b.t.Helper()
	for _, d := range b.daemons {
		lab.EventuallyWithin(b.t, time.Minute, d.Host.Name+" says that the store is away", func() bool { return !d.Status().Store.Connected })
	}
}

// agree waits until leases, peers and subnet files agree on all nodes.
func (b *badDay) agree() {
	b.t.Helper()
	b.answers()
	why := ""
	lab.EventuallyWithinOr(b.t, agreement, func() string { return "all agree: " + why }, func() bool {
		why = b.disagreement()
		return why == ""
	})
}

// disagreement is the first of what does not agree.
func (b *badDay) disagreement() string {
	ctx, cancel := context.WithTimeout(b.t.Context(), 5*time.Second)
	defer cancel()
	resp, err := b.client.Get(ctx, prefix+"/", clientv3.WithPrefix())
	if err != nil {
		return err.Error()
	}
	stored := map[string]string{}
	for _, kv := range resp.Kvs {
		stored[string(kv.Key)] = string(kv.Value)
	}
	if !strings.Contains(stored[prefix+"/config"], network.String()) {
		return fmt.Sprintf("the config in the store is %q", stored[prefix+"/config"])
	}
	subnets := map[string]string{} // by node id
	for _, d := range b.daemons {
		st := d.Status()
		value := stored[subnetKey(st.Subnet)]
		switch {
		case st.State != "ready" || !st.Store.Connected:
			return fmt.Sprintf("%s is %s, connected %t: %s", d.Host.Name, st.State, st.Store.Connected, st.Store.Error)
		case !strings.Contains(value, `"`+st.NodeID+`"`) || !strings.Contains(value, `"`+d.Host.Addr.String()+`"`):
			return fmt.Sprintf("%s has %s, of which the store says %q", d.Host.Name, st.Subnet, value)
		}
		env, err := os.ReadFile(filepath.Join(d.RuntimeDir, "subnet.env"))
		gateway := netip.PrefixFrom(mustPrefix(b.t, st.Subnet).Addr().Next(), mustPrefix(b.t, st.Subnet).Bits())
		if err != nil || !strings.Contains(string(env), "FLANNEL_SUBNET="+gateway.String()+"\n") {
			return fmt.Sprintf("%s has %s, and its subnet.env says %q, %v", d.Host.Name, st.Subnet, env, err)
		}
		subnets[st.NodeID] = st.Subnet
	}
	if len(subnets) != len(b.daemons) {
		return fmt.Sprintf("subnets %v", subnets)
	}
	for _, d := range b.daemons {
		var peers []struct {
			Subnet   string `json:"subnet"`
			NodeID   string `json:"node_id"`
			PublicIP string `json:"public_ip"`
			Problem  string `json:"problem"`
		}
		if err := d.Get("/v1/peers", &peers); err != nil {
			return err.Error()
		}
		var known []string
		for _, p := range peers {
			want, ours := subnets[p.NodeID]
			switch {
			case !ours:
			case want != p.Subnet || p.Problem != "":
				return fmt.Sprintf("%s knows %s at %s: %q; it has %s", d.Host.Name, p.PublicIP, p.Subnet, p.Problem, want)
			default:
				known = append(known, p.NodeID)
			}
		}
		if slices.Sort(known); len(slices.Compact(known)) != len(b.daemons)-1 {
			return fmt.Sprintf("%s knows %v", d.Host.Name, peers)
		}
	}
	return ""
}

// onEtcd is a bad day on Debian's etcd.
func onEtcd(t *testing.T, nodes int) (*badDay, *lab.Etcd) {
	t.Helper()
	l, e, client := withEtcd(t, nodes)
	return newBadDay(t, l, nodes, client, func(int) []string { return []string{"--etcd-endpoints", e.Endpoint, "--network", network.String()} }), e
}

func TestBadStore_Away(t *testing.T) {
	t.Parallel()
	b, e := onEtcd(t, 2)
	e.Stop()
	b.away()
	e.Start()
	b.end(1)
}

// The network between the nodes and the store is cut, and the store's history is compacted meanwhile.
func TestBadStore_CompactedWhileCutOff(t *testing.T) {
	t.Parallel()
	b, e := onEtcd(t, 2)
	for i := range b.daemons {
		if err := b.Host(i + 1).Blackhole(netip.PrefixFrom(e.Addr.Addr(), 32)); err != nil {
			t.Fatal(err)
		}
	}
	b.away()
	for i := range 50 {
		put(t, b.client, "/unrelated", fmt.Sprint(i))
	}
	stock := subnetKey("10.66.250.0/24") // what happened meanwhile is seen, too
	put(t, b.client, stock, `{"PublicIP":"198.51.100.9","PublicIPv6":null}`)
	resp, err := b.client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.client.Compact(t.Context(), resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	for i := range b.daemons {
		if err := b.Host(i + 1).Unblackhole(netip.PrefixFrom(e.Addr.Addr(), 32)); err != nil {
			t.Fatal(err)
		}
	}
	waitPeers(t, 2, b.daemons...)
	b.end(2)
}

// Compaction under the eyes of nodes that are connected, and a restart right after it.
func TestBadStore_Compacted(t *testing.T) {
	t.Parallel()
	b, e := onEtcd(t, 2)
	for range 2 {
		for i := range 50 {
			put(t, b.client, "/unrelated", fmt.Sprint(i))
		}
		resp, err := b.client.Get(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.client.Compact(t.Context(), resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
			t.Fatal(err)
		}
		b.agree()
		e.Stop()
		e.Start()
	}
	b.end(2)
}

// A store that answers after seconds is used as it is; one that takes too long counts as away, and the log says so a few times at most.
func TestBadStore_Slow(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 2)
	proxy := l.Outside.Proxy(t, netip.AddrPortFrom(l.Outside.Addr, 2390), e.Addr)
	b := newBadDay(t, l, 2, client, func(int) []string {
		return []string{"--etcd-endpoints", "http://" + proxy.Addr.String(), "--network", network.String()}
	})
	proxy.SetDelay(time.Second)
	key := subnetKey(b.daemons[0].Status().Subnet)
	if _, err := client.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "the key is put back, slowly", func() bool { return len(keys(t, client, key)) == 1 })
	proxy.SetDelay(4 * time.Second) // there, and back
	if _, err := client.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	b.awayOnce()
	proxy.SetDelay(0)
	b.end(6)
}

// awayOnce waits until some daemon has said that the store is away.
func (b *badDay) awayOnce() {
	b.t.Helper()
	lab.EventuallyWithin(b.t, time.Minute, "somebody notices", func() bool {
		return slices.ContainsFunc(b.daemons, func(d *lab.Daemon) bool { return !d.Status().Store.Connected })
	})
}

func TestBadStore_Stutters(t *testing.T) {
	t.Parallel()
	b, e := onEtcd(t, 2)
	for i := range 5 {
		e.Freeze()
		time.Sleep(time.Second)
		e.Thaw()
		if _, err := b.client.Delete(t.Context(), subnetKey(b.daemons[i%2].Status().Subnet)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
	}
	b.end(6)
}

func TestBadStore_ComesBackEmpty(t *testing.T) {
	t.Parallel()
	l, e, client := withEtcd(t, 4)
	for range 30 {
		put(t, client, "/unrelated", "x") // so that revisions go back a long way
	}
	b := newBadDay(t, l, 3, client, func(int) []string { return []string{"--etcd-endpoints", e.Endpoint, "--network", network.String()} })
	e.Stop()
	e.Wipe()
	e.Start()
	b.end(6)
	for i, d := range b.daemons {
		if log := d.LogText()[b.logged[i]:]; strings.Count(log, "the store has gone back") != 1 {
			t.Errorf("%s does not say once what has happened:\n%s", d.Host.Name, log)
		}
	}
	// The network is the one that there was, to whoever comes.
	if st := b.Host(4).Up("--etcd-endpoints", e.Endpoint).Status(); st.Network != network.String() {
		t.Errorf("a new node is in the network %s", st.Network)
	}
}

// The daemon with the embedded store has lost the store's data. The others go on among themselves.
func TestBadStore_EmbeddedComesBackEmpty(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 3)
	h := l.Host(1)
	listen := []string{"--listen-etcd", h.Addr.String() + ":2379"}
	b := newBadDay(t, l, 3, l.Outside.EtcdClient(t, etcdURL(h)), func(node int) []string {
		if node == 1 {
			return append(listen, "--network", network.String())
		}
		return []string{"--etcd-endpoints", etcdURL(h)}
	})
	b.pings[0].Stop()
	b.pings[2].Stop()
	b.daemons[0].Stop()
	data, err := filepath.Glob(filepath.Join(h.Home(), "*", "*", "rootless-ovl", "etcd"))
	if more, err := filepath.Glob(filepath.Join(h.Home(), ".*", "*", "rootless-ovl", "etcd")); err == nil {
		data = append(data, more...)
	}
	if err != nil || len(data) == 0 {
		t.Fatalf("no data of the store below %s: %v", h.Home(), err)
	}
	for _, dir := range data {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	b.daemons[0] = h.Up(listen...) // it remembers the network
	b.logged[0] = 0
	b.pings = b.pings[1:2]
	b.end(6)
}

// A backup has earlier versions of what there is: a lease on another etcd lease, and none of a node that came later.
func TestBadStore_RestoredFromABackup(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		have   error
		backup func(e *lab.Etcd) (restore func())
	}{
		"of the data directory": {nil, func(e *lab.Etcd) func() {
			e.Stop()
			defer e.Start()
			return e.Save()
		}},
		"by etcdctl": {lab.HaveEtcdctl(), (*lab.Etcd).Snapshot},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if c.have != nil {
				t.Skip(c.have)
			}
			l, e, client := withEtcd(t, 3)
			args := func(int) []string { return []string{"--etcd-endpoints", e.Endpoint, "--network", network.String()} }
			d1, d2 := l.Host(1).Up(args(1)...), l.Host(2).Up(args(2)...)
			waitPeers(t, 1, d1, d2)
			restore := c.backup(e)
			b := &badDay{Lab: l, t: t, client: client, daemons: []*lab.Daemon{d1, d2}}
			b.agree()
			for range 3 {
				b.revoke(d2)
				b.agree()
			}
			b.daemons = append(b.daemons, l.Host(3).Up(args(3)...))
			for i := range b.daemons {
				b.members = append(b.members, join(t, l.Host(i+1), fmt.Sprintf("c%d", i+1)))
			}
			b.agree()
			b.begin()
			e.Stop()
			restore()
			e.Start()
			b.end(6)
		})
	}
}

// revoke ends the etcd lease of a node by hand.
func (b *badDay) revoke(d *lab.Daemon) {
	b.t.Helper()
	key := subnetKey(d.Status().Subnet)
	resp, err := b.client.Get(b.t.Context(), key)
	if err != nil || len(resp.Kvs) != 1 {
		b.t.Fatalf("%s: %v, %v", key, resp, err)
	}
	if _, err := b.client.Revoke(b.t.Context(), clientv3.LeaseID(resp.Kvs[0].Lease)); err != nil {
		b.t.Fatal(err)
	}
}

func TestBadStore_LeasesRevokedByHand(t *testing.T) {
	t.Parallel()
	b, _ := onEtcd(t, 2)
	for _, d := range b.daemons {
		b.revoke(d)
	}
	b.end(3)
}

func TestBadStore_KeysDeletedByHand(t *testing.T) {
	t.Parallel()
	b, _ := onEtcd(t, 2)
	if _, err := b.client.Delete(t.Context(), prefix+"/", clientv3.WithPrefix()); err != nil { // the config, too
		t.Fatal(err)
	}
	b.end(4)
}

// Somebody else has the subnet of a node, which gives way: it takes another, and the others are not disturbed.
func TestBadStore_KeyTakenByAnother(t *testing.T) {
	t.Parallel()
	b, _ := onEtcd(t, 3)
	loser := b.daemons[2]
	subnet := loser.Status().Subnet
	key := subnetKey(subnet)
	b.pings[1].Stop()
	b.pings[2].Stop()
	b.pings = b.pings[:1]
	grant, err := b.client.Grant(t.Context(), 3600)
	if err != nil {
		t.Fatal(err)
	}
	thief := `{"PublicIP":"192.0.2.99","PublicIPv6":null,"RootlessOvl":{"V":1,"NodeID":"thief","Port":8285,"MTU":1472}}`
	if _, err := b.client.Put(t.Context(), key, thief, clientv3.WithLease(grant.ID)); err != nil {
		t.Fatal(err)
	}
	lab.EventuallyWithin(t, agreement, "the node has another subnet", func() bool {
		st := loser.Status()
		return st.Subnet != subnet && st.State == "ready"
	})
	b.agree()
	b.members[2] = join(t, b.Host(3), "again")
	pings(t, b.members[0].Space, b.members[2].addr)
	pings(t, b.members[2].Space, b.members[1].addr)
	resp, err := b.client.Get(t.Context(), key)
	if err != nil || len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != thief || resp.Kvs[0].Version != 2 {
		t.Errorf("fought over the key: %v, %v", resp, err)
	}
	log := loser.LogText()[b.logged[2]:]
	for _, word := range []string{"lease lost", "thief", "the node has another subnet now", "does not fit"} {
		if strings.Count(log, word) == 0 {
			t.Errorf("the log does not say %q:\n%s", word, log)
		}
	}
	b.logged[2] = len(loser.LogText()) // it may say what has become of its container
	if r := b.pings[0].Stop(); r.Lost() != 0 {
		t.Errorf("ping: %v", r)
	}
}

// Certificates have expired on both sides, and are renewed in their place: nothing is started again.
func TestBadStore_CertificatesExpired(t *testing.T) {
	t.Parallel()
	if err := lab.HaveEtcd(); err != nil {
		t.Skip(err)
	}
	l := lab.New(t, 2)
	certs := l.Outside.NewCerts()
	e := l.Outside.Etcd(certs, true)
	b := newBadDay(t, l, 2, l.Outside.EtcdClientTLS(t, e.Endpoint, certs), func(int) []string {
		return []string{"--etcd-endpoints", e.Endpoint, "--etcd-cafile", certs.CA, "--etcd-certfile", certs.ClientCert, "--etcd-keyfile", certs.ClientKey, "--network", network.String()}
	})
	certs.Renew(-time.Minute)
	e.Stop() // connections that there are would live on
	e.Start()
	for _, d := range b.daemons {
		storeError(t, d, "certificate has expired")
	}
	certs.Renew(time.Hour)
	b.end(1)
}

// A member of a cluster is cut off from the two others. Nodes that reach those notice nothing, one that reaches the lonely member only goes on
// with what it knows.
func TestBadStore_ClusterSplit(t *testing.T) {
	t.Parallel()
	if err := lab.HaveEtcd(); err != nil {
		t.Skip(err)
	}
	l := lab.New(t, 3)
	etcd := lab.EtcdCluster(l.Host(1), l.Host(2), l.Host(3))
	all := strings.Join([]string{etcd[0].Endpoint, etcd[1].Endpoint, etcd[2].Endpoint}, ",")
	b := newBadDay(t, l, 3, l.Outside.EtcdClient(t, etcd[0].Endpoint), func(node int) []string {
		if node == 3 {
			return []string{"--etcd-endpoints", etcd[2].Endpoint, "--network", network.String()}
		}
		return []string{"--etcd-endpoints", all, "--network", network.String()}
	})
	etcd[2].CutOff(etcd[0], etcd[1])
	lab.EventuallyWithin(t, time.Minute, "the node at the lonely member says that the store is away", func() bool { return !b.daemons[2].Status().Store.Connected })
	b.answers()
	majority := badDay{Lab: l, t: t, client: b.client, daemons: b.daemons[:2]}
	for range 3 { // what changes meanwhile
		key := subnetKey(b.daemons[0].Status().Subnet)
		if _, err := b.client.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		lab.Eventually(t, "the key is put back", func() bool { return len(keys(t, b.client, key)) == 1 })
	}
	majority.connected()
	etcd[2].Mend(etcd[0], etcd[1])
	b.end(8)
}

// connected waits until every daemon says so.
func (b *badDay) connected() {
	b.t.Helper()
	for _, d := range b.daemons {
		lab.Eventually(b.t, d.Host.Name+" is connected", func() bool { return d.Status().Store.Connected })
	}
}

// The list of endpoints names two stores that know nothing of each other: all nodes come together in the first that answers.
func TestBadStore_TwoStoresInOneList(t *testing.T) {
	t.Parallel()
	l, first, client := withEtcd(t, 2)
	second := l.Outside.AnotherEtcd(2399)
	other := l.Outside.EtcdClient(t, second.Endpoint)
	for range 40 {
		put(t, other, "/unrelated", "x")
	}
	args := []string{"--etcd-endpoints", first.Endpoint + "," + second.Endpoint, "--network", network.String()}
	b := newBadDay(t, l, 2, client, func(int) []string { return args })
	first.Stop()
	// Better one store than none.
	b.client = other
	b.agree()
	first.Start()
	b.client = client
	b.agree()
	b.revoke(b.daemons[0]) // it is not taken for lost in the other store
	b.end(8)
	for _, d := range b.daemons {
		if !strings.Contains(d.LogText(), "not of one store") {
			t.Errorf("%s does not say what is wrong:\n%s", d.Host.Name, d.LogText())
		}
	}
}
