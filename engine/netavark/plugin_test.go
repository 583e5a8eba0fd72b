// The protocol against a daemon that is not: netavark's own examples, what is asked of the daemon, and what is answered.

package netavark

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// fakeDaemon answers from its fields and notes what it was asked.
type fakeDaemon struct {
	status    api.Status
	attach    api.Attachment
	attachErr []error // of one Attach after the other, then none
	owned     map[string][]api.Attachment
	err       error // of everything

	attached []api.AttachRequest
	detached []string
}

func (f *fakeDaemon) Status(context.Context) (api.Status, error) { return f.status, f.err }

func (f *fakeDaemon) Attach(_ context.Context, r api.AttachRequest) (api.Attachment, error) {
	if err := r.Validate(); err != nil {
		return api.Attachment{}, err
	}
	f.attached = append(f.attached, r)
	if len(f.attachErr) > 0 {
		err := f.attachErr[0]
		f.attachErr = f.attachErr[1:]
		return api.Attachment{}, err
	}
	return f.attach, f.err
}

func (f *fakeDaemon) Detach(_ context.Context, name, _ string) error {
	f.detached = append(f.detached, name)
	return f.err
}

func (f *fakeDaemon) AttachmentsOf(_ context.Context, owner string) ([]api.Attachment, error) {
	return f.owned[owner], f.err
}

func newFakeDaemon() *fakeDaemon {
	return &fakeDaemon{
		status: api.Status{State: api.StateReady, Subnet: "10.213.7.0/24", Gateway: "10.213.7.1", Network: "10.213.0.0/16"},
		attach: api.Attachment{
			Name: "testctr", IfName: "eth0", Addr: "10.213.7.50/24", MAC: "aa:bb:cc:dd:aa:00", Gateway: "10.213.7.1", DefaultRoute: true,
			DNS: &api.DNS{Server: "10.213.7.1", Search: []string{"ovl.internal"}},
		},
	}
}

// call is one call of the plugin: its answer and what it says to the user.
type call struct {
	out, err string
	ok       bool
}

// run calls the plugin with a file in place of the namespace.
func run(t *testing.T, daemon API, env map[string]string, stdin string, args ...string) call {
	t.Helper()
	var out, stderr bytes.Buffer
	p := Plugin{
		Connect: func() (API, error) { return daemon, nil },
		Version: "v1.2.3", Getenv: func(v string) string { return env[v] },
		Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &stderr,
	}
	ok := p.Run(t.Context(), args)
	return call{strings.TrimSuffix(out.String(), "\n"), stderr.String(), ok}
}

// refusal is the error of a call that must fail.
func (c call) refusal(t *testing.T) string {
	t.Helper()
	var e map[string]string
	if c.ok || json.Unmarshal([]byte(c.out), &e) != nil || len(e) != 1 || e["error"] == "" {
		t.Fatalf("succeeded: %t, output %q; want an error", c.ok, c.out)
	}
	return e["error"]
}

