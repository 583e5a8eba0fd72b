// This file is the cases of names: those of the overlay, and those that the host's resolvers know.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

var nameCases = []testCase{
	{name: "names/everywhere", about: "a container's name is known on every node within a second of attach, A, AAAA and PTR", run: namesEverywhere},
	{name: "names/detached", about: "it is gone everywhere within two seconds of detach", run: namesDetached},
	{name: "names/node-stops", about: "the names of a node that stops are gone within two seconds", limit: 60 * time.Second, run: namesNodeStops},
	{name: "names/node-dies", about: "the names of a node that dies are gone when its lease ends", limit: 90 * time.Second, run: namesNodeDies},
	{name: "names/alias", about: "an alias of several containers answers with all of them, in turns", run: namesAlias},
	{name: "names/taken", about: "a name that another node has is refused, with who has it", run: namesTaken},
	{name: "names/host-and-gateway", about: "host and gateway are the asking container's gateway", run: namesReserved},
	{name: "names/unknown", about: "an unknown name of the domain is NXDOMAIN, and no resolver of the host is asked", run: namesUnknown},
	{name: "names/search", about: "run gives its command a resolv.conf with gateway, domain and the host's search domains", run: namesSearch},
	{name: "dns/forwarded", about: "names of the host's resolver, by UDP and TCP; NXDOMAIN passes", run: dnsForwarded},
	{name: "dns/truncated", about: "a long answer is truncated by UDP, whole by TCP", run: dnsTruncated},
	{name: "dns/edns", about: "a long answer comes by UDP to who says by EDNS that it fits", run: dnsEDNS},
	{name: "dns/cache", about: "a second question within the TTL is not asked again, and its TTL runs down", run: dnsCache},
	{name: "dns/follows-resolv-conf", about: "a new /etc/resolv.conf of the host is followed", run: dnsFollows},
	{name: "dns/stub", about: "a resolver on the host's loopback, as systemd-resolved is, is asked", run: dnsStub},
	{name: "dns/dead-resolver", about: "a resolver that does not answer is passed over", run: dnsDead},
}

const domain = ".ovl.internal."

// ask asks a container's gateway.
func ask(b *box, network, name string, kind uint16) (*dns.Msg, error) {
	return b.Resolve(network, at(b.gateway, 53), name, kind)
}

