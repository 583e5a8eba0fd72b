// What is dialled for processes of the host, what is not, and what they are told.

package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/proxy"
	"github.com/rootless-ovl/rootless-ovl/stack"
)

// fakeDialer answers for containers.
type fakeDialer struct {
	errs  map[string]error // by address and port; nil is a connection
	calls []string
}

func (d *fakeDialer) DialTCP(_ context.Context, from, to netip.AddrPort) (stack.Conn, error) {
	d.calls = append(d.calls, to.String())
	if from.IsValid() {
		return nil, errors.New("not from the gateway's own address")
	}
	if err := d.errs[to.String()]; err != nil {
		return nil, err
	}
	a, _ := net.Pipe()
	return pipeConn{a}, nil
}

// pipeConn is a stack.Conn that nobody half-closes.
type pipeConn struct{ net.Conn }

func (c pipeConn) CloseRead() error  { return nil }
func (c pipeConn) CloseWrite() error { return c.Close() }

// dialing is a node with one container, web, and a dialer that is not.
func dialing(t *testing.T) (*Node, *fakeDialer) {
	t.Helper()
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	w.start(41)
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 41, Name: "Web"}); err != nil {
		t.Fatal(err)
	}
	d := &fakeDialer{errs: map[string]error{}}
	n.dialer = d
	return n, d
}

func TestDialOverlay_FindsNamesAndAddresses(t *testing.T) {
	n, d := dialing(t)
	web := netip.AddrPortFrom(n.attachments["Web"].saved.Addr.Addr(), 80).String()
	elsewhere := "10.5.90.2:80"
	n.peers = []peer{{way: way{subnet: netip.MustParsePrefix("10.5.90.0/24"), addr: netip.MustParseAddrPort("192.0.2.9:8285")}}}
	for _, host := range []string{"Web", "web", "web.", strings.TrimSuffix(web, ":80"), "::ffff:" + strings.TrimSuffix(web, ":80")} {
		d.calls = nil
		conn, err := n.dialOverlay(t.Context(), host, 80)
		if err != nil || !slices.Equal(d.calls, []string{web}) {
			t.Errorf("%s: dialled %v, %v; want %s", host, d.calls, err, web)
			continue
		}
		conn.Close()
	}
	d.calls = nil
	if _, err := n.dialOverlay(t.Context(), strings.TrimSuffix(elsewhere, ":80"), 80); err != nil || !slices.Equal(d.calls, []string{elsewhere}) {
		t.Errorf("a peer's container: dialled %v, %v", d.calls, err)
	}
}

func TestDialOverlay_RefusesWhatIsNotTheOverlays(t *testing.T) {
	n, d := dialing(t)
	n.peers = []peer{{lease: lease.Lease{Subnet: netip.MustParsePrefix("10.5.90.0/24")}}}
	for _, host := range []string{
		"10.5.90.1", "10.5.90.0", "127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "169.254.169.254", "fd00:ec2::254", "fe80::1%eth0", "192.0.2.1", "224.0.0.1",
		"255.255.255.255", n.own[0].String(), n.own[1].String(), "::ffff:" + n.own[0].String(),
	} {
		if _, err := n.dialOverlay(t.Context(), host, 80); !errors.Is(err, api.ErrDenied) {
			t.Errorf("%s: %v", host, err)
		}
	}
	for _, host := range []string{"nobody", "localhost", "example.com", "", "web.example.com", "a b\r\n"} {
		if _, err := n.dialOverlay(t.Context(), host, 80); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("%q: %v", host, err)
		}
	}
	if len(d.calls) != 0 {
		t.Errorf("dialled %v", d.calls)
	}
}

func TestDialOverlay_SaysWhyNobodyAnswers(t *testing.T) {
	n, d := dialing(t)
	web := netip.AddrPortFrom(n.attachments["Web"].saved.Addr.Addr(), 80)
	for _, tt := range []struct {
		err   error
		errno syscall.Errno
		says  string
	}{
		{syscall.ECONNREFUSED, syscall.ECONNREFUSED, "nothing listens there"},
		{syscall.EHOSTUNREACH, syscall.EHOSTUNREACH, "no container has this address"},
		{syscall.ENETUNREACH, syscall.ENETUNREACH, "no node has its subnet"},
		{syscall.EACCES, syscall.EACCES, "--isolate, --allow-from"},
		{context.DeadlineExceeded, syscall.ETIMEDOUT, "does not answer"},
		{syscall.EIO, syscall.EIO, "input/output error"},
	} {
		d.errs[web.String()] = tt.err
		_, err := n.dialOverlay(t.Context(), "web", 80)
		if !errors.Is(err, api.ErrUnavailable) || !errors.Is(err, tt.errno) || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "web ("+web.String()+")") {
			t.Errorf("%v: %v", tt.err, err)
		}
	}
}

