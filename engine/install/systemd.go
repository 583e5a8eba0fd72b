// This file is the units of systemd's user instance, and the file with the flags of the daemon.

package install

import (
	"fmt"
	"path/filepath"
	"strings"
)

// service has no setting that gives the daemon a mount or user namespace of its own (Protect..., Private..., ReadOnlyPaths and the like): in a
// user namespace below the user's it would not own the containers' any more. RestrictNamespaces= would forbid setns(2). The daemon starts no
// programs, so that NoNewPrivileges=, which the filters of system calls imply, costs nothing.
//
// Exit status 2 is a command line that is wrong, which starting it again does not mend.
//
// A reload has a new process take the place of the daemon (up --replace), of the program that is there now and with the flags of now; the old one
// tells systemd which it is. A daemon that dies is started again after RestartSec=, which is short since containers reach nobody meanwhile.
//
// It is told to be ready once it has a subnet, or goes on with that of its last run. Engines whose containers are started at boot wait for that,
// for TimeoutStartSec= at most.
func (s Setup) service() []byte {
	return fmt.Appendf(nil, marker+`# Flags of the daemon are in %[1]s; other settings go into a drop-in: systemctl --user edit rootless-ovl.service

[Unit]
Description=One flat network for containers on many hosts, without root
Documentation=man:rootless-ovl(1) man:rootless-ovl-up(1)
Requires=rootless-ovl.socket
After=rootless-ovl.socket
Before=docker.service podman.service podman-restart.service containerd.service
StartLimitIntervalSec=0

[Service]
Type=notify
EnvironmentFile=-%[2]s
ExecStart=%[3]s --runtime-dir %[4]s --state-dir %[5]s up $ROOTLESS_OVL_UP
ExecReload=%[3]s --runtime-dir %[4]s --state-dir %[5]s up --replace --background $ROOTLESS_OVL_UP
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=100ms
TimeoutStartSec=90
TimeoutStopSec=30
LimitNOFILE=524288
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy=default.target
Also=rootless-ovl.socket
`, s.UpEnvPath(), unitPattern(s.UpEnvPath()), unitProgram(s.Program), unitArg(s.RuntimeDir), unitArg(s.StateDir))
}

func (s Setup) socket() []byte {
	return fmt.Appendf(nil, marker+`
[Unit]
Description=The API of rootless-ovl
Documentation=man:rootless-ovl(1)

[Socket]
ListenStream=%s
SocketMode=0600
DirectoryMode=0700
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
`, unitPath(filepath.Join(s.RuntimeDir, "api.sock")))
}

// unitPath is a path as the value of a setting, which systemd takes as it stands but for what it puts in place of a %.
func unitPath(path string) string { return strings.ReplaceAll(path, "%", "%%") }

// unitPattern is a path where systemd looks for all files of a pattern, as glob(7) has them.
func unitPattern(path string) string {
	return unitPath(strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path))
}

// unitProgram is a program at the begin of a command line. One with a quote or a backslash in its path systemd does not start, and a shell
// does, which the program takes the place of.
func unitProgram(path string) string {
	if strings.ContainsAny(path, `"'\`) {
		return `/bin/sh -c 'exec "$$0" "$$@"' ` + unitArg(path)
	}
	return unitWord(path)
}

// unitWord is a word of a command line, unitArg one in which variables would be replaced.
func unitWord(word string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%").Replace(word) + `"`
}

func unitArg(word string) string { return strings.ReplaceAll(unitWord(word), "$", "$$") }

const upEnv = `# For the service: flags of ` + "`rootless-ovl up`" + `, separated by blanks, as in
#   ROOTLESS_OVL_UP=--etcd-endpoints http://192.0.2.1:2379 --proxy 1080
# After a change: systemctl --user restart rootless-ovl.service
ROOTLESS_OVL_UP=

# The environment that ` + "`up`" + ` reads can be set too, a password for one. Nobody but you may read this file.
#ROOTLESS_OVL_ETCD_PASSWORD=
`
