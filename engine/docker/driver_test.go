// What dockerd asks, with requests as docker 20.10 sends them, and what it is answered.

package docker

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	networkID  = "8a5d7c3e1f0b4a69b2c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6"
	endpointID = "1f2e3d4c5b6a79880716253443526170f1e2d3c4b5a69788f0e1d2c3b4a59687"

	createNetwork = `{"NetworkID":"` + networkID + `","Options":{"com.docker.network.enable_ipv6":false,"com.docker.network.generic":{}},` +
		`"IPv4Data":[{"AddressSpace":"rootless-ovl-local","Pool":"10.213.7.0/24","Gateway":"10.213.7.1/24","AuxAddresses":null}],"IPv6Data":[]}`
	ids            = `"NetworkID":"` + networkID + `","EndpointID":"` + endpointID + `"`
	createEndpoint = `{` + ids + `,"Interface":{"Address":"10.213.7.2/24","AddressIPv6":"","MacAddress":""},` +
		`"Options":{"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],"com.docker.network.portmap":[]}}`
	joinEndpoint = `{` + ids + `,"SandboxKey":"/var/run/docker/netns/1a2b3c4d5e6f","Options":{"com.docker.network.endpoint.exposedports":[],"com.docker.network.portmap":[]}}`
)

// withNetwork is a driver and its node, with docker's network.
func withNetwork(t *testing.T) (*served, *fakeNode) {
	t.Helper()
	f := newFakeNode()
	s := serveDriver(t, newDriver(t, f, ""))
	s.ok("NetworkDriver.CreateNetwork", createNetwork)
	return s, f
}

// edit replaces in a request; what is replaced must be there.
func edit(t *testing.T, body, old, by string) string {
	t.Helper()
	if !strings.Contains(body, old) {
		t.Fatalf("%s has no %s", body, old)
	}
	return strings.Replace(body, old, by, 1)
}

func TestHandler_SaysWhatItIs(t *testing.T) {
	s := serveDriver(t, newDriver(t, newFakeNode(), ""))
	for path, want := range map[string]map[string]any{
		"Plugin.Activate":                    {"Implements": []any{"NetworkDriver", "IpamDriver"}},
		"NetworkDriver.GetCapabilities":      {"Scope": "local", "ConnectivityScope": "global"},
		"IpamDriver.GetCapabilities":         {"RequiresMACAddress": false, "RequiresRequestReplay": false},
		"IpamDriver.GetDefaultAddressSpaces": {"LocalDefaultAddressSpace": "rootless-ovl-local", "GlobalDefaultAddressSpace": "rootless-ovl-global"},
		"NetworkDriver.DiscoverNew":          {},
	} {
		if got := s.ok(path, ""); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}
}

func TestHandler_RefusesWhatIsNoRequest(t *testing.T) {
	s, _ := withNetwork(t)
	for _, c := range []struct {
		path, body string
		status     int
		text       string
	}{
		{"NetworkDriver.Fly", "{}", http.StatusNotFound, "Fly"},
		{"", "{}", http.StatusNotFound, "no /"},
		{"NetworkDriver.Join", "{", http.StatusBadRequest, "not what docker sends"},
		{"NetworkDriver.Join", "[1]", http.StatusBadRequest, "not what docker sends"},
		{"NetworkDriver.Join", "", http.StatusOK, "network id"},
		{"NetworkDriver.Join", `{"NetworkID":"a/b","EndpointID":"e"}`, http.StatusOK, `"a/b"`},
		{"NetworkDriver.Join", `{"NetworkID":"a","EndpointID":"` + strings.Repeat("e", 129) + `"}`, http.StatusOK, "129"},
		{"IpamDriver.RequestPool", `"` + strings.Repeat("x", maxRequest) + `"`, http.StatusBadRequest, "larger"},
		{"NetworkDriver.AllocateNetwork", "{}", http.StatusOK, "swarm"},
	} {
		status, answer := s.post(c.path, c.body)
		text, _ := answer["Err"].(string)
		if status != c.status || !strings.HasPrefix(text, "rootless-ovl: ") || !strings.Contains(text, c.text) {
			t.Errorf("%s %.40s: %d %q", c.path, c.body, status, text)
		}
	}
	resp, err := s.http.Get("http://plugin/Plugin.Activate")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET: %s", resp.Status)
	}
}

