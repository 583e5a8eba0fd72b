// A daemon, a node, a store and a sandbox that are not, and the command line run in this process against them.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/node"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// start is when the fakes came to be; tests run ten minutes later.
var start = time.Date(2026, 5, 6, 7, 0, 0, 0, time.UTC)

// fakeDaemon is an api.Backend that answers from its fields and notes what happens.
type fakeDaemon struct {
	status      api.Status
	attachments []api.Attachment
	peers       []api.Peer
	err         error
	attachErr   error
	detachErr   error
	forwardErr  error
	forwardAt   chan struct{} // Forward waits for it
	notes       *notes

	mu        sync.Mutex
	config    json.RawMessage
	attached  []api.AttachRequest
	addresses []api.Address
	released  []string
}

// notes is what happened, in order.
type notes struct {
	mu   sync.Mutex
	list []string
}

func (n *notes) add(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.list = append(n.list, fmt.Sprintf(format, args...))
}

func (n *notes) String() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Join(n.list, ", ")
}

func (f *fakeDaemon) Status(context.Context) (api.Status, error) { return f.status, f.err }

func (f *fakeDaemon) Attach(_ context.Context, r api.AttachRequest) (api.Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attached = append(f.attached, r)
	f.notes.add("attach %d", r.PID)
	name := r.Name
	if name == "" {
		name = "chosen"
	}
	return api.Attachment{
		Name: name, PID: r.PID, Netns: r.Netns, IfName: "eth0", Addr: "10.213.7.2/24", MAC: "02:00:0a:d5:07:02",
		Gateway: "10.213.7.1", MTU: 1472, DefaultRoute: !r.NoDefaultRoute, Since: start,
	}, cmp.Or(f.err, f.attachErr)
}

func (f *fakeDaemon) DetachSoon(ctx context.Context, ref, owner string) error {
	return f.Detach(ctx, ref, owner)
}

func (f *fakeDaemon) Detach(_ context.Context, ref, _ string) error {
	f.notes.add("detach %s", ref)
	return cmp.Or(f.err, f.detachErr)
}

func (f *fakeDaemon) Attachments(context.Context) ([]api.Attachment, error) {
	return f.attachments, f.err
}

func (f *fakeDaemon) Rename(_ context.Context, ref string, r api.NamesRequest) (api.Attachment, error) {
	f.notes.add("rename %s %s %v", ref, r.Name, r.Aliases)
	return api.Attachment{Name: cmp.Or(r.Name, ref), Aliases: r.Aliases}, f.err
}

func (f *fakeDaemon) Publish(_ context.Context, ref string, r api.PublishRequest) ([]api.Port, error) {
	f.notes.add("publish %s %s snat %t", ref, strings.Join(r.Publish, " "), r.SNAT)
	list, err := r.Ports()
	for i := range list {
		if list[i].HostPort == 0 {
			list[i].HostPort = 49152
		}
	}
	return list, cmp.Or(err, f.err)
}

func (f *fakeDaemon) Unpublish(_ context.Context, ref string, r api.UnpublishRequest) ([]api.Port, error) {
	f.notes.add("unpublish %s %s all %t", ref, strings.Join(r.Publish, " "), r.All)
	return []api.Port{{HostPort: 8080, Port: 80, Proto: "tcp"}}, f.err
}

func (f *fakeDaemon) ReserveAddress(_ context.Context, r api.AddressRequest) (api.Address, error) {
	return api.Address{}, f.err
}

func (f *fakeDaemon) ReleaseAddress(_ context.Context, addr string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released = append(f.released, addr)
	return f.err
}

func (f *fakeDaemon) Addresses(context.Context) ([]api.Address, error) { return f.addresses, f.err }

func (f *fakeDaemon) Peers(context.Context) ([]api.Peer, error) { return f.peers, f.err }

func (f *fakeDaemon) Config(context.Context) (json.RawMessage, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.config, f.err
}

func (f *fakeDaemon) SetConfig(_ context.Context, raw json.RawMessage) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.config = raw
	}
	return f.err
}

