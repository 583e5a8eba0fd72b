// This file sets up rootless-ovl as a member of a flannel network: a node on a third host, whose store has the lease of a host
// that runs flannel, and that host's kernel with the entries that flannel makes of the node's lease.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// memberConfig keeps the node's subnet apart from those of the kernel peers, of which the store learns later, or never.
const memberConfig = `{"Network": "10.77.0.0/16", "SubnetMin": "10.77.100.0", "Backend": {"Type": "vxlan"}}`

var member = oursSpec{name: "ovl-member", port: flannelPort, etcdPort: 2379, rmemMax: largeRmemMax}

// vxlanLease is what flannel's vxlan backend publishes.
type vxlanLease struct {
	PublicIP    netip.Addr
	PublicIPv6  *netip.Addr
	BackendType string
	BackendData vtep
}

type vtep struct {
	VNI     int
	VtepMAC string
}

// leasePrefix is where flannel keeps its leases, and leaseTTL for how long.
const (
	leasePrefix = "/coreos.com/network/subnets/"
	leaseTTL    = 24 * time.Hour
)

// startMember joins the second of the kernel peers.
//
// Over the nic-like underlay the wire sums what goes to the node. On a virtual wire a packet from a VXLAN device keeps the sending
// kernel's note that it is encapsulated (skb->encapsulation) for as long as it owes a checksum, and a kernel that sees that note
// joins nothing for a socket (udp_gro_receive). From a card no such note comes. A card sums at no cost to the cores, the wire
// here at the expense of the one path that goes to the node.
func (l *lab) startMember(ctx context.Context) (network, error) {
	kernel, err := l.peer(ctx, peerVXLAN)
	if err != nil {
		return network{}, err
	}
	_, flannel := l.flannelHosts()
	h, err := l.newHost(ctx, "h3", "192.0.2.3")
	if err != nil {
		return network{}, err
	}
	if l.underlay == underlayNIC {
		if err := l.wire.run(ctx, "ethtool", "-K", wirePort(h.name), "tx-checksum-ip-generic", "off"); err != nil {
			return network{}, err
		}
	}
	config := filepath.Join(h.home, "flannel.json")
	if err := os.WriteFile(config, []byte(memberConfig), 0o644); err != nil {
		return network{}, err
	}
	o := &ours{lab: l, spec: member}
	store := fmt.Sprintf("127.0.0.1:%d", member.etcdPort)
	var node *process
	if err := withRmemMax(member.rmemMax, func() (err error) {
		node, err = o.startNode(ctx, h, "--port", strconv.Itoa(member.port), "--net-config-path", config, "--listen-etcd", store)
		return err
	}); err != nil {
		return network{}, err
	}
	if err := flannel.exchange(ctx, h.space, store); err != nil {
		return network{}, err
	}
	if err := o.waitPeers(ctx, h, node, 1); err != nil {
		return network{}, err
	}
	c, err := l.newContainer(ctx, h, member.name+"-c1")
	if err != nil {
		return network{}, err
	}
	addr, err := o.attach(ctx, h, c)
	if err != nil {
		return network{}, err
	}
	p := &path{peer: peerOurs, a: end{c.space, addr}, b: kernel.overlay.b, daemons: []*process{node}}
	return network{overlay: p, ours: o}, node.waitAnswer(ctx, p.a.space, p.b.addr)
}

// exchange does what flanneld does at its start: it puts the host's lease into the store, which is reached from a space, and makes
// the entries for the one lease that is there.
func (f flannelHost) exchange(ctx context.Context, from *space, store string) error {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"http://" + store}, DialTimeout: commandLimit, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (conn net.Conn, err error) {
			err = from.do(func() error {
				conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", strings.TrimPrefix(address, "http://"))
				return err
			})
			return conn, err
		})},
	})
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	found, err := client.Get(ctx, leasePrefix, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	for _, kv := range found.Kvs {
		subnet, err := netip.ParsePrefix(strings.ReplaceAll(strings.TrimPrefix(string(kv.Key), leasePrefix), "-", "/"))
		if err != nil {
			return err
		}
		var other vxlanLease
		if err := json.Unmarshal(kv.Value, &other); err != nil {
			return fmt.Errorf("lease %s: %w", kv.Key, err)
		}
		if err := f.learn(ctx, subnet, other.BackendData.VtepMAC, other.PublicIP); err != nil {
			return err
		}
	}
	value, err := json.Marshal(vxlanLease{PublicIP: f.addr, BackendType: "vxlan", BackendData: vtep{flannelVNI, f.vtepMAC()}})
	if err != nil {
		return err
	}
	granted, err := client.Grant(ctx, int64(leaseTTL/time.Second))
	if err != nil {
		return err
	}
	_, err = client.Put(ctx, leasePrefix+strings.ReplaceAll(f.subnet().String(), "/", "-"), string(value), clientv3.WithLease(granted.ID))
	return err
}
