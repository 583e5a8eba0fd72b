// Networks of the driver rootless-ovl: the plugin protocol as podman and netavark speak it, in the namespaces where rootless podman has them do so;
// netavark and podman themselves, where those that are installed have plugins.

package engines

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// rootlessSpace is where rootless podman has netavark run: a user namespace with a range of uids, a network namespace of its own, and a mount
// namespace in which /run is another and containers' namespaces have their paths (libnetwork/internal/rootlessnetns of podman's libraries).
type rootlessSpace struct {
	t    *testing.T
	host *lab.Host
	pid  string // of the process that keeps it
	dir  string // of containers' namespaces
}

func newRootlessSpace(t *testing.T, h *lab.Host) *rootlessSpace {
	t.Helper()
	program(t, "newuidmap", "uidmap")
	s := &rootlessSpace{t: t, host: h, dir: filepath.Join(h.XDGRuntimeDir(), "netns")}
	cmd := h.Command("unshare", "--map-root-user", "--map-auto", "--mount", "--net", "--propagation", "slave", "sh", "-c", `
		mkdir -p "$0" && mount -t tmpfs tmpfs /run && echo $$ && exec sleep infinity`, s.dir)
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
	line, err := bufio.NewReader(out).ReadString('\n')
	limit.Stop()
	if s.pid = strings.TrimSpace(line); err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	return s
}

// argv runs a program in the space, as its root.
func (s *rootlessSpace) argv(argv ...string) []string {
	return append([]string{"nsenter", "--user", "--mount", "--net", "--target", s.pid, "--preserve-credentials", "--"}, argv...)
}

func (s *rootlessSpace) run(stdin string, argv ...string) lab.Result {
	s.t.Helper()
	full := s.argv(argv...)
	return s.host.RunWith(func(c *exec.Cmd) { c.Stdin = strings.NewReader(stdin) }, full[0], full[1:]...)
}

func (s *rootlessSpace) ok(argv ...string) string {
	s.t.Helper()
	return ok(s.t, s.host, s.argv(argv...)...)
}

// netns makes the namespace of a container, to which no process belongs yet, and returns its path, which is one here alone.
func (s *rootlessSpace) netns(name string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	s.ok("sh", "-c", `touch "$0" && unshare --net sh -c 'ip link set lo up && mount --bind /proc/self/ns/net "$0"' "$0"`, path)
	return path
}

// start starts the processes of a container, with an /etc/resolv.conf as podman writes it. It ends with the test, or by the function that is returned.
func (s *rootlessSpace) start(path string, a netavarkStatus, script string) (kill func()) {
	s.t.Helper()
	conf := ""
	for _, server := range a.Servers {
		conf += "nameserver " + server + "\n"
	}
	if len(a.Search) > 0 {
		conf += "search " + strings.Join(a.Search, " ") + "\n"
	}
	file := path + ".resolv.conf"
	if r := s.run(conf, "sh", "-c", `cat > "$0"`, file); r.Code != 0 {
		s.t.Fatal(r.Stderr)
	}
	argv := s.argv("nsenter", "--net="+path, "unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && echo && eval "$1"`, file, script)
	cmd := s.host.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.host.Start(cmd); err != nil {
		s.t.Fatal(err)
	}
	done := false
	kill = func() {
		if !done {
			done = true
			_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
			_ = cmd.Wait()
		}
	}
	s.t.Cleanup(kill)
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		s.t.Fatalf("%s: %v", s.host.Name, err)
	}
	return kill
}

// get fetches from within a container, with its resolv.conf.
func (s *rootlessSpace) get(path, host, page string) (string, bool) {
	s.t.Helper()
	argv := append([]string{"nsenter", "--net=" + path, "unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, path + ".resolv.conf"},
		fetch(host, 80, page)...)
	return fetched(s.run("", argv...))
}

// plugin writes the file by which podman and netavark find the plugin into a directory, and returns its path.
func plugin(t *testing.T, h *lab.Host, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "rootless-ovl")
	writeAsUser(t, h, path, fmt.Sprintf("#!/bin/sh\nexec '%s' --runtime-dir '%s' netavark \"$@\"\n", h.Plugin(), filepath.Join(h.XDGRuntimeDir(), "rootless-ovl")))
	ok(t, h, "chmod", "755", path)
	return path
}

