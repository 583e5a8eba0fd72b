// This file tests which packets are routed at all, and the TTL.

package forwarder

import (
	"encoding/binary"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func TestCheck_JudgesHeaders(t *testing.T) {
	v4 := func(edit func(b []byte)) []byte {
		b := nettest.Between(containerA, containerC).UDP(nettest.UDP{SrcPort: 1, DstPort: 2}, []byte("payload"))
		edit(b)
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ^nettest.Sum(b[:20]))
		return b
	}
	v6 := func(edit func(b []byte)) []byte {
		b := nettest.Between(containerA6, containerC6).UDP(nettest.UDP{SrcPort: 1, DstPort: 2}, []byte("payload"))
		edit(b)
		return b
	}
	dst4 := func(a, b, c, d byte) []byte { return v4(func(p []byte) { copy(p[16:], []byte{a, b, c, d}) }) }
	dst6 := func(s string) []byte {
		return nettest.Between(containerA6, s).UDP(nettest.UDP{}, nil)
	}
	same := func([]byte) {}
	icmp := func(kind byte) []byte {
		return nettest.Between(containerA, containerC).ICMP(kind, 0, 0, make([]byte, 28))
	}
	icmp6 := func(kind byte) []byte {
		return nettest.Between(containerA6, containerC6).ICMP(kind, 0, 0, make([]byte, 48))
	}
	withOptions := func(ip []byte) []byte { // four bytes of "no operation"
		b := append(append(append([]byte(nil), ip[:20]...), 1, 1, 1, 1), ip[20:]...)
		b[0]++
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ^nettest.Sum(b[:24]))
		return b
	}
	for name, c := range map[string]struct {
		ip   []byte
		want Drop
	}{
		"empty":                           {nil, DropMalformed},
		"IPv4":                            {v4(same), dropNone},
		"IPv4, 19 bytes":                  {v4(same)[:19], DropMalformed},
		"IPv4, cut short":                 {v4(same)[:30], DropMalformed},
		"IPv4, header length 16":          {v4(func(b []byte) { b[0] = 0x44 }), DropMalformed},
		"IPv4, header longer than packet": {v4(func(b []byte) { b[0] = 0x4f }), DropMalformed},
		"IPv4, total length of 19":        {v4(func(b []byte) { b[2], b[3] = 0, 19 }), DropMalformed},
		"IPv4, total length of 0":         {v4(func(b []byte) { b[2], b[3] = 0, 0 }), DropMalformed},
		"IPv4, total length too large":    {v4(func(b []byte) { b[3]++ }), DropMalformed},
		"IPv4, header alone":              {v4(func(b []byte) { b[3] = 20 })[:20], dropNone},
		"IPv4, checksum wrong":            {func() []byte { b := v4(same); b[10] ^= 1; return b }(), DropBadChecksum},
		"version 5":                       {append([]byte{0x55}, v4(same)[1:]...), DropMalformed},
		"version 0":                       {make([]byte, 60), DropMalformed},
		"to multicast":                    {dst4(224, 0, 0, 1), DropNotUnicast},
		"to broadcast":                    {dst4(255, 255, 255, 255), DropNotUnicast},
		"to class E":                      {dst4(240, 0, 0, 1), DropNotUnicast},
		"to loopback":                     {dst4(127, 0, 0, 1), DropNotUnicast},
		"to this network":                 {dst4(0, 0, 0, 0), DropNotUnicast},
		"IPv6":                            {v6(same), dropNone},
		"IPv6, 39 bytes":                  {v6(same)[:39], DropMalformed},
		"IPv6, length too large":          {v6(func(b []byte) { b[5]++ }), DropMalformed},
		"IPv6, header alone":              {v6(func(b []byte) { b[5] = 0 })[:40], dropNone},
		"IPv6, jumbogram":                 {v6(func(b []byte) { b[4], b[5] = 0xff, 0xff }), DropMalformed},
		"IPv6 to multicast":               {dst6("ff02::1"), DropNotUnicast},
		"IPv6 to link-local":              {dst6("fe80::1"), DropNotUnicast},
		"IPv6 to link-local, high":        {dst6("febf::1"), DropNotUnicast},
		"IPv6 to site-local":              {dst6("fec0::1"), dropNone},
		"IPv6 to loopback":                {dst6("::1"), DropNotUnicast},
		"IPv6 to unspecified":             {dst6("::"), DropNotUnicast},
		"echo":                            {icmp(8), dropNone},
		"unreachable":                     {icmp(3), dropNone},
		"ICMP without a byte":             {nettest.Between(containerA, containerC).Raw(packet.ICMP, nil), dropNone},
		"redirect":                        {icmp(5), DropLinkOnly},
		"router's advertisement":          {icmp(9), DropLinkOnly},
		"router's solicitation":           {icmp(10), DropLinkOnly},
		"redirect with options":           {withOptions(icmp(5)), DropLinkOnly},
		"later fragment of ICMP":          {withFrag(nettest.Between(containerA, containerC), 10).Raw(packet.ICMP, []byte{5, 0, 0, 0}), dropNone},
		"first fragment of a redirect":    {withFrag(nettest.Between(containerA, containerC), nettest.MF).Raw(packet.ICMP, []byte{5, 0, 0, 0, 0, 0, 0, 0}), DropLinkOnly},
		"echo of IPv6":                    {icmp6(128), dropNone},
		"IPv6 without a byte of ICMP":     {nettest.Between(containerA6, containerC6).Raw(packet.ICMPv6, nil), dropNone},
		"IPv6 router's solicitation":      {icmp6(133), DropLinkOnly},
		"IPv6 router's advertisement":     {icmp6(134), DropLinkOnly},
		"neighbour's solicitation":        {icmp6(135), DropLinkOnly},
		"neighbour's advertisement":       {icmp6(136), DropLinkOnly},
		"IPv6 redirect":                   {icmp6(137), DropLinkOnly},
	} {
		t.Run(name, func(t *testing.T) {
			p := nettest.Packet(c.ip)
			if got := check(p); got != c.want {
				t.Errorf("check says %q, want %q", dropNames[got], dropNames[c.want])
			}
		})
	}
}

