// The CNI plugin, called by libcni as cnitool and containerd call it, and by podman's CNI backend.

package engines

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// cniPlugin puts the plugin into a directory of the host's user and returns that.
func cniPlugin(t *testing.T, h *lab.Host) string {
	t.Helper()
	dir := filepath.Join(h.Home(), "cni-plugins")
	path := filepath.Join(dir, "rootless-ovl")
	writeAsUser(t, h, path, fmt.Sprintf("#!/bin/sh\nexec '%s' --runtime-dir '%s' cni \"$@\"\n", h.Plugin(), filepath.Join(h.XDGRuntimeDir(), "rootless-ovl")))
	ok(t, h, "chmod", "755", path)
	return dir
}

// hostExec has libcni run plugins as the host's user, by a command before them: none, or one that enters namespaces.
type hostExec struct {
	version.PluginDecoder
	t      *testing.T
	h      *lab.Host
	before []string
}

func (e *hostExec) ExecPlugin(_ context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	env := e.h.Env()
	for _, v := range environ {
		if strings.HasPrefix(v, "CNI_") {
			env = append(env, v)
		}
	}
	argv := append(slices.Clone(e.before), path)
	r := e.h.RunWith(func(c *exec.Cmd) { c.Stdin, c.Env = bytes.NewReader(stdin), env }, argv[0], argv[1:]...)
	if r.Code == 0 {
		return []byte(r.Stdout), nil
	}
	var failed types.Error
	if err := json.Unmarshal([]byte(r.Stdout), &failed); err != nil {
		return nil, fmt.Errorf("exit code %d, no error as the specification has it: %q, %s", r.Code, r.Stdout, r.Stderr)
	}
	return nil, &failed
}