func (f *fakeDaemon) Forward(_ context.Context, to string, accept func() (*api.Stream, error)) error {
	f.notes.add("forward %s", to)
	if f.forwardAt != nil {
		<-f.forwardAt
	}
	if err := cmp.Or(f.err, f.forwardErr); err != nil {
		return err
	}
	s, err := accept()
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = io.Copy(s, s) // an echo
	return err
}

func newFakeDaemon() *fakeDaemon {
	return &fakeDaemon{
		notes: &notes{},
		status: api.Status{
			Version: "v1.2.3", State: api.StateReady, Since: start, PID: 4711, NodeID: "0123456789abcdef0123456789abcdef",
			PublicIP: "192.0.2.1", Interface: "eth0", Port: 8285, Subnet: "10.213.7.0/24", Network: "10.213.0.0/16",
			Gateway: "10.213.7.1", Backend: "udp", MTU: 1472, RunDir: "/run/user/1000/rootless-ovl",
			StateDir: "/home/u/.local/state/rootless-ovl", SubnetEnv: "/run/user/1000/rootless-ovl/subnet.env",
			Store: api.StoreStatus{
				Endpoints: []string{"http://127.0.0.1:2379"}, Prefix: "/coreos.com/network", Embedded: true, Connected: true, Since: start,
			},
			Attachments: 2, Peers: 1,
			Counters: map[string]map[string]uint64{"tap": {"reads": 12, "writes": 0}, "drops": {"ttl_exceeded": 3}, "path_mtu": {"silent_peers": 1}},
		},
		attachments: []api.Attachment{
			{Name: "job7", Netns: "/run/user/1000/netns/x", IfName: "ovl0", Addr: "10.213.7.3/24", MAC: "02:00:0a:d5:07:03",
				Gateway: "10.213.7.1", MTU: 1472, Since: start.Add(9*time.Minute + 55*time.Second),
				Policy: api.Policy{Isolate: true, Egress: []string{"deny"}, HostAccess: []int{5432}}},
			{Name: "web", PID: 815, IfName: "eth0", Addr: "10.213.7.2/24", MAC: "02:00:0a:d5:07:02",
				Gateway: "10.213.7.1", MTU: 1472, DefaultRoute: true, Problem: "its MTU is 1430", Since: start.Add(-3 * time.Hour),
				Ports: []api.Port{{HostPort: 8080, Port: 80, Proto: "tcp"}, {HostAddr: "::1", HostPort: 53, Port: 53, Proto: "udp", SNAT: true}}},
		},
		addresses: []api.Address{
			{Addr: "10.213.7.2/24", Gateway: "10.213.7.1", Owner: "docker/12ab", Attachment: "web", Since: start},
			{Addr: "10.213.7.9/24", Gateway: "10.213.7.1", Since: start.Add(time.Minute)},
		},
		peers: []api.Peer{
			{Subnet: "10.213.9.0/24", PublicIP: "192.0.2.9", Port: 18285, MTU: 1472, PathMTU: 1372, NodeID: "fedc", Backend: "udp", LastHeard: start.Add(time.Minute)},
			{Subnet: "10.213.12.0/24", PublicIP: "192.0.2.12", Port: 8285, MTU: 1472, PathMTU: 1472, Stock: true, Backend: "udp", Problem: "same public IP as ours"},
		},
		config: json.RawMessage(`{"Network":"10.213.0.0/16","Backend":{"Type":"udp"}}`),
	}
}

// bench is a place to run command lines in.
type bench struct {
	t      *testing.T
	dir    string // runtime directory
	daemon *fakeDaemon
	world  world

	out, err bytes.Buffer // of the last run
}

