// This file is what flannel's vxlan backend keeps in the store: its part of the network config, and of a lease
// (pkg/backend/vxlan/vxlan.go VXLANConfig and vxlanLeaseAttrs).
//
//	config  "Backend": {"Type":"vxlan","VNI":1,"Port":8472,"MTU":1500,"GBP":false,"Learning":false,"DirectRouting":false}
//	lease   "BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}
//
// Members that flannel reads on Windows alone (MacPrefix, Name) are passed over, as they are by flannel on Linux.

package lease

import (
	"encoding/json"
	"fmt"
	"net"
)

// Defaults of the vxlan backend. The port is the Linux kernel's, older than IANA's 4789.
const (
	DefaultVNI       = 1
	DefaultVXLANPort = 8472

	maxVNI = 1<<24 - 1
	// minVXLANMTU is the smallest underlay MTU in bytes that leaves the overlay what every IPv4 host must take, 576.
	minVXLANMTU = 576 + 50
)

// VXLANConfig is the Backend of a vxlan network.
type VXLANConfig struct {
	VNI           int
	Port          int  // UDP port that every stock node receives on
	MTU           int  // of the underlay, bytes; 0: that of the external interface
	GBP           bool // nodes mark frames with a group policy
	Learning      bool // kernels learn where a VTEP is from the frames of it
	DirectRouting bool // nodes on one LAN do not encapsulate
}

// VXLAN is the Backend of a vxlan network, with defaults filled in. It is an error for another backend. Unlike flannel, which
// leaves that to the kernel, it refuses numbers that cannot be.
func (c NetworkConfig) VXLAN() (VXLANConfig, error) {
	if c.BackendType != "vxlan" {
		return VXLANConfig{}, fmt.Errorf("%w: the backend is %q, not vxlan", ErrBadConfig, c.BackendType)
	}
	v := VXLANConfig{VNI: DefaultVNI}
	if len(c.Backend) > 0 {
		if err := json.Unmarshal(c.Backend, &v); err != nil {
			return VXLANConfig{}, fmt.Errorf("%w: %w", ErrBadConfig, inWords("Backend", err))
		}
	}
	if v.Port == 0 {
		v.Port = DefaultVXLANPort
	}
	switch {
	case v.VNI < 0 || v.VNI > maxVNI:
		return VXLANConfig{}, fmt.Errorf("%w: Backend VNI %d is not a number from 0 to %d", ErrBadConfig, v.VNI, maxVNI)
	case v.Port < 0 || v.Port > 65535:
		return VXLANConfig{}, fmt.Errorf("%w: Backend Port %d is not a number from 1 to 65535", ErrBadConfig, v.Port)
	case v.MTU != 0 && (v.MTU < minVXLANMTU || v.MTU > 65535):
		return VXLANConfig{}, fmt.Errorf("%w: Backend MTU %d is not a number from %d to 65535", ErrBadConfig, v.MTU, minVXLANMTU)
	}
	return v, nil
}

// VXLANData is the BackendData, or BackendV6Data, of a vxlan node's lease.
type VXLANData struct {
	VNI     uint32
	VtepMAC [6]byte // to which the other nodes address their frames
}

type wireVXLANData struct {
	VNI     uint32
	VtepMAC string
}

// JSON is d as flannel writes it.
func (d VXLANData) JSON() json.RawMessage {
	return fmt.Appendf(nil, `{"VNI":%d,"VtepMAC":%q}`, d.VNI, net.HardwareAddr(d.VtepMAC[:]).String())
}

// ParseVXLANData reads what a vxlan node's lease has for a family: member is its name, BackendData or BackendV6Data, which errors say.
func ParseVXLANData(member string, b []byte) (VXLANData, error) {
	if len(b) == 0 {
		return VXLANData{}, fmt.Errorf("its lease has no %s, which holds the VTEP's MAC address", member)
	}
	var w wireVXLANData
	if err := json.Unmarshal(b, &w); err != nil {
		return VXLANData{}, inWords(member, err)
	}
	mac, err := net.ParseMAC(w.VtepMAC)
	if err != nil || len(mac) != 6 {
		return VXLANData{}, fmt.Errorf("%s VtepMAC %.64q is not a MAC address", member, w.VtepMAC)
	}
	d := VXLANData{VNI: w.VNI, VtepMAC: [6]byte(mac)}
	if mac[0]&1 != 0 || d.VtepMAC == [6]byte{} {
		return VXLANData{}, fmt.Errorf("%s VtepMAC %v is not the address of one interface", member, mac)
	}
	return d, nil
}
