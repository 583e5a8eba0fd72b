// This file is about attachments whose interface somebody else configures (AttachRequest.Loose): docker, say, whose daemon takes an
// interface out of its own namespace, names it eth0 in the container's and gives it its address. We make the TAP and hold it; its descriptor goes
// on working wherever the device is.
//
//	made      in the namespace that was asked for, its home: down
//	taken     in another namespace, under another name; that is written down, so that the next daemon finds it
//	returned  at home again and down, as docker leaves it when the container is disconnected, before it says so
//
// It ends when it is detached and when the device is gone, as with every attachment. And since whoever took it may be killed: when it lies at home
// unused, and when nothing is left in the namespace where it is. Of the latter nobody tells us, for a namespace lives as long as we hold something
// of it.

package node

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// loosePrefix begins the names of interfaces for which none was asked for: rovl and eight hexadecimal digits.
const loosePrefix = "rovl"

// looseTimes are how long what may last.
type looseTimes struct {
	first    time.Duration // between looks where it is, until it has been taken
	poll     time.Duration // and from then on
	untaken  time.Duration // at home: nobody has taken it
	returned time.Duration // at home again
	empty    time.Duration // in a namespace that all processes have left
	kept     time.Duration // likewise, but it is still mounted somewhere
	starting time.Duration // in a namespace where no process has been yet, and that is not mounted
}

// Docker takes an interface within some milliseconds, and tells of one that it has brought back at once.
var usualLooseTimes = looseTimes{first: 100 * time.Millisecond, poll: time.Second, untaken: time.Minute, returned: 15 * time.Second, empty: inodeGrace, kept: inodeKept, starting: inodeFirst}

