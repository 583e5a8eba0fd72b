// up --replace --background: what systemd runs to have the service go on in a new process.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// envTell is the number of the descriptor by which a daemon in the background tells that it has taken the place. The next one ends when it is
// not to take it any more.
const envTell = "ROOTLESS_OVL_TELL_FD"

// inBackground runs this command line again without --background, and returns when that process serves, or has ended. When ctx ends the place is
// not taken any more; but one that is being taken is waited for, and what has taken it is left alone: the daemon before it is gone.
func (a *app) inBackground(ctx context.Context) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer r.Close()
	asked, ask, err := os.Pipe()
	if err != nil {
		w.Close()
		return fmt.Errorf("pipe: %w", err)
	}
	defer ask.Close()
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(s string) bool {
		return strings.TrimLeft(s, "-") == "background" || strings.HasPrefix(s, "--background=")
	})
	// Not CommandContext: the daemon outlives this process.
	child := exec.Command(a.programPath(), args...)
	child.Stdout, child.Stderr = a.stdout, a.stderr
	child.ExtraFiles = []*os.File{w, asked}
	child.Env = append(os.Environ(), envTell+"=3")
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = child.Start()
	w.Close()
	asked.Close()
	if err != nil {
		return fmt.Errorf("start the daemon that is to take the place: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = ask.Close() })()
	if n, _ := r.Read(make([]byte, 1)); n == 1 {
		return child.Process.Release()
	}
	err = child.Wait()
	var status *exec.ExitError
	if errors.As(err, &status) && status.ExitCode() > 0 {
		return exitStatus(status.ExitCode()) // it has said why
	}
	return fmt.Errorf("the daemon that was to take the place has ended: %w", errors.Join(err, ctx.Err()))
}

// starter is the process that waits in inBackground for this one; nil: there is none.
type starter struct {
	tell, asked *os.File
	settled     atomic.Bool // the place is being taken, or is not taken any more
}

// startedBy is the starter that the environment tells of. What this process starts hears nothing of it.
func startedBy() *starter {
	fd, err := strconv.Atoi(os.Getenv(envTell))
	if err != nil {
		return nil
	}
	_ = os.Unsetenv(envTell)
	syscall.CloseOnExec(fd)
	syscall.CloseOnExec(fd + 1)
	return &starter{tell: os.NewFile(uintptr(fd), "tell"), asked: os.NewFile(uintptr(fd+1), "asked")}
}

// heed is ctx until the starter does not want the place taken any more, or has gone; from begin on that means nothing.
func (s *starter) heed(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	if s != nil {
		go func() { // ends with the starter
			_, _ = s.asked.Read(make([]byte, 1))
			if s.settled.CompareAndSwap(false, true) {
				cancel()
			}
		}()
	}
	return ctx, cancel
}

// begin is called right before the place is taken, which an error forbids.
func (s *starter) begin() error {
	if s != nil && !s.settled.CompareAndSwap(false, true) {
		return errors.New("who asked for the place to be taken has gone: the daemon that runs goes on")
	}
	return nil
}

// done has inBackground return.
func (s *starter) done() {
	if s != nil {
		_, _ = s.tell.Write([]byte{1}) // who has gone does not want to know
		_ = s.tell.Close()
	}
}
