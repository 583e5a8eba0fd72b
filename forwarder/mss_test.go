// Tests of the MSS clamp.

package forwarder

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// mssOption is the option with a value.
func mssOption(v uint16) []byte { return []byte{2, 4, byte(v >> 8), byte(v)} }

func TestClampMSS_LowersAndNeverRaises(t *testing.T) {
	const mtu = 1372
	nop, eol := []byte{1, 1, 1, 1}, []byte{0, 0, 0, 0}
	join := func(b ...[]byte) []byte { return bytes.Join(b, nil) }
	mss := mssOption(1432)
	linux := join(mss, []byte{4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7}) // SACK, timestamps, NOP, window scale
	odd := join([]byte{1}, mss, []byte{1, 1, 1})                                // at an odd offset
	for name, c := range map[string]struct {
		flags   uint8
		options []byte
		want    []byte // nil: left alone
	}{
		"SYN":                        {nettest.SYN, mss, mssOption(1332)},
		"SYN/ACK":                    {nettest.SYN | nettest.ACK, mss, mssOption(1332)},
		"SYN with ECN":               {nettest.SYN | nettest.ECE | nettest.CWR, mss, mssOption(1332)},
		"a Linux SYN":                {nettest.SYN, linux, join(mssOption(1332), linux[4:])},
		"behind NOPs":                {nettest.SYN, join(nop, mss), join(nop, mssOption(1332))},
		"at an odd offset":           {nettest.SYN, odd, join([]byte{1}, mssOption(1332), []byte{1, 1, 1})},
		"behind an unknown option":   {nettest.SYN, join([]byte{254, 6, 1, 2, 3, 4, 1, 1}, mss), join([]byte{254, 6, 1, 2, 3, 4, 1, 1}, mssOption(1332))},
		"largest":                    {nettest.SYN, mssOption(65535), mssOption(1332)},
		"just fits":                  {nettest.SYN, mssOption(1332), nil},
		"smaller already":            {nettest.SYN, mssOption(536), nil},
		"no SYN":                     {nettest.ACK, mss, nil},
		"no options":                 {nettest.SYN, nil, nil},
		"no MSS":                     {nettest.SYN, []byte{4, 2, 1, 1}, nil},
		"behind the end of the list": {nettest.SYN, join(eol, mss), nil},
		"MSS of another length":      {nettest.SYN, []byte{2, 6, 5, 0x98, 0, 0, 1, 1}, nil},
		"cut off":                    {nettest.SYN, []byte{1, 1, 2, 4}, nil},
		"cut off after the kind":     {nettest.SYN, []byte{1, 1, 1, 2}, nil},
		"an option of length 0":      {nettest.SYN, join([]byte{8, 0, 1, 1}, mss), nil},
		"an option of length 1":      {nettest.SYN, join([]byte{8, 1, 1, 1}, mss), nil},
		"an option beyond the end":   {nettest.SYN, join([]byte{8, 200, 1, 1}, mss), nil},
	} {
		for _, from := range []nettest.IP{
			nettest.Between(containerA, containerC),
			nettest.Between(containerA6, containerC6),
			{Src: nettest.Between(containerA, containerC).Src, Dst: nettest.Between(containerA, containerC).Dst, Options: []byte{1, 1, 1, 1}},
		} {
			t.Run(name+" "+from.Dst.String(), func(t *testing.T) {
				build := func(options []byte) []byte {
					return from.TCP(nettest.TCP{SrcPort: 1, DstPort: 2, Seq: 7, Flags: c.flags, Options: options}, []byte("fast open"))
				}
				limit := mtu
				if from.Dst.Is6() {
					limit += 20
				}
				want := build(c.options)
				if c.want != nil {
					want = build(c.want)
				}
				p := pkt(build(c.options))
				clampMSS(p, limit)
				if !bytes.Equal(p.Bytes(), want) {
					t.Errorf("got  %x\nwant %x", p.Bytes(), want)
				}
				owed := pkt(build(c.options))
				nettest.Owe(owed)
				clampMSS(owed, limit)
				if got := nettest.Finish(owed); !bytes.Equal(got, want) {
					t.Errorf("with the checksum owed: got  %x\nwant %x", got, want)
				}
			})
		}
	}
}

