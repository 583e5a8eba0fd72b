// Tests of connections made inside real namespaces, by a process without a capability. The servers in them are sockets of the namespace too.

package nsutil

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

var (
	inside4 = netip.MustParseAddr("10.5.1.2")
	inside6 = netip.MustParseAddr("fd00:5:1::2")
)

// attached is a namespace with a TAP that nobody reads: what leaves by it is lost.
func attached(t *testing.T, m mapping) (*holder, *Namespace) {
	t.Helper()
	h := startHolder(t, m)
	n := open(t, h.pid)
	tap, err := n.CreateTAP(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tap.Delete() })
	return h, n
}

func openInside(t *testing.T, n *Namespace) *Inside {
	t.Helper()
	in, err := n.OpenInside(InsideConfig{IfName: "eth0", Addrs: []netip.Addr{inside4, inside6}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := in.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	for i, no := range in.no {
		if no != nil {
			t.Fatalf("family %d is not supported: %v", i, no)
		}
	}
	return in
}

// serveInside has a server of the namespace call serve for each connection.
func serveInside(t *testing.T, n *Namespace, at netip.AddrPort, serve func(c *net.TCPConn)) netip.AddrPort {
	t.Helper()
	w := wish{talks: noTalk, stream4: 1}
	if at.Addr().Is6() {
		w = wish{talks: noTalk, stream6: 1}
	}
	op, err := n.enterFor(w)
	if err != nil {
		t.Fatal(err)
	}
	fd := append(op.stream4, op.stream6...)[0]
	f := os.NewFile(uintptr(fd), "server")
	defer f.Close()
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, sockaddrOf(at)), unix.Listen(fd, 128)); err != nil {
		t.Fatal(err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	return netip.AddrPortFrom(at.Addr(), l.Addr().(*net.TCPAddr).AddrPort().Port())
}

// who tells clients as whom they are seen.
func who(c *net.TCPConn) {
	_, _ = io.WriteString(c, c.RemoteAddr().String())
}

func dialInside(in *Inside, from string, to netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return in.DialTCP(ctx, netip.MustParseAddrPort(from), to)
}

// seenAs is as whom the server sees a client.
func seenAs(t *testing.T, in *Inside, from string, to netip.AddrPort) string {
	t.Helper()
	c, err := dialInside(in, from, to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestInside_ServerSeesTheClientsAddress(t *testing.T) {
	for _, m := range mappings {
		for _, filter := range []string{"", "1", "2"} {
			if filter != "" && m.uid != 0 {
				continue // only root of the namespace sets it
			}
			t.Run(m.name+", rp_filter "+filter, func(t *testing.T) {
				h, n := attached(t, m)
				if filter != "" {
					for _, dev := range []string{"all", "default", "lo", "eth0"} {
						if a := h.run("sysctl", "-w", "net.ipv4.conf."+dev+".rp_filter="+filter); a.Err != "" {
							t.Fatal(a.Err)
						}
					}
				}
				in := openInside(t, n)
				at4 := serveInside(t, n, netip.AddrPortFrom(inside4, 80), who)
				at6 := serveInside(t, n, netip.AddrPortFrom(inside6, 80), who)
				for _, c := range []struct {
					from string
					to   netip.AddrPort
				}{
					{"203.0.113.7:5555", at4}, {"203.0.113.7:555", at4}, {"192.168.1.9:5555", at4},
					{"[2001:db8::7]:5555", at6}, {"[2001:db8::7]:555", at6},
				} {
					if got := seenAs(t, in, c.from, c.to); got != c.from {
						t.Errorf("%s is seen as %s", c.from, got)
					}
				}
				// The gateway, for clients whose address is not kept.
				if got := seenAs(t, in, "10.5.1.1:0", at4); !strings.HasPrefix(got, "10.5.1.1:") || got == "10.5.1.1:0" {
					t.Errorf("the gateway is seen as %s", got)
				}
			})
		}
	}
}

func TestInside_RefusalAndTimeoutAreTold(t *testing.T) {
	_, n := attached(t, mappings[0])
	in := openInside(t, n)
	for _, c := range []struct{ from, to string }{{"203.0.113.7:5555", "10.5.1.2:81"}, {"[2001:db8::7]:5555", "[fd00:5:1::2]:81"}} {
		if _, err := dialInside(in, c.from, netip.MustParseAddrPort(c.to)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v, want a refusal", c.to, err)
		}
	}
	// Its backlog is full: the kernel answers no more.
	op, err := n.enterFor(wish{talks: noTalk, stream4: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer op.close()
	full := netip.MustParseAddrPort("10.5.1.2:82")
	if err := errors.Join(unix.Bind(op.stream4[0], sockaddrOf(full)), unix.Listen(op.stream4[0], 0)); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		var c *net.TCPConn
		c, err = in.DialTCP(ctx, netip.MustParseAddrPort(fmt.Sprintf("203.0.113.7:%d", 6000+i)), full)
		cancel()
		if err != nil {
			break
		}
		defer c.Close()
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a server that does not answer: %v", err)
	}
}

func TestInside_HalfCloseAndResetPass(t *testing.T) {
	_, n := attached(t, mappings[1])
	in := openInside(t, n)
	told := make(chan error, 1)
	to := serveInside(t, n, netip.AddrPortFrom(inside4, 80), func(c *net.TCPConn) {
		b, err := io.ReadAll(c)
		if err == nil {
			_, _ = fmt.Fprintf(c, "%d bytes", len(b))
		}
		told <- err
	})
	c, err := dialInside(in, "203.0.113.7:5555", to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() {
		_, _ = c.Write(bytes.Repeat([]byte("0123456789"), 1_000_000))
		_ = c.CloseWrite()
	}()
	if b, err := io.ReadAll(c); err != nil || string(b) != "10000000 bytes" {
		t.Errorf("after a half close: %q, %v", b, err)
	}
	if err := <-told; err != nil {
		t.Errorf("the server reads %v", err)
	}
	if c, err = dialInside(in, "203.0.113.7:5556", to); err != nil {
		t.Fatal(err)
	}
	_ = c.SetLinger(0)
	c.Close()
	if err := <-told; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server reads %v after a reset", err)
	}
}

func TestInside_AFourTupleInUseGetsAnotherPort(t *testing.T) {
	_, n := attached(t, mappings[0])
	in := openInside(t, n)
	to := serveInside(t, n, netip.AddrPortFrom(inside4, 80), func(c *net.TCPConn) {
		_, _ = io.WriteString(c, c.RemoteAddr().String()+"\n")
		_, _ = io.Copy(io.Discard, c)
	})
	open := map[string]bool{}
	for range 3 {
		c, err := dialInside(in, "203.0.113.7:5555", to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		b := make([]byte, 40)
		k, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		as := strings.TrimSpace(string(b[:k]))
		if open[as] || !strings.HasPrefix(as, "203.0.113.7:") {
			t.Errorf("seen as %s, after %v", as, open)
		}
		open[as] = true
	}
	if !open["203.0.113.7:5555"] {
		t.Errorf("none has the client's port: %v", open)
	}
}

func TestInside_APortOfAServerIsNotTakenFromIt(t *testing.T) {
	_, n := attached(t, mappings[0])
	in := openInside(t, n)
	to := serveInside(t, n, netip.AddrPortFrom(netip.IPv4Unspecified(), 5555), who)
	if _, err := dialInside(in, "203.0.113.7:5555", netip.AddrPortFrom(inside4, to.Port())); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v, want ErrUnsupported", err)
	}
	if got := seenAs(t, in, "203.0.113.7:5556", netip.AddrPortFrom(inside4, to.Port())); got != "203.0.113.7:5556" {
		t.Errorf("the next client is seen as %s", got)
	}
}

func TestInside_ManyConnectionsInARow(t *testing.T) {
	_, n := attached(t, mappings[2])
	in := openInside(t, n)
	to := serveInside(t, n, netip.AddrPortFrom(inside4, 80), who)
	before := fdCount(t)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 500 {
				from := fmt.Sprintf("203.0.113.%d:%d", w+1, 2000+i)
				if i%2 == 1 { // the gateway's
					from = "10.5.1.1:0"
				}
				c, err := dialInside(in, from, to)
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
				b, err := io.ReadAll(c)
				c.Close()
				if err != nil || i%2 == 0 && string(b) != from {
					t.Errorf("connection %d: seen as %q: %v", i, b, err)
					return
				}
			}
		})
	}
	wg.Wait()
	in.pools[0].trim()
	in.pools[0].trim()
	in.pools[0].mu.Lock()
	if making := in.pools[0].making; making != nil {
		in.pools[0].mu.Unlock()
		<-making
		in.pools[0].mu.Lock()
	}
	spare := len(in.pools[0].ready)
	in.pools[0].mu.Unlock()
	if after := fdCount(t); after > before+spare+8 {
		t.Errorf("%d descriptors, %d before, %d of them spare sockets", after, before, spare)
	}
}

// trace is what an Inside leaves in a namespace.
func trace(h *holder) string {
	var b strings.Builder
	for _, f := range []string{"-4", "-6"} {
		b.WriteString(h.run("ip", f, "rule").Out)
		for _, line := range strings.Split(h.run("ip", f, "route", "show", "table", "all").Out, "\n") {
			if strings.Contains(line, "default") {
				b.WriteString(line + "\n")
			}
		}
	}
	for _, s := range insideSysctls {
		b.WriteString(h.run("cat", s).Out)
	}
	return b.String()
}

func TestInside_CloseLeavesNothing(t *testing.T) {
	for _, m := range []mapping{mappings[0], mappings[3]} {
		for _, accept := range []string{"0", "1"} {
			if accept == "1" && m.uid != 0 {
				continue
			}
			t.Run(m.name+", tcp_fwmark_accept "+accept, func(t *testing.T) {
				h, n := attached(t, m)
				if accept == "1" {
					if a := h.run("sysctl", "-w", "net.ipv4.tcp_fwmark_accept=1"); a.Err != "" {
						t.Fatal(a.Err)
					}
				}
				before, fds, routines := trace(h), fdCount(t), runtime.NumGoroutine()
				in, err := n.OpenInside(InsideConfig{IfName: "eth0", Addrs: []netip.Addr{inside4, inside6}})
				if err != nil {
					t.Fatal(err)
				}
				made := trace(h)
				if !strings.Contains(made, "fwmark 0x6f76") || !strings.HasSuffix(made, "1\n1\n1\n") {
					t.Errorf("made:\n%s", made)
				}
				// A daemon that comes back finds what it needs, and what it is to undo.
				again, err := n.OpenInside(InsideConfig{IfName: "eth0", Addrs: []netip.Addr{inside4}})
				if err != nil {
					t.Fatal(err)
				}
				if twice := trace(h); twice != made {
					t.Errorf("made twice:\n%s\nonce:\n%s", twice, made)
				}
				again.pools[0].close()
				again.pools[1].close()
				if err := in.Close(); err != nil {
					t.Error(err)
				}
				if after := trace(h); after != before {
					t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
				}
				if err := in.Close(); err != nil {
					t.Errorf("Close again: %v", err)
				}
				if _, err := dialInside(in, "203.0.113.7:5555", netip.AddrPortFrom(inside4, 80)); !errors.Is(err, ErrGone) {
					t.Errorf("DialTCP after Close: %v", err)
				}
				if after := fdCount(t); after != fds {
					t.Errorf("%d descriptors, %d before", after, fds)
				}
				if after := goroutineCount(routines); after > routines {
					t.Errorf("%d goroutines, %d before", after, routines)
				}
			})
		}
	}
}

func TestInside_TwoTAPsOfANamespaceDoNotUndoEachOther(t *testing.T) {
	h, n := attached(t, mappings[0])
	before := trace(h)
	one := openInside(t, n)
	two, err := n.OpenInside(InsideConfig{IfName: "ovl1", Addrs: []netip.Addr{inside4}})
	if err != nil {
		t.Fatal(err)
	}
	if err := two.Close(); err != nil {
		t.Fatal(err)
	}
	to := serveInside(t, n, netip.AddrPortFrom(inside4, 80), who)
	if got := seenAs(t, one, "203.0.113.7:5555", to); got != "203.0.113.7:5555" {
		t.Errorf("seen as %s", got)
	}
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	if after := trace(h); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

func TestInside_WhatWasOffIsHandedOnToTheLastThatCloses(t *testing.T) {
	h, n := attached(t, mappings[0])
	before := trace(h)
	one := openInside(t, n)
	two, err := n.OpenInside(InsideConfig{IfName: "ovl1", Addrs: []netip.Addr{inside4}})
	if err != nil {
		t.Fatal(err)
	}
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	to := serveInside(t, n, netip.AddrPortFrom(inside4, 80), who)
	if got := seenAs(t, two, "203.0.113.7:5555", to); got != "203.0.113.7:5555" {
		t.Errorf("seen as %s", got)
	}
	if err := two.Close(); err != nil {
		t.Fatal(err)
	}
	if after := trace(h); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

func TestInside_ConnectsAgainAfterLoWasDown(t *testing.T) {
	h, n := attached(t, mappings[0])
	in := openInside(t, n)
	made := trace(h)
	for _, state := range []string{"down", "up"} {
		if a := h.run("ip", "link", "set", "lo", state); a.Err != "" {
			t.Skipf("ip: %s", a.Err)
		}
	}
	for _, tt := range []struct {
		from string
		at   netip.Addr
	}{{"203.0.113.7:5555", inside4}, {"[2001:db8::7]:5555", inside6}} {
		to := serveInside(t, n, netip.AddrPortFrom(tt.at, 80), who)
		if got := seenAs(t, in, tt.from, to); got != tt.from {
			t.Errorf("%v: seen as %s", tt.at, got)
		}
	}
	if now := trace(h); now != made {
		t.Errorf("now:\n%s\nbefore:\n%s", now, made)
	}
}

func TestInside_WithoutSocketsTheGatewayIsToCarry(t *testing.T) {
	_, n := attached(t, mappings[0])
	in := openInside(t, n)
	ready := in.pools[0]
	in.pools[0] = newPool(func(int) ([]int, error) { return nil, syscall.EMFILE })
	defer func() { in.pools[0] = ready }()
	to := netip.AddrPortFrom(inside4, 80)
	if _, err := dialInside(in, "203.0.113.7:5555", to); !errors.Is(err, errors.ErrUnsupported) || !errors.Is(err, syscall.EMFILE) {
		t.Errorf("DialTCP: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := in.DialTCP(ctx, netip.MustParseAddrPort("203.0.113.7:5555"), to); err == nil || errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("DialTCP with a context that is done: %v", err)
	}
	// It is no reason to give up a family for good.
	if err := in.tryAll([]netip.Addr{inside4, inside6}); !errors.Is(err, syscall.EMFILE) || errors.Is(err, errors.ErrUnsupported) || in.no[0] != nil {
		t.Errorf("the try: %v, IPv4: %v", err, in.no[0])
	}
}

func TestInside_AFirewallThatDropsMakesAFamilyUnsupported(t *testing.T) {
	h, n := attached(t, mappings[0])
	err := n.netfilter(func(c *nftables) error {
		at := base("filter", unix.NF_INET_LOCAL_IN, priorityFilter)
		const nfDrop = 0
		at[len(at)-1] = nl.NewRtAttr(unix.NFTA_CHAIN_POLICY, nl.BEUint32Attr(nfDrop))
		return c.batch(c.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "f"), c.chain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, "f", "in", at...))
	})
	if err != nil {
		t.Skipf("no firewall can be made here: %v", err)
	}
	before := trace(h)
	if in, err := n.OpenInside(InsideConfig{IfName: "eth0", Addrs: []netip.Addr{inside4}}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v, %v; want ErrUnsupported", in, err)
	}
	if after := trace(h); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
	in, err := n.OpenInside(InsideConfig{IfName: "eth0", Addrs: []netip.Addr{inside4, inside6}})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	to := serveInside(t, n, netip.AddrPortFrom(inside6, 80), who)
	if got := seenAs(t, in, "[2001:db8::7]:5555", to); got != "[2001:db8::7]:5555" {
		t.Errorf("IPv6: seen as %s", got)
	}
	if _, err := dialInside(in, "203.0.113.7:5555", netip.AddrPortFrom(inside4, 80)); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("IPv4: %v, want ErrUnsupported", err)
	}
}

func TestInside_WithoutIPv6OnlyIPv4IsSupported(t *testing.T) {
	_, n := attached(t, mappings[0])
	// An address that the container does not have stands for a family that does not work.
	in, err := n.OpenInside(InsideConfig{IfName: "eth0", Addrs: []netip.Addr{inside4, netip.MustParseAddr("fd00:5:9::9")}})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	to := serveInside(t, n, netip.AddrPortFrom(inside4, 80), who)
	if got := seenAs(t, in, "203.0.113.7:5555", to); got != "203.0.113.7:5555" {
		t.Errorf("seen as %s", got)
	}
	if _, err := dialInside(in, "[2001:db8::7]:5555", netip.AddrPortFrom(inside6, 80)); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("IPv6: %v, want ErrUnsupported", err)
	}
}

// nullSockets builds descriptors that are as good as sockets to a pool.
func nullSockets(count int) ([]int, error) {
	var fds []int
	for range count {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

func TestPool_GrowsUnderLoadAndShrinksWhenItIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var built []int
		p := newPool(func(count int) ([]int, error) {
			built = append(built, count)
			return nullSockets(count)
		})
		defer p.close()
		for range 1000 {
			fd, err := p.take(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(fd)
		}
		synctest.Wait()
		if built[0] != leastSockets || slices.Max(built) > mostSockets {
			t.Errorf("built %v", built)
		}
		time.Sleep(10 * trimEvery)
		synctest.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.ready) > leastSockets || p.batch != leastSockets {
			t.Errorf("%d are ready after the load, %d at once", len(p.ready), p.batch)
		}
	})
}

func TestPool_AnErrorIsToldAndTheNextTakeTriesAgain(t *testing.T) {
	broken := true
	p := newPool(func(count int) ([]int, error) {
		if broken {
			return nil, syscall.EMFILE
		}
		return nullSockets(count)
	})
	defer p.close()
	if _, err := p.take(t.Context()); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("take: %v", err)
	}
	broken = false
	fd, err := p.take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p.mu.Lock()
	closeAll(p.ready)
	p.ready = nil
	p.making = make(chan struct{}) // which takes for ever
	p.mu.Unlock()
	if _, err := p.take(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("take with a context that is done: %v", err)
	}
	p.mu.Lock()
	p.making = nil
	p.mu.Unlock()
}
