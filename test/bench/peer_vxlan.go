// This file sets up kernel VXLAN as flannel's vxlan backend and its bridge plugin do: a VXLAN device without learning whose
// neighbours, forwarding entries and routes are written by hand, a bridge, and a veth pair for each container.

package main

import (
	"context"
	"fmt"
	"net/netip"
)

// vxlanMTU is the wire's 1500 less the outer IPv4 (20), UDP (8) and VXLAN (8) headers and the inner Ethernet header (14).
const vxlanMTU = 1500 - 20 - 8 - 8 - 14

// flannel's own, where its config names no others.
const (
	flannelVNI  = 1
	flannelPort = 8472
)

// flannelHost is what differs between the hosts.
type flannelHost struct {
	*host
	number int
}

func (f flannelHost) subnet() netip.Prefix { return netip.PrefixFrom(f.address(0), 24) }
func (f flannelHost) vtepMAC() string {
	return fmt.Sprintf("02:00:0a:4d:%02x:00", f.number)
}
func (f flannelHost) pod(n int) netip.Addr { return f.address(n + 1) }
func (f flannelHost) address(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 77, byte(f.number), byte(n)})
}

func (l *lab) flannelHosts() (one, two flannelHost) {
	return flannelHost{l.h1, 1}, flannelHost{l.h2, 2}
}

// startVXLAN offers the overlay, and on host 1 a second container on the same bridge.
func (l *lab) startVXLAN(ctx context.Context) (network, error) {
	for _, name := range []string{peerVXLAN, peerBridge} {
		if s, ok := l.peers[name]; ok { // one set-up serves both names
			return s.network, s.err
		}
	}
	one, two := l.flannelHosts()
	for _, f := range [][2]flannelHost{{one, two}, {two, one}} {
		if err := f[0].flannel(ctx, f[1]); err != nil {
			return network{}, err
		}
	}
	var ends []end
	for _, p := range []struct {
		flannelHost
		n int
	}{{one, 1}, {two, 1}, {one, 2}} {
		e, err := l.pod(ctx, p.flannelHost, p.n)
		if err != nil {
			return network{}, err
		}
		ends = append(ends, e)
	}
	return network{
		overlay:  &path{peer: peerVXLAN, a: ends[0], b: ends[1]},
		sameNode: &path{peer: peerBridge, a: ends[0], b: ends[2]},
	}, nil
}

// flannel makes the host's VXLAN device with the entries of one other host, and its bridge.
func (f flannelHost) flannel(ctx context.Context, other flannelHost) error {
	err := f.ip(ctx,
		// Nothing about the outer UDP checksum, as flannel says nothing: kernels set it since 4.6.
		fmt.Sprintf("link add flannel.1 mtu %d address %s type vxlan id %d dev %s local %s dstport %d nolearning",
			vxlanMTU, f.vtepMAC(), flannelVNI, uplink, f.addr, flannelPort),
		fmt.Sprintf("addr add %s/32 dev flannel.1", f.subnet().Addr()),
		"link set flannel.1 up",
		fmt.Sprintf("link add cni0 mtu %d type bridge", vxlanMTU),
		fmt.Sprintf("addr add %s/24 dev cni0", f.pod(0)),
		"link set cni0 up",
	)
	if err != nil {
		return err
	}
	return f.learn(ctx, other.subnet(), other.vtepMAC(), other.addr)
}

// learn makes the entries that flannel makes when it sees another host's lease.
func (f flannelHost) learn(ctx context.Context, subnet netip.Prefix, vtepMAC string, addr netip.Addr) error {
	if err := f.ip(ctx,
		fmt.Sprintf("neigh replace %s lladdr %s dev flannel.1 nud permanent", subnet.Addr(), vtepMAC),
		fmt.Sprintf("route add %s via %s dev flannel.1 onlink", subnet, subnet.Addr())); err != nil {
		return err
	}
	return f.run(ctx, "bridge", "fdb", "append", vtepMAC, "dev", "flannel.1", "dst", addr.String())
}

// pod makes the host's container number n.
func (l *lab) pod(ctx context.Context, f flannelHost, n int) (end, error) {
	s, err := l.newSpace(fmt.Sprintf("pod%d-%s", n, f.name))
	if err != nil {
		return end{}, err
	}
	if err := f.ip(ctx,
		fmt.Sprintf("link add veth%d mtu %d type veth peer name eth0 mtu %d netns %s", n, vxlanMTU, vxlanMTU, s.path()),
		fmt.Sprintf("link set veth%d master cni0 up", n)); err != nil {
		return end{}, err
	}
	return end{s, f.pod(n)}, s.ip(ctx,
		fmt.Sprintf("addr add %s/24 dev eth0", f.pod(n)), "link set eth0 up",
		fmt.Sprintf("route add default via %s", f.pod(0)))
}