func (e *hostExec) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// cniNetwork is a configuration as libcni reads it.
func cniNetwork(t *testing.T, version, members string) *libcni.NetworkConfigList {
	t.Helper()
	if members != "" {
		members = ", " + members
	}
	list, err := libcni.ConfListFromBytes([]byte(fmt.Sprintf(`{"cniVersion": %q, "name": "ovl", "plugins": [{"type": "rootless-ovl",
		"capabilities": {"portMappings": true, "ips": true, "mac": true, "dns": true, "aliases": true}%s}]}`, version, members)))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// sandbox starts a process of the host's user in namespaces of its own, by unshare, and returns its pid. The script runs in them first.
func sandbox(t *testing.T, h *lab.Host, flags, script string) int {
	t.Helper()
	cmd := h.Command("unshare", flags, "sh", "-ec", script+"\necho ready\nexec sleep infinity")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	limit := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	line := make([]byte, len("ready\n"))
	if _, err := out.Read(line); err != nil {
		t.Fatalf("unshare %s: %v, %s", flags, err, stderr.String())
	}
	return cmd.Process.Pid
}

// codeOf is the specification's number of an error.
func codeOf(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

// ownersOf are whose attachments the daemon has.
func ownersOf(h *lab.Host) []string {
	var list []struct {
		Owner string `json:"owner"`
	}
	h.CLIJSON(&list, "ps")
	var owners []string
	for _, a := range list {
		owners = append(owners, a.Owner)
	}
	slices.Sort(owners)
	return owners
}

// containerdPort is a port as containerd's library passes it.
type containerdPort struct {
	HostPort, ContainerPort int32
	Protocol, HostIP        string
}

func TestCNI_FromAddToDelAsContainerdCallsIt(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	plugins := cniPlugin(t, h)
	runtime := &hostExec{t: t, h: h}
	c := libcni.NewCNIConfigWithCacheDir([]string{plugins}, t.TempDir(), runtime)
	ctx := t.Context()
	network := cniNetwork(t, "1.1.0", `"hostAccess": [5432]`)

	if err := c.GetStatusNetworkList(ctx, network); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	if _, err := c.ValidateNetworkList(ctx, network); err != nil {
		t.Errorf("VERSION: %v", err)
	}
	pid := sandbox(t, h, "-Urn", "")
	enter := func(argv ...string) []string {
		return append([]string{"nsenter", "-t", strconv.Itoa(pid), "-U", "-n", "--preserve-credentials"}, argv...)
	}
	rt := &libcni.RuntimeConf{
		ContainerID: "c1", NetNS: fmt.Sprintf("/proc/%d/ns/net", pid), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "prod"}, {"K8S_POD_NAME", "web"}, {"K8S_POD_INFRA_CONTAINER_ID", "c1"}, {"K8S_POD_UID", "1"}},
		CapabilityArgs: map[string]any{
			"portMappings": []containerdPort{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}},
			"aliases":      []string{"front"}, "mac": "02:00:00:00:00:07",
			"dns": map[string][]string{"Searches": {"example.org"}},
		},
	}
	added, err := c.AddNetworkList(ctx, network, rt)
	if err != nil {
		t.Fatal(err)
	}
	result, err := types100.GetResult(added)
	if err != nil || len(result.Interfaces) != 1 || len(result.IPs) < 1 || len(result.Routes) < 2 {
		t.Fatalf("%v, %+v", err, result)
	}
	addr, _ := netip.AddrFromSlice(result.IPs[0].Address.IP)
	if i := result.Interfaces[0]; i.Name != "eth0" || i.Mac != "02:00:00:00:00:07" || i.Mtu != d.Status().MTU || i.Sandbox != rt.NetNS {
		t.Errorf("interface %+v", i)
	}
	if dns := result.DNS; len(dns.Nameservers) != 1 || !slices.Contains(dns.Search, "example.org") || len(dns.Search) != 2 {
		t.Errorf("dns %+v", dns)
	}
	inside := ok(t, h, enter("sh", "-c", "ip -o addr show eth0; ip route")...)
	for _, want := range []string{addr.Unmap().String(), "default via " + d.Status().Gateway} {
		if !strings.Contains(inside, want) {
			t.Errorf("%q is not in\n%s", want, inside)
		}
	}
	var list []struct {
		Name    string   `json:"name"`
		Owner   string   `json:"owner"`
		Aliases []string `json:"aliases"`
		Ports   []struct {
			HostPort int `json:"host_port"`
		} `json:"ports"`
	}
	h.CLIJSON(&list, "ps")
	if len(list) != 1 || list[0].Name != "web.prod" || list[0].Owner != "cni/ovl/c1/eth0" || len(list[0].Ports) != 1 || list[0].Ports[0].HostPort != 8080 {
		t.Errorf("attached %+v", list)
	}

	if err := c.CheckNetworkList(ctx, network, rt); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if _, err := c.AddNetworkList(ctx, network, rt); codeOf(err) != 100 {
		t.Errorf("ADD twice: %d, %v", codeOf(err), err)
	}
	second := *rt
	second.ContainerID, second.NetNS, second.CapabilityArgs = "c2", fmt.Sprintf("/proc/%d/ns/net", sandbox(t, h, "-Urn", "")), nil
	second.Args = nil
	if _, err := c.AddNetworkList(ctx, network, &second); err != nil {
		t.Fatal(err)
	}
	if err := c.GCNetworkList(ctx, network, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "c2", IfName: "eth0"}}}); err != nil {
		t.Errorf("GC: %v", err)
	}
	if got := ownersOf(h); !slices.Equal(got, []string{"cni/ovl/c2/eth0"}) {
		t.Errorf("after GC there are %v", got)
	}
	if err := c.CheckNetworkList(ctx, network, rt); err == nil {
		t.Error("CHECK finds what GC has freed")
	}
	gone := second
	gone.NetNS = ""
	for range 2 {
		if err := c.DelNetworkList(ctx, network, &gone); err != nil {
			t.Errorf("DEL: %v", err)
		}
	}
	if got := ownersOf(h); len(got) != 0 {
		t.Errorf("after DEL there are %v", got)
	}
	if got := ok(t, h, enter("ip", "-o", "link")...); strings.Contains(got, "eth0") {
		t.Errorf("after GC the container has\n%s", got)
	}

	d.Stop()
	if err := c.GetStatusNetworkList(ctx, network); codeOf(err) != 51 || !strings.Contains(err.Error(), "rootless-ovl up") {
		t.Errorf("STATUS without a daemon: %d, %v", codeOf(err), err)
	}
	if _, err := c.AddNetworkList(ctx, network, rt); codeOf(err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), "rootless-ovl up") {
		t.Errorf("ADD without a daemon: %d, %v", codeOf(err), err)
	}
	if err := c.DelNetworkList(ctx, network, rt); err != nil {
		t.Errorf("DEL without a daemon: %v", err)
	}
}

