// This file publishes ports of attachments on the host: it opens them, keeps them over restarts, and closes them with their attachment.
// The data plane is package publish.

package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
	"github.com/rootless-ovl/rootless-ovl/publish"
)

// portRetry is how often a port is tried again that was taken when the daemon came back.
const portRetry = 3 * time.Second

// savedPort is one published port as it is kept on disk.
type savedPort struct {
	HostAddr netip.Addr `json:"host_addr,omitzero"` // not valid: all of the host's
	HostPort uint16     `json:"host_port"`
	Port     uint16     `json:"port"`
	Proto    string     `json:"proto"`
	SNAT     bool       `json:"snat,omitempty"`
}

// portOf is the port of a request that has been validated.
func portOf(p api.Port) savedPort {
	s := savedPort{HostPort: uint16(p.HostPort), Port: uint16(p.Port), Proto: p.Proto, SNAT: p.SNAT}
	if p.HostAddr != "" {
		s.HostAddr, _ = netip.ParseAddr(p.HostAddr) // ParsePublish has written it
	}
	return s
}

func (s savedPort) api() api.Port {
	p := api.Port{HostPort: int(s.HostPort), Port: int(s.Port), Proto: s.Proto, SNAT: s.SNAT}
	if s.HostAddr.IsValid() {
		p.HostAddr = s.HostAddr.String()
	}
	return p
}

// collides tells whether the host cannot have both ports.
func (s savedPort) collides(o savedPort) bool {
	if s.HostPort == 0 || s.HostPort != o.HostPort || s.Proto != o.Proto {
		return false
	}
	a, b := s.HostAddr, o.HostAddr
	switch {
	case !a.IsValid() || !b.IsValid():
		return true
	case a.Is4() != b.Is4():
		return false
	}
	return a == b || a.IsUnspecified() || b.IsUnspecified()
}

// published is a published port of an attachment. saved is constant once it is in a list; the rest is guarded by Node.mu.
type published struct {
	saved   savedPort
	pub     *publish.Publication // nil: it could not be opened
	problem string               // why
}

func (p *published) api() api.Port {
	d := p.saved.api()
	d.Problem = p.problem
	if p.pub != nil {
		s := p.pub.Stats()
		d.Counters = numbers(s)
		for reason, count := range s.Drops {
			d.Counters["drops_"+reason] = count
		}
	}
	return d
}

// portsLocked are the published ports of an attachment as the API shows them.
func (a *attachment) portsLocked() (list []api.Port) {
	for _, p := range a.ports {
		list = append(list, p.api())
	}
	return list
}

func (a *attachment) savedPortsLocked() (list []savedPort) {
	for _, p := range a.ports {
		list = append(list, p.saved)
	}
	return list
}

// portTroubleLocked tells of ports that could not be opened.
func (a *attachment) portTroubleLocked() string {
	var texts []string
	for _, p := range a.ports {
		if p.problem != "" {
			texts = append(texts, p.problem)
		}
	}
	return joined(texts...)
}

// kernelSockets are sockets in a container's own network namespace.
type kernelSockets interface {
	DialTCP(ctx context.Context, from, to netip.AddrPort) (*net.TCPConn, error)
	Close() error
}

// portInside is how the published ports of one attachment reach it: by sockets in its namespace while there are any, otherwise through the
// gateway's stack. It implements publish.Inside.
type portInside struct {
	gateway gateway
	sockets atomic.Pointer[kernelSockets]

	// Guarded by Node.portsMu.
	at     nsutil.Place // where the sockets are, of a loose attachment
	never  bool         // it takes none: errors.ErrUnsupported
	told   bool         // that it takes none at the moment
	trying bool         // something is tried again, see retryPorts
}

// DialTCP says errors.ErrUnsupported where the namespace takes no sockets of ours.
func (i *portInside) DialTCP(ctx context.Context, from, to netip.AddrPort) (*net.TCPConn, error) {
	s := i.sockets.Load()
	if s == nil {
		return nil, errors.ErrUnsupported
	}
	return (*s).DialTCP(ctx, from, to)
}

func (i *portInside) Carry(ctx context.Context, host *net.TCPConn, from, to netip.AddrPort) error {
	return i.gateway.CarryTCP(ctx, host, from, to)
}

