// Tests of attach, detach and what an attachment looks like from both sides.

package test

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestAttach_GivesTheContainerAnInterface(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	d := upEmbedded(l.Host(1))
	a := join(t, l.Host(1), "a")
	i := eth0(t, a.Space)
	if !i.Up || i.MTU != overlayMTU || i.MAC != a.at.MAC || i.TxQueueLen < 2000 {
		t.Errorf("interface %+v for attachment %+v; want it up, MTU %d and a queue that holds a window", i, a.at, overlayMTU)
	}
	if !slices.Equal(i.Addrs, []netip.Prefix{netip.PrefixFrom(a.addr, a.subnet.Bits())}) {
		t.Errorf("addresses %v, want %s", i.Addrs, a.at.Addr)
	}
	routes, err := a.Routes()
	if err != nil || !slices.Contains(routes, "default via "+a.gateway.String()+" dev eth0") {
		t.Errorf("routes %q, %v; want a default route through the gateway", routes, err)
	}
	if st := d.Status(); st.Attachments != 1 || st.Gateway != a.gateway.String() || st.MTU != overlayMTU {
		t.Errorf("status %+v", st)
	}
	pings(t, a.Space, a.gateway)
}

func TestAttach_PrintsTheAddress(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	upEmbedded(l.Host(1))
	c := l.Host(1).Container("a")
	r := l.Host(1).CLI("attach", pid(c))
	if _, err := netip.ParsePrefix(strings.TrimSpace(r.Stdout)); r.Code != 0 || err != nil {
		t.Errorf("exit code %d, printed %q (%q), want an address alone", r.Code, r.Stdout, r.Stderr)
	}
}

func TestAttach_TakesOptions(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	upEmbedded(h)
	first := join(t, h, "first")
	bytes := first.subnet.Addr().As4()
	bytes[3] = 77
	want := netip.AddrFrom4(bytes)
	m := join(t, h, "web-1", "--ip", want.String(), "--ifname", "ovl7", "--mac", "02:11:22:33:44:55", "--no-default-route")
	if m.addr != want || m.at.Name != "web-1" || m.at.IfName != "ovl7" || m.at.MAC != "02:11:22:33:44:55" {
		t.Errorf("attachment %+v", m.at)
	}
	i := iface(t, m.Space, "ovl7")
	if i.MAC != "02:11:22:33:44:55" || i.Addrs[0].Addr() != want {
		t.Errorf("interface %+v", i)
	}
	routes, err := m.Routes()
	if err != nil || strings.Contains(strings.Join(routes, "\n"), "default") {
		t.Errorf("routes %q, %v; want no default route", routes, err)
	}
	pings(t, m.Space, first.addr)
	pings(t, first.Space, m.addr)
}

// With --no-default-route the rest of the overlay must still be reachable.
func TestAttach_WithoutDefaultRouteReachesPeers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a", "--no-default-route"), join(t, s.h2, "b")
	pings(t, a.Space, b.addr)
	if _, err := a.DialContext(t.Context(), "tcp4", port(lab.OutsideAddr, 80).String()); err == nil || !strings.Contains(err.Error(), "unreachable") {
		t.Errorf("the outside: %v, want no route", err)
	}
}

func TestAttach_ByNetnsPath(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	upEmbedded(h)
	c := h.Container("a")
	m := &member{Container: c}
	h.CLIJSON(&m.at, "attach", "--netns", c.NetnsPath(), "--name", "by-path")
	m.read(t)
	if m.at.Netns != c.NetnsPath() || m.at.PID != 0 {
		t.Errorf("attachment %+v", m.at)
	}
	pings(t, m.Space, m.gateway)
	if r := h.CLI("detach", "by-path"); r.Code != 0 {
		t.Errorf("detach: exit code %d: %s", r.Code, r.Stderr)
	}
	noInterface(t, m.Space)
}

// As podman's --userns=keep-id: the daemon's user is not root inside, so that nobody can simply enter.
func TestAttach_ContainerWhoseUserIsNotRootInside(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	upEmbedded(l.Host(1))
	m := attach(t, l.Host(1).ContainerMapped("keep-id", 1000))
	pings(t, m.Space, m.gateway)
}

