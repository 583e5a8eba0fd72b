// What becomes of an installation, and of the daemon that it is for.

package doctor

import (
	"bytes"
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/rootless-ovl/rootless-ovl/engine/install"
)

var testSetup = install.Setup{
	Program: "/opt/bin/rootless-ovl", Plugin: "/opt/bin/rootless-ovl-plugin", RuntimeDir: "/run/user/1001/rootless-ovl", StateDir: "/home/me/.local/state/rootless-ovl",
	ConfigHome: "/home/me/.config", DataHome: "/home/me/.local/share", LibHome: "/home/me/.local/lib", PodmanVersion: "podman version 4.3.1", SystemdRuns: true,
}

// installedView is a file system in which this was installed.
func installedView(parts ...install.Part) fstest.MapFS {
	view := fstest.MapFS{"opt/bin/rootless-ovl": {Mode: 0o755}, "opt/bin/rootless-ovl-plugin": {Mode: 0o755}}
	if len(parts) == 0 {
		return view
	}
	p, err := testSetup.Install(view, parts)
	if err != nil {
		panic(err) // a fault of the test
	}
	for _, c := range p.Changes {
		name := strings.TrimPrefix(c.Path, "/")
		switch c.Action {
		case install.Write:
			view[name] = &fstest.MapFile{Data: c.New, Mode: c.Mode}
		case install.Link:
			view[name] = &fstest.MapFile{Data: []byte(c.Target), Mode: fs.ModeSymlink}
		}
	}
	return view
}

