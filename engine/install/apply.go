// This file carries a Plan out, in the real file system.

package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Apply does what is planned, step by step, and stops at the first that fails: what is done by then is in the record. did is told of each
// step that was done.
func Apply(p Plan, did func(Change)) error {
	for _, c := range p.Changes {
		if err := c.apply(); err != nil {
			return fmt.Errorf("%w: what was done until then, `rootless-ovl uninstall` takes back", err)
		}
		did(c)
	}
	return nil
}

func (c Change) apply() error {
	switch c.Action {
	case MakeDir:
		err := os.Mkdir(c.Path, c.Mode)
		if errors.Is(err, fs.ErrExist) {
			return nil // made by somebody meanwhile
		}
		return err
	case Write:
		return writeWhole(c.Path, c.New, c.Mode)
	case Link:
		err := os.Symlink(c.Target, c.Path)
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Remove(c.Path); err != nil {
			return err
		}
		return os.Symlink(c.Target, c.Path)
	case Remove:
		if err := os.Remove(c.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	case RemoveDir:
		err := os.Remove(c.Path)
		if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, fs.ErrNotExist) {
			return nil // somebody uses it by now, or has removed it
		}
		return err
	}
	return fmt.Errorf("%s: %q is not an action", c.Path, c.Action)
}

// writeWhole writes a file such that nobody sees a part of it.
func writeWhole(path string, content []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the error that matters is err
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