func netns(t *testing.T) string {
	t.Helper()
	path := t.TempDir() + "/netns"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// The examples of plugin-API.md, but for the subnets, which are the node's here.
const (
	exampleNetwork = `{
    "name": "example1",
    "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",
    "driver": "mydriver",
    "subnets": [ { "subnet": "10.213.7.0/24", "gateway": "10.213.7.1" } ],
    "ipv6_enabled": false,
    "internal": false,
    "dns_enabled": false,
    "ipam_options": { "driver": "host-local" },
    "options": { "isolate": "true" }
}`
	exampleContainer = `{
    "container_id": "752947ff91f961eb3cb47ffe9315016979f3ffbec09e4d96a4fae3fb03391697",
    "container_name": "testctr",
    "port_mappings": [ { "container_port": 80, "host_ip": "127.0.0.1", "host_port": 8080, "protocol": "tcp", "range": 1 } ],
    "network": {
        "dns_enabled": false,
        "driver": "bridge",
        "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",
        "internal": false,
        "ipv6_enabled": false,
        "name": "podman",
        "network_interface": "podman0",
        "options": null,
        "ipam_options": { "driver": "host-local" },
        "subnets": [ { "gateway": "10.88.0.1", "lease_range": null, "subnet": "10.88.0.0/16" } ],
        "network_dns_servers": null
    },
    "network_options": {
        "aliases": [ "752947ff91f9" ],
        "interface_name": "eth0",
        "static_ips": [ "10.213.7.50" ],
        "static_mac": "aa:bb:cc:dd:aa:00"
    }
}`
	exampleOwner = "netavark/2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9/752947ff91f961eb3cb47ffe9315016979f3ffbec09e4d96a4fae3fb03391697"
)

// exampleStatus is the answer of the setup of exampleContainer, as plugin-API.md has it.
const exampleStatus = `{"dns_search_domains":[],"dns_server_ips":[],` +
	`"interfaces":{"eth0":{"mac_address":"aa:bb:cc:dd:aa:00","subnets":[{"gateway":"10.213.7.1","ipnet":"10.213.7.50/24"}]}}}`

func TestExamplesOfTheProtocol(t *testing.T) {
	for _, args := range [][]string{{"info"}, nil} {
		if c := run(t, nil, nil, "", args...); !c.ok || c.out != `{"version":"v1.2.3","api_version":"1.0.0"}` {
			t.Errorf("%v: %+v", args, c)
		}
	}
	c := run(t, newFakeDaemon(), nil, exampleNetwork, "create")
	if want := `{"dns_enabled":false,"driver":"mydriver","id":"2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",` +
		`"internal":false,"ipam_options":{},"ipv6_enabled":false,"name":"example1","options":{"isolate":"true"}}`; !c.ok || !sameJSON(c.out, want) {
		t.Errorf("create: %+v\nwant %s", c, want)
	}
	d := newFakeDaemon()
	path := netns(t)
	c = run(t, d, nil, exampleContainer, "setup", path)
	if !c.ok || c.out != exampleStatus || c.err != "" {
		t.Errorf("setup: %+v", c)
	}
	if len(d.attached) != 1 {
		t.Fatalf("attached %+v", d.attached)
	}
	got := d.attached[0]
	if got.NetnsFD <= 2 {
		t.Errorf("descriptor %d", got.NetnsFD)
	}
	got.NetnsFD = 0
	want := api.AttachRequest{Owner: exampleOwner, Addr: "10.213.7.50", MAC: "aa:bb:cc:dd:aa:00", IfName: "eth0", Publish: []string{"127.0.0.1:8080:80/tcp"}}
	if !reflect.DeepEqual(got, want) { // without DNS no names
		t.Errorf("asked for %+v\nwant %+v", got, want)
	}
	d.owned = map[string][]api.Attachment{exampleOwner: {{Name: "testctr"}}}
	for range 2 {
		c = run(t, d, nil, exampleContainer, "teardown", path)
		if !c.ok || c.out != "" || c.err != "" {
			t.Errorf("teardown: %+v", c)
		}
		d.owned = nil
	}
	if !reflect.DeepEqual(d.detached, []string{"testctr"}) {
		t.Errorf("detached %q", d.detached)
	}
}

func sameJSON(a, b string) bool {
	var x, y any
	return json.Unmarshal([]byte(a), &x) == nil && json.Unmarshal([]byte(b), &y) == nil && reflect.DeepEqual(x, y)
}

func TestCreate_KeepsWhatItDoesNotKnow(t *testing.T) {
	in := `{"name":"n","id":"a","driver":"rootless-ovl","created":"2026-05-06T07:00:00Z","ipv6_enabled":false,"internal":true,"dns_enabled":true,` +
		`"labels":{"a":"b"},"later":[1,{"x":null}],"ipam_options":{}}`
	if c := run(t, &fakeDaemon{err: errors.New("nobody is asked")}, nil, in, "create"); !c.ok || !sameJSON(c.out, in) {
		t.Errorf("%+v", c)
	}
}

func TestCreate_RefusesWhatCannotBe(t *testing.T) {
	dual := newFakeDaemon()
	dual.status.Network6, dual.status.Subnet6, dual.status.Gateway6 = "fd00:5::/48", "fd00:5:0:7::/64", "fd00:5:0:7::1"
	none := newFakeDaemon()
	none.status = api.Status{State: api.StateWaitingForStore}
	absent := &fakeDaemon{err: api.Errorf(api.CodeUnavailable, "the daemon is not running: start it with `rootless-ovl up`")}
	for name, c := range map[string]struct {
		members string
		daemon  *fakeDaemon
		want    string // "": it is taken
	}{
		"nothing":             {`"options":null`, nil, ""},
		"options":             {`"options":{"allow-from":"10.213.9.0/24:443/tcp, 10.213.8.0/24","egress":"deny","host_access":"5432 80","snat":"1"}`, nil, ""},
		"an option":           {`"options":{"mtu":"1400"}`, nil, `option "mtu" is not known: there are allow_from, allow_to, egress, host_access, isolate, no_default_route, snat`},
		"a container's":       {`"options":{"publish":"80"}`, nil, "podman run --network NETWORK:publish=80"},
		"a bad switch":        {`"options":{"isolate":"perhaps"}`, nil, `option isolate: "perhaps"`},
		"a bad port":          {`"options":{"host_access":"0"}`, nil, `option host_access: "0" is not a port`},
		"a bad rule":          {`"options":{"allow_to":"everybody"}`, nil, `"everybody"`},
		"egress and internal": {`"options":{"egress":"allow"},"internal":true`, nil, "an internal network"},
		"an interface":        {`"network_interface":"eth7"`, nil, "--interface-name"},
		"routes":              {`"routes":[{"destination":"10.0.0.0/8","gateway":"10.213.7.1"}]`, nil, "--route"},
		"servers":             {`"network_dns_servers":["1.1.1.1"]`, nil, "--dns"},
		"dhcp":                {`"ipam_options":{"driver":"dhcp"}`, nil, "--ipam-driver"},
		"no addresses":        {`"ipam_options":{"driver":"none"}`, nil, "--ipam-driver"},
		"the node's":          {`"subnets":[{"subnet":"10.213.7.0/24"}]`, nil, ""},
		"another subnet":      {`"subnets":[{"subnet":"10.213.8.0/24"}]`, nil, "the node has leased 10.213.7.0/24"},
		"part of it":          {`"subnets":[{"subnet":"10.213.7.0/25"}]`, nil, "the node has leased 10.213.7.0/24"},
		"no subnet":           {`"subnets":[{"subnet":"x"}]`, nil, "CIDR"},
		"another gateway":     {`"subnets":[{"subnet":"10.213.7.0/24","gateway":"10.213.7.2"}]`, nil, "--gateway"},
		"a range":             {`"subnets":[{"subnet":"10.213.7.0/24","lease_range":{"start_ip":"10.213.7.9"}}]`, nil, "--ip-range"},
		"IPv6":                {`"ipv6_enabled":true`, nil, "--ipv6"},
		"an IPv6 subnet":      {`"subnets":[{"subnet":"fd00:5:0:7::/64"}]`, nil, "no IPv6 network"},
		"both":                {`"ipv6_enabled":true,"subnets":[{"subnet":"10.213.7.0/24"},{"subnet":"fd00:5:0:7::/64","gateway":"fd00:5:0:7::1","lease_range":null}]`, dual, ""},
		"another IPv6 subnet": {`"subnets":[{"subnet":"fd00:6::/64"}]`, dual, "the node has leased fd00:5:0:7::/64"},
		"no lease yet":        {`"subnets":[{"subnet":"10.213.7.0/24"}]`, none, "none yet (waiting-for-store)"},
		"no daemon":           {`"subnets":[{"subnet":"10.213.7.0/24"}]`, absent, "rootless-ovl up"},
		"no daemon, no need":  {`"internal":true`, absent, ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := c.daemon
			if d == nil {
				d = newFakeDaemon()
			}
			got := run(t, d, nil, `{"name":"n","id":"a","driver":"rootless-ovl",`+c.members+`}`, "create")
			if c.want == "" {
				if !got.ok || strings.Contains(got.out, "subnets") {
					t.Errorf("%+v", got)
				}
				return
			}
			if e := got.refusal(t); !strings.Contains(e, c.want) {
				t.Errorf("error %q; want %q in it", e, c.want)
			}
		})
	}
}

