// This file notices that a container is gone: by its process where it was attached by pid, by its path where it has one, and where it was
// attached by a descriptor by looking for anything that is left in its namespace.
//
// The namespace itself tells nothing: it lives as long as we hold a TAP in it. An engine that ends a container says so (CNI's DEL, say), but one
// that was killed, or whose container was, may never do; then the address would be lost.
//
// podman and containerd mount the namespaces that they make, before they call a CNI plugin and until after they have called it for the last time.
// So one that is mounted and that nobody has been in yet is a container's that is still to be started, however long that takes. Once processes
// have come and gone it has ended, unless others come soon: a mount that an engine keeps then, since it was killed, may be there until the next
// reboot. nerdctl and rootless ctr mount nothing: there the container's process is in it before the plugin is called. Who has a descriptor
// only, until there is a process, has inodeFirst for it.

package node

import (
	"errors"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// pathPoll is how often the path of a namespace is looked at. A container that exits is to be noticed within a second.
const pathPoll = 500 * time.Millisecond

const (
	// inodePoll is how often it is looked at what is in a namespace without a path: one system call as a rule.
	inodePoll = 2 * time.Second
	// inodeGrace is how long a namespace without a path is empty, and mounted nowhere, before its container has ended: a process that engines
	// start again in the same namespace takes a moment.
	inodeGrace = 10 * time.Second
	// inodeKept is the same of one that is still mounted: CRI engines take a moment longer.
	inodeKept = time.Minute
	// inodeFirst is the same of one that nobody has been seen in yet, and that is mounted nowhere.
	inodeFirst = time.Minute
)

// exitWatch tells when something has ended. Close stops watching; Done may then stay open for ever.
type exitWatch interface {
	Done() <-chan struct{}
	Close() error
}

// watchFor begins to watch for the end of an attachment.
func (n *Node) watchFor(a *attachment) (exitWatch, error) {
	s := &a.saved
	if s.Loose {
		return newLooseWatch(s.Entered), nil
	}
	if s.PID != 0 {
		return n.edges.watchPID(s.PID)
	}
	if s.Netns != "" {
		return watchPath(s.Netns, s.Inode, n.edges.inodeAt), nil
	}
	return watchInode(s.Inode, n.edges.findInode, s.Entered, func() { n.noteEntered(a) }), nil
}

// hasEnded tells whether the container of a saved attachment is known to be gone, as its watch would say. Of one that is known by its namespace
// alone only time tells.
func (n *Node) hasEnded(s *savedAttachment) bool {
	switch {
	case s.Loose:
		return false
	case s.PID != 0:
		start, err := n.edges.startTime(s.PID)
		return errors.Is(err, nsutil.ErrNoProcess) || err == nil && start != s.StartTime
	case s.Netns != "":
		return leadsElsewhere(s.Netns, s.Inode, n.edges.inodeAt)
	}
	return false
}

// leadsElsewhere tells whether path is no longer the file with that number: unmounted, removed, made anew, or of a process that has ended. When the
// look itself fails, for want of descriptors say, nothing is concluded.
func leadsElsewhere(path string, inode uint64, at func(path string) (uint64, error)) bool {
	now, err := at(path)
	if err != nil {
		return slices.ContainsFunc(noWay, func(e unix.Errno) bool { return errors.Is(err, e) })
	}
	return now != inode
}

// noWay is what the system says of a path that leads to nothing of ours any more. A process's is closed to us when its pid is another user's by now.
var noWay = []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.ESRCH, unix.EACCES, unix.EPERM, unix.ELOOP, unix.EXDEV}

// noteEntered writes down that there was a process in a's namespace: the next daemon is to know whether its container has ended or not begun.
func (n *Node) noteEntered(a *attachment) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a.entered {
		return
	}
	a.entered = true
	if err := n.saveAttachmentsLocked(); err != nil {
		n.log.Error("attachments not saved, so that the next start would not take them up as they are: see whether the disk is full", "err", err)
	}
}

// pollWatch looks again and again.
type pollWatch struct {
	done chan struct{}
	stop chan struct{}
	once sync.Once
}

// watchPath is done when path is no longer the namespace it was, with that inode number. at is nsutil.InodeAt.
func watchPath(path string, inode uint64, at func(path string) (uint64, error)) *pollWatch {
	return watchPoll(pathPoll, func() bool { return leadsElsewhere(path, inode, at) })
}

// watchInode is done when find has found the namespace empty for a time. entered tells whether processes have been in it; first is
// called when that becomes known.
func watchInode(inode uint64, find func(inode uint64, last string) (string, error), entered bool, first func()) *pollWatch {
	process := "" // a path of the last one that was seen
	inside, kept := time.Now(), time.Now()
	return watchPoll(inodePoll, func() bool {
		at, err := find(inode, process)
		process = ""
		switch {
		case errors.Is(err, nsutil.ErrGone):
		case err != nil: // it could not be looked for
			inside, kept = time.Now(), time.Now()
		case nsutil.IsMount(at):
			kept = time.Now()
		default:
			inside, kept = time.Now(), time.Now()
			process = at
			if !entered {
				entered = true
				first()
			}
		}
		if !entered {
			return time.Since(kept) >= inodeFirst
		}
		return time.Since(kept) >= inodeGrace || time.Since(inside) >= inodeKept
	})
}

// watchPoll is done when ended, called at intervals by a goroutine of its own until Close, reports true.
func watchPoll(interval time.Duration, ended func() bool) *pollWatch {
	w := &pollWatch{done: make(chan struct{}), stop: make(chan struct{})}
	go func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			if ended() {
				close(w.done)
				return
			}
			select {
			case <-tick.C:
			case <-w.stop:
				return
			}
		}
	}()
	return w
}

func (w *pollWatch) Done() <-chan struct{} { return w.done }

// Close never fails and may be called again.
func (w *pollWatch) Close() error {
	w.once.Do(func() { close(w.stop) })
	return nil
}
