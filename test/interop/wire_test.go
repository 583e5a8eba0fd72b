// Tests of the wire: packets between a flannel host and our node, and leases that come and go.

package interop

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// backend is one of flannel's, as a network has it, that our node speaks.
type backend struct {
	name     string
	config   string // in the store, as an operator writes it
	overhead int    // bytes, by which the overlay's MTU is below the LAN's
	arch     string // the only GOARCH on which flannel has it; "" is all
	dual     bool   // IPv6 too, inside and outside
	// flannelOverhead is flannel's own idea of overhead, if it has another.
	flannelOverhead int

	members  []string                               // of a stock lease's JSON
	devices  []string                               // of the kernel, which have MAC addresses that the lease tells, and which a reboot takes away
	unrouted func(f *flannel, addr netip.Addr) bool // flannel has no route to the address
}

var backends = []backend{
	{
		name: "udp", config: `{"Network":"10.66.0.0/16"}`, overhead: 28, arch: "amd64",
		members: []string{"PublicIP", "PublicIPv6"}, unrouted: unreachable,
	},
	{
		name: "udp with every key", overhead: 28, arch: "amd64",
		config:  `{"Network":"10.66.0.0/16","SubnetLen":26,"SubnetMin":"10.66.7.64","SubnetMax":"10.66.9.0","Backend":{"Type":"UDP","Port":7890}}`,
		members: []string{"PublicIP", "PublicIPv6"}, unrouted: unreachable,
	},
	{
		name: "vxlan", config: `{"Network":"10.66.0.0/16","Backend":{"Type":"vxlan"}}`, overhead: 50,
		members: vxlanMembers, devices: []string{"flannel.1"}, unrouted: withoutRoute,
	},
	{
		name: "vxlan with every key", overhead: 150,
		config:  `{"Network":"10.66.0.0/16","SubnetLen":26,"Backend":{"Type":"VXLAN","VNI":4242,"Port":14789,"MTU":1400,"GBP":true,"Learning":true}}`,
		members: vxlanMembers, devices: []string{"flannel.4242"}, unrouted: withoutRoute,
	},
	{
		// flannel takes off 50 where IPv6 needs 70: docs/flannel.md.
		name: "vxlan dual-stack", overhead: 70, flannelOverhead: 50, dual: true,
		config:  `{"EnableIPv6":true,"Network":"10.66.0.0/16","IPv6Network":"fd66::/48","Backend":{"Type":"vxlan"}}`,
		members: dualMembers, devices: []string{"flannel.1", "flannel-v6.1"}, unrouted: withoutRoute,
	},
	{
		name: "vxlan dual-stack with every key", overhead: 170, flannelOverhead: 150, dual: true,
		config: `{"EnableIPv6":true,"Network":"10.66.0.0/16","SubnetLen":26,"IPv6Network":"fd66::/48","IPv6SubnetLen":80,
			"Backend":{"Type":"VXLAN","VNI":4242,"Port":14789,"MTU":1400,"GBP":true,"Learning":true}}`,
		members: dualMembers, devices: []string{"flannel.4242", "flannel-v6.4242"}, unrouted: withoutRoute,
	},
}

var (
	vxlanMembers = []string{"BackendData", "BackendType", "PublicIP", "PublicIPv6"}
	dualMembers  = []string{"BackendData", "BackendType", "BackendV6Data", "PublicIP", "PublicIPv6"}
)

// withoutRoute: the vxlan backend has a route for each peer.
func withoutRoute(f *flannel, addr netip.Addr) bool {
	list := f.host.Routes
	if addr.Is6() {
		list = f.host.Routes6
	}
	routes, err := list()
	return err == nil && !slices.ContainsFunc(routes, func(r string) bool {
		dst, _, _ := strings.Cut(r, " ")
		p, err := netip.ParsePrefix(dst)
		return err == nil && p.Contains(addr)
	})
}

