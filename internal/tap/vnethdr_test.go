// This file tests virtio_net_hdr, written and read, and what of a container's own making is believed.

package tap

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Golden bytes: what Linux 6.18 writes to a TAP with a 10-byte header, from linux/virtio_net.h, little-endian.
var goldenVnetHdrs = map[string]struct {
	p    *packet.Packet
	want []byte
}{
	"nothing owed": {nettest.Packet(out4.ICMP(8, 0, 1, nil)), []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
	// csum_start 34 = Ethernet 14 + IPv4 20, csum_offset 6
	"UDP checksum": {owed(out4.UDP(nettest.UDP{}, nettest.Payload(9))), []byte{1, 0, 0, 0, 0, 0, 34, 0, 6, 0}},
	// hdr_len 66 = 14+20+32, gso_size 1360 = 0x0550, csum_offset 16
	"TSO":     {nettest.Super(out4.TCP(nettest.TCP{Flags: nettest.ACK, Options: make([]byte, 12)}, nettest.Payload(9000)), 1360), []byte{1, 1, 66, 0, 0x50, 5, 34, 0, 16, 0}},
	"TSO ECN": {nettest.Super(out4.TCP(nettest.TCP{Flags: nettest.ACK | nettest.CWR}, nettest.Payload(9000)), 1360), []byte{1, 0x81, 54, 0, 0x50, 5, 34, 0, 16, 0}},
	"TSO6":    {nettest.Super(out6.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(9000)), 1360), []byte{1, 4, 74, 0, 0x50, 5, 54, 0, 16, 0}},
	"USO":     {nettest.Super(out4.UDP(nettest.UDP{}, nettest.Payload(9000)), 256), []byte{1, 5, 42, 0, 0, 1, 34, 0, 6, 0}},
	"USO6":    {nettest.Super(out6.UDP(nettest.UDP{}, nettest.Payload(9000)), 256), []byte{1, 5, 62, 0, 0, 1, 54, 0, 6, 0}},
}

func owed(ip []byte) *packet.Packet {
	p := nettest.Packet(ip)
	nettest.Owe(p)
	return p
}

func TestVnetHdr_IsTheKernels(t *testing.T) {
	for name, c := range goldenVnetHdrs {
		t.Run(name, func(t *testing.T) {
			b := bytes.Repeat([]byte{0xee}, vnetHdrLen)
			putVnetHdr(b, c.p)
			if !bytes.Equal(b, c.want) {
				t.Errorf("wrote %v, want %v", b, c.want)
			}
			got := nettest.Packet(c.p.Bytes())
			if err := readVnetHdr(c.want, got); err != nil {
				t.Fatal(err)
			}
			if !equalFacts(*got, *c.p) {
				t.Errorf("read %+v, want %+v", got, c.p)
			}
		})
	}
}

func TestReadVnetHdr_BelievesNoLength(t *testing.T) {
	p := nettest.Super(out4.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(9000)), 1360)
	for _, hdrLen := range []uint16{0, 1, 53, 55, 0xffff} {
		b := make([]byte, vnetHdrLen)
		putVnetHdr(b, p)
		binary.LittleEndian.PutUint16(b[2:], hdrLen)
		got := nettest.Packet(p.Bytes())
		if err := readVnetHdr(b, got); err != nil || got.HdrLen != 40 {
			t.Errorf("hdr_len %d: %v, HdrLen %d, want 40", hdrLen, err, got.HdrLen)
		}
	}
}