// setupInput is the input of a setup.
func setupInput(network, options, more string) string {
	return fmt.Sprintf(`{"container_id":"1234567890123","container_name":"web",%s"network":{"id":"n","name":"ovl","driver":"rootless-ovl","dns_enabled":true,`+
		`"internal":false,"ipv6_enabled":false%s},"network_options":{"interface_name":"eth0"%s}}`, more, network, options)
}

func TestSetup_AsksTheDaemonFor(t *testing.T) {
	plain := api.AttachRequest{Owner: "netavark/n/1234567890123", IfName: "eth0", Name: "web"}
	with := func(change func(*api.AttachRequest)) api.AttachRequest {
		r := plain
		change(&r)
		return r
	}
	for name, c := range map[string]struct {
		network, options, more string
		env                    map[string]string
		want                   api.AttachRequest
		says                   string
	}{
		"a name": {want: plain},
		"aliases": {
			options: `,"aliases":["web","front","123456789012","front"]`, // podman's own alias is all digits here
			want:    with(func(r *api.AttachRequest) { r.Aliases = []string{"front"} }),
		},
		"an alias that cannot be": {
			options: `,"aliases":["-x"]`, want: plain, says: `the alias "-x"`,
		},
		"a name that cannot be": {
			more: `"container_name":"web-",`, options: `,"aliases":["front"]`, says: "web- is not found by its name",
			want: with(func(r *api.AttachRequest) { r.Name, r.Aliases = "", []string{"front"} }),
		},
		"a name of its own": {
			options: `,"options":{"name":"db"}`, want: with(func(r *api.AttachRequest) { r.Name = "db" }),
		},
		"a policy of the network and of the container": {
			network: `,"options":{"isolate":"true","allow_from":"10.213.9.0/24","host_access":"53000"}`,
			options: `,"options":{"isolate":"false","allow_to":"10.213.9.0/24;10.213.8.0/24","egress":"192.0.2.0/24"}`,
			want: with(func(r *api.AttachRequest) {
				r.AllowFrom, r.AllowTo = []string{"10.213.9.0/24"}, []string{"10.213.9.0/24", "10.213.8.0/24"}
				r.Egress, r.HostAccess = []string{"192.0.2.0/24"}, []int{53000}
			}),
		},
		"nothing outside": {
			network: `,"internal":true`, more: `"port_mappings":[{"host_port":8080,"container_port":80}],`,
			want: with(func(r *api.AttachRequest) {
				r.NoDefaultRoute, r.Egress, r.Publish, r.SNAT = true, []string{"deny"}, []string{"8080:80/tcp"}, true
			}),
		},
		"another default route": {
			network: `,"options":{"no_default_route":"true"}`, options: `,"options":{"publish":"8080:80"}`,
			want: with(func(r *api.AttachRequest) { r.NoDefaultRoute, r.Publish, r.SNAT = true, []string{"8080:80"}, true }),
		},
		"snat without ports": {network: `,"options":{"snat":"true"}`, want: plain},
		"ports": {
			more: `"port_mappings":[{"host_ip":"","host_port":8000,"container_port":9000,"range":11,"protocol":"tcp,udp"},` +
				`{"host_ip":"fd00::1","host_port":0,"container_port":53,"range":0,"protocol":"UDP"},{"host_ip":"0.0.0.0","host_port":65535,"container_port":1}],`,
			want: with(func(r *api.AttachRequest) {
				r.Publish = []string{"8000-8010:9000-9010/tcp", "8000-8010:9000-9010/udp", "[fd00::1]::53/udp", "0.0.0.0:65535:1/tcp"}
			}),
		},
		"ports that podman opens": {
			env:  map[string]string{"_CONTAINERS_ROOTLESS_UID": "1000", "_CONTAINERS_USERNS_CONFIGURED": "done"},
			more: `"port_mappings":[{"host_port":8080,"container_port":80}],`, options: `,"options":{"publish":"8443:443;53:53/udp","snat":"true"}`,
			want: with(func(r *api.AttachRequest) { r.Publish, r.SNAT = []string{"8443:443", "53:53/udp"}, true }),
		},
		"a reloaded network": {
			options: `,"static_ips":["10.213.7.50","::ffff:10.213.7.50"]`, want: with(func(r *api.AttachRequest) { r.Addr = "10.213.7.50" }),
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newFakeDaemon()
			got := run(t, d, c.env, setupInput(c.network, c.options, c.more), "setup", netns(t))
			if !got.ok || len(d.attached) != 1 {
				t.Fatalf("%+v", got)
			}
			d.attached[0].NetnsFD = 0
			if !reflect.DeepEqual(d.attached[0], c.want) {
				t.Errorf("asked for %+v\nwant %+v", d.attached[0], c.want)
			}
			if (c.says == "") != (got.err == "") || !strings.Contains(got.err, c.says) {
				t.Errorf("it says %q; want %q in it", got.err, c.says)
			}
		})
	}
}

