// This file is the underlay's sockets: a set for IPv4 and, on a dual-stack host, one for IPv6, on the same port. Each set has a socket
// for every lane of every loop.

package forwarder

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// UnderlayConfig is where the underlay sockets are bound.
type UnderlayConfig struct {
	// Addr is the IPv4 address of the external interface and the port; port 0 lets the kernel choose.
	Addr netip.AddrPort
	// Addr6 is its IPv6 address, of which there are sockets too, on the same port. Invalid: peers have IPv4 addresses alone.
	Addr6 netip.Addr
	// ReceiveBuffer in bytes is asked for; the kernel grants a socket at most net.core.rmem_max, and lanes make up for it.
	// 0 asks for 4 MiB, below which the path loses bursts.
	ReceiveBuffer int
	// VXLAN is what is spoken with peers; nil: the udp format.
	VXLAN *VXLAN
	// Given are sockets that another Router had, in the place of those that would be opened at the same addresses.
	Given []GivenSockets
}

const (
	defaultBuffer = 4 << 20

	// portTries bounds how often another port is taken when the kernel's choice for IPv4 is taken for IPv6.
	portTries = 16
)

// family is an IP version of the underlay. Which one a packet inside has is another matter.
type family int

const (
	outer4 family = iota
	outer6
	families
)

// familyOf is the family of a, which is valid and not an IPv4 address in IPv6.
func familyOf(a netip.Addr) family {
	if a.Is4() {
		return outer4
	}
	return outer6
}

// familySpec is what the socket calls want to know of a family.
type familySpec struct {
	network     string
	domain      int
	nameLen     uint32
	headers     int // bytes of IP and UDP headers
	level       int
	mtuDiscover int
	probe       int // value of mtuDiscover: DF, and no ear for ICMP
	mtu         int // of the route of a connected socket
}

var familySpecs = [families]familySpec{
	outer4: {"udp4", unix.AF_INET, unix.SizeofSockaddrInet4, UDPOverhead, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE, unix.IP_MTU},
	outer6: {"udp6", unix.AF_INET6, unix.SizeofSockaddrInet6, UDPOverhead6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE, unix.IPV6_MTU},
}

// sockaddr is a socket address of either family, as the kernel reads and writes it: of IPv4, a RawSockaddrInet4 at its beginning.
type sockaddr struct{ unix.RawSockaddrInet6 }

func sockaddrOf(a netip.AddrPort) (s sockaddr) {
	if a.Addr().Is4() {
		s4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s))
		s4.Family, s4.Addr = unix.AF_INET, a.Addr().As4()
	} else {
		s.Family, s.Addr = unix.AF_INET6, a.Addr().As16()
	}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&s.Port))[:], a.Port())
	return s
}

// addrPort is the address and port in s. An IPv4 address in IPv6 stays one, and so is no IPv4 peer's.
func (s *sockaddr) addrPort() netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&s.Port))[:])
	if s.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(s)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), port)
}

// underlay is the sockets of each family; that of a family may be nil. It is never changed: Rebind puts another in its place.
type underlay [families]*sockets

// sockets is the set of sockets of one family on one port.
type sockets struct {
	// constant after openSockets
	fds        []int // loop by loop, lane by lane
	lanes      int   // sockets a loop
	addr       netip.AddrPort
	recvBuffer int
	gso        bool // UDP_SEGMENT
	gro        bool // UDP_GRO
	steered    bool // the kernel chooses the socket by the inner destination
}

func (s *sockets) family() *familySpec { return &familySpecs[familyOf(s.addr.Addr())] }

// loopFDs are the sockets of loop i, one a lane.
func (s *sockets) loopFDs(i int) []int { return s.fds[i*s.lanes : (i+1)*s.lanes] }

func (s *sockets) close() {
	for _, fd := range s.fds {
		_ = unix.Close(fd)
	}
}

// check refuses addresses that no underlay has, and fills in what c leaves open.
func (c *UnderlayConfig) check() error {
	if err := checkUnderlayAddrs(c.Addr.Addr(), c.Addr6); err != nil {
		return err
	}
	if c.ReceiveBuffer == 0 {
		c.ReceiveBuffer = defaultBuffer
	}
	return c.VXLAN.check()
}

func checkUnderlayAddrs(addr, addr6 netip.Addr) error {
	if !addr.Is4() {
		return fmt.Errorf("underlay address %v is not IPv4, which every node has", addr)
	}
	if addr6.IsValid() && (addr6.Is4() || addr6.Is4In6() || addr6.IsLinkLocalUnicast() || addr6.Zone() != "") {
		return fmt.Errorf("underlay address %v is not an IPv6 address at which peers could be reached", addr6)
	}
	return nil
}

