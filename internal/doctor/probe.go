// This file is the sockets of the checks: a knock at a UDP port, and a ping of a given size, both without privilege.

package doctor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// knock sends a few empty datagrams, which a node passes over without counting them as damage, and waits for an ICMP
// error, which a connected socket gets as the error of its next call.
func knock(ctx context.Context, peer netip.AddrPort, wait time.Duration) error {
	f, err := connected(unix.SOCK_DGRAM, 0, peer)
	if err != nil {
		return err
	}
	defer f.Close()
	deadline := time.Now().Add(wait)
	stop := context.AfterFunc(ctx, func() { _ = f.SetDeadline(time.Now()) })
	defer stop()
	const knocks = 3
	for k := range knocks {
		if _, err := f.Write(nil); err != nil {
			return errno(err)
		}
		if err := f.SetReadDeadline(deadline.Add(-wait * time.Duration(knocks-1-k) / knocks)); err != nil {
			return err
		}
		var b [1]byte
		_, err := f.Read(b[:])
		switch {
		case err == nil, errors.Is(err, io.EOF):
			return nil // an answer, if an empty one
		case ctx.Err() != nil:
			return ctx.Err()
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return errno(err)
		}
	}
	return nil
}

// interfaceMTU is what the kernel would send to the peer without fragmenting if it had learnt nothing of the path, in bytes of IP
// packet. IP_MTU is no answer: it tells what ICMP errors said, too, even with IP_PMTUDISC_PROBE. The interface is the one that has the
// address that the kernel would send from.
func interfaceMTU(peer netip.AddrPort) (int, error) {
	f, err := connected(unix.SOCK_DGRAM, 0, peer)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var source netip.Addr
	mtu, err := control(f, func(fd int) (int, error) {
		sa, err := unix.Getsockname(fd)
		if err != nil {
			return 0, err
		}
		if sa, ok := sa.(*unix.SockaddrInet4); ok {
			source = netip.AddrFrom4(sa.Addr)
		}
		return unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU)
	})
	if err != nil {
		return 0, err
	}
	ifaces, err := net.Interfaces()
	if err != nil {
		return 0, err
	}
	for _, i := range ifaces {
		addrs, err := i.Addrs()
		if err != nil {
			continue // it has just gone
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == source {
				return max(mtu, i.MTU), nil
			}
		}
	}
	return mtu, nil
}

// echo sends an ICMP echo request in an IP packet of the given size with "do not fragment" set, and waits for its answer.
//
//	0      1      2          4            6              8
//	| type | code | checksum | identifier | sequence     | payload
//
// The kernel fills in checksum and identifier (the socket's port), and delivers only answers to this socket.
func echo(ctx context.Context, peer netip.Addr, size int, wait time.Duration) (bool, error) {
	const header = 20 + 8
	if size < header {
		return false, fmt.Errorf("%d bytes are too few for a ping", size)
	}
	f, err := connected(unix.SOCK_DGRAM, unix.IPPROTO_ICMP, netip.AddrPortFrom(peer, 0))
	if err != nil {
		return false, err
	}
	defer f.Close()
	if _, err := control(f, func(fd int) (int, error) {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 2*size+4096)
		return 0, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	}); err != nil {
		return false, err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetDeadline(time.Now()) })
	defer stop()
	request := make([]byte, size-20)
	request[0] = 8 // echo request
	binary.BigEndian.PutUint16(request[6:], 1)
	if err := f.SetDeadline(time.Now().Add(wait)); err != nil {
		return false, err
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	answer := make([]byte, size)
	n := 0
	if _, err = f.Write(request); err == nil {
		n, err = f.Read(answer)
	}
	switch {
	case err == nil:
		return n == len(request) && answer[0] == 0, nil
	case ctx.Err() != nil:
		return false, ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.EMSGSIZE), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return false, nil
	default:
		return false, errno(err)
	}
}

// connected makes a non-blocking IPv4 socket to one peer.
func connected(kind, proto int, peer netip.AddrPort) (*os.File, error) {
	addr := peer.Addr().Unmap()
	if !addr.Is4() {
		return nil, fmt.Errorf("%v is not an IPv4 address", addr)
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: addr.As4(), Port: int(peer.Port())}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "probe"), nil
}

func control(f *os.File, do func(fd int) (int, error)) (int, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var inner error
	if err := conn.Control(func(fd uintptr) { n, inner = do(int(fd)) }); err != nil {
		return 0, err
	}
	return n, inner
}

// errno takes the file's name off an error.
func errno(err error) error {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}
