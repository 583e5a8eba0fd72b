// Tests of published ports: their life with their attachment. Sockets of the host are real, containers are not.

package node

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// listens tells whether somebody accepts on that port of the host's loopback.
func listens(port int) bool {
	c, err := net.DialTimeout("tcp4", fmt.Sprintf("127.0.0.1:%d", port), time.Second)
	if err != nil {
		return errors.Is(err, syscall.ECONNRESET) // accepted, and reset at once
	}
	c.Close()
	return true
}

// serves puts a server into the container that says hello and closes.
func (c *container) serves(t *testing.T, at string) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			s, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(s, "hello")
			s.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	if c.servers == nil {
		c.servers = make(map[netip.AddrPort]netip.AddrPort)
	}
	c.servers[netip.MustParseAddrPort(at)] = netip.MustParseAddrPort(l.Addr().String())
}

// hello is what a client of a port of the host's loopback gets.
func hello(t *testing.T, port int) string {
	t.Helper()
	c, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if errors.Is(err, syscall.ECONNRESET) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	b, _ := io.ReadAll(c) // a reset is an empty answer
	return string(b)
}

func portsOf(t *testing.T, n *Node, name string) []api.Port {
	t.Helper()
	list, err := n.Attachments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if a.Name == name {
			for i := range a.Ports {
				a.Ports[i].Counters = nil
			}
			return a.Ports
		}
	}
	t.Fatalf("no attachment %q", name)
	return nil
}

func savedPortsOf(t *testing.T, n *Node) (all []savedPort) {
	t.Helper()
	var s savedAttachments
	if _, err := readState(filepath.Join(n.cfg.StateDir, attachmentsFile), &s); err != nil {
		t.Fatal(err)
	}
	for _, a := range s.Attachments {
		all = append(all, a.Ports...)
	}
	return all
}

func TestPublish_LeadsIntoTheContainer(t *testing.T) {
	w := newWorld()
	c := w.start(7)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 7, Name: "web"}); err != nil {
		t.Fatal(err)
	}
	c.serves(t, "10.5.72.2:80")
	list, err := n.Publish(t.Context(), "web", api.PublishRequest{Publish: []string{"127.0.0.1::80", "127.0.0.1::81", "127.0.0.1:0:53/udp"}})
	if err != nil || len(list) != 3 || list[0].HostPort == 0 || list[2].Proto != "udp" {
		t.Fatalf("%+v, %v", list, err)
	}
	if got := hello(t, list[0].HostPort); got != "hello" {
		t.Errorf("port 80 of the container said %q", got)
	}
	if got := hello(t, list[1].HostPort); got != "" {
		t.Errorf("port 81 of the container, where nobody listens, said %q", got)
	}
	for limit := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) { // a client may know of its reset before it is counted
		s, _ := n.Status(t.Context())
		if s.Counters["published"]["connections"] == 2 && s.Counters["drops"]["publish-refused"] == 1 {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("counters: %v, %v", s.Counters["published"], s.Counters["drops"])
		}
	}
	if c.sockets != 1 {
		t.Errorf("%d pools of sockets in the namespace", c.sockets)
	}
	if saved := savedPortsOf(t, n); len(saved) != 3 || saved[0].HostPort != uint16(list[0].HostPort) {
		t.Errorf("saved %+v", saved)
	}
	gone, err := n.Unpublish(t.Context(), "7", api.UnpublishRequest{Publish: []string{"80", "81"}})
	if err != nil || len(gone) != 2 {
		t.Errorf("Unpublish: %+v, %v", gone, err)
	}
	if listens(list[0].HostPort) {
		t.Error("an unpublished port is open")
	}
	if left := portsOf(t, n, "web"); len(left) != 1 || left[0].Proto != "udp" {
		t.Errorf("left: %+v", left)
	}
	if c.sockets != 0 {
		t.Error("sockets are left in the namespace, and no TCP port is published")
	}
	if _, err := n.Unpublish(t.Context(), "web", api.UnpublishRequest{Publish: []string{"80"}}); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("again: %v", err)
	}
}

