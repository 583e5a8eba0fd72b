// This file reads what /proc says about a process: whether it lives, since when, and whose it is.

package nsutil

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// StartTime is when a process started, in clock ticks since the machine did (field 22 of /proc/PID/stat). The same pid
// with another start time is another process. A zombie counts as no process: ErrNoProcess.
func StartTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return 0, noProcess(pid, err)
		}
		return 0, err
	}
	state, start, err := parseStat(b)
	if err != nil {
		return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	if state == 'Z' || state == 'X' {
		return 0, fail(ErrNoProcess, nil, "process %d has ended (it is a zombie that its parent has not reaped)", pid)
	}
	return start, nil
}

// parseStat reads the state and the start time of a /proc/PID/stat line. The name of the program, in parentheses, may
// hold any byte, parentheses and spaces too.
func parseStat(b []byte) (state byte, start uint64, err error) {
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return 0, 0, errors.New("no program name")
	}
	fields := bytes.Fields(b[end+1:]) // the first of these is field 3, the state
	if len(fields) < 20 || len(fields[0]) != 1 {
		return 0, 0, errors.New("too few fields")
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("start time: %w", err)
	}
	return fields[0][0], start, nil
}

func noProcess(pid int, cause error) error {
	return fail(ErrNoProcess, cause, "process %d does not exist: give the pid of a running process", pid)
}

// ownerText names the user whose process it is, for an error.
func ownerText(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return "another user"
	}
	for line := range strings.Lines(string(b)) {
		if uids, ok := strings.CutPrefix(line, "Uid:"); ok {
			if f := strings.Fields(uids); len(f) > 0 {
				return "uid " + f[0]
			}
		}
	}
	return "another user"
}

// capable tells whether this process has a capability in effect.
func capable(c uint) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}

// DetachedNetns is the path of the network namespace that RootlessKit has made for what it runs, where that is not its child's own
// (rootlesskit --detach-netns, which dockerd-rootless.sh gives from docker 29 on); "" if pid is not such a child. What the path leads to is
// for OpenPath to find: it does not follow links out of the root of the process, which may have made them.
//
// Source: rootlesskit pkg/parent/parent.go, which enters it by the same path.
func DetachedNetns(pid int) string {
	if s := sight.Load(); s != nil {
		return s.DetachedNetns(pid)
	}
	proc := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(proc + "/environ")
	if err != nil {
		return ""
	}
	for variable := range bytes.SplitSeq(b, []byte{0}) {
		dir, found := bytes.CutPrefix(variable, []byte("ROOTLESSKIT_STATE_DIR="))
		if !found || len(dir) == 0 {
			continue
		}
		path := proc + "/root" + filepath.Join("/", string(dir), "netns")
		if f, err := openNetns(path); err == nil {
			f.Close()
			return path
		}
	}
	return ""
}
