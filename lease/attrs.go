// This file is the value of a lease in the store: flannel's LeaseAttrs JSON (pkg/lease/lease.go), byte for byte, and
// the one member more that only rootless-ovl nodes read.
//
//	{"PublicIP":"192.168.64.3","PublicIPv6":null                    always present
//	 ,"BackendType":"vxlan"                                          absent for udp
//	 ,"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}          absent for udp
//	 ,"BackendV6Data":{...}                                          dual-stack only
//	 ,"RootlessOvl":{"V":1,"NodeID":"..","Port":18285,"MTU":1472}}   ours; stock decoders ignore it
//
// flannel trims quotes where we parse a string, so it accepts a bare word where we do not; nobody writes one.

package lease

import (
	"encoding/json"
	"fmt"
	"net/netip"
)

// Attrs is what a node publishes with its lease. The zero address stands for "none".
type Attrs struct {
	PublicIP      netip.Addr // IPv4 underlay address
	PublicIPv6    netip.Addr // IPv6 underlay address
	BackendType   string     // "" for udp, as flannel writes it
	BackendData   json.RawMessage
	BackendV6Data json.RawMessage
	RootlessOvl   *Extension // nil for a stock flannel node
}

// Extension is the member that makes a lease a rootless-ovl node's. It never changes the meaning of a stock member.
type Extension struct {
	V         int      // version of this object, 1
	NodeID    string   // identity of the node, kept in its state directory: up to 128 letters, digits, '.', '_', '-'
	Port      int      // UDP port of the underlay socket; 0: the port of the network config
	MTU       int      // overlay MTU in bytes that this node accepts; 0: unknown
	Caps      []string `json:",omitempty"`
	PublicKey string   `json:",omitempty"` // base64
	Left      bool     `json:",omitempty"` // the node gives the lease back and is gone: its last word, before the key is deleted
}

// CapPartialChecksums in Caps: the node takes inner TCP and UDP packets whose checksum covers the pseudo header alone. It
// believes the outer UDP checksum, which senders therefore always set.
const CapPartialChecksums = "partial-checksums"

// CapSteers in Caps: the node has several receivers for its one port and picks one for a train of datagrams by the inner
// destination of the first, of which it takes the last two bytes. Packets that differ there keep their order only if they
// do not share a train.
const CapSteers = "steers-by-destination"

// ExtensionVersion is the V that this package writes.
const ExtensionVersion = 1

// maxNodeID bounds a NodeID in bytes: it goes into logs and errors. Ours are 32 hexadecimal digits.
const maxNodeID = 128

type wireAttrs struct {
	PublicIP      string
	PublicIPv6    *string
	BackendType   string          `json:",omitempty"`
	BackendData   json.RawMessage `json:",omitempty"`
	BackendV6Data json.RawMessage `json:",omitempty"`
	RootlessOvl   *Extension      `json:",omitempty"`
}

// MarshalJSON writes flannel's form.
func (a Attrs) MarshalJSON() ([]byte, error) {
	w := wireAttrs{"0.0.0.0", nil, a.BackendType, a.BackendData, a.BackendV6Data, a.RootlessOvl}
	if a.PublicIP.IsValid() {
		if !a.PublicIP.Is4() {
			return nil, fmt.Errorf("lease: PublicIP %v is not IPv4", a.PublicIP)
		}
		w.PublicIP = a.PublicIP.String()
	}
	if a.PublicIPv6.IsValid() {
		s := a.PublicIPv6.String()
		w.PublicIPv6 = &s
	}
	return json.Marshal(w)
}

