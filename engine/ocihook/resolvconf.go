// This file tells a container where to look names up.

package ocihook

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// resolvConf is where a container looks; inRoot is the same in its root.
const (
	resolvConf = "/etc/resolv.conf"
	inRoot     = "etc/resolv.conf"
	inRootNew  = "etc/.resolv.conf.rootless-ovl"
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

// writeInRoot puts a new file into the container's root. The image has made what is there: nothing leads out of the root, and what the file
// was, a link into /run perhaps, is replaced.
func writeInRoot(dir string, content []byte) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Mkdir("etc", 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := root.Remove(inRootNew); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a hook that was killed
		return err
	}
	f, err := root.OpenFile(inRootNew, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	// Whoever the container's processes are, and whatever the engine's umask.
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = root.Rename(inRootNew, inRoot)
	}
	if err != nil {
		_ = root.Remove(inRootNew)
	}
	return err
}