// newBench has no daemon yet.
func newBench(t *testing.T) *bench {
	t.Helper()
	base, err := os.MkdirTemp("", "ovl") // short enough for sun_path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	b := &bench{t: t, dir: base + "/run", daemon: newFakeDaemon()}
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("XDG_STATE_HOME", "")
	t.Setenv("HOME", base)
	t.Setenv(envRuntimeDir, b.dir)
	t.Setenv(envStateDir, "")
	t.Setenv(envEtcdPassword, "")
	for _, name := range []string{"XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_LIB_HOME", "CONTAINERS_CONF"} {
		t.Setenv(name, "")
	}
	unexpected := func(what string) { t.Errorf("%s was called", what) }
	b.world = world{
		stdin: strings.NewReader(""), stdout: &b.out, stderr: &b.err,
		now:            func() time.Time { return start.Add(10 * time.Minute) },
		hostResolvConf: func() string { return "" },
		newNode: func(node.Config) (nodeRunner, error) {
			unexpected("newNode")
			return nil, errors.ErrUnsupported
		},
		openStore: func(context.Context, lease.ClientConfig, string) (configStore, error) {
			unexpected("openStore")
			return nil, errors.ErrUnsupported
		},
		startSandbox: func(nsutil.Spec) (sandbox, error) {
			unexpected("startSandbox")
			return nil, errors.ErrUnsupported
		},
		joinSandbox: func(api.Attachment, nsutil.Spec) (sandbox, error) {
			unexpected("joinSandbox")
			return nil, errors.ErrUnsupported
		},
		programPath:   func() string { return "/usr/bin/rootless-ovl" },
		pluginPath:    func() string { return "/usr/bin/rootless-ovl-plugin" },
		podmanVersion: func(context.Context) string { return "" },
		onPath:        func(string) bool { return false },
		systemdRuns:   func() bool { return false },
		dockerLink:    func(context.Context, func() (int, bool, error), *slog.Logger) {},
		shutIn:        func(shutInOrder) (sight, error) { return sight{}, nil },
		endDaemon: func(context.Context, int) error {
			unexpected("endDaemon")
			return errors.ErrUnsupported
		},
	}
	return b
}

// serve has the bench's daemon on its socket.
func (b *bench) serve() *bench {
	b.t.Helper()
	ln, err := api.Listen(b.dir)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.Serve(ctx, ln, api.Handler(b.daemon), slog.New(slog.DiscardHandler)) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("Serve: %v", err)
		}
	})
	return b
}

// run runs one command line and returns its exit status; out and err have what it printed.
func (b *bench) run(args ...string) int {
	b.out.Reset()
	b.err.Reset()
	return execute(context.Background(), b.world, args)
}

// must runs one that has to succeed and returns its standard output.
func (b *bench) must(args ...string) string {
	b.t.Helper()
	if code := b.run(args...); code != 0 {
		b.t.Fatalf("%q: exit status %d, %s", args, code, &b.err)
	}
	return b.out.String()
}

// fakeSandbox notes what is done to it.
type fakeSandbox struct {
	notes    *notes
	code     int
	release  error
	warnings []string
}

func (s *fakeSandbox) PID() int { return 1234 }

func (s *fakeSandbox) Release() error {
	s.notes.add("release")
	return s.release
}

func (s *fakeSandbox) Warnings() []string { return s.warnings }

func (s *fakeSandbox) ForwardSignals() func() {
	s.notes.add("forward signals")
	return func() { s.notes.add("stop forwarding") }
}

func (s *fakeSandbox) Done() <-chan struct{} {
	s.notes.add("done")
	ended := make(chan struct{})
	close(ended)
	return ended
}

func (s *fakeSandbox) Wait() (int, error) {
	s.notes.add("wait")
	return s.code, nil
}

func (s *fakeSandbox) Close() error {
	s.notes.add("close")
	return nil
}

// fakeNode runs until its context ends, or fails at once.
type fakeNode struct {
	running chan struct{}
	err     error
}

func (n *fakeNode) Run(ctx context.Context) error {
	if n.err != nil {
		return n.err
	}
	close(n.running)
	<-ctx.Done()
	return nil
}

// jsonNames are the member names of a JSON object, or of the first object of an array, sorted.
func jsonNames(t *testing.T, text string) []string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	if list, ok := v.([]any); ok {
		if len(list) == 0 {
			return nil
		}
		v = list[0]
	}
	object, ok := v.(map[string]any)
	if !ok {
		t.Fatalf("%q is not an object", text)
	}
	var names []string
	for name := range object {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
