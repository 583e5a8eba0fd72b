// Tests of published ports.

package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// published is a port as `publish`, `unpublish` and `ps` print it.
type published struct {
	HostAddr string            `json:"host_addr"`
	HostPort int               `json:"host_port"`
	Port     int               `json:"port"`
	Proto    string            `json:"proto"`
	SNAT     bool              `json:"snat"`
	Problem  string            `json:"problem"`
	Counters map[string]uint64 `json:"counters"`
}

// tellClients has the member answer at that port, TCP and UDP and at every address, with who it thinks asks.
func (m *member) tellClients(t *testing.T, n uint16) {
	t.Helper()
	addrs := []netip.Addr{m.addr}
	if m.addr6.IsValid() { // that of the outside alone, too
		addrs = append(addrs, m.addr6)
	}
	for _, addr := range addrs {
		l, err := m.Listen("tcp", port(addr, n).String())
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, c.RemoteAddr().String())
				c.Close()
			}
		}()
		u, err := m.ListenPacket("udp", port(addr, n).String())
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			buf := make([]byte, 1500)
			for {
				_, from, err := u.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = u.WriteTo([]byte(from.String()), from)
			}
		}()
		t.Cleanup(func() { l.Close(); u.Close() })
	}
}

// askWho asks a member that tells clients who it thinks they are. It says who asked, too.
func askWho(t *testing.T, from *lab.Space, network string, at netip.AddrPort) (asked, seen string, err error) {
	t.Helper()
	c, err := from.DialContext(t.Context(), network, at.String())
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	buf := make([]byte, 100)
	for range 5 { // a datagram may be lost
		_ = c.SetDeadline(time.Now().Add(4 * time.Second))
		if network == "udp" {
			if _, err = c.Write([]byte("who?")); err != nil {
				break
			}
		}
		var n int
		if n, err = c.Read(buf); err == nil {
			return c.LocalAddr().String(), string(buf[:n]), nil
		}
		if network == "tcp" {
			break
		}
	}
	return c.LocalAddr().String(), "", err
}

// portsOf are the published ports of an attachment.
func portsOf(t *testing.T, h *lab.Host, name string) []published {
	t.Helper()
	var list []struct {
		Name  string      `json:"name"`
		Ports []published `json:"ports"`
	}
	h.CLIJSON(&list, "ps")
	for _, a := range list {
		if a.Name == name {
			return a.Ports
		}
	}
	t.Fatalf("ps does not have %q: %+v", name, list)
	return nil
}

// seesClients checks that the member behind a published port sees clients as themselves, or as its gateway.
func seesClients(t *testing.T, l *lab.Lab, h *lab.Host, m *member, n uint16, snat bool) {
	t.Helper()
	at := []netip.Addr{h.Addr}
	if m.addr6.IsValid() {
		at = append(at, h.Addr6)
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, addr := range at {
			asked, seen, err := askWho(t, l.Outside.Space, network, port(addr, n))
			switch {
			case err != nil:
				t.Errorf("%s to %v: %v", network, port(addr, n), err)
			case snat && !strings.HasPrefix(seen, net.JoinHostPort(m.router(addr).String(), "")):
				t.Errorf("%s to %v: the container saw %s, want the gateway", network, port(addr, n), seen)
			case !snat && seen != asked:
				t.Errorf("%s to %v: the container saw %s, the client was %s", network, port(addr, n), seen, asked)
			}
		}
	}
}

