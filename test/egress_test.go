// Tests of what the gateway carries on and brings back: TTLs, errors of routers, path MTUs, IPv6, and where it all leaves the host.

package test

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// trace sends a datagram from a space, as traceroute does, and waits for the ICMP error about it. Not valid: none came.
func trace(t *testing.T, s *lab.Space, to netip.AddrPort, hops, size int, dontFragment bool) (e lab.ICMPError) {
	t.Helper()
	err := s.Do(func() error {
		family, level := unix.AF_INET, unix.IPPROTO_IP
		recvErr, ttl, discover := unix.IP_RECVERR, unix.IP_TTL, unix.IP_MTU_DISCOVER
		var sa unix.Sockaddr
		if to.Addr().Is6() {
			family, level = unix.AF_INET6, unix.IPPROTO_IPV6
			recvErr, ttl, discover = unix.IPV6_RECVERR, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER
			sa = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
		} else {
			sa = &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		mode := unix.IP_PMTUDISC_DONT
		if dontFragment {
			mode = unix.IP_PMTUDISC_PROBE // whatever the container knows already
		}
		if err := errors.Join(unix.SetsockoptInt(fd, level, recvErr, 1), unix.SetsockoptInt(fd, level, ttl, hops),
			unix.SetsockoptInt(fd, level, discover, mode), unix.Connect(fd, sa)); err != nil {
			return err
		}
		if _, err := unix.Write(fd, make([]byte, size)); err != nil {
			return err
		}
		wait := []unix.PollFd{{Fd: int32(fd)}}
		for until := time.Now().Add(10 * time.Second); time.Now().Before(until); {
			if _, err := unix.Poll(wait, 1000); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			var control [512]byte
			_, n, _, _, err := unix.Recvmsg(fd, make([]byte, 1), control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EAGAIN) {
				continue
			}
			if err != nil {
				return err
			}
			msgs, err := unix.ParseSocketControlMessage(control[:n])
			if err != nil {
				return err
			}
			for _, m := range msgs { // struct sock_extended_err, and who sent it
				if m.Header.Level != int32(level) || m.Header.Type != int32(recvErr) {
					continue
				}
				e.Type, e.Code, e.MTU = m.Data[5], m.Data[6], int(binary.NativeEndian.Uint32(m.Data[8:]))
				if family == unix.AF_INET {
					e.From = netip.AddrFrom4([4]byte(m.Data[20:24]))
				} else {
					e.From = netip.AddrFrom16([16]byte(m.Data[24:40]))
				}
				return nil
			}
		}
		return nil
	})
	if err != nil {
		t.Fatalf("datagram to %v with %d hops and %d bytes: %v", to, hops, size, err)
	}
	return e
}

func TestEgress_TracerouteShowsEveryRouter(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1, lab.WithIPv6)
	n := l.Tunnel(lab.MTU)
	upEmbedded(l.Host(1))
	a := join(t, l.Host(1), "a")
	addr := netip.MustParseAddr
	for _, tt := range []struct {
		to                      netip.Addr
		path                    []netip.Addr
		exceeded, closed, noOne byte
	}{
		{n.Far.Addr, []netip.Addr{a.gateway, addr("192.0.2.2"), addr("198.51.100.130"), n.Far.Addr}, 11, 3, 3},
		{n.Far.Addr6, []netip.Addr{a.gateway6, addr("2001:db8:0:2::2"), addr("2001:db8:0:5101::2"), n.Far.Addr6}, 3, 1, 4},
	} {
		for i, want := range tt.path {
			got := trace(t, a.Space, port(tt.to, 33434+uint16(i)), i+1, 32, false)
			typ, code := tt.exceeded, byte(0)
			last := i == len(tt.path)-1
			if last { // nobody listens there
				typ, code = tt.closed, tt.noOne
			}
			if got.From != want || got.Type != typ || got.Code != code {
				t.Errorf("UDP to %v, hop %d: %+v, want one of type %d, code %d from %v", tt.to, i+1, got, typ, code, want)
			}
			r, err := a.PingWith(tt.to, lab.PingOptions{Count: 1, TTL: i + 1})
			if err != nil {
				t.Fatal(err)
			}
			if last {
				if r.Lost() != 0 {
					t.Errorf("ping %v, hop %d: %v", tt.to, i+1, r)
				}
			} else if len(r.Errors) != 1 || r.Errors[0].From != want || r.Errors[0].Type != typ {
				t.Errorf("ping %v, hop %d: %v, want time exceeded from %v", tt.to, i+1, r, want)
			}
		}
	}
}

func TestEgress_DatagramsLearnThePathsMTU(t *testing.T) {
	t.Parallel()
	const narrow = 1400
	l := lab.New(t, 1, lab.WithIPv6)
	n := l.Tunnel(narrow)
	upEmbedded(l.Host(1))
	a := join(t, l.Host(1), "a")
	for _, tt := range []struct {
		to, router, gateway netip.Addr
		typ, code           byte
	}{
		{n.Far.Addr, netip.MustParseAddr("192.0.2.2"), a.gateway, 3, 4},
		{n.Far.Addr6, netip.MustParseAddr("2001:db8:0:2::2"), a.gateway6, 2, 0},
	} {
		seen := n.Far.UDPEcho(t, port(tt.to, 9000))
		for i, from := range []netip.Addr{tt.router, tt.gateway} { // who finds out, and the host, which then knows
			got := trace(t, a.Space, port(tt.to, 9000), 64, narrow+20-echoHeaders(tt.to), true)
			if got.From != from || got.Type != tt.typ || got.Code != tt.code || got.MTU != narrow {
				t.Errorf("datagram %d to %v: %+v, want MTU %d from %v", i, tt.to, got, narrow, from)
			}
		}
		if len(seen) != 0 {
			t.Errorf("a datagram that is too big, and not to be fragmented, arrived at %v", tt.to)
		}
		// The container's kernel has learnt it, and fragments what may be.
		for _, size := range []int{narrow - echoHeaders(tt.to), narrow, 9000} {
			if err := a.EchoUDP(port(tt.to, 9000), size); err != nil {
				t.Errorf("UDP to %v, %d bytes: %v", tt.to, size, err)
			}
		}
	}
}

