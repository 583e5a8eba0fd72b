// This file tests the resolver against servers made of miekg/dns, on the host's loopback.

package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

const patience = 30 * time.Second

// fake is a DNS server at ip, on UDP and TCP, at a port that all fakes of a test share.
func fake(t *testing.T, ip string, port *uint16, h dns.HandlerFunc, networks ...string) {
	t.Helper()
	if networks == nil {
		networks = []string{"udp", "tcp"}
	}
	servers, err := listen(netip.MustParseAddr(ip), port, networks)
	// What is free for UDP may be somebody's for TCP.
	for tries := 0; *port == 0 && errors.Is(err, syscall.EADDRINUSE) && tries < 100; tries++ {
		servers, err = listen(netip.MustParseAddr(ip), port, networks)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range servers {
		s.Handler = h
		ready := make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = s.ActivateAndServe()
		}()
		<-ready
		t.Cleanup(func() {
			_ = s.Shutdown()
			<-done
		})
	}
}

// listen opens a socket for each network, all at one port: *port, or any when that is 0. It sets *port only when all are open.
func listen(ip netip.Addr, port *uint16, networks []string) (servers []*dns.Server, err error) {
	at := netip.AddrPortFrom(ip, *port)
	defer func() {
		if err == nil {
			*port = at.Port()
			return
		}
		for _, s := range servers {
			if s.PacketConn != nil {
				s.PacketConn.Close()
			} else {
				s.Listener.Close()
			}
		}
	}()
	for _, network := range networks {
		if network == "udp" {
			c, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
			if err != nil {
				return servers, err
			}
			servers = append(servers, &dns.Server{Net: network, PacketConn: c})
			at = c.LocalAddr().(*net.UDPAddr).AddrPort()
		} else {
			l, err := net.ListenTCP(network, net.TCPAddrFromAddrPort(at))
			if err != nil {
				return servers, err
			}
			servers = append(servers, &dns.Server{Net: network, Listener: l})
			at = l.Addr().(*net.TCPAddr).AddrPort()
		}
	}
	return servers, nil
}

// says answers with one TXT record for each text.
func says(texts ...string) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		for _, text := range texts {
			m.Answer = append(m.Answer, &dns.TXT{
				Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 1}, Txt: []string{text}})
		}
		if w.RemoteAddr().Network() == "udp" {
			size := dns.MinMsgSize
			if o := q.IsEdns0(); o != nil {
				size = int(o.UDPSize())
			}
			m.Truncate(size)
		}
		_ = w.WriteMsg(m)
	}
}

func fails(rc int) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetRcode(q, rc)
		_ = w.WriteMsg(m)
	}
}

func silent(dns.ResponseWriter, *dns.Msg) {}

func resolvConf(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	writeConf(t, path, lines...)
	return path
}

// writeConf replaces the file, as resolvconf and systemd do.
func writeConf(t *testing.T, path string, lines ...string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func question(t *testing.T, change func(*dns.Msg)) []byte {
	t.Helper()
	q := new(dns.Msg)
	q.SetQuestion("www.example.org.", dns.TypeTXT)
	q.Id = 0xbeef
	if change != nil {
		change(q)
	}
	b, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unpack(t *testing.T, b []byte) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		t.Fatalf("%v: % x", err, b)
	}
	if m.Id != 0xbeef || !m.Response {
		t.Fatalf("no answer to the question: %v", m)
	}
	return m
}

func TestAnswer_ForwardsAndKeepsTheIdentifier(t *testing.T) {
	var port uint16
	var seen atomic.Uint32
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		seen.Store(uint32(q.Id))
		says("hello")(w, q)
	})
	r := New(Config{ResolvConf: resolvConf(t, "# comment", "nameserver 127.0.0.1", "search example.org"), Port: port, Timeout: patience})
	m := unpack(t, r.Answer(t.Context(), Query{}, question(t, nil)))
	if len(m.Answer) != 1 || m.Answer[0].(*dns.TXT).Txt[0] != "hello" {
		t.Errorf("answer: %v", m)
	}
	if s := r.Stats(); s.Queries != 1 || s.Answered != 1 {
		t.Errorf("stats: %+v", s)
	}
}

