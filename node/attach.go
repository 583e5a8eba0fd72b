// This file attaches network namespaces to the overlay and takes them off again. An attachment goes through
//
//	pending  name, namespace and address are reserved and on disk; the TAP is being made
//	live     its address is in the route table; its end is watched for
//	leaving  out of the table; the TAP is being removed; name and address are still reserved
//
// and whoever moves it on (attach, detach, the end of its process) does so under Node.mu, so each step is done once.

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

const (
	defaultIfName = "eth0"
	// txQueueLen is the TAP's ring in packets, which may be superpackets: a window of 3 MB of single packets of 1472 bytes fits, or
	// some milliseconds of small ones, so that a daemon that waits for a core loses none; and at most 128 MB of superpackets. A
	// longer ring takes no more in the long run, it only delivers it later: a flood of UDP superpackets would stand 0.7 s in
	// a ring of 10000.
	txQueueLen = 2000
	// maxGSO is the kernel's largest superpacket, GSO_LEGACY_MAX_SIZE.
	maxGSO = 65536
)

// gsoMaxSize is the gso_max_size of a TAP of this MTU, in bytes: so large that the segments of a TCP superpacket, each with its
// headers and encap bytes before them, just fill one datagram train. The kernel takes MAX_TCP_HEADER off (some 320, by its configuration) and
// divides by the payload of a segment; half a segment more covers the difference. The count of segments is not
// bounded (gso_max_segs), or the container's kernel would cut UDP superpackets of many small datagrams by itself.
func gsoMaxSize(mtu, encap int) int {
	const ipAndTCP, maxTCPHeader = 20 + 32, 320
	payload := mtu - ipAndTCP
	return min(maxGSO, forwarder.MaxTrain/(mtu+encap)*payload+maxTCPHeader+payload/2)
}

type phase int

const (
	pending phase = iota
	live
	leaving
)

// attachment is one network namespace on the overlay. saved is constant once it is live, but for Name, Named and Aliases, and without its ports;
// these and the rest are guarded by Node.mu.
type attachment struct {
	saved savedAttachment

	phase   phase
	problem string // what of it did not work when it was attached or taken up
	nameErr error  // why its name is not even asked for; nil: it is, or there is none to publish
	link    link
	port    *forwarder.Port
	exit    exitWatch
	ns      namespace     // see keepNamespace; nil: none is kept
	at      whereabouts   // of a loose one
	entered bool          // as of savedAttachment
	adopted bool          // of an earlier daemon; constant
	off     chan struct{} // closed when nothing of it is left
	naming  chan struct{} // has one element while Rename is at it, which asks the store
	next    string        // the name that Rename is about to give it

	ports  []*published // changed with Node.portsMu held, too
	inside portInside   // how they reach it
}

func (n *Node) newAttachment(s savedAttachment) *attachment {
	a := &attachment{saved: s, entered: s.Entered, off: make(chan struct{}), naming: make(chan struct{}, 1), inside: portInside{gateway: n.gateway}}
	if s.Loose {
		a.at.Place = nsutil.Place{Inode: s.Inode, IfName: s.IfName}
	}
	return a
}

// Attach puts a namespace on the overlay. On an error nothing of it is left behind.
func (n *Node) Attach(ctx context.Context, r api.AttachRequest) (api.Attachment, error) {
	if err := r.Validate(); err != nil {
		return api.Attachment{}, err
	}
	if r.IfName == "" {
		r.IfName = defaultIfName
		switch {
		case r.Gateway:
			r.IfName = gatewayIfName
		case r.Loose:
			r.IfName = looseIfName()
		}
	}
	if r.Gateway || r.Loose {
		r = n.engineOf(r)
	}
	var warnings []string
	n.mu.Lock()
	err := n.takesLocked()
	if err == nil {
		warnings, err = n.checkPolicyLocked(r.Policy)
	}
	if err == nil {
		err = n.checkDNSAtLocked(r)
	}
	n.mu.Unlock()
	if err != nil {
		return api.Attachment{}, attachError(r, err)
	}
	ns, err := n.openAsked(ctx, r)
	if err != nil {
		return api.Attachment{}, attachError(r, err)
	}
	defer ns.Close()

	if err := n.awaitLeaving(ctx, r); err != nil {
		return api.Attachment{}, attachError(r, err)
	}
	a, err := n.reserve(r, ns)
	if err != nil {
		return api.Attachment{}, attachError(r, err)
	}
	err = n.claimName(ctx, a)
	if err == nil {
		err = n.publishFor(a, r)
	}
	if err != nil {
		n.dropName(a)
		n.mu.Lock()
		n.forgetLocked(a)
		err = errors.Join(err, n.saveAttachmentsLocked())
		n.mu.Unlock()
		return api.Attachment{}, attachError(r, err)
	}
	if err := n.connect(ctx, a, ns); err != nil {
		n.stopPorts(a)
		return api.Attachment{}, attachError(r, err)
	}
	n.startPorts(a)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.log.Info("attached", "name", a.saved.Name, "addr", a.saved.Addr.Addr(), "where", a.saved.where(), "ifname", a.saved.IfName)
	if r.Gateway {
		n.tellMisfitLocked(a)
	}
	described := n.describeLocked(a)
	described.Warnings = append(warnings, familyWarning(a.saved)...)
	return described, nil
}