func TestSetup_Answers(t *testing.T) {
	d := newFakeDaemon()
	d.attach.Addr6, d.attach.Gateway6, d.attach.IfName = "fd00:5:0:7::32/64", "fd00:5:0:7::1", "eth1"
	d.attach.Warnings = []string{"IPv6 rules have no effect"}
	c := run(t, d, nil, setupInput("", `,"static_ips":["fd00:5:0:7::32"]`, ""), "setup", netns(t))
	want := `{"dns_search_domains":["ovl.internal"],"dns_server_ips":["10.213.7.1"],"interfaces":{"eth1":{"mac_address":"aa:bb:cc:dd:aa:00","subnets":[` +
		`{"gateway":"10.213.7.1","ipnet":"10.213.7.50/24"},{"gateway":"fd00:5:0:7::1","ipnet":"fd00:5:0:7::32/64"}]}}}`
	if !c.ok || c.out != want || !strings.Contains(c.err, "no effect") {
		t.Errorf("%+v\nwant %s", c, want)
	}
	d.attach.DefaultRoute = false
	c = run(t, d, nil, setupInput("", "", ""), "setup", netns(t))
	if !c.ok || strings.Contains(c.out, "gateway") {
		t.Errorf("without a default route: %+v", c)
	}
}

func TestSetup_RefusesWhatCannotBe(t *testing.T) {
	for name, c := range map[string]struct {
		in, path, want string
	}{
		"no JSON":        {in: "", want: "standard input"},
		"another type":   {in: `{"container_id":7}`, want: "plugin-API.md"},
		"no container":   {in: `{"network":{"id":"n"}}`, want: "container_id"},
		"too much":       {in: strings.Repeat(" ", maxInput+1), want: "more than 1048576 bytes"},
		"no namespace":   {in: setupInput("", "", ""), path: "/nowhere", want: "/nowhere"},
		"an option":      {in: setupInput("", `,"options":{"speed":"11"}`, ""), want: `"speed" is not known`},
		"an own name":    {in: setupInput("", `,"options":{"name":"a b"}`, ""), want: `option name`},
		"an own port":    {in: setupInput("", `,"options":{"publish":"x"}`, ""), want: `option publish`},
		"two addresses":  {in: setupInput("", `,"static_ips":["10.213.7.5","10.213.7.6"]`, ""), want: "two static IPv4 addresses"},
		"no address":     {in: setupInput("", `,"static_ips":["x"]`, ""), want: "static address"},
		"IPv6 address":   {in: setupInput("", `,"static_ips":["fd00::5"]`, ""), want: "--ip6"},
		"sctp":           {in: setupInput("", "", `"port_mappings":[{"host_port":8080,"container_port":80,"protocol":"sctp"}],`), want: "80/sctp"},
		"a host address": {in: setupInput("", "", `"port_mappings":[{"host_ip":"x","host_port":8080,"container_port":80}],`), want: "host_ip"},
		"a long range":   {in: setupInput("", "", `"port_mappings":[{"host_port":65000,"container_port":80,"range":600}],`), want: "beyond 65535"},
		"a MAC":          {in: setupInput("", `,"static_mac":"x"`, ""), want: "MAC"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newFakeDaemon()
			path := c.path
			if path == "" {
				path = netns(t)
			}
			if e := run(t, d, nil, c.in, "setup", path).refusal(t); !strings.Contains(e, c.want) {
				t.Errorf("error %q; want %q in it", e, c.want)
			}
			if len(d.attached) != len(d.detached) {
				t.Errorf("left attached: %d of %d", len(d.attached)-len(d.detached), len(d.attached))
			}
		})
	}
	if e := run(t, newFakeDaemon(), nil, "", "setup").refusal(t); !strings.Contains(e, "setup PATH") {
		t.Errorf("without a path: %q", e)
	}
	if e := run(t, newFakeDaemon(), nil, "", "update").refusal(t); !strings.Contains(e, `"update"`) {
		t.Errorf("another call: %q", e)
	}
}

