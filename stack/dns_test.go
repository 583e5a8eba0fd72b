// This file tests the resolver where containers find it: at port 53 of the gateway, over UDP and TCP.

package stack

import (
	"encoding/binary"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	mdns "github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/stack/dns"
)

// useServer makes a fake server on loopback the gateway's resolver.
func (w *wire) useServer(h mdns.HandlerFunc) {
	w.t.Helper()
	ready := make(chan struct{})
	s := &mdns.Server{Addr: "127.0.0.1:0", Net: "udp", Handler: h, NotifyStartedFunc: func() { close(ready) }}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.ListenAndServe()
	}()
	<-ready
	w.t.Cleanup(func() {
		_ = s.Shutdown()
		<-done
	})
	conf := filepath.Join(w.t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 127.0.0.1\n"), 0o600); err != nil {
		w.t.Fatal(err)
	}
	port := netip.MustParseAddrPort(s.PacketConn.LocalAddr().String()).Port()
	w.g.resolver = dns.New(dns.Config{ResolvConf: conf, Port: port, Log: w.g.log})
}

func answerTXT(text string) mdns.HandlerFunc {
	return func(rw mdns.ResponseWriter, q *mdns.Msg) {
		m := new(mdns.Msg)
		m.SetReply(q)
		m.Answer = []mdns.RR{&mdns.TXT{Hdr: mdns.RR_Header{Name: q.Question[0].Name, Rrtype: mdns.TypeTXT, Class: mdns.ClassINET}, Txt: []string{text}}}
		_ = rw.WriteMsg(m)
	}
}

func ask(t *testing.T, name string) (*mdns.Msg, []byte) {
	t.Helper()
	q := new(mdns.Msg)
	q.SetQuestion(name, mdns.TypeTXT)
	b, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return q, b
}

func TestDNS_AtTheGatewaysAddress(t *testing.T) {
	w := newWire(t, nil)
	w.useServer(answerTXT("hello"))
	c := w.container(aliceAddr)
	at := netip.AddrPortFrom(gatewayAddr, 53)
	check := func(t *testing.T, q *mdns.Msg, b []byte) {
		t.Helper()
		m := new(mdns.Msg)
		if err := m.Unpack(b); err != nil {
			t.Fatal(err)
		}
		if m.Id != q.Id || len(m.Answer) != 1 || !strings.Contains(m.Answer[0].String(), "hello") {
			t.Errorf("answer: %v", m)
		}
	}
	t.Run("udp", func(t *testing.T) {
		conn := c.dialUDP(at)
		defer conn.Close()
		q, b := ask(t, "example.org.")
		_, _ = conn.Write(b)
		buf := make([]byte, 2048)
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		check(t, q, buf[:n])
	})
	t.Run("tcp", func(t *testing.T) {
		conn := c.mustDialTCP(at)
		defer conn.Close()
		for range 2 { // more than one query on a connection
			q, b := ask(t, "example.org.")
			_, _ = conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
			var size [2]byte
			if _, err := io.ReadFull(conn, size[:]); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(conn, got); err != nil {
				t.Fatal(err)
			}
			check(t, q, got)
		}
	})
	t.Run("garbage", func(t *testing.T) {
		w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 99), at, []byte("no query")))
		eventually(t, "it is counted", func() bool { return w.g.Stats().DNS.Malformed == 1 })
	})
	if s := w.g.Stats(); s.UDPFlows != 0 || s.DNS.Answered != 3 {
		t.Errorf("stats: %+v", s)
	}
}

func TestDNS_AtOtherAddressesThatAContainerAsks(t *testing.T) {
	w := newWire(t, nil)
	w.useServer(answerTXT("hello"))
	alice := w.container(aliceAddr)
	at := []netip.Addr{netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("169.254.1.1")} // the second is closed otherwise
	w.g.SetPolicy([]netip.Addr{aliceAddr}, Policy{DNSAt: at})
	check := func(b []byte) {
		t.Helper()
		m := new(mdns.Msg)
		if err := m.Unpack(b); err != nil || len(m.Answer) != 1 || !strings.Contains(m.Answer[0].String(), "hello") {
			t.Errorf("answer: %v, %v", m, err)
		}
	}
	for _, a := range at {
		addr := netip.AddrPortFrom(a, 53)
		conn := alice.dialUDP(addr)
		_, b := ask(t, "example.net.")
		_, _ = conn.Write(b)
		buf := make([]byte, 2048)
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		check(buf[:n])
		conn.Close()

		stream := alice.mustDialTCP(addr)
		_, _ = stream.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
		var size [2]byte
		if _, err := io.ReadFull(stream, size[:]); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(stream, got); err != nil {
			t.Fatal(err)
		}
		check(got)
		stream.Close()
	}

	// The rest of such an address, and others' queries, are as of any address.
	closed := func(n int, b []byte) {
		t.Helper()
		w.send(b)
		eventually(t, "administratively prohibited", func() bool {
			return w.icmpSeen(header.ICMPv4DstUnreachable, header.ICMPv4AdminProhibited) == n
		})
	}
	_, b := ask(t, "example.org.")
	dns := netip.AddrPortFrom(at[1], 53)
	closed(1, makeUDP(netip.AddrPortFrom(aliceAddr, 99), netip.AddrPortFrom(at[1], 54), b))
	closed(2, makeUDP(netip.AddrPortFrom(bobAddr, 99), dns, b))
	closed(3, makeTCP(netip.AddrPortFrom(bobAddr, 99), dns, header.TCPFlagSyn, 1))
	w.g.DropPolicy([]netip.Addr{aliceAddr})
	closed(4, makeUDP(netip.AddrPortFrom(aliceAddr, 99), dns, b))
}
