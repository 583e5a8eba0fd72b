// This file is for a process that may not look into others itself, as landlock(7) has it: somebody else does it in its place.

package nsutil

import (
	"errors"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Sight is how this package sees other processes: the functions of the same names, OpenNetns that of OpenNetnsFile. They must be safe for
// concurrent use, and their errors of the same kinds.
type Sight struct {
	OpenNetns     func(path string) (*os.File, error)
	InodeAt       func(path string) (uint64, error)
	Find          func(inode uint64, last string) (path string, err error) // of a Finder
	Processes     func() (map[uint64]int, error)                           // of a Finder
	DetachedNetns func(pid int) string
	OfAnother     func(pid int) bool
}

var sight atomic.Pointer[Sight] // nil: our own

// SeeThrough has the package see by s from now on, whoever uses it in this process.
func SeeThrough(s *Sight) { sight.Store(s) }

// OpenNetnsFile opens the file of a network namespace, which is all that is looked at: whose it is, and whether it is the host's, is for
// OpenPath. Errors are those of openNetns.
func OpenNetnsFile(path string) (*os.File, error) { return openNetns(path) }

// OfAnother tells whether there is a process of that pid which we may not signal: another user's.
func OfAnother(pid int) bool {
	if s := sight.Load(); s != nil {
		return s.OfAnother(pid)
	}
	return errors.Is(unix.Kill(pid, 0), unix.EPERM)
}
