// This file is the Zone: the names of the overlay, which the resolver answers by itself, and the way back from its addresses.
//
//	web.ovl.internal.  A, AAAA                 a container that is called web, here or elsewhere
//	db.ovl.internal.   A, AAAA, several        an alias of several, in turn
//	host.ovl.internal., gateway.ovl.internal.  the asking container's gateway
//	web.  db.  host.  gateway.                 the same in one label, where there is such a name; else it is forwarded
//	localhost., *.localhost.                   the asking container itself: 127.0.0.1, ::1 (RFC 6761, section 6.3)
//	3.7.213.10.in-addr.arpa.  PTR              every address of the overlay's networks; none of them is ever forwarded

package dns

import (
	"encoding/hex"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/miekg/dns"
)

// How long others may keep what the zone says, in seconds: names come and go within seconds.
const (
	zoneTTL     = 2
	zoneMinimum = 1 // for what is not there
)

// gatewayNames are the names in every domain that lead to the asking container's gateway; the second is what PTR says of it.
var gatewayNames = [...]string{"host", "gateway"}

func isGateway(name string) bool { return slices.Contains(gatewayNames[:], name) }

func isLocalhost(name string) bool {
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

// Reserved tells whether a name, in lower case, is one that no container can have. A Zone passes over those that have one.
func Reserved(name string) bool { return isGateway(name) || isLocalhost(name) }

// Host is a container with a name.
type Host struct {
	Name    string // relative to the domain, in lower case; it may have several labels
	Addrs   []netip.Addr
	Aliases []string // as Name; others may have them too
}

// ZoneConfig is what a Zone is made of.
type ZoneConfig struct {
	Domain   string         // as "ovl.internal"
	Networks []netip.Prefix // whose addresses are the overlay's
	Hosts    []Host         // everywhere in the overlay
	// Gateways are the addresses under which a container of this node, found by each of its own, knows its gateway. Who is not in it has the one
	// that it asks.
	Gateways map[netip.Addr][]netip.Addr
}

// Equal tells whether both make the same Zone. The order of Hosts counts.
func (c ZoneConfig) Equal(o ZoneConfig) bool {
	return c.Domain == o.Domain && slices.Equal(c.Networks, o.Networks) && slices.EqualFunc(c.Hosts, o.Hosts, Host.equal) &&
		maps.EqualFunc(c.Gateways, o.Gateways, slices.Equal)
}

func (h Host) equal(o Host) bool {
	return h.Name == o.Name && slices.Equal(h.Addrs, o.Addrs) && slices.Equal(h.Aliases, o.Aliases)
}

// Zone is never changed once made, and safe for concurrent use.
type Zone struct {
	domain   string // in lower case, with a dot at the end
	networks []netip.Prefix
	names    map[string]*owner // by relative name, and "" for what is only in the middle of others
	reverse  map[netip.Addr][]string
	gateways map[netip.Addr][]netip.Addr
	serial   uint32
}

// owner is a name that is there.
type owner struct {
	addrs, addrs6 []netip.Addr
	next, next6   atomic.Uint32 // which of them is said first
}

func (o *owner) add(addrs []netip.Addr) {
	for _, a := range addrs {
		list := &o.addrs
		if a.Is6() {
			list = &o.addrs6
		}
		if !slices.Contains(*list, a) {
			*list = append(*list, a)
		}
	}
}

// zones counts the zones made: the serial number tells whoever looks that something has changed.
var zones atomic.Uint32

// NewZone makes a Zone. A name goes before an alias that is the same.
func NewZone(c ZoneConfig) *Zone {
	z := &Zone{
		domain:   dns.CanonicalName(c.Domain),
		names:    make(map[string]*owner),
		reverse:  make(map[netip.Addr][]string),
		gateways: c.Gateways,
		serial:   zones.Add(1),
	}
	for _, n := range c.Networks {
		z.networks = append(z.networks, n.Masked())
	}
	take := func(name string) *owner {
		o := z.names[name]
		if o == nil {
			o = &owner{}
			o.next.Store(rand.Uint32())
			o.next6.Store(rand.Uint32())
			z.names[name] = o
		}
		return o
	}
	isName := make(map[string]bool, len(c.Hosts))
	for _, h := range c.Hosts {
		if Reserved(h.Name) {
			continue
		}
		isName[h.Name] = true
		take(h.Name).add(h.Addrs)
		for _, a := range h.Addrs {
			z.reverse[a] = append(z.reverse[a], h.Name)
		}
	}
	for _, h := range c.Hosts {
		for _, alias := range h.Aliases {
			if !isName[alias] && !Reserved(alias) {
				take(alias).add(h.Addrs)
			}
		}
	}
	for name := range z.names {
		for _, parent, more := strings.Cut(name, "."); more; _, parent, more = strings.Cut(parent, ".") {
			if z.names[parent] == nil {
				z.names[parent] = &owner{} // nothing is there, but below it
			}
		}
	}
	return z
}

// Lookup is the addresses of a container's name or alias, those of an alias in turn. The name is in lower case, without a dot at its end, with or
// without the domain.
func (z *Zone) Lookup(name string) []netip.Addr {
	if z == nil {
		return nil
	}
	o := z.names[strings.TrimSuffix(name, "."+strings.TrimSuffix(z.domain, "."))]
	if o == nil {
		return nil
	}
	return slices.Concat(inTurn(o.addrs, &o.next), inTurn(o.addrs6, &o.next6))
}

// answer is the message for a question that is the zone's, nil for any other.
func (z *Zone) answer(q *query, who Query) []byte {
	name := strings.ToLower(q.question.Name)
	m := new(dns.Msg)
	apex, found := z.domain, true
	switch {
	case dns.IsSubDomain(z.domain, name):
		found = z.inDomain(m, q, who, strings.TrimSuffix(strings.TrimSuffix(name, z.domain), "."))
	case isLocalhost(strings.TrimSuffix(name, ".")):
		apex = "localhost."
		var o owner
		o.add([]netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()})
		o.answer(m, q)
	case z.inOneLabel(name):
		apex = name // there is nothing else that we know of the root
		z.inDomain(m, q, who, strings.TrimSuffix(name, "."))
	default:
		p, rest, ok := reversed(name)
		if !ok {
			return nil
		}
		if apex, ok = z.apexOf(name, p); !ok {
			return nil
		}
		found = z.inReverse(m, q, who, p, rest, apex == name)
	}
	return z.message(q, m, apex, found)
}

