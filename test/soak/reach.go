// This file is what members reach, and what they must not.

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// straggling is how long the last answer may take that must not come.
const straggling = 300 * time.Millisecond

// matrix has every member ask every other, until all who may be reached have answered, or the patience is at its end; it gives what is missing.
// An answer that must not come, or of somebody else, is a violation.
func (r *run) matrix(of []*member, patience time.Duration) (missing []string) {
	deadline := time.Now().Add(patience)
	var mu sync.Mutex
	var wg sync.WaitGroup
	var forbidden []string
	for _, m := range of {
		wg.Add(1)
		go func() {
			defer wg.Done()
			lacking, wrong := r.row(m, of, deadline)
			mu.Lock()
			defer mu.Unlock()
			missing, forbidden = append(missing, lacking...), append(forbidden, wrong...)
		}()
	}
	wg.Wait()
	if len(forbidden) > 0 {
		r.violation("reached what must not be:\n  %s", strings.Join(forbidden, "\n  "))
	}
	return missing
}

// question is one that a member asks again and again.
type question struct {
	to      netip.Addr
	of      *member // nil: nobody has the address
	may     bool
	numbers []uint64
}

// row has one member ask all others.
func (r *run) row(m *member, of []*member, deadline time.Time) (missing, forbidden []string) {
	defer m.s.forget()
	var questions []*question
	for _, o := range of {
		if o != m {
			questions = append(questions, &question{to: o.addr, of: o, may: may(m.policy, o.policy, "udp")})
		}
	}
	for _, a := range r.freed {
		if !slices.ContainsFunc(r.members, func(m *member) bool { return (m.attached || m.unsure) && m.addr == a }) {
			questions = append(questions, &question{to: a})
		}
	}
	pending := func() (open []*question) {
		for _, q := range questions {
			if q.may && !slices.ContainsFunc(q.numbers, func(n uint64) bool { return m.s.answer(n) != "" }) {
				open = append(open, q)
			}
		}
		return open
	}
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		for _, q := range questions {
			if !q.may || slices.Contains(pending(), q) {
				q.numbers = append(q.numbers, m.s.ask(netip.AddrPortFrom(q.to, udpPort)))
			}
		}
		time.Sleep(pause)
		if len(pending()) == 0 || time.Now().After(deadline) {
			break
		}
	}
	time.Sleep(straggling)
	for _, q := range pending() {
		missing = append(missing, fmt.Sprintf("%s (%s, %s) does not reach %s (%s, %s) in %d tries", m.id, m.node.Name, m.addr, q.of.id, q.of.node.Name, q.to, len(q.numbers)))
	}
	for _, q := range questions {
		for _, n := range q.numbers {
			who := m.s.answer(n)
			switch {
			case who == "":
			case !q.may && q.of == nil:
				forbidden = append(forbidden, fmt.Sprintf("%s (%s) asked %s, which nobody should have, and %s answers", m.id, m.addr, q.to, who))
			case !q.may:
				forbidden = append(forbidden, fmt.Sprintf("%s (%s, %s) reaches %s (%s, %s)", m.id, m.addr, m.policy, q.of.id, q.to, q.of.policy))
			case who != q.of.id:
				forbidden = append(forbidden, fmt.Sprintf("%s asked %s (%s), and %s answers", m.id, q.of.id, q.to, who))
			}
		}
	}
	return missing, forbidden
}

// checkSteady has the members that were there before this day reach each other while the store is being hurt.
func (r *run) checkSteady() {
	var steady []*member
	for _, m := range r.attachedMembers() {
		if m.since < r.round {
			steady = append(steady, m)
		}
	}
	if missing := r.matrix(steady, 10*time.Second); len(missing) > 0 {
		r.violation("the store is being hurt, and packets do not go on:\n  %s", strings.Join(missing, "\n  "))
	}
}

// check is something that has to hold now that the nodes have settled; it is tried for a while, since a machine may be busy.
type check struct {
	what string
	try  func() error
}