func TestAttach_DetachRemovesEverything(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	for _, by := range []string{"name", "pid"} {
		t.Run("by "+by, func(t *testing.T) {
			m := join(t, h, "by-"+by)
			what := m.Name
			if by == "pid" {
				what = pid(m.Container)
			}
			if r := h.CLI("detach", what); r.Code != 0 {
				t.Fatalf("exit code %d: %s", r.Code, r.Stderr)
			}
			noInterface(t, m.Space)
			if list := d.Attachments(); len(list) != 0 {
				t.Errorf("still listed: %+v", list)
			}
			// Its address is free again.
			next := join(t, h, "next-"+by, "--ip", m.addr.String())
			pings(t, next.Space, next.gateway)
			// And so is the namespace.
			again := attach(t, m.Container)
			pings(t, again.Space, next.addr)
			for _, name := range []string{next.Name, again.Name} {
				if r := h.CLI("detach", name); r.Code != 0 {
					t.Errorf("detach %s: exit code %d: %s", name, r.Code, r.Stderr)
				}
			}
		})
	}
}

func TestAttach_ExitIsNoticed(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	m := join(t, h, "short")
	m.Release()
	lab.Eventually(t, "nothing is left of the ended container", func() bool { return d.Status().Attachments == 0 })
	if list := d.Attachments(); len(list) != 0 {
		t.Errorf("still listed: %+v", list)
	}
	next := join(t, h, "next", "--ip", m.addr.String())
	pings(t, next.Space, next.gateway)
}

func TestAttach_InterfaceRemovedInsideIsNoticed(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	m := join(t, h, "a")
	if r := m.Run("ip", "link", "delete", "eth0"); r.Code != 0 {
		t.Skipf("no way to delete the interface (iproute2 missing?): %s", r.Stderr)
	}
	lab.Eventually(t, "nothing is left of the attachment", func() bool { return d.Status().Attachments == 0 })
	again := attach(t, m.Container)
	pings(t, again.Space, again.gateway)
}

// The daemon may be killed and come back: the containers keep interface and address, and traffic resumes.
func TestAttach_OutlivesTheDaemon(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b := join(t, s.h1, "a"), join(t, s.h2, "b")
	gone := join(t, s.h2, "gone")
	pings(t, a.Space, b.addr)
	for _, end := range []string{"crash", "stop"} {
		t.Run(end, func(t *testing.T) {
			if end == "crash" {
				s.d2.Kill()
				gone.Release() // ends while nobody looks
			} else if code := s.d2.Stop(); code != 0 {
				t.Errorf("exit code %d after SIGTERM", code)
			}
			if i := eth0(t, b.Space); len(i.Addrs) != 1 {
				t.Errorf("the container lost its address: %+v", i)
			}
			s.d2 = s.h2.Up("--etcd-endpoints", etcdURL(s.h1))
			lab.Eventually(t, "the container is attached again, the ended one is not", func() bool {
				list := s.d2.Attachments()
				return len(list) == 1 && list[0].Name == "b" && list[0].Addr == b.at.Addr
			})
			waitPeers(t, 1, s.d1, s.d2)
			pings(t, a.Space, b.addr)
			pings(t, b.Space, a.addr)
			pings(t, b.Space, b.gateway)
		})
	}
}

// The list of attachments is lost while the daemon is down: its interface is still in the container, and nobody knows of it.
func TestAttach_AgainAfterTheListOfAttachmentsIsLost(t *testing.T) {
	t.Parallel()
	for _, flags := range [][]string{nil, {"--ifname", "eth1"}} {
		t.Run(strings.Join(flags, " "), func(t *testing.T) {
			l := lab.New(t, 1)
			h := l.Host(1)
			d := upEmbedded(h)
			m := join(t, h, "a")
			state := h.Home() + "/.local/state/rootless-ovl"
			d.Kill()
			if err := os.Truncate(state+"/attachments.json", 1); err != nil {
				t.Fatal(err)
			}
			d = upEmbedded(h)
			if list := d.Attachments(); len(list) != 0 {
				t.Fatalf("attachments: %+v", list)
			}
			again := attach(t, m.Container, flags...)
			pings(t, again.Space, again.gateway)
			if h.CLI("detach", pid(m.Container)).Code != 0 {
				t.Error("detach failed")
			}
			noInterface(t, m.Space)
		})
	}
}

