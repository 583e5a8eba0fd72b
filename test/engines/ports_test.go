// Published ports of rootless podman's and docker's containers, whose servers see the client.

package engines

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// seesClient publishes a port of a container that serves, and asks it from outside who asks. The connection is to be of the container's own kernel.
func seesClient(t *testing.T, l *lab.Lab, h *lab.Host, name, pid string) {
	t.Helper()
	const port = 8080
	ok(t, h, h.Binary(), "attach", "--name", name, "-p", fmt.Sprintf("%d:80", port), pid)
	url := "http://" + netip.AddrPortFrom(h.Addr, port).String() + "/cgi-bin/who"
	lab.Eventually(t, name+": an answer", func() bool { _, err := l.Outside.Fetch(url); return err == nil })
	if got, err := l.Outside.Fetch(url); err != nil || got != lab.RouterAddr.String() {
		t.Errorf("%s: the container saw %q, %v; the client is %v", name, got, err, lab.RouterAddr)
	}
	var list []struct {
		Name  string `json:"name"`
		Ports []struct {
			Counters map[string]uint64 `json:"counters"`
		} `json:"ports"`
	}
	h.CLIJSON(&list, "ps")
	for _, a := range list {
		if a.Name == name && (len(a.Ports) != 1 || a.Ports[0].Counters["spliced"] == 0 || a.Ports[0].Counters["carried"] != 0) {
			t.Errorf("%s: connections are not all the kernel's: %+v", name, a.Ports)
		}
	}
}

func TestPodman_PublishedPortsShowTheClient(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	h.Up()
	p := podman(t, h)
	ok(t, h, p, "import", image(t, l.Dir), "localhost/busybox")
	t.Cleanup(func() { h.Run(p, "rm", "-f", "-t", "0", "-a") })
	ok(t, h, p, "run", "-d", "--name", "web", "--network", "none", "localhost/busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")
	seesClient(t, l, h, "web", ok(t, h, p, "inspect", "-f", "{{.State.Pid}}", "web"))
}

func TestDocker_PublishedPortsShowTheClient(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	h.Up()
	d := startDocker(t, h, "dockerd-rootless.sh")
	d.ready()
	d.ok("import", image(t, l.Dir), "busybox")
	d.ok("run", "-d", "--stop-signal", "KILL", "--name", "web", "--network", "none", "busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")
	seesClient(t, l, h, "web", d.ok("inspect", "-f", "{{.State.Pid}}", "web"))
}
