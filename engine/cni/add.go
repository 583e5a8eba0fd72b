// This file is ADD: a container's interface is made, and told as a result.

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// add puts the container on the overlay.
func (c *call) add(ctx context.Context) (any, error) {
	conf, err := readConfig(c.input)
	if err != nil {
		return nil, err
	}
	prev, err := c.prevResult()
	if err != nil {
		return nil, err
	}
	r, err := c.request(conf, prev)
	if err != nil {
		return nil, err
	}
	ns, err := c.open(c.netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if ns.isOurs() {
		return nil, fail(types.ErrInvalidNetNS, "%s=%.200s is the namespace that the plugin runs in: give that of a container", envNetns, c.netns)
	}
	r.NetnsFD = ns.fd()

	status, err := c.daemon.Status(ctx)
	if err != nil {
		return nil, err
	}
	if err := conf.checkMTU(status.MTU); err != nil {
		return nil, err
	}
	att, err := c.attach(ctx, r, ns)
	if err != nil {
		return nil, err
	}
	c.made = att.Name
	for _, w := range att.Warnings {
		c.tell("%s", w)
	}
	if att.Problem != "" {
		c.tell("%s", att.Problem)
	}
	result, err := c.result(conf, prev, att, status)
	if err != nil {
		c.undo()
		return nil, err
	}
	return result, nil
}

// request is what is asked of the daemon, without the namespace.
func (c *call) request(conf config, prev *types100.Result) (api.AttachRequest, error) {
	e, err := readExtras(c.Getenv(envArgs), conf.Args)
	if err != nil {
		return api.AttachRequest{}, err
	}
	r, err := conf.request(c.head.Name, e)
	if err != nil {
		return r, err
	}
	if r.IfName == "" {
		r.IfName = c.ifName
	}
	if i := slices.IndexFunc(prev.Interfaces, func(i *types100.Interface) bool { return i.Sandbox != "" && i.Name == r.IfName }); i >= 0 {
		return r, fail(types.ErrInvalidNetworkConfig, "a plugin before this one has made %s in the container: give this one another name with \"ifName\"", r.IfName)
	}
	r.NoDefaultRoute = hasDefaultRoute(prev)
	if conf.DefaultRoute != nil {
		r.NoDefaultRoute = !*conf.DefaultRoute
	}
	if r.NoDefaultRoute && len(r.Publish) > 0 && !r.SNAT {
		return r, fail(types.ErrInvalidNetworkConfig, "the container's default route does not lead to the overlay, so its answers to clients of published ports would leave elsewhere: write \"snat\": true, and it sees the gateway's address instead of theirs")
	}
	r.Owner = c.owner()
	if len(r.Owner) > maxOwner {
		return r, fail(types.ErrInvalidNetworkConfig, "the names of the network, the container and the interface have %d bytes together: %d are the most", len(r.Owner), maxOwner)
	}
	return r, nil
}

// attach asks the daemon. An attachment with this name that is of another namespace is a container's that has had its id before and ended without
// DEL: it is taken off first.
func (c *call) attach(ctx context.Context, r api.AttachRequest, ns *namespace) (api.Attachment, error) {
	att, err := c.daemon.Attach(ctx, r)
	if !errors.Is(err, api.ErrInUse) {
		return att, err
	}
	stale, listErr := c.daemon.AttachmentsOf(ctx, r.Owner)
	stale = slices.DeleteFunc(stale, func(a api.Attachment) bool { return a.Inode == ns.inode })
	if listErr != nil || len(stale) == 0 {
		return att, err
	}
	for _, a := range stale {
		if err := c.daemon.Detach(ctx, a.Name, a.Owner); err != nil && !errors.Is(err, api.ErrNotFound) {
			return att, err
		}
	}
	return c.daemon.Attach(ctx, r)
}

// undoPatience bounds what is waited for where an ADD fails at its end.
const undoPatience = 5 * time.Second

// undo takes the container off again.
func (c *call) undo() {
	if c.made == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	if err := c.daemon.Detach(ctx, c.made, c.owner()); err != nil {
		c.tell("not detached again: %v", err)
	}
}

// checkMTU refuses an MTU that the interface will not have.
func (c config) checkMTU(network int) error {
	switch {
	case c.MTU == 0 || network == 0 || c.MTU == network:
		return nil
	case c.MTU > network:
		return fail(types.ErrInvalidNetworkConfig, "mtu: %d is larger than what the overlay carries, which is %d: leave mtu out, and interfaces get that", c.MTU, network)
	}
	return fail(types.ErrInvalidNetworkConfig, "mtu: %d is not the overlay's, which is %d and every interface's: leave mtu out (a smaller one is the network's to have, by that of its hosts' interface)", c.MTU, network)
}

// prevResult is that of the plugin before this one, in the latest version's form; empty if there is none.
func (c *call) prevResult() (*types100.Result, error) {
	if len(c.head.PrevResult) == 0 || bytes.Equal(c.head.PrevResult, []byte("null")) {
		return &types100.Result{CNIVersion: latest}, nil
	}
	var own struct {
		CNIVersion string            `json:"cniVersion"`
		Interfaces []json.RawMessage `json:"interfaces"`
		IPs        []json.RawMessage `json:"ips"`
		Routes     []json.RawMessage `json:"routes"`
	}
	bad := func(err error) error { return fail(types.ErrDecodingFailure, "prevResult cannot be read: %v", err) }
	if err := json.Unmarshal(c.head.PrevResult, &own); err != nil {
		return nil, bad(err)
	}
	for _, list := range [][]json.RawMessage{own.Interfaces, own.IPs, own.Routes} { // of which the library takes none that is null
		if slices.ContainsFunc(list, func(m json.RawMessage) bool { return bytes.Equal(m, []byte("null")) }) {
			return nil, bad(errors.New("null is in one of its lists"))
		}
	}
	if own.CNIVersion == "" { // it is that of the configuration
		own.CNIVersion = c.head.CNIVersion
	}
	r, err := create.Create(own.CNIVersion, c.head.PrevResult)
	if err != nil {
		return nil, bad(err)
	}
	result, err := types100.GetResult(r)
	if err != nil {
		return nil, bad(err)
	}
	return result, nil
}

// hasDefaultRoute tells whether a plugin before this one has made an IPv4 default route.
func hasDefaultRoute(r *types100.Result) bool {
	return slices.ContainsFunc(r.Routes, func(route *types.Route) bool {
		ones, bits := route.Dst.Mask.Size()
		return ones == 0 && bits == 32
	})
}

// result adds the attachment to what the plugins before this one have made, in the version of the configuration.
func (c *call) result(conf config, prev *types100.Result, att api.Attachment, status api.Status) (types.Result, error) {
	r := *prev
	r.Interfaces = append(slices.Clone(prev.Interfaces), &types100.Interface{Name: att.IfName, Mac: att.MAC, Mtu: att.MTU, Sandbox: c.netns})
	ours := len(r.Interfaces) - 1
	for _, f := range []struct {
		addr, gateway, network string
		all                    netip.Prefix
	}{
		{att.Addr, att.Gateway, status.Network, netip.PrefixFrom(netip.IPv4Unspecified(), 0)},
		{att.Addr6, att.Gateway6, status.Network6, netip.PrefixFrom(netip.IPv6Unspecified(), 0)},
	} {
		if f.addr == "" {
			continue
		}
		addr, err := netip.ParsePrefix(f.addr)
		if err != nil {
			return nil, fail(codeDaemon, "the daemon has given the address %q: is it of this version?", f.addr)
		}
		gateway, err := netip.ParseAddr(f.gateway)
		if err != nil {
			return nil, fail(codeDaemon, "the daemon has given the gateway %q: is it of this version?", f.gateway)
		}
		r.IPs = append(r.IPs, &types100.IPConfig{Interface: types100.Int(ours), Address: ipNet(addr), Gateway: gateway.AsSlice()})
		if network, err := netip.ParsePrefix(f.network); err == nil && network.Contains(addr.Addr()) {
			r.Routes = append(r.Routes, &types.Route{Dst: ipNet(network), GW: gateway.AsSlice()})
		}
		if att.DefaultRoute {
			r.Routes = append(r.Routes, &types.Route{Dst: ipNet(f.all), GW: gateway.AsSlice()})
		}
	}
	r.DNS = conf.dns(prev.DNS, att.DNS)
	r.CNIVersion = latest
	converted, err := r.GetAsVersion(c.head.CNIVersion)
	if err != nil {
		return nil, fail(types.ErrIncompatibleCNIVersion, "the result in version %s: %v", c.head.CNIVersion, err)
	}
	return converted, nil
}

// ipNet is the library's form of a prefix.
func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// dns is what belongs into the container's resolv.conf: servers that the runtime or the configuration names, or those of a plugin before this one, go
// before the gateway. The overlay's domain is searched where it can be found, which is by the gateway.
func (c config) dns(prev types.DNS, overlay *api.DNS) types.DNS {
	asked := c.RuntimeConfig.DNS
	d := types.DNS{Nameservers: asked.Servers, Domain: c.DNS.Domain, Search: asked.Searches, Options: asked.Options}
	for _, other := range []types.DNS{c.DNS, prev} {
		if len(d.Nameservers) == 0 {
			d.Nameservers = other.Nameservers
		}
		if len(d.Search) == 0 {
			d.Search = other.Search
		}
		if len(d.Options) == 0 {
			d.Options = other.Options
		}
		if d.Domain == "" {
			d.Domain = other.Domain
		}
	}
	if overlay != nil && (len(d.Nameservers) == 0 || slices.Contains(d.Nameservers, overlay.Server)) {
		if len(d.Nameservers) == 0 {
			d.Nameservers = []string{overlay.Server}
		}
		listed := func(s string) bool { return slices.Contains(overlay.Search, strings.TrimSuffix(s, ".")) }
		d.Search = append(slices.Clone(overlay.Search), slices.DeleteFunc(slices.Clone(d.Search), listed)...)
	}
	return d
}
