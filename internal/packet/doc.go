// Package packet is the one currency between the rooms of the packet path: an IP packet (possibly a 64 KB superpacket)
// in borrowed memory, with room in front of it and with the offload facts that virtio_net_hdr carries.
//
// Place in the journey: internal/tap and forwarder's underlay make Packets, forwarder routes them, internal/tap,
// forwarder's underlay and stack send them.
//
// Ownership: whoever read a packet owns its memory. A Packet is lent for the length of one Send call; a receiver that
// wants to keep bytes copies them. Nothing here starts a goroutine or takes a lock.
package packet
