// This file sends and receives raw frames inside a namespace, superpackets among them.

package lab

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// vnetHeader is the length of the virtio_net_hdr before each frame of a RawSocket.
const vnetHeader = 10

// RawSocket is an AF_PACKET socket on one interface, with PACKET_VNET_HDR: superpackets pass whole. One goroutine at a time.
type RawSocket struct {
	fd  int
	buf []byte
}

// RawSocket opens a raw socket on an interface of the space. Close it.
func (s *Space) RawSocket(ifName string) (*RawSocket, error) {
	r := &RawSocket{fd: -1, buf: make([]byte, 80<<10)}
	err := s.Do(func() error {
		link, err := netlink.LinkByName(ifName)
		if err != nil {
			return err
		}
		proto := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		if r.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(proto)); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(r.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return err
		}
		return unix.Bind(r.fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: link.Attrs().Index})
	})
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// Close closes the socket.
func (r *RawSocket) Close() {
	if r.fd >= 0 {
		unix.Close(r.fd)
		r.fd = -1
	}
}

// Send sends a plain frame, Ethernet header included.
func (r *RawSocket) Send(frame []byte) error {
	_, err := unix.Write(r.fd, append(make([]byte, vnetHeader), frame...))
	return err
}

// SendTSO sends a TCP/IPv4 frame as one superpacket whose segments carry segment bytes each. The TCP checksum field must hold the
// pseudo-header sum: see TCPSegment.
func (r *RawSocket) SendTSO(frame []byte, segment int) error {
	header := make([]byte, vnetHeader, vnetHeader+len(frame))
	header[0] = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	header[1] = 1 // VIRTIO_NET_HDR_GSO_TCPV4
	binary.NativeEndian.PutUint16(header[2:], 14+20+20)
	binary.NativeEndian.PutUint16(header[4:], uint16(segment))
	binary.NativeEndian.PutUint16(header[6:], 14+20) // checksum starts here
	binary.NativeEndian.PutUint16(header[8:], 16)    // and is stored there
	_, err := unix.Write(r.fd, append(header, frame...))
	return err
}

// Frame is a frame that a RawSocket received.
type Frame struct {
	Data    []byte // Ethernet header included; valid until the next Receive
	Segment int    // bytes per segment of a superpacket; 0: a plain frame
}

// Receive waits for a frame that comes in (not one that the namespace sends) and for which match is true.
func (r *RawSocket) Receive(limit time.Duration, match func(Frame) bool) (Frame, error) {
	deadline := time.Now().Add(limit)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return Frame{}, errors.New("no such frame came in")
		}
		timeout := unix.NsecToTimeval(left.Nanoseconds())
		if err := unix.SetsockoptTimeval(r.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
			return Frame{}, err
		}
		n, from, err := unix.Recvfrom(r.fd, r.buf, 0)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return Frame{}, err
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); !ok || ll.Pkttype == unix.PACKET_OUTGOING || n < vnetHeader {
			continue
		}
		f := Frame{Data: r.buf[vnetHeader:n]}
		if r.buf[1] != 0 {
			f.Segment = int(binary.NativeEndian.Uint16(r.buf[4:]))
		}
		if match(f) {
			return f, nil
		}
	}
}

// EthernetFrame puts an Ethernet header before an IPv4 or IPv6 packet.
func EthernetFrame(dst, src [6]byte, packet []byte) []byte {
	frame := append(append([]byte(nil), dst[:]...), src[:]...)
	if len(packet) > 0 && packet[0]>>4 == 6 {
		return append(append(frame, 0x86, 0xdd), packet...)
	}
	return append(append(frame, 0x08, 0x00), packet...)
}

// IPv4 makes an IPv4 packet with a good header checksum.
func IPv4(src, dst netip.Addr, protocol, ttl byte, payload []byte) []byte {
	h := make([]byte, 20, 20+len(payload))
	h[0], h[8], h[9] = 0x45, ttl, protocol
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	copy(h[12:], src.AsSlice())
	copy(h[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(h[10:], Checksum(h))
	return append(h, payload...)
}

// UDPv6 makes an IPv6 packet with a UDP datagram, whose checksum is right: IPv6 knows none without.
func UDPv6(src, dst netip.AddrPort, payload []byte) []byte {
	udp := UDP(src.Port(), dst.Port(), payload)
	h := make([]byte, 40, 40+len(udp))
	h[0], h[6], h[7] = 0x60, unix.IPPROTO_UDP, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(udp)))
	copy(h[8:], src.Addr().AsSlice())
	copy(h[24:], dst.Addr().AsSlice())
	pseudo := binary.BigEndian.AppendUint32(append([]byte(nil), h[8:40]...), uint32(len(udp)))
	pseudo = append(append(pseudo, 0, 0, 0, unix.IPPROTO_UDP), udp...)
	sum := Checksum(pseudo)
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(udp[6:], sum)
	return append(h, udp...)
}

// UDP makes a UDP datagram without checksum.
func UDP(srcPort, dstPort uint16, payload []byte) []byte {
	h := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(h, srcPort)
	binary.BigEndian.PutUint16(h[2:], dstPort)
	binary.BigEndian.PutUint16(h[4:], uint16(8+len(payload)))
	return append(h, payload...)
}

// TCPSegment makes a TCP/IPv4 packet (ACK and PSH set) whose checksum field holds the sum of the pseudo header only, as a kernel
// leaves it to a device that completes checksums.
func TCPSegment(src, dst netip.AddrPort, payload []byte) []byte {
	h := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint32(h[4:], 1000)
	binary.BigEndian.PutUint32(h[8:], 2000)
	h[12], h[13] = 5<<4, 0x18
	binary.BigEndian.PutUint16(h[14:], 64000)
	pseudo := append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(20+len(payload)))
	binary.BigEndian.PutUint16(h[16:], ^Checksum(pseudo))
	return IPv4(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, 64, append(h, payload...))
}
