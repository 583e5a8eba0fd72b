// What `up` shuts itself in with: --sandbox.

package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/engine/docker"
	"github.com/rootless-ovl/rootless-ovl/engine/dockerlink"
	"github.com/rootless-ovl/rootless-ovl/internal/cage"
	"github.com/rootless-ovl/rootless-ovl/internal/opener"
	"github.com/rootless-ovl/rootless-ovl/node"
)

// shutInOrder is what a daemon's cage depends on.
type shutInOrder struct {
	mode   cage.Mode
	config node.Config
	reads  []string // files that may change while it runs
}

// sight is how the daemon sees dockerd from inside its cage.
type sight struct {
	report  api.Sandbox
	left    []string // of cage.Report
	dockerd func(pid int) docker.Dockerd
	link    func() (pid int, made bool, err error)
}

// shutIn limits the memory of this process, has an opener look into other processes for it, and shuts it in.
func shutIn(o shutInOrder) (sight, error) {
	c := o.config
	subnetDir, subnetMode := c.RuntimeDir, os.FileMode(0o700)
	if c.SubnetFile != "" {
		subnetDir, subnetMode = filepath.Dir(c.SubnetFile), 0o755
	}
	// A directory that cannot be made is for the node to complain of. That of subnet.env is for others to read, the rest is not.
	_ = os.MkdirAll(subnetDir, subnetMode)
	cage.OnlyOurs()
	_ = os.MkdirAll(c.StateDir, 0o700)
	_ = os.MkdirAll(c.RuntimeDir, 0o700)

	memory, err := cage.LimitMemory()
	if err != nil {
		c.Log.Warn("the cgroup's memory limit cannot be read", "err", err)
	}
	userDir, socket := os.Getenv("XDG_RUNTIME_DIR"), filepath.Join(c.RuntimeDir, docker.SocketName)
	s := sight{
		report:  api.Sandbox{MemoryLimit: memory.Limit, MemoryLimitFrom: memory.From},
		dockerd: docker.Look,
		link:    func() (int, bool, error) { return dockerlink.Put(userDir, socket) },
	}
	if o.mode != cage.Off {
		eyes, err := opener.Start(opener.Config{Strict: o.mode == cage.On, UserDir: userDir, Socket: socket, Ended: func(err error) {
			// At once: what a daemon without sight takes for the end of its containers, the next one finds as it was.
			c.Log.Error("the daemon's second process is gone", "err", err)
			os.Exit(1)
		}})
		if err != nil {
			return s, err
		}
		eyes.Use()
		s.dockerd, s.link = eyes.Dockerd, eyes.PutDockerLink
	}
	r, err := cage.Enter(o.mode, cage.Paths{
		Write:           []string{c.StateDir, c.RuntimeDir, subnetDir},
		Read:            o.reads,
		AbstractSockets: strings.HasPrefix(os.Getenv("NOTIFY_SOCKET"), "@"),
	})
	if err != nil {
		return s, err
	}
	s.left = r.Left
	s.report.Seccomp, s.report.Landlock, s.report.NoNewPrivs, s.report.Off = r.Seccomp, r.Landlock, r.NoNewPrivs, r.Why
	return s, nil
}

// tell says in the log what the daemon is in, when it has come so far that it runs.
func (s *sight) tell(log *slog.Logger) {
	if text := sandboxText(s.report); text != "" {
		log.Info("sandbox", "is", text)
	}
	for _, text := range s.left {
		log.Warn("a file is open to the daemon in part only", "problem", text)
	}
}

// sandboxText is one line of what a daemon has shut itself in with.
func sandboxText(s api.Sandbox) string {
	var on, off []string
	add := func(name, text string, is bool) {
		if is {
			on = append(on, text)
		} else if why := s.Off[name]; why != "" {
			off = append(off, fmt.Sprintf("%s is off: %s", name, why))
		}
	}
	add("seccomp", "seccomp", s.Seccomp)
	add("landlock", fmt.Sprintf("landlock (ABI %d)", s.Landlock), s.Landlock > 0)
	add("no_new_privs", "no_new_privs", s.NoNewPrivs)
	if len(on) == 0 && s.Off["seccomp"] == cage.AskedOff {
		return "off (" + cage.AskedOff + ")"
	}
	return strings.Join(append([]string{strings.Join(on, ", ")}, off...), "; ")
}
