// rootless-ovl plugin: what container engines run, and people do not. Each command below it speaks the protocol of one kind of engine, to which
// standard input and output belong.

package main

import "github.com/spf13/cobra"

func (a *app) pluginCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "plugin",
		Short:   "Speak to a container engine",
		Hidden:  true,
		Long:    `Speak to a container engine in its own protocol. Engines run this, as the files say that are made for them.`,
		Example: `  CNI_COMMAND=VERSION rootless-ovl plugin cni </dev/null`,
		Args:    cobra.ArbitraryArgs,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("%q is no kind of engine that has a plugin: `rootless-ovl plugin --help` lists them", args[0])
			}
			return usagef("plugin is for container engines, which say what kind they are: `rootless-ovl plugin --help` lists them")
		},
	}
	cmd.AddCommand(a.pluginCNICommand(), a.pluginNetavarkCommand(), a.pluginOCIHookCommand())
	return cmd
}