func (i *portInside) OpenUDP(from, to netip.AddrPort, reply func([]byte)) (publish.UDPFlow, error) {
	u, err := i.gateway.OpenUDP(from, to, reply)
	if err != nil {
		return nil, err
	}
	return u, nil
}

// Publish publishes ports of an attachment: all that are asked for, or none.
func (n *Node) Publish(_ context.Context, nameOrPID string, r api.PublishRequest) ([]api.Port, error) {
	wanted, err := r.Ports()
	if err != nil {
		return nil, err
	}
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	n.mu.Lock()
	a, err := n.liveLocked(nameOrPID)
	if err == nil {
		err = r.Check(n.describeLocked(a))
	}
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	added, err := n.openPorts(a, wanted)
	if err != nil {
		return nil, publishError(n.nameOf(a), err)
	}
	n.openInside(a, added)
	n.mu.Lock()
	if _, err = n.liveLocked(a.saved.Name); err == nil { // it may have ended meanwhile
		err = n.addPortsLocked(a, added)
	}
	list := make([]api.Port, 0, len(added))
	for _, p := range added {
		list = append(list, p.api())
	}
	n.mu.Unlock()
	if err != nil {
		n.closePorts(added)
		n.closeInside(a)
		return nil, publishError(n.nameOf(a), err)
	}
	n.servePorts(a, added)
	n.retryLater(a)
	n.log.Info("published", "name", n.nameOf(a), "ports", api.PortsText(list))
	return list, nil
}

// Unpublish closes published ports of an attachment.
func (n *Node) Unpublish(_ context.Context, nameOrPID string, r api.UnpublishRequest) ([]api.Port, error) {
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	n.mu.Lock()
	a, err := n.liveLocked(nameOrPID)
	if err != nil {
		n.mu.Unlock()
		return nil, err
	}
	picked, err := r.Pick(a.portsLocked())
	var stay, gone []*published
	for _, p := range a.ports {
		if slices.ContainsFunc(picked, func(d api.Port) bool { return portOf(d) == p.saved }) {
			gone = append(gone, p)
		} else {
			stay = append(stay, p)
		}
	}
	was := a.ports
	if err == nil {
		a.ports = stay
		if err = n.saveAttachmentsLocked(); err != nil {
			a.ports = was
		}
	}
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	n.closePorts(gone)
	n.closeInside(a)
	if len(gone) > 0 {
		n.log.Info("unpublished", "name", n.nameOf(a), "ports", api.PortsText(picked))
	}
	return picked, nil
}

// liveLocked finds an attachment that ports can be published of now.
func (n *Node) liveLocked(nameOrPID string) (*attachment, error) {
	if err := n.takesLocked(); err != nil {
		return nil, err
	}
	a := n.findLocked(nameOrPID)
	switch {
	case a == nil || a.phase == leaving:
		return nil, api.Errorf(api.CodeNotFound, "no attachment %q: `rootless-ovl ps` lists them", nameOrPID)
	case a.phase == pending:
		return nil, api.Errorf(api.CodeUnavailable, "attachment %q is still being made: try again", nameOrPID)
	}
	return a, nil
}

// openPorts binds ports for an attachment, all or none. The caller holds portsMu.
func (n *Node) openPorts(a *attachment, wanted []api.Port) (opened []*published, err error) {
	defer func() {
		if err != nil {
			n.closePorts(opened)
		}
	}()
	n.mu.Lock()
	err = n.roomForLocked(a, wanted)
	n.mu.Unlock()
	for _, w := range wanted {
		if err != nil {
			return opened, err
		}
		p := &published{saved: portOf(w)}
		if p.pub, err = n.openPort(a, p.saved, true); err == nil {
			p.saved.HostPort = p.pub.HostPort()
			opened = append(opened, p)
		}
	}
	return opened, err
}

