// This file is the parent's half of a Sandbox: the new user, network and mount namespace of `rootless-ovl run`, and what it has in common with
// the sandbox in a container's namespaces (join.go).

package nsutil

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// childArg0 is what a program that calls MaybeChild is started as to become the first process of a Sandbox.
const childArg0 = "rootless-ovl-sandbox"

// Descriptors of the first process beside the standard three.
const (
	orderFD  = 3 // reads the sandboxOrder (gob: an environment may hold any bytes), then one byte when it may go on
	reportFD = 4 // writes sandboxReports (gob); closed by a successful exec
)

// Spec says what to run in a Sandbox.
type Spec struct {
	Args []string // the command and its arguments; looked up in the PATH of Env
	Env  []string // nil: our own
	Dir  string   // "": our own working directory
	// ResolvConf is what /etc/resolv.conf says inside; nil leaves the host's.
	ResolvConf []byte
	// MapRoot makes the command root of its namespaces. Without it the command runs under the user's own uid and
	// gid and, in namespaces of its own, without a capability.
	MapRoot bool
	// Nil is our own.
	Stdin, Stdout, Stderr *os.File
}

// sandboxOrder is what the first process is told.
type sandboxOrder struct {
	Args       []string
	Env        []string
	ResolvConf []byte
	SetResolv  bool
	KeepCaps   bool
	OwnNetns   bool     // the network namespace was made for the command
	UID, GID   int      // to become first; -1: stay
	Dir        string   // to go to; "": stay
	Hide       []string // sockets of name services that would answer for the host's network
	Parent     int
}

// sandboxReport is what it answers: a warning, or why the command cannot be run.
type sandboxReport struct {
	Warning string
	Error   string
	Code    int
	Refused syscall.Errno // of the first thing that takes a capability in the new namespaces
}

// hostNameServices are sockets over which the C library asks a daemon of the host instead of the resolver in resolv.conf.
var hostNameServices = []string{
	"/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/var/run/nscd/socket",
}

// A Sandbox is a process in a new user, network and mount namespace that waits until Release and then becomes the
// command. It dies with us. What else runs in the sandbox is killed when the command has ended.
type Sandbox struct {
	proc   *os.Process
	userns uint64                           // inode of its user namespace; 0 where it could not be read
	others []int                            // children of ours that were there before and may be in the same user namespace
	done   chan struct{}                    // closed when the command has ended and the rest has been killed
	reaped func() (*os.ProcessState, error) // reaps the command, once

	mu       sync.Mutex
	order    *os.File // nil after Release
	report   *os.File
	warnings []string
	failed   *CommandError
}

// CommandError says that the command could not be run. Code is the exit code shells use: 127 not found, 126 found but not
// executable.
type CommandError struct {
	Code int
	Text string
}

func (e *CommandError) Error() string { return e.Text }

// Start makes the namespaces. The process in them, PID, holds still until Release; attach it meanwhile. The program must
// call MaybeChild first thing in main. ErrNoUserns, with the cause and the remedy, where the system does not allow it.
func Start(spec Spec) (*Sandbox, error) {
	uid, gid := os.Geteuid(), os.Getegid()
	inUID, inGID := uid, gid
	if spec.MapRoot {
		inUID, inGID = 0, 0
	}
	attr := &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: inUID, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: inGID, HostID: gid, Size: 1}},
		Pdeathsig:   unix.SIGKILL,
	}
	if !spec.MapRoot {
		// The execution of our own program again would drop the capabilities of a uid other than 0.
		attr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN}
	}
	order := sandboxOrder{KeepCaps: spec.MapRoot, OwnNetns: true, UID: -1, GID: -1}
	return start(spec, order, nil, func(files []*os.File) (*os.Process, error) {
		cmd := &exec.Cmd{
			Path:        "/proc/self/exe",
			Args:        []string{childArg0},
			Env:         os.Environ(),
			Dir:         spec.Dir,
			Stdin:       files[0],
			Stdout:      files[1],
			Stderr:      files[2],
			ExtraFiles:  files[3:],
			SysProcAttr: attr,
		}
		if err := cmd.Start(); err != nil {
			return nil, usernsError(err)
		}
		return cmd.Process, nil
	})
}

