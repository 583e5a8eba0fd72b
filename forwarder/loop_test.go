// This file tests the poll loops: running, stopping, leaving nothing behind, and the promise of RemovePort.

package forwarder

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/internal/nettest"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// descriptors is the number of open descriptors of the process.
func descriptors(t testing.TB) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

// start runs r until the test ends or stop is called.
func start(t testing.TB, r *Router) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("Run does not return")
		}
	})
	t.Cleanup(stop)
	return stop
}

func TestRun_ForwardsBothWays(t *testing.T) {
	g := newRig(t)
	start(t, g.Router)
	for range 100 {
		g.a.Inject(pkt(udp(containerA, containerB, 100)), pkt(udp(containerA, outside, 100)))
		if _, err := g.peer.WriteToUDPAddrPort(udp(containerC, containerA, 100), g.Underlay()); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range []*nettest.Recorder{g.a.Recorder, g.b.Recorder, g.egress} {
		r.Wait(t, 100)
	}
	g.wantDrops(nil)
}

func TestRun_StopsAndLeaksNothing(t *testing.T) {
	fds, routines := descriptors(t), runtime.NumGoroutine()
	for range 5 {
		r := newRouter(t, 3)
		stop := start(t, r)
		stop()
	}
	r := newRouter(t, 2)
	r.Close() // never run
	r.Close()
	if n := descriptors(t); n != fds {
		t.Errorf("%d descriptors, before %d", n, fds)
	}
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > routines && time.Now().Before(deadline); {
		runtime.Gosched()
	}
	if n := runtime.NumGoroutine(); n > routines {
		t.Errorf("%d goroutines, before %d", n, routines)
	}
}

func TestClose_LetsInjectorsCallOn(t *testing.T) {
	g := newRig(t)
	inj := g.NewInjector()
	stop := start(t, g.Router)
	var calls atomic.Uint64
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-quit:
				return
			default:
				inj.Forward([]*packet.Packet{pkt(udp(gateway, containerC, 10))})
				calls.Add(1)
			}
		}
	})
	for calls.Load() < 100 {
		runtime.Gosched()
	}
	stop()
	sent := g.Stats().Underlay.SentPackets
	for n := calls.Load(); calls.Load() < n+100; {
		runtime.Gosched()
	}
	close(quit)
	wg.Wait()
	if now := g.Stats().Underlay.SentPackets; now != sent {
		t.Errorf("%d packets sent by a router that has stopped", now-sent)
	}
	if _, err := g.AddPort(PortConfig{Name: "late", Device: nettest.NewDevice(t), Sources: []netip.Prefix{alone(netip.MustParseAddr("10.1.0.8"))}}); err == nil {
		t.Error("a port was added to a router that has stopped")
	}
	g.RemovePort(g.portA)
}