// openPort binds a port. Only people wait for one that is taken: the daemon tries again.
func (n *Node) openPort(a *attachment, s savedPort, patient bool) (*publish.Publication, error) {
	pub, err := publish.Listen(publish.Spec{HostAddr: s.HostAddr, HostPort: s.HostPort, Port: s.Port, Proto: s.Proto, SNAT: s.SNAT},
		publish.Target{Addresses: n.portAddresses(a), Inside: &a.inside, Places: n.places, Patient: patient, Log: n.log,
			Given: n.givenPortOf(a, s)})
	return pub, n.takenByUs(s, err)
}

// roomForLocked tells what of ours has the ports of the host that are wanted, if anything.
func (n *Node) roomForLocked(a *attachment, wanted []api.Port) error {
	if len(a.ports)+len(wanted) > api.MaxPorts {
		return api.Errorf(api.CodeExhausted, "%d published ports are more than the %d that one container may have", len(a.ports)+len(wanted), api.MaxPorts)
	}
	taken := make(map[uint16][]savedPort)
	owner := make(map[savedPort]string)
	for _, other := range n.attachments {
		for _, p := range other.ports {
			taken[p.saved.HostPort] = append(taken[p.saved.HostPort], p.saved)
			owner[p.saved] = other.saved.Name
		}
	}
	for _, w := range wanted {
		s := portOf(w)
		for _, o := range taken[s.HostPort] {
			if !s.collides(o) {
				continue
			}
			if who := owner[o]; who != "" {
				return api.Errorf(api.CodeInUse, "port %d/%s of this host is published for %q already (%v): `rootless-ovl unpublish %d:%d/%s %s` first, or choose another port",
					s.HostPort, s.Proto, who, o.api(), o.HostPort, o.Port, s.Proto, who)
			}
			return api.Errorf(api.CodeInvalid, "port %d/%s of this host is given twice", s.HostPort, s.Proto)
		}
		if s.HostPort == 0 {
			continue
		}
		taken[s.HostPort] = append(taken[s.HostPort], s)
		if s.Proto == publish.UDP && int(s.HostPort) == n.port {
			return api.Errorf(api.CodeInUse, "port %d/udp of this host is the daemon's own, to which the other nodes send: choose another port", s.HostPort)
		}
	}
	return nil
}

// addPortsLocked makes ports part of an attachment, on disk too.
func (n *Node) addPortsLocked(a *attachment, added []*published) error {
	was := a.ports
	a.ports = slices.Concat(was, added)
	if err := n.saveAttachmentsLocked(); err != nil {
		a.ports = was
		return err
	}
	return nil
}

// servePorts lets clients in on ports that are open.
func (n *Node) servePorts(a *attachment, list []*published) {
	addrs := n.portAddresses(a)
	for _, p := range list {
		if pub := p.pub; pub != nil {
			pub.SetAddresses(addrs)
			n.watchers.Go(func() {
				if n.untilSwitched(n.publishing) {
					_ = pub.Run(n.publishing)
				}
			}) // it ends with the node or by Close, and has nothing else to say
		}
	}
}

// closePorts closes ports that are in no list any more. What they have counted stays in the totals.
func (n *Node) closePorts(list []*published) {
	for _, p := range list {
		if p.pub == nil {
			continue
		}
		p.pub.Close()
		n.mu.Lock()
		n.gonePorts.add(p.pub.Stats())
		n.mu.Unlock()
	}
}

// portTotals are the counters of all published ports.
type portTotals struct {
	Connections uint64 `json:"connections"`
	Spliced     uint64 `json:"spliced"`
	Carried     uint64 `json:"carried"`
	Flows       uint64 `json:"flows"`
	BytesIn     uint64 `json:"bytes_in"`
	BytesOut    uint64 `json:"bytes_out"`

	drops map[string]uint64
}

func (t *portTotals) add(s publish.Stats) {
	t.Connections += s.Connections
	t.Spliced += s.Spliced
	t.Carried += s.Carried
	t.Flows += s.Flows
	t.BytesIn += s.BytesIn
	t.BytesOut += s.BytesOut
	if t.drops == nil {
		t.drops = make(map[string]uint64)
	}
	for reason, count := range s.Drops {
		t.drops[reason] += count
	}
}

// portTotalsLocked are the totals since the start.
func (n *Node) portTotalsLocked() portTotals {
	t := n.gonePorts
	t.drops = maps.Clone(t.drops)
	for _, a := range n.attachments {
		for _, p := range a.ports {
			if p.pub != nil {
				t.add(p.pub.Stats())
			}
		}
	}
	return t
}

