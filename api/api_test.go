// Client, Handler and socket together, and the Handler against requests no Client of ours would send.

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestClient_GetsWhatTheBackendSays(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	b := &fakeBackend{
		status: Status{
			Version: "1.2.3", State: StateReady, Since: since, Subnet: "10.213.7.0/24", MTU: 1472, Attachments: 1, Peers: 1,
			Store:    StoreStatus{Endpoints: []string{"http://127.0.0.1:2379"}, Connected: true, Since: since},
			Counters: map[string]map[string]uint64{"drops": {"ttl_exceeded": 3}},
		},
		attachments: []Attachment{
			{Name: "web", PID: 42, IfName: "eth0", Addr: "10.213.7.2/24", Since: since},
			{Name: "job", Inode: 4026532345, IfName: "eth0", Addr: "10.213.7.3/24", Since: since, Owner: "cni/a net/0123&x=y/eth0"},
		},
		peers:  []Peer{{Subnet: "10.213.9.0/24", PublicIP: "192.0.2.9", Port: 8285, Stock: true}},
		config: json.RawMessage(`{"Network":"10.213.0.0/16"}`),
	}
	c := serve(t, b)
	ctx := context.Background()

	if got, err := c.Status(ctx); err != nil || !reflect.DeepEqual(got, b.status) {
		t.Errorf("Status: %+v, %v", got, err)
	}
	if got, err := c.Attachments(ctx); err != nil || !reflect.DeepEqual(got, b.attachments) {
		t.Errorf("Attachments: %+v, %v", got, err)
	}
	if got, err := c.Peers(ctx); err != nil || !reflect.DeepEqual(got, b.peers) {
		t.Errorf("Peers: %+v, %v", got, err)
	}
	if got, err := c.Config(ctx); err != nil || string(got) != string(b.config) {
		t.Errorf("Config: %s, %v", got, err)
	}
	if err := c.SetConfig(ctx, json.RawMessage(`{"Network":"10.5.0.0/16"}`)); err != nil {
		t.Errorf("SetConfig: %v", err)
	}
	if string(b.config) != `{"Network":"10.5.0.0/16"}` {
		t.Errorf("the backend got the config %s", b.config)
	}

	if got, err := c.AttachmentsOf(ctx, "cni/a net/0123&x=y/eth0"); err != nil || !reflect.DeepEqual(got, b.attachments[1:]) {
		t.Errorf("AttachmentsOf: %+v, %v", got, err)
	}
	if got, err := c.AttachmentsOf(ctx, "cni/other"); err != nil || len(got) != 0 {
		t.Errorf("AttachmentsOf another: %+v, %v", got, err)
	}
	if got, err := c.Rename(ctx, "web", NamesRequest{Name: "shop", Aliases: []string{"www"}}); err != nil || got.Name != "shop" || !slices.Equal(got.Aliases, []string{"www"}) ||
		!slices.Equal(b.renamed, []string{"web"}) {
		t.Errorf("Rename: %+v, %v; the backend was asked for %q", got, err, b.renamed)
	}

	req := AttachRequest{PID: 42, Name: "web", Addr: "10.213.7.2", IfName: "eth0", MAC: "02:00:00:00:00:01", NoDefaultRoute: true}
	a, err := c.Attach(ctx, req)
	if err != nil || a.Addr != "10.213.7.2/24" {
		t.Errorf("Attach: %+v, %v", a, err)
	}
	if err := c.Detach(ctx, "web", ""); err != nil {
		t.Errorf("Detach: %v", err)
	}
	if err := c.DetachSoon(ctx, "db", "docker/1"); err != nil {
		t.Errorf("DetachSoon: %v", err)
	}
	if !reflect.DeepEqual(b.attached, []AttachRequest{req}) || !slices.Equal(b.detached, []string{"web"}) || !slices.Equal(b.detachedSoon, []string{"dbdocker/1"}) {
		t.Errorf("the backend was asked to attach %+v, detach %q and detach %q soon", b.attached, b.detached, b.detachedSoon)
	}
}

func TestHandler_SendsEmptyListsAndNotNull(t *testing.T) {
	for _, path := range []string{PathAttachments, PathPeers} {
		rec := httptest.NewRecorder()
		Handler(&fakeBackend{}).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		if got := strings.TrimSpace(rec.Body.String()); got != "[]" {
			t.Errorf("GET %s: %s", path, got)
		}
	}
}

