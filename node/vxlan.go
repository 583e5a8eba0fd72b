// This file is what a vxlan network asks of a node beyond a udp one: a MAC address of its own, which peers address their frames
// to, and what it publishes of that.

package node

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// vxlanOf is what the router speaks in the network: nil for the udp format. The node's MAC address is made when it is first
// needed.
func (n *Node) vxlanOf(cfg lease.NetworkConfig) (*forwarder.VXLAN, error) {
	if cfg.BackendType != backendVXLAN {
		return nil, nil
	}
	c, err := cfg.VXLAN()
	if err != nil {
		return nil, err
	}
	mac, err := vtepMAC(n.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	return &forwarder.VXLAN{VNI: uint32(c.VNI), MAC: mac, GBP: c.GBP}, nil
}

// checkVXLAN refuses vxlan networks that a node without root, or this version, cannot be a full member of.
func checkVXLAN(cfg lease.NetworkConfig) error {
	c, err := cfg.VXLAN()
	switch {
	case err != nil:
		return err
	case c.DirectRouting:
		return errors.New("network config: DirectRouting has hosts of one LAN send packets to each other without encapsulation, which needs routes on the hosts and so root: leave it out of the Backend")
	}
	return nil
}

// vtepMAC reads the node's MAC address from dir, or makes one as flannel does: random, locally administered, unicast. Unlike
// flannel's it outlives a reboot, so that peers need not learn another.
func vtepMAC(dir string) (mac [6]byte, err error) {
	path := filepath.Join(dir, vtepMACFile)
	b, err := readOwn(path, maxWordFile)
	if errors.Is(err, fs.ErrNotExist) {
		rand.Read(mac[:])
		mac[0] = mac[0]&^1 | 2
		return mac, writeFile(path, []byte(macText(mac)+"\n"))
	}
	if err != nil {
		return mac, fmt.Errorf("VTEP MAC address: %w", err)
	}
	hw, err := net.ParseMAC(strings.TrimSpace(string(b)))
	if err != nil || len(hw) != 6 || hw[0]&1 != 0 || [6]byte(hw) == mac {
		return mac, fmt.Errorf("VTEP MAC address: %s does not hold one, as in 02:11:22:33:44:55; restore it, or remove it to get another, which peers follow", path)
	}
	return [6]byte(hw), nil
}

// underlayMTU is the MTU in bytes that the overlay's is made of: the external interface's, or less by the network config.
func (n *Node) underlayMTU(cfg lease.NetworkConfig, ext external) int {
	mtu := min(ext.mtu, maxUnderlayMTU)
	if cfg.BackendType != backendVXLAN {
		return mtu
	}
	c, err := cfg.VXLAN()
	switch {
	case err != nil || c.MTU == 0: // checkVXLAN has refused the former
	case c.MTU > mtu:
		n.log.Warn("the network config's MTU is above the external interface's, which counts", "configured", c.MTU, "interface", mtu)
	default:
		mtu = c.MTU
	}
	return mtu
}

// publishVXLAN puts into a what a vxlan node publishes; nothing for the udp format. flannel's IPv6 device has a MAC address of its
// own; ours is one for both families, which no peer can tell from two.
func publishVXLAN(a *lease.Attrs, v *forwarder.VXLAN, dualStack bool) {
	if v == nil {
		return
	}
	a.BackendType = backendVXLAN
	a.BackendData = lease.VXLANData{VNI: v.VNI, VtepMAC: v.MAC}.JSON()
	if dualStack {
		a.BackendV6Data = a.BackendData
	}
}

// notVXLAN says why a lease is none of a vxlan network; nothing if it is one.
func notVXLAN(a lease.Attrs) string {
	if a.BackendType == backendVXLAN { // in the store's words: flannel asks for nothing else, either
		return ""
	}
	theirs := a.BackendType
	if theirs == "" {
		theirs = backendUDP
	}
	return fmt.Sprintf("its lease is of the backend %.32q, and this network's is vxlan", theirs)
}

// vtepOf reads the MAC address of a peer in our vxlan network from the member of its lease that is for a family, or says why nothing is sent to it;
// doubt is as in peer.
func vtepOf(member string, data json.RawMessage, v *forwarder.VXLAN) (mac [6]byte, problem, doubt string) {
	d, err := lease.ParseVXLANData(member, data)
	switch {
	case err != nil:
		return mac, err.Error(), ""
	case d.VtepMAC == v.MAC:
		return mac, fmt.Sprintf("it has our own VTEP MAC address, %s: was a state directory copied? Remove %s from one and start that node again", macText(v.MAC), vtepMACFile), ""
	case d.VNI != v.VNI:
		doubt = fmt.Sprintf("its lease is of VNI %d, and this network's is %d: it may not take our packets", d.VNI, v.VNI)
	}
	return d.VtepMAC, "", doubt
}