// unreachable: the udp backend answers what it has no route for with net-unreachable, which a connect shows. It comes from the
// host's own address, so that a kernel only believes it with accept_local.
func unreachable(f *flannel, addr netip.Addr) bool {
	if err := f.host.Sysctl("net/ipv4/conf/all/accept_local", "1"); err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	conn, err := f.host.DialContext(ctx, "tcp4", netip.AddrPortFrom(addr, web).String())
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ENETUNREACH)
}

// forBackends runs a test with each backend.
func forBackends(t *testing.T, test func(t *testing.T, b backend)) {
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			if b.arch != "" && b.arch != runtime.GOARCH {
				t.Skipf("flannel has this backend on %s only", b.arch)
			}
			t.Parallel()
			test(t, b)
		})
	}
}

const (
	web  = 8080
	echo = 9000
	bulk = 16 << 20 // bytes of TCP in each direction
)

func TestFlannel_ExchangesEverythingWithOurs(t *testing.T) {
	t.Parallel()
	forBackends(t, func(t *testing.T, b backend) {
		t.Run("flanneld joins first", func(t *testing.T) {
			t.Parallel()
			s := newSite(t, b)
			f := s.startFlannel(t)
			exchange(t, s, f, s.startOurs(t))
		})
		t.Run("flanneld joins last", func(t *testing.T) {
			t.Parallel()
			s := newSite(t, b)
			n := s.startOurs(t)
			exchange(t, s, s.startFlannel(t), n)
		})
	})
}

