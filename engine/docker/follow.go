// This file follows dockerds: when one can be reached, what has changed unseen is set right, and then its events are listened to.

package docker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	// connectPatience is how long a dockerd that calls is tried, each connectPause: it calls before it answers, and has gone for a while when
	// it is restarted. Then nobody tries until it calls again.
	connectPatience = 2 * time.Minute
	connectPause    = time.Second
	// namesPause is how often names are tried again that somebody else had.
	namesPause = 30 * time.Second
	// atOnce is about how many containers dockerd is asked at a time, and maxWaiting how many more wait to be asked about: dockerd's events
	// cannot be left unread meanwhile, dockerd throws them away. When more come all containers are looked at.
	atOnce     = 8
	maxWaiting = 1024
	// identityLimit is how long a dockerd may take to say which one it is.
	identityLimit = 10 * time.Second
)

// following is what runs during Follow.
type following struct {
	d     *Driver
	ctx   context.Context
	tasks sync.WaitGroup

	mu    sync.Mutex
	kicks map[string]chan struct{} // by socket, one element when its dockerd has called
}

// Follow follows the dockerds that are known and those that call, until ctx ends. It is called once.
func (d *Driver) Follow(ctx context.Context) error {
	f := &following{d: d, ctx: ctx, kicks: make(map[string]chan struct{})}
	d.following.Store(f)
	for _, socket := range d.sockets.all() {
		f.kick(socket)
	}
	<-ctx.Done()
	d.following.Store(nil)
	f.mu.Lock()
	f.kicks = nil
	f.mu.Unlock()
	f.tasks.Wait()
	return nil
}

// seen has the dockerd that calls followed.
func (d *Driver) seen(pid int) {
	f := d.following.Load()
	if f == nil || pid == 0 {
		return
	}
	for _, socket := range d.peek(pid).Sockets {
		f.kick(socket)
	}
}

// kick has a socket tried again, for the first time or after it was given up.
func (f *following) kick(socket string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.kicks == nil {
		return
	}
	if err := f.d.sockets.add(socket); err != nil {
		f.d.log.Warn("the socket of dockerd is not remembered", "socket", socket, "err", err)
	}
	c, known := f.kicks[socket]
	if !known {
		if len(f.kicks) >= maxSockets {
			return
		}
		c = make(chan struct{}, 1)
		f.kicks[socket] = c
		f.tasks.Go(func() { f.one(socket, c) })
	}
	select {
	case c <- struct{}{}:
	default:
	}
}

// gaveUp forgets a socket where nobody answers, unless it was kicked just now, and tells whether it did.
func (f *following) gaveUp(socket string, kicked <-chan struct{}) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.kicks == nil {
		return true
	}
	if len(kicked) > 0 {
		return false
	}
	delete(f.kicks, socket)
	if err := f.d.sockets.remove(socket); err != nil {
		f.d.log.Warn("the socket of a dockerd that has gone stays remembered", "socket", socket, "err", err)
	}
	return true
}

// one follows the dockerd of a socket, and those after it, until nobody answers there for connectPatience.
func (f *following) one(socket string, kicked <-chan struct{}) {
	giveUp := time.Now().Add(f.d.connectPatience)
	for f.ctx.Err() == nil {
		select {
		case <-kicked:
			giveUp = time.Now().Add(f.d.connectPatience)
		default:
		}
		if time.Now().After(giveUp) && f.gaveUp(socket, kicked) {
			return
		}
		if f.listen(socket) {
			giveUp = time.Now().Add(f.d.connectPatience)
		}
		f.d.pause(f.ctx, connectPause)
	}
}

