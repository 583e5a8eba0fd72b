// This file is the checks of the host itself.

package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/rootless-ovl/rootless-ovl/internal/cage"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

const (
	// stockBuffer is net.core.rmem_max of a kernel that nobody tuned, in bytes. The underlay makes do with it (forwarder/lanes.go).
	stockBuffer = 212992
	// wantIDs is how many subordinate ids an engine maps into a container.
	wantIDs = 65536
	// wantFiles is a hard limit on open files with which the gateway need not lower its limits on flows (stack/descriptors.go).
	wantFiles = 65536
)

func (h host) tun() Check {
	const id, title = "tun-device", "/dev/net/tun can be opened"
	err := h.openTun()
	if err == nil {
		return good(id, title, "opened for reading and writing")
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return bad(id, title, "/dev/net/tun: "+err.Error(), "see what is at /dev/net/tun")
	}
	cause, remedy := nsutil.TunTrouble(errno)
	return bad(id, title, fmt.Sprintf("/dev/net/tun: %s (%v)", cause, errno), remedy)
}

func (h host) appArmor(program string) Check {
	const id, title = "apparmor-userns", "AppArmor lets programs make user namespaces"
	if h.value("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") != "1" {
		return good(id, title, "not restricted")
	}
	label := h.value("/proc/self/attr/current")
	if label != "" && !strings.HasPrefix(label, "unconfined") {
		return good(id, title, "restricted, but this program has the profile "+label)
	}
	name := filepath.Base(program)
	return warn(id, title,
		"kernel.apparmor_restrict_unprivileged_userns is 1: `rootless-ovl run` cannot make its namespaces (attach and up need none)",
		"as root, write this profile to /etc/apparmor.d/"+name+" and load it (apparmor_parser -r /etc/apparmor.d/"+name+"):\n"+nsutil.AppArmorProfile(program))
}

func (h host) usernsClone() Check {
	const id, title = "userns-clone", "users may make user namespaces"
	if h.value("/proc/sys/kernel/unprivileged_userns_clone") == "0" {
		return bad(id, title, "kernel.unprivileged_userns_clone is 0: no container runs without root, and there is nothing to attach",
			persistent("kernel.unprivileged_userns_clone", "1"))
	}
	return good(id, title, "not forbidden")
}

func (h host) maxUserNamespaces() Check {
	return h.maxNamespaces("max-user-namespaces", "user namespaces are not used up", "user.max_user_namespaces")
}

func (h host) maxNetNamespaces() Check {
	return h.maxNamespaces("max-net-namespaces", "network namespaces are not used up", "user.max_net_namespaces")
}

func (h host) maxNamespaces(id, title, key string) Check {
	v := h.value("/proc/sys/" + strings.ReplaceAll(key, ".", "/"))
	switch v {
	case "":
		return skip(id, title, key+" cannot be read")
	case "0":
		return bad(id, title, key+" is 0: no container runs without root, and there is nothing to attach", persistent(key, "15000"))
	}
	return good(id, title, key+" is "+v)
}

// persistent is how a setting of the kernel is changed for now and for good.
func persistent(key, value string) string {
	return fmt.Sprintf("as root: echo '%s = %s' >/etc/sysctl.d/90-rootless-ovl.conf; sysctl --system (other settings of ours go into the same file)", key, value)
}

func (h host) idMapper(program string) Check {
	id, title := program, program+" works without root"
	path, err := h.lookPath(program)
	if err != nil {
		return warn(id, title, program+" is not installed: podman and docker cannot give a container more than one user",
			h.install(map[string]string{"debian": "uidmap", "fedora": "shadow-utils", "arch": "shadow", "alpine": "shadow-uidmap", "suse": "shadow"}))
	}
	st, err := h.stat(path)
	if err != nil {
		return warn(id, title, fmt.Sprintf("%s: %v", path, err), "reinstall it")
	}
	if st.Mode()&fs.ModeSetuid == 0 && !h.hasCap(path) {
		return warn(id, title, path+" is neither setuid nor has it a file capability: podman and docker cannot give a container more than one user",
			"as root: chmod u+s "+path)
	}
	return good(id, title, path)
}

