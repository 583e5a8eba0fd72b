// rootless-ovl exec: a command of the host in a container's network.

package main

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

func (a *app) execCommand() *cobra.Command {
	var root bool
	cmd := &cobra.Command{
		Use:   "exec [flags] [NAME|PID] -- COMMAND [ARG...]",
		Short: "Run a command of this host in a container's network",
		Long: `Run a command of this host, with its files, in the network namespace of an attachment: curl, psql, ss or tcpdump beside a container that has
no tools. /etc/resolv.conf names the gateway. The command has the capabilities of the container's user namespace, and is the user whom that
maps to you, or its root where it maps nobody to you; the container itself is left as it is. Without a name the command gets a namespace
of its own on the overlay for as long as it runs, as with run.

Signals are passed on, and the exit status is that of the command: 127 where it is not found, 126 where it cannot be executed, 128 + n
where signal n ended it. What it leaves running is killed.`,
		Example: `  rootless-ovl exec web -- ss -tln
  rootless-ovl exec web -- tcpdump -ni eth0 -Z root
  rootless-ovl exec -- curl http://web/`,
		Args: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			switch {
			case dash < 0 || len(args) <= dash || args[dash] == "":
				return usagef("exec needs a command: give it after --, as `rootless-ovl exec web -- ss -tln`")
			case dash > 1:
				return usagef("exec takes one name or pid: `rootless-ovl ps` lists them")
			case dash == 1:
				if err := api.CheckRef(args[0]); err != nil {
					return usageError{err}
				}
			}
			return nil
		},
		ValidArgsFunction: a.completeAttachments,
		RunE: func(cmd *cobra.Command, args []string) error {
			a.ownStdout = true // it is the command's
			dash := cmd.ArgsLenAtDash()
			spec := nsutil.Spec{Args: args[dash:], MapRoot: root}
			if dash == 0 {
				return a.runIn(cmd.Context(), api.AttachRequest{}, spec)
			}
			return statusOfSignal(catchSignals(cmd.Context()), func(early *signalContext) error { return a.execUntil(early, args[0], spec) })
		},
	}
	cmd.Flags().BoolVar(&root, "root", false, "be root (uid 0) of the namespace instead of yourself")
	return cmd
}

// execUntil runs the command in the namespaces of an attachment. Signals are caught by early until there is the command.
func (a *app) execUntil(early *signalContext, ref string, spec nsutil.Spec) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	defer c.Close()
	list, err := c.Attachments(early)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(list, func(att api.Attachment) bool {
		return att.Name == ref || att.PID != 0 && strconv.Itoa(att.PID) == ref
	})
	if i < 0 {
		return api.Errorf(api.CodeNotFound, "there is no attachment %q on this node: `rootless-ovl ps` lists them", ref)
	}
	att := list[i]
	if att.DNS != nil { // there is none where the gateway's address is the engine's bridge's
		spec.ResolvConf = att.DNS.ResolvConf(a.hostResolvConf())
	}
	sb, err := a.joinSandbox(att, spec)
	if err != nil {
		return err
	}
	defer sb.Close()
	return a.play(early, sb, func() {})
}

// joinSandbox starts a sandbox in the namespaces of an attachment: its process's, or what has the network namespace at its path.
func joinSandbox(att api.Attachment, spec nsutil.Spec) (sandbox, error) {
	where := att.Netns
	open := func() (*nsutil.Namespace, error) { return nsutil.OpenPath(where) }
	switch {
	case att.PID != 0:
		where = fmt.Sprintf("process %d", att.PID)
		open = func() (*nsutil.Namespace, error) { return nsutil.OpenPID(att.PID) }
	case where == "": // it was attached by a descriptor
		var err error
		if where, err = nsutil.FindInode(att.Inode, ""); err != nil {
			return nil, err
		}
	}
	ns, err := open()
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if att.Inode != 0 && ns.Inode() != att.Inode { // the pid or the path is somebody else's by now; 0: of an older daemon
		return nil, fmt.Errorf("%s has another network namespace than what was attached as %q: the container has ended, and `rootless-ovl ps` lists those that live", where, att.Name)
	}
	return nsutil.StartIn(ns, spec)
}
