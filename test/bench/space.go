// This file makes network namespaces and runs things inside them.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// commandLimit bounds a command that sets something up.
const commandLimit = 20 * time.Second

// space is a network namespace, held by descriptor. Its methods may be called from any goroutine.
type space struct {
	name string
	file *os.File
}

// onThread runs fn on a thread of its own, which ends with it.
func onThread(fn func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		result <- fn()
	}()
	return <-result
}

// newSpace makes an empty network namespace, prepared for measuring: loopback up, cubic, no IPv6 chatter.
func newSpace(name string) (*space, error) {
	s := &space{name: name}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		var err error
		s.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err == nil {
		err = s.prepare()
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	return s, nil
}

// spaceOf opens and prepares the network namespace of a process.
func spaceOf(name string, pid int) (*space, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	s := &space{name: name, file: file}
	if err := s.prepare(); err != nil {
		s.close()
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	return s, nil
}

func (s *space) prepare() error {
	err := s.do(func() error {
		return errors.Join(
			// BBR would pace the fast paths down and hide what they differ in.
			writeSysctl("net/ipv4/tcp_congestion_control", "cubic"),
			writeSysctl("net/ipv4/ping_group_range", "0 2147483647"),
		)
	})
	if err != nil {
		return err
	}
	// Absent where the kernel has no IPv6, and then there is nothing to switch off.
	_ = s.do(func() error { return writeSysctl("net/ipv6/conf/all/disable_ipv6", "1") })
	_ = s.do(func() error { return writeSysctl("net/ipv6/conf/default/disable_ipv6", "1") })
	return s.ip(context.Background(), "link set lo up")
}

func (s *space) close() {
	if s.file != nil {
		s.file.Close()
	}
}

// path names the namespace for ip(8), as long as the space is open.
func (s *space) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.file.Fd()) }

// do runs fn on a thread inside the namespace.
func (s *space) do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", s.name, err)
		}
		return fn()
	})
}

// start starts cmd in the namespace.
func (s *space) start(cmd *exec.Cmd) error { return s.do(cmd.Start) }

// run runs a program in the namespace.
func (s *space) run(ctx context.Context, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	_, err := s.output(exec.CommandContext(ctx, name, args...))
	return err
}

// output runs cmd in the namespace and returns its standard output; its standard error becomes part of the error.
func (s *space) output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second
	err := s.start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return stdout.String(), fmt.Errorf("%s: %s: %w: %s", s.name, strings.Join(cmd.Args, " "), err, tail(stderr.String()+stdout.String()))
	}
	return stdout.String(), nil
}

// ip runs ip(8) on each line.
func (s *space) ip(ctx context.Context, lines ...string) error {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	_, err := s.output(cmd)
	return err
}

// tailLength is how much of a program's output an error shows, in bytes.
const tailLength = 600

// tail is the end of a program's output, in one line.
func tail(text string) string {
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	if len(text) > tailLength {
		text = "..." + text[len(text)-tailLength:]
	}
	return text
}
