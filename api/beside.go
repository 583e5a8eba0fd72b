// A further socket beside the API's, for the protocol of an engine that calls the daemon.

package api

import (
	"net"
	"os"
	"path/filepath"
)

// ListenBeside listens on a socket called name in the runtime directory of a Listener that this process has open: the lock of that says
// that a socket which lies there is nobody's any more. As there, connections of other users are closed unanswered.
func ListenBeside(runtimeDir, name string) (*BesideListener, error) {
	path := filepath.Join(runtimeDir, name)
	if len(path) > maxSocketPath {
		return nil, Errorf(CodeInvalid, "the socket's path %s has %d bytes, the kernel allows %d: choose a shorter --runtime-dir", path, len(path), maxSocketPath)
	}
	ln, err := listenAt(path)
	if err != nil {
		return nil, err
	}
	return GivenBeside(ln), nil
}

// GivenBeside makes one of a socket that another process had.
func GivenBeside(ln *net.UnixListener) *BesideListener {
	return &BesideListener{UnixListener: ln, uid: os.Geteuid()}
}

// BesideListener accepts connections of its own user only.
type BesideListener struct {
	*net.UnixListener
	uid int
}

// Accept waits for the next connection of our own user.
func (l *BesideListener) Accept() (net.Conn, error) { return acceptOwn(l.UnixListener, l.uid) }