// savedHome is where a loose TAP was made.
type savedHome struct {
	PID       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"start_time,omitempty"`
	Netns     string `json:"netns,omitempty"`
	Inode     uint64 `json:"inode"`
}

// whereabouts are where a loose TAP is.
type whereabouts struct {
	nsutil.Place
	pid int // a process there; 0: none is known
}

var errNotTaken = errors.New("nobody has taken its interface to a container yet, or has configured it there")

// looseIfName is a name for an interface that will get another.
func looseIfName() string {
	var b [4]byte
	rand.Read(b[:])
	return loosePrefix + hex.EncodeToString(b[:])
}

// looseMark is an alias for an interface that only who may look at it knows: MAC addresses and names are anybody's to choose, in a namespace of his own.
func looseMark() string {
	var b [16]byte
	rand.Read(b[:])
	return loosePrefix + " " + hex.EncodeToString(b[:])
}

// makeLoose makes s that of an interface that somebody takes.
func (s *savedAttachment) makeLoose() {
	s.Loose, s.Mark = true, looseMark()
	s.Home = savedHome{PID: s.PID, StartTime: s.StartTime, Netns: s.Netns, Inode: s.Inode}
	s.PID, s.StartTime, s.Netns = 0, 0, ""
}

// nowLocked is the attachment as it is now: a loose one moves.
func (a *attachment) nowLocked() savedAttachment {
	s := a.saved
	s.Entered = a.entered
	if s.Loose {
		s.Inode, s.IfName = a.at.Inode, a.at.IfName
	}
	return s
}

// looseTAP is the TAP of a loose attachment with that mark, where c is that of an ordinary one.
func looseTAP(c nsutil.TAPConfig, mark string) nsutil.TAPConfig {
	c.Addrs, c.Routes, c.Loose, c.Alias = nil, nil, true, mark
	return c
}

// looseWatch tells of the end of a loose attachment. track is who finds out.
type looseWatch struct {
	done, stop chan struct{}
	once       sync.Once
	entered    bool   // a process has been seen where it is
	why        string // constant once done is closed
}

// newLooseWatch is the watch of an attachment; entered tells whether an earlier daemon has seen a process where it is.
func newLooseWatch(entered bool) *looseWatch {
	return &looseWatch{done: make(chan struct{}), stop: make(chan struct{}), entered: entered}
}

func (w *looseWatch) Done() <-chan struct{} { return w.done }

// Why is what has ended it, when Done is closed.
func (w *looseWatch) Why() string { return w.why }

func (w *looseWatch) Close() error {
	w.once.Do(func() { close(w.stop) })
	return nil
}

// track looks where the TAP of a loose attachment is, until the attachment ends, or should.
func (n *Node) track(a *attachment, w *looseWatch) {
	t := n.loose
	f := follower{n: n, a: a, seen: w.entered}
	for {
		wait := t.poll
		if !f.taken {
			wait = t.first
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-w.stop:
			timer.Stop()
			return
		case <-n.stopping:
			timer.Stop()
			return
		}
		if why := f.look(time.Now()); why != "" {
			w.why = why
			close(w.done)
			return
		}
	}
}

// follower is what track remembers.
type follower struct {
	n     *Node
	a     *attachment
	taken bool      // it has been elsewhere than at home
	seen  bool      // there was a process in the namespace where it is
	where string    // which, as of edges.findInode; empty: none is known
	idle  time.Time // since when nobody has used it; zero: somebody does
}

// look tells why the attachment is to end; "" if it is not.
func (f *follower) look(now time.Time) (why string) {
	f.n.mu.Lock()
	l := f.a.link
	f.n.mu.Unlock()
	if l == nil { // it is being taken off
		return ""
	}
	at, err := l.place()
	switch {
	case errors.Is(err, nsutil.ErrNoTAP):
		return "its interface is gone, or the namespace that it was in"
	case err != nil: // nothing can be known, so nothing is concluded
		f.idle = time.Time{}
		return ""
	}
	if f.n.notePlace(f.a, at) {
		f.seen, f.where, f.idle = false, "", time.Time{}
	}
	home := at.Inode == f.a.saved.Home.Inode
	f.taken = f.taken || !home
	limit, why := f.limit(at.Inode, home)
	if limit == 0 {
		f.idle = time.Time{}
		return ""
	}
	if f.idle.IsZero() {
		f.idle = now
	}
	if now.Sub(f.idle) < limit {
		return ""
	}
	if home && f.up(l, at) { // somebody uses it where it was made, if anybody is there
		if process, mounted := f.occupied(at.Inode); process || mounted {
			f.idle = time.Time{}
			return ""
		}
	}
	return why
}

// limit is how long it may be as it is now before it ends, and why it ends then; 0: for ever.
func (f *follower) limit(inode uint64, home bool) (limit time.Duration, why string) {
	t := &f.n.loose
	switch {
	case home && f.taken:
		return t.returned, "its interface has been given back"
	case home:
		return t.untaken, "nobody has taken its interface"
	}
	switch process, mounted := f.occupied(inode); {
	case process, mounted && !f.seen:
		return 0, ""
	case mounted:
		return t.kept, "its container has ended"
	case f.seen:
		return t.empty, "its container has ended"
	}
	return t.starting, "its container has not been started"
}

// occupied tells whether there is a process in the namespace, or else something that keeps it.
func (f *follower) occupied(inode uint64) (process, mounted bool) {
	where, err := f.n.edges.findInode(inode, f.where)
	switch {
	case errors.Is(err, nsutil.ErrGone):
	case err != nil: // it could not be looked for, so nothing is concluded
		return true, false
	case nsutil.IsMount(where):
		mounted = true
	default:
		if where != f.where {
			f.n.noteProcess(f.a, pidOfPath(where))
		}
		f.where, f.seen = where, true
		f.n.noteEntered(f.a)
		return true, false
	}
	f.where = ""
	f.n.noteProcess(f.a, 0)
	return false, mounted
}

// up tells whether the device is up.
func (f *follower) up(l link, at nsutil.Place) bool {
	ns, err := l.openNamespace()
	if err != nil {
		return false
	}
	defer ns.Close()
	list, err := ns.taps()
	return err == nil && slices.ContainsFunc(list, func(d nsutil.Device) bool { return d.IfName == at.IfName && d.Up })
}

// notePlace remembers where a loose TAP is, and reports whether that is another place than before.
func (n *Node) notePlace(a *attachment, at nsutil.Place) (moved bool) {
	n.mu.Lock()
	if a.at.Place == at || a.phase != live {
		n.mu.Unlock()
		return false
	}
	moved = a.at.Inode != at.Inode
	a.at.Place = at
	if moved {
		a.at.pid, a.entered = 0, false
	}
	err, name := n.saveAttachmentsLocked(), a.saved.Name
	n.mu.Unlock()
	if err != nil {
		n.log.Error("attachments not saved, so that the next start would not take them up as they are: see whether the disk is full", "err", err)
	}
	n.log.Debug("interface moved or named", "name", name, "ifname", at.IfName, "netns", at.Inode, "home", at.Inode == a.saved.Home.Inode)
	n.renewInside(a, at)
	return moved
}

func (n *Node) noteProcess(a *attachment, pid int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	a.at.pid = pid
}

// pidOfPath is the process whose network namespace a path is, or 0.
func pidOfPath(path string) int {
	m := procNetns.FindStringSubmatch(path)
	if m == nil {
		return 0
	}
	pid, err := strconv.Atoi(m[1])
	if err != nil { // more digits than a pid has
		return 0
	}
	return pid
}

// renewInside has published ports reach the TAP by sockets of the namespace where it is, and not of that where it was.
func (n *Node) renewInside(a *attachment, at nsutil.Place) {
	n.portsMu.Lock()
	defer n.portsMu.Unlock()
	if s := a.inside.sockets.Load(); s != nil {
		if a.inside.at == at {
			return
		}
		a.inside.sockets.Store(nil)
		if err := (*s).Close(); err != nil {
			n.log.Debug("sockets in a container's namespace", "name", n.nameOf(a), "err", err)
		}
	}
	a.inside.never = false
	n.mu.Lock()
	list := slices.Clone(a.ports)
	n.mu.Unlock()
	n.openInside(a, list)
	n.retryLater(a)
}

// looseSockets makes sockets in the namespace where a loose TAP is. The caller holds portsMu.
func (n *Node) looseSockets(a *attachment) (kernelSockets, error) {
	n.mu.Lock()
	l, s := a.link, a.saved
	n.mu.Unlock()
	if l == nil {
		return nil, errNotTaken
	}
	at, err := l.place()
	if err != nil {
		return nil, err
	}
	if at.Inode == s.Home.Inode {
		return nil, errNotTaken
	}
	ns, err := l.openNamespace()
	if err != nil {
		return nil, err
	}
	s.IfName = at.IfName
	sockets, err := ns.sockets(s)
	if err != nil {
		if errors.Is(err, unix.EADDRNOTAVAIL) { // it does not have its address yet
			err = errNotTaken
		}
		return nil, errors.Join(err, ns.Close())
	}
	a.inside.at = at
	return sockets, nil
}

// findLoose finds the namespace where a loose TAP of an earlier daemon is now, and puts that into s. Where it was last seen is looked at first,
// then its home, then every namespace of ours: it may have been moved while there was no daemon. One without a mark may be in the first two only.
func (n *Node) findLoose(s *savedAttachment) (namespace, error) {
	var tried []uint64
	look := func(open func() (namespace, error)) namespace {
		ns, err := open()
		if err != nil {
			return nil
		}
		if slices.Contains(tried, ns.Inode()) || !n.hasLoose(ns, s) {
			tried = append(tried, ns.Inode())
			ns.Close()
			return nil
		}
		return ns
	}
	for _, inode := range []uint64{s.Inode, s.Home.Inode} {
		if path, err := n.edges.findInode(inode, s.Home.Netns); err == nil {
			if ns := look(func() (namespace, error) { return n.edges.openPath(path) }); ns != nil {
				return ns, nil
			}
		}
	}
	var all map[uint64]int
	if s.Mark != "" {
		var err error
		if all, err = n.edges.netnses(); err != nil {
			return nil, err
		}
	}
	for inode, pid := range all {
		if slices.Contains(tried, inode) {
			continue
		}
		if ns := look(func() (namespace, error) { return n.edges.openPID(pid) }); ns != nil {
			return ns, nil
		}
	}
	return nil, errors.New("its interface is gone, or the namespace that it was in")
}

// hasLoose tells whether the TAP of s is in ns, and puts its name there into s.
func (n *Node) hasLoose(ns namespace, s *savedAttachment) bool {
	list, err := ns.taps()
	if err != nil {
		return false
	}
	is := func(d nsutil.Device) bool { return d.Alias == s.Mark }
	if s.Mark == "" {
		is = func(d nsutil.Device) bool { return macText(d.MAC) == s.MAC }
	}
	i := slices.IndexFunc(list, is)
	if i < 0 && s.Mark == "" { // with another MAC address, it is told by its name where it was last
		i = slices.IndexFunc(list, func(d nsutil.Device) bool { return d.IfName == s.IfName && ns.Inode() == s.Inode })
	}
	if i < 0 {
		return false
	}
	s.Entered = s.Entered && ns.Inode() == s.Inode
	s.Inode, s.IfName = ns.Inode(), list[i].IfName
	return true
}
