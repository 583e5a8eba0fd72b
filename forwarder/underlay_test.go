// This file tests the underlay on loopback sockets: trains out, trains in, and what the kernel may refuse.

package forwarder

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func needGSO(t *testing.T, g *rig) {
	t.Helper()
	if !g.Stats().Underlay.GSO {
		t.Skip("this kernel has no UDP_SEGMENT")
	}
}

func TestUnderlay_SendsEqualPacketsAsOneTrain(t *testing.T) {
	g := newRig(t)
	needGSO(t, g)
	for name, c := range map[string]struct {
		sizes  []int
		trains uint64
	}{
		"one":                      {[]int{500}, 1},
		"sixteen":                  {repeat(1000, 16), 1},
		"a short one ends a train": {append(repeat(1000, 5), 900), 1},
		"after the short one":      {append(repeat(1000, 5), 900, 900), 2},
		"growing":                  {[]int{100, 101, 102}, 3},
		"falling":                  {[]int{102, 101, 100}, 2},
		"65 equal":                 {repeat(100, 65), 1},
		"128 equal":                {repeat(100, 128), 1},
		"129 equal":                {repeat(100, 129), 2},
		"65507 bytes":              {repeat(1400, 45), 1},
		"more than 65507 bytes":    {repeat(1400, 46), 2},
		"100 sizes": {func() (s []int) {
			for i := range 100 {
				s = append(s, 100+i)
			}
			return s
		}(), 100},
	} {
		t.Run(name, func(t *testing.T) {
			before := g.Stats().Underlay
			var pkts []*packet.Packet
			var want [][]byte
			for _, n := range c.sizes {
				ip := udp(containerA, containerC, n)
				pkts, want = append(pkts, pkt(ip)), append(want, hop1(ip))
			}
			g.fromA(pkts...)
			s := g.Stats().Underlay
			if got := s.SentTrains - before.SentTrains; got != c.trains {
				t.Errorf("%d trains, want %d", got, c.trains)
			}
			if calls, want := s.SendCalls-before.SendCalls, (c.trains+txMsgs-1)/txMsgs; calls != want {
				t.Errorf("%d calls, want %d", calls, want)
			}
			if got := s.SentPackets - before.SentPackets; got != uint64(len(c.sizes)) {
				t.Errorf("%d packets counted, want %d", got, len(c.sizes))
			}
			got := datagrams(t, g.peer)
			if len(got) != len(want) {
				t.Fatalf("%d datagrams, want %d", len(got), len(want))
			}
			for i := range want {
				if !bytes.Equal(got[i], want[i]) {
					t.Fatalf("datagram %d differs", i)
				}
			}
		})
	}
	g.wantDrops(nil)
}

func repeat(size, n int) (s []int) {
	for range n {
		s = append(s, size)
	}
	return s
}

func TestUnderlay_SendsASuperpacketInOneCall(t *testing.T) {
	g := newRig(t)
	needGSO(t, g)
	// 44 segments is what a TAP is told to make at most (gso_max_segs).
	super := nettest.Super(nettest.Between(containerA, containerC).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(44*1432)), 1432)
	super.Bytes()[8]++ // the hop that it makes
	want := nettest.Segment(super)
	super.Bytes()[8]--
	g.fromA(super)
	s := g.Stats().Underlay
	if s.SendCalls != 1 || s.SentTrains != 1 || s.SentPackets != 44 {
		t.Errorf("%d calls, %d trains, %d packets; want 1, 1, 44", s.SendCalls, s.SentTrains, s.SentPackets)
	}
	got := datagrams(t, g.peer)
	if len(got) != len(want) {
		t.Fatalf("%d datagrams, want %d", len(got), len(want))
	}
	for i := range got {
		if err := nettest.Check(got[i]); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[i][20:], want[i][20:]) {
			t.Fatalf("segment %d differs", i)
		}
	}
}