// subIDs checks /etc/subuid or /etc/subgid: lines of user:first:count.
func (h host) subIDs(kind string) Check {
	file := "/etc/sub" + kind
	id, title := "sub"+kind, file+" has a range for this user"
	name, uid := h.user()
	if uid == 0 {
		return skip(id, title, "root needs none")
	}
	for line := range strings.Lines(h.value("/etc/nsswitch.conf")) {
		if db, ok := strings.CutPrefix(strings.TrimSpace(line), "subid:"); ok && strings.TrimSpace(db) != "files" {
			return skip(id, title, "subordinate ids come from "+strings.TrimSpace(db)+" (/etc/nsswitch.conf)")
		}
	}
	total := 0
	for line := range strings.Lines(h.value(file)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 3 || f[0] != name && f[0] != strconv.Itoa(uid) {
			continue
		}
		if n, err := strconv.Atoi(f[2]); err == nil && n > 0 {
			total += n
		}
	}
	remedy := fmt.Sprintf("as root: usermod --add-sub%ss 100000-165535 %s (take a range that no other user in %s has); then podman system migrate", kind, name, file)
	switch {
	case total == 0:
		return warn(id, title, "no range for "+name+": podman and docker cannot give a container more than one user", remedy)
	case total < wantIDs:
		return warn(id, title, fmt.Sprintf("%d ids for %s: images expect %d", total, name, wantIDs), remedy)
	}
	return good(id, title, fmt.Sprintf("%d ids", total))
}

func (h host) noNewPrivileges() Check {
	const id, title = "no-new-privileges", "setuid programs work here"
	for line := range strings.Lines(h.value("/proc/self/status")) {
		if v, ok := strings.CutPrefix(line, "NoNewPrivs:"); ok && strings.TrimSpace(v) == "1" {
			return warn(id, title, "NoNewPrivs is 1: newuidmap fails in every program that is started from here",
				"in a systemd unit remove NoNewPrivileges=yes and what implies it (DynamicUser=, SystemCallFilter=, ProtectKernelTunables= in user units); in a container remove --security-opt no-new-privileges")
		}
	}
	return good(id, title, "NoNewPrivs is 0")
}

// sandbox tells what the running daemon has shut itself in with, or else what one that is started would.
func (h host) sandbox(d *Daemon) Check {
	const id, title = "sandbox", "the daemon can shut itself in"
	k := h.kernel()
	off := make(map[string]string)
	if d != nil && d.Err == nil {
		off = d.SandboxOff
	} else {
		if !k.Seccomp {
			off["seccomp"] = "the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"
		}
		if k.Landlock == 0 {
			off["landlock"] = fmt.Sprint(k.LandlockErr)
		}
	}
	var texts []string
	for _, part := range slices.Sorted(maps.Keys(off)) {
		if off[part] == cage.AskedOff {
			return warn(id, title, "the daemon runs with "+cage.AskedOff, "start it without that flag, unless something does not work then: that would be a bug to report")
		}
		texts = append(texts, part+" is off: "+off[part])
	}
	if len(texts) > 0 {
		return warn(id, title, strings.Join(texts, "; "), "the daemon works without, but whoever takes it over can do more (docs/security.md): have the kernel's part switched on")
	}
	return good(id, title, fmt.Sprintf("seccomp, landlock (ABI %d)", k.Landlock))
}

func (h host) hidepid() Check {
	const id, title = "hidepid", "/proc shows the processes of containers"
	options := ""
	for line := range strings.Lines(h.value("/proc/self/mounts")) {
		if f := strings.Fields(line); len(f) >= 4 && f[1] == "/proc" && f[2] == "proc" {
			options = f[3] // the last mount is on top
		}
	}
	for o := range strings.SplitSeq(options, ",") {
		v, ok := strings.CutPrefix(o, "hidepid=")
		if !ok || v == "0" || v == "off" {
			continue
		}
		return warn(id, title, "/proc is mounted with "+o+": containers whose processes run under subordinate uids cannot be attached by pid",
			"as root: mount -o remount,hidepid=0 /proc (and in /etc/fstab), or attach by path (--netns); in a systemd unit remove ProtectProc=")
	}
	return good(id, title, "not hidden")
}

func (h host) pingGroupRange() Check {
	const id, title = "ping-group-range", "users may send pings"
	v := h.value("/proc/sys/net/ipv4/ping_group_range")
	f := strings.Fields(v)
	if len(f) != 2 {
		return skip(id, title, "net.ipv4.ping_group_range cannot be read")
	}
	low, err1 := strconv.ParseUint(f[0], 10, 32)
	high, err2 := strconv.ParseUint(f[1], 10, 32)
	if err1 == nil && err2 == nil {
		for _, g := range h.groups() {
			if uint64(g) >= low && uint64(g) <= high {
				return good(id, title, fmt.Sprintf("group %d is in %d-%d", g, low, high))
			}
		}
	}
	return warn(id, title, "net.ipv4.ping_group_range is "+strings.Join(f, " ")+": containers cannot ping the outside (pings within the overlay work)",
		persistent("net.ipv4.ping_group_range", "0 2147483647"))
}