// start makes a Sandbox of what launch executes: our own program, with files as its descriptors from 0 on. complete, unless nil, has the
// last word on the order, when the process is in its namespaces.
func start(spec Spec, order sandboxOrder, complete func(pid int, o *sandboxOrder) error, launch func(files []*os.File) (*os.Process, error)) (*Sandbox, error) {
	if len(spec.Args) == 0 || spec.Args[0] == "" {
		return nil, fail(ErrInvalid, nil, "no command to run: give one after --")
	}
	if err := checkDir(spec.Dir); err != nil {
		return nil, err
	}
	orderR, orderW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	reportR, reportW, err := os.Pipe()
	if err != nil {
		orderR.Close()
		orderW.Close()
		return nil, err
	}
	s := &Sandbox{done: make(chan struct{}), order: orderW, report: reportR}
	s.others, _ = ownChildren() // without a readable /proc nobody is taken for one of the sandbox's
	files := []*os.File{fileOr(spec.Stdin, os.Stdin), fileOr(spec.Stdout, os.Stdout), fileOr(spec.Stderr, os.Stderr), orderR, reportW}
	s.reaped = sync.OnceValues(func() (*os.ProcessState, error) { return s.proc.Wait() })
	// Of us, not of this thread alone; a kernel that cannot (before 3.4) leaves orphans to the host's init.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

	// The kernel's "parent" that the process dies with is a thread, so one goroutine keeps its thread until the process
	// has ended (https://go.dev/issue/27505).
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var err error
		s.proc, err = launch(files)
		if err == nil {
			s.userns, _, _ = userNamespace(s.PID(), 0)
		}
		started <- err
		if err == nil {
			s.attend()
		}
	}()
	err = <-started
	orderR.Close()
	reportW.Close()
	if err != nil {
		orderW.Close()
		reportR.Close()
		return nil, err
	}
	order.Args, order.Env, order.Parent, order.Hide = spec.Args, spec.Env, os.Getpid(), hostNameServices
	order.ResolvConf, order.SetResolv = spec.ResolvConf, spec.ResolvConf != nil
	if order.Env == nil {
		order.Env = os.Environ()
	}
	if complete != nil {
		err = complete(s.PID(), &order)
	}
	if err == nil {
		if err = gob.NewEncoder(orderW).Encode(order); err != nil {
			err = fmt.Errorf("preparing the sandbox: %w", err)
		}
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// checkDir tells whether a command may start in a directory.
func checkDir(dir string) error {
	if dir == "" {
		return nil
	}
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return &os.PathError{Op: "chdir", Path: dir, Err: unix.ENOTDIR}
	}
	if err := unix.Access(dir, unix.X_OK); err != nil {
		return &os.PathError{Op: "chdir", Path: dir, Err: err}
	}
	return nil
}

func fileOr(f, otherwise *os.File) *os.File {
	if f != nil {
		return f
	}
	return otherwise
}

// PID is the process to attach, and later the command's.
func (s *Sandbox) PID() int { return s.proc.Pid }

// attend waits for the end of the command and of all that it leaves.
func (s *Sandbox) attend() {
	defer close(s.done)
	ended := make(chan struct{})
	orphaned := make(chan os.Signal, 1)
	signal.Notify(orphaned, unix.SIGCHLD)
	defer signal.Stop(orphaned)
	var reaping sync.WaitGroup
	reaping.Go(func() {
		for {
			select {
			case <-orphaned:
				s.reap()
			case <-ended:
				return
			}
		}
	})
	for { // without reaping it: until Wait or Close its pid is nobody else's
		err := unix.Waitid(unix.P_PID, s.PID(), nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	close(ended)
	reaping.Wait()
	if err := s.sweep(); err != nil {
		s.mu.Lock()
		s.warnings = append(s.warnings, err.Error())
		s.mu.Unlock()
	}
}

// Done is closed when the command has ended and what it left running has been killed. The command is a zombie then, its pid
// nobody else's, until Wait or Close.
func (s *Sandbox) Done() <-chan struct{} { return s.done }

// Release lets the process put its resolv.conf in place and become the command. It returns when the command has been
// executed, or a *CommandError, or ErrNoUserns where the system lets user namespaces be made but not used. Warnings has what could not be done on the way.
func (s *Sandbox) Release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.order == nil {
		return fail(ErrInvalid, nil, "the sandbox was released or closed before")
	}
	_, err := s.order.Write([]byte{'\n'})
	s.order.Close()
	s.order = nil
	if err != nil && !errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("releasing the sandbox: %w", err)
	}
	var refused syscall.Errno
	for dec := gob.NewDecoder(s.report); ; {
		var r sandboxReport
		if err := dec.Decode(&r); err != nil {
			if errors.Is(err, io.EOF) {
				break
			}
			return fmt.Errorf("preparing the sandbox: %w", err)
		}
		if r.Warning != "" {
			s.warnings = append(s.warnings, r.Warning)
		}
		if r.Error != "" {
			s.failed = &CommandError{Code: r.Code, Text: r.Error}
			refused = r.Refused
		}
	}
	s.report.Close()
	if refused != 0 {
		return usernsError(fmt.Errorf("%s: %w", s.failed.Text, refused))
	}
	if s.failed != nil {
		return s.failed
	}
	return nil
}

