// The plugin against a daemon that is not.

package cni

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// fakeAPI answers from its fields and notes what it was asked.
type fakeAPI struct {
	st          api.Status
	attachments []api.Attachment
	err         error // what every method fails with
	attachErrs  []error
	detachErr   error

	attached []api.AttachRequest
	detached []string
}

func (f *fakeAPI) Status(context.Context) (api.Status, error) { return f.st, f.err }

func (f *fakeAPI) Attach(_ context.Context, r api.AttachRequest) (api.Attachment, error) {
	f.attached = append(f.attached, r)
	err := f.err
	if len(f.attachErrs) > 0 {
		err, f.attachErrs = f.attachErrs[0], f.attachErrs[1:]
	}
	att := api.Attachment{
		Name: cmp.Or(r.Name, "chosen"), Owner: r.Owner, IfName: r.IfName, Addr: cmp.Or(r.Addr, "10.213.7.2") + "/24", MAC: cmp.Or(r.MAC, "02:6f:0a:d5:07:02"), Gateway: "10.213.7.1",
		MTU: 1472, DefaultRoute: !r.NoDefaultRoute, DNS: &api.DNS{Server: "10.213.7.1", Search: []string{"ovl.internal"}},
	}
	if f.st.Network6 != "" {
		att.Addr6, att.Gateway6 = "fd00:5:0:7::ad5:702/64", "fd00:5:0:7::1"
	}
	return att, err
}

func (f *fakeAPI) Attachments(context.Context) ([]api.Attachment, error) { return f.attachments, f.err }

func (f *fakeAPI) AttachmentsOf(_ context.Context, owner string) ([]api.Attachment, error) {
	var list []api.Attachment
	for _, a := range f.attachments {
		if a.Owner == owner {
			list = append(list, a)
		}
	}
	return list, f.err
}

func (f *fakeAPI) Detach(_ context.Context, ref, _ string) error {
	f.detached = append(f.detached, ref)
	return cmp.Or(f.err, f.detachErr)
}

func newFakeAPI() *fakeAPI {
	return &fakeAPI{st: api.Status{State: api.StateReady, Subnet: "10.213.7.0/24", Network: "10.213.0.0/16", Gateway: "10.213.7.1", MTU: 1472, AddrsFree: 200}}
}

// notRunning is what the client says where no daemon is.
func notRunning(t *testing.T) error {
	t.Helper()
	_, err := api.NewClient(t.TempDir() + "/api.sock").Status(t.Context())
	if !errors.Is(err, api.ErrNotRunning) {
		t.Fatal(err)
	}
	return err
}

// netns is a path of a network namespace that is only in the tests' minds, inode its number.
const (
	netns = "/run/netns/container"
	inode = 4026532000
)

// openFake opens netns, and everything else as the plugin does.
func openFake(inside func(string) (view, error)) func(string) (*namespace, error) {
	return func(path string) (*namespace, error) {
		if path != netns {
			return openNamespace(path)
		}
		file, err := os.Open(os.DevNull)
		return &namespace{file: file, inode: inode, inside: inside}, err
	}
}

// outcome is what a call came to.
type outcome struct {
	ok             bool
	stdout, stderr string
	code           uint // of the error
	msg            string
	version        string
}

// invoke makes one call. env is NAME=VALUE, without CNI_.
func invoke(t *testing.T, f *fakeAPI, config string, env ...string) outcome {
	t.Helper()
	return invokeInside(t, f, func(string) (view, error) { return view{}, errNotAllowed }, config, env...)
}

// invokeInside is invoke where the container can be looked into.
func invokeInside(t *testing.T, f *fakeAPI, inside func(string) (view, error), config string, env ...string) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	p := Plugin{
		Connect: func() (API, error) { return f, nil },
		Getenv: func(name string) string {
			for _, e := range env {
				if k, v, _ := strings.Cut(e, "="); "CNI_"+k == name {
					return v
				}
			}
			return ""
		},
		Stdin: strings.NewReader(config), Stdout: &stdout, Stderr: &stderr,
		open: openFake(inside),
	}
	o := outcome{ok: p.Run(context.Background()), stdout: stdout.String(), stderr: stderr.String()}
	if !o.ok {
		var e callError
		if err := json.Unmarshal(stdout.Bytes(), &e); err != nil || e.Msg == "" || e.CNIVersion == "" {
			t.Fatalf("the error is no object of the specification: %q, %v", o.stdout, err)
		}
		o.code, o.msg, o.version = e.Code, e.Msg, e.CNIVersion
	}
	return o
}

// conf is a configuration of version 1.1.0 with some more members.
func conf(more string) string {
	return `{"cniVersion": "1.1.0", "name": "ovl", "type": "rootless-ovl"` + cmp.Or(strings.TrimRight(", "+more, ", "), "") + `}`
}