// netavarkStatus is the answer of setup.
type netavarkStatus struct {
	Search     []string `json:"dns_search_domains"`
	Servers    []string `json:"dns_server_ips"`
	Interfaces map[string]struct {
		MAC     string `json:"mac_address"`
		Subnets []struct {
			Gateway string `json:"gateway"`
			Net     string `json:"ipnet"`
		} `json:"subnets"`
	} `json:"interfaces"`
}

// addr is the IPv4 address of the container.
func (a netavarkStatus) addr(t *testing.T) netip.Addr {
	t.Helper()
	for _, i := range a.Interfaces {
		for _, s := range i.Subnets {
			if p, err := netip.ParsePrefix(s.Net); err == nil && p.Addr().Is4() {
				return p.Addr()
			}
		}
	}
	t.Fatalf("no address in %+v", a)
	return netip.Addr{}
}

// input is a container and its network as netavark hands them to a plugin: the members of netavark's types, those that are absent as null.
func input(network, name, options, ports string) string {
	return fmt.Sprintf(`{"container_id":"%064x","container_name":%q,"port_mappings":%s,"network":%s,"network_options":%s}`, name, name, ports, network, options)
}

const oneInterface = `{"aliases":["0123456789ab"],"interface_name":"eth0","static_ips":null,"static_mac":null,"options":null}`

