// This file has a node take the place of one that runs (`up --replace`): the new process gets the descriptors of the old one, and no packet of the overlay
// is lost.
//
//	new  asks over the API's socket                      old  holds back changes, writes its state down, sends the descriptors
//	new  makes router, gateway, routes, attachments      old  forwards
//	new  is ready                                        old  resets the gateway's connections, stops its poll loops
//	new  starts its poll loops, serves                        packets wait in TAPs and sockets meanwhile
//	new  waits                                           old  ends, closes the embedded store; nothing is revoked
//	new  opens the store, confirms the lease: resume.go
//
// Up to the switch the old one goes on as if nothing had been when anything fails. From then on all is on disk, for a supervisor to start again.
// Both are of one user: the kernel says whose the socket and whose the connection is.

package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/handover"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

const (
	pathHandover     = "/v1/handover"
	handoverProtocol = "rootless-ovl-handover"

	// handoverTalk bounds what one waits for the other to say, handoverWork what the new one takes to make itself ready, and the old one to end.
	handoverTalk = 5 * time.Second
	handoverWork = time.Minute

	saysReady, saysYours = 'R', 'Y'
)

// What descriptors are of.
const (
	givenLock    = "lock"     // of the state directory
	givenAPILock = "api-lock" // of the runtime directory
	givenAPI     = "api"
	givenBeside  = "beside" // by name
	givenHealth  = "health"
	givenProxy   = "proxy"
	givenTAP     = "tap"  // by attachment
	givenPort    = "port" // by attachment and port
)

// claim is what the new one says first.
type claim struct {
	StateDir string `json:"state_dir"`
}

// offer is the answer; of what the descriptors are, in their order: the underlay's sockets, then the items.
type offer struct {
	Refused   string                `json:"refused,omitempty"` // why there is nothing
	PID       int                   `json:"pid"`
	Version   string                `json:"version,omitempty"`   // of the program
	Notify    string                `json:"notify,omitempty"`    // systemd's socket
	Activated bool                  `json:"activated,omitempty"` // the API's socket is systemd's
	Underlay  []forwarder.SocketSet `json:"underlay,omitempty"`
	Items     []givenItem           `json:"items,omitempty"`
}

type givenItem struct {
	givenKey
	Count int  `json:"count"`
	USO   bool `json:"uso,omitempty"` // of a TAP
}

// givenKey tells items apart.
type givenKey struct {
	Kind string    `json:"kind"`
	Name string    `json:"name,omitempty"`
	Port savedPort `json:"port,omitzero"`
}

// count is how many descriptors belong to it; -1 is what cannot be.
func (o *offer) count() int {
	n := 0
	for _, s := range o.Underlay {
		if s.Loops < 0 || s.Lanes < 0 || s.Loops > handover.MaxDescriptors || s.Lanes > handover.MaxDescriptors {
			return -1
		}
		n += s.Count()
	}
	for _, i := range o.Items {
		if i.Count < 0 || i.Count > handover.MaxDescriptors {
			return -1
		}
		n += i.Count
	}
	return n
}

// inheritance is what a node got from the one that it replaces. Its descriptors are duplicated by whoever uses them.
type inheritance struct {
	offer
	conn     *net.UnixConn // on which the other tells that it has ended, by closing it
	fds      []int
	sockets  []forwarder.GivenSockets
	items    map[givenKey]givenItem
	byKey    map[givenKey][]int
	switched bool
}