func TestAnswer_PassesEDNSOptions(t *testing.T) {
	var port uint16
	got := make(chan *dns.Msg, 1)
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		got <- q
		says("x")(w, q)
	})
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	r.Answer(t.Context(), Query{}, question(t, func(q *dns.Msg) {
		q.SetEdns0(4096, true)
		q.IsEdns0().Option = append(q.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"})
	}))
	o := (<-got).IsEdns0()
	if o == nil || o.UDPSize() != ednsSize || !o.Do() || len(o.Option) != 1 {
		t.Errorf("the server saw %v", o)
	}
}

func TestAnswer_AsksAgainOverTCPWhenTruncated(t *testing.T) {
	var port uint16
	long := []string{strings.Repeat("a", 250), strings.Repeat("b", 250), strings.Repeat("c", 250)}
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		if w.RemoteAddr().Network() == "udp" { // a server that truncates whatever the query allows
			m := new(dns.Msg)
			m.SetReply(q)
			m.Truncated = true
			_ = w.WriteMsg(m)
			return
		}
		says(long...)(w, q)
	})
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	t.Run("the container takes it all", func(t *testing.T) {
		m := unpack(t, r.Answer(t.Context(), Query{}, question(t, func(q *dns.Msg) { q.SetEdns0(4096, false) })))
		if m.Truncated || len(m.Answer) != 3 {
			t.Errorf("truncated %v, %d answers", m.Truncated, len(m.Answer))
		}
	})
	t.Run("the container takes 512 bytes", func(t *testing.T) {
		b := r.Answer(t.Context(), Query{}, question(t, nil))
		if m := unpack(t, b); !m.Truncated || len(b) > 512 {
			t.Errorf("truncated %v, %d bytes", m.Truncated, len(b))
		}
	})
	if s := r.Stats(); s.Retried != 2 {
		t.Errorf("stats: %+v", s)
	}
}

func TestAnswer_TriesTheNextServer(t *testing.T) {
	for name, first := range map[string]dns.HandlerFunc{
		"silence":  silent,
		"SERVFAIL": fails(dns.RcodeServerFailure),
		"REFUSED":  fails(dns.RcodeRefused),
	} {
		t.Run(name, func(t *testing.T) {
			var port uint16
			var asked atomic.Int32
			timeout, want := patience, int32(2)
			if name == "silence" { // the second query does not wait for it again
				timeout, want = 3*time.Second, 1 // which is time enough for the second server, too
			}
			fake(t, "127.0.0.1", &port, says("second"), "udp")
			fake(t, "127.0.0.2", &port, func(w dns.ResponseWriter, q *dns.Msg) { asked.Add(1); first(w, q) }, "udp")
			r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.2", "nameserver 127.0.0.1"), Port: port, Timeout: timeout})
			for _, name := range []string{"one.example.", "two.example."} { // the same twice would be in the cache
				m := unpack(t, r.Answer(t.Context(), Query{}, question(t, func(q *dns.Msg) { q.Question[0].Name = name })))
				if len(m.Answer) != 1 {
					t.Errorf("answer: %v", m)
				}
			}
			if n := asked.Load(); n != want {
				t.Errorf("the first server was asked %d times, want %d", n, want)
			}
		})
	}
}

func TestAnswer_NXDOMAINIsAnAnswer(t *testing.T) {
	var port uint16
	fake(t, "127.0.0.1", &port, fails(dns.RcodeNameError), "udp")
	fake(t, "127.0.0.2", &port, says("wrong"), "udp")
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1", "nameserver 127.0.0.2"), Port: port, Timeout: patience})
	if m := unpack(t, r.Answer(t.Context(), Query{}, question(t, nil))); m.Rcode != dns.RcodeNameError {
		t.Errorf("answer: %v", m)
	}
}

func TestAnswer_SERVFAILWhenNobodyAnswers(t *testing.T) {
	for name, lines := range map[string][]string{
		"refused": {"nameserver 127.0.0.1", "options attempts:1"},
		"nothing": {""},
	} {
		t.Run(name, func(t *testing.T) {
			// A port where nobody listens: every server on it refuses at once.
			c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			port := netip.MustParseAddrPort(c.LocalAddr().String()).Port()
			c.Close()
			r := New(Config{ResolvConf: resolvConf(t, lines...), Port: port, Timeout: patience})
			m := unpack(t, r.Answer(t.Context(), Query{}, question(t, nil)))
			if m.Rcode != dns.RcodeServerFailure || len(m.Question) != 1 {
				t.Errorf("answer: %v", m)
			}
			if s := r.Stats(); s.Failed != 1 {
				t.Errorf("stats: %+v", s)
			}
		})
	}
}

