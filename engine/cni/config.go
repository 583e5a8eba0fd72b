// This file is the configuration of a network as ADD reads it: its members, what the runtime adds for one container, and the request to the
// daemon that they make together.
//
// Members that are not known are refused, as the specification allows: a misspelt "isolate" must not leave a container open. Only args and members
// with a dot or a slash in them, which are other people's, are passed over.

package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// What "names" may say.
const (
	namesUnique = "unique" // the container's name is its alone in the overlay
	namesShared = "shared" // others may have it too: each is found in turn
	namesNone   = "none"   // it is not found by a name
)

// config is a network's configuration.
type config struct {
	Type         string         `json:"type"`
	Capabilities map[string]any `json:"capabilities"`
	IPMasq       *bool          `json:"ipMasq"`
	IPAM         struct {
		Type string `json:"type"`
	} `json:"ipam"`
	DNS types.DNS `json:"dns"`

	MTU          int       `json:"mtu"`
	IfName       string    `json:"ifName"` // in place of CNI_IFNAME
	DefaultRoute *bool     `json:"defaultRoute"`
	Names        string    `json:"names"`
	Isolate      bool      `json:"isolate"`
	AllowFrom    []string  `json:"allowFrom"`
	AllowTo      []string  `json:"allowTo"`
	Egress       oneOrMore `json:"egress"`
	HostAccess   []int     `json:"hostAccess"`
	SNAT         bool      `json:"snat"`

	Args          json.RawMessage `json:"args"`
	RuntimeConfig runtimeConfig   `json:"runtimeConfig"`
}

// known are the members that a configuration may have: those of config and of head.
var known = []string{
	"cniVersion", "name", "type", "capabilities", "ipMasq", "ipam", "dns", "mtu", "ifName", "defaultRoute", "names", "isolate", "allowFrom", "allowTo", "egress",
	"hostAccess", "snat", "args", "runtimeConfig", "prevResult",
}

// runtimeConfig is what the runtime says for one container: of what the configuration's capabilities list. Names of members are read in upper and
// lower case, as runtimes write them.
type runtimeConfig struct {
	PortMappings []portMapping `json:"portMappings"`
	IPs          []string      `json:"ips"`
	MAC          string        `json:"mac"`
	DNS          struct {
		Servers  []string `json:"servers"`
		Searches []string `json:"searches"`
		Options  []string `json:"options"`
	} `json:"dns"`
	Aliases aliases `json:"aliases"`
}

var capabilities = []string{"portMappings", "ips", "mac", "dns", "aliases"}

// portMapping is a port of the host that leads to one of the container.
type portMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// oneOrMore is a string or a list of them.
type oneOrMore []string

// UnmarshalJSON reads either.
func (l *oneOrMore) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*l = nil
		if one != "" {
			*l = oneOrMore{one}
		}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(l))
}

// aliases are further names: a list, as the conventions have it, or podman's, which has one for each network.
type aliases struct {
	all       []string
	byNetwork map[string][]string
}

// UnmarshalJSON reads either.
func (a *aliases) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &a.byNetwork) == nil {
		return nil
	}
	a.byNetwork = nil
	return json.Unmarshal(b, &a.all)
}

func (a aliases) of(network string) []string {
	return append(slices.Clone(a.all), a.byNetwork[network]...)
}

// extras is what a runtime may say in other places: CNI_ARGS, and args.cni of the configuration.
type extras struct {
	ips       []string
	mac       string
	pod       string // the container's name
	namespace string // of the pod
}

