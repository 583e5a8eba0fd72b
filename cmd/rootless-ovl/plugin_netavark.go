// rootless-ovl plugin netavark: what podman and netavark run for networks of the driver rootless-ovl.

package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/engine/netavark"
)

func (a *app) pluginNetavarkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "netavark [create | setup NETNS | teardown NETNS | info]",
		Short: "Answer a call of netavark's plugin protocol",
		Long: `Answer one call of podman or netavark about a network of the driver rootless-ovl, as netavark's plugin-API.md describes: JSON on
standard input and output. They find this program by an executable file "rootless-ovl" in a directory of netavark_plugin_dirs in containers.conf.`,
		Example: `  rootless-ovl plugin netavark info`,
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			a.ownStdout = true // it is the protocol's
			p := netavark.Plugin{
				Connect: func() (netavark.API, error) { return a.client() },
				Version: thisBuild().Version, Getenv: os.Getenv, Stdin: a.stdin, Stdout: a.stdout, Stderr: a.stderr,
			}
			if !p.Run(cmd.Context(), args) {
				return exitStatus(exitFailed)
			}
			return nil
		},
	}
}
