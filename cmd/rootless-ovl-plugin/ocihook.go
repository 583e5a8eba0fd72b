// oci-hook: put podman's containers on the overlay when their runtime makes them.

package main

import (
	"context"

	"github.com/rootless-ovl/rootless-ovl/engine/ocihook"
)

func (c call) ociHook(ctx context.Context, args []string) error {
	if len(args) > 0 {
		return usagef("oci-hook takes no argument, but the container's state on standard input: %q is one", args[0])
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	defer client.Close()
	return ocihook.New(client, c.stderr).Run(ctx, c.stdin)
}
