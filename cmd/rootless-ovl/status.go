// rootless-ovl status: how the node is.

package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show how this node is",
		Long: `Show the node's lease, addresses, store and counters.

For people counters that are 0 are left out; JSON has them all.`,
		Example: `  rootless-ovl status
  rootless-ovl status -o json | jq .counters.drops`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) { a.statusText(w, s) })
		},
	}
}

func (a *app) statusText(w io.Writer, s api.Status) {
	lease, backend, underlay := s.Subnet, s.Backend, both(s.PublicIP, s.PublicIPv6)
	if lease != "" && s.Ephemeral {
		lease += " (ephemeral: given back on stop)"
	}
	if s.MTU != 0 {
		backend = fmt.Sprintf("%s, MTU %d", s.Backend, s.MTU)
	}
	if s.Port != 0 {
		underlay += fmt.Sprintf(" port %d", s.Port)
	}
	if s.Interface != "" {
		underlay += " on " + s.Interface
	}
	row(w, "State", s.State)
	if s.Problem != "" {
		row(w, "Problem", s.Problem)
	}
	row(w, "Network", s.Network)
	row(w, "Subnet", lease)
	row(w, "Gateway", s.Gateway)
	if s.Network6 != "" { // in rows of their own, since scripts read those of IPv4
		row(w, "Network6", s.Network6)
		row(w, "Subnet6", s.Subnet6)
		row(w, "Gateway6", s.Gateway6)
	}
	if s.Domain != "" {
		row(w, "Domain", s.Domain)
	}
	row(w, "Backend", backend)
	row(w, "Underlay", underlay)
	outbound := strings.Join(s.OutboundAddrs, ", ")
	if s.OutboundIf != "" {
		outbound = strings.TrimSpace(outbound + " on " + s.OutboundIf)
	}
	if outbound != "" {
		row(w, "Outbound", outbound)
	}
	row(w, "Store", a.storeText(s.Store))
	if s.Proxy != "" {
		row(w, "Proxy", s.Proxy)
	}
	row(w, "Attachments", s.Attachments)
	row(w, "Peers", s.Peers)
	row(w, "Node ID", s.NodeID)
	row(w, "Subnet file", s.SubnetEnv)
	row(w, "Daemon", fmt.Sprintf("version %s, pid %d, up %s", s.Version, s.PID, a.ago(s.Since)))
	for _, group := range slices.Sorted(maps.Keys(s.Counters)) {
		for _, name := range slices.Sorted(maps.Keys(s.Counters[group])) {
			if n := s.Counters[group][name]; n != 0 {
				row(w, group+"."+name, n)
			}
		}
	}
}

// both is what is shown of an IPv4 and an IPv6 value, of which the latter is empty unless the overlay is dual-stack.
func both(v4, v6 string) string {
	if v6 == "" {
		return v4
	}
	return v4 + ", " + v6
}

func (a *app) storeText(s api.StoreStatus) string {
	where := strings.Join(s.Endpoints, ",")
	if s.Embedded {
		where = "embedded etcd on " + where
	}
	how := "connected"
	if !s.Connected {
		how = "not connected"
	}
	if since := a.ago(s.Since); since != "" {
		how += " for " + since
	}
	if s.Error != "" {
		how += ": " + s.Error
	}
	return fmt.Sprintf("%s, prefix %s, %s", where, s.Prefix, how)
}