// sameJSON compares two documents, without regard for order and space.
func sameJSON(t *testing.T, got, want string) {
	t.Helper()
	var g, w any
	if err := json.Unmarshal([]byte(got), &g); err != nil {
		t.Fatalf("%q: %v", got, err)
	}
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		t.Fatalf("%q: %v", want, err)
	}
	if diff := gocmp.Diff(w, g); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestAdd_AnswersInTheVersionOfTheConfiguration(t *testing.T) {
	const (
		iface  = `"name": "eth0", "mac": "02:6f:0a:d5:07:02", "sandbox": "NETNS"`
		routes = `"routes": [{"dst": "10.213.0.0/16", "gw": "10.213.7.1"}, {"dst": "0.0.0.0/0", "gw": "10.213.7.1"}]`
		dns    = `"dns": {"nameservers": ["10.213.7.1"], "search": ["ovl.internal"]}`
	)
	for version, want := range map[string]string{
		"0.3.1": `{"cniVersion": "0.3.1", "interfaces": [{` + iface + `}], "ips": [{"version": "4", "interface": 0, "address": "10.213.7.2/24", "gateway": "10.213.7.1"}], ` + routes + `, ` + dns + `}`,
		"0.4.0": `{"cniVersion": "0.4.0", "interfaces": [{` + iface + `}], "ips": [{"version": "4", "interface": 0, "address": "10.213.7.2/24", "gateway": "10.213.7.1"}], ` + routes + `, ` + dns + `}`,
		"1.0.0": `{"cniVersion": "1.0.0", "interfaces": [{` + iface + `, "mtu": 1472}], "ips": [{"interface": 0, "address": "10.213.7.2/24", "gateway": "10.213.7.1"}], ` + routes + `, ` + dns + `}`,
		"1.1.0": `{"cniVersion": "1.1.0", "interfaces": [{` + iface + `, "mtu": 1472}], "ips": [{"interface": 0, "address": "10.213.7.2/24", "gateway": "10.213.7.1"}], ` + routes + `, ` + dns + `}`,
	} {
		t.Run(version, func(t *testing.T) {
			f := newFakeAPI()
			o := invoke(t, f, strings.Replace(conf(""), "1.1.0", version, 1), "COMMAND=ADD", "CONTAINERID=abc", "NETNS="+netns, "IFNAME=eth0")
			if !o.ok {
				t.Fatal(o.msg)
			}
			sameJSON(t, o.stdout, strings.ReplaceAll(want, "NETNS", netns))
			if len(f.attached) != 1 || f.attached[0].Owner != "cni/ovl/abc/eth0" || f.attached[0].NetnsFD < 3 || len(f.detached) != 0 {
				t.Errorf("asked for %+v, detached %v", f.attached, f.detached)
			}
		})
	}
}

