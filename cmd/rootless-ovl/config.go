// rootless-ovl config get, config set: the network config in the store, through the daemon or directly.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/node"
)

// configStore is where the network config is: the daemon, or the store itself.
type configStore interface {
	Config(ctx context.Context) (json.RawMessage, error)
	SetConfig(ctx context.Context, raw json.RawMessage) error
	Close()
}

func (a *app) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Read or write the network's configuration",
		Long: `Read or write the network config in the store: flannel's JSON, the same for all nodes.

With --etcd-endpoints the commands speak to etcd themselves and need no daemon.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usagef("config does nothing by itself: use `config get` or `config set`")
		},
	}
	cmd.AddCommand(a.configGetCommand(), a.configSetCommand())
	return cmd
}

const configEndpoints = "`URL`s of etcd, repeated or separated by commas (default: ask the daemon)"

func (a *app) configGetCommand() *cobra.Command {
	var etcd etcdFlags
	cmd := &cobra.Command{
		Use:   "get",
		Short: "Print the network config",
		Long:  `Print the network config as it stands in the store.`,
		Example: `  rootless-ovl config get
  rootless-ovl config get --etcd-endpoints http://192.0.2.1:2379`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.configStore(cmd, &etcd)
			if err != nil {
				return err
			}
			defer s.Close()
			raw, err := s.Config(cmd.Context())
			if err != nil {
				return err
			}
			return a.printJSON(raw) // the same for people and programs: it is JSON
		},
	}
	etcd.register(cmd, configEndpoints)
	return cmd
}

func (a *app) configSetCommand() *cobra.Command {
	var etcd etcdFlags
	var domain string
	cmd := &cobra.Command{
		Use:   "set [FILE|-|JSON]",
		Short: "Check the network config and write it",
		Long: `Check a network config as flannel does, and write it to the store. One that flannel takes and no rootless-ovl node starts on is
written with a warning. It is read from a file, from standard input (-), or
given as it is when it begins with {. Nodes read it when they start.

With --domain and nothing else, the config in the store gets another domain.`,
		Example: `  rootless-ovl config set '{"Network": "10.5.0.0/16", "SubnetLen": 24, "Backend": {"Type": "udp", "Port": 8285}}'
  rootless-ovl config set network.json --etcd-endpoints http://192.0.2.1:2379
  rootless-ovl config set --domain lab.internal`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 || len(args) == 0 && !cmd.Flags().Changed("domain") {
				return usagef("config set takes one config: a file, - for standard input, or JSON in quotes")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("domain") {
				if _, err := lease.CheckDomain(domain); err != nil {
					return usageError{fmt.Errorf("--domain: %w", err)}
				}
			}
			var raw json.RawMessage
			var warnings []string
			if len(args) == 1 { // what is wrong with it is told without any store
				given, name, err := a.readConfig(args[0])
				if err != nil {
					return err
				}
				if raw, warnings, err = newConfig(given, domain, name); err != nil {
					return err
				}
			}
			s, err := a.configStore(cmd, &etcd)
			if err != nil {
				return err
			}
			defer s.Close()
			if raw == nil {
				given, err := s.Config(cmd.Context())
				if err != nil {
					return err
				}
				if raw, warnings, err = newConfig(given, domain, "the config in the store"); err != nil {
					return err
				}
			}
			if err := s.SetConfig(cmd.Context(), raw); err != nil {
				return err
			}
			for _, w := range warnings {
				fmt.Fprintf(a.stderr, "rootless-ovl: warning: %s\n", w)
			}
			return a.print(raw, func(w io.Writer) { fmt.Fprintln(w, "network config written; nodes read it when they start") })
		},
	}
	cmd.Flags().StringVar(&domain, "domain", "", "`domain` below which containers' names are found, as ovl.internal")
	etcd.register(cmd, configEndpoints)
	return cmd
}

