// Tests of the outside's ways into the overlay: forward, the proxy, exec.

package test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// forward runs `rootless-ovl forward` with these pairs until the test ends, and returns where each listens.
func forward(t *testing.T, h *lab.Host, pairs ...string) []netip.AddrPort {
	t.Helper()
	cmd := h.Command(h.Binary(), append([]string{"forward"}, pairs...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd.Stderr = &said
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("forward ended with %v: %s", err, &said)
		}
	})
	kill := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() { kill.Stop() })
	lines := bufio.NewScanner(out)
	var at []netip.AddrPort
	for range len(pairs) / 2 {
		if !lines.Scan() {
			t.Fatalf("forward %v: %s", pairs, &said)
		}
		f := strings.Fields(lines.Text()) // forwarding ADDR [and ADDR] to TARGET
		addr, err := netip.ParseAddrPort(f[1])
		if err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		at = append(at, addr)
	}
	return at
}

func TestForward_LeadsToContainersAnywhere(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	a.HTTPServer(t, port(a.addr, 80))
	b.HTTPServer(t, port(b.addr, 80))
	at := forward(t, s.h1, "0", "a:80", "127.0.0.2:0", port(b.addr, 80).String(), "0", "b:80", "0", "B.ovl.internal.:80")
	if at[1].Addr().String() != "127.0.0.2" {
		t.Errorf("it listens on %v", at[1])
	}
	for i, to := range at {
		if i >= 2 { // names come to other nodes within a second
			lab.Eventually(t, "the name leads there", func() bool {
				_, err := s.h1.Fetch("http://" + to.String() + "/")
				return err == nil
			})
		}
		got, err := s.h1.Fetch("http://" + to.String() + "/")
		if err != nil || got != s.d1.Status().Gateway {
			t.Errorf("%d: the container saw %q, %v; want the gateway of host 1", i, got, err)
		}
		if err := s.h1.Download(to, 5<<20); err != nil {
			t.Errorf("%d: download: %v", i, err)
		}
		if err := s.h1.Upload(to, 5<<20); err != nil {
			t.Errorf("%d: upload: %v", i, err)
		}
	}
}

