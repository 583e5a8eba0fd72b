// Rootless docker whose containers are on the overlay by docker's own network driver.

package engines

import (
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// createOverlay is what a user types.
const createOverlay = "network create -d rootless-ovl --ipam-driver rootless-ovl"

// overlayAddr is a container's address on the overlay.
func (d *docker) overlayAddr(container string) string {
	d.t.Helper()
	return d.ok("inspect", "-f", "{{.NetworkSettings.Networks.ovl.IPAddress}}", container)
}

// fails runs docker with args, which must fail and say what.
func (d *docker) fails(args string, what ...string) {
	d.t.Helper()
	r := d.run(strings.Fields(args)...)
	if r.Code == 0 {
		d.t.Errorf("%s: docker %s succeeds", d.host.Name, args)
	}
	for _, w := range what {
		if !strings.Contains(r.Stderr, w) {
			d.t.Errorf("%s: docker %s does not say %q: %s", d.host.Name, args, w, r.Stderr)
		}
	}
}

// pings tells whether a container reaches a name or an address.
func (d *docker) pings(container, to string) bool {
	d.t.Helper()
	return d.run("exec", container, "ping", "-c", "1", "-W", "2", to).Code == 0
}

// finds waits until a container reaches another by name.
func (d *docker) finds(container, name string) {
	d.t.Helper()
	lab.Eventually(d.t, d.host.Name+": "+container+" reaches "+name, func() bool { return d.pings(container, name) })
}

// attached is what of the daemon's list these tests look at.
type attached struct {
	Name    string   `json:"name"`
	Owner   string   `json:"owner"`
	Aliases []string `json:"aliases"`
	Addr    string   `json:"addr"`
	Addr6   string   `json:"addr6"`
	MAC     string   `json:"mac"`
	IfName  string   `json:"ifname"`
	Problem string   `json:"problem"`
	Ports   []struct {
		HostAddr string `json:"host_addr"`
		HostPort int    `json:"host_port"`
		Port     int    `json:"port"`
		Proto    string `json:"proto"`
	} `json:"ports"`
}

// attachedAs is an attachment by its name; the zero value if there is none.
func attachedAs(t *testing.T, n *lab.Daemon, name string) attached {
	t.Helper()
	var list []attached
	if err := n.Get("/v1/attachments", &list); err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(list, func(a attached) bool { return a.Name == name }); i >= 0 {
		return list[i]
	}
	return attached{}
}

// reserved are the addresses that are reserved on a node.
func reserved(t *testing.T, n *lab.Daemon) (addrs []string) {
	t.Helper()
	var list []struct {
		Addr string `json:"addr"`
	}
	if err := n.Get("/v1/addresses", &list); err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		addrs = append(addrs, strings.TrimSuffix(a.Addr, "/24"))
	}
	return addrs
}

