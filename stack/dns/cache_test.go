// This file tests the cache, the sharing of queries, and connections with several queries.

package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// packed is an answer to a question for a TXT record of www.example.org, and the question.
func packed(t *testing.T, change func(*dns.Msg)) (query, []byte) {
	t.Helper()
	q, err := parseQuery(question(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	m := new(dns.Msg)
	if err := m.Unpack(q.wire); err != nil {
		t.Fatal(err)
	}
	m.Response = true
	change(m)
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return q, b
}

func rr(t *testing.T, text string) dns.RR {
	t.Helper()
	r, err := dns.NewRR(text)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestLifetime(t *testing.T) {
	const soa = "example.org. 900 IN SOA a. b. 1 2 3 4 300"
	for _, c := range []struct {
		name string
		m    func(*dns.Msg)
		want uint32
	}{
		{"an answer", func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN TXT x")} }, 60},
		{"the shortest counts", func(m *dns.Msg) {
			m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN CNAME x.org."), rr(t, "x.org. 20 IN TXT x")}
		}, 20},
		{"additional records too", func(m *dns.Msg) {
			m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN TXT x")}
			m.Extra = []dns.RR{rr(t, "y.org. 7 IN A 192.0.2.1")}
			m.SetEdns0(1232, true)
		}, 7},
		{"a year is a day", func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "www.example.org. 31536000 IN TXT x")} }, maxTTL},
		{"a TTL with the top bit is none", func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "www.example.org. 4294967295 IN TXT x")} }, 0},
		{"NXDOMAIN for the minimum of the SOA", func(m *dns.Msg) { m.Rcode = dns.RcodeNameError; m.Ns = []dns.RR{rr(t, soa)} }, 300},
		{"NODATA likewise", func(m *dns.Msg) { m.Ns = []dns.RR{rr(t, soa)} }, 300},
		{"NODATA behind a CNAME", func(m *dns.Msg) {
			m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN CNAME x.org.")}
			m.Ns = []dns.RR{rr(t, soa)}
		}, 60},
		{"an SOA beside an answer", func(m *dns.Msg) {
			m.Answer = []dns.RR{rr(t, "www.example.org. 600 IN TXT x")}
			m.Ns = []dns.RR{rr(t, soa)}
		}, 600},
		{"NXDOMAIN without SOA", func(m *dns.Msg) { m.Rcode = dns.RcodeNameError }, 0},
		{"a referral", func(m *dns.Msg) { m.Ns = []dns.RR{rr(t, "example.org. 60 IN NS a.example.org.")} }, 0},
		{"SERVFAIL", func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure; m.Ns = []dns.RR{rr(t, soa)} }, 0},
		{"truncated", func(m *dns.Msg) { m.Truncated = true; m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN TXT x")} }, 0},
		{"an extended response code", func(m *dns.Msg) {
			m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN TXT x")}
			m.SetEdns0(1232, false)
			m.Rcode = dns.RcodeBadVers
		}, 0},
	} {
		q, b := packed(t, c.m)
		if _, got := lifetime(b, &q); got != c.want {
			t.Errorf("%s: %d s, want %d", c.name, got, c.want)
		}
	}
}

func TestCache_CountsDownAndForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, b := packed(t, func(m *dns.Msg) {
			m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN TXT x"), rr(t, "www.example.org. 90 IN TXT y")}
		})
		key, _ := q.key()
		var c cache
		c.put(1, key, &q, b, time.Now())
		time.Sleep(25 * time.Second)
		asked, err := parseQuery(question(t, func(m *dns.Msg) { m.Id = 0xbeef; m.Question[0].Name = "wWw.Example.org." }))
		if err != nil {
			t.Fatal(err)
		}
		m := unpack(t, c.get(1, key, &asked, time.Now()))
		if m.Answer[0].Header().Ttl != 35 || m.Answer[1].Header().Ttl != 65 || m.Question[0].Name != "wWw.Example.org." {
			t.Errorf("after 25 s: %v", m)
		}
		if c.get(2, key, &q, time.Now()) != nil {
			t.Error("the answer of other servers is given")
		}
		c.put(2, key, &q, b, time.Now())
		time.Sleep(time.Minute)
		if c.get(2, key, &q, time.Now()) != nil || len(c.answers) != 0 || c.bytes != 0 {
			t.Errorf("after a minute there are %d answers of %d bytes", len(c.answers), c.bytes)
		}
	})
}

func TestCache_IsBounded(t *testing.T) {
	var c cache
	fill := func(n int, text string) {
		q, b := packed(t, func(m *dns.Msg) {
			for len(text) > 0 {
				part := text[:min(200, len(text))]
				text = text[len(part):]
				m.Answer = append(m.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: "www.example.org.", Rrtype: dns.TypeTXT, Class: 1, Ttl: 60}, Txt: []string{part}})
			}
		})
		for i := range n {
			c.put(0, fmt.Sprint(i), &q, b, time.Now())
		}
	}
	fill(maxCached+100, "x")
	if n := len(c.answers); n != maxCached {
		t.Errorf("%d answers", n)
	}
	q, _ := packed(t, func(*dns.Msg) {})
	if c.get(0, "0", &q, time.Now()) != nil || c.get(0, fmt.Sprint(maxCached+99), &q, time.Now()) == nil {
		t.Error("not the oldest have gone")
	}
	fill(maxCached, strings.Repeat("x", 20000))
	if c.bytes > maxCachedBytes || len(c.answers) < 100 {
		t.Errorf("%d answers, %d bytes", len(c.answers), c.bytes)
	}
}

