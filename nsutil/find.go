// This file finds a network namespace by its number alone: some process that is in it, or some mount that keeps it.

package nsutil

import (
	"bytes"
	"iter"
	"os"
	"path"
	"strconv"

	"golang.org/x/sys/unix"
)

// FindInode is a path for OpenPath of the network namespace with that number: that of a process in it, or else that of a file it is mounted
// at, as engines and `ip netns` do it, in the mount namespace of some process. It sees what the user that we are may see. last, if not empty,
// is what it has found before, which is looked at first: that is one system call, and the rest some for each process there is.
// ErrGone if nothing is found: then the namespace has ended, or is kept by open descriptors only.
//
// The path may mean something else as soon as FindInode has returned: look at Namespace.Inode of what it opens.
func FindInode(inode uint64, last string) (string, error) {
	if last != "" {
		if at, err := InodeAt(last); err == nil && at == inode {
			return last, nil
		}
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return "", err
	}
	var procs []string
	for _, d := range dirs {
		if _, err := strconv.ParseUint(d.Name(), 10, 31); err == nil {
			procs = append(procs, "/proc/"+d.Name())
		}
	}
	for _, p := range procs {
		// Of a zombie, and of another user's process, there is nothing to be seen.
		if at, err := pathInode(p + "/ns/net"); err == nil && at == inode {
			return p + "/ns/net", nil
		}
	}
	root := []byte("net:[" + strconv.FormatUint(inode, 10) + "]")
	seen := make(map[uint64]bool) // mount namespaces
	for _, p := range procs {
		mnt, err := pathInode(p + "/ns/mnt")
		if err != nil || seen[mnt] {
			continue
		}
		seen[mnt] = true
		b, err := os.ReadFile(p + "/mountinfo")
		if err != nil {
			continue // it has just ended
		}
		for point := range nsfsMounts(b, root) {
			// What is there now may be something else, of the process's making.
			found := path.Join(p, "root", point)
			f, err := openNetns(found)
			if err != nil {
				continue
			}
			at, err := fileInode(f)
			f.Close()
			if err == nil && at == inode {
				return found, nil
			}
		}
	}
	return "", fail(ErrGone, unix.ESRCH, "network namespace net:[%d]: no process of yours is in it, and it is mounted nowhere: it has ended", inode)
}

// IsMount tells whether a path that FindInode has found is that of a mount, and not of a process.
func IsMount(path string) bool { return procRoot.MatchString(path) }

// nsfsMounts are the mount points in a /proc/PID/mountinfo (proc_pid_mountinfo(5)) at which a namespace is mounted, given as the file shows it.
func nsfsMounts(mountinfo, namespace []byte) iter.Seq[string] {
	return func(yield func(string) bool) {
		for line := range bytes.Lines(mountinfo) {
			front, back, ok := bytes.Cut(line, []byte(" - "))
			fields := bytes.Fields(front)
			if !ok || len(fields) < 6 || !bytes.Equal(fields[3], namespace) || !bytes.HasPrefix(back, []byte("nsfs ")) {
				continue
			}
			if !yield(unescapeMount(fields[4])) {
				return
			}
		}
	}
}

// unescapeMount undoes the kernel's writing of space, tab, newline and backslash in three octal digits (mangle in fs/seq_file.c).
func unescapeMount(b []byte) string {
	out := make([]byte, 0, len(b))
	for i := 0; i < len(b); i++ {
		if b[i] == '\\' && i+3 < len(b) {
			if c, err := strconv.ParseUint(string(b[i+1:i+4]), 8, 8); err == nil {
				out = append(out, byte(c))
				i += 3
				continue
			}
		}
		out = append(out, b[i])
	}
	return string(out)
}

// BootID names the time since the kernel was started: another after every reboot.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(bytes.TrimSpace(b)), err
}
