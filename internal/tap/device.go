// This file is the Device: reading frames into packets, and writing packets as frames.

package tap

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// RouterMAC is the address that every container sees as its router, on every node, so that a neighbour cache
// survives a restart of the daemon. Locally administered; nobody else is on the link.
var RouterMAC = [6]byte{0x02, 'o', 'v', 'l', 0x00, 0x01}

// Config describes the container at the other end of a TAP.
type Config struct {
	// File is the TAP's descriptor, opened with IFF_TAP|IFF_NO_PI|IFF_VNET_HDR. New takes it over: on success it is
	// closed and a duplicate kept.
	File *os.File
	// MAC is the address of the interface inside the namespace.
	MAC [6]byte
	// Addrs are the container's own addresses, for which ARP and ND are not answered.
	Addrs []netip.Addr
}

// Device is one TAP. Read is for the owning poll loop; everything else is safe for concurrent use.
type Device struct {
	// constant after New
	fd    int
	mac   [6]byte
	addrs []netip.Addr
	eth4  [ethHdrLen]byte // Ethernet header towards the container
	eth6  [ethHdrLen]byte
	uso   bool // the kernel takes and gives UDP superpackets (Linux 6.2)

	// atomic
	stats counters
}

// Payloads of up to so many bytes are copied together rather than handed to the kernel piece by piece, which costs it more.
const smallPiece = 256

// ioctls and values that x/sys/unix lacks; linux/if_tun.h.
const (
	tunFCsum   = 0x01
	tunFTSO4   = 0x02
	tunFTSO6   = 0x04
	tunFTSOECN = 0x08
	tunFUSO4   = 0x20
	tunFUSO6   = 0x40
)

// New sets the header size and the offloads of the TAP (a reopened persistent TAP has lost them) and returns its Device.
// UDP superpackets are probed for, not assumed. On error c.File is left open.
func New(c Config) (*Device, error) {
	// An os.File may sit in the Go runtime's poller, which would wake for every frame beside the poll loop: keep a plain
	// descriptor in its place.
	fd, err := unix.FcntlInt(c.File.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("TAP: duplicate its descriptor: %w", err)
	}
	d := &Device{fd: fd, mac: c.MAC, addrs: c.Addrs}
	if err := d.setUp(); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	_ = c.File.Close()
	d.address()
	return d, nil
}

// NewGiven makes a Device of a descriptor that another one, of another process, may still be at: it duplicates it and leaves everything as it was set
// up. uso is what the other's USO says. c.File is not used.
func NewGiven(of int, uso bool, c Config) (*Device, error) {
	fd, err := unix.FcntlInt(uintptr(of), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("TAP: duplicate its descriptor: %w", err)
	}
	d := &Device{fd: fd, mac: c.MAC, addrs: c.Addrs, uso: uso}
	if err := d.fits(); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	d.address()
	return d, nil
}

// address makes the Ethernet headers towards the container.
func (d *Device) address() {
	for _, e := range []struct {
		hdr       *[ethHdrLen]byte
		etherType uint16
	}{{&d.eth4, etherTypeIPv4}, {&d.eth6, etherTypeIPv6}} {
		copy(e.hdr[0:], d.mac[:])
		copy(e.hdr[6:], RouterMAC[:])
		e.hdr[12], e.hdr[13] = byte(e.etherType>>8), byte(e.etherType)
	}
}

func (d *Device) setUp() error {
	if err := unix.SetNonblock(d.fd, true); err != nil {
		return fmt.Errorf("TAP: set non-blocking: %w", err)
	}
	if err := unix.IoctlSetPointerInt(d.fd, unix.TUNSETVNETHDRSZ, vnetHdrLen); err != nil {
		return fmt.Errorf("TAP: TUNSETVNETHDRSZ: %w", err)
	}
	offloads := tunFCsum | tunFTSO4 | tunFTSO6 | tunFTSOECN
	if err := unix.IoctlSetInt(d.fd, unix.TUNSETOFFLOAD, offloads|tunFUSO4|tunFUSO6); err == nil {
		d.uso = true
	} else if err := unix.IoctlSetInt(d.fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return fmt.Errorf("TAP: TUNSETOFFLOAD: %w", err)
	}
	return nil
}

// fits tells whether a TAP was set up as setUp does.
func (d *Device) fits() error {
	size, err := unix.IoctlGetInt(d.fd, unix.TUNGETVNETHDRSZ)
	if err != nil {
		return fmt.Errorf("TAP: TUNGETVNETHDRSZ: %w", err)
	}
	if size != vnetHdrLen {
		return fmt.Errorf("TAP: its headers have %d bytes, this version's %d: stop the daemon that runs and start this one", size, vnetHdrLen)
	}
	return nil
}

// USO tells whether the kernel takes and gives UDP superpackets.
func (d *Device) USO() bool { return d.uso }

