// Where a user's daemon keeps its things by default.

package api

import (
	"errors"
	"os"
	"path/filepath"
)

const (
	dirName    = "rootless-ovl"
	socketName = "api.sock"
)

// RuntimeDir is the default runtime directory, $XDG_RUNTIME_DIR/rootless-ovl. Nothing is created.
func RuntimeDir() (string, error) {
	base := os.Getenv("XDG_RUNTIME_DIR")
	if base == "" {
		return "", errors.New("XDG_RUNTIME_DIR is not set: run `export XDG_RUNTIME_DIR=/run/user/$UID`, or choose a directory with --runtime-dir")
	}
	if !filepath.IsAbs(base) {
		return "", Errorf(CodeInvalid, "XDG_RUNTIME_DIR is %q, not an absolute path: run `export XDG_RUNTIME_DIR=/run/user/$UID`", base)
	}
	return filepath.Join(base, dirName), nil
}

// StateDir is the default state directory, $XDG_STATE_HOME/rootless-ovl or ~/.local/state/rootless-ovl. Nothing is created.
// A relative XDG_STATE_HOME is ignored, as its specification asks.
func StateDir() (string, error) {
	if base := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(base) {
		return filepath.Join(base, dirName), nil
	}
	home := os.Getenv("HOME")
	if !filepath.IsAbs(home) {
		return "", errors.New("neither XDG_STATE_HOME nor HOME is set: choose a directory with --state-dir")
	}
	return filepath.Join(home, ".local", "state", dirName), nil
}

// SocketPath is where the daemon with that runtime directory listens.
func SocketPath(runtimeDir string) string { return filepath.Join(runtimeDir, socketName) }