// clientOf is whom the server of a published port sees as its client.
func clientOf(t *testing.T, l *lab.Lab, at netip.AddrPort) string {
	t.Helper()
	resp, err := l.Outside.HTTPClient().Get("http://" + at.String() + "/cgi-bin/who")
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func TestDockerDriver_ContainersOfTwoHosts(t *testing.T) {
	l := lab.New(t, 2)
	l.Outside.HTTPServer(t, netip.AddrPortFrom(lab.OutsideAddr, 80))
	h1, h2 := l.Host(1), l.Host(2)
	store := netip.AddrPortFrom(h1.Addr, 2379)
	up1 := func() *lab.Daemon { return h1.Up("--listen-etcd", store.String()) }
	n1 := up1()
	n2 := h2.Up("--etcd-endpoints", "http://"+store.String())
	tarball := image(t, l.Dir)
	d1, d2 := startDocker(t, h1, "exec dockerd-rootless.sh"), startDocker(t, h2, "exec dockerd-rootless.sh")
	again := func(h *lab.Host) *docker { return startDocker(t, h, "exec dockerd-rootless.sh") } // to the end of the whole test
	subnet := netip.MustParsePrefix(n1.Status().Subnet)
	gateway := n1.Status().Gateway

	d1.ready()
	d1.fails("network create -d rootless-ovl ovl", "--ipam-driver rootless-ovl")
	d1.fails(createOverlay+" --subnet 172.30.0.0/16 ovl", "172.30.0.0/16", subnet.String(), "leave --subnet out")
	d1.fails(createOverlay+" --internal ovl", "--internal", "-o egress=deny")
	d1.fails(createOverlay+" --ipv6 --subnet fd00:9::/64 ovl", "--ipv6", "leave it out")
	d1.fails(createOverlay+" --gateway "+subnet.Addr().Next().Next().String()+" --subnet "+subnet.String()+" ovl", "--gateway", gateway)
	d1.fails(createOverlay+" -o colour=blue ovl", `"colour"`, "isolate")
	d2.ready()
	for _, d := range []*docker{d1, d2} {
		d.ok("import", tarball, "busybox")
	}
	d1.ok(strings.Fields(createOverlay + " --subnet " + subnet.String() + " ovl")...) // --ip needs that it is said
	d2.ok(strings.Fields(createOverlay + " ovl")...)
	for _, d := range []*docker{d1, d2} {
		if got := d.ok("network", "inspect", "-f", "{{range .IPAM.Config}}{{.Subnet}} {{.Gateway}}{{end}}", "ovl"); !strings.HasPrefix(got, "10.213.") {
			t.Errorf("%s: the network has %q", d.host.Name, got)
		}
	}
	web := func(d *docker, args ...string) {
		t.Helper()
		d.ok(append(append([]string{"run", "-d", "--stop-signal", "KILL", "--net", "ovl"}, args...), "busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")...)
	}
	web(d1, "--name", "web", "--restart", "always", "--network-alias", "front", "-p", "8080:80", "-p", "127.0.0.1:8081:80", "-p", "9000-9002:9000-9002/udp")
	web(d2, "--name", "shop", "-p", "8080:80")
	addr1, addr2 := d1.overlayAddr("web"), d2.overlayAddr("shop")
	if !subnet.Contains(netip.MustParseAddr(addr1)) {
		t.Errorf("the container has %s, which is not of the node's subnet %v", addr1, subnet)
	}

	reach := func(t *testing.T) {
		t.Helper()
		for _, c := range []struct {
			d                 *docker
			from, to          string
			own, address, who string
		}{{d1, "web", addr2, addr1, addr2, "shop"}, {d2, "shop", addr1, addr2, addr1, "web"}} {
			if got := c.d.get(c.from, c.to, "/cgi-bin/who"); got != c.own {
				t.Errorf("%s is seen as %s by %s, want its own %s", c.from, got, c.to, c.own)
			}
			c.d.finds(c.from, c.who)
			c.d.finds(c.from, c.who+".ovl.internal")
		}
		d2.finds("shop", "front")
		for _, h := range []*lab.Host{h1, h2} {
			if got := clientOf(t, l, netip.AddrPortFrom(h.Addr, 8080)); got != lab.RouterAddr.String() {
				t.Errorf("%s: port 8080: the container sees %s, want the client's %s", h.Name, got, lab.RouterAddr)
			}
		}
	}
	reach(t)
	if got := d1.get("web", addr2, "/bulk | wc -c"); got != bulkText {
		t.Errorf("%s bytes of %s", got, bulkText)
	}
	if got := d1.get("web", lab.OutsideAddr.String(), "/"); got != h1.Addr.String() {
		t.Errorf("the outside sees the container as %s", got)
	}
	a := attachedAs(t, n1, "web")
	if a.Problem != "" || a.Addr != addr1+"/24" || len(a.Ports) != 5 || a.Ports[1].HostAddr != "127.0.0.1" || a.Ports[4].Proto != "udp" || a.Ports[4].HostPort != 9002 || !slices.Equal(a.Aliases, []string{"front"}) {
		t.Errorf("attached as %+v", a)
	}
	if got, err := h1.Fetch("http://127.0.0.1:8081/cgi-bin/who"); err != nil {
		t.Errorf("a port of loopback: %q %v", got, err)
	}

	t.Run("static address and MAC", func(t *testing.T) {
		ip := subnet.Addr().As4()
		ip[3] = 77
		want := netip.AddrFrom4(ip).String()
		run := "run -d --name fixed --net ovl --ip " + want + " --mac-address 02:00:00:00:00:77 busybox httpd -f"
		d1.ok(strings.Fields(run)...)
		if got := d1.ok("exec", "fixed", "ip", "addr", "show", "eth0"); !strings.Contains(got, "inet "+want+"/24") || !strings.Contains(got, "02:00:00:00:00:77") {
			t.Errorf("the container has\n%s", got)
		}
		d1.fails("run --rm --net ovl --ip "+want+" busybox true", want, "in use")
		d1.fails("run --rm --net ovl --ip 10.99.0.1 busybox true")
		d1.finds("web", "fixed")
		d2.finds("shop", "fixed")
		d1.ok("rm", "-f", "fixed")
		lab.Eventually(t, "nothing is left behind", func() bool { return attachedAs(t, n1, "fixed").Name == "" })
		if list := reserved(t, n1); slices.Contains(list, want) {
			t.Errorf("reserved: %v", list)
		}
	})

	t.Run("connect and disconnect", func(t *testing.T) {
		d1.ok("run", "-d", "--name", "plain", "busybox", "httpd", "-f")
		for range 2 {
			d1.ok("network", "connect", "--alias", "also", "ovl", "plain")
			if !d1.pings("plain", addr2) {
				t.Error("a container of two networks does not reach the other host's")
			}
			d2.finds("shop", "also")
			d1.finds("plain", "shop")
			d1.ok("network", "disconnect", "ovl", "plain")
			lab.Eventually(t, "nothing is left behind", func() bool { return attachedAs(t, n1, "plain").Name == "" })
		}
		d1.ok("rm", "-f", "plain")
	})

	t.Run("what a network and a container ask for", func(t *testing.T) {
		d1.ok(strings.Fields(createOverlay + " -o egress=deny apart")...)
		d1.ok("run", "-d", "--name", "inner", "--net", "apart", "busybox", "httpd", "-f")
		if !d1.pings("inner", addr2) || d1.pings("inner", lab.OutsideAddr.String()) {
			t.Error("egress=deny: the overlay is not reached, or the outside is")
		}
		d1.ok("rm", "-f", "inner")
		d1.ok("network", "rm", "apart")
	})

	t.Run("a port that is taken", func(t *testing.T) {
		d1.fails("run -d --name late --net ovl -p 8080:80 busybox httpd -f", "8080")
		if got := reserved(t, n1); len(got) != 1 {
			t.Errorf("reserved %v", got)
		}
		d1.ok("rm", "-f", "late")
	})

	t.Run("renamed", func(t *testing.T) {
		d2.ok("rename", "shop", "store")
		d1.finds("web", "store")
		if d1.pings("web", "shop") {
			t.Error("still found by its old name")
		}
		d2.ok("rename", "store", "shop")
		d1.finds("web", "shop")
	})

	t.Run("a container is restarted", func(t *testing.T) {
		d1.ok("restart", "-t", "0", "web")
		addr1 = d1.overlayAddr("web")
		reach(t)
		lab.Eventually(t, "what it had is free", func() bool { return len(n1.Attachments()) == 1 })
		if got := reserved(t, n1); !slices.Equal(got, []string{addr1}) {
			t.Errorf("reserved %v, want %s", got, addr1)
		}
	})

	t.Run("dockerd is restarted", func(t *testing.T) {
		d1.stop()
		lab.Eventually(t, "its containers are off the overlay", func() bool { return len(n1.Attachments()) == 0 && len(reserved(t, n1)) == 0 })
		d1 = again(h1)
		d1.ready()
		lab.Eventually(t, "the container that is always restarted runs", func() bool {
			return attachedAs(t, n1, "web").Name != ""
		})
		addr1 = d1.overlayAddr("web")
		reach(t)
	})

	t.Run("dockerd is killed", func(t *testing.T) {
		d1.kill()
		d1 = again(h1)
		d1.ready()
		lab.Eventually(t, "the container runs again, and nothing is left of before", func() bool {
			now := d1.overlayAddr("web")
			return now != "" && attachedAs(t, n1, "web").Addr == now+"/24" && len(n1.Attachments()) == 1 && len(reserved(t, n1)) == 1
		})
		addr1 = d1.overlayAddr("web")
		reach(t)
	})

	t.Run("the daemon is killed and started again, and the other one stopped", func(t *testing.T) {
		d1.ok("run", "-d", "--name", "doomed", "--net", "ovl", "busybox", "httpd", "-f")
		lab.Eventually(t, "it has its name", func() bool { return attachedAs(t, n1, "doomed").Name != "" })
		pid, err := strconv.Atoi(d1.ok("inspect", "-f", "{{.State.Pid}}", "doomed"))
		if err != nil {
			t.Fatal(err)
		}
		n1.Kill()
		d1.ok("rename", "web", "www")
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		n1 = up1()
		d2.finds("shop", "www")
		d1.ok("rename", "www", "web")
		reach(t)
		// Docker searches for a driver that is not there for a quarter of a minute.
		n2.Stop()
		absent := make(chan lab.Result)
		go func() { absent <- d2.run("run", "--rm", "--net", "ovl", "busybox", "true") }()
		lab.Eventually(t, "what ended meanwhile is gone", func() bool {
			return attachedAs(t, n1, "doomed").Name == "" && len(n1.Attachments()) == 1 && len(reserved(t, n1)) == 1
		})
		if r := <-absent; r.Code == 0 || !strings.Contains(r.Stderr, "rootless-ovl.sock") {
			t.Errorf("without a daemon: %+v", r)
		}
	})
	d1.kill() // otherwise they would look for their driver for long
	d2.kill()
}

func TestDockerDriver_DualStack(t *testing.T) {
	l := lab.New(t, 1, lab.WithIPv6)
	h := l.Host(1)
	config := filepath.Join(l.Dir, "network.json")
	if err := os.WriteFile(config, []byte(`{"Network": "10.215.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:215::/48", "Backend": {"Type": "vxlan"}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	n := h.Up("--net-config-path", config)
	d := startDocker(t, h, "exec dockerd-rootless.sh")
	d.ready()
	d.ok("import", image(t, l.Dir), "busybox")
	d.ok(strings.Fields(createOverlay + " ovl")...)
	var addr6 [2]string
	for i, name := range []string{"one", "two"} {
		d.ok("run", "-d", "--stop-signal", "KILL", "--name", name, "--net", "ovl", "busybox", "httpd", "-f")
		addr6[i] = d.ok("inspect", "-f", "{{.NetworkSettings.Networks.ovl.GlobalIPv6Address}}", name)
		lab.Eventually(t, name+" has its name and its addresses", func() bool {
			a := attachedAs(t, n, name)
			return a.Addr6 == addr6[i]+"/64"
		})
	}
	if !d.pings("one", addr6[1]) || !d.pings("one", d.overlayAddr("two")) {
		t.Errorf("%v do not reach each other:\n%s", addr6, d.ok("exec", "one", "ip", "addr"))
	}
	if !d.pings("one", lab.RouterAddr6.String()) {
		t.Errorf("the outside is not reached by IPv6:\n%s", d.ok("exec", "one", "ip", "-6", "route"))
	}
	d.finds("one", "two")
}

// kill ends dockerd as a machine does that loses its power, but for the containers' processes.
func (d *docker) kill() {
	d.t.Helper()
	b, err := os.ReadFile(filepath.Join(d.host.XDGRuntimeDir(), "docker.pid"))
	if err != nil {
		d.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err == nil {
		err = unix.Kill(pid, unix.SIGKILL)
	}
	if err != nil {
		d.t.Fatalf("%s: dockerd: %v", d.host.Name, err)
	}
	<-d.ended
}
