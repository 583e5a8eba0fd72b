// rootless-ovl ps: list what is attached.

package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func (a *app) psCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ps",
		Short: "List the attached containers",
		Long:  `List this node's attachments: containers and commands on the overlay.`,
		Example: `  rootless-ovl ps
  rootless-ovl ps -o json | jq -r '.[] | .name + " " + .addr'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Attachments(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) {
				row(w, "NAME", "ADDRESS", "INTERFACE", "MAC", "PID", "NETNS", "AGE", "PORTS", "POLICY", "PROBLEM")
				for _, att := range list {
					row(w, att.Name, both(att.Addr, att.Addr6), att.IfName, att.MAC, number(att.PID), att.Netns, a.ago(att.Since),
						api.PortsText(att.Ports), att.Summary(), att.Problem)
				}
			})
		},
	}
}

// number is n, or nothing for 0.
func number(n int) any {
	if n == 0 {
		return ""
	}
	return n
}
