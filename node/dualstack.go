// This file is what a dual-stack network adds to a node: an IPv6 subnet, from which each container has an address beside its IPv4
// one, and an IPv6 way to each peer.
//
//	container   10.5.72.9  fd00:5:0:12::a05:4809         the subnet, and in its last bits the IPv4 address
//	gateway     10.5.72.1  fd00:5:0:12::1                and ::, as it has .0: flannel's device of a stock host has both
//
// flannel has a device of its own for each family (flannel.1 and flannel-v6.1): IPv4 packets travel in IPv4 datagrams to a peer's
// PublicIP, IPv6 packets in IPv6 ones to its PublicIPv6. Its udp backend carries IPv4 alone, though the lease has both subnets.

package node

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// minMTUv6 is the smallest MTU in bytes of a link that carries IPv6 (RFC 8200 5).
const minMTUv6 = 1280

// carriesIPv6 tells whether containers of the network speak IPv6.
func carriesIPv6(cfg lease.NetworkConfig) bool {
	return cfg.EnableIPv6 && cfg.BackendType != backendUDP
}

// subnets are a node's; v6 is zero unless the network's leases have one.
type subnets struct{ v4, v6 netip.Prefix }

// subnets are ours, as far as the overlay carries them.
func (me self) subnets() subnets { return subnets{me.subnet, me.subnet6} }

// carried is own without what the overlay does not carry.
func (n *Node) carried(own subnets) subnets {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !carriesIPv6(n.netConfig) {
		own.v6 = netip.Prefix{}
	}
	return own
}

func subnetsOf(l lease.Lease) subnets { return subnets{l.Subnet, l.Subnet6} }

// addr6Of is the IPv6 address in subnet6 of the container that has addr in its IPv4 subnet; not ok if subnet6 is too small. That both
// addresses end alike keeps a container in one poll loop (forwarder/steer.go).
func addr6Of(addr, subnet6 netip.Prefix) (netip.Prefix, bool) {
	free := 128 - subnet6.Bits()
	a4 := addr.Addr().As4()
	host := binary.BigEndian.Uint32(a4[:])
	if free < 32 { // the host part alone, if it fits
		host &= uint32(1<<(32-addr.Bits()) - 1)
		if host>>free != 0 {
			return netip.Prefix{}, false
		}
	}
	a := subnet6.Masked().Addr().As16()
	binary.BigEndian.PutUint32(a[12:], binary.BigEndian.Uint32(a[12:])|host)
	return netip.PrefixFrom(netip.AddrFrom16(a), subnet6.Bits()), true
}

// checkDualStack refuses a dual-stack network that this host cannot be in; mtu is the overlay's.
func checkDualStack(cfg lease.NetworkConfig, ext external, mtu int) error {
	switch {
	case !carriesIPv6(cfg):
		return nil
	case cfg.BackendType == backendVXLAN && !ext.bind6.IsValid():
		return fmt.Errorf("the network is dual-stack (EnableIPv6), whose IPv6 travels over IPv6, and the interface %s has no IPv6 address that other nodes could send to: give it one, or choose another interface with --iface", ext.ifName)
	case mtu < minMTUv6:
		return fmt.Errorf("the network is dual-stack (EnableIPv6), and IPv6 needs an overlay MTU of %d: the interface %s, or the network config's MTU, leaves %d", minMTUv6, ext.ifName, mtu)
	}
	return nil
}
