// This file is what goes over the wire: the requests of dockerd, which is trusted no further than their form is checked, and the answers.

package docker

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
)

// maxRequest is the most bytes of a request: a published port has some hundred, and a container may have thousands.
const maxRequest = 4 << 20

// Keys of options that dockerd sends.
const (
	labelPrefix     = "com.docker."
	labelGeneric    = "com.docker.network.generic"
	labelInternal   = "com.docker.network.internal"
	labelIPv6       = "com.docker.network.enable_ipv6"
	labelIPv4       = "com.docker.network.enable_ipv4"
	labelMTU        = "com.docker.network.driver.mtu"
	labelGateway    = "com.docker.network.gateway"
	labelPortMap    = "com.docker.network.portmap"
	addressTypeKey  = "RequestAddressType"
	scopeLocal      = "local"
	contentType     = "application/vnd.docker.plugins.v1.1+json"
	routeByNextHop  = 0
	interfacePrefix = "eth"
)

type createNetworkRequest struct {
	NetworkID string
	Options   map[string]json.RawMessage
	IPv4Data  []ipamData
	IPv6Data  []ipamData
}

// ipamData is a pool of a network, as the IPAM driver of its choice has given it.
type ipamData struct {
	Pool         string
	Gateway      string
	AuxAddresses map[string]json.RawMessage
}

type networkRequest struct{ NetworkID string }

// endpointRequest is all that is asked about one endpoint; what a request does not have is empty.
type endpointRequest struct {
	NetworkID  string
	EndpointID string
	Interface  *endpointInterface
	Options    map[string]json.RawMessage
}

// endpointInterface has in an answer only what was empty in the request.
type endpointInterface struct {
	Address     string `json:",omitempty"` // CIDR
	AddressIPv6 string `json:",omitempty"`
	MacAddress  string `json:",omitempty"`
}

type createEndpointResponse struct{ Interface endpointInterface }

type joinResponse struct {
	InterfaceName interfaceName
	Gateway       string        `json:",omitempty"`
	GatewayIPv6   string        `json:",omitempty"`
	StaticRoutes  []staticRoute `json:",omitempty"`
}

type interfaceName struct{ SrcName, DstPrefix string }

type staticRoute struct {
	Destination string
	RouteType   int
	NextHop     string
}

type poolRequest struct {
	Pool    string
	SubPool string
	V6      bool
}

type poolResponse struct {
	PoolID string
	Pool   string
	Data   map[string]string
}

type addressRequest struct {
	PoolID  string
	Address string
	Options map[string]string
}

type addressResponse struct{ Address string }

type capabilities struct {
	Scope             string
	ConnectivityScope string
}

type ipamCapabilities struct {
	RequiresMACAddress    bool
	RequiresRequestReplay bool
}

type addressSpaces struct {
	LocalDefaultAddressSpace  string
	GlobalDefaultAddressSpace string
}

type activation struct{ Implements []string }

type operInfo struct{ Value map[string]string }

type nothing struct{}

// failure is an answer that says what went wrong: network drivers have another word for it than IPAM drivers.
type failure struct{ Err, Error string }

func failed(text string) failure { return failure{Err: text, Error: text} }

// decode reads one JSON object into v. Members that v does not have are passed over: other versions of docker have more. An empty body is an
// empty object, as docker sends it where there is nothing to say.
func decode(body io.Reader, v any) error {
	b, err := io.ReadAll(io.LimitReader(body, maxRequest+1))
	switch {
	case err != nil:
		return fmt.Errorf("the request ends early: %w", err)
	case len(b) > maxRequest:
		return fmt.Errorf("the request is larger than %d bytes", maxRequest)
	case len(b) == 0:
		return nil
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("the request is not what docker sends: %w", err)
	}
	return nil
}

// checkID refuses what cannot be an id of docker's: it becomes a part of owners' names and of messages.
func checkID(what, id string) error {
	if id == "" || len(id) > 128 {
		return fmt.Errorf("the %s id has %d characters: docker's have 64", what, len(id))
	}
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return fmt.Errorf("%q is not a %s id of docker's", id, what)
		}
	}
	return nil
}

func (r *networkRequest) check() error { return checkID("network", r.NetworkID) }

func (r *createNetworkRequest) check() error { return checkID("network", r.NetworkID) }

func (r *endpointRequest) check() error {
	if err := checkID("network", r.NetworkID); err != nil {
		return err
	}
	return checkID("endpoint", r.EndpointID)
}

// flag reads a boolean option, which some versions send as a string.
func flag(options map[string]json.RawMessage, key string) (value, given bool) {
	raw, given := options[key]
	text := strings.Trim(string(raw), `"`)
	return text == "true", given && (text == "true" || text == "false")
}

// userOptions are the options that a user has given: those of generic data, which are docker's `-o`, and others that are no labels of docker's.
func userOptions(options map[string]json.RawMessage) (map[string]string, error) {
	out := make(map[string]string)
	for key, raw := range options {
		switch {
		case key == labelGeneric:
			var inner map[string]any
			if err := json.Unmarshal(raw, &inner); err != nil {
				return nil, fmt.Errorf("options: %w", err)
			}
			for k, v := range inner {
				out[k] = fmt.Sprint(v)
			}
		case !strings.HasPrefix(key, labelPrefix):
			var v any
			if err := json.Unmarshal(raw, &v); err != nil {
				return nil, fmt.Errorf("option %q: %w", key, err)
			}
			out[key] = fmt.Sprint(v)
		}
	}
	return out, nil
}

// addrOf reads an address with or without a length.
func addrOf(text string) (netip.Addr, error) {
	if p, err := netip.ParsePrefix(text); err == nil {
		return p.Addr().Unmap(), nil
	}
	a, err := netip.ParseAddr(text)
	return a.Unmap(), err
}
