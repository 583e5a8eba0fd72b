// This file notices that the host's network changes.

package hostnet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Watch calls changed whenever ExternalInterface may answer otherwise than before: an interface, an address or a route that the choice
// looks at is there, gone or different. One change may bring many calls, and many bring none that matters. They come one after another,
// from the calling goroutine, until ctx ends (nil); the first when the kernel has begun to tell, for what came before is not told. An error
// says that the kernel tells nothing, or nothing any more.
func Watch(ctx context.Context, o Options, changed func()) error {
	f, err := subscribe(groups(o))
	if err != nil {
		return fmt.Errorf("subscribing to changes of the network: %w", err)
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 64<<10)
	changed()
	for {
		n, err := f.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // there was more than the socket holds
			changed()
		case err != nil:
			return fmt.Errorf("reading changes of the network: %w", err)
		case matters(buf[:n], o):
			changed()
		}
	}
}

// groups are the kernel's names for what the choice looks at.
func groups(o Options) []int {
	g := []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE}
	if o.CanReach.Is6() {
		g = append(g, unix.RTNLGRP_IPV6_ROUTE)
	}
	return g
}

// subscribe opens a socket that the kernel tells of changes. Closing the file closes it.
func subscribe(groups []int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	for _, g := range groups {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g)
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "rtnetlink"), nil
}

// matters tells whether one of the messages is about something that the choice looks at. Of routes that is the default one, so that a
// router's full table, which never rests, costs nothing; where a route is asked for, it is all of them.
func matters(b []byte, o Options) bool {
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return true // cut short; it was about something
	}
	for _, m := range messages {
		switch m.Header.Type {
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			const dstLen = 1 // struct rtmsg: rtm_dst_len
			if o.CanReach.IsValid() || len(m.Data) <= dstLen || m.Data[dstLen] == 0 {
				return true
			}
		default:
			return true
		}
	}
	return false
}