// FD is the descriptor to poll. It stays the Device's.
func (d *Device) FD() int { return d.fd }

// Close closes the descriptor. A persistent TAP stays in its namespace. No Read or Send may be running or follow.
func (d *Device) Close() error { return unix.Close(d.fd) }

// ErrGone is returned by Read when the TAP no longer exists: the container's root deleted it.
var ErrGone = errors.New("the TAP device is gone from its namespace")

// Read takes frames into rx until the TAP is empty (nil) or rx is full (nil). Frames that are not for the router or not IP
// are answered (ARP, ND) or dropped and counted.
func (d *Device) Read(rx *packet.Rx) error {
	var reads, packets, supers, bytes uint64
	defer func() {
		if reads > 0 {
			d.stats.reads.Add(reads)
			d.stats.readPackets.Add(packets)
			d.stats.readSupers.Add(supers)
			d.stats.readBytes.Add(bytes)
		}
	}()
	for {
		space := rx.Space()
		if space == nil {
			return nil
		}
		frame := space[packet.Headroom-linkHdrLen:]
		n, err := d.read(frame)
		switch {
		case err == nil:
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EBADFD), errors.Is(err, unix.ENODEV):
			return ErrGone
		default: // EIO: the interface is down
			d.stats.drop(DropTAPRead, 1)
			return nil
		}
		reads++
		if n < linkHdrLen {
			d.stats.drop(DropFrameShort, 1)
			continue
		}
		if !d.accept(frame[:n]) {
			continue
		}
		p := rx.Add(n - linkHdrLen)
		if err := readVnetHdr(frame, p); err != nil {
			d.stats.drop(DropBadOffload, 1)
			rx.Drop()
			continue
		}
		packets++
		bytes += uint64(n - linkHdrLen)
		if p.GSO != packet.GSONone {
			supers++
		}
	}
}

// Send writes packets to the container, joining neighbours of one flow. See packet.Sender.
func (d *Device) Send(s *packet.Scratch, pkts []*packet.Packet) {
	var t tally
	for i := 0; i < len(pkts); {
		p := pkts[i]
		n := 1
		if r, ok := startRun(p); ok && (r.proto != packet.UDP || d.uso) {
			for i+n < len(pkts) && r.extend(p, pkts[i+n], n) {
				n++
			}
			if n > 1 {
				d.writeRun(s, &t, &r, pkts[i:i+n])
				i += n
				continue
			}
		}
		if p.Verified && !p.NeedsCsum {
			p.MarkPartial()
		}
		d.writeOne(s, &t, p)
		i++
	}
	t.addTo(&d.stats)
}

// writeOne writes one packet, with its link header in its own headroom where there is one.
func (d *Device) writeOne(s *packet.Scratch, t *tally, p *packet.Packet) {
	eth := &d.eth4
	if p.Buf[p.Off]>>4 == 6 {
		eth = &d.eth6
	}
	var err error
	if p.Off >= linkHdrLen {
		frame := p.Buf[p.Off-linkHdrLen:]
		putVnetHdr(frame, p)
		copy(frame[vnetHdrLen:], eth[:])
		setIov(&s.Iovs[0], frame)
		err = d.writev(s.Iovs[:1])
	} else {
		putVnetHdr(s.Hdrs, p)
		copy(s.Hdrs[vnetHdrLen:], eth[:])
		setIov(&s.Iovs[0], s.Hdrs[:linkHdrLen])
		setIov(&s.Iovs[1], p.Bytes())
		err = d.writev(s.Iovs[:2])
	}
	t.wrote(d, err, 1, p.Len(), p.GSO != packet.GSONone)
}

// writeRun writes the packets of a run as one superpacket.
func (d *Device) writeRun(s *packet.Scratch, t *tally, r *run, pkts []*packet.Packet) {
	first, last := pkts[0].Bytes(), pkts[len(pkts)-1].Bytes()
	hdr := s.Hdrs[linkHdrLen : linkHdrLen+r.hdr]
	copy(hdr, first[:r.hdr])
	psh := r.proto == packet.TCP && last[r.l4+13]&0x08 != 0
	p := r.describe(hdr, psh)
	putVnetHdr(s.Hdrs, &p)
	if first[0]>>4 == 6 {
		copy(s.Hdrs[vnetHdrLen:], d.eth6[:])
	} else {
		copy(s.Hdrs[vnetHdrLen:], d.eth4[:])
	}
	n := linkHdrLen + r.hdr
	var pieces []*packet.Packet
	if r.seg > smallPiece || n+r.payload > len(s.Hdrs) {
		pieces = pkts
	} else {
		for _, p := range pkts {
			n += copy(s.Hdrs[n:], p.Bytes()[r.hdr:])
		}
	}
	setIov(&s.Iovs[0], s.Hdrs[:n])
	for i, p := range pieces {
		setIov(&s.Iovs[1+i], p.Bytes()[r.hdr:])
	}
	t.wrote(d, d.writev(s.Iovs[:1+len(pieces)]), len(pkts), r.hdr+r.payload, true)
}