func TestPublish_ThroughTheStackWhereTheNamespaceRefuses(t *testing.T) {
	w := newWorld()
	w.start(7).socketsErr = errKernel
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	a, err := n.Attach(t.Context(), api.AttachRequest{PID: 7, Publish: []string{"127.0.0.1::80"}})
	if err != nil || len(a.Ports) != 1 {
		t.Fatalf("%+v, %v", a, err)
	}
	hello(t, a.Ports[0].HostPort)
	w.mu.Lock()
	defer w.mu.Unlock()
	if want := []netip.AddrPort{netip.MustParseAddrPort("10.5.72.2:80")}; !slices.Equal(w.carried, want) {
		t.Errorf("the stack carried to %v, want %v", w.carried, want)
	}
}

func TestPublish_WantsSocketsAgainWhereTheyCouldNotBeMadeOnce(t *testing.T) {
	w := newWorld()
	c := w.start(7)
	c.socketsErr = syscall.EMFILE
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 7, Name: "web", Publish: []string{"127.0.0.1::80"}}); err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	a := n.attachments["web"]
	n.mu.Unlock()
	if n.retryOnce(a) || c.sockets != 0 {
		t.Errorf("nothing is left to try, with %d pools of sockets", c.sockets)
	}
	w.mu.Lock()
	c.socketsErr = fmt.Errorf("no: %w", errors.ErrUnsupported)
	w.mu.Unlock()
	if !n.retryOnce(a) {
		t.Error("what is not supported is tried again")
	}
	if _, err := n.Unpublish(t.Context(), "web", api.UnpublishRequest{All: true}); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	c.socketsErr = nil
	w.mu.Unlock()
	if _, err := n.Publish(t.Context(), "web", api.PublishRequest{Publish: []string{"127.0.0.1::80"}}); err != nil {
		t.Fatal(err)
	}
	if !n.retryOnce(a) || c.sockets != 1 {
		t.Errorf("something is left to try, with %d pools of sockets", c.sockets)
	}
}