func TestAttach_HundredTimesThreeLeaksNothing(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	const n = 100
	containers := make([]*lab.Container, n)
	for i := range containers {
		containers[i] = h.Container("c" + itoa(i))
	}
	round := func(d *lab.Daemon, containers []*lab.Container) {
		t.Helper()
		seen := map[netip.Addr]bool{}
		var members []*member
		for _, c := range containers {
			m := attach(t, c)
			if seen[m.addr] {
				t.Fatalf("address %s was given twice", m.addr)
			}
			seen[m.addr] = true
			members = append(members, m)
		}
		pings(t, members[0].Space, members[len(members)-1].addr)
		if st := d.Status(); st.Attachments != len(containers) {
			t.Errorf("%d attachments, want %d", st.Attachments, len(containers))
		}
		for _, c := range containers {
			if r := h.CLI("detach", c.Name); r.Code != 0 {
				t.Fatalf("detach %s: exit code %d: %s", c.Name, r.Code, r.Stderr)
			}
			noInterface(t, c.Space)
		}
		lab.Eventually(t, "no attachment is left", func() bool { return d.Status().Attachments == 0 })
	}

	// What a daemon has open after one attach and detach is what it may have open after three hundred. Connections to the
	// store and of the API come and go, hence the slack; a leak would be 300 or more.
	const slack = 25
	d := upEmbedded(h)
	round(d, containers[:1])
	files, threads := d.OpenFiles(), d.Threads()
	goroutines := d.Goroutines()

	d = upEmbedded(h)
	for range 3 {
		round(d, containers)
	}
	lab.Eventually(t, "the descriptors are back to what they were", func() bool { return d.OpenFiles() <= files+slack })
	filesAfter, threadsAfter := d.OpenFiles(), d.Threads()
	goroutinesAfter := d.Goroutines()
	if goroutines < 5 || goroutinesAfter > goroutines+slack {
		t.Errorf("%d goroutines after one attach, %d after 300", goroutines, goroutinesAfter)
	}
	if threadsAfter > threads+slack {
		t.Errorf("%d threads after one attach, %d after 300", threads, threadsAfter)
	}
	t.Logf("after one attach and after 300: descriptors %d, %d; goroutines %d, %d; threads %d, %d",
		files, filesAfter, goroutines, goroutinesAfter, threads, threadsAfter)
}

func TestAttach_SimultaneousAttachesGetDistinctAddresses(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	const n = 16
	results := make(chan lab.Result, n)
	for i := range n {
		c := h.Container("c" + string(rune('a'+i)))
		go func() { results <- h.CLI("attach", pid(c), "--name", c.Name) }()
	}
	for range n {
		if r := <-results; r.Code != 0 {
			t.Errorf("exit code %d: %s", r.Code, r.Stderr)
		}
	}
	seen := map[string]bool{}
	for _, a := range d.Attachments() {
		seen[a.Addr] = true
	}
	if len(seen) != n {
		t.Errorf("%d distinct addresses for %d containers", len(seen), n)
	}
}

