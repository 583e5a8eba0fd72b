// This file is a day: faults that come and go, and operations on members beside them.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

const (
	// most is how many containers a host has at the same time.
	most = 5
	// firstPort is the first of the host's ports that are published.
	firstPort = 18000
	// descriptorRole has this program be a process that attaches a descriptor of its own.
	descriptorRole = "attach-descriptor"
)

// names are few, so that they are used again and again, on all hosts.
var names = strings.Fields("ant bee cat dog eel fox gnu hen ibis jay koi lynx mole newt owl pug rat seal toad vole wasp yak")

// weighted is something that happens more or less often.
type weighted[F any] struct {
	name   string
	weight int
	happen F
}

// choose is one of several, by the seed.
func choose[F any](r *run, of []weighted[F]) weighted[F] {
	sum := 0
	for _, w := range of {
		sum += w.weight
	}
	n := r.rng.IntN(sum)
	for _, w := range of {
		if n -= w.weight; n < 0 {
			return w
		}
	}
	panic("the weights are not what they sum up to")
}

// An operation decides what it does before it gives what does it, which runs beside others and on the members that it has made busy; nil:
// it cannot be just now.
type operation func(*run) func()

var operations = []weighted[operation]{
	{"join", 30, (*run).join},
	{"attach", 16, (*run).attachAgain},
	{"detach", 12, (*run).detach},
	{"kill", 10, (*run).crash},
	{"rename", 10, (*run).rename},
	{"publish", 12, (*run).publish},
	{"unpublish", 8, (*run).unpublish},
	{"talk", 10, (*run).talk},
	{"forge", 10, (*run).forge},
	{"take a name that is taken", 4, (*run).takenName},
	{"run a command", 5, (*run).command},
}

// day is what happens in a round before the nodes may settle.
func (r *run) day() {
	hurts := r.chooseFaults()
	batches := 1 + r.rng.IntN(3)
	r.say("day %d: %d batches, faults: %v", r.round, batches, hurts)
	if r.rng.IntN(2) == 0 {
		r.batch(nil)
	}
	var open []*fault
	for i, f := range hurts {
		if f.beside {
			continue
		}
		hurts[i].begin()
		open = append(open, f)
	}
	for range batches {
		var crashes []*fault
		for _, f := range hurts {
			if f.beside && !f.done {
				crashes = append(crashes, f)
				f.done = true
			}
		}
		r.batch(crashes)
	}
	if len(open) > 0 {
		if r.storeOnly(hurts) {
			r.checkSteady()
		}
		time.Sleep(time.Duration(r.rng.IntN(3000)) * time.Millisecond)
	}
	slices.Reverse(open)
	for _, f := range open {
		if f.end != nil {
			f.end()
		}
	}
	for _, f := range hurts {
		r.count(f.kind)
	}
}

// batch does some operations at the same time, and has faults fall beside them.
func (r *run) batch(beside []*fault) {
	var wg sync.WaitGroup
	begin := make(chan struct{})
	start := func(f func()) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			<-begin
			r.t.run(f)
		}()
	}
	for range 1 + r.rng.IntN(5) {
		o := choose(r, operations)
		if f := o.happen(r); f != nil {
			r.count(o.name)
			start(f)
		}
	}
	for _, f := range beside {
		wait := time.Duration(r.rng.IntN(400)) * time.Millisecond
		start(func() {
			time.Sleep(wait)
			f.begin()
		})
	}
	close(begin)
	wg.Wait()
	for _, m := range r.members {
		m.busy = false
	}
	if r.t.Failed() {
		r.violation("an operation failed")
	}
}

// one is a member that has no operation in this batch, and fits; nil: there is none.
func (r *run) one(fits func(*member) bool) *member {
	var of []*member
	for _, m := range r.members {
		if !m.busy && !m.unsure && !m.node.mute && fits(m) {
			of = append(of, m)
		}
	}
	if len(of) == 0 {
		return nil
	}
	m := of[r.rng.IntN(len(of))]
	m.busy = true
	return m
}

func attached(m *member) bool { return m.attached }

// freeName is a name that nobody has, or may have.
func (r *run) freeName() string {
	for _, i := range r.rng.Perm(len(names)) {
		name := names[i]
		if !slices.ContainsFunc(r.members, func(m *member) bool { return m.name == name }) &&
			!slices.ContainsFunc(r.dying, func(d dying) bool { return d.name == name }) {
			return name
		}
	}
	return ""
}

func (r *run) join() func() {
	n := r.nodes[r.rng.IntN(len(r.nodes))]
	living := 0
	for _, m := range r.members {
		if m.node == n {
			living++
		}
	}
	if n.mute || living >= most {
		return nil
	}
	m := r.newMember(n)
	m.busy = true
	return r.attach(m)
}

