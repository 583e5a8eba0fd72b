// This file is DEL and GC: containers are taken off the overlay.

package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// del takes a container off the overlay. It needs neither its namespace nor the result of ADD, and succeeds where there is nothing to do, any number
// of times.
//
// It succeeds without the daemon, too. A runtime calls DEL on the way to removing a container whose processes have ended, and most do not remove one
// whose DEL fails: `podman rm` would fail for as long as the daemon is away, which may be for ever. Nothing is lost by it: a daemon that starts takes
// up only those attachments whose namespaces still have processes, and frees the addresses and names of all others. What stays is a container that
// is disconnected while it runs: the next daemon finds it alive and has it on the overlay again, until DEL is run once more.
func (c *call) del(ctx context.Context) (any, error) {
	if len(c.owner()) > maxOwner { // there was no ADD
		return nil, nil
	}
	list, err := c.daemon.AttachmentsOf(ctx, c.owner())
	if errors.Is(err, api.ErrNotRunning) {
		c.tell("%v; when it starts, it frees the address of %s, whose container has ended then", err, c.owner())
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return nil, c.detach(ctx, list)
}

// detach takes attachments off the overlay. It goes on after an error.
func (c *call) detach(ctx context.Context, list []api.Attachment) error {
	var failed []error
	for _, a := range list {
		if err := c.daemon.Detach(ctx, a.Name, a.Owner); err != nil && !errors.Is(err, api.ErrNotFound) {
			failed = append(failed, fmt.Errorf("%s: %w", a.Owner, err))
		}
	}
	return errors.Join(failed...)
}

// gc takes off every container of the network that the runtime does not list.
func (c *call) gc(ctx context.Context) (any, error) {
	raw := c.head.ValidAttachments
	if raw == nil {
		raw = c.head.Attachments
	}
	if raw == nil { // which is not the same as an empty list, or null
		return nil, fail(types.ErrInvalidNetworkConfig, "GC needs the list \"cni.dev/valid-attachments\": without it nothing is freed")
	}
	var valid []types.GCAttachment
	if err := json.Unmarshal(raw, &valid); err != nil {
		return nil, fail(types.ErrDecodingFailure, "cni.dev/valid-attachments: %v", err)
	}
	keep := map[string]bool{}
	for _, v := range valid {
		keep[c.ownerPrefix()+v.ContainerID+"/"+v.IfName] = true
	}
	list, err := c.daemon.Attachments(ctx)
	if err != nil {
		return nil, err
	}
	var gone []api.Attachment
	for _, a := range list {
		if strings.HasPrefix(a.Owner, c.ownerPrefix()) && !keep[a.Owner] {
			gone = append(gone, a)
		}
	}
	return nil, c.detach(ctx, gone)
}