// addrsOf are the A and AAAA records of an answer.
func addrsOf(m *dns.Msg) []netip.Addr {
	var addrs []netip.Addr
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			a, _ := netip.AddrFromSlice(rr.A)
			addrs = append(addrs, a.Unmap())
		case *dns.AAAA:
			a, _ := netip.AddrFromSlice(rr.AAAA)
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// knows says whether the name leads to exactly these addresses, in any order.
func knows(b *box, name string, want ...netip.Addr) error {
	m, err := ask(b, "udp4", name, dns.TypeA)
	if err != nil {
		return err
	}
	got := addrsOf(m)
	slices.SortFunc(got, netip.Addr.Compare)
	slices.SortFunc(want, netip.Addr.Compare)
	if m.Rcode != dns.RcodeSuccess || !slices.Equal(got, want) {
		return fmt.Errorf("%s: %s, %v; want %v", name, dns.RcodeToString[m.Rcode], got, want)
	}
	return nil
}

func gone(b *box, name string) error {
	m, err := ask(b, "udp4", name, dns.TypeA)
	if err == nil && m.Rcode != dns.RcodeNameError {
		err = fmt.Errorf("%s: %s, %v; want NXDOMAIN", name, dns.RcodeToString[m.Rcode], addrsOf(m))
	}
	return err
}

// soon fails the trial unless fn says nil within the limit, which the project promises.
func soon(t *trial, limit time.Duration, what string, fn func() error) {
	begin := time.Now()
	var err error
	lab.EventuallyWithinOr(t, limit, func() string { return fmt.Sprintf("%s: %v", what, err) }, func() bool {
		err = fn()
		return err == nil
	})
	t.Logf("%s after %v", what, time.Since(begin).Round(time.Millisecond))
}

func namesEverywhere(t *trial, s *site) {
	near, far := join(t, s.h, "names-near"), join(t, s.h2, "names-far")
	web := join(t, s.h, "names-web")
	soon(t, time.Second, "known on the other node", func() error { return knows(far, "names-web"+domain, web.addr) })
	soon(t, time.Second, "known on the same node", func() error { return knows(near, "names-web"+domain, web.addr) })
	t.check("with capitals", knows(far, "Names-WEB"+domain, web.addr))
	t.check("itself", knows(web, "names-web"+domain, web.addr))
	for _, b := range []*box{near, far} {
		m, err := ask(b, "udp4", "names-web"+domain, dns.TypeAAAA)
		if err != nil || m.Rcode != dns.RcodeSuccess {
			t.Errorf("AAAA: %v, %v; want no error", m, err)
		}
		reverse, err := dns.ReverseAddr(web.addr.String())
		t.must("reverse", err)
		m, err = ask(b, "udp4", reverse, dns.TypePTR)
		if err != nil || len(m.Answer) != 1 || !strings.HasSuffix(m.Answer[0].String(), "names-web"+domain) {
			t.Errorf("PTR: %v, %v", m, err)
		}
	}
	if r, err := far.Ping(web.addr, 3); err != nil || r.Lost() != 0 {
		t.Errorf("ping of what the name leads to: %v, %v", r, err)
	}
}

func namesDetached(t *trial, s *site) {
	far := join(t, s.h2, "names-far")
	web := join(t, s.h, "names-web")
	soon(t, 5*time.Second, "known", func() error { return knows(far, "names-web"+domain, web.addr) })
	ok(t, s.h.CLI("detach", web.Name))
	soon(t, 2*time.Second, "gone", func() error { return gone(far, "names-web"+domain) })
}

// ending is a lab with a node that is about to end; the store is another host's.
func ending(t *trial) (other *box, d *lab.Daemon) {
	l := lab.New(t, 2)
	e := l.Outside.Etcd(nil, false)
	up := []string{"--etcd-endpoints", e.Endpoint, "--network", overlayNet}
	d = l.Host(1).Up(up...)
	l.Host(2).Up(up...)
	other = join(t, l.Host(2), "other")
	web := join(t, l.Host(1), "web")
	soon(t, 5*time.Second, "known", func() error { return knows(other, "web"+domain, web.addr) })
	return other, d
}

func namesNodeStops(t *trial, _ *site) {
	other, d := ending(t)
	d.Stop()
	soon(t, 2*time.Second, "gone", func() error { return gone(other, "web"+domain) })
}

func namesNodeDies(t *trial, _ *site) {
	other, d := ending(t)
	d.Kill()
	soon(t, 45*time.Second, "gone", func() error { return gone(other, "web"+domain) })
}

func namesAlias(t *trial, s *site) {
	asks := join(t, s.h2, "names-asks")
	a := join(t, s.h, "db-1", "--alias", "db")
	b := join(t, s.h2, "db-2", "--alias", "db")
	soon(t, 5*time.Second, "both", func() error { return knows(asks, "db"+domain, a.addr, b.addr) })
	first := map[netip.Addr]int{}
	for range 20 {
		m, err := ask(asks, "udp4", "db"+domain, dns.TypeA)
		t.must("ask", err)
		if addrs := addrsOf(m); len(addrs) > 0 {
			first[addrs[0]]++
		}
	}
	if len(first) != 2 {
		t.Errorf("first of 20 answers: %v; want both in turns", first)
	}
	ok(t, s.h.CLI("detach", "db-1"))
	soon(t, 2*time.Second, "one is left", func() error { return knows(asks, "db"+domain, b.addr) })
}

func namesTaken(t *trial, s *site) {
	join(t, s.h, "only-one")
	c := s.h2.Container("only-one")
	refused(t, s.h2.CLI("attach", fmt.Sprint(c.PID), "--name", "only-one"), "only-one", s.h.Addr.String())
	if all, err := c.Interfaces(); err != nil || len(all) != 0 {
		t.Errorf("the container whose name was refused is left with %v, %v", all, err)
	}
}

func namesReserved(t *trial, s *site) {
	a, b := join(t, s.h, "names-a"), join(t, s.h2, "names-b")
	for _, c := range []*box{a, b} {
		for _, name := range []string{"host", "gateway"} {
			t.check(c.Name, knows(c, name+domain, c.gateway))
		}
	}
	c := s.h.Container("gateway")
	refused(t, s.h.CLI("attach", fmt.Sprint(c.PID), "--name", "gateway"), "gateway")
}

func namesUnknown(t *trial, s *site) {
	asked := s.resolver(t)
	b := s.box(t)
	t.check("unknown", gone(b, "nobody"+domain))
	if n := asked.Load(); n != 0 {
		t.Errorf("the host's resolver was asked %d times", n)
	}
}

// resolver is the resolver of the site's host for the time of a trial: the outside's router, as a lab's resolv.conf says. It knows
// name.lab.test and big.lab.test; the count is of what it was asked.
func (s *site) resolver(t *trial) *atomic.Int64 {
	return resolverAt(t, s.Outside.Space, at(lab.RouterAddr, 53))
}

func resolverAt(t *trial, space *lab.Space, addr netip.AddrPort) *atomic.Int64 {
	asked := new(atomic.Int64)
	handle := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Add(1)
		m := new(dns.Msg)
		m.SetReply(q)
		name := q.Question[0].Name
		switch {
		case name == "big.lab.test.":
			bigAnswer(m, w, q)
		case strings.HasSuffix(name, "name.lab.test.") && q.Question[0].Qtype == dns.TypeA:
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: lab.OutsideAddr.AsSlice()}}
		case strings.HasSuffix(name, "name.lab.test."):
		default:
			m.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(m)
	})
	packet, err := space.ListenPacket("udp4", addr.String())
	t.must("resolver", err)
	stream, err := space.Listen("tcp4", addr.String())
	t.must("resolver", err)
	var serving sync.WaitGroup
	for _, server := range []*dns.Server{{PacketConn: packet, Handler: handle}, {Listener: stream, Handler: handle}} {
		serving.Go(func() { _ = server.ActivateAndServe() })
	}
	t.Cleanup(func() {
		packet.Close()
		stream.Close()
		serving.Wait() // while they read, the address is in use
	})
	return asked
}