func TestAttach_BadInput(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h)
	first := join(t, h, "first")
	fresh := h.Container("fresh")
	plain := h.Command("cat") // a process in the host's own network namespace
	stdin, err := plain.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(plain); err != nil {
		t.Fatal(err)
	}
	defer func() { stdin.Close(); _ = plain.Wait() }()
	taken := h.Container("taken")
	if err := taken.AddBridge("eth0"); err != nil {
		t.Fatal(err)
	}
	ended := h.Container("ended")
	ended.Stop()
	notNetns := h.Home() + "/file"
	if err := os.WriteFile(notNetns, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := first.subnet.Addr().Prev().String() // the subnet before ours
	last := lastAddr(first.subnet).String()

	for _, c := range []struct {
		name  string
		args  []string
		words []string
	}{
		{"no such process", []string{pid(ended)}, []string{pid(ended), "no"}},
		{"another user's process", []string{othersPID(t)}, []string{othersPID(t)}},
		{"already attached", []string{pid(first.Container)}, []string{"already attached", "first"}},
		{"already attached, by path", []string{"--netns", first.NetnsPath()}, []string{"already attached"}},
		{"host's own namespace", []string{itoa(plain.Process.Pid)}, []string{itoa(plain.Process.Pid), "host"}},
		{"interface name taken", []string{pid(taken)}, []string{"eth0", "--ifname"}},
		{"name taken", []string{pid(fresh), "--name", "first"}, []string{"first", "--name"}},
		{"address outside the subnet", []string{pid(fresh), "--ip", other}, []string{other, first.subnet.String()}},
		{"address in use", []string{pid(fresh), "--ip", first.addr.String()}, []string{first.addr.String(), "first"}},
		{"gateway's address", []string{pid(fresh), "--ip", first.gateway.String()}, []string{first.gateway.String()}},
		{"subnet's address", []string{pid(fresh), "--ip", first.subnet.Addr().String()}, []string{first.subnet.Addr().String()}},
		{"broadcast address", []string{pid(fresh), "--ip", last}, []string{last}},
		{"no address at all", []string{pid(fresh), "--ip", "10.66.x"}, []string{"10.66.x"}},
		{"IPv6 address", []string{pid(fresh), "--ip", "fd00::1"}, []string{"fd00::1"}},
		{"bad MAC", []string{pid(fresh), "--mac", "01:00:5e:00:00:01"}, []string{"01:00:5e:00:00:01"}},
		{"bad interface name", []string{pid(fresh), "--ifname", "much-too-long-a-name"}, []string{"much-too-long-a-name"}},
		{"bad name", []string{pid(fresh), "--name", "../x"}, []string{"../x"}},
		{"not a pid", []string{"abc"}, []string{"abc"}},
		{"negative pid", []string{"--", "-5"}, []string{"-5"}},
		{"nothing", nil, []string{"pid"}},
		{"pid and path", []string{pid(fresh), "--netns", fresh.NetnsPath()}, []string{"both"}},
		{"path that is not there", []string{"--netns", h.Home() + "/none"}, []string{h.Home() + "/none"}},
		{"path that is no namespace", []string{"--netns", notNetns}, []string{notNetns}},
	} {
		t.Run(c.name, func(t *testing.T) {
			refused(t, h.CLI(append([]string{"attach"}, c.args...)...), c.words...)
			noInterface(t, fresh.Space)
			if list := d.Attachments(); len(list) != 1 {
				t.Errorf("attachments: %+v", list)
			}
		})
	}
	t.Run("detach of nobody", func(t *testing.T) { refused(t, h.CLI("detach", "nobody"), "nobody") })
	t.Run("nothing broke", func(t *testing.T) { pings(t, attach(t, fresh).Space, first.addr) })
}

// othersPID is a process of another user that is not ours to attach.
func othersPID(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.Trim(e.Name(), "0123456789") != "" {
			continue
		}
		if _, err := os.Readlink("/proc/" + e.Name() + "/ns/net"); os.IsPermission(err) {
			return e.Name()
		}
	}
	t.Skip("this machine has no process of another user")
	return ""
}

func TestAttach_FullSubnet(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	d := upEmbedded(h, "--network", "10.66.0.0/24") // subnets of /26: 61 addresses for containers
	capacity := 1<<(32-mustPrefix(t, d.Status().Subnet).Bits()) - 3
	for range capacity {
		c := h.Container("c")
		if r := h.CLI("attach", pid(c)); r.Code != 0 {
			t.Fatalf("attach: exit code %d: %s", r.Code, r.Stderr)
		}
	}
	c := h.Container("one-too-many")
	refused(t, h.CLI("attach", pid(c)), "no addresses left", "10.66.0.")
	noInterface(t, c.Space)
}

func TestAttach_TunDeviceMissingOrClosed(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		hide func(*lab.Host) error
	}{
		{"absent", (*lab.Host).HideTun},
		{"closed", (*lab.Host).CloseTun},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := lab.New(t, 1)
			h := l.Host(1)
			if err := c.hide(h); err != nil {
				t.Fatal(err)
			}
			d := upEmbedded(h)
			ct := h.Container("a")
			refused(t, h.CLI("attach", pid(ct)), "/dev/net/tun")
			noInterface(t, ct.Space)
			if !d.Running() || len(d.Attachments()) != 0 {
				t.Errorf("running %v, attachments %v", d.Running(), d.Attachments())
			}
			r := h.CLI("doctor")
			if r.Code == 0 || !strings.Contains(r.Stdout+r.Stderr, "/dev/net/tun") {
				t.Errorf("doctor does not see it: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			}
		})
	}
}
