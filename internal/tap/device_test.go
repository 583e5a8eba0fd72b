// This file tests the Device over a pair of datagram sockets, which keep frames apart as a TAP does.

package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

var (
	containerMAC = [6]byte{2, 0, 10, 1, 0, 2}
	own4, own6   = netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")
	in4          = nettest.Between("10.2.0.2", "10.1.0.2")
	in6          = nettest.Between("fd00:2::2", "fd00:1::2")
	out4         = nettest.Between("10.1.0.2", "10.2.0.2")
	out6         = nettest.Between("fd00:1::2", "fd00:2::2")
)

// wire is the container's side of a Device under test.
type wire struct {
	t  testing.TB
	fd int
}

func newDevice(t testing.TB) (*Device, wire) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
	})
	for _, fd := range fds {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20)
	}
	d := &Device{fd: fds[0], mac: containerMAC, addrs: []netip.Addr{own4, own6}, uso: true}
	d.address()
	return d, wire{t, fds[1]}
}

// write puts a frame on the wire.
func (w wire) write(frame []byte) {
	w.t.Helper()
	if _, err := unix.Write(w.fd, frame); err != nil {
		w.t.Fatalf("write a frame of %d bytes: %v", len(frame), err)
	}
}

// frames takes what is on the wire.
func (w wire) frames() (out [][]byte) {
	w.t.Helper()
	for {
		b := make([]byte, linkHdrLen+packet.MaxIP+1)
		n, err := unix.Read(w.fd, b)
		if errors.Is(err, unix.EAGAIN) {
			return out
		}
		if err != nil {
			w.t.Fatal(err)
		}
		out = append(out, b[:n])
	}
}

// packets takes what is on the wire, as the container's kernel would see it.
func (w wire) packets() (out []*packet.Packet) {
	w.t.Helper()
	for _, f := range w.frames() {
		if len(f) <= linkHdrLen {
			w.t.Fatalf("a frame of %d bytes", len(f))
		}
		if got := [6]byte(f[vnetHdrLen:]); got != containerMAC {
			w.t.Errorf("frame to %x, want the container's %x", got, containerMAC)
		}
		if got := [6]byte(f[vnetHdrLen+6:]); got != RouterMAC {
			w.t.Errorf("frame from %x, want the router's %x", got, RouterMAC)
		}
		wantType := uint16(etherTypeIPv4)
		if f[linkHdrLen]>>4 == 6 {
			wantType = etherTypeIPv6
		}
		if got := binary.BigEndian.Uint16(f[vnetHdrLen+12:]); got != wantType {
			w.t.Errorf("EtherType %#04x, want %#04x", got, wantType)
		}
		p := nettest.Packet(f[linkHdrLen:])
		if err := readVnetHdr(f, p); err != nil {
			w.t.Fatalf("frame %x: %v", f[:linkHdrLen], err)
		}
		if kernel := binary.LittleEndian.Uint16(f[2:]); p.GSO != packet.GSONone && kernel != p.HdrLen+ethHdrLen {
			w.t.Errorf("hdr_len %d, want %d", kernel, p.HdrLen+ethHdrLen)
		}
		out = append(out, p)
	}
	return out
}

// frame is what the container's kernel sends: the packet with its virtio_net_hdr, to the router.
func frame(p *packet.Packet) []byte {
	f := make([]byte, linkHdrLen, linkHdrLen+p.Len())
	putVnetHdr(f, p)
	copy(f[vnetHdrLen:], RouterMAC[:])
	copy(f[vnetHdrLen+6:], containerMAC[:])
	binary.BigEndian.PutUint16(f[vnetHdrLen+12:], etherTypeIPv4)
	if p.Bytes()[0]>>4 == 6 {
		binary.BigEndian.PutUint16(f[vnetHdrLen+12:], etherTypeIPv6)
	}
	return append(f, p.Bytes()...)
}

func drops(d *Device) map[string]uint64 {
	m := make(map[string]uint64)
	d.Drops(m)
	for k, v := range m {
		if v == 0 {
			delete(m, k)
		}
	}
	return m
}