func TestAnswer_IgnoresForgedAnswers(t *testing.T) {
	var port uint16
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		for _, spoil := range []func(*dns.Msg){
			func(m *dns.Msg) { m.Id++ },
			func(m *dns.Msg) { m.Question[0].Name = "www.example.com." },
			func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeA },
			func(m *dns.Msg) { m.Response = false },
		} {
			m := new(dns.Msg)
			m.SetReply(q)
			spoil(m)
			_ = w.WriteMsg(m)
		}
		_, _ = w.Write([]byte("short"))
		says("true")(w, q)
	}, "udp")
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	m := unpack(t, r.Answer(t.Context(), Query{}, question(t, nil)))
	if len(m.Answer) != 1 || m.Answer[0].(*dns.TXT).Txt[0] != "true" {
		t.Errorf("answer: %v", m)
	}
}

func TestAnswer_DropsWhatIsNoQuery(t *testing.T) {
	r := New(Config{ResolvConf: resolvConf(t)})
	for name, b := range map[string][]byte{
		"empty":         {},
		"short":         make([]byte, 11),
		"no question":   make([]byte, 12),
		"an answer":     question(t, func(q *dns.Msg) { q.Response = true }),
		"two questions": question(t, func(q *dns.Msg) { q.Question = append(q.Question, q.Question[0]) }),
		"cut":           question(t, nil)[:20],
		"a pointer":     {'x', 1, 'y', 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 1, 0, 1, 0, 1}, // its name is in the identifier
	} {
		if got := r.Answer(t.Context(), Query{}, b); got != nil {
			t.Errorf("%s: answered % x", name, got)
		}
	}
	if s := r.Stats(); s.Malformed != 7 || s.Queries != 0 {
		t.Errorf("stats: %+v", s)
	}
}

func TestAnswer_OtherOpcodesAreNotImplemented(t *testing.T) {
	r := New(Config{ResolvConf: resolvConf(t)})
	m := unpack(t, r.Answer(t.Context(), Query{}, question(t, func(q *dns.Msg) { q.Opcode = dns.OpcodeNotify })))
	if m.Rcode != dns.RcodeNotImplemented || m.Opcode != dns.OpcodeNotify {
		t.Errorf("answer: %v", m)
	}
}

func TestAnswer_BoundsQueriesInFlight(t *testing.T) {
	var port uint16
	in, out := make(chan struct{}), make(chan struct{})
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		in <- struct{}{}
		<-out
		says("x")(w, q)
	}, "udp")
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience, MaxQueries: 4})
	var wg sync.WaitGroup
	from := func(i int) Query { return Query{From: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})} }
	asks := func(i int) []byte {
		return question(t, func(q *dns.Msg) { q.Question[0].Name = fmt.Sprintf("q%d.example.", i) })
	}
	for i, who := range []int{0, 0, 1, 2} { // half, half of what is left, and one that is always had
		if i == 2 {
			if b := r.Answer(t.Context(), from(0), asks(9)); b != nil {
				t.Errorf("a container took more than half: % x", b)
			}
		}
		wg.Go(func() {
			if r.Answer(t.Context(), from(who), asks(i)) == nil {
				t.Error("no answer")
			}
		})
		<-in
	}
	if b := r.Answer(t.Context(), from(3), asks(9)); b != nil {
		t.Errorf("a fifth query was answered: % x", b)
	}
	if s := r.Stats(); s.Overload != 2 {
		t.Errorf("stats: %+v", s)
	}
	close(out)
	wg.Wait()
}

func TestAnswer_EndsWithItsContext(t *testing.T) {
	var port uint16
	asked := make(chan struct{}, 8)
	fake(t, "127.0.0.1", &port, func(dns.ResponseWriter, *dns.Msg) { asked <- struct{}{} }, "udp")
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-asked
		cancel()
	}()
	if b := r.Answer(ctx, Query{}, question(t, nil)); b != nil {
		t.Errorf("answered % x", b)
	}
}

