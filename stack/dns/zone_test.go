// This file tests what the zone says of names, addresses and what is not there.

package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

var (
	asker = Query{From: netip.MustParseAddr("10.213.7.9"), At: netip.MustParseAddr("10.213.7.1")}
	other = Query{From: netip.MustParseAddr("10.213.7.8"), At: netip.MustParseAddr("10.213.7.1")}
)

func addrs(list ...string) (out []netip.Addr) {
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func testZone(t testing.TB) *Zone {
	t.Helper()
	return NewZone(ZoneConfig{
		Domain:   "Ovl.Internal",
		Networks: []netip.Prefix{netip.MustParsePrefix("10.213.0.0/16"), netip.MustParsePrefix("10.5.0.0/20"), netip.MustParsePrefix("fd00:5::/48")},
		Hosts: []Host{
			{Name: "web", Addrs: addrs("10.213.7.3", "fd00:5:0:7::3"), Aliases: []string{"front", "all", "db"}},
			{Name: "db", Addrs: addrs("10.213.8.4"), Aliases: []string{"all"}},
			{Name: "db2.blue", Addrs: addrs("10.213.9.4"), Aliases: []string{"all", "localhost", "host", "x.localhost"}},
			{Name: "localhost", Addrs: addrs("10.213.9.5")},
			{Name: "gateway", Addrs: addrs("10.213.9.6")},
		},
		Gateways: map[netip.Addr][]netip.Addr{asker.From: addrs("10.213.7.1", "fd00:5:0:7::1")},
	})
}

// look asks z and writes the answer as RCODE, whether there is an SOA, and the answers' data.
func look(t *testing.T, z *Zone, who Query, name string, kind uint16) string {
	t.Helper()
	b := question(t, func(q *dns.Msg) { q.SetQuestion(name, kind); q.Id = 0xbeef })
	q, err := parseQuery(b)
	if err != nil {
		t.Fatal(err)
	}
	answer := z.answer(&q, who)
	if answer == nil {
		return "forwarded"
	}
	m := unpack(t, answer)
	if !m.Authoritative || !m.RecursionAvailable || m.Question[0].Name != name {
		t.Errorf("%s: %v", name, m)
	}
	out := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		if rr.Header().Name != name {
			t.Errorf("%s: the answer is of %s", name, rr.Header().Name)
		}
		f := strings.Fields(rr.String())
		out = append(out, f[4])
	}
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); !ok || !dns.IsSubDomain(rr.Header().Name, name) || soa.Minttl > 2 {
			t.Errorf("%s: authority %v", name, rr)
		}
		out = append(out, "SOA:"+rr.Header().Name)
	}
	return strings.Join(out, " ")
}