// nameOf is what a is called now.
func (n *Node) nameOf(a *attachment) string { return n.savedOf(a).Name }

// takesLocked tells whether attachments are taken now.
func (n *Node) takesLocked() error {
	if !n.open {
		return api.Errorf(api.CodeUnavailable, "the node is not ready (%s): `rootless-ovl status` says more", n.state)
	}
	return nil
}

// openAsked opens the namespace that r names. ctx tells whose the descriptor in it is.
func (n *Node) openAsked(ctx context.Context, r api.AttachRequest) (namespace, error) {
	switch {
	case r.PID != 0:
		return n.edges.openPID(r.PID)
	case r.Netns != "":
		return n.edges.openPath(r.Netns)
	}
	pid, err := n.edges.caller(ctx)
	if err != nil {
		return nil, err
	}
	ns, err := n.edges.openPath(fmt.Sprintf("/proc/%d/fd/%d", pid, r.NetnsFD))
	if errors.Is(err, nsutil.ErrNoPath) {
		return nil, api.Errorf(api.CodeNotFound, "process %d has no descriptor %d: keep it open until the answer is there", pid, r.NetnsFD)
	}
	if err != nil {
		return nil, err
	}
	if err := n.edges.lives(ctx); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

// openSaved opens the namespace of an attachment, if it is still the one that it was.
func (n *Node) openSaved(s *savedAttachment) (ns namespace, err error) {
	switch {
	case s.PID != 0:
		ns, err = n.edges.openPID(s.PID)
	case s.Netns != "":
		ns, err = n.edges.openPath(s.Netns)
	default:
		var where string
		if where, err = n.edges.findInode(s.Inode, ""); err == nil {
			ns, err = n.edges.openPath(where)
		}
	}
	if err == nil && ns.Inode() != s.Inode {
		return nil, errors.Join(errors.New("its network namespace is another one now"), ns.Close())
	}
	return ns, err
}

// findSaved is openSaved of an attachment of an earlier daemon. It puts into s where a loose one is now. That of one that still runs is where
// its TAP is, however it was found before: the TAP was given, and may be all that leads there (no process is in it yet, or its path is gone).
func (n *Node) findSaved(s *savedAttachment) (namespace, error) {
	fd, shared := n.sharedTAP(s.Name)
	if !shared {
		return n.findAlone(s)
	}
	given, err := n.edges.namespaceOf(fd)
	if err == nil && (s.Loose || given.Inode() == s.Inode) {
		if s.Loose && !n.hasLoose(given, s) {
			s.Entered = s.Entered && given.Inode() == s.Inode
			s.Inode = given.Inode()
		}
		return given, nil
	}
	if errors.Is(err, nsutil.ErrNoTAP) {
		return nil, err
	}
	ns, aerr := n.findAlone(s)
	switch {
	case err != nil && aerr != nil:
		return nil, errors.Join(aerr, err)
	case err != nil:
		return ns, nil
	case aerr != nil: // somebody has moved its interface, which works there too
		return given, nil
	}
	_ = given.Close()
	return ns, nil
}

// findAlone is findSaved by what the state file says.
func (n *Node) findAlone(s *savedAttachment) (namespace, error) {
	if s.Loose {
		return n.findLoose(s)
	}
	return n.openSaved(s)
}

// keepNamespace has a, which is known by its namespace's number alone, hold on to ns: nothing else leads there before a process is in it.
func (n *Node) keepNamespace(a *attachment, ns namespace) error {
	if a.saved.PID != 0 || a.saved.Netns != "" || a.saved.Loose {
		return nil
	}
	kept, err := ns.again()
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a.ns = kept
	return nil
}

// letGo undoes keepNamespace.
func (n *Node) letGo(a *attachment) {
	n.mu.Lock()
	kept := a.ns
	a.ns = nil
	n.mu.Unlock()
	if kept != nil {
		if err := kept.Close(); err != nil {
			n.log.Debug("network namespace not closed", "inode", a.saved.Inode, "err", err)
		}
	}
}

// openAttached is openSaved of an attachment.
func (n *Node) openAttached(a *attachment) (namespace, error) {
	n.mu.Lock()
	if a.ns != nil {
		defer n.mu.Unlock()
		return a.ns.again()
	}
	n.mu.Unlock()
	return n.openSaved(&a.saved)
}

// savedOf is what is kept of an attachment that lives, without its ports, as its names are now.
func (n *Node) savedOf(a *attachment) savedAttachment {
	n.mu.Lock()
	defer n.mu.Unlock()
	return a.saved
}

// reserve gives the attachment its name and address and writes it down before anything is made, so that a TAP that
// outlives this daemon is always known to the next one.
func (n *Node) reserve(r api.AttachRequest, ns namespace) (*attachment, error) {
	s := savedAttachment{Name: r.Name, PID: r.PID, Netns: r.Netns, Inode: ns.Inode(), Owner: r.Owner, IfName: r.IfName,
		NoDefault: r.NoDefaultRoute || r.Gateway, Gateway: r.Gateway, Since: time.Now(), Policy: r.Policy,
		Named: r.Name != "", Aliases: r.Aliases, NoIPv6: r.NoIPv6, DNSAt: r.DNSAt}
	switch {
	case s.Name != "":
	case r.NetnsFD != 0 && !r.Loose:
		s.Name = "netns-" + strconv.FormatUint(s.Inode, 10)
	default:
		s.Name = defaultName(r)
	}
	if err := checkNames(&s); err != nil {
		return nil, err
	}
	if r.PID != 0 {
		start, err := n.edges.startTime(r.PID)
		if err != nil {
			return nil, err
		}
		s.StartTime = start
	}
	if r.Loose {
		s.makeLoose()
	}

	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.takesLocked(); err != nil {
		return nil, err
	}
	for _, other := range n.attachments {
		if s.Loose || other.saved.Loose {
			continue
		}
		if other.saved.Inode == s.Inode || r.PID != 0 && other.saved.PID == r.PID {
			return nil, api.Errorf(api.CodeInUse, "it is already attached as %q with address %v: `rootless-ovl detach %s` first",
				other.saved.Name, other.saved.Addr.Addr(), other.saved.Name)
		}
	}
	for _, other := range n.attachments {
		if s.Owner != "" && other.saved.Owner == s.Owner {
			return nil, api.Errorf(api.CodeInUse, "owner %q has the attachment %q with address %v already: `rootless-ovl detach %s` first", s.Owner, other.saved.Name, other.saved.Addr.Addr(), other.saved.Name)
		}
	}
	if err := n.nameFreeLocked(nil, s.Name); err != nil {
		return nil, err
	}
	if err := n.excludedLocked(r.Gateway); err != nil {
		return nil, err
	}
	addr, err := n.chooseAddrLocked(r, s.Name)
	if err != nil {
		return nil, err
	}
	s.Addr = netip.PrefixFrom(addr, n.pool.subnet.Bits())
	if me := n.selfLocked(); me.subnet6.IsValid() && !r.Gateway && !r.NoIPv6 {
		var ok bool
		if s.Addr6, ok = addr6Of(s.Addr, me.subnet6); !ok {
			n.pool.free(addr)
			return nil, fmt.Errorf("%w in %v, the IPv6 subnet: it is smaller than the IPv4 one; give nodes larger ones (IPv6SubnetLen in the network config)", ErrNoAddrsLeft, me.subnet6)
		}
		for _, other := range n.attachments { // in a small IPv6 subnet, one of an earlier IPv4 subnet may have it
			if other.saved.Addr6.Addr() == s.Addr6.Addr() {
				n.pool.free(addr)
				return nil, fmt.Errorf("%v: %w by attachment %q: detach that, which is of an earlier subnet, or choose another address (--ip)", s.Addr6.Addr(), ErrAddrInUse, other.saved.Name)
			}
		}
	}
	if !s.Addr6.IsValid() {
		s.Addr6 = n.egress6Of(s, n.selfLocked())
	}
	mac := macOf(addr)
	if r.MAC != "" {
		if mac, err = api.ParseMAC(r.MAC); err != nil {
			n.pool.free(addr)
			return nil, err
		}
	}
	s.MAC, s.MTU = macText(mac), n.mtu
	a := n.newAttachment(s)
	n.attachments[s.Name] = a
	if err := n.saveAttachmentsLocked(); err != nil {
		n.forgetLocked(a)
		return nil, err
	}
	return a, nil
}

func (n *Node) chooseAddrLocked(r api.AttachRequest, name string) (netip.Addr, error) {
	switch {
	case r.Gateway:
		addr := networkAddr(n.pool.subnet)
		return addr, n.pool.keep(addr, name)
	case r.Addr == "":
		return n.pool.any(name)
	}
	addr, err := netip.ParseAddr(r.Addr)
	if err != nil {
		return addr, api.Errorf(api.CodeInvalid, "address: %w", err)
	}
	return addr, n.pool.take(addr, name)
}

// connect makes the TAP and puts a into the route table, or undoes all of it.
func (n *Node) connect(ctx context.Context, a *attachment, ns namespace) (err error) {
	defer func() {
		if err != nil {
			n.letGo(a)
			n.dropName(a)
			n.mu.Lock()
			defer n.mu.Unlock()
			n.forgetLocked(a)
			err = errors.Join(err, n.saveAttachmentsLocked())
		}
	}()
	if err := n.keepNamespace(a, ns); err != nil {
		return err
	}
	exit, err := n.watchFor(a)
	if err != nil {
		return err
	}
	tapConfig, err := n.tapConfig(a.saved)
	if err != nil {
		exit.Close()
		return err
	}
	l, err := n.createTAP(ns, tapConfig, a.saved)
	if errors.Is(err, nsutil.ErrNoIPv6) {
		level := slog.LevelWarn
		if isEgress6(a.saved.Addr6) { // which nobody has asked for
			level = slog.LevelDebug
		}
		n.log.Log(ctx, level, "the container has IPv6 switched off (sysctl net.ipv6.conf.all.disable_ipv6): it gets IPv4 only", "name", a.saved.Name, "where", a.saved.where())
		n.mu.Lock()
		a.saved.Addr6 = netip.Prefix{}
		err = n.saveAttachmentsLocked()
		n.mu.Unlock()
		if err == nil {
			tapConfig, err = n.tapConfig(a.saved)
		}
		if err == nil {
			l, err = n.createTAP(ns, tapConfig, a.saved)
		}
	}
	if err != nil {
		exit.Close()
		return err
	}
	if err = ctx.Err(); err == nil {
		n.letThrough(a, ns)
		if err = n.enter(a, l, exit, tapConfig.MTU); err != nil {
			n.takeBack(a)
		}
	}
	if err != nil {
		exit.Close()
		return errors.Join(err, l.Delete())
	}
	return nil
}

// enter gives l to the router, makes a live and begins to watch for its end. On an error l is not in the router.
func (n *Node) enter(a *attachment, l link, exit exitWatch, mtu int) error {
	broken := make(chan struct{})
	c := forwarder.PortConfig{
		Name:    a.saved.Name,
		Sources: a.saved.sources(),
		MTU:     mtu,
		Device:  l,
		Gone:    func(error) { close(broken) },
	}
	if a.saved.Gateway {
		c.Errors = dummyAddr
	}
	drop, err := n.setPolicy(a.saved, &c)
	if err != nil {
		return err
	}
	port, err := n.path.AddPort(c)
	if err != nil {
		drop()
		return err
	}
	n.mu.Lock()
	a.link, a.port, a.exit, a.phase = l, port, exit, live
	n.keepNameLocked(a)
	if err = n.publishLocked(); err != nil {
		a.phase = pending
	}
	n.mu.Unlock()
	if err != nil {
		n.path.RemovePort(port)
		drop()
		return err
	}
	if w, ok := exit.(*looseWatch); ok {
		n.watchers.Go(func() { n.track(a, w) })
	}
	n.watchers.Go(func() {
		why := "its container has ended"
		select {
		case <-exit.Done():
			if w, ok := exit.(*looseWatch); ok {
				why = w.Why()
			}
		case <-broken:
			why = "its interface was removed inside the container"
		case <-a.off:
			return
		case <-n.stopping:
			return
		}
		if _, err := n.leave(a, why); err != nil {
			n.log.Debug("TAP of an ended container", "ifname", a.saved.IfName, "err", err)
		}
	})
	return nil
}

// leave takes a live attachment off the overlay and removes its TAP; why is for the log. It reports whether it was this
// call that did.
func (n *Node) leave(a *attachment, why string) (bool, error) {
	if !n.disconnect(a) {
		return false, nil
	}
	return true, n.remove(a, why)
}

// disconnect is the first half of leave: no packet of a comes or goes any more.
func (n *Node) disconnect(a *attachment) bool {
	n.mu.Lock()
	if a.phase != live {
		n.mu.Unlock()
		return false
	}
	a.phase = leaving
	if err := n.publishLocked(); err != nil {
		n.log.Error("route table not replaced", "err", err)
	}
	n.mu.Unlock()

	n.stopPorts(a)
	n.path.RemovePort(a.port)
	return true
}

// remove is the second half of leave: of its namespace, its name and its address nothing is ours any more. The kernel takes up to 20 ms for
// the TAP, and the store its time for the name.
func (n *Node) remove(a *attachment, why string) error {
	n.mu.Lock()
	n.retireLocked(a.link)
	removed := a.link
	a.link = nil
	n.mu.Unlock()
	n.takeBack(a)
	n.letGo(a)
	err := errors.Join(removed.Delete(), a.exit.Close())
	for _, p := range a.saved.sources() {
		n.gateway.Release(p)
	}
	n.gateway.DropPolicy(a.saved.addrs())
	n.dropName(a)

	n.mu.Lock()
	defer n.mu.Unlock()
	n.forgetLocked(a)
	close(a.off)
	n.log.Info("detached", "name", a.saved.Name, "addr", a.saved.Addr.Addr(), "where", a.saved.where(), "why", why)
	if serr := n.saveAttachmentsLocked(); serr != nil {
		n.log.Error("attachments not saved, so that the next start would not take them up as they are: see whether the disk is full", "err", serr)
	}
	return err
}

// askedTo is why an attachment leaves that somebody detached.
const askedTo = "asked to"

// Detach takes an attachment off the overlay, found by its name, or by its pid in decimal, if it is owner's or owner is empty.
func (n *Node) Detach(ctx context.Context, nameOrPID, owner string) error {
	a, err := n.detachable(nameOrPID, owner)
	if err != nil {
		return err
	}
	done, err := n.leave(a, askedTo)
	if !done { // somebody else is at it: our caller may rely on its being gone, all the same
		select {
		case <-a.off:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err != nil {
		return fmt.Errorf("detach %s: the address is free, but removing %s failed: %w", nameOrPID, a.saved.IfName, err)
	}
	return nil
}

// DetachSoon takes an attachment off the overlay as Detach does, but returns before its TAP is removed and its name and address are free: an
// attach that wants them waits (leaving.go).
func (n *Node) DetachSoon(_ context.Context, nameOrPID, owner string) error {
	a, err := n.detachable(nameOrPID, owner)
	if err != nil || !n.disconnect(a) {
		return err
	}
	n.watchers.Go(func() {
		if err := n.remove(a, askedTo); err != nil {
			n.log.Warn("the interface of a detached container was not removed", "name", a.saved.Name, "ifname", a.saved.IfName, "err", err)
		}
	})
	return nil
}

// detachable finds an attachment that is not being made.
func (n *Node) detachable(nameOrPID, owner string) (*attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	a := n.findLocked(nameOrPID)
	switch {
	case a == nil:
		return nil, api.Errorf(api.CodeNotFound, "no attachment %q: `rootless-ovl ps` lists them", nameOrPID)
	case owner != "" && a.saved.Owner != owner:
		return nil, api.Errorf(api.CodeNotFound, "attachment %q is not of owner %q: `rootless-ovl ps` lists them", nameOrPID, owner)
	case a.phase == pending:
		return nil, api.Errorf(api.CodeUnavailable, "attachment %q is still being made: try again", nameOrPID)
	}
	return a, nil
}

func (n *Node) findLocked(nameOrPID string) *attachment {
	if a, ok := n.attachments[nameOrPID]; ok {
		return a
	}
	pid, err := strconv.Atoi(nameOrPID)
	if err != nil || pid <= 0 {
		return nil
	}
	for _, a := range n.attachments {
		if a.saved.PID == pid || a.saved.Loose && a.at.pid == pid {
			return a
		}
	}
	return nil
}

// forgetLocked gives back a's name and address.
func (n *Node) forgetLocked(a *attachment) {
	if n.attachments[a.saved.Name] == a {
		delete(n.attachments, a.saved.Name)
		n.pool.free(a.saved.Addr.Addr())
	}
}

// tapConfig is the container's side of an attachment.
func (n *Node) tapConfig(s savedAttachment) (nsutil.TAPConfig, error) {
	mac, err := api.ParseMAC(s.MAC)
	if err != nil {
		return nsutil.TAPConfig{}, err
	}
	n.mu.Lock()
	network, network6, mtu, encap := n.netConfig.Network, n.netConfig.IPv6Network, n.mtu, n.vxlan.Encap()
	n.mu.Unlock()
	var addrs []netip.Prefix
	var routes []nsutil.Route
	for _, f := range []struct {
		addr, network netip.Prefix
		all           netip.Addr
	}{{s.Addr, network, netip.IPv4Unspecified()}, {s.Addr6, network6, netip.IPv6Unspecified()}} {
		if !f.addr.IsValid() {
			continue
		}
		addrs = append(addrs, f.addr)
		gateway := gatewayAddr(f.addr)
		if !isEgress6(f.addr) {
			routes = append(routes, nsutil.Route{Dst: f.network, Gateway: gateway})
		}
		if !s.NoDefault {
			routes = append(routes, nsutil.Route{Dst: netip.PrefixFrom(f.all, 0), Gateway: gateway})
		}
	}
	c := nsutil.TAPConfig{
		IfName:     s.IfName,
		MAC:        mac,
		MTU:        mtu,
		TxQueueLen: txQueueLen,
		Queues:     1,
		Addrs:      addrs,
		Routes:     routes,
		GSOMaxSize: gsoMaxSize(mtu, encap),
		Persist:    true,
	}
	if s.Gateway {
		c = gatewayTAP(c, s.Addr, network)
	}
	if s.Loose {
		c = looseTAP(c, s.Mark)
	}
	return c, nil
}

// adopt takes up the attachments of an earlier daemon whose containers still live, with the addresses they had. It is
// called once, before the API attaches anything.
func (n *Node) adopt() error {
	var saved savedAttachments
	_, err := readState(filepath.Join(n.cfg.StateDir, attachmentsFile), &saved)
	var broken *brokenStateError
	if errors.As(err, &broken) {
		n.log.Warn("attachments of the last run are lost; attach their containers again", "err", err)
	} else if err != nil {
		return err
	}
	boot := n.bootID()
	if boot != "" && saved.Boot != "" && boot != saved.Boot && len(saved.Attachments) > 0 {
		n.log.Info("the host was started again since the last run: its containers have ended, and their addresses are free", "attachments", len(saved.Attachments))
		saved.Attachments = nil
	}
	n.mu.Lock()
	n.boot, n.pool.last, n.unadopted = boot, saved.LastAddr, saved.Attachments
	n.takeUpAddressesLocked(saved.Reserved)
	n.mu.Unlock()
	var adopted []*attachment
	for i, s := range saved.Attachments {
		a, err := n.adoptOne(s)
		n.mu.Lock()
		n.unadopted = saved.Attachments[i+1:]
		n.mu.Unlock()
		if err != nil && n.isServed(&s, err) {
			return fmt.Errorf("attachment %q cannot be taken over: see why, and start this one with --replace again; the daemon that runs goes on: %w", s.Name, err)
		}
		if err != nil {
			level := slog.LevelInfo
			if errors.Is(err, errBadEntry) {
				level = slog.LevelWarn
			}
			n.log.Log(context.Background(), level, "attachment dropped", "name", s.Name, "addr", s.Addr.Addr(), "where", s.where(), "err", err)
			continue
		}
		adopted = append(adopted, a)
		n.log.Info("attachment taken up again", "name", s.Name, "addr", s.Addr.Addr(), "where", s.where())
	}
	// When all containers reach each other: sockets in a namespace are tried out, which may take a while.
	for _, a := range adopted {
		n.restorePorts(a)
		n.startPorts(a)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.saveAttachmentsLocked()
}

// bootID names the host's run, or is empty where that cannot be told.
func (n *Node) bootID() string {
	id, err := n.edges.bootID()
	if err != nil {
		n.log.Debug("whether the host was started again cannot be told", "err", err)
		return ""
	}
	return id
}

// errEnded is why an attachment is not taken up whose container is no more.
var errEnded = errors.New("its container has ended")

// errBadEntry is an entry of the state file that the node has not written.
var errBadEntry = errors.New("its entry in the state file is not valid")

// adoptOne takes up an attachment without its ports.
func (n *Node) adoptOne(s savedAttachment) (taken *attachment, err error) {
	r := api.AttachRequest{PID: s.PID, Netns: s.Netns, Name: s.Name, Owner: s.Owner, IfName: s.IfName, MAC: s.MAC, Policy: s.Policy, DNSAt: s.DNSAt, Loose: s.Loose}
	if s.PID == 0 && s.Netns == "" && s.Inode != 0 {
		r.NetnsFD = 3 // of whoever it was, any number
	}
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadEntry, err)
	}
	switch {
	case s.Name == "":
		return nil, fmt.Errorf("%w: it has no name", errBadEntry)
	case !s.Addr.Addr().Is4() || s.Addr6.IsValid() && !s.Addr6.Addr().Is6():
		return nil, fmt.Errorf("%w: it has no address", errBadEntry)
	}
	if n.hasEnded(&s) {
		return nil, errEnded
	}
	ns, err := n.findSaved(&s)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	a := n.newAttachment(s)
	a.adopted = true
	for _, p := range s.Ports {
		a.ports = append(a.ports, &published{saved: p}) // restorePorts opens them
	}
	n.mu.Lock()
	_, twice := n.attachments[s.Name]
	if twice {
		err = fmt.Errorf("name %q is there twice", s.Name)
	} else if err = n.pool.keep(s.Addr.Addr(), s.Name); err == nil {
		n.attachments[s.Name] = a
	}
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			n.letGo(a)
			n.mu.Lock()
			n.forgetLocked(a)
			n.mu.Unlock()
			n.stopPorts(a)
			if !n.shares() { // else the one before goes on with it
				n.forbid(ns, s)
			}
		}
	}()
	if err := n.keepNamespace(a, ns); err != nil {
		return nil, err
	}
	exit, err := n.watchFor(a)
	if err != nil {
		return nil, err
	}
	if !n.shares() { // else settle does
		n.refit(a, ns)
	}
	l, err := n.adoptTAP(a, ns)
	if err != nil {
		exit.Close()
		return nil, err
	}
	if !n.shares() {
		n.letThrough(a, ns)
	}
	if err := n.enter(a, l, exit, n.overlayMTU()); err != nil {
		exit.Close()
		return nil, errors.Join(err, l.Close())
	}
	return a, nil
}

