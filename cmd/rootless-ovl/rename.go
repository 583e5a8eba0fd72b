// rootless-ovl rename: give an attachment other names.

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func (a *app) renameCommand() *cobra.Command {
	var req api.NamesRequest
	cmd := &cobra.Command{
		Use:   "rename NAME|PID [NEW]",
		Short: "Give an attached container other names",
		Long: `Give an attachment another name, other aliases, or both: those that are given here, and no others. Without NEW it keeps its name. Addresses,
connections and published ports stay as they are.`,
		Example: `  rootless-ovl rename 4711 web
  rootless-ovl rename web --alias front --alias www`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 && len(args) != 2 {
				return usagef("rename takes a name or pid, and the new name: `rootless-ovl ps` lists them")
			}
			if err := api.CheckRef(args[0]); err != nil {
				return usageError{err}
			}
			return nil
		},
		ValidArgsFunction: a.completeAttachments,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				req.Name = args[1]
			}
			if err := req.Validate(); err != nil {
				return usageError{err}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			att, err := c.Rename(cmd.Context(), args[0], req)
			if err != nil {
				return err
			}
			return a.print(att, func(w io.Writer) { fmt.Fprintln(w, strings.Join(append([]string{att.Name}, att.Aliases...), " ")) })
		},
	}
	cmd.Flags().StringArrayVar(&req.Aliases, "alias", nil, "another `name` under which the overlay finds it; may be repeated")
	return cmd
}
