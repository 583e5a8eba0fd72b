// This file speaks rtnetlink over a socket that a fork child opened in another namespace: messages are built with
// vishvananda/netlink/nl, sent and acknowledged here, because that library can only use sockets it opened itself.

package nsutil

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// rtnl is one netlink socket, mostly of rtnetlink. It does one request at a time.
type rtnl struct {
	fd  int
	buf []byte
}

// newRTNL prepares a socket: errors with the kernel's words, and no waiting for ever.
func newRTNL(fd int) *rtnl {
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	tv := unix.NsecToTimeval(forkTimeout.Nanoseconds())
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	return &rtnl{fd: fd, buf: make([]byte, 64<<10)}
}

const (
	// dumpTries is how often a dump is asked for that another one's changes spoil.
	dumpTries = 10
	// A namespace chooses how much there is to list: that many answers are read, and that many kept.
	maxAnswers, maxKept = 1 << 20, 1 << 10
)

// errInterrupted is a dump during which what it lists was changed: it may lack something that was there all the time.
var errInterrupted = errors.New("the list changed while it was read")

// do sends a request and reads until the kernel has acknowledged it (requests carry NLM_F_ACK). It returns the payloads of the
// answers; the kernel's refusal is a syscall.Errno in the error's chain.
func (c *rtnl) do(req *nl.NetlinkRequest) ([][]byte, error) {
	var answers [][]byte
	err := c.ask(req, func(answer []byte) error {
		if len(answers) == maxKept {
			return fmt.Errorf("netlink: more than %d answers", maxKept)
		}
		answers = append(answers, bytes.Clone(answer))
		return nil
	})
	return answers, err
}

// dump asks for a list, and returns what keep makes of the answers that it wants. keep owns nothing of an answer after its return. A list
// that is changed while it is read is asked for again.
func dump[T any](c *rtnl, req *nl.NetlinkRequest, keep func(answer []byte) (T, bool)) ([]T, error) {
	req.Flags |= unix.NLM_F_DUMP
	var err error
	for range dumpTries {
		var kept []T
		read := 0
		err = c.ask(req, func(answer []byte) error {
			if read++; read > maxAnswers {
				return fmt.Errorf("netlink: a list longer than %d", maxAnswers)
			}
			if v, wanted := keep(answer); wanted {
				if kept = append(kept, v); len(kept) > maxKept {
					return fmt.Errorf("netlink: more than %d of what is looked for", maxKept)
				}
			}
			return nil
		})
		if err == nil {
			return kept, nil
		}
		if !errors.Is(err, errInterrupted) {
			break
		}
	}
	return nil, err
}

// ask sends a request and has each answer visited until the kernel has acknowledged it or a dump is done. After an error of
// visit the socket is good for no further dump.
func (c *rtnl) ask(req *nl.NetlinkRequest, visit func(answer []byte) error) error {
	req.Seq = nl.NewNetlinkRequest(0, 0).Seq // of its own for each time that it is sent
	kernel := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	if err := unix.Sendto(c.fd, req.Serialize(), 0, kernel); err != nil {
		return fmt.Errorf("netlink send: %w", err)
	}
	var interrupted error
	for {
		msgs, err := c.receive()
		if err != nil {
			return err
		}
		for _, m := range msgs {
			if m.Header.Seq != req.Seq {
				continue
			}
			if m.Header.Flags&unix.NLM_F_DUMP_INTR != 0 {
				interrupted = errInterrupted
			}
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				return errors.Join(doneError(m), interrupted)
			case unix.NLMSG_ERROR:
				return ackError(m)
			default:
				if err := visit(m.Data); err != nil {
					return err
				}
			}
		}
	}
}

// doneError reads an NLMSG_DONE, which has the error of a dump that ended early as a negative number.
//
// Source: net/netlink/af_netlink.c, netlink_dump_done.
func doneError(m syscall.NetlinkMessage) error {
	if len(m.Data) < 4 {
		return nil
	}
	if code := int32(binary.NativeEndian.Uint32(m.Data)); code < 0 {
		return syscall.Errno(-code)
	}
	return nil
}

