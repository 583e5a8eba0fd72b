// This file is SOCKS5 as RFC 1928 has it:
//
//	client    05 n methods[n]                            proxy    05 00    (or ff: none of them)
//	client    05 cmd 00 type address port                proxy    05 reply 00 type address port
//
//	type 1: 4 bytes of IPv4; 3: a length and a name; 4: 16 bytes of IPv6. Ports are big-endian.

package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/rootless-ovl/rootless-ovl/internal/relay"
)

const (
	socks4Version = 4
	socks5Version = 5

	methodNone         = 0x00 // no authentication
	methodUnacceptable = 0xff

	commandConnect = 1

	addrIPv4 = 1
	addrName = 3
	addrIPv6 = 4

	replySucceeded       = 0
	replyFailure         = 1
	replyNotAllowed      = 2
	replyNetUnreachable  = 3
	replyHostUnreachable = 4
	replyRefused         = 5
	replyNoCommand       = 7
	replyNoAddressType   = 8
)

// socks4Refusal is "request rejected or failed" in the words of version 4.
var socks4Refusal = []byte{0, 91, 0, 0, 0, 0, 0, 0}

// errNotSOCKS is a client that does not keep to the protocol.
var errNotSOCKS = errors.New("not SOCKS5")

func (p *Proxy) serveSOCKS(ctx context.Context, c *client) {
	defer c.Close()
	p.socks.Add(1)
	host, port, err := greet(c)
	if err != nil {
		p.bad.Add(1)
		return
	}
	conn, err := p.dial(ctx, host, port)
	if err != nil {
		code, _ := refusal(err)
		_, _ = c.Write(reply(code, netip.AddrPort{})) // it is closed in any case
		return
	}
	var bound netip.AddrPort
	if a, ok := conn.LocalAddr().(*net.TCPAddr); ok {
		bound = a.AddrPort()
	}
	_, err = c.Write(reply(replySucceeded, bound))
	if err == nil {
		err = c.SetReadDeadline(time.Time{})
	}
	if err != nil {
		relay.Reset(conn)
		return
	}
	_ = relay.Join(ctx, c, conn) // whoever broke it knows, and the other was reset
}

// greet leads the conversation up to the request, and answers those that cannot be met.
func greet(rw io.ReadWriter) (host string, port uint16, err error) {
	var head [4]byte
	if _, err := io.ReadFull(rw, head[:2]); err != nil {
		return "", 0, err
	}
	if head[0] != socks5Version {
		return "", 0, errNotSOCKS
	}
	methods := make([]byte, head[1])
	if _, err := io.ReadFull(rw, methods); err != nil {
		return "", 0, err
	}
	method := byte(methodUnacceptable)
	for _, m := range methods {
		if m == methodNone {
			method = methodNone
		}
	}
	if _, err := rw.Write([]byte{socks5Version, method}); err != nil {
		return "", 0, err
	}
	if method == methodUnacceptable {
		return "", 0, fmt.Errorf("%w without a password", errNotSOCKS)
	}
	if _, err := io.ReadFull(rw, head[:]); err != nil {
		return "", 0, err
	}
	if head[0] != socks5Version {
		return "", 0, errNotSOCKS
	}
	if host, port, err = readAddr(rw, head[3]); errors.Is(err, errNotSOCKS) {
		_, _ = rw.Write(reply(replyNoAddressType, netip.AddrPort{})) // it is closed in any case
	}
	if err != nil {
		return "", 0, err
	}
	if head[1] != commandConnect {
		_, _ = rw.Write(reply(replyNoCommand, netip.AddrPort{})) // likewise
		return "", 0, fmt.Errorf("%w CONNECT but command %d", errNotSOCKS, head[1])
	}
	return host, port, nil
}

// readAddr reads an address of that type and a port.
func readAddr(r io.Reader, kind byte) (host string, port uint16, err error) {
	var length [1]byte
	switch kind {
	case addrIPv4:
		length[0] = 4
	case addrIPv6:
		length[0] = 16
	case addrName:
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return "", 0, err
		}
	default:
		return "", 0, fmt.Errorf("%w: address type %d", errNotSOCKS, kind)
	}
	b := make([]byte, int(length[0])+2)
	if _, err := io.ReadFull(r, b); err != nil {
		return "", 0, err
	}
	addr, port := b[:length[0]], binary.BigEndian.Uint16(b[length[0]:])
	if kind == addrName {
		return string(addr), port, nil
	}
	a, _ := netip.AddrFromSlice(addr) // 4 or 16 bytes are one
	return a.Unmap().String(), port, nil
}

// reply is the answer to a request, with the address that we connected from if there is one.
func reply(code byte, bound netip.AddrPort) []byte {
	a, kind := bound.Addr().Unmap(), byte(addrIPv4)
	switch {
	case !a.IsValid():
		a = netip.IPv4Unspecified()
	case a.Is6():
		kind = addrIPv6
	}
	b := append([]byte{socks5Version, code, 0, kind}, a.AsSlice()...)
	return binary.BigEndian.AppendUint16(b, bound.Port())
}