func TestIPAM_GivesTheNodesSubnet(t *testing.T) {
	f := newFakeNode()
	s := serveDriver(t, newDriver(t, f, ""))
	want := map[string]any{"PoolID": "10.213.7.0/24", "Pool": "10.213.7.0/24", "Data": map[string]any{"com.docker.network.gateway": "10.213.7.1/24"}}
	for _, pool := range []string{"", "10.213.7.0/24", "10.213.7.9/24"} {
		if got := s.ok("IpamDriver.RequestPool", `{"AddressSpace":"rootless-ovl-local","Pool":"`+pool+`","SubPool":"","Options":{},"V6":false}`); !reflect.DeepEqual(got, want) {
			t.Errorf("pool %q: %v", pool, got)
		}
	}
	for body, what := range map[string]string{
		`{"Pool":"172.20.0.0/16"}`: "leave --subnet out",
		`{"Pool":"x"}`:             "leave --subnet out",
		`{"Pool":"10.213.7.0/24","SubPool":"10.213.7.128/25"}`: "--ip-range",
		`{"V6":true}`: "leave it out: in a dual-stack overlay",
	} {
		s.fails("IpamDriver.RequestPool", body, what)
	}
	s.ok("IpamDriver.ReleasePool", `{"PoolID":"10.213.7.0/24"}`)

	gateway := `"Options":{"RequestAddressType":"com.docker.network.gateway"}}`
	for _, addr := range []string{"", "10.213.7.1"} {
		if got := s.ok("IpamDriver.RequestAddress", `{"PoolID":"10.213.7.0/24","Address":"`+addr+`",`+gateway); got["Address"] != "10.213.7.1/24" {
			t.Errorf("gateway %q: %v", addr, got)
		}
	}
	s.fails("IpamDriver.RequestAddress", `{"PoolID":"10.213.7.0/24","Address":"10.213.7.254",`+gateway, "--gateway 10.213.7.254", "10.213.7.1")
	s.ok("IpamDriver.ReleaseAddress", `{"PoolID":"10.213.7.0/24","Address":"10.213.7.1"}`)
	if len(f.reserved) != 0 {
		t.Errorf("the gateway is reserved: %v", f.reserved)
	}
}

func TestIPAM_ReservesAddresses(t *testing.T) {
	s, f := withNetwork(t)
	request := func(addr string) string { return `{"PoolID":"10.213.7.0/24","Address":"` + addr + `","Options":null}` }
	if got := s.ok("IpamDriver.RequestAddress", request("")); got["Address"] != "10.213.7.2/24" {
		t.Errorf("any: %v", got)
	}
	if got := s.ok("IpamDriver.RequestAddress", request("10.213.7.77")); got["Address"] != "10.213.7.77/24" {
		t.Errorf("one: %v", got)
	}
	s.fails("IpamDriver.RequestAddress", request("10.213.7.77"), "another container's", "--ip")
	s.ok("NetworkDriver.CreateEndpoint", createEndpoint)
	s.fails("IpamDriver.RequestAddress", request("10.213.7.2"), "10.213.7.2 is in use")
	f.change(func() { f.reserved["10.213.7.9"] = api.Address{Addr: "10.213.7.9/24", Owner: "cni"} })
	s.fails("IpamDriver.RequestAddress", request("10.213.7.9"), "in use")
	s.fails("IpamDriver.RequestAddress", request("fd00::1"), "not an IPv4 address")
	s.fails("IpamDriver.RequestAddress", request("x"), "not an IPv4 address")
	for range 2 { // docker releases again what it is not sure of
		s.ok("IpamDriver.ReleaseAddress", request("10.213.7.77"))
	}
	s.fails("IpamDriver.ReleaseAddress", request(""), "not an address")
	if _, still := f.reserved["10.213.7.77"]; still {
		t.Error("not released")
	}

	f.change(func() { f.status.Subnet, f.status.Gateway = "10.213.8.0/24", "10.213.8.1" })
	s.fails("IpamDriver.RequestAddress", request(""), "10.213.7.0/24", "10.213.8.0/24", "docker network rm")
	s.fails("NetworkDriver.CreateEndpoint", createEndpoint, "10.213.8.0/24", "docker network rm")
}

