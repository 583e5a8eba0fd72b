// This file tests the answers to ARP and neighbour solicitations, byte for byte.

package tap

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// hexBytes reads bytes written in hex with spaces and line breaks.
func hexBytes(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const zeroVnet = "00000000000000000000"

// Origin of the bytes: the diagrams of RFC 826 and RFC 4861, filled in by hand.
const (
	arpAsks = zeroVnet + `ffffffffffff 02000a010002 0806
		0001 0800 06 04 0001 02000a010002 0a010002 000000000000 0a010001`
	arpTold = zeroVnet + `02000a010002 026f766c0001 0806
		0001 0800 06 04 0002 026f766c0001 0a010001 02000a010002 0a010002`
)

func TestRead_AnswersARPForTheGateway(t *testing.T) {
	d, w := newDevice(t)
	w.write(hexBytes(t, arpAsks))
	rx := packet.NewRx(8, 1<<16)
	if err := d.Read(rx); err != nil {
		t.Fatal(err)
	}
	if len(rx.Packets()) != 0 {
		t.Error("ARP was taken for a packet")
	}
	f := w.frames()
	if len(f) != 1 || !bytes.Equal(f[0], hexBytes(t, arpTold)) {
		t.Errorf("answered\n%x, want\n%x", f, hexBytes(t, arpTold))
	}
}

func TestAnswerARP_AnswersOthersAddressesOnly(t *testing.T) {
	edit := func(at int, v ...byte) []byte {
		b := hexBytes(t, arpAsks)[vnetHdrLen:]
		copy(b[at:], v)
		return b
	}
	const (
		answer = iota
		silence
		malformed
	)
	for name, c := range map[string]struct {
		eth  []byte
		want int
	}{
		"gateway":            {edit(0), answer},
		"a neighbour":        {edit(38, 10, 1, 0, 99), answer},
		"outside":            {edit(38, 192, 0, 2, 1), answer},
		"unicast probe":      {edit(0, RouterMAC[:]...), answer},
		"with padding":       {append(edit(0), make([]byte, 18)...), answer},
		"own address":        {edit(38, 10, 1, 0, 2), silence},
		"gratuitous":         {edit(28, 10, 1, 0, 9, 0, 0, 0, 0, 0, 0, 10, 1, 0, 9), silence},
		"probe for own":      {edit(28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 1, 0, 2), silence},
		"for nothing":        {edit(38, 0, 0, 0, 0), silence},
		"a reply":            {edit(20, 0, 2), silence},
		"RARP":               {edit(20, 0, 3), silence},
		"not Ethernet":       {edit(14, 0, 6), malformed},
		"not IPv4":           {edit(16, 0x86, 0xdd), malformed},
		"hardware length 8":  {edit(18, 8), malformed},
		"protocol length 16": {edit(19, 16), malformed},
		"one byte short":     {edit(0)[:ethHdrLen+arpLen-1], malformed},
		"Ethernet alone":     {edit(0)[:ethHdrLen], malformed},
		"one byte of ARP":    {edit(0)[:ethHdrLen+1], malformed},
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := newDevice(t)
			got := d.answerARP(c.eth)
			switch c.want {
			case malformed:
				if got != nil {
					t.Errorf("answered %x", got)
				}
			case silence:
				if got == nil || len(got) != 0 {
					t.Errorf("answered %x", got)
				}
			default:
				if len(got) != linkHdrLen+arpLen || !bytes.Equal(got[linkHdrLen+14:][:4], c.eth[38:42]) {
					t.Errorf("answered %x", got)
				}
			}
		})
	}
}

// solicit is the frame of a neighbour solicitation for target.
func solicit(src, target string) []byte {
	h := nettest.Between(src, "ff02::1:ff00:1")
	h.TTL = 255
	body := append(netip.MustParseAddr(target).AsSlice(), 1, 1)
	return frame(nettest.Packet(h.ICMP(ndSolicit, 0, 0, append(body, containerMAC[:]...))))
}