func TestZone_Says(t *testing.T) {
	z := testZone(t)
	const nodata, nxdomain = "NOERROR SOA:ovl.internal.", "NXDOMAIN SOA:ovl.internal."
	for _, c := range []struct {
		name string
		kind uint16
		want string
	}{
		{"web.ovl.internal.", dns.TypeA, "NOERROR 10.213.7.3"},
		{"WEB.ovl.INTERNAL.", dns.TypeA, "NOERROR 10.213.7.3"},
		{"web.ovl.internal.", dns.TypeAAAA, "NOERROR fd00:5:0:7::3"},
		{"web.ovl.internal.", dns.TypeTXT, nodata},
		{"web.ovl.internal.", dns.TypeANY, "NOERROR 10.213.7.3 fd00:5:0:7::3"},
		{"front.ovl.internal.", dns.TypeA, "NOERROR 10.213.7.3"},
		{"db.ovl.internal.", dns.TypeA, "NOERROR 10.213.8.4"}, // a name goes before web's alias
		{"db.ovl.internal.", dns.TypeAAAA, nodata},
		{"db2.blue.ovl.internal.", dns.TypeA, "NOERROR 10.213.9.4"},
		{"blue.ovl.internal.", dns.TypeA, nodata},
		{"green.ovl.internal.", dns.TypeA, nxdomain},
		{"x.web.ovl.internal.", dns.TypeA, nxdomain},
		{"ovl.internal.", dns.TypeA, nodata},
		{"ovl.internal.", dns.TypeNS, "NOERROR gateway.ovl.internal."},
		{"ovl.internal.", dns.TypeSOA, "NOERROR gateway.ovl.internal."},
		{"ovl.internal.", dns.TypeAXFR, "REFUSED"},
		{"web.", dns.TypeA, "NOERROR 10.213.7.3"},
		{"web.", dns.TypeMX, "NOERROR SOA:web."},
		{"blue.", dns.TypeA, "forwarded"},
		{"green.", dns.TypeA, "forwarded"},
		{"host.", dns.TypeA, "NOERROR 10.213.7.1"},
		{"Gateway.", dns.TypeAAAA, "NOERROR fd00:5:0:7::1"},
		{"host.", dns.TypeMX, "NOERROR SOA:host."},
		{"hosts.", dns.TypeA, "forwarded"},
		{"localhost.", dns.TypeA, "NOERROR 127.0.0.1"},
		{"LocalHost.", dns.TypeAAAA, "NOERROR ::1"},
		{"x.localhost.", dns.TypeA, "NOERROR 127.0.0.1"},
		{"localhost.", dns.TypeMX, "NOERROR SOA:localhost."},
		{"xlocalhost.", dns.TypeA, "forwarded"},
		{"localhost.ovl.internal.", dns.TypeA, nxdomain},
		{"x.localhost.ovl.internal.", dns.TypeA, nxdomain},
		{"5.9.213.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN SOA:213.10.in-addr.arpa."},
		{"6.9.213.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN SOA:213.10.in-addr.arpa."},
		{"internal.", dns.TypeA, "forwarded"},
		{"xovl.internal.", dns.TypeA, "forwarded"},
		{`web\.ovl.internal.`, dns.TypeA, "forwarded"},
		{"web.ovl.internal.example.", dns.TypeA, "forwarded"},
		{".", dns.TypeNS, "forwarded"},

		{"host.ovl.internal.", dns.TypeA, "NOERROR 10.213.7.1"},
		{"host.ovl.internal.", dns.TypeAAAA, "NOERROR fd00:5:0:7::1"},
		{"Gateway.ovl.internal.", dns.TypeA, "NOERROR 10.213.7.1"},
		{"gateway.ovl.internal.", dns.TypeTXT, nodata},

		{"3.7.213.10.in-addr.arpa.", dns.TypePTR, "NOERROR web.ovl.internal."},
		{"3.7.213.10.in-addr.arpa.", dns.TypeA, "NOERROR SOA:213.10.in-addr.arpa."},
		{"1.7.213.10.in-addr.arpa.", dns.TypePTR, "NOERROR gateway.ovl.internal."},
		{"99.7.213.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN SOA:213.10.in-addr.arpa."},
		{"x.3.7.213.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN SOA:213.10.in-addr.arpa."},
		{"03.7.213.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN SOA:213.10.in-addr.arpa."},
		{"7.213.10.in-addr.arpa.", dns.TypePTR, "NOERROR SOA:213.10.in-addr.arpa."},
		{"213.10.in-addr.arpa.", dns.TypeNS, "NOERROR gateway.ovl.internal."},
		{"10.in-addr.arpa.", dns.TypePTR, "forwarded"},
		{"1.1.214.10.in-addr.arpa.", dns.TypePTR, "forwarded"},
		{"1.15.5.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN SOA:15.5.10.in-addr.arpa."},
		{"1.16.5.10.in-addr.arpa.", dns.TypePTR, "forwarded"},
		{"5.10.in-addr.arpa.", dns.TypeSOA, "forwarded"},
		{arpa(t, "fd00:5:0:7::3"), dns.TypePTR, "NOERROR web.ovl.internal."},
		{arpa(t, "fd00:5:0:7::1"), dns.TypePTR, "NOERROR gateway.ovl.internal."},
		{arpa(t, "fd00:5:0:7::99"), dns.TypePTR, "NXDOMAIN SOA:0.0.0.0.5.0.0.0.0.0.d.f.ip6.arpa."},
		{arpa(t, "fd00:6::3"), dns.TypePTR, "forwarded"},
		{"arpa.", dns.TypeNS, "forwarded"},
	} {
		// fd00:5::/48 has twelve digits.
		if got := look(t, z, asker, c.name, c.kind); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.name, dns.TypeToString[c.kind], got, c.want)
		}
	}
	if got := look(t, z, other, "host.ovl.internal.", dns.TypeAAAA); got != nodata {
		t.Errorf("a container without IPv6 is told %s", got)
	}
}

