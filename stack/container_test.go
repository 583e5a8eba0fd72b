// This file is the containers of the tests: gVisor stacks of their own, wired to a Gateway as forwarder wires it.

package stack

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

var (
	gatewayAddr  = netip.MustParseAddr("10.5.1.1")
	gatewayAddr0 = netip.MustParseAddr("10.5.1.0")
	gatewayAddr6 = netip.MustParseAddr("fd00:5::1")
	aliceAddr    = netip.MustParseAddr("10.5.1.2")
	aliceAddr6   = netip.MustParseAddr("fd00:5::2")
	bobAddr      = netip.MustParseAddr("10.5.1.3")
	loopback     = netip.MustParseAddr("127.0.0.1")
)

const testMTU = 1450

// wire joins a Gateway with containers. It checks every packet for them: what a kernel would refuse fails the test.
type wire struct {
	t   *testing.T
	g   *Gateway
	log *lockedBuffer

	mu         sync.Mutex
	containers map[netip.Addr]*container
	seen       []observed // what the gateway sent
}

// observed is a packet on its way to a container: its bytes as far as its headers, and what it is.
type observed struct {
	in      inbound
	b       []byte
	gso     packet.GSO
	segment int // payload in bytes of the packets that a superpacket stands for
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newWire starts a Gateway. Its Run ends with the test, which then must have no goroutine of it left.
func newWire(t *testing.T, change func(*Config)) *wire {
	t.Helper()
	w := &wire{t: t, log: &lockedBuffer{}, containers: make(map[netip.Addr]*container)}
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 127.0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Config{
		Addresses:    []netip.Addr{gatewayAddr, gatewayAddr0, gatewayAddr6},
		MTU:          testMTU,
		Exit:         w.exit,
		HostLoopback: true,
		ResolvConf:   conf,
		Log:          slog.New(slog.NewTextHandler(w.log, nil)),
	}
	if change != nil {
		change(&c)
	}
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	w.g = g
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- g.Run(ctx) }()
	eventually(t, "the gateway runs", func() bool { return g.live.Load() != nil })
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ran:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("Run has not returned:\n%s", stacks())
		}
		// The containers go after the gateway, whose last resets they may still take.
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, c := range w.containers {
			c.close()
		}
	})
	return w
}

// exit is the gateway's Config.Exit.
func (w *wire) exit(pkts []*packet.Packet) {
	for _, p := range pkts {
		if p.Off < packet.Headroom {
			w.t.Errorf("packet with %d bytes of headroom, want %d", p.Off, packet.Headroom)
		}
		clear(p.Buf[:p.Off]) // ours to overwrite
		b := p.Bytes()
		in, ok := parseIP(b)
		if !ok || in.length != len(b) {
			w.t.Errorf("the gateway sent no IP packet: % x", b[:min(len(b), 40)])
			continue
		}
		w.check(p, b, in)
		w.mu.Lock()
		if len(w.seen) < 100_000 {
			w.seen = append(w.seen, observed{in: in, b: bytes.Clone(b[:min(len(b), 128)]), gso: p.GSO, segment: int(p.SegSize)})
		}
		c := w.containers[in.dst]
		w.mu.Unlock()
		if c != nil {
			c.receive(b)
		}
	}
}

// check holds a packet to what virtio_net_hdr and a receiving kernel ask for. It completes a checksum that is owed.
func (w *wire) check(p *packet.Packet, b []byte, in inbound) {
	if in.dst.Is4() && header.IPv4(b).CalculateChecksum() != 0xffff {
		w.t.Errorf("wrong IPv4 header checksum")
	}
	if p.GSO == packet.GSONone {
		if len(b) > testMTU {
			w.t.Errorf("packet of %d bytes is larger than the MTU and not marked for segmentation", len(b))
		}
	} else {
		h := header.TCP(b[in.transport:])
		if want := in.transport + int(h.DataOffset()); int(p.HdrLen) != want {
			w.t.Errorf("HdrLen %d, want %d", p.HdrLen, want)
		}
		if max := testMTU - int(p.HdrLen); int(p.SegSize) > max || p.SegSize == 0 {
			w.t.Errorf("SegSize %d, want 1 to %d", p.SegSize, max)
		}
		if !p.NeedsCsum || len(b) > gsoMaxSize+200 {
			w.t.Errorf("superpacket of %d bytes, NeedsCsum %v", len(b), p.NeedsCsum)
		}
		want := packet.GSOTCPv4
		if in.dst.Is6() {
			want = packet.GSOTCPv6
		}
		if p.GSO != want {
			w.t.Errorf("GSO kind %d, want %d", p.GSO, want)
		}
	}
	if p.NeedsCsum {
		start, field := int(p.CsumStart), int(p.CsumStart)+int(p.CsumOffset)
		if start != in.transport {
			w.t.Errorf("CsumStart %d, want %d", start, in.transport)
		}
		if got, want := binary.BigEndian.Uint16(b[field:]), pseudoSum(b, in); got != want {
			w.t.Errorf("partial checksum %#x, want that of the pseudo header, %#x", got, want)
		}
		binary.BigEndian.PutUint16(b[field:], ^checksum.Checksum(b[start:], 0))
	}
	if !in.fragment && !checksumRight(b, in) {
		w.t.Errorf("wrong transport checksum, protocol %d", in.proto)
	}
	if in.proto == protoICMP && !in.fragment && checksum.Checksum(b[in.transport:], 0) != 0xffff {
		w.t.Errorf("wrong ICMP checksum")
	}
	if in.proto == protoICMPv6 && checksum.Checksum(b[in.transport:], pseudoSum(b, in)) != 0xffff {
		w.t.Errorf("wrong ICMPv6 checksum")
	}
}

