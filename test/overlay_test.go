// Tests of the overlay: what containers send to each other.

package test

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestOverlay_ConnectsContainers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b, c := join(t, s.h1, "a"), join(t, s.h1, "b"), join(t, s.h2, "c")
	for _, m := range []*member{a, b, c} {
		m.HTTPServer(t, port(m.addr, 8080))
	}
	for _, pair := range []struct {
		name     string
		from, to *member
	}{
		{"same node", a, b},
		{"across nodes", a, c},
		{"across nodes, back", c, b},
	} {
		t.Run(pair.name, func(t *testing.T) {
			from, to := pair.from, pair.to
			seen := to.UDPEcho(t, port(to.addr, 9000))
			pings(t, from.Space, to.addr)
			if got, err := from.Fetch("http://" + port(to.addr, 8080).String() + "/"); err != nil || got != from.addr.String() {
				t.Errorf("the server saw the client as %q, %v; want its own address %s", got, err, from.addr)
			}
			if err := from.Download(port(to.addr, 8080), 20<<20); err != nil {
				t.Errorf("TCP download: %v", err)
			}
			if err := from.Upload(port(to.addr, 8080), 20<<20); err != nil {
				t.Errorf("TCP upload: %v", err)
			}
			for _, size := range []int{0, 1, 512, overlayMTU - 28, overlayMTU - 27, 9000, 65507} {
				if size == 0 { // an empty datagram comes back as an empty read, which no deadline tells from nothing
					continue
				}
				if err := from.EchoUDP(port(to.addr, 9000), size); err != nil {
					t.Errorf("UDP, %d bytes: %v", size, err)
				}
			}
			select {
			case src := <-seen:
				if src.Addr() != from.addr {
					t.Errorf("UDP came from %s, want %s", src.Addr(), from.addr)
				}
			default:
				t.Error("no UDP datagram arrived")
			}
		})
	}
}

func TestOverlay_LargePingsCross(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	for _, size := range []int{overlayMTU - 28, 4000, 20000} {
		r, err := a.PingWith(b.addr, lab.PingOptions{Count: 3, Size: size})
		if err != nil || r.Lost() != 0 {
			t.Errorf("ping of %d bytes: %v, %v", size, r, err)
		}
	}
}

func TestOverlay_LeasesDistinctSubnetsOfTheNetwork(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	st1, st2 := s.d1.Status(), s.d2.Status()
	p1, err1 := netip.ParsePrefix(st1.Subnet)
	p2, err2 := netip.ParsePrefix(st2.Subnet)
	if err1 != nil || err2 != nil {
		t.Fatalf("subnets %q and %q", st1.Subnet, st2.Subnet)
	}
	if p1.Overlaps(p2) || !network.Overlaps(p1) || !network.Overlaps(p2) || p1.Bits() != 24 {
		t.Errorf("subnets %s and %s of %s", p1, p2, network)
	}
	a := join(t, s.h1, "a")
	if a.subnet != p1.Masked() || !p1.Contains(a.gateway) {
		t.Errorf("container has %s with gateway %s, want an address of %s", a.at.Addr, a.gateway, p1)
	}
}