// listenUnderlay opens the sockets of so many loops, of both families on one port. Offloads that the kernel lacks are left out.
func listenUnderlay(c UnderlayConfig, loops int, log *slog.Logger) (*underlay, error) {
	for try := 1; ; try++ {
		lanes := lanesFor(c.ReceiveBuffer, loops)
		s4, err := openSockets(c, c.Addr, loops, lanes)
		if err != nil {
			return nil, explainListen(err, c.Addr, c.VXLAN)
		}
		u := &underlay{outer4: s4}
		if c.Addr6.IsValid() {
			addr6 := netip.AddrPortFrom(c.Addr6, s4.addr.Port())
			if u[outer6], err = openSockets(c, addr6, loops, lanes); err != nil {
				s4.close()
				if errors.Is(err, unix.EADDRINUSE) && c.Addr.Port() == 0 && try < portTries {
					continue
				}
				return nil, explainListen(err, addr6, c.VXLAN)
			}
		}
		if all := s4.recvBuffer * tcpOf(s4.lanes); 2*all < c.ReceiveBuffer {
			log.Warn("the kernel grants the underlay less receive buffer than asked for; fast bursts may be lost until an administrator raises net.core.rmem_max",
				"granted", all, "asked", c.ReceiveBuffer, "sockets", tcpOf(s4.lanes))
		}
		return u, nil
	}
}

// openSockets opens the sockets of so many loops, with so many lanes each, on one address and port.
func openSockets(c UnderlayConfig, addr netip.AddrPort, loops, lanes int) (*sockets, error) {
	if s, ok, err := c.given(addr, loops); ok || err != nil {
		return s, err
	}
	s := &sockets{addr: addr, lanes: lanes}
	if err := s.listen(c, loops); err != nil {
		s.close()
		return nil, err
	}
	s.recvBuffer = receiveBuffer(s.fds[0])
	return s, nil
}

// explainListen says what to do about an error of openSockets.
func explainListen(err error, addr netip.AddrPort, v *VXLAN) error {
	a, port := addr.Addr(), addr.Port()
	switch {
	case errors.Is(err, ErrOtherSockets):
		return err
	case errors.Is(err, unix.EADDRINUSE) && v != nil:
		return fmt.Errorf("UDP port %d on %v is taken: by another program (`ss -lunp` names it), or by this host's kernel for a VXLAN device, as flannel makes one, for a host has either flannel or this node (root deletes it: `ip link delete flannel.1`, and flannel-v6.1 for IPv6). Free the port, or give this node one of its own with --port, to which flannel hosts cannot send", port, a)
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("UDP port %d on %v is taken by another program (`ss -lunp` names it): stop it, or give this node a port of its own with --port", port, a)
	case errors.Is(err, unix.EADDRNOTAVAIL) && a.Is6():
		return fmt.Errorf("%v is not an address of this host, or not yet, as long as the kernel makes sure that nobody else has it (`ip -6 address` says tentative): wait for that, or choose the interface with --iface", a)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%v is not an address of this host: choose the interface with --iface", a)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("UDP port %d needs privilege: choose one above net.ipv4.ip_unprivileged_port_start with --port", port)
	}
	return fmt.Errorf("open the underlay socket on %v: %w", addr, err)
}

// listen opens the sockets, all lanes of a loop after one another. A kernel that does not steer leaves one lane.
func (s *sockets) listen(c UnderlayConfig, loops int) error {
	shared := loops*s.lanes > 1
	if shared && s.addr.Port() != 0 {
		if err := s.probeFree(); err != nil {
			return err
		}
	}
	for i := 0; i < loops*s.lanes; i++ {
		fd, err := s.open(c, shared)
		if err != nil {
			return err
		}
		s.fds = append(s.fds, fd)
		if i == 0 && shared {
			if s.steered = steer(fd, loops, s.lanes, c.VXLAN.Encap()); !s.steered {
				s.lanes = 1
			}
		}
	}
	return nil
}

// open opens one socket; shared with others of its port.
func (s *sockets) open(c UnderlayConfig, shared bool) (int, error) {
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		if !shared {
			return nil
		}
		var err error
		if cerr := rc.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	spec := s.family()
	pc, err := lc.ListenPacket(context.Background(), spec.network, s.addr.String()) // "udp6" sets IPV6_V6ONLY
	if err != nil {
		return -1, err
	}
	defer func() { _ = pc.Close() }()
	conn, ok := pc.(*net.UDPConn)
	if !ok {
		return -1, fmt.Errorf("%T is not a UDP socket", pc)
	}
	file, err := conn.File() // a duplicate outside the runtime's poller
	if err != nil {
		return -1, err
	}
	defer func() { _ = file.Close() }()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	for _, o := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, c.ReceiveBuffer) // what was granted is read back and reported
	}
	// DF on every datagram, and no ear for what an ICMP error says of the path: node/pathmtu.go finds out what passes.
	_ = unix.SetsockoptInt(fd, spec.level, spec.mtuDiscover, spec.probe)
	_, err = unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	s.gso = err == nil
	s.gro = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) == nil
	if la, ok := conn.LocalAddr().(*net.UDPAddr); ok {
		s.addr = netip.AddrPortFrom(s.addr.Addr(), uint16(la.Port))
	}
	return fd, nil
}

// probeFree fails if somebody else holds the port, even with SO_REUSEPORT: sharing it would lose packets in silence.
func (s *sockets) probeFree() error {
	c, err := net.ListenUDP(s.family().network, net.UDPAddrFromAddrPort(s.addr))
	if err != nil {
		return err
	}
	return c.Close()
}
