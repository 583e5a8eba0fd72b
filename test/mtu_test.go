// Tests of MTUs: large ones, and narrow places on the way.

package test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// onlyPeer is what a daemon says of its only peer.
type onlyPeer struct {
	Subnet     string `json:"subnet"`
	Subnet6    string `json:"subnet6"`
	PublicIP   string `json:"public_ip"`
	PublicIPv6 string `json:"public_ipv6"`
	MTU        int    `json:"mtu"`
	Path       int    `json:"path_mtu"`
	Path6      int    `json:"path_mtu6"`
	Problem    string `json:"problem"`
}

func peerOf(t *testing.T, d *lab.Daemon) onlyPeer {
	t.Helper()
	var peers []onlyPeer
	if err := d.Get("/v1/peers", &peers); err != nil || len(peers) != 1 {
		t.Fatalf("peers: %v, %v", peers, err)
	}
	return peers[0]
}

// pathMTU is what a daemon says of its only peer's path.
func pathMTU(t *testing.T, d *lab.Daemon) (announced, path int) {
	t.Helper()
	p := peerOf(t, d)
	return p.MTU, p.Path
}

// wantPathMTU waits for it while containers talk.
func wantPathMTU(t *testing.T, talk func(), mtu int, daemons ...*lab.Daemon) {
	t.Helper()
	wantPath(t, func(p onlyPeer) int { return p.Path }, talk, mtu, daemons...)
}

// wantPathMTU6 is wantPathMTU for IPv6.
func wantPathMTU6(t *testing.T, talk func(), mtu int, daemons ...*lab.Daemon) {
	t.Helper()
	wantPath(t, func(p onlyPeer) int { return p.Path6 }, talk, mtu, daemons...)
}

func wantPath(t *testing.T, path func(onlyPeer) int, talk func(), mtu int, daemons ...*lab.Daemon) {
	t.Helper()
	last := 0
	for _, d := range daemons {
		lab.EventuallyWithinOr(t, 40*time.Second, func() string {
			return fmt.Sprintf("%s: path MTU %d, want %d\n%s", d.Host.Name, last, mtu, d.LogText())
		}, func() bool {
			talk()
			last = path(peerOf(t, d))
			return last == mtu
		})
	}
}

// widen gives a container's interface a larger MTU, so that its kernel sends what the path must judge.
func widen(t *testing.T, m *member, mtu int) {
	t.Helper()
	if err := m.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(link, mtu)
	}); err != nil {
		t.Fatal(err)
	}
}

// bigTransfers moves data both ways and checks every byte.
func bigTransfers(t *testing.T, a, b *member, size int64) {
	t.Helper()
	if err := a.Upload(port(b.addr, 8080), size); err != nil {
		t.Errorf("upload: %v", err)
	}
	if err := a.Download(port(b.addr, 8080), size); err != nil {
		t.Errorf("download: %v", err)
	}
}

// tooBig fails the test unless a ping with DF of that size (inner packet) is answered with frag-needed, or packet-too-big, and mtu.
func tooBig(t *testing.T, from *member, to netip.Addr, size, mtu int) {
	t.Helper()
	r, err := from.PingWith(to, lab.PingOptions{Count: 3, Size: size - echoHeaders(to), DontFrag: true, Interval: 300 * time.Millisecond})
	if err != nil || r.Received != 0 || len(r.Errors) == 0 {
		t.Errorf("ping of %d bytes with DF: %v, %v; want frag-needed", size, r, err)
		return
	}
	kind, code := byte(3), byte(4)
	if to.Is6() {
		kind, code = 2, 0
	}
	if e := r.Errors[0]; e.Type != kind || e.Code != code || e.MTU != mtu || e.From != from.router(to) {
		t.Errorf("got %+v, want frag-needed with MTU %d from %s", e, mtu, from.router(to))
	}
}

// crosses fails the test unless pings with DF of that size (inner packet) are answered.
func crosses(t *testing.T, from *member, to netip.Addr, size int) {
	t.Helper()
	r, err := from.PingWith(to, lab.PingOptions{Count: 3, Size: size - echoHeaders(to), DontFrag: true})
	if err != nil || r.Lost() != 0 {
		t.Errorf("ping of %d bytes with DF: %v, %v", size, r, err)
	}
}