// podman may not get round to the teardown of a container, and starts it again later.
func TestSetup_TakesThePlaceOfWhatIsLeftOfTheContainer(t *testing.T) {
	taken := api.Errorf(api.CodeInUse, `name "web" is taken`)
	d := newFakeDaemon()
	d.attachErr = []error{taken}
	d.owned = map[string][]api.Attachment{"netavark/n/1234567890123": {{Name: "web"}}}
	if c := run(t, d, nil, setupInput("", "", ""), "setup", netns(t)); !c.ok || !reflect.DeepEqual(d.detached, []string{"web"}) || len(d.attached) != 2 {
		t.Errorf("%+v, detached %q", c, d.detached)
	}
	d = newFakeDaemon()
	d.attachErr = []error{taken}
	if e := run(t, d, nil, setupInput("", "", ""), "setup", netns(t)).refusal(t); !strings.Contains(e, "taken") || len(d.attached) != 1 {
		t.Errorf("somebody else's: %q, %d times", e, len(d.attached))
	}
}

// brokenPipe is a standard output that nobody reads.
type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, os.ErrClosed }

func TestSetup_LeavesNothingWhenNobodyReadsTheAnswer(t *testing.T) {
	d := newFakeDaemon()
	p := Plugin{
		Connect: func() (API, error) { return d, nil }, Getenv: os.Getenv,
		Stdin: strings.NewReader(setupInput("", "", "")), Stdout: brokenPipe{}, Stderr: new(bytes.Buffer),
	}
	if p.Run(t.Context(), []string{"setup", netns(t)}) || len(d.attached) != 1 || len(d.detached) != 1 {
		t.Errorf("attached %d times, detached %d times", len(d.attached), len(d.detached))
	}
}

