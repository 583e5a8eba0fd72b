// This file tests what a container hears of a router that refuses its connection.

package stack

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// routed makes a device with one address of the host's of each family, behind which answer is who hears all packets: what it returns is
// received by the host.
func routed(t *testing.T, answer func(b []byte, in inbound) []byte, addrs ...netip.Prefix) {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("no TUN here: %v", err)
	}
	req, err := unix.NewIfreq("tun0")
	if err != nil {
		t.Fatal(err)
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "tun0")
	dev, err := netlink.LinkByName("tun0")
	if err == nil {
		err = netlink.LinkSetUp(dev)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(dev, addr); err != nil {
			t.Fatalf("add %v: %v", a, err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 2000); ; {
			n, err := f.Read(b)
			if err != nil {
				return
			}
			if in, ok := parseIP(b[:n]); ok {
				if a := answer(b[:n], in); a != nil {
					_, _ = f.Write(a)
				}
			}
		}
	}()
	t.Cleanup(func() {
		f.Close()
		<-done
	})
}

func TestTCP_ARefusalComesFromTheRouterThatSentIt(t *testing.T) {
	if !inOwnNamespace(t) {
		return
	}
	host, host6 := netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8::1/64")
	router, router6 := netip.MustParseAddr("198.51.100.9"), netip.MustParseAddr("2001:db8::9")
	routed(t, func(b []byte, in inbound) []byte {
		switch {
		case in.proto != protoTCP:
			return nil
		case in.src.Is4():
			return hostUnreachable.message(true).over4(b, router.As4(), in.src.As4())
		}
		return hostUnreachable.message(false).over6(b, router6.As16(), in.src.As16())
	}, host, host6)
	w := newWire(t, nil)
	for _, c := range []struct {
		from, to, router netip.Addr
	}{
		{aliceAddr, netip.MustParseAddr("198.51.100.77"), router},
		{aliceAddr6, netip.MustParseAddr("2001:db8::77"), router6},
	} {
		from, to := netip.AddrPortFrom(c.from, 999), netip.AddrPortFrom(c.to, 80)
		w.send(makeSYN(from, to))
		eventually(t, "an error from "+c.router.String(), func() bool {
			return w.countSeen(func(o observed) bool { return isICMPError(o.b, o.in) && o.in.src == c.router && o.in.dst == c.from }) == 1
		})
	}
}

// A connection that stands hears of no ICMP error, which anybody could have sent.
func TestTCP_ErrorsAreHeardWhileDiallingOnly(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("the host has no IPv6 loopback")
	}
	defer l.Close()
	w := newWire(t, nil)
	conn := w.container(aliceAddr6).mustDialTCP(netip.AddrPortFrom(gatewayAddr6, netip.MustParseAddrPort(l.Addr().String()).Port()))
	defer conn.Close()
	var c *carrier
	eventually(t, "it is carried", func() bool {
		for _, f := range w.g.live.Load().flows.all(kindTCP) {
			f := f.(*tcpFlow)
			f.mu.Lock()
			c = f.carrier
			f.mu.Unlock()
		}
		return c != nil
	})
	c.withSocket(func(fd int) {
		if on, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR); err != nil || on != 0 {
			t.Errorf("IPV6_RECVERR is %d, %v", on, err)
		}
	})
}

// makeSYN is a container's call, of either family.
func makeSYN(from, to netip.AddrPort) []byte {
	if from.Addr().Is4() {
		return makeTCP(from, to, header.TCPFlagSyn, 1)
	}
	b := make([]byte, header.IPv6MinimumSize+header.TCPMinimumSize)
	header.IPv6(b).Encode(&header.IPv6Fields{
		PayloadLength: header.TCPMinimumSize, TransportProtocol: header.TCPProtocolNumber, HopLimit: 64,
		SrcAddr: tcpipAddr(from.Addr()), DstAddr: tcpipAddr(to.Addr()),
	})
	header.TCP(b[header.IPv6MinimumSize:]).Encode(&header.TCPFields{
		SrcPort: from.Port(), DstPort: to.Port(), SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 65535,
	})
	fixTransport(b)
	return b
}