func TestMTU_NarrowPathIsFoundAndTold(t *testing.T) {
	t.Parallel()
	for _, silent := range []bool{false, true} {
		name := map[bool]string{false: "routers say so", true: "black hole"}[silent]
		t.Run(name, func(t *testing.T) {
			l := lab.New(t, 1)
			tunnel := l.Tunnel(1400)
			if silent {
				tunnel.Silence()
			}
			d1 := upEmbedded(l.Host(1))
			d2 := tunnel.Far.Up("--etcd-endpoints", etcdURL(l.Host(1)))
			waitPeers(t, 1, d1, d2)
			a, b := join(t, l.Host(1), "a"), join(t, tunnel.Far, "b")
			b.HTTPServer(t, port(b.addr, 8080))

			// The first thing that happens on this path, before anything was probed.
			bigTransfers(t, a, b, 20<<20)
			const narrow = 1400 - 28
			talk := func() { pings(t, a.Space, b.addr) }
			wantPathMTU(t, talk, narrow, d1, d2)
			if announced, _ := pathMTU(t, d1); announced != overlayMTU {
				t.Errorf("announced MTU %d, want %d", announced, overlayMTU)
			}
			bigTransfers(t, a, b, 50<<20)

			crosses(t, a, b.addr, narrow)
			crosses(t, b, a.addr, narrow)
			tooBig(t, a, b.addr, narrow+1, narrow)
			tooBig(t, b, a.addr, overlayMTU, narrow)
			r, err := a.PingWith(b.addr, lab.PingOptions{Count: 3, Size: 4000})
			if err != nil || r.Lost() != 0 {
				t.Errorf("ping that may be fragmented: %v, %v", r, err)
			}
			seen := b.UDPEcho(t, port(b.addr, 9000))
			if err := a.EchoUDP(port(b.addr, 9000), 9000); err != nil || len(seen) == 0 {
				t.Errorf("UDP of 9000 bytes: %v", err)
			}
			for _, d := range []*lab.Daemon{d1, d2} {
				if c := d.Status().Counters["path_mtu"]; c["narrow_peers"] != 1 || c["probes_sent"] == 0 || c["probes_sent"] > 300 {
					t.Errorf("%s: counters %v", d.Host.Name, c)
				}
			}
		})
	}
}

func TestMTU_PathThatNarrowsIsNoticed(t *testing.T) {
	t.Parallel()
	for _, silent := range []bool{false, true} {
		name := map[bool]string{false: "routers say so", true: "black hole"}[silent]
		t.Run(name, func(t *testing.T) {
			l := lab.New(t, 1)
			tunnel := l.Tunnel(1500)
			d1 := upEmbedded(l.Host(1))
			d2 := tunnel.Far.Up("--etcd-endpoints", etcdURL(l.Host(1)))
			waitPeers(t, 1, d1, d2)
			a, b := join(t, l.Host(1), "a"), join(t, tunnel.Far, "b")
			b.HTTPServer(t, port(b.addr, 8080))
			bigTransfers(t, a, b, 20<<20)
			crosses(t, a, b.addr, overlayMTU)

			if silent {
				tunnel.Silence()
			}
			tunnel.SetMTU(1420)
			bigTransfers(t, a, b, 20<<20) // within the client's limit, though the path is a new one
			wantPathMTU(t, func() { pings(t, a.Space, b.addr) }, 1420-28, d1, d2)
			tooBig(t, a, b.addr, overlayMTU, 1420-28)
			crosses(t, a, b.addr, 1420-28)
		})
	}
}

