// This file notices that a container is gone: by its process where it was attached by pid, by its path otherwise.

package node

import (
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// pathPoll is how often the path of a namespace is looked at. A container that exits is to be noticed within a second.
const pathPoll = 500 * time.Millisecond

// exitWatch tells when something has ended. Close stops watching; Done may then stay open for ever.
type exitWatch interface {
	Done() <-chan struct{}
	Close() error
}

// watchFor begins to watch for the end of an attachment.
func (n *Node) watchFor(s *savedAttachment) (exitWatch, error) {
	if s.PID != 0 {
		return n.edges.watchPID(s.PID)
	}
	return watchPath(s.Netns, s.Inode), nil
}

// pathWatch is done when its path is no longer the namespace it was: unmounted, removed, or made anew.
type pathWatch struct {
	done chan struct{}
	stop chan struct{}
	once sync.Once
}

// watchPath watches path, which now is a file with that inode number. It runs one goroutine until Close or the end.
func watchPath(path string, inode uint64) *pathWatch {
	w := &pathWatch{done: make(chan struct{}), stop: make(chan struct{})}
	go func() {
		tick := time.NewTicker(pathPoll)
		defer tick.Stop()
		for {
			if now, err := nsutil.InodeAt(path); err != nil || now != inode {
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

func (w *pathWatch) Done() <-chan struct{} { return w.done }

// Close never fails and may be called again.
func (w *pathWatch) Close() error {
	w.once.Do(func() { close(w.stop) })
	return nil
}
