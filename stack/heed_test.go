// This file tests which ICMP errors about connections and datagrams the gateway believes.

package stack

import (
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// segmentsOf gives a connection of alice a lot to carry and returns the largest payload in bytes of its segments from then on.
func (w *wire) segmentsOf(host *net.TCPConn, conn net.Conn) int {
	w.t.Helper()
	from := w.countSeen(func(observed) bool { return true })
	data := randomBytes(20_000)
	go func() { _, _ = host.Write(data) }()
	for got := 0; got < len(data); {
		n, err := conn.Read(make([]byte, 4096))
		if err != nil {
			w.t.Fatal(err)
		}
		got += n
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	largest := 0
	for _, o := range w.seen[from:] {
		if o.in.proto != protoTCP {
			continue
		}
		payload := o.in.length - o.in.transport - int(header.TCP(o.b[o.in.transport:]).DataOffset())
		if o.gso != packet.GSONone {
			payload = min(payload, o.segment)
		}
		largest = max(largest, payload)
	}
	return largest
}

// Whose flow it is may be told of a path's MTU by its container, and by the router of the container's node; nobody else is believed.
func TestHeeds_PathMTUsOfWhoMayKnow(t *testing.T) {
	const full = testMTU - header.IPv4MinimumSize - header.TCPMinimumSize
	peer := netip.MustParseAddr("10.5.9.7") // a container of another node
	outside := netip.MustParseAddr("192.0.2.7")
	for name, tt := range map[string]struct {
		container, from, to netip.Addr // to invalid: the end of the connection
		mtu                 uint32
		cut                 bool // in fragments
		want                int  // size of segments; 0: as it was
		reason              dropReason
	}{
		"the container":               {container: aliceAddr, from: aliceAddr, mtu: 1000, want: 1000 - 40},
		"another container":           {container: aliceAddr, from: bobAddr, mtu: 1000, reason: dropICMPForged},
		"of another node":             {container: aliceAddr, from: peer, to: gatewayAddr, mtu: 1000, reason: dropICMPForged},
		"another, to the gateway":     {container: aliceAddr, from: bobAddr, to: gatewayAddr, mtu: 1000, reason: dropICMPForged},
		"the container, to elsewhere": {container: aliceAddr, from: aliceAddr, to: gatewayAddr, mtu: 1000, reason: dropICMPForged},
		"in fragments":                {container: aliceAddr, from: bobAddr, mtu: 1000, cut: true, reason: dropICMPForged},
		"its own in fragments":        {container: aliceAddr, from: aliceAddr, mtu: 1000, cut: true, reason: dropICMPForged},
		"its node":                    {container: peer, from: netip.MustParseAddr("10.5.9.1"), mtu: 1000, want: 1000 - 40},
		"its node, a flannel host":    {container: peer, from: netip.MustParseAddr("10.5.9.0"), mtu: 1000, want: 1000 - 40},
		"another node":                {container: peer, from: netip.MustParseAddr("10.5.8.1"), mtu: 1000, reason: dropICMPForged},
		"its neighbour":               {container: peer, from: netip.MustParseAddr("10.5.9.2"), mtu: 1000, reason: dropICMPForged},
		"the outside":                 {container: aliceAddr, from: outside, mtu: 1000, reason: dropICMPForged},
		"a tiny one":                  {container: aliceAddr, from: aliceAddr, mtu: 68, reason: dropICMPUnused},
		"the least":                   {container: aliceAddr, from: aliceAddr, mtu: 576, want: 576 - 40},
		"none":                        {container: aliceAddr, from: aliceAddr, mtu: 0, reason: dropICMPUnused},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWire(t, func(c *Config) { c.SubnetLen = 24 })
			served, release := make(chan *net.TCPConn, 1), make(chan struct{})
			defer close(release)
			server := listenTCP(t, func(s *net.TCPConn) { served <- s; <-release })
			conn := w.container(tt.container).mustDialTCP(server)
			defer conn.Close()
			host := <-served
			if got := w.segmentsOf(host, conn); got < full-40 { // timestamps
				t.Fatalf("segments of %d bytes before", got)
			}
			container := conn.LocalAddr().(*net.TCPAddr).AddrPort()
			to := tt.to
			if !to.IsValid() {
				to = server.Addr()
			}
			message := tooBig(true, tt.mtu).over4(makeTCP(server, container, header.TCPFlagAck, 1), to4(tt.from), to4(to))
			if tt.cut {
				w.send(fragments(message, 44)...)
			} else {
				w.send(message)
			}
			before := w.segmentsOf(host, conn)
			switch {
			case tt.want != 0 && (before > tt.want || before < tt.want-40 || w.drops(dropICMPForged)+w.drops(dropICMPUnused) != 0):
				t.Errorf("segments of %d bytes, want %d; drops %v", before, tt.want, w.g.Stats().Drops)
			case tt.want == 0 && (before < full-40 || w.drops(tt.reason) != 1):
				t.Errorf("segments of %d bytes, want %d; drops %v", before, full, w.g.Stats().Drops)
			}
		})
	}
}

