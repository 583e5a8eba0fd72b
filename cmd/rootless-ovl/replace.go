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
	"syscall"
)

// envTell is the number of the descriptor by which a daemon in the background tells that it has taken the place.
const envTell = "ROOTLESS_OVL_TELL_FD"

// inBackground runs this command line again without --background, and returns when that process serves, or has ended.
func (a *app) inBackground(ctx context.Context) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer r.Close()
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(s string) bool {
		return strings.TrimLeft(s, "-") == "background" || strings.HasPrefix(s, "--background=")
	})
	// Not CommandContext: the daemon outlives this process.
	child := exec.Command(a.programPath(), args...)
	child.Stdout, child.Stderr = a.stdout, a.stderr
	child.ExtraFiles = []*os.File{w}
	child.Env = append(os.Environ(), envTell+"=3")
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = child.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("start the daemon that is to take the place: %w", err)
	}
	told := make(chan bool, 1)
	go func() {
		n, _ := r.Read(make([]byte, 1))
		told <- n == 1
	}()
	select {
	case ok := <-told:
		if ok {
			return child.Process.Release()
		}
	case <-ctx.Done():
	}
	_ = child.Process.Signal(syscall.SIGTERM) // it has not taken the place, and ends if it has not already
	err = child.Wait()
	var status *exec.ExitError
	if errors.As(err, &status) && status.ExitCode() > 0 {
		return exitStatus(status.ExitCode()) // it has said why
	}
	return fmt.Errorf("the daemon that was to take the place has ended: %w", errors.Join(err, ctx.Err()))
}

// tellParent has inBackground return.
func tellParent() {
	fd, err := strconv.Atoi(os.Getenv(envTell))
	if err != nil {
		return
	}
	_ = os.Unsetenv(envTell) // it is not for whom this process starts
	f := os.NewFile(uintptr(fd), "tell")
	_, _ = f.Write([]byte{1}) // who has gone does not want to know
	_ = f.Close()
}