// nerdctl and other engines in RootlessKit call plugins in its namespaces, where alone the path of a container's namespace means something.
func TestCNI_InTheNamespacesOfRootlessKit(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	dir := filepath.Join(h.Home(), "netns")
	ok(t, h, "mkdir", dir)
	pid := sandbox(t, h, "-Urnm", fmt.Sprintf(`mount -t tmpfs none %[1]s
		for c in a b; do touch %[1]s/$c; unshare -n mount --bind /proc/self/ns/net %[1]s/$c; done`, dir))
	enter := []string{"nsenter", "-t", strconv.Itoa(pid), "-U", "-n", "-m", "--preserve-credentials"}
	c := libcni.NewCNIConfigWithCacheDir([]string{cniPlugin(t, h)}, t.TempDir(), &hostExec{t: t, h: h, before: enter})
	in := func(name, script string) string {
		return ok(t, h, append(slices.Clone(enter), "nsenter", "--net="+filepath.Join(dir, name), "sh", "-ec", script)...)
	}
	for i, version := range []string{"0.3.1", "0.4.0", "1.0.0"} {
		network := cniNetwork(t, version, "")
		rt := &libcni.RuntimeConf{ContainerID: "a", NetNS: filepath.Join(dir, "a"), IfName: "eth0"}
		other := &libcni.RuntimeConf{ContainerID: "b", NetNS: filepath.Join(dir, "b"), IfName: "ovl0"}
		for _, rt := range []*libcni.RuntimeConf{rt, other} {
			if _, err := c.AddNetworkList(t.Context(), network, rt); err != nil {
				t.Fatalf("%s: %v", version, err)
			}
		}
		result, err := c.GetNetworkListCachedResult(network, other)
		if err != nil {
			t.Fatal(err)
		}
		full, err := types100.GetResult(result)
		if err != nil || result.Version() != version {
			t.Fatalf("%s: %v, %+v", version, err, result)
		}
		in("a", "ping -c 1 -W 10 "+full.IPs[0].Address.IP.String())
		if version != "0.3.1" {
			if err := c.CheckNetworkList(t.Context(), network, rt); err != nil {
				t.Errorf("CHECK of %s: %v", version, err)
			}
			in("a", []string{"ip addr flush dev eth0", "ip link set eth0 down", "ip route del default"}[i])
			if err := c.CheckNetworkList(t.Context(), network, rt); codeOf(err) != 103 {
				t.Errorf("CHECK of %s where something has gone: %d, %v", version, codeOf(err), err)
			}
		}
		for _, rt := range []*libcni.RuntimeConf{rt, other} {
			if err := c.DelNetworkList(t.Context(), network, rt); err != nil {
				t.Errorf("%s: DEL: %v", version, err)
			}
		}
		if got := in("a", "ip -o link"); strings.Contains(got, "eth0") {
			t.Errorf("%s: after DEL there is\n%s", version, got)
		}
	}
	if n := d.Status().Attachments; n != 0 {
		t.Errorf("%d attachments are left", n)
	}
}

// containerdScript has containerd, in RootlessKit, run a container in the root directory $1 that says what it has, and then one that answers. The
// directories in which containerd's own client looks for CNI's files are fixed.
const containerdScript = `
rm -rf /etc/cni /opt/cni
mkdir -p /etc/cni/net.d /opt/cni/bin /run/containerd
mount -t tmpfs none /var/lib
cp ~/.local/share/rootless-ovl/cni/rootless-ovl /usr/lib/cni/loopback /opt/cni/bin/
cp ~/.config/cni/net.d/*.conflist /etc/cni/net.d/
cat >~/containerd.toml <<END
version = 2
root = "$HOME/containerd"
state = "/run/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "/run/containerd/containerd.sock"
END
containerd -c ~/containerd.toml >~/containerd.log 2>&1 &
daemon=$!
trap 'kill $daemon; wait $daemon' EXIT
n=0
until ctr version >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 200 ] || { cat ~/containerd.log; exit 1; }; sleep 0.1; done
ctr run --rm --cni --cgroup "" --cpu-shares 0 --rootfs "$1" one /bin/sh -c 'ip -4 -o addr show eth0; ip route; wget -q -O - http://web/cgi-bin/who'
`

