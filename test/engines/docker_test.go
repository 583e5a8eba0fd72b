// Rootless docker as a user of flannel has it: its bridge in the node's subnet.

package engines

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// docker is a rootless dockerd on a host.
type docker struct {
	t     *testing.T
	host  *lab.Host
	cmd   *exec.Cmd
	ended chan struct{}
	log   string
}

// startDocker runs a script of the user's, which has dockerd-rootless.sh on its path and ends with it.
func startDocker(t *testing.T, h *lab.Host, script string) *docker {
	t.Helper()
	contrib := filepath.Dir(program(t, "dockerd-rootless.sh", "docker.io", "/usr/share/docker.io/contrib"))
	for name, pkg := range map[string]string{"docker": "docker.io", "rootlesskit": "rootlesskit", "slirp4netns": "slirp4netns", "newuidmap": "uidmap", "iptables": "iptables"} {
		program(t, name, pkg)
	}
	config := filepath.Join(h.Home(), ".config", "docker")
	writeAsUser(t, h, filepath.Join(config, "daemon.json"), `{"storage-driver": "vfs"}`) // works on every file system

	d := &docker{t: t, host: h, ended: make(chan struct{}), log: h.LogPath("dockerd")}
	log, err := os.Create(d.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d.cmd = h.Command("bash", "-c", script)
	d.cmd.Env = append(d.cmd.Env, "PATH="+contrib+":/usr/bin:/usr/sbin:/bin:/sbin", "DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS=--state-dir="+d.stateDir())
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := h.Start(d.cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.ended)
		_ = d.cmd.Wait()
	}()
	t.Cleanup(d.stop)
	return d
}

func writeAsUser(t *testing.T, h *lab.Host, path, text string) {
	t.Helper()
	r := h.RunWith(func(c *exec.Cmd) { c.Stdin = strings.NewReader(text) }, "sh", "-c", `mkdir -p "$(dirname "$0")" && cat > "$0"`, path)
	if r.Code != 0 {
		t.Fatalf("%s: %s", path, r.Stderr)
	}
}

// stop ends dockerd with its containers.
func (d *docker) stop() {
	select {
	case <-d.ended:
		return
	default:
	}
	if pid, err := d.childPID(); err == nil { // of rootlesskit, whose end ends it too
		_ = unix.Kill(pid, unix.SIGTERM)
	}
	select {
	case <-d.ended:
	case <-time.After(20 * time.Second):
		_ = unix.Kill(-d.cmd.Process.Pid, unix.SIGKILL)
		<-d.ended
	}
}

func (d *docker) stateDir() string { return filepath.Join(d.host.XDGRuntimeDir(), "dockerd-rootless") }

