// The JSON of the plugin protocol, as far as it is used here (netavark's src/network/types.rs; types/network.go of podman's libnetwork).

package netavark

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// maxInput bounds what is read from standard input, in bytes.
const maxInput = 1 << 20

// network is a network as podman describes it. Create gives back the members that it does not know as they came.
type network struct {
	ID          string            `json:"id"`
	Name        string            `json:"name"`
	Interface   string            `json:"network_interface"`
	Subnets     []subnet          `json:"subnets"`
	Routes      []json.RawMessage `json:"routes"`
	IPv6        bool              `json:"ipv6_enabled"`
	Internal    bool              `json:"internal"`
	DNS         bool              `json:"dns_enabled"`
	DNSServers  []string          `json:"network_dns_servers"`
	Options     map[string]string `json:"options"`
	IPAMOptions map[string]string `json:"ipam_options"`
}

type subnet struct {
	Subnet     string          `json:"subnet"`
	Gateway    string          `json:"gateway"`
	LeaseRange json.RawMessage `json:"lease_range"`
}

// container is the input of setup and teardown.
type container struct {
	ID      string        `json:"container_id"`
	Name    string        `json:"container_name"`
	Ports   []portMapping `json:"port_mappings"`
	Network network       `json:"network"`
	Options struct {
		Aliases   []string          `json:"aliases"`
		Interface string            `json:"interface_name"`
		StaticIPs []string          `json:"static_ips"`
		StaticMAC string            `json:"static_mac"`
		Options   map[string]string `json:"options"`
	} `json:"network_options"`
}

// portMapping is Range ports that follow each other, at both ends.
type portMapping struct {
	HostIP        string `json:"host_ip"`
	ContainerPort uint16 `json:"container_port"`
	HostPort      uint16 `json:"host_port"`
	Range         uint16 `json:"range"`
	Protocol      string `json:"protocol"`
}

// status is the answer of setup. Its lists are never null.
type status struct {
	SearchDomains []string        `json:"dns_search_domains"`
	Servers       []string        `json:"dns_server_ips"`
	Interfaces    map[string]link `json:"interfaces"`
}

type link struct {
	MAC     string    `json:"mac_address"`
	Subnets []address `json:"subnets"`
}

type address struct {
	Gateway string `json:"gateway,omitempty"`
	Net     string `json:"ipnet"` // the address with the subnet's length
}

// read decodes one JSON object into each of into.
func read(in io.Reader, what string, into ...any) error {
	b, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	if err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	if len(b) > maxInput {
		return fmt.Errorf("standard input has more than %d bytes: it should be the JSON of %s", maxInput, what)
	}
	for _, v := range into {
		if err := json.Unmarshal(b, v); err != nil {
			return fmt.Errorf("standard input is not the JSON of %s: %w: the plugin is called by podman and netavark, see plugin-API.md of netavark", what, err)
		}
	}
	return nil
}

// readContainer reads the input of setup and teardown.
func readContainer(in io.Reader) (container, error) {
	var c container
	if err := read(in, "a container and its network", &c); err != nil {
		return c, err
	}
	if c.ID == "" || c.Network.ID == "" {
		return c, errors.New("the input names no container_id or no id of the network: the plugin is called by podman and netavark, see plugin-API.md of netavark")
	}
	return c, nil
}

// owner is what the daemon knows the attachment by.
func (c *container) owner() string { return "netavark/" + c.Network.ID + "/" + c.ID }