func exchange(t *testing.T, s *site, f *flannel, n *node) {
	ourLease := s.leases(t)[n.subnet]
	f.reaches(t, n.own()...)
	// Until our node had read flannel's lease, its packets were nobody's.
	dropped := map[string]uint64{"spoofed-by-peer": n.Drops("spoofed-by-peer")}
	for _, reason := range []string{"bad-ip-checksum", "malformed", "vxlan-bad-header", "vxlan-other-vni", "vxlan-foreign-mac", "vxlan-not-ip"} {
		dropped[reason] = 0
	}
	f.bridge(t)
	host, theirs, ours := f.member(), f.container(t, "theirs"), n.container(t, "ours")
	mtu, theirMTU := lab.MTU-s.backend.overhead, lab.MTU-s.backend.overhead
	if s.backend.flannelOverhead != 0 {
		theirMTU = lab.MTU - s.backend.flannelOverhead
	}
	if f.env.MTU != theirMTU || n.Status().MTU != mtu {
		t.Errorf("MTU %d of flannel and %d of ours, want %d and %d", f.env.MTU, n.Status().MTU, theirMTU, mtu)
	}
	for _, m := range []*member{theirs, ours, f.gateway()} {
		for _, addr := range m.addrs() {
			m.HTTPServer(t, netip.AddrPortFrom(addr, web))
			m.UDPEcho(t, netip.AddrPortFrom(addr, echo))
		}
	}

	for _, pair := range []struct {
		name     string
		from, to *member
	}{
		{"flannel's container to ours", theirs, ours},
		{"our container to flannel's", ours, theirs},
		{"flannel's host to our container", host, ours},
		{"our container to flannel's host", ours, f.gateway()},
	} {
		t.Run(pair.name, func(t *testing.T) {
			for _, addr := range pair.to.addrs() {
				talk(t, pair.from, addr, mtu)
			}
		})
	}
	t.Run("pings of addresses that nobody attached", func(t *testing.T) {
		for _, own := range n.own() {
			pings(t, host, own) // from .0, both the .0 that stock nodes know and our gateway
			pings(t, theirs, own)
		}
		for _, addr := range append(host.addrs(), f.gateway().addrs()...) {
			pings(t, ours, addr) // flannel's own device, and the bridge
		}
		for _, addr := range f.gateway().addrs() {
			pings(t, theirs, addr) // the lab itself is sound
		}
	})
	for _, m := range []*member{host, theirs, ours} {
		if sum := checksumErrors(t, m.Space); sum != 0 {
			t.Errorf("the kernel of %s counts %d checksum errors", m.name, sum)
		}
	}
	for reason, before := range dropped {
		if drops := n.Drops(reason) - before; drops != 0 {
			t.Errorf("our node dropped %d packets for %s", drops, reason)
		}
	}

	t.Run("both leases are as their nodes wrote them", func(t *testing.T) {
		all := s.leases(t)
		if len(all) != 2 || all[n.subnet] != ourLease {
			t.Errorf("leases %v; ours was %s", all, ourLease)
		}
		for subnet, want := range map[netip.Prefix][]string{
			f.env.Subnet: s.backend.members,
			n.subnet:     append(slices.Clone(s.backend.members), "RootlessOvl"),
		} {
			var members map[string]json.RawMessage
			if err := json.Unmarshal([]byte(all[subnet]), &members); err != nil {
				t.Errorf("lease of %v, %q: %v", subnet, all[subnet], err)
			}
			if got := slices.Sorted(maps.Keys(members)); !slices.Equal(got, want) {
				t.Errorf("lease of %v has the members %v, want %v", subnet, got, want)
			}
		}
	})
	t.Run("flanneld restarts", func(t *testing.T) {
		before := vtepMACs(t, s.leases(t)[f.env.Subnet])
		f.stop()
		for _, device := range s.backend.devices {
			f.delete(t, device)
		}
		again := s.startFlannel(t)
		if again.env != f.env {
			t.Errorf("flannel comes back with %+v, had %+v", again.env, f.env)
		}
		now := vtepMACs(t, s.leases(t)[f.env.Subnet])
		if len(before) != len(s.backend.devices) || len(now) != len(before) {
			t.Errorf("VTEPs %v before and %v after, for the devices %v", before, now, s.backend.devices)
		}
		for _, mac := range before {
			if slices.Contains(now, mac) {
				t.Errorf("VTEPs %v before and %v after: this tests nothing", before, now)
			}
		}
		for _, addr := range ours.addrs() {
			lab.Eventually(t, "pings pass again", func() bool {
				r, err := theirs.Ping(addr, 1)
				return err == nil && r.Received == 1
			})
			talk(t, ours, theirs.like(addr), mtu)
			talk(t, theirs, addr, mtu)
		}
		if all := s.leases(t); all[n.subnet] != ourLease {
			t.Errorf("our lease has become %s, was %s", all[n.subnet], ourLease)
		}
	})
}

// vtepMACs are the MAC addresses of a lease's JSON, of one family or both.
func vtepMACs(t *testing.T, value string) (macs []string) {
	t.Helper()
	var attrs struct{ BackendData, BackendV6Data struct{ VtepMAC string } }
	if err := json.Unmarshal([]byte(value), &attrs); err != nil {
		t.Fatalf("lease %q: %v", value, err)
	}
	for _, mac := range []string{attrs.BackendData.VtepMAC, attrs.BackendV6Data.VtepMAC} {
		if mac != "" {
			macs = append(macs, mac)
		}
	}
	return macs
}

// talk sends everything there is from a member to the servers at an address, who must see it as the member. mtu is the path's.
func talk(t *testing.T, from *member, to netip.Addr, mtu int) {
	t.Helper()
	pings(t, from, to)
	at := netip.AddrPortFrom(to, web)
	if got, err := from.Fetch("http://" + at.String() + "/"); err != nil || got != from.like(to).String() {
		t.Errorf("the server at %v sees the client as %q, %v; want %v", to, got, err, from.like(to))
	}
	if err := from.Download(at, bulk); err != nil {
		t.Errorf("TCP download from %v: %v", to, err)
	}
	if err := from.Upload(at, bulk); err != nil {
		t.Errorf("TCP upload to %v: %v", to, err)
	}
	headers := 28
	if to.Is6() {
		headers = 48
	}
	for _, size := range []int{1, mtu - headers, mtu - headers + 1, 9000, 65507} {
		if err := from.EchoUDP(netip.AddrPortFrom(to, echo), size); err != nil {
			t.Errorf("UDP to %v, %d bytes: %v", to, size, err)
		}
	}
	for _, size := range []int{mtu - headers, 4000} {
		r, err := from.PingWith(to, lab.PingOptions{Count: 3, Size: size})
		if err != nil || r.Lost() != 0 {
			t.Errorf("ping of %v with %d bytes: %v, %v", to, size, r, err)
		}
	}
}

