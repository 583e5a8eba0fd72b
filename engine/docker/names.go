// This file gives attachments the names of their containers. docker does not say them when it creates an endpoint, and answers about a container
// that is being started only when that is done; so they follow a moment later.

package docker

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// shortID is the length of docker's short ids, which are aliases of their containers.
const shortID = 12

// namesOf are the names of a container on one of its networks: its own, and the aliases that were asked for. Those that nobody on the overlay
// can have are left out.
func namesOf(c container, e endpointSettings) api.NamesRequest {
	var r api.NamesRequest
	if name := strings.TrimPrefix(c.Name, "/"); api.CheckName(name) == nil {
		r.Name = name
	}
	for _, alias := range e.Aliases {
		alias = strings.ToLower(alias)
		isID := len(alias) == shortID && strings.HasPrefix(c.ID, alias)
		if api.CheckName(alias) == nil && !isID && !strings.EqualFold(alias, r.Name) && !slices.Contains(r.Aliases, alias) && len(r.Aliases) < api.MaxAliases {
			r.Aliases = append(r.Aliases, alias)
		}
	}
	slices.Sort(r.Aliases)
	return r
}

// has tells whether an attachment has the names.
func has(a api.Attachment, r api.NamesRequest) bool {
	return (r.Name == "" || a.Name == r.Name) && slices.Equal(slices.Sorted(slices.Values(a.Aliases)), r.Aliases)
}

// nameAfterEvent names a container that has changed, if any of docker's is on the overlay.
func (d *Driver) nameAfterEvent(ctx context.Context, conn *dockerd, id string) {
	if ours, err := d.endpoints(ctx); err == nil && len(ours) == 0 {
		return
	}
	d.nameContainer(ctx, conn, id, func(endpoint string) (api.Attachment, bool) {
		a, err := d.attachmentOf(ctx, endpoint)
		return a, err == nil
	})
}

// nameContainer gives a container's endpoints on the overlay its names; find finds their attachments.
func (d *Driver) nameContainer(ctx context.Context, conn *dockerd, id string, find func(endpoint string) (api.Attachment, bool)) {
	c, err := conn.inspect(ctx, id)
	if err != nil {
		d.log.Debug("a container cannot be inspected", "container", id, "err", err)
		return
	}
	for _, network := range slices.Sorted(maps.Keys(c.NetworkSettings.Networks)) {
		e := c.NetworkSettings.Networks[network]
		if e.EndpointID == "" {
			continue
		}
		a, is := find(e.EndpointID)
		if !is {
			continue // it is on a network of another driver
		}
		d.name(ctx, e.EndpointID, a, namesOf(c, e))
	}
}

// name gives an attachment its names, or as many of them as can be had, and says once what cannot.
func (d *Driver) name(ctx context.Context, endpoint string, a api.Attachment, want api.NamesRequest) {
	if has(a, want) {
		d.forget(endpoint)
		return
	}
	_, err := d.api.Rename(ctx, a.Name, want)
	if err == nil || !errors.Is(err, api.ErrInUse) && !errors.Is(err, api.ErrInvalid) {
		d.forget(endpoint)
		if err != nil && !errors.Is(err, api.ErrNotFound) && ctx.Err() == nil {
			d.log.Warn("a container has not got its name", "container", want.Name, "addr", a.Addr, "err", err)
		}
		return
	}
	if d.remember(endpoint, err) {
		d.log.Warn("a container is not found by all its names: others on the overlay have them", "container", want.Name, "addr", a.Addr, "err", err)
	}
	for _, less := range []api.NamesRequest{{Name: want.Name}, {Aliases: want.Aliases}} {
		if has(a, less) || less.Name == "" && len(less.Aliases) == 0 {
			return
		}
		if _, err := d.api.Rename(ctx, a.Name, less); err == nil {
			return
		}
	}
}

// remember notes why an endpoint has not all of its names; it tells whether that is new.
func (d *Driver) remember(endpoint string, err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	was, known := d.refused[endpoint]
	d.refused[endpoint] = err.Error()
	return !known || was != err.Error()
}

func (d *Driver) forget(endpoint string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.refused, endpoint)
}

// allRefused are the endpoints that have not all of their names.
func (d *Driver) allRefused() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.refused))
}

func (d *Driver) isRefused(endpoint string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, is := d.refused[endpoint]
	return is
}
