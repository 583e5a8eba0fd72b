// Tests of what single containers may reach and who may reach them: every door that is closed stays so, every one that is opened works,
// over a restart of the daemon too.

package test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// Ways through a door: to the HTTP server and the UDP server of a member, and ping.
const (
	byTCP  = "TCP"
	byUDP  = "UDP"
	byPing = "ping"
)

// door is a way from a container to an address.
type door struct {
	from *member
	to   netip.Addr
	by   string
	open bool
}

func (d door) String() string { return fmt.Sprintf("%s from %s to %v", d.by, d.from.Name, d.to) }

// passes tries it.
func (d door) passes() bool {
	switch d.by {
	case byTCP:
		return answersHTTP(d.from.Space, port(d.to, 8080))
	case byUDP:
		return answersUDP(d.from.Space, port(d.to, 9000))
	}
	r, err := d.from.PingWith(d.to, lab.PingOptions{Count: 3, Interval: 50 * time.Millisecond})
	return err == nil && r.Received > 0
}

func answersHTTP(from *lab.Space, addr netip.AddrPort) bool {
	client := from.HTTPClient()
	client.Timeout = 4 * time.Second
	resp, err := client.Get("http://" + addr.String() + "/")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return true
}

func answersUDP(from *lab.Space, addr netip.AddrPort) bool {
	conn, err := from.DialContext(context.Background(), "udp", addr.String())
	if err != nil {
		return false
	}
	defer conn.Close()
	for range 3 {
		_, _ = conn.Write([]byte("x"))
		_ = conn.SetReadDeadline(time.Now().Add(700 * time.Millisecond))
		if _, err := conn.Read(make([]byte, 10)); err == nil {
			return true
		}
	}
	return false
}

// try tries all doors at once.
func try(t *testing.T, when string, doors []door) {
	t.Helper()
	got := make([]bool, len(doors))
	var wg sync.WaitGroup
	for i, d := range doors {
		wg.Go(func() { got[i] = d.passes() })
	}
	wg.Wait()
	for i, d := range doors {
		if got[i] != d.open {
			t.Errorf("%s: %v: open %v, want %v", when, d, got[i], d.open)
		}
	}
}

// doors are all ways from a member to another, open as those in the list are, written "TCP 4" or "ping 6".
func doors(from, to *member, open ...string) (list []door) {
	for _, addr := range to.addrs() {
		family := " 4"
		if addr.Is6() {
			family = " 6"
		}
		for _, by := range []string{byTCP, byUDP, byPing} {
			list = append(list, door{from, addr, by, slices.Contains(open, by+family)})
		}
	}
	return list
}

var everyDoor = []string{"TCP 4", "UDP 4", "ping 4", "TCP 6", "UDP 6", "ping 6"}