func TestRun_SpreadsPortsOverLoops(t *testing.T) {
	r := newRouter(t, 3)
	var routes []Route
	var devices []*nettest.Device
	seen := make(map[*loop]int)
	for i := range 9 {
		a := netip.AddrFrom4([4]byte{10, 1, 0, byte(10 + i)})
		d := nettest.NewDevice(t)
		p, err := r.AddPort(PortConfig{Name: a.String(), Sources: []netip.Prefix{alone(a)}, Device: d})
		if err != nil {
			t.Fatal(err)
		}
		seen[p.loop]++
		devices, routes = append(devices, d), append(routes, Route{netip.PrefixFrom(a, 32), ToPort(p)})
	}
	for _, n := range seen {
		if n != 3 {
			t.Errorf("ports per loop: %v, want 3 each", seen)
		}
	}
	// Many peers and containers: the kernel spreads the datagrams over the sockets, every one of which must be read.
	const peers = 40
	for i := range peers {
		c := udpSocket(t)
		a := netip.AddrFrom4([4]byte{10, 2, byte(i), 1})
		routes = append(routes, Route{netip.PrefixFrom(a, 32), ToPeer(PeerConfig{Addr: addrPort(c), MTU: peerMTU})})
		if _, err := c.WriteToUDPAddrPort(udp(a.String(), netip.AddrFrom4([4]byte{10, 1, 0, byte(10 + i%9)}).String(), 10), r.Underlay()); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.SetTable(TableConfig{Routes: routes}); err != nil {
		t.Fatal(err)
	}
	start(t, r)
	for i, d := range devices {
		d.Wait(t, (peers+8-i)/9)
	}
	for i := range devices { // every container to the next, over all loops
		devices[i].Inject(pkt(udp(netip.AddrFrom4([4]byte{10, 1, 0, byte(10 + i)}).String(), netip.AddrFrom4([4]byte{10, 1, 0, byte(10 + (i+1)%9)}).String(), 10)))
	}
	for i, d := range devices {
		d.Wait(t, 1+(peers+8-i)/9)
	}
	used := 0
	for _, l := range r.loops {
		if l.rxq.stats.trains.Load() > 0 {
			used++
		}
	}
	if used < 2 {
		t.Errorf("%d of 3 sockets got datagrams of %d peers", used, peers)
	}
}

// closable is a device that knows when it may not be touched any more.
type closable struct {
	*nettest.Device
	t      *testing.T
	closed atomic.Bool
	sent   atomic.Uint64
}

func (c *closable) touch() {
	if c.closed.Load() {
		c.t.Error("the device was touched after RemovePort returned")
	}
}

func (c *closable) Send(_ *packet.Scratch, pkts []*packet.Packet) {
	c.touch()
	c.sent.Add(uint64(len(pkts)))
	runtime.Gosched() // let RemovePort in
	c.touch()
}

func (c *closable) Read(rx *packet.Rx) error {
	c.touch()
	err := c.Device.Read(rx)
	c.touch()
	return err
}

func TestRemovePort_QuiescesUnderLoad(t *testing.T) {
	r := newRouter(t, 2)
	start(t, r)
	peer := udpSocket(t)
	peerRoute := Route{netip.MustParsePrefix("10.2.0.0/16"), ToPeer(PeerConfig{Addr: addrPort(peer), MTU: peerMTU})}
	addr := netip.MustParseAddr(containerA)
	inj := r.NewInjector()
	quit := make(chan struct{})
	var wg sync.WaitGroup
	loop := func(f func()) {
		wg.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
					f()
				}
			}
		})
	}
	loop(func() { inj.Forward([]*packet.Packet{pkt(udp(gateway, containerA, 10))}) })
	loop(func() { _, _ = peer.WriteToUDPAddrPort(udp(containerC, containerA, 10), r.Underlay()) })
	loop(func() { r.Stats() })
	for range 150 {
		d := &closable{Device: nettest.NewDevice(t), t: t}
		p, err := r.AddPort(PortConfig{Name: "a", Sources: []netip.Prefix{alone(addr)}, Device: d})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.SetTable(TableConfig{Routes: []Route{peerRoute, {netip.PrefixFrom(addr, 32), ToPort(p)}}}); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			d.Inject(pkt(udp(containerA, containerC, 10)), pkt(udp(containerA, containerA, 10)))
		}
		for d.sent.Load() == 0 {
			runtime.Gosched()
		}
		r.RemovePort(p) // the table still routes to it
		d.closed.Store(true)
		r.RemovePort(p)
	}
	close(quit)
	wg.Wait()
}

func TestRemovePort_CountsWhatIsOnItsWay(t *testing.T) {
	g := newRig(t)
	g.RemovePort(g.portB)
	g.fromA(pkt(udp(containerA, containerB, 1)), pkt(udp(containerA, containerB, 1)))
	g.wantDrops(map[string]uint64{"attachment-gone": 2})
	if len(g.b.Take()) != 0 {
		t.Error("a removed port was sent packets")
	}
	g.b.Inject(pkt(udp(containerB, containerA, 1)))
	g.loops[0].readPort(1)
	if len(g.a.Take()) != 0 {
		t.Error("a removed port was read")
	}
}