func TestTeardown_OfWhatIsGone(t *testing.T) {
	in := setupInput("", "", "")
	// The real client's error of a daemon that does not run.
	absent := api.NewClient(t.TempDir() + "/api.sock")
	c := run(t, absent, nil, in, "teardown", "/nowhere")
	if !c.ok || c.out != "" || !strings.Contains(c.err, "rootless-ovl up") {
		t.Errorf("no daemon: %+v", c)
	}
	owned := map[string][]api.Attachment{"netavark/n/1234567890123": {{Name: "web"}}}
	ended := &endedDaemon{fakeDaemon{owned: owned}}
	if c := run(t, ended, nil, in, "teardown", "/nowhere"); !c.ok || c.out != "" || c.err != "" {
		t.Errorf("it ended meanwhile: %+v", c)
	}
	failing := &fakeDaemon{err: api.Errorf(api.CodeDenied, "not yours")}
	if e := run(t, failing, nil, in, "teardown", "/nowhere").refusal(t); e != "not yours" {
		t.Errorf("another fault: %q", e)
	}
}

// endedDaemon lists attachments that are gone when they are detached.
type endedDaemon struct{ fakeDaemon }

func (d *endedDaemon) Detach(context.Context, string, string) error {
	return api.Errorf(api.CodeNotFound, "gone")
}

// Whatever comes in, there is an answer of the protocol, and what is asked of the daemon can be asked.
func FuzzInput(f *testing.F) {
	f.Add("create", exampleNetwork)
	f.Add("setup", exampleContainer)
	f.Add("teardown", exampleContainer)
	f.Add("setup", setupInput(`,"options":{"egress":"deny"}`, `,"aliases":["a","b."],"options":{"publish":"80;81"}`, `"port_mappings":[{"range":65535}],`))
	path := f.TempDir()
	f.Fuzz(func(t *testing.T, what, in string) {
		d := newFakeDaemon()
		c := run(t, d, nil, in, what, path)
		var v map[string]any
		if c.out != "" && json.Unmarshal([]byte(c.out), &v) != nil {
			t.Errorf("output %q is no JSON object", c.out)
		}
		if what != "create" && c.ok != (v["error"] == nil) || !c.ok && v["error"] == nil {
			t.Errorf("succeeded: %t, output %q", c.ok, c.out)
		}
	})
}