func TestCNI_RootlessContainerd(t *testing.T) {
	for name, pkg := range map[string]string{"containerd": "containerd", "ctr": "containerd", "rootlesskit": "rootlesskit", "slirp4netns": "slirp4netns"} {
		program(t, name, pkg)
	}
	program(t, "loopback", "containernetworking-plugins", "/usr/lib/cni")
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	ok(t, h, h.Binary(), "install", "cni")
	root := filepath.Join(h.Home(), "root")
	ok(t, h, "sh", "-ec", `mkdir "$0" && tar -x -C "$0" -f "$1"`, root, image(t, l.Dir))
	writeAsUser(t, h, filepath.Join(root, "etc", "resolv.conf"), "nameserver "+d.Status().Gateway+"\nsearch ovl.internal\n")
	server := sandbox(t, h, "-Urn", fmt.Sprintf("ip link set lo up; %s httpd -p 0.0.0.0:80 -h %s/www", busyboxPath, root))
	ok(t, h, h.Binary(), "attach", "--name", "web", strconv.Itoa(server))

	r := h.RunWith(func(c *exec.Cmd) {
		c.Env = append(h.Env(), "USER=user", "CONTAINERD_ADDRESS=/run/containerd/containerd.sock")
	},
		"rootlesskit", "--state-dir="+filepath.Join(h.XDGRuntimeDir(), "rootlesskit"), "--net=slirp4netns", "--disable-host-loopback",
		"--copy-up=/etc", "--copy-up=/run", "--copy-up=/opt", "sh", "-ec", containerdScript, "sh", root)
	for _, want := range []string{" " + strings.TrimSuffix(d.Status().Gateway, "1"), "default via " + d.Status().Gateway + " dev eth0"} {
		if r.Code != 0 || !strings.Contains(r.Stdout, want) {
			t.Errorf("%q is not in, exit code %d\n%s%s", want, r.Code, r.Stdout, r.Stderr)
		}
	}
	if fields := strings.Fields(r.Stdout); len(fields) == 0 || !strings.HasPrefix(fields[len(fields)-1], strings.TrimSuffix(d.Status().Gateway, "1")) {
		t.Errorf("web, by name, saw no address of the overlay:\n%s", r.Stdout)
	}
	if got := ownersOf(h); !slices.Equal(got, []string{""}) {
		t.Errorf("besides web there is %v after the container's end", got)
	}
}

