// This file runs the daemon on a host and asks it over its socket.

package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Status is the daemon's answer to GET /v1/status: the names are the API's promise.
type Status struct {
	Version     string `json:"version"`
	State       string `json:"state"`
	Problem     string `json:"problem"`
	PID         int    `json:"pid"`
	NodeID      string `json:"node_id"`
	PublicIP    string `json:"public_ip"`
	Interface   string `json:"interface"`
	Port        int    `json:"port"`
	Subnet      string `json:"subnet"`
	Subnet6     string `json:"subnet6"`
	Network     string `json:"network"`
	Gateway     string `json:"gateway"`
	Backend     string `json:"backend"`
	MTU         int    `json:"mtu"`
	Ephemeral   bool   `json:"ephemeral"`
	Attachments int    `json:"attachments"`
	Peers       int    `json:"peers"`
	Store       struct {
		Endpoints []string `json:"endpoints"`
		Prefix    string   `json:"prefix"`
		Embedded  bool     `json:"embedded"`
		Connected bool     `json:"connected"`
		Error     string   `json:"error"`
	} `json:"store"`
	Counters map[string]map[string]uint64 `json:"counters"`
}

// Attachment is an element of the daemon's answer to GET /v1/attachments.
type Attachment struct {
	Name     string `json:"name"`
	PID      int    `json:"pid"`
	Netns    string `json:"netns"`
	IfName   string `json:"ifname"`
	Addr     string `json:"addr"`
	Addr6    string `json:"addr6"`
	MAC      string `json:"mac"`
	Gateway  string `json:"gateway"`
	Gateway6 string `json:"gateway6"` // empty in a network that is not dual-stack, as Addr6 is
	MTU      int    `json:"mtu"`
	Inode    uint64 `json:"inode"`
}

// Daemon is a running `rootless-ovl up`.
type Daemon struct {
	Host       *Host
	PID        int
	RuntimeDir string
	Log        string // path

	t    T
	cmd  *exec.Cmd
	done chan struct{}
	http *http.Client
}

// Up starts a daemon with `up` and args, waits until it is ready, and checks that it has no capability. It ends with the
// test, or by Stop. --runtime-dir among args is understood.
func (h *Host) Up(args ...string) *Daemon {
	h.lab.t.Helper()
	d := h.UpNoWait(args...)
	d.WaitReady()
	return d
}

// UpNoWait is Up without waiting.
func (h *Host) UpNoWait(args ...string) *Daemon { return h.upWith(nil, args...) }

// UpEnv is Up with additions to the environment.
func (h *Host) UpEnv(env []string, args ...string) *Daemon {
	h.lab.t.Helper()
	d := h.upWith(env, args...)
	d.WaitReady()
	return d
}

func (h *Host) upWith(env []string, args ...string) *Daemon {
	t := h.lab.t
	t.Helper()
	h.daemons++
	d := &Daemon{
		Host: h, t: t, done: make(chan struct{}), RuntimeDir: filepath.Join(h.XDGRuntimeDir(), "rootless-ovl"),
		Log: h.LogPath(fmt.Sprintf("daemon%d", h.daemons)),
	}
	for i, a := range args {
		if value, ok := strings.CutPrefix(a, "--runtime-dir="); ok {
			d.RuntimeDir = value
		} else if a == "--runtime-dir" && i+1 < len(args) {
			d.RuntimeDir = args[i+1]
		}
	}
	d.http = &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return asHostUser(func() (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", d.Socket()) })
		}},
	}
	log, err := os.Create(d.Log)
	must(t, "daemon log", err)
	defer log.Close()
	d.cmd = h.Command(daemonProgram(), append([]string{"up"}, args...)...)
	d.cmd.Env = append(d.cmd.Env, env...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	must(t, "daemon on "+h.Name, h.Start(d.cmd))
	d.PID = d.cmd.Process.Pid
	go func() {
		defer close(d.done)
		_ = d.cmd.Wait()
	}()
	t.Cleanup(func() {
		if d.Running() {
			d.checkCaps()
		}
		if !stop(d.cmd.Process, unix.SIGTERM, d.done, 15*time.Second) {
			t.Errorf("%s: the daemon did not end within 15 s of SIGTERM", h.Name)
		}
		for _, fault := range []string{"panic:", "fatal error:", "DATA RACE"} {
			if strings.Contains(d.LogText(), fault) {
				t.Errorf("%s: the daemon's log has a %q:\n%s", h.Name, fault, d.LogText())
			}
		}
	})
	return d
}

// Socket is the path of the daemon's API socket.
func (d *Daemon) Socket() string { return filepath.Join(d.RuntimeDir, "api.sock") }

// WaitReady waits until the daemon says that it is ready, and checks that it has no capability.
func (d *Daemon) WaitReady() {
	d.t.Helper()
	last := "no answer yet"
	EventuallyWithinOr(d.t, 60*time.Second, func() string {
		return fmt.Sprintf("%s: the daemon is not ready: %s", d.Host.Name, last)
	}, func() bool {
		if !d.Running() {
			d.t.Fatalf("%s: the daemon ended before it was ready, exit code %d:\n%s", d.Host.Name, d.cmd.ProcessState.ExitCode(), d.LogText())
		}
		var s Status
		if err := d.Get("/v1/status", &s); err != nil {
			last = err.Error()
			return false
		}
		last = "state " + s.State
		return s.State == "ready"
	})
	d.checkCaps()
}

