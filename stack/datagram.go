// This file is what UDP and echo flows have in common: a host socket, what it says to the container, and when it is over.

package stack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// conversationAfter is the age at which a UDP flow that goes both ways counts as a conversation: a question and its answer are over by
// then (Linux, net/netfilter/nf_conntrack_proto_udp.c).
const conversationAfter = 2 * time.Second

// datagram is one that a container sends. All of it is lent.
type datagram struct {
	payload []byte
	quote   []byte // its headers, for ICMP errors
	carriage
}

// carriage is how the container asks for a datagram to be carried, which the host's kernel is told.
type carriage struct {
	hops         uint8 // TTL or hop limit
	dontFragment bool  // as every IPv6 packet that is no fragment
}

// datagramOf is the datagram in pkt; its quote is appended to buf.
func datagramOf(pkt *gstack.PacketBuffer, payload, buf []byte) datagram {
	ip := pkt.NetworkHeader().Slice()
	t := pkt.TransportHeader().Slice()
	d := datagram{payload: payload, quote: append(append(buf, ip...), t[:min(8, len(t))]...)}
	if ip[0]>>4 == 4 {
		h := header.IPv4(ip) // gVisor clears its flags when it puts fragments together
		d.hops, d.dontFragment = h.TTL(), h.Flags()&header.IPv4FlagDontFragment != 0
	} else {
		in, _ := parseQuote(d.quote)
		d.hops, d.dontFragment = header.IPv6(ip).HopLimit(), !in.fragment
	}
	d.hops = max(d.hops, 1) // it is here, so it may go on
	return d
}

// quoteRoom is the room on the stack for headers that are quoted: all but those with many IPv6 extensions.
const quoteRoom = 128

// datagramFlow is a flow of datagrams between a container and one host socket.
type datagramFlow struct {
	ns     *netstack
	entry  *entry
	opened int64 // ticks

	used         atomic.Int64 // ticks when the last datagram passed
	replied      atomic.Bool
	conversation atomic.Bool

	// mu is held while the flow is opened: whoever has another datagram for it waits.
	mu    sync.Mutex
	host  *hostSocket    // nil: not open, or over
	route *gstack.Route  // to the container; constant once open
	sent  sentDatagrams  // for ICMP errors about them
	told  []outsideError // memory of report
}

// line is the container's in the exit queue.
func (f *datagramFlow) line() uint8 { return lineOf(f.entry.key.src.Addr()) }

// touch notes that a datagram passes.
func (f *datagramFlow) touch() {
	now := ticks()
	f.used.Store(now)
	if f.replied.Load() && now-f.opened > int64(conversationAfter) {
		f.conversation.Store(true)
	}
}

// idle is how long the flow may be idle now.
func (f *datagramFlow) idle() time.Duration {
	t := &f.ns.gw.cfg.Timeouts
	switch key := &f.entry.key; {
	case f.entry.kind == kindEcho:
		return t.Echo
	case key.dst.Port() == dnsPort:
		return t.UDPDNS
	case f.conversation.Load():
		return t.UDPConversation
	}
	return t.UDP
}

// startDatagrams puts a new flow into the table, opens its socket and sends its first datagram; or sends d by the flow that came in
// between. An error says why the socket could not be opened.
func (ns *netstack) startDatagrams(key flowKey, k kind, proto int, to netip.AddrPort, d datagram) error {
	f := &datagramFlow{ns: ns, opened: ticks()}
	f.mu.Lock()
	e, fresh, why := ns.flows.add(key, k, f)
	if e == nil {
		f.mu.Unlock()
		ns.count.drop(why)
		return nil
	}
	if !fresh {
		f.mu.Unlock()
		e.flow.(datagramTaker).send(d)
		return nil
	}
	f.entry = e
	err := f.openLocked(proto, to)
	f.mu.Unlock()
	if err != nil {
		ns.flows.remove(e)
		return err
	}
	if k == kindEcho {
		ns.count.echoOpened.Add(1)
	} else {
		ns.count.udpOpened.Add(1)
	}
	f.send(d)
	return nil
}

func (f *datagramFlow) openLocked(proto int, to netip.AddrPort) error {
	s, err := f.ns.openSocket(proto, to)
	if err != nil {
		return err
	}
	r, terr := f.ns.route(f.entry.key.dst.Addr(), f.entry.key.src.Addr())
	if terr != nil {
		s.close()
		return errors.New(terr.String())
	}
	f.touch()
	f.host, f.route = s, r
	if err := f.ns.reader.add(f); err != nil {
		f.host = nil
		r.Release()
		s.close()
		return err
	}
	return nil
}