// pings fails the test unless every echo comes back.
func pings(t *testing.T, from *member, to netip.Addr) {
	t.Helper()
	r, err := from.Ping(to, 5)
	if err != nil || r.Lost() != 0 {
		t.Errorf("ping %v from %s: %v, %v", to, from.name, r, err)
	}
}

func TestFlannel_LosesItsRouteWithOurLease(t *testing.T) {
	t.Parallel()
	forBackends(t, func(t *testing.T, b backend) {
		for _, c := range []struct {
			name string
			end  func(n *node)
		}{
			{"given back on stop", func(n *node) { n.Stop() }},
			{"expired after a crash", func(n *node) { n.Kill() }},
		} {
			t.Run(c.name, func(t *testing.T) {
				s := newSite(t, b)
				f := s.startFlannel(t)
				n := s.startOurs(t, "--ephemeral", "--lease-ttl", "5s")
				f.reaches(t, n.own()...)
				ours := n.container(t, "ours")
				for _, addr := range ours.addrs() {
					pings(t, f.member(), addr)
				}
				c.end(n)
				for _, addr := range ours.addrs() {
					lab.Eventually(t, "flannel has no route to our subnet any more", func() bool { return b.unrouted(f, addr) })
				}
				if all := s.leases(t); len(all) != 1 {
					t.Errorf("leases are left: %v", all)
				}
				// A node that comes after finds flannel as before.
				n = s.startOurs(t)
				f.reaches(t, n.own()...)
			})
		}
	})
}

// A flannel host follows our lease to another address, which a host has by DHCP say; nothing else of the lease changes.
func TestFlannel_FollowsOurHostToAnotherAddress(t *testing.T) {
	t.Parallel()
	forBackends(t, func(t *testing.T, b backend) {
		s := newSite(t, b)
		f := s.startFlannel(t)
		n := s.startOurs(t)
		f.reaches(t, n.own()...)
		ours, host := n.container(t, "roamer"), f.member()
		for _, addr := range ours.addrs() {
			pings(t, host, addr)
		}
		before := s.leases(t)
		moves := []netip.Addr{netip.MustParseAddr("192.0.2.77"), n.Host.Addr}
		if b.dual {
			moves = append(moves, netip.MustParseAddr("2001:db8:0:2::77"), n.Host.Addr6)
		}
		for _, addr := range moves {
			old, lose, member := n.Host.Addr, n.Host.LoseAddress, "PublicIP"
			if addr.Is6() {
				old, lose, member = n.Host.Addr6, n.Host.LoseAddress6, "PublicIPv6"
			}
			if err := errors.Join(lose(), n.Host.GetAddress(addr)); err != nil {
				t.Fatal(err)
			}
			lab.Eventually(t, "the lease has the new address", func() bool {
				return strings.Contains(s.leases(t)[n.subnet], `"`+member+`":"`+addr.String()+`"`)
			})
			f.reaches(t, n.own()...)
			for _, to := range ours.addrs() {
				pings(t, host, to)
				pings(t, ours, host.like(to))
			}
			now := s.leases(t)
			before[n.subnet] = strings.Replace(before[n.subnet], `"`+old.String()+`"`, `"`+addr.String()+`"`, 1)
			if !maps.Equal(now, before) {
				t.Errorf("leases %v, want %v", now, before)
			}
		}
	})
}