func TestPublish_AllOrNothing(t *testing.T) {
	w := newWorld()
	w.start(7)
	w.start(8)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	n.port = 18472
	first, err := n.Attach(t.Context(), api.AttachRequest{PID: 7, Name: "first", Publish: []string{"127.0.0.1::80"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 8, Name: "second"}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 9}); err == nil {
		t.Fatal("attached nothing")
	}
	other, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	own, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	owns := own.Addr().(*net.TCPAddr).AddrPort()
	n.listensOn(owns, "its proxy (--proxy)")
	firsts := first.Ports[0].HostPort
	others := other.Addr().(*net.TCPAddr).Port
	probe, err := n.Publish(t.Context(), "second", api.PublishRequest{Publish: []string{"127.0.0.1::80"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Unpublish(t.Context(), "second", api.UnpublishRequest{All: true}); err != nil {
		t.Fatal(err)
	}
	free := probe[0].HostPort // nobody else has taken it meanwhile, as a rule
	tests := []struct {
		spec string
		kind error
		says []string
	}{
		{fmt.Sprintf("127.0.0.1:%d:80", firsts), api.ErrInUse, []string{`"first"`, "unpublish"}},
		{fmt.Sprintf("%d:80", firsts), api.ErrInUse, []string{`"first"`}},
		{fmt.Sprintf("127.0.0.1:%d:80", others), api.ErrInUse, []string{"another program"}},
		{fmt.Sprintf("127.0.0.1:%d:81", free), api.ErrInvalid, []string{"given twice"}},
		{"192.0.2.77:0:81", api.ErrInvalid, []string{"not an address of this host"}},
		{fmt.Sprintf("127.0.0.1:%d:81", owns.Port()), api.ErrInUse, []string{"the daemon's own", "its proxy (--proxy)"}},
		{fmt.Sprintf("%d:81", owns.Port()), api.ErrInUse, []string{"the daemon's own", "its proxy (--proxy)"}},
		{"18472:53/udp", api.ErrInUse, []string{"the daemon's own"}},
	}
	for _, tt := range tests {
		_, err := n.Publish(t.Context(), "second", api.PublishRequest{Publish: []string{fmt.Sprintf("127.0.0.1:%d:80", free), tt.spec}})
		if !errors.Is(err, tt.kind) {
			t.Errorf("%s: %v, want %v", tt.spec, err, tt.kind)
			continue
		}
		for _, s := range append(tt.says, `"second"`) {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %v does not say %q", tt.spec, err, s)
			}
		}
		if listens(free) {
			t.Errorf("%s: the other port has stayed open", tt.spec)
		}
	}
	if got := portsOf(t, n, "second"); len(got) != 0 {
		t.Errorf("ports of the second: %+v", got)
	}
	for ref, kind := range map[string]error{"nobody": api.ErrNotFound, "4711": api.ErrNotFound} {
		if _, err := n.Publish(t.Context(), ref, api.PublishRequest{Publish: []string{"80"}}); !errors.Is(err, kind) {
			t.Errorf("publish for %s: %v", ref, err)
		}
		if _, err := n.Unpublish(t.Context(), ref, api.UnpublishRequest{All: true}); !errors.Is(err, kind) {
			t.Errorf("unpublish for %s: %v", ref, err)
		}
	}
}

func TestPublish_NeedsSNATWithoutADefaultRoute(t *testing.T) {
	w := newWorld()
	w.start(7)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 7, Name: "web", NoDefaultRoute: true}); err != nil {
		t.Fatal(err)
	}
	_, err := n.Publish(t.Context(), "web", api.PublishRequest{Publish: []string{"127.0.0.1::80"}})
	if !errors.Is(err, api.ErrInvalid) || !strings.Contains(err.Error(), "--snat") {
		t.Errorf("without: %v", err)
	}
	list, err := n.Publish(t.Context(), "web", api.PublishRequest{Publish: []string{"127.0.0.1::80"}, SNAT: true})
	if err != nil || !list[0].SNAT || !portsOf(t, n, "web")[0].SNAT {
		t.Errorf("with: %+v, %v", list, err)
	}
}

func TestAttach_WithAPortThatIsTakenLeavesNothingBehind(t *testing.T) {
	w := newWorld()
	c := w.start(7)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	other, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	r := api.AttachRequest{PID: 7, Name: "web", Publish: []string{"127.0.0.1::80", fmt.Sprintf("%v:80", other.Addr())}}
	if _, err := n.Attach(t.Context(), r); !errors.Is(err, api.ErrInUse) || !strings.Contains(err.Error(), "attach pid 7") {
		t.Errorf("Attach: %v", err)
	}
	nothingLeft(t, w, n)

	c.createErr = errKernel
	r.Publish = []string{fmt.Sprintf("127.0.0.1:%d:80", freePort(t))}
	if _, err := n.Attach(t.Context(), r); !errors.Is(err, errKernel) {
		t.Errorf("Attach: %v", err)
	}
	nothingLeft(t, w, n)
	c.createErr = nil
	if _, err := n.Attach(t.Context(), r); err != nil { // the port is free again
		t.Errorf("Attach: %v", err)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func TestPorts_GoWithTheirAttachment(t *testing.T) {
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	for name, end := range map[string]func(*container){
		"detach":               func(*container) { _ = n.Detach(t.Context(), "web", "") },
		"the container's exit": func(c *container) { c.exit() },
	} {
		c := w.start(7)
		a, err := n.Attach(t.Context(), api.AttachRequest{PID: 7, Name: "web", Publish: []string{"127.0.0.1::80"}})
		if err != nil {
			t.Fatal(err)
		}
		end(c)
		for limit := time.Now().Add(20 * time.Second); listens(a.Ports[0].HostPort); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("%s: the port stays open", name)
			}
		}
		for limit := time.Now().Add(20 * time.Second); len(savedNames(t, n)) > 0; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("%s: it stays in the state file", name)
			}
		}
		if c.sockets != 0 {
			t.Errorf("%s: sockets are left in the namespace", name)
		}
	}
	nothingLeft(t, w, n)
}

