// Package tap turns the frames of a TAP device into packets and packets into frames.
//
// Place in the journey: the first room of a packet that leaves a container and the last of one that reaches it. Device
// reads superpackets with their virtio_net_hdr, answers ARP and neighbour discovery in place of every other address,
// and strips Ethernet; on the way back it joins neighbouring segments of a flow into superpackets and writes each with
// one system call.
//
// Ownership: Device.Read fills a packet.Rx that belongs to the calling poll loop. Device.Send borrows packets and scratch
// until it returns. A Device starts no goroutine and takes no lock; Send may be called by several goroutines at once, Read
// by the owning loop alone.
//
// Sources: linux/if_tun.h, linux/virtio_net.h, RFC 826 (ARP), RFC 4861 (ND), Documentation/networking/tuntap.rst.
package tap