// portAddresses are where the ports of an attachment lead, and as whom it may see clients.
func (n *Node) portAddresses(a *attachment) publish.Addresses {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := a.saved
	d := publish.Addresses{Container4: s.Addr.Addr(), Gateway4: gatewayAddr(s.Addr), Overlay: []netip.Prefix{n.netConfig.Network}}
	if s.Addr6.IsValid() {
		d.Container6, d.Gateway6 = s.Addr6.Addr(), gatewayAddr(s.Addr6)
		d.Overlay = append(d.Overlay, s.Addr6.Masked()) // which need not be of the network's
	}
	if carriesIPv6(n.netConfig) {
		d.Overlay = append(d.Overlay, n.netConfig.IPv6Network)
	}
	return d
}

// openInside has sockets made in the namespace of an attachment, if a TCP port is among list and there are none yet. Where the namespace does
// not take them its connections go through the stack; it is tried again if that may change. The caller holds portsMu.
func (n *Node) openInside(a *attachment, list []*published) {
	if a.inside.sockets.Load() != nil || a.inside.never || !slices.ContainsFunc(list, isTCP) {
		return
	}
	s, err := n.socketsIn(a)
	switch {
	case err == nil:
		a.inside.sockets.Store(&s)
		a.inside.told = false
	case errors.Is(err, errNotTaken): // so nobody connects, either
	case errors.Is(err, errors.ErrUnsupported):
		a.inside.never = true
		n.log.Info("published connections go through the gateway, as the container's namespace takes no sockets of ours", "name", n.nameOf(a), "err", err)
	default:
		if !a.inside.told {
			n.log.Info("published connections go through the gateway for now, as sockets cannot be made in the container's namespace", "name", n.nameOf(a), "err", err)
		}
		a.inside.told = true
	}
}

func (n *Node) socketsIn(a *attachment) (kernelSockets, error) {
	if a.saved.Loose {
		return n.looseSockets(a)
	}
	ns, err := n.openAttached(a)
	if err != nil {
		return nil, err
	}
	s, err := ns.sockets(n.savedOf(a))
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return s, nil
}

func isTCP(p *published) bool { return p.saved.Proto == publish.TCP }

// closeInside takes the sockets out of the namespace again when no port needs them. The caller holds portsMu.
func (n *Node) closeInside(a *attachment) {
	n.mu.Lock()
	needed := slices.ContainsFunc(a.ports, isTCP)
	n.mu.Unlock()
	if needed {
		return
	}
	a.inside.never = false // with the next port it is seen
	if s := a.inside.sockets.Swap(nil); s != nil {
		if err := (*s).Close(); err != nil {
			n.log.Debug("sockets in a container's namespace", "name", n.nameOf(a), "err", err)
		}
	}
}

// publishFor is the part of an attach about ports: it binds them before anything is made in the namespace, so that one that is taken leaves
// nothing behind.
func (n *Node) publishFor(a *attachment, r api.AttachRequest) error {
	if len(r.Publish) == 0 {
		return nil
	}
	wanted, err := api.PublishRequest{Publish: r.Publish, SNAT: r.SNAT}.Ports()
	if err != nil {
		return err
	}
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	opened, err := n.openPorts(a, wanted)
	if err != nil {
		return codedPortError(err)
	}
	n.mu.Lock()
	err = n.addPortsLocked(a, opened)
	n.mu.Unlock()
	if err != nil {
		n.closePorts(opened)
	}
	return err
}

// startPorts serves the ports of an attachment that has just become live. Those that could not be opened are tried again until they are.
func (n *Node) startPorts(a *attachment) {
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	n.mu.Lock()
	list := slices.Clone(a.ports)
	alive := a.phase == live
	n.mu.Unlock()
	if !alive || len(list) == 0 { // leave has closed them, or there are none
		return
	}
	n.openInside(a, list)
	n.servePorts(a, list)
	n.retryLater(a)
}

