// This file is ping: echo requests from a namespace, counted, and what ICMP errors came back.

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// pingWait is how long the last answer may take.
const pingWait = 3 * time.Second

var pingIdent atomic.Uint32

// ICMPError is an ICMP error that a namespace received, or an ICMPv6 error, whose types and codes are others.
type ICMPError struct {
	From       netip.Addr
	Type, Code byte
	MTU        int        // of a frag-needed or packet-too-big
	Dst        netip.Addr // destination of the packet that it is about
}

// PingResult counts the echoes of one Ping.
type PingResult struct {
	Sent, Received int
	Duplicates     int // answers that came once more
	Errors         []ICMPError
}

// Lost is the number of echoes that never came back.
func (r PingResult) Lost() int { return r.Sent - r.Received }

func (r PingResult) String() string {
	return fmt.Sprintf("%d sent, %d received, ICMP errors %v", r.Sent, r.Received, r.Errors)
}

// Pinger sends echo requests until it is stopped.
type Pinger struct {
	conn     net.PacketConn
	ident    uint16
	interval time.Duration
	size     int
	dst      netip.Addr
	quit     chan struct{}
	sent     chan struct{}
	received chan struct{}

	mu     sync.Mutex
	result PingResult
	seen   map[uint16]bool
}

// PingOptions change a ping.
type PingOptions struct {
	Interval time.Duration // default 20 ms
	Size     int           // bytes after the ICMP header; default 56
	TTL      int           // default 64; the hop limit of IPv6
	DontFrag bool          // also not by the sender, who does so with IPv6 otherwise
	Count    int           // stop sending by itself after so many; 0: never
}

// StartPing begins to ping dst. Stop it.
func (s *Space) StartPing(dst netip.Addr, o PingOptions) (*Pinger, error) {
	if o.Interval == 0 {
		o.Interval = 20 * time.Millisecond
	}
	if o.Size == 0 {
		o.Size = 56
	}
	open := s.rawICMP
	if dst.Is6() {
		open = s.rawICMPv6
	}
	conn, err := open(o.TTL, o.DontFrag)
	if err != nil {
		return nil, err
	}
	p := &Pinger{
		conn: conn, ident: uint16(pingIdent.Add(1)), interval: o.Interval, size: o.Size, dst: dst,
		quit: make(chan struct{}), sent: make(chan struct{}), received: make(chan struct{}), seen: map[uint16]bool{},
	}
	go p.send(o.Count)
	go p.receive()
	return p, nil
}

func (s *Space) rawICMP(ttl int, dontFrag bool) (net.PacketConn, error) {
	conn, err := s.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return nil, err
	}
	mode := unix.IP_PMTUDISC_DONT
	if dontFrag {
		mode = unix.IP_PMTUDISC_PROBE
	}
	options := map[int]int{unix.IP_MTU_DISCOVER: mode}
	if ttl > 0 {
		options[unix.IP_TTL] = ttl
	}
	return withOptions(conn, unix.IPPROTO_IP, options)
}

func (s *Space) rawICMPv6(hops int, dontFrag bool) (net.PacketConn, error) {
	conn, err := s.ListenPacket("ip6:ipv6-icmp", "::")
	if err != nil {
		return nil, err
	}
	options := map[int]int{}
	if hops > 0 {
		options[unix.IPV6_UNICAST_HOPS] = hops
	}
	if dontFrag {
		options[unix.IPV6_MTU_DISCOVER], options[unix.IPV6_DONTFRAG] = unix.IPV6_PMTUDISC_PROBE, 1
	}
	return withOptions(conn, unix.IPPROTO_IPV6, options)
}

// withOptions sets socket options, or closes the socket.
func withOptions(conn net.PacketConn, level int, options map[int]int) (net.PacketConn, error) {
	raw, err := conn.(*net.IPConn).SyscallConn()
	if err != nil {
		conn.Close()
		return nil, err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) {
		for name, value := range options {
			optErr = errors.Join(optErr, unix.SetsockoptInt(int(fd), level, name, value))
		}
	})
	if err = errors.Join(err, optErr); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (p *Pinger) send(count int) {
	defer close(p.sent)
	tick := time.NewTicker(p.interval)
	defer tick.Stop()
	msg := make([]byte, 8+p.size)
	for seq := 1; count == 0 || seq <= count; seq++ {
		msg[0], msg[1], msg[2], msg[3] = 8, 0, 0, 0
		if p.dst.Is6() {
			msg[0] = icmp6Request // the kernel sums it
		}
		binary.BigEndian.PutUint16(msg[4:], p.ident)
		binary.BigEndian.PutUint16(msg[6:], uint16(seq))
		if p.dst.Is4() {
			binary.BigEndian.PutUint16(msg[2:], Checksum(msg))
		}
		p.mu.Lock()
		p.result.Sent++
		p.mu.Unlock()
		_, _ = p.conn.WriteTo(msg, &net.IPAddr{IP: p.dst.AsSlice()}) // one that cannot leave counts as lost
		select {
		case <-p.quit:
			return
		case <-tick.C:
		}
	}
}