func TestFollower_NoticesChanges(t *testing.T) {
	path := resolvConf(t, "nameserver 127.0.0.5")
	var log bytes.Buffer
	f := follower{path: path, port: 53, log: slog.New(slog.NewTextHandler(&log, nil))}
	server := func() string {
		f.checked = time.Time{} // a second has passed
		return f.get().servers[0].addr.Addr().String()
	}
	if got := server(); got != "127.0.0.5" {
		t.Errorf("got %s", got)
	}
	writeConf(t, path, "nameserver 127.0.0.6")
	if got := f.get().servers[0].addr.Addr().String(); got != "127.0.0.5" {
		t.Errorf("the file was read again within a second: %s", got)
	}
	if got := server(); got != "127.0.0.6" {
		t.Errorf("after the change: %s", got)
	}
	same := f.get()
	if server(); f.get() != same {
		t.Error("the file was read again though it had not changed")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if got := server(); got != "127.0.0.1" {
			t.Errorf("without the file: %s", got)
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("%d log lines, want 1:\n%s", n, log.String())
	}
	writeConf(t, path, "nameserver 127.0.0.7")
	if got := server(); got != "127.0.0.7" {
		t.Errorf("after it is back: %s", got)
	}
}

func TestParse_ResolvConf(t *testing.T) {
	for _, c := range []struct {
		text     string
		servers  string
		timeout  time.Duration
		attempts int
	}{
		{"nameserver 192.0.2.1\nnameserver 2001:db8::1\n", "192.0.2.1:53 [2001:db8::1]:53", 5 * time.Second, 2},
		{"nameserver fe80::1%eth0\noptions timeout:1 attempts:3", "[fe80::1%eth0]:53", time.Second, 3},
		{"nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4", "1.1.1.1:53 1.1.1.2:53 1.1.1.3:53", 5 * time.Second, 2},
		{"nameserver nonsense\nnameserver 192.0.2.9\n; x\n", "192.0.2.9:53", 5 * time.Second, 2},
	} {
		got, err := parse(strings.NewReader(c.text), 53)
		if err != nil {
			t.Errorf("%q: %v", c.text, err)
			continue
		}
		var list []string
		for _, s := range got.servers {
			list = append(list, s.addr.String())
		}
		if strings.Join(list, " ") != c.servers || got.timeout != c.timeout || got.attempts != c.attempts {
			t.Errorf("%q: %v %v %d, want %v %v %d", c.text, list, got.timeout, got.attempts, c.servers, c.timeout, c.attempts)
		}
	}
}

func TestResolver_SaysOnceThatTheHostHasNoServer(t *testing.T) {
	var log bytes.Buffer
	path := resolvConf(t)
	f := follower{path: path, port: 53, log: slog.New(slog.NewTextHandler(&log, nil))}
	for _, line := range []string{"search example.org", "nameserver nonsense", "options attempts:99", ""} {
		writeConf(t, path, line)
		f.checked = time.Time{} // a second has passed
		if c := f.get(); len(c.servers) != 1 || c.servers[0].addr.String() != "127.0.0.1:53" || c.attempts != 1 {
			t.Errorf("%q: it asks %+v", line, c)
		}
	}
	if got := strings.Count(log.String(), "names no server"); got != 1 {
		t.Errorf("said %d times: %s", got, &log)
	}
}

// FuzzQuery reads what a container may send, and what a server may answer to it.
func FuzzQuery(f *testing.F) {
	q := new(dns.Msg)
	q.SetQuestion("www.example.org.", dns.TypeA)
	plain, _ := q.Pack()
	q.SetEdns0(1232, true)
	edns, _ := q.Pack()
	q.Response = true
	answer, _ := q.Pack()
	f.Add(plain, answer)
	f.Add(edns, answer)
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1}, []byte{0, 1, 0x82, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b, answer []byte) {
		q, err := parseQuery(b)
		if err != nil {
			return
		}
		r := q.refusal(dns.RcodeServerFailure)
		if !q.answeredBy(r, q.id()) {
			t.Fatalf("the refusal is no answer to the query: % x, % x", b, r)
		}
		if len(answer) >= headerSize && len(q.fit(answer, q.datagram)) > max(q.datagram, len(r)) {
			t.Fatal("the answer does not fit")
		}
		q.answeredBy(answer, q.id())
		m := new(dns.Msg)
		if err := m.Unpack(q.toServer(q.id())); err != nil {
			t.Fatalf("to the server: %v, %v", m, err)
		}
		if opt := m.IsEdns0(); q.sizeAt > 0 && (opt == nil || opt.UDPSize() != ednsSize) {
			t.Fatalf("to the server: %v", m)
		}
	})
}

func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 127.0.0.53\noptions edns0 trust-ad timeout:2 attempts:x\nsearch lan\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parse(strings.NewReader(text), 53)
		if err == nil && (len(c.servers) == 0 || len(c.servers) > maxServers || c.attempts < 1 || c.timeout < 0) {
			t.Fatalf("%+v", c)
		}
	})
}