// A superpacket is one packet of up to 64 KB that stands for many: one read, one send, and whole again at the receiver.
// By itself: how large packets are depends on who else sends.
func TestOverlay_SuperpacketIsOneReadAndOneSend(t *testing.T) {
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	pings(t, a.Space, b.addr) // both kernels know their gateway now
	quiet(t, a, b)

	sender, err := a.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	receiver, err := b.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer receiver.Close()
	const segment = overlayMTU - 40
	payload := lab.Pattern(44 * segment)
	packet := lab.TCPSegment(port(a.addr, 4000), port(b.addr, 5000), payload)
	frame := lab.EthernetFrame(mac(t, a.Neighbour(a.gateway)), mac(t, eth0(t, a.Space).MAC), packet)

	before1, before2 := s.d1.Status().Counters, s.d2.Status().Counters
	if err := sender.SendTSO(frame, segment); err != nil {
		t.Fatal(err)
	}
	var got []byte
	frames := 0
	for len(got) < len(payload) {
		f, err := receiver.Receive(10*time.Second, func(f lab.Frame) bool {
			return len(f.Data) > 54 && binary.BigEndian.Uint16(f.Data[36:]) == 5000 && f.Data[23] == 6
		})
		if err != nil {
			t.Fatalf("%d bytes of %d came in %d frames: %v", len(got), len(payload), frames, err)
		}
		got = append(got, f.Data[54:]...)
		frames++
		if len(got) < len(payload) && f.Segment == 0 {
			t.Errorf("frame %d of %d bytes is no superpacket", frames, len(f.Data))
		}
	}
	if string(got) != string(payload) {
		t.Error("the payload differs from what was sent")
	}
	// The receiving kernel may answer the stray segment with a RST, so only the sender's direction counts exactly: the RST comes in
	// there as one datagram and one write.
	// The packets may be here before the call that sent them has returned and is counted.
	lab.Eventually(t, "the sending node has counted its packets", func() bool {
		return delta(t, before1, s.d1.Status().Counters, "underlay", "sent_packets") > 0
	})
	after1, after2 := s.d1.Status().Counters, s.d2.Status().Counters
	for _, c := range []struct {
		group, name string
		want        uint64
	}{
		{"tap", "reads", 1},
		{"underlay", "send_calls", 1},
		{"underlay", "sent_packets", 44},
	} {
		if got := delta(t, before1, after1, c.group, c.name); got != c.want {
			t.Errorf("sending node: %s.%s grew by %d, want %d", c.group, c.name, got, c.want)
		}
	}
	if frames > 2 {
		t.Errorf("%d frames arrived for one superpacket", frames)
	}
	if got := delta(t, before2, after2, "tap", "writes"); got != uint64(frames) {
		t.Errorf("receiving node: %d writes to the TAP for %d frames", got, frames)
	}
}

// By itself: how large packets are depends on who else sends.
func TestOverlay_TCPTravelsInSuperpackets(t *testing.T) {
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	b.HTTPServer(t, port(b.addr, 8080))
	before1, before2 := s.d1.Status().Counters, s.d2.Status().Counters
	const size = 64 << 20
	if err := a.Upload(port(b.addr, 8080), size); err != nil {
		t.Fatal(err)
	}
	after1, after2 := s.d1.Status().Counters, s.d2.Status().Counters
	reads, sends := delta(t, before1, after1, "tap", "reads"), delta(t, before1, after1, "underlay", "send_calls")
	writes := delta(t, before2, after2, "tap", "writes")
	t.Logf("%d MB: %d TAP reads, %d UDP sends; at the receiver %d TAP writes", size>>20, reads, sends, writes)
	packets := uint64(size / (overlayMTU - 52)) // what it would be without superpackets
	for name, n := range map[string]uint64{"TAP reads": reads, "UDP sends": sends, "TAP writes at the receiver": writes} {
		if n == 0 || n > packets/8 {
			t.Errorf("%d %s for %d packets' worth of data: superpackets are cut", n, name, packets)
		}
	}
}

// quiet waits until the containers' kernels have stopped sending by themselves (IPv6 and ARP chatter of a new interface).
func quiet(t *testing.T, members ...*member) {
	t.Helper()
	last := uint64(0)
	stable := 0
	lab.Eventually(t, "the containers are quiet", func() bool {
		sum := uint64(0)
		for _, m := range members {
			_ = m.Do(func() error {
				link, err := netlink.LinkByName("eth0")
				if err == nil {
					sum += link.Attrs().Statistics.TxPackets
				}
				return err
			})
		}
		if sum == last {
			stable++
		} else {
			stable = 0
		}
		last = sum
		return stable >= 5
	})
}

func delta(t *testing.T, before, after map[string]map[string]uint64, group, name string) uint64 {
	t.Helper()
	n, ok := after[group][name]
	if !ok {
		t.Errorf("status has no counter %s.%s: %v", group, name, after)
	}
	return n - before[group][name]
}

