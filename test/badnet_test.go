// Tests of the network's bad days: cables and interfaces that go down, hosts that come back as others, ways that are closed in one direction, paths
// that lose, double, reorder or swallow packets, and nodes that sleep for longer than their lease.

package test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// badSite is two nodes whose store is on a third host, which stays well.
type badSite struct {
	*lab.Lab
	etcd   *lab.Etcd
	client *clientv3.Client
	h1, h2 *lab.Host
	d1, d2 *lab.Daemon
}

func newBadSite(t *testing.T, flags ...string) *badSite {
	t.Helper()
	l, e, client := withEtcd(t, 2)
	s := &badSite{Lab: l, etcd: e, client: client, h1: l.Host(1), h2: l.Host(2)}
	s.d1 = s.h1.Up(append([]string{"--etcd-endpoints", e.Endpoint, "--network", network.String()}, flags...)...)
	s.d2 = s.h2.Up(append([]string{"--etcd-endpoints", e.Endpoint}, flags...)...)
	waitPeers(t, 1, s.d1, s.d2)
	return s
}

// reaches waits until an echo comes back.
func reaches(t *testing.T, from, to *member) {
	t.Helper()
	lab.EventuallyWithin(t, 90*time.Second, from.Name+" reaches "+to.Name, func() bool {
		r, err := from.Ping(to.addr, 1)
		return err == nil && r.Received == 1
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestBadNet_CablesAndInterfacesGoDownAndComeBack(t *testing.T) {
	t.Parallel()
	s := newSite(t) // the first host has the store, too
	a, b, c := join(t, s.h1, "a"), join(t, s.h2, "b"), join(t, s.h2, "c")
	b.HTTPServer(t, port(b.addr, 8080))
	talk := converse(t, a, b)
	talk.goesOn(t)
	before := s.d2.Status()
	for _, way := range []struct {
		what     string
		down, up func() error
	}{
		{"the cable of the peer", s.h2.Unplug, s.h2.Plug}, {"its interface", s.h2.LinkDown, s.h2.LinkUp},
		{"the interface of the host with the store", s.h1.LinkDown, s.h1.LinkUp},
	} {
		must(t, way.down())
		noPing(t, a.Space, b.addr)
		pings(t, c.Space, b.addr) // on one host nothing changes
		must(t, way.up())
		reaches(t, a, b)
		reaches(t, b, a)
		talk.goesOn(t)
		if t.Failed() {
			t.Fatalf("after %s was down", way.what)
		}
	}
	lab.Eventually(t, "the store is back for both", func() bool {
		s1, s2 := s.d1.Status(), s.d2.Status()
		return s1.Store.Connected && s2.Store.Connected && s1.Problem == "" && s2.Problem == ""
	})
	if now := s.d2.Status(); now.Subnet != before.Subnet || now.PublicIP != before.PublicIP || now.Port != before.Port || now.PID != before.PID {
		t.Errorf("status %+v, before %+v", now, before)
	}
	bigTransfers(t, a, b, 1<<20)
}

func TestBadNet_AddressChangesWhileTheStoreIsAway(t *testing.T) {
	t.Parallel()
	s := newBadSite(t)
	a, b, c := join(t, s.h1, "a"), join(t, s.h2, "b"), join(t, s.h2, "c")
	talk := converse(t, a, b)
	talk.goesOn(t)
	before := s.d2.Status()
	s.etcd.Freeze()
	must(t, s.h2.LoseAddress())
	must(t, s.h2.GetAddress(newAddr))
	lab.Eventually(t, "the node has seen it", func() bool { return s.d2.Status().PublicIP == newAddr.String() })
	pings(t, c.Space, b.addr)
	noPing(t, a.Space, b.addr) // nobody can know where the peer is
	s.etcd.Thaw()
	lab.EventuallyWithin(t, time.Minute, "the peer sends to the new address", func() bool { return peerAddress(t, s.d1) == newAddr.String() })
	reaches(t, a, b)
	talk.goesOn(t)
	if now := s.d2.Status(); now.Subnet != before.Subnet || now.PID != before.PID {
		t.Errorf("status %+v, before %+v", now, before)
	}
	if all := keys(t, s.client, prefix+"/subnets"); len(all) != 2 {
		t.Errorf("leases %v", all)
	}
}

// reboot ends everything of a host, with what a reboot takes along.
func reboot(t *testing.T, h *lab.Host, d *lab.Daemon, containers ...*member) {
	t.Helper()
	d.Kill()
	for _, c := range containers {
		c.Stop()
	}
	must(t, os.RemoveAll(d.RuntimeDir))
	id := filepath.Join(h.Dir, "boot_id")
	must(t, os.WriteFile(id, []byte("00000000-0000-4000-8000-00000000000b\n"), 0o644))
	must(t, h.Do(func() error { return unix.Mount(id, "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, "") }))
}

func TestBadNet_PeerReboots(t *testing.T) {
	t.Parallel()
	s := newBadSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	pings(t, a.Space, b.addr)
	before := s.d2.Status()
	reboot(t, s.h2, s.d2, b)
	s.d2 = s.h2.Up("--etcd-endpoints", s.etcd.Endpoint)
	now := s.d2.Status()
	if now.Subnet != before.Subnet || now.NodeID != before.NodeID || now.Attachments != 0 {
		t.Errorf("status %+v, before %+v", now, before)
	}
	c := join(t, s.h2, "b") // the name is free
	reaches(t, a, c)
	reaches(t, c, a)

	// The host is installed anew, and its old lease deleted, as the refusal says.
	s.d2.Kill()
	c.Stop()
	must(t, os.RemoveAll(filepath.Join(s.h2.Home(), ".local", "state", "rootless-ovl")))
	upRefused(t, s.h2, []string{"--etcd-endpoints", s.etcd.Endpoint}, "delete the key", before.Subnet)
	if _, err := s.client.Delete(t.Context(), subnetKey(before.Subnet)); err != nil {
		t.Fatal(err)
	}
	s.d2 = s.h2.Up("--etcd-endpoints", s.etcd.Endpoint)
	if again := s.d2.Status(); again.NodeID == before.NodeID {
		t.Errorf("the same node id, %s", again.NodeID)
	}
	subnet := s.d2.Status().Subnet
	lab.Eventually(t, "the peer has that subnet alone", func() bool { return s.d1.Status().Peers == 1 && peerOf(t, s.d1).Subnet == subnet })
	d := join(t, s.h2, "d")
	reaches(t, a, d)
	reaches(t, d, a)
}

// seenPeer is what a user is told of the only peer.
type seenPeer struct {
	Problem   string    `json:"problem"`
	LastHeard time.Time `json:"last_heard"`
}

func TestBadNet_APeerThatIsReachedOneWayOnlyIsShown(t *testing.T) {
	t.Parallel()
	s := newBadSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	pings(t, a.Space, b.addr)
	look := func(h *lab.Host) seenPeer {
		var peers []seenPeer
		h.CLIJSON(&peers, "peers")
		if len(peers) != 1 {
			t.Fatalf("peers %+v", peers)
		}
		return peers[0]
	}
	if p := look(s.h1); p.Problem != "" || p.LastHeard.IsZero() {
		t.Errorf("all is well, and the peer is shown as %+v", p)
	}

	must(t, s.h2.ImpairWays(lab.Impairment{Loss: 1}, lab.Impairment{})) // what it sends is lost
	ping, err := a.StartPing(b.addr, lab.PingOptions{Interval: 200 * time.Millisecond})
	must(t, err)
	defer ping.Stop()
	for h, words := range map[*lab.Host]string{s.h1: "nothing was received from it", s.h2: "packets come from it"} {
		lab.EventuallyWithin(t, 90*time.Second, h.Name+" shows it", func() bool { return strings.Contains(look(h).Problem, words) })
	}
	if c := s.d1.Status().Counters["path_mtu"]; c["silent_peers"] != 1 {
		t.Errorf("counters %v", c)
	}
	if r := s.h1.CLI("status"); !strings.Contains(r.Stdout, "without an answer: 1") {
		t.Errorf("status says\n%s%s", r.Stdout, r.Stderr)
	}
	if s.d1.Status().Peers != 1 {
		t.Error("the peer is gone")
	}
	heard := look(s.h1).LastHeard
	must(t, s.h2.Mend())
	reaches(t, a, b)
	for _, h := range []*lab.Host{s.h1, s.h2} {
		lab.EventuallyWithin(t, 90*time.Second, h.Name+" shows that it is over", func() bool {
			reaches(t, a, b)
			reaches(t, b, a)
			return look(h).Problem == ""
		})
	}
	lab.Eventually(t, "it is heard again", func() bool { return look(s.h1).LastHeard.After(heard) })
	for _, d := range []*lab.Daemon{s.d1, s.d2} {
		for _, line := range []string{"peer answers nothing that it is asked", "peer answers again"} {
			if n := strings.Count(d.LogText(), line); n != 1 {
				t.Errorf("%d lines of %q:\n%s", n, line, d.LogText())
			}
		}
	}
}

func TestBadNet_LostDoubledAndReorderedPacketsHarmNoContent(t *testing.T) {
	t.Parallel()
	s := newBadSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	b.HTTPServer(t, port(b.addr, 8080))
	b.UDPEcho(t, port(b.addr, 9000))
	must(t, s.h2.Impair(lab.Impairment{Duplicate: 0.2, Reorder: 0.1}))
	r, err := a.PingWith(b.addr, lab.PingOptions{Count: 100, Interval: 5 * time.Millisecond})
	if err != nil || r.Lost() != 0 || r.Duplicates == 0 {
		t.Errorf("ping: %v, %d duplicates, %v; want all, and some twice", r, r.Duplicates, err)
	}
	bigTransfers(t, a, b, 1<<20)
	must(t, s.h2.Impair(lab.Impairment{Loss: 0.01, Duplicate: 0.05, Reorder: 0.05, Jitter: time.Millisecond}))
	bigTransfers(t, a, b, 1<<20)
	for _, size := range []int{100, overlayMTU - 28, 4000} {
		if err := a.EchoUDP(port(b.addr, 9000), size); err != nil {
			t.Errorf("UDP of %d bytes: %v", size, err)
		}
	}
	must(t, s.h2.Mend())
	pings(t, a.Space, b.addr)
}

func TestBadNet_ABlackHoleInTheMiddleOfATransfer(t *testing.T) {
	t.Parallel()
	s := newBadSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	b.HTTPServer(t, port(b.addr, 8080))
	talk := converse(t, a, b)
	talk.goesOn(t)
	bigTransfers(t, a, b, 1<<20)
	crosses(t, a, b.addr, overlayMTU)
	must(t, s.h2.Impair(lab.Impairment{Delay: 20 * time.Millisecond})) // so that it takes a while
	sent := s.d1.Status().Counters
	done := make(chan error, 1)
	go func() { done <- a.Upload(port(b.addr, 8080), 16<<20) }()
	lab.Eventually(t, "the transfer is under way", func() bool {
		return delta(t, sent, s.d1.Status().Counters, "underlay", "sent_packets") > 100
	})
	const narrow = 1300
	must(t, s.h2.Impair(lab.Impairment{MaxPacket: narrow}))
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("upload: %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Errorf("the transfer hangs\n%s", s.d1.LogText())
	}
	talk.goesOn(t)
	wantPathMTU(t, func() { pings(t, a.Space, b.addr) }, narrow-28, s.d1)
	bigTransfers(t, a, b, 1<<20)
}

// sleepLong stops daemons as a host that is suspended, until the store has none of their leases.
func (s *badSite) sleepLong(t *testing.T, daemons ...*lab.Daemon) (subnets []string) {
	t.Helper()
	for _, d := range daemons {
		subnets = append(subnets, d.Status().Subnet)
	}
	for _, d := range daemons {
		d.Signal(unix.SIGSTOP)
	}
	lab.EventuallyWithin(t, 90*time.Second, "the leases expire", func() bool {
		for _, subnet := range subnets {
			if len(keys(t, s.client, subnetKey(subnet))) != 0 {
				return false
			}
		}
		return true
	})
	time.Sleep(10 * time.Second) // in all for longer than a busy host may keep a daemon waiting
	return subnets
}

func TestBadNet_NodesSleepForLongerThanTheirLease(t *testing.T) {
	t.Parallel()
	s := newBadSite(t, "--lease-ttl", "6s")
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	a.HTTPServer(t, port(a.addr, 8080))
	talk := converse(t, b, a)
	talk.goesOn(t)
	for what, daemons := range map[string][]*lab.Daemon{"one": {s.d2}, "all": {s.d1, s.d2}} {
		attached := s.d2.Attachments()
		subnets := s.sleepLong(t, daemons...)
		for _, d := range daemons {
			d.Signal(unix.SIGCONT)
		}
		for i, d := range daemons {
			lab.EventuallyWithin(t, time.Minute, d.Host.Name+" has its lease again", func() bool { return len(keys(t, s.client, subnetKey(subnets[i]))) == 1 })
			if now := d.Status(); now.Subnet != subnets[i] || now.State != "ready" {
				t.Errorf("%s slept: status %+v, had the subnet %s", what, now, subnets[i])
			}
			lab.Eventually(t, "the log tells", func() bool { return strings.Contains(d.LogText(), "did not run for a while") })
		}
		reaches(t, a, b)
		reaches(t, b, a)
		talk.goesOn(t)
		if now := s.d2.Attachments(); len(now) != len(attached) || now[0].Addr != attached[0].Addr {
			t.Errorf("%s slept: attachments %+v, before %+v", what, now, attached)
		}
		waitPeers(t, 1, s.d1, s.d2)
	}
}

// The subnet of a node that sleeps may be another's when it wakes up: then it takes another, and says which containers have to be attached again.
func TestBadNet_ASleeperWhoseSubnetIsTakenGetsAnother(t *testing.T) {
	t.Parallel()
	s := newBadSite(t, "--lease-ttl", "6s")
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	pings(t, a.Space, b.addr)
	old := s.sleepLong(t, s.d2)[0]
	theirs, err := json.Marshal(map[string]any{"PublicIP": "192.0.2.200", "BackendType": "udp"})
	must(t, err)
	put(t, s.client, subnetKey(old), string(theirs))
	s.d2.Signal(unix.SIGCONT)
	lab.EventuallyWithin(t, time.Minute, "it has another subnet", func() bool {
		now := s.d2.Status()
		return now.State == "ready" && now.Subnet != old && len(keys(t, s.client, subnetKey(now.Subnet))) == 1
	})
	if v := keys(t, s.client, subnetKey(old))[subnetKey(old)]; v != string(theirs) {
		t.Errorf("the other node's lease is now %s", v)
	}
	c := join(t, s.h2, "c")
	reaches(t, a, c)
	reaches(t, c, a)
	if at := s.d2.Attachments(); len(at) != 2 {
		t.Errorf("attachments %+v", at)
	}
}
