// rootless-ovl addresses: list the addresses that engines have reserved, and release what nobody has any more.

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

func (a *app) addressesCommand() *cobra.Command {
	var release string
	cmd := &cobra.Command{
		Use:   "addresses",
		Short: "List the addresses that are reserved",
		Long: `List the addresses of this node's subnet that are reserved: a container engine, as docker, chooses a container's address before there is
anything to attach, and keeps it for a container that is stopped. No other container gets it.

The engine gives them back. One that was removed with its data does not: --release does it then.`,
		Example: `  rootless-ovl addresses
  rootless-ovl addresses --release 10.213.7.9`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if release != "" {
				if err := c.ReleaseAddress(cmd.Context(), release); err != nil {
					return err
				}
				return a.print(map[string]string{"released": release}, func(w io.Writer) { fmt.Fprintln(w, "released", release) })
			}
			list, err := c.Addresses(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) {
				row(w, "ADDRESS", "OWNER", "ATTACHMENT", "AGE")
				for _, addr := range list {
					row(w, both(addr.Addr, addr.Addr6), addr.Owner, addr.Attachment, a.ago(addr.Since))
				}
			})
		},
	}
	cmd.Flags().StringVar(&release, "release", "", "give that `address` back")
	return cmd
}
