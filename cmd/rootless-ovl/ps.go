// rootless-ovl ps: list what is attached.

package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func (a *app) psCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ps",
		Short: "List the attached containers",
		Long: `List this node's attachments: containers and commands on the overlay. Where engines made some of them, OWNER is what those call them, with long ids
cut off.`,
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
				owned := slices.ContainsFunc(list, func(att api.Attachment) bool { return att.Owner != "" })
				owner := func(cells []any, s string) []any {
					if !owned {
						return cells
					}
					return slices.Insert(cells, 6, any(s))
				}
				row(w, owner([]any{"NAME", "ADDRESS", "INTERFACE", "MAC", "PID", "NETNS", "AGE", "PORTS", "POLICY", "PROBLEM"}, "OWNER")...)
				for _, att := range list {
					row(w, owner([]any{att.Name, both(att.Addr, att.Addr6), att.IfName, att.MAC, number(att.PID), netnsText(att), a.ago(att.Since),
						api.PortsText(att.Ports), att.Summary(), att.Problem}, shortIDs(att.Owner))...)
				}
			})
		},
	}
}

// netnsText is where the namespace of an attachment is, other than its pid: by its number, as lsns writes it, if nothing else is known.
func netnsText(att api.Attachment) string {
	if att.PID == 0 {
		return cmp.Or(att.Netns, fmt.Sprintf("net:[%d]", att.Inode))
	}
	return att.Netns
}

// shortIDs is an owner with the ids in it, hexadecimal of 32 digits and more, as short as engines list them.
func shortIDs(owner string) string {
	parts := strings.Split(owner, "/")
	for i, p := range parts {
		if len(p) >= 32 && strings.Trim(p, "0123456789abcdef") == "" {
			parts[i] = p[:12]
		}
	}
	return strings.Join(parts, "/")
}

// number is n, or nothing for 0.
func number(n int) any {
	if n == 0 {
		return ""
	}
	return n
}
