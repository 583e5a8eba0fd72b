// Tests of the alloc backend, and of the backends that are refused.

package node

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

const allocConfig = `{"Network":"10.5.0.0/16","Backend":{"Type":"alloc"}}`

func TestRun_AllocLeasesAndTellsOfIt(t *testing.T) {
	etcd := startEtcd(t, t.TempDir(), "127.0.0.1:0")
	put(t, etcd.Endpoint(), DefaultEtcdPrefix+"/config", allocConfig)
	c := joinConfig(t, etcd.Endpoint())
	c.Port = PortFromConfig
	a, b := startNode(t, c), startNode(t, joinConfig(t, etcd.Endpoint()))
	s, other := a.ready(), b.ready()
	if s.Backend != backendAlloc || s.MTU != 1500 || s.Subnet == other.Subnet {
		t.Errorf("status %+v, the other's subnet %s", s, other.Subnet)
	}
	got, err := os.ReadFile(s.SubnetEnv)
	gateway := netip.PrefixFrom(netip.MustParsePrefix(s.Subnet).Addr().Next(), 24)
	if want := "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=" + gateway.String() + "\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=true\n"; err != nil || string(got) != want {
		t.Errorf("subnet.env, %v:\n%swant\n%s", err, got, want)
	}
	for _, l := range leasesIn(t, etcd.Endpoint()) {
		if l.Attrs.BackendType != "" { // flannel leaves it out
			t.Errorf("lease %+v", l)
		}
	}
	a.until("one peer", func(s api.Status) bool { return s.Peers == 1 })
	peers, err := a.client.Peers(t.Context())
	if err != nil || len(peers) != 1 || peers[0].Subnet != other.Subnet || peers[0].Backend != backendAlloc || !strings.Contains(peers[0].Problem, backendAlloc) {
		t.Errorf("peers %+v, %v", peers, err)
	}
	if err := a.end(); err != nil {
		t.Fatal(err)
	}
	if again := startNode(t, c).ready(); again.Subnet != s.Subnet {
		t.Errorf("subnet %s, was %s", again.Subnet, s.Subnet)
	}
}

func TestRoutes_OfAllocLeadToNoPeer(t *testing.T) {
	me := self{
		nodeID: "us", subnet: netip.MustParsePrefix("10.5.1.0/24"), network: netip.MustParsePrefix("10.5.0.0/16"),
		public: netip.MustParseAddrPort("192.0.2.1:8285"), mtu: 1500, stockPort: lease.DefaultUDPPort, subnetLen: 24, alloc: true,
	}
	leases := []lease.Lease{{Subnet: netip.MustParsePrefix("10.5.2.0/24"), Attrs: lease.Attrs{PublicIP: netip.MustParseAddr("192.0.2.2")}}}
	peers := peersOf(leases, me)
	if len(peers) != 1 || peers[0].problem != noForwarding {
		t.Fatalf("peers %+v", peers)
	}
	for _, r := range routes(routeSources{me: me, peers: peers, gateway: newWorld()}).Routes {
		if r.Prefix == leases[0].Subnet {
			t.Errorf("a route to the peer: %+v", r)
		}
		if r.Prefix == me.network && r.Hop != forwarder.UnreachableNet {
			t.Errorf("the rest of the network is not unreachable: %+v", r)
		}
	}
	if targets := pathTargets(peers, me.subnets()); len(targets) != 0 {
		t.Errorf("probes to %+v", targets)
	}
}

func TestCheckBackend_SaysWhyAndWhatToUse(t *testing.T) {
	for backend, why := range map[string]string{
		"host-gw": "without encapsulation", "ipip": "raw sockets", "ipsec": "IPsec", "extension": "shell commands",
		"wireguard": "this version", "tencent-vpc": "cloud", "ali-vpc": "cloud", "aws-vpc": "cloud", "gce": "cloud",
		"HOST-GW": "without encapsulation", "teleport": "not known",
	} {
		cfg, err := lease.ParseConfig([]byte(`{"Network":"10.5.0.0/16","Backend":{"Type":"` + backend + `"}}`))
		if err != nil {
			t.Fatal(err)
		}
		err = checkBackend(cfg)
		if err == nil {
			t.Errorf("%s is taken", backend)
			continue
		}
		for _, says := range []string{`"` + strings.ToLower(backend) + `"`, why, `"udp"`} {
			if !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %q does not say %q", backend, err, says)
			}
		}
	}
	for _, backend := range []string{"udp", "alloc"} {
		cfg, err := lease.ParseConfig([]byte(`{"Network":"10.5.0.0/16","Backend":{"Type":"` + backend + `"}}`))
		if err == nil {
			err = checkBackend(cfg)
		}
		if err != nil {
			t.Errorf("%s: %v", backend, err)
		}
	}
}
