// This file is the checks of what `rootless-ovl install` has written, and of the daemon that it is for.

package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/engine/install"
)

const (
	restartUnit  = "systemctl --user restart rootless-ovl.service"
	runInstall   = "rootless-ovl install "
	notInstalled = "not installed (rootless-ovl install %s)"
	notLooked    = "not looked at"
)

// record is what was installed. Without a Setup it is nothing, and so it is where the record cannot be read, which installedFiles says.
func (h host) record(s install.Setup) install.Record {
	if s.StateDir == "" {
		return install.Record{}
	}
	rec, err := install.ReadRecord(h.view, s.StateDir)
	if err != nil {
		return install.Record{}
	}
	return rec
}

func (h host) daemon(o Options) Check {
	const id, title = "daemon", "the daemon answers"
	switch {
	case o.Daemon == nil:
		return skip(id, title, "not asked")
	case o.Daemon.Err == nil:
		return good(id, title, "version "+o.Daemon.Version)
	}
	remedy := "rootless-ovl up, before the engines; " + runInstall + "systemd has it started for you"
	switch {
	case o.Installed.StateDir != "" && !o.Installed.SystemdRuns:
		remedy = o.Installed.NoSystemd()
	case h.record(o.Installed).Has(install.Systemd):
		remedy = restartUnit + "; why it ended: journalctl --user -u rootless-ovl.service"
	}
	return warn(id, title, o.Daemon.Err.Error(), remedy)
}

func (h host) daemonVersion(d *Daemon) Check {
	const id, title = "daemon-version", "the daemon is of this program's version"
	switch {
	case d == nil || d.Err != nil:
		return skip(id, title, "no daemon answers")
	case d.Version != d.Ours:
		return warn(id, title, fmt.Sprintf("the daemon is %s, this program %s", d.Version, d.Ours),
			"start the daemon again, containers keep their addresses: "+restartUnit+", or end `rootless-ovl up` and start it")
	}
	return good(id, title, d.Version)
}

func (h host) units(s install.Setup) Check {
	const id, title = "systemd-units", "systemd starts the daemon"
	switch {
	case s.StateDir == "":
		return skip(id, title, notLooked)
	case !s.SystemdRuns:
		return skip(id, title, "no systemd here: something else has to start rootless-ovl up")
	case !h.record(s).Has(install.Systemd):
		return skip(id, title, fmt.Sprintf(notInstalled, install.Systemd))
	}
	for _, kind := range []string{"socket", "service"} {
		if _, err := fs.Stat(h.view, strings.TrimPrefix(s.UnitPath(kind), "/")); err != nil {
			return warn(id, title, s.UnitPath(kind)+" is not there", runInstall+"systemd")
		}
		if _, err := fs.Lstat(h.view, strings.TrimPrefix(s.WantsPath(kind), "/")); err != nil {
			return warn(id, title, "rootless-ovl."+kind+" is not enabled: it does not start with the machine or the session",
				"systemctl --user enable --now rootless-ovl.socket rootless-ovl.service")
		}
	}
	return good(id, title, "enabled")
}

func (h host) installedFiles(s install.Setup) Check {
	const id, title = "installed-files", "what install wrote is as it was"
	if s.StateDir == "" {
		return skip(id, title, notLooked)
	}
	rec, err := install.ReadRecord(h.view, s.StateDir)
	if err != nil {
		return warn(id, title, err.Error(), "see what has become of it; "+runInstall+"writes it anew once it is away")
	}
	if len(rec.Files) == 0 {
		return skip(id, title, "nothing was installed (rootless-ovl install)")
	}
	var parts []string
	for _, p := range rec.Parts() {
		parts = append(parts, string(p))
	}
	again := runInstall + strings.Join(parts, " ")
	gone, changed := rec.Amiss(h.view)
	why, remedy := h.noPlugin(rec, s)
	switch {
	case h.isGone(rec.Program):
		return bad(id, title, fmt.Sprintf("they start %s, which is not there", rec.Program), again+" with the program that is")
	case why != "":
		return bad(id, title, "they start "+why+": engines that use them cannot start containers", remedy+again)
	case len(gone) > 0:
		return warn(id, title, "not there any more: "+strings.Join(gone, ", "), again)
	case len(changed) > 0:
		return warn(id, title, "changed since: "+strings.Join(changed, ", "), "move them away if the changes are not needed, then "+again)
	}
	return good(id, title, fmt.Sprintf("%d files for %s", len(rec.Files), strings.Join(parts, ", ")))
}

