// This file tests what becomes of a container's words about other people's addresses.

package tap

import (
	"net/netip"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

func TestRead_CountsClaimsOfOthersAddresses(t *testing.T) {
	arp := func(oper byte, sender, target [4]byte) []byte {
		b := hexBytes(t, arpAsks)
		eth := b[vnetHdrLen:]
		eth[21] = oper
		copy(eth[28:], sender[:])
		copy(eth[38:], target[:])
		return b
	}
	nd := func(kind byte, target string) []byte {
		h := nettest.Between("fd00:1::2", "ff02::1")
		h.TTL = 255
		f := frame(nettest.Packet(h.ICMP(kind, 0, 0, append(netip.MustParseAddr(target).AsSlice(), 2, 1, 2, 0, 0, 0, 0, 9))))
		copy(f[vnetHdrLen:], []byte{0x33, 0x33, 0, 0, 0, 1})
		return f
	}
	own, gateway, neighbour := [4]byte{10, 1, 0, 2}, [4]byte{10, 1, 0, 1}, [4]byte{10, 1, 0, 9}
	for name, c := range map[string]struct {
		frame []byte
		want  string // the drop's reason; "": none is due
	}{
		"reply for the gateway":               {arp(arpReply, gateway, own), "tap-neighbour-claim"},
		"reply for a neighbour":               {arp(arpReply, neighbour, gateway), "tap-neighbour-claim"},
		"gratuitous ARP for the gateway":      {arp(arpRequest, gateway, gateway), "tap-neighbour-claim"},
		"gratuitous ARP for a neighbour":      {arp(arpRequest, neighbour, neighbour), "tap-neighbour-claim"},
		"gratuitous ARP for its own":          {arp(arpRequest, own, own), ""},
		"reply for its own":                   {arp(arpReply, own, gateway), ""},
		"a router's advertisement":            {nd(ndRouter, "fd00:1::1"), "tap-neighbour-claim"},
		"a redirect":                          {nd(ndRedirect, "fd00:1::9"), "tap-neighbour-claim"},
		"advertisement for the gateway":       {nd(ndAdvertise, "fd00:1::1"), "tap-neighbour-claim"},
		"advertisement for a neighbour":       {nd(ndAdvertise, "fd00:1::9"), "tap-neighbour-claim"},
		"advertisement for its own":           {nd(ndAdvertise, "fd00:1::2"), "tap-multicast"},
		"advertisement for its own on a link": {nd(ndAdvertise, "fe80::2"), "tap-multicast"},
	} {
		t.Run(name, func(t *testing.T) {
			d, w := newDevice(t)
			w.write(c.frame)
			rx := packet.NewRx(8, 1<<16)
			if err := d.Read(rx); err != nil {
				t.Fatal(err)
			}
			if n := len(rx.Packets()); n != 0 {
				t.Errorf("%d packets", n)
			}
			if f := w.frames(); len(f) != 0 {
				t.Errorf("answered %x", f)
			}
			for reason, n := range drops(d) {
				if reason == c.want && n != 1 || reason != c.want && n != 0 {
					t.Errorf("%d drops: %s; want one %q", n, reason, c.want)
				}
			}
			if c.want != "" && drops(d)[c.want] != 1 {
				t.Errorf("drops %v, want one %s", drops(d), c.want)
			}
		})
	}
}
