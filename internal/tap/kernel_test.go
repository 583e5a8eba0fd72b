// This file tests the Device against the kernel: two network namespaces with a TAP each, and a cable in between that cuts and
// verifies as the underlay does. The test runs itself again in a user namespace of its own, where it may do all that.

package tap

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

const inside = "TAP_TEST_INSIDE"

func TestKernel(t *testing.T) {
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestKernel$", "-test.v", "-test.count=1")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
			Pdeathsig:   syscall.SIGKILL,
		}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Skipf("no user namespace for the test: %v", err)
		}
		if err == nil && bytes.Contains(out, []byte("--- SKIP: TestKernel ")) {
			t.Skipf("inside:\n%s", out)
		}
		if err != nil {
			t.Fatalf("inside: %v\n%s", err, out)
		}
		return
	}
	a, b := newNamespace(t, 0), newNamespace(t, 1)
	cable(t, a, b)
	for _, family := range []string{"tcp4", "tcp6"} {
		t.Run(family, func(t *testing.T) { testTCP(t, a, b, family) })
	}
	for _, family := range []string{"udp4", "udp6"} {
		for _, size := range []int{1200, 1} {
			t.Run(fmt.Sprint(family, "-", size), func(t *testing.T) { testUDP(t, a, b, family, size) })
		}
	}
	t.Run("many datagrams", func(t *testing.T) { testManyDatagrams(t, b) })
	t.Run("checksums", func(t *testing.T) { testChecksums(t, b) })
	for _, n := range []*namespace{a, b} {
		for why := range drops(n.dev) {
			if why != dropNames[DropMulticast] { // routers and listeners that IPv6 looks for
				t.Errorf("drops %v", drops(n.dev))
			}
		}
	}
	t.Run("down and gone", func(t *testing.T) { testGone(t) })
}

// namespace is a network namespace with a TAP, entered by one thread.
type namespace struct {
	calls chan func()
	dev   *Device
	addrs map[byte]netip.Addr // by the last letter of a network name: '4' or '6'
}

// do calls f in the namespace: sockets made there belong there.
func (n *namespace) do(f func()) {
	done := make(chan struct{})
	n.calls <- func() { f(); close(done) }
	<-done
}

func newNamespace(t *testing.T, i byte) *namespace {
	t.Helper()
	n := &namespace{calls: make(chan func()), addrs: map[byte]netip.Addr{
		'4': netip.AddrFrom4([4]byte{10, 9, i, 2}),
		'6': netip.AddrFrom16([16]byte{0xfd, 0, 0, 9, 0, i, 15: 2}),
	}}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, as it has another namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		ready <- err
		if err == nil {
			for f := range n.calls {
				f()
			}
		}
	}()
	if err := <-ready; err != nil {
		t.Skipf("unshare: %v", err)
	}
	t.Cleanup(func() { close(n.calls) })
	var err error
	n.do(func() { n.dev, err = n.open() })
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		t.Skipf("/dev/net/tun: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.dev.Close() })
	return n
}

func (n *namespace) open() (*Device, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var req struct {
		name  [16]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:], "eth0")
	req.flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return nil, fmt.Errorf("TUNSETIFF: %w", errno)
	}
	var own []netip.Addr
	for _, a := range n.addrs {
		own = append(own, a)
	}
	d, err := New(Config{File: os.NewFile(uintptr(fd), "tun"), MAC: containerMAC, Addrs: own})
	if err != nil {
		return nil, err
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	errs := []error{netlink.LinkSetHardwareAddr(link, containerMAC[:]), netlink.LinkSetMTU(link, 1472)}
	for _, a := range n.addrs {
		bits := 24
		if a.Is6() {
			bits = 64
		}
		errs = append(errs, netlink.AddrAdd(link, &netlink.Addr{
			IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}, Flags: unix.IFA_F_NODAD,
		}))
	}
	errs = append(errs, netlink.LinkSetUp(link))
	for _, a := range n.addrs {
		errs = append(errs, netlink.RouteAdd(&netlink.Route{
			LinkIndex: link.Attrs().Index, Gw: a.Prev().AsSlice(), Dst: &net.IPNet{IP: make(net.IP, a.BitLen()/8), Mask: net.CIDRMask(0, a.BitLen())},
		}))
	}
	return d, errors.Join(errs...)
}