func TestClient_ErrorsKeepTheirKindAndText(t *testing.T) {
	tests := []struct {
		name     string
		backend  error
		sentinel error
		code     Code
		status   int
	}{
		{"not found", Errorf(CodeNotFound, "no attachment %q", "x"), ErrNotFound, CodeNotFound, 404},
		{"in use", Errorf(CodeInUse, "address taken"), ErrInUse, CodeInUse, 409},
		{"invalid", Errorf(CodeInvalid, "outside the subnet"), ErrInvalid, CodeInvalid, 400},
		{"denied", Errorf(CodeDenied, "another user's"), ErrDenied, CodeDenied, 403},
		{"unavailable", Errorf(CodeUnavailable, "no lease yet"), ErrUnavailable, CodeUnavailable, 503},
		{"exhausted", Errorf(CodeExhausted, "subnet full"), ErrExhausted, CodeExhausted, 507},
		{"internal", Errorf(CodeInternal, "netlink"), ErrInternal, CodeInternal, 500},
		{"any other error", errors.New("boom"), ErrInternal, CodeInternal, 500},
		{"wrapped Error", fmt.Errorf("attach web: %w", Errorf(CodeInUse, "taken")), ErrInUse, CodeInUse, 409},
		{"wrapped sentinel", fmt.Errorf("attach web: %w", ErrExhausted), ErrExhausted, CodeExhausted, 507},
		{"end of context", fmt.Errorf("attach web: %w", context.Canceled), ErrUnavailable, CodeUnavailable, 503},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := &fakeBackend{err: tt.backend}
			_, err := serve(t, b).Status(context.Background())
			var e *Error
			if !errors.As(err, &e) || e.Code != tt.code || !errors.Is(err, tt.sentinel) || err.Error() != tt.backend.Error() {
				t.Errorf("got %#v, want %q with code %s", err, tt.backend, tt.code)
			}
			for _, other := range []error{ErrNotFound, ErrInUse, ErrInvalid, ErrDenied, ErrUnavailable, ErrExhausted, ErrInternal} {
				if !errors.Is(tt.sentinel, other) && errors.Is(err, other) {
					t.Errorf("%v is also %v", err, other)
				}
			}
			rec := httptest.NewRecorder()
			Handler(b).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, PathStatus, nil))
			if rec.Code != tt.status {
				t.Errorf("HTTP status %d, want %d", rec.Code, tt.status)
			}
		})
	}
}

func TestErrorf_KeepsItsCauseReachable(t *testing.T) {
	if err := Errorf(CodeInUse, "%w here", ErrAnotherDaemon); !errors.Is(err, ErrAnotherDaemon) || !errors.Is(err, ErrInUse) {
		t.Errorf("%#v", err)
	}
}