// claimPlace asks the daemon that runs for all that it has.
func (n *Node) claimPlace(ctx context.Context) (*inheritance, error) {
	conn, err := n.callRunning(ctx)
	if err != nil {
		return nil, err
	}
	in := &inheritance{conn: conn, items: make(map[givenKey]givenItem), byKey: make(map[givenKey][]int)}
	stop := closeAtEnd(ctx, conn)
	err = handover.Send(conn, claim{StateDir: n.cfg.StateDir}, nil, handoverTalk)
	if err == nil {
		in.fds, err = handover.Receive(conn, &in.offer, in.count, handoverWork)
	}
	if !stop() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err == nil && in.Refused != "" {
		err = api.Errorf(api.CodeInUse, "the daemon that runs (pid %d) does not hand over: %s", in.PID, in.Refused)
	}
	if err != nil {
		in.close()
		return nil, err
	}
	left := in.fds
	for _, s := range in.Underlay {
		in.sockets = append(in.sockets, forwarder.GivenSockets{SocketSet: s, FDs: left[:s.Count()]})
		left = left[s.Count():]
	}
	for _, i := range in.Items {
		in.items[i.givenKey], in.byKey[i.givenKey] = i, left[:i.Count]
		left = left[i.Count:]
	}
	if in.Notify != "" && os.Getenv("NOTIFY_SOCKET") == "" {
		if err := os.Setenv("NOTIFY_SOCKET", in.Notify); err != nil {
			n.log.Warn("systemd will not be told", "err", err)
		}
	}
	n.log.Info("taking the place of the daemon that runs", "pid", in.PID, "version", in.Version, "descriptors", len(in.fds))
	return in, nil
}

// closeAtEnd closes conn when ctx ends, which ends all waiting on it, until stop is called. stop tells whether that is still to come.
func closeAtEnd(ctx context.Context, conn net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = conn.Close() })
}

// callRunning reaches the daemon of the runtime directory, and has the connection be one for the handover.
func (n *Node) callRunning(ctx context.Context) (*net.UnixConn, error) {
	path := n.cfg.Socket()
	if err := api.CheckRuntimeDir(n.cfg.RuntimeDir); err != nil {
		return nil, err
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, api.Errorf(api.CodeUnavailable, "no daemon runs at %s whose place could be taken: start this one without --replace", path)
	}
	if err != nil {
		return nil, fmt.Errorf("the daemon that runs: %w", err)
	}
	stop := closeAtEnd(ctx, c)
	conn, ok := c.(*net.UnixConn)
	if err = errors.New("not a unix socket"); ok {
		err = n.askForHandover(conn)
	}
	if !stop() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return conn, nil
}