// receive reads one answer of the kernel.
func (c *rtnl) receive() ([]syscall.NetlinkMessage, error) {
	for {
		n, from, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("netlink receive: %w", err)
		}
		if sa, ok := from.(*unix.SockaddrNetlink); !ok || sa.Pid != 0 {
			continue // not from the kernel
		}
		msgs, err := syscall.ParseNetlinkMessage(c.buf[:n])
		if err != nil {
			return nil, fmt.Errorf("netlink answer: %w", err)
		}
		return msgs, nil
	}
}

// ackError reads an NLMSG_ERROR: nil for an acknowledgement.
//
//	0        4                 20 (or 4 + length of the echoed request)
//	| errno  | header of req.  | attributes, if NLM_F_ACK_TLVS |
//
// Source: include/uapi/linux/netlink.h, struct nlmsgerr.
func ackError(m syscall.NetlinkMessage) error {
	if len(m.Data) < 4 {
		return errors.New("netlink answer: short error message")
	}
	code := int32(binary.NativeEndian.Uint32(m.Data))
	if code == 0 {
		return nil
	}
	err := syscall.Errno(-code)
	if m.Header.Flags&unix.NLM_F_ACK_TLVS == 0 || len(m.Data) < 4+unix.SizeofNlMsghdr {
		return err
	}
	skip := unix.SizeofNlMsghdr
	if m.Header.Flags&unix.NLM_F_CAPPED == 0 {
		skip = (int(binary.NativeEndian.Uint32(m.Data[4:])) + 3) &^ 3
	}
	if skip < unix.SizeofNlMsghdr || 4+skip > len(m.Data) {
		return err
	}
	attrs, perr := nl.ParseRouteAttr(m.Data[4+skip:])
	if perr != nil {
		return err
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w (%s)", err, unix.ByteSliceToString(a.Value))
		}
	}
	return err
}

// linkAttrs is what we want to know of a device.
type linkAttrs struct {
	index int32
	name  string
	alias string
	kind  string // "tun" for TUN and TAP devices
	mac   [6]byte
	up    bool
}

// link finds a device by name; syscall.ENODEV if there is none.
func (c *rtnl) link(name string) (linkAttrs, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	answers, err := c.do(req)
	if err != nil {
		return linkAttrs{}, err
	}
	for _, b := range answers {
		if len(b) < unix.SizeofIfInfomsg {
			continue
		}
		return parseLink(b)
	}
	return linkAttrs{}, syscall.ENODEV
}

// parseLink reads an ifinfomsg, of which b holds the fixed part at least, and its attributes.
func parseLink(b []byte) (linkAttrs, error) {
	attrs, err := nl.ParseRouteAttr(b[unix.SizeofIfInfomsg:])
	if err != nil {
		return linkAttrs{}, err
	}
	// family 1, padding 1, type 2, index 4, flags 4, mask 4
	l := linkAttrs{index: int32(binary.NativeEndian.Uint32(b[4:])), up: binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0}
	for _, a := range attrs {
		switch a.Attr.Type &^ unix.NLA_F_NESTED {
		case unix.IFLA_IFNAME:
			l.name = unix.ByteSliceToString(a.Value)
		case unix.IFLA_IFALIAS:
			l.alias = unix.ByteSliceToString(a.Value)
		case unix.IFLA_ADDRESS:
			copy(l.mac[:], a.Value)
		case unix.IFLA_LINKINFO:
			info, err := nl.ParseRouteAttr(a.Value)
			if err != nil {
				return linkAttrs{}, err
			}
			for _, i := range info {
				if i.Attr.Type == unix.IFLA_INFO_KIND {
					l.kind = unix.ByteSliceToString(i.Value)
				}
			}
		}
	}
	return l, nil
}