// Containers of an overlay without IPv6 reach the outside over it where their host does.
func TestEgress_IPv6OfAnIPv4Overlay(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2, lab.WithIPv6)
	first := upEmbedded(l.Host(1))
	l.Host(2).Up("--etcd-endpoints", etcdURL(l.Host(1)))
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(1), "b")
	far := join(t, l.Host(2), "far")
	l.Outside.HTTPServer(t, port(lab.OutsideAddr6, 80))
	l.Outside.UDPEcho(t, port(lab.OutsideAddr6, 9000))
	if got, err := a.Fetch("http://" + port(lab.OutsideAddr6, 80).String() + "/"); err != nil || got != l.Host(1).Addr6.String() {
		t.Errorf("the outside saw %q, %v; want the host's address", got, err)
	}
	if err := a.EchoUDP(port(lab.OutsideAddr6, 9000), 1000); err != nil {
		t.Errorf("UDP: %v", err)
	}
	pings(t, a.Space, lab.OutsideAddr6)
	pings(t, a.Space, b.addr6)
	r, err := a.Ping(far.addr6, 3)
	if err != nil || r.Received != 0 || len(r.Errors) == 0 || r.Errors[0].Type != 1 {
		t.Errorf("a container of another node: %v, %v; want unreachable", r, err)
	}
	if ps := l.Host(1).CLI("ps"); !strings.Contains(ps.Stdout, a.addr6.String()) {
		t.Errorf("ps does not show %v:\n%s", a.addr6, ps.Stdout)
	}
	if own := join(t, l.Host(1), "own", "--no-default-route"); own.addr6.IsValid() {
		t.Errorf("a container with a default route of its own has %v", own.addr6)
	}
	// It stays over a restart.
	first.Stop()
	upEmbedded(l.Host(1))
	lab.Eventually(t, "IPv6 after a restart", func() bool {
		r, err := a.Ping(lab.OutsideAddr6, 1)
		return err == nil && r.Lost() == 0
	})
}

func TestEgress_LeavesByTheChosenAddress(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1, lab.WithIPv6)
	h := l.Host(1)
	chosen := []netip.Addr{netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("2001:db8:0:2::200")}
	for i, a := range chosen {
		if err := h.AddAddr("lan0", netip.PrefixFrom(a, []int{24, 64}[i])); err != nil {
			t.Fatal(err)
		}
	}
	upRefused(t, h, []string{"--outbound-addr", "192.0.2.99"}, "192.0.2.99", "--outbound-addr")
	upRefused(t, h, []string{"--outbound-if", "eth7"}, "eth7", "--outbound-if")
	d := upEmbedded(h, "--outbound-addr", chosen[0].String()+","+chosen[1].String(), "--outbound-if", "lan0")
	a := join(t, h, "a")
	for i, to := range []netip.Addr{lab.OutsideAddr, lab.OutsideAddr6} {
		l.Outside.HTTPServer(t, port(to, 80))
		seen := l.Outside.UDPEcho(t, port(to, 9000))
		if got, err := a.Fetch("http://" + port(to, 80).String() + "/"); err != nil || got != chosen[i].String() {
			t.Errorf("TCP came from %q, %v; want %v", got, err, chosen[i])
		}
		if err := a.EchoUDP(port(to, 9000), 100); err != nil {
			t.Errorf("UDP to %v: %v", to, err)
		} else if got := <-seen; got.Addr().Unmap() != chosen[i] {
			t.Errorf("UDP came from %v, want %v", got, chosen[i])
		}
		pings(t, a.Space, to)
	}
	// It goes, and is back.
	first := netip.PrefixFrom(chosen[0], 24)
	if err := h.LoseAddr(first); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "status says that the address has gone", func() bool {
		return strings.Contains(d.Status().Problem, chosen[0].String()+" (--outbound-addr)")
	})
	if _, err := a.Fetch("http://" + port(lab.OutsideAddr, 80).String() + "/"); err == nil {
		t.Error("TCP leaves by another address")
	}
	if err := h.AddAddr("lan0", first); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "status has no problem any more", func() bool { return d.Status().Problem == "" })
	if got, err := a.Fetch("http://" + port(lab.OutsideAddr, 80).String() + "/"); err != nil || got != chosen[0].String() {
		t.Errorf("TCP comes from %q, %v; want %v again", got, err, chosen[0])
	}
	if n := strings.Count(d.LogText(), "chosen for it is gone"); n != 1 {
		t.Errorf("the log says %d times that the address has gone", n)
	}
}

func TestEgress_LeavesByTheChosenInterface(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	if err := h.AddBridge("other0"); err != nil { // which leads nowhere
		t.Fatal(err)
	}
	upEmbedded(h, "--outbound-if", "other0")
	a := join(t, h, "a")
	l.Outside.HTTPServer(t, port(lab.OutsideAddr, 80))
	client := a.HTTPClient()
	client.Timeout = 3 * time.Second
	if resp, err := client.Get("http://" + lab.OutsideAddr.String() + "/"); err == nil {
		resp.Body.Close()
		t.Error("a connection left by an interface that was not chosen")
	}
}
