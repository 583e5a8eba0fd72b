// Containers of no engine: namespaces made by unshare and bubblewrap with several mappings of users, attached by pid and by path, and commands
// under run; each reached from another host by name, and reaching it.

package engines

import (
	"bufio"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// fetch is a command of the host that prints what a web server answers. The static busybox is no client here: it cannot load what resolves names.
func fetch(host string, port int, page string) []string {
	return []string{"timeout", "10", "bash", "-c", `exec 3<>"/dev/tcp/$0/$1" && printf 'GET %s HTTP/1.0\r\n\r\n' "$2" >&3 && cat <&3`, host, strconv.Itoa(port), page}
}

// fetched is the body of what fetch has printed.
func fetched(r lab.Result) (string, bool) {
	head, body, ok := strings.Cut(r.Stdout, "\r\n\r\n")
	return body, r.Code == 0 && ok && strings.Contains(head, " 200 ")
}

// background starts a shell script of the user's, which prints a line when it is ready, and returns that. It ends with the test, with all that it started.
func background(t *testing.T, h *lab.Host, script string, args ...string) string {
	t.Helper()
	cmd := h.Command("bash", append([]string{"-c", script, "bash"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	log := new(strings.Builder)
	cmd.Stderr = log
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(time.Minute, func() { _ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) })
	line, err := bufio.NewReader(out).ReadString('\n')
	limit.Stop()
	t.Cleanup(func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		_ = cmd.Wait()
	})
	if err != nil {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		_ = cmd.Wait()
		t.Fatalf("%s: %s: %v\n%s", h.Name, script, err, log)
	}
	return strings.TrimSpace(line)
}

func TestOther_Containers(t *testing.T) {
	program(t, "bwrap", "bubblewrap")
	program(t, "newuidmap", "uidmap")
	l := lab.New(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	store := netip.AddrPortFrom(h1.Addr, 2379)
	n1 := h1.Up("--listen-etcd", store.String())
	h2.Up("--etcd-endpoints", "http://"+store.String())
	writeAsUser(t, h1, filepath.Join(h1.Home(), "www", "index.html"), "hello")
	// What a peer serves, and what it sees of who asks.
	writeAsUser(t, h2, filepath.Join(h2.Home(), "www", "cgi-bin", "who"), "#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'\nprintf %s \"$REMOTE_ADDR\"\n")
	ok(t, h2, "chmod", "755", filepath.Join(h2.Home(), "www", "cgi-bin", "who"))
	background(t, h2, `exec "$1" run --name peer -- sh -c 'echo ready; exec `+busyboxPath+` httpd -f -p 0.0.0.0:80 -h "$HOME/www"'`, h2.Binary())

	// Each prints what attach is to be given: a pid or a path. The container serves, on $port when it begins to, as its own user may.
	serve := "exec " + busyboxPath + ` httpd -f -p 0.0.0.0:8000 -h "$HOME/www"`
	for _, c := range []struct{ name, script string }{
		{"root", `exec unshare --map-root-user --net sh -c 'echo $$; ` + serve + `'`},
		{"myself", `exec unshare --map-current-user --net sh -c 'echo $$; ` + serve + `'`},
		{"range", `exec unshare --map-root-user --map-auto --net sh -c 'echo $$; ` + serve + `'`},
		// A user of the range, as the process of a container that is not its root.
		{"subuid", `exec 5<"$HOME/www"; exec unshare --map-root-user --map-auto --net setpriv --reuid 33 --regid 33 --clear-groups sh -c 'echo $$; ` +
			`exec ` + busyboxPath + ` httpd -f -p 0.0.0.0:8000 -h /proc/self/fd/5'`},
		// The namespace belongs to the outer of two user namespaces, the process to the inner.
		{"nested", `exec unshare --map-root-user --net unshare --user sh -c 'echo $$; ` + serve + `'`},
		{"pidns", `unshare --map-root-user --net --pid --fork --mount-proc sh -c '` + serve + `' & until p=$(pgrep -P $!); do sleep 0.05; done; echo $p; wait`},
		{"procpath", `exec unshare --map-root-user --net sh -c 'echo /proc/$$/ns/net; ` + serve + `'`},
		// A file that is the namespace, in somebody's mount namespace: no process is in it when it is attached.
		{"bindpath", `touch "$HOME/ns"; exec unshare --map-root-user --mount bash -c 'unshare --net="$HOME/ns" true; ` +
			`echo /proc/$$/root$HOME/ns; exec nsenter --net="$HOME/ns" sh -c "` + strings.ReplaceAll(serve, `"`, `\"`) + `"'`},
		{"bubblewrap", `mkfifo "$HOME/child" "$HOME/go"; exec 4<>"$HOME/go"
			bwrap --unshare-user --unshare-net --unshare-pid --bind / / --dev /dev --proc /proc --info-fd 3 --block-fd 4 sh -c '` + serve + `' 3>"$HOME/child" &
			sed -n 's/.*"child-pid": \([0-9]*\).*/\1/p' "$HOME/child"; echo >&4; wait`},
		{"bubblewrap-uid", `mkfifo "$HOME/child7"; exec 3<>"$HOME/child7"
			bwrap --unshare-all --uid 4711 --gid 4711 --ro-bind / / --dev /dev --proc /proc --info-fd 3 sh -c '` + serve + `' &
			while read -r line <&3; do case $line in *child-pid*) echo "$line" | tr -cd '0-9\n'; esac; done`},
	} {
		t.Run(c.name, func(t *testing.T) {
			what := background(t, h1, c.script)
			addr := netip.MustParsePrefix(ok(t, h1, h1.Binary(), "attach", what, "--name", c.name)).Addr()
			lab.Eventually(t, "an answer across, by name", func() bool {
				got, ok := fetched(h2.CLI(append([]string{"run", "--"}, fetch(c.name, 8000, "/")...)...))
				return ok && got == "hello"
			})
			if peer, ok := fetched(h1.CLI(append([]string{"exec", c.name, "--"}, fetch("peer", 80, "/cgi-bin/who")...)...)); !ok || peer != addr.String() {
				t.Errorf("the peer sees %q, want %v", peer, addr)
			}
			ok(t, h1, h1.Binary(), "detach", c.name)
		})
	}
	t.Run("run", func(t *testing.T) {
		for _, argv := range [][]string{
			{},
			{"bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-pid"},
			{"unshare", "--map-root-user", "--mount"},
		} {
			argv = append(append([]string{"run", "--name", "job", "--"}, argv...), fetch("peer", 80, "/cgi-bin/who")...)
			r := h1.CLI(argv...)
			got, _ := fetched(r)
			if addr, err := netip.ParseAddr(got); err != nil || !netip.MustParsePrefix(n1.Status().Subnet).Contains(addr) {
				t.Errorf("%q: the peer sees %q\n%s", argv, got, r.Stderr)
			}
		}
	})
	lab.Eventually(t, "nothing stays attached", func() bool { return len(n1.Attachments()) == 0 })
}

// What cannot be attached says why.
func TestOther_Refusals(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	n := h.Up()
	hidden := background(t, h, `touch "$HOME/ns"; exec unshare --map-root-user --mount sh -c 'unshare --net="$HOME/ns" true; echo "$HOME/ns"; exec sleep infinity'`)
	for _, c := range []struct{ what, want string }{
		{hidden, "network namespace"}, // a path that means something in another mount namespace alone
		{background(t, h, `exec sh -c 'echo $$; exec sleep infinity'`), "host"},
	} {
		if r := h.Run(h.Binary(), "attach", c.what); r.Code == 0 || !strings.Contains(r.Stderr, c.want) {
			t.Errorf("attach %s: exit code %d, %q; want %q", c.what, r.Code, r.Stderr, c.want)
		}
	}
	if list := n.Attachments(); len(list) != 0 {
		t.Errorf("attached: %+v", list)
	}
}
