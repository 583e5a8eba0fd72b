// This file is the Router: what happens to a packet between the read that brought it and the send that takes it away.

package forwarder

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Config is what a Router needs.
type Config struct {
	Log *slog.Logger
	// Loops is the number of poll loops, each with an underlay socket of its own. 0 chooses by the number of cores.
	Loops    int
	Underlay UnderlayConfig
}

// Router forwards packets between ports, peers and the gateway.
type Router struct {
	// constant after New
	log   *slog.Logger
	loops []*loop
	vxlan *VXLAN // nil: the udp format

	underlayConfig UnderlayConfig // but for its addresses, which Rebind changes

	pathEvents chan PathEvent

	// atomic
	table  atomic.Pointer[table]
	under  atomic.Pointer[underlay]
	closed atomic.Bool               // the underlay sockets are closed, or about to be
	probes [probeSlots]atomic.Uint64 // tokens of probes that wait for an answer, by their low bits; 0 is none

	// guarded by mu
	mu      sync.Mutex
	workers []*worker
	ports   []*Port
	next    int // loop that the next port goes to, unless packets are steered
}

// Device is a TAP as the Router sees it.
type Device interface {
	packet.Sender
	// FD is polled for reading.
	FD() int
	// Read fills rx until nothing is left or rx is full. An error means that the device is gone for good.
	Read(rx *packet.Rx) error
}

// PortConfig describes an attachment to the Router.
type PortConfig struct {
	Name    string
	Sources []netip.Prefix // the only sources that the container may use; packets are steered to the loop of the first
	MTU     int            // bytes
	Device  Device
	// Errors is the source of ICMP errors of IPv4 to the container; invalid: TableConfig.Gateway. A namespace would take its own
	// address for a forged source.
	Errors netip.Addr
	// Policy is what the container may exchange with others; nil: everything.
	Policy *Policy
	// Gone is called once, from a goroutine of its own, when Device.Read says that the device is gone.
	Gone func(error)
}

// Port is an attachment in the Router.
type Port struct {
	cfg    PortConfig
	loop   *loop
	policy *policy // nil: everything is open

	// of the goroutine that reads the device
	errors allowance
	used   time.Duration // of the loop's time, on the scale of loop.level

	gone    atomic.Bool
	refused atomic.Uint64 // packets, by policy
}

// NewRouter opens the underlay sockets and prepares the loops; Run starts them.
func NewRouter(c Config) (*Router, error) {
	if err := c.Underlay.check(); err != nil {
		return nil, err
	}
	r := &Router{log: c.Log, vxlan: c.Underlay.VXLAN, underlayConfig: c.Underlay, pathEvents: make(chan PathEvent, pathEvents)}
	n := c.Loops
	if n <= 0 {
		n = defaultLoops()
	}
	under, err := listenUnderlay(c.Underlay, n, c.Log)
	if err != nil {
		return nil, err
	}
	r.underlayConfig.Given = nil
	r.under.Store(under)
	r.table.Store(&table{})
	for i := range n {
		l, err := newLoop(r, i, newWaiter(n))
		if err != nil {
			r.Close()
			return nil, err
		}
		r.loops = append(r.loops, l)
	}
	return r, nil
}

// Overhead is the difference between underlay and overlay MTU in bytes, in the format that the Router speaks, for a peer at that
// underlay address.
func (r *Router) Overhead(peer netip.Addr) int {
	return familySpecs[familyOf(peer)].headers + r.vxlan.Encap()
}

// Underlay is the IPv4 address that the underlay sockets are bound to, with the port that the kernel chose for port 0.
func (r *Router) Underlay() netip.AddrPort { return r.under.Load()[outer4].addr }

// Underlay6 is their IPv6 address, with the same port; invalid where there is none.
func (r *Router) Underlay6() netip.AddrPort {
	if s := r.under.Load()[outer6]; s != nil {
		return s.addr
	}
	return netip.AddrPort{}
}

// ReceiveBuffer is the receive buffer in bytes that the kernel granted each underlay socket.
func (r *Router) ReceiveBuffer() int { return r.under.Load()[outer4].recvBuffer }