// inOneLabel tells whether a name is answered without the domain: that of a container, or of the gateway.
func (z *Zone) inOneLabel(name string) bool {
	if dns.CountLabel(name) != 1 {
		return false
	}
	label := strings.TrimSuffix(name, ".")
	o := z.names[label]
	return isGateway(label) || o != nil && len(o.addrs)+len(o.addrs6) > 0
}

// message completes m, of which the records are there, and packs it.
func (z *Zone) message(q *query, m *dns.Msg, apex string, found bool) []byte {
	m.Id, m.Response, m.Authoritative, m.RecursionAvailable = q.id(), true, true, true
	m.RecursionDesired = q.wire[2]&1 != 0
	m.CheckingDisabled = q.wire[3]&0x10 != 0
	m.Question = []dns.Question{q.question}
	m.Compress = true
	class := q.question.Qclass
	switch {
	case q.edns && q.version != 0:
		m.Answer, m.Rcode = nil, dns.RcodeBadVers
	case class != dns.ClassINET && class != dns.ClassANY, q.question.Qtype == dns.TypeAXFR, q.question.Qtype == dns.TypeIXFR:
		m.Answer, m.Rcode = nil, dns.RcodeRefused
	case !found:
		m.Rcode = dns.RcodeNameError
		fallthrough
	case len(m.Answer) == 0:
		m.Ns = []dns.RR{z.soa(apex)}
	}
	if q.edns {
		m.SetEdns0(ednsSize, q.do)
	}
	b, err := m.Pack()
	if err != nil { // names are checked, so only more addresses than a message holds
		return q.refusal(dns.RcodeServerFailure)
	}
	return b
}

func (z *Zone) soa(apex string) dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: apex, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: zoneMinimum},
		Ns:  "gateway." + z.domain, Mbox: "hostmaster." + z.domain,
		Serial: z.serial, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: zoneMinimum,
	}
}

func (z *Zone) ns(apex string) dns.RR {
	return &dns.NS{Hdr: dns.RR_Header{Name: apex, Rrtype: dns.TypeNS, Class: dns.ClassINET, Ttl: zoneTTL}, Ns: "gateway." + z.domain}
}

// asked tells whether records of a type are asked for.
func (q *query) asked(kind uint16) bool {
	return q.question.Qtype == kind || q.question.Qtype == dns.TypeANY
}

// addApex adds what only the top of a zone has.
func (z *Zone) addApex(m *dns.Msg, q *query) {
	if q.asked(dns.TypeSOA) {
		m.Answer = append(m.Answer, z.soa(q.question.Name))
	}
	if q.asked(dns.TypeNS) {
		m.Answer = append(m.Answer, z.ns(q.question.Name))
	}
}