// UnmarshalJSON reads flannel's form and ours.
func (a *Attrs) UnmarshalJSON(b []byte) error {
	var w wireAttrs
	if err := json.Unmarshal(b, &w); err != nil {
		return err
	}
	got := Attrs{BackendType: w.BackendType, BackendData: w.BackendData, BackendV6Data: w.BackendV6Data, RootlessOvl: w.RootlessOvl}
	if w.PublicIP != "" {
		ip, err := netip.ParseAddr(w.PublicIP)
		ip = ip.Unmap()
		if err != nil || !ip.Is4() {
			return fmt.Errorf("PublicIP %.64q is not an IPv4 address", w.PublicIP)
		}
		if !ip.IsUnspecified() {
			got.PublicIP = ip
		}
	}
	if w.PublicIPv6 != nil {
		ip, err := netip.ParseAddr(*w.PublicIPv6)
		if err != nil || !ip.Is6() || ip.Is4In6() || ip.Zone() != "" {
			return fmt.Errorf("PublicIPv6 %.64q is not an IPv6 address", *w.PublicIPv6)
		}
		if !ip.IsUnspecified() {
			got.PublicIPv6 = ip
		}
	}
	if e := w.RootlessOvl; e != nil {
		switch {
		case !validNodeID(e.NodeID):
			return fmt.Errorf("RootlessOvl.NodeID %.64q is not 1 to %d letters, digits, '.', '_' or '-'", e.NodeID, maxNodeID)
		case e.Port < 0 || e.Port > 65535:
			return fmt.Errorf("RootlessOvl.Port %d is not a port", e.Port)
		case e.MTU < 0 || e.MTU > 65535:
			return fmt.Errorf("RootlessOvl.MTU %d is not an MTU", e.MTU)
		}
	}
	*a = got
	return nil
}

// ParseAttrs reads the value of a lease. Values over MaxValue bytes are refused unread.
func ParseAttrs(b []byte) (Attrs, error) {
	if len(b) > MaxValue {
		return Attrs{}, fmt.Errorf("the value has more than %d bytes", MaxValue)
	}
	var a Attrs
	if err := json.Unmarshal(b, &a); err != nil {
		return Attrs{}, fmt.Errorf("the value is not a lease: %w", err)
	}
	return a, nil
}

// validNodeID keeps what goes into logs and errors to characters that are harmless there.
func validNodeID(s string) bool {
	for _, c := range []byte(s) {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '.' || c == '_' || c == '-') {
			return false
		}
	}
	return s != "" && len(s) <= maxNodeID
}

// sharesPublicIP: the two are one node to flannel, whose findLeaseByIP compares the IPv4 address alone.
func (a Attrs) sharesPublicIP(b Attrs) bool {
	return a.PublicIP.IsValid() && a.PublicIP == b.PublicIP
}

// shared is the underlay address that the two both publish, IPv4 before IPv6; the zero address if there is none.
func (a Attrs) shared(b Attrs) netip.Addr {
	switch {
	case a.sharesPublicIP(b):
		return a.PublicIP
	case a.PublicIPv6.IsValid() && a.PublicIPv6 == b.PublicIPv6:
		return a.PublicIPv6
	}
	return netip.Addr{}
}

// nodeID is "" for a stock node.
func (a Attrs) nodeID() string {
	if a.RootlessOvl == nil {
		return ""
	}
	return a.RootlessOvl.NodeID
}

// left is whether a's node has said that it is gone.
func (a Attrs) left() bool { return a.RootlessOvl != nil && a.RootlessOvl.Left }

// port is where a's node receives, given the port that stock nodes use.
func (a Attrs) port(stock int) int {
	if a.RootlessOvl == nil || a.RootlessOvl.Port == 0 {
		return stock
	}
	return a.RootlessOvl.Port
}

// who names a's node in an error or a log line.
func (a Attrs) who() string {
	if a.PublicIP.IsValid() {
		return a.whoAt(a.PublicIP)
	}
	return a.whoAt(a.PublicIPv6)
}

// whoAt is who, with the one of a's addresses that matters.
func (a Attrs) whoAt(ip netip.Addr) string {
	switch {
	case a.RootlessOvl != nil:
		return fmt.Sprintf("rootless-ovl node %s at %v port %d", a.RootlessOvl.NodeID, ip, a.RootlessOvl.Port)
	case ip.IsValid():
		return fmt.Sprintf("a flannel node at %v", ip)
	}
	return "a flannel node without an address"
}
