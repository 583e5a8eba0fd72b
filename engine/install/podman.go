// This file is our part of containers.conf: a drop-in file that adds directories to the lists that podman reads.
//
// Podman reads, in this order, /usr/share/containers/containers.conf, /etc/containers/containers.conf and .conf.d/*.conf, the user's
// containers.conf and .conf.d/*.conf in the order of their names. Of a list the last file that has it counts, whole. From podman 5 on a list that ends in
// {append=true} is added to what was read before; earlier ones refuse that. For these the drop-in repeats what it would hide, and
// doctor looks whether it still does.
//
// Source: containers/common pkg/config/config.go, systemConfigs and addConfigs, and internal/attributedstring.

package install

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// list is one of the lists: which it is, what is ours in it, and what podman takes where no file has it.
type list struct {
	part       Part
	table, key string
	dir        func(Setup) string
	byDefault  []string
}

var lists = []list{
	{Podman, "engine", "hooks_dir", Setup.HooksDir, nil}, // without root there is no default
	{CNI, "network", "cni_plugin_dirs", Setup.cniDir, []string{
		"/usr/local/libexec/cni", "/usr/libexec/cni", "/usr/local/lib/cni", "/usr/lib/cni", "/opt/cni/bin",
	}},
	{Netavark, "network", "netavark_plugin_dirs", Setup.netavarkDir, []string{
		"/usr/local/libexec/netavark", "/usr/libexec/netavark", "/usr/local/lib/netavark", "/usr/lib/netavark",
	}},
}

// confFile is what a file of podman's says of the lists. An element is a string, or a table with the key append.
type confFile map[string]map[string]any

// parseConf takes the text of a containers.conf, of which only the lists matter.
func parseConf(text []byte) (confFile, error) {
	var raw map[string]any
	if err := toml.Unmarshal(text, &raw); err != nil {
		return nil, err
	}
	conf := confFile{}
	for table, v := range raw {
		if keys, ok := v.(map[string]any); ok {
			conf[table] = keys
		}
	}
	return conf, nil
}

// of is the list in the file: its strings, whether they are added to those before, and whether it is there at all.
func (c confFile) of(l list) (dirs []string, adds, is bool) {
	elements, ok := c[l.table][l.key].([]any)
	if !ok {
		return nil, false, false
	}
	for _, e := range elements {
		switch e := e.(type) {
		case string:
			dirs = append(dirs, e)
		case map[string]any:
			if on, _ := e["append"].(bool); on {
				adds = true
			}
		}
	}
	return dirs, adds, true
}

// confFiles are the files that podman reads, in order. With before only those before our drop-in are given.
func (s Setup) confFiles(view fs.FS) (before, after []string, err error) {
	user := filepath.Join(s.ConfigHome, "containers", "containers.conf")
	all := []string{"/usr/share/containers/containers.conf", "/etc/containers/containers.conf"}
	for _, dir := range []string{"/etc/containers/containers.conf.d", user + ".d"} {
		if dir == user+".d" {
			all = append(all, user)
		}
		found, err := fs.ReadDir(view, viewName(dir)) // sorted
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, err
		}
		for _, e := range found {
			if !e.IsDir() && strings.HasSuffix(e.Name(), ".conf") {
				all = append(all, filepath.Join(dir, e.Name()))
			}
		}
	}
	for _, path := range all {
		switch {
		case path == s.DropInPath():
		case filepath.Dir(path) == user+".d" && path > s.DropInPath():
			after = append(after, path)
		default:
			before = append(before, path)
		}
	}
	return before, after, nil
}

// fold is the list as podman has it after reading these files, from what it had before.
func fold(view fs.FS, files []string, l list, dirs []string) ([]string, error) {
	for _, path := range files {
		text, err := fs.ReadFile(view, viewName(path))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		conf, err := parseConf(text)
		if err != nil {
			return nil, api.Errorf(api.CodeInvalid, "%s is not TOML, podman cannot read it either: mend it: %w", path, err)
		}
		its, adds, is := conf.of(l)
		switch {
		case !is:
		case adds:
			dirs = append(slices.Clip(dirs), its...)
		default:
			dirs = its
		}
	}
	return dirs, nil
}

// dropIn is our containers.conf for these parts. It is nil where none of them needs one.
func (s Setup) dropIn(view fs.FS, parts []Part) (*wanted, error) {
	before, after, err := s.confFiles(view)
	if err != nil {
		return nil, err
	}
	w := &wanted{path: s.DropInPath(), mode: 0o644}
	var text strings.Builder
	text.WriteString(marker)
	table := ""
	for _, l := range lists {
		if !slices.Contains(parts, l.part) || l.part == CNI && s.PodmanVersion == "" {
			continue
		}
		own := l.dir(s)
		had, err := fold(view, before, l, l.byDefault)
		if err != nil {
			return nil, err
		}
		ours := append(slices.DeleteFunc(slices.Clone(had), func(d string) bool { return d == own }), own)
		last, err := fold(view, after, l, ours)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(last, own) {
			return nil, api.Errorf(api.CodeInvalid, "%s of %s is read after our %s and hides it: add %q to it, or remove it", l.key, strings.Join(after, ", "), filepath.Base(w.path), own)
		}
		w.parts = append(w.parts, l.part)
		if table != l.table {
			fmt.Fprintf(&text, "\n[%s]\n", l.table)
			table = l.table
		}
		if s.podmanAtLeast(5, 0) {
			fmt.Fprintf(&text, "%s = [\n  %s,\n  {append=true},\n]\n", l.key, tomlString(own))
			continue
		}
		if len(ours) > 1 {
			text.WriteString("# This list takes the place of those of other files: all but its last line repeats them.\n")
		}
		fmt.Fprintf(&text, "%s = [\n", l.key)
		for _, d := range ours {
			fmt.Fprintf(&text, "  %s,\n", tomlString(d))
		}
		text.WriteString("]\n")
	}
	if len(w.parts) == 0 {
		return nil, nil
	}
	w.content = []byte(text.String())
	return w, nil
}

// tomlString is a basic string of TOML 1.0.
func tomlString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// KnownToPodman tells whether podman, as its files are now, looks for hooks in HooksDir, and whether our drop-in hides from it a directory that
// other files name. With $CONTAINERS_CONF podman reads that file alone.
func (s Setup) KnownToPodman(view fs.FS) (known bool, hidden []string, err error) {
	l := lists[0]
	if s.ContainersConf != "" {
		dirs, err := fold(view, []string{s.ContainersConf}, l, nil)
		return slices.Contains(dirs, s.HooksDir()), nil, err
	}
	before, after, err := s.confFiles(view)
	if err != nil {
		return false, nil, err
	}
	others, err := fold(view, before, l, nil)
	if err != nil {
		return false, nil, err
	}
	with, err := fold(view, append([]string{s.DropInPath()}, after...), l, others)
	if err != nil {
		return false, nil, err
	}
	if len(after) == 0 {
		for _, d := range others {
			if !slices.Contains(with, d) {
				hidden = append(hidden, d)
			}
		}
	}
	return slices.Contains(with, s.HooksDir()), hidden, nil
}