// EventuallyWithinOr is EventuallyWithin with a text that is made when it is needed.
func EventuallyWithinOr(t T, limit time.Duration, what func() string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for pause := 5 * time.Millisecond; !ok(); pause = min(2*pause, 200*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", limit, what())
		}
		time.Sleep(pause)
	}
}

// checkCaps fails the test unless the daemon has no capability, cannot get one, and is in its host's network namespace.
func (d *Daemon) checkCaps() {
	d.t.Helper()
	sets, err := Capabilities(d.PID)
	if err != nil {
		if d.Running() {
			d.t.Errorf("capabilities of the daemon: %v", err)
		}
		return
	}
	_, _, rooted := hostUser()
	for name, set := range sets {
		if set != 0 && (name != "CapBnd" || !rooted) {
			d.t.Errorf("%s: the daemon has %s %016x: it must have none", d.Host.Name, name, set)
		}
	}
}

// Running says whether the daemon has not ended.
func (d *Daemon) Running() bool {
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// Wait waits for the daemon's own end, at most a minute, and returns its exit code.
func (d *Daemon) Wait() int {
	d.t.Helper()
	select {
	case <-d.done:
		return d.cmd.ProcessState.ExitCode()
	case <-time.After(time.Minute):
		d.t.Fatalf("%s: the daemon did not end by itself", d.Host.Name)
		return -1
	}
}

// Stop ends the daemon as systemd does and returns its exit code.
func (d *Daemon) Stop() int {
	d.t.Helper()
	if !stop(d.cmd.Process, unix.SIGTERM, d.done, 15*time.Second) {
		d.t.Errorf("%s: the daemon did not end within 15 s of SIGTERM", d.Host.Name)
	}
	return d.cmd.ProcessState.ExitCode()
}

// Kill ends the daemon as a crash does.
func (d *Daemon) Kill() { stop(d.cmd.Process, unix.SIGKILL, d.done, 15*time.Second) }

// Signal sends sig to the daemon.
func (d *Daemon) Signal(sig os.Signal) { _ = d.cmd.Process.Signal(sig) }

// LogText is what the daemon has logged.
func (d *Daemon) LogText() string {
	b, err := os.ReadFile(d.Log)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Get asks the API and decodes the answer.
func (d *Daemon) Get(path string, into any) error { return d.Ask(http.MethodGet, path, "", into) }

// Ask sends a request to the API and decodes the answer, if into is not nil.
func (d *Daemon) Ask(method, path, body string, into any) error {
	for {
		again, err := d.ask(method, path, body, into)
		if !again {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// ask tells whether it is to be asked again, as it was not begun with: the daemon is being replaced.
func (d *Daemon) ask(method, path, body string, into any) (again bool, err error) {
	req, err := http.NewRequest(method, "http://rootless-ovl"+path, strings.NewReader(body))
	if err != nil {
		return false, err
	}
	resp, err := d.http.Do(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return false, err
	}
	if resp.StatusCode/100 != 2 {
		return resp.Header.Get("Retry-After") != "", fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	if into == nil {
		return false, nil
	}
	return false, json.Unmarshal(answer, into)
}

// Status asks the daemon for its status.
func (d *Daemon) Status() Status {
	d.t.Helper()
	var s Status
	if err := d.Get("/v1/status", &s); err != nil {
		d.t.Fatalf("%s: status: %v", d.Host.Name, err)
	}
	return s
}

// Attachments asks the daemon for its attachments.
func (d *Daemon) Attachments() []Attachment {
	d.t.Helper()
	var list []Attachment
	if err := d.Get("/v1/attachments", &list); err != nil {
		d.t.Fatalf("%s: attachments: %v", d.Host.Name, err)
	}
	return list
}

// Drops adds up the drop counters of one reason, or of all when reason is empty.
func (d *Daemon) Drops(reason string) uint64 {
	d.t.Helper()
	var sum uint64
	for name, n := range d.Status().Counters["drops"] {
		if reason == "" || name == reason {
			sum += n
		}
	}
	return sum
}

// OpenFiles counts the daemon's descriptors.
func (d *Daemon) OpenFiles() int {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.PID))
	if err != nil {
		d.t.Fatalf("descriptors of the daemon: %v", err)
	}
	return len(entries)
}

// Threads counts the daemon's threads.
func (d *Daemon) Threads() int {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", d.PID))
	if err != nil {
		d.t.Fatalf("threads of the daemon: %v", err)
	}
	return len(entries)
}

// Goroutines ends the daemon with SIGQUIT, which makes the Go runtime list every goroutine, and counts them.
func (d *Daemon) Goroutines() int {
	d.t.Helper()
	if !stop(d.cmd.Process, unix.SIGQUIT, d.done, 15*time.Second) {
		d.t.Errorf("%s: the daemon did not end within 15 s of SIGQUIT", d.Host.Name)
	}
	count := 0
	for line := range strings.Lines(d.LogText()) {
		if strings.HasPrefix(line, "goroutine ") && strings.HasSuffix(line, ":\n") {
			count++
		}
	}
	return count
}
