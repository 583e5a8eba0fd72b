// This file tests the resolver against containers that mean harm.

package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestServeStream_ConnectionsHeldOpenLeaveRoomForOthers(t *testing.T) {
	var port uint16
	fake(t, "127.0.0.1", &port, says("x"))
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	defer serving.Wait()
	defer cancel()
	for range maxStreams {
		ours, theirs := net.Pipe()
		defer ours.Close()
		serving.Go(func() {
			defer theirs.Close()
			r.ServeStream(ctx, Query{From: netip.AddrFrom4([4]byte{10, 0, 0, 1})}, theirs)
		})
		go func() { _, _ = ours.Write([]byte{0}) }() // half of a length, whose other half the resolver waits for
	}
	open := func() int {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.open.all
	}
	for deadline := time.Now().Add(patience); open()+int(r.Stats().Streams) < maxStreams; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d open, %+v", open(), r.Stats())
		}
	}
	if open() != maxStreams/2 || r.Stats().Streams != maxStreams/2 {
		t.Errorf("one container holds %d connections, %+v; want half of %d", open(), r.Stats(), maxStreams)
	}
	ours, theirs := net.Pipe()
	serving.Go(func() {
		defer theirs.Close()
		r.ServeStream(ctx, Query{From: netip.AddrFrom4([4]byte{10, 0, 0, 2})}, theirs)
	})
	defer ours.Close()
	go func() { _ = writeStream(ours, question(t, nil)) }()
	_ = ours.SetReadDeadline(time.Now().Add(patience))
	b, err := readStream(ours, maxMessage)
	if err != nil {
		t.Fatalf("another container is not answered: %v", err)
	}
	unpack(t, b)
}

func TestServeStream_ReadsNoHugeQuery(t *testing.T) {
	r := New(Config{ResolvConf: resolvConf(t)})
	ours, theirs := net.Pipe()
	defer ours.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.ServeStream(t.Context(), Query{}, theirs)
		_ = theirs.Close()
	}()
	if _, err := ours.Write(binary.BigEndian.AppendUint16(nil, maxQuery+1)); err != nil {
		t.Fatal(err)
	}
	<-done
	if s := r.Stats(); s.Malformed != 1 || s.Queries != 0 {
		t.Errorf("%+v", s)
	}
}

func TestAnswer_DropsHostileMessages(t *testing.T) {
	good := question(t, nil)
	with := func(change func(b []byte) []byte) []byte { return change(append([]byte(nil), good...)) }
	for name, b := range map[string][]byte{
		"a name that points to itself":       append(append([]byte(nil), good[:12]...), 0xc0, 12, 0, 16, 0, 1),
		"a name that points forth and back":  append(append([]byte(nil), good[:12]...), 0xc0, 14, 0xc0, 12, 0, 16, 0, 1),
		"a name that points into the header": append(append([]byte(nil), good[:12]...), 0xc0, 0, 0, 16, 0, 1),
		"a name that points beyond the end":  append(append([]byte(nil), good[:12]...), 0xff, 0xff, 0, 16, 0, 1),
		"a name of 300 bytes":                append(append(append([]byte(nil), good[:12]...), []byte(strings.Repeat("\x3f"+strings.Repeat("a", 63), 5)+"\x00")...), 0, 16, 0, 1),
		"an answer":                          with(func(b []byte) []byte { b[2] |= 0x80; return b }),
		"65535 questions":                    with(func(b []byte) []byte { b[4], b[5] = 0xff, 0xff; return b }),
		"no question":                        with(func(b []byte) []byte { b[5] = 0; return b[:12] }),
		"a query of 5000 bytes":              append(append([]byte(nil), good...), make([]byte, 5000)...),
		"cut short":                          good[:len(good)-1],
	} {
		t.Run(name, func(t *testing.T) {
			r := New(Config{ResolvConf: resolvConf(t)})
			if b := r.Answer(t.Context(), Query{}, b); b != nil {
				t.Errorf("answered % x", b)
			}
			if s := r.Stats(); s.Malformed != 1 || s.Queries != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// A container gets no more back than it asked for: the gateway is no amplifier, of which its answers are to say.
func TestAnswer_InADatagramIsNoLongerThanAsked(t *testing.T) {
	var port uint16
	fake(t, "127.0.0.1", &port, says(strings.Repeat("x", 250), strings.Repeat("y", 250), strings.Repeat("z", 250)))
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	b := r.Answer(t.Context(), Query{}, question(t, nil))
	if m := unpack(t, b); len(b) > plainUDP || !m.Truncated {
		t.Errorf("%d bytes, truncated %v", len(b), m.Truncated)
	}
}

// A flood of one container's queries to a server that says nothing: what others may ask is there all the time.
func TestAnswer_AFloodOfOneLeavesRoomForOthers(t *testing.T) {
	var port uint16
	fake(t, "127.0.0.1", &port, func(w dns.ResponseWriter, q *dns.Msg) {
		if strings.HasPrefix(q.Question[0].Name, "slow") {
			return
		}
		says("x")(w, q)
	}, "udp")
	r := New(Config{ResolvConf: resolvConf(t, "nameserver 127.0.0.1"), Port: port, Timeout: patience})
	ctx, cancel := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	defer flood.Wait()
	defer cancel()
	for i := range 2000 {
		b := question(t, func(q *dns.Msg) { q.Question[0].Name = fmt.Sprintf("slow%d.example.", i) })
		flood.Go(func() { r.Answer(ctx, Query{From: netip.AddrFrom4([4]byte{10, 0, 0, 1})}, b) })
	}
	for deadline := time.Now().Add(patience); r.Stats().Overload == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("nothing is refused: %+v", r.Stats())
		}
	}
	for i := range 20 {
		b := question(t, func(q *dns.Msg) { q.Question[0].Name = fmt.Sprintf("good%d.example.", i) })
		if b = r.Answer(t.Context(), Query{From: netip.AddrFrom4([4]byte{10, 0, 0, 2})}, b); b == nil {
			t.Fatalf("another container's query %d is not answered: %+v", i, r.Stats())
		}
		if m := unpack(t, b); m.Rcode != dns.RcodeSuccess {
			t.Errorf("query %d: %v", i, m)
		}
	}
}
