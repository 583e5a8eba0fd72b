// This file is the network config: the JSON at <prefix>/config, read and validated as flannel does
// (pkg/subnet/config.go ParseConfig and CheckNetworkConfig, pkg/backend/udp/udp_amd64.go for the port). vxlan.go reads the
// Backend of a vxlan network.

package lease

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
)

// MaxValue is the largest value in bytes that is read from the store; flannel's own are a few hundred bytes.
const MaxValue = 64 << 10

// DefaultUDPPort is the port of flannel's udp backend when the config names none.
const DefaultUDPPort = 8285

// NetworkConfig is the one configuration that all nodes of a network share. Prefixes are masked; SubnetMin, SubnetMax
// and SubnetLen are filled in as flannel does when the JSON leaves them out. The IPv6 fields are zero unless
// EnableIPv6.
type NetworkConfig struct {
	EnableIPv4, EnableIPv6       bool
	Network, IPv6Network         netip.Prefix
	SubnetMin, SubnetMax         netip.Addr // first and last subnet that may be leased
	IPv6SubnetMin, IPv6SubnetMax netip.Addr
	SubnetLen, IPv6SubnetLen     int             // prefix length of a node's subnet
	BackendType                  string          // lower case; "udp" if the JSON has no Backend
	Backend                      json.RawMessage // the Backend object as it was, nil if absent
	RootlessOvl                  json.RawMessage // our object, which flannel passes over, as it was, nil if absent
	Raw                          []byte          // the JSON that was parsed
}

// wireConfig is the JSON. encoding/json matches names without regard to case, as it does for flannel. What is given must
// be readable, though it be empty or not for us: flanneld would not start on it.
type wireConfig struct {
	EnableIPv4     *bool
	EnableIPv6     bool
	EnableNFTables bool // which firewall flanneld writes to; nothing to us
	Network        *string
	IPv6Network    *string
	SubnetMin      *string
	SubnetMax      *string
	IPv6SubnetMin  *string
	IPv6SubnetMax  *string
	SubnetLen      uint
	IPv6SubnetLen  uint
	Backend        json.RawMessage
	RootlessOvl    json.RawMessage
}

// ParseConfig reads and validates a network config. Every error matches ErrBadConfig. Differences from flannel: a
// network without IPv4 is refused (flannel accepts the config and cannot form a key), so is SubnetMin above SubnetMax,
// and what flannel refuses later. test/interop has the whole list.
func ParseConfig(b []byte) (NetworkConfig, error) {
	c, err := parseConfig(b)
	if err != nil {
		return NetworkConfig{}, fmt.Errorf("%w: %w", ErrBadConfig, err)
	}
	return c, nil
}

