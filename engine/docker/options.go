// This file is what a user may ask for with `docker network create -o KEY=VALUE`, and for one container with
// `docker run --network name=ovl,driver-opt=KEY=VALUE`: the policy of attachments, in the words of `rootless-ovl attach`.

package docker

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// optionPrefix may stand before the options, as in annotations.
const optionPrefix = "run.rootless-ovl."

// options are what was asked for of a network or an endpoint.
type options struct {
	api.Policy
	SNAT bool `json:"snat,omitempty"` // of published ports
}

var optionWords = map[string]func(*options, string) error{
	"isolate":    func(o *options, v string) error { return parseFlag(&o.Isolate, v) },
	"snat":       func(o *options, v string) error { return parseFlag(&o.SNAT, v) },
	"allow-from": func(o *options, v string) error { o.AllowFrom = words(v); return nil },
	"allow-to":   func(o *options, v string) error { o.AllowTo = words(v); return nil },
	"egress":     func(o *options, v string) error { o.Egress = words(v); return nil },
	"host-access": func(o *options, v string) error {
		o.HostAccess = nil
		for _, w := range words(v) {
			port, err := strconv.Atoi(w)
			if err != nil {
				return fmt.Errorf("%q is not a port", w)
			}
			o.HostAccess = append(o.HostAccess, port)
		}
		return nil
	},
}

// with is o with what a user has given on top; each option takes the place of the one before. The error names what is wrong.
func (o options) with(given map[string]string) (options, error) {
	for _, key := range slices.Sorted(maps.Keys(given)) {
		value := given[key]
		word := strings.TrimPrefix(key, optionPrefix)
		set, known := optionWords[word]
		switch {
		case key == labelMTU:
			return o, fmt.Errorf("option %s=%s: containers have the overlay's MTU, which `rootless-ovl status` shows: leave it out", key, value)
		case !known:
			return o, fmt.Errorf("option %q is none of this driver's: use %s", key, strings.Join(slices.Sorted(maps.Keys(optionWords)), ", "))
		}
		if err := set(&o, value); err != nil {
			return o, fmt.Errorf("option %s=%s: %w", key, value, err)
		}
	}
	return o, o.Validate()
}

// flags are o as -o of `docker network create` takes it.
func (o options) flags() (flags []string) {
	add := func(key string, values []string) {
		if len(values) > 0 {
			flags = append(flags, key+"="+strings.Join(values, ","))
		}
	}
	if o.Isolate {
		add("isolate", []string{"true"})
	}
	add("allow-from", o.AllowFrom)
	add("allow-to", o.AllowTo)
	add("egress", o.Egress)
	var ports []string
	for _, p := range o.HostAccess {
		ports = append(ports, strconv.Itoa(p))
	}
	add("host-access", ports)
	if o.SNAT {
		add("snat", []string{"true"})
	}
	return flags
}

// words are separated by commas or spaces.
func words(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' })
}

func parseFlag(into *bool, text string) error {
	switch strings.ToLower(text) {
	case "", "true", "1", "yes":
		*into = true
	case "false", "0", "no":
		*into = false
	default:
		return fmt.Errorf("use true or false")
	}
	return nil
}
