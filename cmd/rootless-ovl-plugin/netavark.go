// netavark: what podman and netavark run for networks of the driver rootless-ovl.

package main

import (
	"context"
	"os"

	"github.com/rootless-ovl/rootless-ovl/engine/netavark"
)

func (c call) netavark(ctx context.Context, args []string) error {
	p := netavark.Plugin{
		Connect: func() (netavark.API, error) { return c.client() },
		Version: thisVersion(), Getenv: os.Getenv, Stdin: c.stdin, Stdout: c.stdout, Stderr: c.stderr,
	}
	if !p.Run(ctx, args) {
		return errSaid
	}
	return nil
}
