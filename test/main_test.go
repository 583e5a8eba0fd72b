// This file is what the tests share: entry, two nodes with containers, attaching, expectations.

package test

import (
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVar); role != "" {
		os.Exit(play(role, os.Args[1:]))
	}
	os.Exit(lab.Main(m.Run, ciFiles...))
}

// network is the overlay's network in most tests; its subnets are /24.
var network = netip.MustParsePrefix("10.66.0.0/16")

// overlayMTU is the LAN's MTU without an IPv4 and a UDP header.
const overlayMTU = lab.MTU - 20 - 8

// site is two nodes: the first runs the embedded etcd, the second joins it.
type site struct {
	*lab.Lab
	h1, h2 *lab.Host
	d1, d2 *lab.Daemon
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{Lab: lab.New(t, 2)}
	s.h1, s.h2 = s.Host(1), s.Host(2)
	s.d1 = upEmbedded(s.h1)
	s.d2 = s.h2.Up("--etcd-endpoints", etcdURL(s.h1))
	waitPeers(t, 1, s.d1, s.d2)
	return s
}

func etcdURL(h *lab.Host) string { return "http://" + h.Addr.String() + ":2379" }

// upEmbedded starts a node with an embedded etcd that the LAN may join.
func upEmbedded(h *lab.Host, args ...string) *lab.Daemon {
	return h.Up(append([]string{"--listen-etcd", h.Addr.String() + ":2379", "--network", network.String()}, args...)...)
}

func waitPeers(t *testing.T, n int, daemons ...*lab.Daemon) {
	t.Helper()
	for _, d := range daemons {
		lab.Eventually(t, d.Host.Name+" knows "+strconv.Itoa(n)+" peers", func() bool { return d.Status().Peers == n })
	}
}

// lone is one node with one container.
func lone(t *testing.T) (*lab.Lab, *member) {
	t.Helper()
	l := lab.New(t, 1)
	upEmbedded(l.Host(1))
	return l, join(t, l.Host(1), "a")
}

// closed fails the test if a TCP connection comes about and the server answers.
func closed(t *testing.T, from *lab.Space, addr netip.AddrPort, what string) {
	t.Helper()
	client := from.HTTPClient()
	client.Timeout = 3 * time.Second
	resp, err := client.Get("http://" + addr.String() + "/")
	if err == nil {
		resp.Body.Close()
		t.Errorf("%s (%s) is open to containers", what, addr)
	}
}

// member is a container on the overlay.
type member struct {
	*lab.Container
	addr    netip.Addr
	subnet  netip.Prefix
	gateway netip.Addr
	at      lab.Attachment

	// of a dual-stack network
	addr6    netip.Addr
	subnet6  netip.Prefix
	gateway6 netip.Addr
}

// join starts a container and attaches it, with further flags of attach.
func join(t *testing.T, h *lab.Host, name string, flags ...string) *member {
	t.Helper()
	return attach(t, h.Container(name), flags...)
}

func attach(t *testing.T, c *lab.Container, flags ...string) *member {
	t.Helper()
	m := &member{Container: c}
	c.Host.CLIJSON(&m.at, append([]string{"attach", strconv.Itoa(c.PID), "--name", c.Name}, flags...)...)
	m.read(t)
	return m
}

func (m *member) read(t *testing.T) {
	t.Helper()
	prefix, err := netip.ParsePrefix(m.at.Addr)
	if err != nil {
		t.Fatalf("attach of %s printed the address %q: %v", m.Name, m.at.Addr, err)
	}
	m.addr, m.subnet = prefix.Addr(), prefix.Masked()
	if m.gateway, err = netip.ParseAddr(m.at.Gateway); err != nil {
		t.Fatalf("attach of %s printed the gateway %q: %v", m.Name, m.at.Gateway, err)
	}
	if m.at.Addr6 != "" {
		prefix := mustPrefix(t, m.at.Addr6)
		m.addr6, m.subnet6 = prefix.Addr(), prefix.Masked()
		if m.gateway6, err = netip.ParseAddr(m.at.Gateway6); err != nil {
			t.Fatalf("attach of %s printed the IPv6 gateway %q: %v", m.Name, m.at.Gateway6, err)
		}
	}
}