// readConfig reads all of a configuration. Its errors are *callError.
func readConfig(input []byte) (config, error) {
	var c config
	var members map[string]json.RawMessage
	if err := json.Unmarshal(input, &members); err != nil {
		return c, fail(types.ErrDecodingFailure, "the configuration on standard input cannot be read: %v", err)
	}
	if err := onlyKnown(members, known, ""); err != nil {
		return c, err
	}
	if raw, given := members["runtimeConfig"]; given {
		var runtime map[string]json.RawMessage
		if err := json.Unmarshal(raw, &runtime); err != nil {
			return c, fail(types.ErrDecodingFailure, "runtimeConfig: %v", err)
		}
		if err := onlyKnown(runtime, capabilities, "runtimeConfig."); err != nil {
			err.Msg += "; take it out of the capabilities of this plugin"
			return c, err
		}
	}
	if err := json.Unmarshal(input, &c); err != nil {
		return c, fail(types.ErrInvalidNetworkConfig, "the network's configuration: %v", err)
	}
	return c, c.validate()
}

// onlyKnown refuses members that nobody here reads.
func onlyKnown(members map[string]json.RawMessage, known []string, where string) *callError {
	var odd []string
	for name, value := range members {
		if !slices.Contains(known, name) && !strings.ContainsAny(name, "./") {
			odd = append(odd, fmt.Sprintf("%s%.80s: %.80s", where, name, value))
		}
	}
	if len(odd) == 0 {
		return nil
	}
	slices.Sort(odd)
	return fail(types.ErrUnsupportedField, "%s: this plugin does not know it (it knows %s)", odd[0], strings.Join(known, ", "))
}

// validate refuses what cannot be done here.
func (c config) validate() error {
	switch {
	case c.IPAM.Type != "":
		return fail(types.ErrUnsupportedField, "ipam: {\"type\": %.80q}: addresses come from the node's subnet, so leave ipam out", c.IPAM.Type)
	case c.IPMasq != nil && !*c.IPMasq:
		return fail(types.ErrUnsupportedField, "ipMasq: false: what leaves the overlay always has the host's address; leave it out, or close the outside with \"egress\": \"deny\"")
	case c.MTU < 0:
		return fail(types.ErrInvalidNetworkConfig, "mtu: %d is none: leave it out, and it is the network's", c.MTU)
	case !slices.Contains([]string{"", namesUnique, namesShared, namesNone}, c.Names):
		return fail(types.ErrInvalidNetworkConfig, "names: %.40q: write %q, %q or %q", c.Names, namesUnique, namesShared, namesNone)
	}
	if c.IfName != "" {
		if err := api.CheckIfName(c.IfName); err != nil {
			return fail(types.ErrInvalidNetworkConfig, "ifName: %v", err)
		}
	}
	return nil
}

// readExtras reads CNI_ARGS and args.cni. What is in them and means nothing here is passed over, for the runtime gives it to every plugin.
func readExtras(cniArgs string, args json.RawMessage) (extras, error) {
	var e extras
	for pair := range strings.SplitSeq(cniArgs, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch {
		case value == "":
		case key == "IP":
			e.ips = strings.Split(value, ",")
		case key == "MAC":
			e.mac = value
		case key == "K8S_POD_NAME":
			e.pod = value
		case key == "K8S_POD_NAMESPACE":
			e.namespace = value
		}
	}
	var object struct {
		CNI json.RawMessage `json:"cni"`
	}
	if json.Unmarshal(args, &object) != nil || object.CNI == nil { // somebody else's, whatever it is
		return e, nil
	}
	var ours struct {
		IPs []string `json:"ips"`
		MAC string   `json:"mac"`
	}
	if err := json.Unmarshal(object.CNI, &ours); err != nil {
		return e, fail(types.ErrInvalidNetworkConfig, "args.cni: %v", err)
	}
	if len(ours.IPs) > 0 {
		e.ips = ours.IPs
	}
	if ours.MAC != "" {
		e.mac = ours.MAC
	}
	return e, nil
}