func setIov(v *unix.Iovec, b []byte) {
	v.Base = &b[0]
	v.SetLen(len(b))
}

// read and writev do not block, so the Go scheduler need not hear of them: RawSyscall.
func (d *Device) read(b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(d.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func (d *Device) writev(iovs []unix.Iovec) error {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(d.fd), uintptr(unsafe.Pointer(&iovs[0])), uintptr(len(iovs)))
	if errno != 0 {
		return errno
	}
	return nil
}

// counters are read by Stats at any time.
type counters struct {
	reads, readPackets, readSupers, readBytes       atomic.Uint64
	writes, writtenPackets, writtenSupers, wroteLen atomic.Uint64
	drops                                           [numDrops]atomic.Uint64
}

func (c *counters) drop(why Drop, n uint64) { c.drops[why].Add(n) }

// tally collects the counters of one Send on the stack, so that a batch costs a few atomic additions and not a few a packet.
type tally struct{ writes, packets, supers, bytes uint64 }

func (t *tally) wrote(d *Device, err error, packets, bytes int, super bool) {
	if err != nil {
		d.stats.drop(DropTAPWrite, uint64(packets))
		return
	}
	t.writes++
	t.packets += uint64(packets)
	t.bytes += uint64(bytes)
	if super {
		t.supers++
	}
}

func (t *tally) addTo(c *counters) {
	if t.writes == 0 {
		return
	}
	c.writes.Add(t.writes)
	c.writtenPackets.Add(t.packets)
	c.writtenSupers.Add(t.supers)
	c.wroteLen.Add(t.bytes)
}

// Stats are counts since New. Packets of a superpacket read count once, those joined into a superpacket written count
// each; bytes are of IP packets.
type Stats struct {
	Reads             uint64 `json:"reads"`
	ReadPackets       uint64 `json:"read_packets"`
	ReadSuperpackets  uint64 `json:"read_superpackets"`
	ReadBytes         uint64 `json:"read_bytes"`
	Writes            uint64 `json:"writes"`
	WritePackets      uint64 `json:"write_packets"`
	WriteSuperpackets uint64 `json:"write_superpackets"`
	WriteBytes        uint64 `json:"write_bytes"`
}

// Add adds o to s, for totals over devices.
func (s *Stats) Add(o Stats) {
	s.Reads += o.Reads
	s.ReadPackets += o.ReadPackets
	s.ReadSuperpackets += o.ReadSuperpackets
	s.ReadBytes += o.ReadBytes
	s.Writes += o.Writes
	s.WritePackets += o.WritePackets
	s.WriteSuperpackets += o.WriteSuperpackets
	s.WriteBytes += o.WriteBytes
}

// Stats returns the counters.
func (d *Device) Stats() Stats {
	c := &d.stats
	return Stats{
		Reads: c.reads.Load(), ReadPackets: c.readPackets.Load(), ReadSuperpackets: c.readSupers.Load(), ReadBytes: c.readBytes.Load(),
		Writes: c.writes.Load(), WritePackets: c.writtenPackets.Load(), WriteSuperpackets: c.writtenSupers.Load(), WriteBytes: c.wroteLen.Load(),
	}
}

// Drops adds the counted drops to m, by reason.
func (d *Device) Drops(m map[string]uint64) {
	for i := range d.stats.drops {
		m[dropNames[i]] += d.stats.drops[i].Load()
	}
}

// Drop is a reason why a frame ended here.
type Drop uint8

// The reasons. Their names are stable: `status` shows them.
const (
	DropFrameShort Drop = iota // shorter than its headers
	DropBadOffload             // virtio_net_hdr does not fit the packet
	DropForeignMAC             // not addressed to the router
	DropMulticast              // Ethernet multicast or broadcast that is neither ARP nor ND
	DropNotIP                  // another EtherType
	DropBadARP                 // malformed ARP or ND
	DropClaim                  // says that another's address is here: an ARP reply, an advertisement, a router's word
	DropTAPRead                // the kernel refused a read: the interface is down
	DropTAPWrite               // the kernel refused a frame: the interface is down, or the packet is malformed
	numDrops
)

var dropNames = [numDrops]string{
	DropFrameShort: "tap-frame-short",
	DropBadOffload: "tap-bad-offload",
	DropForeignMAC: "tap-foreign-mac",
	DropMulticast:  "tap-multicast",
	DropNotIP:      "tap-not-ip",
	DropBadARP:     "tap-bad-arp-nd",
	DropClaim:      "tap-neighbour-claim",
	DropTAPRead:    "tap-read-failed",
	DropTAPWrite:   "tap-write-failed",
}
