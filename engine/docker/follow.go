// This file follows dockerds: when one can be reached, what has changed unseen is set right, and then its events are listened to.

package docker

import (
	"context"
	"errors"
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
	// atOnce is about how many containers dockerd is asked at a time.
	atOnce = 8
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
	for _, socket := range socketsOf(pid) {
		if err := d.sockets.add(socket); err != nil {
			d.log.Warn("the socket of dockerd is not remembered", "socket", socket, "err", err)
		}
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

// one follows the dockerd of a socket, and those after it.
func (f *following) one(socket string, kicked <-chan struct{}) {
	var giveUp time.Time
	for f.ctx.Err() == nil {
		select {
		case <-kicked:
			giveUp = time.Now().Add(connectPatience)
		default:
		}
		if time.Now().After(giveUp) {
			select {
			case <-kicked:
				giveUp = time.Now().Add(connectPatience)
			case <-f.ctx.Done():
				return
			}
		}
		if f.listen(socket) {
			giveUp = time.Now().Add(connectPatience)
		}
		f.d.pause(f.ctx, connectPause)
	}
}

// pause waits, and tells whether ctx goes on.
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
	room := make(chan struct{}, atOnce)
	err := conn.events(ctx, func() {
		there = true
		f.d.log.Debug("following dockerd", "socket", socket)
		tasks.Go(func() { f.d.setRight(ctx, conn) })
	}, func(e event) {
		id := e.containerID()
		if id == "" {
			return
		}
		tasks.Go(func() {
			select {
			case room <- struct{}{}:
				defer func() { <-room }()
				f.d.nameContainer(ctx, conn, id)
			case <-ctx.Done():
			}
		})
	})
	f.d.log.Debug("dockerd is not followed", "socket", socket, "err", err)
	return there
}

// setRight looks at dockerd's containers: their names, and what of ours belongs to none of them any more. Names that somebody else had are
// tried again as long as ctx lasts.
func (d *Driver) setRight(ctx context.Context, conn *dockerd) {
	for { // a node that starts has not taken up its attachments yet
		_, err := d.ready(ctx)
		if err == nil {
			break
		}
		if !d.pause(ctx, connectPause) {
			return
		}
	}
	before, err := d.look(ctx, conn)
	if err == nil && before.any() && d.pause(ctx, d.settle) {
		var now orphans
		if now, err = d.look(ctx, conn); err == nil {
			d.drop(ctx, before.and(now))
		}
	}
	if err != nil && ctx.Err() == nil {
		d.log.Warn("dockerd's containers cannot be listed, so what ended while nobody looked stays for now", "err", err)
	}
	for d.pause(ctx, namesPause) {
		if !d.namesMissing() {
			continue
		}
		if _, err := d.look(ctx, conn); err != nil {
			d.log.Debug("names of containers", "err", err)
		}
	}
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

// look goes through dockerd's containers, names ours, and tells what is no container's.
func (d *Driver) look(ctx context.Context, conn *dockerd) (orphans, error) {
	var o orphans
	ours, err := d.endpoints(ctx)
	if err != nil {
		return o, err
	}
	unused, err := d.unused(ctx)
	if err != nil || len(ours)+len(unused) == 0 {
		return o, err
	}
	list, err := conn.running(ctx)
	if err != nil {
		return o, err
	}
	for _, c := range list {
		mine := false
		for _, e := range c.NetworkSettings.Networks {
			if _, is := ours[e.EndpointID]; is {
				mine = true
				delete(ours, e.EndpointID)
			}
			delete(unused, e.IPAddress)
		}
		if mine {
			d.nameContainer(ctx, conn, c.ID)
		}
	}
	if len(d.sockets.all()) > 1 {
		return o, nil // what this dockerd does not know may be another's
	}
	return orphans{ours, unused}, nil
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
		d.log.Info("detached: docker has no such container any more", "name", a.Name, "addr", a.Addr)
		if addr, err := addrOf(a.Addr); err == nil {
			o.addresses[addr.String()] = true
		}
	}
	for addr := range o.addresses {
		if err := d.api.ReleaseAddress(ctx, addr); err != nil && !errors.Is(err, api.ErrNotFound) {
			d.log.Warn("docker has no container with this address any more, but it cannot be released", "addr", addr, "err", err)
		}
	}
}