func TestPublish_ContainerSeesTheClient(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 1)
	h := l.Host(1)
	h.Up("--etcd-endpoints", e.Endpoint)
	a := join(t, h, "a")
	a.tellClients(t, 80)
	var list []published
	h.CLIJSON(&list, "publish", "8080:80", "8080:80/udp", "a")
	if len(list) != 2 || list[0].HostPort != 8080 || list[1].Proto != "udp" {
		t.Errorf("publish printed %+v", list)
	}
	seesClients(t, l, h, a, 8080, false)
	if r := h.CLI("ps"); !strings.Contains(r.Stdout, "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp, 0.0.0.0:8080->80/udp, [::]:8080->80/udp") {
		t.Errorf("ps: %s", r.Stdout)
	}

	took(t, a, "spliced")

	// From the host itself: its loopback would be the container's own.
	for _, addr := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		for _, network := range []string{"tcp", "udp"} {
			_, seen, err := askWho(t, h.Space, network, port(addr, 8080))
			if want := net.JoinHostPort(a.router(addr).String(), ""); err != nil || !strings.HasPrefix(seen, want) {
				t.Errorf("%s from the host's %v: the container saw %q, %v; want its gateway", network, addr, seen, err)
			}
		}
	}
	// From another container of the node, and from itself, by the host's address.
	b := join(t, h, "b")
	for _, m := range []*member{a, b} {
		for _, network := range []string{"tcp", "udp"} {
			if _, seen, err := askWho(t, m.Space, network, port(h.Addr, 8080)); err != nil || seen == "" || strings.HasPrefix(seen, "127.") {
				t.Errorf("%s from container %s by the host's address: it saw %q, %v", network, m.Name, seen, err)
			}
		}
	}

	r := h.CLI("unpublish", "8080:80/udp", "a")
	if r.Code != 0 || strings.TrimSpace(r.Stdout) != "0.0.0.0:8080->80/udp, [::]:8080->80/udp" {
		t.Errorf("unpublish: %+v", r)
	}
	if _, _, err := askWho(t, l.Outside.Space, "tcp", port(h.Addr, 8080)); err != nil {
		t.Errorf("TCP, still published: %v", err)
	}
	h.CLIJSON(&list, "unpublish", "--all", "a")
	if _, _, err := askWho(t, l.Outside.Space, "tcp", port(h.Addr, 8080)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("an unpublished port: %v", err)
	}
	if ports := portsOf(t, h, "a"); len(ports) != 0 {
		t.Errorf("ports: %+v", ports)
	}
}

// The overlay has no IPv6, the host has: its containers have an address for the outside, and clients of IPv6 are seen by that.
func TestPublish_IPv6WithoutIPv6InTheOverlay(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1, lab.WithIPv6)
	h := l.Host(1)
	upEmbedded(h)
	a := join(t, h, "a", "-p", "8080:80", "-p", "8080:80/udp")
	if !a.addr6.IsValid() {
		t.Fatal("the container has no IPv6 address")
	}
	a.tellClients(t, 80)
	seesClients(t, l, h, a, 8080, false)
	took(t, a, "spliced")
}

// took checks which way connections of published ports went, since these were published.
func took(t *testing.T, m *member, way string) {
	t.Helper()
	all := uint64(0)
	for _, p := range portsOf(t, m.Host, m.Name) {
		c := p.Counters
		if all += c[way]; c["spliced"]+c["carried"] != c[way] {
			t.Errorf("port %d: connections are to be %s; counters %v", p.HostPort, way, c)
		}
	}
	if all == 0 {
		t.Errorf("no connection was %s", way)
	}
}

// A container may have a firewall that lets nothing but the loopback's own addresses over lo. Then connections go through the stack.
func TestPublish_ThroughTheStackWhereTheContainerDropsOurs(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 1)
	h := l.Host(1)
	d := h.Up("--etcd-endpoints", e.Endpoint)
	c := h.Container("a")
	for family, own := range map[string]string{"iptables": "127.0.0.0/8", "ip6tables": "::1"} {
		if r := c.Run(family, "-I", "INPUT", "-i", "lo", "!", "-s", own, "-j", "DROP"); r.Code != 0 {
			t.Skipf("no firewall in the container: %+v", r)
		}
	}
	a := attach(t, c, "-p", "8080:80", "-p", "8080:80/udp")
	a.tellClients(t, 80)
	seesClients(t, l, h, a, 8080, false)
	took(t, a, "carried")
	if !strings.Contains(d.LogText(), "go through the gateway") {
		t.Error("the log does not say that connections go through the gateway")
	}
	a.HTTPServer(t, port(a.addr, 81))
	h.CLIJSON(new([]published), "publish", "8081:81", "a")
	if err := l.Outside.Download(port(h.Addr, 8081), 20<<20); err != nil {
		t.Errorf("download: %v", err)
	}
	if err := l.Outside.Upload(port(h.Addr, 8081), 20<<20); err != nil {
		t.Errorf("upload: %v", err)
	}
}