// What the node knows to lead nowhere is not dialled: nobody would answer.
func TestDialOverlay_KnowsWhatLeadsNowhere(t *testing.T) {
	n, d := dialing(t)
	n.peers = []peer{{way: way{subnet: netip.MustParsePrefix("10.5.90.0/24"), problem: "its backend is another"}}}
	for host, want := range map[string]struct {
		errno syscall.Errno
		says  string
	}{
		"10.5.72.99": {syscall.EHOSTUNREACH, "no container has this address"},
		"10.5.80.2":  {syscall.ENETUNREACH, "no node has its subnet"},
		"10.5.90.2":  {syscall.ENETUNREACH, "rootless-ovl peers"},
	} {
		if _, err := n.dialOverlay(t.Context(), host, 80); !errors.Is(err, want.errno) || !strings.Contains(err.Error(), want.says) {
			t.Errorf("%s: %v", host, err)
		}
	}
	if len(d.calls) != 0 {
		t.Errorf("dialled %v", d.calls)
	}
}

func TestDialOverlay_WaitsForTheSubnet(t *testing.T) {
	n, _ := dialing(t)
	n.dialer = nil
	if _, err := n.dialOverlay(t.Context(), "web", 80); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("%v", err)
	}
}

func TestDialOverlay_HasNoAddressBesideAnEngine(t *testing.T) {
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	w.start(41)
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 41, Gateway: true}); err != nil {
		t.Fatal(err)
	}
	d := &fakeDialer{}
	n.dialer = d
	if _, err := n.dialOverlay(t.Context(), n.pool.subnet.Addr().Next().Next().String(), 80); !errors.Is(err, api.ErrUnavailable) || len(d.calls) != 0 {
		t.Errorf("dialled %v, %v", d.calls, err)
	}
}

func TestForward_CarriesAClient(t *testing.T) {
	n, d := dialing(t)
	gone := errors.New("the client has gone")
	if err := n.Forward(t.Context(), "web:80", func() (*api.Stream, error) { return nil, gone }); !errors.Is(err, gone) || len(d.calls) != 1 {
		t.Errorf("dialled %v, %v", d.calls, err)
	}
	accept := func() (*api.Stream, error) {
		t.Error("a client was accepted")
		return nil, gone
	}
	for _, to := range []string{"nobody:80", "127.0.0.1:80", "web"} {
		if err := n.Forward(t.Context(), to, accept); err == nil {
			t.Errorf("%s: no error", to)
		}
	}
}

func TestProxy_IsToldWhatKindOfErrorItIs(t *testing.T) {
	n, d := dialing(t)
	d.errs[netip.AddrPortFrom(n.attachments["Web"].saved.Addr.Addr(), 80).String()] = syscall.ECONNREFUSED
	for host, kind := range map[string]error{"127.0.0.1": proxy.ErrForbidden, "nobody": proxy.ErrNoName, "web": syscall.ECONNREFUSED} {
		_, err := n.dialForProxy(t.Context(), host, 80)
		if !errors.Is(err, kind) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", host, err)
		}
	}
}

func TestListenProxy_SaysWhenThePortIsTaken(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	n.cfg.Proxy = netip.MustParseAddrPort("127.0.0.1:0")
	ln, err := n.listenProxy()
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s, err := n.Status(t.Context())
	if err != nil || s.Proxy != ln.Addr().String() || s.Counters["proxy"] == nil {
		t.Errorf("status: proxy %q, counters %v, %v", s.Proxy, s.Counters["proxy"], err)
	}
	n.cfg.Proxy = n.proxyAddr
	if _, err := n.listenProxy(); err == nil || !strings.Contains(err.Error(), n.proxyAddr.String()+" is taken") {
		t.Errorf("a port that is taken: %v", err)
	}
}

func TestRun_ThatFailsForTheProxyFreesThePortOfTheHealthChecks(t *testing.T) {
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	conf := testConfig(t)
	conf.Proxy = netip.MustParseAddrPort(taken.Addr().String())
	conf.Healthz = netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", freePort(t)))
	n, err := New(conf)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "--proxy") {
		t.Fatalf("Run: %v", err)
	}
	again, err := net.Listen("tcp4", conf.Healthz.String())
	if err != nil {
		t.Fatalf("the port of the health checks is not free: %v", err)
	}
	again.Close()
}

func TestListenProxy_SaysWhatToDo(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	n.cfg.Proxy = netip.MustParseAddrPort("192.0.2.99:0")
	if _, err := n.listenProxy(); err == nil || !strings.Contains(err.Error(), "192.0.2.99 is not an address of this host") {
		t.Errorf("an address of another host: %v", err)
	}
}

func TestListeners_AtAnIPv4AddressAreOfIPv4Alone(t *testing.T) {
	n := readyNode(t, newWorld(), testConfig(t), "10.5.72.0/24")
	n.cfg.Proxy, n.cfg.Healthz = netip.MustParseAddrPort("0.0.0.0:0"), netip.MustParseAddrPort("0.0.0.0:0")
	proxy, err := n.listenProxy()
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	health, err := n.listenHealth()
	if err != nil {
		t.Fatal(err)
	}
	defer health.Close()
	for _, ln := range []net.Listener{proxy, health} {
		_, port, _ := net.SplitHostPort(ln.Addr().String())
		for host, open := range map[string]bool{"127.0.0.1": true, "::1": false} {
			c, err := net.Dial("tcp", net.JoinHostPort(host, port))
			if err == nil {
				c.Close()
			}
			if (err == nil) != open {
				t.Errorf("%v at %s: open %v, %v", ln.Addr(), host, err == nil, err)
			}
		}
	}
}
