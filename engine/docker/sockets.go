// This file knows where dockerd answers: where it was seen before, where the user's dockerd is by default, and where the command line and
// the environment of a dockerd that calls say.

package docker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

const (
	socketsFile = "dockerd-sockets"
	// dockerSocket is dockerd's name for its socket in the user's runtime directory.
	dockerSocket = "docker.sock"
	// maxSockets bounds how many dockerds of one user are followed.
	maxSockets = 8
)

// sockets are paths of dockerds' sockets, kept over restarts of the daemon. It is safe for many goroutines.
type sockets struct {
	path string

	mu    sync.Mutex
	paths []string
}

func openSockets(dir, first string) (*sockets, error) {
	s := &sockets{path: filepath.Join(dir, socketsFile)}
	if first != "" {
		s.paths = []string{first}
	}
	b, err := os.ReadFile(s.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("sockets of dockerd: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if path := strings.TrimSpace(line); filepath.IsAbs(path) && !slices.Contains(s.paths, path) && len(s.paths) < maxSockets {
			s.paths = append(s.paths, path)
		}
	}
	return s, nil
}

func (s *sockets) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.paths)
}

// add remembers a path; it is known from then on even if it cannot be written down.
func (s *sockets) add(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.paths, path) || len(s.paths) >= maxSockets {
		return nil
	}
	s.paths = append(s.paths, path)
	return s.write()
}

// remove forgets a path.
func (s *sockets) remove(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.paths, path)
	if i < 0 {
		return nil
	}
	s.paths = slices.Delete(s.paths, i, i+1)
	return s.write()
}

func (s *sockets) write() error {
	var b strings.Builder
	for _, path := range s.paths {
		b.WriteString(path + "\n")
	}
	return writeFile(s.path, []byte(b.String()))
}

// Dockerd is what a dockerd's process tells of it.
type Dockerd struct {
	Sockets   []string `json:"sockets"`   // unix sockets on which it listens
	Resolvers []string `json:"resolvers"` // addresses at which its containers ask for names
}

// Look looks at a process that is a dockerd. What cannot be seen is empty.
func Look(pid int) Dockerd { return Dockerd{Sockets: socketsOf(pid), Resolvers: resolversOf(pid)} }

// socketsOf are the unix sockets on which a dockerd listens, by its command line, or by default in its runtime directory.
func socketsOf(pid int) []string {
	proc := "/proc/" + strconv.Itoa(pid)
	cmdline, err := os.ReadFile(proc + "/cmdline")
	if err != nil {
		return nil
	}
	if list := hostFlags(strings.Split(string(cmdline), "\x00")); len(list) > 0 {
		return list
	}
	environ, err := os.ReadFile(proc + "/environ")
	if err != nil {
		return nil
	}
	for variable := range strings.SplitSeq(string(environ), "\x00") {
		if dir, is := strings.CutPrefix(variable, "XDG_RUNTIME_DIR="); is && filepath.IsAbs(dir) {
			return []string{filepath.Join(dir, dockerSocket)}
		}
	}
	return nil
}

// hostFlags are the paths of unix sockets in dockerd's arguments.
func hostFlags(args []string) []string {
	var list []string
	for i, arg := range args {
		value, is := strings.CutPrefix(arg, "--host=")
		switch {
		case is:
		case (arg == "-H" || arg == "--host") && i+1 < len(args):
			value = args[i+1]
		case strings.HasPrefix(arg, "-H"):
			value = strings.TrimPrefix(strings.TrimPrefix(arg, "-H"), "=")
		default:
			continue
		}
		if path, unix := strings.CutPrefix(value, "unix://"); unix && filepath.IsAbs(path) {
			list = append(list, filepath.Clean(path))
		}
	}
	return list
}