func TestClampMSS_LeavesOtherPacketsAlone(t *testing.T) {
	syn := nettest.TCP{Flags: nettest.SYN, Options: mssOption(1432)}
	short := nettest.Between(containerA, containerC).TCP(syn, nil)[:30]
	long := nettest.Between(containerA, containerC).TCP(syn, nil)
	long[20+12] = 0xf0 // a header of 60 bytes
	tiny := nettest.Between(containerA, containerC).TCP(syn, nil)
	tiny[20+12] = 0x40
	for name, ip := range map[string][]byte{
		"UDP":                     udp(containerA, containerC, 1400),
		"a fragment":              withFrag(nettest.Between(containerA, containerC), nettest.MF).TCP(syn, nil),
		"half a header":           short,
		"a header beyond the end": long,
		"a header of 16 bytes":    tiny,
	} {
		t.Run(name, func(t *testing.T) {
			p := pkt(ip)
			clampMSS(p, 1000)
			if !bytes.Equal(p.Bytes(), ip) {
				t.Errorf("changed to %x", p.Bytes())
			}
		})
	}
}

func TestClampMSS_KeepsToWhatEveryHostMustTake(t *testing.T) {
	p := pkt(nettest.Between(containerA, containerC).TCP(nettest.TCP{Flags: nettest.SYN, Options: mssOption(1432)}, nil))
	clampMSS(p, 20)
	if got := binary.BigEndian.Uint16(p.Bytes()[42:]); got != 536 {
		t.Errorf("MSS %d", got)
	}
}

func TestForward_ClampsMSSOnNarrowPathsInBothDirections(t *testing.T) {
	mss := func(ip []byte) int { return int(binary.BigEndian.Uint16(ip[42:])) }
	syn := func(src, dst string) *packet.Packet {
		return pkt(nettest.Between(src, dst).TCP(nettest.TCP{Flags: nettest.SYN, Options: mssOption(1460)}, nil))
	}
	const beyond = "10.3.0.2" // a container of the peer with the small MTU
	t.Run("to a narrow peer", func(t *testing.T) {
		g := newRig(t)
		g.fromA(syn(containerA, beyond))
		if d := datagrams(t, g.small); len(d) != 1 || mss(d[0]) != smallMTU-40 || nettest.Check(d[0]) != nil {
			t.Errorf("%x", d)
		}
	})
	t.Run("from a narrow peer", func(t *testing.T) {
		g := newRig(t)
		g.fromPeer(g.small, syn(beyond, containerA))
		if p := g.a.Take(); len(p) != 1 || mss(p[0].Bytes()) != smallMTU-40 || nettest.Check(p[0].Bytes()) != nil {
			t.Errorf("%v", p)
		}
	})
	t.Run("between two containers here", func(t *testing.T) {
		g := newRig(t)
		g.fromA(syn(containerA, containerB))
		if p := g.b.Take(); len(p) != 1 || mss(p[0].Bytes()) != 1460 {
			t.Errorf("%v", p)
		}
	})
	t.Run("to the outside", func(t *testing.T) {
		g := newRig(t)
		g.fromA(syn(containerA, outside))
		if p := g.egress.Take(); len(p) != 1 || mss(p[0].Bytes()) != 1460 {
			t.Errorf("%v", p)
		}
	})
}

func TestClampMSS_AllocatesNothing(t *testing.T) {
	orig := nettest.Between(containerA, containerC).TCP(nettest.TCP{Flags: nettest.SYN, Options: mssOption(1432)}, nil)
	p := pkt(orig)
	if n := testing.AllocsPerRun(100, func() {
		copy(p.Bytes(), orig)
		clampMSS(p, 1400)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzClampMSS clamps any bytes that look like a packet. Nothing but a smaller MSS and the checksum changes, and a checksum that was
// right stays right.
func FuzzClampMSS(f *testing.F) {
	for _, options := range [][]byte{mssOption(1432), {1, 2, 4, 5, 0x98, 1, 1, 1}, {8, 0, 1, 1}, {2, 4}, {2, 3, 1, 1}, {0}} {
		options = append(options, make([]byte, (4-len(options)%4)%4)...)
		for _, h := range []nettest.IP{nettest.Between(containerA, containerC), nettest.Between(containerA6, containerC6)} {
			f.Add(h.TCP(nettest.TCP{Flags: nettest.SYN, Options: options}, []byte("data")), uint16(1372))
		}
	}
	f.Fuzz(func(t *testing.T, ip []byte, mtu uint16) {
		if len(ip) == 0 || len(ip) > packet.MaxIP {
			return
		}
		right := nettest.Check(ip) == nil
		p := pkt(ip)
		clampMSS(p, int(mtu))
		if right {
			if err := nettest.Check(p.Bytes()); err != nil {
				t.Fatalf("%v: %x became %x", err, ip, p.Bytes())
			}
		}
		_, l4, _ := packet.Transport(ip)
		var changed []int
		for i, b := range p.Bytes() {
			if b != ip[i] && i != l4+16 && i != l4+17 {
				changed = append(changed, i)
			}
		}
		if len(changed) > 2 || len(changed) == 2 && changed[1] != changed[0]+1 {
			t.Fatalf("bytes %v changed: %x became %x", changed, ip, p.Bytes())
		}
	})
}
