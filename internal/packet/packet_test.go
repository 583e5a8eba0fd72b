// This file tests receive memory, transport headers and sums.

package packet

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

func TestRx_LaysPacketsEndToEnd(t *testing.T) {
	rx := NewRx(100, 10000)
	var want [][]byte
	for _, n := range []int{1, 64, 1472, 0, 3000, MaxIP} {
		space := rx.Space()
		if space == nil {
			t.Fatalf("no space for %d bytes", n)
		}
		if len(space) < Headroom+MaxIP || cap(space) != len(space) {
			t.Fatalf("space of %d, capacity %d", len(space), cap(space))
		}
		b := bytes.Repeat([]byte{byte(n)}, n)
		copy(space[Headroom:], b)
		p := rx.Add(n)
		if p.Len() != n || p.Off != Headroom || cap(p.Buf) != len(p.Buf) {
			t.Fatalf("packet of %d bytes at %d, want %d", p.Len(), p.Off, n)
		}
		want = append(want, b)
	}
	for i, p := range rx.Packets() {
		clear(p.Buf[:p.Off]) // headroom is the holder's, and nobody else's bytes
		if !bytes.Equal(p.Bytes(), want[i]) {
			t.Errorf("packet %d was overwritten", i)
		}
	}
	if rx.Space() != nil {
		t.Error("the arena holds more than it was made for")
	}
}

func TestRx_EndsABatchAtEitherBound(t *testing.T) {
	fill := func(rx *Rx, size int) (n int) {
		for rx.Space() != nil {
			rx.Add(size)
			n++
		}
		return n
	}
	rx := NewRx(10, 100_000)
	if n := fill(rx, 100); n != 10 {
		t.Errorf("%d small packets, want 10", n)
	}
	rx.Reset()
	if n := fill(rx, 65000); n != 2 {
		t.Errorf("%d superpackets, want 2", n)
	}
	rx = NewRx(10, 0)
	if n := fill(rx, MaxIP); n != 1 {
		t.Errorf("%d packets in the least arena, want 1 of any size", n)
	}
}

func TestRx_DropGivesTheSpaceBack(t *testing.T) {
	rx := NewRx(10, 100_000)
	rx.Space()
	rx.Add(100)
	first := &rx.Space()[0]
	for n := range 300 {
		rx.Add(n)
		rx.Drop()
		if &rx.Space()[0] != first || len(rx.Packets()) != 1 {
			t.Fatalf("%d bytes were not given back", n)
		}
	}
}

func TestTransport_FindsTheHeader(t *testing.T) {
	v4 := func(ihl, proto byte, frag uint16, n int) []byte {
		b := make([]byte, n)
		b[0], b[9] = 0x40|ihl, proto
		binary.BigEndian.PutUint16(b[6:], frag)
		return b
	}
	v6 := func(next byte, n int) []byte {
		b := make([]byte, n)
		b[0], b[6] = 0x60, next
		return b
	}
	for name, c := range map[string]struct {
		ip    []byte
		proto uint8
		l4    int
		ok    bool
	}{
		"nothing":               {nil, 0, 0, false},
		"19 bytes":              {v4(5, TCP, 0, 20)[:19], 0, 0, false},
		"IPv4":                  {v4(5, TCP, 0, 40), TCP, 20, true},
		"IPv4 with DF":          {v4(5, UDP, 0x4000, 40), UDP, 20, true},
		"IPv4 with options":     {v4(15, ICMP, 0, 60), ICMP, 60, true},
		"IPv4 options cut":      {v4(15, TCP, 0, 59), TCP, 60, false},
		"IPv4 of 16 bytes":      {v4(4, TCP, 0, 40), TCP, 16, false},
		"first fragment":        {v4(5, TCP, 0x2000, 40), TCP, 20, false},
		"later fragment":        {v4(5, TCP, 1, 40), TCP, 20, false},
		"IPv6":                  {v6(UDP, 48), UDP, 40, true},
		"IPv6 of 39 bytes":      {v6(UDP, 39), 0, 0, false},
		"IPv6 hop-by-hop":       {v6(0, 80), 0, 40, false},
		"IPv6 fragment":         {v6(44, 80), 44, 40, false},
		"version 0":             {make([]byte, 40), 0, 0, false},
		"any protocol of IPv4":  {v4(5, 132, 0, 40), 132, 20, true},
		"no protocol known, v6": {v6(132, 80), 132, 40, false},
	} {
		if proto, l4, ok := Transport(c.ip); proto != c.proto || l4 != c.l4 || ok != c.ok {
			t.Errorf("%s: %d %d %v, want %d %d %v", name, proto, l4, ok, c.proto, c.l4, c.ok)
		}
	}
}

func TestPseudoSum_IsTheSumOfThePseudoHeader(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	sum := func(b []byte) (s uint32) {
		for i := 0; i < len(b); i += 2 {
			s += uint32(binary.BigEndian.Uint16(b[i:]))
			s = s&0xffff + s>>16
		}
		return s
	}
	for range 5000 {
		ip := make([]byte, 40)
		for i := range ip {
			ip[i] = byte(r.Uint32())
		}
		if r.IntN(4) == 0 {
			ip = bytes.Repeat([]byte{0xff}, 40)
		}
		proto, length := uint8(r.Uint32()), r.IntN(1<<17)
		ip[0] = 0x45
		v4 := append(bytes.Clone(ip[12:20]), 0, proto, 0, byte(length>>16), byte(length>>8), byte(length))
		if got, want := PseudoSum(ip, proto, length), uint16(sum(v4)); got != want {
			t.Fatalf("IPv4 %x %d %d: %#x, want %#x", ip, proto, length, got, want)
		}
		ip[0] = 0x60
		v6 := append(bytes.Clone(ip[8:40]), 0, byte(length>>16), byte(length>>8), byte(length), 0, proto)
		if got, want := PseudoSum(ip, proto, length), uint16(sum(v6)); got != want {
			t.Fatalf("IPv6 %x %d %d: %#x, want %#x", ip, proto, length, got, want)
		}
	}
}

func TestFold_KeepsTheResidue(t *testing.T) {
	for _, x := range []uint64{0, 1, 0xffff, 0x10000, 0x1fffe, 0xffffffff, 0xffffffffffffffff, 0x123456789abcdef0, 0xffff0000ffff0001} {
		got := Fold(x)
		if uint64(got)%0xffff != x%0xffff || (x != 0 && got == 0) {
			t.Errorf("Fold(%#x) = %#x", x, got)
		}
	}
}