func TestRun_FindsWhatBecameOfAnInstallation(t *testing.T) {
	const (
		dropIn = "home/me/.config/containers/containers.conf.d/50-rootless-ovl.conf"
		hook   = "home/me/.local/share/rootless-ovl/hooks.d/rootless-ovl.json"
		record = "home/me/.local/state/rootless-ovl/install.json"
		wants  = "home/me/.config/systemd/user/default.target.wants/rootless-ovl.service"
		unit   = "home/me/.config/systemd/user/rootless-ovl.socket"
	)
	write := func(name, text string) func(*fake, *Options, fstest.MapFS) {
		return func(_ *fake, _ *Options, view fstest.MapFS) { view[name] = &fstest.MapFile{Data: []byte(text)} }
	}
	remove := func(name string) func(*fake, *Options, fstest.MapFS) {
		return func(_ *fake, _ *Options, view fstest.MapFS) { delete(view, name) }
	}
	nothing := func(f *fake, _ *Options, _ fstest.MapFS) { f.view = installedView() }
	docker := func(runs, linked bool) func(*fake, *Options, fstest.MapFS) {
		return func(f *fake, _ *Options, _ fstest.MapFS) {
			f.dockerLink = func(string, string) (bool, bool) { return runs, linked }
		}
	}
	tests := []struct {
		name           string
		change         func(*fake, *Options, fstest.MapFS)
		id             string
		status         Status
		detail, remedy string
	}{
		{"no daemon, with a unit", func(_ *fake, o *Options, _ fstest.MapFS) { o.Daemon.Err = errors.New("nobody there") }, "daemon", Warn, "nobody there", "systemctl --user restart"},
		{"no daemon, no unit", func(f *fake, o *Options, _ fstest.MapFS) {
			o.Daemon.Err, f.view = errors.New("nobody there"), installedView()
		}, "daemon", Warn, "nobody there", "rootless-ovl install systemd"},
		{"no daemon, no systemd", func(_ *fake, o *Options, _ fstest.MapFS) {
			o.Daemon.Err, o.Installed.SystemdRuns = errors.New("nobody there"), false
		}, "daemon", Warn, "nobody there", "setsid -f"},
		{"no daemon asked", func(_ *fake, o *Options, _ fstest.MapFS) { o.Daemon = nil }, "daemon", Skipped, "", ""},
		{"an older daemon", func(_ *fake, o *Options, _ fstest.MapFS) { o.Daemon.Version = "v0.9" }, "daemon-version", Warn, "the daemon is v0.9, this program v1.0", "start the daemon again"},
		{"no daemon to compare", func(_ *fake, o *Options, _ fstest.MapFS) { o.Daemon.Err = errors.New("x") }, "daemon-version", Skipped, "", ""},
		{"no systemd", func(_ *fake, o *Options, _ fstest.MapFS) { o.Installed.SystemdRuns = false }, "systemd-units", Skipped, "rootless-ovl up", ""},
		{"no units", nothing, "systemd-units", Skipped, "rootless-ovl install systemd", ""},
		{"a unit removed", remove(unit), "systemd-units", Warn, "rootless-ovl.socket is not there", "rootless-ovl install systemd"},
		{"a unit disabled", remove(wants), "systemd-units", Warn, "not enabled", "systemctl --user enable --now"},
		{"nothing installed", nothing, "installed-files", Skipped, "rootless-ovl install", ""},
		{"a file removed", remove(hook), "installed-files", Warn, hook, "rootless-ovl install podman docker systemd"},
		{"a file changed", write(hook, "{}"), "installed-files", Warn, "changed since: /" + hook, "move them away"},
		{"flags changed", write("home/me/.config/rootless-ovl/up.env", "X=1"), "installed-files", OK, "", ""},
		{"the program gone", remove("opt/bin/rootless-ovl"), "installed-files", Fail, "/opt/bin/rootless-ovl, which is not there", "rootless-ovl install podman"},
		{"a broken record", write(record, "{"), "installed-files", Warn, "install.json", "rootless-ovl install"},
		{"the engines' program gone", remove("opt/bin/rootless-ovl-plugin"), "installed-files", Fail, "/opt/bin/rootless-ovl-plugin, which is not there", "rootless-ovl install podman"},
		{"the hook's program gone", remove("opt/bin/rootless-ovl-plugin"), "podman-hook", Fail, "/opt/bin/rootless-ovl-plugin, which is not there", "rootless-ovl install podman"},
		{"the hook's program nowhere", func(f *fake, o *Options, v fstest.MapFS) {
			o.Installed.Plugin = ""
			remove("opt/bin/rootless-ovl-plugin")(f, o, v)
		}, "podman-hook", Fail, "which is not there", "put rootless-ovl-plugin into /opt/bin"},
		{"files of a version without the engines' program", func(_ *fake, _ *Options, v fstest.MapFS) {
			v[record].Data = bytes.Replace(v[record].Data, []byte(`"plugin":`), []byte(`"x":`), 1)
		}, "podman-hook", Fail, "a version before rootless-ovl-plugin", "rootless-ovl install podman"},
		{"no podman", func(_ *fake, o *Options, _ fstest.MapFS) { o.Installed.PodmanVersion = "" }, "podman-hook", Skipped, "no podman", ""},
		{"no hook", nothing, "podman-hook", Skipped, "rootless-ovl install podman", ""},
		{"hooks_dir removed", remove(dropIn), "podman-hook", Warn, "hooks_dir does not have", "rootless-ovl install podman"},
		{"hooks_dir set later", write("home/me/.config/containers/containers.conf.d/99.conf", "[engine]\nhooks_dir=['/x']"), "podman-hook", Warn, "hooks_dir does not have", "install podman"},
		{"hooks_dir added to since", write("home/me/.config/containers/containers.conf", "[engine]\nhooks_dir=['/x']"), "podman-hook", Warn, "hides from podman what was added to hooks_dir since: /x", "install podman"},
		{"CONTAINERS_CONF", func(_ *fake, o *Options, view fstest.MapFS) {
			o.Installed.ContainersConf = "/my.conf"
			view["my.conf"] = &fstest.MapFile{}
		}, "podman-hook", Warn, "CONTAINERS_CONF is set", "hooks_dir = ["},
		{"no TOML", write("etc/containers/containers.conf", "["), "podman-hook", Warn, "not TOML", "mend it"},
		{"a dockerd without the link", docker(true, false), "docker-plugin", Warn, "no link", "rootless-ovl up"},
		{"a dockerd with the link", docker(true, true), "docker-plugin", OK, "has it", ""},
		{"a dockerd, not installed", func(f *fake, o *Options, v fstest.MapFS) { nothing(f, o, v); docker(true, false)(f, o, v) }, "docker-plugin", Warn, "no link", "rootless-ovl up"},
		{"no dockerd, not installed", nothing, "docker-plugin", Skipped, "rootless-ovl install docker", ""},
		{"no Setup", func(_ *fake, o *Options, _ fstest.MapFS) { o.Installed = install.Setup{} }, "docker-plugin", Skipped, "not looked at", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, o := newFake(), testOptions()
			view := f.view.(fstest.MapFS)
			tt.change(f, &o, view)
			c := find(t, run(t.Context(), o, f.host), tt.id)
			if c.Status != tt.status || !strings.Contains(c.Detail, tt.detail) || !strings.Contains(c.Remedy, tt.remedy) || (c.Remedy == "") != (c.Status != Warn && c.Status != Fail) {
				t.Errorf("%+v", c)
			}
		})
	}
}
