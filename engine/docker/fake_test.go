// A daemon and a dockerd that are not.

package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

var start = time.Date(2026, 5, 6, 7, 0, 0, 0, time.UTC)

// fakeNode is an API with the subnet 10.213.7.0/24, which keeps what it is asked to.
type fakeNode struct {
	mu        sync.Mutex
	status    api.Status
	attached  map[string]api.Attachment // by name
	requests  []api.AttachRequest
	reserved  map[string]api.Address
	taken     map[string]bool // names that others on the overlay have
	busyPorts map[int]bool    // of the host
	portStart int             // the first that is not privileged
	published [][]string
	next      int
	lists     int   // how often all attachments were listed
	err       error // of everything
}

func newFakeNode() *fakeNode {
	return &fakeNode{
		status:   api.Status{State: api.StateReady, Network: "10.213.0.0/16", Subnet: "10.213.7.0/24", Gateway: "10.213.7.1"},
		attached: make(map[string]api.Attachment), reserved: make(map[string]api.Address), taken: make(map[string]bool), busyPorts: make(map[int]bool), next: 2,
	}
}

func (f *fakeNode) Status(context.Context) (api.Status, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status, f.err
}

func (f *fakeNode) Attach(_ context.Context, r api.AttachRequest) (api.Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := cmp.Or(f.err, r.Validate()); err != nil {
		return api.Attachment{}, err
	}
	for _, a := range f.attached {
		if a.Owner == r.Owner || strings.HasPrefix(a.Addr, r.Addr+"/") {
			return api.Attachment{}, api.Errorf(api.CodeInUse, "%s is in use", r.Addr)
		}
	}
	f.requests = append(f.requests, r)
	a := api.Attachment{
		Name: fmt.Sprintf("docker-%d", len(f.requests)), Owner: r.Owner, Addr: r.Addr + "/24", MAC: cmp.Or(r.MAC, "02:6f:0a:d5:07:02"), IfName: "rovl01234567",
		Gateway: f.status.Gateway, Addr6: "", Since: start.Add(time.Duration(len(f.requests)) * time.Second),
	}
	if f.status.Subnet6 != "" {
		a.Addr6, a.Gateway6 = "fd00:7::2/64", "fd00:7::1"
	}
	f.attached[a.Name] = a
	return a, nil
}

func (f *fakeNode) DetachSoon(_ context.Context, ref, owner string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if a, is := f.attached[ref]; !is || a.Owner != owner {
		return api.Errorf(api.CodeNotFound, "no attachment %q of %q", ref, owner)
	}
	delete(f.attached, ref)
	return nil
}

func (f *fakeNode) Attachments(context.Context) ([]api.Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lists++
	return slices.Collect(maps.Values(f.attached)), f.err
}

func (f *fakeNode) AttachmentsOf(_ context.Context, owner string) ([]api.Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []api.Attachment
	for _, a := range f.attached {
		if a.Owner == owner {
			list = append(list, a)
		}
	}
	return list, f.err
}

func (f *fakeNode) Rename(_ context.Context, ref string, r api.NamesRequest) (api.Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a, is := f.attached[ref]
	if !is {
		return a, api.Errorf(api.CodeNotFound, "no attachment %q", ref)
	}
	for _, name := range append([]string{r.Name}, r.Aliases...) {
		if f.taken[name] {
			return a, api.Errorf(api.CodeInUse, "name %q is taken", name)
		}
	}
	delete(f.attached, ref)
	a.Name, a.Aliases = cmp.Or(r.Name, a.Name), r.Aliases
	f.attached[a.Name] = a
	return a, nil
}

