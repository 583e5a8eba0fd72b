// Tests of the daemon's death and of what takes its place: kill -9 and a supervisor that starts it again at once, and `up --replace`. A stream and a
// ping every 10 ms run between containers of two hosts meanwhile.
//
// A few rounds each. ROOTLESS_OVL_LONG=1 makes them 20, and holds the daemon to the 500 ms that a kill may cost; a loaded machine that runs other
// tests beside takes longer to start a process.

package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

const (
	pingEvery = 10 * time.Millisecond
	// killMayCost is how long pings may go unanswered after a kill.
	killMayCost = 500 * time.Millisecond
)

// long tells whether figures are measured.
func long() bool { return os.Getenv("ROOTLESS_OVL_LONG") == "1" }

func rounds() int {
	if long() {
		return 20
	}
	return 3
}

// stream is bytes that go from one container to another until they are stopped.
type stream struct {
	conn net.Conn
	sent atomic.Int64
	done chan error // of the writer
	got  chan error // of the reader
	read atomic.Int64
	quit chan struct{}
}

func startStream(t *testing.T, from, to *member) *stream {
	t.Helper()
	l, err := to.Listen("tcp", port(to.addr, 5201).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := &stream{done: make(chan error, 1), got: make(chan error, 1), quit: make(chan struct{})}
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			accepted <- c
		}
	}()
	if s.conn, err = from.DialContext(t.Context(), "tcp", port(to.addr, 5201).String()); err != nil {
		t.Fatal(err)
	}
	theirs := <-accepted
	t.Cleanup(func() { s.conn.Close(); theirs.Close() })
	go func() { s.got <- s.check(theirs) }()
	go func() { s.done <- s.write() }()
	return s
}

// piece is what is written at once, every streamEvery: some 12 MB/s.
const (
	piece       = 64 << 10
	streamEvery = 5 * time.Millisecond
)

func (s *stream) write() error {
	b := lab.Pattern(piece)
	tick := time.NewTicker(streamEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.quit:
			return s.conn.(interface{ CloseWrite() error }).CloseWrite()
		}
		n, err := s.conn.Write(b)
		s.sent.Add(int64(n))
		if err != nil {
			return err
		}
	}
}

func (s *stream) check(c net.Conn) error {
	want, b := lab.Pattern(piece), make([]byte, piece)
	for {
		n, err := io.ReadFull(c, b)
		s.read.Add(int64(n))
		if !slices.Equal(b[:n], want[:n]) {
			return fmt.Errorf("after %d bytes the stream is not what was sent", s.read.Load())
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// flows waits until more bytes have come through.
func (s *stream) flows(t *testing.T) {
	t.Helper()
	before := s.read.Load()
	lab.Eventually(t, "the stream goes on", func() bool { return s.read.Load() > before+2*piece })
}

// end stops the stream and fails the test if a byte of it is missing.
func (s *stream) end(t *testing.T) {
	t.Helper()
	close(s.quit)
	if err := errors.Join(<-s.done, <-s.got); err != nil || s.read.Load() != s.sent.Load() {
		t.Errorf("the stream: %d bytes sent, %d came, %v", s.sent.Load(), s.read.Load(), err)
	}
}

// outages pings while each round does something to a daemon, and returns how long pings went unanswered in each.
func outages(t *testing.T, from *lab.Space, to netip.Addr, s *stream, round func()) (all []time.Duration) {
	t.Helper()
	for range rounds() {
		p, err := from.StartPing(to, lab.PingOptions{Interval: pingEvery})
		if err != nil {
			t.Fatal(err)
		}
		lab.Eventually(t, "pings are answered", func() bool { return p.Received() > 10 })
		round()
		before := p.Received()
		lab.Eventually(t, "pings are answered again", func() bool { return p.Received() > before+20 })
		s.flows(t)
		all = append(all, time.Duration(p.Stop().Lost())*pingEvery)
	}
	slices.Sort(all)
	t.Logf("pings unanswered for: median %v, most %v, of %d rounds: %v", all[len(all)/2], all[len(all)-1], len(all), all)
	return all
}

// killed fails the test if a kill has cost too much.
func killed(t *testing.T, all []time.Duration) {
	t.Helper()
	limit := 20 * killMayCost
	if long() {
		limit = killMayCost
	}
	if most := all[len(all)-1]; most > limit {
		t.Errorf("pings were unanswered for %v: %v at most", most, limit)
	}
}

func TestDeath_StreamsOutliveAKilledDaemon(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	for name, kill := range map[string]func(){
		"that joins a store": func() {
			s.d2.Kill()
			s.d2 = s.h2.Up("--etcd-endpoints", etcdURL(s.h1))
		},
		"that has the store": func() {
			s.d1.Kill()
			s.d1 = upEmbedded(s.h1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bytes := startStream(t, a, b)
			killed(t, outages(t, a.Space, b.addr, bytes, kill))
			bytes.end(t)
		})
	}
	for _, d := range []*lab.Daemon{s.d1, s.d2} {
		if st := d.Status(); st.State != "ready" || st.Attachments != 1 {
			t.Errorf("%s: %+v", d.Host.Name, st)
		}
	}
}

// egress is a connection of a container to a server on another host's LAN, of which neither side says anything more.
func egress(t *testing.T, from *lab.Space, at netip.AddrPort, server *lab.Space) net.Conn {
	t.Helper()
	l, err := server.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := from.DialContext(t.Context(), "tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	if _, err := theirs.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return c
}

// isReset waits for the reset of a connection on which nothing is sent.
func isReset(t *testing.T, c net.Conn, what string) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: %v instead of a reset", what, err)
	}
}

// What a container has open to the outside cannot be saved. It is told, rather than left to wait, and what it has beside that stays.
func TestDeath_EgressIsReset(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2, lab.WithIPv6)
	h, outside := l.Host(1), l.Host(2)
	args := []string{"--listen-etcd", h.Addr.String() + ":2379", "--network", network.String()}
	d := h.Up(args...)
	a, b := join(t, h, "a"), join(t, h, "b")
	for name, end := range map[string]func(){"killed": func() { d.Kill() }, "stopped": func() { d.Stop() }} {
		v4 := egress(t, a.Space, port(outside.Addr, 7000), outside.Space)
		v6 := egress(t, a.Space, port(outside.Addr6, 7000), outside.Space)
		neighbour := egress(t, a.Space, port(b.addr, 7000), b.Space)
		end()
		d = h.Up(args...)
		isReset(t, v4, name+", IPv4")
		isReset(t, v6, name+", IPv6")
		_ = neighbour.SetReadDeadline(time.Now().Add(2 * time.Second))
		if _, err := neighbour.Read(make([]byte, 1)); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: a connection to another container: %v", name, err)
		}
		for _, c := range []net.Conn{v4, v6, neighbour} {
			c.Close()
		}
		if again := egress(t, a.Space, port(outside.Addr, 7001), outside.Space); again != nil {
			again.Close()
		}
	}
}