// What a container may reach by itself does not bear on what is published: neither the fast way nor the stack's.
func TestPublish_OfAContainerThatMayReachNothing(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	upEmbedded(h)
	a := join(t, h, "a", "--isolate", "--egress", "deny", "-p", "8080:80", "-p", "8080:80/udp")
	a.tellClients(t, 80)
	seesClients(t, l, h, a, 8080, false)

	// A client's port that is a server's in the container cannot be bound there.
	client := &net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(port(lab.RouterAddr, 80))}
	var seen []byte
	if err := l.Outside.Do(func() error {
		c, err := client.DialContext(t.Context(), "tcp", port(h.Addr, 8080).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		seen, err = io.ReadAll(c)
		return err
	}); err != nil || string(seen) != port(lab.RouterAddr, 80).String() {
		t.Errorf("a client with the server's port: the container saw %q, %v", seen, err)
	}
	if _, _, err := askWho(t, a.Space, "tcp", port(lab.OutsideAddr, 80)); err == nil {
		t.Error("the container reaches the outside")
	}
}

func TestPublish_SNATShowsTheGateway(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	upEmbedded(h)
	a := join(t, h, "a", "-p", "8080:80", "-p", "8080:80/udp", "--snat")
	a.tellClients(t, 80)
	seesClients(t, l, h, a, 8080, true)

	b := join(t, h, "b", "--no-default-route")
	b.tellClients(t, 80)
	refused(t, h.CLI("publish", "8081:80", "b"), "--snat", "default route")
	h.CLIJSON(new([]published), "publish", "--snat", "8081:80", "8081:80/udp", "b")
	seesClients(t, l, h, b, 8081, true)
}

func TestPublish_CarriesBulkBothWays(t *testing.T) {
	t.Parallel()
	l, a := lone(t)
	h := l.Host(1)
	a.HTTPServer(t, port(a.addr, 80))
	a.UDPEcho(t, port(a.addr, 9000))
	h.CLIJSON(new([]published), "publish", "8080:80", "9000:9000/udp", "a")
	at := port(h.Addr, 8080)
	if err := l.Outside.Download(at, 50<<20); err != nil {
		t.Errorf("download: %v", err)
	}
	if err := l.Outside.Upload(at, 50<<20); err != nil {
		t.Errorf("upload: %v", err)
	}
	for _, size := range []int{1, 1400, 9000, 65507} {
		if err := l.Outside.EchoUDP(port(h.Addr, 9000), size); err != nil {
			t.Errorf("UDP, %d bytes: %v", size, err)
		}
	}
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for range 10 {
				if got, err := l.Outside.Fetch("http://" + at.String() + "/"); err != nil || got != lab.RouterAddr.String() {
					t.Errorf("the container saw %q, %v", got, err)
				}
			}
		})
	}
	wg.Wait()
	took(t, a, "spliced")
}

func TestPublish_RefusesWithTheRemedy(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	upEmbedded(h)
	join(t, h, "a", "-p", "8080:80")
	join(t, h, "b")
	taken, err := h.Listen("tcp", "0.0.0.0:9090")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for spec, words := range map[string][]string{
		"80:80":               {"net.ipv4.ip_unprivileged_port_start", "80"},
		"8080:80":             {`"a"`, "unpublish"},
		"127.0.0.1:8080:80":   {`"a"`},
		"9090:80":             {"another program", "ss -ltnp"},
		"203.0.113.99:8082:1": {"not an address of this host"},
		"2379:80":             {"2379"}, // the embedded store's
		"8082:80/sctp":        {"tcp or udp"},
		"8000-8001:80":        {"same length"},
	} {
		refused(t, h.CLI("publish", "8081:81", spec, "b"), words...)
		if conn, err := h.DialContext(t.Context(), "tcp", "127.0.0.1:8081"); err == nil {
			conn.Close()
			t.Errorf("%s was refused, and the port beside it is open", spec)
		}
	}
	refused(t, h.CLI("publish", "8081:80", "nobody"), "nobody", "ps")
	refused(t, h.CLI("unpublish", "8081:80", "a"), "8081:80", "ps")
	c := h.Container("c")
	refused(t, h.CLI("attach", pid(c), "--name", "c", "-p", "8080:80"), `"a"`)
	refused(t, h.CLI("attach", pid(c), "--gateway", "-p", "8083:80"), "engine")
	noInterface(t, c.Space)
	if ports := portsOf(t, h, "b"); len(ports) != 0 {
		t.Errorf("ports of b: %+v", ports)
	}
}

