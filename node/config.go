// This file is the node's configuration: what the command line gives to New.

package node

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// Defaults of a Config.
const (
	// DefaultEtcdPrefix is flannel's.
	DefaultEtcdPrefix = "/coreos.com/network"
	// DefaultListenEtcd is where the embedded store listens when nothing else is said: this host only.
	DefaultListenEtcd = "127.0.0.1:2379"
	// DefaultLeaseTTL is the life of a host's lease while it is not renewed: flannel's 24 hours, so that a reboot or a
	// long outage of the store gives the same subnet back.
	DefaultLeaseTTL = 24 * time.Hour
	// DefaultEphemeralTTL is the life of an ephemeral node's lease: long enough to ride out a slow store, short enough
	// that the subnet of a runner that was cut off is free again within the minute.
	DefaultEphemeralTTL = 30 * time.Second
)

// DefaultNetwork is created when the store has no network config and the user names none: 256 subnets of /24. It is a part
// of 10.0.0.0/8 that neither docker, podman, Kubernetes nor home routers use by default, so it overlaps with few hosts.
var DefaultNetwork = netip.MustParsePrefix("10.213.0.0/16")

// Values of Config.Port that are not port numbers.
const (
	PortFromConfig = -1 // the port of the network config (flannel's way; 8285 if the config is silent)
	PortAny        = 0  // any free port, published in our lease
)

// Config is everything that a node is told. The zero value of a field is its default unless said otherwise.
type Config struct {
	// StateDir outlives the daemon and the machine's uptime: node id, previous subnet, attachments, last known leases,
	// the embedded store's data. It is created with mode 0700. One daemon per StateDir. Required.
	StateDir string
	// RuntimeDir holds api.sock and subnet.env. It is created with mode 0700. Required.
	RuntimeDir string

	// Etcd is the store to join. Empty Endpoints: this node runs an embedded etcd in StateDir/etcd.
	Etcd lease.ClientConfig
	// EtcdPrefix is the directory of the overlay's keys; default DefaultEtcdPrefix.
	EtcdPrefix string
	// ListenEtcd is the "host:port" that the embedded etcd serves clients on; default DefaultListenEtcd. Port 0 takes
	// any free port. Unused with Endpoints.
	ListenEtcd string

	// Network is what the network config is created with when the store has none. If NetworkSet is false it is
	// DefaultNetwork.
	Network netip.Prefix
	// NetworkSet: the user asked for Network by name, so a store whose config names another one is an error and not
	// something to go along with.
	NetworkSet bool
	// NetConfig is the network config (JSON) that is created in the place of one made of Network; nil: none. A store that
	// has another one goes before it.
	NetConfig []byte
	// AllowOverlap starts the node even though the overlay network overlaps a route or a resolver of this host, which
	// its containers then cannot reach.
	AllowOverlap bool

	// Iface are interfaces (names or addresses) to try in order, IfaceRegex patterns tried after them,
	// IfaceCanReach a host whose route chooses the interface. All empty: that of the default route.
	Iface         []string
	IfaceRegex    []string
	IfaceCanReach string
	// PublicIP is the address that peers send to. Zero: the address of the external interface. Without Iface,
	// IfaceRegex and IfaceCanReach it also chooses the interface, so it must then be an address of this host.
	PublicIP netip.Addr
	// PublicIPv6 is the same for IPv6, which a dual-stack network asks for. Without PublicIP too it chooses the interface.
	PublicIPv6 netip.Addr

	// Port is the underlay's UDP port: PortFromConfig, PortAny, or a number 1..65535 that is published in our lease. Under
	// the alloc backend nothing is sent to it, and PortFromConfig is PortAny.
	Port int
	// Ephemeral: a short lease, revoked when Run ends. For CI jobs.
	Ephemeral bool
	// LeaseTTL is the life of our lease while it is not renewed; default DefaultLeaseTTL, or DefaultEphemeralTTL for an
	// ephemeral node.
	LeaseTTL time.Duration
	// RenewMargin: the lease is renewed at least this long before it ends. It is renewed whenever a third of its life has
	// passed, so that only a margin of over two thirds makes a difference.
	RenewMargin time.Duration
	// SubnetFile is where subnet.env is written; default RuntimeDir/subnet.env.
	SubnetFile string
	// NoIPMasq writes FLANNEL_IPMASQ=false into it, which has docker translate addresses itself. The gateway goes on doing so.
	NoIPMasq bool

	// Healthz is where GET /healthz and /readyz are answered, to anybody and in flanneld's words. Zero: nowhere.
	Healthz netip.AddrPort

	// Proxy is where the SOCKS5 and HTTP proxy to the overlay listens, with port 0 on any free one. Zero: nowhere.
	Proxy netip.AddrPort

	// HostLoopback and LinkLocal open the host's loopback and the link-local range (169.254.0.0/16, cloud metadata) to
	// containers.
	HostLoopback bool
	LinkLocal    bool

	// OutboundAddrs are the addresses of this host, at most one a family, that what containers send outside comes from; OutboundIf
	// is the only interface it leaves by. Neither: the host's routes decide.
	OutboundAddrs []netip.Addr
	OutboundIf    string

	// Beside runs beside the API, from when it can be asked until its context ends; it may use RuntimeDir and StateDir, which this node has locked.
	// An error ends the node. nil: nothing.
	// It listens on a socket of RuntimeDir by the function that it is given.
	Beside func(ctx context.Context, listen func(name string) (net.Listener, error)) error

	// Replace takes the place of the daemon that runs on RuntimeDir and StateDir, whose descriptors this node goes on with. Replacing is called right
	// before that one is asked to let go, which an error forbids; Replaced when it has; nil: nothing is.
	Replace   bool
	Replacing func() error
	Replaced  func()

	// Sandbox is what Status reports of the cage that this process is in, set before Run; nil: it is in none.
	Sandbox *api.Sandbox

	// Log receives one line per event; default slog.Default().
	Log *slog.Logger
	// Version is what Status reports.
	Version string
}