// release closes all TAPs and leaves them in their containers for the next daemon. It is called when the router and the
// gateway have ended.
func (n *Node) release() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.attachments {
		if a.phase != live {
			continue
		}
		if s := a.inside.sockets.Swap(nil); s != nil && !n.shares() { // the ports have been closed by the end of publishing
			if err := (*s).Close(); err != nil {
				n.log.Debug("sockets in a container's namespace", "name", a.saved.Name, "err", err)
			}
		}
		a.exit.Close()
		err := a.link.Close()
		if a.ns != nil {
			err = errors.Join(err, a.ns.Close())
		}
		if err != nil {
			n.log.Warn("TAP not closed", "name", a.saved.Name, "err", err)
		}
	}
}

// saveAttachmentsLocked writes down what is attached, and what adopt has not come to yet as it was.
func (n *Node) saveAttachmentsLocked() error {
	if n.handed.Load() {
		return nil // the file is another's
	}
	saved := savedAttachments{V: 1, Boot: n.boot, LastAddr: n.pool.last, Attachments: []savedAttachment{}, Reserved: n.savedAddressesLocked()}
	for _, a := range n.attachments {
		s := a.nowLocked()
		s.Ports = a.savedPortsLocked()
		saved.Attachments = append(saved.Attachments, s)
	}
	for _, s := range n.unadopted {
		if n.attachments[s.Name] == nil {
			saved.Attachments = append(saved.Attachments, s)
		}
	}
	slices.SortFunc(saved.Attachments, func(a, b savedAttachment) int { return strings.Compare(a.Name, b.Name) })
	return writeState(filepath.Join(n.cfg.StateDir, attachmentsFile), saved)
}

