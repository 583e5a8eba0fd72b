// This file is the opener's own process.

package opener

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/rootless-ovl/rootless-ovl/internal/cage"
)

const (
	// childArg0 is what the program is started as to become the opener.
	childArg0 = "rootless-ovl-opener"
	pairFD    = 3
	// memoryLimit is for the little that there is to keep, in bytes.
	memoryLimit = 16 << 20
)

// MaybeServe must be called first thing in main, after nsutil.MaybeChild. In a process that Start has started it never returns; otherwise it
// does nothing.
func MaybeServe() {
	if len(os.Args) != 1 || os.Args[0] != childArg0 {
		return
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "rootless-ovl: the opener:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve() error {
	debug.SetMemoryLimit(memoryLimit)
	// What ends the daemon, a terminal's or systemd's, is for the daemon to follow: it asks until its end.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	_ = os.WriteFile("/proc/self/comm", []byte(childArg0), 0) // what ps shows; it would be "exe"
	conn, err := connOf(os.NewFile(pairFD, "pair"))
	if err != nil {
		return err
	}
	var m mandate
	buf := make([]byte, maxMessage)
	if _, err := receive(conn, buf, &m); err != nil {
		return fmt.Errorf("what it is to do: %w", err)
	}
	if err := cage.EnterOpener(); err != nil && m.Strict {
		return err
	}
	return answerAll(conn, newCalls(m))
}

// answerAll returns when the daemon has closed its end.
func answerAll(conn *net.UnixConn, calls map[string]call) error {
	buf := make([]byte, maxMessage)
	turns := make(chan struct{}, maxAtOnce)
	for {
		var q question
		files, err := receive(conn, buf, &q)
		closeAll(files) // no question has any
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
			return nil
		case err != nil:
			return err
		}
		turns <- struct{}{}
		go func() {
			defer func() { <-turns }()
			a, f := answerOne(calls, q)
			err := send(conn, a, f)
			if f != nil {
				_ = f.Close() // the daemon has its own now
			}
			if err != nil { // it is too long
				_ = send(conn, answer{ID: q.ID, Err: toRemote(err)}, nil) // if this does not go either, the daemon has ended
			}
		}()
	}
}

// answerOne does what is asked. The file is the caller's.
func answerOne(calls map[string]call, q question) (answer, *os.File) {
	do, known := calls[q.Call]
	if !known {
		return answer{ID: q.ID, Err: toRemote(fmt.Errorf("the opener knows no %q", q.Call))}, nil
	}
	value, f, err := do(q.Arg)
	a := answer{ID: q.ID}
	if err == nil {
		a.Value, err = json.Marshal(value)
	}
	if err != nil {
		a.Err = toRemote(err)
	}
	return a, f
}
