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
	s := newSite(t, dualStack(t))
	f1, f2 := s.startFlannelOn(t, s.Host(1)), s.startFlannelOn(t, s.Host(2))
	f1.bridge(t)
	f2.bridge(t)
	a, b := f1.container(t, "a"), f2.container(t, "b")
	f1.reaches(t, f2.gateway().addrs()...)
	for _, f := range []*flannel{f1, f2} {
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
	t.Log(f1.env, f2.env)
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
