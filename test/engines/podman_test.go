// Rootless podman with a bridge network in the node's subnet.

package engines

import (
	"bufio"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// podman is what a user has to say for podman on a machine without systemd.
func podman(t *testing.T, h *lab.Host) string {
	t.Helper()
	for name, pkg := range map[string]string{"crun": "crun", "slirp4netns": "slirp4netns", "newuidmap": "uidmap", "iptables": "iptables"} {
		program(t, name, pkg)
	}
	// crun wants cgroups of one kind, whatever the machine has.
	if err := h.Do(func() error { return unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "") }); err != nil {
		t.Fatalf("cgroup2: %v", err)
	}
	writeAsUser(t, h, filepath.Join(h.Home(), ".config", "containers", "containers.conf"), "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"crun\"\n")
	writeAsUser(t, h, filepath.Join(h.Home(), ".config", "containers", "storage.conf"), "[storage]\ndriver = \"vfs\"\n")
	return program(t, "podman", "podman")
}

// keepNamespace starts a process that keeps podman's rootless network namespace, and returns its pid.
func keepNamespace(t *testing.T, h *lab.Host, podman string) string {
	t.Helper()
	cmd := h.Command(podman, "unshare", "--rootless-netns", "sh", "-c", "echo $$; exec sleep infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		_ = cmd.Wait()
	})
	pid, err := bufio.NewReader(out).ReadString('\n')
	limit.Stop()
	if err != nil {
		t.Fatalf("%s: podman unshare --rootless-netns: %v", h.Name, err)
	}
	return strings.TrimSpace(pid)
}

func TestPodman_WithABridgeInTheSubnetOfAVXLANNetwork(t *testing.T) {
	l := lab.New(t, 2)
	l.Outside.HTTPServer(t, netip.AddrPortFrom(lab.OutsideAddr, 80))
	store := netip.AddrPortFrom(l.Host(1).Addr, 2379)
	config := filepath.Join(l.Dir, "network.json")
	if err := os.WriteFile(config, []byte(`{"Network": "10.214.0.0/16", "Backend": {"Type": "vxlan"}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	l.Host(1).Up("--listen-etcd", store.String(), "--net-config-path", config)
	l.Host(2).Up("--etcd-endpoints", "http://"+store.String())
	tarball := image(t, l.Dir)

	var addr [2]string
	command := make([]string, 2)
	for i := range addr {
		h := l.Host(i + 1)
		p := podman(t, h)
		command[i] = p
		env := ok(t, h, "cat", filepath.Join(h.XDGRuntimeDir(), "rootless-ovl", "subnet.env"))
		subnet := netip.MustParsePrefix(valueOf(env, "FLANNEL_SUBNET"))
		ok(t, h, p, "import", tarball, "localhost/busybox")
		ok(t, h, p, "network", "create", "--subnet", subnet.Masked().String(), "--opt", "mtu="+valueOf(env, "FLANNEL_MTU"), "flannel")
		ok(t, h, h.Binary(), "attach", "--gateway", keepNamespace(t, h, p))
		ok(t, h, p, "run", "-d", "--name", "web", "--network", "flannel", "--cap-add", "net_raw", "localhost/busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")
		addr[i] = ok(t, h, p, "inspect", "-f", "{{.NetworkSettings.Networks.flannel.IPAddress}}", "web")
		if !subnet.Contains(netip.MustParseAddr(addr[i])) {
			t.Errorf("%s: a container has %s, which is outside %v", h.Name, addr[i], subnet)
		}
		t.Cleanup(func() { h.Run(p, "rm", "-f", "-t", "0", "-a") })
	}
	for i, p := range command {
		h, other := l.Host(i+1), addr[1-i]
		ok(t, h, p, "exec", "web", "ping", "-c", "1", "-W", "10", other)
		if got := ok(t, h, p, "exec", "web", "sh", "-c", "timeout 10 wget -q -O - http://"+other+"/bulk | wc -c"); got != bulkText {
			t.Errorf("%s got %s bytes of %s from %s", h.Name, got, bulkText, other)
		}
		if got := ok(t, h, p, "exec", "web", "timeout", "10", "wget", "-q", "-O", "-", "http://"+lab.OutsideAddr.String()+"/"); got != h.Addr.String() {
			t.Errorf("%s: the outside sees a container as %s", h.Name, got)
		}
	}
}
