// Rootless podman's containers on the overlay by the hook: what a user types, and what is left when something of it dies.

package engines

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// hooked is podman with the hook on a host.
type hooked struct {
	t    *testing.T
	host *lab.Host
	path string
	user string // by whose name podman finds ranges of uids
}

// hookPodman gives a host podman with an image, and the hook: for every container, or for those with an annotation.
func hookPodman(t *testing.T, h *lab.Host, tarball string, every bool) *hooked {
	t.Helper()
	p := &hooked{t: t, host: h, path: podman(t, h), user: ok(t, h, "id", "-un")}
	install := []string{h.Binary(), "install", "podman"}
	if every {
		install = append(install, "--every-container")
	}
	ok(t, h, install...)
	p.ok("import", tarball, "localhost/busybox")
	t.Cleanup(func() {
		p.run("pod", "rm", "-f", "-t", "0", "-a")
		p.run("rm", "-f", "-t", "0", "-a")
	})
	return p
}

func (p *hooked) run(args ...string) lab.Result {
	p.t.Helper()
	return p.host.RunWith(p.env, p.path, args...)
}

func (p *hooked) env(c *exec.Cmd) { c.Env = append(c.Env, "USER="+p.user) }

// ok runs podman with args, which must succeed.
func (p *hooked) ok(args ...string) string {
	p.t.Helper()
	r := p.run(args...)
	if r.Code != 0 {
		p.t.Fatalf("%s: podman %s: exit code %d\n%s%s", p.host.Name, strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return strings.TrimSuffix(r.Stdout, "\n")
}

// serve starts a container without a network of podman's that serves, with annotations: key=value, without their prefix.
func (p *hooked) serve(name string, annotations ...string) {
	p.t.Helper()
	p.ok(p.serving(name, annotations...)...)
}

func (p *hooked) serving(name string, annotations ...string) []string {
	args := []string{"run", "-d", "--name", name, "--network", "none", "--stop-signal", "KILL", "--cap-add", "net_raw"}
	for _, a := range annotations {
		args = append(args, "--annotation", "run.rootless-ovl."+a)
	}
	return append(append(args, "localhost/busybox"), httpd...)
}

// httpd serves /www on every address.
var httpd = []string{"httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www"}

// get fetches from within a container.
func (p *hooked) get(container, url string) string {
	p.t.Helper()
	return p.ok("exec", container, "/bin/timeout", "10", "/bin/wget", "-q", "-O", "-", url)
}

// pid is a container's process, or podman's own beside it (ConmonPid).
func (p *hooked) pid(container, which string) int {
	p.t.Helper()
	pid, err := strconv.Atoi(p.ok("inspect", "-f", "{{.State."+which+"}}", container))
	if err != nil || pid == 0 {
		p.t.Fatalf("%s of %s: %d, %v", which, container, pid, err)
	}
	return pid
}

// kill ends a process as the kernel does when memory is short.
func (p *hooked) kill(pid int) {
	p.t.Helper()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		p.t.Fatalf("kill -9 %d: %v", pid, err)
	}
}

// addrOf is the address of an attachment, without its length; "" where there is none of that name.
func addrOf(d *lab.Daemon, name string) string {
	for _, a := range d.Attachments() {
		if a.Name == name {
			addr, _, _ := strings.Cut(a.Addr, "/")
			return addr
		}
	}
	return ""
}

func names(d *lab.Daemon) []string {
	var list []string
	for _, a := range d.Attachments() {
		list = append(list, a.Name)
	}
	slices.Sort(list)
	return list
}

func TestPodmanHook_PutsContainersOfTwoHostsOnTheOverlay(t *testing.T) {
	l := lab.New(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	store := netip.AddrPortFrom(h1.Addr, 2379)
	d1 := h1.Up("--listen-etcd", store.String())
	d2 := h2.Up("--etcd-endpoints", "http://"+store.String())
	tarball := image(t, l.Dir)
	p1, p2 := hookPodman(t, h1, tarball, false), hookPodman(t, h2, tarball, true)

	p1.serve("web", "attach=web", "alias=front", "publish=8080:80", "ip="+otherThan(t, d1), "isolate=false", "host-access=5432")
	p2.serve("db", "attach=db", "dns=keep", "egress=deny", "ifname=ovl7", "mac=02:00:00:00:00:07")
	web, db := addrOf(d1, "web"), addrOf(d2, "db")
	if web != otherThan(t, d1) || db == "" {
		t.Fatalf("web has %q, db %q", web, db)
	}

	t.Run("names", func(t *testing.T) {
		for _, name := range []string{"db", "db.ovl.internal", db} {
			if got := p1.get("web", "http://"+name+"/cgi-bin/who"); got != web {
				t.Errorf("%s sees web as %s, want %s", name, got, web)
			}
		}
		if r := p2.run("exec", "db", "timeout", "10", "wget", "-q", "-O", "-", "http://web/cgi-bin/who"); r.Code == 0 {
			t.Error("a container that keeps its resolv.conf finds a name")
		}
		if got := p2.get("db", "http://"+web+"/cgi-bin/who"); got != db {
			t.Errorf("web sees db as %s, want %s", got, db)
		}
		if got := p2.ok("exec", "db", "ip", "link", "show", "ovl7"); !strings.Contains(got, "02:00:00:00:00:07") {
			t.Errorf("the interface: %s", got)
		}
	})

	t.Run("published port", func(t *testing.T) {
		url := "http://" + netip.AddrPortFrom(h1.Addr, 8080).String() + "/cgi-bin/who"
		if got, err := l.Outside.Fetch(url); err != nil || got != lab.RouterAddr.String() {
			t.Errorf("the container saw %q, %v; the client is %v", got, err, lab.RouterAddr)
		}
	})

	t.Run("restart", func(t *testing.T) {
		before := p1.pid("web", "Pid")
		p1.ok("restart", "-t", "0", "web")
		if p1.pid("web", "Pid") == before || addrOf(d1, "web") != web {
			t.Errorf("web has %q, had %q", addrOf(d1, "web"), web)
		}
		if got := p1.get("web", "http://db/cgi-bin/who"); got != web {
			t.Errorf("db sees web as %q", got)
		}
		p1.ok("stop", "-t", "0", "web")
		if got := names(d1); len(got) != 0 {
			t.Errorf("after podman stop: %v", got)
		}
		p1.ok("start", "web")
		p1.get("web", "http://db/cgi-bin/who")
	})

	t.Run("every container", func(t *testing.T) {
		id := p2.ok(p2.serving("plain")...)
		if got := p2.get("plain", "http://front/cgi-bin/who"); got != addrOf(d2, id[:12]) {
			t.Errorf("web sees a container without an annotation as %s; attached are %v", got, names(d2))
		}
		p2.serve("apart", "attach=false")
		p2.ok("run", "--rm", "--network", "host", "localhost/busybox", "ip", "addr")
		p2.ok("rm", "-f", "-t", "0", "plain", "apart")
		if got := names(d2); !slices.Equal(got, []string{"db"}) {
			t.Errorf("attached are %v", got)
		}
	})

	t.Run("beside podman's own network", func(t *testing.T) {
		for name, network := range map[string][]string{
			"slirp": {"--network", "slirp4netns"}, "private": {"--network", "slirp4netns", "--userns", "keep-id", "--user", "0"}, "keep": {"--network", "none", "--userns", "keep-id"},
		} {
			args := append(append([]string{"run", "--rm", "--annotation", "run.rootless-ovl.attach=" + name}, network...),
				"localhost/busybox", "timeout", "10", "wget", "-q", "-O", "-", "http://db/cgi-bin/who")
			if r := p1.run(args...); r.Code != 0 || !strings.HasPrefix(r.Stdout, strings.Join(strings.Split(web, ".")[:3], ".")) {
				t.Errorf("%v: exit code %d, db sees %q\n%s", network, r.Code, r.Stdout, r.Stderr)
			}
		}
	})

	t.Run("rm -f", func(t *testing.T) {
		p1.ok("rm", "-f", "-t", "0", "web")
		p2.ok("rm", "-f", "-t", "0", "db")
		if got := append(names(d1), names(d2)...); len(got) != 0 {
			t.Errorf("attached are %v", got)
		}
	})
}

// otherThan is an address of the node's that it would not choose first.
func otherThan(t *testing.T, d *lab.Daemon) string {
	t.Helper()
	subnet := netip.MustParsePrefix(d.Status().Subnet)
	a := subnet.Masked().Addr().As4()
	a[3] += 77
	return netip.AddrFrom4(a).String()
}

func TestPodmanHook_RefusalsSayWhatToDo(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	p := hookPodman(t, h, image(t, l.Dir), false)
	p.serve("web", "attach=web")
	refused := func(says string, args ...string) {
		t.Helper()
		r := p.run(args...)
		if r.Code == 0 || !strings.Contains(r.Stderr, says) || !strings.Contains(r.Stderr, "rootless-ovl") {
			t.Errorf("podman %v: exit code %d, want an error that says %q:\n%s", args, r.Code, says, r.Stderr)
		}
	}
	refused("is taken", p.serving("second", "attach=web")...)
	refused("no-default-route", p.serving("third", "atach=web")...)
	refused("--network none", "run", "-d", "--network", "host", "--annotation", "run.rootless-ovl.attach=x", "localhost/busybox", "ip", "addr")
	for _, runtime := range []string{"crun", "runc"} {
		refused("is not a port", append([]string{"--runtime", runtime}, p.serving(runtime, "host-access=x")...)...)
	}
	// A container that cannot start has been attached.
	if r := p.run("run", "-d", "--network", "none", "--annotation", "run.rootless-ovl.attach=broken", "localhost/busybox", "no-such-program"); r.Code == 0 {
		t.Error("no-such-program runs")
	}
	lab.Eventually(t, "its address is free", func() bool { return slices.Equal(names(d), []string{"web"}) })

	// An image that asks for itself.
	context := filepath.Join(h.Home(), "build")
	writeAsUser(t, h, filepath.Join(context, "Containerfile"), "FROM localhost/busybox\n")
	p.ok("build", "--annotation", "run.rootless-ovl.host-access=22", "-t", "localhost/greedy", context)
	refused("an image is not asked", "run", "--rm", "--network", "none", "localhost/greedy", "ip", "addr")
	p.ok("run", "--rm", "--network", "none", "--annotation", "run.rootless-ovl.attach=false", "localhost/greedy", "ip", "addr")

	p.ok("rm", "-f", "-t", "0", "-a")
	if got := names(d); len(got) != 0 {
		t.Errorf("attached are %v", got)
	}

	d.Stop()
	refused("rootless-ovl up", p.serving("late", "attach=late")...)
	d = h.Up()
	p.ok("start", "late")
	if addrOf(d, "late") == "" {
		t.Errorf("attached are %v", names(d))
	}
}

// podman passes over a hook whose path is not there. A container that is to be closed must not start open for that.
func TestPodmanHook_RefusesContainersWhenTheProgramHasMoved(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	h.Up()
	p := hookPodman(t, h, image(t, l.Dir), false)
	ok(t, h, h.Binary(), "uninstall", "podman")
	moved := filepath.Join(h.Home(), "rootless-ovl-plugin")
	ok(t, h, "cp", h.Binary(), h.Plugin(), h.Home())
	ok(t, h, filepath.Join(h.Home(), "rootless-ovl"), "install", "podman")
	p.serve("web", "attach=web")
	p.ok("rm", "-f", "-t", "0", "web")
	ok(t, h, "rm", moved)
	for _, runtime := range []string{"crun", "runc"} {
		r := p.run("--runtime", runtime, "run", "--rm", "--annotation", "run.rootless-ovl.egress=deny", "localhost/busybox", "true")
		if r.Code == 0 || !strings.Contains(r.Stderr, "rootless-ovl install podman") {
			t.Errorf("%s: exit code %d\n%s", runtime, r.Code, r.Stderr)
		}
	}
	if r := h.Run(h.Binary(), "doctor"); !strings.Contains(r.Stdout, "the hook starts "+moved+", which is not there") {
		t.Errorf("doctor: %s%s", r.Stdout, r.Stderr)
	}
}

// Newer versions of podman write resolv.conf between createRuntime and poststart. Here a hook of somebody else's does, which comes before ours.
func TestPodmanHook_WritesResolvConfAgainAtPoststart(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	p := hookPodman(t, h, image(t, l.Dir), false)
	hooks := filepath.Join(h.Home(), ".local", "share", "rootless-ovl", "hooks.d")
	file, err := os.ReadFile(filepath.Join(hooks, "rootless-ovl.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(file), "poststart") { // which is installed for newer ones alone
		file = []byte(strings.Replace(string(file), `"createRuntime",`, `"createRuntime", "poststart",`, 1))
	}
	writeAsUser(t, h, filepath.Join(hooks, "rootless-ovl.json"), string(file))
	writeAsUser(t, h, filepath.Join(hooks, "0-late.json"), `{"version": "1.0.0", "hook": {"path": "/bin/sh", "args": ["sh", "-c",
		"for f in `+h.XDGRuntimeDir()+`/containers/*/$(grep -o '[0-9a-f]\\{64\\}' | head -1)/userdata/resolv.conf; do [ ! -e $f ] || echo nameserver 192.0.2.1 >$f; done"]},
		"when": {"always": true}, "stages": ["poststart"]}`)
	p.serve("probe", "attach=probe")
	for _, runtime := range []string{"crun", "runc"} {
		for _, network := range []string{"none", "slirp4netns"} {
			name := runtime + "-" + network
			p.ok(append([]string{"--runtime", runtime, "run", "-d", "--name", name, "--network", network, "--stop-signal", "KILL", "--annotation", "run.rootless-ovl.attach=" + name,
				"localhost/busybox"}, httpd...)...)
			if got := p.get(name, "http://probe/cgi-bin/who"); got == "" || got != addrOf(d, name) {
				t.Errorf("probe sees %s as %q, attached are %v", name, got, names(d))
			}
		}
	}
	p.ok("rm", "-f", "-t", "0", "-a")
	if got := names(d); len(got) != 0 {
		t.Errorf("attached are %v", got)
	}
}

// reachedFrom has a command on another host ask a server by its names and addresses.
func reachedFrom(t *testing.T, h *lab.Host, servers ...string) {
	t.Helper()
	for _, server := range servers {
		if r := h.CLI("run", "--", busyboxPath, "timeout", "10", busyboxPath, "wget", "-q", "-O", "-", "http://"+server+"/cgi-bin/who"); r.Code != 0 {
			t.Errorf("%s: %s: exit code %d\n%s", h.Name, server, r.Code, r.Stderr)
		}
	}
}

func TestPodmanHook_Pods(t *testing.T) {
	l := lab.New(t, 2)
	h := l.Host(1)
	store := netip.AddrPortFrom(h.Addr, 2379)
	d := h.Up("--listen-etcd", store.String())
	l.Host(2).Up("--etcd-endpoints", "http://"+store.String())
	program(t, "catatonit", "catatonit", "/usr/libexec/podman", "/usr/libexec/catatonit")
	p := hookPodman(t, h, image(t, l.Dir), false)
	p.serve("probe", "attach=probe")

	t.Run("pod create", func(t *testing.T) {
		p.ok("pod", "create", "--name", "shop", "--network", "none")
		member := func(name string, args ...string) {
			t.Helper()
			p.ok(append([]string{"run", "-d", "--pod", "shop", "--name", name, "--stop-signal", "KILL", "--annotation", "run.rootless-ovl.attach=shop",
				"--annotation", "run.rootless-ovl.alias=s", "--annotation", "run.rootless-ovl.publish=8080:80", "localhost/busybox"}, args...)...)
		}
		member("front", httpd...)
		member("back", "sleep", "infinity")
		shop := addrOf(d, "shop")
		if got := names(d); !slices.Equal(got, []string{"probe", "shop"}) {
			t.Fatalf("attached are %v", got)
		}
		for _, container := range []string{"front", "back"} {
			if got := p.get(container, "http://probe/cgi-bin/who"); got != shop {
				t.Errorf("probe sees %s as %s, want the pod's %s", container, got, shop)
			}
		}
		if got := p.get("probe", "http://s/cgi-bin/who"); got != addrOf(d, "probe") {
			t.Errorf("the pod sees probe as %s", got)
		}
		reachedFrom(t, l.Host(2), "shop", shop, "s")
		p.ok("pod", "stop", "-t", "0", "shop")
		p.ok("pod", "start", "shop") // in any order
		shop = addrOf(d, "shop")
		for _, container := range []string{"front", "back"} {
			if got := p.get(container, "http://probe/cgi-bin/who"); got != shop {
				t.Errorf("after a stop of the pod probe sees %s as %s, want %s", container, got, shop)
			}
		}
		p.ok("rm", "-f", "-t", "0", "back")
		if got := p.get("front", "http://probe/cgi-bin/who"); got != shop {
			t.Errorf("after a member's end probe sees the pod as %q", got)
		}
		p.ok("pod", "restart", "shop")
		p.get("front", "http://probe/cgi-bin/who")
		p.get("probe", "http://shop/cgi-bin/who")
		p.ok("pod", "rm", "-f", "-t", "0", "shop")
		lab.Eventually(t, "the pod's address is free", func() bool { return slices.Equal(names(d), []string{"probe"}) })
	})

	t.Run("every container", func(t *testing.T) {
		ok(t, h, h.Binary(), "install", "podman", "--every-container")
		p.ok("pod", "create", "--name", "shop", "--network", "none")
		p.ok(append([]string{"run", "-d", "--pod", "shop", "--name", "front", "--stop-signal", "KILL", "--annotation", "run.rootless-ovl.attach=shop", "localhost/busybox"}, httpd...)...)
		p.ok("run", "-d", "--pod", "shop", "--name", "back", "--stop-signal", "KILL", "localhost/busybox", "sleep", "infinity")
		if got := p.get("back", "http://probe/cgi-bin/who"); got != addrOf(d, "shop") {
			t.Errorf("probe sees the pod as %s; attached are %v", got, names(d))
		}
		p.ok("pod", "rm", "-f", "-t", "0", "shop")
		if got := names(d); !slices.Equal(got, []string{"probe"}) {
			t.Errorf("attached are %v", got)
		}
		ok(t, h, h.Binary(), "install", "podman", "--every-container=false")
	})

	t.Run("kube play", func(t *testing.T) {
		file := filepath.Join(h.Home(), "pod.yaml")
		writeAsUser(t, h, file, `apiVersion: v1
kind: Pod
metadata:
  name: kube
  annotations:
    run.rootless-ovl.attach: kube
    run.rootless-ovl.publish: 8090:80
spec:
  containers:
  - name: web
    image: localhost/busybox:latest
    imagePullPolicy: Never
    command: [/bin/httpd, -f, -p, "0.0.0.0:80", -h, /www]
  - name: side
    image: localhost/busybox:latest
    imagePullPolicy: Never
    command: [/bin/sleep, infinity]
`)
		p.ok("play", "kube", "--network", "none", file)
		if got := names(d); !slices.Equal(got, []string{"kube", "probe"}) {
			t.Fatalf("attached are %v", got)
		}
		if got := p.get("probe", "http://kube/cgi-bin/who"); got != addrOf(d, "probe") {
			t.Errorf("the pod sees probe as %s", got)
		}
		reachedFrom(t, l.Host(2), "kube", addrOf(d, "kube"))
		if got := p.get("kube-side", "http://probe/cgi-bin/who"); got != addrOf(d, "kube") {
			t.Errorf("probe sees the pod as %s", got)
		}
		if _, err := l.Outside.Fetch("http://" + netip.AddrPortFrom(h.Addr, 8090).String() + "/cgi-bin/who"); err != nil {
			t.Error(err)
		}
		p.ok("pod", "kill", "kube")
		p.ok("play", "kube", "--down", file)
		lab.Eventually(t, "the pod's address is free", func() bool { return slices.Equal(names(d), []string{"probe"}) })
	})
}

// Beside the project's own network: podman-compose 1.0.3 adds it, whatever network_mode says.
func TestPodmanHook_Compose(t *testing.T) {
	l := lab.New(t, 2)
	h := l.Host(1)
	store := netip.AddrPortFrom(h.Addr, 2379)
	d := h.Up("--listen-etcd", store.String())
	l.Host(2).Up("--etcd-endpoints", "http://"+store.String())
	compose := program(t, "podman-compose", "podman-compose")
	p := hookPodman(t, h, image(t, l.Dir), false)
	dir := filepath.Join(h.Home(), "shop")
	writeAsUser(t, h, filepath.Join(dir, "compose.yaml"), `services:
  web:
    image: localhost/busybox
    command: [httpd, -f, -p, "0.0.0.0:80", -h, /www]
    annotations:
      run.rootless-ovl.attach: web
      run.rootless-ovl.publish: 8080:80
      run.rootless-ovl.snat: "true"
  client:
    image: localhost/busybox
    command: [sleep, infinity]
    annotations:
      run.rootless-ovl.attach: client
`)
	in := func(args ...string) lab.Result {
		return h.RunWith(func(c *exec.Cmd) { c.Dir = dir }, compose, args...)
	}
	r := in("up", "-d")
	if got := names(d); r.Code != 0 || !slices.Equal(got, []string{"client", "web"}) {
		t.Fatalf("podman-compose up: exit code %d, attached are %v\n%s%s", r.Code, got, r.Stdout, r.Stderr)
	}
	if got := p.get("shop_client_1", "http://web.ovl.internal/cgi-bin/who"); got != addrOf(d, "client") {
		t.Errorf("web sees client as %s", got)
	}
	reachedFrom(t, l.Host(2), "web", addrOf(d, "web"))
	if got, err := l.Outside.Fetch("http://" + netip.AddrPortFrom(h.Addr, 8080).String() + "/cgi-bin/who"); err != nil || got != d.Status().Gateway {
		t.Errorf("the container saw %q, %v; want the gateway", got, err)
	}
	if r := in("down", "-t", "0"); r.Code != 0 {
		t.Errorf("podman-compose down: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if got := names(d); len(got) != 0 {
		t.Errorf("attached are %v", got)
	}
}

func TestPodmanHook_OutlivesWhatDies(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	p := hookPodman(t, h, image(t, l.Dir), false)
	p.serve("stays", "attach=stays")
	stays := addrOf(d, "stays")
	// reach asks a container by name, and by the address that it had.
	reach := func(when string) {
		t.Helper()
		for _, host := range []string{"stays", stays} {
			if r := h.CLI("run", "--", busyboxPath, "timeout", "10", busyboxPath, "wget", "-q", "-O", "-", "http://"+host+"/cgi-bin/who"); r.Code != 0 {
				t.Errorf("%s: %s: exit code %d\n%s", when, host, r.Code, r.Stderr)
			}
		}
		if got := addrOf(d, "stays"); got != stays {
			t.Errorf("%s: the address is %q, was %q", when, got, stays)
		}
	}
	reach("at first")

	t.Run("a container is killed", func(t *testing.T) {
		p.serve("dies", "attach=dies")
		p.kill(p.pid("dies", "Pid"))
		lab.Eventually(t, "its address is free", func() bool { return addrOf(d, "dies") == "" })
		p.ok("start", "dies")
		if addrOf(d, "dies") == "" {
			t.Errorf("attached are %v", names(d))
		}
		p.ok("rm", "-f", "-t", "0", "dies")
	})

	t.Run("its conmon is killed", func(t *testing.T) {
		p.serve("orphan", "attach=orphan")
		addr, pid := addrOf(d, "orphan"), p.pid("orphan", "Pid")
		p.kill(p.pid("orphan", "ConmonPid"))
		if r := h.CLI("run", "--", busyboxPath, "timeout", "10", busyboxPath, "wget", "-q", "-O", "-", "http://orphan/cgi-bin/who"); r.Code != 0 || addrOf(d, "orphan") != addr {
			t.Errorf("exit code %d, address %q, was %q\n%s", r.Code, addrOf(d, "orphan"), addr, r.Stderr)
		}
		p.kill(pid)
		lab.Eventually(t, "its address is free", func() bool { return addrOf(d, "orphan") == "" })
		p.run("rm", "-f", "-t", "0", "orphan")
	})

	t.Run("podman is killed", func(t *testing.T) {
		args := slices.DeleteFunc(p.serving("fore", "attach=fore"), func(a string) bool { return a == "-d" })
		cmd := h.Command(p.path, args...)
		p.env(cmd)
		if err := h.Start(cmd); err != nil {
			t.Fatal(err)
		}
		lab.Eventually(t, "it is attached", func() bool { return addrOf(d, "fore") != "" })
		lab.Eventually(t, "it runs", func() bool { return p.run("exec", "fore", "ip", "addr").Code == 0 })
		addr := addrOf(d, "fore")
		p.kill(cmd.Process.Pid)
		_ = cmd.Wait()
		if r := h.CLI("run", "--", busyboxPath, "timeout", "10", busyboxPath, "wget", "-q", "-O", "-", "http://fore/cgi-bin/who"); r.Code != 0 || addrOf(d, "fore") != addr {
			t.Errorf("exit code %d, address %q, was %q\n%s", r.Code, addrOf(d, "fore"), addr, r.Stderr)
		}
		p.ok("rm", "-f", "-t", "0", "fore")
		if got := addrOf(d, "fore"); got != "" {
			t.Errorf("a removed container has %s", got)
		}
	})

	t.Run("the daemon restarts", func(t *testing.T) {
		p.serve("goes", "attach=goes")
		d.Kill()
		d = h.Up()
		reach("after a crash")
		d.Stop()
		p.ok("rm", "-f", "-t", "0", "goes") // which nobody hears
		d = h.Up()
		reach("after a restart")
		if got := names(d); !slices.Equal(got, []string{"stays"}) {
			t.Errorf("attached are %v", got)
		}
	})

	t.Run("a restart policy waits for the daemon", func(t *testing.T) {
		p.ok(append([]string{"run", "-d", "--name", "again", "--restart", "always", "--network", "none", "--annotation", "run.rootless-ovl.attach=again", "localhost/busybox"}, httpd...)...)
		d.Stop()
		p.kill(p.pid("again", "Pid"))
		d = h.Up() // within the hook's patience
		lab.Eventually(t, "the container is there again", func() bool { return addrOf(d, "again") != "" })
		p.ok("rm", "-f", "-t", "0", "again")
	})

	t.Run("the host reboots", func(t *testing.T) {
		for _, pid := range []int{p.pid("stays", "ConmonPid"), p.pid("stays", "Pid")} {
			p.kill(pid)
		}
		if b, err := os.ReadFile(filepath.Join(h.XDGRuntimeDir(), "libpod", "tmp", "pause.pid")); err == nil {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		d.Kill()
		entries, err := os.ReadDir(h.XDGRuntimeDir())
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if err := os.RemoveAll(filepath.Join(h.XDGRuntimeDir(), e.Name())); err != nil {
				t.Fatal(err)
			}
		}
		d = h.Up()
		if got := names(d); len(got) != 0 {
			t.Errorf("attached are %v", got)
		}
		p.ok("start", "stays")
		stays = addrOf(d, "stays")
		reach("after the reboot")
	})
}