func TestAdd_AsksForWhatIsConfigured(t *testing.T) {
	tests := []struct {
		name, more string
		env        []string
		want       api.AttachRequest // without its descriptor and owner
	}{
		{"nothing", ``, nil, api.AttachRequest{IfName: "eth0"}},
		{"policy", `"isolate": true, "allowFrom": ["10.213.9.0/24:443/tcp"], "allowTo": ["10.213.8.1"], "egress": ["192.0.2.0/24"], "hostAccess": [5432], "mtu": 1472, "ipMasq": true`, nil,
			api.AttachRequest{IfName: "eth0", Policy: api.Policy{
				Isolate: true, AllowFrom: []string{"10.213.9.0/24:443/tcp"}, AllowTo: []string{"10.213.8.1"}, Egress: []string{"192.0.2.0/24"}, HostAccess: []int{5432},
			}}},
		{"egress as a word", `"egress": "deny", "ifName": "ovl0", "defaultRoute": false`, nil,
			api.AttachRequest{IfName: "ovl0", NoDefaultRoute: true, Policy: api.Policy{Egress: []string{"deny"}}}},
		{"capabilities", `"snat": true, "capabilities": {"ips": true}, "runtimeConfig": {"ips": ["10.213.7.20/24"], "mac": "02:00:00:00:00:07", "aliases": ["a", "B", "b"],
			"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}, {"hostPort": 53, "containerPort": 53, "protocol": "UDP", "hostIP": "::1"}, {"hostPort": 1, "containerPort": 2, "hostIP": "127.0.0.1"}]}`, nil,
			api.AttachRequest{IfName: "eth0", Addr: "10.213.7.20", MAC: "02:00:00:00:00:07", Aliases: []string{"a", "B"}, SNAT: true,
				Publish: []string{"8080:80/tcp", "[::1]:53:53/udp", "127.0.0.1:1:2/tcp"}}},
		{"containerd", `"runtimeConfig": {"portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}], "dns": {"Servers": ["192.0.2.53"]}}`,
			[]string{"ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=1-2=3"},
			api.AttachRequest{IfName: "eth0", Name: "web.prod", Publish: []string{"8080:80/tcp"}}},
		{"podman", `"runtimeConfig": {"aliases": {"ovl": ["0123456789ab", "012345678901", "www"], "other": ["x"]}}`,
			[]string{"ARGS=IgnoreUnknown=1;K8S_POD_NAME=web;MAC=02:00:00:00:00:09;IP=10.213.7.21"},
			api.AttachRequest{IfName: "eth0", Name: "web", Aliases: []string{"0123456789ab", "www"}, MAC: "02:00:00:00:00:09", Addr: "10.213.7.21"}},
		{"shared names", `"names": "shared", "runtimeConfig": {"aliases": ["www"]}`, []string{"ARGS=K8S_POD_NAME=web"}, api.AttachRequest{IfName: "eth0", Aliases: []string{"web", "www"}}},
		{"no names", `"names": "none", "runtimeConfig": {"aliases": ["www"]}`, []string{"ARGS=K8S_POD_NAME=web"}, api.AttachRequest{IfName: "eth0"}},
		{"a name that cannot be one", ``, []string{"ARGS=K8S_POD_NAME=1234"}, api.AttachRequest{IfName: "eth0"}},
		{"args", `"args": {"cni": {"ips": ["10.213.7.22"], "mac": "02:00:00:00:00:0a", "labels": [{"key": "app", "value": "x"}]}, "other": 3}`, []string{"ARGS=IP=10.213.7.21"},
			api.AttachRequest{IfName: "eth0", Addr: "10.213.7.22", MAC: "02:00:00:00:00:0a"}},
		{"args of others", `"args": ["x"], "example.com/x": 1`, nil, api.AttachRequest{IfName: "eth0"}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			f := newFakeAPI()
			o := invoke(t, f, conf(tc.more), append(tc.env, "COMMAND=ADD", "CONTAINERID=abc", "NETNS="+netns, "IFNAME=eth0")...)
			if !o.ok {
				t.Fatal(o.msg)
			}
			got := f.attached[0]
			got.NetnsFD, got.Owner = 0, ""
			if diff := gocmp.Diff(tc.want, got, gocmp.Transformer("none", func(l []string) []string { return append([]string{}, l...) })); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestAdd_RefusesWithACodeAndARemedy(t *testing.T) {
	env := []string{"COMMAND=ADD", "CONTAINERID=abc", "NETNS=" + netns, "IFNAME=eth0"}
	tests := []struct {
		name, config string
		env          []string
		attach       error
		code         uint
		says         string
	}{
		{"no JSON", `{`, env, nil, 6, "standard input"},
		{"no version", `{"name": "ovl"}`, env, nil, 1, "0.4.0"},
		{"a version of the future", `{"cniVersion": "1.9.0", "name": "ovl"}`, env, nil, 1, "1.1.0"},
		{"no name", `{"cniVersion": "1.1.0"}`, env, nil, 7, "name"},
		{"a name with a slash", `{"cniVersion": "1.1.0", "name": "a/b"}`, env, nil, 7, "name"},
		{"no container", conf(""), []string{"COMMAND=ADD", "NETNS=" + netns}, nil, 4, "CNI_CONTAINERID, CNI_IFNAME"},
		{"a container with a slash", conf(""), []string{"COMMAND=ADD", "CONTAINERID=a/b", "NETNS=" + netns, "IFNAME=eth0"}, nil, 4, "CNI_CONTAINERID"},
		{"an interface with a slash", conf(""), []string{"COMMAND=ADD", "CONTAINERID=a", "NETNS=" + netns, "IFNAME=a/b"}, nil, 4, "CNI_IFNAME"},
		{"no command", conf(""), nil, nil, 4, "CNI_COMMAND"},
		{"another command", conf(""), []string{"COMMAND=SUB"}, nil, 4, "GC"},
		{"no namespace", conf(""), []string{"COMMAND=ADD", "CONTAINERID=abc", "NETNS=/nowhere", "IFNAME=eth0"}, nil, 8, "/nowhere"},
		{"a file", conf(""), []string{"COMMAND=ADD", "CONTAINERID=abc", "NETNS=/proc/self/status", "IFNAME=eth0"}, nil, 8, "no network namespace"},
		{"another kind of namespace", conf(""), []string{"COMMAND=ADD", "CONTAINERID=abc", "NETNS=/proc/self/ns/mnt", "IFNAME=eth0"}, nil, 8, "no network namespace"},
		{"its own namespace", conf(""), []string{"COMMAND=ADD", "CONTAINERID=abc", "NETNS=/proc/self/ns/net", "IFNAME=eth0"}, nil, 8, "runs in"},
		{"names that are too long", conf(""), []string{"COMMAND=ADD", "CONTAINERID=" + strings.Repeat("a", 250), "NETNS=" + netns, "IFNAME=eth0"}, nil, 7, "255"},
		{"a misspelt member", conf(`"isolated": true`), env, nil, 2, "isolated: true"},
		{"a member in other letters", conf(`"Isolate": true`), env, nil, 2, "Isolate: true"},
		{"ipam", conf(`"ipam": {"type": "host-local"}`), env, nil, 2, "host-local"},
		{"no masquerading", conf(`"ipMasq": false`), env, nil, 2, "egress"},
		{"a larger MTU", conf(`"mtu": 9000`), env, nil, 7, "1472"},
		{"a smaller MTU", conf(`"mtu": 1400`), env, nil, 7, "1472"},
		{"a negative MTU", conf(`"mtu": -1`), env, nil, 7, "leave it out"},
		{"an MTU that is text", conf(`"mtu": "1400"`), env, nil, 7, "mtu"},
		{"a bad name of the interface", conf(`"ifName": "lo"`), env, nil, 7, "ifName"},
		{"bad names", conf(`"names": "some"`), env, nil, 7, "shared"},
		{"bandwidth", conf(`"runtimeConfig": {"bandwidth": {"ingressRate": 1}}`), env, nil, 2, "capabilities"},
		{"sctp", conf(`"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "sctp"}]}`), env, nil, 2, "sctp"},
		{"port 0", conf(`"runtimeConfig": {"portMappings": [{"hostPort": 1}]}`), env, nil, 7, "1 to 65535"},
		{"a port's address", conf(`"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "hostIP": "x"}]}`), env, nil, 7, "hostIP"},
		{"a multicast port", conf(`"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "hostIP": "224.0.0.1"}]}`), env, nil, 7, "224.0.0.1"},
		{"two addresses", conf(`"runtimeConfig": {"ips": ["10.213.7.9", "10.213.7.10"]}`), env, nil, 2, "one IPv4 address"},
		{"an IPv6 address", conf(`"runtimeConfig": {"ips": ["fd00::9/64"]}`), env, nil, 2, "IPv6"},
		{"no address", conf(`"runtimeConfig": {"ips": ["x"]}`), env, nil, 7, "10.213.7.20"},
		{"ports without the default route", conf(`"defaultRoute": false, "runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1}]}`), env, nil, 7, "snat"},
		{"a bad prevResult", conf(`"prevResult": {"cniVersion": "7.0.0"}`), env, nil, 6, "prevResult"},
		{"the daemon refuses", conf(""), env, api.Errorf(api.CodeInvalid, "no"), 7, "no"},
		{"the daemon is away", conf(""), env, api.Errorf(api.CodeUnavailable, "no"), 11, "no"},
		{"a name is taken", conf(""), env, api.Errorf(api.CodeInUse, "no"), 100, "no"},
		{"no address is free", conf(""), env, api.Errorf(api.CodeExhausted, "no"), 101, "no"},
		{"another user's", conf(""), env, api.Errorf(api.CodeDenied, "no"), 102, "no"},
		{"the namespace has gone", conf(""), env, api.Errorf(api.CodeNotFound, "no"), 3, "no"},
		{"a fault", conf(""), env, errors.New("no"), 104, "no"},
		{"it takes too long", conf(""), env, context.DeadlineExceeded, 11, "deadline"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			f := newFakeAPI()
			if tc.attach != nil {
				f.attachErrs = []error{tc.attach}
			}
			o := invoke(t, f, tc.config, tc.env...)
			if o.ok || o.code != tc.code || !strings.Contains(o.msg, tc.says) {
				t.Errorf("ok %t, code %d, %q; want %d and %q", o.ok, o.code, o.msg, tc.code, tc.says)
			}
			if tc.attach == nil && len(f.attached) > 0 {
				t.Errorf("the daemon was asked all the same: %+v", f.attached)
			}
		})
	}
}

func TestAdd_BehindAnotherPluginPassesItsResultOn(t *testing.T) {
	prev := func(ifName string) string {
		return `"prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "br0"}, {"name": "` + ifName + `", "mac": "02:00:00:00:00:01", "sandbox": "` + netns + `"}],
			"ips": [{"interface": 1, "address": "192.0.2.9/24", "gateway": "192.0.2.1"}], "routes": [{"dst": "0.0.0.0/0", "gw": "192.0.2.1"}],
			"dns": {"nameservers": ["192.0.2.53"], "search": ["example.org"]}}`
	}
	env := []string{"COMMAND=ADD", "CONTAINERID=abc", "NETNS=" + netns, "IFNAME=eth0"}

	f := newFakeAPI()
	o := invoke(t, f, conf(`"ifName": "ovl0", `+prev("eth0")), env...)
	if !o.ok {
		t.Fatal(o.msg)
	}
	if r := f.attached[0]; !r.NoDefaultRoute || r.IfName != "ovl0" || r.Owner != "cni/ovl/abc/eth0" {
		t.Errorf("asked for %+v", r)
	}
	sameJSON(t, o.stdout, strings.ReplaceAll(`{"cniVersion": "1.1.0",
		"interfaces": [{"name": "br0"}, {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "NETNS"}, {"name": "ovl0", "mac": "02:6f:0a:d5:07:02", "mtu": 1472, "sandbox": "NETNS"}],
		"ips": [{"interface": 1, "address": "192.0.2.9/24", "gateway": "192.0.2.1"}, {"interface": 2, "address": "10.213.7.2/24", "gateway": "10.213.7.1"}],
		"routes": [{"dst": "0.0.0.0/0", "gw": "192.0.2.1"}, {"dst": "10.213.0.0/16", "gw": "10.213.7.1"}],
		"dns": {"nameservers": ["192.0.2.53"], "search": ["example.org"]}}`, "NETNS", netns))

	f = newFakeAPI()
	if o := invoke(t, f, conf(prev("eth0")), env...); o.ok || o.code != 7 || !strings.Contains(o.msg, "ifName") || len(f.attached) > 0 {
		t.Errorf("an interface that is there already: ok %t, %d %s", o.ok, o.code, o.msg)
	}
	f = newFakeAPI()
	if o := invoke(t, f, conf(`"ifName": "ovl0", "defaultRoute": true, `+prev("eth0")), env...); !o.ok || f.attached[0].NoDefaultRoute {
		t.Errorf("a default route that is asked for: ok %t, %s, %+v", o.ok, o.msg, f.attached)
	}
}

func TestAdd_TellsResolversAsTheyAreAskedFor(t *testing.T) {
	for _, tc := range []struct{ name, more, want string }{
		{"the gateway", ``, `{"nameservers": ["10.213.7.1"], "search": ["ovl.internal"]}`},
		{"the configuration's", `"dns": {"nameservers": ["192.0.2.53"], "domain": "example.org", "search": ["a"], "options": ["ndots:1"]}`,
			`{"nameservers": ["192.0.2.53"], "domain": "example.org", "search": ["a"], "options": ["ndots:1"]}`},
		{"the runtime's", `"dns": {"nameservers": ["192.0.2.53"]}, "runtimeConfig": {"dns": {"servers": ["192.0.2.54"], "searches": ["b"], "options": ["rotate"]}}`,
			`{"nameservers": ["192.0.2.54"], "search": ["b"], "options": ["rotate"]}`},
		{"search domains beside the gateway", `"runtimeConfig": {"dns": {"searches": ["b", "ovl.internal."]}}`, `{"nameservers": ["10.213.7.1"], "search": ["ovl.internal", "b"]}`},
		{"the gateway among others", `"dns": {"nameservers": ["10.213.7.1", "192.0.2.53"]}`, `{"nameservers": ["10.213.7.1", "192.0.2.53"], "search": ["ovl.internal"]}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := invoke(t, newFakeAPI(), conf(tc.more), "COMMAND=ADD", "CONTAINERID=abc", "NETNS="+netns, "IFNAME=eth0")
			var result struct {
				DNS json.RawMessage `json:"dns"`
			}
			if err := json.Unmarshal([]byte(o.stdout), &result); err != nil || !o.ok {
				t.Fatal(err, o.stdout)
			}
			sameJSON(t, string(result.DNS), tc.want)
		})
	}
}

func TestAdd_OfBothFamiliesTellsBoth(t *testing.T) {
	f := newFakeAPI()
	f.st.Network6 = "fd00:5::/48"
	o := invoke(t, f, conf(""), "COMMAND=ADD", "CONTAINERID=abc", "NETNS="+netns, "IFNAME=eth0")
	for _, want := range []string{`"fd00:5:0:7::ad5:702/64"`, `"fd00:5::/48"`, `"::/0"`, `"0.0.0.0/0"`} {
		if !o.ok || !strings.Contains(o.stdout, want) {
			t.Errorf("%s is not in %s", want, o.stdout)
		}
	}
}

func TestAdd_ReplacesWhatAnEarlierContainerOfThatIDLeft(t *testing.T) {
	taken := api.Errorf(api.CodeInUse, "taken")
	for _, tc := range []struct {
		name  string
		left  []api.Attachment
		ok    bool
		gone  []string
		asked int
	}{
		{"of another namespace", []api.Attachment{{Name: "old", Owner: "cni/ovl/abc/eth0", Inode: inode + 1}}, true, []string{"old"}, 2},
		{"of this one", []api.Attachment{{Name: "old", Owner: "cni/ovl/abc/eth0", Inode: inode}}, false, nil, 1},
		{"of another container", []api.Attachment{{Name: "old", Owner: "cni/ovl/abcd/eth0", Inode: inode + 1}}, false, nil, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFakeAPI()
			f.attachments, f.attachErrs = tc.left, []error{taken}
			o := invoke(t, f, conf(""), "COMMAND=ADD", "CONTAINERID=abc", "NETNS="+netns, "IFNAME=eth0")
			if o.ok != tc.ok || !slices.Equal(f.detached, tc.gone) || len(f.attached) != tc.asked || !o.ok && o.code != 100 {
				t.Errorf("ok %t, code %d, detached %v, asked %d times", o.ok, o.code, f.detached, len(f.attached))
			}
		})
	}
}

func TestAdd_LeavesNothingBehindWhereNobodyReadsTheResult(t *testing.T) {
	f := newFakeAPI()
	env := map[string]string{"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "abc", "CNI_NETNS": netns, "CNI_IFNAME": "eth0"}
	p := Plugin{
		Connect: func() (API, error) { return f, nil }, Getenv: func(name string) string { return env[name] },
		Stdin: strings.NewReader(conf("")), Stdout: closed{}, Stderr: closed{}, open: openFake(nil),
	}
	if p.Run(t.Context()) || !slices.Equal(f.detached, []string{"chosen"}) {
		t.Errorf("detached %v", f.detached)
	}
}

type closed struct{}

func (closed) Write([]byte) (int, error) { return 0, os.ErrClosed }

func TestDel_SucceedsAnyNumberOfTimes(t *testing.T) {
	there := []api.Attachment{{Name: "web", Owner: "cni/ovl/abc/eth0"}, {Name: "other", Owner: "cni/ovl/abd/eth0"}}
	for _, tc := range []struct {
		name string
		f    *fakeAPI
		env  []string
		gone []string
	}{
		{"there", &fakeAPI{attachments: there}, []string{"CONTAINERID=abc"}, []string{"web"}},
		{"not there", &fakeAPI{attachments: there}, []string{"CONTAINERID=abe"}, nil},
		{"its namespace has gone", &fakeAPI{attachments: there}, []string{"CONTAINERID=abc", "NETNS=/nowhere"}, []string{"web"}},
		{"it goes by itself", &fakeAPI{attachments: there, detachErr: api.Errorf(api.CodeNotFound, "gone")}, []string{"CONTAINERID=abc"}, []string{"web"}},
		{"no daemon", &fakeAPI{err: notRunning(t)}, []string{"CONTAINERID=abc"}, nil},
		{"an id that no ADD has taken", &fakeAPI{attachments: there}, []string{"CONTAINERID=" + strings.Repeat("a", 250)}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// What ADD would refuse must not keep a container from being removed.
			o := invoke(t, tc.f, conf(`"ipam": {"type": "x"}, "unknown": 1, "prevResult": null`), append(tc.env, "COMMAND=DEL", "IFNAME=eth0")...)
			if !o.ok || o.stdout != "" || !slices.Equal(tc.f.detached, tc.gone) {
				t.Errorf("ok %t, %q, detached %v", o.ok, o.stdout, tc.f.detached)
			}
			if tc.f.err != nil && !strings.Contains(o.stderr, "rootless-ovl up") {
				t.Errorf("without the daemon it says %q", o.stderr)
			}
		})
	}
}

func TestDel_TellsWhatKeepsItFromWorking(t *testing.T) {
	f := &fakeAPI{attachments: []api.Attachment{{Name: "web", Owner: "cni/ovl/abc/eth0"}}, detachErr: api.Errorf(api.CodeUnavailable, "later")}
	if o := invoke(t, f, conf(""), "COMMAND=DEL", "CONTAINERID=abc", "IFNAME=eth0"); o.ok || o.code != 11 || !strings.Contains(o.msg, "later") {
		t.Errorf("ok %t, %d %s", o.ok, o.code, o.msg)
	}
	if o := invoke(t, f, conf(""), "COMMAND=DEL", "IFNAME=eth0"); o.ok || o.code != 4 {
		t.Errorf("without a container: ok %t, %d %s", o.ok, o.code, o.msg)
	}
}

func TestGC_FreesWhatIsNotListed(t *testing.T) {
	there := []api.Attachment{
		{Name: "a", Owner: "cni/ovl/a/eth0"}, {Name: "a1", Owner: "cni/ovl/a/eth1"}, {Name: "b", Owner: "cni/ovl/b/eth0"}, {Name: "c", Owner: "cni/ovl2/c/eth0"},
		{Name: "d", Owner: "docker/d"}, {Name: "e"},
	}
	for _, tc := range []struct {
		name, more string
		err        error
		code       uint // 0: success
		gone       []string
	}{
		{"some", `"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}, {"containerID": "c", "ifname": "eth0"}]`, nil, 0, []string{"a1", "b"}},
		{"the older member", `"cni.dev/attachments": [{"containerID": "a", "ifname": "eth0"}]`, nil, 0, []string{"a1", "b"}},
		{"none is valid", `"cni.dev/valid-attachments": []`, nil, 0, []string{"a", "a1", "b"}},
		{"null", `"cni.dev/valid-attachments": null`, nil, 0, []string{"a", "a1", "b"}},
		{"all, after errors too", `"cni.dev/valid-attachments": []`, api.Errorf(api.CodeInternal, "stuck"), 104, []string{"a", "a1", "b"}},
		{"no list", ``, nil, 7, nil},
		{"a bad list", `"cni.dev/valid-attachments": {}`, nil, 6, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := &fakeAPI{attachments: there, detachErr: tc.err}
			o := invoke(t, f, conf(tc.more), "COMMAND=GC")
			if o.ok != (tc.code == 0) || o.code != tc.code || !slices.Equal(f.detached, tc.gone) {
				t.Errorf("ok %t, %d %s, freed %v", o.ok, o.code, o.msg, f.detached)
			}
		})
	}
	f := &fakeAPI{err: notRunning(t)}
	if o := invoke(t, f, conf(`"cni.dev/valid-attachments": []`), "COMMAND=GC"); o.ok || o.code != 11 {
		t.Errorf("without a daemon: ok %t, %d %s", o.ok, o.code, o.msg)
	}
}

func TestCheck_ComparesTheResultWithWhatThereIs(t *testing.T) {
	const prev = `"prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "mac": "02:6F:0a:d5:07:02", "sandbox": "/x"}], "ips": [{"interface": 0, "address": "10.213.7.2/24"}]}`
	fine := api.Attachment{Name: "web", Owner: "cni/ovl/abc/eth0", Inode: inode, IfName: "eth0", Addr: "10.213.7.2/24", MAC: "02:6f:0a:d5:07:02", DefaultRoute: true}
	with := func(change func(*api.Attachment)) []api.Attachment {
		a := fine
		change(&a)
		return []api.Attachment{a}
	}
	seen := func(change func(*view)) func(string) (view, error) {
		v := view{up: true, mac: fine.MAC, addrs: []netip.Prefix{netip.MustParsePrefix("fe80::1/64"), netip.MustParsePrefix(fine.Addr)}, defaultRoute: true}
		change(&v)
		return func(string) (view, error) { return v, nil }
	}
	asMade := seen(func(*view) {})
	there := with(func(*api.Attachment) {})
	for _, tc := range []struct {
		name, more string
		there      []api.Attachment
		inside     func(string) (view, error)
		change     func(*api.Status)
		code       uint
		says       string
	}{
		{"all is well", prev, there, asMade, nil, 0, ""},
		{"it may not look inside", prev, there, func(string) (view, error) { return view{}, errNotAllowed }, nil, 0, ""},
		{"the lease is lost, its subnet known", prev, there, asMade, func(s *api.Status) { s.State = api.StateLeaseLost }, 0, ""},
		{"a problem", prev, with(func(a *api.Attachment) { a.Problem = "its MTU is 1430" }), asMade, nil, 0, ""},
		{"no prevResult", ``, there, asMade, nil, 7, "prevResult"},
		{"unknown", prev, nil, asMade, nil, 3, "cni/ovl/abc/eth0"},
		{"another namespace", prev, with(func(a *api.Attachment) { a.Inode++ }), asMade, nil, 103, "namespace"},
		{"another address", prev, with(func(a *api.Attachment) { a.Addr = "10.213.7.3/24" }), asMade, nil, 103, "10.213.7.3"},
		{"another MAC address", prev, with(func(a *api.Attachment) { a.MAC = "02:00:00:00:00:01" }), asMade, nil, 103, "02:00:00:00:00:01"},
		{"no subnet", prev, there, asMade, func(s *api.Status) { s.State = api.StateWaitingForStore }, 11, "not ready"},
		{"another subnet", prev, there, asMade, func(s *api.Status) { s.Subnet = "10.213.9.0/24" }, 103, "another subnet"},
		{"the interface has gone", prev, there, seen(func(v *view) { v.missing = true }), nil, 103, "no interface eth0"},
		{"it is down", prev, there, seen(func(v *view) { v.up = false }), nil, 103, "is down"},
		{"its MAC address was changed", prev, there, seen(func(v *view) { v.mac = "02:00:00:00:00:01" }), nil, 103, "MAC"},
		{"its address was removed", prev, there, seen(func(v *view) { v.addrs = nil }), nil, 103, "10.213.7.2"},
		{"its route was removed", prev, there, seen(func(v *view) { v.defaultRoute = false }), nil, 103, "route"},
		{"looking fails", prev, there, func(string) (view, error) { return view{}, errors.New("no") }, nil, 5, "no"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFakeAPI()
			f.attachments = tc.there
			if tc.change != nil {
				tc.change(&f.st)
			}
			o := invokeInside(t, f, tc.inside, conf(tc.more), "COMMAND=CHECK", "CONTAINERID=abc", "NETNS="+netns, "IFNAME=eth0")
			if o.ok != (tc.code == 0) || o.code != tc.code || !strings.Contains(o.msg, tc.says) || o.ok && o.stdout != "" {
				t.Errorf("ok %t, %d %s", o.ok, o.code, o.msg)
			}
			if problem := append(tc.there, api.Attachment{})[0].Problem; o.ok && !strings.Contains(o.stderr, problem) {
				t.Errorf("it says %q", o.stderr)
			}
		})
	}
}

func TestCommands_AreThoseOfTheVersion(t *testing.T) {
	for _, tc := range []struct {
		version, command string
		ok               bool
	}{{"0.3.1", "CHECK", false}, {"1.0.0", "GC", false}, {"1.0.0", "STATUS", false}, {"1.1.0", "STATUS", true}, {"0.3.1", "DEL", true}} {
		o := invoke(t, newFakeAPI(), strings.Replace(conf(""), "1.1.0", tc.version, 1), "COMMAND="+tc.command, "CONTAINERID=a", "IFNAME=eth0", "NETNS=/nowhere")
		if o.ok != tc.ok || !o.ok && (o.code != 1 || o.version != tc.version) {
			t.Errorf("%s of %s: ok %t, %d %s", tc.command, tc.version, o.ok, o.code, o.msg)
		}
	}
}

func TestStatus_SaysWhetherContainersCanBeAdded(t *testing.T) {
	for _, tc := range []struct {
		name string
		st   api.Status
		err  error
		more string
		code uint
	}{
		{"ready", api.Status{State: api.StateReady, AddrsFree: 3, Problem: "two nodes have one address"}, nil, "", 0},
		{"on what was last known", api.Status{State: api.StateLeaseLost, AddrsFree: 1}, nil, "", 0},
		{"no address is free", api.Status{State: api.StateReady, Subnet: "10.213.7.0/24"}, nil, "", 50},
		{"no store", api.Status{State: api.StateWaitingForStore, Store: api.StoreStatus{Error: "connection refused"}}, nil, "", 50},
		{"stopping", api.Status{State: api.StateStopping}, nil, "", 51},
		{"no daemon", api.Status{}, notRunning(t), "", 51},
		{"another user's daemon", api.Status{}, api.Errorf(api.CodeDenied, "no"), "", 50},
		{"a configuration that ADD refuses", api.Status{State: api.StateReady}, nil, `"isolated": true`, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := invoke(t, &fakeAPI{st: tc.st, err: tc.err}, conf(tc.more), "COMMAND=STATUS")
			if o.ok != (tc.code == 0) || o.code != tc.code || o.ok && o.stdout != "" || !strings.Contains(o.stderr+o.msg, tc.st.Problem) {
				t.Errorf("ok %t, %d %s, %s", o.ok, o.code, o.msg, o.stderr)
			}
		})
	}
}