func TestReadVnetHdr_RefusesWhatDoesNotFit(t *testing.T) {
	tcp4 := func() *packet.Packet {
		return nettest.Super(out4.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(3000)), 1000)
	}
	tcp6 := func() *packet.Packet {
		return nettest.Super(out6.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(3000)), 1000)
	}
	udp4 := func() *packet.Packet { return nettest.Super(out4.UDP(nettest.UDP{}, nettest.Payload(3000)), 1000) }
	u16 := binary.LittleEndian.PutUint16
	for name, c := range map[string]struct {
		p    *packet.Packet
		edit func(hdr, ip []byte)
	}{
		"checksum before the packet":          {tcp4(), func(h, _ []byte) { u16(h[6:], 13) }},
		"checksum of the Ethernet header":     {tcp4(), func(h, _ []byte) { u16(h[6:], 0) }},
		"checksum in the IP header":           {udp4(), func(h, _ []byte) { h[1] = 0; u16(h[6:], 14+12); u16(h[8:], 0) }},
		"checksum in the IPv6 header":         {tcp6(), func(h, _ []byte) { h[1] = 0; u16(h[6:], 14+8); u16(h[8:], 0) }},
		"checksum in the IP options":          {owed(out4.UDP(nettest.UDP{}, nettest.Payload(60))), func(h, ip []byte) { ip[0] = 0x48 }},
		"checksum beyond the end":             {tcp4(), func(h, _ []byte) { u16(h[6:], 14+3039) }},
		"checksum field half beyond the end":  {tcp4(), func(h, _ []byte) { u16(h[6:], 14+3040-17); h[1] = 0 }},
		"checksum offset 0xffff":              {tcp4(), func(h, _ []byte) { u16(h[8:], 0xffff) }},
		"TSO without a checksum":              {tcp4(), func(h, _ []byte) { h[0] = 0 }},
		"TSO with UDP's checksum field":       {tcp4(), func(h, _ []byte) { u16(h[8:], 6) }},
		"TSO that starts elsewhere":           {tcp4(), func(h, _ []byte) { u16(h[6:], 14+24) }},
		"TSO of segments of 0":                {tcp4(), func(h, _ []byte) { u16(h[4:], 0) }},
		"TSO4 of IPv6":                        {tcp6(), func(h, _ []byte) { h[1] = 1 }},
		"TSO6 of IPv4":                        {tcp4(), func(h, _ []byte) { h[1] = 4 }},
		"TSO of UDP":                          {udp4(), func(h, _ []byte) { h[1] = 1; u16(h[8:], 16) }},
		"USO of TCP":                          {tcp4(), func(h, _ []byte) { h[1] = 5; u16(h[8:], 6) }},
		"USO with TCP's checksum field":       {udp4(), func(h, _ []byte) { u16(h[8:], 16) }},
		"TSO of a fragment":                   {tcp4(), func(_, ip []byte) { ip[6] = 0x20 }},
		"TSO with IPv6 extension headers":     {tcp6(), func(h, ip []byte) { ip[6] = 60; u16(h[6:], 14+48) }},
		"TSO far behind IPv6 extensions":      {tcp6(), func(h, ip []byte) { ip[6] = 0; u16(h[6:], 14+2040) }},
		"TCP header of 16 bytes":              {tcp4(), func(_, ip []byte) { ip[32] = 0x40 }},
		"TSO without payload":                 {nettest.Super(out4.TCP(nettest.TCP{Flags: nettest.ACK}, nil), 1000), func(_, _ []byte) {}},
		"TCP header beyond the end":           {nettest.Super(out4.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(8)), 4), func(_, ip []byte) { ip[32] = 0xf0 }},
		"TSO of 19 bytes of TCP":              {nettest.Packet(out4.Raw(packet.TCP, nettest.Payload(19))), func(h, _ []byte) { copy(h, []byte{1, 1, 0, 0, 1, 0, 34, 0, 16, 0}) }},
		"USO without payload":                 {nettest.Super(out4.UDP(nettest.UDP{}, nil), 1000), func(_, _ []byte) {}},
		"TSO of segments of 7":                {tcp4(), func(h, _ []byte) { u16(h[4:], 7) }},
		"TSO6 of segments of 1":               {tcp6(), func(h, _ []byte) { u16(h[4:], 1) }},
		"USO into 600 datagrams":              {udp4(), func(h, _ []byte) { u16(h[4:], 5) }},
		"UFO":                                 {udp4(), func(h, _ []byte) { h[1] = 3 }},
		"unknown kind":                        {udp4(), func(h, _ []byte) { h[1] = 0x7f }},
		"ECN alone and a checksum beyond all": {udp4(), func(h, _ []byte) { h[1] = 0x80; u16(h[6:], 0xffff) }},
		"IP version 0":                        {tcp4(), func(_, ip []byte) { ip[0] = 0 }},
	} {
		t.Run(name, func(t *testing.T) {
			b := make([]byte, vnetHdrLen)
			putVnetHdr(b, c.p)
			c.edit(b, c.p.Bytes())
			if err := readVnetHdr(b, nettest.Packet(c.p.Bytes())); err == nil {
				t.Errorf("%v is believed", b)
			}
		})
	}
}

func TestReadVnetHdr_TakesAChecksumDeepInThePacket(t *testing.T) {
	// A tunnel inside the container owes the checksum of its inner packet.
	inner := nettest.Between("192.0.2.1", "192.0.2.2").UDP(nettest.UDP{}, nettest.Payload(50))
	p := nettest.Packet(out4.Raw(4, inner))
	b := []byte{1, 0, 0, 0, 0, 0, 14 + 20 + 20, 0, 6, 0}
	if err := readVnetHdr(b, p); err != nil || p.CsumStart != 40 || p.CsumOffset != 6 {
		t.Errorf("%v, %+v", err, p)
	}
}
