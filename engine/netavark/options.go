// The options of networks (podman network create -o) and of containers (podman run --network NETWORK:OPTION=VALUE): the words of the API.

package netavark

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// options are those of a container: its network's, and its own, which go before.
type options struct {
	policy         api.Policy
	noDefaultRoute bool
	snat           bool
	name           string
	publish        []string
}

// known are the options by name; those with ofContainer make no sense for a network. Lists are separated by commas, blanks or semicolons: podman
// itself splits a container's options at commas.
var known = map[string]struct {
	set         func(o *options, value string) error
	ofContainer bool
}{
	"isolate":          {set: func(o *options, v string) error { return setBool(&o.policy.Isolate, v) }},
	"allow_from":       {set: func(o *options, v string) error { o.policy.AllowFrom = list(v); return nil }},
	"allow_to":         {set: func(o *options, v string) error { o.policy.AllowTo = list(v); return nil }},
	"egress":           {set: func(o *options, v string) error { o.policy.Egress = list(v); return nil }},
	"host_access":      {set: func(o *options, v string) error { return setPorts(&o.policy.HostAccess, v) }},
	"no_default_route": {set: func(o *options, v string) error { return setBool(&o.noDefaultRoute, v) }},
	"snat":             {set: func(o *options, v string) error { return setBool(&o.snat, v) }},
	"name":             {set: func(o *options, v string) error { o.name = v; return api.CheckName(v) }, ofContainer: true},
	"publish":          {set: func(o *options, v string) error { o.publish = list(v); return checkPublish(o.publish) }, ofContainer: true},
}

// options reads those of the network, and of a container in it unless that is nil.
func (n *network) options(c *container) (options, error) {
	var o options
	if err := o.take(n.Options, false); err != nil {
		return o, err
	}
	if c != nil {
		if err := o.take(c.Options.Options, true); err != nil {
			return o, err
		}
	}
	if n.Internal {
		if len(o.policy.Egress) > 0 {
			return o, errors.New("option egress: an internal network reaches nothing outside: leave it out, or create the network without --internal")
		}
		o.noDefaultRoute, o.policy.Egress = true, []string{"deny"}
	}
	return o, o.policy.Validate()
}

// take sets what given says.
func (o *options) take(given map[string]string, ofContainer bool) error {
	for _, key := range slices.Sorted(maps.Keys(given)) {
		opt, ok := known[strings.ReplaceAll(key, "-", "_")]
		switch {
		case !ok:
			return fmt.Errorf("option %q is not known: there are %s", key, names(ofContainer))
		case opt.ofContainer && !ofContainer:
			return fmt.Errorf("option %q is one of a container, not of a network: give it as in podman run --network NETWORK:%s=%s", key, key, given[key])
		}
		if err := opt.set(o, given[key]); err != nil {
			return fmt.Errorf("option %s: %w", key, err)
		}
	}
	return nil
}

// names are the options that can be given.
func names(ofContainer bool) string {
	var list []string
	for name, opt := range known {
		if ofContainer || !opt.ofContainer {
			list = append(list, name)
		}
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

func list(value string) []string {
	return strings.FieldsFunc(value, func(c rune) bool { return c == ',' || c == ';' || c == ' ' })
}

// setBool reads a switch, which may stand alone.
func setBool(b *bool, value string) error {
	if value == "" {
		*b = true
		return nil
	}
	v, err := strconv.ParseBool(value)
	if err != nil {
		return fmt.Errorf("%q is neither true nor false", value)
	}
	*b = v
	return nil
}

func setPorts(ports *[]int, value string) error {
	*ports = nil
	for _, s := range list(value) {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("%q is not a port: give 1 to 65535", s)
		}
		*ports = append(*ports, int(n))
	}
	return nil
}

func checkPublish(specs []string) error {
	for _, s := range specs {
		if _, err := api.ParsePublish(s); err != nil {
			return err
		}
	}
	return nil
}
