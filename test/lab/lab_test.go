// Tests of the lab itself: what the other tests take for granted.

package lab_test

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m.Run)) }

func TestLab_IsNotRoot(t *testing.T) {
	if uid := os.Getuid(); uid == 0 {
		t.Errorf("the lab runs as uid 0")
	}
}

func TestLab_HostsReachEachOtherAndTheOutside(t *testing.T) {
	l := lab.New(t, 2)
	for _, dst := range []*lab.Host{l.Host(2), l.Outside} {
		r, err := l.Host(1).Ping(dst.Addr, 3)
		if err != nil || r.Lost() != 0 {
			t.Errorf("h1 to %s: %v, %v", dst.Name, r, err)
		}
	}
	listener, err := l.Outside.Listen("tcp", lab.OutsideAddr.String()+":80")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		_, _ = io.WriteString(w, host)
	})}
	go func() { _ = server.Serve(listener) }()
	defer server.Close()
	client := &http.Client{Transport: &http.Transport{DialContext: l.Host(1).DialContext, DisableKeepAlives: true}}
	resp, err := client.Get("http://" + lab.OutsideAddr.String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); string(body) != l.Host(1).Addr.String() {
		t.Errorf("the outside saw %q, want the host's own address %s", body, l.Host(1).Addr)
	}
}

// Both families, addresses usable at once, errors of routers on the way.
func TestLab_HostsHaveIPv6IfAskedFor(t *testing.T) {
	l := lab.New(t, 2, lab.WithIPv6)
	tunnel := l.Tunnel(1400)
	h1, h2 := l.Host(1), l.Host(2)
	for what, dst := range map[string]netip.Addr{
		"host": h2.Addr6, "router": lab.RouterAddr6, "outside": lab.OutsideAddr6, "host beyond the tunnel": tunnel.Far.Addr6, "host by IPv4": h2.Addr,
	} {
		if r, err := h1.Ping(dst, 3); err != nil || r.Lost() != 0 {
			t.Errorf("%s: %v, %v", what, r, err)
		}
	}
	if i, err := h1.Interfaces(); err != nil || len(i) != 1 || !slices.Contains(i[0].Addrs6, netip.PrefixFrom(h1.Addr6, 64)) {
		t.Errorf("interfaces %+v, %v", i, err)
	}
	routes, err := h1.Routes6()
	if err != nil || !slices.Contains(routes, "default via "+lab.RouterAddr6.String()+" dev lan0") {
		t.Errorf("routes %q, %v", routes, err)
	}
	if h1.Neighbour(h2.Addr6) == "" {
		t.Error("no neighbour entry for the other host")
	}
	h2.HTTPServer(t, netip.AddrPortFrom(h2.Addr6, 8080))
	if got, err := h1.Fetch("http://" + netip.AddrPortFrom(h2.Addr6, 8080).String() + "/"); err != nil || got != h1.Addr6.String() {
		t.Errorf("the server saw %q, %v", got, err)
	}
	h2.UDPEcho(t, netip.AddrPortFrom(h2.Addr6, 9000))
	if err := h1.EchoUDP(netip.AddrPortFrom(h2.Addr6, 9000), 65507); err != nil {
		t.Error(err)
	}
	r, err := h1.PingWith(tunnel.Far.Addr6, lab.PingOptions{Count: 3, Size: 1401 - 48, DontFrag: true})
	if err != nil || r.Received != 0 || len(r.Errors) == 0 || r.Errors[0].Type != 2 || r.Errors[0].MTU != 1400 {
		t.Errorf("ping that is too big: %v, %v; want packet-too-big", r, err)
	}
	r, err = h1.PingWith(tunnel.Far.Addr6, lab.PingOptions{Count: 3, TTL: 1})
	if err != nil || r.Received != 0 || len(r.Errors) == 0 || r.Errors[0].Type != 3 {
		t.Errorf("ping over one hop: %v, %v; want time exceeded", r, err)
	}
	tunnel.Silence()
	r, err = h1.PingWith(tunnel.Far.Addr6, lab.PingOptions{Count: 3, TTL: 1})
	if err != nil || r.Received != 0 || len(r.Errors) != 0 {
		t.Errorf("ping over one hop, silent router: %v, %v", r, err)
	}
	if r, err := h1.Ping(tunnel.Far.Addr6, 3); err != nil || r.Lost() != 0 {
		t.Errorf("across silent routers: %v, %v", r, err)
	}
}

func TestLab_HostsHaveNoIPv6Otherwise(t *testing.T) {
	l := lab.New(t, 1)
	i, err := l.Host(1).Interfaces()
	if err != nil || len(i) != 1 || len(i[0].Addrs6) != 0 || l.Host(1).Addr6.IsValid() {
		t.Errorf("interfaces %+v, %v", i, err)
	}
}

func TestLab_ProgramsHaveNoCapability(t *testing.T) {
	l := lab.New(t, 1)
	r := l.Host(1).Run("sh", "-c", "id -u; grep Cap /proc/self/status; cat /etc/resolv.conf; echo $HOME")
	if r.Code != 0 {
		t.Fatalf("exit code %d: %s", r.Code, r.Stderr)
	}
	lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
	if lines[0] == "0" {
		t.Errorf("programs run as uid 0")
	}
	for _, line := range lines {
		if name, value, ok := strings.Cut(line, ":\t"); ok && strings.HasPrefix(name, "Cap") && strings.Trim(value, "0") != "" {
			t.Errorf("%s is %s, want none", name, value)
		}
	}
	if !strings.Contains(r.Stdout, "nameserver "+lab.RouterAddr.String()) || !strings.Contains(r.Stdout, l.Host(1).Home()) {
		t.Errorf("no resolv.conf or HOME of its own:\n%s", r.Stdout)
	}
}

func TestLab_ContainersBelongToTheUser(t *testing.T) {
	l := lab.New(t, 1)
	c := l.Host(1).Container("c1")
	sets, err := lab.Capabilities(c.PID)
	if err != nil || sets["CapEff"] == 0 {
		t.Errorf("capabilities over its own namespace: %v, %v", sets, err)
	}
	if interfaces, err := c.Interfaces(); err != nil || len(interfaces) != 0 {
		t.Errorf("a new container has interfaces %v, %v", interfaces, err)
	}
}
