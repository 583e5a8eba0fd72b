// Tests of names: what containers find at the gateway's resolver, from attach to the death of a node.

package test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// finds is what the container's gateway says of a name: the response code, then the data of the records, sorted.
func (m *member) finds(t *testing.T, name string, kind uint16) string {
	t.Helper()
	answer, err := m.Resolve("udp4", port(m.gateway, 53), name, kind)
	if err != nil {
		return err.Error()
	}
	var data []string
	for _, rr := range answer.Answer {
		data = append(data, strings.Fields(rr.String())[4])
	}
	slices.Sort(data)
	return strings.TrimSpace(dns.RcodeToString[answer.Rcode] + " " + strings.Join(data, " "))
}

// comesToFind waits until a container finds an IPv4 address, and fails if that is later than limit after now.
func (m *member) comesToFind(t *testing.T, limit time.Duration, name, want string) {
	t.Helper()
	lab.EventuallyWithin(t, limit, fmt.Sprintf("%s finds %s: %s", m.Name, name, want), func() bool { return m.finds(t, name, dns.TypeA) == want })
}

func TestNames_AreFoundAcrossNodes(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b", "--alias", "service", "--alias", "only-b")
	const soon, gone = time.Second, 2 * time.Second
	a.comesToFind(t, soon, "b.ovl.internal.", "NOERROR "+b.addr.String())
	b.comesToFind(t, soon, "a.ovl.internal.", "NOERROR "+a.addr.String())
	c := join(t, s.h1, "c", "--alias", "service")
	b.comesToFind(t, soon, "service.ovl.internal.", "NOERROR "+strings.Join(sorted(b.addr, c.addr), " "))
	arpa, err := dns.ReverseAddr(b.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range []struct {
		name string
		kind uint16
		want string
	}{
		{"A.Ovl.Internal.", dns.TypeA, "NOERROR " + a.addr.String()},
		{"only-b.ovl.internal.", dns.TypeA, "NOERROR " + b.addr.String()},
		{"b.", dns.TypeA, "NOERROR " + b.addr.String()},
		{"b.ovl.internal.", dns.TypeAAAA, "NOERROR"},
		{"nobody.ovl.internal.", dns.TypeA, "NXDOMAIN"},
		{arpa, dns.TypePTR, "NOERROR b.ovl.internal."},
		{"host.ovl.internal.", dns.TypeA, "NOERROR " + a.gateway.String()},
		{"gateway.ovl.internal.", dns.TypeA, "NOERROR " + a.gateway.String()},
	} {
		if got := a.finds(t, q.name, q.kind); got != q.want {
			t.Errorf("a finds %s %s: %s, want %s", q.name, dns.TypeToString[q.kind], got, q.want)
		}
	}
	t.Run("an alias leads to each in turn", func(t *testing.T) {
		first := map[string]bool{}
		for range 6 {
			answer, err := a.Resolve("tcp4", port(a.gateway, 53), "service.ovl.internal.", dns.TypeA)
			if err != nil || len(answer.Answer) != 2 {
				t.Fatalf("%v, %v", answer, err)
			}
			first[answer.Answer[0].(*dns.A).A.String()] = true
		}
		if len(first) != 2 {
			t.Errorf("only %v come first", first)
		}
	})
	t.Run("a name that is taken is refused", func(t *testing.T) {
		d := s.h1.Container("d")
		for _, flags := range [][]string{{"--name", "B"}, {"--name", "d", "--alias", "b"}, {"--name", "only-b"}} {
			r := s.h1.CLI(append([]string{"attach", itoa(d.PID)}, flags...)...)
			if r.Code != 1 || !strings.Contains(r.Stderr, b.addr.String()+" on node ") || !strings.Contains(r.Stderr, s.h2.Addr.String()) {
				t.Errorf("%q: exit code %d, %s", flags, r.Code, r.Stderr)
			}
		}
		if r := s.h1.CLI("attach", itoa(d.PID), "--name", "gateway"); r.Code != 1 || !strings.Contains(r.Stderr, "gateway") {
			t.Errorf("a reserved name: exit code %d, %s", r.Code, r.Stderr)
		}
	})
	t.Run("detach takes it away", func(t *testing.T) {
		if r := s.h2.CLI("detach", "b"); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		a.comesToFind(t, gone, "b.ovl.internal.", "NXDOMAIN")
		a.comesToFind(t, gone, "service.ovl.internal.", "NOERROR "+c.addr.String())
		join(t, s.h1, "b") // and it is free at once
	})
	t.Run("so does the end of the container", func(t *testing.T) {
		c.Stop()
		a.comesToFind(t, gone, "c.ovl.internal.", "NXDOMAIN")
	})
}

func sorted(addrs ...netip.Addr) (texts []string) {
	for _, a := range addrs {
		texts = append(texts, a.String())
	}
	slices.Sort(texts)
	return texts
}

func TestNames_GoWithTheirNodeAndComeBackWithIt(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	const name = "b.ovl.internal."
	there := "NOERROR " + b.addr.String()
	a.comesToFind(t, time.Second, name, there)
	s.d2.Stop()
	if got := a.finds(t, name, dns.TypeA); got != "NXDOMAIN" {
		a.comesToFind(t, 2*time.Second, name, "NXDOMAIN")
	}
	d2 := s.h2.Up("--etcd-endpoints", etcdURL(s.h1))
	a.comesToFind(t, 2*time.Second, name, there)
	b.comesToFind(t, 2*time.Second, "a.ovl.internal.", "NOERROR "+a.addr.String())
	d2.Kill()
	if got := a.finds(t, name, dns.TypeA); got != there {
		t.Errorf("at once: %s", got)
	}
	const ttl = 20 * time.Second
	a.comesToFind(t, ttl+5*time.Second, name, "NXDOMAIN") // etcd looks at leases now and then
	s.h2.Up("--etcd-endpoints", etcdURL(s.h1))
	a.comesToFind(t, 2*time.Second, name, there)
}

func TestNames_AreInTheNetworksDomain(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	h.SetResolvConf("search lab.test\nnameserver " + lab.RouterAddr.String() + "\n")
	d := upEmbedded(h)
	if r := h.CLI("config", "set", "--domain", "lab.internal"); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	d.Stop()
	upEmbedded(h)
	a, b := join(t, h, "a"), join(t, h, "b")
	if got := a.finds(t, "b.lab.internal.", dns.TypeA); got != "NOERROR "+b.addr.String() {
		t.Errorf("a finds %s", got)
	}
	r := run(h, "cat", "/etc/resolv.conf")
	if want := "nameserver " + a.gateway.String() + "\nsearch lab.internal lab.test\n"; r.Code != 0 || r.Stdout != want {
		t.Errorf("resolv.conf of run: exit code %d, %q, want %q", r.Code, r.Stdout, want)
	}
	// By the search domain of that file, with the C library of this system.
	if r := run(h, "getent", "ahostsv4", "b"); r.Code != 0 || !strings.HasPrefix(r.Stdout, b.addr.String()+" ") {
		t.Errorf("getent: exit code %d, %q %s", r.Code, r.Stdout, r.Stderr)
	}
}
