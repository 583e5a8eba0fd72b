// This file runs the bench in two stages: the outer one keeps the machine as it was, the inner one measures.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stageVariable tells the inner stage its work directory.
const stageVariable = "ROOTLESS_OVL_BENCH_DIR"

// innerGrace is how long the inner stage may clean up after a signal. Its end ends everything in any case.
const innerGrace = 20 * time.Second

const (
	sysctlAllowedCC = "net/ipv4/tcp_allowed_congestion_control"
	sysctlRmemMax   = "net/core/rmem_max"
)

// errReported is a failure of the inner stage, which has said what it is.
var errReported = errors.New("the measuring stage failed")

// errInterrupted is a bench that a signal ended.
var errInterrupted = errors.New("interrupted")

// program is a command that the bench cannot do without, and the Debian package that has it.
type program struct{ command, pkg string }

var required = []program{
	{"ip", "iproute2"}, {"bridge", "iproute2"}, {"ethtool", "ethtool"}, {"iperf3", "iperf3"}, {"unshare", "util-linux"},
	{"sleep", "coreutils"},
}

// missingPackages are the packages of the programs that are not installed.
func missingPackages(programs []program) []string {
	var pkgs []string
	for _, p := range programs {
		if _, err := exec.LookPath(p.command); err != nil && !slices.Contains(pkgs, p.pkg) {
			pkgs = append(pkgs, p.pkg)
		}
	}
	return pkgs
}

func installLine(pkgs ...string) string {
	return "sudo apt-get install -y --no-install-recommends " + strings.Join(pkgs, " ")
}

// outerStage checks the machine, runs the inner stage and undoes what it changed outside of it.
func outerStage(ctx context.Context, o options, args []string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root to make the kernel peers (the daemons run unprivileged in it): sudo make bench")
	}
	if pkgs := missingPackages(required); len(pkgs) > 0 {
		return fmt.Errorf("programs are missing: %s", installLine(pkgs...))
	}
	if o.writeDocs {
		if err := checkMarkers(o.docs); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp("", "rootless-ovl-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	// The user of the daemons may not reach the directory of the repository.
	const plugin = "rootless-ovl-plugin" // which engines start, beside the program
	if err := errors.Join(
		copyFile(filepath.Join(dir, "rootless-ovl"), o.binary),
		copyFile(filepath.Join(dir, plugin), filepath.Join(filepath.Dir(o.binary), plugin)),
	); err != nil {
		return fmt.Errorf("%w (make build makes both)", err)
	}
	saved, err := keepSysctls(sysctlAllowedCC, sysctlRmemMax)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, saved.restore()) }()
	if err := allowCubic(); err != nil {
		return err
	}

	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), stageVariable+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the measuring stage: %w", err)
	}
	done := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-done:
			return
		case <-ctx.Done():
			_ = cmd.Process.Signal(unix.SIGTERM)
		case <-time.After(o.limit + innerGrace):
		}
		select {
		case <-done:
		case <-time.After(innerGrace):
			_ = cmd.Process.Kill()
		}
	}()
	err = cmd.Wait()
	close(done)
	<-watched
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return errReported
	}
	if err != nil {
		return fmt.Errorf("the measuring stage: %w", err)
	}
	return nil
}

// innerStage is the first process of its PID namespace.
func innerStage(ctx context.Context, o options, dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	b := &bench{options: o, dir: dir, log: os.Stderr}
	limited, cancel := context.WithTimeout(ctx, o.limit)
	defer cancel()
	report, err := b.run(limited)
	if err != nil && report == nil {
		return err
	}
	if text := report.text(); text != "" {
		fmt.Print(text)
	}
	if ctx.Err() != nil {
		return errInterrupted
	}
	if err := report.writeJSON(o.results); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "results: %s\n", o.results)
	if o.writeDocs {
		if err := report.writeDocs(o.docs); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "table: %s\n", o.docs)
	}
	return err
}

func copyFile(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}
