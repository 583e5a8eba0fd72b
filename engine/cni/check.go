// This file is CHECK: is what ADD has made still there?

package cni

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// check compares the result of ADD with what the daemon has, with the lease, and with what is in the container, where it may be looked into. ADD has
// answered when packets flow, so there is no delay to allow for.
func (c *call) check(ctx context.Context) (any, error) {
	prev, err := c.prevResult()
	if err != nil {
		return nil, err
	}
	if len(prev.Interfaces) == 0 {
		return nil, fail(types.ErrInvalidNetworkConfig, "CHECK needs prevResult, the result of ADD")
	}
	ns, err := c.open(c.netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	list, err := c.daemon.AttachmentsOf(ctx, c.owner())
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, fail(types.ErrUnknownContainer, "the daemon has no attachment of %s: `rootless-ovl ps` lists those that it has; run DEL and ADD again", c.owner())
	}
	att := list[0]
	if att.Inode != ns.inode {
		return nil, fail(codeBroken, "the attachment %q is of another network namespace than %s=%.200s: run DEL and ADD again", att.Name, envNetns, c.netns)
	}
	status, err := c.daemon.Status(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkLease(att, status); err != nil {
		return nil, err
	}
	if err := checkResult(att, prev); err != nil {
		return nil, err
	}
	switch v, err := ns.inside(att.IfName); {
	case errors.Is(err, errNotAllowed):
	case err != nil:
		return nil, fail(types.ErrIOFailure, "%v", err)
	default:
		if err := checkView(att, v); err != nil {
			return nil, err
		}
	}
	if att.Problem != "" {
		c.tell("%s: %s", att.Name, att.Problem)
	}
	return nil, nil
}

// checkLease tells whether the attachment's address is one of the node's.
func checkLease(att api.Attachment, status api.Status) error {
	if status.State != api.StateReady && status.State != api.StateLeaseLost {
		return fail(types.ErrTryAgainLater, "the node is not ready (%s): `rootless-ovl status` says more", status.State)
	}
	subnet, err := netip.ParsePrefix(status.Subnet)
	addr, err2 := netip.ParsePrefix(att.Addr)
	if err != nil || err2 != nil {
		return fail(codeDaemon, "the daemon has the subnet %q and the address %q: is it of this version?", status.Subnet, att.Addr)
	}
	if !subnet.Contains(addr.Addr()) {
		return fail(codeBroken, "the node has another subnet by now, %v, and %v is not in it, so peers do not find the container: start it again", subnet, addr.Addr())
	}
	return nil
}

// checkResult compares the attachment with the result of ADD.
func checkResult(att api.Attachment, prev *types100.Result) error {
	ours := slices.IndexFunc(prev.Interfaces, func(i *types100.Interface) bool {
		return i.Name == att.IfName && (i.Mac == "" || strings.EqualFold(i.Mac, att.MAC))
	})
	if ours < 0 {
		return fail(codeBroken, "prevResult has no interface %s with %s, which is what was made: run DEL and ADD again", att.IfName, att.MAC)
	}
	for _, text := range []string{att.Addr, att.Addr6} {
		addr, err := netip.ParsePrefix(text)
		if err != nil { // Addr6 may be empty
			continue
		}
		if !slices.ContainsFunc(prev.IPs, func(ip *types100.IPConfig) bool {
			a, ok := netip.AddrFromSlice(ip.Address.IP)
			return ok && a.Unmap() == addr.Addr()
		}) {
			return fail(codeBroken, "prevResult does not have the container's address %v: run DEL and ADD again", addr)
		}
	}
	return nil
}

// checkView compares the attachment with what is inside the container.
func checkView(att api.Attachment, v view) error {
	const remedy = "run DEL and ADD again, or start the container again"
	switch {
	case v.missing:
		return fail(codeBroken, "the container has no interface %s any more: %s", att.IfName, remedy)
	case !v.up:
		return fail(codeBroken, "%s is down in the container: `ip link set %s up` there, or start the container again", att.IfName, att.IfName)
	case !strings.EqualFold(v.mac, att.MAC):
		return fail(codeBroken, "%s has another MAC address in the container, %s and not %s: %s", att.IfName, v.mac, att.MAC, remedy)
	case att.DefaultRoute && !v.defaultRoute:
		return fail(codeBroken, "the container's default route does not lead to %s any more: %s", att.IfName, remedy)
	}
	for _, text := range []string{att.Addr, att.Addr6} {
		if addr, err := netip.ParsePrefix(text); err == nil && !slices.ContainsFunc(v.addrs, func(p netip.Prefix) bool { return p.Addr() == addr.Addr() }) {
			return fail(codeBroken, "%s does not have %v in the container any more: %s", att.IfName, addr.Addr(), remedy)
		}
	}
	return nil
}