func (f *fakeNode) Publish(_ context.Context, ref string, r api.PublishRequest) ([]api.Port, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a, is := f.attached[ref]
	if !is {
		return nil, api.Errorf(api.CodeNotFound, "no attachment %q", ref)
	}
	ports, err := r.Ports()
	if err != nil {
		return nil, err
	}
	for _, p := range ports {
		if p.HostPort != 0 && p.HostPort < f.portStart {
			return nil, api.Errorf(api.CodeDenied, "ports below %d are privileged", f.portStart)
		}
		if f.busyPorts[p.HostPort] {
			return nil, api.Errorf(api.CodeInUse, "port %d is taken", p.HostPort)
		}
	}
	a.Ports = append(a.Ports, ports...)
	f.attached[ref] = a
	f.published = append(f.published, r.Publish)
	return ports, nil
}

func (f *fakeNode) Unpublish(_ context.Context, ref string, _ api.UnpublishRequest) ([]api.Port, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a, is := f.attached[ref]
	if !is {
		return nil, api.Errorf(api.CodeNotFound, "no attachment %q", ref)
	}
	was := a.Ports
	a.Ports = nil
	f.attached[ref] = a
	return was, nil
}

func (f *fakeNode) ReserveAddress(_ context.Context, r api.AddressRequest) (api.Address, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := cmp.Or(f.err, r.Validate()); err != nil {
		return api.Address{}, err
	}
	if r.Addr == "" {
		r.Addr = fmt.Sprintf("10.213.7.%d", f.next)
		f.next++
	}
	if was, is := f.reserved[r.Addr]; is && was.Owner != r.Owner {
		return api.Address{}, api.Errorf(api.CodeInUse, "address %s is in use", r.Addr)
	}
	got := api.Address{Addr: r.Addr + "/24", Owner: r.Owner, Gateway: f.status.Gateway}
	f.reserved[r.Addr] = got
	return f.withHolder(got), nil
}

func (f *fakeNode) withHolder(r api.Address) api.Address {
	for _, a := range f.attached {
		if a.Addr == r.Addr {
			r.Attachment = a.Name
		}
	}
	return r
}

func (f *fakeNode) ReleaseAddress(_ context.Context, addr string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, is := f.reserved[addr]; !is {
		return api.Errorf(api.CodeNotFound, "%s is not reserved", addr)
	}
	delete(f.reserved, addr)
	return nil
}

func (f *fakeNode) Addresses(context.Context) ([]api.Address, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []api.Address
	for _, r := range f.reserved {
		list = append(list, f.withHolder(r))
	}
	return list, f.err
}