// A node that still takes the path for narrow answers the probes of one that asks anew, in fragments if need be: or both would stay
// at what they once found.
func TestMTU_PathThatWidensIsNoticedByANodeThatAsksAnew(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	tunnel := l.Tunnel(1400)
	d1 := upEmbedded(l.Host(1))
	far := func() *lab.Daemon { return tunnel.Far.Up("--etcd-endpoints", etcdURL(l.Host(1))) }
	d2 := far()
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, tunnel.Far, "b")
	wantPathMTU(t, func() { pings(t, a.Space, b.addr) }, 1400-28, d1, d2)

	tunnel.SetMTU(1500)
	d2.Stop()
	d2 = far()
	waitPeers(t, 1, d2)
	wantPathMTU(t, func() { pings(t, b.Space, a.addr) }, overlayMTU, d2)
	if _, path := pathMTU(t, d1); path != 1400-28 {
		t.Errorf("the other node did not keep what it knew: path MTU %d", path)
	}
	crosses(t, b, a.addr, overlayMTU)
}

// By itself: how large packets are depends on who else sends.
func TestMTU_JumboUnderlayIsUsedInFull(t *testing.T) {
	const jumbo = 9000 - 28
	l := lab.New(t, 2, lab.WithMTU(9000))
	d1 := upEmbedded(l.Host(1))
	d2 := l.Host(2).Up("--etcd-endpoints", etcdURL(l.Host(1)))
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	if s := d1.Status(); s.MTU != jumbo {
		t.Errorf("overlay MTU %d, want %d", s.MTU, jumbo)
	}
	if i := eth0(t, a.Space); i.MTU != jumbo {
		t.Errorf("the container's interface has MTU %d, want %d", i.MTU, jumbo)
	}
	b.HTTPServer(t, port(b.addr, 8080))
	crosses(t, a, b.addr, jumbo)
	wantPathMTU(t, func() { pings(t, a.Space, b.addr) }, jumbo, d1)
	widen(t, a, 20000)
	tooBig(t, a, b.addr, jumbo+1, jumbo)
	widen(t, a, jumbo)
	b.UDPEcho(t, port(b.addr, 9000))
	for _, size := range []int{jumbo - 28, jumbo - 27, 30000, 65507} {
		if err := a.EchoUDP(port(b.addr, 9000), size); err != nil {
			t.Errorf("UDP, %d bytes: %v", size, err)
		}
	}

	before1, before2 := d1.Status().Counters, d2.Status().Counters
	const size = 64 << 20
	if err := a.Upload(port(b.addr, 8080), size); err != nil {
		t.Fatal(err)
	}
	after1, after2 := d1.Status().Counters, d2.Status().Counters
	packets := delta(t, before1, after1, "underlay", "sent_packets")
	trains := delta(t, before1, after1, "underlay", "sent_trains")
	reads, writes := delta(t, before1, after1, "tap", "reads"), delta(t, before2, after2, "tap", "writes")
	t.Logf("%d MB: %d packets in %d trains, %d TAP reads, %d TAP writes at the receiver", size>>20, packets, trains, reads, writes)
	const least = size / (jumbo - 52)
	if packets < least || packets > least+least/4 {
		t.Errorf("%d packets for %d MB, want about %d: packets are not as large as they may be", packets, size>>20, least)
	}
	for what, n := range map[string]uint64{"trains": trains, "TAP reads": reads, "TAP writes at the receiver": writes} {
		if n > packets/3 {
			t.Errorf("%d %s for %d packets: superpackets are cut", n, what, packets)
		}
	}
}

// By itself: how large packets are depends on who else sends.
func TestMTU_LargestUnderlayIsUsed(t *testing.T) {
	l := lab.New(t, 2, lab.WithMTU(65535))
	d1 := upEmbedded(l.Host(1))
	d2 := l.Host(2).Up("--etcd-endpoints", etcdURL(l.Host(1)))
	waitPeers(t, 1, d1, d2)
	a, b := join(t, l.Host(1), "a"), join(t, l.Host(2), "b")
	const largest = 65535 - 28
	if s := d1.Status(); s.MTU != largest {
		t.Errorf("overlay MTU %d, want %d", s.MTU, largest)
	}
	b.HTTPServer(t, port(b.addr, 8080))
	crosses(t, a, b.addr, largest)
	wantPathMTU(t, func() { pings(t, a.Space, b.addr) }, largest, d1)
	bigTransfers(t, a, b, 50<<20)
}
