// This file lists the TCP connections of another namespace, by NETLINK_SOCK_DIAG over a socket that a fork child opened there: sock_diag(7),
// include/uapi/linux/inet_diag.h.
//
//	request    inet_diag_req_v2  family protocol ext pad | states(4) | inet_diag_sockid(48)
//	answer     inet_diag_msg     family state timer retrans | inet_diag_sockid(48) | expires rqueue wqueue uid inode (4 each) | attributes
//	sockid     sport dport(2 each, big-endian) src(16) dst(16) if(4) cookie(8)

package nsutil

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY, include/uapi/linux/sock_diag.h
	inetDiagMark     = 15 // INET_DIAG_MARK

	diagRequestLen = 56
	diagAnswerLen  = 72

	// diagStates are those of connections that are there for both sides, as bits: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING
	// (include/net/tcp_states.h).
	diagStates = 1<<1 | 1<<4 | 1<<5 | 1<<8 | 1<<9 | 1<<11
)

// TCPConnection is one end of a connection, which a process of the namespace has.
type TCPConnection struct {
	Local, Remote netip.AddrPort
	Cookie        uint64 // the kernel's number for the socket, given once
}

// TCPConnections lists connections of the namespace that wanted says yes to, at most `most` of them. Those that Inside has made, and what they are
// connected to, are left out.
func (n *Namespace) TCPConnections(most int, wanted func(TCPConnection) bool) ([]TCPConnection, error) {
	op, err := n.enterFor(wish{talks: unix.NETLINK_SOCK_DIAG})
	if err != nil {
		return nil, err
	}
	defer op.close()
	c := newRTNL(op.netlink)
	var all []TCPConnection
	for _, family := range families {
		req := nl.NewNetlinkRequest(sockDiagByFamily, 0)
		data := make([]byte, diagRequestLen)
		data[0], data[1] = family, unix.IPPROTO_TCP
		binary.NativeEndian.PutUint32(data[4:], diagStates)
		req.AddRawData(data)
		left := min(most-len(all), maxKept)
		list, err := dump(c, req, func(b []byte) (TCPConnection, bool) {
			conn, ok := parseConnection(b)
			if !ok || left == 0 || !wanted(conn) {
				return conn, false
			}
			left--
			return conn, true
		})
		if err != nil {
			return nil, fmt.Errorf("%s: listing TCP connections: %w", n.name, err)
		}
		all = append(all, list...)
	}
	return all, nil
}

// parseConnection reads an inet_diag_msg. It says no to what is none, and to connections with a mark of Inside's.
func parseConnection(b []byte) (c TCPConnection, ok bool) {
	if len(b) < diagAnswerLen {
		return c, false
	}
	var local, remote netip.Addr
	switch b[0] {
	case unix.AF_INET:
		local, remote = netip.AddrFrom4([4]byte(b[8:])), netip.AddrFrom4([4]byte(b[24:]))
	case unix.AF_INET6: // which a socket of both families has for IPv4, too
		local, remote = netip.AddrFrom16([16]byte(b[8:])).Unmap(), netip.AddrFrom16([16]byte(b[24:])).Unmap()
	default:
		return c, false
	}
	if mark := attrsIn(b[diagAnswerLen:])[inetDiagMark]; len(mark) == 4 && binary.NativeEndian.Uint32(mark)>>16 == insideMark>>16 {
		return c, false
	}
	return TCPConnection{
		Local:  netip.AddrPortFrom(local, binary.BigEndian.Uint16(b[4:])),
		Remote: netip.AddrPortFrom(remote, binary.BigEndian.Uint16(b[6:])),
		Cookie: binary.NativeEndian.Uint64(b[44:]),
	}, true
}
