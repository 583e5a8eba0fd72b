// rootless-ovl attach: put a namespace on the overlay.

package main

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func (a *app) attachCommand() *cobra.Command {
	var req api.AttachRequest
	cmd := &cobra.Command{
		Use:   "attach {PID | PATH}",
		Short: "Put a running container on the overlay",
		Long: `Put the network namespace of a process, or the one at a path, on the overlay, and print its address.

The process or namespace must be yours; it keeps its address until it ends or is detached.

With --gateway it is that of a container engine, which gets the node's whole subnet for a bridge of its own: rootless docker, started with
the --bip and --mtu that subnet.env says.`,
		Example: `  rootless-ovl attach $(podman inspect -f '{{.State.Pid}}' web) --name web
  rootless-ovl attach /run/user/1000/netns/x --ip 10.213.7.20 -p 8080:80
  rootless-ovl attach --gateway $(cat $XDG_RUNTIME_DIR/dockerd-rootless/child_pid)`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 1 && strings.ContainsRune(args[0], '/'):
				if req.Netns != "" {
					return usagef("both %s and --netns %s are given: name only one of them", args[0], req.Netns)
				}
				req.Netns = args[0]
			case len(args) == 1:
				pid, err := parsePID(args[0])
				if err != nil {
					return err
				}
				req.PID = pid
			}
			if req.Netns != "" {
				abs, err := filepath.Abs(req.Netns)
				if err != nil {
					return fmt.Errorf("netns path %s: %w", req.Netns, err)
				}
				req.Netns = abs
			}
			if err := req.Validate(); err != nil {
				return usageError{err}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			att, err := c.Attach(cmd.Context(), req)
			if err != nil {
				return err
			}
			err = a.print(att, func(w io.Writer) { fmt.Fprintln(w, att.Addr) })
			if a.output.value == outputText {
				// Apart from the address, so that $(rootless-ovl attach ...) is the address.
				fmt.Fprintf(a.stderr, "attached %s: %s on %s, gateway %s\n", att.Name, both(att.Addr, att.Addr6), att.IfName, both(att.Gateway, att.Gateway6))
				if att.DNS != nil {
					fmt.Fprintf(a.stderr, "for its resolv.conf: nameserver %s, search %s\n", att.DNS.Server, strings.Join(att.DNS.Search, " "))
				}
				if len(att.Ports) > 0 {
					fmt.Fprintf(a.stderr, "published %s\n", api.PortsText(att.Ports))
				}
				a.warn(att.Warnings)
				if att.Problem != "" {
					fmt.Fprintf(a.stderr, "warning: %s; the log of the daemon says more\n", att.Problem)
				}
			}
			return err
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&req.Netns, "netns", "", "attach the network namespace at this `path`")
	fs.BoolVar(&req.Gateway, "gateway", false, "route the node's whole subnet to the namespace, for a bridge of its own")
	attachFlags(fs, &req)
	fs.BoolVar(&req.NoDefaultRoute, "no-default-route", false, "route only the overlay's network, not the outside, through the gateway")
	return cmd
}

// attachFlags are those that attach and run share.
func attachFlags(fs *pflag.FlagSet, req *api.AttachRequest) {
	fs.StringVar(&req.Name, "name", "", "`name` of the attachment, by which the overlay finds it (default: chosen by the daemon, and not published)")
	fs.StringArrayVar(&req.Aliases, "alias", nil, "another `name` under which the overlay finds it, and others with the same in turn; may be repeated")
	fs.StringVar(&req.Addr, "ip", "", "IPv4 `address` within the node's subnet (default: a free one)")
	fs.StringVar(&req.IfName, "ifname", "", "`name` of the interface in the namespace (default eth0)")
	fs.StringVar(&req.MAC, "mac", "", "MAC `address` of the interface (default: made from the address)")
	publishFlags(fs, req)
	policyFlags(fs, &req.Policy)
}

// policyFlags are what the attachment may reach and be reached from.
func policyFlags(fs *pflag.FlagSet, p *api.Policy) {
	fs.BoolVar(&p.Isolate, "isolate", false, "no connection from or to other containers of the overlay, but for --allow-from and --allow-to")
	fs.StringSliceVar(&p.AllowFrom, "allow-from", nil, "only `rule`,... may connect to it: CIDR[:PORT[-PORT]][/tcp|udp|icmp]; may be repeated")
	fs.StringSliceVar(&p.AllowTo, "allow-to", nil, "it may connect only to `rule`,... of the overlay, as in --allow-from; may be repeated")
	fs.StringSliceVar(&p.Egress, "egress", nil, "what of the outside it may reach: `allow|deny|CIDR,...` (default allow)")
	fs.Var((*portList)(&p.HostAccess), "host-access", "`ports` of the gateway's address that lead to this host's loopback, comma-separated")
}

func parsePID(s string) (int, error) {
	pid, err := strconv.ParseUint(s, 10, 31) // which takes no sign
	if err != nil || pid == 0 {
		return 0, usagef("%q is not a pid: give a process of the container, as `podman inspect -f '{{.State.Pid}}' NAME` prints it", s)
	}
	return int(pid), nil
}

// portList is ports, separated by commas, each once; further flags add to it.
type portList []int

func (l *portList) String() string {
	words := make([]string, len(*l))
	for i, p := range *l {
		words[i] = strconv.Itoa(p)
	}
	return strings.Join(words, ",")
}

func (l *portList) Set(s string) error {
	for word := range strings.SplitSeq(s, ",") {
		port, err := strconv.Atoi(strings.TrimSpace(word))
		switch {
		case err != nil && word != "" && strings.Trim(word, "0123456789-") == "":
			return fmt.Errorf("%q is a range: list its ports one by one", word)
		case err != nil:
			return fmt.Errorf("%q is not a port: write one or more, such as 5432,8080", word)
		case !slices.Contains(*l, port):
			*l = append(*l, port)
		}
	}
	return nil
}

func (l *portList) Type() string { return "ports" }
