// rootless-ovl docker-opts: what dockerd is to be told of our subnet, as flannel's dist/mk-docker-opts.sh writes it.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// Names of variables: that of each option begins with the first, all options together are in the second.
const (
	dockerOption  = "DOCKER_OPT_"
	dockerOptions = "DOCKER_OPTS"
)

type dockerOptsFlags struct {
	subnetFile string
	writeTo    string
	individual bool
	combined   bool
	key        string
	noIPMasq   bool
}

func (a *app) dockerOptsCommand() *cobra.Command {
	var f dockerOptsFlags
	cmd := &cobra.Command{
		Use:   "docker-opts",
		Short: "Print what dockerd is to be told of this node's subnet",
		Long: `Print dockerd's options for a bridge in this node's subnet, out of its subnet.env, as flannel's mk-docker-opts.sh does and
with its flags: each option in a variable of its own (DOCKER_OPT_BIP, DOCKER_OPT_IPMASQ, DOCKER_OPT_MTU), then all of them in
DOCKER_OPTS. What DOCKER_OPTS holds in the environment stays in front, and DOCKER_OPT_... of the environment are added.`,
		Example: `  rootless-ovl docker-opts
  rootless-ovl docker-opts -c -k DOCKER_NETWORK_OPTIONS -d ~/.config/docker-opts.env`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !isVariable(f.key) {
				return usagef("--key %q cannot be the name of a variable: use letters, digits and _", f.key)
			}
			if f.writeTo != "" && a.output.value == outputJSON {
				return usagef("--docker-env writes variables for a shell or systemd, not JSON: leave out one of the two")
			}
			env, err := a.subnetEnv(cmd.Context(), f.subnetFile)
			if err != nil {
				return err
			}
			return a.writeDockerOpts(f, f.variables(env, os.Environ()))
		},
	}
	fs := cmd.Flags()
	fs.StringVarP(&f.subnetFile, "subnet-file", "f", "", "`file` to read, as up writes it (default: the running daemon's, or that in the runtime directory)")
	fs.StringVarP(&f.writeTo, "docker-env", "d", "", "`file` to write (default: standard output)")
	fs.BoolVarP(&f.individual, "individual", "i", false, "only each option in a variable of its own")
	fs.BoolVarP(&f.combined, "combined", "c", false, "only all options in one variable")
	fs.StringVarP(&f.key, "key", "k", dockerOptions, "`name` of the variable with all options")
	fs.BoolVarP(&f.noIPMasq, "no-ip-masq", "m", false, "leave out what says whether docker masquerades")
	return cmd
}

var variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func isVariable(name string) bool { return variable.MatchString(name) }

// subnetEnv reads the node's subnet.env, or the given file. It must be there: a docker that starts without it would take a
// subnet of its own, and nobody would notice before a packet is lost.
func (a *app) subnetEnv(ctx context.Context, file string) (lease.SubnetEnv, error) {
	if file == "" {
		dir, err := a.runtime()
		if err != nil {
			return lease.SubnetEnv{}, err
		}
		file = filepath.Join(dir, "subnet.env")
		if at := a.daemonsSubnetFile(ctx, dir); at != "" {
			file = at
		}
	}
	env, err := lease.ReadSubnetEnv(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return env, fmt.Errorf("%w: start the node with `rootless-ovl up`, or name the file with --subnet-file", err)
	case err == nil && !env.Subnet.IsValid():
		err = fmt.Errorf("subnet file %s has no FLANNEL_SUBNET, so no IPv4 subnet, and docker needs one", file)
	}
	return env, err
}

// daemonsSubnetFile is where the daemon of a runtime directory writes; "" if there is none.
func (a *app) daemonsSubnetFile(ctx context.Context, dir string) string {
	c := api.NewClient(api.SocketPath(dir))
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, daemonPatience)
	defer cancel()
	s, err := c.Status(ctx)
	if err != nil {
		return ""
	}
	return s.SubnetEnv
}

// shellVariable is NAME="value".
type shellVariable struct{ name, value string }

// variables is what the script writes: the single options sorted by name, then all of them in one.
func (f dockerOptsFlags) variables(env lease.SubnetEnv, environ []string) []shellVariable {
	single := map[string]string{}
	var together string
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		switch {
		case name == f.key && value != "":
			together = value + " "
		case strings.HasPrefix(name, dockerOption) && isVariable(name) && value != "":
			single[name] = value
		}
	}
	gateway := netip.PrefixFrom(env.Subnet.Addr().Next(), env.Subnet.Bits())
	single[dockerOption+"BIP"] = fmt.Sprintf("--bip=%v", gateway)
	if env.MTU != 0 {
		single[dockerOption+"MTU"] = fmt.Sprintf("--mtu=%d", env.MTU)
	}
	if !f.noIPMasq && !env.IPMasqAbsent { // what the node masquerades, docker must not
		single[dockerOption+"IPMASQ"] = fmt.Sprintf("--ip-masq=%t", !env.IPMasq)
	}
	var all []shellVariable
	for name, value := range single {
		all = append(all, shellVariable{name, value})
	}
	slices.SortFunc(all, func(a, b shellVariable) int { return strings.Compare(a.name, b.name) })
	for _, v := range all {
		together += " " + v.value
	}
	if f.combined && !f.individual {
		all = nil
	}
	if f.combined || !f.individual {
		all = append(all, shellVariable{f.key, together})
	}
	return all
}

// inQuotes escapes what a shell and systemd read as something else between double quotes.
var inQuotes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`")

func (a *app) writeDockerOpts(f dockerOptsFlags, vars []shellVariable) error {
	if a.output.value == outputJSON {
		object := map[string]string{}
		for _, v := range vars {
			object[v.name] = v.value
		}
		return a.printJSON(object)
	}
	var text bytes.Buffer
	for _, v := range vars {
		fmt.Fprintf(&text, "%s=\"%s\"\n", v.name, inQuotes.Replace(v.value))
	}
	if f.writeTo == "" {
		_, err := text.WriteTo(a.stdout)
		return err
	}
	return os.WriteFile(f.writeTo, text.Bytes(), 0o644)
}
