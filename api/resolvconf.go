// A container's resolv.conf.

package api

import (
	"slices"
	"strings"
)

// ResolvConf is the text of resolv.conf(5) for a container: it asks the gateway for names, in the overlay's domain and then in the search domains
// of the host's text, with its options.
func (d DNS) ResolvConf(host string) []byte {
	var search []string // of the host: the last of its lines counts, as in resolv.conf(5)
	var options []string
	for line := range strings.Lines(host) {
		f := strings.Fields(line)
		switch {
		case len(f) < 2:
		case f[0] == "search":
			search = f[1:]
		case f[0] == "domain":
			search = f[1:2]
		case f[0] == "options":
			options = append(options, f[1:]...)
		}
	}
	search = append(slices.Clone(d.Search), slices.DeleteFunc(search, func(s string) bool { return slices.Contains(d.Search, strings.TrimSuffix(s, ".")) })...)
	// There is one server here.
	options = slices.DeleteFunc(options, func(o string) bool { return o == "rotate" })
	b := []byte("nameserver " + d.Server + "\n")
	if len(search) > 0 {
		b = append(b, "search "+strings.Join(search, " ")+"\n"...)
	}
	if len(options) > 0 {
		b = append(b, "options "+strings.Join(options, " ")+"\n"...)
	}
	return b
}
