// Tests of TAPs that somebody takes to another namespace.

package nsutil

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inner starts a process in a further network namespace of the holder's user namespace, as a container engine does, and returns its pid.
func (h *holder) inner() int {
	h.t.Helper()
	a := h.run("sh", "-c", "unshare -n sleep 60 >/dev/null 2>&1 </dev/null & echo $!")
	pid, err := strconv.Atoi(strings.TrimSpace(a.Out))
	if err != nil {
		h.t.Fatalf("unshare: %q %s", a.Out, a.Err)
	}
	h.t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })
	outer, err := pathInode(fmt.Sprintf("/proc/%d/ns/net", h.pid))
	if err != nil {
		h.t.Fatal(err)
	}
	for range 2000 {
		if at, err := pathInode(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && at != outer {
			return pid
		}
		time.Sleep(time.Millisecond)
	}
	h.t.Fatal("unshare has made no network namespace")
	return 0
}

func looseConfig() TAPConfig {
	c := testConfig()
	c.IfName, c.Alias, c.Addrs, c.Routes, c.Loose = "rovl0011aabb", "rovl 0123456789abcdef", nil, nil, true
	return c
}

func TestTAP_LooseIsMadeDownAndBare(t *testing.T) {
	h := startHolder(t, mappings[0])
	c := looseConfig()
	tap, err := open(t, h.pid).CreateTAP(c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Delete() }()
	links := h.links()
	l := links[c.IfName]
	if slices.Contains(l.Flags, "UP") || len(l.AddrInfo) > 0 || l.MTU != c.MTU || l.Address != macText(c.MAC) || l.TxQLen != c.TxQueueLen {
		t.Errorf("it is %+v", l)
	}
	if slices.Contains(links["lo"].Flags, "UP") {
		t.Error("lo was brought up")
	}
	if r := h.routes("-4"); len(r) != 0 {
		t.Errorf("routes: %v", r)
	}
	for _, change := range []func(*TAPConfig){
		func(c *TAPConfig) { c.Addrs = testConfig().Addrs },
		func(c *TAPConfig) { c.Routes = []Route{{Dst: netip.MustParsePrefix("10.5.0.0/16")}} },
	} {
		c := looseConfig()
		c.IfName = "other0"
		change(&c)
		if _, err := open(t, h.pid).CreateTAP(c); !errors.Is(err, ErrInvalid) {
			t.Errorf("with addresses or routes: %v", err)
		}
	}
}

func TestPlaceOf_FollowsTheTAP(t *testing.T) {
	h := startHolder(t, mappings[0])
	home := open(t, h.pid)
	c := looseConfig()
	tap, err := home.CreateTAP(c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Delete() }()
	is := func(want Place) {
		t.Helper()
		if got, err := PlaceOf(tap.fd()); err != nil || got != want {
			t.Fatalf("it is at %+v, %v; want %+v", got, err, want)
		}
	}
	is(Place{home.Inode(), c.IfName})

	pid := h.inner()
	if a := h.run("ip", "link", "set", c.IfName, "netns", strconv.Itoa(pid), "name", "eth0"); a.Err != "" {
		t.Fatal(a.Err)
	}
	there := open(t, pid)
	is(Place{there.Inode(), "eth0"})
	same, err := NamespaceOf(tap.fd())
	if err != nil {
		t.Fatal(err)
	}
	defer same.Close()
	if same.Inode() != there.Inode() {
		t.Errorf("NamespaceOf opened %d, want %d", same.Inode(), there.Inode())
	}
	devices := func(want ...Device) {
		t.Helper()
		if got, err := same.TAPs(); err != nil || !slices.Equal(got, want) {
			t.Errorf("TAPs: %v, %v; want %v", got, err, want)
		}
	}
	devices(Device{IfName: "eth0", Alias: c.Alias, MAC: c.MAC})
	if a := h.run("nsenter", "-t", strconv.Itoa(pid), "-n", "ip", "-d", "-j", "link", "show", "dev", "eth0"); !strings.Contains(a.Out, fmt.Sprintf(`"gso_max_size":%d,`, c.GSOMaxSize)) ||
		!strings.Contains(a.Out, fmt.Sprintf(`"mtu":%d,`, c.MTU)) || !strings.Contains(a.Out, fmt.Sprintf(`"txqlen":%d,`, c.TxQueueLen)) {
		t.Errorf("it has lost something on its way: %s %s", a.Out, a.Err)
	}
	inside := func(args ...string) {
		t.Helper()
		if a := h.run(append([]string{"nsenter", "-t", strconv.Itoa(pid), "-n", "ip"}, args...)...); a.Err != "" {
			t.Fatal(a.Err)
		}
	}
	inside("link", "set", "eth0", "up")
	devices(Device{IfName: "eth0", Alias: c.Alias, MAC: c.MAC, Up: true})

	all, err := NewFinder(0).Processes()
	if err != nil || all[there.Inode()] != pid || all[home.Inode()] == 0 {
		t.Errorf("processes of namespaces: %v, %v; want %d in %d", all, err, pid, there.Inode())
	}

	// Whoever held it has died: it is found by its alias, and is opened where it is.
	tap.Close()
	if tap, err = same.AdoptTAP("eth0", 1); err != nil {
		t.Fatal(err)
	}
	is(Place{there.Inode(), "eth0"})
	inside("link", "delete", "eth0")
	if _, err := PlaceOf(tap.fd()); !errors.Is(err, ErrNoTAP) {
		t.Errorf("of a device that was deleted: %v", err)
	}
	if _, err := NamespaceOf(tap.fd()); !errors.Is(err, ErrNoTAP) {
		t.Errorf("NamespaceOf a device that was deleted: %v", err)
	}
}