func mac(t *testing.T, s string) [6]byte {
	t.Helper()
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		t.Fatalf("MAC address %q: %v", s, err)
	}
	return [6]byte(hw)
}

func TestOverlay_AnswersWithICMPErrors(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	nobody := network.Addr().Next() // the first subnet is never leased
	unattached := func(p netip.Prefix) netip.Addr {
		bytes := p.Addr().As4()
		bytes[3] = 200
		return netip.AddrFrom4(bytes)
	}
	for _, c := range []struct {
		name       string
		dst        netip.Addr
		ttl        int
		from       netip.Addr
		kind, code []byte
	}{
		{"no lease", nobody, 64, a.gateway, []byte{3}, []byte{0, 1}},
		{"own subnet, nobody there", unattached(a.subnet), 64, a.gateway, []byte{3}, []byte{1}},
		{"peer's subnet, nobody there", unattached(b.subnet), 64, b.gateway, []byte{3}, []byte{1}},
		{"time exceeded at our node", b.addr, 1, a.gateway, []byte{11}, []byte{0}},
		{"time exceeded at the peer", b.addr, 2, b.gateway, []byte{11}, []byte{0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			// Errors are limited in rate; one of a few is enough.
			r, err := a.PingWith(c.dst, lab.PingOptions{Count: 3, TTL: c.ttl, Interval: 300 * time.Millisecond})
			if err != nil || r.Received != 0 || len(r.Errors) == 0 {
				t.Fatalf("ping: %v, %v; want errors only", r, err)
			}
			e := r.Errors[0]
			if e.From != c.from || !strings.ContainsRune(string(c.kind), rune(e.Type)) || !strings.ContainsRune(string(c.code), rune(e.Code)) {
				t.Errorf("got %+v, want type %v code %v from %s", e, c.kind, c.code, c.from)
			}
		})
	}
	t.Run("frag needed", func(t *testing.T) {
		if err := a.Do(func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(link, 4000)
		}); err != nil {
			t.Fatal(err)
		}
		r, err := a.PingWith(b.addr, lab.PingOptions{Count: 3, Size: 3000, DontFrag: true, Interval: 300 * time.Millisecond})
		if err != nil || r.Received != 0 || len(r.Errors) == 0 {
			t.Fatalf("ping: %v, %v; want frag-needed", r, err)
		}
		if e := r.Errors[0]; e.Type != 3 || e.Code != 4 || e.MTU != overlayMTU {
			t.Errorf("got %+v, want frag-needed with MTU %d", e, overlayMTU)
		}
	})
}

func TestOverlay_DropsWhatAContainerSendsFromAnotherAddress(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b, c := join(t, s.h1, "a"), join(t, s.h1, "b"), join(t, s.h2, "c")
	pings(t, a.Space, a.gateway)
	raw, err := a.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	seen := map[string]<-chan netip.AddrPort{"same node": b.UDPEcho(t, port(b.addr, 9000)), "across": c.UDPEcho(t, port(c.addr, 9000))}
	sources := map[string]netip.Addr{
		"another container of the node": b.addr, "a container of a peer": c.addr, "the gateway": a.gateway,
		"the outside": lab.OutsideAddr, "the host": s.h1.Addr, "loopback": netip.MustParseAddr("127.0.0.1"),
		"unspecified": netip.IPv4Unspecified(),
	}
	for name, src := range sources {
		before := s.d1.Drops("")
		for _, dst := range []netip.Addr{b.addr, c.addr, lab.OutsideAddr, a.gateway} {
			packet := lab.IPv4(src, dst, 17, 64, lab.UDP(1234, 9000, []byte("spoof")))
			if err := raw.Send(lab.EthernetFrame(mac(t, a.Neighbour(a.gateway)), mac(t, eth0(t, a.Space).MAC), packet)); err != nil {
				t.Fatal(err)
			}
		}
		lab.Eventually(t, "drops are counted for "+name, func() bool { return s.d1.Drops("") >= before+4 })
	}
	if n := s.d1.Drops("spoofed-by-container"); n == 0 {
		t.Errorf("no drop has the reason spoofed-by-container: %v", s.d1.Status().Counters["drops"])
	}
	// A datagram from its own address comes through, so what the others would have done is known.
	if err := a.EchoUDP(port(b.addr, 9000), 5); err != nil {
		t.Error(err)
	}
	if err := a.EchoUDP(port(c.addr, 9000), 5); err != nil {
		t.Error(err)
	}
	for name, ch := range seen {
		for len(ch) > 0 {
			if src := <-ch; src.Addr() != a.addr {
				t.Errorf("%s: a datagram arrived from %s", name, src)
			}
		}
	}
}

