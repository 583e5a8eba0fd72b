// The types of the API and the rules a request must obey whatever the node.

package api

import (
	"fmt"
	"net"
	"path"
	"regexp"
	"strings"
	"time"
)

// The paths. A change that an existing client could not live with gets a new version.
const (
	PathStatus = "/v1/status"
	// GET: list, with ?owner= those of one; POST: attach; DELETE PathAttachments/{name or pid}: detach; POST and DELETE .../ports: publish,
	// unpublish; PUT .../names: rename
	PathAttachments = "/v1/attachments"
	PathPeers       = "/v1/peers"
	PathConfig      = "/v1/config" // GET and PUT: the network config, as it stands in the store
)

// What Status.State may say.
const (
	StateStarting        = "starting"          // reading the state directory, choosing the public IP
	StateWaitingForStore = "waiting-for-store" // no lease yet, and the store does not answer
	StateReady           = "ready"             // lease held, forwarding
	// StateLeaseLost: forwarding on what was last known while a lease is acquired again, or, after a start without the store, until the store
	// confirms that the one of the last run still stands. Store.Connected tells the two apart.
	StateLeaseLost = "lease-lost"
	StateStopping  = "stopping"
)

// Status is one look at a node.
type Status struct {
	Version   string    `json:"version"`
	State     string    `json:"state"`
	Problem   string    `json:"problem,omitempty"` // what keeps peers from reaching this node, or containers the outside; empty when nothing is known to
	Since     time.Time `json:"since"`             // when the daemon started
	PID       int       `json:"pid"`
	NodeID    string    `json:"node_id"`
	PublicIP  string    `json:"public_ip"`
	Interface string    `json:"interface"` // the external interface
	Port      int       `json:"port"`      // the underlay's UDP port
	Subnet    string    `json:"subnet"`    // CIDR; empty until leased
	Network   string    `json:"network"`   // CIDR; empty until the config is read
	Gateway   string    `json:"gateway"`   // the subnet's gateway address
	Backend   string    `json:"backend"`   // the encapsulation
	MTU       int       `json:"mtu"`       // overlay MTU, bytes
	// Of a dual-stack overlay, otherwise empty.
	PublicIPv6 string `json:"public_ipv6,omitempty"`
	Subnet6    string `json:"subnet6,omitempty"`
	Network6   string `json:"network6,omitempty"`
	Gateway6   string `json:"gateway6,omitempty"`

	// By what containers' traffic leaves, where that was chosen.
	OutboundAddrs []string `json:"outbound_addrs,omitempty"`
	OutboundIf    string   `json:"outbound_if,omitempty"`

	Proxy  string `json:"proxy,omitempty"`  // where the proxy to the overlay listens
	Domain string `json:"domain,omitempty"` // below which the gateways find containers' names; empty until the config is read

	Ephemeral bool   `json:"ephemeral"` // the lease is given back on stop
	RunDir    string `json:"runtime_dir"`
	StateDir  string `json:"state_dir"`
	SubnetEnv string `json:"subnet_file"`

	Store StoreStatus `json:"store"`

	Sandbox Sandbox `json:"sandbox"`

	Attachments int `json:"attachments"` // how many
	Peers       int `json:"peers"`       // how many
	AddrsFree   int `json:"addrs_free"`  // how many addresses of the subnet nobody has or has reserved

	// Counters are grouped ("tap", "underlay", "drops", "gateway", "published"); within a group each has a snake_case name. They only
	// grow while the daemon lives.
	Counters map[string]map[string]uint64 `json:"counters"`
}

// Sandbox is what the daemon has shut itself in with, so that whoever takes it over gets little by it.
type Sandbox struct {
	Seccomp    bool              `json:"seccomp"`       // the system calls that it does not need are closed
	Landlock   int               `json:"landlock"`      // so are files, and other processes: the kernel's ABI, 0 when off
	NoNewPrivs bool              `json:"no_new_privs"`  // no setuid program gives it anything
	Off        map[string]string `json:"off,omitempty"` // why one of these is off, by its name
	// MemoryLimit is from where on memory is freed with more effort, in bytes; 0 when there is no limit. It was taken from "GOMEMLIMIT" or "cgroup".
	MemoryLimit     int64  `json:"memory_limit"`
	MemoryLimitFrom string `json:"memory_limit_from,omitempty"`
}

