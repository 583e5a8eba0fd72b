// This file is what a port may exchange with the other containers of the overlay (`attach --isolate`, `--allow-from`, `--allow-to`),
// wherever those are. Each direction is open, or closed but for what rules allow and for what belongs to a flow that passed the other way
// (policyflows.go). The gateway's packets and this router's own errors are nobody's of the overlay: they pass. What is refused is
// answered with ICMP "administratively prohibited" (RFC 1812 5.2.7.1, RFC 4443 3.1).

package forwarder

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Policy is what a port may exchange with other containers. It is not changed once a port has it.
type Policy struct {
	In, Out Direction // as the container sees them
}

// Direction is one half of a Policy.
type Direction struct {
	Closed bool   // but for Allow, and for replies
	Allow  []Rule // of no use where it is not closed
}

// Rule lets flows begin.
type Rule struct {
	Prefix      netip.Prefix // of the others
	Proto       uint8        // IP protocol number, 0 for any; packet.ICMP in a rule of IPv6 stands for ICMPv6
	First, Last uint16       // of the ports, of TCP and UDP, that the flow goes to; both 0 for any
}

// direction is that of a packet, as the container sees it.
type direction uint8

const (
	inbound direction = iota
	outbound
	directions
)

// policy is a Policy as the packet path uses it, with what it remembers. Its rules are constant.
type policy struct {
	rules [directions]ruleSet
	flows flowTable
}

type ruleSet struct {
	closed bool
	v4, v6 []Rule
}

// compile makes the policy of a port; nil where everything is open.
func (c *Policy) compile() (*policy, error) {
	if c == nil || !c.In.Closed && !c.Out.Closed {
		return nil, nil
	}
	p := &policy{flows: newFlowTable()}
	for dir, d := range [directions]Direction{inbound: c.In, outbound: c.Out} {
		set := &p.rules[dir]
		set.closed = d.Closed
		for _, r := range d.Allow {
			if !r.Prefix.IsValid() || r.Prefix.Addr().Is4In6() || r.First > r.Last {
				return nil, fmt.Errorf("rule %+v has no prefix or no ports", r)
			}
			r.Prefix = r.Prefix.Masked()
			if r.Prefix.Addr().Is4() {
				set.v4 = append(set.v4, r)
				continue
			}
			if r.Proto == packet.ICMP {
				r.Proto = packet.ICMPv6
			}
			set.v6 = append(set.v6, r)
		}
	}
	return p, nil
}

// policed tells whether somebody has to ask p what it may have.
func (p *Port) policed() bool { return p != nil && p.policy != nil }

// permits applies the policies of sender and receiver to a packet on its way to h. What it refuses has been counted and answered.
func (w *worker) permits(p *packet.Packet, h *hop, in *ingress) bool {
	ip := p.Bytes()
	var s sight
	s.read(ip)
	var refuses *Port
	switch {
	case in.port.policed() && h.inOverlay() && !in.port.policy.permits(outbound, &s, w.clock()):
		refuses = in.port
	case in.kind != fromGateway && h.port.policed() && !h.port.policy.permits(inbound, &s, w.clock()):
		refuses = h.port
	default:
		return true
	}
	refuses.refused.Add(1)
	w.drop(DropPolicy)
	if w.abounds(in) {
		w.icmpError(p, in, header.ICMPv4DstUnreachable, header.ICMPv4AdminProhibited, header.ICMPv6DstUnreachable, header.ICMPv6Prohibited, 0)
	}
	return false
}

// asksResolver tells whether a packet is a query to a resolver, or may be a part of one. Names of the outside are the outside: our resolver is
// no way to it for a container of a peer, which has another, and may have none because of its policy.
func asksResolver(ip []byte) bool {
	const dnsPort = 53
	var s sight
	s.read(ip)
	return (s.proto == packet.TCP || s.proto == packet.UDP) && s.role != roleAbout && s.dst == dnsPort
}

// inOverlay tells whether h is where other containers are, or would be: a policy tells nobody which addresses are taken.
func (h *hop) inOverlay() bool { return h.kind != hopGateway && h.kind != hopEgress }

// Refused is how many packets the port's policy has refused, to it and from it.
func (p *Port) Refused() uint64 { return p.refused.Load() }