func (r *run) attachAgain() func() {
	m := r.one(func(m *member) bool { return !m.attached })
	if m == nil {
		return nil
	}
	return r.attach(m)
}

// attach attaches a member that is not.
func (r *run) attach(m *member) func() {
	name := r.freeName()
	if name == "" {
		return nil
	}
	how := choose(r, []weighted[string]{{"pid", 4, ""}, {"path", 2, ""}, {"descriptor", 2, ""}, {"loose", 3, ""}}).name
	p := choose(r, []weighted[policy]{{"", 8, open}, {"", 2, isolated}, {"", 2, serving}, {"", 2, asking}, {"", 1, inward}}).happen
	var ports []published
	if r.rng.IntN(4) == 0 {
		ports = append(ports, published{r.freePort(m.node), "tcp"})
	}
	m.name, m.how, m.policy, m.ports = name, how, p, ports // the name is taken from now on
	return func() {
		at, err := m.ask(how, name, p, ports)
		r.say("attach %s to %s as %s by %s, %s, ports %v: %s %v", m.id, m.node.Name, name, how, p, ports, at.Addr, brief(err))
		if err != nil {
			r.failed(m, "attach", err)
			return
		}
		addr, err := netip.ParsePrefix(at.Addr)
		if err != nil || addr.Masked() != m.node.subnet {
			r.t.Errorf("attach of %s: address %q, %v; the node has %s", name, at.Addr, err, m.node.subnet)
			return
		}
		m.attached, m.addr, m.ifName, m.since = true, addr.Addr(), at.IfName, r.round
	}
}

// failed takes note of an operation that failed: on a good day it is a violation.
func (r *run) failed(m *member, what string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.unsure = true
	if what == "attach" && m.how == "loose" { // made, perhaps, and not taken to the container: it goes when nobody takes it
		r.dying = append(r.dying, dying{node: m.node, name: m.name, until: time.Now().Add(settling)})
	}
	r.complete[what+" failed"]++
	if !r.hurt(m.node) {
		r.t.Errorf("%s of %s on %s: %v", what, m.id, m.node.Name, err)
	}
}

// ask has the node attach the member, in one of the ways that there are.
func (m *member) ask(how, name string, p policy, ports []published) (at lab.Attachment, err error) {
	request := map[string]any{"name": name}
	for k, v := range p.rules() {
		request[k] = v
	}
	var specs []string
	for _, port := range ports {
		specs = append(specs, port.spec())
	}
	if specs != nil {
		request["publish"] = specs
	}
	switch how {
	case "pid", "path":
		what := strconv.Itoa(m.c.PID)
		if how == "path" {
			what = m.c.NetnsPath()
		}
		args := append([]string{"attach", what, "--name", name, "--output", "json"}, p.flags()...)
		for _, spec := range specs {
			args = append(args, "-p", spec)
		}
		result := m.node.CLI(args...)
		if result.Code != 0 {
			return at, fmt.Errorf("exit code %d: %s", result.Code, strings.TrimSpace(result.Stderr))
		}
		return at, json.Unmarshal([]byte(result.Stdout), &at)
	case "descriptor":
		request["owner"] = "soak/" + m.id + "/" + name
		body, err := json.Marshal(request)
		if err != nil {
			return at, err
		}
		self, err := os.Executable()
		if err != nil {
			return at, err
		}
		result := m.node.Run(self, descriptorRole, m.node.daemon().Socket(), m.c.NetnsPath(), string(body))
		if result.Code != 0 {
			return at, fmt.Errorf("exit code %d: %s", result.Code, strings.TrimSpace(result.Stderr))
		}
		return at, json.Unmarshal([]byte(result.Stdout), &at)
	default:
		request["loose"], request["pid"] = true, m.node.engine.PID
		body, err := json.Marshal(request)
		if err != nil {
			return at, err
		}
		if err := m.node.daemon().Ask(http.MethodPost, "/v1/attachments", string(body), &at); err != nil {
			return at, err
		}
		prefix, err := netip.ParsePrefix(at.Addr)
		if err != nil {
			return at, err
		}
		if err := m.node.engine.Give(at.IfName, m.c, "eth0"); err != nil {
			return at, err
		}
		at.IfName = "eth0"
		return at, m.c.SetUp("eth0", prefix, m.gateway())
	}
}

