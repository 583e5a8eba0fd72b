// This file is a member: a container, what answers in it, and what the model knows of its attachment.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// What answers in every member, and outside: a datagram "Q" and eight bytes is answered with "A", the bytes and who answers; a connection is
// told who answers, in a line, and then what it sends. A datagram "S" is forged, and must not arrive.
const (
	udpPort = 7000
	tcpPort = 7001
)

// policy is what a member may reach and who may reach it.
type policy string

const (
	open     policy = "open"
	isolated policy = "isolated"
	serving  policy = "serving" // isolated, but anybody may connect to tcpPort
	asking   policy = "asking"  // isolated, but it may ask anybody's udpPort
	inward   policy = "inward"  // open, but nothing outside
)

// rules are the members of a request for an attachment.
func (p policy) rules() map[string]any {
	switch p {
	case isolated:
		return map[string]any{"isolate": true}
	case serving:
		return map[string]any{"isolate": true, "allow_from": []string{fmt.Sprintf("%s:%d/tcp", network, tcpPort)}}
	case asking:
		return map[string]any{"isolate": true, "allow_to": []string{fmt.Sprintf("%s:%d/udp", network, udpPort)}}
	case inward:
		return map[string]any{"egress": []string{"deny"}}
	default:
		return nil
	}
}

// flags are the same on the command line.
func (p policy) flags() []string {
	var flags []string
	for name, value := range p.rules() {
		switch v := value.(type) {
		case bool:
			flags = append(flags, "--"+name)
		case []string:
			flags = append(flags, "--"+strings.ReplaceAll(name, "_", "-"), strings.Join(v, ","))
		}
	}
	return flags
}

// may tells whether a's policy lets it begin, and b's lets it be reached: the protocol is "udp", "tcp" or "icmp", at our ports.
func may(a, b policy, protocol string) bool {
	to := a == open || a == inward || a == asking && protocol == "udp"
	from := b == open || b == inward || b == serving && protocol == "tcp"
	return to && from
}

// member is a container whose process lives.
type member struct {
	id   string // what answers in it says so; for ever
	node *node
	c    *lab.Container
	t    *trial // ends with it
	s    *server
	ns   uint64 // the inode of its network namespace

	// The model, changed by the operation that it has, and between batches.
	attached bool
	unsure   bool // an operation failed while the node was being hurt
	busy     bool // has an operation in this batch
	how      string
	name     string
	policy   policy
	addr     netip.Addr
	ifName   string
	ports    []published
	since    int // the round of its attachment
	seen     *seen
}

// published is a port of the host.
type published struct {
	port  uint16
	proto string
}

func (m *member) String() string {
	if !m.attached {
		return fmt.Sprintf("on %s, not attached, unsure %v, pid %d", m.node.Name, m.unsure, m.c.PID)
	}
	return fmt.Sprintf("on %s as %q by %s, %s, %s, ports %v, unsure %v, pid %d, net:[%d], since round %d",
		m.node.Name, m.name, m.how, m.addr, m.policy, m.ports, m.unsure, m.c.PID, m.ns, m.since)
}

// gateway is where its resolver is.
func (m *member) gateway() netip.Addr { return m.node.subnet.Addr().Next() }

// newMember starts a container.
func (r *run) newMember(n *node) *member {
	r.made++
	id := fmt.Sprintf("m%d", r.made)
	m := &member{id: id, node: n, t: r.t.part(id)}
	m.c = n.Container(id)
	var st syscall.Stat_t
	if err := syscall.Stat(m.c.NetnsPath(), &st); err != nil {
		r.t.Fatalf("%s: %v", id, err)
	}
	m.ns = st.Ino
	m.s = serve(m.t, r, m.c.Space, id)
	r.members = append(r.members, m)
	return m
}

// kill ends the member's process as a crash does, and lets the kernel have its namespace.
func (r *run) kill(m *member) {
	r.drop(m)
	m.c.Release()
	m.t.end()
	r.members = slices.DeleteFunc(r.members, func(o *member) bool { return o == m })
	if m.attached || m.unsure {
		d := dying{node: m.node, name: m.name, until: time.Now().Add(settling)}
		for _, p := range m.ports {
			d.ports = append(d.ports, p.port)
		}
		r.dying = append(r.dying, d)
	}
	if m.attached {
		r.freed = append(r.freed, m.addr)
	}
}

// drop ends the conversations of a member that may be off the overlay.
func (r *run) drop(m *member) {
	r.talks = slices.DeleteFunc(r.talks, func(c *conversation) bool {
		if c.from != m && c.to != m {
			return false
		}
		c.conn.Close()
		return true
	})
}