func TestPolicy_BetweenContainers(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	up := func(h *lab.Host) *lab.Daemon { return h.Up("--etcd-endpoints", e.Endpoint) }
	d1, d2 := up(h1), up(h2)
	waitPeers(t, 1, d1, d2)
	b, c := join(t, h1, "b"), join(t, h2, "c")
	alone := join(t, h1, "alone", "--isolate")
	server := join(t, h1, "server", "--allow-from", fmt.Sprintf("%v:8080/tcp,[%v]:9000/udp", c.addr, c.addr6), "--allow-from", b.addr.String()+"/icmp")
	client := join(t, h2, "client", "--isolate", "--allow-to", fmt.Sprintf("%v:9000,[%v]:8080-8081/tcp,%v/icmp", b.addr, b.addr6, b.addr6))
	for _, m := range []*member{b, c, alone, server, client} {
		m.serve(t)
	}
	l.Outside.HTTPServer(t, port(lab.OutsideAddr, 8080))
	all := slices.Concat(
		doors(alone, b), doors(b, alone), doors(alone, c), doors(c, alone), doors(alone, server), doors(client, alone),
		doors(b, c, everyDoor...), doors(c, b, everyDoor...),
		doors(c, server, "TCP 4", "UDP 6"), doors(b, server, "ping 4"), doors(client, server),
		doors(server, b, everyDoor...), doors(server, c, everyDoor...), doors(server, client),
		doors(client, b, "UDP 4", "TCP 6", "ping 6"), doors(b, client), doors(client, c), doors(c, client),
		[]door{
			{alone, alone.gateway, byPing, true}, {alone, alone.gateway6, byPing, true}, // our own gateway is no other container
			{alone, client.gateway, byPing, false}, {alone, client.gateway6, byPing, false}, // another node's is
			{alone, lab.OutsideAddr, byTCP, true}, {alone, lab.OutsideAddr, byPing, true}, {client, lab.OutsideAddr, byTCP, true},
		},
	)
	try(t, "at first", all)
	if d1.Drops("policy-denied") == 0 || d2.Drops("policy-denied") == 0 {
		t.Errorf("refusals are not counted: %v, %v", d1.Status().Counters["drops"], d2.Status().Counters["drops"])
	}

	t.Run("who is refused is told", func(t *testing.T) {
		for _, tt := range []struct {
			from *member
			to   netip.Addr
			want [2]byte
		}{
			{alone, c.addr, [2]byte{3, 13}}, {alone, c.addr6, [2]byte{1, 1}},
			{c, alone.addr, [2]byte{3, 13}}, {c, alone.addr6, [2]byte{1, 1}},
			{b, alone.addr, [2]byte{3, 13}}, {client, server.addr, [2]byte{3, 13}},
			{alone, netip.MustParseAddr("10.66.255.77"), [2]byte{3, 13}}, // nobody's, as everybody's
		} {
			r, err := tt.from.PingWith(tt.to, lab.PingOptions{Count: 3, Interval: 100 * time.Millisecond})
			if err != nil || r.Received != 0 || len(r.Errors) == 0 || [2]byte{r.Errors[0].Type, r.Errors[0].Code} != tt.want {
				t.Errorf("%s to %v: %v, %v; want ICMP errors %v", tt.from.Name, tt.to, r, err, tt.want)
			}
		}
	})
	t.Run("large transfers and datagrams", func(t *testing.T) {
		const size = 20 << 20
		if err := c.Upload(port(server.addr, 8080), size); err != nil {
			t.Errorf("upload to the server: %v", err)
		}
		if err := client.Download(port(b.addr6, 8080), size); err != nil {
			t.Errorf("download by the client: %v", err)
		}
		for _, n := range []int{dualMTU, 9000, 65507} {
			if err := client.EchoUDP(port(b.addr, 9000), n); err != nil {
				t.Errorf("UDP of %d bytes: %v", n, err)
			}
			if err := c.EchoUDP(port(server.addr6, 9000), n); err != nil {
				t.Errorf("UDP of %d bytes, IPv6: %v", n, err)
			}
		}
	})
	t.Run("in ps", func(t *testing.T) {
		r := h1.CLI("ps")
		for _, words := range []string{"isolate", "from 3"} {
			if !strings.Contains(r.Stdout, words) {
				t.Errorf("ps does not say %q:\n%s", words, r.Stdout)
			}
		}
		var list []struct {
			Name      string            `json:"name"`
			Isolate   bool              `json:"isolate"`
			AllowFrom []string          `json:"allow_from"`
			Counters  map[string]uint64 `json:"counters"`
		}
		h1.CLIJSON(&list, "ps")
		for _, a := range list {
			if a.Isolate != (a.Name == "alone") || len(a.AllowFrom) != map[string]int{"server": 3}[a.Name] || (a.Counters["policy_denied"] == 0) != (a.Name == "b") {
				t.Errorf("ps: %+v", a)
			}
		}
	})

	d1.Kill()
	d2.Kill()
	d1, d2 = up(h1), up(h2)
	waitPeers(t, 1, d1, d2)
	for _, d := range []*lab.Daemon{d1, d2} {
		lab.Eventually(t, "the containers are taken up again", func() bool { return len(d.Attachments()) == map[string]int{"h1": 3, "h2": 2}[d.Host.Name] })
	}
	try(t, "after the daemons were killed", all)

	h1.CLI("detach", "alone")
	again := attach(t, alone.Container)
	again.serve(t)
	try(t, "attached again without a policy", slices.Concat(doors(again, b, everyDoor...), doors(c, again, everyDoor...)))
}

// A connection that is open when the daemon dies goes on with the next.
func TestPolicy_ConnectionsOutliveTheDaemon(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	b := join(t, s.h1, "b")
	a := join(t, s.h2, "a", "--isolate", "--allow-to", b.addr.String()+":7/tcp")
	ln, err := b.Listen("tcp4", port(b.addr, 7).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		buf := make([]byte, 100)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			if _, err := conn.Write(buf[:n]); err != nil {
				return
			}
		}
	}()
	conn, err := a.DialContext(t.Context(), "tcp4", port(b.addr, 7).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	said := func(when string) {
		t.Helper()
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err := conn.Write([]byte(when)); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if n, err := conn.Read(make([]byte, 100)); err != nil || n != len(when) {
			t.Fatalf("%s: %d bytes came back, %v", when, n, err)
		}
	}
	said("before")
	s.d2.Kill()
	s.d2 = s.h2.Up("--etcd-endpoints", etcdURL(s.h1))
	said("after")
}

