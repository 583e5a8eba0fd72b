// This file tests the gateway against packets that are made to do harm: fragments, and what only neighbours on a link may say.

package stack

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// answered is how many echo replies the gateway has sent to a container, whole or their first fragments.
func (w *wire) answered(to netip.Addr) int {
	return w.countSeen(func(o observed) bool {
		return o.in.dst == to && !o.in.later && o.in.proto == protoICMP && header.ICMPv4(o.b[o.in.transport:]).Type() == header.ICMPv4EchoReply
	})
}

// reframed is a fragment at another offset in bytes.
func reframed(f []byte, offset int) []byte {
	b := append([]byte(nil), f...)
	h := header.IPv4(b)
	h.SetFlagsFragmentOffset(h.Flags(), uint16(offset))
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	return b
}

func TestFragments_ThatOverlapAreRefused(t *testing.T) {
	w := newWire(t, nil)
	f := fragments(makeEcho(aliceAddr, gatewayAddr, 1, 1, string(make([]byte, 2600))), 1400)
	if len(f) != 2 {
		t.Fatalf("%d fragments", len(f))
	}
	w.send(f[0], reframed(f[1], 800)) // over the end of the first
	w.send(f[0], f[1])                // what is left of that datagram is not completed by the rest of it either
	eventually(t, "the refusal is counted", func() bool { return w.drops(dropFragment) > 0 })
	good := fragments(makeEcho(bobAddr, gatewayAddr, 2, 1, string(make([]byte, 2600))), 1400)
	w.send(good...)
	eventually(t, "another datagram is answered", func() bool { return w.answered(bobAddr) == 1 })
	if n := w.g.Stats().Fragments; n != 6 {
		t.Errorf("%d fragments counted, want 6", n)
	}
}

func TestFragments_TinyFirstOnesAreRefused(t *testing.T) {
	w := newWire(t, nil)
	syn := make([]byte, 20)
	binary.BigEndian.PutUint16(syn, 1000)
	binary.BigEndian.PutUint16(syn[2:], 80)
	syn[12], syn[13] = 5<<4, 2
	whole := makeIPv4(protoTCP, aliceAddr, netip.MustParseAddr("192.0.2.1"), syn)
	before := w.drops(dropMalformed)
	w.send(fragments(whole, 28)...) // eight bytes each: the first has the ports, the flags come later
	if n := w.drops(dropMalformed) - before; n != 1 {
		t.Errorf("%d drops, want that of the first fragment", n)
	}
	if n := w.g.Stats().TCPHalfOpen; n != 0 {
		t.Errorf("%d connections begin", n)
	}
}

// The first halves of a hundred thousand datagrams of one container: they take no more memory than a few, and another's datagrams are put together.
func TestFragments_NeverCompletedTakeBoundedMemory(t *testing.T) {
	w := newWire(t, nil)
	f := fragments(makeEcho(aliceAddr, gatewayAddr, 1, 1, string(make([]byte, 2600))), 1400)[0]
	good := fragments(makeEcho(bobAddr, gatewayAddr, 2, 1, string(make([]byte, 2600))), 1400)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const flood = 100_000
	for i := range flood {
		h := header.IPv4(f)
		h.SetID(uint16(i))
		h.SetSourceAddress(tcpipAddr(aliceAddr))
		if i&0x10000 != 0 { // more than there are identifiers: to the gateway's other address
			h.SetDestinationAddress(tcpipAddr(gatewayAddr0))
		}
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		w.send(f)
		if i == flood/2 {
			w.send(good...)
		}
	}
	eventually(t, "another's datagram is answered", func() bool { return w.answered(bobAddr) == 1 })
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 32<<20 {
		t.Errorf("%d MB are held for fragments that are never completed", grown>>20)
	}
	if n := w.g.Stats().Fragments; n != flood+2 {
		t.Errorf("%d fragments counted, want %d", n, flood+2)
	}
	if n := w.answered(aliceAddr); n != 0 {
		t.Errorf("%d answers to halves", n)
	}
}

func TestNeighbourMessages_AreNobodysHere(t *testing.T) {
	w := newWire(t, nil)
	for typ := header.ICMPv6RouterSolicit; typ <= header.ICMPv6RedirectMsg; typ++ {
		for name, hidden := range map[string]bool{"plain": false, "behind options": true} {
			msg := make([]byte, 40)
			msg[0] = byte(typ)
			copy(msg[8:], gatewayAddr6.AsSlice())
			ip := make([]byte, header.IPv6MinimumSize)
			ip[0], ip[6], ip[7] = 0x60, protoICMPv6, 255
			copy(ip[8:], aliceAddr6.AsSlice())
			copy(ip[24:], gatewayAddr6.AsSlice())
			if hidden {
				ip[6] = byte(header.IPv6DestinationOptionsExtHdrIdentifier)
				ip = append(ip, protoICMPv6, 0, 1, 4, 0, 0, 0, 0)
			}
			ip = append(ip, msg...)
			binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-header.IPv6MinimumSize))
			before := w.drops(dropNeighbour)
			w.send(ip)
			if n := w.drops(dropNeighbour) - before; n != 1 {
				t.Errorf("type %d, %s: %d drops", typ, name, n)
			}
		}
	}
	if n := w.countSeen(func(o observed) bool { return o.in.dst == aliceAddr6 }); n != 0 {
		t.Errorf("%d answers", n)
	}
}