// A connection through the gateway ends as the container ends it.
func TestForward_PassesHalfCloseAndResetOn(t *testing.T) {
	t.Parallel()
	l, a := lone(t)
	h := l.Host(1)
	ln, err := a.Listen("tcp", port(a.addr, 7).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	at := forward(t, h, "0", "a:7", "0", "a:8")
	dial := func(to netip.AddrPort) *net.TCPConn {
		conn, err := h.DialContext(t.Context(), "tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		return conn.(*net.TCPConn)
	}
	client := dial(at[0])
	_, _ = io.WriteString(client, "question")
	_ = client.CloseWrite()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(server); err != nil || string(got) != "question" {
		t.Errorf("the container got %q, %v", got, err)
	}
	_, _ = io.WriteString(server, "answer")
	server.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != "answer" {
		t.Errorf("the client got %q, %v", got, err)
	}

	for _, who := range []string{"container", "client"} {
		client := dial(at[0])
		_, _ = io.WriteString(client, "x")
		server, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.ReadFull(server, make([]byte, 1))
		from, to := server.(*net.TCPConn), client
		if who == "client" {
			from, to = to, from
		}
		_ = from.SetLinger(0)
		from.Close()
		_ = to.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err := to.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("after a reset by the %s the other end reads %v", who, err)
		}
	}
	refuses, err := h.DialContext(t.Context(), "tcp", at[1].String())
	if err == nil { // otherwise the reset has come already
		defer refuses.Close()
		_ = refuses.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = refuses.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a port that the container refuses: %v, want a reset", err)
	}
}

func TestForward_RefusesWhatCannotBe(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	refused(t, h.CLI("forward", "8080", "a:80"), "rootless-ovl up")
	upEmbedded(h)
	taken, err := h.Listen("tcp", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	refused(t, h.CLI("forward", "8080", "a:80"), "127.0.0.1:8080", "taken")
	refused(t, h.CLI("forward", "8080"), "pairs")
	refused(t, h.CLI("forward", "80", "a:80"), "ip_unprivileged_port_start")
}

// proxied is a client of a host's proxy.
func proxied(h *lab.Host, scheme string, at netip.AddrPort) *http.Client {
	return &http.Client{Timeout: 50 * time.Second, Transport: &http.Transport{
		Proxy:             http.ProxyURL(&url.URL{Scheme: scheme, Host: at.String()}),
		DialContext:       h.DialContext,
		DisableKeepAlives: true,
	}}
}

func fetch(c *http.Client, u string) (status int, body string, err error) {
	resp, err := c.Get(u)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func TestProxy_LeadsToContainersAnywhere(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	d1 := upEmbedded(h1, "--proxy", "1080")
	d2 := h2.Up("--etcd-endpoints", etcdURL(h1))
	waitPeers(t, 1, d1, d2)
	a, b := join(t, h1, "a"), join(t, h2, "b")
	a.HTTPServer(t, port(a.addr, 8080))
	b.HTTPServer(t, port(b.addr, 80))
	at := netip.MustParseAddrPort("127.0.0.1:1080")
	lab.Eventually(t, "the name b is known on host 1", func() bool {
		status, _, err := fetch(proxied(h1, "http", at), "http://b.ovl.internal/")
		return err == nil && status == http.StatusOK
	})
	for _, scheme := range []string{"socks5h", "socks5", "http"} {
		c := proxied(h1, scheme, at)
		urls := []string{"http://" + b.addr.String() + "/"}
		if scheme != "socks5" { // there the client looks names up
			urls = append(urls, "http://a:8080/", "http://b.ovl.internal/")
		}
		for _, u := range urls {
			if status, body, err := fetch(c, u); err != nil || status != http.StatusOK || body != d1.Status().Gateway {
				t.Errorf("%s, %s: %d %q, %v", scheme, u, status, body, err)
			}
		}
	}
	var s struct {
		Proxy    string
		Counters map[string]map[string]uint64
	}
	h1.CLIJSON(&s, "status")
	if s.Proxy != at.String() || s.Counters["proxy"]["socks"] != 4 || s.Counters["proxy"]["http_requests"] < 4 {
		t.Errorf("status: %+v", s)
	}
	refusedUp := h1.CLI("up", "--proxy", "1080", "--state-dir", h1.Dir+"/other", "--runtime-dir", h1.Dir+"/other-run", "--etcd-endpoints", etcdURL(h1), "--port", "0")
	if refusedUp.Code == 0 || !strings.Contains(refusedUp.Stderr, "127.0.0.1:1080 is taken") {
		t.Errorf("a port that is taken: exit code %d, %s", refusedUp.Code, refusedUp.Stderr)
	}
}

// Nobody waits for an address that nobody has, or for a container that is closed to the gateway: 502, where silence is 504.
func TestProxy_SaysWhyNobodyAnswers(t *testing.T) {
	t.Parallel()
	l, e, _ := withDualStack(t, 2)
	h1, h2 := l.Host(1), l.Host(2)
	d1, d2 := h1.Up("--etcd-endpoints", e.Endpoint, "--proxy", "1080"), h2.Up("--etcd-endpoints", e.Endpoint)
	waitPeers(t, 1, d1, d2)
	there := join(t, h2, "alone", "--isolate")
	there.serve(t)
	c := proxied(h1, "http", netip.MustParseAddrPort("127.0.0.1:1080"))
	free := func(subnet string) string {
		a := netip.MustParsePrefix(subnet).Addr().As16()
		a[15] = 200
		return netip.AddrFrom16(a).Unmap().String()
	}
	s1, s2 := d1.Status(), d2.Status()
	network := netip.MustParsePrefix(s1.Network)
	unleased := netip.PrefixFrom(network.Addr(), 24).Addr().Next().Next()
	for host, says := range map[string]string{
		free(s1.Subnet):                  "no container has this address",
		"[" + free(s1.Subnet6) + "]":     "no container has this address",
		free(s2.Subnet):                  "no container has this address",
		"[" + free(s2.Subnet6) + "]":     "no container has this address",
		unleased.String():                "no node has its subnet",
		there.addr.String():              "--isolate",
		"[" + there.addr6.String() + "]": "--isolate",
	} {
		if status, body, err := fetch(c, "http://"+host+":8080/"); err != nil || status != http.StatusBadGateway || !strings.Contains(body, says) {
			t.Errorf("%s: %d %q, %v; want 502 and %q", host, status, body, err, says)
		}
	}
}

// Neither way leads anywhere but into the overlay: not to this host, not to its network, not beyond.
func TestOutside_ReachesNothingButTheOverlay(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h, "--proxy", "1080", "--host-loopback", "--allow-link-local")
	at := netip.MustParseAddrPort("127.0.0.1:1080")
	l.Outside.HTTPServer(t, port(lab.OutsideAddr, 80))
	h.HTTPServer(t, netip.MustParseAddrPort("127.0.0.1:8000"))
	gateway := d.Status().Gateway
	closed := []string{
		"127.0.0.1:8000", "[::1]:8000", "[::ffff:127.0.0.1]:8000", "localhost:8000", "0.0.0.0:8000", "127.0.0.1:1080",
		h.Addr.String() + ":2379", "127.0.0.1:2379", // the store
		gateway + ":8000", gateway + ":53", gateway + ":2379", // the gateway, which has the host's loopback open for containers
		lab.OutsideAddr.String() + ":80", "169.254.169.254:80", "[fd00:ec2::254]:80", "[fe80::1]:80", "224.0.0.1:80", "255.255.255.255:80", "example.com:80",
	}
	for _, to := range closed {
		conn, err := h.DialContext(t.Context(), "tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(40 * time.Second))
		_, _ = fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", to)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != http.StatusForbidden && resp.StatusCode != http.StatusBadGateway {
			t.Errorf("CONNECT %s: %v, %v", to, resp, err)
		}
		conn.Close()
		if status, body, err := fetch(proxied(h, "http", at), "http://"+to+"/"); err != nil || status != http.StatusForbidden && status != http.StatusBadGateway {
			t.Errorf("http://%s: %d %q, %v", to, status, body, err)
		}
		if _, _, err := fetch(proxied(h, "socks5h", at), "http://"+to+"/"); err == nil {
			t.Errorf("SOCKS: %s is reached", to)
		}
		if host, _, _ := net.SplitHostPort(to); net.ParseIP(host) != nil {
			refused(t, h.CLI("forward", "0", to), "are dialled")
			continue
		}
		forwardTo := forward(t, h, "0", to)[0]
		if _, _, err := fetch(h.HTTPClient(), "http://"+forwardTo.String()+"/"); err == nil {
			t.Errorf("forward: %s is reached", to)
		}
	}
	// And the proxy is closed to containers, even where the host's loopback is open.
	a := join(t, h, "a")
	if body, err := a.Fetch("http://" + gateway + ":8000/"); err != nil {
		t.Errorf("the host's loopback is not open to the container: %q, %v", body, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if conn, err := a.DialContext(ctx, "tcp", gateway+":1080"); err == nil {
		conn.Close()
		t.Error("a container reaches the proxy")
	}
}

func TestExec_RunsInAContainersNetwork(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	h.SetResolvConf("search lab.test\nnameserver " + lab.RouterAddr.String() + "\n")
	upEmbedded(h)
	for _, c := range []struct {
		name string
		uid  int
	}{{"rooted", 0}, {"other", 777}} {
		m := attach(t, h.ContainerMapped(c.name, c.uid))
		for _, ref := range []string{c.name, pid(m.Container)} {
			r := h.CLI("exec", ref, "--", "sh", "-c", "readlink /proc/self/ns/net; id -u; cat /etc/resolv.conf; cat /proc/net/fib_trie; pwd")
			if r.Code != 0 {
				t.Fatalf("exec %s: exit code %d, %s", ref, r.Code, r.Stderr)
			}
			own := m.Run("readlink", "/proc/self/ns/net").Stdout
			for _, want := range []string{own, "\n" + itoa(c.uid) + "\n", "nameserver " + m.gateway.String(), "search", m.addr.String(), h.Home()} {
				if !strings.Contains(r.Stdout, want) {
					t.Errorf("exec %s: %q is not in\n%s", ref, want, r.Stdout)
				}
			}
		}
		r := h.RunWith(func(cmd *exec.Cmd) { cmd.Stdin = strings.NewReader("hello") }, h.Binary(), "exec", c.name, "--", "cat")
		if r.Code != 0 || r.Stdout != "hello" {
			t.Errorf("standard input: exit code %d, %q %s", r.Code, r.Stdout, r.Stderr)
		}
		for script, code := range map[string]int{"exit 7": 7, "kill -TERM $$": 143, "kill -KILL $$": 137} {
			if r := h.CLI("exec", c.name, "--", "sh", "-c", script); r.Code != code {
				t.Errorf("%q: exit code %d, want %d: %s", script, r.Code, code, r.Stderr)
			}
		}
		if r := h.CLI("exec", c.name, "--", "no-such-program"); r.Code != 127 {
			t.Errorf("a program that is not there: exit code %d, %s", r.Code, r.Stderr)
		}
		if r := h.CLI("exec", c.name, "--", "/etc"); r.Code != 126 {
			t.Errorf("a directory: exit code %d, %s", r.Code, r.Stderr)
		}
		pings(t, m.Space, m.gateway) // it is as it was
	}
	refused(t, h.CLI("exec", "nobody", "--", "true"), "nobody", "rootless-ovl ps")
	refused(t, h.CLI("exec", "rooted", "true"), "--")
}

func TestExec_PassesSignalsOn(t *testing.T) {
	t.Parallel()
	l, _ := lone(t)
	h := l.Host(1)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
		// The lab's own first process ignores signals, and exec leaves alone what was ignored when it started.
		cmd := h.Command("env", "--default-signal=INT,HUP", h.Binary(), "exec", "a", "--", "bash", "-c",
			`trap 'echo got; exit 42' TERM INT HUP USR1; echo ready; while :; do sleep 0.05; done`)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Start(cmd); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "ready" {
			t.Errorf("%v: the program printed %q first", sig, lines.Text())
		}
		_ = cmd.Process.Signal(sig)
		if !lines.Scan() || lines.Text() != "got" {
			t.Errorf("%v did not reach the program: %q", sig, lines.Text())
		}
		_ = cmd.Wait()
		kill.Stop()
		if code := cmd.ProcessState.ExitCode(); code != 42 {
			t.Errorf("%v: exit code %d, want the program's 42", sig, code)
		}
	}
}

func TestExec_WithoutANameIsRun(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	d := upEmbedded(l.Host(1))
	r := l.Host(1).CLI("exec", "--", "sh", "-c", "cat /etc/resolv.conf; exit 3")
	if r.Code != 3 || !strings.Contains(r.Stdout, "nameserver "+d.Status().Gateway) {
		t.Errorf("exit code %d, %q %s", r.Code, r.Stdout, r.Stderr)
	}
	lab.Eventually(t, "nothing stays attached", func() bool { return len(d.Attachments()) == 0 })
}