// addrs are the container's addresses.
func (s *savedAttachment) addrs() []netip.Addr {
	if s.Addr6.IsValid() {
		return []netip.Addr{s.Addr.Addr(), s.Addr6.Addr()}
	}
	return []netip.Addr{s.Addr.Addr()}
}

// sources are where what comes from the namespace may come from: its addresses, or the subnet behind it.
func (s *savedAttachment) sources() (sources []netip.Prefix) {
	if s.Gateway {
		return []netip.Prefix{s.Addr.Masked()}
	}
	for _, a := range s.addrs() {
		sources = append(sources, netip.PrefixFrom(a, a.BitLen()))
	}
	return sources
}

// where is how a person would name the attached namespace; of a loose attachment, where it was made.
func (s *savedAttachment) where() string {
	if s.Loose {
		return (&savedAttachment{PID: s.Home.PID, Netns: s.Home.Netns, Inode: s.Home.Inode}).where()
	}
	switch {
	case s.Netns != "":
		return s.Netns
	case s.PID != 0:
		return "pid " + strconv.Itoa(s.PID)
	}
	return "net:[" + strconv.FormatUint(s.Inode, 10) + "]" // as lsns(8) and /proc do
}

var procNetns = regexp.MustCompile(`^/proc/(\d+)/(?:task/\d+/)?ns/net$`)