// links lists the devices of a kind.
func (c *rtnl) links(kind string) ([]linkAttrs, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	return dump(c, req, func(b []byte) (linkAttrs, bool) {
		if len(b) < unix.SizeofIfInfomsg {
			return linkAttrs{}, false
		}
		l, err := parseLink(b)
		return l, err == nil && l.kind == kind
	})
}

// addrsOf lists the IPv4 addresses of a device.
func (c *rtnl) addrsOf(index int32) ([]netip.Prefix, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETADDR, 0)
	req.AddData(nl.NewIfAddrmsg(unix.AF_INET))
	return dump(c, req, func(b []byte) (netip.Prefix, bool) {
		if len(b) < unix.SizeofIfAddrmsg || b[0] != unix.AF_INET || int32(binary.NativeEndian.Uint32(b[4:])) != index {
			return netip.Prefix{}, false
		}
		attrs, err := nl.ParseRouteAttr(b[unix.SizeofIfAddrmsg:])
		if err != nil {
			return netip.Prefix{}, false
		}
		for _, a := range attrs {
			if addr, ok := netip.AddrFromSlice(a.Value); ok && a.Attr.Type == unix.IFA_LOCAL && addr.Is4() {
				p := netip.PrefixFrom(addr, int(b[1]))
				return p, p.IsValid()
			}
		}
		return netip.Prefix{}, false
	})
}

// setLink changes attributes of a device that exists.
func (c *rtnl) setLink(index int32, attrs ...*nl.RtAttr) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = index
	req.AddData(msg)
	for _, a := range attrs {
		req.AddData(a)
	}
	_, err := c.do(req)
	return err
}

// setUp brings a device up.
func (c *rtnl) setUp(index int32) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = index
	msg.Flags = unix.IFF_UP
	msg.Change = unix.IFF_UP
	req.AddData(msg)
	_, err := c.do(req)
	return err
}

// addAddr gives a device an address. IPv6 addresses skip duplicate address detection: leases are unique already.
func (c *rtnl) addAddr(index int32, p netip.Prefix) error {
	return c.addr(nl.NewNetlinkRequest(unix.RTM_NEWADDR, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL), index, p)
}

// removeAddr takes an address of the device away, and the route of its prefix with it.
func (c *rtnl) removeAddr(index int32, p netip.Prefix) error {
	return c.addr(nl.NewNetlinkRequest(unix.RTM_DELADDR, unix.NLM_F_ACK), index, p)
}

func (c *rtnl) addr(req *nl.NetlinkRequest, index int32, p netip.Prefix) error {
	msg := nl.NewIfAddrmsg(familyOf(p.Addr()))
	msg.Index = uint32(index)
	msg.Prefixlen = uint8(p.Bits())
	if p.Addr().Is6() {
		msg.Flags = unix.IFA_F_NODAD
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, p.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, p.Addr().AsSlice()))
	_, err := c.do(req)
	return err
}

// addRoute adds a route over the device. onlink says that the gateway is reachable although no address covers it.
func (c *rtnl) addRoute(index int32, r Route, onlink bool) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWROUTE, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	msg := nl.NewRtMsg() // main table, unicast, scope universe
	msg.Family = uint8(familyOf(r.Dst.Addr()))
	msg.Dst_len = uint8(r.Dst.Bits())
	msg.Protocol = unix.RTPROT_STATIC
	switch {
	case !r.Gateway.IsValid():
		if r.Dst.Addr().Is4() {
			msg.Scope = unix.RT_SCOPE_LINK
		}
	case onlink:
		msg.Flags |= unix.RTNH_F_ONLINK
	}
	req.AddData(msg)
	if r.Dst.Bits() > 0 {
		req.AddData(nl.NewRtAttr(unix.RTA_DST, r.Dst.Addr().AsSlice()))
	}
	if r.Gateway.IsValid() {
		req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, r.Gateway.AsSlice()))
	}
	req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))))
	if r.MTU > 0 {
		metrics := nl.NewRtAttr(unix.RTA_METRICS, nil)
		metrics.AddRtAttr(unix.RTAX_MTU, nl.Uint32Attr(uint32(r.MTU)))
		req.AddData(metrics)
	}
	_, err := c.do(req)
	return err
}