// underlay sends forged underlay datagrams from the LAN interface of a host.
type underlay struct {
	t     *testing.T
	raw   *lab.RawSocket
	frame func(payload []byte) []byte
}

func newUnderlay(t *testing.T, from, to *lab.Host, src, dst netip.AddrPort) *underlay {
	t.Helper()
	if _, err := from.Ping(to.Addr, 1); err != nil {
		t.Fatal(err)
	}
	raw, err := from.RawSocket("lan0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(raw.Close)
	dstMAC, srcMAC := mac(t, iface(t, to.Space, "lan0").MAC), mac(t, iface(t, from.Space, "lan0").MAC)
	return &underlay{t: t, raw: raw, frame: func(payload []byte) []byte {
		return lab.EthernetFrame(dstMAC, srcMAC, lab.IPv4(src.Addr(), dst.Addr(), 17, 64, lab.UDP(src.Port(), dst.Port(), payload)))
	}}
}

func (u *underlay) send(payload []byte) {
	u.t.Helper()
	if err := u.raw.Send(u.frame(payload)); err != nil {
		u.t.Fatal(err)
	}
}

func TestOverlay_DropsWhatAPeerMayNotSend(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	seen := a.UDPEcho(t, port(a.addr, 9000))
	st1, st2 := s.d1.Status(), s.d2.Status()
	node1, node2 := port(s.h1.Addr, uint16(st1.Port)), port(s.h2.Addr, uint16(st2.Port))
	stranger := port(lab.RouterAddr, uint16(st2.Port))

	peer := newUnderlay(t, s.h2, s.h1, node2, node1)
	other := newUnderlay(t, s.Outside, s.h1, stranger, node1)
	inner := func(src, dst netip.Addr) []byte { return lab.IPv4(src, dst, 17, 60, lab.UDP(1234, 9000, []byte("x"))) }
	for _, c := range []struct {
		name string
		from *underlay
		src  netip.Addr
		dst  netip.Addr
	}{
		{"a stranger as the peer's container", other, b.addr, a.addr},
		{"a peer as our own container", peer, a.addr, a.addr},
		{"a peer as our gateway", peer, a.gateway, a.addr},
		{"a peer as nobody's container", peer, network.Addr().Next(), a.addr},
		{"a peer as the outside", peer, lab.OutsideAddr, a.addr},
		{"a peer to the outside through us", peer, b.addr, lab.OutsideAddr},
		{"a peer to itself through us", peer, b.addr, b.addr.Next()},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := s.d1.Drops("")
			c.from.send(inner(c.src, c.dst))
			lab.Eventually(t, "the drop is counted", func() bool { return s.d1.Drops("") > before })
		})
	}
	if n := s.d1.Drops("spoofed-by-peer"); n == 0 {
		t.Errorf("no drop has the reason spoofed-by-peer: %v", s.d1.Status().Counters["drops"])
	}
	peer.send(inner(b.addr, a.addr)) // the same datagram with the right source arrives
	src := <-seen
	if src.Addr() != b.addr || len(seen) != 0 {
		t.Errorf("datagrams arrived from %s, and %d more", src, len(seen))
	}
}

