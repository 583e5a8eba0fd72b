// rootless-ovl status: how the node is.

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// readyPause is between two looks at a node that is not ready.
const readyPause = 50 * time.Millisecond

func (a *app) statusCommand() *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how this node is",
		Long: `Show the node's lease, addresses, store and counters.

For people counters that are 0 are left out; JSON has them all.

With --wait it is shown when the node is ready: the daemon may still be starting, or not have been started yet. A node that is
not ready in time is an error.`,
		Example: `  rootless-ovl status
  rootless-ovl status --wait 30s
  rootless-ovl status -o json | jq .counters.drops`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("wait") && wait <= 0 {
				return usagef("--wait %v is no time to wait: write it as 30s", wait)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			var s api.Status
			if wait > 0 {
				s, err = statusWhenReady(cmd.Context(), c, wait)
			} else {
				s, err = c.Status(cmd.Context())
			}
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) { a.statusText(w, s) })
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait up to this `time` until the node is ready (default: show what is)")
	return cmd
}

// statusWhenReady is the status of a node that is ready within limit. A daemon that is not there yet is waited for, too; what
// waiting cannot change, as another user's socket, is an error at once.
func statusWhenReady(ctx context.Context, c *api.Client, limit time.Duration) (api.Status, error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var why error // of the last look that came to an end
	for {
		s, err := c.Status(limited)
		switch {
		case err == nil && s.State == api.StateReady:
			return s, nil
		case err == nil:
			why = notReady(s)
		case limited.Err() != nil:
			if why == nil {
				why = err
			}
		case codeOf(err) != api.CodeUnavailable:
			return s, err
		default:
			why = err
		}
		select {
		case <-limited.Done():
			return api.Status{}, fmt.Errorf("not ready after %v: %w", limit, why)
		case <-time.After(readyPause):
		}
	}
}

// notReady says what a node is waiting for.
func notReady(s api.Status) error {
	text := "the node is " + s.State
	for _, more := range []string{s.Problem, s.Store.Error} {
		if more != "" {
			text += ": " + more
		}
	}
	return api.Errorf(api.CodeUnavailable, "%s: the daemon's log says more", text)
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
	row(w, "Peers", peersText(s))
	row(w, "Node ID", s.NodeID)
	row(w, "Subnet file", s.SubnetEnv)
	if text := sandboxText(s.Sandbox); text != "" { // a daemon of before there was one says nothing
		row(w, "Sandbox", text)
	}
	if s.Sandbox.MemoryLimit > 0 {
		row(w, "Memory limit", fmt.Sprintf("%d MiB (%s)", s.Sandbox.MemoryLimit>>20, s.Sandbox.MemoryLimitFrom))
	}
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

func peersText(s api.Status) string {
	text := fmt.Sprint(s.Peers)
	if n := s.Counters["path_mtu"]["silent_peers"]; n > 0 {
		text += fmt.Sprintf(" (without an answer: %d, see rootless-ovl peers)", n)
	}
	return text
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
