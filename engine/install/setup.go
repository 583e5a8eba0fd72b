// This file is what an installation is made from, and where its files go.

package install

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Part is what can be installed and uninstalled by itself.
type Part string

// The parts.
const (
	Podman   Part = "podman"   // an OCI hook
	Docker   Part = "docker"   // the plugin's specification
	CNI      Part = "cni"      // a plugin and a network
	Netavark Part = "netavark" // a network plugin of podman 4.6 and later
	Systemd  Part = "systemd"  // the daemon as a user service, with its socket
	Shell    Part = "shell"    // completions and manual pages
)

// Parts are all of them, in the order in which they are told of.
var Parts = []Part{Podman, Docker, CNI, Netavark, Systemd, Shell}

// name is what our files are called.
const name = "rootless-ovl"

// PluginName is the program that engines start at each start and end of a container.
const PluginName = "rootless-ovl-plugin"

// startPlugin are the parts whose files have engines start it.
var startPlugin = []Part{Podman, CNI, Netavark}

// startsPlugin tells whether one of these parts does.
func startsPlugin(parts []Part) bool {
	return slices.ContainsFunc(parts, func(p Part) bool { return slices.Contains(startPlugin, p) })
}

// Setup is where things are on this machine. All paths are absolute.
type Setup struct {
	Program    string // this program, as it will be started
	Plugin     string // PluginName, which engines start; empty: there is none
	RuntimeDir string // the daemon's
	StateDir   string // the daemon's, where the record is kept too

	ConfigHome string // ~/.config
	DataHome   string // ~/.local/share
	LibHome    string // ~/.local/lib

	EveryContainer *bool // podman's hook is for every container, not only for annotated ones; nil: as it is, or not

	Completions map[string][]byte // by shell (bash, fish, zsh): the shells that are to have them
	ManPages    map[string][]byte // by file name, all of section 1

	PodmanVersion  string // as `podman --version` prints it; empty: there is no podman
	ContainersConf string // $CONTAINERS_CONF: instead of all other files podman reads this one
	SystemdRuns    bool   // systemd is what started this machine
}

// plugin is the program that engines start for these parts; empty where none of them does.
func (s Setup) plugin(parts []Part) string {
	if !startsPlugin(parts) {
		return ""
	}
	return s.Plugin
}

// check refuses what could not be written into files that others parse.
func (s Setup) check() error {
	paths := map[string]string{
		"the program": s.Program, "the runtime directory": s.RuntimeDir, "the state directory": s.StateDir,
		"the directory of configuration": s.ConfigHome, "the directory of data": s.DataHome, "the directory of libraries": s.LibHome,
	}
	if s.Plugin != "" {
		paths["the engines' program"] = s.Plugin
	}
	for what, path := range paths {
		odd := func(r rune) bool { return unicode.IsControl(r) || r == utf8.RuneError }
		if !filepath.IsAbs(path) || strings.ContainsFunc(path, odd) {
			return fmt.Errorf("%s is at %q, which is not an absolute path of printable characters: set HOME, the XDG variables or --runtime-dir and --state-dir so that it is", what, path)
		}
	}
	return nil
}

// Directories of ours alone, which engines are told of.

func (s Setup) ownDir(what string) string { return filepath.Join(s.DataHome, name, what) }

// HooksDir is where podman is to look for OCI hooks.
func (s Setup) HooksDir() string { return s.ownDir("hooks.d") }

func (s Setup) cniDir() string      { return s.ownDir("cni") }
func (s Setup) netavarkDir() string { return s.ownDir("netavark") }

// HookPath is the OCI hook.
func (s Setup) HookPath() string { return filepath.Join(s.HooksDir(), name+".json") }

// DockerSpecPath is where dockerd looks for the plugin.
func (s Setup) DockerSpecPath() string {
	return filepath.Join(s.LibHome, "docker", "plugins", name+".spec")
}

// UnitPath is where the service (or socket) of systemd is.
func (s Setup) UnitPath(kind string) string {
	return filepath.Join(s.ConfigHome, "systemd", "user", name+"."+kind)
}

// WantsPath is the link by which the unit is enabled.
func (s Setup) WantsPath(kind string) string {
	target := map[string]string{"service": "default.target", "socket": "sockets.target"}[kind]
	return filepath.Join(s.ConfigHome, "systemd", "user", target+".wants", name+"."+kind)
}

// UpEnvPath is the file with the flags of the service.
func (s Setup) UpEnvPath() string { return filepath.Join(s.ConfigHome, name, "up.env") }

// DropInPath is our part of containers.conf.
func (s Setup) DropInPath() string {
	return filepath.Join(s.ConfigHome, "containers", "containers.conf.d", "50-"+name+".conf")
}

// ConflistPath is the network of CNI.
func (s Setup) ConflistPath() string {
	return filepath.Join(s.ConfigHome, "cni", "net.d", "50-"+name+".conflist")
}

var versionNumber = regexp.MustCompile(`\b(\d+)\.(\d+)`)

// podmanAtLeast tells whether podman is of that version or later; one whose version cannot be read is taken for a new one.
func (s Setup) podmanAtLeast(major, minor int) bool {
	m := versionNumber.FindStringSubmatch(s.PodmanVersion)
	if m == nil {
		return true
	}
	a, errA := strconv.Atoi(m[1])
	b, errB := strconv.Atoi(m[2])
	return errA != nil || errB != nil || a > major || a == major && b >= minor
}

// HasNetavarkPlugins tells whether there is a podman that takes plugins of netavark.
func (s Setup) HasNetavarkPlugins() bool { return s.PodmanVersion != "" && s.podmanAtLeast(4, 6) }

// Found are the parts for which there is something on this machine. onPath tells whether a program is on the search path.
func (s Setup) Found(view fs.FS, onPath func(program string) bool) []Part {
	there := func(path string) bool {
		_, err := fs.Stat(view, viewName(path))
		return err == nil
	}
	found := map[Part]bool{
		Podman:   s.PodmanVersion != "",
		Docker:   onPath("dockerd") || onPath("dockerd-rootless.sh") || there(filepath.Join(s.ConfigHome, "systemd", "user", "docker.service")),
		CNI:      onPath("nerdctl") || onPath("cnitool") || there(filepath.Dir(s.ConflistPath())),
		Netavark: s.HasNetavarkPlugins(),
		Systemd:  s.SystemdRuns,
		Shell:    len(s.Completions)+len(s.ManPages) > 0,
	}
	return slices.DeleteFunc(slices.Clone(Parts), func(p Part) bool { return !found[p] })
}