func TestPublish_OutlivesTheDaemonAndGoesWithTheContainer(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	a := join(t, h, "a", "-p", "8080:80", "-p", "8080:80/udp", "-p", "8081:80")
	a.tellClients(t, 80)
	for _, end := range []string{"crash", "stop"} {
		if end == "crash" {
			d.Kill()
		} else if code := d.Stop(); code != 0 {
			t.Errorf("exit code %d after SIGTERM", code)
		}
		taken, err := h.Listen("tcp", "0.0.0.0:8081")
		if err != nil {
			t.Fatalf("%s: the port is not free: %v", end, err)
		}
		d = upEmbedded(h)
		seesClients(t, l, h, a, 8080, false)
		took(t, a, "spliced")
		if ports := portsOf(t, h, "a"); len(ports) != 3 || !strings.Contains(ports[2].Problem, "8081") {
			t.Errorf("%s: ports %+v", end, ports)
		}
		if r := h.CLI("ps"); !strings.Contains(r.Stdout, "taken by another program") {
			t.Errorf("ps: %s", r.Stdout)
		}
		taken.Close()
		lab.Eventually(t, "the port that was taken is published again", func() bool { return portsOf(t, h, "a")[2].Problem == "" })
		if n := strings.Count(d.LogText(), "cannot be opened again"); n != 1 {
			t.Errorf("%s: the log tells %d times of the port that was taken", end, n)
		}
	}
	a.Stop()
	lab.Eventually(t, "the port goes with its container", func() bool {
		_, _, err := askWho(t, l.Outside.Space, "tcp", port(h.Addr, 8080))
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

func TestPublish_HundredsOfPortsAndRanges(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	a := join(t, h, "a")
	for _, n := range []uint16{9000, 9149, 9299} {
		a.tellClients(t, n)
	}
	before := d.OpenFiles()
	h.CLIJSON(new([]published), "publish", "20000-20299:9000-9299", "a")
	for _, n := range []uint16{20000, 20149, 20299} {
		if asked, seen, err := askWho(t, l.Outside.Space, "tcp", port(h.Addr, n)); err != nil || asked != seen {
			t.Errorf("port %d: the container saw %q, the client was %q, %v", n, seen, asked, err)
		}
	}
	if r := h.CLI("ps"); !strings.Contains(r.Stdout, " 0.0.0.0:20000-20299->9000-9299/tcp, [::]:20000-20299->9000-9299/tcp ") {
		t.Errorf("ps: %s", r.Stdout)
	}
	if n := len(portsOf(t, h, "a")); n != 300 {
		t.Errorf("%d ports", n)
	}
	r := h.CLI("publish", "80", "a", "--output", "json")
	var list []published
	if err := json.Unmarshal([]byte(r.Stdout), &list); err != nil || len(list) != 1 || list[0].HostPort < 1024 {
		t.Errorf("any free port: %+v, %v", r, err)
	}
	if r := h.CLI("unpublish", "--all", "a"); r.Code != 0 || !strings.Contains(r.Stdout, fmt.Sprint(list[0].HostPort)) {
		t.Errorf("unpublish: %+v", r)
	}
	lab.Eventually(t, "the descriptors are given back", func() bool { return d.OpenFiles() <= before+20 })
}

func TestRun_Publishes(t *testing.T) {
	t.Parallel()
	h := lab.New(t, 1).Host(1)
	upEmbedded(h)
	cmd := h.Command(h.Binary(), "run", "--name", "job", "-p", "8080:80", "--", "sleep", "60")
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "the port of the command is published", func() bool {
		r := h.CLI("ps")
		return strings.Contains(r.Stdout, "0.0.0.0:8080->80/tcp")
	})
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	lab.Eventually(t, "it goes with the command", func() bool {
		free, err := h.Listen("tcp", "0.0.0.0:8080")
		if err == nil {
			free.Close()
		}
		return err == nil
	})
}