func TestHandler_RefusesWhatItDoesNotUnderstand(t *testing.T) {
	tests := []struct {
		name, method, path, body string
		status                   int
		says                     string
	}{
		{"unknown path", "GET", "/v1/nothing", "", 404, "/v1/nothing"},
		{"unknown version", "GET", "/v9/status", "", 404, "newer"},
		{"wrong method", "POST", PathStatus, "{}", 405, "use GET"},
		{"wrong method on a list", "DELETE", PathAttachments, "", 405, "GET or POST"},
		{"wrong method on one", "GET", PathAttachments + "/web", "", 405, "use DELETE"},
		{"no body", "POST", PathAttachments, "", 400, "not an attach request"},
		{"not JSON", "POST", PathAttachments, "pid=3", 400, "not an attach request"},
		{"an array", "POST", PathAttachments, "[1]", 400, "not an attach request"},
		{"unknown member", "POST", PathAttachments, `{"pid":3,"colour":"red"}`, 400, "colour"},
		{"wrong type", "POST", PathAttachments, `{"pid":"3"}`, 400, "pid"},
		{"pid beyond an int", "POST", PathAttachments, `{"pid":99999999999999999999}`, 400, "pid"},
		{"two objects", "POST", PathAttachments, `{"pid":3}{"pid":4}`, 400, "after its JSON object"},
		{"too large", "POST", PathAttachments, `{"name":"` + strings.Repeat("x", MaxBody) + `"}`, 400, "larger than 524288"},
		{"no namespace", "POST", PathAttachments, `{}`, 400, "neither a pid nor a netns"},
		{"two namespaces", "POST", PathAttachments, `{"pid":3,"netns":"/x"}`, 400, "both a pid (3) and a netns path (/x)"},
		{"config not JSON", "PUT", PathConfig, "Network: 10.0.0.0/8", 400, "not a JSON object"},
		{"config an array", "PUT", PathConfig, "[]", 400, "not a JSON object"},
		{"config empty", "PUT", PathConfig, "", 400, "not a JSON object"},
		{"config too large", "PUT", PathConfig, `{"x":"` + strings.Repeat("x", MaxBody) + `"}`, 400, "larger than 524288"},
		{"owner of two lines", "GET", PathAttachments + "?owner=a%0Ab", "", 400, "printable"},
		{"owner of nothing", "GET", PathAttachments + "?owner=", "", 400, "1 to 255"},
		{"names of a path", "PUT", PathAttachments + "/a%2Fb/names", `{"name":"web"}`, 400, "neither a name nor a pid"},
		{"names not JSON", "PUT", PathAttachments + "/web/names", "name=x", 400, "not a names request"},
		{"names that are none", "PUT", PathAttachments + "/web/names", `{"aliases":["a/b"]}`, 400, "alias"},
		{"detach of an endless name", "DELETE", PathAttachments + "/" + strings.Repeat("x", 200), "", 400, "neither a name nor a pid"},
		{"detach of a path", "DELETE", PathAttachments + "/a%2Fb", "", 400, "neither a name nor a pid"},
		{"detach of a zero byte", "DELETE", PathAttachments + "/a%00b", "", 400, "neither a name nor a pid"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := &fakeBackend{}
			rec := httptest.NewRecorder()
			Handler(b).ServeHTTP(rec, httptest.NewRequest(tt.method, tt.path, strings.NewReader(tt.body)))
			if rec.Code != tt.status {
				t.Errorf("status %d, want %d", rec.Code, tt.status)
			}
			var e Error
			if err := json.Unmarshal(rec.Body.Bytes(), &e); err != nil || e.Code == "" || !strings.Contains(e.Message, tt.says) {
				t.Errorf("answer %s, want a JSON error that says %q", rec.Body, tt.says)
			}
			if len(e.Message) > 300 {
				t.Errorf("an error of %d bytes is no line", len(e.Message))
			}
			if len(b.attached)+len(b.detached)+len(b.renamed) != 0 || b.config != nil {
				t.Error("the backend was called")
			}
		})
	}
}