// SetTable replaces the whole route table. Packets in flight finish on the old one.
func (r *Router) SetTable(c TableConfig) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	t, err := buildTable(c, r.table.Load(), r.vxlan, r.under.Load())
	if err != nil {
		return err
	}
	r.table.Store(t)
	return nil
}

// AddPort begins to read from a device. Packets reach it once a table routes to ToPort of the result.
func (r *Router) AddPort(c PortConfig) (*Port, error) {
	if c.Device == nil || len(c.Sources) == 0 {
		return nil, errors.New("a port needs a device and an address")
	}
	rules, err := c.Policy.compile()
	if err != nil {
		return nil, fmt.Errorf("policy of %s: %w", c.Name, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := &Port{cfg: c, loop: r.loopForLocked(c.Sources[0].Addr()), policy: rules}
	if err := p.loop.add(p); err != nil {
		return nil, fmt.Errorf("poll the device of %s: %w", c.Name, err)
	}
	r.ports = append(r.ports, p)
	return p, nil
}

// RemovePort stops all use of a port. When it returns, no goroutine of the packet path touches its device any more, and
// the caller may close it. Removing a port twice does nothing.
func (r *Router) RemovePort(p *Port) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.Index(r.ports, p)
	if i < 0 {
		return
	}
	r.ports = slices.Delete(r.ports, i, i+1)
	p.gone.Store(true)
	p.loop.remove(p)
	r.quiesceLocked()
}

// quiesceLocked returns when every worker has finished the batch that it was in at the call.
func (r *Router) quiesceLocked() {
	for _, w := range r.workers {
		for epoch := w.epoch.Load(); epoch&1 == 1 && w.epoch.Load() == epoch; {
			time.Sleep(50 * time.Microsecond)
		}
	}
}

// Injector forwards packets that do not come from a loop: the stack's output.
type Injector struct{ w *worker }

// NewInjector returns an Injector. Each is for one goroutine at a time.
func (r *Router) NewInjector() *Injector { return &Injector{newWorker(r, 0)} }

// Forward routes packets of the gateway to their containers, here or on peers. Packets are borrowed until it returns.
func (i *Injector) Forward(pkts []*packet.Packet) {
	i.w.begin()
	defer i.w.end()
	if i.w.router.closed.Load() {
		return
	}
	in := ingress{kind: fromGateway}
	for _, p := range pkts {
		i.w.forward(p, &in)
	}
}

// ingress is where a packet came in.
type ingress struct {
	kind  ingressKind
	port  *Port          // fromContainer
	outer netip.AddrPort // fromPeer

	// The last packet's addresses and verdict: neighbours of one flow need no look-up of their own.
	cacheKey [32]byte // source and destination
	cacheLen int      // bytes of them; 0: there is none
	cacheHop *hop
	// peer is the peer whose source was last found to be its own (fromPeer).
	peer *peer
	// mtu in bytes of where the last packet came from, 0 for the gateway: what its sender may take the path to carry.
	mtu int
	// segment is the payload in bytes of each segment of the superpacket that a peer's datagram is, 0 for another (vxlan.go).
	segment int
}

type ingressKind uint8

const (
	fromContainer ingressKind = iota
	fromPeer
	fromGateway
)

// worker is the packet path of one goroutine: its scratch, its read side of the table, its counters.
type worker struct {
	// constant after New
	router  *Router
	loop    int // index of the loop whose sockets it uses
	scratch *packet.Scratch
	turns   bool // it is a loop's, whose wait ends turns of the gateway

	// of the goroutine
	turn packet.Turn // nil: none has begun

	// atomic; epoch is odd while a batch is in progress
	epoch atomic.Uint64
	drops [numDrops]atomic.Uint64
	icmps atomic.Uint64
	sent  underlayCounters

	// of the goroutine: the sockets in use, and a queue for each family that has some
	under *underlay
	tx    [families]*txQueue

	// of the batch in progress
	table   *table
	buckets []bucket
	used    int    // buckets in use
	now     uint32 // see clock; 0: not asked yet
	roused  bool   // goroutines of the gateway have work; the loop's wait clears it
	own     ownPackets
}

// bucket collects the packets of one batch that go to one next hop.
type bucket struct {
	hop  *hop
	pkts []*packet.Packet
}

func newWorker(r *Router, loop int) *worker {
	w := &worker{router: r, loop: loop, scratch: packet.NewScratch(), own: newOwnPackets(), under: new(underlay)}
	w.adopt(r.under.Load())
	r.mu.Lock()
	defer r.mu.Unlock()
	r.workers = append(r.workers, w)
	return w
}

// begin opens a batch: from here to end, nothing that the table points to goes away, and no socket is closed.
func (w *worker) begin() {
	w.epoch.Add(1)
	w.now = 0
	w.table = w.router.table.Load() // before the sockets: it has peers of a family only where there were sockets of it already
	if u := w.router.under.Load(); u != w.under {
		w.adopt(u)
	}
}

// adopt goes over to other sockets: once in a worker's life, and after each Rebind.
func (w *worker) adopt(u *underlay) {
	for f, s := range u {
		if s == w.under[f] {
			continue
		}
		w.tx[f] = nil
		if s != nil {
			w.tx[f] = newTxQueue(s, w)
		}
	}
	w.under = u
}

// end sends what the batch collected and closes it.
func (w *worker) end() {
	w.flush()
	w.table = nil
	w.own.reset()
	w.epoch.Add(1)
}

// endTurn ends the gateway's turn, if one has begun. It is called between batches.
func (w *worker) endTurn() {
	if t := w.turn; t != nil {
		w.turn = nil
		t.End()
	}
}

func (w *worker) drop(why Drop) { w.drops[why].Add(1) }

// forward routes one packet: into the bucket of its next hop, or to its end.
func (w *worker) forward(p *packet.Packet, in *ingress) {
	if why := check(p); why != dropNone {
		w.drop(why)
		return
	}
	ip := p.Bytes()
	v4 := ip[0]>>4 == 4
	var h *hop
	if v4 && in.cacheLen == 8 && binary.NativeEndian.Uint64(ip[12:]) == binary.NativeEndian.Uint64(in.cacheKey[:]) ||
		!v4 && in.cacheLen == 32 && [32]byte(ip[8:]) == in.cacheKey {
		h = in.cacheHop
	} else {
		src, dst := addrs(ip)
		if why := w.checkSource(src, in); why != dropNone {
			w.drop(why)
			return
		}
		h = w.table.lookup(dst)
		if h != nil && h.kind == hopPeer && in.kind == fromContainer && h.peer.watched.Load() {
			w.router.stirred(h.peer)
		}
		if in.cacheHop = h; v4 {
			in.cacheLen = copy(in.cacheKey[:], ip[12:20])
		} else {
			in.cacheLen = copy(in.cacheKey[:], ip[8:40])
		}
	}
	if in.kind == fromPeer && !p.Verified {
		settle(p, in)
	}
	if h == nil {
		w.unreachable(p, in, reachNet)
		return
	}
	if (in.port.policed() || h.port.policed()) && !w.permits(p, h, in) {
		return
	}
	switch h.kind {
	case hopGateway:
		if in.kind == fromGateway {
			w.drop(DropLoop)
			return
		}
		if in.kind == fromPeer {
			if w.router.probeAnswered(ip) {
				return
			}
			if asksResolver(ip) {
				w.drop(DropTransit)
				if w.abounds(in) {
					w.icmpError(p, in, header.ICMPv4DstUnreachable, header.ICMPv4PortUnreachable, header.ICMPv6DstUnreachable, header.ICMPv6PortUnreachable, 0)
				}
				return
			}
		}
		w.enqueue(h, p) // delivered, not forwarded: no TTL, no MTU
		return
	case hopOwnAt:
		if w.takesProbe(p, h, in) {
			return
		}
	case hopEgress:
		if in.kind != fromContainer {
			w.drop(DropTransit)
			return
		}
	case hopPeer:
		if in.kind == fromPeer {
			w.drop(DropTransit)
			return
		}
	case hopUnreachableHost:
		w.unreachable(p, in, reachHost)
		return
	case hopUnreachableNet:
		w.unreachable(p, in, reachNet)
		return
	}
	if in.kind != fromGateway && !decrementTTL(ip) {
		w.drop(DropTTL)
		w.timeExceeded(p, in)
		return
	}
	mtu := mtuFor(v4, h.mtu)
	if mtu != in.mtu && mtu > 0 && in.mtu > 0 {
		clampMSS(p, min(mtu, in.mtu))
	}
	if mtu > 0 && wireLen(p) > mtu && !w.fit(p, h, mtu, in) {
		return
	}
	w.enqueue(h, p)
}

// checkSource refuses packets from an address that the one who sent them does not own.
func (w *worker) checkSource(src netip.Addr, in *ingress) Drop {
	switch in.kind {
	case fromContainer:
		if !in.port.owns(src) {
			return DropSpoofedContainer
		}
		in.mtu = mtuFor(src.Is4(), in.port.cfg.MTU)
	case fromPeer:
		h := w.table.lookup(src)
		if h == nil || h.kind != hopPeer || !h.peer.sent(in.outer) {
			return DropSpoofedPeer
		}
		in.peer, in.mtu = h.peer, mtuFor(src.Is4(), h.mtu)
	}
	return dropNone
}

// owns tells whether the container may send from src.
func (p *Port) owns(src netip.Addr) bool {
	for _, own := range p.cfg.Sources {
		if own.Contains(src) {
			return true
		}
	}
	return false
}

// wireLen is the length in bytes of the longest packet that p becomes on the wire.
func wireLen(p *packet.Packet) int {
	if p.GSO != packet.GSONone {
		return min(int(p.HdrLen)+int(p.SegSize), p.Len())
	}
	return p.Len()
}

// enqueue puts p into the bucket of its next hop.
func (w *worker) enqueue(h *hop, p *packet.Packet) {
	for i := range w.buckets[:w.used] {
		if w.buckets[i].hop == h {
			w.buckets[i].pkts = append(w.buckets[i].pkts, p)
			return
		}
	}
	if w.used == len(w.buckets) {
		w.buckets = append(w.buckets, bucket{})
	}
	b := &w.buckets[w.used]
	w.used++
	b.hop = h
	b.pkts = append(b.pkts, p)
}

// flush sends all buckets: peers' packets go into one transmit queue and out together.
func (w *worker) flush() {
	for i := range w.buckets[:w.used] {
		b := &w.buckets[i]
		switch b.hop.kind {
		case hopPort, hopOwnAt:
			if b.hop.port.gone.Load() {
				w.drops[DropPortGone].Add(uint64(len(b.pkts)))
				break
			}
			b.hop.port.cfg.Device.Send(w.scratch, b.pkts)
		case hopPeer:
			q := w.tx[b.hop.peer.family]
			for _, p := range b.pkts {
				q.sendTo(b.hop.peer, p)
			}
		default:
			if t, ok := b.hop.sender.(packet.Turner); ok && w.turns && w.turn == nil {
				w.turn = t.Begin()
			}
			b.hop.sender.Send(w.scratch, b.pkts)
			w.roused = true
		}
		clear(b.pkts)
		b.pkts, b.hop = b.pkts[:0], nil
	}
	w.used = 0
	for _, q := range w.tx {
		if q != nil {
			q.flush()
		}
	}
}

// addrs are the source and destination of an IP packet that passed check.
func addrs(ip []byte) (src, dst netip.Addr) {
	if ip[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
	}
	return netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
}

// decrementTTL takes one from the TTL or hop limit, and tells whether the packet may go on.
func decrementTTL(ip []byte) bool {
	if ip[0]>>4 == 6 {
		if ip[7] <= 1 {
			return false
		}
		ip[7]--
		return true
	}
	if ip[8] <= 1 {
		return false
	}
	ip[8]--
	// RFC 1624: the checksum grows by what the word TTL|protocol lost. The one added before the carry is taken makes
	// 0xffff zero, as a checksum computed from scratch is.
	h := header.IPv4(ip)
	sum := uint32(h.Checksum()) + 0x0100
	h.SetChecksum(uint16(sum + (sum+1)>>16))
	return true
}