func (p *Pinger) receive() {
	defer close(p.received)
	buf := make([]byte, 70000)
	for {
		n, from, err := p.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		src, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP)
		p.take(src.Unmap(), buf[:n])
	}
}

// take counts one ICMP message.
func (p *Pinger) take(src netip.Addr, msg []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	request, reply, parse := byte(8), byte(0), parseICMPError
	if p.dst.Is6() {
		request, reply, parse = icmp6Request, icmp6Reply, parseICMPv6Error
	}
	if len(msg) >= 8 && msg[0] == reply && binary.BigEndian.Uint16(msg[4:]) == p.ident && src == p.dst {
		if seq := binary.BigEndian.Uint16(msg[6:]); !p.seen[seq] {
			p.seen[seq] = true
			p.result.Received++
		} else {
			p.result.Duplicates++
		}
		return
	}
	e, inner, ok := parse(src, msg)
	if ok && len(inner) >= 8 && e.Dst == p.dst && inner[0] == request && binary.BigEndian.Uint16(inner[4:]) == p.ident {
		p.result.Errors = append(p.result.Errors, e)
	}
}

// parseICMPError reads an ICMP error; inner is what follows the header of the packet that it is about.
func parseICMPError(src netip.Addr, msg []byte) (e ICMPError, inner []byte, ok bool) {
	if len(msg) < 8+20 || msg[0] != 3 && msg[0] != 11 {
		return e, nil, false
	}
	about := msg[8:]
	header := int(about[0]&15) * 4
	if len(about) < header {
		return e, nil, false
	}
	dst, _ := netip.AddrFromSlice(about[16:20])
	e = ICMPError{From: src, Type: msg[0], Code: msg[1], Dst: dst}
	if e.Type == 3 && e.Code == 4 {
		e.MTU = int(binary.BigEndian.Uint16(msg[6:]))
	}
	return e, about[header:], true
}

// What an ICMPv6 message can be (RFC 4443).
const (
	icmp6Request = 128
	icmp6Reply   = 129
	icmp6TooBig  = 2
	icmp6Errors  = 127 // the largest type of an error
)

// parseICMPv6Error is parseICMPError for IPv6.
func parseICMPv6Error(src netip.Addr, msg []byte) (e ICMPError, inner []byte, ok bool) {
	if len(msg) < 8+40 || msg[0] > icmp6Errors {
		return e, nil, false
	}
	about := msg[8:]
	dst, _ := netip.AddrFromSlice(about[24:40])
	e = ICMPError{From: src, Type: msg[0], Code: msg[1], Dst: dst}
	if e.Type == icmp6TooBig {
		e.MTU = int(binary.BigEndian.Uint32(msg[4:]))
	}
	inner = about[40:]
	if about[6] == unix.IPPROTO_FRAGMENT && len(inner) >= 8 {
		inner = inner[8:]
	}
	return e, inner, true
}

// Received is the number of answers so far.
func (p *Pinger) Received() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.result.Received
}

// Stop sends no more, waits some seconds for the answers that are still out, and returns the count.
func (p *Pinger) Stop() PingResult {
	select {
	case <-p.quit:
	default:
		close(p.quit)
	}
	<-p.sent
	for deadline := time.Now().Add(pingWait); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		p.mu.Lock()
		complete := p.result.Received+len(p.result.Errors) >= p.result.Sent
		p.mu.Unlock()
		if complete {
			break
		}
	}
	p.conn.Close()
	<-p.received
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.result
}

// Ping sends count echo requests and counts the answers.
func (s *Space) Ping(dst netip.Addr, count int) (PingResult, error) {
	return s.PingWith(dst, PingOptions{Count: count})
}

// PingWith is Ping with options; Count must be set.
func (s *Space) PingWith(dst netip.Addr, o PingOptions) (PingResult, error) {
	p, err := s.StartPing(dst, o)
	if err != nil {
		return PingResult{}, err
	}
	<-p.sent
	return p.Stop(), nil
}

// Checksum is the Internet checksum (RFC 1071) of b, whose own checksum field is zero.
func Checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
