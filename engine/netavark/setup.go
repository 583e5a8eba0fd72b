// Setup and teardown: a container's namespace on the overlay, and off it.

package netavark

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// setup attaches the namespace at a path that means something to this process.
func (p *Plugin) setup(ctx context.Context, path string) error {
	c, err := readContainer(p.Stdin)
	if err != nil {
		return err
	}
	r, static6, err := p.request(&c)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("network namespace of container %s: %w", c.Name, err)
	}
	defer f.Close()
	r.NetnsFD = int(f.Fd())
	daemon, err := p.Connect()
	if err != nil {
		return err
	}
	a, err := attach(ctx, daemon, r)
	if err != nil {
		return err
	}
	for _, w := range a.Warnings {
		p.warn("%s", w)
	}
	err = checkStatic6(a, static6)
	if err == nil {
		err = p.answer(statusOf(a, c.Network.DNS))
	}
	if err != nil { // podman takes the container for not connected
		return errors.Join(err, daemon.Detach(context.WithoutCancel(ctx), a.Name, a.Owner))
	}
	return nil
}

// attach asks for the attachment. What is left of the same container, whose end nobody told the daemon of, makes way.
func attach(ctx context.Context, daemon API, r api.AttachRequest) (api.Attachment, error) {
	a, err := daemon.Attach(ctx, r)
	if !errors.Is(err, api.ErrInUse) {
		return a, err
	}
	old, oerr := daemon.AttachmentsOf(ctx, r.Owner)
	if oerr != nil || len(old) == 0 {
		return a, err
	}
	for _, o := range old {
		if derr := daemon.Detach(ctx, o.Name, o.Owner); derr != nil && !errors.Is(derr, api.ErrNotFound) {
			return a, errors.Join(err, derr)
		}
	}
	return daemon.Attach(ctx, r)
}

// request is what setup asks the daemon for, but for the namespace, and the IPv6 addresses that the container is to have.
func (p *Plugin) request(c *container) (r api.AttachRequest, static6 []netip.Addr, err error) {
	o, err := c.Network.options(c)
	if err != nil {
		return r, nil, err
	}
	r = api.AttachRequest{
		Owner: c.owner(), IfName: c.Options.Interface, MAC: c.Options.StaticMAC, Policy: o.policy,
		NoDefaultRoute: o.noDefaultRoute, Publish: o.publish,
	}
	if c.Network.DNS {
		p.name(c, o.name, &r)
	}
	if r.Addr, static6, err = staticAddrs(c.Options.StaticIPs); err != nil {
		return r, nil, err
	}
	if len(c.Ports) > 0 && !p.enginePublishes() {
		specs, err := publishOf(c.Ports)
		if err != nil {
			return r, nil, err
		}
		r.Publish = append(r.Publish, specs...)
	}
	// Answers of a container without a default route come to the gateway only if they are for it.
	r.SNAT = len(r.Publish) > 0 && (o.snat || o.noDefaultRoute)
	return r, static6, nil
}

// name has the container found by podman's names of it. What cannot be a name here is no reason not to start: podman's rules are
// other ones, and it makes aliases by itself.
func (p *Plugin) name(c *container, own string, r *api.AttachRequest) {
	own = cmp.Or(own, c.Name)
	if findable(own) {
		r.Name = own
	} else if own != "" {
		p.warn("container %s is not found by its name, which DNS cannot carry: give it another with --name or --network %s:name=...", c.Name, c.Network.Name)
	}
	for _, alias := range c.Options.Aliases {
		switch {
		case strings.EqualFold(alias, r.Name), slices.Contains(r.Aliases, alias):
		case findable(alias):
			r.Aliases = append(r.Aliases, alias)
		case !strings.HasPrefix(c.ID, alias): // podman's own, some of which are all digits
			p.warn("container %s is not found by the alias %q, which DNS cannot carry: choose another with --network-alias", c.Name, alias)
		}
	}
}

// findable tells whether an attachment can have the name and be found by it.
func findable(name string) bool {
	if api.CheckName(name) != nil {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
	}
	return true
}

// staticAddrs are the one IPv4 address and the IPv6 addresses of a list, which has some twice when podman reloads a network.
func staticAddrs(list []string) (v4 string, v6 []netip.Addr, err error) {
	for _, s := range list {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil:
			return "", nil, fmt.Errorf("static address: %w", err)
		case a.Is6() && !a.Is4In6():
			v6 = append(v6, a)
		case v4 != "" && v4 != a.Unmap().String():
			return "", nil, fmt.Errorf("two static IPv4 addresses, %s and %v: a container has one, give --ip once", v4, a.Unmap())
		default:
			v4 = a.Unmap().String()
		}
	}
	return v4, v6, nil
}

