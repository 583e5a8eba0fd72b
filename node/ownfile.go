// This file reads the node's own files. Their directory is this user's alone, but it may not always have been, and people restore backups: what is
// no plain file of ours is not read, and nothing that is read can hold the daemon up or fill its memory.

package node

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The most that is read of a file, in bytes. A hundred thousand leases have some 60 MB.
const (
	maxWordFile  = 4 << 10
	maxStateFile = 256 << 20
)

// readOwn reads the file at path, of most bytes. One that is not there gives an error that matches fs.ErrNotExist; the other errors name the path
// and what to do. It follows no symbolic link, waits for no FIFO, and believes no file that others could have written.
func readOwn(path string, most int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link: put the file itself there, or remove the link", path)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	if err := checkOwn(f, path); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s has more than %d bytes: no version of this program writes so much; move it away", path, most)
	}
	return b, err
}

// checkOwn refuses what is no plain file of this user's alone.
func checkOwn(f *os.File, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%s is not a plain file: move it away", path)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, not to you (uid %d): move it away, or run `chown %[3]d %[1]s` if you know what is in it", path, st.Uid, os.Geteuid())
	case st.Mode&0o022 != 0:
		return fmt.Errorf("others may have written to %s (mode %04o): see what is in it, and run `chmod 600 %[1]s`", path, st.Mode&0o777)
	}
	return nil
}
