// Commands of the host in the network of a podman container, which has no tools.

package engines

import (
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestExec_InAPodmanContainer(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	h.Up()
	p := podman(t, h)
	ok(t, h, p, "import", image(t, l.Dir), "localhost/busybox")
	t.Cleanup(func() { h.Run(p, "rm", "-f", "-t", "0", "-a") })
	ok(t, h, p, "run", "-d", "--name", "web", "--network", "none", "localhost/busybox", "httpd", "-f", "-p", "127.0.0.1:8080")
	addr := ok(t, h, h.Binary(), "attach", ok(t, h, p, "inspect", "-f", "{{.State.Pid}}", "web"), "--name", "web")
	out := ok(t, h, h.Binary(), "exec", "web", "--", "sh", "-c", "id -u; cat /etc/resolv.conf; ip -4 -o addr show eth0; ss -Htln; ip link set eth0 mtu 1400 && echo may")
	for _, want := range []string{"0\nnameserver ", addr, "127.0.0.1:8080", "\nmay"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}
