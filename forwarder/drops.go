// This file names the reasons why a packet ends in the forwarder.

package forwarder

// Drop is a reason why a packet was not forwarded.
type Drop uint8

// The reasons. Their names are stable: `status` shows them.
const (
	dropNone             Drop = iota
	DropMalformed             // not an IP packet: too short, lengths that do not fit, unknown version
	DropBadChecksum           // IPv4 header checksum
	DropNotUnicast            // destination is multicast, broadcast, loopback or unspecified
	DropSpoofedContainer      // a container sent from an address that is not its own
	DropSpoofedPeer           // the outer source does not own the inner source
	DropTransit               // from one peer to another, or to the outside, through us
	DropTTL                   // time to live ran out
	DropNoRoute               // no lease, no attachment, no family for the destination
	DropTooBig                // above the next hop's MTU with DF; the sender was told
	DropPortGone              // the attachment went away while the packet was on its way
	DropUnderlayFull          // the underlay socket took nothing for too long
	DropUnderlayRefused       // the kernel refused the datagram: no route, unreachable, firewall
	DropUnderlayTooBig        // datagram above the underlay's MTU
	DropLoop                  // the gateway sent to itself
	DropScratch               // no room for an ICMP error or fragments in this batch
	DropBadVXLAN              // not a VXLAN frame, or one with bits that we do not know
	DropOtherVNI              // VXLAN frame of another network
	DropForeignVTEP           // VXLAN frame that is addressed to another VTEP, or to all
	DropNotIP                 // VXLAN frame with ARP or anything else that is not IP
	DropPolicy                // refused by the policy of the container that sent it, or of the one that it was for
	DropLinkOnly              // a message of a neighbour on the link, which no router passes on: ND, a router's advertisement, a redirect
	numDrops
)

var dropNames = [numDrops]string{
	DropMalformed:        "malformed",
	DropBadChecksum:      "bad-ip-checksum",
	DropNotUnicast:       "not-unicast",
	DropSpoofedContainer: "spoofed-by-container",
	DropSpoofedPeer:      "spoofed-by-peer",
	DropTransit:          "transit-refused",
	DropTTL:              "ttl-exceeded",
	DropNoRoute:          "no-route",
	DropTooBig:           "too-big",
	DropPortGone:         "attachment-gone",
	DropUnderlayFull:     "underlay-full",
	DropUnderlayRefused:  "underlay-refused",
	DropUnderlayTooBig:   "underlay-too-big",
	DropLoop:             "gateway-loop",
	DropScratch:          "no-scratch",
	DropBadVXLAN:         "vxlan-bad-header",
	DropOtherVNI:         "vxlan-other-vni",
	DropForeignVTEP:      "vxlan-foreign-mac",
	DropNotIP:            "vxlan-not-ip",
	DropPolicy:           "policy-denied",
	DropLinkOnly:         "link-only-message",
}
