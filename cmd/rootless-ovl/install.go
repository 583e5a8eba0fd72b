// rootless-ovl install, uninstall: the files by which engines, systemd and the shell know this program.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/rootless-ovl/rootless-ovl/engine/install"
)

// wholeView is the file system as engine/install looks at it.
var wholeView = os.DirFS("/")

func (a *app) installCommand() *cobra.Command {
	var dryRun, everyContainer bool
	cmd := &cobra.Command{
		Use:   "install [podman|docker|cni|netavark|systemd|shell]...",
		Short: "Make podman, docker, CNI, systemd and the shell know this program",
		Long: `Write the files in your home directory by which engines, systemd and the shell know this program; without an argument, for what is found
on this machine. Nothing is overwritten that was not written by an earlier install, and "uninstall" takes back exactly what was written.

podman    an OCI hook that attaches containers with the annotation run.rootless-ovl.attach
docker    the specification of the network plugin
cni       a plugin, and a network called rootless-ovl
netavark  a network plugin of podman 4.6 and later
systemd   the daemon as a user service, enabled, with its socket
shell     completions and manual pages`,
		Example: `  rootless-ovl install --dry-run
  rootless-ovl install
  rootless-ovl install podman systemd
  rootless-ovl install podman --every-container`,
		Args:      partsOnly,
		ValidArgs: partNames(),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.installSetup(cmd.Context())
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("every-container") {
				s.EveryContainer = &everyContainer
			}
			if err := a.addShellFiles(&s); err != nil {
				return err
			}
			parts := partsOf(args)
			if len(parts) == 0 {
				parts = s.Found(wholeView, a.onPath)
			}
			if everyContainer && !slices.Contains(parts, install.Podman) {
				return usagef("--every-container is about podman: use `rootless-ovl install podman --every-container`")
			}
			if len(parts) == 0 {
				return errors.New("neither podman, docker, nerdctl nor systemd is found here: install one of them, or name what you want, as `rootless-ovl install podman`")
			}
			p, err := s.Install(wholeView, parts)
			if err != nil {
				return err
			}
			return a.carryOut(p, dryRun)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would be written, and write nothing")
	cmd.Flags().BoolVar(&everyContainer, "every-container", false, "with podman: attach every container, not only annotated ones; stays until it is set to false")
	return cmd
}

func (a *app) uninstallCommand() *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "uninstall [podman|docker|cni|netavark|systemd|shell]...",
		Short: "Take back what install has written",
		Long: `Take back what "install" has written; without an argument, everything. Files that were changed since stay, and are named; directories stay that
were there before, or have something else in them.`,
		Example: `  rootless-ovl uninstall --dry-run
  rootless-ovl uninstall
  rootless-ovl uninstall docker`,
		Args:      partsOnly,
		ValidArgs: partNames(),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.installSetup(cmd.Context())
			if err != nil {
				return err
			}
			p, err := s.Uninstall(wholeView, partsOf(args))
			if err != nil {
				return err
			}
			return a.carryOut(p, dryRun)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would be removed, and remove nothing")
	return cmd
}

func partNames() []string {
	var names []string
	for _, p := range install.Parts {
		names = append(names, string(p))
	}
	return names
}

func partsOnly(_ *cobra.Command, args []string) error {
	for _, arg := range args {
		if !slices.Contains(partNames(), arg) {
			return usagef("%q is not known here: use %s", arg, strings.Join(partNames(), ", "))
		}
	}
	return nil
}

func partsOf(args []string) []install.Part {
	var parts []install.Part
	for _, arg := range args {
		parts = append(parts, install.Part(arg))
	}
	return parts
}

// installSetup is this machine, without what the shell gets.
func (a *app) installSetup(ctx context.Context) (install.Setup, error) {
	s := install.Setup{
		Program:        a.programPath(),
		Plugin:         a.pluginPath(),
		PodmanVersion:  a.podmanVersion(ctx),
		ContainersConf: os.Getenv("CONTAINERS_CONF"),
		SystemdRuns:    a.systemdRuns(),
	}
	var err error
	if s.RuntimeDir, err = a.runtime(); err != nil {
		return s, err
	}
	if s.StateDir, err = a.state(); err != nil {
		return s, err
	}
	for _, d := range []struct {
		into             *string
		variable, inHome string
	}{
		{&s.ConfigHome, "XDG_CONFIG_HOME", ".config"}, {&s.DataHome, "XDG_DATA_HOME", ".local/share"}, {&s.LibHome, "XDG_LIB_HOME", ".local/lib"},
	} {
		*d.into = os.Getenv(d.variable)
		if !filepath.IsAbs(*d.into) { // as the XDG specification asks
			*d.into = filepath.Join(os.Getenv("HOME"), d.inHome)
		}
	}
	return s, nil
}

// addShellFiles makes completions for the shells that are here, and manual pages where there is man.
func (a *app) addShellFiles(s *install.Setup) error {
	root := (&app{world: a.world}).root() // a tree of its own: the texts are changed
	plainUsage(root)
	s.Completions, s.ManPages = map[string][]byte{}, map[string][]byte{}
	for shell, generate := range map[string]func(io.Writer) error{
		"bash": func(w io.Writer) error { return root.GenBashCompletionV2(w, true) },
		"fish": func(w io.Writer) error { return root.GenFishCompletion(w, true) },
		"zsh":  root.GenZshCompletion,
	} {
		if !a.onPath(shell) {
			continue
		}
		var b bytes.Buffer
		if err := generate(&b); err != nil {
			return err
		}
		s.Completions[shell] = b.Bytes()
	}
	if !a.onPath("man") {
		return nil
	}
	return manPages(root, buildTime(s.Program), s.ManPages)
}