func TestUnderlay_SendsToSeveralPeersInOneCall(t *testing.T) {
	g := newRig(t)
	g.fromA(pkt(udp(containerA, containerC, 100)), pkt(udp(containerA, "10.3.0.2", 100)), pkt(udp(containerA, "10.4.0.2", 100)))
	if s := g.Stats().Underlay; s.SendCalls != 1 || s.SentTrains != 3 {
		t.Errorf("%d calls, %d trains; want 1, 3", s.SendCalls, s.SentTrains)
	}
	for name, c := range map[string]*net.UDPConn{"peer": g.peer, "small": g.small, "stock": g.stock} {
		if n := len(datagrams(t, c)); n != 1 {
			t.Errorf("%s got %d datagrams", name, n)
		}
	}
}

func TestUnderlay_SendsMoreThanItsQueueHolds(t *testing.T) {
	g := newRig(t)
	// 64 KB in segments of 8 bytes: more headers and pieces than one flush takes.
	super := nettest.Super(nettest.Between(containerA, containerC).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(60000)), 8)
	whole := bytes.Clone(super.Bytes()[40:])
	n := uint64(len(whole) / 8)
	g.fromA(super)
	if s := g.Stats().Underlay; s.SentPackets != n {
		t.Errorf("%d packets, want %d (drops %v)", s.SentPackets, n, g.drops())
	}
	var payload []byte
	for _, d := range datagrams(t, g.peer) {
		if err := nettest.Check(d); err != nil {
			t.Fatal(err)
		}
		payload = append(payload, d[40:]...)
	}
	if !bytes.HasPrefix(whole, payload) || len(payload) == 0 { // the test's socket may overflow
		t.Error("other payload")
	}
}

// queued fills the transmit queue of a rig with one train of n packets of 200 bytes, which the caller then has refused.
func queued(g *rig, n int) *txQueue {
	w := g.loops[0].worker
	w.begin()
	q := w.tx[outer4]
	to := w.table.lookup(netip.MustParseAddr(containerC)).peer
	for i := range n {
		ip := udp(containerA, containerC, 172)
		q.reserve()
		if i%2 == 0 { // in two pieces, as segments are
			hdr := q.header(28)
			copy(hdr, ip)
			q.add(to, hdr, ip[28:])
		} else {
			q.add(to, ip, nil)
		}
	}
	return q
}

