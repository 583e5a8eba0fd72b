// flanneld's command line on up (main.go of flannel v0.28): its environment, its way of writing flags, and the flags that
// cannot mean anything here. Those that can are with the others, in up.go and etcd.go.

package main

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// flanneldFlags are the flags that mean here what they mean to flanneld.
var flanneldFlags = []string{
	"etcd-endpoints", "etcd-prefix", "etcd-keyfile", "etcd-certfile", "etcd-cafile", "etcd-username", "etcd-password",
	"iface", "iface-regex", "iface-can-reach", "public-ip", "public-ipv6", "subnet-file", "subnet-lease-renew-margin", "ip-masq",
	"healthz-ip", "healthz-port", "net-config-path", "v",
}

const (
	noKubernetes = "leases are kept in etcd, not in Kubernetes"
	noFirewall   = "the host's firewall and routes are never touched"
	noKlog       = "--log-level says what is logged"
)

// idleFlags are the flags of flanneld that are taken and have no effect, and why.
var idleFlags = []struct {
	name   string
	isBool bool
	why    string
}{
	{"kube-subnet-mgr", true, noKubernetes},
	{"kube-api-url", false, noKubernetes},
	{"kube-annotation-prefix", false, noKubernetes},
	{"kubeconfig-file", false, noKubernetes},
	{"set-node-network-unavailable", true, noKubernetes},
	{"iptables-resync", false, noFirewall},
	{"iptables-forward-rules", true, noFirewall},
	{"ip-blackhole-route", true, noFirewall},
	{"ip-masq-fully-random-disable", true, noFirewall},
	{"vmodule", false, noKlog},
	{"log_backtrace_at", false, noKlog},
}

// idleFlag is the value of one of them.
type idleFlag struct {
	isBool bool
	text   string
}

func (v *idleFlag) String() string { return v.text }

func (v *idleFlag) Type() string {
	if v.isBool {
		return "bool"
	}
	return "string"
}

func (v *idleFlag) Set(s string) error {
	if v.isBool {
		on, err := strconv.ParseBool(s)
		if err != nil {
			return fmt.Errorf("use true or false")
		}
		s = strconv.FormatBool(on)
	}
	v.text = s
	return nil
}

// asksNothing: what is asked for is what happens here anyway.
func (v *idleFlag) asksNothing() bool { return v.text == "" || v.isBool && v.text == "false" }

// registerIdle adds the flags without effect. They are in the documents, not in the help.
func registerIdle(fs *pflag.FlagSet) {
	for _, f := range idleFlags {
		flag := fs.VarPF(&idleFlag{isBool: f.isBool}, f.name, "", "flanneld's; no effect here: "+f.why)
		flag.Hidden = true
		if f.isBool {
			flag.NoOptDefVal = "true"
		}
	}
}

// idle names the flags that were given and have no effect, those of one reason together; "" if there are none.
func idle(fs *pflag.FlagSet) string {
	var reasons []string
	names := map[string][]string{}
	for _, f := range idleFlags {
		flag := fs.Lookup(f.name)
		if v, ok := flag.Value.(*idleFlag); !ok || !flag.Changed || v.asksNothing() {
			continue
		}
		if names[f.why] == nil {
			reasons = append(reasons, f.why)
		}
		names[f.why] = append(names[f.why], "--"+f.name)
	}
	for i, why := range reasons {
		reasons[i] = strings.Join(names[why], ", ") + ": " + why
	}
	return strings.Join(reasons, "; ")
}

// flanneldVariable is the variable of the environment that stands in for a flag, as flanneld has it.
func flanneldVariable(flag string) string {
	return "FLANNELD_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// strayVariables are those of the environment that look like flanneld's and stand for none of its flags, sorted: most often a
// name that is misspelt.
func strayVariables() (stray []string) {
	known := map[string]bool{flanneldVariable("version"): true} // flanneld looks at that flag before the environment
	for _, name := range flanneldFlags {
		known[flanneldVariable(name)] = true
	}
	for _, f := range idleFlags {
		known[flanneldVariable(f.name)] = true
	}
	for _, e := range os.Environ() {
		name, value, _ := strings.Cut(e, "=")
		if strings.HasPrefix(name, flanneldVariable("")) && value != "" && !known[name] {
			stray = append(stray, name)
		}
	}
	slices.Sort(stray)
	return stray
}

// fromEnvironment sets the flags of flanneld that the command line does not have from the environment. It returns the
// variables that it took. One that is set and empty counts as unset, as for flanneld.
func fromEnvironment(fs *pflag.FlagSet) (taken []string, err error) {
	names := flanneldFlags
	for _, f := range idleFlags {
		names = append(names[:len(names):len(names)], f.name)
	}
	for _, name := range names {
		variable := flanneldVariable(name)
		text := os.Getenv(variable)
		switch {
		case text == "" || fs.Changed(name):
			continue
		case name == "etcd-password" && os.Getenv(envEtcdPassword) != "": // ours goes before flanneld's
			continue
		}
		if err := fs.Set(name, text); err != nil {
			return nil, usagef("%s: %w", variable, flagError(err))
		}
		taken = append(taken, variable)
	}
	return taken, nil
}

// doubleDashes turns flags as Go's flag package takes them, -etcd-endpoints=URL, into ours, --etcd-endpoints=URL. Only
// names of flags that cmd has are turned: single letters, and a letter with its value (-ojson), stay.
func doubleDashes(cmd *cobra.Command, args []string) []string {
	cmd.InitDefaultHelpFlag()
	cmd.InheritedFlags() // has Flags know those of the root
	fs := cmd.Flags()
	turned := make([]string, 0, len(args))
	for i := 0; i < len(args); i++ {
		arg := args[i]
		name, _, hasValue := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
		single := strings.HasPrefix(arg, "-") && !strings.HasPrefix(arg, "--")
		var flag *pflag.Flag
		switch {
		case arg == "--":
			return append(turned, args[i:]...)
		case single && len(name) == 1:
			flag = fs.ShorthandLookup(name)
		case strings.HasPrefix(arg, "-"):
			flag = fs.Lookup(name)
			if flag != nil && single {
				arg = "-" + arg
			}
		}
		turned = append(turned, arg)
		if flag != nil && flag.NoOptDefVal == "" && !hasValue && i+1 < len(args) {
			i++ // its value, whatever that looks like
			turned = append(turned, args[i])
		}
	}
	return turned
}