func (d *docker) childPID() (int, error) {
	b, err := os.ReadFile(filepath.Join(d.stateDir(), "child_pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// started waits for something of dockerd's start.
func (d *docker) started(what string, is func() bool) {
	d.t.Helper()
	lab.EventuallyWithin(d.t, time.Minute, d.host.Name+": "+what, func() bool {
		select {
		case <-d.ended:
			b, _ := os.ReadFile(d.log)
			d.t.Fatalf("%s: dockerd has ended:\n%s", d.host.Name, b)
		default:
		}
		return is()
	})
}

// hasNamespace waits for the namespace that can be attached.
func (d *docker) hasNamespace() {
	d.t.Helper()
	d.started("a child_pid", func() bool { _, err := d.childPID(); return err == nil })
}

// ready waits until dockerd answers.
func (d *docker) ready() {
	d.t.Helper()
	d.started("an answer of dockerd", func() bool { return d.run("version").Code == 0 })
}

func (d *docker) run(args ...string) lab.Result {
	d.t.Helper()
	client := program(d.t, "docker", "docker.io")
	return d.host.Run(client, append([]string{"--host", "unix://" + filepath.Join(d.host.XDGRuntimeDir(), "docker.sock")}, args...)...)
}

// ok runs docker with args, which must succeed.
func (d *docker) ok(args ...string) string {
	d.t.Helper()
	r := d.run(args...)
	if r.Code != 0 {
		d.t.Fatalf("%s: docker %s: exit code %d\n%s%s", d.host.Name, strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// attach is what a user types.
func (d *docker) attach() {
	d.t.Helper()
	ok(d.t, d.host, "bash", "-c", d.host.Binary()+` attach --gateway $(cat $XDG_RUNTIME_DIR/dockerd-rootless/child_pid)`)
}

// iptables runs it in dockerd's namespace, as the user can.
func (d *docker) iptables(args ...string) string {
	d.t.Helper()
	pid, err := d.childPID()
	if err != nil {
		d.t.Fatal(err)
	}
	return ok(d.t, d.host, append([]string{"nsenter", "--user", "--preserve-credentials", "--mount", "--net", "--target", strconv.Itoa(pid),
		program(d.t, "iptables", "iptables")}, args...)...)
}

// serve starts a container with a web server, and returns its address.
func (d *docker) serve(args ...string) string {
	d.t.Helper()
	id := d.ok(append(append([]string{"run", "-d", "--stop-signal", "KILL"}, args...), "busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")...)
	return d.ok("inspect", "-f", "{{.NetworkSettings.IPAddress}}", id)
}

// get fetches from within a container that serves.
func (d *docker) get(container, from, path string) string {
	d.t.Helper()
	return d.ok("exec", container, "sh", "-c", fmt.Sprintf("timeout 10 wget -q -O - http://%s%s", from, path))
}

func TestDocker_TheFlannelWay(t *testing.T) {
	l := lab.New(t, 2)
	l.Outside.HTTPServer(t, netip.AddrPortFrom(lab.OutsideAddr, 80))
	h1, h2 := l.Host(1), l.Host(2)
	store := netip.AddrPortFrom(h1.Addr, 2379)
	n1 := h1.Up("--listen-etcd", store.String())
	h2.Up("--etcd-endpoints", "http://"+store.String())
	tarball := image(t, l.Dir)

	// Word for word, but for where the file is; and with flannel's script for the options.
	d1 := startDocker(t, h1, `source $XDG_RUNTIME_DIR/rootless-ovl/subnet.env; dockerd-rootless.sh --bip=$FLANNEL_SUBNET --mtu=$FLANNEL_MTU`)
	d2 := startDocker(t, h2, `eval "$(`+h2.Binary()+` docker-opts -c)" && dockerd-rootless.sh $DOCKER_OPTS`)
	d2.hasNamespace()
	d2.attach() // before dockerd has set up anything
	d1.ready()
	d1.attach()
	d2.ready()

	var addr, subnet [2]string
	for i, d := range []*docker{d1, d2} {
		d.ok("import", tarball, "busybox")
		addr[i] = d.serve("--name", "web")
		env := ok(t, d.host, "cat", filepath.Join(d.host.XDGRuntimeDir(), "rootless-ovl", "subnet.env"))
		subnet[i] = valueOf(env, "FLANNEL_SUBNET")
		if got := d.ok("run", "--rm", "--network", "host", "busybox", "ip", "addr", "show", "docker0"); !strings.Contains(got, "inet "+subnet[i]+" ") {
			t.Errorf("%s: docker0 does not have FLANNEL_SUBNET %s:\n%s", d.host.Name, subnet[i], got)
		}
		if got := d.ok("exec", "web", "ip", "link", "show", "eth0"); !strings.Contains(got, " mtu "+valueOf(env, "FLANNEL_MTU")+" ") {
			t.Errorf("%s: a container does not have FLANNEL_MTU:\n%s%s", d.host.Name, env, got)
		}
		if !netip.MustParsePrefix(subnet[i]).Contains(netip.MustParseAddr(addr[i])) {
			t.Errorf("%s: a container has %s, which is outside %s", d.host.Name, addr[i], subnet[i])
		}
	}
	reach := func() {
		t.Helper()
		for i, d := range []*docker{d1, d2} {
			other := addr[1-i]
			d.ok("exec", "web", "ping", "-c", "1", "-W", "10", other)
			if got := d.ok("exec", "web", "sh", "-c", "timeout 10 wget -q -O - http://"+other+"/bulk | wc -c"); got != bulkText {
				t.Errorf("%s got %s bytes of %s from %s", d.host.Name, got, bulkText, other)
			}
		}
	}
	reach()
	// The namespace has the address that is asked and answers.
	for _, d := range []*docker{d1, d2} {
		lab.Eventually(t, "path MTU probes of "+d.host.Name+" are answered", func() bool {
			var s lab.Status
			d.host.CLIJSON(&s, "status")
			return s.Counters["path_mtu"]["probes_answered"] > 0
		})
	}

	// dockerd masquerades on host 1, and shall not on host 2.
	tap := netip.MustParsePrefix(subnet[0]).Masked().Addr().String()
	if got := d1.get("web", addr[1], "/cgi-bin/who"); got != tap {
		t.Errorf("host 2 sees a container of host 1 as %s, want %s: dockerd masquerades", got, tap)
	}
	if got := d2.get("web", addr[0], "/cgi-bin/who"); got != addr[1] {
		t.Errorf("host 1 sees a container of host 2 as %s, want its own address %s", got, addr[1])
	}
	for _, d := range []*docker{d1, d2} {
		if got := d.get("web", lab.OutsideAddr.String(), "/"); got != d.host.Addr.String() {
			t.Errorf("%s: the outside sees a container as %s", d.host.Name, got)
		}
	}

	t.Run("published ports", func(t *testing.T) {
		for _, d := range []*docker{d1, d2} {
			d.serve("--name", "published", "-p", "8081:80")
			got, err := l.Outside.HTTPClient().Get("http://" + netip.AddrPortFrom(d.host.Addr, 8081).String() + "/bulk")
			if err != nil {
				t.Errorf("%s: %v", d.host.Name, err)
				continue
			}
			if got.ContentLength != bulk {
				t.Errorf("%s: %s, %d bytes", d.host.Name, got.Status, got.ContentLength)
			}
			got.Body.Close()
		}
	})

	t.Run("the daemon restarts", func(t *testing.T) {
		n1.Stop()
		n1 = h1.Up("--listen-etcd", store.String())
		if a := n1.Attachments(); len(a) != 1 || a[0].IfName != "rovl0" {
			t.Fatalf("attachments %+v", a)
		}
		reach()
	})

	t.Run("the user's rules have the last word", func(t *testing.T) {
		theirs := []string{"DOCKER-USER", "-i", "rovl0", "-s", netip.MustParsePrefix(subnet[1]).Masked().String(), "-j", "DROP"}
		dropped := func(when string) {
			t.Helper()
			if r := d2.run("exec", "web", "ping", "-c", "1", "-W", "1", addr[0]); r.Code == 0 {
				t.Errorf("%s: what the user drops arrives\n%s", when, d1.iptables("-S"))
			}
		}
		d1.iptables(append([]string{"-I"}, theirs...)...)
		dropped("after attach")
		n1.Stop()
		n1 = h1.Up("--listen-etcd", store.String())
		dropped("after a restart")
		ok(t, h1, h1.Binary(), "detach", n1.Attachments()[0].Name)
		d1.attach()
		dropped("before attach")
		d1.iptables(append([]string{"-D"}, theirs...)...)
		reach()
	})

	t.Run("without DOCKER-USER", func(t *testing.T) {
		d1.iptables("-D", "FORWARD", "-j", "DOCKER-USER")
		reach()
		d1.iptables("-I", "FORWARD", "-j", "DOCKER-USER")
	})

	t.Run("detach and attach", func(t *testing.T) {
		ok(t, h1, h1.Binary(), "detach", n1.Attachments()[0].Name)
		if got := d1.ok("run", "--rm", "--network", "host", "busybox", "ip", "addr"); strings.Contains(got, "rovl0") {
			t.Errorf("left behind:\n%s", got)
		}
		if r := d2.run("exec", "web", "ping", "-c", "1", "-W", "1", addr[0]); r.Code == 0 {
			t.Error("a container of a detached host answers")
		}
		d1.attach()
		reach()
	})

	t.Run("docker ends", func(t *testing.T) {
		d1.stop()
		lab.Eventually(t, "no attachment", func() bool { return len(n1.Attachments()) == 0 })
	})
}

// valueOf is the value of a variable in the text of subnet.env.
func valueOf(env, name string) string {
	for line := range strings.Lines(env) {
		if value, found := strings.CutPrefix(strings.TrimSpace(line), name+"="); found {
			return value
		}
	}
	return ""
}
