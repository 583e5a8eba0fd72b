// This file reads what a user asks of this hook: the container's annotations.

package ocihook

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// Prefix begins every annotation that is for this hook.
const Prefix = "run.rootless-ovl."

const (
	keyAttach = Prefix + "attach"
	keyDNS    = Prefix + "dns"
)

var errEmpty = errors.New("a value is empty: give it one, or leave the annotation out")

// shortID is how many characters of an id engines show, and name a container's host by.
const shortID = 12

// wish is what the annotations ask for.
type wish struct {
	asked   bool // there is an annotation of ours; otherwise the hook is run for every container
	leave   bool // not to be attached
	named   bool // by the user
	keepDNS bool // its resolv.conf is not to be written

	noDefaultRoute *bool // nil: as it fits
	request        api.AttachRequest
}

// options are the annotations beside attach. Those whose values are lists have commas between them.
var options = map[string]func(*wish, string) error{
	Prefix + "alias":            func(w *wish, v string) error { return list(&w.request.Aliases, v) },
	Prefix + "publish":          func(w *wish, v string) error { return list(&w.request.Publish, v) },
	Prefix + "snat":             func(w *wish, v string) error { return truth(&w.request.SNAT, v) },
	Prefix + "ip":               func(w *wish, v string) error { return text(&w.request.Addr, v) },
	Prefix + "mac":              func(w *wish, v string) error { return text(&w.request.MAC, v) },
	Prefix + "ifname":           func(w *wish, v string) error { return text(&w.request.IfName, v) },
	Prefix + "isolate":          func(w *wish, v string) error { return truth(&w.request.Isolate, v) },
	Prefix + "allow-from":       func(w *wish, v string) error { return list(&w.request.AllowFrom, v) },
	Prefix + "allow-to":         func(w *wish, v string) error { return list(&w.request.AllowTo, v) },
	Prefix + "egress":           func(w *wish, v string) error { return list(&w.request.Egress, v) },
	Prefix + "host-access":      func(w *wish, v string) error { return ports(&w.request.HostAccess, v) },
	Prefix + "no-default-route": func(w *wish, v string) error { w.noDefaultRoute = new(bool); return truth(w.noDefaultRoute, v) },
	keyDNS:                      func(w *wish, v string) error { return dns(&w.keepDNS, v) },
}

// readWish reads the annotations of the container with that id. Errors name the annotation, and have api.CodeInvalid.
func readWish(annotations map[string]string, id string) (wish, error) {
	var w wish
	if strings.TrimSpace(annotations[keyAttach]) == "false" {
		return wish{asked: true, leave: true}, nil
	}
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		if !strings.HasPrefix(key, Prefix) {
			continue
		}
		w.asked = true
		value := strings.TrimSpace(annotations[key])
		if key == keyAttach {
			w.attach(value)
			continue
		}
		set, known := options[key]
		if !known {
			return wish{}, api.Errorf(api.CodeInvalid, "%q is no annotation of rootless-ovl's: there are %s", clip(key), optionWords())
		}
		if err := set(&w, value); err != nil {
			return wish{}, api.Errorf(api.CodeInvalid, "annotation %s=%s: %w", key, clip(value), err)
		}
	}
	if !w.named {
		w.request.Name = nameOf(id)
	}
	return w, w.check(id)
}

// attach is the annotation that says under which name.
func (w *wish) attach(value string) {
	if value != "" && value != "true" {
		w.named, w.request.Name = true, value
	}
}

// check tells early what the daemon would refuse whatever the node.
func (w *wish) check(id string) error {
	r := w.request
	r.PID = 1 // of whom is not known yet
	if err := r.Validate(); err != nil {
		return inAnnotations(fmt.Errorf("annotations of container %s: %w", short(id), err))
	}
	return nil
}

// optionWords lists the annotations for an error.
func optionWords() string {
	words := slices.Sorted(maps.Keys(options))
	for i, w := range words {
		words[i] = strings.TrimPrefix(w, Prefix)
	}
	return keyAttach + " and, with the same beginning, " + strings.Join(words, ", ")
}

// nameOf names a container after its id: as engines show it, or a little more of it, for a name is not made of digits alone.
func nameOf(id string) string {
	for n := min(shortID, len(id)); n <= len(id); n++ {
		if api.CheckName(id[:n]) == nil {
			return id[:n]
		}
	}
	return "ctr-" + strings.Trim(strings.ReplaceAll(short(id), "+", "-"), "-_.")
}

func short(id string) string { return id[:min(shortID, len(id))] }

func text(to *string, value string) error {
	if value == "" {
		return errEmpty
	}
	*to = value
	return nil
}

func list(to *[]string, value string) error {
	for word := range strings.SplitSeq(value, ",") {
		if word = strings.TrimSpace(word); word == "" {
			return errEmpty
		}
		*to = append(*to, word)
	}
	return nil
}

func ports(to *[]int, value string) error {
	var words []string
	if err := list(&words, value); err != nil {
		return err
	}
	for _, word := range words {
		port, err := strconv.Atoi(word)
		if err != nil {
			return fmt.Errorf("%q is not a port: write one or more, such as 5432,8080", clip(word))
		}
		if !slices.Contains(*to, port) {
			*to = append(*to, port)
		}
	}
	return nil
}

func truth(to *bool, value string) error {
	switch value {
	case "", "true":
		*to = true
	case "false":
		*to = false
	default:
		return errors.New("use true or false")
	}
	return nil
}

func dns(keep *bool, value string) error {
	if value != "keep" {
		return errors.New("use keep, for the resolv.conf that the container has, or leave the annotation out")
	}
	*keep = true
	return nil
}