func TestVersion_NeedsNoDaemonAndNoConfiguration(t *testing.T) {
	for input, want := range map[string]string{`{"cniVersion": "0.4.0"}`: "0.4.0", ``: "1.1.0", `{`: "1.1.0", `{"cniVersion": "2.0.0"}`: "2.0.0"} {
		var stdout bytes.Buffer
		p := Plugin{
			Connect: func() (API, error) { t.Error("connected"); return nil, errors.ErrUnsupported },
			Getenv:  func(name string) string { return map[string]string{"CNI_COMMAND": "VERSION"}[name] },
			Stdin:   strings.NewReader(input), Stdout: &stdout, Stderr: &stdout,
		}
		if !p.Run(t.Context()) {
			t.Fatal(stdout.String())
		}
		sameJSON(t, stdout.String(), `{"cniVersion": "`+want+`", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}`)
	}
}

func TestRun_WithoutARuntimeDirectoryIsAnErrorOfTheEnvironment(t *testing.T) {
	var stdout, stderr bytes.Buffer
	p := Plugin{
		Connect: func() (API, error) { return nil, errors.New("XDG_RUNTIME_DIR is not set") }, Getenv: func(name string) string { return map[string]string{"CNI_COMMAND": "STATUS"}[name] },
		Stdin: strings.NewReader(conf("")), Stdout: &stdout, Stderr: &stderr,
	}
	if p.Run(t.Context()) || !strings.Contains(stdout.String(), `"code": 4`) {
		t.Error(stdout.String())
	}
}