func TestAttachRequest_ValidateNamesTheFault(t *testing.T) {
	ok := []AttachRequest{
		{PID: 1},
		{Netns: "/run/user/1001/netns/x"},
		{PID: 1, Name: "proj_web.1-a", Addr: "10.213.7.2", IfName: "eth0", MAC: "02:00:00:00:00:01"},
		{PID: 1, Name: "1a"},
		{PID: 1, IfName: "abcdefghijklmno"},
		{NetnsFD: 3, Owner: "cni/a net/0123/eth0"},
		{PID: 1, Owner: strings.Repeat("o", 255)},
	}
	for _, r := range ok {
		if err := r.Validate(); err != nil {
			t.Errorf("%+v: %v", r, err)
		}
	}
	bad := []struct {
		r    AttachRequest
		says string
	}{
		{AttachRequest{PID: -4}, "-4 is not a pid"},
		{AttachRequest{NetnsFD: 3, PID: 1}, "name only one of them"},
		{AttachRequest{NetnsFD: 3, Netns: "/x"}, "name only one of them"},
		{AttachRequest{NetnsFD: 2}, "above 2"},
		{AttachRequest{NetnsFD: -1}, "above 2"},
		{AttachRequest{PID: 1, Owner: strings.Repeat("o", 256)}, "256 bytes"},
		{AttachRequest{PID: 1, Owner: "a\nb"}, "printable"},
		{AttachRequest{PID: 1, Owner: "caf\u00e9"}, "printable"},
		{AttachRequest{PID: 1, Aliases: []string{"a/b"}}, "alias"},
		{AttachRequest{Netns: "netns/x"}, "relative"},
		{AttachRequest{Netns: "/a\x00b"}, "zero byte"},
		{AttachRequest{Netns: "/proc/self/ns/net"}, "attach $$"},
		{AttachRequest{Netns: "//proc/./thread-self/ns/net"}, "attach $$"},
		{AttachRequest{PID: 1, Name: "1234"}, "taken for a pid"},
		{AttachRequest{PID: 1, Name: "-x"}, "beginning with a letter or digit"},
		{AttachRequest{PID: 1, Name: "a/b"}, "use letters"},
		{AttachRequest{PID: 1, Name: strings.Repeat("n", 64)}, "64 characters"},
		{AttachRequest{PID: 1, Addr: "10.213.7.2/24"}, "without a length"},
		{AttachRequest{PID: 1, Addr: "fd00::1"}, "not an IPv4 address"},
		{AttachRequest{PID: 1, Addr: "10.213.7.300"}, "10.213.7.300"},
		{AttachRequest{PID: 1, IfName: "a name"}, "interface name"},
		{AttachRequest{PID: 1, IfName: "lo"}, "interface name"},
		{AttachRequest{PID: 1, IfName: "eth%d"}, "interface name"},
		{AttachRequest{PID: 1, IfName: "abcdefghijklmnop"}, "interface name"},
		{AttachRequest{PID: 1, Gateway: true, Addr: "10.213.7.2"}, "leave it out"},
		{AttachRequest{PID: 1, Gateway: true, NoDefaultRoute: true}, "leave --no-default-route out"},
		{AttachRequest{PID: 1, MAC: "zz"}, "not a MAC address"},
		{AttachRequest{PID: 1, MAC: "02:00:00:00:00:00:00:01"}, "not a MAC address"},
		{AttachRequest{PID: 1, MAC: "01:00:5e:00:00:01"}, "unicast"},
		{AttachRequest{PID: 1, MAC: "00:00:00:00:00:00"}, "unicast"},
	}
	for _, tt := range bad {
		err := tt.r.Validate()
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%+v: %v, want ErrInvalid that says %q", tt.r, err, tt.says)
		}
	}
}

// TestJSONNames_AreStable holds the names that scripts depend on.
func TestJSONNames_AreStable(t *testing.T) {
	tests := []struct {
		v    any
		want string
	}{
		{Status{}, "version state problem since pid node_id public_ip interface port subnet network gateway backend mtu public_ipv6 subnet6 network6 gateway6 outbound_addrs outbound_if proxy domain ephemeral runtime_dir state_dir subnet_file store sandbox attachments peers addrs_free counters"},
		{Sandbox{}, "seccomp landlock no_new_privs off memory_limit memory_limit_from"},
		{StoreStatus{}, "endpoints prefix embedded connected since error"},
		{Attachment{}, "name pid netns inode owner ifname addr addr6 mac gateway gateway6 mtu default_route whole_subnet loose dns_at problem warnings since counters aliases dns ports isolate allow_from allow_to egress host_access"},
		{Port{}, "host_addr host_port port proto snat problem counters"},
		{PublishRequest{}, "publish snat"},
		{UnpublishRequest{}, "publish all"},
		{AttachRequest{}, "pid netns netns_fd owner name addr ifname mac no_default_route gateway aliases loose no_ipv6 dns_at publish snat isolate allow_from allow_to egress host_access"},
		{NamesRequest{}, "name aliases"},
		{Address{}, "addr addr6 gateway gateway6 owner attachment since"},
		{AddressRequest{}, "addr owner"},
		{DNS{}, "server search"},
		{Peer{}, "subnet public_ip port mtu path_mtu subnet6 public_ipv6 path_mtu6 node_id stock backend problem last_heard counters"},
		{Error{}, "error code"},
	}
	for _, tt := range tests {
		var names []string
		for _, f := range reflect.VisibleFields(reflect.TypeOf(tt.v)) {
			if f.IsExported() && !f.Anonymous {
				name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
				names = append(names, name)
			}
		}
		if got := strings.Join(names, " "); got != tt.want {
			t.Errorf("%T:\n got %s\nwant %s", tt.v, got, tt.want)
		}
	}
}