// retryLater has tried again what did not come about, if there is something. The caller holds portsMu.
func (n *Node) retryLater(a *attachment) {
	if !a.inside.trying && n.owing(a) {
		a.inside.trying = true
		n.watchers.Go(func() { n.retryPorts(a) })
	}
}

// owing tells whether ports of a live attachment are not open, or want sockets in its namespace that may yet be made. The caller holds portsMu.
func (n *Node) owing(a *attachment) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return a.phase == live && (slices.ContainsFunc(a.ports, isClosed) ||
		a.inside.sockets.Load() == nil && !a.inside.never && slices.ContainsFunc(a.ports, isTCP))
}

func isClosed(p *published) bool { return p.pub == nil }

// stopPorts closes all ports of an attachment that leaves, or was never made.
func (n *Node) stopPorts(a *attachment) {
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	n.mu.Lock()
	list := a.ports
	a.ports = nil
	n.mu.Unlock()
	n.closePorts(list)
	n.closeInside(a)
}

// restorePorts opens the ports that an attachment had under the last daemon. One that cannot be opened is a problem of the attachment.
func (n *Node) restorePorts(a *attachment) {
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	n.mu.Lock()
	saved := a.savedPortsLocked() // none of one that has left by now
	n.mu.Unlock()
	if len(saved) == 0 {
		return
	}
	var list []*published
	for _, s := range saved {
		p := &published{saved: s}
		var err error
		if p.pub, err = n.openPort(a, s, false); err != nil {
			p.problem = err.Error()
			n.log.Warn("a published port cannot be opened again yet", "name", a.saved.Name, "port", s.api(), "err", err)
		}
		list = append(list, p)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a.ports = list
}

// retryPorts opens what of an attachment's ports is not open, and what they want in its namespace, until all is there.
func (n *Node) retryPorts(a *attachment) {
	tick := time.NewTicker(portRetry)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-a.off:
			return
		case <-n.stopping:
			return
		}
		if n.retryOnce(a) {
			return
		}
	}
}

// retryOnce reports whether nothing is left to try. It gives way to others between ports.
func (n *Node) retryOnce(a *attachment) bool {
	n.mu.Lock()
	missing := slices.DeleteFunc(slices.Clone(a.ports), func(p *published) bool { return !isClosed(p) })
	n.mu.Unlock()
	for _, p := range missing {
		n.retryPort(a, p)
	}
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	if !n.owing(a) {
		a.inside.trying = false
		return true
	}
	n.mu.Lock()
	list := slices.Clone(a.ports)
	n.mu.Unlock()
	n.openInside(a, list)
	a.inside.trying = n.owing(a)
	return !a.inside.trying
}

// retryPort opens a port that is still wanted, if it can be.
func (n *Node) retryPort(a *attachment, p *published) {
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	n.mu.Lock()
	wanted := a.phase == live && slices.Contains(a.ports, p) && isClosed(p)
	n.mu.Unlock()
	if !wanted { // any more
		return
	}
	pub, err := n.openPort(a, p.saved, false)
	if err != nil {
		return // its problem has been told
	}
	n.mu.Lock()
	p.pub, p.problem = pub, ""
	n.mu.Unlock()
	n.servePorts(a, []*published{p})
	n.log.Info("published again", "name", n.nameOf(a), "port", p.saved.api())
}

// publishError gives an error about ports its code and says whose ports they are.
func publishError(name string, err error) error {
	err = codedPortError(err)
	var coded *api.Error
	if errors.As(err, &coded) {
		return api.Errorf(coded.Code, "publish for %q: %w", name, err)
	}
	return fmt.Errorf("publish for %q: %w", name, err)
}

func codedPortError(err error) error {
	switch {
	case errors.Is(err, publish.ErrPrivileged):
		return api.Errorf(api.CodeDenied, "%w", err)
	case errors.Is(err, publish.ErrPortTaken):
		return api.Errorf(api.CodeInUse, "%w", err)
	case errors.Is(err, publish.ErrDescriptors):
		return api.Errorf(api.CodeExhausted, "%w", err)
	case errors.Is(err, publish.ErrNotHere), errors.Is(err, publish.ErrInvalid):
		return api.Errorf(api.CodeInvalid, "%w", err)
	}
	return err
}
