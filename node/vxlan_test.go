// Tests of what a vxlan network asks of a node.

package node

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

func vxlanLease(l lease.Lease, vni uint32, mac [6]byte) lease.Lease {
	l.Attrs.BackendType = "vxlan"
	l.Attrs.BackendData = lease.VXLANData{VNI: vni, VtepMAC: mac}.JSON()
	return l
}

func vxlanSelf() self {
	me := testSelf()
	me.stockPort, me.mtu = 8472, 1450
	me.vxlan = &forwarder.VXLAN{VNI: 1, MAC: [6]byte{2, 0, 0, 0, 0, 1}}
	return me
}

func TestVtepMAC_IsMadeOnceAndKept(t *testing.T) {
	dir := t.TempDir()
	mac, err := vtepMAC(dir)
	if err != nil || mac[0]&3 != 2 {
		t.Fatalf("%x, %v: want a local unicast address", mac, err)
	}
	if again, err := vtepMAC(dir); err != nil || again != mac {
		t.Errorf("second time: %x, %v; want %x", again, err, mac)
	}
	if other, err := vtepMAC(t.TempDir()); err != nil || other == mac {
		t.Errorf("another node: %x, %v", other, err)
	}
	path := filepath.Join(dir, vtepMACFile)
	for _, bad := range []string{"", "x", "01:00:5e:00:00:01", "00:00:00:00:00:00", "02:11:22:33:44:55:66:77"} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := vtepMAC(dir); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestPeersOf_ReadsTheLeasesOfAVXLANNetwork(t *testing.T) {
	me := vxlanSelf()
	mac := func(n byte) [6]byte { return [6]byte{0xc6, 0, 0, 0, 0, n} }
	noData, garbage := stockLease("10.5.6.0/24", "192.0.2.6"), stockLease("10.5.7.0/24", "192.0.2.7")
	noData.Attrs.BackendType, garbage.Attrs.BackendType = "vxlan", "vxlan"
	garbage.Attrs.BackendData = []byte(`{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}`)
	odd := vxlanLease(stockLease("10.5.9.0/24", "192.0.2.9"), 1, mac(9))
	odd.Attrs.BackendType = "host-gw"
	ours := vxlanLease(ovlLease("10.5.2.0/24", "192.0.2.3", "bb", 18472, 1400), 1, mac(2))
	ours.Attrs.RootlessOvl.Caps = []string{lease.CapPartialChecksums}
	for _, tc := range []struct {
		name  string
		lease lease.Lease
		says  string // the problem, empty for none
		doubt string
		want  forwarder.PeerConfig
	}{
		{"a flannel host", vxlanLease(stockLease("10.5.1.0/24", "192.0.2.2"), 1, mac(1)), "", "",
			forwarder.PeerConfig{Addr: netip.MustParseAddrPort("192.0.2.2:8472"), MTU: 1450, AnyPort: true, VTEP: mac(1)}},
		{"one of ours", ours, "", "",
			forwarder.PeerConfig{Addr: netip.MustParseAddrPort("192.0.2.3:18472"), MTU: 1400, PartialChecksums: true, VTEP: mac(2), OuterChecksums: true}},
		{"of another VNI", vxlanLease(stockLease("10.5.3.0/24", "192.0.2.4"), 7, mac(3)), "", "VNI 7",
			forwarder.PeerConfig{Addr: netip.MustParseAddrPort("192.0.2.4:8472"), MTU: 1450, AnyPort: true, VTEP: mac(3)}},
		{"of the udp backend", stockLease("10.5.4.0/24", "192.0.2.5"), `"udp"`, "", forwarder.PeerConfig{}},
		{"of another backend", odd, `"host-gw"`, "", forwarder.PeerConfig{}},
		{"one of ours of udp", ovlLease("10.5.5.0/24", "192.0.2.5", "cc", 18285, 1472), `"udp"`, "", forwarder.PeerConfig{}},
		{"without data", noData, "no BackendData", "", forwarder.PeerConfig{}},
		{"with no usable address", garbage, "ff:ff:ff:ff:ff:ff", "", forwarder.PeerConfig{}},
		{"with our address", vxlanLease(stockLease("10.5.8.0/24", "192.0.2.8"), 1, me.vxlan.MAC), "our own VTEP", "", forwarder.PeerConfig{}},
		{"with no public IP", vxlanLease(stockLease("10.5.8.0/24", ""), 1, mac(8)), "public IP", "", forwarder.PeerConfig{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := peersOf([]lease.Lease{tc.lease}, me)[0]
			if tc.says != "" {
				if !strings.Contains(p.problem, tc.says) || p.addr.IsValid() {
					t.Errorf("%+v, want a problem with %q", p, tc.says)
				}
				return
			}
			if p.problem != "" || (p.doubt != "") != (tc.doubt != "") || !strings.Contains(p.doubt, tc.doubt) || p.config(p.way) != tc.want {
				t.Errorf("%+v, want %+v", p, tc.want)
			}
		})
	}
}

func TestNode_FollowsWhatPeersOfAVXLANNetworkPublish(t *testing.T) {
	var logged syncBuffer
	c := testConfig(t)
	c.Log = slog.New(slog.NewTextHandler(&logged, nil))
	w := newWorld()
	n := readyNode(t, w, c, "10.5.72.0/24")
	n.vxlan, n.mtu = &forwarder.VXLAN{VNI: 1, MAC: [6]byte{2, 0, 0, 0, 0, 1}}, 1450
	hop := func() forwarder.Hop {
		w.mu.Lock()
		defer w.mu.Unlock()
		return lookup(t, w.table, "10.5.1.7")
	}
	at := func(public string, mac byte) forwarder.Hop {
		return forwarder.ToPeer(forwarder.PeerConfig{Addr: netip.AddrPortFrom(netip.MustParseAddr(public), uint16(n.selfLocked().stockPort)), MTU: 1450, AnyPort: true, VTEP: [6]byte{2, 0, 0, 0, 0, mac}})
	}
	for _, s := range []struct {
		public string
		mac    byte
	}{{"192.0.2.2", 5}, {"192.0.2.2", 6}, {"192.0.2.9", 6}} {
		n.setLeases([]lease.Lease{vxlanLease(stockLease("10.5.1.0/24", s.public), 1, [6]byte{2, 0, 0, 0, 0, s.mac}), stockLease("10.5.2.0/24", "192.0.2.3")})
		if hop() != at(s.public, s.mac) {
			t.Errorf("%s with MAC %d: %+v", s.public, s.mac, hop())
		}
	}
	for text, times := range map[string]int{
		"peer has another VTEP MAC address": 1, "02:00:00:00:00:06": 1, "peer cannot be used": 1, "peer gone": 1,
	} {
		if got := strings.Count(logged.String(), text); got != times {
			t.Errorf("%q was logged %d times, want %d:\n%s", text, got, times, logged.String())
		}
	}
}

func TestUnderlayMTU_IsTheSmallerOfConfigAndInterface(t *testing.T) {
	for _, tc := range []struct {
		config    string
		ext, want int
		warned    bool
	}{
		{`{"Type":"udp","MTU":1000}`, 1500, 1500, false},
		{`{"Type":"udp"}`, 70000, 65535, false},
		{`{"Type":"vxlan"}`, 9000, 9000, false},
		{`{"Type":"vxlan"}`, 65536, 65535, false},
		{`{"Type":"vxlan","MTU":1400}`, 1500, 1400, false},
		{`{"Type":"vxlan","MTU":1500}`, 1500, 1500, false},
		{`{"Type":"vxlan","MTU":9000}`, 1500, 1500, true},
	} {
		cfg, err := lease.ParseConfig([]byte(`{"Network":"10.5.0.0/16","Backend":` + tc.config + `}`))
		if err != nil {
			t.Fatal(err)
		}
		var logged bytes.Buffer
		n := &Node{log: slog.New(slog.NewTextHandler(&logged, nil))}
		if got := n.underlayMTU(cfg, external{mtu: tc.ext}); got != tc.want || (logged.Len() > 0) != tc.warned {
			t.Errorf("%s on %d: %d, want %d; logged %q", tc.config, tc.ext, got, tc.want, logged.String())
		}
	}
}

// The superpackets that a container's kernel makes just fill a train, whatever stands in front of each segment.
func TestGSOMaxSize_FillsATrain(t *testing.T) {
	for _, c := range []struct{ mtu, encap int }{{1472, 0}, {1450, 22}, {8950, 22}, {1350, 22}} {
		const ipAndTCP, maxTCPHeader = 52, 320
		segments := (gsoMaxSize(c.mtu, c.encap) - maxTCPHeader) / (c.mtu - ipAndTCP)
		if want := forwarder.MaxTrain / (c.mtu + c.encap); segments != want {
			t.Errorf("MTU %d, encapsulation %d: %d segments, want %d", c.mtu, c.encap, segments, want)
		}
	}
}

func TestRun_JoinsAVXLANNetwork(t *testing.T) {
	const config = `{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":18472,"MTU":1400}}`
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	put(t, etcd.Endpoint(), DefaultEtcdPrefix+"/config", config)
	c := joinConfig(t, etcd.Endpoint())
	r := startNode(t, c)
	s := r.ready()
	if s.Backend != "vxlan" || s.MTU != 1350 {
		t.Errorf("status %+v", s)
	}
	leases := leasesIn(t, etcd.Endpoint())
	if len(leases) != 1 {
		t.Fatalf("leases %+v", leases)
	}
	a := leases[0].Attrs
	d, err := lease.ParseVXLANData("BackendData", a.BackendData)
	if err != nil || a.BackendType != "vxlan" || d.VNI != 7 || d.VtepMAC[0]&3 != 2 || a.RootlessOvl.MTU != 1350 {
		t.Errorf("%+v, %v", a, err)
	}
	if env, err := lease.ReadSubnetEnv(filepath.Join(c.RuntimeDir, "subnet.env")); err != nil || env.MTU != 1350 {
		t.Errorf("subnet.env %+v, %v", env, err)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	startNode(t, c).ready()
	if again := leasesIn(t, etcd.Endpoint()); len(again) != 1 || string(again[0].Attrs.BackendData) != string(a.BackendData) {
		t.Errorf("second run: %+v, first: %s", again, a.BackendData)
	}
}
