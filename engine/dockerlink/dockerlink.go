// This file is all of it: who runs dockerd, and the link for it.

package dockerlink

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// often is the time between two looks.
const often = time.Second

// Name is the plugin's, by which `docker network create -d` asks for it.
const Name = "rootless-ovl"

// place is where dockerd looks, from the root of its mount namespace.
const place = "run/docker/plugins/" + Name + ".sock"

// Keep calls put, which is Put or has it called elsewhere, again and again until ctx is done. What cannot be done is said in the log, once for each
// dockerd.
func Keep(ctx context.Context, put func() (pid int, made bool, err error), log *slog.Logger) {
	tick := time.NewTicker(often)
	defer tick.Stop()
	said := ""
	for {
		pid, made, err := put()
		switch {
		case made:
			log.Info("docker finds the plugin", "pid", pid, "link", "/"+place)
		case err != nil && said != fmt.Sprint(pid, err):
			said = fmt.Sprint(pid, err)
			log.Warn("docker does not find the plugin", "pid", pid, "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Put puts a symbolic link to socket, an absolute path, where the dockerd of this user that runs now looks for it, if there is one, and tells whether
// it was not there. runtimeDir is $XDG_RUNTIME_DIR; where it is empty nothing is done.
func Put(runtimeDir, socket string) (pid int, made bool, err error) {
	if runtimeDir == "" {
		return 0, false, nil
	}
	if pid = pidIn(filepath.Join(runtimeDir, "docker.pid")); pid > 0 && commOf(pid) == "dockerd" {
		made, err = put(fmt.Sprintf("/proc/%d", pid), socket, true)
		return pid, made, err
	}
	if pid = pidIn(filepath.Join(runtimeDir, "dockerd-rootless", "child_pid")); pid > 0 && isRootlessKits(pid) {
		made, err = put(fmt.Sprintf("/proc/%d", pid), socket, false)
		return pid, made, err
	}
	return 0, false, nil
}

// Linked tells whether a dockerd of this user runs, and whether the link to socket is where it looks.
func Linked(runtimeDir, socket string) (runs, linked bool) {
	pid := pidIn(filepath.Join(runtimeDir, "docker.pid"))
	if pid == 0 || commOf(pid) != "dockerd" {
		return false, false
	}
	to, err := os.Readlink(fmt.Sprintf("/proc/%d/root/%s", pid, place))
	return true, err == nil && to == socket
}

// pidIn is the pid in a file, 0 where there is none.
func pidIn(path string) int {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid < 1 {
		return 0
	}
	return pid
}

func commOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// isRootlessKits tells whether a process is RootlessKit's child, which is RootlessKit started once more: its state directory outlives it when it is
// killed, and the pid may be another process's then, such as one of a container.
func isRootlessKits(pid int) bool {
	parent := parentOf(pid)
	if parent == 0 {
		return false
	}
	path := func(pid int) string { return fmt.Sprintf("/proc/%d/exe", pid) }
	name, err := os.Readlink(path(parent))
	if err != nil || strings.TrimSuffix(filepath.Base(name), " (deleted)") != "rootlesskit" { // deleted by an update
		return false
	}
	its, err1 := os.Stat(path(pid))
	parents, err2 := os.Stat(path(parent))
	return err1 == nil && err2 == nil && os.SameFile(its, parents)
}

// parentOf is the pid of a process's parent, 0 where that cannot be told.
func parentOf(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if text, is := strings.CutPrefix(line, "PPid:"); is {
			parent, err := strconv.Atoi(strings.TrimSpace(text))
			if err != nil {
				return 0
			}
			return parent
		}
	}
	return 0
}

// put makes the link in the mount namespace of the process in proc (/proc/PID). Without running nothing is made until dockerd has made
// /run/docker itself. It does nothing in our own mount namespace: that dockerd is not in RootlessKit's.
func put(proc, socket string, running bool) (made bool, err error) {
	own, err1 := os.Readlink("/proc/self/ns/mnt")
	its, err2 := os.Readlink(proc + "/ns/mnt")
	if err := errors.Join(err1, err2); err != nil {
		return false, ignoreGone(err)
	}
	if its == own {
		return false, nil
	}
	root, err := os.OpenRoot(proc + "/root")
	if err != nil {
		return false, ignoreGone(err)
	}
	defer root.Close()
	made, err = putIn(root, socket, running)
	return made, ignoreGone(err)
}

// ignoreGone is nil for a process that has ended meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// putIn makes the link below a root. Paths that lead out of it are refused.
func putIn(root *os.Root, socket string, running bool) (made bool, err error) {
	if !running {
		if fi, err := root.Lstat("run/docker"); err != nil || !fi.IsDir() {
			return false, ignoreGone(err)
		}
	}
	to, err := root.Readlink(place)
	switch {
	case err == nil && to == socket:
		return false, nil
	case err == nil:
		if fi, err := os.Stat(to); err == nil && fi.Mode().Type() == fs.ModeSocket {
			return false, fmt.Errorf("/%s leads to %s, the socket of another node: stop that node, or remove the link, to have this one's", place, to)
		}
		err = root.Remove(place)
	case errors.Is(err, fs.ErrNotExist):
		err = root.MkdirAll(filepath.Dir(place), 0o755)
	}
	if err != nil {
		return false, err
	}
	return true, root.Symlink(socket, place)
}