func TestUnderlay_FallsBackWhereTheKernelCannotCut(t *testing.T) {
	for _, c := range []struct {
		errno          unix.Errno
		segs, maxAfter int
	}{
		{unix.EIO, 10, 1},
		{unix.EMSGSIZE, 10, trainSegs},
		{unix.EINVAL, 10, trainSegs},
		{unix.EINVAL, 100, oldTrainSegs},
	} {
		t.Run(fmt.Sprint(c.errno, c.segs), func(t *testing.T) {
			g := newRig(t)
			needGSO(t, g)
			q := queued(g, c.segs)
			if q.n != 1 {
				t.Fatalf("%d trains", q.n)
			}
			for i := range q.trains[:q.n] { // what flush does before the kernel refuses
				q.names[i] = q.trains[i].to.name
			}
			q.refused(0, c.errno)
			q.n, q.niov, q.nhdr = 0, 0, 0
			g.loops[0].worker.end()
			if q.maxSegs != c.maxAfter {
				t.Errorf("trains of %d from now on, want %d", q.maxSegs, c.maxAfter)
			}
			got := datagrams(t, g.peer)
			if len(got) != c.segs {
				t.Fatalf("%d datagrams, want %d", len(got), c.segs)
			}
			for _, d := range got {
				if err := nettest.Check(d); err != nil {
					t.Fatal(err)
				}
			}
			g.wantDrops(nil)
			if s := g.Stats(); s.Underlay.SentPackets != uint64(c.segs) || s.Peers[g.peerCfg.Addr].SentPackets != uint64(c.segs) {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestUnderlay_SendsOneByOneWhenTheKernelRefuses(t *testing.T) {
	g := newRig(t)
	needGSO(t, g)
	// A real refusal: no UDP_SEGMENT without a checksum (EINVAL).
	if err := unix.SetsockoptInt(g.under.Load()[outer4].fds[0], unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil {
		t.Fatal(err)
	}
	var pkts []*packet.Packet
	for range 20 {
		pkts = append(pkts, pkt(udp(containerA, containerC, 100)))
	}
	pkts = append(pkts, pkt(udp(containerA, "10.3.0.2", 100))) // the train behind goes out all the same
	g.fromA(pkts...)
	if n, m := len(datagrams(t, g.peer)), len(datagrams(t, g.small)); n != 20 || m != 1 {
		t.Errorf("%d and %d datagrams, want 20 and 1", n, m)
	}
	g.wantDrops(nil)
}

func TestUnderlay_SendsWithoutUDPSegment(t *testing.T) {
	g := newRig(t)
	g.loops[0].worker.tx[outer4].maxSegs = 1
	var pkts []*packet.Packet
	for range 130 {
		pkts = append(pkts, pkt(udp(containerA, containerC, 100)))
	}
	g.fromA(pkts...)
	s := g.Stats().Underlay
	if s.SentTrains != 130 || s.SendCalls != 3 {
		t.Errorf("%d trains in %d calls, want 130 in 3", s.SentTrains, s.SendCalls)
	}
	if n := len(datagrams(t, g.peer)); n != 130 {
		t.Errorf("%d datagrams", n)
	}
}

func TestUnderlay_CountsWhatTheKernelRefuses(t *testing.T) {
	g := newRig(t)
	// 255.255.255.255 needs SO_BROADCAST: Go's sockets have it; 240.0.0.1 has no route anywhere.
	bad := PeerConfig{Addr: netip.MustParseAddrPort("240.0.0.1:9"), MTU: peerMTU}
	g.table.Routes = append(g.table.Routes, Route{netip.MustParsePrefix("10.6.0.0/16"), ToPeer(bad)})
	g.set(g.table)
	g.fromA(pkt(udp(containerA, "10.6.0.1", 10)), pkt(udp(containerA, "10.6.0.1", 10)), pkt(udp(containerA, containerC, 10)))
	g.wantDrops(map[string]uint64{"underlay-refused": 2})
	if len(datagrams(t, g.peer)) != 1 {
		t.Error("the train behind a refused one was lost")
	}
	big := PeerConfig{Addr: g.peerCfg.Addr}
	g.table.Routes[len(g.table.Routes)-1].Hop = ToPeer(big) // MTU 0: no limit of its own
	g.set(g.table)
	g.fromA(pkt(udp(containerA, "10.6.0.1", MaxTrain-28)), pkt(udp(containerA, "10.6.0.1", MaxTrain-27)))
	g.wantDrops(map[string]uint64{"underlay-refused": 2, "underlay-too-big": 1})
	if d := datagrams(t, g.peer); len(d) != 1 || len(d[0]) != MaxTrain {
		t.Errorf("%d datagrams, want the largest that there is", len(d))
	}
}

func TestDropOf_NamesTheReason(t *testing.T) {
	for errno, want := range map[unix.Errno]Drop{
		unix.EMSGSIZE: DropUnderlayTooBig, unix.EAGAIN: DropUnderlayFull, unix.ENOBUFS: DropUnderlayFull,
		unix.ENETUNREACH: DropUnderlayRefused, unix.EPERM: DropUnderlayRefused, unix.ECONNREFUSED: DropUnderlayRefused,
	} {
		if got := dropOf(errno); got != want {
			t.Errorf("%v: %s", errno, dropNames[got])
		}
	}
}

// receive makes the Router read the next trains of its socket, on the goroutine of the test.
func (g *rig) receive(trains uint64) {
	g.t.Helper()
	g.receiveOn(outer4, trains)
}

func (g *rig) receiveOn(f family, trains uint64) {
	g.t.Helper()
	l := g.loops[0]
	for want := l.rxq.stats.trains.Load() + trains; l.rxq.stats.trains.Load() < want; {
		ready := g.lanesReady(f, 20_000)
		if ready == 0 {
			g.t.Fatalf("%d trains are missing", want-l.rxq.stats.trains.Load())
		}
		l.worker.begin()
		l.rxq.read(l.worker, f, ready)
		l.worker.end()
	}
}

// lanesReady waits at most so many milliseconds until the first loop has something to read, and tells in which lanes.
func (r *Router) lanesReady(f family, wait int) (ready uint64) {
	var all [maxLanes]unix.PollFd
	fds := r.under.Load()[f].loopFDs(0)
	polled := all[:len(fds)]
	for i, fd := range fds {
		polled[i] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	}
	for _, err := unix.Poll(polled, wait); err != nil; {
		_, err = unix.Poll(polled, wait)
	}
	for lane, p := range polled {
		if p.Revents != 0 {
			ready |= 1 << lane
		}
	}
	return ready
}

// sendTrain sends payload from c, cut by the kernel into datagrams of size.
func sendTrain(t testing.TB, c *net.UDPConn, to netip.AddrPort, payload []byte, size int) {
	t.Helper()
	oob := make([]byte, unix.CmsgSpace(2))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
	h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	*(*uint16)(unsafe.Pointer(&oob[unix.CmsgLen(0)])) = uint16(size)
	if _, _, err := c.WriteMsgUDPAddrPort(payload, oob, to); err != nil {
		t.Fatal(err)
	}
}

func TestUnderlay_SplitsTrains(t *testing.T) {
	g := newRig(t)
	needGSO(t, g)
	if !g.Stats().Underlay.GRO {
		t.Skip("this kernel has no UDP_GRO")
	}
	var want [][]byte
	var train []byte
	for i := range 21 {
		h := nettest.Between(containerC, containerA)
		h.ID = uint16(i)
		n := 972
		if i == 20 {
			n = 311
		}
		ip := h.UDP(nettest.UDP{SrcPort: uint16(i)}, nettest.Payload(n))
		want, train = append(want, hop1(ip)), append(train, ip...)
	}
	sendTrain(t, g.peer, g.Underlay(), train, 1000)
	g.receive(1)
	got := g.a.Packets()
	if len(got) != len(want) {
		t.Fatalf("%d packets, want %d (drops %v)", len(got), len(want), g.drops())
	}
	for i := range got {
		if !bytes.Equal(got[i].Bytes(), want[i]) {
			t.Fatalf("packet %d is not the one that was sent", i)
		}
		if !got[i].Verified || got[i].NeedsCsum || got[i].GSO != packet.GSONone {
			t.Fatalf("packet %d: %+v", i, got[i])
		}
	}
	if got[0].Off < packet.Headroom {
		t.Error("the first packet of a train has no headroom")
	}
	s := g.Stats()
	if s.Underlay.RecvTrains != 1 || s.Underlay.RecvPackets != 21 || s.Underlay.RecvBytes != uint64(len(train)) {
		t.Errorf("%+v, want one train", s.Underlay)
	}
	if p := s.Peers[g.peerCfg.Addr]; p.RecvPackets != 21 || p.RecvBytes != uint64(len(train)) {
		t.Errorf("peer %+v", p)
	}
}

func TestUnderlay_TakesTheLargestDatagram(t *testing.T) {
	g := newRig(t)
	ip := udp(containerC, containerA, MaxTrain-28)
	if _, err := g.peer.WriteToUDPAddrPort(ip, g.Underlay()); err != nil {
		t.Fatal(err)
	}
	g.receive(1)
	one(t, "container a", g.a.Take(), hop1(ip))
}

func TestUnderlay_TakesMorePacketsThanItKeeps(t *testing.T) {
	g := newRig(t)
	needGSO(t, g)
	const packets = 3 * rxPkts
	for i := 0; i < packets; i += 64 {
		var train []byte
		for range 64 {
			train = append(train, udp(containerC, containerA, 12)...)
		}
		sendTrain(t, g.peer, g.Underlay(), train, 40)
	}
	g.receive(packets / 64)
	if n := len(g.a.Take()); n != packets {
		t.Errorf("%d packets, want %d (drops %v)", n, packets, g.drops())
	}
}

// A container is sent what a batch holds: superpackets are joined within one.
func TestUnderlay_TakesMoreAtATimeWhereTCPComesInSingleDatagrams(t *testing.T) {
	g := newRig(t)
	needGSO(t, g)
	if !g.Stats().Underlay.GRO {
		t.Skip("this kernel has no UDP_GRO")
	}
	const n = 4 * rxSingle
	tcp := nettest.Between(containerC, containerA).TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(1000))
	single := func(b []byte) func() {
		return func() {
			if _, err := g.peer.WriteToUDPAddrPort(b, g.Underlay()); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		send        func()
		packets     int
		least, most uint64 // batches
	}{
		"TCP":           {single(tcp), n, n / rxSingle, n / rxMsgs / 2},
		"TCP in trains": {func() { sendTrain(t, g.peer, g.Underlay(), append(bytes.Clone(tcp), tcp...), len(tcp)) }, 2 * n, n / rxMsgs, n},
		"UDP":           {single(udp(containerC, containerA, 1000)), n, n / rxMsgs, n},
	} {
		t.Run(name, func(t *testing.T) {
			before := g.loops[0].worker.epoch.Load()
			for range n {
				c.send()
			}
			g.receive(n)
			if got := (g.loops[0].worker.epoch.Load() - before) / 2; got < c.least || got > c.most {
				t.Errorf("%d datagrams in %d batches, want %d to %d", n, got, c.least, c.most)
			}
			if got := len(g.a.Take()); got != c.packets {
				t.Errorf("%d packets, want %d", got, c.packets)
			}
		})
	}
	g.wantDrops(nil)
}

// What was found out about a peer's packet does not hold for that of another in the same batch.
func TestUnderlay_TellsPeersOfABatchApart(t *testing.T) {
	g := newRig(t)
	const containerD = "10.3.0.2" // in the lane of containerC
	for _, d := range []struct {
		from *net.UDPConn
		ip   []byte
	}{
		{g.peer, udp(containerC, containerA, 10)}, {g.small, udp(containerC, containerA, 11)}, {g.small, udp(containerD, containerA, 12)},
		{g.peer, udp(containerC, containerA, 13)}, {g.peer, udp(containerD, containerA, 14)}, {g.peer, udp(containerC, containerA, 15)},
	} {
		if _, err := d.from.WriteToUDPAddrPort(d.ip, g.Underlay()); err != nil {
			t.Fatal(err)
		}
	}
	g.receive(6)
	var sizes []int
	for _, p := range g.a.Take() {
		sizes = append(sizes, p.Len()-28)
	}
	if want := []int{10, 12, 13, 15}; !slices.Equal(sizes, want) {
		t.Errorf("datagrams of %v bytes came through, want %v", sizes, want)
	}
	g.wantDrops(map[string]uint64{"spoofed-by-peer": 2})
}

func TestUnderlay_CountsGarbage(t *testing.T) {
	g := newRig(t)
	good := udp(containerC, containerA, 50)
	var sent uint64
	send := func(b []byte) {
		if _, err := g.peer.WriteToUDPAddrPort(b, g.Underlay()); err != nil {
			t.Fatal(err)
		}
		sent++
		g.receive(1)
	}
	for n := 1; n < len(good); n++ {
		send(good[:n])
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		b := make([]byte, 1+r.IntN(1500))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		if len(b) > 20 && r.IntN(2) == 0 {
			copy(b, good[:20])
			b[r.IntN(20)] ^= byte(1 + r.IntN(255))
		}
		send(b)
	}
	if n := len(g.a.Take()) + len(g.b.Take()); n != 0 {
		t.Errorf("%d packets got through", n)
	}
	var counted uint64
	for _, n := range g.drops() {
		counted += n
	}
	if counted != sent {
		t.Errorf("%d datagrams sent, %d drops counted: %v", sent, counted, g.drops())
	}
	send(good)
	one(t, "container a", g.a.Take(), hop1(good))
}

// Whoever looks whether the port is open does so with an empty datagram.
func TestUnderlay_PassesOverEmptyDatagrams(t *testing.T) {
	g := newRig(t)
	good := udp(containerC, containerA, 50)
	for _, b := range [][]byte{{}, good, {}} {
		if _, err := g.peer.WriteToUDPAddrPort(b, g.Underlay()); err != nil {
			t.Fatal(err)
		}
	}
	g.receive(3)
	one(t, "container a", g.a.Take(), hop1(good))
	g.wantDrops(map[string]uint64{})
}

func TestUnderlay_CountsEachDatagramOfABadTrain(t *testing.T) {
	g := newRig(t)
	needGSO(t, g)
	sendTrain(t, g.peer, g.Underlay(), make([]byte, 100), 10)
	g.receive(1)
	g.wantDrops(map[string]uint64{"malformed": 10})
}

func TestUnderlay_KeepsItsChecksumsOn(t *testing.T) {
	// Packets from the underlay are called verified because the outer UDP checksum covers them.
	g := newRig(t)
	for _, fd := range g.under.Load()[outer4].fds {
		if off, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_NO_CHECK); err != nil || off != 0 {
			t.Errorf("SO_NO_CHECK is %d (%v)", off, err)
		}
	}
}

func TestSegmentSize_ReadsControlMessages(t *testing.T) {
	msg := func(level, kind int32, data ...byte) []byte {
		b := make([]byte, unix.CmsgSpace(len(data)))
		h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
		h.Level, h.Type = level, kind
		h.SetLen(unix.CmsgLen(len(data)))
		copy(b[unix.CmsgLen(0):], data)
		return b
	}
	size := msg(unix.IPPROTO_UDP, unix.UDP_GRO, 0xdc, 5, 0, 0)
	other := msg(unix.SOL_SOCKET, 99, 1, 2, 3)
	hostile := bytes.Clone(other)
	hostile[0] = 3 // shorter than its own header
	long := bytes.Clone(other)
	long[0] = 60
	for name, c := range map[string]struct {
		ctl  []byte
		want int
	}{
		"none": {nil, 0}, "UDP_GRO": {size, 1500}, "behind another": {append(bytes.Clone(other), size...), 1500}, "another": {other, 0},
		"length 3": {append(hostile, size...), 0}, "length 60": {long, 0}, "cut short": {size[:10], 0},
		"two bytes": {msg(unix.IPPROTO_UDP, unix.UDP_GRO, 1, 2), 0},
	} {
		q := newRxQueue(1, nil)
		copy(q.ctls[0][:], c.ctl)
		q.msgs[0].Hdr.SetControllen(len(c.ctl))
		if got := q.segmentSize(0); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestNewRouter_SaysWhyItCannotListen(t *testing.T) {
	taken := addrPort(udpSocket(t))
	for name, c := range map[string]struct {
		addr  netip.AddrPort
		loops int
		want  []string
	}{
		"port taken":                  {taken, 1, []string{fmt.Sprint(taken.Port()), "taken", "--port"}},
		"port taken, several sockets": {taken, 3, []string{fmt.Sprint(taken.Port()), "taken", "--port"}},
		"not our address":             {netip.MustParseAddrPort("192.0.2.1:0"), 1, []string{"192.0.2.1", "--iface"}},
		"IPv6":                        {netip.MustParseAddrPort("[::1]:0"), 1, []string{"::1", "IPv4"}},
		"no address":                  {netip.AddrPort{}, 1, []string{"IPv4"}},
	} {
		t.Run(name, func(t *testing.T) {
			refusesRouter(t, c.loops, UnderlayConfig{Addr: c.addr}, c.want)
		})
	}
}

// refusesRouter checks that no Router is made of u, that the error says every word, and that no descriptor is left open.
func refusesRouter(t *testing.T, loops int, u UnderlayConfig, words []string) {
	t.Helper()
	before := descriptors(t)
	_, err := NewRouter(Config{Log: slog.New(slog.DiscardHandler), Loops: loops, Underlay: u})
	if err == nil {
		t.Fatal("no error")
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

func TestNewRouter_RefusesAPortSharedByAnotherRouter(t *testing.T) {
	first := newRouter(t, 2)
	_, err := NewRouter(Config{Log: slog.New(slog.DiscardHandler), Loops: 2, Underlay: UnderlayConfig{Addr: first.Underlay()}})
	if err == nil || !strings.Contains(err.Error(), "taken") {
		t.Errorf("error %v: two routers of one user would share the port, and each lose the other's packets", err)
	}
}

func TestNewRouter_WarnsOfASmallReceiveBuffer(t *testing.T) {
	var log bytes.Buffer
	r, err := NewRouter(Config{
		Log: slog.New(slog.NewTextHandler(&log, nil)), Loops: 1,
		Underlay: UnderlayConfig{Addr: netip.MustParseAddrPort("127.0.0.1:0"), ReceiveBuffer: 1 << 30},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if !strings.Contains(log.String(), "net.core.rmem_max") || r.ReceiveBuffer() >= 1<<30 || r.ReceiveBuffer() <= 0 {
		t.Errorf("granted %d, log %q", r.ReceiveBuffer(), log.String())
	}
}