// StoreStatus tells how the node stands with etcd.
type StoreStatus struct {
	Endpoints []string  `json:"endpoints"`
	Prefix    string    `json:"prefix"`
	Embedded  bool      `json:"embedded"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"`           // since when Connected has its value
	Error     string    `json:"error,omitempty"` // the last failure; empty while connected
}

// Attachment is one network namespace on the overlay.
type Attachment struct {
	Name         string            `json:"name"`
	PID          int               `json:"pid,omitempty"`   // the process whose namespace it is; 0 when attached by path or descriptor
	Netns        string            `json:"netns,omitempty"` // the namespace's path; empty when attached by PID or descriptor
	Inode        uint64            `json:"inode,omitempty"` // of the network namespace: tells it from another under the same PID or path
	Owner        string            `json:"owner,omitempty"` // what an engine calls it
	IfName       string            `json:"ifname"`
	Addr         string            `json:"addr"`            // CIDR: the address with the subnet's length
	Addr6        string            `json:"addr6,omitempty"` // likewise in a dual-stack overlay
	MAC          string            `json:"mac"`
	Gateway      string            `json:"gateway"`
	Gateway6     string            `json:"gateway6,omitempty"`
	MTU          int               `json:"mtu"`
	DefaultRoute bool              `json:"default_route"`
	WholeSubnet  bool              `json:"whole_subnet,omitempty"` // attached as the gateway of all of Addr's subnet
	Loose        bool              `json:"loose,omitempty"`        // made for somebody to move: PID, Inode and IfName are where it is now
	DNSAt        []string          `json:"dns_at,omitempty"`       // where the gateway's resolver answers, too
	Problem      string            `json:"problem,omitempty"`      // what of it may not work; empty when all is well
	Warnings     []string          `json:"warnings,omitempty"`     // in the answer to an attach: what of the request has no effect
	Since        time.Time         `json:"since"`
	Counters     map[string]uint64 `json:"counters,omitempty"`
	Aliases      []string          `json:"aliases,omitempty"` // further names, which others may have as well
	DNS          *DNS              `json:"dns,omitempty"`     // nil with WholeSubnet: the gateway is not to be asked then
	Ports        []Port            `json:"ports,omitempty"`   // published
	Policy
}

// DNS is what belongs into the resolv.conf of a container on the overlay.
type DNS struct {
	Server string   `json:"server"` // the gateway
	Search []string `json:"search"` // the network's domain
}

// AttachRequest asks for an attachment. Exactly one of PID, Netns and NetnsFD is given; what else is left out is chosen by the node.
type AttachRequest struct {
	PID   int    `json:"pid,omitempty"`
	Netns string `json:"netns,omitempty"` // absolute path, as the daemon sees it
	// NetnsFD is a descriptor, above 2, of the process that asks, which the daemon opens again: for callers whose paths mean nothing to the
	// daemon. It stays the caller's, who may close it when the answer is there.
	NetnsFD int `json:"netns_fd,omitempty"`
	// Owner is what an engine calls the attachment, so that it finds it again: unique on the node, see CheckOwner.
	Owner          string `json:"owner,omitempty"`
	Name           string `json:"name,omitempty"`   // unique in the overlay; default: made from the PID or the path, and published nowhere
	Addr           string `json:"addr,omitempty"`   // IPv4 address without length; default: a free one of the subnet
	IfName         string `json:"ifname,omitempty"` // default: eth0, with Gateway rovl0, with Loose rovl and eight digits
	MAC            string `json:"mac,omitempty"`    // default: made from the address
	NoDefaultRoute bool   `json:"no_default_route,omitempty"`
	// Gateway routes the whole subnet to the namespace, which has a bridge of its own in it. It gets no default route.
	Gateway bool `json:"gateway,omitempty"`
	// Aliases are further names under which the container is found, which others may have as well: then each is found in turn.
	Aliases []string `json:"aliases,omitempty"`
	// Loose makes the interface only, down and with its MAC address and MTU: whoever asked moves it to a container's namespace, names it and
	// configures it there, with the address, gateway and routes of the answer. A namespace may have several.
	Loose bool `json:"loose,omitempty"`
	// NoIPv6 gives it no IPv6 address.
	NoIPv6 bool `json:"no_ipv6,omitempty"`
	// DNSAt are addresses at which the container looks for a resolver: there, on port 53, the gateway's answers, for this container alone.
	DNSAt []string `json:"dns_at,omitempty"`
	// Publish are ports to publish, as ParsePublish reads them; with SNAT clients are shown to the container as the gateway.
	Publish []string `json:"publish,omitempty"`
	SNAT    bool     `json:"snat,omitempty"`
	Policy
}