// buildTime stands on manual pages. Two installations of one program have the same.
func buildTime(program string) time.Time {
	if fi, err := os.Stat(program); err == nil {
		return fi.ModTime()
	}
	return time.Unix(0, 0)
}

// manPages adds the page of a command and of those below it.
func manPages(cmd *cobra.Command, date time.Time, to map[string][]byte) error {
	cmd.DisableAutoGenTag = true
	name := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
	var b bytes.Buffer
	header := doc.GenManHeader{Title: strings.ToUpper(name), Section: "1", Source: "rootless-ovl " + thisBuild().Version, Manual: "rootless-ovl", Date: &date}
	if err := doc.GenMan(cmd, &header, &b); err != nil {
		return err
	}
	to[name+".1"] = b.Bytes()
	for _, sub := range cmd.Commands() {
		if !sub.IsAvailableCommand() || sub.IsAdditionalHelpTopicCommand() {
			continue
		}
		if err := manPages(sub, date, to); err != nil {
			return err
		}
	}
	return nil
}

// installResult is a plan for programs.
type installResult struct {
	DryRun  bool            `json:"dry_run"`
	Changes []installChange `json:"changes"`
	Foreign []string        `json:"foreign"` // as wanted, but not ours
	Kept    []string        `json:"kept"`    // changed since they were installed
	Notes   []string        `json:"notes"`
}

type installChange struct {
	Action  string `json:"action"`
	Path    string `json:"path"`
	Mode    string `json:"mode,omitempty"` // octal
	Target  string `json:"target,omitempty"`
	Content string `json:"content,omitempty"` // of files that people read
}

// carryOut does what is planned, or shows it.
func (a *app) carryOut(p install.Plan, dryRun bool) error {
	result := installResult{DryRun: dryRun, Changes: []installChange{}, Foreign: orNone(p.Foreign), Kept: orNone(p.Kept), Notes: orNone(p.Notes)}
	note := func(c install.Change) {
		change := installChange{Action: c.Action, Path: c.Path, Target: c.Target}
		if !c.Bulky {
			change.Content = string(c.New)
		}
		if c.Mode != 0 {
			change.Mode = fmt.Sprintf("%04o", c.Mode)
		}
		result.Changes = append(result.Changes, change)
	}
	var shown bytes.Buffer
	if dryRun {
		for _, c := range p.Changes {
			note(c)
		}
		if err := p.Show(&shown); err != nil {
			return err
		}
	} else if err := install.Apply(p, func(c install.Change) {
		note(c)
		fmt.Fprintf(&shown, "%s %s\n", c.Action, c.Path)
	}); err != nil {
		return err
	}
	if a.output.value == outputJSON {
		return a.printJSON(result)
	}
	if p.Empty() {
		fmt.Fprintln(&shown, "nothing to do")
	}
	for _, path := range p.Foreign {
		fmt.Fprintf(&shown, "left %s: it is as it should be, and yours\n", path)
	}
	for _, path := range p.Kept {
		fmt.Fprintf(&shown, "left %s: it was changed since it was installed; remove it yourself if you do not need it\n", path)
	}
	for i, text := range p.Notes {
		if i == 0 {
			fmt.Fprintln(&shown)
		}
		fmt.Fprintln(&shown, "- "+text)
	}
	_, err := shown.WriteTo(a.stdout)
	return err
}

func orNone(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

// ownPath is this program as its user calls it, so that a link to the version of the day stays one.
func ownPath() string {
	self, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	called, err := exec.LookPath(os.Args[0])
	if err != nil {
		return self
	}
	if called, err = filepath.Abs(called); err != nil {
		return self
	}
	a, errA := os.Stat(called)
	b, errB := os.Stat(self)
	if errA != nil || errB != nil || !os.SameFile(a, b) {
		return self
	}
	return called
}

// pluginPath is the program that engines start: beside this one as its user calls it, beside this one's file, or on $PATH; empty: there is none.
func pluginPath() string {
	beside := []string{ownPath()}
	if self, err := os.Executable(); err == nil {
		beside = append(beside, self)
	}
	for _, path := range beside {
		path = filepath.Join(filepath.Dir(path), install.PluginName)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return path
		}
	}
	found, err := exec.LookPath(install.PluginName)
	if err != nil {
		return ""
	}
	if found, err = filepath.Abs(found); err != nil {
		return ""
	}
	return found
}

// podmanPatience bounds what we wait for podman to say its version.
const podmanPatience = 10 * time.Second

// askPodman is what `podman --version` prints; empty: there is none.
func askPodman(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, podmanPatience)
	defer cancel()
	out, err := exec.CommandContext(ctx, "podman", "--version").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// onSearchPath tells whether a program is on $PATH or where a system keeps its own.
func onSearchPath(program string) bool {
	if _, err := exec.LookPath(program); err == nil {
		return true
	}
	return slices.ContainsFunc([]string{"/usr/local/sbin", "/usr/sbin", "/sbin"}, func(dir string) bool {
		fi, err := os.Stat(filepath.Join(dir, program))
		return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
	})
}

// underSystemd is sd_booted(3).
func underSystemd() bool {
	_, err := os.Lstat("/run/systemd/system")
	return !errors.Is(err, fs.ErrNotExist)
}
