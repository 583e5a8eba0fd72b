// Tests of `up --replace`: a new process takes the place of the daemon, and nothing of the overlay is lost. See death_test.go for how it is measured.

package test

import (
	"os"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// replaced has a new daemon take the place of d, which then has ended well.
func replaced(t *testing.T, d *lab.Daemon, args ...string) *lab.Daemon {
	t.Helper()
	next := d.Host.Up(append(args, "--replace")...)
	if code := d.Wait(); code != 0 {
		t.Errorf("the daemon that was replaced ended with %d:\n%s", code, d.LogText())
	}
	return next
}

func TestReplace_LosesNoPing(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	embedded := []string{"--listen-etcd", s.h1.Addr.String() + ":2379", "--network", network.String()}
	for name, replace := range map[string]func(){
		"that joins a store": func() { s.d2 = replaced(t, s.d2, "--etcd-endpoints", etcdURL(s.h1)) },
		"that has the store": func() { s.d1 = replaced(t, s.d1, embedded...) },
	} {
		t.Run(name, func(t *testing.T) {
			bytes := startStream(t, a, b)
			all := outages(t, a.Space, b.addr, bytes, replace)
			if most := all[len(all)-1]; most > 0 {
				t.Errorf("pings were unanswered for %v", most)
			}
			bytes.end(t)
		})
	}
	for _, d := range []*lab.Daemon{s.d1, s.d2} {
		if st := d.Status(); st.State != "ready" || st.Attachments != 1 {
			t.Errorf("%s: %+v", d.Host.Name, st)
		}
	}
}

func TestReplace_GoesOnWithEverything(t *testing.T) {
	t.Parallel()
	e := newEstate(t)
	before := e.d2.Status()
	old := e.d2
	e.d2 = replaced(t, old, e.args...)
	after := e.d2.Status()
	if after.Attachments != before.Attachments || after.Subnet != before.Subnet {
		t.Errorf("after %+v, before %+v", after, before)
	}
	e.works(t)
	if strings.Contains(e.d2.LogText(), "level=ERROR") || strings.Contains(e.d2.LogText(), "attachment dropped") {
		t.Errorf("log:\n%s", e.d2.LogText())
	}
	// Everything can be handed on once more, changed, and stopped.
	e.d2 = replaced(t, e.d2, e.args...)
	join(t, e.h2, "later")
	e.works(t)
	if code := e.d2.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	e.d2 = e.h2.Up(e.args...)
	e.works(t)
}

func TestReplace_ResetsEgress(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	h, outside := l.Host(1), l.Host(2)
	args := []string{"--listen-etcd", h.Addr.String() + ":2379", "--network", network.String()}
	d := h.Up(args...)
	a := join(t, h, "a")
	c := egress(t, a.Space, port(outside.Addr, 7000), outside.Space)
	replaced(t, d, args...)
	isReset(t, c, "replaced")
	egress(t, a.Space, port(outside.Addr, 7001), outside.Space).Close()
}

// What does not come about leaves the daemon that runs as it was.
func TestReplace_RefusesAndLeavesTheOldOne(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	p, err := a.StartPing(b.addr, lab.PingOptions{Interval: pingEvery})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args  []string
		words []string
	}{
		"another state directory": {[]string{"--etcd-endpoints", etcdURL(s.h1), "--state-dir", t.TempDir()}, []string{"state directory", "--state-dir"}},
		"another store":           {[]string{"--etcd-endpoints", "http://192.0.2.99:2379"}, []string{"another store", "without --replace"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := s.h2.CLI(append([]string{"up", "--replace"}, c.args...)...)
			lines := strings.Split(strings.TrimSpace(r.Stderr), "\n") // its log goes before
			r.Stderr = lines[len(lines)-1] + "\n"
			refused(t, r, c.words...)
		})
	}
	empty := t.TempDir()
	elsewhere := []string{"up", "--replace", "--etcd-endpoints", etcdURL(s.h1), "--runtime-dir", empty}
	if err := os.Chmod(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	refused(t, s.h2.CLI(elsewhere...), "open to other users", "chmod 700 "+empty)
	if err := os.Chmod(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	refused(t, s.h2.CLI(elsewhere...), "no daemon runs", "without --replace")
	if st := s.d2.Status(); st.State != "ready" || st.Attachments != 1 {
		t.Errorf("%+v", st)
	}
	if r := p.Stop(); r.Lost() > 0 {
		t.Errorf("pings: %v", r)
	}
	join(t, s.h2, "later")
}

// The daemon that runs looks at a path twice a second only.
func TestReplace_GoesOnWithoutAContainerThatHasJustEnded(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	stays := join(t, s.h2, "stays")
	args := []string{"--etcd-endpoints", etcdURL(s.h1)}
	for range 3 {
		c := s.h2.Container("ends")
		s.h2.CLIJSON(&struct{}{}, "attach", "--netns", c.NetnsPath(), "--name", "ends")
		c.Stop()
		s.d2 = replaced(t, s.d2, args...)
		lab.Eventually(t, "the one that has ended is gone", func() bool { return s.d2.Status().Attachments == 1 })
	}
	pings(t, stays.Space, stays.gateway)
}

func TestReplace_InTheBackground(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	args := []string{"--listen-etcd", h.Addr.String() + ":2379", "--network", network.String()}
	d := h.Up(args...)
	a := join(t, h, "a")
	r := h.CLI(append([]string{"up", "--replace", "--background"}, args...)...)
	if r.Code != 0 {
		t.Fatalf("exit code %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if code := d.Wait(); code != 0 {
		t.Errorf("the daemon that was replaced ended with %d", code)
	}
	pings(t, a.Space, a.gateway)
	var st lab.Status
	h.CLIJSON(&st, "status")
	if st.Attachments != 1 {
		t.Errorf("%+v", st)
	}
	if r := h.CLI("down"); r.Code != 0 {
		t.Errorf("down: exit code %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
}
