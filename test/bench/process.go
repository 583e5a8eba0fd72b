// This file starts, ends and accounts for the processes of a lab.

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopGrace is how long a process may take to end by itself.
const stopGrace = 5 * time.Second

// process is a running program of a lab.
type process struct {
	name string
	pid  int
	cmd  *exec.Cmd
	log  string // path
	done chan struct{}
}

// command makes a command that a space can start. With unprivileged it runs as the lab's user, who has no capability.
func (l *lab) command(unprivileged bool, home, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = home
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + home, "XDG_RUNTIME_DIR=" + home, "LANG=C.UTF-8",
	}
	if unprivileged {
		id := uint32(l.uid)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	}
	return cmd
}

// launch starts cmd in a space, with its output in a file. The process ends with stop, or with the lab.
func (l *lab) launch(s *space, name string, cmd *exec.Cmd) (*process, error) {
	l.launched++
	p := &process{name: name, cmd: cmd, done: make(chan struct{}), log: filepath.Join(l.dir, fmt.Sprintf("%s-%d.log", name, l.launched))}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := s.start(cmd); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	p.pid = cmd.Process.Pid
	go func() {
		defer close(p.done)
		_ = cmd.Wait() // how it ended is in its log
	}()
	l.onClose(p.stop)
	return p, nil
}

// stop ends the process, by force when it does not end by itself. It may be called again.
func (p *process) stop() {
	select {
	case <-p.done:
		return
	default:
	}
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(stopGrace):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// ended is an error when the process has ended, with the end of what it said.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %s: %s", p.name, p.cmd.ProcessState, p.said())
	default:
		return nil
	}
}

// said is the end of the process's log, or what it panicked with.
func (p *process) said() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	for _, mark := range []string{"panic: ", "fatal error: "} {
		if i := strings.Index(string(b), mark); i >= 0 {
			return tail(string(b[i:min(i+tailLength, len(b))]))
		}
	}
	return tail(string(b))
}

// waitFor calls ready until it returns nil; it fails when the context or limit ends, or p does (p may be nil).
func waitFor(ctx context.Context, limit time.Duration, p *process, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		if p != nil {
			if ended := p.ended(); ended != nil {
				return ended
			}
		}
		select {
		case <-ctx.Done():
			if p != nil {
				return fmt.Errorf("%s is not ready after %v: %w: %s", p.name, limit, err, p.said())
			}
			return fmt.Errorf("not ready after %v: %w", limit, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// clockTick is the unit of CPU times in /proc: USER_HZ is 100 on every architecture that Go runs on.
const clockTick = 10 * time.Millisecond

// cpuTime is the CPU time that the processes have used so far, in user and kernel mode.
func cpuTime(processes []*process) (time.Duration, error) {
	var sum time.Duration
	for _, p := range processes {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
		if err != nil {
			return 0, fmt.Errorf("%s: %w", p.name, err)
		}
		t, err := parseProcessCPU(string(b))
		if err != nil {
			return 0, fmt.Errorf("%s: %w", p.name, err)
		}
		sum += t
	}
	return sum, nil
}

// parseProcessCPU reads the CPU time from /proc/PID/stat: fields 14 and 15, counted after the name in parentheses.
func parseProcessCPU(stat string) (time.Duration, error) {
	_, rest, ok := cutLast(stat, ")")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 13 {
		return 0, fmt.Errorf("unknown process statistics %q", stat)
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(fields[12], 10, 64)
	if err != nil {
		return 0, err
	}
	return time.Duration(user+system) * clockTick, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// machineTime is the CPU time that the whole machine has used so far.
func machineTime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return parseMachineCPU(string(b))
}

// parseMachineCPU adds up user, nice, system, irq and softirq of /proc/stat's first line.
func parseMachineCPU(stat string) (time.Duration, error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("unknown machine statistics %q", line)
	}
	var sum time.Duration
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(n) * clockTick
	}
	return sum, nil
}

// memory is a process's resident set in bytes: its highest since resetPeak, and now.
func (p *process) memory() (peak, now float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", p.name, err)
	}
	if peak, err = statusKB(string(b), "VmHWM"); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", p.name, err)
	}
	if now, err = statusKB(string(b), "VmRSS"); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", p.name, err)
	}
	return peak, now, nil
}

// statusKB reads one of the sizes in /proc/PID/status, in bytes.
func statusKB(status, name string) (float64, error) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return float64(n) * 1024, err
		}
	}
	return 0, fmt.Errorf("no %s in its status", name)
}

// resetPeak makes now the highest resident set.
func (p *process) resetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.pid), []byte("5"), 0)
}

// checkUnprivileged makes sure that the process has no capability.
func (p *process) checkUnprivileged() error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		for _, set := range []string{"CapPrm:", "CapEff:"} {
			if value, ok := strings.CutPrefix(line, set); ok && strings.Trim(value, "0\t\n ") != "" {
				return fmt.Errorf("%s must have no capability, it has %s", p.name, strings.TrimSpace(line))
			}
		}
	}
	return nil
}