// inDomain adds the records of a name relative to the domain. No means that there is no such name.
func (z *Zone) inDomain(m *dns.Msg, q *query, who Query, name string) bool {
	if name == "" {
		z.addApex(m, q)
		return true
	}
	if isGateway(name) {
		var o owner
		o.add(z.gatewaysOf(who))
		o.answer(m, q)
		return true
	}
	o := z.names[name]
	if o != nil {
		o.answer(m, q)
	}
	return o != nil
}

// gatewaysOf are the addresses by which a container knows its gateway.
func (z *Zone) gatewaysOf(who Query) []netip.Addr {
	if addrs, ok := z.gateways[who.From]; ok {
		return addrs
	}
	return []netip.Addr{who.At}
}

// answer adds the addresses that q asks for, each time another of them first.
func (o *owner) answer(m *dns.Msg, q *query) {
	if q.asked(dns.TypeA) {
		for _, a := range inTurn(o.addrs, &o.next) {
			m.Answer = append(m.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: q.question.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: zoneTTL}, A: a.AsSlice()})
		}
	}
	if q.asked(dns.TypeAAAA) {
		for _, a := range inTurn(o.addrs6, &o.next6) {
			m.Answer = append(m.Answer, &dns.AAAA{
				Hdr: dns.RR_Header{Name: q.question.Name, Rrtype: dns.TypeAAAA, Class: dns.ClassINET, Ttl: zoneTTL}, AAAA: a.AsSlice()})
		}
	}
}

// inTurn is list beginning with another element each time.
func inTurn(list []netip.Addr, next *atomic.Uint32) []netip.Addr {
	if len(list) < 2 {
		return list
	}
	first := int(next.Add(1) % uint32(len(list)))
	return slices.Concat(list[first:], list[:first])
}

// inReverse adds the names of an address; p is shorter where only the beginning of an address is asked for. rest is what stands before it.
func (z *Zone) inReverse(m *dns.Msg, q *query, who Query, p netip.Prefix, rest, isApex bool) bool {
	if isApex && !rest {
		z.addApex(m, q)
	}
	switch {
	case rest:
		return false
	case !p.IsSingleIP():
		return true // there is something below
	}
	a := p.Addr()
	names := z.reverse[a]
	if slices.Contains(z.gatewaysOf(who), a) {
		names = append([]string{gatewayNames[1]}, names...)
	}
	if q.asked(dns.TypePTR) {
		for _, name := range names {
			m.Answer = append(m.Answer, &dns.PTR{
				Hdr: dns.RR_Header{Name: q.question.Name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: zoneTTL}, Ptr: name + "." + z.domain})
		}
	}
	return len(names) > 0 || isApex
}

// apexOf is the top of the reverse zone that name, which stands for p, is in: the shortest name of which everything below is ours. No means
// that it is in none.
func (z *Zone) apexOf(name string, p netip.Prefix) (string, bool) {
	step, suffix := 8, 2
	if p.Addr().Is6() {
		step = 4
	}
	for _, n := range z.networks {
		bits := (n.Bits() + step - 1) / step * step
		if p.Addr().BitLen() != n.Addr().BitLen() || p.Bits() < bits || !n.Contains(p.Addr()) {
			continue
		}
		labels := dns.Split(name)
		return name[labels[len(labels)-suffix-bits/step]:], true
	}
	return "", false
}

// reversed reads a name of in-addr.arpa. or ip6.arpa., in lower case, as the address that it stands for, or the beginning of one. rest tells
// that more stands in front of what could be read.
func reversed(name string) (p netip.Prefix, rest, ok bool) {
	labels := dns.SplitDomainName(name)
	if len(labels) < 3 || labels[len(labels)-1] != "arpa" {
		return p, false, false
	}
	kind := labels[len(labels)-2]
	labels = labels[:len(labels)-2]
	slices.Reverse(labels)
	bits := 0
	switch kind {
	case "in-addr":
		var a [4]byte
		for _, l := range labels {
			n, err := strconv.ParseUint(l, 10, 8)
			if bits == 32 || err != nil || l != strconv.Itoa(int(n)) {
				rest = true
				break
			}
			a[bits/8] = byte(n)
			bits += 8
		}
		p = netip.PrefixFrom(netip.AddrFrom4(a), bits)
	case "ip6":
		var digits [32]byte
		for i := range digits {
			digits[i] = '0'
		}
		for _, l := range labels {
			if bits == 128 || len(l) != 1 || !strings.Contains("0123456789abcdef", l) {
				rest = true
				break
			}
			digits[bits/4] = l[0]
			bits += 4
		}
		var a [16]byte
		_, _ = hex.Decode(a[:], digits[:]) // they are all hexadecimal
		p = netip.PrefixFrom(netip.AddrFrom16(a), bits)
	default:
		return p, false, false
	}
	return p, rest, true
}