// count is how many packets the gateway has sent that which likes.
func (w *wire) countSeen(which func(observed) bool) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, o := range w.seen {
		if which(o) {
			n++
		}
	}
	return n
}

// icmpSeen counts ICMP messages of a type and code that the gateway has sent.
func (w *wire) icmpSeen(typ header.ICMPv4Type, code header.ICMPv4Code) int {
	return w.countSeen(func(o observed) bool {
		if o.in.proto != protoICMP {
			return false
		}
		h := header.ICMPv4(o.b[o.in.transport:])
		return h.Type() == typ && h.Code() == code
	})
}

// tcpSeen counts TCP segments that have just these flags, of SYN, ACK, RST and FIN.
func (w *wire) tcpSeen(flags header.TCPFlags) int {
	return w.countSeen(func(o observed) bool {
		const which = header.TCPFlagSyn | header.TCPFlagAck | header.TCPFlagRst | header.TCPFlagFin
		return o.in.proto == protoTCP && header.TCP(o.b[o.in.transport:]).Flags()&which == flags
	})
}

// container is one container with a network stack of its own, which makes superpackets as a kernel does behind a TAP.
type container struct {
	w     *wire
	s     *gstack.Stack
	link  *link
	addr  netip.Addr
	ended chan struct{}
}

func (w *wire) container(addr netip.Addr) *container {
	w.t.Helper()
	c := &container{w: w, addr: addr, ended: make(chan struct{})}
	c.s = gstack.New(gstack.Options{
		NetworkProtocols:   []gstack.NetworkProtocolFactory{ipv4.NewProtocolWithOptions(ipv4.Options{AllowExternalLoopbackTraffic: true}), ipv6.NewProtocol},
		TransportProtocols: []gstack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	scratch := packet.NewScratch()
	c.link = &link{exit: newExitQueue(8192, new(counters), func(pkts []*packet.Packet) {
		turn := w.g.Begin() // as the router's loops do
		w.g.Send(scratch, pkts)
		runtime.Gosched()
		if turn != nil {
			turn.End()
		}
	})}
	c.link.SetMTU(testMTU)
	if err := c.s.CreateNIC(nicID, c.link); err != nil {
		w.t.Fatal(err)
	}
	pa := tcpip.ProtocolAddress{Protocol: header.IPv4ProtocolNumber, AddressWithPrefix: tcpipAddr(addr).WithPrefix()}
	if addr.Is6() {
		pa.Protocol = header.IPv6ProtocolNumber
	}
	if err := c.s.AddProtocolAddress(nicID, pa, gstack.AddressProperties{}); err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	w.containers[addr] = c
	w.mu.Unlock()
	c.s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}, {Destination: header.IPv6EmptySubnet, NIC: nicID}})
	go func() {
		defer close(c.ended)
		c.link.exit.drain()
	}()
	return c
}

func (c *container) receive(b []byte) {
	proto := header.IPv4ProtocolNumber
	if b[0]>>4 == 6 {
		proto = header.IPv6ProtocolNumber
	}
	c.link.deliver(b, proto)
}

func (c *container) close() {
	select {
	case <-c.ended:
		return
	default:
	}
	c.s.Destroy()
	c.link.exit.close()
	<-c.ended
}

func full(a netip.AddrPort) (tcpip.FullAddress, tcpip.NetworkProtocolNumber) {
	proto := header.IPv4ProtocolNumber
	if a.Addr().Is6() {
		proto = header.IPv6ProtocolNumber
	}
	return tcpip.FullAddress{NIC: nicID, Addr: tcpipAddr(a.Addr()), Port: a.Port()}, proto
}

// patience is how long a test waits for what must happen. It is no measure of speed.
const patience = 30 * time.Second

func (c *container) dialTCP(to netip.AddrPort) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	a, proto := full(to)
	return gonet.DialContextTCP(ctx, c.s, a, proto)
}