func (h host) socketBuffer(name string) Check {
	id, title := strings.ReplaceAll(name, "_", "-"), "socket buffers may be large (net.core."+name+")"
	v := h.value("/proc/sys/net/core/" + name)
	n, err := strconv.Atoi(v)
	switch {
	case err != nil: // older kernels do not show it in a network namespace
		return skip(id, title, "net.core."+name+" cannot be read")
	case n < stockBuffer:
		return warn(id, title, fmt.Sprintf("net.core.%s is %d bytes, less than a stock system's %d: bursts between nodes are lost and sent again", name, n, stockBuffer),
			persistent("net.core."+name, strconv.Itoa(stockBuffer)))
	}
	return good(id, title, fmt.Sprintf("%d bytes", n))
}

func (h host) runtimeDir() Check {
	const id, title = "runtime-dir", "XDG_RUNTIME_DIR is usable"
	dir := h.getenv("XDG_RUNTIME_DIR")
	_, uid := h.user()
	login := fmt.Sprintf("log in by ssh, a terminal or `machinectl shell` instead of su or sudo; or export XDG_RUNTIME_DIR=/run/user/%d if that exists; or give --runtime-dir", uid)
	if dir == "" {
		return warn(id, title, "XDG_RUNTIME_DIR is not set: the daemon has no place for its socket", login)
	}
	st, err := h.stat(dir)
	switch {
	case err != nil:
		return bad(id, title, fmt.Sprintf("XDG_RUNTIME_DIR is %s: %v", dir, errors.Unwrap(err)), login)
	case !st.IsDir():
		return bad(id, title, "XDG_RUNTIME_DIR is "+dir+", which is not a directory", login)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && int(sys.Uid) != uid {
		return bad(id, title, fmt.Sprintf("XDG_RUNTIME_DIR is %s, which belongs to uid %d", dir, sys.Uid), login)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return warn(id, title, fmt.Sprintf("%s is open to others (%v)", dir, st.Mode().Perm()), "chmod 0700 "+dir)
	}
	return good(id, title, dir)
}

func (h host) linger() Check {
	const id, title = "linger", "services of this user run without a login"
	if !h.exists("/run/systemd/system") {
		return skip(id, title, "no systemd here")
	}
	name, _ := h.user()
	if h.exists("/var/lib/systemd/linger/" + name) {
		return good(id, title, "linger is on for "+name)
	}
	return warn(id, title, "linger is off for "+name+": the daemon and the containers end when the last session does", "loginctl enable-linger "+name)
}

// openFiles looks at the hard limit, to which every Go program raises its own.
func (h host) openFiles() Check {
	const id, title = "open-files", "the daemon may open enough files (RLIMIT_NOFILE of this session)"
	for line := range strings.Lines(h.value("/proc/self/limits")) {
		v, ok := strings.CutPrefix(line, "Max open files")
		f := strings.Fields(v)
		if !ok || len(f) < 2 {
			continue
		}
		n, err := strconv.Atoi(f[1])
		switch {
		case f[1] == "unlimited":
			return good(id, title, "no limit")
		case err != nil:
			continue
		case n < wantFiles:
			return warn(id, title, fmt.Sprintf("the hard limit is %d: containers get fewer connections to the outside at a time, as each takes a descriptor", n),
				fmt.Sprintf("as root: write `* hard nofile %d` to /etc/security/limits.d/90-rootless-ovl.conf and log in again (for one shell: ulimit -Hn %[1]d); for a systemd unit: LimitNOFILE=%[1]d, and the same in user@.service for units of users", wantFiles))
		}
		return good(id, title, fmt.Sprintf("the hard limit is %d", n))
	}
	return skip(id, title, "/proc/self/limits does not say")
}

func (h host) overlap(network netip.Prefix) Check {
	const id, title = "network-overlap", "the host does not use the overlay's addresses"
	if !network.IsValid() {
		return skip(id, title, "no overlay network given (--network)")
	}
	found, err := h.overlaps(network)
	if err != nil {
		return skip(id, title, err.Error())
	}
	if len(found) == 0 {
		return good(id, title, fmt.Sprintf("%v is free", network))
	}
	var all []string
	for _, o := range found {
		all = append(all, o.String())
	}
	return bad(id, title, fmt.Sprintf("%v overlaps %s: containers cannot reach these", network, strings.Join(all, ", ")),
		"choose another network (--network), or accept it with --allow-overlap")
}
