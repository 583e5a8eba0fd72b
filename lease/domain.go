// This file is the network's domain: where it stands in the network config, and what it may be.
//
//	{"Network": "10.5.0.0/16", ..., "RootlessOvl": {"Domain": "ovl.internal"}}
//
// flannel passes over the member, and takes a config whatever is in it: so does ParseConfig.

package lease

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// DefaultDomain is below what containers' names are found where the config names no domain.
const DefaultDomain = "ovl.internal"

// domainMember and ownMember are where the domain stands.
const (
	ownMember    = "RootlessOvl"
	domainMember = "Domain"
)

// maxDomain in bytes leaves room for a name of maxDNSName within the 253 of a whole name.
const maxDomain = 150

// Domain is the network's domain, in lower case and without a dot at the end.
func (c NetworkConfig) Domain() (string, error) {
	if len(c.RootlessOvl) == 0 || bytes.Equal(c.RootlessOvl, []byte("null")) {
		return DefaultDomain, nil
	}
	own := struct{ Domain *string }{}
	if err := json.Unmarshal(c.RootlessOvl, &own); err != nil {
		return "", fmt.Errorf("%w: %w", ErrBadConfig, inWords(ownMember, err))
	}
	if own.Domain == nil {
		return DefaultDomain, nil
	}
	d, err := CheckDomain(*own.Domain)
	if err != nil {
		return "", fmt.Errorf("%w: %s: %w", ErrBadConfig, ownMember, err)
	}
	return d, nil
}

// CheckDomain tells whether containers' names can be below domain, and returns it in lower case without a dot at the end.
func CheckDomain(domain string) (string, error) {
	d := strings.ToLower(strings.TrimSuffix(domain, "."))
	fail := func(why string) (string, error) {
		return "", fmt.Errorf("domain %.200q: %s: give one such as %s", domain, why, DefaultDomain)
	}
	if d == "" || len(d) > maxDomain {
		return fail(fmt.Sprintf("it has %d characters, and 1 to %d are needed", len(d), maxDomain))
	}
	labels := strings.Split(d, ".")
	for _, l := range labels {
		if err := checkLabel(l); err != nil {
			return fail(err.Error())
		}
	}
	switch last := labels[len(labels)-1]; {
	case last == "arpa" || last == "localhost" || last == "local":
		return fail(last + " has a meaning of its own")
	case strings.Trim(last, "0123456789") == "":
		return fail("it ends in a number")
	}
	return d, nil
}

// WithDomain is a network config with another domain, and everything else as it was. raw must parse.
func WithDomain(raw []byte, domain string) ([]byte, error) {
	if _, err := CheckDomain(domain); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadConfig, err)
	}
	text, err := json.Marshal(domain)
	if err != nil {
		return nil, err
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadConfig, inWords("it", err))
	}
	own := make(map[string]json.RawMessage)
	for name, value := range all {
		if strings.EqualFold(name, ownMember) {
			if err := json.Unmarshal(value, &own); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrBadConfig, inWords(ownMember, err))
			}
			delete(all, name)
		}
	}
	if own == nil { // it was null
		own = make(map[string]json.RawMessage)
	}
	for name := range own {
		if strings.EqualFold(name, domainMember) {
			delete(own, name)
		}
	}
	own[domainMember] = text
	if all[ownMember], err = json.Marshal(own); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}
