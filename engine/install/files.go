// This file is what is in each file.

package install

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/engine/ocihook"
)

// wanted is a file, or a symbolic link, that is to be there.
type wanted struct {
	parts   []Part // for which it is
	path    string
	content []byte
	mode    fs.FileMode
	link    string // where it leads to: a symbolic link
	once    bool   // made when absent; from then on it is the user's
	bulky   bool   // nobody wants to read it in a --dry-run
}

// marker opens every file whose format has comments.
const marker = "# Written by `rootless-ovl install`. `rootless-ovl uninstall` takes it back.\n"

// wantedFor is everything for these parts except podman's drop-in.
func (s Setup) wantedFor(parts []Part) []wanted {
	var all []wanted
	for _, p := range parts {
		var of []wanted
		switch p {
		case Podman:
			of = []wanted{{path: s.HookPath(), content: s.hook(), mode: 0o644}}
		case Docker:
			of = []wanted{{path: s.DockerSpecPath(), content: []byte("unix://" + filepath.Join(s.RuntimeDir, "docker.sock") + "\n"), mode: 0o644}}
		case CNI:
			of = []wanted{
				{path: filepath.Join(s.cniDir(), name), content: s.script("cni"), mode: 0o755},
				{path: s.ConflistPath(), content: []byte(conflist), mode: 0o644},
			}
		case Netavark:
			of = []wanted{{path: filepath.Join(s.netavarkDir(), name), content: s.script("netavark"), mode: 0o755}}
		case Systemd:
			of = []wanted{
				{path: s.UnitPath("service"), content: s.service(), mode: 0o644},
				{path: s.UnitPath("socket"), content: s.socket(), mode: 0o644},
				{path: s.UpEnvPath(), content: []byte(upEnv), mode: 0o600, once: true},
				{path: s.WantsPath("service"), link: s.UnitPath("service")},
				{path: s.WantsPath("socket"), link: s.UnitPath("socket")},
			}
		case Shell:
			of = s.shell()
		}
		for i := range of {
			of[i].parts = []Part{p}
		}
		all = append(all, of...)
	}
	return all
}

func (s Setup) everyContainer() bool { return s.EveryContainer != nil && *s.EveryContainer }

func (s Setup) hook() []byte {
	b, err := ocihook.File(s.Plugin, s.RuntimeDir, s.everyContainer(), s.podmanAtLeast(4, 6))
	if err != nil {
		panic(err) // paths that are not absolute, which a Setup does not have
	}
	return b
}

func indented(v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		panic(err) // our own types of strings: a fault of this program
	}
	return b.Bytes()
}

// script starts the engines' program for one kind of them: they look for a file of the plugin's name in a directory.
func (s Setup) script(kind string) []byte {
	return fmt.Appendf(nil, "#!/bin/sh\n%sexec %s --runtime-dir %s %s \"$@\"\n", marker, shellWord(s.Plugin), shellWord(s.RuntimeDir), kind)
}

func shellWord(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }

// conflist is of version 1.0.0, which libcni of podman 4 and of nerdctl knows. It is without the capability portMappings: both publish ports
// themselves where they are rootless, and the second to do so would be refused.
const conflist = `{
  "cniVersion": "1.0.0",
  "name": "rootless-ovl",
  "plugins": [
    {
      "type": "rootless-ovl",
      "capabilities": {"ips": true, "mac": true, "dns": true, "aliases": true}
    }
  ]
}
`

// zshDir is a directory that zsh does not look into by itself; there is none of a user's that it does.
func (s Setup) zshDir() string { return filepath.Join(s.DataHome, "zsh", "site-functions") }

// shell is the completions and the manual pages.
func (s Setup) shell() []wanted {
	places := map[string]string{
		"bash": filepath.Join(s.DataHome, "bash-completion", "completions", name),
		"fish": filepath.Join(s.ConfigHome, "fish", "completions", name+".fish"),
		"zsh":  filepath.Join(s.zshDir(), "_"+name),
	}
	var all []wanted
	add := func(path string, content []byte) {
		all = append(all, wanted{path: path, content: content, mode: 0o644, bulky: true})
	}
	for shell, content := range s.Completions {
		if path, ok := places[shell]; ok {
			add(path, content)
		}
	}
	for page, content := range s.ManPages {
		add(filepath.Join(s.DataHome, "man", "man1", page), content)
	}
	slices.SortFunc(all, func(a, b wanted) int { return strings.Compare(a.path, b.path) })
	return all
}