func TestOverlay_SurvivesGarbageFromTheNetwork(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	node1 := port(s.h1.Addr, uint16(s.d1.Status().Port))
	node2 := port(s.h2.Addr, uint16(s.d2.Status().Port))
	peer := newUnderlay(t, s.h2, s.h1, node2, node1)
	before := s.d1.Drops("")

	good := lab.IPv4(b.addr, a.addr, 17, 60, lab.UDP(1, 9, make([]byte, 100)))
	for n := range len(good) { // truncated at each byte
		peer.send(good[:n])
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		junk := make([]byte, random.IntN(overlayMTU))
		for i := range junk {
			junk[i] = byte(random.Uint32())
		}
		if len(junk) > 20 && random.IntN(2) == 0 { // so that half of it gets past the first check
			copy(junk, good[:20])
			junk[random.IntN(20)] = byte(random.Uint32())
		}
		peer.send(junk)
	}
	// Oversized: a datagram of 64 KB, from the peer's address and from a stranger's.
	for _, h := range []*lab.Host{s.h2, s.Outside} {
		conn, err := h.DialContext(t.Context(), "udp4", node1.String())
		if err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{0, 1, 1472, 9000, 65507} {
			if _, err := conn.Write(make([]byte, size)); err != nil {
				t.Error(err)
			}
		}
		conn.Close()
	}
	lab.Eventually(t, "drops are counted", func() bool { return s.d1.Drops("") > before+uint64(len(good)) })
	if !s.d1.Running() {
		t.Fatalf("the daemon ended:\n%s", s.d1.LogText())
	}
	// What is behind the garbage in the socket's queue may be lost to its length.
	lab.Eventually(t, "the garbage has been read", func() bool {
		r, err := a.Ping(b.addr, 1)
		return err == nil && r.Lost() == 0
	})
	pings(t, a.Space, b.addr)
	pings(t, b.Space, a.addr)
}

func TestOverlay_SurvivesGarbageFromAContainer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	pings(t, a.Space, b.addr)
	raw, err := a.RawSocket("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	before := s.d1.Drops("")
	gw, own := mac(t, a.Neighbour(a.gateway)), mac(t, eth0(t, a.Space).MAC)
	good := lab.EthernetFrame(gw, own, lab.IPv4(a.addr, b.addr, 17, 64, lab.UDP(1, 9, make([]byte, 60))))
	for n := 15; n < len(good); n++ { // the kernel itself refuses less than an Ethernet header
		_ = raw.Send(good[:n])
	}
	random := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		junk := make([]byte, 15+random.IntN(overlayMTU-15))
		for i := range junk {
			junk[i] = byte(random.Uint32())
		}
		switch random.IntN(4) {
		case 0: // random protocol to the gateway
			copy(junk, good[:12])
		case 1: // ARP
			copy(junk, append(append([]byte{255, 255, 255, 255, 255, 255}, own[:]...), 8, 6, 0, 1, 8, 0, 6, 4))
		case 2: // a broken IP header
			copy(junk, good[:min(34, len(junk))])
			if len(junk) > 34 {
				junk[14+random.IntN(20)] = byte(random.Uint32())
			}
		}
		_ = raw.Send(junk)
	}
	// Superpackets whose header and packet do not fit each other.
	for _, segment := range []int{1, 7, 1400, 65535} {
		tcp := lab.TCPSegment(port(a.addr, 1), port(b.addr, 2), make([]byte, 8000))
		_ = raw.SendTSO(lab.EthernetFrame(gw, own, tcp), segment)
		tcp[0] = 0x4f
		_ = raw.SendTSO(lab.EthernetFrame(gw, own, tcp), segment)
	}
	lab.Eventually(t, "drops are counted", func() bool { return s.d1.Drops("") > before })
	if !s.d1.Running() {
		t.Fatalf("the daemon ended:\n%s", s.d1.LogText())
	}
	pings(t, a.Space, b.addr)
	pings(t, b.Space, a.addr)
	pings(t, a.Space, a.gateway)
}