func (c *container) mustDialTCP(to netip.AddrPort) *gonet.TCPConn {
	c.w.t.Helper()
	conn, err := c.dialTCP(to)
	if err != nil {
		c.w.t.Fatalf("dial %v: %v", to, err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

func (c *container) dialUDP(to netip.AddrPort) *gonet.UDPConn {
	c.w.t.Helper()
	a, proto := full(to)
	conn, err := gonet.DialUDP(c.s, nil, &a, proto)
	if err != nil {
		c.w.t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// send gives the gateway a hand-made packet.
func (w *wire) send(pkts ...[]byte) {
	var list []*packet.Packet
	for _, b := range pkts {
		buf := append(make([]byte, packet.Headroom), b...)
		p := new(packet.Packet)
		p.Reset(buf, packet.Headroom)
		list = append(list, p)
	}
	w.g.Send(packet.NewScratch(), list)
	for _, p := range list {
		clear(p.Buf) // what was lent is no longer the gateway's
	}
}

// makeIPv4 lays out an IPv4 packet.
func makeIPv4(proto uint8, src, dst netip.Addr, payload []byte) []byte {
	b := make([]byte, header.IPv4MinimumSize+len(payload))
	h := header.IPv4(b)
	h.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: proto, SrcAddr: tcpipAddr(src), DstAddr: tcpipAddr(dst)})
	h.SetChecksum(^h.CalculateChecksum())
	copy(b[header.IPv4MinimumSize:], payload)
	return b
}

func makeUDP(src, dst netip.AddrPort, payload []byte) []byte {
	u := make([]byte, header.UDPMinimumSize+len(payload))
	copy(u[header.UDPMinimumSize:], payload)
	header.UDP(u).Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(len(u))})
	b := makeIPv4(protoUDP, src.Addr(), dst.Addr(), u)
	fixTransport(b)
	return b
}

func makeTCP(src, dst netip.AddrPort, flags header.TCPFlags, seq uint32) []byte {
	t := make([]byte, header.TCPMinimumSize)
	header.TCP(t).Encode(&header.TCPFields{SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: seq, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535})
	b := makeIPv4(protoTCP, src.Addr(), dst.Addr(), t)
	fixTransport(b)
	return b
}

func makeEcho(src, dst netip.Addr, id, seq uint16, payload string) []byte {
	m := make([]byte, echoHeader+len(payload))
	h := header.ICMPv4(m)
	h.SetType(header.ICMPv4Echo)
	h.SetIdent(id)
	h.SetSequence(seq)
	copy(m[echoHeader:], payload)
	h.SetChecksum(^checksum.Checksum(m, 0))
	return makeIPv4(protoICMP, src, dst, m)
}

func makeEcho6(src, dst netip.Addr, id, seq uint16, payload string) []byte {
	b := make([]byte, header.IPv6MinimumSize+echoHeader+len(payload))
	h := header.ICMPv6(b[header.IPv6MinimumSize:])
	header.IPv6(b).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(h)), TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: 64,
		SrcAddr: tcpipAddr(src), DstAddr: tcpipAddr(dst),
	})
	h.SetType(header.ICMPv6EchoRequest)
	h.SetIdent(id)
	h.SetSequence(seq)
	copy(h[echoHeader:], payload)
	in, _ := parseIP(b)
	h.SetChecksum(^checksum.Checksum(h, pseudoSum(b, in)))
	return b
}

// fixTransport writes the checksum of a TCP segment or UDP datagram.
func fixTransport(b []byte) {
	in, _ := parseIP(b)
	t := b[in.transport:]
	if in.proto == protoUDP {
		header.UDP(t).SetChecksum(0)
		header.UDP(t).SetChecksum(^checksum.Checksum(t, pseudoSum(b, in)))
		return
	}
	header.TCP(t).SetChecksum(0)
	header.TCP(t).SetChecksum(^checksum.Checksum(t, pseudoSum(b, in)))
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if is() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

func (w *wire) drops(r dropReason) uint64 { return w.g.Stats().Drops[dropNames[r]] }

// listenTCP serves connections on the host's loopback until the test ends.
func listenTCP(t *testing.T, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		conns []net.Conn
	)
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return netip.MustParseAddrPort(l.Addr().String())
}

// listenUDP answers every datagram on the host's loopback with what answer makes of it.
func listenUDP(t *testing.T, answer func([]byte) []byte) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if b := answer(buf[:n]); b != nil {
				_, _ = c.WriteToUDPAddrPort(b, from)
			}
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return netip.MustParseAddrPort(c.LocalAddr().String())
}

// closedPort is a TCP and UDP port of the host's loopback where nobody listens.
func closedPort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

// TestMain fails when goroutines of the package are left at the end.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		left := ""
		for range 200 {
			left = ""
			for _, g := range strings.Split(stacks(), "\n\n") {
				if strings.Contains(g, "rootless-ovl/stack") && !strings.Contains(g, "TestMain") || strings.Contains(g, "gvisor.dev") {
					left += g + "\n\n"
				}
			}
			if left == "" {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if left != "" {
			fmt.Fprintf(os.Stderr, "goroutines left:\n%s", left)
			code = 1
		}
	}
	os.Exit(code)
}