// checkStatic6 refuses an IPv6 address that the container has not got: it follows from the IPv4 address.
func checkStatic6(a api.Attachment, want []netip.Addr) error {
	got, _ := netip.ParsePrefix(a.Addr6)
	for _, w := range want {
		if got.Addr() != w {
			return fmt.Errorf("static address %v cannot be had: a container's IPv6 address follows from its IPv4 address (%s, %s), leave --ip6 out", w, a.Addr, cmp.Or(a.Addr6, "and has none here"))
		}
	}
	return nil
}

// Variables that rootless podman has in its environment and hands down (containers/storage pkg/unshare).
var podmansOwn = []string{"_CONTAINERS_USERNS_CONFIGURED", "_CONTAINERS_ROOTLESS_UID"}

// enginePublishes tells whether who calls opens the host's ports itself: rootless podman starts its rootlessport for every container with
// published ports, whatever the network's driver, and would not start one whose ports are open already (setupRootlessPortMappingViaRLK in
// libpod/networking_linux.go).
func (p *Plugin) enginePublishes() bool {
	return slices.ContainsFunc(podmansOwn, func(v string) bool { return p.Getenv(v) != "" })
}

// publishOf writes port mappings as api.ParsePublish reads them.
func publishOf(list []portMapping) (specs []string, err error) {
	for _, m := range list {
		host := ""
		if m.HostIP != "" {
			a, err := netip.ParseAddr(m.HostIP)
			if err != nil {
				return nil, fmt.Errorf("port mapping: host_ip: %w", err)
			}
			host = a.Unmap().String() + ":"
			if a.Unmap().Is6() {
				host = "[" + a.String() + "]:"
			}
		}
		outside, inside, err := m.ends()
		if err != nil {
			return nil, err
		}
		protocol := cmp.Or(strings.ToLower(m.Protocol), api.ProtoTCP)
		for proto := range strings.SplitSeq(protocol, ",") {
			if proto != api.ProtoTCP && proto != api.ProtoUDP {
				return nil, fmt.Errorf("port %d/%s cannot be published: the gateway carries tcp and udp", m.ContainerPort, proto)
			}
			specs = append(specs, host+outside+":"+inside+"/"+proto)
		}
	}
	return specs, nil
}

// ends are the ports of the host, none for any, and of the container.
func (m portMapping) ends() (outside, inside string, err error) {
	n := max(int(m.Range), 1)
	ports := func(first uint16) (string, error) {
		last := int(first) + n - 1
		if last > 65535 {
			return "", fmt.Errorf("port mapping: %d ports from %d on are beyond 65535: shorten the range", n, first)
		}
		if n == 1 {
			return strconv.Itoa(int(first)), nil
		}
		return fmt.Sprintf("%d-%d", first, last), nil
	}
	if inside, err = ports(m.ContainerPort); err != nil || m.HostPort == 0 {
		return "", inside, err
	}
	outside, err = ports(m.HostPort)
	return outside, inside, err
}

// statusOf is the answer about an attachment. With dns the container is to ask the gateway for names.
func statusOf(a api.Attachment, dns bool) status {
	s := status{SearchDomains: []string{}, Servers: []string{}}
	if dns && a.DNS != nil {
		s.Servers = append(s.Servers, a.DNS.Server)
		s.SearchDomains = append(s.SearchDomains, a.DNS.Search...)
	}
	l := link{MAC: a.MAC, Subnets: []address{}}
	for _, x := range []address{{a.Gateway, a.Addr}, {a.Gateway6, a.Addr6}} {
		if x.Net == "" {
			continue
		}
		if !a.DefaultRoute {
			x.Gateway = ""
		}
		l.Subnets = append(l.Subnets, x)
	}
	s.Interfaces = map[string]link{a.IfName: l}
	return s
}

// teardown detaches what setup has attached. That there is nothing, or nobody to ask, is no error: the daemon frees by itself what has gone
// while it was away.
func (p *Plugin) teardown(ctx context.Context) error {
	c, err := readContainer(p.Stdin)
	if err != nil {
		return err
	}
	daemon, err := p.Connect()
	if err != nil {
		return err
	}
	list, err := daemon.AttachmentsOf(ctx, c.owner())
	if errors.Is(err, api.ErrNotRunning) {
		p.warn("%v; when it runs again it frees the address of %s, unless the container lives on: `rootless-ovl detach` then", err, cmp.Or(c.Name, c.ID))
		return nil
	}
	if err != nil {
		return err
	}
	for _, a := range list {
		if derr := daemon.Detach(ctx, a.Name, a.Owner); derr != nil && !errors.Is(derr, api.ErrNotFound) {
			err = errors.Join(err, derr)
		}
	}
	return err
}