// router is the member's gateway of the family of an address.
func (m *member) router(like netip.Addr) netip.Addr {
	if like.Is6() {
		return m.gateway6
	}
	return m.gateway
}

// echoHeaders are the IP and ICMP headers of an echo request to the address, in bytes. UDP's is as long as ICMP's.
func echoHeaders(to netip.Addr) int {
	if to.Is6() {
		return 40 + 8
	}
	return 20 + 8
}

// pings fails the test unless every echo comes back.
func pings(t *testing.T, from *lab.Space, to netip.Addr) {
	t.Helper()
	r, err := from.Ping(to, 5)
	if err != nil || r.Lost() != 0 {
		t.Errorf("ping %s: %v, %v", to, r, err)
	}
}

// noPing fails the test if an echo comes back.
func noPing(t *testing.T, from *lab.Space, to netip.Addr) {
	t.Helper()
	r, err := from.Ping(to, 3)
	if err != nil || r.Received != 0 {
		t.Errorf("ping %s: %v, %v; want no answer", to, r, err)
	}
}

func port(addr netip.Addr, n uint16) netip.AddrPort { return netip.AddrPortFrom(addr, n) }

func pid(c *lab.Container) string { return strconv.Itoa(c.PID) }

// refused fails the test unless the program ended with an error of one line that holds each of the words.
func refused(t *testing.T, r lab.Result, words ...string) {
	t.Helper()
	if r.Code == 0 {
		t.Errorf("exit code 0, want an error\nstdout: %s\nstderr: %s", r.Stdout, r.Stderr)
		return
	}
	line := strings.TrimSuffix(r.Stderr, "\n")
	if line == "" || strings.Contains(line, "\n") {
		t.Errorf("want one line of error, got %q (stdout %q)", r.Stderr, r.Stdout)
	}
	for _, word := range words {
		if !strings.Contains(strings.ToLower(line), strings.ToLower(word)) {
			t.Errorf("the error does not say %q: %s", word, line)
		}
	}
}

// lastLine is the last line of a daemon's log.
func lastLine(d *lab.Daemon) string {
	lines := strings.Split(strings.TrimSpace(d.LogText()), "\n")
	return lines[len(lines)-1]
}

// upRefused starts a daemon that must end by itself with an error whose last line holds each of the words.
func upRefused(t *testing.T, h *lab.Host, args []string, words ...string) {
	t.Helper()
	d := h.UpNoWait(args...)
	if code := d.Wait(); code <= 0 {
		t.Errorf("up %v: exit code %d, want an error\n%s", args, code, d.LogText())
	}
	for _, word := range words {
		if !strings.Contains(strings.ToLower(lastLine(d)), strings.ToLower(word)) {
			t.Errorf("up %v: the error does not say %q: %s", args, word, lastLine(d))
		}
	}
	if _, err := os.Stat(d.Socket()); err == nil {
		t.Errorf("up %v left its API socket behind", args)
	}
}

// eth0 returns the interface of that name; the test fails when it is not there.
func eth0(t *testing.T, s *lab.Space) lab.Interface {
	t.Helper()
	return iface(t, s, "eth0")
}

func iface(t *testing.T, s *lab.Space, name string) lab.Interface {
	t.Helper()
	all, err := s.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if i.Name == name {
			return i
		}
	}
	t.Fatalf("no interface %s among %v", name, all)
	return lab.Interface{}
}

// noInterface fails the test if the container has any interface but lo.
func noInterface(t *testing.T, s *lab.Space) {
	t.Helper()
	all, err := s.Interfaces()
	if err != nil || len(all) != 0 {
		t.Errorf("the container is left with interfaces %v, %v", all, err)
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

func mustPrefix(t *testing.T, s string) netip.Prefix {
	t.Helper()
	p, err := netip.ParsePrefix(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// lastAddr is the last address of an IPv4 prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	return netip.AddrFrom4(b)
}