// Origin of the bytes: the diagrams of RFC 8200 and RFC 4861 4.4, filled in by hand; the checksum by nettest.
const ndTold = zeroVnet + `02000a010002 026f766c0001 86dd
	60000000 0020 3a ff fd000001000000000000000000000001 fd000001000000000000000000000002
	88 00 0000 c0000000 fd000001000000000000000000000001 02 01 026f766c0001`

func TestRead_AnswersSolicitations(t *testing.T) {
	d, w := newDevice(t)
	f := solicit("fd00:1::2", "fd00:1::1")
	copy(f[vnetHdrLen:], []byte{0x33, 0x33, 0xff, 0, 0, 1})
	w.write(f)
	rx := packet.NewRx(8, 1<<16)
	if err := d.Read(rx); err != nil {
		t.Fatal(err)
	}
	if len(rx.Packets()) != 0 {
		t.Error("the solicitation was taken for a packet")
	}
	got := w.frames()
	if len(got) != 1 {
		t.Fatalf("%d answers, drops %v", len(got), drops(d))
	}
	if err := nettest.Check(got[0][linkHdrLen:]); err != nil {
		t.Error(err)
	}
	want := hexBytes(t, ndTold)
	copy(want[linkHdrLen+42:], got[0][linkHdrLen+42:][:2]) // the checksum, which Check found right
	if !bytes.Equal(got[0], want) {
		t.Errorf("answered\n%x, want\n%x", got[0], want)
	}
}

func TestAnswerND_AnswersOthersAddressesOnly(t *testing.T) {
	edit := func(at int, v ...byte) []byte {
		f := solicit("fd00:1::2", "fd00:1::1")[vnetHdrLen:]
		copy(f[ethHdrLen+at:], v)
		return f
	}
	const (
		answer = iota
		silence
		malformed
	)
	whole := func(src, target string) []byte { return solicit(src, target)[vnetHdrLen:] }
	noOption := func() []byte {
		h := nettest.Between("fd00:1::2", "ff02::1:ff00:1")
		h.TTL = 255
		return frame(nettest.Packet(h.ICMP(ndSolicit, 0, 0, nettest.Between("fd00:1::2", "fd00:1::1").Dst.AsSlice())))[vnetHdrLen:]
	}
	for name, c := range map[string]struct {
		eth  []byte
		want int
	}{
		"gateway":                     {whole("fd00:1::2", "fd00:1::1"), answer},
		"from link-local":             {whole("fe80::2", "fe80::1"), answer},
		"without option":              {noOption(), answer},
		"own address":                 {whole("fd00:1::2", "fd00:1::2"), silence},
		"duplicate address detection": {whole("::", "fd00:1::7"), silence},
		"multicast target":            {whole("fd00:1::2", "ff02::1"), malformed},
		"hop limit 254":               {edit(7, 254), malformed},
		"code 1":                      {edit(41, 1), malformed},
		"wrong checksum":              {edit(42, 0xde, 0xad), malformed},
		"length 0":                    {edit(4, 0, 0), malformed},
		"length 23":                   {edit(4, 0, 23), malformed},
		"length beyond the frame":     {edit(4, 0xff, 0xff), malformed},
		"cut short":                   {edit(0)[:ethHdrLen+ipv6HdrLen+1], malformed},
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := newDevice(t)
			if !isSolicitation(c.eth[ethHdrLen:]) {
				t.Fatal("not seen as a solicitation")
			}
			got := d.answerND(c.eth)
			switch c.want {
			case malformed:
				if got != nil {
					t.Errorf("answered %x", got)
				}
			case silence:
				if got == nil || len(got) != 0 {
					t.Errorf("answered %x", got)
				}
			default:
				if len(got) == 0 {
					t.Fatal("no answer")
				}
				if err := nettest.Check(got[linkHdrLen:]); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestIsSolicitation_NeedsItsType(t *testing.T) {
	for _, ip := range [][]byte{nil, make([]byte, 40), out6.ICMP(128, 0, 0, nil), out6.UDP(nettest.UDP{SrcPort: ndSolicit << 8}, nil)} {
		if isSolicitation(ip) {
			t.Errorf("%x", ip)
		}
	}
}