// defaultName names an attachment after its pid, or after the last element of its path; a loose one after its interface.
func defaultName(r api.AttachRequest) string {
	text := filepath.Base(r.Netns)
	m := procNetns.FindStringSubmatch(r.Netns)
	switch {
	case r.Loose: // there may be several in a namespace
		text = r.IfName
	case r.PID != 0:
		return "pid-" + strconv.Itoa(r.PID)
	case m != nil:
		return "pid-" + m[1]
	}
	name := strings.TrimLeft(strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("_.-", c) {
			return c
		}
		return '-'
	}, text), "_.-")
	if len(name) > 59 {
		name = name[:59]
	}
	if api.CheckName(name) != nil { // nothing left of it, or digits alone
		name = "ns-" + name
	}
	return strings.TrimRight(name, "-")
}

// macPrefix begins the MACs that macOf makes: locally administered, unicast.
var macPrefix = [2]byte{0x02, 0x6f}

// macOf is an address made from the IPv4 address, so unique within the overlay.
func macOf(addr netip.Addr) [6]byte {
	a := addr.As4()
	return [6]byte{macPrefix[0], macPrefix[1], a[0], a[1], a[2], a[3]}
}

func macText(m [6]byte) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// attachError gives an error of an attach its code and says what was being attached.
func attachError(r api.AttachRequest, err error) error {
	what := fmt.Sprintf("attach pid %d", r.PID)
	switch {
	case r.Netns != "":
		what = "attach " + r.Netns
	case r.NetnsFD != 0:
		what = fmt.Sprintf("attach descriptor %d", r.NetnsFD)
	}
	code := codeOf(err)
	subject := fmt.Sprintf("process %d", r.PID)
	if r.Netns != "" {
		subject = r.Netns
	}
	if rest, named := strings.CutPrefix(err.Error(), subject); named && strings.HasPrefix(strings.TrimPrefix(rest, ":"), " ") {
		what = "attach"
	}
	if r.NetnsFD != 0 || r.Loose { // an engine has asked: its numbers say nothing to people who know the container
		switch {
		case r.Name != "":
			what = fmt.Sprintf("attach %q", r.Name)
		case r.Owner != "":
			what = "attach " + r.Owner
		}
	}
	return api.Errorf(code, "%s: %w", what, err)
}

// codeOf is the code of an error about attachments and addresses.
func codeOf(err error) api.Code {
	var coded *api.Error
	is := func(targets ...error) bool {
		return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
	}
	switch {
	case errors.As(err, &coded):
		return coded.Code
	case is(nsutil.ErrNotOwner, nsutil.ErrTunDevice):
		return api.CodeDenied
	case is(nsutil.ErrNoProcess, nsutil.ErrNoPath, nsutil.ErrGone):
		return api.CodeNotFound
	case is(nsutil.ErrHostNamespace, nsutil.ErrNotNetns, nsutil.ErrInvalid, nsutil.ErrIfName, ErrAddrInvalid):
		return api.CodeInvalid
	case is(nsutil.ErrIfNameTaken, nsutil.ErrRouteTaken, nsutil.ErrTAPBusy, ErrAddrInUse):
		return api.CodeInUse
	case is(ErrNoAddrsLeft):
		return api.CodeExhausted
	case is(errNoSubnetHeld, nsutil.ErrTimeout, context.Canceled, context.DeadlineExceeded):
		return api.CodeUnavailable
	}
	return api.CodeInternal
}
