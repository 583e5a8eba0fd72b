// rootless-ovl plugin cni: the CNI plugin.

package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/engine/cni"
)

func (a *app) pluginCNICommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cni",
		Short: "Serve podman, nerdctl, containerd and whoever calls CNI plugins",
		Long: `Do what CNI_COMMAND says, as the CNI specification 1.1.0 has it: ADD, DEL, CHECK, GC, STATUS or VERSION. The network's
configuration is read from standard input, the result or the error is written to standard output.`,
		Example: `  CNI_COMMAND=VERSION rootless-ovl plugin cni </dev/null`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a.ownStdout = true
			p := cni.Plugin{
				Connect: func() (cni.API, error) {
					c, err := a.client()
					if err != nil {
						return nil, err
					}
					return c, nil
				},
				Getenv: os.Getenv,
				Stdin:  a.stdin,
				Stdout: a.stdout,
				Stderr: a.stderr,
			}
			if !p.Run(cmd.Context()) {
				return exitStatus(exitFailed)
			}
			return nil
		},
	}
}