func (h host) isGone(path string) bool {
	_, err := fs.Stat(h.view, strings.TrimPrefix(path, "/"))
	return errors.Is(err, fs.ErrNotExist)
}

// noPlugin says which program engines' files start in vain, and what is to be done before they are written anew; "" where they start one or there
// are none.
func (h host) noPlugin(rec install.Record, s install.Setup) (why, remedy string) {
	switch {
	case !rec.StartsPlugin():
		return "", ""
	case rec.Plugin == "":
		why = fmt.Sprintf("%s as a version before %s did", rec.Program, install.PluginName)
	case h.isGone(rec.Plugin):
		why = rec.Plugin + ", which is not there"
	default:
		return "", ""
	}
	if s.Plugin == "" {
		remedy = fmt.Sprintf("put %s into %s, from where you have rootless-ovl; then ", install.PluginName, filepath.Dir(s.Program))
	}
	return why, remedy
}

func (h host) podmanHook(s install.Setup) Check {
	const id, title = "podman-hook", "podman knows the hook"
	rec := h.record(s)
	switch {
	case s.StateDir == "":
		return skip(id, title, notLooked)
	case s.PodmanVersion == "":
		return skip(id, title, "there is no podman")
	case !rec.Has(install.Podman):
		return skip(id, title, fmt.Sprintf(notInstalled, install.Podman))
	}
	known, hidden, err := s.KnownToPodman(h.view)
	switch {
	case err != nil:
		return warn(id, title, err.Error(), "podman reads this file too: mend it")
	case !known && s.ContainersConf != "":
		return warn(id, title, "CONTAINERS_CONF is set, and "+s.ContainersConf+" has no hooks_dir of ours: podman reads that file alone, and annotated containers get no network",
			fmt.Sprintf("add to its [engine]: hooks_dir = [%q]; or unset CONTAINERS_CONF", s.HooksDir()))
	case !known:
		return warn(id, title, "hooks_dir does not have "+s.HooksDir()+": annotated containers get no network", runInstall+"podman")
	case len(hidden) > 0:
		return warn(id, title, filepath.Base(s.DropInPath())+" hides from podman what was added to hooks_dir since: "+strings.Join(hidden, ", "), runInstall+"podman")
	}
	if why, remedy := h.noPlugin(rec, s); why != "" {
		return bad(id, title, "the hook starts "+why+": the containers that it is for cannot start", remedy+runInstall+"podman")
	}
	which := "annotated containers"
	if rec.EveryContainer {
		which = "every container"
	}
	return good(id, title, "for "+which)
}

func (h host) dockerPlugin(s install.Setup) Check {
	const id, title = "docker-plugin", "docker knows the network plugin"
	if s.StateDir == "" {
		return skip(id, title, notLooked)
	}
	spec := h.record(s).Has(install.Docker)
	runs, linked := h.dockerLink(h.getenv("XDG_RUNTIME_DIR"), filepath.Join(s.RuntimeDir, "docker.sock"))
	switch {
	case linked:
		return good(id, title, "the running dockerd has it")
	case runs && spec:
		return warn(id, title, "the running dockerd has no link to its socket; only docker that reads ~/.local/lib/docker/plugins finds it",
			"start the daemon, which makes the link: "+restartUnit+" or rootless-ovl up")
	case runs:
		return warn(id, title, "the running dockerd has no link to its socket", "start the daemon, which makes the link: "+restartUnit+" or rootless-ovl up")
	case spec:
		return good(id, title, "installed; dockerd does not run")
	}
	return skip(id, title, "no dockerd of this user runs, and it is "+fmt.Sprintf(notInstalled, install.Docker))
}