func TestKey_TellsQueriesApart(t *testing.T) {
	keys := make(map[string]string)
	for name, change := range map[string]func(*dns.Msg){
		"plain":   nil,
		"type":    func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeA },
		"class":   func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS },
		"name":    func(m *dns.Msg) { m.Question[0].Name = "wwv.example.org." },
		"CD":      func(m *dns.Msg) { m.CheckingDisabled = true },
		"AD":      func(m *dns.Msg) { m.AuthenticatedData = true },
		"no RD":   func(m *dns.Msg) { m.RecursionDesired = false },
		"EDNS":    func(m *dns.Msg) { m.SetEdns0(1232, false) },
		"DO":      func(m *dns.Msg) { m.SetEdns0(1232, true) },
		"upper A": func(m *dns.Msg) { m.Question[0].Qtype = 65 }, // 'A': types have no case
		"lower a": func(m *dns.Msg) { m.Question[0].Qtype = 97 },
	} {
		q, err := parseQuery(question(t, change))
		if err != nil {
			t.Fatal(err)
		}
		key, ok := q.key()
		if was := keys[key]; !ok || was != "" {
			t.Errorf("%s: the key is that of %q", name, was)
		}
		keys[key] = name
	}
	q, _ := parseQuery(question(t, func(m *dns.Msg) { m.Question[0].Name = "WWW.example.ORG."; m.Id = 7 }))
	if key, _ := q.key(); keys[key] != "plain" {
		t.Error("case or identifier make another key")
	}
	q, _ = parseQuery(question(t, func(m *dns.Msg) {
		m.SetEdns0(1232, false)
		m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0)}}
	}))
	if _, ok := q.key(); ok {
		t.Error("a query with options has a key")
	}
	q, _ = parseQuery(question(t, func(m *dns.Msg) {
		m.SetEdns0(1232, false)
		m.SetTsig("key.", dns.HmacSHA256, 300, 1)
	}))
	if _, ok := q.key(); ok || !bytes.Equal(q.toServer(q.id()), q.wire) {
		t.Error("a signed query has a key, or is changed")
	}
}

// However many sizes of datagrams one question is asked with, one is on its way to a server.
func TestAnswer_AsksOnceForAllSizes(t *testing.T) {
	var port uint16
	var asked atomic.Int32
	release := make(chan struct{})
	long := []string{strings.Repeat("a", 250), strings.Repeat("b", 250), strings.Repeat("c", 250)}
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Add(1)
		if size := q.IsEdns0().UDPSize(); size != ednsSize {
			t.Errorf("asked with %d bytes", size)
		}
		<-release
		says(long...)(w, q)
	}, "udp")
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	var wg sync.WaitGroup
	for _, size := range []int{0, 512, 513, 700, 1232, 1400, 4096, 65535} {
		wg.Go(func() {
			b := r.Answer(t.Context(), Query{}, question(t, func(q *dns.Msg) { q.SetEdns0(uint16(size), false) }))
			m := unpack(t, b)
			if fits := size >= 1232; len(b) > max(512, size) || m.Truncated == fits || fits && len(m.Answer) != 3 {
				t.Errorf("%d: %d bytes, truncated %v, %d answers", size, len(b), m.Truncated, len(m.Answer))
			}
		})
	}
	asking := func() int {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.asking.all
	}
	for end := time.Now().Add(patience); asking() < 8 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	close(release)
	wg.Wait()
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestAnswer_AsksOnceForManyAndKeepsTheAnswer(t *testing.T) {
	var port uint16
	var asked atomic.Int32
	in, out := make(chan struct{}, 8), make(chan struct{})
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Add(1)
		in <- struct{}{}
		<-out
		m := new(dns.Msg)
		m.SetReply(q)
		m.Answer = []dns.RR{rr(t, "www.example.org. 600 IN TXT once")}
		_ = w.WriteMsg(m)
	}, "udp")
	conf := resolvConf(t, "nameserver 127.0.0.1")
	r := New(Config{ResolvConf: conf, Port: port, Timeout: patience})
	given, giveUp := context.WithCancel(t.Context())
	ask := func(ctx context.Context) *dns.Msg {
		b := r.Answer(ctx, Query{}, question(t, nil))
		if b == nil {
			return nil
		}
		return unpack(t, b)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if m := ask(given); m != nil {
			t.Errorf("who gave up was told %v", m)
		}
	})
	<-in
	for range 10 {
		wg.Go(func() {
			if m := ask(t.Context()); m == nil || len(m.Answer) != 1 {
				t.Errorf("got %v", m)
			}
		})
	}
	giveUp() // one of the others asks in its place
	<-in
	close(out)
	wg.Wait()
	if m := ask(t.Context()); len(m.Answer) != 1 {
		t.Errorf("got %v", m)
	}
	if s := r.Stats(); asked.Load() != 2 || s.Shared+s.Cached != 10 || s.Cached == 0 {
		t.Errorf("asked %d times: %+v", asked.Load(), s)
	}
	// Others are to be asked now.
	writeConf(t, conf, "nameserver 127.0.0.1", "nameserver 127.0.0.9")
	r.file.mu.Lock()
	r.file.checked = time.Time{}
	r.file.mu.Unlock()
	if ask(t.Context()); asked.Load() != 3 {
		t.Errorf("asked %d times after resolv.conf changed", asked.Load())
	}
}

