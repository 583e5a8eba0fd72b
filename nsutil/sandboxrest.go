// This file ends what a sandbox's command leaves running. We are the subreaper of all our descendants (prctl(2)), so a
// process of the sandbox that loses its parent becomes our child: it is reaped while the command runs, and killed when the
// command has ended. No PID namespace is made for this: pids and /proc inside stay those that the daemon, the terminal and
// the rest of the host know.

package nsutil

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// sweepPatience bounds how long killed processes may take to go; one may sleep in the kernel for as long as a disk does.
const sweepPatience = 5 * time.Second

// userNamespace is the inode of a process's user namespace and whether that namespace is, or lies within, the one with inode
// within (0: nothing lies within it).
func userNamespace(pid int, within uint64) (inode uint64, inside bool, err error) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/ns/user", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, false, err
	}
	for depth := 0; ; depth++ {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		if err != nil {
			unix.Close(fd)
			return 0, false, err
		}
		if depth == 0 {
			inode = st.Ino
		}
		if st.Ino == within {
			unix.Close(fd)
			return inode, true, nil
		}
		parent, err := unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
		unix.Close(fd)
		if err != nil { // ours, or one beyond it
			return inode, false, nil
		}
		fd = parent
	}
}

// ownChildren are the processes whose parent we are, zombies too.
func ownChildren() ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var list []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + name + "/stat")
		if err == nil && parentOf(b) == os.Getpid() {
			list = append(list, pid)
		}
	}
	return list, nil
}

// orphans are our children that belong to the sandbox, without its first process. Zombies are among them.
func (s *Sandbox) orphans() ([]int, error) {
	all, err := ownChildren()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(pid int) bool {
		if pid == s.PID() || slices.Contains(s.others, pid) {
			return true
		}
		_, inside, err := userNamespace(pid, s.userns)
		return err != nil || !inside
	}), nil
}

// parentOf reads the parent's pid (field 4) of a /proc/PID/stat line, 0 where there is none.
func parentOf(stat []byte) int {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]) // the name before it may hold any byte
	if len(fields) < 2 {
		return 0
	}
	pid, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return 0
	}
	return pid
}

// reap takes the zombies among the orphans away.
func (s *Sandbox) reap() {
	list, err := s.orphans()
	if err != nil {
		return // without a readable /proc they stay zombies until we end
	}
	for _, pid := range list {
		_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
	}
}

// sweep kills what is left of the sandbox when its command has ended. Killing a process makes its children ours, so it is done
// until there are none.
func (s *Sandbox) sweep() error {
	deadline := time.Now().Add(sweepPatience)
	for {
		list, err := s.orphans()
		if err != nil {
			return fmt.Errorf("looking for processes that the command left: %w", err)
		}
		if len(list) == 0 {
			return nil
		}
		for _, pid := range list {
			_ = unix.Kill(pid, unix.SIGKILL) // it is our child, so the pid is still its own
		}
		for _, pid := range list {
			if err := waitUntil(pid, deadline); err != nil {
				return err
			}
		}
	}
}

// waitUntil reaps a child that is about to end.
func waitUntil(pid int, deadline time.Time) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // reaped already
	}
	defer unix.Close(fd)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("process %d, which the command left running, was killed and does not end", pid)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting for process %d: %w", pid, err)
		}
		if n > 0 {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
			return nil
		}
	}
}
