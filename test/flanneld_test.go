// Tests of up with flanneld's command line, of docker-opts, and of a network with the alloc backend.

package test

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestFlanneld_CommandLineAndEnvironmentStartANode(t *testing.T) {
	t.Parallel()
	l, e, etcd := withEtcd(t, 1)
	put(t, etcd, "/flannel/config", `{"Network": "10.66.0.0/16", "SubnetLen": 26}`)
	h := l.Host(1)
	file := filepath.Join(h.Dir, "subnet.env")
	d := h.UpEnv([]string{"FLANNELD_ETCD_PREFIX=/flannel", "FLANNELD_IFACE=nonsense0", "FLANNELD_IP_MASQ=false"},
		"-etcd-endpoints="+e.Endpoint, "-iface", h.Addr.String(), "-subnet-file", file, "-healthz-port=8471",
		"-kube-subnet-mgr=false", "-iptables-resync=30", "-v=1")
	st := d.Status()
	subnet := mustPrefix(t, st.Subnet)
	if st.Network != "10.66.0.0/16" || subnet.Bits() != 26 {
		t.Errorf("status %+v", st)
	}
	gateway := netip.PrefixFrom(subnet.Addr().Next(), subnet.Bits()).String()
	want := "FLANNEL_NETWORK=10.66.0.0/16\nFLANNEL_SUBNET=" + gateway + "\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
	if b, err := os.ReadFile(file); err != nil || string(b) != want {
		t.Errorf("subnet.env, %v:\n%swant\n%s", err, b, want)
	}
	for path, want := range map[string]string{"/healthz": "flanneld is running", "/readyz": "flanneld is ready"} {
		if got, err := l.Outside.Fetch("http://" + port(h.Addr, 8471).String() + path); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", path, got, err, want)
		}
	}
	if r := h.CLI("docker-opts", "-c"); r.Code != 0 || r.Stdout != `DOCKER_OPTS=" --bip=`+gateway+` --ip-masq=true --mtu=1472"`+"\n" {
		t.Errorf("docker-opts: %+v", r)
	}
	if n := strings.Count(d.LogText(), "have no effect here"); n != 1 || !strings.Contains(d.LogText(), "--iptables-resync: ") {
		t.Errorf("%d warnings:\n%s", n, d.LogText())
	}
	kvs, err := etcd.Get(context.Background(), "/flannel/subnets/"+strings.ReplaceAll(st.Subnet, "/", "-"))
	if err != nil || len(kvs.Kvs) != 1 {
		t.Errorf("the lease is not under the prefix: %v, %v", kvs, err)
	}
}

func TestAlloc_LeasesWithoutForwardingToPeers(t *testing.T) {
	t.Parallel()
	l, e, etcd := withEtcd(t, 2)
	put(t, etcd, prefix+"/config", `{"Network": "10.66.0.0/16", "Backend": {"Type": "alloc"}}`)
	h1, h2 := l.Host(1), l.Host(2)
	d1, d2 := h1.Up("-etcd-endpoints", e.Endpoint), h2.Up("-etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	if st := d1.Status(); st.MTU != lab.MTU {
		t.Errorf("MTU %d, want the interface's, %d", st.MTU, lab.MTU)
	}
	a, b, c := join(t, h1, "a"), join(t, h1, "b"), join(t, h2, "c")
	pings(t, a.Space, b.addr)
	pings(t, a.Space, a.gateway)
	r, err := a.Ping(c.addr, 3)
	if err != nil || r.Received != 0 || len(r.Errors) == 0 {
		t.Errorf("ping of the other host's container: %v, %v; want it refused", r, err)
	}
	l.Outside.HTTPServer(t, port(lab.OutsideAddr, 8080))
	if _, err := a.Fetch("http://" + port(lab.OutsideAddr, 8080).String() + "/"); err != nil {
		t.Errorf("the outside: %v", err)
	}
}
