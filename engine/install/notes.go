// This file is what a user has to do besides.

package install

import (
	"fmt"
	"slices"
)

// NoSystemd is how the daemon is started where there is no systemd.
func (s Setup) NoSystemd() string {
	return fmt.Sprintf("there is no systemd here: start the daemon yourself before the engines, at boot (cron: @reboot) or at login: "+
		"mkdir -p %s && setsid -f %s up --log-format json 2>>%s", shellWord(s.StateDir), shellWord(s.Program), shellWord(s.StateDir+"/up.log"))
}

func (s Setup) installNotes(parts []Part) []string {
	var notes []string
	add := func(format string, args ...any) { notes = append(notes, fmt.Sprintf(format, args...)) }
	if slices.Contains(parts, Systemd) {
		if s.SystemdRuns {
			add("flags of the daemon (--etcd-endpoints, say) go into %s", s.UpEnvPath())
			add("start it: systemctl --user daemon-reload && systemctl --user restart rootless-ovl.socket rootless-ovl.service")
			add("to have it run from boot on, without a login: loginctl enable-linger")
		} else {
			add("%s", s.NoSystemd())
		}
	}
	if slices.Contains(parts, Podman) {
		if s.ContainersConf != "" {
			add("CONTAINERS_CONF is set: podman reads %s alone; add to its [engine]: hooks_dir = [%s]", s.ContainersConf, tomlString(s.HooksDir()))
		}
		if s.everyContainer() {
			add("podman now puts every new container on the overlay, and needs the daemon to start one")
		} else {
			add("podman: podman run --network none --annotation run.rootless-ovl.attach=NAME ...")
		}
	}
	if slices.Contains(parts, Docker) {
		add("docker: docker network create -d rootless-ovl --ipam-driver rootless-ovl ovl; docker run --network ovl ...")
	}
	if slices.Contains(parts, CNI) {
		add("CNI: the network is called rootless-ovl; podman finds the plugin, for others CNI_PATH needs %s", s.cniDir())
	}
	if slices.Contains(parts, Netavark) {
		add("podman: podman network create -d rootless-ovl ovl; podman run --network ovl ...")
	}
	if _, zsh := s.Completions["zsh"]; zsh && slices.Contains(parts, Shell) {
		add("zsh: put fpath+=(%s) before compinit in ~/.zshrc", s.zshDir())
	}
	return notes
}

func (s Setup) uninstallNotes(rec Record, parts []Part) []string {
	if !rec.Has(Systemd) || !slices.Contains(parts, Systemd) || !s.SystemdRuns {
		return nil
	}
	return []string{"the service runs until it is stopped: systemctl --user stop rootless-ovl.socket rootless-ovl.service; systemctl --user daemon-reload"}
}
