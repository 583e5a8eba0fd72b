// This file is the load of questions: what Debian's dnsmasq says, and what it says through the gateway.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

const (
	questions      = 20_000
	askers         = 64
	namesOfEach    = 200 // kinds of question: so many names
	questionPeriod = 2 * time.Second
)

var errMismatch = errors.New("the answer differs from the resolver's own")

// question is one to be asked again and again.
type question struct {
	network string // udp4 or tcp4
	name    string
	kind    uint16
	edns    bool
}

// answerText is what of an answer does not depend on when it was given.
func answerText(m *dns.Msg) string {
	lines := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		rr = dns.Copy(rr)
		rr.Header().Ttl = 0
		lines = append(lines, rr.String())
	}
	slices.Sort(lines[1:])
	return strings.Join(lines, "\n")
}

// asker asks one question at a time: UDP from one socket, TCP with a connection a question.
type asker struct {
	from *lab.Space
	to   netip.AddrPort
	udp  net.Conn
}

// ask asks as a resolver library does: again where nothing comes, and by TCP where the answer is truncated.
func (a *asker) ask(ctx context.Context, q question, again *atomic.Int64) (*dns.Msg, error) {
	m := new(dns.Msg)
	m.SetQuestion(q.name, q.kind)
	if q.edns {
		m.SetEdns0(4096, false)
	}
	var err error
	for try := range 4 {
		if try > 0 {
			again.Add(1)
		}
		var answer *dns.Msg
		if q.network == "tcp4" {
			answer, err = query(ctx, a.from, q.network, a.to, m)
		} else {
			answer, err = a.askUDP(m)
		}
		switch {
		case err != nil:
		case answer.Truncated && q.network == "udp4":
			q.network = "tcp4"
			return a.ask(ctx, q, again)
		default:
			return answer, nil
		}
	}
	return nil, err
}

func (a *asker) askUDP(q *dns.Msg) (*dns.Msg, error) {
	q.Id = dns.Id()
	c := &dns.Conn{Conn: a.udp, UDPSize: 4096}
	_ = a.udp.SetDeadline(time.Now().Add(questionPeriod))
	if err := c.WriteMsg(q); err != nil {
		return nil, err
	}
	for {
		m, err := c.ReadMsg()
		if err != nil || m.Id == q.Id { // another's is an answer that came too late
			return m, err
		}
	}
}

// dnsmasq serves lab.test at an address of the outside.
func (s *site) dnsmasq(t *trial, addr netip.Addr) {
	var hosts, conf strings.Builder
	for i := range namesOfEach {
		fmt.Fprintf(&hosts, "198.51.100.%d host-%d.lab.test\n2001:db8::%x host-%d.lab.test\n", 1+i%250, i, i+1, i)
		fmt.Fprintf(&conf, "txt-record=text-%d.lab.test", i)
		for piece := range 4 {
			fmt.Fprintf(&conf, ",%d-%d-%s", i, piece, strings.Repeat("x", 200))
		}
		conf.WriteString("\n")
	}
	dir := s.Outside.Dir
	hostsFile, confFile := filepath.Join(dir, "dnsmasq.hosts"), filepath.Join(dir, "dnsmasq.conf")
	t.must("dnsmasq", os.WriteFile(hostsFile, []byte(hosts.String()), 0o644))
	fmt.Fprintf(&conf, "no-resolv\nno-hosts\naddn-hosts=%s\nlocal=/lab.test/\nlisten-address=%s\nbind-interfaces\nedns-packet-max=4096\nlocal-ttl=5\ncache-size=10000\n", hostsFile, addr)
	t.must("dnsmasq", os.WriteFile(confFile, []byte(conf.String()), 0o644))
	cmd := s.Outside.Command("dnsmasq", "--keep-in-foreground", "--conf-file="+confFile, "--pid-file=", "--log-facility=-", "--user=", "--group=")
	said := new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = said, said
	if err := s.Outside.Start(cmd); err != nil {
		t.Fatalf("%v: sudo apt-get install -y --no-install-recommends dnsmasq-base", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		if t.Failed() {
			t.Logf("dnsmasq said: %.2000s", said)
		}
	})
	lab.EventuallyWithin(t, 10*time.Second, "dnsmasq answers", func() bool {
		m, err := s.Outside.Resolve("tcp4", at(addr, 53), "host-1.lab.test.", dns.TypeA)
		return err == nil && len(m.Answer) == 1
	})
}

func loadDNS(t *trial, s *site) {
	s.dnsmasq(t, lab.RouterAddr)
	b := s.box(t)
	var all []question
	for i := range namesOfEach {
		host, text, none := fmt.Sprintf("host-%d.lab.test.", i), fmt.Sprintf("text-%d.lab.test.", i), fmt.Sprintf("none-%d.lab.test.", i)
		all = append(all,
			question{"udp4", host, dns.TypeA, i%2 == 0}, question{"udp4", host, dns.TypeAAAA, false}, question{"udp4", text, dns.TypeTXT, i%2 == 0},
			question{"udp4", none, dns.TypeA, false}, question{"tcp4", host, dns.TypeA, false})
	}
	var again atomic.Int64
	newAsker := func(from *lab.Space, to netip.Addr) *asker {
		c, err := from.DialContext(t.Context(), "udp", at(to, 53).String())
		t.must("socket", err)
		t.Cleanup(func() { c.Close() })
		return &asker{from: from, to: at(to, 53), udp: c}
	}
	direct := newAsker(s.h.Space, lab.RouterAddr)
	want := make([]string, len(all))
	for i, q := range all {
		m, err := direct.ask(t.Context(), q, &again)
		t.must("direct answer", err)
		want[i] = answerText(m)
	}
	again.Store(0)
	free := make(chan *asker, askers)
	for range askers {
		free <- newAsker(b.Space, b.gateway)
	}
	begin := time.Now()
	errs := inParallel(t, askers, questions, func(i int) error {
		a := <-free
		defer func() { free <- a }()
		at := i % len(all)
		m, err := a.ask(t.Context(), all[at], &again)
		if err != nil {
			return fmt.Errorf("%+v: %w", all[at], err)
		}
		if got := answerText(m); got != want[at] {
			return fmt.Errorf("%+v: %w:\n%.300s\nfor\n%.300s", all[at], errMismatch, got, want[at])
		}
		return nil
	})
	if len(errs) > 0 {
		t.Fatalf("%d questions fail, the first: %v", len(errs), errs[0])
	}
	note("%d questions, %d at a time: %.0f a second, %d asked again", questions, askers, questions/time.Since(begin).Seconds(), again.Load())
}