// Peer is another node as the store describes it.
type Peer struct {
	Subnet   string `json:"subnet"`
	PublicIP string `json:"public_ip"`
	Port     int    `json:"port"`     // where datagrams for it are sent
	MTU      int    `json:"mtu"`      // the smaller of its overlay MTU, as announced, and ours
	PathMTU  int    `json:"path_mtu"` // what the path to it carries: at most MTU
	// Of a dual-stack overlay, as far as IPv6 packets are sent to it: its subnet, where they go, what that path carries.
	Subnet6    string `json:"subnet6,omitempty"`
	PublicIPv6 string `json:"public_ipv6,omitempty"`
	PathMTU6   int    `json:"path_mtu6,omitempty"`

	NodeID  string `json:"node_id,omitempty"`
	Stock   bool   `json:"stock"` // a flannel node, not one of ours
	Backend string `json:"backend"`
	Problem string `json:"problem,omitempty"` // why packets for it may not arrive, or are not sent; empty when all is well
	// LastHeard is when a packet came from it last, to within some seconds; zero: none since the daemon was started.
	LastHeard time.Time         `json:"last_heard,omitzero"`
	Counters  map[string]uint64 `json:"counters,omitempty"`
}

// procSelf are the paths that mean something else to whoever opens them.
var procSelf = regexp.MustCompile(`^/proc/(self|thread-self)(/|$)`)

// Validate checks what can be checked without the node. Its errors have CodeInvalid.
func (r AttachRequest) Validate() error {
	switch {
	case r.NetnsFD != 0 && (r.PID != 0 || r.Netns != ""):
		return Errorf(CodeInvalid, "a descriptor (netns_fd %d) is given, and a pid or a netns path too: name only one of them", r.NetnsFD)
	case r.NetnsFD != 0 && r.NetnsFD <= 2:
		return Errorf(CodeInvalid, "netns_fd %d cannot be a network namespace: give the number of a descriptor above 2", r.NetnsFD)
	case r.NetnsFD != 0:
	case r.PID == 0 && r.Netns == "":
		return Errorf(CodeInvalid, "neither a pid nor a netns path is given: name one of them")
	case r.PID != 0 && r.Netns != "":
		return Errorf(CodeInvalid, "both a pid (%d) and a netns path (%s) are given: name only one of them", r.PID, r.Netns)
	case r.PID < 0:
		return Errorf(CodeInvalid, "%d is not a pid: pids are above 0", r.PID)
	case r.Netns != "" && !strings.HasPrefix(r.Netns, "/"):
		return Errorf(CodeInvalid, "netns path %q is relative: the daemon has another working directory, give the absolute path", r.Netns)
	case procSelf.MatchString(path.Clean(r.Netns)):
		return Errorf(CodeInvalid, "netns path %s would be the daemon's own: give a process that stays in the namespace, as `rootless-ovl attach $$` does in a shell", r.Netns)
	case strings.ContainsRune(r.Netns, 0):
		return Errorf(CodeInvalid, "netns path %q holds a zero byte", r.Netns)
	}
	if err := (NamesRequest{Name: r.Name, Aliases: r.Aliases}).Validate(); err != nil {
		return err
	}
	if r.Owner != "" {
		if err := CheckOwner(r.Owner); err != nil {
			return err
		}
	}
	if r.Gateway && r.Addr != "" {
		return Errorf(CodeInvalid, "an address (%s) is given to the gateway of the whole subnet: leave it out", clip(r.Addr))
	}
	if r.Gateway && r.NoDefaultRoute {
		return Errorf(CodeInvalid, "the gateway of the whole subnet is to get no default route, and gets none in any case: leave --no-default-route out")
	}
	if r.Gateway {
		if err := r.checkGateway(); err != nil {
			return err
		}
	}
	if err := r.checkLoose(); err != nil {
		return err
	}
	if err := r.Policy.Validate(); err != nil {
		return err
	}
	if r.Addr != "" {
		if err := checkIPv4(r.Addr); err != nil {
			return err
		}
	}
	if r.IfName != "" {
		if err := CheckIfName(r.IfName); err != nil {
			return err
		}
	}
	if r.MAC != "" {
		if _, err := ParseMAC(r.MAC); err != nil {
			return err
		}
	}
	return r.validatePublish()
}

