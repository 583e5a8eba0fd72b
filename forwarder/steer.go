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

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Where the last two bytes of the destination are in an IP header. They tell containers of a subnet apart, and both families
// have the same there where a container's IPv6 address ends as its IPv4 address does.
const (
	steerAt4, steerAt6 = 18, 38
	laneAt4, laneAt6   = 14, 22 // the same of the source
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

// steerProgram returns the index of the socket for the packet in a datagram's payload, at which its offsets begin
// (run_bpf_filter in the kernel's net/core/sock_reuseport.c): steerIndex of its destination times the number of lanes, plus its
// lane (lanes.go). The packet stands behind encap bytes. What is too short for a load ends the program with 0: the
// first socket.
func steerProgram(loops, lanes, encap int) []unix.SockFilter {
	load := func(size uint16, at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | size, K: uint32(encap) + at}
	}
	const byteAt, halfAt, wordAt = unix.BPF_B | unix.BPF_ABS, unix.BPF_H | unix.BPF_ABS, unix.BPF_W | unix.BPF_ABS
	alu := func(op uint16, k int) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_ALU | op, K: uint32(k)} }
	jump := func(on uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | on, K: k, Jt: yes, Jf: no}
	}
	mixed, tcp := mixedOf(lanes), tcpOf(lanes)
	return []unix.SockFilter{
		// The sequence number if the packet is TCP, else the end of its source.
		0: load(byteAt, 0),
		1: alu(unix.BPF_RSH, 4),
		2: jump(unix.BPF_JEQ, 6, 10-3, 0),
		3: load(byteAt, 9),
		4: jump(unix.BPF_JEQ, packet.TCP, 0, 14-5),
		5: load(halfAt, 6),
		6: jump(unix.BPF_JSET, 0x1fff, 14-7, 0), // a fragment other than the first
		7: {Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH, K: uint32(encap)},
		8: load(unix.BPF_W|unix.BPF_IND, 4),
		9: jump(unix.BPF_JA, 19-10, 0, 0),

		10: load(byteAt, 6),
		11: jump(unix.BPF_JEQ, packet.TCP, 0, 16-12),
		12: load(wordAt, 44),
		13: jump(unix.BPF_JA, 19-14, 0, 0),

		14: load(halfAt, laneAt4),
		15: jump(unix.BPF_JA, 17-16, 0, 0),
		16: load(halfAt, laneAt6),

		// The lane, to be kept until the loop is known.
		17: alu(unix.BPF_MOD, mixed),
		18: jump(unix.BPF_JA, 22-19, 0, 0),
		19: alu(unix.BPF_RSH, stripeShift),
		20: alu(unix.BPF_MOD, tcp),
		21: alu(unix.BPF_ADD, lanes-tcp),
		22: {Code: unix.BPF_ST, K: 0},

		// The loop of its destination.
		23: load(byteAt, 0),
		24: alu(unix.BPF_RSH, 4),
		25: jump(unix.BPF_JEQ, 6, 28-26, 0),
		26: load(halfAt, steerAt4),
		27: jump(unix.BPF_JA, 29-28, 0, 0),
		28: load(halfAt, steerAt6),
		29: alu(unix.BPF_MOD, loops),
		30: alu(unix.BPF_MUL, lanes),
		31: {Code: unix.BPF_LDX | unix.BPF_MEM, K: 0},
		32: {Code: unix.BPF_ALU | unix.BPF_ADD | unix.BPF_X},
		33: {Code: unix.BPF_RET | unix.BPF_A},
	}
}

// steer attaches the program to the group that fd, its first socket, begins. The kernel numbers the sockets in the order in
// which they are bound. It may refuse.
func steer(fd, loops, lanes, encap int) bool {
	p := steerProgram(loops, lanes, encap)
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}) == nil
}

// Steers tells whether packets are steered: there are several loops, and the kernel took the program.
func (r *Router) Steers() bool {
	for _, s := range r.under.Load() {
		if s != nil && !s.steered {
			return false
		}
	}
	return len(r.loops) > 1
}

// loopForLocked chooses the loop of a port whose container has this address, or whose containers have those from it on: of several, most
// packets then come to other loops, and are delivered all the same.
func (r *Router) loopForLocked(addr netip.Addr) *loop {
	if r.Steers() {
		return r.loops[steerIndex(addr, len(r.loops))]
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
	first := &q.iovs[t.iov] // begins with the headers
	if steerKey(unsafe.Slice(first.Base, first.Len)[q.encap:]) != steerKey(ip) {
		t.closed = true
	}
}
