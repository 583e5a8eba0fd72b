// What is wrong with a flag, in words of this program and not of the packages that parse it.

package main

import (
	"errors"
	"fmt"

	"github.com/spf13/pflag"
)

// kinds is what the value of a flag has to be, by its name in the help; that of a bool has none.
var kinds = map[string]string{
	"port":    "a number",
	"level":   "a number",
	"minutes": "a number of minutes",
	"time":    "a time with its unit, such as 30s or 24h",
	"address": "an IP address",
	"CIDR":    "a network in CIDR form, such as 10.5.0.0/16",
}

// flagError is pflag's error in our words; one that speaks for itself stays.
func flagError(err error) error {
	var invalid *pflag.InvalidValueError
	var unknown *pflag.NotExistError
	switch {
	case errors.As(err, &invalid):
		f := invalid.GetFlag()
		name, _ := pflag.UnquoteUsage(f)
		kind := kinds[name]
		if f.Value.Type() == "bool" {
			kind = "true or false"
		}
		if kind == "" {
			return fmt.Errorf("--%s %q: %w", f.Name, invalid.GetValue(), invalid.Unwrap())
		}
		return fmt.Errorf("--%s: %q is not %s", f.Name, invalid.GetValue(), kind)
	case errors.As(err, &unknown) && len(unknown.GetSpecifiedShortnames()) > 1: // a long name behind one dash
		return fmt.Errorf("unknown flag: -%s", unknown.GetSpecifiedShortnames())
	}
	return err
}
