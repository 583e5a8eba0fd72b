// This file is which network configs no node starts on, though flannel's parser takes them: networks whose addresses can be on
// no interface, and backends that a node without root, or this version, cannot serve. package lease takes what flannel takes.

package node

import (
	"fmt"
	"net/netip"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// CheckConfig says why no node starts on cfg, wherever it runs; nil if one may.
func CheckConfig(cfg lease.NetworkConfig) error {
	if err := CheckRanges(cfg); err != nil {
		return err
	}
	if _, err := cfg.Domain(); err != nil {
		return err
	}
	return checkBackend(cfg)
}

// special are the ranges, by family, of which no host on a network has an address, and what they are.
var special = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "the range of the unspecified address"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.PrefixFrom(dummyAddr, 32), "the dummy address that errors of a node come from"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved"},

	{netip.MustParsePrefix("::/8"), "loopback, unspecified or embeds IPv4 addresses"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

// CheckRanges refuses networks whose containers could have no address that works, on a flannel host either.
func CheckRanges(cfg lease.NetworkConfig) error {
	if err := checkRange("Network", cfg.Network, "a private network such as 10.5.0.0/16"); err != nil || !carriesIPv6(cfg) {
		return err
	}
	return checkRange("IPv6Network", cfg.IPv6Network, "a unique local network such as fd00:5::/48")
}

func checkRange(member string, network netip.Prefix, use string) error {
	for _, s := range special {
		switch {
		case !s.prefix.Overlaps(network):
		case s.prefix.Bits() <= network.Bits():
			return fmt.Errorf("%s %v is %s: no container can have an address of it, use %s", member, network, s.what, use)
		case s.prefix.IsSingleIP():
			return fmt.Errorf("%s %v contains %v, %s: use %s", member, network, s.prefix.Addr(), s.what, use)
		default:
			return fmt.Errorf("%s %v contains %v, which is %s: no container can have an address of that, use %s", member, network, s.prefix, s.what, use)
		}
	}
	return nil
}

// The backends that are spoken, in flannel's words.
const (
	backendUDP   = "udp"
	backendVXLAN = "vxlan"
)

// refusals is why a backend of flannel's is not spoken, and what to do.
var refusals = map[string]string{
	"wireguard": "is not spoken by this version",
	"host-gw":   "sends packets between hosts without encapsulation, which needs routes on the hosts and so root",
	"ipip":      "needs raw sockets and so root",
	"ipsec":     "needs the kernel's IPsec and so root",
	"extension": "runs shell commands of the config as root",

	"tencent-vpc": cloudRoutes,
	"ali-vpc":     cloudRoutes,
	"aws-vpc":     cloudRoutes,
	"gce":         cloudRoutes,
}

const cloudRoutes = "puts routes into a cloud account and sends packets between hosts without encapsulation, which needs root"

// checkBackend refuses network configs that a node without root, or this version, cannot serve.
func checkBackend(cfg lease.NetworkConfig) error {
	switch cfg.BackendType {
	case backendUDP:
		_, err := cfg.UDPPort()
		return err
	case backendVXLAN:
		return checkVXLAN(cfg)
	case backendAlloc:
		return nil
	}
	why, ok := refusals[cfg.BackendType]
	if !ok {
		why = "is not known"
	}
	return fmt.Errorf("network config: backend %q %s: use {\"Backend\": {\"Type\": \"udp\"}} or \"vxlan\", which flannel speaks too", cfg.BackendType, why)
}