// change is for tests, while the driver runs.
func (f *fakeNode) change(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

// names are those of all attachments.
func (f *fakeNode) names() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []string
	for _, a := range f.attached {
		list = append(list, strings.Join(append([]string{a.Name}, a.Aliases...), "+"))
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

// newDriver is a driver of that node, with files of its own; dockerHost is where it looks for dockerd.
func newDriver(t *testing.T, f *fakeNode, dockerHost string) *Driver {
	t.Helper()
	d := New(Config{API: f, StateDir: t.TempDir(), RuntimeDir: t.TempDir(), DockerHost: dockerHost, Log: slog.New(slog.DiscardHandler)})
	d.readyPatience, d.settle = 50*time.Millisecond, 20*time.Millisecond
	return d
}

// served is a driver behind its socket, as dockerd reaches it: this process is dockerd.
type served struct {
	t    *testing.T
	http *http.Client
}

func serveDriver(t *testing.T, d *Driver) *served {
	t.Helper()
	dir := t.TempDir()
	ln, err := api.ListenBeside(dir, SocketName)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.Serve(ctx, ln, d.Handler(), slog.New(slog.DiscardHandler)) }()
	s := &served{t: t, http: &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, SocketName))
	}}}}
	t.Cleanup(func() {
		s.http.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

// post sends a request as docker does, and returns the status and the answer.
func (s *served) post(path, body string) (int, map[string]any) {
	s.t.Helper()
	resp, err := s.http.Post("http://plugin/"+path, contentType, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		s.t.Fatalf("%s: %v", path, err)
	}
	return resp.StatusCode, answer
}

// ok is post that must succeed.
func (s *served) ok(path, body string) map[string]any {
	s.t.Helper()
	code, answer := s.post(path, body)
	if text, _ := answer["Err"].(string); code != http.StatusOK || text != "" {
		s.t.Fatalf("%s: %d %s", path, code, text)
	}
	return answer
}

// fails is post whose answer must have an error that contains all of what.
func (s *served) fails(path, body string, what ...string) {
	s.t.Helper()
	_, answer := s.post(path, body)
	text, _ := answer["Err"].(string)
	if answer["Error"] != text { // an IPAM driver says it by this word
		s.t.Errorf("%s: %v", path, answer)
	}
	for _, w := range what {
		if !strings.Contains(text, w) {
			s.t.Errorf("%s %s: error %q does not say %q", path, body, text, w)
		}
	}
	if text == "" || strings.Contains(text, "\n") {
		s.t.Errorf("%s %s: error %q", path, body, text)
	}
}

// fakeDockerd answers as dockerd does about its containers.
type fakeDockerd struct {
	socket string
	stop   func()

	mu         sync.Mutex
	containers map[string]container
	starting   map[string]bool // of them, by id
	inspected  []string
	events     chan event
	dataRoot   string
}

func startDockerd(t *testing.T, list ...container) *fakeDockerd {
	t.Helper()
	f := &fakeDockerd{socket: filepath.Join(t.TempDir(), "d.sock"), dataRoot: t.TempDir(), containers: make(map[string]container), starting: make(map[string]bool), events: make(chan event, 16)}
	for _, c := range list {
		f.containers[c.ID] = c
	}
	f.start(t)
	return f
}

// start listens; after stop again.
func (f *fakeDockerd) start(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /info", func(w http.ResponseWriter, _ *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		_ = json.NewEncoder(w).Encode(identity{ID: "an id", DockerRootDir: f.dataRoot})
	})
	mux.HandleFunc("GET /containers/json", func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		var list []listed
		for _, c := range f.containers {
			state := "running"
			if f.starting[c.ID] {
				if state = "created"; r.URL.Query().Get("all") == "" {
					continue
				}
				list = append(list, listed{container{ID: c.ID, Name: c.Name}, state})
				continue
			}
			c.NetworkSettings.Networks = maps.Clone(c.NetworkSettings.Networks)
			for name, e := range c.NetworkSettings.Networks {
				e.Aliases = nil // as in docker's list
				c.NetworkSettings.Networks[name] = e
			}
			list = append(list, listed{c, state})
		}
		_ = json.NewEncoder(w).Encode(list)
	})
	mux.HandleFunc("GET /containers/{id}/json", func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.inspected = append(f.inspected, r.PathValue("id"))
		c, is := f.containers[r.PathValue("id")]
		if !is {
			http.Error(w, `{"message":"No such container"}`, http.StatusNotFound)
			return
		}
		_ = json.NewEncoder(w).Encode(c)
	})
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		for {
			select {
			case e := <-f.events:
				_ = json.NewEncoder(w).Encode(e)
				_ = http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	srv := httptest.NewUnstartedServer(mux)
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	f.stop = func() {
		srv.CloseClientConnections()
		srv.Close()
	}
	t.Cleanup(func() { f.stop() })
}

func (f *fakeDockerd) set(c container) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.containers[c.ID] = c
}

func (f *fakeDockerd) tell(kind, action, container string) {
	e := event{Type: kind, Action: action}
	e.Actor.ID = container
	if kind == "network" {
		e.Actor.ID, e.Actor.Attributes = "net", map[string]string{"container": container}
	}
	f.events <- e
}

// aContainer is one with an endpoint.
func aContainer(id, name, endpoint, addr string, aliases ...string) container {
	c := container{ID: id, Name: "/" + name}
	c.NetworkSettings.Networks = map[string]endpointSettings{"ovl": {EndpointID: endpoint, IPAddress: addr, Aliases: aliases}}
	return c
}

// eventually waits for something that other goroutines do.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}
