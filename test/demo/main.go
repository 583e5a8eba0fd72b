// Command demo shows the main job on simulated hosts: two nodes, containers on both, and what they can reach. It needs no root; as
// root it gives up root first. The last line of a demonstration that worked is "demo: ok".
package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func main() { os.Exit(lab.Main(demo)) }

// stage is the demonstration as the lab sees it: what a *testing.T is to a test.
type stage struct {
	ctx      context.Context
	cancel   context.CancelFunc
	failed   bool
	cleanups []func()
}

func (s *stage) Helper()                  {}
func (s *stage) Name() string             { return "demo" }
func (s *stage) Context() context.Context { return s.ctx }
func (s *stage) Failed() bool             { return s.failed }
func (s *stage) Cleanup(f func())         { s.cleanups = append(s.cleanups, f) }

func (s *stage) Logf(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func (s *stage) Errorf(format string, args ...any) {
	s.failed = true
	fmt.Printf("FAILED: "+format+"\n", args...)
}

func (s *stage) Fatalf(format string, args ...any) {
	s.Errorf(format, args...)
	runtime.Goexit()
}

// end runs the cleanups, the last one first, each even when another gave up.
func (s *stage) end() {
	s.cancel()
	for len(s.cleanups) > 0 {
		last := s.cleanups[len(s.cleanups)-1]
		s.cleanups = s.cleanups[:len(s.cleanups)-1]
		s.run(last)
	}
}

// run runs f to its end or until it calls Fatalf.
func (s *stage) run(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	<-done
}

// checkTun says, before anything is made, why a daemon of this user could not open a TAP.
func checkTun() error {
	f, err := os.OpenFile(tun, os.O_RDWR, 0)
	if err == nil {
		return f.Close()
	}
	return fmt.Errorf("%w, as uid %d: sudo modprobe tun; sudo chmod 666 %s; rootless-ovl doctor knows more causes", err, os.Getuid(), tun)
}

const tun = "/dev/net/tun"

func demo() int {
	if err := checkTun(); err != nil {
		fmt.Println("demo:", err)
		return 1
	}
	s := &stage{}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.run(s.show)
	s.end()
	if s.failed {
		fmt.Println("demo: failed")
		return 1
	}
	fmt.Println("demo: ok")
	return 0
}

// say prints what happens next.
func say(format string, args ...any) { fmt.Printf("\n"+format+"\n", args...) }

// typed shows a command as a person would type it.
func typed(h *lab.Host, format string, args ...any) {
	fmt.Printf("  %s$ %s\n", h.Name, fmt.Sprintf(format, args...))
}

// printed shows what a command printed.
func printed(text string) {
	for line := range strings.Lines(strings.TrimSpace(text)) {
		fmt.Printf("      %s\n", strings.TrimRight(line, "\n"))
	}
}

// container is a container with its address.
type container struct {
	*lab.Container
	addr netip.Addr
}

func (s *stage) show() {
	fmt.Printf("rootless-ovl: containers on several hosts in one flat network, with no root anywhere.\n"+
		"You are uid %d. The hosts are namespaces of this machine on a network of their own (%s).\n", os.Getuid(), lab.LAN)
	l := lab.New(s, 2)
	h1, h2 := l.Host(1), l.Host(2)
	l.Outside.HTTPServer(s, netip.AddrPortFrom(lab.OutsideAddr, 80))
	l.Outside.DNSServer(s, netip.AddrPortFrom(lab.RouterAddr, 53), map[string]netip.Addr{"www.lab.test.": lab.OutsideAddr})

	say("1. One daemon on each host. The first brings an etcd with it, the second joins.")
	listen := h1.Addr.String() + ":2379"
	typed(h1, "rootless-ovl up --listen-etcd %s &", listen)
	d1 := h1.Up("--listen-etcd", listen)
	s.ready(d1)
	typed(h2, "rootless-ovl up --etcd-endpoints http://%s &", listen)
	d2 := h2.Up("--etcd-endpoints", "http://"+listen)
	s.ready(d2)
	for _, d := range []*lab.Daemon{d1, d2} {
		lab.Eventually(s, d.Host.Name+" knows the other node", func() bool { return d.Status().Peers == 1 })
		caps, err := lab.Capabilities(d.PID)
		if err != nil || caps["CapEff"] != 0 || caps["CapPrm"] != 0 {
			s.Fatalf("%s: the daemon has capabilities %v, %v", d.Host.Name, caps, err)
		}
		typed(d.Host, "grep CapEff /proc/%d/status", d.PID)
		fmt.Printf("      CapEff:\t%016x\n", caps["CapEff"])
	}

	say("2. Containers: two on h1, one on h2. Each is a user and network namespace with nothing in it.")
	a, b, c := s.attach(h1, "a"), s.attach(h1, "b"), s.attach(h2, "c")
	typed(h1, "rootless-ovl ps")
	printed(h1.CLI("ps").Stdout)
	typed(h1, "rootless-ovl peers")
	printed(h1.CLI("peers").Stdout)

	say("3. Across hosts: a (h1) to c (h2).")
	s.ping(a, c.addr)
	s.serveAndDownload(a, c)
	say("4. On the same host: a to b, both on h1.")
	s.ping(a, b.addr)
	s.serveAndDownload(a, b)

	say("5. The outside, through the gateway in user space: %s is on no overlay.", lab.OutsideAddr)
	s.ping(a, lab.OutsideAddr)
	typed(h1, "(in a) curl http://%s/", lab.OutsideAddr)
	got, err := a.Fetch("http://" + lab.OutsideAddr.String() + "/")
	if err != nil || got != h1.Addr.String() {
		s.Fatalf("the outside: %q, %v", got, err)
	}
	fmt.Printf("      the server saw the client %s: the host's address\n", got)

	say("6. A command in a network of its own, in one line, as a CI job would use it.")
	script := "grep nameserver /etc/resolv.conf"
	typed(h2, "rootless-ovl run -- %s", script)
	r := h2.CLI("run", "--", "grep", "nameserver", "/etc/resolv.conf")
	if r.Code != 0 {
		s.Fatalf("run: exit code %d: %s", r.Code, r.Stderr)
	}
	printed(r.Stdout)

	say("7. What the sending node counted: superpackets stay whole.")
	counters := d2.Status().Counters
	under := counters["underlay"]
	fmt.Printf("      h2 read %d packets of %d bytes in all from its containers and sent them in %d datagram trains with %d system calls\n",
		counters["tap"]["read_packets"], counters["tap"]["read_bytes"], under["sent_trains"], under["send_calls"])

	say("8. Away again.")
	typed(h1, "rootless-ovl detach a")
	if r := h1.CLI("detach", "a"); r.Code != 0 {
		s.Fatalf("detach: %s", r.Stderr)
	}
	if left, err := a.Interfaces(); err != nil || len(left) != 0 {
		s.Fatalf("a is left with %v, %v", left, err)
	}
	for _, d := range []*lab.Daemon{d2, d1} {
		if code := d.Stop(); code != 0 {
			s.Errorf("%s: the daemon ended with exit code %d", d.Host.Name, code)
		}
	}
	fmt.Println("  daemons stopped; nothing was changed on this machine")
}

func (s *stage) ready(d *lab.Daemon) {
	st := d.Status()
	fmt.Printf("      ready: leased %s of %s, UDP port %d, uid %d\n", st.Subnet, st.Network, st.Port, os.Getuid())
}

func (s *stage) attach(h *lab.Host, name string) *container {
	c := &container{Container: h.Container(name)}
	typed(h, "rootless-ovl attach %d --name %s", c.PID, name)
	r := h.CLI("attach", strconv.Itoa(c.PID), "--name", name)
	if r.Code != 0 {
		s.Fatalf("attach: %s", r.Stderr)
	}
	prefix, err := netip.ParsePrefix(strings.TrimSpace(r.Stdout))
	if err != nil {
		s.Fatalf("attach: %v", err)
	}
	printed(r.Stdout)
	c.addr = prefix.Addr()
	return c
}

func (s *stage) ping(from *container, to netip.Addr) {
	typed(from.Host, "(in %s) ping -c 5 %s", from.Name, to)
	r, err := from.Ping(to, 5)
	if err == nil && r.Lost() != 0 {
		err = errors.New("echoes were lost")
	}
	if err != nil {
		s.Fatalf("ping from %s to %s: %v, %v", from.Name, to, r, err)
	}
	fmt.Printf("      %d sent, %d received\n", r.Sent, r.Received)
}

// serveAndDownload starts a web server in one container and downloads from it in another.
func (s *stage) serveAndDownload(client, server *container) {
	const size = 100 << 20
	at := netip.AddrPortFrom(server.addr, 80)
	server.HTTPServer(s, at)
	typed(client.Host, "(in %s) curl http://%s/", client.Name, server.addr)
	saw, err := client.Fetch("http://" + at.String() + "/")
	if err != nil || saw != client.addr.String() {
		s.Fatalf("HTTP from %s to %s: %q, %v", client.Name, server.Name, saw, err)
	}
	fmt.Printf("      the server saw the client %s: %s's own address\n", saw, client.Name)
	typed(client.Host, "(in %s) curl http://%s/100MB", client.Name, server.addr)
	if err := client.Download(at, size); err != nil {
		s.Fatalf("download from %s: %v", server.Name, err)
	}
	fmt.Printf("      %d bytes, every one as sent\n", size)
}
