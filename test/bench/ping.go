// This file waits for the first answer to a ping.

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// pingInterval is between two requests.
const pingInterval = time.Millisecond

// firstAnswer pings target from s until it answers and returns when that was. Before there is a route it tries again and again.
func firstAnswer(ctx context.Context, s *space, target netip.Addr) (time.Time, error) {
	var at time.Time
	err := s.do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return fmt.Errorf("ICMP socket: %w", err)
		}
		defer unix.Close(fd)
		interval := unix.NsecToTimeval(int64(pingInterval))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &interval); err != nil {
			return err
		}
		request := echoRequest(0x6f76, 1)
		var reply [256]byte
		for ctx.Err() == nil {
			if err := unix.Sendto(fd, request, 0, &unix.SockaddrInet4{Addr: target.As4()}); err != nil {
				time.Sleep(pingInterval / 4) // no route yet
				continue
			}
			for {
				n, _, err := unix.Recvfrom(fd, reply[:], 0)
				if err != nil {
					break // nothing came in the interval
				}
				if isEchoReply(reply[:n], target, request) {
					at = time.Now()
					return nil
				}
			}
		}
		return fmt.Errorf("no answer to pings from %s to %v: %w", s.name, target, ctx.Err())
	})
	return at, err
}

// echoRequest is an ICMP echo request (RFC 792): type, code, checksum, identifier, sequence.
func echoRequest(id, seq uint16) []byte {
	b := []byte{8, 0, 0, 0}
	b = binary.BigEndian.AppendUint16(b, id)
	b = binary.BigEndian.AppendUint16(b, seq)
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(b[2:], ^uint16(sum+sum>>16))
	return b
}

// isEchoReply reports whether an IPv4 packet is target's answer to the request.
func isEchoReply(packet []byte, target netip.Addr, request []byte) bool {
	if len(packet) < 20 {
		return false
	}
	header := int(packet[0]&0xf) * 4
	if len(packet) < header+8 || netip.AddrFrom4([4]byte(packet[12:16])) != target {
		return false
	}
	icmp := packet[header:]
	return icmp[0] == 0 && [4]byte(icmp[4:8]) == [4]byte(request[4:8])
}