func TestCheck_TrimsPadding(t *testing.T) {
	for _, h := range []nettest.IP{nettest.Between(containerA, containerC), nettest.Between(containerA6, containerC6)} {
		ip := h.UDP(nettest.UDP{}, []byte("abc"))
		p := nettest.Packet(append(ip, make([]byte, 18)...))
		if why := check(p); why != dropNone || p.Len() != len(ip) {
			t.Errorf("check says %q and leaves %d bytes, want %d", dropNames[why], p.Len(), len(ip))
		}
	}
}

func TestCheck_RefusesPaddedSuperpackets(t *testing.T) {
	ip := nettest.Between(containerA, containerC).UDP(nettest.UDP{}, nettest.Payload(50))
	p := nettest.Super(ip, 10)
	p.Buf = append(p.Buf, 0)
	if why := check(p); why != DropMalformed {
		t.Errorf("padded superpacket: %q", dropNames[why])
	}
	p = nettest.Packet(append(ip, make([]byte, 100)...))
	p.NeedsCsum, p.CsumStart, p.CsumOffset = true, 100, 16
	if why := check(p); why != DropMalformed {
		t.Errorf("checksum owed to the padding: %q", dropNames[why])
	}
}

func TestDecrementTTL_KeepsTheChecksumRight(t *testing.T) {
	h := nettest.Between(containerA, containerC)
	for ttl := range 256 {
		for id := range 1 << 16 { // moves the checksum through all its values
			h.TTL, h.ID = uint8(ttl), uint16(id)
			if ttl > 3 && ttl < 254 && id%251 != 0 {
				continue
			}
			b := make([]byte, 20)
			b[0], b[3], b[8], b[9] = 0x45, 20, byte(ttl), packet.UDP
			binary.BigEndian.PutUint16(b[4:], uint16(id))
			copy(b[12:], h.Src.AsSlice())
			copy(b[16:], h.Dst.AsSlice())
			binary.BigEndian.PutUint16(b[10:], ^nettest.Sum(b))
			on := decrementTTL(b)
			if on != (ttl > 1) {
				t.Fatalf("TTL %d goes on: %v", ttl, on)
			}
			if !on {
				continue
			}
			got := binary.BigEndian.Uint16(b[10:])
			b[10], b[11] = 0, 0
			if want := ^nettest.Sum(b); int(b[8]) != ttl-1 || got != want {
				t.Fatalf("TTL %d id %d: became %d with checksum %#04x, want %#04x", ttl, id, b[8], got, want)
			}
		}
	}
}

func TestDecrementTTL_TakesOneFromTheHopLimit(t *testing.T) {
	h := nettest.Between(containerA6, containerC6)
	for ttl := 1; ttl < 256; ttl++ {
		h.TTL = uint8(ttl)
		ip := h.UDP(nettest.UDP{}, nil)
		if on := decrementTTL(ip); on != (ttl > 1) || (on && int(ip[7]) != ttl-1) {
			t.Fatalf("hop limit %d: %v, %d", ttl, on, ip[7])
		}
	}
}