// permits judges a packet at the time now, and remembers its flow if that is needed for what comes the other way.
func (p *policy) permits(dir direction, s *sight, now uint32) bool {
	rules := &p.rules[dir]
	if !rules.closed {
		// The other direction is closed. What this one begins may be answered there.
		if s.role == roleOrdinary || s.role == roleOpener {
			p.flows.remember(p.flows.hash(s.key(dir)), now)
		}
		return true
	}
	var hash uint64
	switch s.role {
	case roleLater:
		return p.flows.knows(p.flows.hash(s.fragmentKey(dir)), now, fragmentIdle) || rules.allow(dir, s)
	case roleAbout:
		return s.quotes(dir) && p.flows.knows(p.flows.hash(s.key(dir)), now, s.idle()) || rules.allow(dir, s)
	case roleOther:
		return rules.allow(dir, s)
	case roleOpener:
		if !rules.allow(dir, s) {
			return false
		}
		hash = p.flows.hash(s.key(dir))
		p.flows.remember(hash, now)
	case roleOrdinary:
		hash = p.flows.hash(s.key(dir))
		if !p.flows.knows(hash, now, s.idle()) {
			if !rules.allow(dir, s) {
				return false
			}
			p.flows.remember(hash, now)
		}
	}
	if s.fragmented {
		p.flows.remember(p.flows.hash(s.fragmentKey(dir)), now)
	}
	return true
}

// allow tells whether a rule lets the packet begin a flow.
func (r *ruleSet) allow(dir direction, s *sight) bool {
	rules := r.v4
	if !s.v4 {
		rules = r.v6
	}
	if len(rules) == 0 {
		return false
	}
	src, dst := addrs(s.ip)
	other := dst
	if dir == inbound {
		other = src
	}
	for i := range rules {
		r := &rules[i]
		switch {
		case r.Proto != 0 && r.Proto != s.outerProto:
		case r.Last != 0 && (!s.ported || s.dst < r.First || s.dst > r.Last):
		case r.Prefix.Contains(other):
			return true
		}
	}
	return false
}

// role is what a packet is to the flow that it belongs to.
type role uint8

const (
	roleOther    role = iota // no flow can be told: only a rule lets it pass
	roleOrdinary             // begins a flow, or is a reply
	roleOpener               // begins a flow, and is never a reply: a SYN without ACK, an echo request
	roleAbout                // an ICMP error about a packet of a flow
	roleLater                // a fragment without transport header, which goes where the first one went
)

// sight is what a policy sees of a packet.
type sight struct {
	ip         []byte
	v4         bool
	role       role
	outerProto uint8 // IP protocol of the packet itself
	fragmented bool  // there are later fragments, or this is one
	id         uint32
	ported     bool // src and dst are ports, of TCP or UDP

	// The flow that the packet is of or about: of a packet that was sent from src to dst. An echo has its identifier in both.
	proto            uint8
	src, dst         uint16
	srcAddr, dstAddr []byte
}

// maxExtensions6 bounds the walk over the extension headers of IPv6.
const maxExtensions6 = 8

// Numbers of IPv6 extension headers (IANA).
const (
	extHopByHop    = 0
	extRouting     = 43
	extFragment    = 44
	extDestination = 60
)

// read looks at a packet that passed check.
func (s *sight) read(ip []byte) {
	*s = sight{ip: ip}
	l4 := s.header(ip)
	s.outerProto = s.proto
	if l4 == nil {
		return
	}
	s.transport(l4)
}

// header reads addresses, protocol and fragmentation of the packet that ip is, or begins with, and returns its transport header; nil
// if there is none.
func (s *sight) header(ip []byte) []byte {
	switch {
	case len(ip) >= header.IPv4MinimumSize && ip[0]>>4 == 4:
		s.v4, s.proto, s.srcAddr, s.dstAddr = true, ip[9], ip[12:16], ip[16:20]
		h := header.IPv4(ip)
		l4 := int(h.HeaderLength())
		if l4 < header.IPv4MinimumSize || l4 > len(ip) {
			return nil
		}
		s.id = uint32(h.ID())
		return s.fragment(ip[l4:], int(h.FragmentOffset()), h.More())
	case len(ip) >= header.IPv6MinimumSize && ip[0]>>4 == 6:
		s.v4, s.proto, s.srcAddr, s.dstAddr = false, ip[6], ip[8:24], ip[24:40]
		return s.extensions(ip[header.IPv6MinimumSize:])
	}
	return nil
}

// extensions walks over the extension headers of IPv6.
func (s *sight) extensions(b []byte) []byte {
	for range maxExtensions6 {
		switch s.proto {
		case extHopByHop, extRouting, extDestination:
			if len(b) < 8 {
				return nil
			}
			n := 8 * (1 + int(b[1]))
			if n > len(b) {
				return nil
			}
			s.proto, b = b[0], b[n:]
		case extFragment:
			if len(b) < header.IPv6FragmentHeaderSize {
				return nil
			}
			word := binary.BigEndian.Uint16(b[2:])
			s.id = binary.BigEndian.Uint32(b[4:])
			s.proto = b[0]
			b = b[header.IPv6FragmentHeaderSize:]
			if word>>3 != 0 {
				return s.fragment(b, int(word>>3)*8, word&1 != 0)
			}
			s.fragmented = word&1 != 0
		default:
			return b
		}
	}
	return nil
}