// attachDescriptor is the process that attaches a namespace by a descriptor, and prints the attachment.
func attachDescriptor(socket, path, body string) int {
	err := func() error {
		ns, err := os.Open(path)
		if err != nil {
			return err
		}
		defer ns.Close()
		body = strings.TrimSuffix(body, "}") + fmt.Sprintf(`,"netns_fd":%d}`, ns.Fd())
		client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
		var resp *http.Response
		var answer []byte
		for again := true; again; again = resp.Header.Get("Retry-After") != "" { // of a daemon that is being replaced
			if resp, err = client.Post("http://rootless-ovl/v1/attachments", "application/json", bytes.NewBufferString(body)); err != nil {
				return err
			}
			answer, err = io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				return err
			}
		}
		if resp.StatusCode/100 != 2 {
			return fmt.Errorf("%s: %s", resp.Status, answer)
		}
		_, err = os.Stdout.Write(answer)
		return err
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (p published) spec() string {
	inside := tcpPort
	if p.proto == "udp" {
		inside = udpPort
	}
	return fmt.Sprintf("%d:%d/%s", p.port, inside, p.proto)
}

func (r *run) detach() func() {
	m := r.one(attached)
	if m == nil {
		return nil
	}
	r.drop(m)
	r.gone(m)
	byPID := (m.how == "pid") && r.rng.IntN(3) == 0
	return func() {
		what := m.name
		if byPID {
			what = strconv.Itoa(m.c.PID)
		}
		result := m.node.CLI("detach", what)
		r.say("detach %s (%s) from %s: %d %s", m.id, what, m.node.Name, result.Code, strings.TrimSpace(result.Stderr))
		if result.Code != 0 {
			r.failed(m, "detach", fmt.Errorf("exit code %d: %s", result.Code, result.Stderr))
			return
		}
		if r.anyHurt() { // the other nodes may hear of it later
			r.mu.Lock()
			r.dying = append(r.dying, dying{node: m.node, name: m.name, until: time.Now().Add(settling)})
			r.mu.Unlock()
		}
		m.attached, m.name, m.ports = false, "", nil
		if left, err := m.c.Interfaces(); err != nil || len(left) > 0 {
			r.t.Errorf("detached, %s is left with %v, %v", m.id, left, err)
		}
	}
}

// gone remembers what must not answer any more.
func (r *run) gone(m *member) {
	r.freed = append(r.freed, m.addr)
	for _, p := range m.ports {
		if p.proto == "tcp" {
			r.closed = append(r.closed, netip.AddrPortFrom(m.node.Addr, p.port))
		}
	}
}

func (r *run) crash() func() {
	m := r.one(func(*member) bool { return true })
	if m == nil {
		return nil
	}
	r.say("kill %s (%s) on %s", m.id, m.name, m.node.Name)
	if m.attached {
		r.gone(m)
	}
	r.kill(m)
	return func() {}
}

func (r *run) rename() func() {
	m := r.one(attached)
	if m == nil {
		return nil
	}
	name := r.freeName()
	if name == "" {
		return nil
	}
	old := m.name
	m.name = name // both are taken until the batch is over
	r.dying = append(r.dying, dying{node: m.node, name: old, until: time.Now().Add(settling)})
	return func() {
		result := m.node.CLI("rename", old, name)
		r.say("rename %s from %s to %s on %s: %d %s", m.id, old, name, m.node.Name, result.Code, strings.TrimSpace(result.Stderr))
		if result.Code != 0 {
			r.failed(m, "rename", fmt.Errorf("exit code %d: %s", result.Code, result.Stderr))
		}
	}
}

// freePort is a port of a host that is published for nobody.
func (r *run) freePort(n *node) uint16 {
	for {
		port := uint16(firstPort + r.rng.IntN(40))
		if !slices.ContainsFunc(r.members, func(m *member) bool {
			return m.node == n && slices.ContainsFunc(m.ports, func(p published) bool { return p.port == port })
		}) && !slices.ContainsFunc(r.dying, func(d dying) bool { return d.node == n && slices.Contains(d.ports, port) }) {
			return port
		}
	}
}

func (r *run) publish() func() {
	m := r.one(func(m *member) bool { return m.attached && len(m.ports) < 3 })
	if m == nil {
		return nil
	}
	p := published{r.freePort(m.node), []string{"tcp", "udp"}[r.rng.IntN(2)]}
	m.ports = append(m.ports, p)
	return func() {
		result := m.node.CLI("publish", p.spec(), m.name)
		r.say("publish %s for %s (%s) on %s: %d %s", p.spec(), m.id, m.name, m.node.Name, result.Code, strings.TrimSpace(result.Stderr))
		if result.Code != 0 {
			r.failed(m, "publish", fmt.Errorf("exit code %d: %s", result.Code, result.Stderr))
		}
	}
}

func (r *run) unpublish() func() {
	m := r.one(func(m *member) bool { return m.attached && len(m.ports) > 0 })
	if m == nil {
		return nil
	}
	i := r.rng.IntN(len(m.ports))
	p := m.ports[i]
	return func() {
		result := m.node.CLI("unpublish", p.spec(), m.name)
		r.say("unpublish %s of %s (%s) on %s: %d %s", p.spec(), m.id, m.name, m.node.Name, result.Code, strings.TrimSpace(result.Stderr))
		if result.Code != 0 {
			r.failed(m, "unpublish", fmt.Errorf("exit code %d: %s", result.Code, result.Stderr))
			return
		}
		m.ports = slices.Delete(slices.Clone(m.ports), i, i+1)
	}
}

// talk begins a conversation that has to go on as long as its two members are on the overlay.
func (r *run) talk() func() {
	if len(r.talks) >= 6 || r.anyHurt() {
		return nil
	}
	from := r.one(attached)
	to := r.one(func(m *member) bool { return attached(m) && from != nil && may(from.policy, m.policy, "tcp") })
	if to == nil || from.since == r.round || to.since == r.round {
		return nil // of this day: the other node may not know it yet
	}
	return func() {
		c, lines, id, err := from.s.connect(netip.AddrPortFrom(to.addr, tcpPort), 20*time.Second)
		r.say("talk %s to %s: %v", from.id, to.id, brief(err))
		if err != nil || id != to.id {
			r.t.Errorf("%s (%s) to %s (%s): %q answers, %v", from.id, from.addr, to.id, to.addr, id, err)
			return
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.talks = append(r.talks, &conversation{from: from, to: to, conn: c, lines: lines, since: r.round})
	}
}

// forge has a member send what is not from its address, and a stranger on the LAN what is from a member.
func (r *run) forge() func() {
	m := r.one(attached)
	if m == nil {
		return nil
	}
	var victims []netip.Addr
	for _, o := range r.members {
		if o.attached && !o.unsure && o != m {
			victims = append(victims, o.addr)
		}
	}
	if len(victims) == 0 {
		return nil
	}
	victim := victims[r.rng.IntN(len(victims))]
	as := append(victims, m.node.subnet.Addr().Next(), lab.OutsideAddr, r.nodes[0].Addr, m.node.subnet.Addr().Next().Next().Next())[r.rng.IntN(len(victims)+4)]
	if as == m.addr {
		return nil
	}
	packet := func(src, dst netip.Addr, who string) []byte {
		return lab.IPv4(src, dst, 17, 64, lab.UDP(1234, udpPort, []byte("S of "+who+" as "+src.String())))
	}
	strange := packet(as, victim, "a stranger")
	return func() {
		err := sendRaw(m.c.Space, packet(as, victim, m.id), victim)
		r.say("forge: %s as %s to %s: %v", m.id, as, victim, brief(err))
		if r.backend != "udp" {
			return
		}
		conn, err := r.lab.Outside.ListenPacket("udp4", "0.0.0.0:0")
		if err != nil {
			r.t.Errorf("forge: %v", err)
			return
		}
		defer conn.Close()
		for _, n := range r.nodes {
			_, _ = conn.WriteTo(strange, net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.Addr, 8285)))
		}
	}
}