// readConfig reads what config set was given, and says what it is.
func (a *app) readConfig(arg string) (raw []byte, name string, err error) {
	name = arg
	switch text := bytes.TrimSpace([]byte(arg)); {
	case bytes.HasPrefix(text, []byte("{")):
		raw, name = text, "the given JSON"
	case arg == "-":
		raw, err = io.ReadAll(io.LimitReader(a.stdin, api.MaxBody+1))
		name = "standard input"
	default:
		raw, err = readFile(arg)
		if errors.Is(err, fs.ErrNotExist) && (len(text) == 0 || text[0] == '[' || json.Valid(text)) {
			return nil, name, usagef("config set: %q is not a JSON object, and no file: write a config as {\"Network\": \"10.5.0.0/16\"}", arg)
		}
	}
	if err != nil {
		return nil, name, fmt.Errorf("network config: %w", err)
	}
	return raw, name, nil
}

// newConfig checks a config, of which name says what it is, and gives it a domain unless that is empty. warnings are about a config that
// flannel takes.
func newConfig(raw []byte, domain, name string) (config json.RawMessage, warnings []string, err error) {
	if domain != "" {
		if raw, err = lease.WithDomain(raw, domain); err != nil {
			return nil, nil, api.Errorf(api.CodeInvalid, "%s: %w", name, err)
		}
	}
	cfg, err := lease.ParseConfig(raw)
	if err == nil {
		err = node.CheckRanges(cfg)
	}
	if err != nil {
		return nil, nil, api.Errorf(api.CodeInvalid, "%s: %w", name, err)
	}
	if unknown := lease.UnknownMembers(raw); len(unknown) > 0 {
		for i, u := range unknown {
			unknown[i] = strconv.Quote(u)
		}
		warnings = append(warnings, fmt.Sprintf("nobody reads %s of this config: a misspelt name?", strings.Join(unknown, ", ")))
	}
	if d, err := cfg.Domain(); err == nil && !strings.Contains(d, ".") {
		warnings = append(warnings, fmt.Sprintf("the domain %q is one label: every other name below it is hidden from containers, those of the internet too if it is a top-level domain; better is one such as %s", d, lease.DefaultDomain))
	}
	if err := node.CheckConfig(cfg); err != nil {
		warnings = append(warnings, fmt.Sprintf("no rootless-ovl node starts on this: %v", err))
	}
	return bytes.TrimSpace(raw), warnings, nil
}

// readFile reads no more than could be a config, whatever the file is.
func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, api.MaxBody+1))
}

// configStore is the daemon, or with --etcd-endpoints the store.
func (a *app) configStore(cmd *cobra.Command, etcd *etcdFlags) (configStore, error) {
	c, err := etcd.config()
	if err != nil {
		return nil, err
	}
	if len(c.Endpoints) > 0 {
		return a.openStore(cmd.Context(), c, etcd.prefix)
	}
	if cmd.Flags().Changed("etcd-prefix") {
		return nil, usagef("--etcd-prefix is for etcd, and the daemon has its own: give --etcd-endpoints too")
	}
	return a.client()
}

// etcdStore is the network config in etcd itself.
type etcdStore struct {
	client   *lease.Client
	registry *lease.Registry
}

func openEtcd(ctx context.Context, c lease.ClientConfig, prefix string) (configStore, error) {
	client, err := lease.Dial(ctx, c)
	if err != nil {
		return nil, err
	}
	return etcdStore{client, lease.NewRegistry(client, prefix, nil)}, nil
}

func (s etcdStore) Config(ctx context.Context) (json.RawMessage, error) {
	c, err := s.registry.Config(ctx)
	return c.Raw, storeError(err)
}

func (s etcdStore) SetConfig(ctx context.Context, raw json.RawMessage) error {
	return storeError(s.registry.PutConfig(ctx, raw))
}

func (s etcdStore) Close() { s.client.Close() }

// storeError gives an error of the store the code that the daemon would give it.
func storeError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, lease.ErrNoConfig):
		return api.Errorf(api.CodeNotFound, "%w", err)
	case errors.Is(err, lease.ErrBadConfig):
		return api.Errorf(api.CodeInvalid, "%w", err)
	case errors.Is(err, lease.ErrAuth):
		return api.Errorf(api.CodeDenied, "%w", err)
	case errors.Is(err, lease.ErrUnreachable), errors.Is(err, lease.ErrTLS):
		return api.Errorf(api.CodeUnavailable, "%w", err)
	}
	return err
}
