// cni: the CNI plugin, for podman, nerdctl, containerd and whoever calls CNI plugins.

package main

import (
	"context"
	"os"

	"github.com/rootless-ovl/rootless-ovl/engine/cni"
)

func (c call) cni(ctx context.Context, args []string) error {
	if len(args) > 0 {
		return usagef("cni takes no argument, but CNI_COMMAND from the environment and the configuration on standard input: %q is one", args[0])
	}
	p := cni.Plugin{
		Connect: func() (cni.API, error) {
			client, err := c.client()
			if err != nil {
				return nil, err
			}
			return client, nil
		},
		Getenv: os.Getenv,
		Stdin:  c.stdin,
		Stdout: c.stdout,
		Stderr: c.stderr,
	}
	if !p.Run(ctx) {
		return errSaid
	}
	return nil
}