func TestCNI_InAChain(t *testing.T) {
	bridge := filepath.Dir(program(t, "bridge", "containernetworking-plugins", "/usr/lib/cni"))
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	containers, data := filepath.Join(h.Home(), "netns"), filepath.Join(h.Home(), "cni")
	ok(t, h, "mkdir", containers, data)
	engine := sandbox(t, h, "-Urnm", fmt.Sprintf("mount -t tmpfs none %[1]s; touch %[1]s/a; unshare -n mount --bind /proc/self/ns/net %[1]s/a", containers))
	enter := []string{"nsenter", "-t", strconv.Itoa(engine), "-U", "-n", "-m", "--preserve-credentials"}
	c := libcni.NewCNIConfigWithCacheDir([]string{cniPlugin(t, h), bridge}, t.TempDir(), &hostExec{t: t, h: h, before: enter})
	rt := &libcni.RuntimeConf{ContainerID: "a", NetNS: filepath.Join(containers, "a"), IfName: "eth0"}
	for _, tc := range []struct {
		name, plugins string
		want          []string // interfaces in the container, in the order of the result
		route         string   // where its default route leads
		noCheck       bool     // bridge wants every address of the result on its own interface
	}{
		{"first", `{"type": "rootless-ovl"}, {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}}`, []string{"eth0"}, "via " + d.Status().Gateway + " dev eth0", false},
		{"behind a bridge", fmt.Sprintf(`{"type": "bridge", "bridge": "br1", "isDefaultGateway": true, "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "192.0.2.0/24"}]]}},
			{"type": "rootless-ovl", "ifName": "ovl0"}`, data), []string{"eth0", "ovl0"}, "via 192.0.2.1 dev eth0", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			list, err := libcni.ConfListFromBytes([]byte(`{"cniVersion": "1.0.0", "name": "chain", "disableCheck": ` + strconv.FormatBool(tc.noCheck) + `, "plugins": [` + tc.plugins + `]}`))
			if err != nil {
				t.Fatal(err)
			}
			added, err := c.AddNetworkList(t.Context(), list, rt)
			if err != nil {
				t.Fatal(err)
			}
			result, err := types100.GetResult(added)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, i := range result.Interfaces {
				if i.Sandbox != "" {
					got = append(got, i.Name)
				}
			}
			if !slices.Equal(got, tc.want) || len(result.IPs) != len(tc.want) {
				t.Errorf("interfaces %v, addresses %v", got, result.IPs)
			}
			routes := ok(t, h, append(slices.Clone(enter), "nsenter", "--net="+rt.NetNS, "ip", "route")...)
			if !strings.Contains(routes, "default "+tc.route) || !strings.Contains(routes, "via "+d.Status().Gateway) {
				t.Errorf("routes\n%s", routes)
			}
			if err := c.CheckNetworkList(t.Context(), list, rt); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			if err := c.DelNetworkList(t.Context(), list, rt); err != nil {
				t.Errorf("DEL: %v", err)
			}
		})
	}
}

// cniNetworkName is what `install` calls the network.
const cniNetworkName = "rootless-ovl"

// cniPodman is podman with its CNI backend, and our plugin and network as `install` sets them up.
func cniPodman(t *testing.T, h *lab.Host) string {
	t.Helper()
	p := podman(t, h)
	program(t, "loopback", "containernetworking-plugins", "/usr/lib/cni")
	conf := filepath.Join(h.Home(), ".config", "containers", "containers.conf")
	writeAsUser(t, h, conf, ok(t, h, "cat", conf)+"\n[network]\nnetwork_backend = \"cni\"\n")
	ok(t, h, h.Binary(), "install", "cni")
	t.Cleanup(func() {
		h.Run(p, "rm", "-f", "-t", "0", "-a")
		h.Run(p, "system", "migrate")
	})
	return p
}

