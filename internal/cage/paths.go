// This file is the landlock rules.

package cage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Paths are those that this one daemon needs, beside what every daemon does.
type Paths struct {
	// Write are directories in which files and sockets are made. They must exist.
	Write []string
	// Read are files that may be replaced by a rename while the process runs: the directories that they are in are let in. One that
	// has a home in it, or everybody's files, is not: then it is the file alone, as it is now.
	Read []string
	// AbstractSockets: one is needed that is not of this process's making.
	AbstractSockets bool
}

const (
	readRights  landlock.AccessFSSet = llsys.AccessFSReadFile | llsys.AccessFSReadDir
	writeRights landlock.AccessFSSet = readRights | llsys.AccessFSWriteFile | llsys.AccessFSTruncate | llsys.AccessFSRemoveFile | llsys.AccessFSRemoveDir |
		llsys.AccessFSMakeReg | llsys.AccessFSMakeDir | llsys.AccessFSMakeSock
	fileRights landlock.AccessFSSet = llsys.AccessFSReadFile | llsys.AccessFSWriteFile

	// handled is all that is forbidden unless a rule lets it in: what ABI 5 knows. ABI 9's right to connect to a socket by its path is not in it: a
	// dockerd may listen anywhere.
	handled landlock.AccessFSSet = 1<<16 - 1
)

// hostFiles is what every daemon reads: the resolver's and the time zone's files, certificates, what the kernel says. Not: any home, and no
// /run of others.
var hostFiles = []string{
	"/etc", "/usr/share", "/usr/lib/ssl", "/usr/local/share", "/nix/store", "/gnu/store",
	"/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman", "/run/netconfig", // where resolv.conf leads
	"/proc", "/sys/fs/cgroup", "/sys/devices/system/cpu", "/sys/kernel/mm/transparent_hugepage",
	"/dev/urandom",
}

// links are followed once, when the cage is made, for what they lead to outside of hostFiles.
var links = []string{"/etc/resolv.conf", "/etc/hosts", "/etc/localtime", "/etc/nsswitch.conf"}

// restrictPaths applies the rules and returns the kernel's ABI.
func restrictPaths(p Paths) (abi int, left []string, err error) {
	abi, err = llsys.LandlockGetABIVersion()
	if err != nil {
		return 0, nil, landlockOff(err)
	}
	rules, left, err := pathRules(p)
	if err != nil {
		return 0, left, err
	}
	scoped := landlock.ScopedSet(llsys.ScopeSignal | llsys.ScopeAbstractUnixSocket)
	if p.AbstractSockets {
		scoped = llsys.ScopeSignal
	}
	config, err := landlock.NewConfig(handled, scoped)
	if err != nil {
		return 0, left, err
	}
	if err := config.BestEffort().Restrict(rules...); err != nil {
		return 0, left, err
	}
	return abi, left, nil
}

// pathRules are the rules. A path that is not there is none, but for those of p.
func pathRules(p Paths) (rules []landlock.Rule, left []string, err error) {
	read := slices.Clone(hostFiles)
	for _, l := range links {
		if to, err := filepath.EvalSymlinks(l); err == nil {
			dir, _ := letIn(to)
			read = append(read, dir)
		}
	}
	for _, f := range p.Read {
		f, err := filepath.Abs(f)
		if err != nil {
			return nil, nil, err
		}
		at := []string{f}
		if to, err := filepath.EvalSymlinks(f); err == nil && to != f {
			at = append(at, to)
		}
		for _, f := range at {
			path, whole := letIn(f)
			if !whole {
				left = append(left, fmt.Sprintf("%s can be read as it is now, but not when it is replaced: put it into a directory of its own", f))
			}
			read = append(read, path)
		}
	}
	for _, path := range read {
		rights := readRights
		fi, err := os.Stat(path)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission):
			continue
		case err != nil:
			return nil, left, err
		case !fi.IsDir():
			rights = llsys.AccessFSReadFile
		}
		rules = append(rules, landlock.PathAccess(rights, path))
	}
	// Of other network namespaces: a child that is in one writes its settings (nsutil/inside.go). The host's are not this user's to write.
	rules = append(rules,
		landlock.PathAccess(fileRights|llsys.AccessFSReadDir, "/proc/sys").IgnoreIfMissing(),
		landlock.PathAccess(fileRights, "/dev/null").IgnoreIfMissing(),
		landlock.PathAccess(fileRights|llsys.AccessFSIoctlDev, "/dev/net/tun").IgnoreIfMissing())
	for _, dir := range p.Write {
		rules = append(rules, landlock.PathAccess(writeRights, dir))
	}
	return rules, left, nil
}

// letIn is what is let in so that a file can be read: its directory, unless that has more in it than files like this one.
func letIn(file string) (path string, whole bool) {
	dir := filepath.Dir(file)
	if fi, err := os.Stat(dir); err != nil || fi.Mode()&os.ModeSticky != 0 { // as /tmp
		return file, false
	}
	homes := []string{"/home", "/root", "/run", "/var", "/usr"}
	if home, err := os.UserHomeDir(); err == nil {
		homes = append(homes, filepath.Clean(home))
		if real, err := filepath.EvalSymlinks(home); err == nil {
			homes = append(homes, real)
		}
	}
	if runtimeDir := os.Getenv("XDG_RUNTIME_DIR"); runtimeDir != "" {
		homes = append(homes, filepath.Clean(runtimeDir))
	}
	for _, h := range homes {
		if h == dir || strings.HasPrefix(h, strings.TrimSuffix(dir, "/")+"/") {
			return file, false
		}
	}
	return dir, true
}

// MakePrivate makes a directory that others cannot enter, and those above it, if it is not there: a rule needs what it is for. Whether one that
// is there is fit is not looked at.
func MakePrivate(dir string) error { return os.MkdirAll(dir, 0o700) }

// OnlyOurs has files be made that nobody else can read or write, unless the program says otherwise.
func OnlyOurs() { unix.Umask(0o077) }