// bigAnswer is 2,000 bytes of text, truncated for who cannot take it.
func bigAnswer(m *dns.Msg, w dns.ResponseWriter, q *dns.Msg) {
	txt := &dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}}
	for range 10 {
		txt.Txt = append(txt.Txt, strings.Repeat("x", 200))
	}
	m.Answer = []dns.RR{txt}
	size := dns.MinMsgSize
	if o := q.IsEdns0(); o != nil {
		size = int(o.UDPSize())
		m.SetEdns0(4096, false)
	}
	if w.LocalAddr().Network() == "udp" {
		m.Truncate(size)
	}
}

func dnsForwarded(t *trial, s *site) {
	s.resolver(t)
	b := s.box(t)
	for _, network := range []string{"udp4", "tcp4"} {
		m, err := ask(b, network, "name.lab.test.", dns.TypeA)
		if err != nil || !slices.Equal(addrsOf(m), []netip.Addr{lab.OutsideAddr}) {
			t.Errorf("%s: %v, %v; want %s", network, m, err, lab.OutsideAddr)
		}
		m, err = ask(b, network, "nowhere.lab.test.", dns.TypeA)
		if err != nil || m.Rcode != dns.RcodeNameError {
			t.Errorf("%s: %v, %v; want NXDOMAIN", network, m, err)
		}
	}
}

func dnsTruncated(t *trial, s *site) {
	s.resolver(t)
	b := s.box(t)
	if m, err := ask(b, "udp4", "big.lab.test.", dns.TypeTXT); err != nil || !m.Truncated {
		t.Errorf("by UDP: %v, %v; want it truncated", m, err)
	}
	if m, err := ask(b, "tcp4", "big.lab.test.", dns.TypeTXT); err != nil || m.Truncated || len(m.Answer) != 1 {
		t.Errorf("by TCP: %v, %v; want it whole", m, err)
	}
}

func dnsEDNS(t *trial, s *site) {
	s.resolver(t)
	b := s.box(t)
	q := new(dns.Msg)
	q.SetQuestion("big.lab.test.", dns.TypeTXT)
	q.SetEdns0(4096, false)
	m, err := query(t.Context(), b.Space, "udp4", at(b.gateway, 53), q)
	if err != nil || m.Truncated || len(m.Answer) != 1 || m.IsEdns0() == nil {
		t.Errorf("%v, %v; want it whole, with EDNS", m, err)
	}
}

