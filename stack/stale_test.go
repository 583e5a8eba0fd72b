// Tests of connections that an earlier gateway had.

package stack

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestProvoke_SendsABareSegmentWithItsChecksumsRight(t *testing.T) {
	for _, ends := range [][2]string{{"192.0.2.9:443", "10.5.1.2:40000"}, {"[2001:db8::9]:443", "[fd00:5::2]:40000"}} {
		from, to := netip.MustParseAddrPort(ends[0]), netip.MustParseAddrPort(ends[1])
		b := bareACK(from, to)
		in, ok := parseIP(b)
		if !ok || in.src != from.Addr() || in.dst != to.Addr() || in.length != len(b) || in.proto != protoTCP {
			t.Fatalf("%x is %+v", b, in)
		}
		seg := header.TCP(b[in.transport:])
		if seg.SourcePort() != from.Port() || seg.DestinationPort() != to.Port() || seg.Flags() != header.TCPFlagAck || len(seg.Payload()) > 0 {
			t.Errorf("segment %x", []byte(seg))
		}
		if !checksumRight(b, in) || to.Addr().Is4() && checksum.Checksum(b[:in.transport], 0) != 0xffff {
			t.Errorf("checksums of %x", b)
		}
	}
}

func TestProvoke_LeavesAloneWhatTheGatewayKnows(t *testing.T) {
	w := newWire(t, nil)
	known, stranger := netip.MustParseAddrPort("192.0.2.9:443"), netip.MustParseAddrPort("192.0.2.9:444")
	container := netip.AddrPortFrom(aliceAddr, 40000)
	flows := w.g.live.Load().flows
	e, _, _ := flows.add(flowKey{proto: protoTCP, src: container, dst: known}, kindHalfOpen, &tcpFlow{ns: w.g.live.Load(), wake: make(chan struct{}, 1)})
	defer flows.remove(e)
	w.g.Provoke(container, known)
	w.g.Provoke(container, stranger)
	var ports []uint16
	eventually(t, "a segment is sent", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		ports = nil
		for _, o := range w.seen {
			ports = append(ports, header.TCP(o.b[o.in.transport:]).SourcePort())
		}
		return len(ports) > 0
	})
	if len(ports) != 1 || ports[0] != stranger.Port() {
		t.Errorf("segments from ports %v", ports)
	}
}