// pause all, and tells whether ctx goes on.
func (d *Driver) pause(ctx context.Context, t time.Duration) bool {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// listen listens to a dockerd's events until it goes away, and tells whether it was there.
func (f *following) listen(socket string) (there bool) {
	ctx, cancel := context.WithCancel(f.ctx)
	conn := newDockerd(socket)
	var tasks sync.WaitGroup
	defer conn.close()
	defer tasks.Wait()
	defer cancel()
	changed, missed := make(chan string, maxWaiting), make(chan struct{}, 1)
	for range atOnce {
		tasks.Go(func() { f.nameChanged(ctx, conn, changed) })
	}
	err := conn.events(ctx, func() {
		there = true
		f.d.log.Debug("following dockerd", "socket", socket)
		tasks.Go(func() { f.d.setRight(ctx, conn, missed) })
	}, func(e event) {
		id := e.containerID()
		if id == "" {
			return
		}
		select {
		case changed <- id:
			return
		default:
		}
		select {
		case missed <- struct{}{}:
		default: // it is known already
		}
	})
	f.d.log.Debug("dockerd is not followed", "socket", socket, "err", err)
	return there
}

// nameChanged names the containers that events are about, until ctx ends.
func (f *following) nameChanged(ctx context.Context, conn *dockerd, changed <-chan string) {
	for {
		select {
		case id := <-changed:
			f.d.nameAfterEvent(ctx, conn, id)
		case <-ctx.Done():
			return
		}
	}
}

// errUnsure is for a dockerd that was there and does not answer now: what it has is not known.
var errUnsure = errors.New("another dockerd does not answer")

// setRight looks at dockerd's containers: their names, and what of ours belongs to none of them any more. Names that somebody else had are
// tried again as long as ctx lasts, and all of them where events were missed.
func (d *Driver) setRight(ctx context.Context, conn *dockerd, missed <-chan struct{}) {
	for { // a node that starts has not taken up its attachments yet
		_, err := d.ready(ctx)
		if err == nil {
			break
		}
		if !d.pause(ctx, connectPause) {
			return
		}
	}
	err := d.tidy(ctx, conn, anyEndpoint)
	if err != nil && !errors.Is(err, errUnsure) && ctx.Err() == nil {
		d.log.Warn("dockerd's containers cannot be listed, so what ended while nobody looked stays for now", "err", err)
	}
	tidied := err == nil
	tick := time.NewTicker(namesPause)
	defer tick.Stop()
	for {
		which, all := d.isRefused, false
		select {
		case <-missed:
			which, all = anyEndpoint, true
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		var err error
		switch {
		case !tidied:
			err = d.tidy(ctx, conn, which)
			tidied = err == nil
		case all || len(d.allRefused()) > 0:
			_, err = d.look(ctx, conn, which)
		}
		if err != nil {
			d.log.Debug("dockerd's containers", "err", err)
		}
	}
}

func anyEndpoint(string) bool { return true }

// tidy drops what docker has forgotten, if there is no other dockerd that may know of it. The error is errUnsure if that cannot be told yet.
func (d *Driver) tidy(ctx context.Context, conn *dockerd, which func(endpoint string) bool) error {
	before, err := d.look(ctx, conn, which)
	if err != nil || !before.any() {
		return err
	}
	if alone, err := d.alone(ctx, conn); err != nil || !alone {
		return err
	}
	if !d.pause(ctx, d.settle) {
		return nil
	}
	now, err := d.look(ctx, conn, which)
	if err != nil {
		return err
	}
	gone := before.and(now)
	if !gone.any() {
		return nil
	}
	if err := gone.keepStarting(ctx, conn); err != nil {
		return err
	}
	if alone, err := d.alone(ctx, conn); err != nil || !alone {
		return err
	}
	d.drop(ctx, gone)
	return nil
}

// alone tells whether all the sockets that are known are this dockerd's. One that does not answer counts until it is given up: a dockerd that is
// restarted has its containers again.
func (d *Driver) alone(ctx context.Context, conn *dockerd) (bool, error) {
	its, err := conn.identity(ctx)
	if err != nil {
		return false, err
	}
	var silent error
	for _, socket := range d.sockets.all() {
		other := newDockerd(socket)
		who, err := other.identity(ctx)
		other.close()
		switch {
		case err != nil:
			silent = fmt.Errorf("%w: %s: %w", errUnsure, socket, err)
		case who != its:
			return false, nil
		}
	}
	return silent == nil, silent
}

// orphans are what docker has of ours and knows nothing of: attachments by endpoint, and reserved addresses. An endpoint of a container that is
// being started looks like one.
type orphans struct {
	endpoints map[string]api.Attachment
	addresses map[string]bool
}

func (o orphans) any() bool { return len(o.endpoints)+len(o.addresses) > 0 }

// and is what is in both, and has not been made anew between them.
func (o orphans) and(later orphans) orphans {
	both := orphans{endpoints: make(map[string]api.Attachment), addresses: make(map[string]bool)}
	for id, a := range o.endpoints {
		if b, still := later.endpoints[id]; still && a.Since.Equal(b.Since) {
			both.endpoints[id] = b
		}
	}
	for addr := range o.addresses {
		if later.addresses[addr] {
			both.addresses[addr] = true
		}
	}
	return both
}

// keepStarting takes out what containers have that dockerd does not list as running. It says what one has that is being started when that is done.
func (o orphans) keepStarting(ctx context.Context, conn *dockerd) error {
	list, err := conn.all(ctx)
	if err != nil {
		return err
	}
	for _, c := range list {
		if c.State != "running" {
			switch c.container, err = conn.inspect(ctx, c.ID); {
			case errors.Is(err, errNotThere):
				continue
			case err != nil:
				return err
			}
		}
		for _, e := range c.NetworkSettings.Networks {
			delete(o.endpoints, e.EndpointID)
			delete(o.addresses, e.IPAddress)
		}
	}
	return nil
}

// look goes through dockerd's containers, names those of ours that have an endpoint of which, and tells what is no container's of this dockerd.
func (d *Driver) look(ctx context.Context, conn *dockerd, which func(endpoint string) bool) (orphans, error) {
	refused := d.allRefused() // before the attachments are listed: what is refused later may not be among them
	ours, err := d.endpoints(ctx)
	if err != nil {
		return orphans{}, err
	}
	for _, endpoint := range refused {
		if _, is := ours[endpoint]; !is {
			d.forget(endpoint)
		}
	}
	unused, err := d.unused(ctx)
	if err != nil || len(ours)+len(unused) == 0 {
		return orphans{}, err
	}
	list, err := conn.running(ctx)
	if err != nil {
		return orphans{}, err
	}
	o := orphans{maps.Clone(ours), unused}
	find := func(endpoint string) (api.Attachment, bool) {
		a, is := ours[endpoint]
		return a, is
	}
	for _, c := range list {
		mine := false
		for _, e := range c.NetworkSettings.Networks {
			if _, is := ours[e.EndpointID]; is {
				mine = mine || which(e.EndpointID)
				delete(o.endpoints, e.EndpointID)
			}
			delete(o.addresses, e.IPAddress)
		}
		if mine {
			d.nameContainer(ctx, conn, c.ID, find)
		}
	}
	return o, nil
}

// endpoints are docker's attachments, by the ids of their endpoints.
func (d *Driver) endpoints(ctx context.Context) (map[string]api.Attachment, error) {
	list, err := d.api.Attachments(ctx)
	if err != nil {
		return nil, err
	}
	byID := make(map[string]api.Attachment)
	for _, a := range list {
		if id, is := endpointOf(a.Owner); is {
			byID[id] = a
		}
	}
	return byID, nil
}

// drop takes off what docker has forgotten.
func (d *Driver) drop(ctx context.Context, o orphans) {
	for id, a := range o.endpoints {
		if err := d.detach(ctx, id); err != nil {
			d.log.Warn("docker has no such container any more, but it cannot be detached", "name", a.Name, "addr", a.Addr, "err", err)
			continue
		}
		d.forget(id)
		d.log.Info("detached: docker has no such container any more", "name", a.Name, "addr", a.Addr)
		if addr, err := addrOf(a.Addr); err == nil {
			o.addresses[addr.String()] = true
		}
	}
	for addr := range o.addresses {
		d.takeBack(addr)
		if err := d.api.ReleaseAddress(ctx, addr); err != nil && !errors.Is(err, api.ErrNotFound) {
			d.log.Warn("docker has no container with this address any more, but it cannot be released", "addr", addr, "err", err)
		}
	}
}