// cable carries packets between a and b until the test ends: one goroutine, as one poll loop.
func cable(t *testing.T, a, b *namespace) {
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		rx, s := packet.NewRx(64, 256<<10), packet.NewScratch()
		for !stop.Load() {
			fds := []unix.PollFd{{Fd: int32(a.dev.FD()), Events: unix.POLLIN}, {Fd: int32(b.dev.FD()), Events: unix.POLLIN}}
			_, _ = unix.Poll(fds, 50)
			for _, way := range [][2]*Device{{a.dev, b.dev}, {b.dev, a.dev}} {
				rx.Reset()
				if err := way[0].Read(rx); err != nil {
					t.Errorf("Read: %v", err)
					return
				}
				var out []*packet.Packet
				pkts := rx.Packets()
				for i := range pkts {
					out = append(out, segmentsOf(&pkts[i])...)
				}
				way[1].Send(s, out)
			}
		}
	})
	t.Cleanup(func() { stop.Store(true); wg.Wait() })
}

func last(s string) byte { return s[len(s)-1] }

func testTCP(t *testing.T, a, b *namespace, family string) {
	var ln net.Listener
	var err error
	b.do(func() { ln, err = net.Listen(family, netip.AddrPortFrom(b.addrs[last(family)], 0).String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	// Interactive segments and bulk, both ways at once.
	sent := nettest.Payload(4 << 20)
	echoed := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			_, err = io.Copy(c, c)
			_ = c.Close()
		}
		echoed <- err
	}()
	before, readBefore := b.dev.Stats(), a.dev.Stats()
	var c net.Conn
	a.do(func() { c, err = (&net.Dialer{Timeout: 20 * time.Second}).Dial(family, ln.Addr().String()) })
	if err != nil {
		t.Fatalf("dial: %v (drops %v, %v)", err, drops(a.dev), drops(b.dev))
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
	go func() {
		_, _ = c.Write(sent)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes came back: %v", len(got), len(sent), err)
	}
	if err := <-echoed; err != nil {
		t.Error(err)
	}
	if s := b.dev.Stats(); s.WriteSuperpackets == before.WriteSuperpackets || s.ReadSuperpackets == before.ReadSuperpackets {
		t.Errorf("no superpackets: %+v", s)
	}
	if s := a.dev.Stats(); s.ReadSuperpackets == readBefore.ReadSuperpackets {
		t.Errorf("no superpackets: %+v", s)
	}
}

func testUDP(t *testing.T, a, b *namespace, family string, size int) {
	const count = 20
	var from, to *net.UDPConn
	var err, err2 error
	b.do(func() {
		to, err = net.ListenUDP(family, net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.addrs[last(family)], 0)))
	})
	a.do(func() {
		from, err2 = net.ListenUDP(family, net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.addrs[last(family)], 0)))
	})
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	defer to.Close()
	_ = to.SetReadDeadline(time.Now().Add(20 * time.Second))
	rc, err := from.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) })
	if err != nil {
		t.Skipf("UDP_SEGMENT: %v", err)
	}
	payload := nettest.Payload(count * size)
	beforeA, beforeB := a.dev.Stats(), b.dev.Stats()
	if _, err := from.WriteTo(payload, to.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2000)
	for i := range count {
		n, err := to.Read(buf)
		if err != nil {
			t.Fatalf("datagram %d: %v (drops %v)", i, err, drops(b.dev))
		}
		if !bytes.Equal(buf[:n], payload[i*size:][:size]) {
			t.Fatalf("datagram %d has %d other bytes", i, n)
		}
	}
	if !a.dev.uso {
		return
	}
	if s := a.dev.Stats(); s.ReadSuperpackets != beforeA.ReadSuperpackets+1 {
		t.Errorf("%d superpackets read, want 1", s.ReadSuperpackets-beforeA.ReadSuperpackets)
	}
	// Send counts when it has written, and the reader may be faster.
	written := func() uint64 { return b.dev.Stats().WriteSuperpackets - beforeB.WriteSuperpackets }
	for lost := time.Now().Add(10 * time.Second); written() == 0 && time.Now().Before(lost); {
		runtime.Gosched()
	}
	if n := written(); n != 1 {
		t.Errorf("%d superpackets written, want 1", n)
	}
}