func TestIPAM_OfTwoThatAskForAnAddressAtOnceOneHasIt(t *testing.T) {
	f := newFakeNode()
	d := newDriver(t, f, "")
	as := func(pid int) context.Context { return context.WithValue(t.Context(), pidKey{}, pid) }
	r := &addressRequest{PoolID: "10.213.7.0/24", Address: "10.213.7.77"}
	if _, err := d.requestAddress(as(1), r); err != nil {
		t.Fatal(err)
	}
	if _, err := d.requestAddress(as(1), r); err == nil {
		t.Error("two have it")
	}
	if _, err := d.requestAddress(as(2), r); err != nil {
		t.Errorf("a dockerd after it: %v", err)
	}
	if _, err := d.releaseAddress(as(2), r); err != nil {
		t.Fatal(err)
	}
	f.next = 77
	if _, err := d.requestAddress(as(2), &addressRequest{PoolID: r.PoolID}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.requestAddress(as(2), r); err == nil {
		t.Error("it was given to one that asked for any")
	}
	f.change(func() { f.err = errors.New("no more") })
	if _, err := d.requestAddress(as(2), &addressRequest{PoolID: r.PoolID, Address: "10.213.7.78"}); err == nil || d.given["10.213.7.78"].pid != 0 {
		t.Errorf("what could not be reserved is nobody's: %v", err)
	}
}

func TestRequests_WaitForANodeThatStarts(t *testing.T) {
	f := newFakeNode()
	d := newDriver(t, f, "")
	s := serveDriver(t, d)
	f.status.State = api.StateWaitingForStore
	s.fails("IpamDriver.RequestPool", `{}`, "waiting-for-store", "rootless-ovl status")
	d.readyPatience = 1 << 40
	answered := make(chan map[string]any)
	go func() {
		_, answer := s.post("IpamDriver.RequestPool", `{}`)
		answered <- answer
	}()
	f.change(func() { f.status.State = api.StateReady })
	if got := <-answered; got["Pool"] != "10.213.7.0/24" {
		t.Error(got)
	}
	f.change(func() { f.status.State = api.StateStopping })
	s.fails("IpamDriver.RequestPool", `{}`, "stopping", "rootless-ovl up")
}

func TestCreateNetwork_RefusesWhatItCannotBe(t *testing.T) {
	s := serveDriver(t, newDriver(t, newFakeNode(), ""))
	generic := func(options string) string {
		return edit(t, createNetwork, `"com.docker.network.generic":{}`, `"com.docker.network.generic":{`+options+`}`)
	}
	for _, c := range []struct {
		name, body string
		what       []string
	}{
		{"docker's own addresses", edit(t, createNetwork, "10.213.7.0/24", "172.18.0.0/16"), []string{"172.18.0.0/16", "10.213.7.0/24", "--ipam-driver rootless-ovl"}},
		{"no pool", edit(t, createNetwork, `"Pool":"10.213.7.0/24"`, `"Pool":""`), []string{"--ipam-driver rootless-ovl"}},
		{"--internal", edit(t, createNetwork, `_ipv6":false`, `_ipv6":false,"com.docker.network.internal":true`), []string{"--internal", "egress=deny"}},
		{"--ipv6", edit(t, createNetwork, `_ipv6":false`, `_ipv6":true`), []string{"--ipv6"}},
		{"--ipv4=false", edit(t, createNetwork, `_ipv6":false`, `_ipv6":false,"com.docker.network.enable_ipv4":"false"`), []string{"--ipv4=false"}},
		{"an IPv6 pool", edit(t, createNetwork, `"IPv6Data":[]`, `"IPv6Data":[{"Pool":"fd00::/64"}]`), []string{"--ipv6"}},
		{"--gateway", edit(t, createNetwork, `"10.213.7.1/24"`, `"10.213.7.9/24"`), []string{"--gateway"}},
		{"--aux-address", edit(t, createNetwork, `"AuxAddresses":null`, `"AuxAddresses":{"router":{"IP":"10.213.7.9"}}`), []string{"--aux-address"}},
		{"an option that is none", generic(`"isolated":"true"`), []string{`"isolated"`, "isolate", "host-access"}},
		{"an MTU", generic(`"com.docker.network.driver.mtu":"1400"`), []string{"mtu", "leave it out"}},
		{"a bad flag", generic(`"isolate":"maybe"`), []string{"isolate=maybe", "true or false"}},
		{"a bad rule", generic(`"allow-from":"10.213.0.0/16:x"`), []string{"10.213.0.0/16:x"}},
		{"a bad port", generic(`"host-access":"http"`), []string{"host-access=http"}},
		{"options that are none", edit(t, createNetwork, `"com.docker.network.generic":{}`, `"com.docker.network.generic":7`), []string{"options"}},
	} {
		t.Run(c.name, func(t *testing.T) { s.fails("NetworkDriver.CreateNetwork", c.body, c.what...) })
	}
	s.fails("NetworkDriver.CreateEndpoint", createEndpoint, "docker network rm")
}

func TestCreateNetwork_KeepsItsOptionsOverARestart(t *testing.T) {
	f := newFakeNode()
	first := newDriver(t, f, "")
	s := serveDriver(t, first)
	s.ok("NetworkDriver.CreateNetwork", edit(t, createNetwork, `"com.docker.network.generic":{}`,
		`"com.docker.network.generic":{"isolate":"true","run.rootless-ovl.egress":"10.0.0.0/8, 192.0.2.0/24","allow-from":"10.213.9.0/24:80/tcp 10.213.8.0/24","host-access":"5432","snat":"true"}`))
	second := newDriver(t, f, "")
	var err error
	if second.networks, err = openNetworks(strings.TrimSuffix(first.networks.path, networksFile)); err != nil {
		t.Fatal(err)
	}
	s = serveDriver(t, second)
	s.ok("NetworkDriver.CreateEndpoint", edit(t, createEndpoint, `"Options":{`, `"Options":{"isolate":"false","run.rootless-ovl.host-access":"80",`))
	want := api.Policy{Isolate: false, AllowFrom: []string{"10.213.9.0/24:80/tcp", "10.213.8.0/24"}, Egress: []string{"10.0.0.0/8", "192.0.2.0/24"}, HostAccess: []int{80}}
	if got := f.requests[0].Policy; !reflect.DeepEqual(got, want) {
		t.Errorf("policy %+v, want %+v", got, want)
	}
	if o, _ := second.networks.get(networkID); !o.SNAT || !o.Isolate {
		t.Errorf("the network's options are %+v", o)
	}
	s.fails("NetworkDriver.CreateEndpoint", edit(t, createEndpoint, `"Options":{`, `"Options":{"snat":"true",`), "docker network create")
	s.ok("NetworkDriver.DeleteNetwork", `{"NetworkID":"`+networkID+`"}`)
	s.ok("NetworkDriver.DeleteNetwork", `{"NetworkID":"`+networkID+`"}`)
	s.fails("NetworkDriver.CreateEndpoint", createEndpoint, "docker network rm")
}

func TestEndpoint_LivesFromCreateToDelete(t *testing.T) {
	s, f := withNetwork(t)
	answer := s.ok("NetworkDriver.CreateEndpoint", createEndpoint)
	if want := map[string]any{"MacAddress": "02:6f:0a:d5:07:02"}; !reflect.DeepEqual(answer["Interface"], want) {
		t.Errorf("docker is told %v of the interface, want only what it has not said: %v", answer["Interface"], want)
	}
	r := f.requests[0]
	if !r.Loose || r.Owner != "docker/"+endpointID || r.Addr != "10.213.7.2" || r.PID == 0 || r.Name != "" {
		t.Errorf("attached with %+v", r)
	}
	joined := s.ok("NetworkDriver.Join", joinEndpoint)
	if want := map[string]any{"SrcName": "rovl01234567", "DstPrefix": "eth"}; !reflect.DeepEqual(joined["InterfaceName"], want) || joined["Gateway"] != "10.213.7.1" {
		t.Errorf("joined %v", joined)
	}
	routes, _ := joined["StaticRoutes"].([]any)
	for i, want := range append([]string{"10.213.0.0/16"}, asRoutes(r.DNSAt)...) {
		if i >= len(routes) || !reflect.DeepEqual(routes[i], map[string]any{"Destination": want, "RouteType": 0.0, "NextHop": "10.213.7.1"}) {
			t.Errorf("routes %v: want %s", routes, want)
		}
	}
	if got := s.ok("NetworkDriver.EndpointOperInfo", `{`+ids+`}`); !reflect.DeepEqual(got, map[string]any{"Value": map[string]any{}}) {
		t.Errorf("info %v", got)
	}
	s.ok("NetworkDriver.RevokeExternalConnectivity", `{`+ids+`}`)
	s.ok("NetworkDriver.Leave", `{`+ids+`}`)
	if len(f.attached) != 1 {
		t.Error("gone before docker has brought the interface back")
	}
	for range 2 {
		s.ok("NetworkDriver.DeleteEndpoint", `{`+ids+`}`)
		if len(f.attached) != 0 {
			t.Error("not detached")
		}
	}
	s.fails("NetworkDriver.Join", joinEndpoint, "docker restart")
	s.ok("NetworkDriver.RevokeExternalConnectivity", `{`+ids+`}`)
	s.ok("NetworkDriver.Leave", `{`+ids+`}`)
}

// asRoutes are the routes to IPv4 servers.
func asRoutes(servers []string) (routes []string) {
	for _, s := range servers {
		if !strings.Contains(s, ":") {
			routes = append(routes, s+"/32")
		}
	}
	return routes
}

func TestEndpoint_HasTheMACAndTheAddressesThatAreAskedFor(t *testing.T) {
	s, f := withNetwork(t)
	f.change(func() { f.status.Network6, f.status.Subnet6 = "fd00::/48", "fd00:7::/64" })
	mac := edit(t, createEndpoint, `"MacAddress":""`, `"MacAddress":"02:00:00:00:00:77"`)
	if got := s.ok("NetworkDriver.CreateEndpoint", mac)["Interface"]; !reflect.DeepEqual(got, map[string]any{"AddressIPv6": "fd00:7::2/64"}) {
		t.Errorf("told %v", got)
	}
	if got := f.requests[0].MAC; got != "02:00:00:00:00:77" {
		t.Errorf("attached with %s", got)
	}
	joined := s.ok("NetworkDriver.Join", joinEndpoint)
	routes, _ := joined["StaticRoutes"].([]any)
	has6 := slices.ContainsFunc(routes, func(r any) bool {
		return reflect.DeepEqual(r, map[string]any{"Destination": "fd00::/48", "RouteType": 0.0, "NextHop": "fd00:7::1"})
	})
	if joined["GatewayIPv6"] != "fd00:7::1" || !has6 {
		t.Errorf("joined %v", joined)
	}

	for body, what := range map[string]string{
		edit(t, createEndpoint, `"Address":"10.213.7.2/24"`, `"Address":""`):           "--ipam-driver rootless-ovl",
		edit(t, createEndpoint, `"Address":"10.213.7.2/24"`, `"Address":"10.1.1.1"`):   "docker network rm",
		edit(t, createEndpoint, `"Address":"10.213.7.2/24"`, `"Address":"x"`):          "not an address",
		edit(t, createEndpoint, `"MacAddress":""`, `"MacAddress":"01:00:00:00:00:77"`): "unicast",
		edit(t, createEndpoint, `"Options":{`, `"Options":{"colour":"blue",`):          `"colour"`,
	} {
		s.fails("NetworkDriver.CreateEndpoint", body, what)
	}
}

func TestEndpoint_IsMadeAnewWhenDockerAsksAgain(t *testing.T) {
	s, f := withNetwork(t)
	for range 2 { // docker repeats a call whose answer was lost
		s.ok("NetworkDriver.CreateEndpoint", createEndpoint)
	}
	if len(f.attached) != 1 || len(f.requests) != 2 {
		t.Errorf("%d attachments of %d requests", len(f.attached), len(f.requests))
	}
}

func TestPublish_OpensWhatDockerBinds(t *testing.T) {
	program := func(bindings string) string {
		return `{` + ids + `,"Options":{"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],"com.docker.network.portmap":[` + bindings + `]}}`
	}
	for _, c := range []struct {
		name, bindings string
		want           [][]string
	}{
		{"none", "", nil},
		{"a port", `{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080}`, [][]string{{"8080:80/tcp"}}},
		{"one at an address, one of UDP", `{"Proto":6,"Port":80,"HostIP":"127.0.0.1","HostPort":8080,"HostPortEnd":8080},{"Proto":17,"Port":53,"HostIP":"::1","HostPort":53}`,
			[][]string{{"127.0.0.1:8080:80/tcp", "[::1]:53:53/udp"}}},
		{"any port of the host", `{"Proto":6,"Port":80,"HostPort":0,"HostPortEnd":0}`, [][]string{{"0:80/tcp"}}},
		{"a range is one", `{"Proto":6,"Port":9009,"HostPort":8003,"HostPortEnd":8003},{"Proto":6,"Port":9002,"HostPort":8002,"HostPortEnd":8002},` +
			`{"Proto":6,"Port":9001,"HostPort":8001,"HostPortEnd":8001},{"Proto":6,"Port":9000,"HostPort":8000,"HostPortEnd":8000}`, [][]string{{"8000-8002:9000-9002/tcp", "8003:9009/tcp"}}},
		{"the same twice is once", `{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8080},{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8080}`, [][]string{{"8080:80/tcp"}}},
		{"the first free of a range", `{"Proto":6,"Port":80,"HostPort":7000,"HostPortEnd":7005}`, [][]string{{"7002:80/tcp"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, f := withNetwork(t)
			f.busyPorts = map[int]bool{7000: true, 7001: true, 6000: true}
			s.ok("NetworkDriver.CreateEndpoint", createEndpoint)
			s.ok("NetworkDriver.ProgramExternalConnectivity", program(c.bindings))
			if !reflect.DeepEqual(f.published, c.want) {
				t.Errorf("published %v, want %v", f.published, c.want)
			}
			before := len(f.attached["docker-1"].Ports)
			s.ok("NetworkDriver.ProgramExternalConnectivity", program(c.bindings))
			if got := len(f.attached["docker-1"].Ports); got != before {
				t.Errorf("asked again: %d ports, before %d", got, before)
			}
			s.ok("NetworkDriver.RevokeExternalConnectivity", `{`+ids+`}`)
			if got := f.attached["docker-1"].Ports; len(got) != 0 {
				t.Errorf("left %v", got)
			}
		})
	}
	s, f := withNetwork(t)
	f.busyPorts, f.portStart = map[int]bool{6000: true, 6001: true}, 1024
	one := `{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8080},`
	s.fails("NetworkDriver.ProgramExternalConnectivity", program(strings.TrimSuffix(one, ",")), "docker restart")
	s.ok("NetworkDriver.CreateEndpoint", createEndpoint)
	for bindings, what := range map[string]string{
		one + `{"Proto":6,"Port":80,"HostPort":6000,"HostPortEnd":6001}`: "6000-6001",
		one + `{"Proto":6,"Port":80,"HostPort":6000,"HostPortEnd":6000}`: "6000",
		one + `{"Proto":6,"Port":80,"HostPort":1000,"HostPortEnd":1030}`: "the range 1000-1030 of the host: ports below 1024",
		one + `{"Proto":132,"Port":80,"HostPort":1}`:                     "sctp",
		one + `{"Proto":1,"Port":80,"HostPort":1}`:                       "protocol 1",
		one + `{"Proto":6,"Port":0,"HostPort":1}`:                        "no port 0",
		one + `{"Proto":6,"Port":80,"HostPort":70000}`:                   "70000",
		one + `{"Proto":6,"Port":80,"HostPort":-1}`:                      "-1",
		one + `{"Proto":6,"Port":80,"HostPort":1,"HostIP":"home"}`:       "home",
		one + `7`: "published ports",
	} {
		s.fails("NetworkDriver.ProgramExternalConnectivity", program(bindings), what)
		if got := f.attached["docker-1"].Ports; len(got) != 0 {
			t.Errorf("%s: left %v", bindings, got)
		}
	}
}

func FuzzHandler(f *testing.F) {
	for _, path := range []string{"NetworkDriver.CreateNetwork", "NetworkDriver.CreateEndpoint", "NetworkDriver.Join", "NetworkDriver.ProgramExternalConnectivity",
		"IpamDriver.RequestPool", "IpamDriver.RequestAddress", "IpamDriver.ReleaseAddress"} {
		f.Add(path, createNetwork)
		f.Add(path, createEndpoint)
		f.Add(path, `{`+ids+`,"Options":{"com.docker.network.portmap":[{"Proto":6,"Port":80,"HostPort":1,"HostPortEnd":9}]}}`)
		f.Add(path, `{"PoolID":"10.213.7.0/24","Address":"10.213.7.1/24","Pool":"10.213.7.0/24","V6":true}`)
	}
	f.Fuzz(func(t *testing.T, path, body string) {
		d := newDriver(t, newFakeNode(), "")
		if err := d.networks.put(networkID, options{}); err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
		r.URL.Path = "/" + path
		w := httptest.NewRecorder()
		d.Handler().ServeHTTP(w, r)
		var answer struct{ Err string }
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || w.Code != http.StatusOK && answer.Err == "" || strings.Contains(answer.Err, "\n") {
			t.Errorf("%s %q: %d %s", path, body, w.Code, w.Body)
		}
	})
}

// What docker 20.10.24 sent, word for word but for the addresses: a network with a --subnet, a container with published ports, one with --ip and
// --mac-address, and their ends.
func TestHandler_AnswersWhatWasRecorded(t *testing.T) {
	recorded, err := os.ReadFile("testdata/docker-20.10.24.txt")
	if err != nil {
		t.Fatal(err)
	}
	f := newFakeNode()
	s := serveDriver(t, newDriver(t, f, ""))
	given := ""
	for line := range strings.Lines(string(recorded)) {
		path, body, _ := strings.Cut(strings.TrimSpace(line), " ")
		answer := s.ok(strings.TrimPrefix(path, "/"), body)
		if path == "/IpamDriver.RequestAddress" {
			given, _ = answer["Address"].(string)
		}
		if path == "/NetworkDriver.CreateEndpoint" && !strings.Contains(body, `"Address":"`+given+`"`) {
			t.Errorf("the recording is of another address than %s: %s", given, body)
		}
	}
	if len(f.requests) != 2 || f.requests[1].MAC != "02:00:00:00:00:77" || f.requests[1].Addr != "10.213.7.77" {
		t.Errorf("attached %+v", f.requests)
	}
	if want := [][]string{{"8080:80/tcp", "127.0.0.1:8081:80/tcp", "9000-9002:9000-9002/udp"}}; !reflect.DeepEqual(f.published, want) {
		t.Errorf("published %v, want %v", f.published, want)
	}
	if len(f.attached) != 0 || len(f.reserved) != 0 {
		t.Errorf("left behind: %v %v", f.attached, f.reserved)
	}
}