func TestRead_TakesPacketsAndSuperpackets(t *testing.T) {
	d, w := newDevice(t)
	plain := nettest.Packet(out4.ICMP(8, 0, 1, []byte("ping")))
	owed := nettest.Packet(out6.UDP(nettest.UDP{SrcPort: 5, DstPort: 6}, nettest.Payload(99)))
	nettest.Owe(owed)
	super := nettest.Super(out4.TCP(nettest.TCP{Flags: nettest.ACK | nettest.CWR}, nettest.Payload(60000)), 1360)
	uso := nettest.Super(out6.UDP(nettest.UDP{SrcPort: 5, DstPort: 6}, nettest.Payload(20000)), 1300)
	sent := []*packet.Packet{plain, owed, super, uso}
	for _, p := range sent {
		w.write(frame(p))
	}
	rx := packet.NewRx(64, 256<<10)
	if err := d.Read(rx); err != nil {
		t.Fatal(err)
	}
	got := rx.Packets()
	if len(got) != len(sent) {
		t.Fatalf("%d packets, want %d (drops %v)", len(got), len(sent), drops(d))
	}
	for i := range got {
		if got[i].Off < packet.Headroom {
			t.Errorf("packet %d has %d bytes of headroom", i, got[i].Off)
		}
		if !bytes.Equal(got[i].Bytes(), sent[i].Bytes()) {
			t.Errorf("packet %d has other bytes", i)
		}
		a, b := got[i], *sent[i]
		a.Buf, b.Buf, a.Off, b.Off = nil, nil, 0, 0
		if !equalFacts(a, b) {
			t.Errorf("packet %d: %+v, want %+v", i, a, b)
		}
	}
	s := d.Stats()
	if s.Reads != 4 || s.ReadPackets != 4 || s.ReadSuperpackets != 2 || s.ReadBytes != uint64(plain.Len()+owed.Len()+super.Len()+uso.Len()) {
		t.Errorf("stats %+v", s)
	}
}

func equalFacts(a, b packet.Packet) bool {
	return a.CsumStart == b.CsumStart && a.CsumOffset == b.CsumOffset && a.HdrLen == b.HdrLen && a.SegSize == b.SegSize &&
		a.GSO == b.GSO && a.ECN == b.ECN && a.NeedsCsum == b.NeedsCsum && a.Verified == b.Verified
}

func TestRead_StopsWhenTheBatchIsFull(t *testing.T) {
	d, w := newDevice(t)
	for range 5 {
		w.write(frame(nettest.Packet(out4.UDP(nettest.UDP{}, []byte("x")))))
	}
	rx := packet.NewRx(3, 1<<16)
	for _, want := range []int{3, 2, 0} {
		rx.Reset()
		if err := d.Read(rx); err != nil {
			t.Fatal(err)
		}
		if got := len(rx.Packets()); got != want {
			t.Fatalf("batch of %d, want %d", got, want)
		}
	}
}

func TestRead_CountsWhatIsNotForTheRouter(t *testing.T) {
	good := func() []byte { return frame(nettest.Packet(out4.UDP(nettest.UDP{}, []byte("x")))) }
	edit := func(at int, v ...byte) []byte {
		f := good()
		copy(f[at:], v)
		return f
	}
	for name, c := range map[string]struct {
		frame []byte
		want  Drop
	}{
		"one byte":            {good()[:1], DropFrameShort},
		"23 bytes":            {good()[:linkHdrLen-1], DropFrameShort},
		"link header alone":   {good()[:linkHdrLen], DropFrameShort},
		"other MAC":           {edit(vnetHdrLen, 2, 1, 1, 1, 1, 1), DropForeignMAC},
		"broadcast":           {edit(vnetHdrLen, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), DropMulticast},
		"multicast":           {edit(vnetHdrLen, 1, 0, 0x5e, 0, 0, 1), DropMulticast},
		"VLAN":                {edit(vnetHdrLen+12, 0x81, 0), DropNotIP},
		"LLDP":                {edit(vnetHdrLen+12, 0x88, 0xcc), DropNotIP},
		"802.3 length":        {edit(vnetHdrLen+12, 0, 46), DropNotIP},
		"ARP cut short":       {edit(vnetHdrLen+12, 8, 6)[:linkHdrLen+arpLen-1], DropBadARP},
		"unknown gso_type":    {edit(1, 3), DropBadOffload},
		"checksum beyond end": {edit(0, 1, 0, 0, 0, 0, 0, 0xff, 0xff, 6), DropBadOffload},
	} {
		t.Run(name, func(t *testing.T) {
			d, w := newDevice(t)
			w.write(c.frame)
			w.write(good())
			rx := packet.NewRx(8, 1<<16)
			if err := d.Read(rx); err != nil {
				t.Fatal(err)
			}
			if got := drops(d); len(got) != 1 || got[dropNames[c.want]] != 1 {
				t.Errorf("drops %v, want one %s", got, dropNames[c.want])
			}
			if len(rx.Packets()) != 1 {
				t.Errorf("%d packets, want the good one", len(rx.Packets()))
			}
			if f := w.frames(); len(f) != 0 {
				t.Errorf("answered %x", f)
			}
		})
	}
}