func FuzzAdd_NeverPanicsAndAlwaysAnswersInJSON(f *testing.F) {
	for _, seed := range []string{
		conf(""), conf(`"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1}], "ips": ["10.213.7.9/24"], "aliases": {"ovl": ["a"]}}`),
		conf(`"prevResult": {"cniVersion": "0.4.0", "interfaces": [null], "ips": [null, {"version": "4", "address": "10.0.0.1/8"}], "routes": [null, {"dst": "0.0.0.0/0"}]}`),
		conf(`"args": {"cni": {"ips": ["x"]}}, "egress": ["deny"], "hostAccess": [1]`), `{"cniVersion": "0.3.1", "name": "a", "prevResult": []}`, `null`, `[]`,
	} {
		f.Add(seed, "IP=1;K8S_POD_NAME=x")
	}
	f.Fuzz(func(t *testing.T, config, args string) {
		c := &call{Plugin: Plugin{Getenv: func(string) string { return args }}, input: []byte(config), ifName: "eth0", containerID: "a", netns: "/n", command: "ADD"}
		if c.readHead("0.3.1") != nil {
			return
		}
		parsed, err := readConfig(c.input)
		if err != nil {
			if asError(err).Msg == "" {
				t.Error("an error without a text")
			}
			return
		}
		prev, err := c.prevResult()
		if err != nil {
			return
		}
		r, err := c.request(parsed, prev)
		if err != nil {
			return
		}
		att, _ := newFakeAPI().Attach(t.Context(), api.AttachRequest{IfName: r.IfName, NoDefaultRoute: r.NoDefaultRoute})
		result, err := c.result(parsed, prev, att, newFakeAPI().st)
		if err != nil {
			return
		}
		if b, err := json.Marshal(result); err != nil || !json.Valid(b) {
			t.Errorf("%s: %v", b, err)
		}
	})
}