func TestClient_RefusesWhatIsNoNameBeforeAsking(t *testing.T) {
	b := &fakeBackend{}
	c := serve(t, b)
	for _, ref := range []string{"", ".", "..", "a/b", "a b", "-x", strings.Repeat("x", 64), "1234567890123456789012"} {
		if err := c.Detach(context.Background(), ref, ""); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", ref, err)
		}
	}
	for _, ref := range []string{"web", "4711", "a.b_c-d", "1a"} {
		if err := c.Detach(context.Background(), ref, ""); err != nil {
			t.Errorf("%q: %v", ref, err)
		}
	}
	if got := strings.Join(b.detached, " "); got != "web 4711 a.b_c-d 1a" {
		t.Errorf("the backend was asked to detach %s", got)
	}
}

func TestServe_LetsARunningRequestFinish(t *testing.T) {
	b := &slowBackend{entered: make(chan struct{}), leave: make(chan struct{})}
	ln, err := Listen(shortDir(t) + "/run")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, ln, Handler(b), slog.New(slog.DiscardHandler)) }()
	answered := make(chan error, 1)
	go func() {
		_, err := NewClient(ln.Path()).Status(context.Background())
		answered <- err
	}()
	<-b.entered
	cancel()
	close(b.leave)
	if err := <-answered; err != nil {
		t.Errorf("the running request: %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// slowBackend answers Status when it may.
type slowBackend struct {
	fakeBackend
	entered, leave chan struct{}
}

func (b *slowBackend) Status(context.Context) (Status, error) {
	close(b.entered)
	<-b.leave
	return Status{}, nil
}

func TestServe_TellsWhenItsListenerFails(t *testing.T) {
	ln, err := Listen(shortDir(t) + "/run")
	if err != nil {
		t.Fatal(err)
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Serve(context.Background(), ln, Handler(&fakeBackend{}), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("Serve on a closed listener returned nil")
	}
}

func FuzzDecodeAttach(f *testing.F) {
	f.Add(`{"pid":3}`)
	f.Add(`{"netns":"/x","name":"web","addr":"10.213.7.2","ifname":"eth0","mac":"02:00:00:00:00:01","no_default_route":true}`)
	f.Add(`{"pid":3}{"pid":4}`)
	f.Add(`{"pid":3,"isolate":true,"allow_from":["10.213.7.0/24:80/tcp"],"egress":["deny"],"host_access":[5432]}`)
	f.Add(`{"pid":3,"colour":"red"}`)
	f.Add(`{"pid":3,"publish":["8080:80","[::1]:0:53/udp"],"snat":true}`)
	f.Add(`[`)
	f.Fuzz(func(t *testing.T, body string) {
		req, err := decodeAttach(strings.NewReader(body))
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%q: %v is not ErrInvalid", body, err)
			}
			return
		}
		if (req.PID == 0) == (req.Netns == "") {
			t.Errorf("%q: accepted %+v, which names not exactly one namespace", body, req)
		}
		b, err := json.Marshal(req)
		if err != nil {
			t.Fatalf("%+v: %v", req, err)
		}
		again, err := decodeAttach(strings.NewReader(string(b)))
		if err != nil || !reflect.DeepEqual(again, req) {
			t.Errorf("%s decodes to %+v, %v, not to itself", b, again, err)
		}
	})
}

func FuzzHandler(f *testing.F) {
	f.Add("POST", "/v1/attachments", `{"pid":3}`)
	f.Add("DELETE", "/v1/attachments/web", "")
	f.Add("POST", "/v1/attachments/web/ports", `{"publish":["8080:80"]}`)
	f.Add("DELETE", "/v1/attachments/web/ports", `{"all":true}`)
	f.Add("PUT", "/v1/config", `{"Network":"10.213.0.0/16"}`)
	f.Add("GET", "/v1/nothing", "")
	h := Handler(&fakeBackend{})
	f.Fuzz(func(t *testing.T, method, path, body string) {
		req, err := http.NewRequest(method, "http://rootless-ovl/"+strings.TrimPrefix(path, "/"), strings.NewReader(body))
		if err != nil {
			return // not a request that could arrive
		}
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, req)
		if rec.Code >= 400 {
			var e Error
			if err := json.Unmarshal(rec.Body.Bytes(), &e); err != nil || e.Message == "" || e.Code == "" {
				t.Errorf("%s %s: %d with %q, not a JSON error", method, path, rec.Code, rec.Body)
			}
		}
	})
}
