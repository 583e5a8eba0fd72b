// Tests of the gateway: what containers reach beside the overlay.

package test

import (
	"bytes"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// lone is one node with one container.
func lone(t *testing.T, flags ...string) (*lab.Lab, *lab.Daemon, *member) {
	t.Helper()
	l := lab.New(t, 1)
	d := upEmbedded(l.Host(1), flags...)
	return l, d, join(t, l.Host(1), "a")
}

func TestGateway_ReachesTheOutside(t *testing.T) {
	l, _, a := lone(t)
	l.Outside.HTTPServer(t, port(lab.OutsideAddr, 80))
	l.Outside.UDPEcho(t, port(lab.OutsideAddr, 9000))
	pings(t, a.Space, lab.OutsideAddr)
	if got, err := a.Fetch("http://" + lab.OutsideAddr.String() + "/"); err != nil || got != l.Host(1).Addr.String() {
		t.Errorf("the outside saw %q, %v; want the host's address", got, err)
	}
	if err := a.Download(port(lab.OutsideAddr, 80), 20<<20); err != nil {
		t.Errorf("download: %v", err)
	}
	if err := a.Upload(port(lab.OutsideAddr, 80), 20<<20); err != nil {
		t.Errorf("upload: %v", err)
	}
	for _, size := range []int{1, 512, overlayMTU - 28, 9000, 65507} {
		if err := a.EchoUDP(port(lab.OutsideAddr, 9000), size); err != nil {
			t.Errorf("UDP, %d bytes: %v", size, err)
		}
	}
}

func TestGateway_AnswersPing(t *testing.T) {
	_, _, a := lone(t)
	pings(t, a.Space, a.gateway)
	r, err := a.PingWith(a.gateway, lab.PingOptions{Count: 3, Size: 4000})
	if err != nil || r.Lost() != 0 {
		t.Errorf("large ping: %v, %v", r, err)
	}
}

func TestGateway_PassesRefusalOn(t *testing.T) {
	_, _, a := lone(t)
	_, err := a.DialContext(t.Context(), "tcp4", port(lab.OutsideAddr, 81).String())
	if err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a closed port of the outside: %v, want connection refused", err)
	}
	conn, err := a.DialContext(t.Context(), "udp4", port(lab.OutsideAddr, 81).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	lab.Eventually(t, "a closed UDP port of the outside is told to the container", func() bool {
		_, _ = conn.Write([]byte("x"))
		_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		_, err := conn.Read(make([]byte, 10))
		return err != nil && strings.Contains(err.Error(), "refused")
	})
}

// A container learns who refuses its datagrams, as a traceroute wants to: the host that it asked, or a router on the way.
func TestGateway_PassesOnWhoRefuses(t *testing.T) {
	l, _, a := lone(t)
	if err := l.Outside.Sysctl("net/ipv4/ip_forward", "1"); err != nil { // a router that forwards says where it cannot
		t.Fatal(err)
	}
	icmp, err := a.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		t.Fatal(err)
	}
	defer icmp.Close()
	conn, err := a.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, tt := range []struct {
		to, from netip.Addr
		code     byte
	}{
		{lab.OutsideAddr, lab.OutsideAddr, 3},
		{netip.MustParseAddr("198.51.100.9"), lab.RouterAddr, 0}, // no route to it
	} {
		lab.Eventually(t, "an error about "+tt.to.String()+" from "+tt.from.String(), func() bool {
			_, _ = conn.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(port(tt.to, 81)))
			_ = icmp.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			b := make([]byte, 1500)
			n, from, err := icmp.ReadFrom(b)
			return err == nil && n >= 8 && from.String() == tt.from.String() && b[0] == 3 && b[1] == tt.code
		})
	}
}

// A container that opens all the flows it can does not take the descriptors that the daemon needs for the others.
func TestGateway_SurvivesAFloodOfFlows(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	l.Outside.HTTPServer(t, port(lab.OutsideAddr, 80))
	var log bytes.Buffer
	cmd := h.Command("/bin/sh", "-c", `ulimit -n 1024 && exec "$0" up "$@"`, h.Binary(), "--listen-etcd", h.Addr.String()+":2379", "--network", network.String())
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	end := sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	t.Cleanup(end)
	lab.Eventually(t, "the daemon is ready", func() bool {
		r := h.CLI("status", "--output", "json")
		return r.Code == 0 && strings.Contains(r.Stdout, `"ready"`)
	})
	a := join(t, h, "a")
	conn, err := a.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for n := range uint16(9000) {
		// Errors are about earlier datagrams: ports of the outside are closed.
		_, _ = conn.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(port(lab.OutsideAddr, 10000+n)))
	}
	b := join(t, h, "b")
	if _, err := b.Fetch("http://" + lab.OutsideAddr.String() + "/"); err != nil {
		t.Errorf("another container's egress: %v", err)
	}
	if r := h.CLI("ps"); r.Code != 0 {
		t.Errorf("ps: exit code %d\n%s", r.Code, r.Stderr)
	}
	var status lab.Status
	h.CLIJSON(&status, "status")
	end()
	if n := strings.Count(log.String(), "LimitNOFILE"); n != 1 {
		t.Errorf("the log names the remedy %d times, want once", n)
	}
	if strings.Contains(log.String(), "too many open files") {
		t.Error("the daemon ran out of descriptors")
	}
	if t.Failed() {
		t.Logf("%+v\n%s", status, log.String())
	}
}

