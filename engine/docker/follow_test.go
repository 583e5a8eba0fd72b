// What the driver learns from dockerd's own API: names, and what has ended unseen.

package docker

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// follow runs Follow until the test ends.
func follow(t *testing.T, d *Driver) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Follow(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// attach is an attachment of docker's.
func attach(t *testing.T, f *fakeNode, endpoint, addr string) {
	t.Helper()
	if _, err := f.ReserveAddress(t.Context(), api.AddressRequest{Addr: addr, Owner: reservationOwner}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Attach(t.Context(), api.AttachRequest{PID: 1, Loose: true, Owner: ownerOf(endpoint), Addr: addr}); err != nil {
		t.Fatal(err)
	}
}

func TestNamesOf_AreThoseThatTheOverlayCanHave(t *testing.T) {
	const id = "c0ffee1234567890"
	for _, c := range []struct {
		name    string
		aliases []string
		want    api.NamesRequest
	}{
		{"web", nil, api.NamesRequest{Name: "web"}},
		{"shop-web-1", []string{"shop-web-1", "WEB", "web", "c0ffee123456", "c0ffee12345", "a_b", "x/y", ""}, api.NamesRequest{Name: "shop-web-1", Aliases: []string{"a_b", "c0ffee12345", "web"}}},
		{strings.Repeat("n", 64), []string{"w"}, api.NamesRequest{Aliases: []string{"w"}}},
		{"12345", nil, api.NamesRequest{}},
	} {
		if got := namesOf(aContainer(id, c.name, "e", "", c.aliases...), endpointSettings{Aliases: c.aliases}); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s %v: %+v, want %+v", c.name, c.aliases, got, c.want)
		}
	}
}

func TestFollow_NamesContainers(t *testing.T) {
	f := newFakeNode()
	attach(t, f, "e1", "10.213.7.2")
	web := aContainer("c1", "web", "e1", "10.213.7.2", "front")
	engine := startDockerd(t, web, aContainer("c9", "elsewhere", "e9", "172.18.0.2"))
	follow(t, newDriver(t, f, engine.socket))
	eventually(t, "a container that runs already has its names", func() bool { return f.names() == "web+front" })

	attach(t, f, "e2", "10.213.7.3")
	engine.set(aContainer("c2", "shop", "e2", "10.213.7.3"))
	engine.tell("network", "connect", "c2")
	eventually(t, "one that is connected", func() bool { return f.names() == "shop web+front" })

	web.Name = "/www"
	engine.set(web)
	engine.tell("container", "rename", "c1")
	eventually(t, "one that is renamed", func() bool { return f.names() == "shop www+front" })
	engine.tell("container", "rename", "c9")
	engine.tell("container", "rename", "../../x")
	engine.tell("container", "die", "c1")
}

func TestFollow_WaitsForANodeThatStarts(t *testing.T) {
	f := newFakeNode()
	f.status.State = api.StateStarting
	engine := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2"))
	d := newDriver(t, f, engine.socket)
	d.readyPatience = time.Minute
	follow(t, d)
	attach(t, f, "e1", "10.213.7.2")
	f.change(func() { f.status.State = api.StateReady })
	eventually(t, "named when the node knows its attachments", func() bool { return f.names() == "web" })
}

func TestFollow_FindsDockerdAgain(t *testing.T) {
	f := newFakeNode()
	attach(t, f, "e1", "10.213.7.2")
	web := aContainer("c1", "web", "e1", "10.213.7.2")
	engine := startDockerd(t, web)
	follow(t, newDriver(t, f, engine.socket))
	eventually(t, "named", func() bool { return f.names() == "web" })
	engine.stop()
	web.Name = "/www"
	engine.set(web)
	engine.start(t)
	eventually(t, "named by what it is called when dockerd is back", func() bool { return f.names() == "www" })
}

func TestFollow_GivesTheNamesThatAreFree(t *testing.T) {
	f := newFakeNode()
	f.taken = map[string]bool{"web": true, "front": true}
	attach(t, f, "e1", "10.213.7.2")
	attach(t, f, "e2", "10.213.7.3")
	engine := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2", "w"), aContainer("c2", "shop", "e2", "10.213.7.3", "front"))
	d := newDriver(t, f, engine.socket)
	follow(t, d)
	eventually(t, "what is taken is left out", func() bool { return f.names() == "docker-1+w shop" })
	f.change(func() { clear(f.taken) })
	engine.tell("container", "start", "c1")
	engine.tell("container", "start", "c2")
	eventually(t, "and given when it is free", func() bool { return f.names() == "shop+front web+w" && len(d.allRefused()) == 0 })
}

func TestFollow_DropsWhatDockerHasForgotten(t *testing.T) {
	f := newFakeNode()
	attach(t, f, "e1", "10.213.7.2")
	attach(t, f, "e2", "10.213.7.3")
	for addr, owner := range map[string]string{"10.213.7.50": "docker", "10.213.7.51": "cni"} {
		if _, err := f.ReserveAddress(t.Context(), api.AddressRequest{Addr: addr, Owner: owner}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Attach(t.Context(), api.AttachRequest{PID: 1, Owner: "cni/net/c/eth0", Addr: "10.213.7.51"}); err != nil {
		t.Fatal(err)
	}
	engine := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2"))
	follow(t, newDriver(t, f, engine.socket))
	eventually(t, "an endpoint and an address of no container are gone, and nothing else", func() bool {
		left, err := f.Addresses(t.Context())
		return err == nil && f.names() == "docker-3 web" && len(left) == 2
	})
}

func TestFollow_DropsNothingWhileThereAreTwoDockerds(t *testing.T) {
	f := newFakeNode()
	attach(t, f, "e1", "10.213.7.2")
	attach(t, f, "e2", "10.213.7.3")
	engine := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2"))
	other := startDockerd(t)
	d := newDriver(t, f, engine.socket)
	if err := d.sockets.add(other.socket); err != nil {
		t.Fatal(err)
	}
	conn := newDockerd(other.socket)
	defer conn.close()
	if err := d.tidy(t.Context(), conn, anyEndpoint); err != nil || f.names() != "docker-1 docker-2" {
		t.Errorf("%s %v", f.names(), err)
	}
	other.stop()
	again := newDockerd(engine.socket)
	defer again.close()
	if err := d.tidy(t.Context(), again, anyEndpoint); !errors.Is(err, errUnsure) || f.names() != "docker-2 web" {
		t.Errorf("one that does not answer may come again: %s %v", f.names(), err)
	}
}

func TestFollow_DropsWhenTheOtherSocketsAreDeadOrTheSameDockerds(t *testing.T) {
	f := newFakeNode()
	attach(t, f, "e1", "10.213.7.2")
	attach(t, f, "e2", "10.213.7.3")
	engine := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2"))
	second := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2"))
	second.dataRoot = engine.dataRoot
	d := newDriver(t, f, filepath.Join(t.TempDir(), "default.sock"))
	for _, socket := range []string{second.socket, engine.socket} {
		if err := d.sockets.add(socket); err != nil {
			t.Fatal(err)
		}
	}
	conn := newDockerd(engine.socket)
	defer conn.close()
	if err := d.tidy(t.Context(), conn, anyEndpoint); !errors.Is(err, errUnsure) {
		t.Errorf("a socket that was not given up: %v", err)
	}
	d.connectPatience = 10 * time.Millisecond
	follow(t, d)
	eventually(t, "the dead socket is forgotten, those that answer are not", func() bool { return len(d.sockets.all()) == 2 })
	if err := d.tidy(t.Context(), conn, anyEndpoint); err != nil || f.names() != "web" {
		t.Errorf("two sockets of one dockerd: %s %v", f.names(), err)
	}
	left, err := openSockets(filepath.Dir(d.sockets.path), "")
	if err != nil || len(left.all()) != 2 {
		t.Errorf("the file: %v %v", left.all(), err)
	}
}

func TestTidy_LeavesAContainerThatTakesLongToStart(t *testing.T) {
	f := newFakeNode()
	attach(t, f, "e1", "10.213.7.2")
	attach(t, f, "e2", "10.213.7.3")
	engine := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2"))
	engine.starting["c1"] = true
	conn := newDockerd(engine.socket)
	defer conn.close()
	d := newDriver(t, f, engine.socket)
	if err := d.remember("e2", api.ErrInUse); !err {
		t.Fatal(err)
	}
	if err := d.tidy(t.Context(), conn, anyEndpoint); err != nil || f.names() != "docker-1" {
		t.Errorf("%s %v", f.names(), err)
	}
	if left := d.allRefused(); len(left) > 0 {
		t.Errorf("an endpoint that was dropped still waits for names: %v", left)
	}
}

func TestLook_AsksOnlyForWhatWaitsForNames(t *testing.T) {
	f := newFakeNode()
	attach(t, f, "e1", "10.213.7.2")
	attach(t, f, "e2", "10.213.7.3")
	engine := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2"), aContainer("c2", "shop", "e2", "10.213.7.3"))
	conn := newDockerd(engine.socket)
	defer conn.close()
	d := newDriver(t, f, engine.socket)
	d.remember("e2", api.ErrInUse)
	d.remember("e3", api.ErrInUse)
	if _, err := d.look(t.Context(), conn, d.isRefused); err != nil || f.names() != "docker-1 shop" || !slices.Equal(engine.inspected, []string{"c2"}) || f.lists != 1 {
		t.Errorf("%s, inspected %v, %d lists, %v", f.names(), engine.inspected, f.lists, err)
	}
	if left := d.allRefused(); len(left) > 0 {
		t.Errorf("an endpoint that is not there still waits for names: %v", left)
	}
}

func TestFollow_ManyEventsAtOnceAreNotLost(t *testing.T) {
	f := newFakeNode()
	attach(t, f, "e1", "10.213.7.2")
	engine := startDockerd(t, aContainer("c1", "web", "e1", "10.213.7.2"))
	engine.starting["c1"] = true
	follow(t, newDriver(t, f, engine.socket))
	for range 4 * maxWaiting {
		engine.tell("container", "start", "c9")
	}
	engine.mu.Lock()
	delete(engine.starting, "c1")
	engine.mu.Unlock()
	engine.tell("container", "start", "c1")
	eventually(t, "the last is named", func() bool { return f.names() == "web" })
}

func TestEvents_OneWithoutEndIsNotRead(t *testing.T) {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "d.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, `{"Type":"container","Action":"start","Actor":{"ID":"c1"}}`+"\n"+`{"Type":"`)
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat("x", 1<<16)); err != nil {
				return
			}
		}
	}))
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	defer srv.Close()
	conn := newDockerd(ln.Addr().String())
	defer conn.close()
	n := 0
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := conn.events(ctx, func() {}, func(event) { n++ }); !errors.Is(err, io.ErrUnexpectedEOF) || n != 1 {
		t.Errorf("%d events, %v", n, err)
	}
}

func TestOrphans_MadeAnewAreNone(t *testing.T) {
	before := orphans{map[string]api.Attachment{"e1": {Since: start}, "e2": {Since: start}, "e3": {Since: start}}, map[string]bool{"a": true, "b": true}}
	after := orphans{map[string]api.Attachment{"e1": {Since: start}, "e2": {Since: start.Add(1)}}, map[string]bool{"b": true, "c": true}}
	if got := before.and(after); len(got.endpoints) != 1 || len(got.addresses) != 1 || !got.addresses["b"] {
		t.Errorf("%+v", got)
	}
}
