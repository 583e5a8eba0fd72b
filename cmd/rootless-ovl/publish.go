// rootless-ovl publish and unpublish: ports of the host that lead to a container.

package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func (a *app) publishCommand() *cobra.Command {
	var snat bool
	cmd := &cobra.Command{
		Use:   "publish [IP:]HOSTPORT:PORT[/tcp|udp]... NAME|PID",
		Short: "Publish ports of a container on this host",
		Long: `Publish ports of an attached container on this host, as docker run -p does: all that are given, or none. The container sees the
clients' own addresses.

HOSTPORT and PORT may be ranges of one length. Without an IP all addresses of the host are meant, IPv4 and IPv6; IPv6 addresses stand
in brackets. With HOSTPORT 0 or empty, or PORT alone, a free port is chosen and printed. Published ports are kept when the
daemon is restarted, and go when the container does.`,
		Example: `  rootless-ovl publish 8080:80 web
  rootless-ovl publish 127.0.0.1:5353:53/udp 8000-8010:8000-8010 web
  rootless-ovl publish 80 web`,
		Args:              portArgs("publish", "publish 8080:80 web"),
		ValidArgsFunction: a.completeLast,
		RunE: func(cmd *cobra.Command, args []string) error {
			specs, name := args[:len(args)-1], args[len(args)-1]
			req := api.PublishRequest{Publish: specs, SNAT: snat}
			if _, err := req.Ports(); err != nil {
				return usageError{err}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Publish(cmd.Context(), name, req)
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) { writePorts(w, list) })
		},
	}
	cmd.Flags().BoolVar(&snat, "snat", false, snatUsage)
	return cmd
}

func (a *app) unpublishCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "unpublish {[IP:]HOSTPORT:PORT[/tcp|udp]... | --all} NAME|PID",
		Short: "Close published ports of a container",
		Long: `Close published ports of a container, and the connections over them: all that are given, or none.

A port is named as for publish; without an IP or without HOSTPORT any is meant.`,
		Example: `  rootless-ovl unpublish 8080:80 web
  rootless-ovl unpublish 53/udp web
  rootless-ovl unpublish --all web`,
		Args: func(cmd *cobra.Command, args []string) error {
			if !all {
				return portArgs("unpublish", "unpublish 8080:80 web")(cmd, args)
			}
			if len(args) != 1 {
				return usagef("unpublish --all takes the name or pid of one container: `rootless-ovl ps` lists them")
			}
			return checkRef(args[0])
		},
		ValidArgsFunction: a.completeLast,
		RunE: func(cmd *cobra.Command, args []string) error {
			req := api.UnpublishRequest{Publish: args[:len(args)-1], All: all}
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Unpublish(cmd.Context(), args[len(args)-1], req)
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) { writePorts(w, list) })
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "close all published ports of the container")
	return cmd
}

// portArgs checks that args are ports and at last a name. Where the name comes first, as in docker's commands, the error has the right order.
func portArgs(command, example string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < 2 {
			return usagef("%s takes ports and at last a name or pid: `rootless-ovl %s`", command, example)
		}
		err := portsAndRef(args)
		if err == nil {
			return nil
		}
		if turned := append(slices.Clone(args[1:]), args[0]); portsAndRef(turned) == nil {
			return usagef("%w; the name comes last: `rootless-ovl %s %s`", err, command, strings.Join(turned, " "))
		}
		return usageError{err}
	}
}

func portsAndRef(args []string) error {
	for _, s := range args[:len(args)-1] {
		if _, err := api.ParsePublish(s); err != nil {
			return err
		}
	}
	return api.CheckRef(args[len(args)-1])
}

func checkRef(ref string) error {
	if err := api.CheckRef(ref); err != nil {
		return usageError{err}
	}
	return nil
}

func writePorts(w io.Writer, list []api.Port) {
	for _, p := range list {
		fmt.Fprintln(w, p)
	}
}

const snatUsage = "show clients to the container as the gateway: for one whose default route does not lead to the overlay"

// publishFlags are those of attach and run.
func publishFlags(fs *pflag.FlagSet, req *api.AttachRequest) {
	fs.StringArrayVarP(&req.Publish, "publish", "p", nil, "publish a port on this host: `[IP:]HOSTPORT:PORT[/tcp|udp]`; may be given several times")
	fs.BoolVar(&req.SNAT, "snat", false, snatUsage)
}

// completeLast offers the names of attachments after the first argument, where a name may stand.
func (a *app) completeLast(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if all := cmd.Flags().Lookup("all"); len(args) == 0 && (all == nil || !all.Changed) {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeAttachments(cmd, nil, word)
}
