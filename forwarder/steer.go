// This file steers packets to poll loops, where there are several. The kernel picks the socket of a SO_REUSEPORT group by the
// outer addresses, so all that a peer sends would come to one loop, and a container's packets would mostly be written to
// its TAP by another loop than the one that reads it. A classic BPF program on the group picks it by the inner destination
// instead, and a port goes to the loop that the same arithmetic finds for its container's address: one loop does both
// directions of a container, and the containers are spread over the loops.
//
// A datagram train (UDP_GRO) comes to the loop of its first packet, whole. Packets in it for containers of other loops are
// delivered all the same, but may then overtake, or be overtaken by, those that come to their own loop. So a node that
// steers says so in its lease, and its peers put packets for one container only into a train for it (txQueue.part). Measured with
// two loops and a TCP stream to each of two containers: nothing arrived out of order, where 5 % did with only superpackets
// kept apart; a network card's driver, which joins what it receives again, does not undo it, since the IP identification begins
// anew with each train. For other peers trains stay as long as they can be: small datagrams to two containers by turns are
// six times dearer in trains of one.
//
// Where the kernel refuses the program, the kernel's choice stands and ports take the loops in turn.

package forwarder

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Where the last two bytes of the destination are in an IP header. They tell containers of a subnet apart, and both families
// have the same there where a container's IPv6 address ends as its IPv4 address does.
const (
	steerAt4, steerAt6 = 18, 38
)

// steerKey is what a packet is steered by.
func steerKey(ip []byte) uint16 {
	if ip[0]>>4 == 6 {
		return binary.BigEndian.Uint16(ip[steerAt6:])
	}
	return binary.BigEndian.Uint16(ip[steerAt4:])
}

// steerIndex is the index of the loop, of n, for packets to a.
func steerIndex(a netip.Addr, n int) int {
	b := a.AsSlice()
	return int(binary.BigEndian.Uint16(b[len(b)-2:])) % n
}

// steerProgram returns steerIndex for the packet in a datagram's payload, at which its offsets begin (run_bpf_filter in the
// kernel's net/core/sock_reuseport.c). What is too short for a load ends the program with 0: the first socket.
func steerProgram(n int) []unix.SockFilter {
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K, K: 4},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 6, Jt: 2},
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: steerAt4},
		{Code: unix.BPF_JMP | unix.BPF_JA, K: 1},
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: steerAt6},
		{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: uint32(n)},
		{Code: unix.BPF_RET | unix.BPF_A},
	}
}

// steer attaches the program to the sockets, which the kernel numbers in the order in which they were bound. It may refuse.
func (u *underlay) steer() {
	if len(u.fds) < 2 {
		return
	}
	p := steerProgram(len(u.fds))
	u.steered = unix.SetsockoptSockFprog(u.fds[0], unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}) == nil
}

// Steers tells whether packets are steered: there are several loops, and the kernel took the program.
func (r *Router) Steers() bool { return r.under.steered }

// loopForLocked chooses the loop of a port whose container has these addresses.
func (r *Router) loopForLocked(addrs []netip.Addr) *loop {
	if r.under.steered {
		return r.loops[steerIndex(addrs[0], len(r.loops))]
	}
	r.next++
	return r.loops[(r.next-1)%len(r.loops)]
}

// part ends the train in progress if a packet for the same peer, of which ip is the beginning, is to be steered otherwise.
func (q *txQueue) part(ip []byte) {
	if q.n == 0 {
		return
	}
	t := &q.trains[q.n-1]
	first := &q.iovs[t.iov] // begins with the IP header
	if steerKey(unsafe.Slice(first.Base, first.Len)) != steerKey(ip) {
		t.closed = true
	}
}
