// Tests of interfaces that somebody else takes to a container and configures there, as docker does with those of a network driver.

package test

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// engine is a container engine's own namespace, on a host with a daemon.
type engine struct {
	*lab.Container
	d *lab.Daemon
}

// give has an interface made in the engine's namespace, and the engine take it to c, name it eth0 and configure it.
func (e *engine) give(t *testing.T, c *lab.Container, more string) *member {
	t.Helper()
	m := &member{Container: c}
	if err := e.d.Ask(http.MethodPost, "/v1/attachments", fmt.Sprintf(`{"pid":%d,"loose":true,"name":%q%s}`, e.PID, c.Name, more), &m.at); err != nil {
		t.Fatal(err)
	}
	m.read(t)
	if i := iface(t, e.Space, m.at.IfName); i.Up || len(i.Addrs)+len(i.Addrs6) > 0 || i.MAC != m.at.MAC || i.MTU != m.at.MTU {
		t.Errorf("the interface is made as %+v", i)
	}
	if err := e.Give(m.at.IfName, c, "eth0"); err != nil {
		t.Fatal(err)
	}
	if err := c.SetUp("eth0", netip.PrefixFrom(m.addr, m.subnet.Bits()), m.gateway); err != nil {
		t.Fatal(err)
	}
	return m
}

// shown waits until the only attachment is shown as an interface of a container.
func (e *engine) shown(t *testing.T, ifName string, c *lab.Container) {
	t.Helper()
	lab.Eventually(t, "the interface is shown as "+ifName+" of "+c.Name, func() bool {
		list := e.d.Attachments()
		fi, err := os.Stat(c.NetnsPath())
		return err == nil && len(list) == 1 && list[0].IfName == ifName && list[0].Inode == fi.Sys().(*syscall.Stat_t).Ino
	})
}

func TestLoose_CarriesPacketsWhereverItIsTaken(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	b := join(t, s.h2, "b")
	e := &engine{s.h1.Container("engine"), s.d1}
	var kept struct{ Addr, Gateway string }
	if err := s.d1.Ask(http.MethodPost, "/v1/addresses", `{"owner":"docker/1"}`, &kept); err != nil {
		t.Fatal(err)
	}
	addr, _, _ := strings.Cut(kept.Addr, "/")
	web := e.give(t, s.h1.Container("web"), `,"addr":"`+addr+`","publish":["8080:80"],"dns_at":["10.0.2.3"]`)
	if web.at.Addr != kept.Addr || web.at.Gateway != kept.Gateway {
		t.Errorf("attached %+v, reserved was %+v", web.at, kept)
	}
	web.tellClients(t, 80)
	works := func(t *testing.T) {
		t.Helper()
		pings(t, web.Space, b.addr)
		pings(t, b.Space, web.addr)
		pings(t, web.Space, web.gateway)
		for _, network := range []string{"udp4", "tcp4"} {
			answer, err := web.Resolve(network, netip.MustParseAddrPort("10.0.2.3:53"), "b.ovl.internal.", dns.TypeA)
			if err != nil || len(answer.Answer) != 1 || answer.Answer[0].(*dns.A).A.String() != b.addr.String() {
				t.Errorf("10.0.2.3 answers by %s: %v, %v", network, answer, err)
			}
		}
		lab.Eventually(t, "a published port leads to it, and shows who asks", func() bool {
			asked, seen, err := askWho(t, s.h2.Space, "tcp", port(s.h1.Addr, 8080))
			return err == nil && asked == seen
		})
		lab.Eventually(t, "its connections are the kernel's own, in the container's namespace", func() bool {
			_, _, err := askWho(t, s.h2.Space, "tcp", port(s.h1.Addr, 8080))
			ports := portsOf(t, s.h1, "web")
			return err == nil && len(ports) == 1 && ports[0].Counters["spliced"] > 0
		})
		if r := s.h1.CLI("exec", "web", "--", "cat", "/proc/net/dev"); r.Code != 0 || !strings.Contains(r.Stdout, "eth0:") {
			t.Errorf("exec: %+v", r)
		}
	}
	e.shown(t, "eth0", web.Container)
	works(t)

	s.d1.Kill()
	s.d1 = upEmbedded(s.h1)
	e.d = s.d1
	waitPeers(t, 1, s.d1, s.d2)
	e.shown(t, "eth0", web.Container)
	works(t)

	// As docker does it on disconnect. Down, nothing is answered, and nothing breaks.
	if err := web.Give("eth0", e.Container, "veth7"); err != nil {
		t.Fatal(err)
	}
	e.shown(t, "veth7", e.Container)
	noPing(t, b.Space, web.addr)
	if err := s.d1.Ask(http.MethodDelete, "/v1/attachments/web", "", nil); err != nil {
		t.Fatal(err)
	}
	noInterface(t, e.Space)
	noInterface(t, web.Space)

	// The address is still the engine's, for whoever names it.
	again := e.give(t, s.h1.Container("again"), `,"addr":"`+addr+`"`)
	pings(t, b.Space, again.addr)
	var list []struct{ Addr, Attachment string }
	if err := s.d1.Get("/v1/addresses", &list); err != nil || len(list) != 1 || list[0].Addr != kept.Addr || list[0].Attachment != "again" {
		t.Errorf("reserved: %+v, %v", list, err)
	}
	again.Release()
	lab.Eventually(t, "nothing is left of it when its container has ended", func() bool { return s.d1.Status().Attachments == 0 })
	if r := s.h1.CLI("addresses", "--release", addr); r.Code != 0 {
		t.Errorf("addresses --release: %+v", r)
	}
	if err := s.d1.Get("/v1/addresses", &list); err != nil || len(list) != 0 {
		t.Errorf("reserved after the release: %+v, %v", list, err)
	}
}

// A daemon that has taken a TAP up again keeps its namespace, which then does not end with the container: that nobody is in it is noticed.
func TestLoose_IsFreedWhenItsContainerEndsAfterARestartOfTheDaemon(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	e := &engine{h.Container("engine"), upEmbedded(h)}
	web := e.give(t, h.Container("web"), "")
	gone := e.give(t, h.Container("gone"), "")
	pings(t, web.Space, gone.addr)
	e.d.Kill()
	gone.Release() // while nobody looks
	e.d = upEmbedded(h)
	e.shown(t, "eth0", web.Container)
	pings(t, web.Space, web.gateway)
	web.Release()
	lab.EventuallyWithin(t, 20*time.Second, "nothing is left of it", func() bool { return e.d.Status().Attachments == 0 })
}