func TestHeeds_IPv6(t *testing.T) {
	w := newWire(t, func(c *Config) { c.IPv6SubnetLen = 64 })
	ns := w.g.live.Load()
	server := netip.MustParseAddrPort("[2001:db8::80]:80")
	quote := func(container netip.Addr) []byte {
		return makeUDP6(server, netip.AddrPortFrom(container, 1000), []byte("x"))
	}
	tcp := quote(aliceAddr6)
	tcp[6] = protoTCP
	for name, tt := range map[string]struct {
		from   string
		quoted []byte
		typ    header.ICMPv6Type
		mtu    uint32
		want   bool
		reason dropReason
	}{
		"the container":       {aliceAddr6.String(), tcp, header.ICMPv6PacketTooBig, 1280, true, 0},
		"too small":           {aliceAddr6.String(), tcp, header.ICMPv6PacketTooBig, 1279, false, dropICMPUnused},
		"unreachable":         {aliceAddr6.String(), tcp, header.ICMPv6DstUnreachable, 0, true, 0},
		"another container":   {"fd00:5::3", tcp, header.ICMPv6PacketTooBig, 1400, false, dropICMPForged},
		"another unreachable": {"fd00:5::3", tcp, header.ICMPv6DstUnreachable, 0, false, dropICMPForged},
		"its node":            {"fd00:5::1", tcp, header.ICMPv6PacketTooBig, 1400, true, 0},
		"another node":        {"fd00:5:0:1::1", tcp, header.ICMPv6PacketTooBig, 1400, false, dropICMPForged},
		"a quote cut short":   {aliceAddr6.String(), tcp[:39], header.ICMPv6PacketTooBig, 1400, false, dropICMPForged},
		"IPv4 in the quote":   {aliceAddr6.String(), makeTCP(netip.AddrPortFrom(loopback, 1), netip.AddrPortFrom(aliceAddr, 1), 0, 0), header.ICMPv6PacketTooBig, 1400, false, dropICMPForged},
		"UDP, too big":        {aliceAddr6.String(), quote(aliceAddr6), header.ICMPv6PacketTooBig, 1400, false, dropICMPUnused},
	} {
		was := w.drops(tt.reason)
		m := icmpError{typ: uint8(tt.typ), rest: tt.mtu}.over6(tt.quoted, netip.MustParseAddr(tt.from).As16(), server.Addr().As16())
		in, ok := parseIP(m)
		if !ok {
			t.Fatal(name)
		}
		if got := ns.heeds(m, in); got != tt.want || !got && w.drops(tt.reason) != was+1 {
			t.Errorf("%s: heeded %v, want %v; drops %v", name, got, tt.want, w.g.Stats().Drops)
		}
	}
}

// What containers say of datagrams is of use in one case only; the rest is counted.
func TestHeeds_CountsWhatItCannotUse(t *testing.T) {
	w := newWire(t, nil)
	at := listenUDP(t, same)
	src := netip.AddrPortFrom(aliceAddr, 7)
	w.send(makeUDP(src, at, []byte("x")))
	eventually(t, "the flow", func() bool { return w.g.Stats().UDPFlows == 1 })
	reply := makeUDP(at, src, []byte("x"))
	for i, m := range []icmpError{
		hostUnreachable.message(true), tooBig(true, 1000), {typ: uint8(header.ICMPv4TimeExceeded), code: 1},
	} {
		w.send(m.over4(reply, to4(aliceAddr), to4(at.Addr())))
		if n := w.drops(dropICMPUnused); n != uint64(i+1) {
			t.Errorf("%d drops, want %d", n, i+1)
		}
	}
	w.send(portUnreachable.message(true).over4(makeUDP(at, netip.AddrPortFrom(aliceAddr, 8), nil), to4(aliceAddr), to4(at.Addr()))) // of no flow
	if n := w.drops(dropICMPUnused); n != 4 {
		t.Errorf("%d drops, want 4", n)
	}
	if n := w.g.Stats().UDPFlows; n != 1 {
		t.Error("the flow has ended")
	}
}

// A connection that is being opened is not ended by another container.
func TestHeeds_NoForgedRefusalOfADial(t *testing.T) {
	w := newWire(t, nil)
	to := netip.AddrPortFrom(aliceAddr, 80) // which never answers
	result := make(chan error, 1)
	go func() {
		_, err := w.g.DialTCP(t.Context(), client, to)
		result <- err
	}()
	eventually(t, "the SYN", func() bool { return w.tcpSeen(header.TCPFlagSyn) > 0 })
	w.mu.Lock()
	var syn []byte
	for _, o := range w.seen {
		if o.in.proto == protoTCP {
			syn = o.b
		}
	}
	w.mu.Unlock()
	w.send(hostUnreachable.message(true).over4(syn, to4(bobAddr), to4(client.Addr())))
	if n := w.drops(dropICMPForged); n != 1 {
		t.Errorf("%d drops, want 1", n)
	}
	if len(result) != 0 {
		t.Fatalf("the dial has ended: %v", <-result)
	}
	w.send(hostUnreachable.message(true).over4(syn, to4(aliceAddr), to4(client.Addr())))
	if err := <-result; err == nil {
		t.Error("the container's own word is not heeded")
	}
}