// newNetwork has the plugin create a network, as podman does before it writes it down: in its user namespace, on the host's network.
func newNetwork(t *testing.T, h *lab.Host, plugin, more string) string {
	t.Helper()
	in := `{"name":"ovl0","id":"2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9","driver":"rootless-ovl","created":"0001-01-01T00:00:00Z",` +
		`"ipv6_enabled":false,"internal":false,"dns_enabled":true,"labels":{"a":"b"},"options":{},"ipam_options":{}` + more + `}`
	r := h.RunWith(func(c *exec.Cmd) { c.Stdin = strings.NewReader(in) }, "unshare", "--map-root-user", plugin, "create")
	if r.Code != 0 {
		t.Fatalf("create: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

func TestNetavark_Protocol(t *testing.T) {
	l := lab.New(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	store := netip.AddrPortFrom(h1.Addr, 2379)
	n1 := h1.Up("--listen-etcd", store.String())
	n2 := h2.Up("--etcd-endpoints", "http://"+store.String())
	script := plugin(t, h1, filepath.Join(h1.Home(), "plugins"))
	if plugin(t, h2, filepath.Join(h2.Home(), "plugins")); t.Failed() {
		return
	}
	s1, s2 := newRootlessSpace(t, h1), newRootlessSpace(t, h2)
	scriptOf := func(s *rootlessSpace) string { return filepath.Join(s.host.Home(), "plugins", filepath.Base(script)) }
	for _, s := range []*rootlessSpace{s1, s2} {
		writeAsUser(t, s.host, filepath.Join(s.host.Home(), "www", "cgi-bin", "who"), "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'\nprintf %s \"$REMOTE_ADDR\"\n")
		ok(t, s.host, "chmod", "755", filepath.Join(s.host.Home(), "www", "cgi-bin", "who"))
	}
	serve := "exec " + busyboxPath + ` httpd -f -p 0.0.0.0:80 -h "$HOME/www"`

	// With the node's own subnet, which is compared and left out.
	network := newNetwork(t, h1, script, fmt.Sprintf(`,"subnets":[{"subnet":%q,"gateway":%q}]`, n1.Status().Subnet, n1.Status().Gateway))
	if strings.Contains(network, "subnets") || !strings.Contains(network, `"labels":{"a":"b"}`) {
		t.Errorf("the network %s", network)
	}
	setup := func(s *rootlessSpace, path, in string) netavarkStatus {
		t.Helper()
		r := s.run(in, scriptOf(s), "setup", path)
		var a netavarkStatus
		if r.Code != 0 || json.Unmarshal([]byte(r.Stdout), &a) != nil {
			t.Fatalf("%s: setup: exit code %d\n%s%s", s.host.Name, r.Code, r.Stdout, r.Stderr)
		}
		return a
	}
	teardown := func(s *rootlessSpace, path, in string) lab.Result {
		t.Helper()
		r := s.run(in, scriptOf(s), "teardown", path)
		if r.Code != 0 || r.Stdout != "" {
			t.Errorf("%s: teardown: exit code %d\n%s%s", s.host.Name, r.Code, r.Stdout, r.Stderr)
		}
		return r
	}
	refused := func(s *rootlessSpace, path, in, want string) {
		t.Helper()
		r := s.run(in, scriptOf(s), "setup", path)
		var e struct {
			Error string `json:"error"`
		}
		if r.Code != 1 || json.Unmarshal([]byte(r.Stdout), &e) != nil || !strings.Contains(e.Error, want) {
			t.Errorf("%s: setup: exit code %d, %q; want an error with %q", s.host.Name, r.Code, r.Stdout, want)
		}
	}

	subnet := netip.MustParsePrefix(n1.Status().Subnet)
	static := subnet.Masked().Addr().As4()
	static[3] = 77
	want := netip.AddrFrom4(static)
	path1, path2 := s1.netns("web"), s2.netns("client")
	in1 := input(network, "web", fmt.Sprintf(`{"aliases":["front","0123456789ab"],"interface_name":"eth0","static_ips":[%q],"static_mac":"aa:bb:cc:dd:aa:00","options":null}`, want),
		`[{"container_port":80,"host_ip":"","host_port":8080,"protocol":"tcp","range":1}]`)
	in2 := input(network, "client", oneInterface, "null")
	a1, a2 := setup(s1, path1, in1), setup(s2, path2, in2)
	if eth0 := a1.Interfaces["eth0"]; a1.addr(t) != want || eth0.MAC != "aa:bb:cc:dd:aa:00" || len(eth0.Subnets) == 0 || eth0.Subnets[0].Gateway != n1.Status().Gateway ||
		len(a1.Servers) != 1 || a1.Servers[0] != n1.Status().Gateway || len(a1.Search) != 1 {
		t.Errorf("status %+v", a1)
	}
	kill1 := s1.start(path1, a1, serve)
	s2.start(path2, a2, serve)
	reach := func(what string, from *rootlessSpace, path, host string, want netip.Addr) {
		t.Helper()
		lab.Eventually(t, what+": "+host, func() bool {
			got, ok := from.get(path, host, "/cgi-bin/who")
			return ok && got == want.String()
		})
	}
	for _, name := range []string{want.String(), "web", "web.ovl.internal", "front"} {
		reach("across", s2, path2, name, a2.addr(t))
	}
	reach("across", s1, path1, "client", a1.addr(t))
	published := "http://" + netip.AddrPortFrom(h1.Addr, 8080).String() + "/cgi-bin/who"
	if got, err := l.Outside.Fetch(published); err != nil || got != lab.RouterAddr.String() {
		t.Errorf("the published port: %q, %v; the container should see the client %v", got, err, lab.RouterAddr)
	}

	t.Run("a name that another host has", func(t *testing.T) {
		refused(s2, s2.netns("web"), input(network, "web", oneInterface, "null"), `"web" is taken`)
	})

	t.Run("the daemon restarts", func(t *testing.T) {
		n1.Stop()
		refused(s1, s1.netns("late"), input(network, "late", oneInterface, "null"), "rootless-ovl up")
		n1 = h1.Up("--listen-etcd", store.String())
		reach("after it", s2, path2, "web", a2.addr(t))
		lab.Eventually(t, "the published port", func() bool { _, err := l.Outside.Fetch(published); return err == nil })
	})

	t.Run("a policy and ports by options", func(t *testing.T) {
		path := s1.netns("closed")
		in := input(network, "closed", `{"aliases":null,"interface_name":"eth0","static_ips":null,"static_mac":null,"options":{"isolate":"true","publish":"8090:80"}}`, "null")
		s1.start(path, setup(s1, path, in), serve)
		lab.Eventually(t, "its port", func() bool {
			_, err := l.Outside.Fetch("http://" + netip.AddrPortFrom(h1.Addr, 8090).String() + "/cgi-bin/who")
			return err == nil
		})
		if got, ok := s2.get(path2, "closed", "/cgi-bin/who"); ok {
			t.Errorf("others reach it, as %s", got)
		}
		teardown(s1, path, in)
	})

	t.Run("rootless podman publishes itself", func(t *testing.T) {
		path := s1.netns("podmans")
		in := input(network, "podmans", oneInterface, `[{"container_port":80,"host_ip":"","host_port":8091,"protocol":"tcp","range":1}]`)
		r := s1.run(in, "env", "_CONTAINERS_USERNS_CONFIGURED=done", "_CONTAINERS_ROOTLESS_UID=1000", scriptOf(s1), "setup", path)
		if r.Code != 0 {
			t.Fatalf("%s%s", r.Stdout, r.Stderr)
		}
		if _, err := l.Outside.Fetch("http://" + netip.AddrPortFrom(h1.Addr, 8091).String() + "/"); err == nil {
			t.Error("the port is open before podman opens it")
		}
		teardown(s1, path, in)
	})

	t.Run("a container that was killed starts again", func(t *testing.T) {
		kill1()
		s1.ok("umount", path1) // what podman does; the teardown is lost
		path := s1.netns("web-again")
		a := setup(s1, path, in1)
		if a.addr(t) != want {
			t.Errorf("it has %v", a.addr(t))
		}
		s1.start(path, a, serve)
		reach("again", s2, path2, "web", a2.addr(t))
		teardown(s1, path, in1)
		teardown(s1, path, in1)
		if list := n1.Attachments(); len(list) != 0 {
			t.Errorf("left: %+v", list)
		}
		if got := s1.ok("nsenter", "--net="+path, "ip", "-o", "link"); strings.Contains(got, "eth0") {
			t.Errorf("left in the container:\n%s", got)
		}
	})

	t.Run("an engine without the daemon", func(t *testing.T) {
		n2.Stop()
		if r := teardown(s2, path2, in2); !strings.Contains(r.Stderr, "rootless-ovl up") {
			t.Errorf("it says %q", r.Stderr)
		}
		if got := strings.TrimSpace(s2.ok(scriptOf(s2), "info")); !strings.Contains(got, `"api_version":"1.0.0"`) {
			t.Errorf("info: %s", got)
		}
	})
}

// versionOf runs a program that prints its version.
func versionOf(t *testing.T, h *lab.Host, argv ...string) (major, minor int, text string) {
	t.Helper()
	text = ok(t, h, argv...)
	m := regexp.MustCompile(`(\d+)\.(\d+)`).FindStringSubmatch(text)
	if m == nil {
		t.Fatalf("%s: %q", strings.Join(argv, " "), text)
	}
	major, _ = strconv.Atoi(m[1])
	minor, _ = strconv.Atoi(m[2])
	return major, minor, text
}

// TestNetavark_Itself has netavark run the plugin: what it hands over, and what it takes for an answer.
func TestNetavark_Itself(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	netavark := ""
	for _, path := range []string{"/usr/libexec/podman/netavark", "/usr/lib/podman/netavark", "/usr/local/libexec/podman/netavark"} {
		if exec.Command("test", "-x", path).Run() == nil {
			netavark = path
		}
	}
	if netavark == "" {
		t.Skip("netavark is not installed")
	}
	if major, minor, text := versionOf(t, h, netavark, "--version"); major == 1 && minor < 6 {
		t.Skipf("%s has no plugins: netavark 1.6, of podman 4.6, has", text)
	}
	n := h.Up()
	script := plugin(t, h, filepath.Join(h.Home(), "plugins"))
	s := newRootlessSpace(t, h)
	network := newNetwork(t, h, script, "")
	path := s.netns("web")
	in := fmt.Sprintf(`{"container_id":"%064x","container_name":"web","networks":{"ovl0":%s},"network_info":{"ovl0":%s},"port_mappings":[{"container_port":80,`+
		`"host_ip":"","host_port":8080,"protocol":"tcp","range":1}]}`, 7, oneInterface, network)
	call := func(what string) lab.Result {
		return s.run(in, netavark, "--config", h.Home(), "--rootless=true", "--plugin-directory", filepath.Dir(script), what, path)
	}
	r := call("setup")
	var got map[string]netavarkStatus
	if r.Code != 0 || json.Unmarshal([]byte(r.Stdout), &got) != nil {
		t.Fatalf("setup: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	list := n.Attachments()
	if len(list) != 1 || list[0].Name != "web" || netip.MustParsePrefix(list[0].Addr).Addr() != got["ovl0"].addr(t) {
		t.Errorf("attachments %+v, status %+v", list, got)
	}
	if r := call("teardown"); r.Code != 0 || len(n.Attachments()) != 0 {
		t.Errorf("teardown: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	n.Stop()
	if r := call("setup"); r.Code == 0 || !strings.Contains(r.Stdout+r.Stderr, "rootless-ovl up") {
		t.Errorf("without the daemon: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

func TestNetavark_Podman(t *testing.T) {
	l := lab.New(t, 2)
	h, peer := l.Host(1), l.Host(2)
	p := podman(t, h)
	if major, minor, text := versionOf(t, h, p, "--version"); major < 4 || major == 4 && minor < 6 {
		t.Skipf("%s has no network plugins: podman 4.6 has", text)
	}
	store := netip.AddrPortFrom(h.Addr, 2379)
	n := h.Up("--listen-etcd", store.String())
	peer.Up("--etcd-endpoints", "http://"+store.String())
	ok(t, h, h.Binary(), "install", "netavark")
	ok(t, h, p, "import", image(t, l.Dir), "localhost/busybox")
	t.Cleanup(func() { h.Run(p, "rm", "-f", "-t", "0", "-a"); h.Run(p, "pod", "rm", "-f", "-t", "0", "-a") })
	serve := []string{"localhost/busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www"}
	run := func(args ...string) string {
		t.Helper()
		return ok(t, h, append(append([]string{p, "run", "-d", "--stop-signal", "KILL"}, args...), serve...)...)
	}
	refused := func(want string, args ...string) {
		t.Helper()
		if r := h.Run(p, args...); r.Code == 0 || !strings.Contains(r.Stderr, want) {
			t.Errorf("podman %s: exit code %d, %q; want %q", strings.Join(args, " "), r.Code, r.Stderr, want)
		}
	}
	addrOf := func(name string) string {
		t.Helper()
		return ok(t, h, p, "inspect", "-f", "{{.NetworkSettings.Networks.ovl0.IPAddress}}", name)
	}
	// get asks from the other host.
	get := func(name string) bool {
		t.Helper()
		_, ok := fetched(peer.CLI(append([]string{"run", "--"}, fetch(name, 80, "/cgi-bin/who")...)...))
		return ok
	}
	ok(t, h, p, "network", "create", "-d", "rootless-ovl", "--subnet", n.Status().Subnet, "ovl0")
	refused("is not known", "network", "create", "-d", "rootless-ovl", "-o", "speed=11", "ovl1")
	refused("the node has leased", "network", "create", "-d", "rootless-ovl", "--subnet", "10.99.0.0/24", "ovl1")

	static := netip.MustParsePrefix(n.Status().Subnet).Masked().Addr().As4()
	static[3] = 77
	run("--name", "web", "--network", "ovl0:ip="+netip.AddrFrom4(static).String()+",alias=front,publish=8081:80", "-p", "8080:80")
	if got := addrOf("web"); got != netip.AddrFrom4(static).String() {
		t.Errorf("web has %s", got)
	}
	for _, host := range []string{"web", "front", addrOf("web")} {
		ok(t, h, p, "run", "--rm", "--network", "ovl0", "localhost/busybox", "timeout", "10", "wget", "-q", "-O", "-", "http://"+host+"/cgi-bin/who")
		lab.Eventually(t, "across: "+host, func() bool { return get(host) })
	}
	published := func(port uint16) string {
		t.Helper()
		got, err := l.Outside.Fetch("http://" + netip.AddrPortFrom(h.Addr, port).String() + "/cgi-bin/who")
		if err != nil {
			t.Errorf("port %d: %v", port, err)
		}
		return got
	}
	published(8080) // podman's
	if got := published(8081); got != lab.RouterAddr.String() {
		t.Errorf("the container sees %q, want the client %v", got, lab.RouterAddr)
	}
	background(t, peer, `exec "$1" run --name peers -- sh -c 'echo ready; exec sleep infinity'`, peer.Binary())
	refused(`"peers" is taken`, "run", "--rm", "--name", "peers", "--network", "ovl0", "localhost/busybox", "true")

	t.Run("restarts", func(t *testing.T) {
		ok(t, h, p, "restart", "-t", "0", "web")
		lab.Eventually(t, "after a restart", func() bool { return get("web") })
		n.Stop()
		refused("rootless-ovl up", "run", "--rm", "--network", "ovl0", "localhost/busybox", "true")
		n = h.Up("--listen-etcd", store.String())
		lab.Eventually(t, "after one of the daemon", func() bool { return get("web") })
		_ = unix.Kill(mustPID(t, ok(t, h, p, "inspect", "-f", "{{.State.Pid}}", "web")), unix.SIGKILL)
		ok(t, h, p, "wait", "web")
		ok(t, h, p, "start", "web")
		lab.Eventually(t, "after kill -9", func() bool { return get("web") })
		ok(t, h, p, "network", "reload", "web")
		lab.Eventually(t, "after a reload", func() bool { return get("web") })
	})

	t.Run("pod, connect and disconnect", func(t *testing.T) {
		ok(t, h, p, "pod", "create", "--name", "shop", "--network", "ovl0")
		run("--pod", "shop")
		lab.Eventually(t, "the pod by its name", func() bool { return get("shop") })
		run("--name", "late", "--network", "ovl0")
		ok(t, h, p, "network", "disconnect", "ovl0", "late")
		if list := n.Attachments(); len(list) != 2 || get("late") {
			t.Errorf("after disconnect: %+v", list)
		}
		ok(t, h, p, "network", "connect", "--alias", "later", "ovl0", "late")
		lab.Eventually(t, "what was connected", func() bool { return get("late") && get("later") })
	})

	t.Run("internal", func(t *testing.T) {
		ok(t, h, p, "network", "create", "-d", "rootless-ovl", "--internal", "closed")
		if r := h.Run(p, "run", "--rm", "--network", "closed", "localhost/busybox", "ip", "route"); r.Code != 0 || strings.Contains(r.Stdout, "default") {
			t.Errorf("routes %s%s", r.Stdout, r.Stderr)
		}
	})

	ok(t, h, p, "pod", "rm", "-f", "-t", "0", "-a")
	ok(t, h, p, "rm", "-f", "-t", "0", "-a")
	if list := n.Attachments(); len(list) != 0 {
		t.Errorf("left: %+v", list)
	}
}

func mustPID(t *testing.T, text string) int {
	t.Helper()
	pid, err := strconv.Atoi(text)
	if err != nil || pid <= 0 {
		t.Fatalf("%q is no pid", text)
	}
	return pid
}