func TestRead_SurvivesARefusedRead(t *testing.T) {
	d, _ := newDevice(t)
	d.fd = -1
	if err := d.Read(packet.NewRx(8, 1<<16)); err != nil {
		t.Fatalf("Read: %v", err)
	}
	if got := drops(d); got["tap-read-failed"] != 1 {
		t.Errorf("drops %v", got)
	}
}

func TestSend_WritesEachPacketAsItIs(t *testing.T) {
	owed := nettest.Packet(in6.UDP(nettest.UDP{SrcPort: 5, DstPort: 6}, nettest.Payload(99)))
	nettest.Owe(owed)
	noHeadroom := nettest.Packet(in4.ICMP(0, 0, 1, []byte("pong")))
	noHeadroom.Reset(noHeadroom.Bytes(), 0)
	for name, p := range map[string]*packet.Packet{
		"plain":       nettest.Packet(in4.UDP(nettest.UDP{SrcPort: 1}, []byte("datagram"))),
		"no headroom": noHeadroom,
		"owed":        owed,
		"TSO":         nettest.Super(in4.TCP(nettest.TCP{Flags: nettest.ACK | nettest.CWR}, nettest.Payload(60000)), 1360),
		"TSO v6":      nettest.Super(in6.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(60000)), 1360),
		"USO":         nettest.Super(in4.UDP(nettest.UDP{SrcPort: 1}, nettest.Payload(20000)), 1000),
		"largest v4":  nettest.Packet(in4.UDP(nettest.UDP{SrcPort: 1}, nettest.Payload(65535-28))),
		"largest v6":  nettest.Packet(in6.UDP(nettest.UDP{SrcPort: 1}, nettest.Payload(65535-8))),
	} {
		t.Run(name, func(t *testing.T) {
			d, w := newDevice(t)
			want := bytes.Clone(p.Bytes())
			d.Send(packet.NewScratch(), []*packet.Packet{p})
			got := w.packets()
			if len(got) != 1 || !bytes.Equal(got[0].Bytes(), want) {
				t.Fatalf("%d packets came, or other bytes (drops %v)", len(got), drops(d))
			}
			if !equalFacts(*got[0], *p) {
				t.Errorf("%+v, want %+v", got[0], p)
			}
			if s := d.Stats(); s.Writes != 1 || s.WritePackets != 1 || s.WriteBytes != uint64(len(want)) {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

func TestSend_CountsRefusedFrames(t *testing.T) {
	d, _ := newDevice(t)
	d.fd = -1
	run := segmentsOf(nettest.Super(in4.TCP(nettest.TCP{Flags: nettest.ACK}, nettest.Payload(4000)), 1000))
	d.Send(packet.NewScratch(), append(run, nettest.Packet(in4.ICMP(0, 0, 0, nil))))
	if got := drops(d); got["tap-write-failed"] != 5 {
		t.Errorf("drops %v, want 5 tap-write-failed", got)
	}
	if s := d.Stats(); s != (Stats{}) {
		t.Errorf("stats %+v, want none", s)
	}
}

func TestStats_AddUp(t *testing.T) {
	s := Stats{1, 2, 3, 4, 5, 6, 7, 8}
	s.Add(Stats{10, 20, 30, 40, 50, 60, 70, 80})
	if s != (Stats{11, 22, 33, 44, 55, 66, 77, 88}) {
		t.Errorf("%+v", s)
	}
}