func TestRun_SaysOnceThatADeviceIsGone(t *testing.T) {
	g := newRig(t)
	gone := make(chan error, 10)
	d := nettest.NewDevice(t)
	p, err := g.AddPort(PortConfig{Name: "x", Sources: []netip.Prefix{alone(netip.MustParseAddr("10.1.0.8"))}, Device: d, Gone: func(err error) { gone <- err }})
	if err != nil {
		t.Fatal(err)
	}
	start(t, g.Router)
	lost := errors.New("it was deleted")
	d.Inject(pkt(udp("10.1.0.8", containerB, 1)))
	d.Fail(lost)
	if err := <-gone; !errors.Is(err, lost) {
		t.Errorf("Gone(%v)", err)
	}
	g.b.Wait(t, 1) // what was read before is forwarded
	d.Fail(lost)
	g.a.Inject(pkt(udp(containerA, containerB, 1)))
	g.b.Wait(t, 2)
	g.RemovePort(p)
	if len(gone) != 0 {
		t.Error("said twice")
	}
}

func TestAddPort_TakesOverTheSlotOfARemovedOne(t *testing.T) {
	g := newRig(t)
	start(t, g.Router)
	a := netip.MustParseAddr("10.1.0.8")
	for range 50 {
		d := nettest.NewDevice(t)
		p, err := g.AddPort(PortConfig{Name: "x", Sources: []netip.Prefix{alone(a)}, Device: d})
		if err != nil {
			t.Fatal(err)
		}
		d.Inject(pkt(udp(a.String(), containerB, 1)))
		g.b.Wait(t, 1)
		g.b.Take()
		g.RemovePort(p)
	}
	if n := len(*g.loops[0].slots.Load()); n != 3 {
		t.Errorf("%d slots for 3 ports", n)
	}
}

func TestAddPort_LeavesNothingOfAFailure(t *testing.T) {
	g := newRig(t)
	f, err := os.Create(t.TempDir() + "/file") // epoll takes no regular files
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = g.AddPort(PortConfig{Name: "web", Sources: []netip.Prefix{alone(netip.MustParseAddr("10.1.0.8"))}, Device: fileDevice{nettest.NewDevice(t), int(f.Fd())}})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "web") {
		t.Errorf("error %v", err)
	}
	if len(g.ports) != 2 || len(*g.loops[0].slots.Load()) != 2 {
		t.Error("the port is there in part")
	}
}

type fileDevice struct {
	*nettest.Device
	fd int
}

func (d fileDevice) FD() int { return d.fd }

func TestAttend_PollsUntilItIsLeft(t *testing.T) {
	r := newRouter(t, 2)
	stopped := newRouter(t, 1)
	stopped.Close()
	if _, err := stopped.Attend(0, func() {}); !errors.Is(err, errStopped) {
		t.Errorf("a stopped router: %v", err)
	}
	start(t, r)
	for range 2 { // the second guest comes after the first has left
		pipe := [2]int{}
		if err := unix.Pipe2(pipe[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		polled := make(chan struct{}, 1)
		left := false
		leave, err := r.Attend(pipe[0], func() {
			if left {
				t.Error("polled after it was left")
			}
			select {
			case polled <- struct{}{}:
			default:
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(pipe[1], []byte{1}); err != nil {
			t.Fatal(err)
		}
		<-polled // the byte is never read, so it goes on
		leave()
		left = true
	}
}

// turner is a gateway that notes in which order it is called.
type turner struct{ calls chan string }

func (g turner) Begin() packet.Turn                     { g.calls <- "begin"; return g }
func (g turner) Send(*packet.Scratch, []*packet.Packet) { g.calls <- "send" }
func (g turner) End()                                   { g.calls <- "end" }

func TestLoop_SendsWithinATurn(t *testing.T) {
	g := newRig(t)
	gw := turner{make(chan string, 8)}
	if err := g.SetTable(TableConfig{Routes: []Route{{netip.MustParsePrefix(gateway + "/32"), ToGateway(gw)}}}); err != nil {
		t.Fatal(err)
	}
	start(t, g.Router)
	g.a.Inject(pkt(udp(containerA, gateway, 1)))
	for _, want := range []string{"begin", "send", "end"} {
		if got := <-gw.calls; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
