// Rootless docker and the node in any order, and what is left of docker's containers when they or the host die.

package engines

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// processes are a container's first process, and containerd's beside it.
func (d *docker) processes(container string) []int {
	d.t.Helper()
	pid, err := strconv.Atoi(d.ok("inspect", "-f", "{{.State.Pid}}", container))
	if err != nil || pid == 0 {
		d.t.Fatalf("the pid of %s: %d, %v", container, pid, err)
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		d.t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), ") ")
	parent, err := strconv.Atoi(strings.Fields(after)[1])
	if err != nil {
		d.t.Fatal(err)
	}
	return []int{pid, parent}
}

func TestDockerDriver_InAnyOrder(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	d := startDocker(t, h, "exec dockerd-rootless.sh")
	d.ready()
	d.ok("import", image(t, l.Dir), "busybox")
	// Docker searches for a driver for a quarter of a minute, within which the daemon comes.
	created := make(chan lab.Result, 1)
	go func() { created <- d.run(strings.Fields(createOverlay + " ovl")...) }()
	lab.Eventually(t, "docker searches", func() bool {
		b, _ := os.ReadFile(d.log)
		return strings.Contains(string(b), "Unable to locate plugin: rootless-ovl, retrying")
	})
	n := h.Up()
	if r := <-created; r.Code != 0 {
		t.Fatalf("docker network create, before the daemon: exit code %d\n%s", r.Code, r.Stderr)
	}
	d.ok("run", "-d", "--stop-signal", "KILL", "--name", "web", "--restart", "always", "-p", "8080:80", "--net", "ovl", "busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")
	d.ok("run", "-d", "--stop-signal", "KILL", "--name", "once", "--net", "ovl", "busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www")

	// holds waits until these containers, and no other, are attached with the addresses that docker says, and no further address is reserved.
	holds := func(when string, containers ...string) {
		t.Helper()
		lab.EventuallyWithin(t, 30*time.Second, when, func() bool {
			addrs := reserved(t, n)
			for _, c := range containers {
				addr := d.overlayAddr(c)
				if addr == "" || attachedAs(t, n, c).Addr != addr+"/24" || !slices.Contains(addrs, addr) {
					return false
				}
			}
			return len(n.Attachments()) == len(containers) && len(addrs) == len(containers)
		})
	}
	serves := func(when string) {
		t.Helper()
		lab.Eventually(t, when+": the published port answers", func() bool {
			return clientOf(t, l, netip.AddrPortFrom(h.Addr, 8080)) == lab.RouterAddr.String()
		})
	}
	kill := func(pids ...int) {
		t.Helper()
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // which another's end may have ended
		}
	}
	holds("both are attached", "web", "once")
	serves("at first")

	kill(d.processes("once")[0])
	holds("the address of a killed one is free", "web")
	d.ok("start", "once")
	holds("it is attached again", "web", "once")
	d.finds("once", "web")

	before := d.processes("web")[0]
	kill(before)
	lab.Eventually(t, "docker starts a killed one again", func() bool {
		pid := d.ok("inspect", "-f", "{{.State.Pid}}", "web")
		return pid != "0" && pid != strconv.Itoa(before)
	})
	holds("with its restart policy it is attached again", "web", "once")
	serves("after kill -9")
	d.finds("once", "web")

	// The host is started again: the user's processes have gone, and what was in his runtime directory.
	lost := append(d.processes("web"), d.processes("once")...)
	n.Kill()
	d.kill()
	kill(lost...)
	entries, err := os.ReadDir(h.XDGRuntimeDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(h.XDGRuntimeDir(), e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	d = startDocker(t, h, "exec dockerd-rootless.sh") // the first of the two again
	n = h.Up()
	d.ready()
	holds("what is always restarted is there, and nothing else", "web")
	serves("after the reboot")
	d.ok("start", "once")
	holds("both are attached after the reboot", "web", "once")
	d.finds("once", "web")
	d.ok("rm", "-f", "web", "once")
	holds("nothing is left")
}