// send passes one datagram of the container to the host, and reports to the container what the host says about it and about earlier ones.
func (f *datagramFlow) send(d datagram) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.host == nil {
		return
	}
	f.touch()
	f.sent.note(d, f.entry.kind == kindEcho)
	const tries = 4
	silent := false
	for range tries {
		err := f.host.send(d.payload, d.carriage)
		if err == nil {
			return
		}
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) {
			break
		}
		// It may be about an earlier datagram, and then this one was not sent: the queue of errors tells. An error that stays with nothing
		// in the queue is about this one; once it can be what is left of an error that has been told.
		about, own := f.reportLocked()
		if own {
			return
		}
		if !about && silent {
			f.ns.refuseDatagram(err, d.quote)
			return
		}
		silent = !about
	}
	f.ns.count.drop(dropHostBusy)
}

// reportLocked sends the container the ICMP errors that the host has got about the flow's datagrams. It says whether there were any, and
// whether the host has refused the last datagram itself as too large.
func (f *datagramFlow) reportLocked() (any, own bool) {
	f.told = f.host.errors(f.told[:0])
	for i := range f.told {
		e := &f.told[i]
		own = own || !e.from.IsValid()
		if m, ok := e.message(); ok {
			f.ns.sendMessage(e.from, m, f.sent.quote(e.about))
		}
	}
	return len(f.told) > 0, own
}

// receive takes what the host's socket has, up to a share of it. The memory is used for every datagram. trouble says that there are errors in
// their queue: the socket may not say so itself, and would wake its reader again and again.
func (f *datagramFlow) receive(buf []byte, trouble bool) {
	const share = 32
	for range share {
		f.mu.Lock()
		if f.host == nil {
			f.mu.Unlock()
			return
		}
		n, err := f.host.receive(buf)
		if err != nil {
			if trouble || !errors.Is(err, unix.EAGAIN) {
				f.reportLocked()
			}
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		f.replied.Store(true)
		f.touch()
		if f.entry.kind == kindEcho {
			f.ns.sendEcho(f.route, f.entry.key, buf[:n])
		} else {
			f.ns.sendDatagram(f.route, f.entry.key, buf[:n])
		}
	}
}

// end closes the flow's socket and takes it out of the table.
func (f *datagramFlow) end() {
	f.mu.Lock()
	s := f.host
	f.host = nil
	f.mu.Unlock()
	if s == nil { // it has ended, or was never opened
		return
	}
	f.ns.reader.drop(s)
	s.close()
	f.route.Release()
	f.ns.flows.remove(f.entry)
}

// sentDatagrams remembers the headers of the last datagram, and of a few before it where it is of use to tell which one an ICMP error is
// about: with echo, whose sequence numbers people see, and with a small TTL, as traceroute sends.
type sentDatagrams struct {
	ring []sentDatagram
	last int
}

type sentDatagram struct {
	b    []byte // headers, and the first bytes of the payload
	head int    // bytes of headers
}

const (
	sentRing      = 16 // as many as traceroute has on the way at once
	tracerHops    = 32 // TTLs up to this one are a tracer's: no system's own is so small
	sentBeginning = 16 // bytes of payload by which datagrams are told apart
)

func (s *sentDatagrams) note(d datagram, echo bool) {
	several := echo || d.hops <= tracerHops
	switch {
	case len(s.ring) == 0 || several && len(s.ring) < sentRing:
		s.ring = append(s.ring, sentDatagram{})
		s.last = len(s.ring) - 1
	case several:
		s.last = (s.last + 1) % len(s.ring)
	}
	q := &s.ring[s.last]
	q.b = append(q.b[:0], d.quote...)
	q.head = len(q.b)
	if several && !echo {
		q.b = append(q.b, d.payload[:min(sentBeginning, len(d.payload))]...)
	}
}

// quote is the datagram that an ICMP error is about, as far as it is known: its headers, and what the error quotes of its payload. about is
// what the host's kernel has of it: for echo the ICMP header with the host's identifier, and the payload.
func (s *sentDatagrams) quote(about []byte) []byte {
	if len(s.ring) == 0 {
		return nil
	}
	last := &s.ring[s.last]
	in, _ := parseQuote(last.b[:last.head])
	echo := in.proto != protoUDP
	if echo && len(about) < echoHeader { // the host itself says it, at once
		return last.b[:last.head]
	}
	payload := about
	if echo {
		payload = about[echoHeader:]
	}
	found := last
	for back := range s.ring {
		q := &s.ring[(s.last+len(s.ring)-back)%len(s.ring)]
		var same bool
		if echo {
			same = binary.BigEndian.Uint16(q.b[q.head-2:]) == binary.BigEndian.Uint16(about[6:])
		} else {
			begin := q.b[q.head:]
			n := min(len(begin), len(payload))
			same = bytes.Equal(begin[:n], payload[:n])
		}
		if same {
			found = q
			break
		}
	}
	return append(bytes.Clone(found.b[:found.head]), payload...)
}
