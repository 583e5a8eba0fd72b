// This file is how much memory the process takes.

package cage

import (
	"errors"
	"math"
	"os"
	"runtime/debug"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// Memory is the limit above which Go's runtime works harder to free memory, in bytes; 0: none. From is what it was taken from: "GOMEMLIMIT" or
// "cgroup".
type Memory struct {
	Limit int64
	From  string
}

// share of the cgroup's limit that is Go's: the rest is for what the kernel counts beside, such as socket buffers.
const share = 0.9

// LimitMemory takes the limit of the process's cgroup for Go's, unless GOMEMLIMIT says one. An error leaves things as they are.
func LimitMemory() (Memory, error) {
	if os.Getenv("GOMEMLIMIT") != "" { // Go's runtime has read it
		return memoryNow("GOMEMLIMIT"), nil
	}
	limit, err := memlimit.FromCgroup()
	switch {
	case errors.Is(err, memlimit.ErrNoLimit), errors.Is(err, memlimit.ErrNoCgroup), errors.Is(err, memlimit.ErrCgroupsNotSupported):
		return Memory{}, nil
	case err != nil:
		return Memory{}, err
	case float64(limit)*share >= math.MaxInt64:
		return Memory{}, nil
	}
	debug.SetMemoryLimit(int64(float64(limit) * share))
	return memoryNow("cgroup"), nil
}

func memoryNow(from string) Memory {
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
		return Memory{limit, from}
	}
	return Memory{}
}