func TestCNI_PodmanOnTwoHosts(t *testing.T) {
	l := lab.New(t, 2)
	store := netip.AddrPortFrom(l.Host(1).Addr, 2379)
	first := l.Host(1).Up("--listen-etcd", store.String())
	l.Host(2).Up("--etcd-endpoints", "http://"+store.String())
	tarball := image(t, l.Dir)
	p := ""
	for i := range 2 {
		h := l.Host(i + 1)
		p = cniPodman(t, h)
		ok(t, h, p, "import", tarball, "localhost/busybox")
		ok(t, h, p, "run", "-d", "--name", fmt.Sprintf("web%d", i+1), "--network", cniNetworkName, "--network-alias", "www", "-p", "8080:80", "localhost/busybox",
			"httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")
	}
	h := l.Host(1)
	addr := ok(t, h, p, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "web1")
	if subnet := netip.MustParsePrefix(first.Status().Subnet); !subnet.Contains(netip.MustParseAddr(addr)) {
		t.Errorf("podman shows the address %s, which is outside %v", addr, subnet)
	}
	if got := ok(t, h, p, "exec", "web1", "sh", "-c", "timeout 10 wget -q -O - http://web2/bulk | wc -c"); got != bulkText {
		t.Errorf("got %s bytes of %s by name from the other host", got, bulkText)
	}
	ok(t, h, p, "exec", "web1", "timeout", "10", "wget", "-q", "-O", "/dev/null", "http://www/cgi-bin/who")
	// From outside, where podman's own forwarder publishes.
	if got, err := l.Outside.Fetch("http://" + netip.AddrPortFrom(h.Addr, 8080).String() + "/cgi-bin/who"); err != nil || got == "" {
		t.Errorf("the published port: %q, %v", got, err)
	}

	// What is killed goes: podman's monitor, before it can call DEL, and the process.
	kill := func(name string) {
		t.Helper()
		for _, which := range []string{"{{.State.ConmonPid}}", "{{.State.Pid}}"} {
			pid, err := strconv.Atoi(ok(t, h, p, "inspect", "-f", which, name))
			if err != nil {
				t.Fatal(err)
			}
			_ = unix.Kill(pid, syscall.SIGKILL)
		}
	}
	kill("web1")
	ok(t, h, p, "rm", "-f", "-t", "0", "web1")
	lab.Eventually(t, "the address of a killed container to be free", func() bool { return len(ownersOf(h)) == 0 })
	ok(t, h, p, "run", "-d", "--name", "web1", "--network", cniNetworkName, "--ip", addr, "localhost/busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")
	if got := ok(t, h, p, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "web1"); got != addr {
		t.Errorf("asked for %s, got %s", addr, got)
	}

	// A daemon that is killed leaves running containers to the next one.
	ok(t, h, p, "restart", "-t", "0", "web1")
	addr = ok(t, h, p, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "web1")
	first.Kill()
	first = h.Up("--listen-etcd", store.String())
	lab.Eventually(t, "an answer by name after the daemon was killed", func() bool {
		r := l.Host(2).Run(p, "exec", "web2", "timeout", "10", "wget", "-q", "-O", "-", "http://web1/cgi-bin/who")
		return r.Code == 0 && r.Stdout != ""
	})
	if got := h.Run(h.Binary(), "exec", "web1", "--", "ip", "-4", "-o", "addr", "show", "eth0"); !strings.Contains(got.Stdout, " "+addr+"/") {
		t.Errorf("after the daemon was killed %s has\n%s%s", addr, got.Stdout, got.Stderr)
	}

	first.Stop()
	if r := h.Run(p, "run", "--rm", "--network", cniNetworkName, "localhost/busybox", "wc"); r.Code == 0 || !strings.Contains(r.Stderr, "rootless-ovl up") {
		t.Errorf("without a daemon: exit code %d, %s", r.Code, r.Stderr)
	}
	ok(t, h, p, "rm", "-f", "-t", "0", "web1")
	// The kernel gives the numbers of namespaces out again: what has that of web1 now is none of ours.
	for i := range 4 {
		ok(t, h, p, "run", "-d", "--name", fmt.Sprintf("alone%d", i), "--network", "none", "localhost/busybox", "httpd", "-f", "-p", "0.0.0.0:80")
	}
	second := h.Up("--listen-etcd", store.String())
	if n := second.Status().Attachments; n != 0 {
		t.Errorf("%d attachments came back of a container that was removed while the daemon was away:\n%s", n, second.LogText())
	}

	// The host starts again: nothing runs, and the runtime directory is empty.
	ok(t, h, p, "run", "-d", "--name", "web3", "--network", cniNetworkName, "localhost/busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")
	kill("web3")
	second.Kill()
	ok(t, h, "sh", "-c", `rm -rf "$XDG_RUNTIME_DIR"/* 2>/dev/null; true`)
	third := h.Up("--listen-etcd", store.String())
	if n := third.Status().Attachments; n != 0 {
		t.Errorf("%d attachments outlive the host's start:\n%s", n, third.LogText())
	}
	ok(t, h, p, "start", "web3")
	lab.Eventually(t, "an answer by name after the host was started again", func() bool { // the other host's node has been without its store
		r := l.Host(2).Run(p, "exec", "web2", "timeout", "10", "wget", "-q", "-O", "-", "http://web3/cgi-bin/who")
		return r.Code == 0 && r.Stdout != ""
	})
}

// flannelPluginVar names flannel's own CNI plugin, which Debian does not have.
const flannelPluginVar = "ROOTLESS_OVL_FLANNEL_CNI"

