// This file is the questions that there are, and how the opener answers them: with the functions that the daemon would call itself.

package opener

import (
	"encoding/json"
	"os"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/engine/docker"
	"github.com/rootless-ovl/rootless-ovl/engine/dockerlink"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// mandate is the first message: what the opener may do, said once.
type mandate struct {
	Strict bool `json:"strict"` // it ends if it cannot shut itself in
	// For the link with which dockerd finds the plugin: as dockerlink.Put.
	UserDir string        `json:"user_dir"`
	Socket  string        `json:"socket"`
	Age     time.Duration `json:"age"` // as nsutil.NewFinder
}

// The questions, by the names of what answers them.
const (
	callOpenNetns  = "open-netns"
	callInodeAt    = "inode-at"
	callFind       = "find"
	callProcesses  = "processes"
	callDetached   = "detached"
	callOthers     = "others"
	callPIDNS      = "pid-namespace"
	callDockerd    = "dockerd"
	callDockerLink = "docker-link"
)

type findArg struct {
	Inode uint64 `json:"inode"`
	Last  string `json:"last,omitempty"`
}

type linkValue struct {
	PID  int    `json:"pid"`
	Made bool   `json:"made"`
	Err  string `json:"err,omitempty"` // PID counts with it, too
}

func newCalls(m mandate) map[string]call {
	finder := nsutil.NewFinder(m.Age)
	return map[string]call{
		callOpenNetns:  file(nsutil.OpenNetnsFile),
		callInodeAt:    value(nsutil.InodeAt),
		callFind:       value(func(a findArg) (string, error) { return finder.Find(a.Inode, a.Last) }),
		callProcesses:  value(func(struct{}) (map[uint64]int, error) { return finder.Processes() }),
		callDetached:   value(func(pid int) (string, error) { return nsutil.DetachedNetns(pid), nil }),
		callOthers:     value(func(pid int) (bool, error) { return nsutil.OfAnother(pid), nil }),
		callPIDNS:      value(api.PIDNamespace),
		callDockerd:    value(func(pid int) (docker.Dockerd, error) { return docker.Look(pid), nil }),
		callDockerLink: value(func(struct{}) (linkValue, error) { return link(m), nil }),
	}
}

func link(m mandate) linkValue {
	pid, made, err := dockerlink.Put(m.UserDir, m.Socket)
	v := linkValue{PID: pid, Made: made}
	if err != nil {
		v.Err = err.Error()
	}
	return v
}

// call answers one kind of question. The file, which may be nil, is the caller's.
type call func(arg json.RawMessage) (value any, f *os.File, err error)

// value and file make a call of a function.
func value[A, V any](do func(A) (V, error)) call {
	return func(arg json.RawMessage) (any, *os.File, error) {
		var a A
		if err := json.Unmarshal(arg, &a); err != nil {
			return nil, nil, err
		}
		v, err := do(a)
		return v, nil, err
	}
}

func file(do func(path string) (*os.File, error)) call {
	return func(arg json.RawMessage) (any, *os.File, error) {
		var path string
		if err := json.Unmarshal(arg, &path); err != nil {
			return nil, nil, err
		}
		f, err := do(path)
		return nil, f, err
	}
}