// Without permission for ICMP sockets the gateway must not pretend that the outside answered.
func TestGateway_NeverForgesAnEcho(t *testing.T) {
	l := lab.New(t, 1, lab.WithoutPing)
	upEmbedded(l.Host(1))
	a := join(t, l.Host(1), "a")
	r, err := a.PingWith(lab.OutsideAddr, lab.PingOptions{Count: 3, Interval: 300 * time.Millisecond})
	if err != nil || r.Received != 0 || len(r.Errors) == 0 {
		t.Fatalf("ping: %v, %v; want errors only", r, err)
	}
	if e := r.Errors[0]; e.Type != 3 || e.Code != 13 {
		t.Errorf("got %+v, want admin-prohibited (3, 13)", e)
	}
	pings(t, a.Space, a.gateway)
}

func TestGateway_ResolvesNames(t *testing.T) {
	l, _, a := lone(t)
	l.Outside.DNSServer(t, port(lab.RouterAddr, 53), map[string]netip.Addr{"outside.lab.test.": lab.OutsideAddr})
	for _, network := range []string{"udp4", "tcp4"} {
		answer, err := a.Resolve(network, port(a.gateway, 53), "outside.lab.test.", dns.TypeA)
		if err != nil || len(answer.Answer) != 1 || !strings.HasSuffix(answer.Answer[0].String(), lab.OutsideAddr.String()) {
			t.Errorf("%s: %v, %v; want %s", network, answer, err, lab.OutsideAddr)
		}
		answer, err = a.Resolve(network, port(a.gateway, 53), "nowhere.lab.test.", dns.TypeA)
		if err != nil || answer.Rcode != dns.RcodeNameError {
			t.Errorf("%s: %v, %v; want NXDOMAIN", network, answer, err)
		}
	}
	answer, err := a.Resolve("udp4", port(a.gateway, 53), "big.lab.test.", dns.TypeTXT)
	if err != nil || !answer.Truncated {
		t.Errorf("big answer by UDP: %v, %v; want it truncated", answer, err)
	}
	answer, err = a.Resolve("tcp4", port(a.gateway, 53), "big.lab.test.", dns.TypeTXT)
	if err != nil || len(answer.Answer) != 1 {
		t.Errorf("big answer by TCP: %v, %v; want it whole", answer, err)
	}
}

func TestGateway_FollowsTheHostsResolvConf(t *testing.T) {
	l, _, a := lone(t)
	l.Outside.DNSServer(t, port(lab.OutsideAddr, 53), map[string]netip.Addr{"outside.lab.test.": lab.OutsideAddr})
	l.Host(1).SetResolvConf("nameserver " + lab.OutsideAddr.String() + "\n")
	lab.Eventually(t, "the gateway asks the new resolver", func() bool {
		answer, err := a.Resolve("udp4", port(a.gateway, 53), "outside.lab.test.", dns.TypeA)
		return err == nil && len(answer.Answer) == 1
	})
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

func TestGateway_KeepsTheHostClosed(t *testing.T) {
	l, d, a := lone(t)
	h := l.Host(1)
	loopback := netip.MustParseAddr("127.0.0.1")
	h.HTTPServer(t, port(loopback, 8080))
	h.UDPEcho(t, port(loopback, 9000))
	l.Outside.HTTPServer(t, port(lab.MetadataAddr, 80))
	if _, err := h.Fetch("http://" + lab.MetadataAddr.String() + "/"); err != nil {
		t.Fatalf("the host itself must reach %s: %v", lab.MetadataAddr, err)
	}
	closed(t, a.Space, port(a.gateway, 8080), "the host's loopback by the gateway's address")
	closed(t, a.Space, port(a.subnet.Addr(), 8080), "the host's loopback by the subnet's address")
	closed(t, a.Space, port(lab.MetadataAddr, 80), "the metadata address")
	closed(t, a.Space, port(h.Addr, 2379), "the embedded etcd")
	if err := a.EchoUDP(port(a.gateway, 9000), 10); err == nil {
		t.Error("the host's loopback is open by UDP")
	}
	noPing(t, a.Space, lab.MetadataAddr)

	// Straight to 127.0.0.1: no container's kernel routes it out, a raw frame does.
	pings(t, a.Space, a.gateway)
	raw, err := a.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	before := d.Drops("")
	packet := lab.IPv4(a.addr, loopback, 17, 64, lab.UDP(1234, 9000, []byte("x")))
	if err := raw.Send(lab.EthernetFrame(mac(t, a.Neighbour(a.gateway)), mac(t, eth0(t, a.Space).MAC), packet)); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "the drop is counted", func() bool { return d.Drops("") > before })
}

func TestGateway_OpensTheHostWhenTold(t *testing.T) {
	l, _, a := lone(t, "--host-loopback", "--allow-link-local")
	h := l.Host(1)
	h.HTTPServer(t, port(netip.MustParseAddr("127.0.0.1"), 8080))
	l.Outside.HTTPServer(t, port(lab.MetadataAddr, 80))
	if _, err := a.Fetch("http://" + port(a.gateway, 8080).String() + "/"); err != nil {
		t.Errorf("the host's loopback by the gateway's address: %v", err)
	}
	if _, err := a.Fetch("http://" + port(lab.MetadataAddr, 80).String() + "/"); err != nil {
		t.Errorf("a link-local address: %v", err)
	}
}

func TestGateway_ManyShortConnections(t *testing.T) {
	l, _, a := lone(t)
	l.Outside.HTTPServer(t, port(lab.OutsideAddr, 80))
	const workers, each = 8, 50
	errs := make(chan error, workers)
	for range workers {
		go func() {
			for range each {
				if _, err := a.Fetch("http://" + lab.OutsideAddr.String() + "/"); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range workers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