// overStream sends queries on one connection, all at once, and reads as many answers, in the order that they come in; first is called when
// one is there.
func overStream(t *testing.T, r *Resolver, who Query, first func(), queries ...[]byte) [][]byte {
	t.Helper()
	container, gateway := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		r.ServeStream(t.Context(), who, gateway)
		_ = gateway.Close()
	})
	wg.Go(func() {
		for _, q := range queries {
			if err := writeStream(container, q); err != nil {
				t.Error(err)
			}
		}
	})
	var out [][]byte
	for range queries {
		b, err := readStream(container, maxMessage)
		if err != nil {
			t.Error(err)
			break
		}
		if out = append(out, b); len(out) == 1 {
			first()
		}
	}
	_ = container.Close()
	wg.Wait()
	return out
}

func TestServeStream_AnswersOutOfOrder(t *testing.T) {
	var port uint16
	release := make(chan struct{})
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		if strings.HasPrefix(q.Question[0].Name, "slow.") {
			<-release
		}
		says("x")(w, q)
	})
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	got := overStream(t, r, Query{}, func() { close(release) },
		question(t, func(q *dns.Msg) { q.Question[0].Name = "slow.example." }), question(t, func(q *dns.Msg) { q.Question[0].Name = "quick.example." }))
	if len(got) != 2 || unpack(t, got[0]).Question[0].Name != "quick.example." || unpack(t, got[1]).Question[0].Name != "slow.example." {
		t.Errorf("got %d answers", len(got))
	}
}

func TestServeStream_AsksOnConnectionsThatAreThere(t *testing.T) {
	var port uint16
	from := make(map[string]bool)
	var mu sync.Mutex
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		mu.Lock()
		from[w.RemoteAddr().String()] = true
		mu.Unlock()
		says("x")(w, q)
	})
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	for i := range 5 {
		overStream(t, r, Query{}, func() {}, question(t, func(q *dns.Msg) { q.Question[0].Name = fmt.Sprintf("n%d.example.", i) }))
	}
	if len(from) != 1 {
		t.Errorf("%d connections for 5 queries one after the other", len(from))
	}
	// One that the server has closed meanwhile costs another, not the answer.
	r.servers.mu.Lock()
	for _, list := range r.servers.idle {
		_ = list[0].conn.(*net.TCPConn).CloseWrite()
	}
	r.servers.mu.Unlock()
	if got := overStream(t, r, Query{}, func() {}, question(t, func(q *dns.Msg) { q.Question[0].Name = "last.example." })); len(unpack(t, got[0]).Answer) != 1 {
		t.Error("no answer")
	}
}

func TestServeStream_EndsWithItsContext(t *testing.T) {
	var port uint16
	asked := make(chan struct{}, 8)
	fake(t, "127.0.0.1", &port, func(dns.ResponseWriter, *dns.Msg) { asked <- struct{}{} }, "tcp")
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	container, gateway := net.Pipe()
	defer container.Close()
	go func() {
		_ = writeStream(container, question(t, nil))
		<-asked
		cancel()
	}()
	r.ServeStream(ctx, Query{}, gateway)
}

// FuzzLifetime reads what a server may answer.
func FuzzLifetime(f *testing.F) {
	q := new(dns.Msg)
	q.SetQuestion("www.example.org.", dns.TypeTXT)
	wire, _ := q.Pack()
	m := new(dns.Msg)
	m.SetReply(q)
	m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: "www.example.org.", Rrtype: dns.TypeTXT, Class: 1, Ttl: 9}, Txt: []string{"x"}}}
	m.SetEdns0(1232, false)
	b, _ := m.Pack()
	f.Add(b)
	m.Compress = true
	b, _ = m.Pack()
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQuery(wire)
		if err != nil {
			t.Fatal(err)
		}
		if !q.answeredBy(b, q.id()) {
			return
		}
		ttls, seconds := lifetime(b, &q)
		if seconds > maxTTL {
			t.Fatalf("%d seconds", seconds)
		}
		for _, at := range ttls {
			if at < q.end || at+4 > len(b) {
				t.Fatalf("a TTL at %d of %d", at, len(b))
			}
			_ = binary.BigEndian.Uint32(b[at:])
		}
		var c cache
		c.put(0, "k", &q, b, time.Now())
		if got := c.get(0, "k", &q, time.Now()); got != nil && len(got) != len(b) {
			t.Fatal("the answer changed its length")
		}
	})
}