// request is the attachment that is asked for, without the namespace. Its errors are *callError.
func (c config) request(network string, e extras) (api.AttachRequest, error) {
	r := api.AttachRequest{
		IfName: c.IfName,
		MAC:    c.RuntimeConfig.MAC,
		Policy: api.Policy{Isolate: c.Isolate, AllowFrom: c.AllowFrom, AllowTo: c.AllowTo, Egress: c.Egress, HostAccess: c.HostAccess},
	}
	if r.MAC == "" {
		r.MAC = e.mac
	}
	ips := c.RuntimeConfig.IPs
	if len(ips) == 0 {
		ips = e.ips
	}
	var err error
	if r.Addr, err = oneIPv4(ips); err != nil {
		return r, err
	}
	r.Name, r.Aliases = c.names(e, c.RuntimeConfig.Aliases.of(network))
	for _, m := range c.RuntimeConfig.PortMappings {
		spec, err := m.spec()
		if err != nil {
			return r, err
		}
		r.Publish = append(r.Publish, spec)
	}
	r.SNAT = c.SNAT && len(r.Publish) > 0
	return r, nil
}

// oneIPv4 is the address that is asked for, "" for any. A length is passed over: it is the subnet's.
func oneIPv4(ips []string) (string, error) {
	if len(ips) == 0 {
		return "", nil
	}
	if len(ips) > 1 {
		return "", fail(types.ErrUnsupportedField, "ips: %.200s: an interface has one IPv4 address here, and its IPv6 address follows from that: ask for one IPv4 address", strings.Join(ips, ", "))
	}
	text, _, _ := strings.Cut(ips[0], "/")
	addr, err := netip.ParseAddr(strings.TrimSpace(text))
	switch {
	case err != nil:
		return "", fail(types.ErrInvalidNetworkConfig, "ips: %.80q is no address: ask for one IPv4 address, as 10.213.7.20", ips[0])
	case addr.Unmap().Is6():
		return "", fail(types.ErrUnsupportedField, "ips: %v: an IPv6 address follows from the IPv4 one, so ask for that", addr)
	}
	return addr.Unmap().String(), nil
}

// names are what the container is found by. Those that cannot be names are left out: runtimes make them up, as podman does an alias
// of a container's id, which may be all digits.
func (c config) names(e extras, wanted []string) (name string, others []string) {
	if c.Names == namesNone {
		return "", nil
	}
	if name = e.pod; name != "" && e.namespace != "" { // a pod's name is its alone in its namespace
		name += "." + e.namespace
	}
	if api.CheckName(name) != nil {
		name = ""
	}
	if c.Names == namesShared {
		wanted = append([]string{name}, wanted...)
		name = ""
	}
	for _, alias := range wanted {
		same := func(s string) bool { return strings.EqualFold(s, alias) }
		if api.CheckName(alias) == nil && !same(name) && !slices.ContainsFunc(others, same) {
			others = append(others, alias)
		}
	}
	return name, others
}

// spec is the mapping as api.ParsePublish reads it.
func (m portMapping) spec() (string, error) {
	proto := strings.ToLower(m.Protocol)
	switch {
	case proto == "":
		proto = api.ProtoTCP
	case proto != api.ProtoTCP && proto != api.ProtoUDP:
		return "", fail(types.ErrUnsupportedField, "portMappings: protocol: %.40q: ports are published for tcp and udp", m.Protocol)
	}
	if m.HostPort < 0 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535 {
		return "", fail(types.ErrInvalidNetworkConfig, "portMappings: %d to %d: ports are 1 to 65535, that of the host 0 for any that is free", m.HostPort, m.ContainerPort)
	}
	host := ""
	if m.HostIP != "" {
		addr, err := netip.ParseAddr(m.HostIP)
		if err != nil {
			return "", fail(types.ErrInvalidNetworkConfig, "portMappings: hostIP: %.80q is no address", m.HostIP)
		}
		host = addr.String() + ":"
		if addr.Is6() {
			host = "[" + addr.String() + "]:"
		}
	}
	spec := host + strconv.Itoa(m.HostPort) + ":" + strconv.Itoa(m.ContainerPort) + "/" + proto
	_, err := api.ParsePublish(spec)
	if err != nil {
		var e *api.Error
		errors.As(err, &e)
		return "", fail(types.ErrInvalidNetworkConfig, "portMappings: %v", e)
	}
	return spec, nil
}
