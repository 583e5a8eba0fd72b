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

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

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
	addr     netip.Addr
	resolver netip.AddrPort
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

	say("6. Names: c is known by its name on every host.")
	s.lookUp(a, "c.ovl.internal", c.addr)

	say("7. A published port: the container sees who the client is.")
	typed(h2, "rootless-ovl publish 8080:80 c")
	printed(s.cli(h2, "publish", "8080:80", "c"))
	at := netip.AddrPortFrom(h2.Addr, 8080)
	fmt.Printf("  %s$ curl http://%s/\n", lab.RouterAddr, at)
	if got, err = l.Outside.Fetch("http://" + at.String() + "/"); err != nil || got != lab.RouterAddr.String() {
		s.Fatalf("the published port: %q, %v", got, err)
	}
	fmt.Printf("      the server saw the client %s: its own address\n", got)

	say("8. A container that is to reach no other, and the outside only.")
	d := s.attach(h1, "d", "--isolate")
	typed(h1, "(in d) curl http://%s/", c.addr)
	if got, err = d.Fetch("http://" + c.addr.String() + "/"); !errors.Is(err, unix.EHOSTUNREACH) {
		s.Fatalf("an isolated container reaches another: %q, %v", got, err)
	}
	fmt.Printf("      %v\n", unix.EHOSTUNREACH)
	typed(h1, "(in d) curl http://%s/", lab.OutsideAddr)
	if got, err = d.Fetch("http://" + lab.OutsideAddr.String() + "/"); err != nil {
		s.Fatalf("an isolated container and the outside: %v", err)
	}
	fmt.Printf("      the server saw the client %s: the host's address\n", got)

	say("9. A command in a network of its own, in one line, as a CI job would use it.")
	typed(h2, "rootless-ovl run -- grep nameserver /etc/resolv.conf")
	printed(s.cli(h2, "run", "--", "grep", "nameserver", "/etc/resolv.conf"))

	say("10. What the sending node counted: superpackets stay whole.")
	counters := d2.Status().Counters
	under := counters["underlay"]
	fmt.Printf("      h2 read %d packets of %d bytes in all from its containers and sent them in %d datagram trains with %d system calls\n",
		counters["tap"]["read_packets"], counters["tap"]["read_bytes"], under["sent_trains"], under["send_calls"])

	say("11. Away again.")
	typed(h1, "rootless-ovl detach a")
	s.cli(h1, "detach", "a")
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

// cli runs our program on a host and gives what it printed.
func (s *stage) cli(h *lab.Host, args ...string) string {
	r := h.CLI(args...)
	if r.Code != 0 {
		s.Fatalf("%s: exit code %d: %s", args[0], r.Code, r.Stderr)
	}
	return r.Stdout
}

func (s *stage) ready(d *lab.Daemon) {
	st := d.Status()
	fmt.Printf("      ready: leased %s of %s, UDP port %d, uid %d\n", st.Subnet, st.Network, st.Port, os.Getuid())
}

func (s *stage) attach(h *lab.Host, name string, flags ...string) *container {
	c := &container{Container: h.Container(name)}
	args := append([]string{"attach", strconv.Itoa(c.PID), "--name", name}, flags...)
	typed(h, "rootless-ovl %s", strings.Join(args, " "))
	out := s.cli(h, args...)
	prefix, err := netip.ParsePrefix(strings.TrimSpace(out))
	if err != nil {
		s.Fatalf("attach: %v", err)
	}
	printed(out)
	c.addr = prefix.Addr()
	c.resolver = netip.AddrPortFrom(prefix.Masked().Addr().Next(), 53)
	return c
}

// lookUp has a container ask its gateway for a name, until that has heard of it.
func (s *stage) lookUp(from *container, name string, want netip.Addr) {
	typed(from.Host, "(in %s) dig +short %s", from.Name, name)
	lab.Eventually(s, name+" is known", func() bool {
		m, err := from.Resolve("udp", from.resolver, name+".", dns.TypeA)
		if err != nil || len(m.Answer) != 1 {
			return false
		}
		a, ok := m.Answer[0].(*dns.A)
		return ok && a.A.String() == want.String()
	})
	printed(want.String())
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