// sendRaw sends an IPv4 packet as it is.
func sendRaw(s *lab.Space, packet []byte, to netip.Addr) error {
	return s.Do(func() error {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer syscall.Close(fd)
		return syscall.Sendto(fd, packet, 0, &syscall.SockaddrInet4{Addr: to.As4()})
	})
}

// takenName asks for a name that another has; it has to be refused.
func (r *run) takenName() func() {
	if r.anyHurt() {
		return nil
	}
	owner := r.one(func(m *member) bool { return m.attached && m.since < r.round })
	m := r.one(func(m *member) bool { return !m.attached })
	if owner == nil || m == nil {
		return nil
	}
	return func() {
		result := m.node.CLI("attach", strconv.Itoa(m.c.PID), "--name", owner.name)
		r.say("attach %s to %s as %s, which is taken: %d %s", m.id, m.node.Name, owner.name, result.Code, strings.TrimSpace(result.Stderr))
		if result.Code == 0 {
			r.t.Errorf("%s got the name %s, which is that of %s", m.id, owner.name, owner.id)
		}
	}
}

// command runs a command in a network of its own, which goes with it.
func (r *run) command() func() {
	n := r.nodes[r.rng.IntN(len(r.nodes))]
	if n.mute {
		return nil
	}
	return func() {
		result := n.CLI("run", "--", "cat", "/proc/net/dev")
		r.say("run on %s: %d %s", n.Name, result.Code, strings.TrimSpace(result.Stderr))
		if (result.Code != 0 || !strings.Contains(result.Stdout, "eth0")) && !r.hurt(n) {
			r.t.Errorf("run on %s: %+v", n.Name, result)
		}
	}
}

// brief is an error in a line, "done" for none.
func brief(err error) string {
	if err == nil {
		return "done"
	}
	return strings.ReplaceAll(err.Error(), "\n", " ")
}
