// rootless-ovl detach: take a namespace off the overlay.

package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// completionPatience bounds how long a TAB may take.
const completionPatience = 2 * time.Second

func (a *app) detachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "detach NAME|PID",
		Short: "Take a container off the overlay",
		Long:  `Take an attachment off the overlay: its interface goes and its address is free again.`,
		Example: `  rootless-ovl detach web
  rootless-ovl detach 4711`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("detach takes one name or pid: `rootless-ovl ps` lists them")
			}
			if err := api.CheckRef(args[0]); err != nil {
				return usageError{err}
			}
			return nil
		},
		ValidArgsFunction: a.completeAttachments,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if err := c.Detach(cmd.Context(), args[0], ""); err != nil {
				return err
			}
			return a.print(map[string]string{"detached": args[0]}, func(w io.Writer) { fmt.Fprintln(w, "detached", args[0]) })
		},
	}
}

// completeAttachments offers the names of attachments to the shell.
func (a *app) completeAttachments(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionPatience)
	defer cancel()
	list, err := c.Attachments(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, att := range list {
		names = append(names, cobra.CompletionWithDesc(att.Name, att.Addr))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