func (n *Node) askForHandover(conn *net.UnixConn) error {
	cred, err := credOf(conn)
	if err != nil {
		return fmt.Errorf("whose the daemon is: %w", err)
	}
	if !mayHandOver(cred.Uid) {
		return api.Errorf(api.CodeDenied, "the daemon at %s is of uid %d, not yours (uid %d)", n.cfg.Socket(), cred.Uid, os.Geteuid())
	}
	_ = conn.SetDeadline(time.Now().Add(2 * handoverTalk))
	_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: rootless-ovl\r\nConnection: Upgrade\r\nUpgrade: %s\r\nContent-Length: 0\r\n\r\n", pathHandover, handoverProtocol)
	if err != nil {
		return fmt.Errorf("the daemon that runs: %w", err)
	}
	// It says nothing more until it is asked: a reader of bytes would lose descriptors.
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return fmt.Errorf("the daemon that runs: %w", err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols && resp.Header.Get("Upgrade") == handoverProtocol {
		return nil
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return api.Errorf(api.CodeInvalid, "the daemon that runs is of a version that cannot hand over: stop it (`rootless-ovl down`) and start this one without --replace")
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	return api.Errorf(api.CodeInUse, "the daemon that runs does not hand over: %s: %s", resp.Status, strings.TrimSpace(string(text)))
}

// mayHandOver tells whether a listener is to be trusted that was of that user when it began to listen. One that the system's systemd holds for us is root's.
func mayHandOver(uid uint32) bool { return int(uid) == os.Geteuid() || uid == 0 }

func credOf(conn *net.UnixConn) (cred *unix.Ucred, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(err, cerr)
}

// get are the descriptors of something, which stay ours.
func (in *inheritance) get(k givenKey) []int {
	if in == nil {
		return nil
	}
	return in.byKey[k]
}

// file is a duplicate of the one descriptor of something; nil: there is none.
func (in *inheritance) file(k givenKey) (*os.File, error) {
	if in == nil {
		return nil, nil
	}
	fds := in.get(k)
	if len(fds) != 1 {
		return nil, nil
	}
	fd, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s of the daemon that runs: %w", k.Kind, err)
	}
	return os.NewFile(uintptr(fd), k.Kind), nil
}

// listener is a listener of the one before; nil: there is none. Nothing happens to its path when it is closed.
func (in *inheritance) listener(k givenKey) (net.Listener, error) {
	f, err := in.file(k)
	if f == nil {
		return nil, err
	}
	defer f.Close()
	return net.FileListener(f)
}

func (in *inheritance) close() {
	handover.CloseAll(in.fds)
	in.fds = nil
	in.conn.Close()
}

// takePlace is the switch, on the side of the new one: after it the other touches nothing any more that was handed over. The end of ctx means
// nothing any more when the other has been told: whether it has let go then is for it to say.
func (n *Node) takePlace(ctx context.Context) error {
	in := n.given
	if err := ctx.Err(); err != nil {
		return err
	}
	if n.cfg.Replacing != nil {
		if err := n.cfg.Replacing(); err != nil {
			return err
		}
	}
	_ = in.conn.SetDeadline(time.Now().Add(handoverWork))
	if _, err := in.conn.Write([]byte{saysReady}); err != nil {
		return fmt.Errorf("the daemon that was to be replaced: %w", err)
	}
	var b [1]byte
	if _, err := io.ReadFull(in.conn, b[:]); err != nil || b[0] != saysYours {
		return fmt.Errorf("the daemon that was to be replaced (pid %d) did not let go: %w", in.PID, err)
	}
	in.switched = true
	close(n.switched)
	handover.CloseAll(in.fds)
	in.fds = nil
	if !in.Activated {
		n.socket.SetUnlinkOnClose(true)
	}
	if err := errors.Join(n.lock.Truncate(0), writeAt0(n.lock, fmt.Sprintf("%d\n", os.Getpid()))); err != nil {
		n.log.Warn("the lock does not say whose it is", "err", err)
	}
	n.log.Info("took the place of the daemon that ran", "pid", in.PID)
	if n.cfg.Replaced != nil {
		n.cfg.Replaced()
	}
	return nil
}

// awaitEnd waits until the one before has let go of the store, too.
func (n *Node) awaitEnd(ctx context.Context) {
	if n.given == nil {
		return
	}
	defer context.AfterFunc(ctx, func() { _ = n.given.conn.SetDeadline(time.Unix(1, 0)) })()
	_ = n.given.conn.SetDeadline(time.Now().Add(handoverWork))
	if _, err := n.given.conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && ctx.Err() == nil {
		n.log.Warn("the daemon that was replaced has not ended", "pid", n.given.PID, "err", err)
	}
}

// handoverOr answers who asks for a handover, and has h answer the rest: changes not while one is under way, and nothing after one. ctx is Run's.
func (n *Node) handoverOr(ctx context.Context, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == pathHandover {
			n.handOverTo(ctx, w, r)
			return
		}
		if r.Method != http.MethodGet && r.URL.Path != api.PathDial {
			if !n.gate.TryRLock() {
				if !api.ReadAhead(w, r) { // the time for that is less than the gate may be closed
					return
				}
				n.gate.RLock()
			}
			defer n.gate.RUnlock()
		}
		if n.handed.Load() {
			api.WriteReplaced(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func (n *Node) handOverTo(ctx context.Context, w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost || !strings.EqualFold(r.Header.Get("Upgrade"), handoverProtocol) {
		http.Error(w, pathHandover+" is for `rootless-ovl up --replace`", http.StatusBadRequest)
		return
	}
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	conn, ok := c.(*net.UnixConn)
	if ok {
		_ = conn.SetDeadline(time.Now().Add(handoverTalk))
		if _, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", handoverProtocol); err == nil {
			err = n.handOver(ctx, conn)
		}
	}
	if !ok || !n.handed.Load() {
		c.Close()
		n.log.Warn("not handed over; going on", "err", err)
	}
}

// handOver gives all that this node has to the process at the other end, and ends the node; or it leaves everything as it is, as when ctx ends before the
// other is ready. After it nil, conn is closed by the end of Run.
func (n *Node) handOver(ctx context.Context, conn *net.UnixConn) error {
	heir, err := credOf(conn)
	if err != nil {
		return err
	}
	var asked claim
	if err := handover.Read(conn, &asked); err != nil {
		return err
	}
	n.log.Info("another process is to take this one's place: changes wait until it has, or has not", "pid", heir.Pid)
	if !n.lockGate(handoverTalk) {
		return errors.Join(errors.New("a change takes too long"), handover.Send(conn, offer{PID: os.Getpid(), Refused: "a change takes too long: try again"}, nil, handoverTalk))
	}
	defer n.gate.Unlock()
	o, fds, err := n.offered(asked)
	if err != nil {
		return errors.Join(err, handover.Send(conn, offer{PID: os.Getpid(), Refused: err.Error()}, nil, handoverTalk))
	}
	err = handover.Send(conn, o, fds, handoverTalk)
	handover.CloseAll(fds)
	if err != nil {
		return err
	}
	if err := awaitReady(ctx, conn); err != nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		return errors.Join(fmt.Errorf("the process that asked for it (pid %d) gave up: %w", heir.Pid, err), n.saveAttachmentsLocked())
	}
	n.handed.Store(true)
	n.log.Info("handing over", "pid", heir.Pid)
	n.socket.SetUnlinkOnClose(false)
	n.mu.Lock()
	for _, l := range n.besides {
		l.SetUnlinkOnClose(false)
	}
	n.mu.Unlock()
	n.unpublish()
	n.stopCarrying()
	<-n.quiet
	n.heir = conn
	_ = conn.SetDeadline(time.Now().Add(handoverTalk))
	_, err = conn.Write([]byte{saysYours})
	n.notify(fmt.Sprintf("MAINPID=%d", heir.Pid))
	n.endRun()
	return err
}

// awaitReady waits until the process at the other end could take the place, or ctx ends. After an error there is no more to be said to it.
func awaitReady(ctx context.Context, conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(handoverWork))
	stop := closeAtEnd(ctx, conn)
	var b [1]byte
	_, err := io.ReadFull(conn, b[:])
	switch {
	case !stop():
		return errors.Join(context.Cause(ctx), err)
	case err == nil && b[0] != saysReady:
		return fmt.Errorf("it says %q", b)
	}
	return err
}

// lockGate waits for changes under way, but not for ever. New ones wait meanwhile.
func (n *Node) lockGate(patience time.Duration) bool {
	locked := make(chan struct{})
	go func() { // ends with those changes
		n.gate.Lock()
		close(locked)
	}()
	select {
	case <-locked:
		return true
	case <-time.After(patience):
	}
	go func() {
		<-locked
		n.gate.Unlock()
	}()
	return false
}

// offered writes the state down, and collects what is to be handed over; the descriptors are the caller's.
func (n *Node) offered(asked claim) (o offer, fds []int, err error) {
	defer func() {
		if err != nil {
			handover.CloseAll(fds)
		}
	}()
	o = offer{PID: os.Getpid(), Version: n.cfg.Version, Notify: os.Getenv("NOTIFY_SOCKET"), Activated: n.socket.Activated()}
	add := func(k givenKey, c syscall.Conn) {
		var fd int
		if err == nil {
			if fd, err = duplicate(c); err == nil {
				fds = append(fds, fd)
				o.Items = append(o.Items, givenItem{givenKey: k, Count: 1})
			}
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case asked.StateDir != n.cfg.StateDir:
		return o, nil, fmt.Errorf("its state directory is %s, not %s: give the same --state-dir", n.cfg.StateDir, asked.StateDir)
	case !n.open || n.handed.Load():
		return o, nil, fmt.Errorf("it is not ready (%s): wait for that", n.state)
	}
	if err := errors.Join(n.saveLastLocked(), n.saveAttachmentsLocked()); err != nil {
		return o, nil, err
	}
	sets, err := n.router.Sockets()
	if err != nil {
		return o, nil, err
	}
	for _, s := range sets {
		o.Underlay, fds = append(o.Underlay, s.SocketSet), append(fds, s.FDs...)
	}
	add(givenKey{Kind: givenLock}, n.lock)
	add(givenKey{Kind: givenAPILock}, n.socket.Lock())
	add(givenKey{Kind: givenAPI}, n.socket)
	for name, l := range n.besides {
		add(givenKey{Kind: givenBeside, Name: name}, l)
	}
	for kind, l := range map[string]*net.TCPListener{givenHealth: n.health, givenProxy: n.forProxy} {
		if l != nil {
			add(givenKey{Kind: kind}, l)
		}
	}
	for _, a := range n.attachments {
		if a.phase != live || err != nil {
			continue
		}
		fd, uso, derr := a.link.duplicate()
		if derr != nil {
			return o, fds, derr
		}
		fds = append(fds, fd)
		o.Items = append(o.Items, givenItem{givenKey: givenKey{Kind: givenTAP, Name: a.saved.Name}, Count: 1, USO: uso})
		for _, p := range a.ports {
			if p.pub == nil {
				continue
			}
			some, derr := p.pub.Sockets()
			if derr != nil {
				return o, fds, derr
			}
			fds = append(fds, some...)
			o.Items = append(o.Items, givenItem{givenKey: givenKey{givenPort, a.saved.Name, p.saved}, Count: len(some)})
		}
	}
	return o, fds, err
}

// duplicate is another descriptor of a socket or a file. Neither gets another mode by it, as by their own ways.
func duplicate(c syscall.Conn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(of uintptr) { fd, err = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(err, cerr)
}

// The openers of what may have been given.

// openState locks the state directory.
func (n *Node) openState() (*os.File, error) {
	f, err := n.given.file(givenKey{Kind: givenLock})
	if f == nil && err == nil {
		return openStateDir(n.cfg.StateDir)
	}
	return f, err
}

func (n *Node) listenAPI() (*api.Listener, error) {
	k := givenKey{Kind: givenAPI}
	if n.given.get(k) == nil {
		return api.Listen(n.cfg.RuntimeDir)
	}
	lock, err := n.given.file(givenKey{Kind: givenAPILock})
	if err != nil {
		return nil, err
	}
	l, err := n.given.listener(k)
	if u, ok := l.(*net.UnixListener); ok && err == nil {
		return api.Given(n.cfg.RuntimeDir, u, lock, n.given.Activated), nil
	}
	return nil, fmt.Errorf("the API's socket of the daemon that runs: %w", err)
}

// listenBeside is what Config.Beside listens by.
func (n *Node) listenBeside(name string) (net.Listener, error) {
	var beside *api.BesideListener
	n.mu.Lock()
	given := n.givenBesides[name]
	delete(n.givenBesides, name)
	n.mu.Unlock()
	if given != nil {
		given.SetUnlinkOnClose(true)
		beside = api.GivenBeside(given)
	} else {
		var err error
		if beside, err = api.ListenBeside(n.cfg.RuntimeDir, name); err != nil {
			return nil, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.besides[name] = beside
	return beside, nil
}

// takeBesides keeps the sockets beside the API's until somebody listens on them, which is after the switch.
func (n *Node) takeBesides() error {
	for k := range n.given.byKey {
		if k.Kind != givenBeside {
			continue
		}
		l, err := n.given.listener(k)
		u, ok := l.(*net.UnixListener)
		if !ok {
			return fmt.Errorf("the socket %s of the daemon that runs: %w", k.Name, err)
		}
		n.mu.Lock()
		n.givenBesides[k.Name] = u
		n.mu.Unlock()
	}
	return nil
}

// givenTCP is the listener of the one before, if that is where this node is to listen.
func (n *Node) givenTCP(kind string, at netip.AddrPort) (*net.TCPListener, error) {
	l, err := n.given.listener(givenKey{Kind: kind})
	if l == nil || err != nil {
		return nil, err
	}
	t, ok := l.(*net.TCPListener)
	if ok {
		has := t.Addr().(*net.TCPAddr).AddrPort()
		if has.Addr().Unmap() == at.Addr().Unmap() && (at.Port() == 0 || at.Port() == has.Port()) {
			return t, nil
		}
	}
	return nil, l.Close()
}

func (n *Node) givenSockets() []forwarder.GivenSockets {
	if n.given == nil {
		return nil
	}
	return n.given.sockets
}

func (n *Node) givenPortOf(a *attachment, s savedPort) []int {
	if n.isSwitched() {
		return nil
	}
	return n.given.get(givenKey{givenPort, a.saved.Name, s})
}

// sharedTAP is the descriptor of an attachment's TAP, as long as the one before carries its packets.
func (n *Node) sharedTAP(name string) (fd int, ok bool) {
	fds := n.given.get(givenKey{Kind: givenTAP, Name: name})
	if n.isSwitched() || len(fds) != 1 {
		return -1, false
	}
	return fds[0], true
}

// isServed tells whether the one before goes on with an attachment that could not be taken up because of err: then its place must not be taken,
// for the attachment would be lost. What has ended meanwhile keeps nobody: of that one, too, it would be gone in a moment.
func (n *Node) isServed(s *savedAttachment, err error) bool {
	fd, ok := n.sharedTAP(s.Name)
	if !ok || errors.Is(err, errEnded) || n.hasEnded(s) {
		return false
	}
	ns, err := n.edges.namespaceOf(fd)
	if err == nil {
		err = ns.Close()
	}
	return !errors.Is(err, nsutil.ErrNoTAP)
}

// settle changes in the namespaces what this node would have otherwise than the one before, which has let go of them. The caller holds Node.gate.
func (n *Node) settle() {
	n.mu.Lock()
	all := slices.Collect(maps.Values(n.attachments))
	n.mu.Unlock()
	for _, a := range all {
		ns, err := n.openAttached(a)
		if err != nil {
			continue // it has ended
		}
		n.refit(a, ns)
		n.letThrough(a, ns)
		ns.Close()
	}
}

// adoptTAP opens the TAP of an attachment of an earlier daemon.
func (n *Node) adoptTAP(a *attachment, ns namespace) (link, error) {
	k := givenKey{Kind: givenTAP, Name: a.saved.Name}
	fds := n.given.get(k)
	if len(fds) != 1 {
		return ns.adopt(a.saved)
	}
	l, err := n.edges.givenTAP(fds[0], n.given.items[k].USO, a.saved)
	if err != nil {
		return nil, fmt.Errorf("its interface: %w", err)
	}
	return l, nil
}

func (n *Node) isSwitched() bool {
	select {
	case <-n.switched:
		return true
	default:
		return false
	}
}

// untilSwitched waits until what this node has is its alone; false: ctx has ended before.
func (n *Node) untilSwitched(ctx context.Context) bool {
	select {
	case <-n.switched:
		return true
	case <-ctx.Done():
		return n.isSwitched()
	}
}

// shares tells whether another daemon goes on with what this one has in namespaces.
func (n *Node) shares() bool { return n.handed.Load() || !n.isSwitched() }