// removeRoute removes the route to r's destination over the device and r's gateway.
func (c *rtnl) removeRoute(index int32, r Route) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELROUTE, unix.NLM_F_ACK)
	msg := nl.NewRtDelMsg()
	msg.Family = uint8(familyOf(r.Dst.Addr()))
	msg.Table = unix.RT_TABLE_MAIN
	msg.Dst_len = uint8(r.Dst.Bits())
	req.AddData(msg)
	if r.Dst.Bits() > 0 {
		req.AddData(nl.NewRtAttr(unix.RTA_DST, r.Dst.Addr().AsSlice()))
	}
	if r.Gateway.IsValid() {
		req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, r.Gateway.AsSlice()))
	}
	req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))))
	_, err := c.do(req)
	return err
}

// foundRoute is a route that exists already.
type foundRoute struct {
	device string // name of the device it leads over; "" for a route without one
	text   string // in words, after the destination
}

// routeTo looks for a route of the main table to exactly this prefix.
func (c *rtnl) routeTo(dst netip.Prefix) (foundRoute, bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
	msg := &nl.RtMsg{}
	msg.Family = uint8(familyOf(dst.Addr()))
	req.AddData(msg)
	routes, err := dump(c, req, func(b []byte) (found []syscall.NetlinkRouteAttr, ok bool) {
		if len(b) < unix.SizeofRtMsg {
			return nil, false
		}
		m := nl.DeserializeRtMsg(b)
		if m.Table != unix.RT_TABLE_MAIN || m.Type != unix.RTN_UNICAST || int(m.Dst_len) != dst.Bits() || m.Flags&unix.RTM_F_CLONED != 0 {
			return nil, false
		}
		attrs, err := nl.ParseRouteAttr(b[unix.SizeofRtMsg:])
		if err != nil {
			return nil, false
		}
		to := zeroAddr(dst.Addr())
		for i, a := range attrs {
			attrs[i].Value = bytes.Clone(a.Value)
			if a.Attr.Type == unix.RTA_DST {
				to, _ = netip.AddrFromSlice(attrs[i].Value)
			}
		}
		return attrs, netip.PrefixFrom(to, dst.Bits()) == dst
	})
	if err != nil {
		return foundRoute{}, false, fmt.Errorf("listing routes: %w", err)
	}
	if len(routes) == 0 {
		return foundRoute{}, false, nil
	}
	var r foundRoute
	for _, a := range routes[0] {
		switch a.Attr.Type {
		case unix.RTA_GATEWAY:
			if addr, ok := netip.AddrFromSlice(a.Value); ok {
				r.text += " via " + addr.String()
			}
		case unix.RTA_OIF:
			if len(a.Value) == 4 {
				r.device = c.nameOf(int32(binary.NativeEndian.Uint32(a.Value)))
				r.text += " over " + r.device
			}
		}
	}
	return r, true, nil
}

// nameOf is the name of a device, or its number where it has gone.
func (c *rtnl) nameOf(index int32) string {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = index
	req.AddData(msg)
	if answers, err := c.do(req); err == nil {
		for _, b := range answers {
			if len(b) < unix.SizeofIfInfomsg {
				continue
			}
			attrs, err := nl.ParseRouteAttr(b[unix.SizeofIfInfomsg:])
			if err != nil {
				break
			}
			for _, a := range attrs {
				if a.Attr.Type == unix.IFLA_IFNAME {
					return unix.ByteSliceToString(a.Value)
				}
			}
		}
	}
	return "device " + strconv.Itoa(int(index))
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func zeroAddr(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
