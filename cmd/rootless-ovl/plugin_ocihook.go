// rootless-ovl plugin oci-hook: put podman's containers on the overlay when their runtime makes them.

package main

import (
	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/engine/ocihook"
)

func (a *app) pluginOCIHookCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "oci-hook",
		Short: "Attach and detach a container as a hook of its OCI runtime",
		Long: `Attach and detach a container as a hook of its OCI runtime, at the stages createRuntime, poststart and poststop. Standard input is the
container's state; what is asked for stands in its annotations run.rootless-ovl.*: docs/podman.md lists them.`,
		Example: `  rootless-ovl --runtime-dir /run/user/1000/rootless-ovl plugin oci-hook < state.json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("oci-hook takes no argument, but the container's state on standard input: %q is one", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			a.ownStdout = true
			c, err := a.client()
			if err != nil {
				return err
			}
			defer c.Close()
			return ocihook.New(c, a.stderr).Run(cmd.Context(), a.stdin)
		},
	}
}
