// This file is the place of subnet.env: that it can be written is known before a subnet is leased, and it goes when the
// subnet is given back.

package node

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// checkSubnetFile tries whether a file can be made where the subnet file will be.
func checkSubnetFile(path string) error {
	dir := filepath.Dir(path)
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		var f *os.File
		if f, err = os.CreateTemp(dir, "."+filepath.Base(path)+".*"); err == nil {
			err = errors.Join(f.Close(), os.Remove(f.Name()))
		}
	}
	if st, serr := os.Stat(path); err == nil && serr == nil && !st.Mode().IsRegular() {
		err = errors.New("it is there and is no file")
	}
	if err != nil {
		return fmt.Errorf("subnet file %s cannot be written: %w; choose another place with --subnet-file", path, plain(err))
	}
	return nil
}

// removeSubnetFile removes the file if it still tells of subnet.
func removeSubnetFile(path string, subnet netip.Prefix) error {
	env, err := lease.ReadSubnetEnv(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && env.Subnet != subnet {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Remove(path)
}