// Warnings has, after Release, one line for each thing that could not be set up in the sandbox, and after Done for what could
// not be ended.
func (s *Sandbox) Warnings() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.warnings...)
}

// Wait waits until Done, reaps the command and returns its exit code: 128 + n where signal n ended it, as shells do.
func (s *Sandbox) Wait() (int, error) {
	<-s.done
	state, err := s.reaped()
	if err != nil {
		return -1, fmt.Errorf("waiting for the command: %w", err)
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	if !ok {
		return state.ExitCode(), nil
	}
	if status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return status.ExitStatus(), nil
}

// Signal sends a signal to the command; os.ErrProcessDone if it has ended and has been reaped.
func (s *Sandbox) Signal(sig os.Signal) error { return s.proc.Signal(sig) }

// Close ends the sandbox: its process is killed if it still lives, and reaped.
func (s *Sandbox) Close() error {
	s.mu.Lock()
	if s.order != nil {
		s.order.Close()
		s.order = nil
		s.report.Close()
	}
	s.mu.Unlock()
	_ = s.proc.Kill()
	<-s.done
	_, _ = s.reaped() // how it ended is Wait's to tell
	return nil
}

// ForwardSignals passes signals that we get on to the command until the returned function is called or the command has
// ended. TERM, HUP, USR1, USR2 and CONT always; INT, QUIT and TSTP only where the terminal has not sent them to the
// command already, which it has if we are in its foreground process group, as the command then is too: one that somebody
// sends to our pid alone is not told apart from the terminal's and does not reach the command. INT and HUP that were ignored
// when we started (nohup, a shell's background jobs) stay ignored. After a TSTP we stop ourselves, so that the shell's job
// control works.
func (s *Sandbox) ForwardSignals() (stop func()) {
	ch := make(chan os.Signal, 16)
	signal.Notify(ch, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGCONT, unix.SIGQUIT, unix.SIGTSTP)
	for _, sig := range []os.Signal{unix.SIGHUP, unix.SIGINT} {
		if !signal.Ignored(sig) {
			signal.Notify(ch, sig)
		}
	}
	quit, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		defer signal.Stop(ch)
		for {
			select {
			case sig := <-ch:
				switch sig {
				case unix.SIGINT, unix.SIGQUIT:
					if !inForeground() {
						_ = s.Signal(sig)
					}
				case unix.SIGTSTP:
					if !inForeground() {
						_ = s.Signal(sig)
					}
					_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
				default:
					_ = s.Signal(sig)
				}
			case <-s.done:
				return
			case <-quit:
				return
			}
		}
	}()
	var once sync.Once
	return func() {
		once.Do(func() { close(quit) })
		<-gone
	}
}

// inForeground tells whether our process group is the one that the controlling terminal sends its signals to.
func inForeground() bool {
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// usernsError says why the system refuses a new user namespace, as far as it tells.
func usernsError(err error) error {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EUSERS) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EACCES) {
		return fmt.Errorf("starting the sandbox: %w", err)
	}
	cause, remedy := usernsRefusal(func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	})
	return fail(ErrNoUserns, err, "cannot make a user namespace (%v): %s; %s", errors.Unwrap(err), cause, remedy)
}

// usernsRefusal looks for the setting that forbids user namespaces. read returns the content of a file, or "".
func usernsRefusal(read func(path string) string) (cause, remedy string) {
	switch {
	case read("/proc/sys/kernel/unprivileged_userns_clone") == "0":
		return "kernel.unprivileged_userns_clone is 0", "as root: sysctl -w kernel.unprivileged_userns_clone=1"
	case read("/proc/sys/user/max_user_namespaces") == "0":
		return "user.max_user_namespaces is 0", "as root: sysctl -w user.max_user_namespaces=15000"
	case read("/proc/sys/user/max_net_namespaces") == "0":
		return "user.max_net_namespaces is 0", "as root: sysctl -w user.max_net_namespaces=15000"
	case read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
		return "AppArmor restricts them (kernel.apparmor_restrict_unprivileged_userns is 1)",
			"install a profile for this program as root (rootless-ovl doctor prints it), or attach a container of an engine that has one"
	default:
		return "the system forbids it", "inside a container allow the system calls clone and unshare (--security-opt seccomp=unconfined); rootless-ovl doctor looks for the cause"
	}
}

// AppArmorProfile is a profile that lets the program at this path make user namespaces, for
// /etc/apparmor.d/ on systems that restrict them (Ubuntu 24.04).
func AppArmorProfile(exe string) string {
	name := strings.Trim(strings.ReplaceAll(filepath.Clean(exe), "/", "."), ".")
	return "abi <abi/4.0>,\ninclude <tunables/global>\n\nprofile " + name + " \"" + exe + "\" flags=(unconfined) {\n  userns,\n  include if exists <local/" + name + ">\n}\n"
}