// query sends one question from a space.
func query(ctx context.Context, from *lab.Space, network string, to netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	conn, err := from.DialContext(ctx, network, to.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return queryOn(conn, q)
}

func queryOn(conn net.Conn, q *dns.Msg) (*dns.Msg, error) {
	c := &dns.Conn{Conn: conn, UDPSize: 4096}
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if err := c.WriteMsg(q); err != nil {
		return nil, err
	}
	m, err := c.ReadMsg()
	if err == nil && m.Id != q.Id {
		err = errors.New("the answer is to another question")
	}
	return m, err
}

func dnsCache(t *trial, s *site) {
	asked := s.resolver(t)
	b := s.box(t)
	ttl := func() uint32 {
		m, err := ask(b, "udp4", "cached.name.lab.test.", dns.TypeA)
		if err != nil || len(m.Answer) != 1 {
			t.Fatalf("%v, %v; want an answer", m, err)
		}
		return m.Answer[0].Header().Ttl
	}
	first := ttl()
	time.Sleep(1100 * time.Millisecond)
	if second := ttl(); first > 60 || second >= first {
		t.Errorf("TTL %d, then %d; want it to run down from 60", first, second)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the resolver was asked %d times, want once", n)
	}
}

func dnsFollows(t *trial, s *site) {
	resolverAt(t, s.Outside.Space, at(lab.OutsideAddr, 53))
	b := s.box(t)
	s.h.SetResolvConf("nameserver " + lab.OutsideAddr.String() + "\n")
	t.Cleanup(func() { s.h.SetResolvConf("nameserver " + lab.RouterAddr.String() + "\n") })
	lab.EventuallyWithin(t, 15*time.Second, "the gateway asks the new resolver", func() bool {
		m, err := ask(b, "udp4", "new.name.lab.test.", dns.TypeA)
		return err == nil && len(m.Answer) == 1
	})
}

func dnsStub(t *trial, _ *site) {
	l := lab.New(t, 1)
	h := l.Host(1)
	// Who may serve port 53 is root's on a real host.
	t.must("port 53", h.Sysctl("net/ipv4/ip_unprivileged_port_start", "53"))
	stub := netip.MustParseAddr("127.0.0.53")
	resolverAt(t, h.Space, at(stub, 53))
	h.SetResolvConf("nameserver " + stub.String() + "\noptions edns0 trust-ad\n")
	h.Up("--listen-etcd", h.Addr.String()+":2379", "--network", overlayNet)
	b := join(t, h, "a")
	if m, err := ask(b, "udp4", "name.lab.test.", dns.TypeA); err != nil || len(m.Answer) != 1 {
		t.Errorf("%v, %v; want an answer", m, err)
	}
}

func dnsDead(t *trial, s *site) {
	s.resolver(t)
	s.h.SetResolvConf("nameserver " + lab.OutsideAddr.String() + "\nnameserver " + lab.RouterAddr.String() + "\n")
	t.Cleanup(func() { s.h.SetResolvConf("nameserver " + lab.RouterAddr.String() + "\n") })
	b := s.box(t)
	lab.EventuallyWithin(t, 15*time.Second, "the second resolver is asked", func() bool {
		m, err := ask(b, "udp4", "dead.name.lab.test.", dns.TypeA)
		return err == nil && len(m.Answer) == 1
	})
}

func namesSearch(t *trial, s *site) {
	s.h.SetResolvConf("nameserver " + lab.RouterAddr.String() + "\nsearch corp.lab.test\n")
	t.Cleanup(func() { s.h.SetResolvConf("nameserver " + lab.RouterAddr.String() + "\n") })
	var text string
	lab.EventuallyWithinOr(t, 10*time.Second, func() string { return "gateway, domain and search domain in:\n" + text }, func() bool {
		text = ok(t, s.h.CLI("run", "--", "cat", "/etc/resolv.conf")).Stdout
		return strings.Contains(text, "nameserver "+s.d.Status().Gateway) && strings.Contains(text, "ovl.internal") && strings.Contains(text, "corp.lab.test")
	})
}