// UnknownMembers are the members of a network config that mean nothing to flannel or to us, sorted: most often one that is
// misspelt. raw must parse.
func UnknownMembers(raw []byte) []string {
	var members map[string]json.RawMessage
	if json.Unmarshal(raw, &members) != nil {
		return nil
	}
	known := reflect.TypeFor[wireConfig]()
	var unknown []string
	for name := range members {
		if _, ok := known.FieldByNameFunc(func(field string) bool { return strings.EqualFold(field, name) }); !ok {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	return unknown
}

func parseConfig(b []byte) (NetworkConfig, error) {
	if len(b) > MaxValue {
		return NetworkConfig{}, fmt.Errorf("%d bytes, at most %d are read", len(b), MaxValue)
	}
	var w wireConfig
	if err := json.Unmarshal(b, &w); err != nil {
		return NetworkConfig{}, inWords("it", err)
	}
	c := NetworkConfig{
		EnableIPv4: w.EnableIPv4 == nil || *w.EnableIPv4,
		EnableIPv6: w.EnableIPv6,
		Backend:    w.Backend,
		Raw:        slices.Clone(b),

		RootlessOvl: w.RootlessOvl,
	}
	if !c.EnableIPv4 {
		return c, fmt.Errorf("EnableIPv4 is false: a network without IPv4 cannot be kept in etcd, because flannel's key needs an IPv4 subnet")
	}
	var err error
	if c.BackendType, err = backendType(w.Backend); err != nil {
		return c, err
	}
	v4 := family{"", "10.5.0.0/16", 32, 30, 28, 24}
	if c.Network, c.SubnetMin, c.SubnetMax, c.SubnetLen, err = v4.check(w.Network, w.SubnetMin, w.SubnetMax, w.SubnetLen); err != nil {
		return c, err
	}
	v6 := family{"IPv6", "fd00:5::/48", 128, 126, 124, 64}
	if !c.EnableIPv6 {
		return c, v6.readable(w.IPv6Network, w.IPv6SubnetMin, w.IPv6SubnetMax)
	}
	c.IPv6Network, c.IPv6SubnetMin, c.IPv6SubnetMax, c.IPv6SubnetLen, err = v6.check(w.IPv6Network, w.IPv6SubnetMin, w.IPv6SubnetMax, w.IPv6SubnetLen)
	return c, err
}

// inWords says what is wrong with JSON without speaking of Go; whole names it.
func inWords(whole string, err error) error {
	var t *json.UnmarshalTypeError
	if !errors.As(err, &t) {
		return fmt.Errorf("%s is not JSON: %w", whole, err)
	}
	what := whole
	if t.Field != "" {
		what = t.Field
		if whole != "it" {
			what = whole + " " + t.Field
		}
	}
	wanted := map[reflect.Kind]string{reflect.Struct: "an object", reflect.String: "a string", reflect.Bool: "true or false"}[t.Type.Kind()]
	if wanted == "" {
		wanted = "a whole number, 0 or more"
	}
	return fmt.Errorf("%s is of the wrong kind (JSON %s): %s is needed", what, t.Value, wanted)
}

func backendType(raw json.RawMessage) (string, error) {
	if len(raw) == 0 {
		return "udp", nil
	}
	var b struct{ Type string }
	if err := json.Unmarshal(raw, &b); err != nil {
		return "", inWords("Backend", err)
	}
	if b.Type == "" {
		return "", fmt.Errorf(`Backend has no Type: name one, as in "Backend": {"Type": "udp"}, or leave Backend out`)
	}
	return strings.ToLower(b.Type), nil
}

// family is the constants of flannel's validation for one address family.
type family struct {
	name       string // prefix of the JSON members
	example    string // of a network
	bits       int
	maxLen     int // longest SubnetLen: a subnet needs four addresses
	maxNetwork int // longest Network when SubnetLen is to be chosen
	defaultLen int // SubnetLen chosen where the network has room for four of them
}

func (f family) check(network, minimum, maximum *string, length uint) (n netip.Prefix, lo, hi netip.Addr, bits int, err error) {
	fail := func(format string, args ...any) (netip.Prefix, netip.Addr, netip.Addr, int, error) {
		return netip.Prefix{}, netip.Addr{}, netip.Addr{}, 0, fmt.Errorf(format, args...)
	}
	if network == nil {
		return fail("%sNetwork is missing: please define a correct %[1]sNetwork parameter", f.name)
	}
	if n, err = f.prefix(*network); err != nil {
		return fail("%w", err)
	}
	switch {
	case n.Addr().BitLen() != f.bits || n.Addr().Is4In6():
		return fail("%sNetwork %v is of the wrong address family", f.name, n)
	case n.Bits() == 0:
		return fail("%sNetwork %v is the whole address space", f.name, n)
	case length > uint(f.maxLen):
		return fail("%sSubnetLen %d must be less than /%d", f.name, length, f.maxLen+1)
	case length > 0 && int(length) < n.Bits()+2:
		return fail("%sSubnetLen %d: network %v must be able to accommodate at least four subnets", f.name, length, n)
	case length > 0:
		bits = int(length)
	case n.Bits() > f.maxNetwork:
		return fail("%sNetwork %v is too small. Minimum useful network prefix is /%d", f.name, n, f.maxNetwork)
	case n.Bits() <= f.defaultLen-2:
		bits = f.defaultLen
	default:
		bits = n.Bits() + 2
	}

	// The first subnet is not leased: its .0 address is the network's own.
	first, _ := nextSubnet(n.Addr(), bits)
	if lo, err = f.bound("SubnetMin", minimum, n, bits, first); err != nil {
		return fail("%w", err)
	}
	if hi, err = f.bound("SubnetMax", maximum, n, bits, lastSubnet(n, bits)); err != nil {
		return fail("%w", err)
	}
	if hi.Less(lo) {
		return fail("%sSubnetMin %v is above %[1]sSubnetMax %[3]v", f.name, lo, hi)
	}
	return n, lo, hi, bits, nil
}

// readable is check for a family that is not enabled.
func (f family) readable(network, minimum, maximum *string) error {
	var err error
	if network != nil {
		_, err = f.prefix(*network)
	}
	if err == nil && minimum != nil {
		_, err = f.addr("SubnetMin", *minimum)
	}
	if err == nil && maximum != nil {
		_, err = f.addr("SubnetMax", *maximum)
	}
	return err
}

func (f family) prefix(s string) (netip.Prefix, error) {
	n, err := netip.ParsePrefix(s)
	if err != nil {
		return n, fmt.Errorf("%sNetwork %.64q is not a network: write an address and a length, as in %s", f.name, s, f.example)
	}
	return n.Masked(), nil
}

func (f family) addr(name, s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return a, fmt.Errorf("%s%s %.64q is not an IP address", f.name, name, s)
	}
	return a, nil
}

// bound is SubnetMin or SubnetMax: the default when unset (the zero address counts as unset, as for flannel).
func (f family) bound(name string, s *string, n netip.Prefix, bits int, unset netip.Addr) (netip.Addr, error) {
	if s == nil {
		return unset, nil
	}
	a, err := f.addr(name, *s)
	switch {
	case err != nil:
		return a, err
	case a.IsUnspecified() && a.BitLen() == f.bits:
		return unset, nil
	case !n.Contains(a):
		return a, fmt.Errorf("%s%s %v is not in the range of the %[1]sNetwork %[4]v", f.name, name, a, n)
	case netip.PrefixFrom(a, bits).Masked().Addr() != a:
		return a, fmt.Errorf("%s%s %v is not on a SubnetLen boundary (/%d)", f.name, name, a, bits)
	}
	return a, nil
}

// UDPPort is the port of the udp backend, which every stock peer sends to. It is an error for another backend.
func (c NetworkConfig) UDPPort() (int, error) {
	if c.BackendType != "udp" {
		return 0, fmt.Errorf("%w: the backend is %q, not udp", ErrBadConfig, c.BackendType)
	}
	if len(c.Backend) == 0 {
		return DefaultUDPPort, nil
	}
	b := struct{ Port int }{DefaultUDPPort}
	if err := json.Unmarshal(c.Backend, &b); err != nil {
		return 0, fmt.Errorf("%w: Backend Port is not a number from 1 to 65535", ErrBadConfig)
	}
	if b.Port < 1 || b.Port > 65535 {
		return 0, fmt.Errorf("%w: Backend Port %d is not a number from 1 to 65535", ErrBadConfig, b.Port)
	}
	return b.Port, nil
}

// StockPort is the underlay port of nodes that publish none, by the network's backend: all stock nodes. It is an error for a
// backend that is neither udp nor vxlan.
func (c NetworkConfig) StockPort() (int, error) {
	if c.BackendType == "vxlan" {
		v, err := c.VXLAN()
		return v.Port, err
	}
	return c.UDPPort()
}

// DefaultConfig is the JSON to create when the store has no config: network in flannel's udp backend, the rest by
// flannel's defaults.
func DefaultConfig(network netip.Prefix) []byte {
	return fmt.Appendf(nil, `{"Network":"%v","Backend":{"Type":"udp"}}`, network.Masked())
}

// nextSubnet is the subnet of prefix length bits after the one at a; false at the end of the address space.
func nextSubnet(a netip.Addr, bits int) (netip.Addr, bool) {
	b := a.AsSlice()
	add := byte(1) << (7 - (bits-1)%8)
	for i := (bits - 1) / 8; i >= 0; i-- {
		b[i] += add
		if b[i] >= add {
			next, _ := netip.AddrFromSlice(b)
			return next, true
		}
		add = 1
	}
	return a, false
}

// lastSubnet is the last subnet of prefix length bits in n.
func lastSubnet(n netip.Prefix, bits int) netip.Addr {
	b := n.Addr().AsSlice()
	for i := n.Bits(); i < bits; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
