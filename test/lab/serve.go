// This file is the servers and clients that tests put into namespaces: HTTP, UDP echo and DNS. They are goroutines of the
// test process; only their sockets are inside.

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// HTTPServer serves on addr in the space until the test ends:
//
//	/          the client's address, as the server saw it
//	/bytes?n=  n bytes of a pattern (see Pattern)
//	/count     (POST) the number of bytes that came in and matched the pattern
func (s *Space) HTTPServer(t T, addr netip.AddrPort) {
	t.Helper()
	l, err := s.Listen("tcp", addr.String())
	must(t, "web server", err)
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		_, _ = io.WriteString(w, host)
	})
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.Copy(w, io.LimitReader(&pattern{}, n))
	})
	mux.HandleFunc("POST /count", func(w http.ResponseWriter, r *http.Request) {
		n, err := checkPattern(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		_, _ = fmt.Fprint(w, n)
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
}

// HTTPClient is a client whose connections start in the space. Names are not resolved: URLs hold addresses.
func (s *Space) HTTPClient() *http.Client {
	return &http.Client{
		Timeout:   50 * time.Second,
		Transport: &http.Transport{DialContext: s.DialContext, DisableKeepAlives: true},
	}
}

// Fetch gets a URL's body from inside the space.
func (s *Space) Fetch(url string) (string, error) {
	resp, err := s.HTTPClient().Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return string(b), err
}

// Download gets n bytes from the HTTPServer at addr and checks every one.
func (s *Space) Download(addr netip.AddrPort, n int64) error {
	resp, err := s.HTTPClient().Get(fmt.Sprintf("http://%s/bytes?n=%d", addr, n))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := checkPattern(resp.Body)
	if err == nil && got != n {
		err = fmt.Errorf("%d bytes of %d", got, n)
	}
	return err
}

// Upload sends n bytes to the HTTPServer at addr, which checks every one.
func (s *Space) Upload(addr netip.AddrPort, n int64) error {
	resp, err := s.HTTPClient().Post(fmt.Sprintf("http://%s/count", addr), "application/octet-stream", io.LimitReader(&pattern{}, n))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && string(b) != strconv.FormatInt(n, 10) {
		err = fmt.Errorf("the server counted %s of %d", b, n)
	}
	return err
}

// pattern is an endless reader whose bytes tell a missing, doubled or swapped piece: a prime-length ramp.
type pattern struct{ at int64 }

const patternPeriod = 251

var patternTable = func() []byte {
	b := make([]byte, patternPeriod*260)
	for i := range b {
		b[i] = byte(i % patternPeriod)
	}
	return b
}()

// Pattern is the first n bytes of what the servers send.
func Pattern(n int) []byte {
	b := make([]byte, n)
	_, _ = (&pattern{}).Read(b)
	return b
}

func (p *pattern) Read(b []byte) (int, error) {
	n := copy(b, patternTable[p.at%patternPeriod:])
	for n < len(b) {
		n += copy(b[n:], patternTable[(p.at+int64(n))%patternPeriod:])
	}
	p.at += int64(n)
	return n, nil
}

func checkPattern(r io.Reader) (int64, error) {
	var at int64
	buf, want := make([]byte, 64<<10), make([]byte, 64<<10)
	expected := &pattern{}
	for {
		n, err := r.Read(buf)
		_, _ = expected.Read(want[:n])
		if !bytes.Equal(buf[:n], want[:n]) {
			return at, fmt.Errorf("the %d bytes from byte %d differ from what was sent", n, at)
		}
		at += int64(n)
		if err == io.EOF {
			return at, nil
		}
		if err != nil {
			return at, fmt.Errorf("after %d bytes: %w", at, err)
		}
	}
}

// UDPEcho answers every datagram at addr in the space with itself until the test ends. seen receives the sources.
func (s *Space) UDPEcho(t T, addr netip.AddrPort) (seen <-chan netip.AddrPort) {
	t.Helper()
	conn, err := s.ListenPacket("udp", addr.String())
	must(t, "UDP echo", err)
	sources := make(chan netip.AddrPort, 1024)
	go func() {
		buf := make([]byte, 70000)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			select {
			case sources <- from.(*net.UDPAddr).AddrPort():
			default:
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() { conn.Close() })
	return sources
}

// EchoUDP sends n bytes to addr and waits for the same bytes, a few times over, since datagrams may be lost.
func (s *Space) EchoUDP(addr netip.AddrPort, n int) error {
	conn, err := s.DialContext(context.Background(), "udp", addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.(*net.UDPConn).SetWriteBuffer(1 << 20)
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		return err
	}
	// A datagram above the MTU is to be sent in fragments, also after a frag-needed. IPv6 does so unless told otherwise.
	if err := raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
	}); err != nil {
		return err
	}
	want := Pattern(n)
	buf := make([]byte, 70000)
	for range 5 {
		if _, err = conn.Write(want); err != nil {
			continue
		}
		_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
		var got int
		if got, err = conn.Read(buf); err != nil {
			continue
		}
		if !bytes.Equal(buf[:got], want) {
			return fmt.Errorf("%d bytes came back for %d, or others", got, n)
		}
		return nil
	}
	return err
}

// DNSServer answers at addr in the space until the test ends: A records from names (with a final dot), a TXT record of 2000
// bytes for "big.lab.test.", which only fits TCP, and NXDOMAIN for the rest.
func (s *Space) DNSServer(t T, addr netip.AddrPort, names map[string]netip.Addr) {
	t.Helper()
	handle := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		name := q.Question[0].Name
		header := dns.RR_Header{Name: name, Class: dns.ClassINET, Ttl: 60}
		a, known := names[name]
		switch {
		case known && q.Question[0].Qtype == dns.TypeA:
			header.Rrtype = dns.TypeA
			m.Answer = []dns.RR{&dns.A{Hdr: header, A: a.AsSlice()}}
		case known:
		case name == "big.lab.test.":
			header.Rrtype = dns.TypeTXT
			txt := &dns.TXT{Hdr: header}
			for range 10 {
				txt.Txt = append(txt.Txt, string(bytes.Repeat([]byte("x"), 200)))
			}
			m.Answer = []dns.RR{txt}
			if w.LocalAddr().Network() == "udp" {
				m.Truncate(dns.MinMsgSize)
			}
		default:
			m.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(m)
	})
	packet, err := s.ListenPacket("udp4", addr.String())
	must(t, "DNS server", err)
	stream, err := s.Listen("tcp4", addr.String())
	must(t, "DNS server", err)
	for _, server := range []*dns.Server{{PacketConn: packet, Handler: handle}, {Listener: stream, Handler: handle}} {
		go func() { _ = server.ActivateAndServe() }()
	}
	t.Cleanup(func() {
		packet.Close()
		stream.Close()
	})
}

// Resolve asks the DNS server at addr, over "udp4" or "tcp4".
func (s *Space) Resolve(network string, addr netip.AddrPort, name string, kind uint16) (*dns.Msg, error) {
	conn, err := s.DialContext(context.Background(), network, addr.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	q := new(dns.Msg)
	q.SetQuestion(name, kind)
	client, times := &dns.Client{Net: network, Timeout: 10 * time.Second}, 1
	if strings.HasPrefix(network, "udp") { // a question may be lost, as when the daemon has just started: resolvers ask again, too
		client.Timeout, times = 2*time.Second, 5
	}
	for {
		answer, _, err := client.ExchangeWithConn(q, &dns.Conn{Conn: conn, UDPSize: 4096})
		if times--; times == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return answer, err
		}
	}
}
