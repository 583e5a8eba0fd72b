// This file tells a container where to look names up.

package ocihook

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// resolvConf is where a container looks; inEtc is the same in etc, a directory of its root.
const (
	resolvConf = "/etc/resolv.conf"
	etc        = "etc"
	inEtc      = "resolv.conf"
	inEtcNew   = ".resolv.conf.rootless-ovl"
)

// writeResolvConf writes the container's file: the engine's, where it mounts one, and in the container's root otherwise. A file or
// directory that the user mounts there is left alone. What else the file says is the engine's, or the host's.
func (h *Hook) writeResolvConf(c bundle, d api.DNS) error {
	m, mounted := c.overResolvConf()
	engines := mounted && isEngines(m.Source)
	if mounted && !engines {
		return nil
	}
	before := h.hostResolvConf
	if engines {
		before = m.Source
	}
	text := readSome(before)
	content := d.ResolvConf(text)
	var err error
	switch {
	case engines && text == string(content): // and read by the container's processes, perhaps
	case engines:
		err = rewrite(m.Source, content)
	default:
		err = writeInRoot(c.Root.Path, content)
	}
	if err != nil {
		return fmt.Errorf("the container's %s: %w: to keep the one that it has, give it the annotation %s=keep", resolvConf, err, keyDNS)
	}
	return nil
}

// readSome is the text of a file, as far as it can be read: what is lost are options for looking names up.
func readSome(name string) string {
	f, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64<<10))
	return string(b)
}

// rewrite writes a file in place, which may be mounted somewhere already.
func rewrite(name string, content []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Close())
}

// writeInRoot puts a new file into the container's root. The image has made what is there: /etc may be a link, which leads to where it leads the
// container, never out of the root, and what the file was, a link into /run perhaps, is replaced.
func writeInRoot(dir string, content []byte) error {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	if err := unix.Mkdirat(root, etc, 0o755); err != nil && err != unix.EEXIST {
		return &fs.PathError{Op: "mkdir", Path: filepath.Join(dir, etc), Err: err}
	}
	at, err := unix.Openat2(root, etc, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return &fs.PathError{Op: "open", Path: filepath.Join(dir, etc), Err: err}
	}
	defer unix.Close(at)
	if err := replaceAt(at, content); err != nil {
		return fmt.Errorf("in %s: %w", filepath.Join(dir, etc), err)
	}
	return nil
}

// replaceAt writes the file in the directory that at is a descriptor of.
func replaceAt(at int, content []byte) error {
	if err := unix.Unlinkat(at, inEtcNew, 0); err != nil && err != unix.ENOENT { // of a hook that was killed
		return err
	}
	fd, err := unix.Openat(at, inEtcNew, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), inEtcNew)
	_, err = f.Write(content)
	// Whoever the container's processes are, and whatever the engine's umask.
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = unix.Renameat(at, inEtcNew, at, inEtc)
	}
	if err != nil {
		_ = unix.Unlinkat(at, inEtcNew, 0)
	}
	return err
}