func TestPolicy_Egress(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 2)
	h1 := l.Host(1)
	d1, d2 := h1.Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	open := join(t, h1, "open")
	none := join(t, h1, "none", "--egress", "deny")
	some := join(t, h1, "some", "--egress", lab.OutsideAddr.String()+"/32,"+lab.RouterAddr6.String())
	wide := join(t, h1, "wide", "--egress", "0.0.0.0/0,::/0")
	c := join(t, l.Host(2), "c")
	c.serve(t)
	for _, a := range []netip.Addr{lab.OutsideAddr, lab.RouterAddr, lab.OutsideAddr6, lab.RouterAddr6, lab.MetadataAddr} {
		l.Outside.HTTPServer(t, port(a, 8080))
		l.Outside.UDPEcho(t, port(a, 9000))
	}
	var list []door
	to := func(from *member, a netip.Addr, open bool) {
		for _, by := range []string{byTCP, byUDP, byPing} {
			list = append(list, door{from, a, by, open})
		}
	}
	for _, a := range []netip.Addr{lab.OutsideAddr, lab.RouterAddr, lab.OutsideAddr6, lab.RouterAddr6} {
		to(open, a, true)
		to(wide, a, true)
		to(none, a, false)
		to(some, a, a == lab.OutsideAddr || a == lab.RouterAddr6)
	}
	for _, m := range []*member{open, wide, none, some} {
		to(m, lab.MetadataAddr, false)
	}
	all := slices.Concat(list, doors(none, c, everyDoor...), doors(some, c, everyDoor...), []door{{none, none.gateway, byPing, true}})
	try(t, "egress", all)

	r, err := none.PingWith(lab.OutsideAddr, lab.PingOptions{Count: 2, Interval: 100 * time.Millisecond})
	if err != nil || len(r.Errors) == 0 || r.Errors[0].Type != 3 || r.Errors[0].Code != 13 {
		t.Errorf("ping of the outside: %v, %v; want admin-prohibited (3, 13)", r, err)
	}
	for _, ttl := range []int{1, 2} { // traceroute gets no further
		r, err := none.PingWith(lab.OutsideAddr, lab.PingOptions{Count: 2, TTL: ttl, Interval: 100 * time.Millisecond})
		if err != nil || slices.ContainsFunc(r.Errors, func(e lab.ICMPError) bool { return e.From == lab.RouterAddr }) {
			t.Errorf("TTL %d: %v, %v", ttl, r, err)
		}
	}
	if d1.Drops("gateway-egress-denied") == 0 {
		t.Errorf("refusals are not counted: %v", d1.Status().Counters["drops"])
	}

	t.Run("names", func(t *testing.T) {
		l.Outside.DNSServer(t, port(lab.RouterAddr, 53), map[string]netip.Addr{"outside.lab.test.": lab.OutsideAddr})
		for m, want := range map[*member]int{open: dns.RcodeSuccess, some: dns.RcodeSuccess, none: dns.RcodeRefused} {
			answer, err := m.Resolve("udp4", port(m.gateway, 53), "outside.lab.test.", dns.TypeA)
			if err != nil || answer.Rcode != want {
				t.Errorf("%s: %v, %v; want %s", m.Name, answer, err, dns.RcodeToString[want])
			}
		}
		// Another node's resolver is no way out.
		conn, err := none.DialContext(t.Context(), "udp4", port(c.gateway, 53).String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		query, err := new(dns.Msg).SetQuestion("outside.lab.test.", dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write(query)
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		if n, err := conn.Read(make([]byte, 2000)); err == nil {
			t.Errorf("another node's resolver answers with %d bytes", n)
		}
	})

	d1.Kill()
	d1 = h1.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	try(t, "after the daemon was killed", all)
}

func TestPolicy_HostAccess(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 2)
	h1 := l.Host(1)
	d1, d2 := h1.Up("--etcd-endpoints", e.Endpoint), l.Host(2).Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	loopback, loopback6 := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	for _, a := range []netip.Addr{loopback, loopback6} {
		h1.HTTPServer(t, port(a, 8080))
		h1.UDPEcho(t, port(a, 9000))
	}
	h1.HTTPServer(t, port(loopback, 8081))
	h1.HTTPServer(t, port(loopback, 8082))
	a := join(t, h1, "a", "--host-access", "8080,9000,8082", "--egress", "deny")
	b, c := join(t, h1, "b"), join(t, l.Host(2), "c")
	tryAll := func(when string) {
		t.Helper()
		for _, gateway := range []netip.Addr{a.gateway, a.gateway6} {
			if !answersHTTP(a.Space, port(gateway, 8080)) || !answersUDP(a.Space, port(gateway, 9000)) {
				t.Errorf("%s: the host's ports are closed at %v", when, gateway)
			}
			for _, m := range []*member{b, c} { // c by the gateway of the other node
				if answersHTTP(m.Space, port(gateway, 8080)) || answersUDP(m.Space, port(gateway, 9000)) {
					t.Errorf("%s: the host's ports are open to %s at %v", when, m.Name, gateway)
				}
			}
			closed(t, a.Space, port(gateway, 8081), when+": a port that was not asked for")
		}
		closed(t, a.Space, port(a.gateway6, 8082), when+": a port that nobody listens on at ::1")
		if !answersHTTP(a.Space, port(a.gateway, 8082)) {
			t.Errorf("%s: a port of 127.0.0.1 alone is closed", when)
		}
		closed(t, a.Space, port(c.gateway, 8080), when+": another node's loopback")
		closed(t, a.Space, port(h1.Addr, 8080), when+": the host's address")
	}
	tryAll("at first")
	d1.Kill()
	d1 = h1.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	tryAll("after the daemon was killed")

	if conn, err := a.DialContext(t.Context(), "tcp4", port(a.gateway, 8083).String()); err == nil {
		conn.Close()
		t.Error("a closed port of the gateway accepts")
	} else if !strings.Contains(err.Error(), "refused") {
		t.Errorf("a closed port of the gateway: %v, want connection refused", err)
	}
}

