// This file finds a network namespace by its number alone: some process that is in it, or some mount that keeps it.

package nsutil

import (
	"bytes"
	"iter"
	"os"
	"path"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Finder finds namespaces by their numbers. It looks through the processes of the machine once for all who ask within a time, and once for all who
// ask at the same moment: that is how often it does for namespaces that it does not find, which may have come since. It is safe for many goroutines, and has none.
type Finder struct {
	age  time.Duration
	take func() (*snapshot, error)

	mu   sync.Mutex // held while the machine is looked through: who asks meanwhile wants the same
	last *snapshot  // nil: there is none
}

// NewFinder makes a Finder that has looked at the machine no longer than age before it answers, nor before it was asked when it answers ErrGone.
func NewFinder(age time.Duration) *Finder { return &Finder{age: age, take: takeSnapshot} }

// Find is a path for OpenPath of the network namespace with that number: that of a process in it, or else that of a file it is mounted
// at, as engines and `ip netns` do it, in the mount namespace of some process. It sees what the user that we are may see. last, if not empty,
// is what it has found before, which is looked at first: that is one system call.
// ErrGone if nothing is found: then the namespace has ended, or is kept by open descriptors only.
//
// The path may mean something else as soon as Find has returned: look at Namespace.Inode of what it opens.
func (f *Finder) Find(inode uint64, last string) (string, error) {
	if s := sight.Load(); s != nil {
		return s.Find(inode, last)
	}
	if last != "" {
		if at, err := InodeAt(last); err == nil && at == inode {
			return last, nil
		}
	}
	began := time.Now()
	s, err := f.snapshot(nil, began.Add(-f.age))
	if err != nil {
		return "", err
	}
	found, listed := s.find(inode)
	if found == "" && (listed || s.taken.Before(began)) { // what was there has ended since; others may have come
		if s, err = f.snapshot(s, began); err != nil {
			return "", err
		}
		found, _ = s.find(inode)
	}
	if found == "" {
		return "", fail(ErrGone, unix.ESRCH, "network namespace net:[%d]: no process of yours is in it, and it is mounted nowhere: it has ended", inode)
	}
	return found, nil
}

// Processes are the network namespaces of the processes that we may look at, each by its inode number with one of its processes. The map is the
// caller's.
func (f *Finder) Processes() (map[uint64]int, error) {
	if s := sight.Load(); s != nil {
		return s.Processes()
	}
	s, err := f.snapshot(nil, time.Now().Add(-f.age))
	if err != nil {
		return nil, err
	}
	found := make(map[uint64]int, len(s.inside))
	for inode, pids := range s.inside {
		found[inode] = pids[0]
	}
	return found, nil
}

// snapshot is what there is, as of since or later, and another than outdated.
func (f *Finder) snapshot(outdated *snapshot, since time.Time) (*snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last != nil && f.last != outdated && !f.last.taken.Before(since) {
		return f.last, nil
	}
	f.last = nil
	now := time.Now()
	s, err := f.take()
	if err != nil {
		return nil, err
	}
	s.taken = now
	f.last = s
	return s, nil
}

// FindInode is Find of a Finder that nobody shares.
func FindInode(inode uint64, last string) (string, error) { return NewFinder(0).Find(inode, last) }

// snapshot is where the processes of the machine were when it was taken. It is safe for many goroutines.
type snapshot struct {
	taken  time.Time        // begun to be
	pids   []int            // all
	inside map[uint64][]int // processes by their network namespaces' numbers
	mounts func() map[uint64][]string
}

func takeSnapshot() (*snapshot, error) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	s := &snapshot{inside: make(map[uint64][]int)}
	for _, d := range dirs {
		pid, err := strconv.ParseUint(d.Name(), 10, 31)
		if err != nil {
			continue
		}
		s.pids = append(s.pids, int(pid))
		// Of a zombie, and of another user's process, there is nothing to be seen.
		if at, err := pathInode(procNet(int(pid))); err == nil {
			s.inside[at] = append(s.inside[at], int(pid))
		}
	}
	s.mounts = sync.OnceValue(s.readMounts) // most have a process
	return s, nil
}

func procDir(pid int) string { return "/proc/" + strconv.Itoa(pid) }

func procNet(pid int) string { return procDir(pid) + "/ns/net" }

// find is as Finder.Find: "" if there is nothing. listed tells whether there was something when the snapshot was taken.
func (s *snapshot) find(inode uint64) (found string, listed bool) {
	for _, pid := range s.inside[inode] {
		if at, err := pathInode(procNet(pid)); err == nil && at == inode {
			return procNet(pid), true
		}
	}
	mounts := s.mounts()[inode]
	for _, point := range mounts {
		// What is there now may be something else, of the process's making.
		f, err := openNetns(point)
		if err != nil {
			continue
		}
		at, err := fileInode(f)
		f.Close()
		if err == nil && at == inode {
			return point, true
		}
	}
	return "", len(s.inside[inode])+len(mounts) > 0
}

// readMounts are the paths at which network namespaces are mounted, by their numbers, each below the root of a process.
func (s *snapshot) readMounts() map[uint64][]string {
	all := make(map[uint64][]string)
	seen := make(map[uint64]bool) // mount namespaces
	for _, pid := range s.pids {
		mnt, err := pathInode(procDir(pid) + "/ns/mnt")
		if err != nil || seen[mnt] {
			continue
		}
		b, err := os.ReadFile(procDir(pid) + "/mountinfo")
		if err != nil {
			continue // it has just ended
		}
		seen[mnt] = true
		for inode, point := range nsfsMounts(b) {
			all[inode] = append(all[inode], path.Join(procDir(pid), "root", point))
		}
	}
	return all
}

// IsMount tells whether a path that FindInode has found is that of a mount, and not of a process.
func IsMount(path string) bool { return procRoot.MatchString(path) }

// nsfsMounts are the mount points in a /proc/PID/mountinfo (proc_pid_mountinfo(5)) at which a network namespace is mounted, with its number.
func nsfsMounts(mountinfo []byte) iter.Seq2[uint64, string] {
	return func(yield func(uint64, string) bool) {
		for line := range bytes.Lines(mountinfo) {
			front, back, ok := bytes.Cut(line, []byte(" - "))
			fields := bytes.Fields(front)
			if !ok || len(fields) < 6 || !bytes.HasPrefix(back, []byte("nsfs ")) {
				continue
			}
			number, opens := bytes.CutPrefix(fields[3], []byte("net:["))
			number, closes := bytes.CutSuffix(number, []byte("]"))
			inode, err := strconv.ParseUint(string(number), 10, 64)
			if !opens || !closes || err != nil {
				continue
			}
			if !yield(inode, unescapeMount(fields[4])) {
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
