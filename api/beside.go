// A further socket beside the API's, for the protocol of an engine that calls the daemon.

package api

import (
	"net"
	"os"
	"path/filepath"
)

// ListenBeside listens on a socket called name in the runtime directory of a Listener that this process has open: the lock of that says
// that a socket which lies there is nobody's any more. As there, connections of other users are closed unanswered.
func ListenBeside(runtimeDir, name string) (net.Listener, error) {
	path := filepath.Join(runtimeDir, name)
	if len(path) > maxSocketPath {
		return nil, Errorf(CodeInvalid, "the socket's path %s has %d bytes, the kernel allows %d: choose a shorter --runtime-dir", path, len(path), maxSocketPath)
	}
	ln, err := listenAt(path)
	if err != nil {
		return nil, err
	}
	return besideListener{UnixListener: ln, uid: os.Geteuid()}, nil
}

type besideListener struct {
	*net.UnixListener
	uid int
}

// Accept waits for the next connection of our own user.
func (l besideListener) Accept() (net.Conn, error) { return acceptOwn(l.UnixListener, l.uid) }