func arpa(t *testing.T, addr string) string {
	t.Helper()
	name, err := dns.ReverseAddr(addr)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestZone_TakesHoldersOfAnAliasInTurn(t *testing.T) {
	z := testZone(t)
	first := make(map[string]int)
	for range 30 {
		got := strings.Fields(look(t, z, asker, "all.ovl.internal.", dns.TypeA))[1:]
		_ = look(t, z, asker, "all.ovl.internal.", dns.TypeAAAA) // as resolvers ask: it must not turn the others
		first[got[0]]++
		slices.Sort(got)
		if strings.Join(got, " ") != "10.213.7.3 10.213.8.4 10.213.9.4" {
			t.Fatalf("got %v", got)
		}
	}
	for _, a := range []string{"10.213.7.3", "10.213.8.4", "10.213.9.4"} {
		if first[a] != 10 {
			t.Errorf("%s was first %d times of 30", a, first[a])
		}
	}
}

func TestZone_LooksUp(t *testing.T) {
	z := testZone(t)
	for name, want := range map[string]string{
		"web": "[10.213.7.3 fd00:5:0:7::3]", "web.ovl.internal": "[10.213.7.3 fd00:5:0:7::3]", "db2.blue": "[10.213.9.4]", "db": "[10.213.8.4]",
		"blue": "[]", "nobody": "[]", "ovl.internal": "[]", "": "[]", "host": "[]",
	} {
		if got := fmt.Sprint(z.Lookup(name)); got != want {
			t.Errorf("%q: %s, want %s", name, got, want)
		}
	}
	if got := (*Zone)(nil).Lookup("web"); got != nil {
		t.Errorf("without a zone: %v", got)
	}
}

func TestZone_AnswersWithEDNS(t *testing.T) {
	z := testZone(t)
	ask := func(change func(*dns.OPT)) *dns.Msg {
		b := question(t, func(q *dns.Msg) {
			q.SetQuestion("web.ovl.internal.", dns.TypeA)
			q.Id = 0xbeef
			q.SetEdns0(4096, true)
			change(q.IsEdns0())
		})
		q, err := parseQuery(b)
		if err != nil {
			t.Fatal(err)
		}
		return unpack(t, z.answer(&q, asker))
	}
	m := ask(func(*dns.OPT) {})
	if o := m.IsEdns0(); o == nil || !o.Do() || o.UDPSize() != ednsSize || len(m.Answer) != 1 {
		t.Errorf("answer: %v", m)
	}
	if m := ask(func(o *dns.OPT) { o.SetVersion(1) }); m.Rcode != dns.RcodeBadVers || len(m.Answer) != 0 {
		t.Errorf("version 1: %v", m)
	}
}

func TestResolver_ManyHoldersAreTruncatedInADatagramOnly(t *testing.T) {
	c := ZoneConfig{Domain: "ovl.internal"}
	for i := range 200 {
		c.Hosts = append(c.Hosts, Host{Name: fmt.Sprintf("h%d", i), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}, Aliases: []string{"all"}})
	}
	z := NewZone(c)
	r := New(Config{ResolvConf: resolvConf(t)})
	r.SetZone(z)
	b := r.Answer(t.Context(), asker, question(t, func(q *dns.Msg) { q.SetQuestion("all.ovl.internal.", dns.TypeA); q.Id = 0xbeef }))
	if m := unpack(t, b); !m.Truncated || len(b) > 512 || len(m.Answer) == 0 {
		t.Errorf("%d bytes, truncated %v, %d answers", len(b), m.Truncated, len(m.Answer))
	}
	got := overStream(t, r, asker, func() {}, question(t, func(q *dns.Msg) { q.SetQuestion("all.ovl.internal.", dns.TypeA); q.Id = 0xbeef }))
	if m := unpack(t, got[0]); m.Truncated || len(m.Answer) != 200 {
		t.Errorf("over TCP: truncated %v, %d answers", m.Truncated, len(m.Answer))
	}
}

func TestResolver_ClosedContainersResolveTheZoneOnly(t *testing.T) {
	var port uint16
	fake(t, "127.0.0.1", &port, says("secret"), "udp")
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	r.SetZone(testZone(t))
	closed := asker
	closed.Closed = true
	b := r.Answer(t.Context(), closed, question(t, func(q *dns.Msg) { q.SetEdns0(1232, false) }))
	if m := unpack(t, b); m.Rcode != dns.RcodeRefused || m.IsEdns0() == nil {
		t.Errorf("answer: %v", m)
	}
	b = r.Answer(t.Context(), closed, question(t, func(q *dns.Msg) { q.SetQuestion("web.ovl.internal.", dns.TypeA); q.Id = 0xbeef }))
	if m := unpack(t, b); len(m.Answer) != 1 {
		t.Errorf("answer: %v", m)
	}
	if s := r.Stats(); s.Refused != 1 || s.Local != 1 || s.Answered != 0 {
		t.Errorf("stats: %+v", s)
	}
}

// FuzzZone asks what a container may ask.
func FuzzZone(f *testing.F) {
	for _, name := range []string{"web.ovl.internal.", "all.ovl.internal.", "ovl.internal.", "3.7.213.10.in-addr.arpa.", "7.0.0.0.0.0.0.0.5.0.0.0.0.0.d.f.ip6.arpa.", "web.", "host.ovl.internal."} {
		q := new(dns.Msg)
		q.SetQuestion(name, dns.TypeANY)
		q.SetEdns0(512, true)
		b, _ := q.Pack()
		f.Add(b)
	}
	z := testZone(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQuery(b)
		if err != nil {
			return
		}
		answer := z.answer(&q, asker)
		if answer == nil {
			return
		}
		var m dns.Msg
		if err := m.Unpack(answer); err != nil || !m.Response || m.Id != q.id() || len(m.Question) != 1 || m.Question[0] != q.question {
			t.Fatalf("%v: the answer to % x is % x", err, b, answer)
		}
		if m.Rcode == dns.RcodeSuccess && len(m.Answer) == 0 && len(m.Ns) == 0 {
			t.Fatalf("nothing is said of nothing: %v", m)
		}
	})
}
