// Tests of dual-stack networks: what flannel hosts do among themselves, which is what a node must fit in.

package interop

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// dualStack is the row of a dual-stack network.
func dualStack(t *testing.T) backend {
	t.Helper()
	for _, b := range backends {
		if b.dual {
			return b
		}
	}
	t.Fatal("no backend is dual-stack")
	return backend{}
}

// Two flannel hosts: that the lab is right, and what flannel does with its MTUs.
func TestFlannel_DualStackAmongItsOwnHosts(t *testing.T) {
	t.Parallel()
	s := newSite(t, dualStack(t))
	f1, f2 := s.startFlannelOn(t, s.Host(1)), s.startFlannelOn(t, s.Host(2))
	f1.bridge(t)
	f2.bridge(t)
	a, b := f1.container(t, "a"), f2.container(t, "b")
	f1.reaches(t, f2.gateway().addrs()...)
	for _, f := range []*flannel{f1, f2} {
		if f.env.MTU != lab.MTU-50 {
			t.Errorf("subnet.env: MTU %d, want %d", f.env.MTU, lab.MTU-50)
		}
		for name, want := range map[string]int{"flannel.1": lab.MTU - 50, "flannel-v6.1": lab.MTU - 70} {
			if mtu := deviceMTU(t, f.host, name); mtu != want {
				t.Errorf("%s: MTU %d, want %d", name, mtu, want)
			}
		}
	}
	for _, addr := range b.addrs() {
		b.HTTPServer(t, netip.AddrPortFrom(addr, web))
		b.UDPEcho(t, netip.AddrPortFrom(addr, echo))
		mtu := lab.MTU - 50
		if addr.Is6() {
			mtu = lab.MTU - 70
		}
		talk(t, a, addr, mtu)
		talk(t, f1.member(), addr, mtu)
	}
}

// flannel's containers have an MTU that IPv6 does not have room for, and more than ours have: docs/flannel.md.
func TestFlannel_PacketsLargerThanOurs(t *testing.T) {
	t.Parallel()
	s := newSite(t, dualStack(t))
	f, n := s.startFlannel(t), s.startOurs(t)
	f.reaches(t, n.own()...)
	f.bridge(t)
	theirs, ours := f.container(t, "theirs"), n.container(t, "ours")
	const size = lab.MTU - 50
	r, err := theirs.PingWith(ours.addr, lab.PingOptions{Count: 3, Size: size - 28, DontFrag: true})
	if err != nil || r.Lost() != 0 {
		t.Errorf("IPv4 packets of %d bytes: %v, %v", size, r, err)
	}
	r, err = theirs.PingWith(ours.addr6, lab.PingOptions{Count: 3, Size: size - 48, DontFrag: true})
	if err != nil || r.Received != 0 || len(r.Errors) == 0 || r.Errors[0].Type != 2 || r.Errors[0].MTU != lab.MTU-70 || r.Errors[0].From != f.gateway().addr6 {
		t.Errorf("IPv6 packets of %d bytes: %v, %v; want packet-too-big of flannel's host", size, r, err)
	}
	ours.UDPEcho(t, netip.AddrPortFrom(ours.addr6, echo))
	if err := theirs.EchoUDP(netip.AddrPortFrom(ours.addr6, echo), size-48); err != nil {
		t.Errorf("UDP of %d bytes over IPv6: %v", size, err)
	}
}

func deviceMTU(t *testing.T, h *lab.Host, name string) (mtu int) {
	t.Helper()
	if err := h.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err == nil {
			mtu = link.Attrs().MTU
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return mtu
}
