// rootless-ovl peers: list the other nodes.

package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func (a *app) peersCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "peers",
		Short: "List the other nodes of the overlay",
		Long: `List the other nodes as the store describes them: the subnet each holds and where packets for it are sent.

MTU is the smaller one of the peer's and ours, PATH MTU what was found to pass on the way to it.
HEARD is how long ago something was received from it: empty for a node that has sent nothing since this daemon was started, as one whose
containers talk to none of ours. A node that containers here send to, and that does not answer, is shown with that PROBLEM.

When the store is away this is what was last known.`,
		Example: `  rootless-ovl peers
  rootless-ovl peers -o json | jq '.[] | select(.problem)'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Peers(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) {
				row(w, "SUBNET", "PUBLIC IP", "PORT", "MTU", "PATH MTU", "BACKEND", "KIND", "NODE ID", "HEARD", "PROBLEM")
				for _, p := range list {
					row(w, both(p.Subnet, p.Subnet6), both(p.PublicIP, p.PublicIPv6), number(p.Port), number(p.MTU), number(p.PathMTU), p.Backend, kind(p), p.NodeID, a.ago(p.LastHeard), p.Problem)
				}
			})
		},
	}
}

func kind(p api.Peer) string {
	if p.Stock {
		return "flannel"
	}
	return "rootless-ovl"
}