// flannelDelegate is what flannel's CNI plugin has the bridge plugin do: its rules for subnet.env (flannel.go, flannel_linux.go of
// flannel-io/cni-plugin), of which it demands all four variables.
func flannelDelegate(t *testing.T, env, dataDir string) string {
	t.Helper()
	subnet := netip.MustParsePrefix(valueOf(env, "FLANNEL_SUBNET"))
	mtu, err := strconv.ParseUint(valueOf(env, "FLANNEL_MTU"), 10, 32)
	masq := valueOf(env, "FLANNEL_IPMASQ")
	if err != nil || masq == "" {
		t.Fatalf("subnet.env: %v, FLANNEL_IPMASQ %q", err, masq)
	}
	return fmt.Sprintf(`{"type": "bridge", "ipMasq": %t, "mtu": %d, "isGateway": true, "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": %q}]}}`,
		masq != "true", mtu, dataDir, subnet.Masked(), netip.MustParsePrefix(valueOf(env, "FLANNEL_NETWORK")))
}

func TestCNI_FlannelsPluginReadsOurSubnetFile(t *testing.T) {
	bridge := filepath.Dir(program(t, "bridge", "containernetworking-plugins", "/usr/lib/cni"))
	l := lab.New(t, 2)
	h, store := l.Host(1), netip.AddrPortFrom(l.Host(1).Addr, 2379)
	h.Up("--listen-etcd", store.String())
	l.Host(2).Up("--etcd-endpoints", "http://"+store.String())
	peer := sandbox(t, l.Host(2), "-Urn", "ip link set lo up")
	peerAddr := netip.MustParsePrefix(ok(t, l.Host(2), h.Binary(), "attach", strconv.Itoa(peer))).Addr()

	file := filepath.Join(h.XDGRuntimeDir(), "rootless-ovl", "subnet.env")
	env := ok(t, h, "cat", file)
	data, containers := filepath.Join(h.Home(), "cni"), filepath.Join(h.Home(), "netns")
	ok(t, h, "mkdir", data, containers)
	stock := os.Getenv(flannelPluginVar)
	for _, tc := range []struct{ name, plugins, plugin string }{
		{"what it has the bridge do", bridge, flannelDelegate(t, env, data)},
		{"itself", filepath.Dir(stock), fmt.Sprintf(`{"type": "flannel", "subnetFile": %q, "dataDir": %q, "ipam": {"dataDir": %[2]q}}`, file, data)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.plugins == "." {
				t.Skip(flannelPluginVar + " names no plugin of flannel's, and Debian has none")
			}
			engine := sandbox(t, h, "-Urnm", fmt.Sprintf(`mount -t tmpfs none %[1]s; touch %[1]s/a; unshare -n mount --bind /proc/self/ns/net %[1]s/a`, containers))
			enter := []string{"nsenter", "-t", strconv.Itoa(engine), "-U", "-n", "-m", "--preserve-credentials"}
			ok(t, h, h.Binary(), "attach", "--gateway", strconv.Itoa(engine))
			defer h.Run(h.Binary(), "detach", strconv.Itoa(engine))
			list, err := libcni.ConfListFromBytes([]byte(`{"cniVersion": "1.0.0", "name": "flannel", "plugins": [` + tc.plugin + `]}`))
			if err != nil {
				t.Fatal(err)
			}
			c := libcni.NewCNIConfigWithCacheDir([]string{tc.plugins, bridge}, t.TempDir(), &hostExec{t: t, h: h, before: enter})
			rt := &libcni.RuntimeConf{ContainerID: "a", NetNS: filepath.Join(containers, "a"), IfName: "eth0"}
			added, err := c.AddNetworkList(t.Context(), list, rt)
			if err != nil {
				t.Fatal(err)
			}
			result, err := types100.GetResult(added)
			if err != nil {
				t.Fatal(err)
			}
			addr := result.IPs[0].Address.IP.String()
			if subnet := netip.MustParsePrefix(valueOf(env, "FLANNEL_SUBNET")); !subnet.Contains(netip.MustParseAddr(addr)) {
				t.Errorf("%s is outside %v", addr, subnet)
			}
			ok(t, h, append(slices.Clone(enter), "nsenter", "--net="+rt.NetNS, "ping", "-c", "1", "-W", "10", peerAddr.String())...)
			ok(t, l.Host(2), "nsenter", "-t", strconv.Itoa(peer), "-U", "-n", "--preserve-credentials", "ping", "-c", "1", "-W", "10", addr)
			if err := c.DelNetworkList(t.Context(), list, rt); err != nil {
				t.Errorf("DEL: %v", err)
			}
		})
	}
}
