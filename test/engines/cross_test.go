// Across hosts and engines: a podman container on one and a docker container on the other.

package engines

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestAcrossHosts_PodmanAndDockerReachEachOther(t *testing.T) {
	l := lab.New(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	store := netip.AddrPortFrom(h1.Addr, 2379)
	h1.Up("--listen-etcd", store.String())
	h2.Up("--etcd-endpoints", "http://"+store.String())
	tarball := image(t, l.Dir)

	ok(t, h2, h2.Binary(), "install", "docker")
	d := startDocker(t, h2, "dockerd-rootless.sh")

	p := podman(t, h1)
	ok(t, h1, h1.Binary(), "install", "podman")
	ok(t, h1, p, "import", tarball, "localhost/busybox")
	t.Cleanup(func() { h1.Run(p, "rm", "-f", "-t", "0", "-a") })
	ok(t, h1, p, "run", "-d", "--name", "of-podman", "--network", "none", "--annotation", "run.rootless-ovl.attach=of-podman", "--cap-add", "net_raw",
		"localhost/busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")

	d.ready()
	d.ok("import", tarball, "busybox")
	d.ok("network", "create", "-d", "rootless-ovl", "--ipam-driver", "rootless-ovl", "ovl")
	d.ok("run", "-d", "--name", "of-docker", "--network", "ovl", "--stop-signal", "KILL", "busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")

	addr := map[string]string{}
	for _, h := range []*lab.Host{h1, h2} {
		var list []lab.Attachment
		h.CLIJSON(&list, "ps")
		for _, a := range list {
			addr[a.Name], _, _ = strings.Cut(a.Addr, "/")
		}
	}
	if got := d.ok("inspect", "-f", "{{.NetworkSettings.Networks.ovl.IPAddress}}", "of-docker"); got != addr["of-docker"] {
		t.Errorf("docker says that of-docker has %s, the node %s", got, addr["of-docker"])
	}

	ends := []struct {
		name string
		in   func(argv ...string) string // run in the container; the test fails where it does
	}{
		{"of-podman", func(argv ...string) string { return ok(t, h1, append([]string{p, "exec", "of-podman"}, argv...)...) }},
		{"of-docker", func(argv ...string) string { return d.ok(append([]string{"exec", "of-docker"}, argv...)...) }},
	}
	for i, from := range ends {
		to := ends[1-i].name
		from.in("ping", "-c", "1", "-W", "10", addr[to])
		for _, by := range []string{addr[to], to + ".ovl.internal"} {
			if got := from.in("sh", "-c", "timeout 10 wget -q -O - http://"+by+"/cgi-bin/who"); got != addr[from.name] {
				t.Errorf("%s to %s: it was seen as %q, want its own address %s", from.name, by, got, addr[from.name])
			}
			if got := from.in("sh", "-c", "timeout 10 wget -q -O - http://"+by+"/bulk | wc -c"); got != bulkText {
				t.Errorf("%s got %s bytes of %s from %s", from.name, got, bulkText, by)
			}
		}
	}
}