// Socket is the path of the API socket.
func (c Config) Socket() string { return filepath.Join(c.RuntimeDir, "api.sock") }

// checked returns c with defaults filled in, or says which field cannot be.
func (c Config) checked() (Config, error) {
	if c.StateDir == "" || c.RuntimeDir == "" {
		return c, fmt.Errorf("node: a state directory and a runtime directory are needed")
	}
	if c.EtcdPrefix == "" {
		c.EtcdPrefix = DefaultEtcdPrefix
	}
	if c.ListenEtcd == "" {
		c.ListenEtcd = DefaultListenEtcd
	}
	if !c.NetworkSet {
		c.Network = DefaultNetwork
	}
	if !c.Network.IsValid() || !c.Network.Addr().Is4() {
		return c, fmt.Errorf("network %v: an IPv4 network such as 10.5.0.0/16 is needed", c.Network)
	}
	c.Network = c.Network.Masked()
	if c.PublicIP.IsValid() && !c.PublicIP.Is4() {
		return c, fmt.Errorf("public IP %v: an IPv4 address is needed", c.PublicIP)
	}
	if a := c.PublicIPv6; a.IsValid() && (!a.Is6() || a.Is4In6() || a.IsLinkLocalUnicast()) {
		return c, fmt.Errorf("public IPv6 %v: an IPv6 address is needed, and not a link-local one", a)
	}
	if _, err := c.outbound(); err != nil {
		return c, err
	}
	if c.Port < PortFromConfig || c.Port > 65535 {
		return c, fmt.Errorf("port %d: 1 to 65535, 0 for any free one, or -1 for that of the network config", c.Port)
	}
	if c.LeaseTTL < 0 || c.LeaseTTL > 0 && c.LeaseTTL < 5*time.Second {
		return c, fmt.Errorf("lease TTL %v: at least 5s", c.LeaseTTL)
	}
	if c.LeaseTTL == 0 {
		c.LeaseTTL = DefaultLeaseTTL
		if c.Ephemeral {
			c.LeaseTTL = DefaultEphemeralTTL
		}
	}
	if c.RenewMargin < 0 || c.RenewMargin >= c.LeaseTTL {
		return c, fmt.Errorf("renew margin %v (--subnet-lease-renew-margin): it must be shorter than the lease, %v (--lease-ttl)", c.RenewMargin, c.LeaseTTL)
	}
	if c.SubnetFile == "" {
		c.SubnetFile = filepath.Join(c.RuntimeDir, "subnet.env")
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c, nil
}

// newNetwork is the network config to create in a store that has none: what was asked for, else what the last run had there.
func (c Config) newNetwork(last savedLast) (lease.NetworkConfig, error) {
	raw, from := lease.DefaultConfig(c.Network), fmt.Sprintf("--network %v", c.Network)
	switch {
	case c.NetConfig != nil:
		raw, from = c.NetConfig, "--net-config-path"
	case !c.NetworkSet && last.Store == storeOf(c):
		// The store was made anew: other nodes go on with what there was. One that cannot be read counts for nothing.
		if cfg, err := lease.ParseConfig([]byte(last.Config)); err == nil && CheckConfig(cfg) == nil {
			return cfg, nil
		}
	}
	cfg, err := lease.ParseConfig(raw)
	if err == nil {
		err = CheckConfig(cfg)
	}
	if err != nil {
		return cfg, fmt.Errorf("%s: %w", from, err)
	}
	return cfg, nil
}

// sameJSON tells whether two texts are the same but for spaces and the order of members.
func sameJSON(a, b []byte) bool {
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}
