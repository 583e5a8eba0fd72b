// What becomes of the containers of an engine that attaches by descriptor when the node, the container, its monitor or the whole host goes.

package engines

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestReboot_KeepsWhatLivesAndFreesWhatDoesNot(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	p := cniPodman(t, h)
	ok(t, h, p, "import", image(t, l.Dir), "localhost/busybox")
	run := func(name string, more ...string) {
		t.Helper()
		ok(t, h, append(append([]string{p, "run", "-d", "--name", name, "--network", "rootless-ovl", "--cap-add", "net_raw"}, more...), "localhost/busybox", "httpd", "-f", "-p", "80", "-h", "/www")...)
	}
	addr := func(name string) string {
		t.Helper()
		return ok(t, h, p, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)
	}
	pid := func(name, which string) int {
		t.Helper()
		n, err := strconv.Atoi(ok(t, h, p, "inspect", "-f", "{{.State."+which+"}}", name))
		if err != nil || n == 0 {
			t.Fatalf("%s of %s: %d, %v", which, name, n, err)
		}
		return n
	}
	gateway := d.Status().Gateway
	reaches := func(name string) {
		t.Helper()
		ok(t, h, p, "exec", name, "ping", "-c", "1", "-W", "10", gateway)
	}
	attached := func(what string, addrs ...string) {
		t.Helper()
		lab.EventuallyWithin(t, 20*time.Second, what, func() bool {
			list := d.Attachments()
			for _, a := range addrs {
				if !strings.Contains(addrsOf(list), " "+a+"/") {
					return false
				}
			}
			return len(list) == len(addrs)
		})
	}
	run("lives")
	run("dies")
	lives, dies := addr("lives"), addr("dies")
	attached("both are attached", lives, dies)

	d.Kill()
	d = h.Up()
	attached("both are taken up again", lives, dies)
	reaches("lives")

	// podman's monitor notices, and calls DEL; started again the container is attached as another.
	_ = unix.Kill(pid("dies", "Pid"), unix.SIGKILL)
	attached("the address of a killed one is free", lives)
	ok(t, h, p, "start", "dies")
	reaches("dies")
	dies = addr("dies")
	attached("both are attached again", lives, dies)

	// Nobody calls DEL: podman has not noticed, and keeps the namespace mounted until the container is removed.
	for _, n := range []int{pid("dies", "ConmonPid"), pid("dies", "Pid")} {
		_ = unix.Kill(n, unix.SIGKILL)
	}
	ok(t, h, p, "rm", "-f", "-t", "0", "dies")
	attached("the address of a removed one is free", lives)

	// The host is started again: the user's processes have gone, and what was in his runtime directory.
	pause, err := os.ReadFile(filepath.Join(h.XDGRuntimeDir(), "libpod", "tmp", "pause.pid"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(pause)))
	if err != nil {
		t.Fatal(err)
	}
	d.Kill()
	for _, n := range []int{pid("lives", "ConmonPid"), pid("lives", "Pid"), n} {
		_ = unix.Kill(n, unix.SIGKILL)
	}
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
	attached("nothing is left")
	run("next", "--ip", lives)
	reaches("next")
	ok(t, h, p, "start", "lives")
	reaches("lives")
	attached("both are attached", lives, addr("lives"))
}

// addrsOf are the addresses of attachments, each after a blank.
func addrsOf(list []lab.Attachment) string {
	var b strings.Builder
	for _, a := range list {
		b.WriteString(" " + a.Addr)
	}
	return b.String()
}
