// Tests of attachments by a descriptor, as CNI plugins make them, and of a host that is started again.

package test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// attachDescriptor attaches a container by a descriptor of a process that ends with it.
func attachDescriptor(t *testing.T, d *lab.Daemon, c *lab.Container) *member {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	r := d.Host.Run("sh", "-c", fmt.Sprintf(`exec 7<%s; exec curl -s --unix-socket %s http://localhost/v1/attachments -d '{"netns_fd": 7, "name": "%s", "owner": "test/%s"}'`,
		c.NetnsPath(), d.Socket(), c.Name, c.Name))
	m := &member{Container: c}
	if err := json.Unmarshal([]byte(r.Stdout), &m.at); err != nil || m.at.Addr == "" {
		t.Fatalf("exit code %d, %v: %s%s", r.Code, err, r.Stdout, r.Stderr)
	}
	m.read(t)
	return m
}

func TestAttach_ByDescriptorOutlivesTheDaemonAndEndsWithTheContainer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), attachDescriptor(t, s.d2, s.h2.Container("b"))
	gone := attachDescriptor(t, s.d2, s.h2.Container("gone"))
	if b.at.PID != 0 || b.at.Netns != "" {
		t.Errorf("attachment %+v", b.at)
	}
	pings(t, a.Space, b.addr)
	if r := s.h2.CLI("ps"); !strings.Contains(r.Stdout, "OWNER") || !strings.Contains(r.Stdout, "test/b") || !strings.Contains(r.Stdout, "net:[") {
		t.Errorf("ps:\n%s%s", r.Stdout, r.Stderr)
	}
	if r := s.h2.CLI("exec", "b", "--", "cat", "/proc/net/fib_trie"); r.Code != 0 || !strings.Contains(r.Stdout, b.addr.String()) {
		t.Errorf("exec: exit code %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}

	s.d2.Kill()
	gone.Release() // ends while nobody looks
	s.d2 = s.h2.Up("--etcd-endpoints", etcdURL(s.h1))
	if list := s.d2.Attachments(); len(list) != 1 || list[0].Name != "b" || list[0].Addr != b.at.Addr {
		t.Errorf("after a restart: %+v", list)
	}
	waitPeers(t, 1, s.d1, s.d2)
	pings(t, a.Space, b.addr)
	pings(t, b.Space, a.addr)

	b.Release()
	lab.EventuallyWithin(t, 30*time.Second, "the end of the container is noticed", func() bool { return s.d2.Status().Attachments == 0 })
	next := join(t, s.h2, "b", "--ip", b.addr.String())
	pings(t, next.Space, a.addr)
}

// Of a host that was started again, the state directory is left.
func TestAttach_NothingIsLeftWhenTheHostWasStartedAgain(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	byPID := join(t, h, "by-pid", "--alias", "front", "-p", "18080:80")
	byFD := attachDescriptor(t, d, h.Container("by-fd"))
	byPath := &member{Container: h.Container("by-path")}
	h.CLIJSON(&byPath.at, "attach", byPath.NetnsPath(), "--name", "by-path")
	byPath.read(t)
	before := d.Status()
	d.Kill()
	for _, m := range []*member{byPID, byFD, byPath} {
		m.Release()
	}
	if err := os.RemoveAll(d.RuntimeDir); err != nil {
		t.Fatal(err)
	}

	d = upEmbedded(h)
	if st := d.Status(); st.Attachments != 0 || st.Subnet != before.Subnet {
		t.Errorf("status %+v, before %+v", st, before)
	}
	if list := d.Attachments(); len(list) != 0 {
		t.Errorf("attachments %+v", list)
	}
	for _, m := range []*member{byPID, byFD, byPath} {
		flags := []string{"--ip", m.addr.String()}
		if m == byPID {
			flags = append(flags, "--alias", "front", "-p", "18080:80")
		}
		next := join(t, h, m.Name, flags...)
		if next.addr != m.addr || next.addr == (netip.Addr{}) {
			t.Errorf("%s has %v, before %v", m.Name, next.addr, m.addr)
		}
		pings(t, next.Space, next.gateway)
	}
}

func TestRename_IsFoundAcrossNodes(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b", "--alias", "old")
	a.comesToFind(t, time.Second, "b.ovl.internal.", "NOERROR "+b.addr.String())
	if r := s.h2.CLI("rename", "b", "web", "--alias", "new"); r.Code != 0 || strings.TrimSpace(r.Stdout) != "web new" {
		t.Errorf("exit code %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	for name, want := range map[string]string{"web": "NOERROR " + b.addr.String(), "new": "NOERROR " + b.addr.String(), "b": "NXDOMAIN", "old": "NXDOMAIN"} {
		a.comesToFind(t, 5*time.Second, name+".ovl.internal.", want)
	}
	refused(t, s.h2.CLI("rename", "web", "a"), `"a" is taken`, a.addr.String())
	pings(t, a.Space, b.addr)
	if r := s.h2.CLI("detach", "web"); r.Code != 0 {
		t.Errorf("detach: %s", r.Stderr)
	}
	a.comesToFind(t, 5*time.Second, "web.ovl.internal.", "NXDOMAIN")
}
