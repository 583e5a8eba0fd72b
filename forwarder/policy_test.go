// This file tests which packets a policy lets through.

package forwarder

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func allow(prefix string, proto uint8, ports ...uint16) Rule {
	r := Rule{Prefix: netip.MustParsePrefix(prefix), Proto: proto}
	if len(ports) > 0 {
		r.First, r.Last = ports[0], ports[len(ports)-1]
	}
	return r
}

func closedBut(rules ...Rule) Direction { return Direction{Closed: true, Allow: rules} }

func compiled(t testing.TB, c Policy) *policy {
	t.Helper()
	p, err := c.compile()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The container of the tests, and others.
const (
	us, them, stranger = "10.1.0.2", "10.2.0.2", "10.3.0.3"
	us6, them6         = "fd00:1::2", "fd00:2::2"
	fragMore           = 0x2000
)

// asks tells whether a packet passes; its direction is that of its addresses.
func (p *policy) asks(now uint32, ip []byte) bool {
	var s sight
	s.read(ip)
	dir := inbound
	if src, _ := addrs(ip); src == netip.MustParseAddr(us) || src == netip.MustParseAddr(us6) {
		dir = outbound
	}
	return p.permits(dir, &s, now)
}

func tcp(src string, sport uint16, dst string, dport uint16, flags uint8) []byte {
	return nettest.Between(src, dst).TCP(nettest.TCP{SrcPort: sport, DstPort: dport, Flags: flags}, nil)
}

func datagram(src string, sport uint16, dst string, dport uint16) []byte {
	return nettest.Between(src, dst).UDP(nettest.UDP{SrcPort: sport, DstPort: dport}, []byte("x"))
}

func echo(src, dst string, id uint16, reply bool) []byte {
	kinds := [2]uint8{8, 0}
	if strings.Contains(src, ":") {
		kinds = [2]uint8{128, 129}
	}
	kind := kinds[0]
	if reply {
		kind = kinds[1]
	}
	return nettest.Between(src, dst).ICMP(kind, 0, uint32(id)<<16|1, []byte("x"))
}

// icmpAboutPacket is the error that from sends to the packet's source.
func icmpAboutPacket(from string, ip []byte) []byte {
	src, _ := addrs(ip)
	kind := uint8(3)
	if src.Is6() {
		kind = 1
	}
	return nettest.Between(from, src.String()).ICMP(kind, 0, 0, ip)
}

func TestPolicy_RulesOpenWhatTheySay(t *testing.T) {
	const syn = nettest.SYN
	for name, c := range map[string]struct {
		rules []Rule
		ip    []byte
		want  bool
	}{
		"no rule":                    {nil, tcp(them, 5, us, 80, syn), false},
		"no rule, UDP":               {nil, datagram(them, 5, us, 80), false},
		"no rule, ping":              {nil, echo(them, us, 1, false), false},
		"no rule, SCTP":              {nil, nettest.Between(them, us).Raw(132, make([]byte, 12)), false},
		"prefix":                     {[]Rule{allow("10.2.0.0/16", 0)}, tcp(them, 5, us, 80, syn), true},
		"prefix, SCTP":               {[]Rule{allow("10.2.0.0/16", 0)}, nettest.Between(them, us).Raw(132, make([]byte, 12)), true},
		"prefix, ping":               {[]Rule{allow("10.2.0.0/16", 0)}, echo(them, us, 1, false), true},
		"another prefix":             {[]Rule{allow("10.3.0.0/16", 0)}, tcp(them, 5, us, 80, syn), false},
		"port":                       {[]Rule{allow("10.2.0.0/16", 0, 80)}, tcp(them, 5, us, 80, syn), true},
		"port, UDP":                  {[]Rule{allow("10.2.0.0/16", 0, 80)}, datagram(them, 5, us, 80), true},
		"port is the destination's":  {[]Rule{allow("10.2.0.0/16", 0, 80)}, tcp(them, 80, us, 5, syn), false},
		"another port":               {[]Rule{allow("10.2.0.0/16", 0, 80)}, tcp(them, 5, us, 81, syn), false},
		"port, ping":                 {[]Rule{allow("10.2.0.0/16", 0, 80)}, echo(them, us, 80, false), false},
		"range, first":               {[]Rule{allow("10.2.0.0/16", packet.TCP, 80, 90)}, tcp(them, 5, us, 80, syn), true},
		"range, last":                {[]Rule{allow("10.2.0.0/16", packet.TCP, 80, 90)}, tcp(them, 5, us, 90, syn), true},
		"range, beyond":              {[]Rule{allow("10.2.0.0/16", packet.TCP, 80, 90)}, tcp(them, 5, us, 91, syn), false},
		"protocol":                   {[]Rule{allow("10.2.0.0/16", packet.UDP)}, datagram(them, 5, us, 80), true},
		"another protocol":           {[]Rule{allow("10.2.0.0/16", packet.UDP)}, tcp(them, 5, us, 80, syn), false},
		"icmp":                       {[]Rule{allow("10.2.0.0/16", packet.ICMP)}, echo(them, us, 1, false), true},
		"icmp, TCP":                  {[]Rule{allow("10.2.0.0/16", packet.ICMP)}, tcp(them, 5, us, 80, syn), false},
		"second rule":                {[]Rule{allow("10.3.0.0/16", 0), allow("10.2.0.2/32", 0)}, tcp(them, 5, us, 80, syn), true},
		"all of IPv4, IPv6 packet":   {[]Rule{allow("0.0.0.0/0", 0)}, tcp(them6, 5, us6, 80, syn), false},
		"IPv6 port":                  {[]Rule{allow("fd00:2::/64", packet.TCP, 80)}, tcp(them6, 5, us6, 80, syn), true},
		"IPv6 another port":          {[]Rule{allow("fd00:2::/64", packet.TCP, 80)}, tcp(them6, 5, us6, 81, syn), false},
		"IPv6 icmp":                  {[]Rule{allow("fd00:2::/64", packet.ICMP)}, echo(them6, us6, 1, false), true},
		"TCP header cut, port rule":  {[]Rule{allow("10.2.0.0/16", 0, 80)}, nettest.Between(them, us).Raw(packet.TCP, make([]byte, 12)), false},
		"UDP with extension headers": {[]Rule{allow("fd00:2::/64", packet.UDP, 80)}, withDestinationOptions(datagram(them6, 5, us6, 80)), true},
		"another port behind them":   {[]Rule{allow("fd00:2::/64", packet.UDP, 80)}, withDestinationOptions(datagram(them6, 5, us6, 81)), false},
	} {
		p := compiled(t, Policy{In: closedBut(c.rules...)})
		if got := p.asks(1, c.ip); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// withDestinationOptions puts an extension header before the transport header of an IPv6 packet.
func withDestinationOptions(ip []byte) []byte {
	out := append(bytes.Clone(ip[:40]), ip[6], 0, 1, 4, 0, 0, 0, 0)
	out = append(out, ip[40:]...)
	out[6] = extDestination
	binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	return out
}

func TestPolicy_RepliesPassAndNothingElse(t *testing.T) {
	for name, c := range map[string]struct {
		out, in []byte // what the container sends, and what then comes
		want    bool
	}{
		"SYN and SYN-ACK":              {tcp(us, 5, them, 80, nettest.SYN), tcp(them, 80, us, 5, nettest.SYN|nettest.ACK), true},
		"SYN and RST":                  {tcp(us, 5, them, 80, nettest.SYN), tcp(them, 80, us, 5, nettest.RST), true},
		"IPv6":                         {tcp(us6, 5, them6, 80, nettest.SYN), tcp(them6, 80, us6, 5, nettest.SYN|nettest.ACK), true},
		"after the handshake":          {tcp(us, 5, them, 80, nettest.ACK), tcp(them, 80, us, 5, nettest.ACK), true},
		"a bare SYN is no reply":       {tcp(us, 5, them, 80, nettest.SYN), tcp(them, 80, us, 5, nettest.SYN), false},
		"another port of theirs":       {tcp(us, 5, them, 80, nettest.SYN), tcp(them, 81, us, 5, nettest.ACK), false},
		"another port of ours":         {tcp(us, 5, them, 80, nettest.SYN), tcp(them, 80, us, 6, nettest.ACK), false},
		"ports the other way round":    {tcp(us, 5, them, 80, nettest.SYN), tcp(them, 5, us, 80, nettest.ACK), false},
		"a stranger":                   {tcp(us, 5, them, 80, nettest.SYN), tcp(stranger, 80, us, 5, nettest.ACK), false},
		"another protocol":             {tcp(us, 5, them, 80, nettest.SYN), datagram(them, 80, us, 5), false},
		"datagram":                     {datagram(us, 5, them, 53), datagram(them, 53, us, 5), true},
		"datagram of a stranger":       {datagram(us, 5, them, 53), datagram(stranger, 53, us, 5), false},
		"ping":                         {echo(us, them, 7, false), echo(them, us, 7, true), true},
		"ping of IPv6":                 {echo(us6, them6, 7, false), echo(them6, us6, 7, true), true},
		"ping, another identifier":     {echo(us, them, 7, false), echo(them, us, 8, true), false},
		"a ping back is no reply":      {echo(us, them, 7, false), echo(them, us, 7, false), false},
		"SCTP":                         {nettest.Between(us, them).Raw(132, make([]byte, 12)), nettest.Between(them, us).Raw(132, make([]byte, 12)), true},
		"error of who was sent to":     {datagram(us, 5, them, 53), icmpAboutPacket(them, datagram(us, 5, them, 53)), true},
		"error of a router":            {datagram(us, 5, them, 53), icmpAboutPacket(stranger, datagram(us, 5, them, 53)), true},
		"error of IPv6":                {datagram(us6, 5, them6, 53), icmpAboutPacket("fd00:3::1", datagram(us6, 5, them6, 53)), true},
		"error about a ping":           {echo(us, them, 7, false), icmpAboutPacket(them, echo(us, them, 7, false)), true},
		"error about another flow":     {datagram(us, 5, them, 53), icmpAboutPacket(them, datagram(us, 6, them, 53)), false},
		"error about another's packet": {datagram(us, 5, them, 53), nettest.Between(stranger, us).ICMP(3, 1, 0, datagram(stranger, 5, them, 53)), false},
		"error about an error":         {datagram(us, 5, them, 53), icmpAboutPacket(them, icmpAboutPacket(us, datagram(them, 53, us, 5))), false},
		"error that quotes nothing":    {datagram(us, 5, them, 53), nettest.Between(them, us).ICMP(3, 1, 0, nil), false},
		"redirect":                     {datagram(us, 5, them, 53), nettest.Between(them, us).ICMP(5, 1, 0, datagram(us, 5, them, 53)), false},
		"timestamp":                    {echo(us, them, 7, false), nettest.Between(them, us).ICMP(14, 0, 7<<16, make([]byte, 12)), false},
	} {
		p := compiled(t, Policy{In: closedBut()})
		if p.asks(1, c.in) {
			t.Errorf("%s: passes unasked", name)
		}
		if !p.asks(1, c.out) {
			t.Errorf("%s: the open direction is closed", name)
		}
		if got := p.asks(2, c.in); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// With both directions closed, each rule's flows are answered in the other.
func TestPolicy_AnswersToAllowedFlowsLeave(t *testing.T) {
	p := compiled(t, Policy{In: closedBut(allow("10.2.0.0/16", packet.TCP, 80)), Out: closedBut(allow("10.2.0.0/16", packet.UDP, 53))})
	for i, c := range []struct {
		ip   []byte
		want bool
	}{
		{tcp(us, 80, them, 5, nettest.SYN|nettest.ACK), false},
		{tcp(them, 5, us, 80, nettest.SYN), true},
		{tcp(us, 80, them, 5, nettest.SYN|nettest.ACK), true},
		{tcp(us, 80, them, 5, nettest.SYN), false},
		{icmpAboutPacket(us, tcp(them, 5, us, 80, nettest.ACK)), true},
		{icmpAboutPacket(us, tcp(them, 6, us, 80, nettest.ACK)), false},
		{tcp(us, 80, stranger, 5, nettest.ACK), false},
		{datagram(us, 9, them, 53), true},
		{datagram(them, 53, us, 9), true},
		{datagram(them, 54, us, 9), false},
		{datagram(us, 9, them, 54), false},
	} {
		if got := p.asks(1, c.ip); got != c.want {
			t.Errorf("packet %d: %v, want %v", i, got, c.want)
		}
	}
}

func TestPolicy_LaterFragmentsFollowTheFirst(t *testing.T) {
	fragments := func(src string, id uint16, dport uint16) (first, later []byte) {
		whole := nettest.Between(src, us).UDP(nettest.UDP{SrcPort: 5, DstPort: dport}, make([]byte, 100))
		h := nettest.Between(src, us)
		h.ID, h.Frag = id, fragMore
		first = h.Raw(packet.UDP, whole[20:20+64])
		h.Frag = 8
		return first, h.Raw(packet.UDP, whole[20+64:])
	}
	p := compiled(t, Policy{In: closedBut(allow("10.2.0.0/16", packet.UDP, 80))})
	first, later := fragments(them, 77, 80)
	if p.asks(1, later) {
		t.Error("a later fragment passes before its first")
	}
	if !p.asks(1, first) || !p.asks(1, later) {
		t.Error("fragments of an allowed datagram are refused")
	}
	if _, other := fragments(them, 78, 80); p.asks(1, other) {
		t.Error("a fragment of another datagram passes")
	}
	if _, other := fragments(stranger, 77, 80); p.asks(1, other) {
		t.Error("a stranger's fragment passes")
	}
	if p.asks(1+fragmentIdle+1, later) {
		t.Error("a fragment passes long after its first")
	}
	first, later = fragments(them, 79, 81)
	if p.asks(1, first) || p.asks(1, later) {
		t.Error("fragments of a refused datagram pass")
	}
	// A fragment within the TCP header (RFC 3128), and a first one too short to be judged.
	p = compiled(t, Policy{In: closedBut(allow("10.2.0.0/16", packet.TCP, 80))})
	h := nettest.Between(them, us)
	h.ID, h.Frag = 5, fragMore
	syn := tcp(them, 5, us, 80, nettest.SYN)
	if p.asks(1, h.Raw(packet.TCP, syn[20:28])) {
		t.Error("a TCP header in pieces passes")
	}
	if !p.asks(1, h.Raw(packet.TCP, syn[20:40])) {
		t.Error("a first fragment with a whole TCP header is refused")
	}
	h.Frag = 1
	if p.asks(1, h.Raw(packet.TCP, syn[28:40])) {
		t.Error("a fragment that overwrites the TCP header passes")
	}
}

func TestPolicy_LaterFragmentsOfIPv6FollowTheFirst(t *testing.T) {
	fragment := func(id uint32, offset uint16, more bool, payload []byte) []byte {
		b := []byte{packet.UDP, 0, 0, 0, 0, 0, 0, 0}
		if more {
			offset |= 1
		}
		binary.BigEndian.PutUint16(b[2:], offset)
		binary.BigEndian.PutUint32(b[4:], id)
		return nettest.Between(them6, us6).Raw(extFragment, append(b, payload...))
	}
	whole := datagram(them6, 5, us6, 80)[40:]
	p := compiled(t, Policy{In: closedBut(allow("fd00:2::/64", packet.UDP, 80))})
	if p.asks(1, fragment(9, 8, false, make([]byte, 20))) {
		t.Error("a later fragment passes before its first")
	}
	if !p.asks(1, fragment(9, 0, true, whole)) || !p.asks(1, fragment(9, 8, false, make([]byte, 20))) {
		t.Error("fragments of an allowed datagram are refused")
	}
	if p.asks(1, fragment(10, 8, false, make([]byte, 20))) {
		t.Error("a fragment of another datagram passes")
	}
	if !p.asks(1, fragment(11, 0, false, whole)) {
		t.Error("a datagram in one fragment is refused")
	}
}

func TestPolicy_ForgetsIdleFlows(t *testing.T) {
	p := compiled(t, Policy{In: closedBut()})
	p.asks(1, datagram(us, 5, them, 53))
	p.asks(1, tcp(us, 5, them, 80, nettest.SYN))
	for now := uint32(1); now < 1000; now += otherIdle { // replies keep it
		if !p.asks(now, datagram(them, 53, us, 5)) {
			t.Fatalf("second %d: the reply is refused", now)
		}
	}
	if p.asks(1000+2*otherIdle, datagram(them, 53, us, 5)) {
		t.Error("a datagram passes long after the last")
	}
	if !p.asks(1+tcpIdle, tcp(them, 80, us, 5, nettest.ACK)) {
		t.Error("a connection that is idle for days is forgotten")
	}
	if p.asks(2+2*tcpIdle, tcp(them, 80, us, 5, nettest.ACK)) {
		t.Error("a connection is remembered for ever")
	}
}

// Whatever is remembered and forgotten: what a container has just sent is answered, and nobody whom it never sent to gets through.
func TestFlowTable_EvictionHarmsNobody(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	p := compiled(t, Policy{In: closedBut()})
	const flows = 4 * flowSets * flowWays
	kept := 0
	for i := range flows {
		now := uint32(1 + i/1000)
		port, other := uint16(r.Uint32()), netip.AddrFrom4([4]byte{10, 2, byte(r.Uint32()), byte(r.Uint32())}).String()
		p.asks(now, datagram(us, port, other, 53))
		if !p.asks(now, datagram(other, 53, us, port)) {
			t.Fatalf("flow %d: its reply is refused", i)
		}
		if p.asks(now, datagram(stranger, 53, us, port)) || p.asks(now, datagram(other, 54, us, port)) {
			t.Fatalf("flow %d: a stranger passes", i)
		}
		// One that is in use stays, however many come and go.
		if !p.asks(now, datagram(us, 1, them, 53)) || !p.asks(now, datagram(them, 53, us, 1)) {
			t.Fatalf("flow %d: one in use is refused", i)
		}
		kept++
	}
	filled := 0
	for i := range p.flows.sets {
		for j := range p.flows.sets[i].hashes {
			if p.flows.sets[i].hashes[j].Load() != 0 {
				filled++
			}
		}
	}
	if filled < flowSets*flowWays*9/10 || kept != flows {
		t.Errorf("%d of %d places were used: the test evicts nothing", filled, flowSets*flowWays)
	}
}

func TestFlowTable_ServesSeveralWorkers(t *testing.T) {
	p := compiled(t, Policy{In: closedBut()})
	done := make(chan bool)
	for w := range 4 {
		go func() {
			ok := true
			for i := range 20000 {
				port := uint16(i%50*4 + w)
				p.asks(1, datagram(us, port, them, 53))
				ok = ok && !p.asks(1, datagram(stranger, 53, us, port))
			}
			done <- ok
		}()
	}
	for range 4 {
		if !<-done {
			t.Error("a stranger passed")
		}
	}
}

func TestCompile_RefusesRulesThatMeanNothing(t *testing.T) {
	for name, r := range map[string]Rule{
		"no prefix":      {},
		"mapped":         {Prefix: netip.MustParsePrefix("::ffff:10.0.0.0/104")},
		"ports reversed": {Prefix: netip.MustParsePrefix("10.0.0.0/8"), First: 2, Last: 1},
	} {
		if _, err := (&Policy{In: closedBut(r)}).compile(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for name, c := range map[string]*Policy{"none": nil, "all open": {In: Direction{Allow: []Rule{allow("10.0.0.0/8", 0)}}}} {
		if p, err := c.compile(); p != nil || err != nil {
			t.Errorf("%s: %v, %v; want nothing to ask", name, p, err)
		}
	}
}

// policed gives a port of the rig a policy.
func (g *rig) policed(p *Port, c Policy) { p.policy = compiled(g.t, c) }

func TestForward_KeepsPolicies(t *testing.T) {
	g := newRig(t)
	g.policed(g.portA, Policy{In: closedBut(), Out: closedBut()})
	inj := g.NewInjector()
	prohibited := func(what string, got []packet.Packet, to string) {
		t.Helper()
		if len(got) != 1 {
			t.Fatalf("%s: %d packets, want an error", what, len(got))
		}
		ip := got[0].Bytes()
		_, dst := addrs(ip)
		if dst.String() != to {
			t.Errorf("%s: the error goes to %v", what, dst)
		}
		if l4, want := 20, [2]byte{3, 13}; ip[0]>>4 == 4 && [2]byte(ip[l4:]) != want {
			t.Errorf("%s: error %v, want %v", what, ip[l4:l4+2], want)
		}
		if l4, want := 40, [2]byte{1, 1}; ip[0]>>4 == 6 && [2]byte(ip[l4:]) != want {
			t.Errorf("%s: error %v, want %v", what, ip[l4:l4+2], want)
		}
	}
	// Out: to the node's other container, to peers', to addresses that nobody has, to a peer's gateway.
	refused := uint64(0)
	for _, to := range []string{containerB, containerC, "10.1.0.77", "10.9.9.9", "10.2.0.1"} {
		g.fromA(pkt(udp(containerA, to, 9)))
		prohibited("to "+to, g.a.Take(), containerA)
		refused++
	}
	g.fromA(pkt(udp(containerA6, containerC6, 9)))
	prohibited("to IPv6", g.a.Take(), containerA6)
	refused++
	low := udp(containerA, containerB, 9)
	low[8] = 1
	nettest.Fix(low)
	g.fromA(pkt(low))
	prohibited("with a TTL of 1", g.a.Take(), containerA)
	refused++
	// In: from the node's other container, from a peer's, from a peer's gateway.
	g.from(ingress{kind: fromContainer, port: g.portB}, pkt(udp(containerB, containerA, 9)))
	prohibited("from b", g.b.Take(), containerB)
	refused++
	for _, from := range []string{containerC, "10.2.0.1", containerC6} {
		to := containerA
		if from == containerC6 {
			to = containerA6
		}
		g.fromPeer(g.peer, pkt(udp(from, to, 9)))
		got := datagrams(t, g.peer)
		if len(got) != 1 {
			t.Fatalf("from %s: the peer got %d packets, want an error", from, len(got))
		}
		prohibited("from "+from, []packet.Packet{*pkt(got[0])}, from)
		refused++
	}
	if len(g.b.Take())+len(datagrams(t, g.peer))+len(g.a.Take()) != 0 {
		t.Error("something passed")
	}
	g.wantDrops(map[string]uint64{"policy-denied": refused})
	if n := g.portA.Refused(); n != refused {
		t.Errorf("%d packets refused by the port's policy, want %d", n, refused)
	}
	// The gateway, the outside, and what others have with each other.
	g.fromA(pkt(udp(containerA, gateway, 9)), pkt(udp(containerA, outside, 9)))
	if len(g.gw.Take()) != 1 || len(g.egress.Take()) != 1 {
		t.Error("the gateway or the outside is closed")
	}
	inj.Forward([]*packet.Packet{pkt(udp(gateway, containerA, 9)), pkt(udp(outside, containerA, 9))})
	if n := len(g.a.Take()); n != 2 {
		t.Errorf("%d packets of the gateway arrived, want 2", n)
	}
	g.from(ingress{kind: fromContainer, port: g.portB}, pkt(udp(containerB, containerC, 9)))
	if n := len(datagrams(t, g.peer)); n != 1 {
		t.Errorf("%d packets between others arrived, want 1", n)
	}
	g.wantDrops(map[string]uint64{"policy-denied": refused})
}

// Packets of one pair of addresses in one batch are judged one by one.
func TestForward_JudgesEachPacketOfABatch(t *testing.T) {
	g := newRig(t)
	g.policed(g.portB, Policy{In: closedBut(allow(containerA+"/32", packet.UDP, 2000))})
	to := func(port uint16) *packet.Packet { return pkt(datagram(containerA, 5, containerB, port)) }
	g.fromA(to(2000), to(2001), to(2000), to(2002))
	if n := len(g.b.Take()); n != 2 {
		t.Errorf("%d packets arrived, want 2", n)
	}
	g.wantDrops(map[string]uint64{"policy-denied": 2})
}

// Errors of the routers on the way to allowed containers pass: path MTU discovery goes on.
func TestForward_LetsErrorsAboutAllowedFlowsPass(t *testing.T) {
	g := newRig(t)
	g.policed(g.portA, Policy{In: closedBut(), Out: closedBut(allow("10.2.0.0/16", 0), allow("10.3.0.0/16", 0))})
	sent := udp(containerA, containerC, 1000)
	g.fromA(pkt(sent))
	g.fromPeer(g.peer, pkt(nettest.Between("10.2.0.1", containerA).ICMP(3, 4, 600, sent[:28])))
	if n := len(g.a.Take()); n != 1 {
		t.Errorf("%d errors of the peer's router arrived, want 1", n)
	}
	// And this router's own.
	big := nettest.Between(containerA, "10.3.0.2")
	big.Frag = 0x4000
	g.fromA(pkt(big.UDP(nettest.UDP{}, nettest.Payload(1400))))
	if n := len(g.a.Take()); n != 1 {
		t.Errorf("%d errors of this router arrived, want 1", n)
	}
	g.wantDrops(map[string]uint64{"too-big": 1})
}

// However many knock at closed doors, whoever has to learn of a path MTU does.
func TestForward_RefusalsLeaveRoomForOtherErrors(t *testing.T) {
	g := newRig(t)
	g.policed(g.portB, Policy{In: closedBut()})
	big := nettest.Between(containerA, "10.3.0.2")
	big.Frag = 0x4000
	for range 5 {
		var batch []*packet.Packet
		for range batchPackets - 1 {
			batch = append(batch, pkt(udp(containerA, containerB, 9)))
		}
		g.fromA(append(batch, pkt(big.UDP(nettest.UDP{}, nettest.Payload(1400))))...)
		got, tooBig := g.a.Take(), 0
		for _, p := range got {
			if p.Bytes()[21] == 4 {
				tooBig++
			}
		}
		if tooBig != 1 {
			t.Fatalf("%d of %d errors tell of the path MTU, want 1", tooBig, len(got))
		}
	}
	if n := g.drops()["policy-denied"]; n != 5*(batchPackets-1) {
		t.Errorf("%d packets refused", n)
	}
}

// A container that must not reach the outside does not get names of it from another node's resolver.
func TestForward_ResolvesForNoPeer(t *testing.T) {
	g := newRig(t)
	h := nettest.Between(containerC, gateway)
	h.Frag = fragMore
	queries := [][]byte{
		datagram(containerC, 5, gateway, 53), tcp(containerC, 5, gateway, 53, nettest.SYN),
		h.Raw(packet.TCP, tcp(containerC, 5, gateway, 53, nettest.SYN)[20:28]),
	}
	for _, ip := range queries {
		g.fromPeer(g.peer, pkt(ip))
	}
	g.wantDrops(map[string]uint64{"transit-refused": uint64(len(queries))})
	answers := datagrams(t, g.peer) // so that whoever asks does not wait
	if len(answers) != len(queries) {
		t.Errorf("%d answers to %d queries", len(answers), len(queries))
	}
	for _, a := range answers {
		if h := header.ICMPv4(a[header.IPv4MinimumSize:]); a[9] != packet.ICMP || h.Type() != header.ICMPv4DstUnreachable || h.Code() != header.ICMPv4PortUnreachable {
			t.Errorf("answered with % x", a)
		}
	}
	g.fromPeer(g.peer, pkt(datagram(containerC, 53, gateway, 5)), pkt(echo(containerC, gateway, 53, false)))
	g.fromA(pkt(datagram(containerA, 5, gateway, 53)))
	if n := len(g.gw.Take()); n != 3 {
		t.Errorf("%d packets reached the gateway, want 3", n)
	}
}

func FuzzPolicy(f *testing.F) {
	for _, ip := range [][]byte{
		tcp(them, 5, us, 80, nettest.SYN), datagram(them6, 5, us6, 80), echo(them, us, 1, false), withDestinationOptions(datagram(them6, 5, us6, 80)),
		icmpAboutPacket(them, datagram(us, 5, them, 53)), icmpAboutPacket(them6, datagram(us6, 5, them6, 53)), nettest.Between(them6, us6).Raw(extFragment, make([]byte, 20)),
	} {
		f.Add(ip)
	}
	f.Fuzz(func(t *testing.T, ip []byte) {
		p := packet.Packet{Buf: ip}
		if check(&p) != dropNone {
			return
		}
		var s sight
		s.read(p.Bytes())
		closed := compiled(t, Policy{In: closedBut(), Out: closedBut()})
		if closed.permits(inbound, &s, 1) || closed.permits(outbound, &s, 1) {
			t.Fatalf("%x passes a policy that lets nothing through", ip)
		}
		half := compiled(t, Policy{In: closedBut()})
		if half.permits(inbound, &s, 1) {
			t.Fatalf("%x passes unasked", ip)
		}
		if !half.permits(outbound, &s, 1) {
			t.Fatalf("%x is refused in an open direction", ip)
		}
		if half.permits(inbound, &s, 1) && s.role == roleOpener {
			t.Fatalf("%x passes as its own reply", ip)
		}
	})
}