// estate is a node with an attachment of each kind, ports and names, and a container of another node that uses them.
type estate struct {
	*site
	peer, plain, loose, descriptor *member
	args                           []string
}

func newEstate(t *testing.T) *estate {
	t.Helper()
	e := &estate{site: newSite(t)}
	e.args = []string{"--etcd-endpoints", etcdURL(e.h1), "--healthz-ip", "127.0.0.1", "--healthz-port", "9099", "--proxy", "127.0.0.1:1080"}
	e.d2.Stop()
	e.d2 = e.h2.Up(e.args...)
	e.peer = join(t, e.h1, "peer")
	e.plain = join(t, e.h2, "plain", "--publish", "8080:80", "--publish", "8081:80/udp")
	e.loose = (&engine{e.h2.Container("engine"), e.d2}).give(t, e.h2.Container("loose"), `,"publish":["8082:80"]`)
	e.descriptor = attachDescriptor(t, e.d2, e.h2.Container("descriptor"))
	e.plain.tellClients(t, 80)
	e.loose.tellClients(t, 80)
	lab.Eventually(t, "the loose one is written down where it is", func() bool {
		return slices.ContainsFunc(e.d2.Attachments(), func(a lab.Attachment) bool { return a.Name == "loose" && a.IfName == "eth0" })
	})
	e.works(t)
	return e
}

// works fails the test unless everything of the estate does.
func (e *estate) works(t *testing.T) {
	t.Helper()
	for _, m := range []*member{e.plain, e.loose, e.descriptor} {
		pings(t, e.peer.Space, m.addr)
	}
	e.plain.comesToFind(t, 10*time.Second, "peer.ovl.internal.", "NOERROR "+e.peer.addr.String())
	e.peer.comesToFind(t, 30*time.Second, "plain.ovl.internal.", "NOERROR "+e.plain.addr.String())
	for network, n := range map[string]uint16{"tcp": 8080, "udp": 8081} {
		if asked, seen, err := askWho(t, e.h1.Space, network, port(e.h2.Addr, n)); err != nil || seen != asked {
			t.Errorf("published %s: the container saw %s, it was %s, %v", network, seen, asked, err)
		}
	}
	lab.Eventually(t, "the loose one's port leads to it", func() bool {
		_, _, err := askWho(t, e.h1.Space, "tcp", port(e.h2.Addr, 8082))
		return err == nil
	})
	if _, err := e.h2.Fetch("http://127.0.0.1:9099/readyz"); err != nil {
		t.Errorf("health checks: %v", err)
	}
}

func TestDeath_EverythingIsTakenUpAgain(t *testing.T) {
	t.Parallel()
	e := newEstate(t)
	before := e.d2.Status()
	e.d2.Kill()
	e.d2 = e.h2.Up(e.args...)
	after := e.d2.Status()
	if after.Attachments != before.Attachments || after.Subnet != before.Subnet {
		t.Errorf("after a kill %+v, before %+v", after, before)
	}
	e.works(t)
}

// Names are known, and answered, before the store is asked: a container that looks one up meanwhile is not told that there is none.
func TestDeath_NamesAreKnownWithoutTheStore(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := join(t, s.h1, "a")
	b := join(t, s.h2, "b")
	b.comesToFind(t, 10*time.Second, "a.ovl.internal.", "NOERROR "+a.addr.String())
	lab.Eventually(t, "the name is written down", func() bool {
		known, err := os.ReadFile(filepath.Join(s.h2.Home(), ".local/state/rootless-ovl/last-known.json"))
		return err == nil && strings.Contains(string(known), a.addr.String())
	})
	s.d2.Kill()
	s.d1.Kill()
	s.d2 = s.h2.UpNoWait("--etcd-endpoints", etcdURL(s.h1))
	var found string
	lab.EventuallyWithinOr(t, 15*time.Second, func() string { return "b finds a: " + found }, func() bool {
		found = b.finds(t, "a.ovl.internal.", dns.TypeA)
		return found == "NOERROR "+a.addr.String()
	})
	// It is not ready before the store has answered, or has not for a while.
	lab.Eventually(t, "it goes on without a confirmed lease", func() bool { return s.d2.Status().State == "lease-lost" })
	s.d1 = upEmbedded(s.h1)
	s.d2.WaitReady()
}