// The store stays closed, whatever a container was given.
func TestPolicy_HostAccessDoesNotOpenTheStore(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	h.Up("--network", network.String()) // the store on 127.0.0.1:2379
	refused(t, h.CLI("run", "--host-access", "2379", "--", "true"), "port 2379", "stays closed")
	a := join(t, h, "a", "--host-access", "2380,8080", "--egress", "0.0.0.0/0")
	h.HTTPServer(t, port(netip.MustParseAddr("127.0.0.1"), 8080))
	if !answersHTTP(a.Space, port(a.gateway, 8080)) {
		t.Error("the port that was opened is closed")
	}
	closed(t, a.Space, port(a.gateway, 2379), "the embedded etcd")
	if conn, err := a.DialContext(t.Context(), "tcp4", port(a.gateway, 2379).String()); err == nil {
		conn.Close()
		t.Error("the embedded etcd accepts connections of containers")
	}
}

func TestPolicy_OfRun(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	upEmbedded(h)
	l.Outside.HTTPServer(t, port(lab.OutsideAddr, 80))
	connect := "exec 3<>/dev/tcp/" + lab.OutsideAddr.String() + "/80"
	if r := h.CLI("run", "--", "bash", "-c", connect); r.Code != 0 {
		t.Fatalf("run without a policy: %+v", r)
	}
	if r := h.CLI("run", "--isolate", "--egress", "deny", "--", "bash", "-c", connect); r.Code == 0 {
		t.Error("run --egress deny reaches the outside")
	}
	refused(t, h.CLI("run", "--host-access", "53", "--", "true"), "resolver")
	refused(t, h.CLI("attach", "--gateway", "--isolate", "1"), "--isolate", "whole subnet")
}

// What clients outside begin through a published port is answered, also by a container that may begin nothing at all.
func TestPolicy_PublishedPortsStayOpen(t *testing.T) {
	t.Parallel()
	for _, flags := range [][]string{nil, {"--snat"}} {
		l := lab.New(t, 1, lab.WithIPv6)
		h := l.Host(1)
		upEmbedded(h)
		a := join(t, h, "a", append(flags, "--isolate", "--egress", "deny", "-p", "8080:8080", "-p", "8080:8080/udp")...)
		a.tellClients(t, 8080)
		for _, network := range []string{"tcp", "udp"} {
			for range 3 {
				if _, seen, err := askWho(t, l.Outside.Space, network, port(h.Addr, 8080)); err != nil || seen == "" {
					t.Errorf("%s, %v: saw %q, %v", network, flags, seen, err)
				}
			}
		}
		// Not even to the same client does it begin anything.
		l.Outside.HTTPServer(t, port(lab.RouterAddr, 8081))
		closed(t, a.Space, port(lab.RouterAddr, 8081), "the outside")
	}
}

// The IPv6 addresses that containers of an IPv4-only overlay have for the outside are no way around.
func TestPolicy_IPv6ForTheOutsideAlone(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1, lab.WithIPv6)
	h := l.Host(1)
	upEmbedded(h)
	a, b, none := join(t, h, "a", "--isolate"), join(t, h, "b"), join(t, h, "none", "--egress", "deny")
	for _, m := range []*member{a, b, none} {
		if !m.addr6.IsValid() {
			t.Fatalf("%s has no IPv6 address", m.Name)
		}
		m.serve(t)
	}
	l.Outside.HTTPServer(t, port(lab.OutsideAddr6, 8080))
	try(t, "IPv6 for the outside", slices.Concat(
		doors(a, b), doors(b, a), doors(none, b, everyDoor...), doors(b, none, everyDoor...),
		[]door{
			{a, lab.OutsideAddr6, byTCP, true}, {a, lab.OutsideAddr6, byPing, true},
			{none, lab.OutsideAddr6, byTCP, false}, {none, lab.OutsideAddr6, byPing, false},
		},
	))
}
