// This file is STATUS: can containers be added?

package cni

import (
	"context"
	"errors"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// status is an error where ADD would fail. Containers that are there need the daemon as well: without it nothing is forwarded.
func (c *call) status(ctx context.Context) (any, error) {
	if _, err := readConfig(c.input); err != nil {
		return nil, err
	}
	s, err := c.daemon.Status(ctx)
	switch {
	case errors.Is(err, api.ErrNotRunning):
		return nil, fail(codeLimited, "%v", err)
	case err != nil:
		return nil, fail(codeNotReady, "%v", err)
	case s.State == api.StateReady || s.State == api.StateLeaseLost:
	case s.State == api.StateStopping:
		return nil, fail(codeLimited, "the daemon is stopping: start it again with `rootless-ovl up`")
	default:
		text := "the node has no subnet yet (" + s.State + "): `rootless-ovl status` says more"
		if s.Store.Error != "" {
			text += "; " + s.Store.Error
		}
		return nil, fail(codeNotReady, "%s", text)
	}
	if s.AddrsFree == 0 {
		return nil, fail(codeNotReady, "no address of %s is free: remove a container, or give nodes larger subnets (SubnetLen in the network config)", s.Subnet)
	}
	if s.Problem != "" {
		c.tell("%s", s.Problem)
	}
	return nil, nil
}