func TestAdopt_TakesPortsUpAgain(t *testing.T) {
	w := newWorld()
	conf := testConfig(t)
	c := w.start(7)
	first := readyNode(t, w, conf, "10.5.72.0/24")
	a, err := first.Attach(t.Context(), api.AttachRequest{PID: 7, Name: "web", Publish: []string{"127.0.0.1::80", "127.0.0.1::81"}, SNAT: true})
	if err != nil {
		t.Fatal(err)
	}
	before := portsOf(t, first, "web")
	stopNode(first)
	if listens(a.Ports[0].HostPort) || c.sockets != 0 {
		t.Error("something of the ports is left when the node has stopped")
	}
	taken, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", a.Ports[1].HostPort))
	if err != nil {
		t.Skip("the port has been taken by another process")
	}
	defer taken.Close()

	c.serves(t, "10.5.72.2:80")
	c.serves(t, "10.5.72.2:81")
	second := readyNode(t, w, conf, "10.5.72.0/24")
	if err := second.adopt(); err != nil {
		t.Fatal(err)
	}
	if got := hello(t, a.Ports[0].HostPort); got != "hello" {
		t.Errorf("the first port said %q", got)
	}
	now := portsOf(t, second, "web")
	if !strings.Contains(now[1].Problem, "taken by another program") {
		t.Errorf("the second port: %+v", now[1])
	}
	if list, _ := second.Attachments(t.Context()); !strings.Contains(list[0].Problem, "taken by another program") {
		t.Errorf("the attachment's problem: %q", list[0].Problem)
	}
	if saved := savedPortsOf(t, second); len(saved) != 2 {
		t.Errorf("saved %+v", saved)
	}
	second.mu.Lock()
	att := second.attachments["web"]
	second.mu.Unlock()
	if second.retryOnce(att) {
		t.Error("the port was opened twice")
	}
	taken.Close()
	if !second.retryOnce(att) {
		t.Fatal("the port is free and was not opened")
	}
	if got := hello(t, a.Ports[1].HostPort); got != "hello" {
		t.Errorf("the second port said %q", got)
	}
	if now := portsOf(t, second, "web"); !reflect.DeepEqual(now, before) {
		t.Errorf("now %+v, before %+v", now, before)
	}
	w.checkOrder(t)
}

func TestSavedPort_CollidesWhereTheHostCannotHaveBoth(t *testing.T) {
	port := func(s string) savedPort {
		list, err := api.ParsePublish(s)
		if err != nil {
			t.Fatal(err)
		}
		return portOf(list[0])
	}
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"80:1", "80:2", true},
		{"80:1", "81:1", false},
		{"80:1", "80:1/udp", false},
		{"80:1", "127.0.0.1:80:1", true},
		{"0.0.0.0:80:1", "127.0.0.1:80:1", true},
		{"0.0.0.0:80:1", "[::1]:80:1", false},
		{"[::]:80:1", "[::1]:80:1", true},
		{"[::]:80:1", "0.0.0.0:80:1", false},
		{"80:1", "[::1]:80:1", true},
		{"127.0.0.2:80:1", "127.0.0.1:80:1", false},
		{"127.0.0.1:80:1", "127.0.0.1:80:2", true},
		{":1", ":1", false},
	} {
		if got := port(tt.a).collides(port(tt.b)); got != tt.want || port(tt.b).collides(port(tt.a)) != got {
			t.Errorf("%s and %s: %t", tt.a, tt.b, got)
		}
	}
}