// NamesRequest asks for other names of an attachment: all that it has from then on.
type NamesRequest struct {
	Name    string   `json:"name,omitempty"` // empty: the one that it has
	Aliases []string `json:"aliases,omitempty"`
}

// Validate checks what can be checked without the node. Its errors have CodeInvalid.
func (r NamesRequest) Validate() error {
	if r.Name != "" {
		if err := CheckName(r.Name); err != nil {
			return err
		}
	}
	if len(r.Aliases) > MaxAliases {
		return Errorf(CodeInvalid, "%d aliases are more than the %d that one container may have", len(r.Aliases), MaxAliases)
	}
	for _, a := range r.Aliases {
		if err := CheckName(a); err != nil {
			return Errorf(CodeInvalid, "alias: %w", err)
		}
	}
	return nil
}

// MaxAliases is how many aliases one attachment may have.
const MaxAliases = 64

// maxOwner bounds what an engine may call an attachment, in bytes: CNI's ids of containers have 64 and more.
const maxOwner = 255

// CheckOwner tells whether owner can be what an engine calls an attachment: 1 to 255 printable ASCII characters. By convention it is the
// engine's name and its own ids, with slashes between: "cni/NET/CONTAINERID/IFNAME". Errors have CodeInvalid.
func CheckOwner(owner string) error {
	bad := owner == "" || len(owner) > maxOwner
	for _, c := range []byte(owner) {
		bad = bad || c < ' ' || c >= 0x7f
	}
	if bad {
		return Errorf(CodeInvalid, "%q cannot be an owner: use 1 to %d printable characters, such as docker/ENDPOINTID", clip(owner), maxOwner)
	}
	return nil
}

// maxName bounds a name of an attachment; it is a DNS label's 63 bytes.
const maxName = 63

// CheckName tells whether name can name an attachment: what container engines allow, 1 to 63 of a-z, A-Z, 0-9, '_', '.', '-',
// beginning with a letter or digit. All digits is refused, because `detach 123` means a pid. Errors have CodeInvalid.
func CheckName(name string) error {
	if name == "" || len(name) > maxName {
		return Errorf(CodeInvalid, "name %q has %d characters: use 1 to %d", clip(name), len(name), maxName)
	}
	digits := true
	for i, c := range []byte(name) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		digit := c >= '0' && c <= '9'
		mark := c == '_' || c == '.' || c == '-'
		if !letter && !digit && (!mark || i == 0) {
			return Errorf(CodeInvalid, "name %q: use letters, digits, '_', '.' and '-', beginning with a letter or digit", name)
		}
		digits = digits && digit
	}
	if digits {
		return Errorf(CodeInvalid, "name %q is all digits and would be taken for a pid: add a letter", name)
	}
	return nil
}

// maxIfName is IFNAMSIZ without its final zero byte (linux/if.h).
const maxIfName = 15

// CheckIfName tells whether the kernel would take name for an interface (dev_valid_name in net/core/dev.c), and refuses "lo"
// and '%', which the kernel would expand. Errors have CodeInvalid.
func CheckIfName(name string) error {
	bad := name == "" || len(name) > maxIfName || name == "." || name == ".." || name == "lo"
	for _, c := range []byte(name) {
		bad = bad || c <= ' ' || c >= 0x7f || c == '/' || c == ':' || c == '%'
	}
	if bad {
		return Errorf(CodeInvalid, "%q cannot be an interface name: use 1 to %d printable characters without '/', ':' and '%%', and not lo",
			clip(name), maxIfName)
	}
	return nil
}

// ParseMAC reads a 48-bit unicast MAC that is not all zero. Errors have CodeInvalid.
func ParseMAC(s string) ([6]byte, error) {
	var mac [6]byte
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(mac) {
		return mac, Errorf(CodeInvalid, "%q is not a MAC address: write six hex bytes, as 02:00:0a:d5:07:14", clip(s))
	}
	copy(mac[:], hw)
	if mac[0]&1 != 0 || mac == [6]byte{} {
		return mac, Errorf(CodeInvalid, "MAC address %s is not a unicast address: use one as 02:00:00:00:00:07, with an even first byte and not all zero", hw)
	}
	return mac, nil
}

// clip shortens what somebody sent so that it fits in an error line.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return fmt.Sprintf("%s... (%d bytes)", s[:most], len(s))
}