// checkReach checks some of everything.
func (r *run) checkReach() {
	members := r.attachedMembers()
	r.address2member(members)
	var checks []check
	pairs := func(n int, add func(a, b *member)) {
		for range n {
			if len(members) < 2 {
				return
			}
			i := r.rng.IntN(len(members))
			j := (i + 1 + r.rng.IntN(len(members)-1)) % len(members)
			add(members[i], members[j])
		}
	}
	pairs(8, func(a, b *member) { checks = append(checks, r.connects(a, b)) })
	pairs(8, func(a, b *member) { checks = append(checks, r.pings(a, b)) })
	pairs(8, func(a, b *member) { checks = append(checks, r.resolves(a, b.name, b.addr)) })
	for _, name := range names {
		if len(members) > 0 && r.rng.IntN(5) == 0 && !slices.ContainsFunc(r.members, func(m *member) bool { return m.name == name }) &&
			!slices.ContainsFunc(r.dying, func(d dying) bool { return d.name == name }) {
			checks = append(checks, r.resolves(members[r.rng.IntN(len(members))], name, netip.Addr{}))
		}
	}
	for _, m := range members {
		for _, p := range m.ports {
			checks = append(checks, r.portLeads(m, p))
		}
		if r.rng.IntN(4) == 0 {
			checks = append(checks, r.egress(m))
		}
	}
	for _, at := range r.closed {
		checks = append(checks, r.portClosed(at))
	}
	r.closed = nil
	if len(r.freed) > 12 {
		r.freed = slices.Clone(r.freed[len(r.freed)-12:])
	}
	for _, talk := range r.talks {
		checks = append(checks, check{
			fmt.Sprintf("the conversation of %s with %s, begun on day %d", talk.from.id, talk.to.id, talk.since),
			// TCP tries again after up to as long as the pause was; a minute is more than all days.
			func() error { return final(talk.goesOn(time.Minute)) },
		})
	}
	r.hold(checks)
	if r.t.Failed() {
		r.violation("while everything was checked")
	}
}

// finally is an error after which there is nothing to try again.
type finally struct{ error }

func final(err error) error {
	if err == nil {
		return nil
	}
	return finally{err}
}

// hold tries all checks side by side.
func (r *run) hold(checks []check) {
	var mu sync.Mutex
	var wrong []string
	var wg sync.WaitGroup
	for _, c := range checks {
		wg.Add(1)
		go func() {
			defer wg.Done()
			deadline := time.Now().Add(15 * time.Second)
			for {
				err := c.try()
				if err == nil {
					return
				}
				if errors.As(err, new(finally)) || time.Now().After(deadline) {
					mu.Lock()
					defer mu.Unlock()
					wrong = append(wrong, c.what+": "+err.Error())
					return
				}
				time.Sleep(200 * time.Millisecond)
			}
		}()
	}
	wg.Wait()
	r.say("%d checks, %d wrong", len(checks), len(wrong))
	if len(wrong) > 0 {
		r.violation("the nodes have settled, and yet:\n  %s", strings.Join(wrong, "\n  "))
	}
}

// address2member fails the run if two members have one address, or one has not what its container has.
func (r *run) address2member(members []*member) {
	owners := map[netip.Addr]*member{}
	for _, m := range members {
		if o := owners[m.addr]; o != nil {
			r.violation("%s and %s both have %s", m.id, o.id, m.addr)
		}
		owners[m.addr] = m
		if !m.node.subnet.Contains(m.addr) {
			r.violation("%s on %s has %s, which is not of %s", m.id, m.node.Name, m.addr, m.node.subnet)
		}
		interfaces, err := m.c.Interfaces()
		if err != nil || len(interfaces) != 1 || len(interfaces[0].Addrs) != 1 || interfaces[0].Addrs[0] != netip.PrefixFrom(m.addr, m.node.subnet.Bits()) {
			r.violation("%s should have %s, and has %+v, %v", m.id, m.addr, interfaces, err)
		}
	}
}