// server answers in a namespace, and asks from it.
type server struct {
	space  *lab.Space
	id     string
	asker  net.PacketConn
	mu     sync.Mutex
	heard  map[uint64]string // answers, by what was asked
	conns  map[net.Conn]bool
	closed bool
}

// serve begins to answer; it ends with t.
func serve(t *trial, r *run, space *lab.Space, id string) *server {
	s := &server{space: space, id: id, heard: map[uint64]string{}, conns: map[net.Conn]bool{}}
	answers, err := space.ListenPacket("udp4", fmt.Sprintf("0.0.0.0:%d", udpPort))
	if err != nil {
		r.t.Fatalf("%s: %v", id, err)
	}
	s.asker, err = space.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		r.t.Fatalf("%s: %v", id, err)
	}
	l, err := space.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", tcpPort))
	if err != nil {
		r.t.Fatalf("%s: %v", id, err)
	}
	t.Cleanup(func() {
		answers.Close()
		s.asker.Close()
		l.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.closed = true
		for c := range s.conns {
			c.Close()
		}
	})
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := answers.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue // an ICMP error
			}
			switch {
			case n == 9 && buf[0] == 'Q':
				_, _ = answers.WriteTo(append(append([]byte("A"), buf[1:9]...), id...), from)
			case n > 0 && buf[0] == 'S':
				r.t.Errorf("a forged datagram arrived at %s from %s: %q", id, from, buf[:n])
			}
		}
	}()
	go func() {
		buf := make([]byte, 2048)
		for {
			n, _, err := s.asker.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil && n > 9 && buf[0] == 'A' {
				s.mu.Lock()
				s.heard[binary.BigEndian.Uint64(buf[1:9])] = string(buf[9:n])
				s.mu.Unlock()
			}
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.echo(c)
		}
	}()
	return s
}

func (s *server) echo(c net.Conn) {
	defer c.Close()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.conns[c] = true
	s.mu.Unlock()
	fmt.Fprintln(c, s.id)
	_, _ = io.Copy(c, c)
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
}

// ask sends a question to an address, and gives the number by which the answer is heard.
func (s *server) ask(to netip.AddrPort) uint64 {
	number := rand.Uint64()
	_, _ = s.asker.WriteTo(binary.BigEndian.AppendUint64([]byte("Q"), number), net.UDPAddrFromAddrPort(to))
	return number
}

// answer is who answered a question, "" if nobody has yet.
func (s *server) answer(number uint64) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heard[number]
}

// forget drops all answers.
func (s *server) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.heard)
}

// connect dials, and reads who answers.
func (s *server) connect(to netip.AddrPort, limit time.Duration) (c net.Conn, lines *bufio.Reader, id string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	c, err = s.space.DialContext(ctx, "tcp4", to.String())
	if err != nil {
		return nil, nil, "", err
	}
	_ = c.SetDeadline(time.Now().Add(limit))
	lines = bufio.NewReader(c)
	id, err = lines.ReadString('\n')
	if err != nil {
		c.Close()
		return nil, nil, "", fmt.Errorf("connected, and then: %w", err)
	}
	return c, lines, strings.TrimSpace(id), nil
}

// exchange sends n bytes to an address and reads them back; it gives who answered.
func (s *server) exchange(to netip.AddrPort, n int, limit time.Duration) (string, error) {
	c, lines, id, err := s.connect(to, limit)
	if err != nil {
		return "", err
	}
	defer c.Close()
	want := lab.Pattern(n)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		if err == nil {
			err = c.(*net.TCPConn).CloseWrite()
		}
		sent <- err
	}()
	got, err := io.ReadAll(lines)
	if err = errors.Join(err, <-sent); err != nil {
		return id, fmt.Errorf("after %d bytes of %d: %w", len(got), n, err)
	}
	if !bytes.Equal(got, want) {
		return id, fmt.Errorf("%d bytes came back for %d, or others", len(got), n)
	}
	return id, nil
}

// conversation is a connection between two members that outlives days.
type conversation struct {
	from, to *member
	conn     net.Conn
	lines    *bufio.Reader
	since    int
	said     int
}

// goesOn says something, and wants it back.
func (c *conversation) goesOn(limit time.Duration) error {
	c.said++
	_ = c.conn.SetDeadline(time.Now().Add(limit))
	line := fmt.Sprintf("%s to %s, %d\n", c.from.id, c.to.id, c.said)
	if _, err := io.WriteString(c.conn, line); err != nil {
		return err
	}
	got, err := c.lines.ReadString('\n')
	if err == nil && got != line {
		err = fmt.Errorf("said %q, heard %q", line, got)
	}
	return err
}