// testManyDatagrams: the kernel takes the superpackets that are made of more datagrams than one may hold.
func testManyDatagrams(t *testing.T, n *namespace) {
	var to *net.UDPConn
	var err error
	n.do(func() { to, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.addrs['4'], 0))) })
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	_ = to.SetReadDeadline(time.Now().Add(20 * time.Second))
	const count, size = 150, 10
	port := to.LocalAddr().(*net.UDPAddr).Port //nolint:errcheck // a UDP socket's
	h := nettest.Between("10.9.9.9", n.addrs['4'].String())
	n.dev.Send(packet.NewScratch(), segmentsOf(nettest.Super(h.UDP(nettest.UDP{SrcPort: 9, DstPort: uint16(port)}, nettest.Payload(count*size)), size)))
	if why := drops(n.dev)[dropNames[DropTAPWrite]]; why != 0 {
		t.Errorf("the kernel refused %d packets", why)
	}
	buf := make([]byte, 2000)
	for i := range count {
		if k, err := to.Read(buf); err != nil || k != size {
			t.Fatalf("datagram %d: %d bytes, %v", i, k, err)
		}
	}
}

// testChecksums: the kernel judges what nobody has verified, and believes what somebody has.
func testChecksums(t *testing.T, n *namespace) {
	var to *net.UDPConn
	var err error
	n.do(func() { to, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.addrs['4'], 0))) })
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	_ = to.SetReadDeadline(time.Now().Add(20 * time.Second))
	port := uint16(to.LocalAddr().(*net.UDPAddr).Port)
	make1 := func(text string, spoil bool) []byte {
		ip := nettest.Between("10.9.0.2", n.addrs['4'].String()).UDP(nettest.UDP{SrcPort: 9, DstPort: port}, []byte(text))
		if spoil {
			ip[26] ^= 0x55
		}
		return ip
	}
	s := packet.NewScratch()
	n.dev.Send(s, []*packet.Packet{nettest.Packet(make1("spoiled", true)), nettest.Packet(make1("whole", false)), verified(make1("verified", false))})
	buf := make([]byte, 100)
	for _, want := range []string{"whole", "verified"} {
		k, err := to.Read(buf)
		if err != nil || string(buf[:k]) != want {
			t.Fatalf("read %q (%v), want %q", buf[:k], err, want)
		}
	}
}

func testGone(t *testing.T) {
	n := newNamespace(t, 2)
	var link netlink.Link
	var err error
	n.do(func() {
		if link, err = netlink.LinkByName("eth0"); err == nil {
			err = netlink.LinkSetDown(link)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	rx := packet.NewRx(64, 1<<16)
	if err := n.dev.Read(rx); err != nil {
		t.Errorf("down: %v", err)
	}
	n.dev.Send(packet.NewScratch(), []*packet.Packet{nettest.Packet(in4.ICMP(8, 0, 1, nil))})
	if d := drops(n.dev); d["tap-write-failed"] != 1 {
		t.Errorf("down: drops %v", d)
	}
	n.do(func() { err = netlink.LinkDel(link) })
	if err != nil {
		t.Fatal(err)
	}
	if err := n.dev.Read(rx); !errors.Is(err, ErrGone) {
		t.Errorf("deleted: %v, want ErrGone", err)
	}
}