// connects checks a connection and what it carries, or that there is none.
func (r *run) connects(a, b *member) check {
	n := []int{1, 1000, 100 << 10, 2 << 20}[r.rng.IntN(4)]
	allowed := may(a.policy, b.policy, "tcp")
	return check{fmt.Sprintf("%s (%s, %s) connects to %s (%s, %s)", a.id, a.addr, a.policy, b.id, b.addr, b.policy), func() error {
		limit := 30 * time.Second
		if !allowed {
			limit = time.Second
		}
		id, err := a.s.exchange(netip.AddrPortFrom(b.addr, tcpPort), n, limit)
		switch {
		case !allowed && err == nil:
			return final(fmt.Errorf("%s answers, which must not be", id))
		case !allowed:
			return nil
		case err == nil && id != b.id:
			return final(fmt.Errorf("%s answers", id))
		default:
			return err
		}
	}}
}

func (r *run) pings(a, b *member) check {
	allowed, size := may(a.policy, b.policy, "icmp"), []int{56, 1300, 3000}[r.rng.IntN(3)]
	return check{fmt.Sprintf("%s (%s, %s) pings %s (%s, %s) with %d bytes", a.id, a.addr, a.policy, b.id, b.addr, b.policy, size), func() error {
		result, err := a.s.space.PingWith(b.addr, lab.PingOptions{Count: 3, Size: size})
		switch {
		case err != nil:
			return err
		case allowed && result.Lost() > 0:
			return fmt.Errorf("%v", result)
		case !allowed && result.Received > 0:
			return final(fmt.Errorf("%v, which must not be", result))
		default:
			return nil
		}
	}}
}

// resolves checks what a member finds by a name; no address: nothing.
func (r *run) resolves(m *member, name string, want netip.Addr) check {
	expected := "NXDOMAIN"
	if want.IsValid() {
		expected = "NOERROR " + want.String()
	}
	return check{fmt.Sprintf("%s (%s) finds %s", m.id, m.node.Name, name), func() error {
		answer, err := m.s.space.Resolve("udp4", netip.AddrPortFrom(m.gateway(), 53), name+".ovl.internal.", dns.TypeA)
		if err != nil {
			return err
		}
		got := dns.RcodeToString[answer.Rcode]
		for _, rr := range answer.Answer {
			got += " " + strings.Fields(rr.String())[4]
		}
		if got != expected {
			return fmt.Errorf("%s, expected %s", got, expected)
		}
		return nil
	}}
}

// portLeads checks a published port from outside.
func (r *run) portLeads(m *member, p published) check {
	at := netip.AddrPortFrom(m.node.Addr, p.port)
	return check{fmt.Sprintf("port %s/%s of %s leads to %s (%s)", at, p.proto, m.node.Name, m.id, m.policy), func() error {
		id, err := "", error(nil)
		if p.proto == "tcp" {
			id, err = r.outside.exchange(at, 5000, 10*time.Second)
		} else {
			number := r.outside.ask(at)
			for range 20 {
				if id = r.outside.answer(number); id != "" {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			if id == "" {
				err = errors.New("no answer")
			}
		}
		if err == nil && id != m.id {
			return final(fmt.Errorf("%s answers", id))
		}
		return err
	}}
}

// portClosed checks that a port leads to nobody, unless it has been published again.
func (r *run) portClosed(at netip.AddrPort) check {
	for _, m := range r.members {
		if (m.attached || m.unsure) && m.node.Addr == at.Addr() && slices.ContainsFunc(m.ports, func(p published) bool { return p.port == at.Port() && p.proto == "tcp" }) {
			return check{"", func() error { return nil }}
		}
	}
	return check{fmt.Sprintf("port %s is closed", at), func() error {
		c, _, id, err := r.outside.connect(at, time.Second)
		if err != nil {
			return nil
		}
		c.Close()
		return fmt.Errorf("%s answers", id)
	}}
}

// egress checks what a member reaches outside.
func (r *run) egress(m *member) check {
	return check{fmt.Sprintf("%s (%s, %s) and the outside", m.id, m.addr, m.policy), func() error {
		id, err := m.s.exchange(netip.AddrPortFrom(lab.OutsideAddr, tcpPort), 20_000, 10*time.Second)
		switch {
		case m.policy == inward && err == nil:
			return final(fmt.Errorf("%s answers, which must not be", id))
		case m.policy == inward:
			return nil
		case err == nil && id != "outside":
			return final(fmt.Errorf("%s answers", id))
		default:
			return err
		}
	}}
}