// fragment notes where in its datagram b stands, offset in bytes.
func (s *sight) fragment(b []byte, offset int, more bool) []byte {
	s.fragmented = more || offset > 0
	if offset == 0 {
		return b
	}
	// One that begins within the TCP header would write over what was judged (RFC 3128).
	if s.proto != packet.TCP || offset >= header.TCPMinimumSize {
		s.role = roleLater
	}
	return nil
}

// transport reads ports, or what stands for them, and the role.
func (s *sight) transport(b []byte) {
	const portsLen, tcpFlagsAt, echoIdentAt = 4, 13, 4
	switch s.proto {
	case packet.TCP:
		if len(b) < portsLen {
			return
		}
		s.ports(b)
		if len(b) <= tcpFlagsAt { // what cannot be judged whole passes by no rule of ports
			s.ported = false
			return
		}
		s.role = roleOrdinary
		if header.TCPFlags(b[tcpFlagsAt])&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn {
			s.role = roleOpener
		}
	case packet.UDP:
		if len(b) < portsLen {
			return
		}
		s.ports(b)
		s.role = roleOrdinary
	case packet.ICMP, packet.ICMPv6:
		if len(b) < icmpErrorLen || s.v4 != (s.proto == packet.ICMP) {
			return
		}
		switch kindOfICMP(s.v4, b[0]) {
		case icmpRequest:
			s.role = roleOpener
		case icmpReply:
			s.role = roleOrdinary
		case icmpAbout:
			s.about(b[icmpErrorLen:])
			return
		default:
			return
		}
		s.src = binary.BigEndian.Uint16(b[echoIdentAt:])
		s.dst = s.src
	default:
		s.role = roleOrdinary
	}
}

func (s *sight) ports(b []byte) {
	s.ported, s.src, s.dst = true, binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
}

// Kinds of ICMP messages, as far as a policy is concerned.
type icmpKind uint8

const (
	icmpNone    icmpKind = iota // of no flow
	icmpRequest                 // echo
	icmpReply
	icmpAbout // an error
)

func kindOfICMP(v4 bool, t byte) icmpKind {
	if v4 {
		switch header.ICMPv4Type(t) {
		case header.ICMPv4Echo:
			return icmpRequest
		case header.ICMPv4EchoReply:
			return icmpReply
		case header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
			return icmpAbout
		}
		return icmpNone
	}
	switch header.ICMPv6Type(t) {
	case header.ICMPv6EchoRequest:
		return icmpRequest
	case header.ICMPv6EchoReply:
		return icmpReply
	case header.ICMPv6DstUnreachable, header.ICMPv6PacketTooBig, header.ICMPv6TimeExceeded, header.ICMPv6ParamProblem:
		return icmpAbout
	}
	return icmpNone
}

// about reads the packet that an error quotes. Eight bytes of its transport header are enough (RFC 792).
func (s *sight) about(quoted []byte) {
	outer := s.v4
	var q sight
	l4 := q.header(quoted)
	if q.v4 != outer || len(l4) < 8 {
		return
	}
	switch q.proto {
	case packet.TCP, packet.UDP:
		q.ports(l4)
	case packet.ICMP, packet.ICMPv6:
		if k := kindOfICMP(q.v4, l4[0]); k != icmpRequest && k != icmpReply {
			return
		}
		const echoIdentAt = 4
		q.src = binary.BigEndian.Uint16(l4[echoIdentAt:])
		q.dst = q.src
	}
	s.role, s.proto, s.src, s.dst, s.srcAddr, s.dstAddr = roleAbout, q.proto, q.src, q.dst, q.srcAddr, q.dstAddr
}

// quotes tells whether an error may be about a packet that its receiver sent. To a container it may come from any router; from one,
// it is about what the container got.
func (s *sight) quotes(dir direction) bool {
	src, dst := s.ip[12:16], s.ip[16:20]
	if !s.v4 {
		src, dst = s.ip[8:24], s.ip[24:40]
	}
	return string(s.srcAddr) == string(dst) && (dir == inbound || string(s.dstAddr) == string(src))
}

// idle is for how many seconds the flow is remembered without a packet.
func (s *sight) idle() int32 {
	if s.proto == packet.TCP {
		return tcpIdle
	}
	return otherIdle
}
