// This file is flannel's alloc backend (pkg/backend/alloc): the node leases a subnet and writes subnet.env, and nothing is sent
// between hosts. Its own containers reach each other and, through the gateway, the outside.

package node

import (
	"net/netip"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

const backendAlloc = "alloc"

// noForwarding is why no peer of an alloc network is sent to.
const noForwarding = "the network's backend is alloc, which sends nothing between hosts"

// allocUnderlay is where the router's socket of an alloc network is: where no other host reaches it. Its port is in the lease
// all the same, for that tells nodes with one public IP apart.
var allocUnderlay = netip.AddrFrom4([4]byte{127, 0, 0, 1})

func allocates(cfg lease.NetworkConfig) bool { return cfg.BackendType == backendAlloc }
